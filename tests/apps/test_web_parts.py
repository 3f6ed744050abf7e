"""The parts of the web demo without a browser: conversations, the line in front of the model, how answers look."""

from __future__ import annotations

import json
import runpy
import socket
import threading
import time
import urllib.request
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from web_support import GIRAFFE, ScriptedBackend

from deepseek_vl2.cli.main import main as cli_main
from deepseek_vl2.serve.web import command, rendering
from deepseek_vl2.serve.web.backend import LoadStatus, ModelBackend
from deepseek_vl2.serve.web.examples import EXAMPLES, LOGO, PICTURES
from deepseek_vl2.serve.web.jobs import Job, JobLine, Stage
from deepseek_vl2.serve.web.limits import Limits
from deepseek_vl2.serve.web.state import Chat, Settings, Turn
from deepseek_vl2.utils.demo import write_demo_checkpoint

IMAGES = Path(__file__).resolve().parents[2] / "images"
CAT = str(IMAGES / "multi_image_2.jpeg")
QUESTION = [{"role": "<|User|>", "content": "What?", "images": []}]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# ---------------------------------------------------------------- conversations


def test_pictures_without_a_tag_stand_in_front() -> None:
    chat = Chat()
    chat.ask("Compare <image> with the other.", [CAT, CAT], Limits())
    assert chat.messages()[0]["content"] == "<image>\nCompare <image> with the other."
    assert chat.messages()[0]["images"] == [CAT, CAT]


def test_questions_without_an_answer_are_left_out() -> None:
    chat = Chat([Turn("one", [CAT], answer="uno"), Turn("two", error="it failed"), Turn("three", answer="tr")])
    chat.ask("four", [], Limits())
    assert [message["content"] for message in chat.messages()] == ["<image>\none", "uno", "three", "tr", "four"]
    assert chat.last_image() == CAT


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("  ", [], "Write a question first"),
        ("", [CAT], "Ask something about the picture first"),
        ("x" * 11, [], "11 characters; the limit is 10"),
        ("a", [CAT] * 3, "3 pictures; the limit is 2"),
        ("<image>", [], "1 <image> tags and 0 pictures"),
    ],
)
def test_refused_questions_change_nothing(text: str, images: list[str], message: str) -> None:
    chat = Chat()
    with pytest.raises(ValueError, match=message):
        chat.ask(text, images, Limits(characters=10, images=2))
    assert chat.turns == []


def test_refused_pictures(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(CAT).read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^broken\.png is truncated"):
        Chat().ask("?", [str(broken)], Limits())
    with pytest.raises(ValueError, match=r"^multi_image_2.jpeg has 451x300 pixels, more than the limit of 1,000"):
        Chat().ask("?", [CAT], Limits(pixels=1000))


def test_a_conversation_has_an_end() -> None:
    with pytest.raises(ValueError, match="2 turns"):
        Chat([Turn("a"), Turn("b")]).ask("c", [], Limits(turns=2))


# ---------------------------------------------------------------- the line


@pytest.fixture
def backend() -> ScriptedBackend:
    return ScriptedBackend({"": "An answer of some length."}, pause=0.005)


def test_one_at_a_time_first_come_first_served(backend: ScriptedBackend) -> None:
    line = JobLine(backend, waiting=8)
    jobs = [line.submit([{"content": str(number)}], Settings()) for number in range(4)]
    assert [job.ahead for job in jobs] == [0, 1, 2, 3]
    until(lambda: all(job.finished for job in jobs))
    assert [job.text for job in jobs] == ["An answer of some length."] * 4
    assert [messages[0]["content"] for messages, _ in backend.seen] == ["0", "1", "2", "3"]
    assert backend.most_open == 1
    until(lambda: len(line) == 0)


def test_a_full_line_turns_away(backend: ScriptedBackend) -> None:
    line = JobLine(ScriptedBackend({"": "x" * 4000}, pause=0.02), waiting=1)
    jobs = [line.submit(QUESTION, Settings()) for _ in range(2)]
    with pytest.raises(ValueError, match="1 requests are waiting already"):
        line.submit(QUESTION, Settings())
    for job in jobs:
        line.cancel(job)


def test_stopping_lets_the_next_one_in_at_once() -> None:
    backend = ScriptedBackend({"long": "word " * 4000, "": "short"}, pause=0.01)
    line = JobLine(backend, waiting=8)
    first = line.submit([{"content": "long"}], Settings())
    second = line.submit([{"content": "long"}], Settings())
    third = line.submit(QUESTION, Settings())
    until(lambda: len(first.text) > 8)
    line.cancel(second)
    assert second.stage is Stage.STOPPED and third.ahead == 1
    line.cancel(first)
    assert first.finished
    until(lambda: third.stage is Stage.DONE, seconds=5)
    assert first.stage is Stage.STOPPED and first.text.startswith("word wo")
    assert backend.stopped_early == 1 and len(backend.seen) == 2


def test_an_error_reaches_its_visitor_and_no_other() -> None:
    backend = ScriptedBackend(
        {
            "boom": RuntimeError("a kernel failed"),
            "bad": ValueError("Too long."),
            "gpu": torch.OutOfMemoryError(),
            "": "ok",
        }
    )
    line = JobLine(backend, waiting=8)
    jobs = [line.submit([{"content": word}], Settings()) for word in ("boom", "bad", "gpu", "fine")]
    until(lambda: all(job.finished for job in jobs))
    assert jobs[0].error == "The model failed with RuntimeError: a kernel failed"
    assert jobs[1].error == "Too long."
    assert "memory ran out" in jobs[2].error
    assert jobs[3].text == "ok" and jobs[3].error == ""


def test_questions_wait_for_the_model_and_learn_when_it_fails(backend: ScriptedBackend) -> None:
    backend.state = LoadStatus(text="Loading")
    line = JobLine(backend, waiting=8)
    first, second = line.submit(QUESTION, Settings()), line.submit(QUESTION, Settings())
    assert "still loading" in rendering.progress_text(first, backend.status())
    line.cancel(first)
    until(lambda: first.stage is Stage.STOPPED)
    backend.state = LoadStatus(failed=True, text="x could not be loaded: no such file")
    until(lambda: second.finished)
    assert second.error == "x could not be loaded: no such file"


# ---------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelBackend]:
    directory = write_demo_checkpoint(tmp_path_factory.mktemp("demo"))
    backend = ModelBackend(str(directory), {"device": "cpu"}, dtype=torch.float32)
    seen: list[float | None] = []
    report = backend._report
    backend._report = lambda fraction: (seen.append(fraction), report(fraction))[1]  # type: ignore[method-assign]
    assert not backend.status().ready and not backend.wait(0)
    backend.start()
    until(lambda: backend.wait(0.1), seconds=60)
    assert seen and seen[-1] == 1.0 and seen == sorted(seen), "no progress was seen"
    yield backend


def ask(model: ModelBackend, settings: Settings, text: str = "Hello") -> str:
    pieces = model.stream(model.prepare([{"role": "user", "content": text}], 4096), settings)
    return "".join(pieces)


def test_status_names_the_model(model: ModelBackend) -> None:
    assert model.status().ready
    assert "parameters · float32 · cpu" in model.status().text


def test_seeds(model: ModelBackend) -> None:
    settings = Settings(temperature=1.0, new_tokens=24, seed=7)
    assert ask(model, settings) == ask(model, settings)
    assert ask(model, settings) != ask(model, Settings(temperature=1.0, new_tokens=24, seed=8))


def test_the_oldest_turns_make_room(model: ModelBackend) -> None:
    chat = Chat([Turn("a" * 100, answer="b" * 100), Turn("c" * 100, answer="d" * 100)])
    chat.ask("e", [], Limits())
    whole = model.prepare(chat.messages(), 4096)
    length = whole.inputs["input_ids"].shape[1]
    assert whole.dropped == 0
    part = model.prepare(chat.messages(), length - 1)
    assert part.dropped == 1 and part.inputs["input_ids"].shape[1] < length - 200
    with pytest.raises(ValueError, match=r"take \d+ tokens, more than the 5 "):
        model.prepare(chat.messages(), 5)


def test_a_running_answer_is_stopped(model: ModelBackend) -> None:
    line = JobLine(model, waiting=2)
    job = line.submit([{"role": "user", "content": "Hello"}], Settings(new_tokens=2000, temperature=1.0, seed=1))
    until(lambda: job.text != "")
    line.cancel(job)
    until(lambda: len(line) == 0, seconds=5)
    assert job.stage is Stage.STOPPED
    assert not [thread for thread in threading.enumerate() if "generation" in thread.name]


def test_a_cut_answer_is_known(model: ModelBackend) -> None:
    line = JobLine(model, waiting=2)
    job = line.submit([{"role": "user", "content": "Hello"}], Settings(new_tokens=3, temperature=0))
    until(lambda: job.stage is Stage.DONE)
    assert job.cut


def test_loading_errors_are_shown(tmp_path: Path) -> None:
    backend = ModelBackend(str(tmp_path / "nothing"))
    backend.start()
    until(lambda: backend.status().failed, seconds=60)
    assert "nothing could not be loaded" in backend.status().text
    with pytest.raises(ValueError, match="could not be loaded"):
        backend.wait(0)


# ---------------------------------------------------------------- how it looks


def test_labels_take_the_place_of_tags() -> None:
    shown = rendering.answer_markdown(f"See {GIRAFFE} there.")
    assert shown.startswith(
        'See <span class="ref" style="--box: rgb(230, 25, 75); --wash: rgba(230, 25, 75, 0.16)">'
        "The giraffe at the back.</span> there."
    )
    assert "704" not in shown


@pytest.mark.parametrize(
    ("way", "words", "asked"),
    [
        ("ask_to_find", " the giraffe ", "<|ref|>the giraffe<|/ref|>."),
        ("ask_to_find", "<|ref|>the giraffe<|/ref|>", "<|ref|>the giraffe<|/ref|>"),
        ("ask_for_boxes", "What is here?", "<|grounding|>What is here?"),
    ],
)
def test_buttons_ask_for_boxes_in_the_forms_that_models_know(way: str, words: str, asked: str) -> None:
    gr = pytest.importorskip("gradio")
    from deepseek_vl2.serve.web.events import DemoEvents

    backend = ScriptedBackend({"": "An answer."})
    events = DemoEvents(backend, JobLine(backend, 4), Limits())
    chat, request = Chat(), gr.Request(session_hash="one")
    changed = getattr(events, way)({"text": words, "files": []}, chat, request)
    assert chat.turns[-1].question == asked and changed[-1] == {"text": "", "files": []}
    for nothing in ("", "  ", None, "<image> the giraffe"):
        assert getattr(events, way)({"text": nothing, "files": []}, chat, request) == (gr.skip(),) * 3
    assert len(chat.turns) == 1


@pytest.mark.parametrize("length", range(1, len(GIRAFFE)))
def test_no_half_tag_is_seen_while_writing(length: int) -> None:
    shown = rendering.answer_markdown("Here: " + GIRAFFE[:length], writing=True)
    assert "&lt;" not in shown and "|" not in shown and "[" not in shown
    assert "Here: The giraffe at the back.".startswith(shown) or "</span>" in shown


def test_what_cannot_be_read_stays_as_it_is_at_the_end() -> None:
    assert rendering.answer_markdown("a <|ref|>b") == "a &lt;|ref|>b"


def test_html_is_text() -> None:
    assert rendering.escape("<img src=x> `a<b` & c") == "&lt;img src=x> `a<b` &amp; c"
    attack = "<|ref|><script>x</script><|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"
    assert "<script>" not in rendering.answer_markdown(attack)
    assert "<script>" not in rendering.box_list(attack, (100, 100))


def test_boxes_are_drawn_and_listed_in_pixels() -> None:
    image = Image.new("RGB", (999, 999), "white")
    drawing = rendering.draw_answer(GIRAFFE, image)
    assert drawing is not None and drawing.getpixel((704, 600)) == (230, 25, 75)
    listed = rendering.box_list(f"{GIRAFFE}\n\nThere.", image.size)
    assert "<code>704, 438, 917, 686</code>" in listed
    assert "&lt;|det|&gt;[[704, 438, 917, 686]]&lt;|/det|&gt;<br><br>There." in listed
    assert rendering.draw_answer("no boxes", image) is None


def test_with_several_pictures_the_page_says_whose_the_boxes_are() -> None:
    turn = Turn("where?", [CAT, CAT], answer=GIRAFFE, drawing=CAT, picture=(1, 2), open=False)
    turn.boxes = rendering.box_list(GIRAFFE, (999, 999), turn.picture)
    chat = Chat([turn])
    shown = rendering.chat_messages(chat)[-1]["content"]
    assert '<span class="note">Boxes on picture 1 of 2</span>' in shown
    assert "1 box in pixels of picture 1 of 2" in turn.boxes
    assert any(isinstance(part, dict) and "picture 1 of 2" in part["alt_text"] for part in shown)
    assert rendering.picture_choices(chat) == [("Picture 1", 1), ("Picture 2", 2)]
    for other in (Chat(), Chat([Turn("hi")]), Chat([Turn("where?", [CAT], picture=(1, 1))])):
        assert rendering.picture_choices(other) == []
    turn.forget_answer()
    assert rendering.picture_choices(chat) == []


def test_the_visitor_chooses_the_picture_that_boxes_are_drawn_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio")
    from deepseek_vl2.serve.web.events import DemoEvents

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    files = [tmp_path / "red.png", tmp_path / "blue.png"]
    Image.new("RGB", (300, 200), "red").save(files[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: upright it is 200 wide and 300 high
    Image.new("RGB", (300, 200), "blue").save(files[1], exif=exif)
    limits = Limits()
    backend = ScriptedBackend({"": GIRAFFE})
    events = DemoEvents(backend, JobLine(backend, limits.waiting), limits)
    chat, request = Chat(), SimpleNamespace(session_hash="a")
    chat.ask("Where is it?", [str(files[0])], limits)
    chat.turns[0].answer, chat.turns[0].open = "Nowhere.", False
    chat.ask("And in this one?", [str(files[1])], limits)
    turn = chat.turns[-1]
    turn.answer, turn.open = GIRAFFE, False
    events._draw(turn, chat.pictures())
    assert turn.picture == (2, 2) and Image.open(turn.drawing).size == (200, 300)
    assert events.idle(chat, request)[-1]["value"] == 2 and events.idle(chat, request)[-1]["visible"]
    again, shown = events.choose_picture(chat, 1, request)
    assert again is chat and turn.picture == (1, 2) and "Boxes on picture 1 of 2" in str(shown)
    assert Image.open(turn.drawing).size == (300, 200) and "211, 87, 275, 137" in turn.boxes
    for wrong in (0, 3, None):
        events.choose_picture(chat, wrong, request)
        assert turn.picture == (1, 2)
    assert len(events.idle(chat, request)) == len(events.busy(Chat([Turn("hi")]))) == 7


def test_messages_show_questions_answers_and_what_went_wrong() -> None:
    chat = Chat([Turn("look", [CAT], answer="a cat", note="Stopped."), Turn("again", error="<it> failed")])
    first, answer, second, failure = rendering.chat_messages(chat)
    assert [part if isinstance(part, str) else part["path"] for part in first["content"]] == [CAT, "look"]
    assert answer["content"] == ["a cat", '<span class="note">Stopped.</span>']
    assert second["content"] == ["again"] and "&lt;it&gt; failed" in failure["content"][0]


def test_progress_says_how_many_are_before() -> None:
    ready = LoadStatus(ready=True)
    assert rendering.progress_text(Job([], Settings(), ahead=2), ready) == "Waiting: 2 requests are before yours"
    assert rendering.progress_text(Job([], Settings(), ahead=1), ready) == "Waiting: 1 request is before yours"


def test_status_line() -> None:
    assert 'value="0.430"' in rendering.status_html(LoadStatus(text="Loading", fraction=0.43))
    assert "alert" in rendering.status_html(LoadStatus(failed=True, text="<no>"))
    assert "&lt;no&gt;" in rendering.status_html(LoadStatus(failed=True, text="<no>"))


def test_an_example_is_taken_by_its_number_alone(tmp_path: Path) -> None:
    """A visitor may claim that an example is made of any file; Gradio would publish what the handler returns."""
    gr = pytest.importorskip("gradio", reason='needs Gradio: pip install "deepseek_vl2[gradio]"')
    from deepseek_vl2.serve.web.events import DemoEvents

    events = DemoEvents(ScriptedBackend({}), JobLine(ScriptedBackend({}), 1), Limits())
    claimed = {"text": "x", "files": [{"path": str(tmp_path / "secret.txt")}]}
    for index, example in enumerate(EXAMPLES):
        taken = events.take_example(gr.SelectData(None, {"index": index, "value": claimed}))
        assert taken == {"text": example.question, "files": example.files}
    for index in (-1, len(EXAMPLES), None, "0", [0]):
        assert events.take_example(gr.SelectData(None, {"index": index, "value": claimed})) == gr.skip()


# ---------------------------------------------------------------- what ships


def test_examples_ship_with_the_package() -> None:
    assert LOGO.is_file()
    shown = {name for example in EXAMPLES for name in example.pictures}
    assert shown == {path.name for path in PICTURES.iterdir()}
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 300_000
    copies = runpy.run_path(str(IMAGES / "examples.py"))["COPIES"]
    assert set(copies) == shown
    for name, source in copies.items():  # boxes are parts of width and height: they must not be distorted
        with Image.open(PICTURES / name) as copy, Image.open(IMAGES / source) as original:
            assert copy.width / copy.height == pytest.approx(original.width / original.height, abs=0.01)
    for example in EXAMPLES:
        Chat().ask(example.question, example.files, Limits())


def test_the_server_asks_no_host_and_lets_the_browser_ask_none(
    backend: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gradio", reason='needs Gradio: pip install "deepseek_vl2[gradio]"')
    from deepseek_vl2.serve.web.layout import build_page
    from deepseek_vl2.serve.web.server import launch

    asked: set[str] = set()
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **more: asked.add(host) or look_up(host, *rest, **more)
    )
    page = build_page(backend)
    address = launch(page, Limits())
    try:
        with urllib.request.urlopen(address) as response:
            assert "default-src 'self'" in response.headers["Content-Security-Policy"]
        with urllib.request.urlopen(address + "config") as response:
            config = json.load(response)
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(OSError, match=f"Port {port} on 127.0.0.1 is in use"):
            launch(build_page(backend), Limits(), port=port)
    finally:
        page.close(verbose=False)
    assert asked <= {"127.0.0.1", "localhost"}
    assert not config["analytics_enabled"] and not config["run_history"]
    assert not [entry["api_name"] for entry in config["dependencies"] if entry["api_visibility"] == "public"]


def test_without_gradio_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert cli_main(["demo"]) == 1
    assert capsys.readouterr().err == (
        'deepseek-vl2 demo: error: demo needs the package gradio: pip install "deepseek_vl2[gradio]"\n'
    )


@pytest.mark.parametrize("name", ["./no_such", "no_such/model"])
def test_a_mistyped_model_ends_the_program_at_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gradio")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    assert cli_main(["demo", "--model", name]) == 1
    error = capsys.readouterr().err
    assert "There is no" in error and error.count("\n") == 1


def test_options_of_the_original_script_are_understood() -> None:
    parser = ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--model_name", "x", "--ip", "0.0.0.0", "--port", "37913", "--chunk_size", "512"])
    assert (args.model, args.host, args.port, args.chunk_size) == ("x", "0.0.0.0", 37913, 512)
    assert parser.parse_args([]).host == "127.0.0.1" and not parser.parse_args([]).share
