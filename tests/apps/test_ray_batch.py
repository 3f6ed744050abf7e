"""``batch --ray`` on a cluster of one or two nodes: an actor and a node are killed, and each line has one answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ray_support import actors_of, kill_actor, loopback_cluster

from deepseek_vl2.cli.main import main
from deepseek_vl2.utils.io import nano_is_installed

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif(not nano_is_installed(), reason="nano is not installed"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found in /proc"),
]

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--max_new_tokens", "4", "--dtype", "float32", "--device", "cpu", "--batch_size", "8", "--quiet")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Run a cluster of two nodes that the test may break."""
    with loopback_cluster() as running:
        yield running


def start(cluster: Any, questions: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    """Start the command on a cluster."""
    command = [sys.executable, "-m", "deepseek_vl2.cli", "batch", str(questions), str(output)]
    return subprocess.Popen(
        [*command, *OPTIONS, "--ray-address", cluster.address, *options],
        cwd=questions.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def write_questions(directory: Path, lines: int) -> Path:
    """Write questions, every tenth about a tiny picture, and a line that is none."""
    Image.new("RGB", (24, 24), "red").save(directory / "red.png")
    questions: list[Any] = [
        {"prompt": f"What colour, {number}?", "id": number, **({"images": ["red.png"]} if number % 10 == 5 else {})}
        for number in range(lines - 1)
    ]
    path = directory / "q.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions) + "no question\n", "utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something is so while the command runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alone(questions: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Return what one process answers."""
    monkeypatch.chdir(questions.parent)
    assert main(["batch", str(questions), str(output), *OPTIONS]) == 1
    return records(output)


def test_a_killed_actor_is_replaced_and_each_line_has_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, output = write_questions(tmp_path, 16), tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part0"
    with loopback_cluster(nodes=1) as cluster:
        process = start(cluster, questions, output, "--batch_size", "2")
        try:
            wait_for(process, lambda: part.exists() and part.read_bytes().count(b"\n") >= 1)
            kill_actor(cluster.head_node, "LineWorker")
            assert part.read_bytes().count(b"\n") < 15
            errors = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert errors.count("A worker died and is replaced") == 1, errors
    assert [record["line"] for record in records(output)] == list(range(1, 16))
    (error,) = records(tmp_path / "a.jsonl.errors")
    assert error["line"] == 16 and "Not JSON" in error["error"]
    assert records(output) == alone(questions, tmp_path / "b.jsonl", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("lines", [60, 1000])
def test_a_killed_actor_and_a_killed_node_lose_and_double_nothing(
    lines: int, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, output = write_questions(tmp_path, lines), tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part0"
    (second,) = cluster.worker_nodes
    process = start(cluster, questions, output)
    try:

        def answered(least: int) -> Callable[[], bool]:
            return lambda: part.exists() and part.read_bytes().count(b"\n") >= least

        wait_for(process, lambda: bool(actors_of(cluster.head_node, "LineWorker")))
        wait_for(process, answered(lines // 10))
        kill_actor(cluster.head_node, "LineWorker")
        if lines > 100:  # both are at work again before the next one goes
            wait_for(process, answered(lines // 2))
        cluster.remove_node(second, allow_graceful=False)
        assert not answered(lines)()
        errors = process.communicate(timeout=500)[1]
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert errors.count("A worker died and is replaced") >= 1, errors
    found = records(output)
    assert [record["line"] for record in found] == list(range(1, lines))
    (error,) = records(tmp_path / "a.jsonl.errors")
    assert error["line"] == lines and "Not JSON" in error["error"]
    assert found == alone(questions, tmp_path / "b.jsonl", monkeypatch)
    assert not part.exists() and not (tmp_path / "a.jsonl.lock").exists()


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions, output = write_questions(tmp_path, 200), tmp_path / "a.jsonl"
    part = tmp_path / "a.jsonl.part0"
    process = start(cluster, questions, output)
    try:
        wait_for(process, lambda: part.exists() and part.read_bytes().count(b"\n") >= 50)
        process.kill()
        process.wait(30)
        before = len(records_of_part(part))
        process = start(cluster, questions, output)
        assert process.wait(200) == 1
    finally:
        process.kill()
    assert before >= 50
    assert records(output) == alone(questions, tmp_path / "b.jsonl", monkeypatch)


def records_of_part(part: Path) -> list[str]:
    return [line for line in part.read_text("utf-8").splitlines() if line.endswith("}")]
