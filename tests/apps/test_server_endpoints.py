"""Completions, tokens and the small endpoints; fields that are taken, honoured, or cut to what fits."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from server_support import MODEL, RunningServer, data_url, make_server, picture

from deepseek_vl2 import __version__
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

openai = pytest.importorskip("openai")

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(
    golden_model: Callable[..., DeepseekVLV2ForCausalLM], processor: DeepseekVLV2Processor
) -> Iterator[RunningServer]:
    """Run a server over the golden model of the small architecture."""
    options = {"max_length": 600, "max_batch": 6}
    with make_server(golden_model("small"), processor, engine=options, api_keys=("key",)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Any:
    """Return the official client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0)


def ask(client: Any, messages: Any = HELLO, **options: Any) -> Any:
    given = {"max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **given)


def complete(client: Any, prompt: Any = "One, two,", **options: Any) -> Any:
    return client.completions.create(**{"model": MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, **options})


def call(server: RunningServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    given = {"Authorization": "Bearer key", "Content-Type": "application/json", **headers}
    connection.request(method, path, None if body is None else json.dumps(body), given)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text), response.headers


# ---------------------------------------------------------------- completions


def test_a_completion_goes_on_from_its_prompt(
    client: Any, server: RunningServer, processor: DeepseekVLV2Processor
) -> None:
    inputs = processor(prompt="One, two,")
    output = server.server.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :])
    answer = complete(client)
    assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == inputs["input_ids"].shape[1] and answer.usage.completion_tokens == 8
    ids = inputs["input_ids"][0].tolist()
    for prompt in (ids, [ids], ["One, two,"]):
        assert complete(client, prompt).choices[0].text == expected
    assert complete(client, echo=True).choices[0].text == "One, two," + expected
    assert complete(client, ids, echo=True).choices[0].text.endswith("One, two," + expected)
    assert complete(client, max_tokens=openai.omit).usage.completion_tokens == 16


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"logprobs": 2}, {"seed": 3, "temperature": 1.0}])
def test_several_prompts_with_several_answers_each(client: Any, options: dict[str, Any]) -> None:
    prompts = ["One, two,", "A dog", "A dog"]
    whole = complete(client, prompts, n=2, **options)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert whole.choices[2].text == whole.choices[4].text and whole.choices[3].text == whole.choices[5].text
    assert ("seed" in options) == (whole.choices[2].text != whole.choices[3].text)
    texts, tokens, reasons, usage = [""] * 6, [[] for _ in range(6)], [""] * 6, None
    for chunk in complete(client, prompts, n=2, stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices] and usage == whole.usage
    assert reasons == ["length"] * 6
    assert tokens == [choice.logprobs.tokens if choice.logprobs else [] for choice in whole.choices]


def test_log_probabilities_of_completions(client: Any) -> None:
    answer = complete(client, logprobs=3).choices[0]
    found = answer.logprobs
    assert "".join(found.tokens) == answer.text and found.text_offset[0] == 0
    for start, token in zip(found.text_offset, found.tokens, strict=True):
        assert answer.text[start : start + len(token)] == token
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen == max(top.values()) and len(top) == 3
    assert complete(client, logprobs=0).choices[0].logprobs.token_logprobs == found.token_logprobs


def test_completions_have_forms(client: Any) -> None:
    assert re.fullmatch("[ab]{3}", complete(client, extra_body={"guided_regex": "[ab]{3}"}).choices[0].text)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    assert complete(client, extra_body={"response_format": form}).choices[0].text in ("1", "2")


@pytest.mark.parametrize(
    "fields",
    [
        *({"prompt": value} for value in ([], [[]], 5, [["x"]], [-1], [10**9], None, ["x"] * 65, "<image>", [1, "x"])),
        *({"prompt": value} for value in ("word " * 3000, [5] * 700)),
        {"prompt": "", "add_special_tokens": False},
        *(
            {"best_of": 2},
            {"suffix": "x"},
            {"logprobs": 21},
            {"echo": True, "logprobs": 1},
            {"n": 9},
            {"max_tokens": 0},
        ),
        *({"max_tokens": 0}, {"stream_options": {}}, {"unheard_of": 1}, {"messages": HELLO}),
    ],
)
def test_completions_that_cannot_be_written(server: RunningServer, fields: dict[str, Any]) -> None:
    status, answer, _ = call(server, "POST", "/v1/completions", {"model": MODEL, "prompt": "x", **fields})
    assert status == 400 and len(answer["error"]["message"]) > 10


def test_more_answers_than_are_ever_taken_together_are_refused(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": ["x"] * 36, "n": 2}
    status, answer, _ = call(server, "POST", "/v1/completions", body)
    assert status == 400 and "72 answers are more than the 70" in answer["error"]["message"]


def test_a_prompt_of_image_tokens_is_refused(server: RunningServer, processor: DeepseekVLV2Processor) -> None:
    body = {"model": MODEL, "prompt": [processor.image_token_id]}
    status, answer, _ = call(server, "POST", "/v1/completions", body)
    assert status == 400 and "tokens of images" in answer["error"]["message"]


# ---------------------------------------------------------------- tokens, versions, names of requests


def test_tokens(server: RunningServer, processor: DeepseekVLV2Processor) -> None:
    text = "Grüße, 世界"
    status, found, _ = call(server, "POST", "/tokenize", {"model": MODEL, "prompt": text})
    assert status == 200 and found["tokens"] == processor.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 600 and found["token_strs"] is None
    bare = call(server, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False, "return_token_strs": True})[
        1
    ]
    assert bare["tokens"] == processor.encode(text, bos=False) and len(bare["token_strs"]) == bare["count"]
    assert call(server, "POST", "/detokenize", {"tokens": bare["tokens"]})[1] == {"prompt": text}
    content = [{"type": "image_url", "image_url": data_url(picture(60, 60))}, {"type": "text", "text": "What?"}]
    status, chat, _ = call(server, "POST", "/tokenize", {"messages": [{"role": "user", "content": content}]})
    turn = {"role": "user", "content": "<image>\nWhat?", "images": [picture(60, 60)]}
    assert status == 200 and chat["tokens"] == processor(conversations=[turn])["input_ids"][0].tolist()
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": HELLO}),
        ("/tokenize", {"messages": []}),
        ("/tokenize", {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}),
        ("/tokenize", {"messages": HELLO, "chat_template_kwargs": {"chat_template": "x"}}),
        ("/detokenize", {"tokens": [10**8]}),
        ("/detokenize", {"tokens": [1] * 601}),
        ("/detokenize", {}),
    ):
        assert call(server, "POST", path, body)[0] == 400
    assert call(server, "POST", "/tokenize", {"prompt": "x", "model": "other"})[0] == 404
    assert call(server, "POST", "/tokenize", {"prompt": "x"}, Authorization="")[0] == 401


ASKED = [{"role": "user", "content": "Say hi. "}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Hi, "}]


@pytest.mark.parametrize(
    ("messages", "said", "end"),
    [
        (ASKED, {}, ": Say hi.\n\n<|Assistant|>:"),
        (ASKED, {"add_generation_prompt": True}, ": Say hi.\n\n<|Assistant|>:"),
        (ASKED, {"add_generation_prompt": False}, ": Say hi.\n\n"),
        (ASKED, {"continue_final_message": True}, ": Say hi."),
        (ASKED, {"continue_final_message": True, "add_generation_prompt": False}, ": Say hi."),
        (ASKED, {"chat_template_kwargs": {"continue_final_message": True}}, ": Say hi."),
        (ANSWERED, {}, "<|Assistant|>:Hi,"),
        (ANSWERED, {"continue_final_message": True, "add_generation_prompt": False}, "<|Assistant|>:Hi,"),
        (ANSWERED, {"add_generation_prompt": False}, "<|Assistant|>:Hi,<｜end▁of▁sentence｜>"),
        (ANSWERED, {"chat_template_kwargs": {"add_generation_prompt": False}}, "Hi,<｜end▁of▁sentence｜>"),
    ],
)
def test_a_conversation_ends_where_it_is_asked_to(
    server: RunningServer, processor: DeepseekVLV2Processor, messages: Any, said: dict[str, Any], end: str
) -> None:
    status, found, _ = call(server, "POST", "/tokenize", {"messages": messages, **said})
    assert status == 200 and processor.decode(found["tokens"]).endswith(end)
    status, answer, _ = call(
        server, "POST", "/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 1, **said}
    )
    assert status == 200 and answer["usage"]["prompt_tokens"] == found["count"]


def test_whole_numbers_may_have_a_decimal_point(server: RunningServer) -> None:
    body = {"model": MODEL, "prompt": [5.0, 6], "max_tokens": 2.0, "top_k": 1.0, "seed": 3.0, "logprobs": 1.0}
    status, answer, _ = call(server, "POST", "/v1/completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 2
    assert (
        call(server, "POST", "/detokenize", {"tokens": [5.0]})[:2]
        == call(server, "POST", "/detokenize", {"tokens": [5]})[:2]
    )
    for wrong in ({"max_tokens": 2.5}, {"max_tokens": True}, {"max_tokens": "2"}, {"prompt": [5.5]}, {"seed": 1e300}):
        assert call(server, "POST", "/v1/completions", {**body, **wrong})[0] == 400


def test_version_and_ping_need_no_key(server: RunningServer) -> None:
    assert call(server, "GET", "/version", Authorization="")[:2] == (200, {"version": __version__})
    for method in ("GET", "POST"):
        assert call(server, method, "/ping", Authorization="")[:2] == (200, {"status": "ok"})


def test_a_refused_method_names_all_that_are_taken(server: RunningServer) -> None:
    for path, methods in (("/ping", "GET, POST"), ("/v1/responses/x", "DELETE, GET"), ("/v1/responses", "POST")):
        status, _, headers = call(server, "PUT", path)
        assert status == 405 and headers["allow"] == methods


def test_another_model_is_told_before_anything_else(server: RunningServer) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        status, answer, _ = call(server, "POST", path, {"model": "other", "unheard_of": 1})
        assert status == 404 and answer["error"]["code"] == "model_not_found"


def test_each_request_has_a_name(server: RunningServer, client: Any) -> None:
    seen = set()
    for method, path, status in (("GET", "/health", 200), ("GET", "/nowhere", 404), ("POST", "/v1/completions", 400)):
        found, _, headers = call(server, method, path, {} if method == "POST" else None)
        assert found == status
        seen.add(headers["x-request-id"])
    assert len(seen) == 3 and all(name.startswith("req_") for name in seen)
    assert call(server, "GET", "/health", **{"X-Request-Id": "mine-1"})[2]["x-request-id"] == "mine-1"
    assert call(server, "GET", "/health", **{"X-Request-Id": "a b\tc"})[2]["x-request-id"].startswith("req_")
    assert ask(client, max_tokens=1)._request_id.startswith("req_")


# ---------------------------------------------------------------- fields


HARMLESS: dict[str, Any] = {
    "reasoning_effort": "high", "store": True, "metadata": {"a": "b"}, "user": "me", "service_tier": "flex",
    "prompt_cache_key": "x", "prompt_cache_retention": "24h", "safety_identifier": "x", "modalities": ["text"],
    "verbosity": "medium", "parallel_tool_calls": False, "tools": [], "tool_choice": "auto", "functions": [],
    "chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True, "request_id": "x",
    "priority": 1, "cache_salt": "x", "include_reasoning": False, "skip_special_tokens": True, "best_of": 1,
    "spaces_between_special_tokens": False, "guided_decoding_backend": "guidance", "top_k": -1, "min_p": 0,
    "min_tokens": 0, "stop_token_ids": [], "audio": None, "prediction": None, "logit_bias": {}, "stop": None,
}  # fmt: skip


def test_harmless_fields_are_taken(client: Any) -> None:
    plain = ask(client).choices[0].message.content
    assert ask(client, extra_body=HARMLESS).choices[0].message.content == plain
    named = [{**HELLO[0], "name": "Ann", "cache_control": {"type": "ephemeral"}}]
    assert ask(client, named).choices[0].message.content == plain
    parts = [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]
    assert ask(client, [{"role": "user", "content": parts}]).choices[0].message.content == plain
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": True, "new": 1}
    counts = [chunk.usage.completion_tokens for chunk in ask(client, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 8


def test_answers_are_cut_to_the_room_there_is(client: Any) -> None:
    long = [{"role": "user", "content": "dog " * 560}]
    for field in ("max_tokens", "max_completion_tokens"):
        answer = ask(client, long, **{"max_tokens": openai.omit, field: 10**9}, extra_body={"ignore_eos": True})
        assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 600


def test_system_messages_are_joined(client: Any) -> None:
    several = [{"role": role, "content": text} for role, text in (("system", "Be kind."), ("developer", "Be brief."))]
    joined = [{"role": "system", "content": "Be kind.\n\nBe brief."}]
    assert ask(client, several + HELLO).choices[0].message == ask(client, joined + HELLO).choices[0].message


def test_a_refusal_is_what_an_assistant_said(client: Any) -> None:
    plain = [*HELLO, {"role": "assistant", "content": "No."}, *HELLO]
    want = ask(client, plain).choices[0].message
    part = {"type": "refusal", "refusal": "No."}
    for said in ({"content": None, "refusal": "No."}, {"refusal": "No."}, {"content": [part]}):
        assert ask(client, [*HELLO, {"role": "assistant", **said}, *HELLO]).choices[0].message == want
    items = [*HELLO, {"role": "assistant", "content": [part]}, *HELLO]
    answer = client.responses.create(model=MODEL, input=items, max_output_tokens=8, temperature=0)
    assert answer.output_text == want.content
    assert client.completions.create(model=MODEL, prompt="x", max_tokens=1, suffix="").choices
    assert ask(client, [{"role": "user", "content": ""}], max_tokens=1).choices, "an empty text is a content"


def test_a_literal_tag_of_an_image_is_text(
    client: Any, server: RunningServer, processor: DeepseekVLV2Processor
) -> None:
    image = {"type": "image_url", "image_url": data_url(picture(60, 60))}
    parts = [image, {"type": "text", "text": "Is <image> a tag? Or <image_placeholder>?"}]
    messages = [
        {"role": "system", "content": "Of <image> say nothing."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "<image> is one."},
        {"role": "user", "content": "<image>"},
    ]
    assert ask(client, messages, max_tokens=2).choices[0].message.content
    tokens = call(server, "POST", "/tokenize", {"messages": messages})[1]["tokens"]
    assert tokens.count(processor.image_token_id) == 421, "those of the one image"
    assert call(server, "POST", "/detokenize", {"tokens": tokens[-12:]})[1]["prompt"].count("<image>") == 1


def test_top_k_and_min_p(client: Any) -> None:
    greedy = ask(client).choices[0].message.content
    for option in ({"top_k": 1}, {"min_p": 1.0}):
        assert ask(client, temperature=2.0, seed=1, extra_body=option).choices[0].message.content == greedy
    assert ask(client, temperature=2.0, seed=1).choices[0].message.content != greedy


def test_stop_tokens_and_the_least_number_of_tokens(client: Any, processor: DeepseekVLV2Processor) -> None:
    entries = ask(client, logprobs=True).choices[0].logprobs.content
    tokens = [next(iter(processor.encode(bytes(entry.bytes).decode(), bos=False))) for entry in entries]
    text = "".join(entry.token for entry in entries)
    first = tokens.index(tokens[3])
    ended = ask(client, extra_body={"stop_token_ids": [tokens[3]]}).choices[0]
    assert ended.finish_reason == "stop"
    assert ended.message.content == "".join(entry.token for entry in entries[:first])
    longer = ask(client, extra_body={"stop_token_ids": [tokens[3]], "min_tokens": 6}, max_tokens=12)
    assert longer.usage.completion_tokens >= 6
    word = entries[1].token
    assert ask(client, stop=word).choices[0].message.content == text[: text.index(word)]
    assert len(ask(client, stop=word, extra_body={"min_tokens": 5}).choices[0].message.content) > text.index(word)


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": ["red", "blue", "ré😀d"]}, "red|blue|ré😀d"),
    ({"guided_json": {"enum": [1, 2]}}, "[12]"),
    ({"guided_json": '{"enum": [1, 2]}'}, "[12]"),
    ({"guided_grammar": 'root ::= "yes" | "no" [0-9]'}, "yes|no[0-9]"),
    ({"guided_grammar": 'start: "yes" | "no" /[0-9]/'}, "yes|no[0-9]"),
    ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    ({"structured_outputs": {"choice": ["x", "y"]}}, "x|y"),
    ({"structured_outputs": {"grammar": 'start: "yes"'}}, "yes"),
    ({"structured_outputs": {"json": '{"const": 5}'}}, "5"),
    ({"structured_outputs": {"json_object": True}, "max_tokens": 3}, r"\{.*"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": [1, {"a": 2}]}}}},
     r'\[1,\{"a":2\}\]'),
    ({"guided_json": {"const": [1, 2]}, "guided_whitespace_pattern": " {2}"}, r"\[(  )?1(  )?,(  )?2(  )?\]"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "pattern"), FORMS)
def test_forms_of_an_answer(client: Any, fields: dict[str, Any], pattern: str) -> None:
    for seed in range(2):
        answer = ask(client, temperature=1.0, seed=seed, extra_body={"max_tokens": 40, **fields}).choices[0]
        assert re.fullmatch(pattern, answer.message.content)


def test_json_is_compact_unless_white_space_is_asked_for(client: Any) -> None:
    """A bias towards blanks shows whether they may be written."""
    schema = {
        "type": "object",
        "properties": {
            "a": {"enum": [1]},
            "b": {"type": "array", "items": {"enum": [2]}, "minItems": 2, "maxItems": 2},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    blank = client.post("/../tokenize", cast_to=object, body={"prompt": " ", "add_special_tokens": False})["tokens"][0]
    options: Any = {"logit_bias": {str(blank): 100}, "max_tokens": 60}
    assert ask(client, response_format=form, **options).choices[0].message.content == '{"a":1,"b":[2,2]}'
    for extra in ({"json_whitespace": True}, {"structured_outputs": {"json": schema, "disable_any_whitespace": False}}):
        given = {} if "structured_outputs" in extra else {"response_format": form}
        assert " " in ask(client, **given, **options, extra_body=extra).choices[0].message.content


def test_objects_can_be_closed(client: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    extra = {"structured_outputs": {"json": schema, "disable_additional_properties": True}}
    for seed in range(3):
        assert ask(client, seed=seed, temperature=1.0, extra_body=extra).choices[0].message.content == '{"a":1}'


# ---------------------------------------------------------------- images


def shown(client: Any, image: Any) -> Any:
    content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": "What?"}]
    return ask(client, [{"role": "user", "content": content}], max_tokens=6).choices[0].message.content


def test_images_in_all_spellings(client: Any) -> None:
    url = data_url(picture(64, 64, "#fbff3e"), "PNG")
    header, _, payload = url.partition(",")
    assert "+" in payload or "/" in payload, "or the URL-safe form is the same"
    expected = shown(client, {"url": url})
    lines = "\r\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    safe = payload.replace("+", "-").replace("/", "_")
    for other in (lines, safe, payload.rstrip("="), safe.rstrip("="), f" {payload}\n"):
        assert shown(client, {"url": f"{header},{other}"}) == expected
    assert shown(client, url) == expected
    assert shown(client, f"data:IMAGE/PNG;charset=utf-8;BASE64,{payload}") == expected


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_images_of_telephones(client: Any, kind: str) -> None:
    from PIL import features

    image, file = picture(64, 64), io.BytesIO()
    if kind == "AVIF":
        if not features.check("avif"):
            pytest.skip("this Pillow has no AVIF")
        image.save(file, "AVIF")
    else:
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(image).save(file)
    encoded = base64.b64encode(file.getvalue()).decode()
    assert shown(client, f"data:image/{kind.lower()};base64,{encoded}")


def test_heic_without_its_package_says_what_to_do(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepseek_vl2.models import heif

    monkeypatch.setattr(heif, "find_spec", lambda name: None)
    data = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40
    with pytest.raises(openai.BadRequestError, match=r"deepseek_vl2\[heif\]"):
        shown(client, f"data:image/heic;base64,{base64.b64encode(data).decode()}")
