"""pull, list and info: checkpoints of a hub on loopback, in a cache of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stub import Hub, running_hub

from deepseek_vl2.cli import hub_cache
from deepseek_vl2.cli import pull as pull_module
from deepseek_vl2.cli.main import main
from deepseek_vl2.cli.releases import ARCHITECTURES, RELEASES, release_facts
from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.utils.demo import write_demo_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAME = "somebody/small-vl2"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    directory = write_demo_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    (directory / "pytorch_model.bin").write_bytes(b"another format")
    (directory / "evil.py").write_text("never wanted")
    with running_hub() as hub:
        hub.add(NAME, directory)
        hub.repositories["somebody/llama"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x"}
        hub.repositories["somebody/text"] = {"README.md": b"no model"}
        half = {file: content for file, content in hub.repositories[NAME].items() if file != "tokenizer.json"}
        hub.repositories["somebody/half"] = half
        hub.refusals["somebody/gated"] = (403, "GatedRepo")
        hub.refusals["somebody/broken"] = (500, "")
        yield hub


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Run:
    """Run the program in a process of its own: the hub's library reads its settings when it is imported."""

    def in_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        return subprocess.run(
            [sys.executable, "-m", "deepseek_vl2.cli", *arguments],
            cwd=ROOT, env={**kept, **settings, **variables}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return in_process


def test_a_checkpoint_is_pulled_listed_and_found_offline(run: Run, hub: Hub) -> None:
    done = run("pull", NAME)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    wanted = {file for file in hub.repositories[NAME] if not file.endswith((".bin", ".py"))}
    assert {file.name for file in path.iterdir()} == wanted
    assert (path / "model.safetensors").read_bytes() == hub.repositories[NAME]["model.safetensors"]
    assert f"Downloading {NAME}: {len(wanted)} files, 2 MB" in done.stderr and "Traceback" not in done.stderr

    listed = json.loads(run("list", "--json").stdout)
    (found,) = [model for model in listed["models"] if model["name"] == NAME]
    assert found["path"] == str(path) and not found["missing"] and found["bytes"] > 1_000_000
    assert [model["name"] for model in listed["to_pull"]] == list(RELEASES)
    assert f"{NAME} " in (text := run("list").stdout) and "deepseek-vl2 pull MODEL" in text

    asked = len(hub.asked)
    (path / "tokenizer.json").unlink()  # as after an interruption
    assert f"incomplete: `deepseek-vl2 pull {NAME}` goes on" in run("list").stdout
    assert len(hub.asked) == asked  # looking asks nobody
    assert run("pull", NAME).returncode == 0 and (path / "tokenizer.json").is_file()
    weights = [line for line in hub.asked[asked:] if line.startswith("GET") and "safetensors" in line]
    assert not weights  # what is there does not come again


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["somebody/nothing"], "There is no repository somebody/nothing at http://127.0.0.1"),
        (["deepseek-ai/deepseek-vl2-tny"], "Did you mean deepseek-ai/deepseek-vl2-tiny?"),
        ([NAME, "--revision", "never"], f"{NAME} has no revision 'never'."),
        (["somebody/gated"], "somebody/gated is gated: ask for access"),
        (["somebody/llama"], "not a DeepSeek-VL2 checkpoint: its config.json says model_type 'llama'"),
        (["somebody/text"], "holds no checkpoint"),
        (["somebody/half"], "lacks tokenizer.json"),
        (["somebody/broken"], "answered 500"),
    ],
)
def test_what_a_hub_refuses_is_named_in_a_line(run: Run, arguments: list[str], words: str) -> None:
    done = run("pull", *arguments)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("deepseek-vl2 pull: error: ") and "Traceback" not in done.stderr


def test_a_hub_that_is_away_is_named_in_a_line(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = run("pull", NAME, HF_ENDPOINT=closed)
    assert done.returncode == 1 and f"The hub ({closed}) cannot be reached" in done.stderr, done.stderr
    offline = run("pull", NAME, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "HF_HUB_OFFLINE is set" in offline.stderr, offline.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek-vl2-tiny", "Did you mean deepseek-ai/deepseek-vl2-tiny?"),
        ("a/b/c", "no id of a hub repository"),
        (str(ROOT), "is a directory here"),
    ],
)
def test_names_that_no_hub_can_have(name: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", name]) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("deepseek-vl2 pull: error: ") and error.count("\n") == 1


def test_what_ships_needs_no_pull(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nano", "demo"):
        assert main(["pull", name]) == 0
        assert "needs no download" in capsys.readouterr().err


def test_a_disk_that_is_too_small_is_told_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pull_module, "cache_directory", lambda: tmp_path / "hub")
    monkeypatch.setattr(hub_cache, "cache_directory", lambda: tmp_path / "hub")
    usage = shutil.disk_usage(tmp_path)._replace(free=5_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"needs 6\.74 GB more, and .*hub has 5\.00 GB free"):
        pull_module.check_space("deepseek-ai/deepseek-vl2-tiny", {"model.safetensors": 6_741_002_880})


def test_a_model_that_is_not_there_is_downloaded_by_the_command_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once: what the cache holds whole is loaded as it is there, and the hub is not asked."""
    snapshot = tmp_path / "models--somebody--small-vl2" / "snapshots" / "main"
    pulled: list[str] = []

    def download(name: str) -> Path:
        pulled.append(name)
        snapshot.parent.mkdir(parents=True)
        return write_demo_checkpoint(snapshot)

    monkeypatch.setattr(hub_cache, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(pull_module, "download", download)
    monkeypatch.setattr("deepseek_vl2.cli.options.check_reachable", lambda name: None)
    for _ in range(2):
        assert main(["ask", "Hi", "--model", NAME, "--max_new_tokens", "2", "--json", "--device", "cpu"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == NAME
    assert pulled == [NAME]


def test_checkpoints_of_other_families_and_shards_that_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_cache, "cache_directory", lambda: tmp_path)
    assert hub_cache.cached_checkpoints() == []
    other = tmp_path / "models--meta--llama" / "snapshots" / "1"
    ours = tmp_path / "models--a--vl2-b" / "snapshots" / "1"
    for folder, kind in ((other, "llama"), (ours, "deepseek_vl_v2")):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    for file in ("processor_config.json", "tokenizer.json", "model-00001-of-00002.safetensors"):
        (ours / file).write_text("{}")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (ours / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (found,) = hub_cache.cached_checkpoints()
    assert found.name == "a/vl2-b" and found.missing == ("model-00002-of-00002.safetensors",)


def test_info_of_a_release_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def touched(*arguments: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", touched)
    monkeypatch.setattr(socket.socket, "connect", touched)
    monkeypatch.setattr(hub_cache, "cache_directory", lambda: tmp_path)
    for name in RELEASES:
        assert main(["info", name, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)["model"]
        assert facts["name"] == name and facts["parameters"]["total"] == RELEASES[name][0]
        assert main(["info", name]) == 0
        assert "experts a token" in capsys.readouterr().out


def test_what_is_known_of_the_releases_is_what_their_configs_say() -> None:
    from deepseek_vl2.cli.info import model_facts

    for kind, name in zip(("tiny", "small", "base"), ARCHITECTURES, strict=True):
        read = model_facts(str(ROOT / "tests" / "golden" / "releases" / kind), 4096)
        read.pop("problem")  # there are no weights
        assert release_facts(name, 4096) == {**read, "name": name}
    from deepseek_vl2.cli.releases import MODEL_TYPE

    assert DeepseekVLV2Config.model_type == MODEL_TYPE
