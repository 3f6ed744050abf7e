"""What every command has in common: help at once, suggestions, one form of error, tracebacks on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_vl2.cli.main import COMMANDS, command_parser, main
from deepseek_vl2.cli.parser import names_image, spread_images, suggestion

ROOT = Path(__file__).resolve().parents[2]
PICTURE = str(ROOT / "images" / "table.png")
HEAVY = ("torch", "transformers", "PIL", "numpy", "huggingface_hub", "gradio", "fastapi", "pydantic", "accelerate")

HELP = """
import contextlib, io, json, sys
from deepseek_vl2.cli.main import COMMANDS, main
seen = {}
for name in ("", *COMMANDS):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([name, "--help"] if name else ["--help"])
    seen[name] = [text.getvalue(), sorted(sys.modules)]
print(json.dumps(seen))
"""


def apart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    """What takes seconds to import is left to the command's work: the names say which, whatever the machine's speed."""
    done = apart("-c", HELP)
    assert done.returncode == 0, done.stderr
    for name, (text, modules) in json.loads(done.stdout).items():
        assert f"usage: deepseek-vl2 {name}".strip() in text and "--traceback" in text, name
        assert not set(HEAVY) & set(modules), name


@pytest.mark.parametrize(
    "form",
    [
        ("finetune.py",),
        ("inference.py",),
        ("web_demo.py",),
        ("-m", "deepseek_vl2.serve.api"),
        ("-m", "deepseek_vl2.synthetic.evaluate"),
        ("-m", "deepseek_vl2.training.finetune"),
    ],
    ids=" ".join,
)
def test_so_does_the_help_of_the_scripts(form: tuple[str, ...]) -> None:
    done = apart("-X", "importtime", *form, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "usage: " in done.stdout and "argparse" in imported
    assert not set(HEAVY) & imported


def test_the_bare_command_shows_all_that_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([])
    shown = capsys.readouterr().err
    assert done.value.code == 2 and "error:" not in shown
    assert all(f"  {name} " in shown for name in COMMANDS) and "examples:" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["asks"], "there is no command 'asks'. Did you mean ask?"),
        (["fine-tune"], "Did you mean finetune?"),
        (["--traceback"], "the command is missing"),
        (["xyzzy"], "The commands are ask, chat"),
        (["--verson"], "Did you mean --version?"),
        (["--model", "nano", "ask"], "Options of a command follow it: deepseek-vl2 COMMAND --model"),
        (["ask", "Hi", "--imgae", "a.png"], "unrecognized arguments: --imgae a.png. Did you mean --image?"),
        (["ask", "Hi", "--max-new-token=3", "--max-newtokens", "3"], "Did you mean --max-new-tokens?"),
        (["ask", "Hi", "--max_newtokens", "3"], "Did you mean --max_new_tokens?"),
        (["ask", "Hi", "--dtype", "bflot16"], "invalid choice: 'bflot16' (choose from bfloat16, float16, float32)."),
        (["ask", "Hi", "--dtype", "bflot16"], "Did you mean bfloat16?"),
        (["ask", "Hi", "--traceb"], "Did you mean --traceback?"),
        (["chat", "--tempratur", "1"], "Did you mean --temperature?"),
        (["ground", "a.png", "x", "--coc0"], "Did you mean --coco?"),
        (["batch", "a", "b", "--batchsize", "2"], "Did you mean --batch-size?"),
        (["info", "--jsn"], "Did you mean --json?"),
        (["list", "--jsn"], "Did you mean --json?"),
        (["pull", "x", "--revison", "y"], "Did you mean --revision?"),
        (["quantize", "a", "b", "--to", "int5"], "Did you mean int"),
        (["demo", "--prot", "1"], "Did you mean --port?"),
        (["serve", "--log-level", "warn"], "Did you mean warning?"),
        (["finetune", "--data", "a", "--output", "b", "--method", "lore"], "Did you mean lora?"),
        (["evaluate", "--tasks", "locat"], "Did you mean locate?"),
        (["completion", "bsh"], "Did you mean bash?"),
    ],
)
def test_a_typo_is_answered_with_what_was_meant(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    usage, error, hint = capsys.readouterr().err.strip().splitlines()
    program = "deepseek-vl2" + (f" {arguments[0]}" if arguments[0] in COMMANDS else "")
    assert done.value.code == 2 and usage.startswith(f"usage: {program}")
    assert error.startswith(f"{program}: error: ") and words in error
    assert hint == f"{program} --help explains the options."


def test_nothing_is_suggested_that_is_not_alike() -> None:
    assert suggestion("--zzz", ["--image", "--model"]) == ""
    assert suggestion("FP8", ["fp8", "int8"]) == " Did you mean fp8?"


FAILING = {
    "ask": ["x", "-i", "no_such.png"],
    "chat": ["-i", "no_such.png"],
    "ground": ["no_such.png", "x"],
    "batch": ["no_such.jsonl", "out.jsonl"],
    "info": ["./no_such"],
    "pull": ["no-id"],
    "quantize": ["./no_such", "out"],
    "demo": ["--device", "teapot"],
    "serve": ["./no_such"],
    "finetune": ["--data", "no_such.jsonl", "--output", "out", "--method", "full"],
    "evaluate": ["--model", "./no_such"],
}


@pytest.mark.parametrize("name", FAILING)
def test_every_command_fails_in_the_same_form(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([name, *FAILING[name]]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith(f"deepseek-vl2 {name}: error: ") and not shown.out


@pytest.mark.parametrize("name", FAILING)
def test_every_command_shows_a_traceback_on_request(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([name, *FAILING[name], "--traceback"], ["--traceback", name, *FAILING[name]]):
        with pytest.raises((ValueError, OSError)):
            main(arguments)


def test_options_that_do_not_go_together_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--data", "x", "--output", "y", "--batch_size", "0"]) == 2
    assert capsys.readouterr().err.startswith("deepseek-vl2 finetune: error: --batch_size must be positive")


def test_every_command_is_asked_for_its_help_with_examples() -> None:
    for name in COMMANDS:
        text = command_parser(name).format_help()
        assert ("xamples:" in text and f"deepseek-vl2 {name}" in text) or name == "finetune", name


# ---------------------------------------------------------------- several images behind one option


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Q -i a.png b.JPG c.webp", "Q -i a.png -i b.JPG -i c.webp"),
        ("-i a.png b.png What? --json", "-i a.png -i b.png What? --json"),
        ("--image http://x/a data:image/png;base64,AA Q", "--image http://x/a --image data:image/png;base64,AA Q"),
        ("-i a.png -i b.png Q", "-i a.png -i b.png Q"),
        ("-i noend Q", "-i noend Q"),
        ("Q -i - --json", "Q -i - --json"),
        ("- -i a.png", "- -i a.png"),
        ("-i a.png -", "-i a.png -"),
        ("Q --output b.png -i a.png", "Q --output b.png -i a.png"),
        ("-i a.png -- b.png", "-i a.png -- b.png"),
        ("-i", "-i"),
    ],
)
def test_images_that_a_shell_has_expanded(given: str, expected: str) -> None:
    assert spread_images(given.split(), ("--image", "-i")) == expected.split()


def test_what_can_only_be_an_image(tmp_path: Path) -> None:
    (tmp_path / "scan").write_bytes(b"x")
    assert names_image(str(tmp_path / "scan")) and names_image("gone.png")
    assert not names_image("What is this?") and not names_image("--json") and not names_image("x" * 5000)


def test_the_question_may_follow_the_images(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["ask", "-i", PICTURE, PICTURE, "What differs?", "--max-new-tokens", "2", "--json", "--model", "demo"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "What differs?" and [image["source"] for image in answer["images"]] == [PICTURE] * 2


@pytest.mark.parametrize("blank", ["", " ", "\n"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("pull", "BLANK"),
        ("pull", "a/b", "--revision", "BLANK"),
        ("info", "BLANK"),
        ("ask", "x", "--model", "BLANK"),
        ("ask", "x", "-i", "BLANK"),
        ("ask", "x", "-i", PICTURE, "--output", "BLANK"),
        ("chat", "-m", "BLANK"),
        ("ground", PICTURE, "BLANK"),
        ("batch", "BLANK", "out"),
        ("quantize", "nano", "BLANK"),
        ("serve", "BLANK"),
        ("serve", "--host", "BLANK"),
        ("serve", "--served-model-name", "BLANK"),
        ("demo", "--model", "BLANK"),
        ("demo", "--host", "BLANK"),
        ("finetune", "--model", "BLANK", "--data", "x", "--output", "y"),
        ("finetune", "--data", "BLANK", "--output", "y"),
        ("evaluate", "--output", "BLANK"),
    ],
    ids=" ".join,
)
def test_a_name_that_is_empty_stands_for_no_default(
    arguments: tuple[str, ...], blank: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a script's variable is not set: a default would answer with another model, or listen to everybody."""
    with pytest.raises(SystemExit) as done:
        main([blank if word == "BLANK" else word for word in arguments])
    assert done.value.code == 2
    assert "it is empty, as from a variable that is not set" in capsys.readouterr().err


def test_texts_may_be_empty() -> None:
    parser = command_parser("ask")
    args = parser.parse_args(["x", "--system_prompt", "", "--stop", "\n"])
    assert args.system_prompt == "" and args.stop == ["\n"]


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_a_models_name_that_is_empty_is_no_directory(name: str) -> None:
    from deepseek_vl2.models import DeepseekVLV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
    from deepseek_vl2.utils.io import load_pretrained_model

    for load in (
        load_pretrained_model,
        DeepseekVLV2Config.from_pretrained,
        DeepseekVLV2ForCausalLM.from_pretrained,
        DeepseekVLV2Processor.from_pretrained,
    ):
        with pytest.raises(ValueError, match="The model's name is empty"):
            load(name)
