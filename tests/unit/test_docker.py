"""The container images and the compose file say what they must: no root, no secrets, a health check, a cache."""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_vl2.serve.api.command import KEY_VARIABLE, add_arguments

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
MENTIONED = (ROOT / "docs" / "docker.md", FOLDER / "compose.yaml", DOCKERFILE)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def final_stage() -> list[tuple[str, str]]:
    """Return the instructions of the image that is run."""
    found = instructions()
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Return the compose file, merged as compose merges it."""
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed (the extra 'dev' brings it)")
def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run(["hadolint", DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_runs_the_server_as_nobody_in_particular() -> None:
    last = dict(final_stage())
    user, _, group = last["USER"].partition(":")
    assert int(user) > 0 and int(group) > 0
    assert last["VOLUME"] == "/cache" and "/health" in last["HEALTHCHECK"]
    names = [name for name, _ in final_stage()]
    assert names.index("USER") < names.index("ENTRYPOINT")


def test_what_is_started_is_a_command_of_the_package() -> None:
    last = dict(final_stage())
    program, command, *options = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    assert (program, command) == ("deepseek-vl2", "serve")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args(options)
    assert (parsed.host, str(parsed.port)) == ("0.0.0.0", last["EXPOSE"])
    check = json.loads(last["HEALTHCHECK"].partition("CMD ")[2])
    compile(check[2], "health check", "exec")
    assert f":{parsed.port}/health" in check[2]


def test_caches_are_in_the_volume() -> None:
    variables = dict(pair.split("=", 1) for pair in dict(final_stage())["ENV"].split())
    for name in ("HF_HOME", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert Path(variables[name]).is_relative_to("/cache")


def test_what_is_copied_is_there_and_not_left_out() -> None:
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    ignored = [line for line in lines if not line.startswith("#")]
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[0] == "*"
    copies = [rest.split() for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    copied = [name for words in copies for name in words[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in allowed) for name in copied)
    assert set(allowed) == set(copied), "more is sent to the builder than the image copies"


def test_both_devices_can_be_built(compose: dict[str, Any]) -> None:
    choices = re.search(r"case .*? esac", " ".join(rest for name, rest in instructions() if name == "RUN"))
    assert choices is not None
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        build = compose["services"][name]["build"]
        assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
        assert build["args"] == {"DEVICE": device} and f"{device})" in choices[0]
    (device,) = compose["services"]["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
    assert "deploy" not in compose["services"]["cpu"]


@pytest.mark.parametrize("name", ["gpu", "cpu"])
def test_services_are_closed_by_default(compose: dict[str, Any], name: str) -> None:
    service = compose["services"][name]
    assert service["profiles"] == [name]
    assert service["ports"] == ["${BIND:-127.0.0.1}:${PORT:-8000}:8000"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
    assert service["volumes"] == ["cache:/cache"] and "cache" in compose["volumes"]
    assert KEY_VARIABLE in service["environment"]


def test_no_secret_is_written_down(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for variable, value in service["environment"].items():
            assert value == f"${{{variable}:-}}"
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|KEY|SECRET|PASSWORD", rest)


def test_the_page_names_profiles_and_variables_that_exist(compose: dict[str, Any]) -> None:
    text = "\n".join(path.read_text() for path in MENTIONED)
    assert set(re.findall(r"--profile (\w+)", text)) == set(compose["services"])
    assert set(re.findall(r"DEVICE=(\w+)", text)) == {"cuda", "cpu"}
    written = (FOLDER / "compose.yaml").read_text()
    for variable in re.findall(r"`([A-Z_]{3,})`", MENTIONED[0].read_text()):
        assert f"${{{variable}:-" in written, variable
