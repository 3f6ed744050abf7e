"""The files of deploy/: whole, of one mind with the code and with one another, and open to nobody by mistake."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("fastapi")

from deepseek_vl2.integrations.ray.app import app_options, server_options  # noqa: E402
from deepseek_vl2.integrations.ray.replica import read_options  # noqa: E402

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
SCRIPTS = sorted((DEPLOY / "ray").glob("*.sh"))
API_VERSIONS = {
    "ConfigMap": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
}


class StrictLoader(yaml.SafeLoader):  # type: ignore[misc,name-defined]
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]  # before others are merged in
        assert len(keys) == len(set(keys)), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text("utf-8"), StrictLoader))


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """Return all objects of Kubernetes by kind and name."""
    found = [document for path in MANIFESTS for document in documents(path)]
    return {(one["kind"], one.get("metadata", {}).get("name", "")): one for one in found}


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each deployment's name, its object and its only container."""
    for (kind, name), one in manifests().items():
        if kind == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            yield name, one, container


def test_the_application_takes_its_arguments() -> None:
    (config,) = documents(DEPLOY / "ray" / "serve.yaml")
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert (module, name) == ("deepseek_vl2.integrations.ray.app", "build")
    options = app_options(application["args"])
    args = read_options(server_options(options))
    assert args.name == options.model and args.image_cache_mib == 2048
    assert config["http_options"]["request_timeout_s"] > args.request_seconds


def test_ray_serve_takes_the_config() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    (config,) = documents(DEPLOY / "ray" / "serve.yaml")
    assert schema.ServeDeploySchema.parse_obj(config).applications[0].args == config["applications"][0]["args"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"checkpoint": "nano"}, "checkpoint"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "less than min_replicas"),
        ({"options": ["--slots", "none"]}, "--slots"),
        ({"options": ["--port", "80"]}, "http_options"),
        ({"options": ["--api-key=x"]}, "DEEPSEEK_VL2_API_KEY"),
        ({"options": "--unknown 1"}, "--unknown"),
    ],
)
def test_wrong_arguments_are_told_before_anything_starts(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        app_options(args)


def test_arguments_of_a_command_line_are_texts() -> None:
    options = app_options({"max_replicas": "4", "gpus": "0", "options": "--slots 8 --dtype float32"})
    assert (options.max_replicas, options.gpus) == (4, 0)
    assert server_options(options) == ["nano", "--max_body_mib", "32", "--slots", "8", "--dtype", "float32"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_read_by_a_shell(script: Path) -> None:
    done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, done.stderr
    assert script.stat().st_mode & 0o111


def test_manifests_are_objects_that_are_listed() -> None:
    (listed,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert sorted([*listed["resources"], "kustomization.yaml"]) == [path.name for path in MANIFESTS]
    for (kind, name), one in manifests().items():
        assert one["apiVersion"] == API_VERSIONS[kind]
        if kind != "Kustomization":
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name)
            assert one["metadata"]["labels"]["app"] == "deepseek-vl2"


def test_the_config_map_holds_the_files_of_the_application() -> None:
    held = manifests()["ConfigMap", "deepseek-vl2"]["data"]
    assert held == {path.name: path.read_text("utf-8") for path in [DEPLOY / "ray" / "serve.yaml", *SCRIPTS]}


def test_pods_are_found_and_find_what_they_name() -> None:
    known = manifests()
    (image,) = known["Kustomization", ""]["images"]
    for name, one, container in pods():
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        pod = one["spec"]["template"]["spec"]
        assert container["image"] == image["name"], "kustomize sets it"
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["command"][-1].rpartition("/")[2] in known["ConfigMap", "deepseek-vl2"]["data"]
        assert pod["terminationGracePeriodSeconds"] > 120, name
    for kind, name in known:
        if kind == "Service":
            selector = known[kind, name]["spec"]["selector"].items()
            matched = [c for _, one, c in pods() if selector <= one["spec"]["template"]["metadata"]["labels"].items()]
            assert matched
            for port in known[kind, name]["spec"]["ports"]:
                assert all(port["targetPort"] in {p["name"] for p in container["ports"]} for container in matched)
    ((_, _, worker),) = [pod for pod in pods() if pod[0] == "deepseek-vl2-worker"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    head = next(variable["value"] for variable in worker["env"] if variable["name"] == "RAY_HEAD")
    assert ("Service", head.partition(":")[0]) in known


def test_nobody_uses_the_model_or_the_cluster_without_a_key() -> None:
    for _, one, container in pods():
        secrets = {v["name"]: v["valueFrom"]["secretKeyRef"] for v in container["env"] if "valueFrom" in v}
        assert set(secrets) == {"DEEPSEEK_VL2_API_KEY", "RAY_AUTH_TOKEN"}
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert one["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        assert one["spec"]["template"]["spec"]["automountServiceAccountToken"] is False
    policy = manifests()["NetworkPolicy", "deepseek-vl2"]["spec"]
    opened = [rule for rule in policy["ingress"] if "from" not in rule]
    assert [rule["ports"] for rule in opened] == [[{"port": 8000, "protocol": "TCP"}]]


def test_compose_starts_a_head_and_workers_of_one_image() -> None:
    (composed,) = documents(DEPLOY / "compose.ray.yaml")
    services = composed["services"]
    assert set(services) == {"head", "worker"}
    for service in services.values():
        assert service["image"].startswith("${DEEPSEEK_VL2_IMAGE:-")
        script = service["entrypoint"][-1].rpartition("/")[2]
        assert (DEPLOY / "ray" / script).is_file() and "./ray:/etc/deepseek-vl2:ro" in service["volumes"]
        for variable in ("DEEPSEEK_VL2_API_KEY", "RAY_AUTH_TOKEN"):  # compose ends where they are not set
            assert service["environment"][variable].startswith(f"${{{variable}:?")
        assert {volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")} == set(
            composed["volumes"]
        )
    assert services["head"]["ports"] == ["${DEEPSEEK_VL2_ADDRESS:-127.0.0.1:8000}:8000"]
    assert "ports" not in services["worker"]
