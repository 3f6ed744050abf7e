"""The console command: ask, ground, info, and its front, in one process; a few runs in a process of their own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deepseek_vl2.cli import main as front
from deepseek_vl2.cli.main import COMMANDS, as_declared, main
from deepseek_vl2.utils import io as package_io
from deepseek_vl2.utils.demo import write_demo_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "images" / "table.png")
GIRAFFES = str(ROOT / "images" / "visual_grounding_1.jpeg")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_demo_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the model say what the test puts into the list, whatever it is asked; the last text over and over."""
    from deepseek_vl2.serve.streaming import TextStream

    texts: list[str] = []

    def next_piece(self: Any) -> str | None:
        if self.inputs is not None:
            self.inputs, self.letters = None, iter(texts.pop(0) if len(texts) > 1 else texts[0])
        letter = next(self.letters, None)
        if letter is None:
            self.ended, self.answer.finish_reason = True, "stop"
        else:
            self.answer.text += letter
        return letter

    monkeypatch.setattr(sys.modules[TextStream.__module__]._Run, "next_piece", next_piece)
    return texts


# ---------------------------------------------------------------- the front


def run_apart(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def test_help_imports_nothing_heavy() -> None:
    """Without torch, transformers and PIL the interpreter's own start is most of the time."""
    code = """
import contextlib, sys, time
begin = time.perf_counter()
from deepseek_vl2.cli.main import main
for arguments in (["--help"], *([name, "--help"] for name in ("ask", "chat", "ground", "batch", "info"))):
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code == 0
assert not {"torch", "transformers", "PIL", "numpy"} & set(sys.modules), sorted(sys.modules)
print("SECONDS", time.perf_counter() - begin)
"""
    done = run_apart("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.rpartition("SECONDS")[2]) < 1
    assert done.stdout.count("examples:") == 6
    assert all(name in done.stdout for name in COMMANDS)


def test_the_command_runs_in_a_process_of_its_own(model_path: str) -> None:
    arguments = ("-m", "deepseek_vl2.cli", "ask", "Hi", "--model", model_path, "--max-new-tokens", "4", "--json")
    done = run_apart(*arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_weights_are_packed_when_asked(kind: str, model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    from deepseek_vl2.cli.options import add_model_arguments, load
    from deepseek_vl2.models.quantized_layers import PackedExperts, PackedLinear

    parser = ArgumentParser()
    add_model_arguments(parser)
    arguments = ["--model", model_path, "--device", "cpu", "--quantize", kind, "--quantize_head", "int8"]
    model = load(parser.parse_args(arguments)).model
    assert any(isinstance(m, PackedExperts) and m.formats["gate_up_proj"].kind == kind for m in model.modules())
    head = model.get_output_embeddings()
    assert isinstance(head, PackedLinear) and head.format.kind == "int8"
    assert main(["ask", "Hi", *arguments, "--max_new_tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["ask"], ["ask", "x", "--top_p", "2"], ["ask", "x", "--temperature", "hot"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "usage: deepseek-vl2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "x", "--image", "no_such.png"], "no_such.png"),
        (["ask", "x", "--image", str(ROOT / "README.md")], "not an image"),
        (["ask", "x", "--model", "./no/such"], "no checkpoint directory"),
        (["ask", "x", "--device", "cuda:99"], "no device cuda:99"),
        (["ask", "x", "--device", "teapot"], "no kind of device"),
        (["ask", ""], "question is empty"),
        (["ask", " \t"], "question is empty"),
        (["ask", "x", "--image", "s3://bucket/a.png"], "s3://bucket/a.png is an address of 's3'"),
        (["ask", "x", "--image", "/dev/zero"], "/dev/zero is a device"),
        (["ask", "x", "--output", "a.jpg"], "no image to draw"),
        (["ask", "x", "--image", PICTURE, "--output", "a.txt"], "name of an image file"),
        (["ask", "x", "--image", PICTURE, "--output", "a.psd"], "name of an image file"),
        (["ask", "x", "--image", PICTURE, "--output", "no/such/a.jpg"], "no directory"),
        (["ground", PICTURE], "Say what to find"),
        (["ground", PICTURE, "a<|/ref|>"], "must not hold the tag"),
        (["ground", PICTURE, "x", "--example_box", "1,2,3,4"], "needs --example"),
        (["info", "./no/such"], "no checkpoint directory"),
        (["info", "~no_such_user/model"], "no checkpoint directory"),
        (["ask", "x", "--quantize_head", "int8"], "needs --quantize"),
        (["ask", "x", "--device", "cpu", "--max_memory", "16 apples"], "no size of memory"),
        (["ask", "x", "--device", "cpu", "--max_memory", "100kB"], "0.0 GB allowed"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("deepseek-vl2 ") and error.count("\n") == 1


def test_an_unreachable_hub_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("deepseek_vl2.cli.options.socket.getaddrinfo", unknown)
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    for arguments in (["ask", "x", "--model", "nobody/nothing"], ["info", "nobody/nothing"]):
        assert main(arguments) == 1
        assert "hub (huggingface.co) cannot be reached" in capsys.readouterr().err


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, argv: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(front, "run_command", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["ask", "x"])


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 0)])
def test_interruptions(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def interrupted(name: str, argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(front, "run_command", interrupted)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main(["ask", "x"]) == code


def test_warnings_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warned(name: str, argv: list[str]) -> int:
        warnings.warn("The prompt is long.", stacklevel=1)
        return 0

    monkeypatch.setattr(front, "run_command", warned)
    assert main(["ask", "x"]) == 0
    assert capsys.readouterr().err == "Note: The prompt is long.\n"


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Say what to find"):
        main(["--traceback", "ground", PICTURE])


def test_a_missing_extra_is_one_helpful_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'fastapi'", name="fastapi")

    late = types.SimpleNamespace(main=lambda argv: missing("fastapi"))  # imported when it runs
    for import_module in (missing, lambda name: late):
        monkeypatch.setattr(front, "import_module", import_module)
        assert main(["serve"]) == 1
        assert 'pip install "deepseek_vl2[serve]"' in capsys.readouterr().err


def test_commands_of_other_modules_are_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    parsing = types.SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--port_number", type=int), main=lambda args: seen.append(args)
    )
    bare = types.SimpleNamespace(main=lambda argv, prog=None: (seen.append((argv, prog)), 3)[1])
    modules = {COMMANDS["demo"].module: parsing, COMMANDS["finetune"].module: bare}
    monkeypatch.setattr(front, "import_module", modules.__getitem__)
    assert main(["demo", "--port-number", "7"]) == 0
    assert main(["finetune", "--rate", "1"]) == 3
    assert seen[0].port_number == 7
    assert seen[1] == (["--rate", "1"], "deepseek-vl2 finetune")


def test_options_may_be_spelled_with_hyphens_or_underscores() -> None:
    declared = ("--max_new_tokens", "--api-key", "--stop")
    given = ["--max-new-tokens", "-3", "a-b", "--api_key=x-y", "--api-key", "--stop", "--un-known", "--", "--api_key"]
    expected = [
        "--max_new_tokens",
        "-3",
        "a-b",
        "--api-key=x-y",
        "--api-key",
        "--stop",
        "--un-known",
        "--",
        "--api_key",
    ]
    assert as_declared(given, declared) == expected


# ---------------------------------------------------------------- ask


def test_ask_streams_the_answer(said: list[str], model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    said.append("A table.")
    assert main(["ask", "What?", "--image", PICTURE, "--model", model_path]) == 0
    assert capsys.readouterr().out == "A table.\n"


def test_a_question_longer_than_what_the_model_knows(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 4085  # of 4,096 tokens, with the template's
    assert main(["ask", long, "-m", model_path, "--max_new_tokens", "50"]) == 0
    assert "The answer was cut off after 3 tokens (the model knows no more)" in capsys.readouterr().err
    for command in (["ask", long * 2], ["ground", PICTURE, long * 2]):
        assert main([*command, "-m", model_path]) == 1
        error = capsys.readouterr().err
        assert "tokens; the model knows 4,096, its answer's included" in error and "Traceback" not in error


def test_ask_json(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "What?", "-i", PICTURE, "-i", GIRAFFES, "-m", model_path, "--max_new_tokens", "4", "--json"]
    assert main([*arguments, "--temperature", "1", "--seed", "3", "--system", "Be brief."]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["seed"] == 3 and answer["finish_reason"] == "length"
    assert [image["width"] for image in answer["images"]] == [Image.open(p).width for p in (PICTURE, GIRAFFES)]
    assert answer["usage"]["prompt_tokens"] > 842 and answer["usage"]["completion_tokens"] == 4
    assert set(answer["grounding"]) == {"objects", "problems"}


def test_ask_reads_the_question_from_the_input(
    said: list[str], model_path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said.append("Yes")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Is this read?\n"))
    assert main(["ask", "-", "--model", model_path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Is this read?"


def test_ask_draws(said: list[str], model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said.append("<|ref|>it<|/ref|><|det|>[[100, 100, 900, 900]]<|/det|>")
    output = tmp_path / "drawn.png"
    assert main(["ask", "x", "-i", GIRAFFES, "-m", model_path, "--output", str(output)]) == 0
    assert Image.open(output).size == Image.open(GIRAFFES).size
    assert "boxes are drawn" in capsys.readouterr().err


# ---------------------------------------------------------------- ground


def test_ground_writes_drawing_and_boxes(
    said: list[str],
    model_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said.append("<|ref|>giraffes<|/ref|><|det|>[[0, 0, 999, 500], [5, 5, 2, two]]<|/det|>")
    assert main(["ground", GIRAFFES, "giraffes", "--all", "--model", model_path]) == 0
    written = json.loads((tmp_path / "visual_grounding_1_boxes.json").read_text(encoding="utf-8"))
    width, height = Image.open(GIRAFFES).size
    assert written["objects"][0]["pixel_boxes"] == [[0, 0, width, int(500 / 999 * height)]]
    assert written["problems"][0]["kind"] == "not a box"
    assert Image.open(tmp_path / "visual_grounding_1_boxes.jpg").size == (width, height)
    assert "'two'" in capsys.readouterr().err


def test_ground_coco(said: list[str], model_path: str, tmp_path: Path) -> None:
    said.append("<|ref|>a<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>")
    files = ["--output", str(tmp_path / "d.png"), "--boxes", str(tmp_path / "b.json")]
    assert main(["ground", GIRAFFES, "a", "--coco", "--model", model_path, *files]) == 0
    coco = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    assert coco["images"][0]["file_name"] == Path(GIRAFFES).name and len(coco["annotations"]) == 1


def test_ground_by_example_speaks_of_the_second_image(said: list[str], model_path: str, tmp_path: Path) -> None:
    said.append("<|ref|>mug<|/ref|><|det|>[[0, 0, 999, 999]]<|/det|>")
    files = ["--output", str(tmp_path / "d.png"), "--boxes", str(tmp_path / "b.json")]
    example = ["--example", PICTURE, "--example_box", "100,100,500,500"]
    assert main(["ground", GIRAFFES, *example, "--model", model_path, *files]) == 0
    (found,) = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["objects"]
    assert found["image"] == 1 and found["pixel_boxes"] == [[0, 0, *Image.open(GIRAFFES).size]]


def test_ground_without_a_box(said: list[str], model_path: str, tmp_path: Path) -> None:
    said.append("There is none.")
    files = ["--output", str(tmp_path / "d.png"), "--boxes", str(tmp_path / "b.json")]
    assert main(["ground", GIRAFFES, "a", "--chat", "--model", model_path, *files]) == 0
    assert json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["objects"] == []
    assert not (tmp_path / "d.png").exists()


# ---------------------------------------------------------------- info


def test_info_of_a_checkpoint(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", model_path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    counts = facts["model"]["parameters"]
    assert counts["total"] == counts["vision"] + counts["projector"] + counts["language"]
    assert counts["activated"] < counts["total"]
    assert facts["model"]["file_bytes"] > counts["total"] * 4  # float32 and headers
    assert facts["devices"][-1]["device"] == "cpu" and facts["versions"]["torch"]
    assert {row["model"] for row in facts["fits"]} >= {model_path, "deepseek-ai/deepseek-vl2"}
    precisions = {row["precision"] for row in facts["fits"] if row["model"] == model_path}
    assert precisions == {"bfloat16", "int8", "int4", "fp8"}
    trained = {row["method"]: row["needed"] for row in facts["training"]}
    assert trained["full"] == 16 * counts["total"]
    assert trained["LoRA bfloat16"] > trained["QLoRA int8"] > trained["QLoRA int4"] > trained["QLoRA nf4"] > 0
    assert main(["info", model_path]) == 0
    told = capsys.readouterr().out
    assert "3 of 8 experts a token" in told and "fine-tuning" in told and "QLoRA nf4" in told
    assert main(["info"]) == 0
    assert "fine-tuning" not in capsys.readouterr().out


def test_info_counts_the_releases(capsys: pytest.CaptureFixture[str]) -> None:
    """The released configs, without weights: totals as published, cache as the architecture says."""
    from deepseek_vl2.cli.info import RELEASES, model_facts
    from deepseek_vl2.cli.releases import release_facts

    for kind, name in zip(("tiny", "small", "base"), RELEASES, strict=True):
        facts = model_facts(str(ROOT / "tests" / "golden" / "releases" / kind), 4096)
        weights = facts["weights_bytes"]
        counts = (facts["parameters"]["total"], weights["int8"], weights["int4"], facts["cache_bytes_per_token"])
        assert counts == RELEASES[name] and weights["fp8"] == weights["int8"]
        assert facts["training_bytes"] == release_facts(name, 4096)["training_bytes"]
        assert facts["image_tokens"]["1024x768"] == 1415
        assert "no safetensors files" in facts["problem"]


def test_info_names_what_is_wrong_with_a_checkpoint(
    model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path(model_path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["language_config"]["num_hidden_layers"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["info", str(tmp_path)]) == 0
    assert "missing tensors" in capsys.readouterr().err


# ---------------------------------------------------------------- names of models


def test_model_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert package_io.resolve_model_path("deepseek-ai/deepseek-vl2-tiny") == "deepseek-ai/deepseek-vl2-tiny"
    assert package_io.resolve_model_path(tmp_path) == tmp_path
    monkeypatch.setattr(package_io, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match='lacks the small model "nano"'):
        package_io.resolve_model_path("nano")
    (tmp_path / "assets" / "nano").mkdir(parents=True)
    (tmp_path / "assets" / "nano" / "config.json").write_text("{}")
    assert package_io.resolve_model_path("nano") == tmp_path / "assets" / "nano"
