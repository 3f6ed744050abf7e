"""Generated requests made answerable: what JSON Schema cannot say is put right, all else is left as it is.

The OpenAPI page says what fields hold. It cannot say that a system message comes first, that a result answers a call
made before, that a text is a picture or a grammar, or that an answer has one form.
"""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from PIL import Image

MOST_TOKENS = 4
MOST_IMAGES = 2
LIMITS = {
    "/v1/chat/completions": "max_tokens", "/v1/completions": "max_tokens", "/v1/responses": "max_output_tokens"
}  # fmt: skip
# A value of each field that gives the answer a form, by the type of what was generated.
FORMS: dict[str, dict[type, Any]] = {
    "response_format": {dict: {"type": "json_object"}},
    "structured_outputs": {dict: {"json": {"type": "object"}, "whitespace_pattern": "[ ]?"}},
    "guided_json": {dict: {"type": "object"}, str: '{"type": "boolean"}'},
    "guided_regex": {str: "[a-z]+"},
    "guided_choice": {list: ["yes", "no"]},
    "guided_grammar": {str: 'start: "yes" | "no"'},
    "regex": {str: "[0-9]+"},
}


def _picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PICTURE = _picture()


def _part(part: dict[str, Any], left: list[int]) -> dict[str, Any]:
    if "image_url" not in part:
        return part
    if not left:
        return {"type": "input_text" if part["type"] == "input_image" else "text", "text": "x"}
    left.pop()
    plain = part["type"] == "input_image" or isinstance(part["image_url"], str)
    return {"type": part["type"], "image_url": PICTURE if plain else {"url": PICTURE}}


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages, or items of the Responses API, that follow each other."""
    found: list[dict[str, Any]] = []
    calls: set[Any] = set()
    left = [0] * MOST_IMAGES
    for message in messages:
        role, kind = message.get("role"), message.get("type")
        if role in ("system", "developer") and any(other.get("role") not in ("system", "developer") for other in found):
            continue
        if role == "tool" and message.get("tool_call_id") not in calls:
            continue
        if kind == "function_call_output" and message["call_id"] not in calls:
            continue
        calls |= {call["id"] for call in message.get("tool_calls") or []}
        calls |= {message["call_id"]} if kind == "function_call" else set()
        if isinstance(message.get("content"), list):
            message = {**message, "content": [_part(part, left) for part in message["content"]]}
        found.append(message)
    if all(message.get("role") in ("system", "developer") for message in found):
        found.append({"role": "user", "content": "Hello"})
    return found


def _with_one_form(body: dict[str, Any]) -> dict[str, Any]:
    given = [name for name in FORMS if body.get(name) is not None]
    body = {name: value for name, value in body.items() if name not in given[1:]}
    for name in given[:1]:
        body[name] = FORMS[name][type(body[name])]
    if given or body.get("tools"):
        body.pop("ignore_eos", None)
    if given:
        body.pop("tools", None)
        body.pop("text", None)
    if isinstance(body.get("text"), dict) and (body["text"].get("format") or {}).get("type") != "text":
        del body["text"]
    if "guided_whitespace_pattern" in body:
        body["guided_whitespace_pattern"] = "[ ]?"
    return body


def _with_tools(body: dict[str, Any]) -> dict[str, Any]:
    tools = {}
    for tool in body.get("tools") or []:
        function = tool.get("function", tool)
        function.update({"parameters": {"type": "object"}, "strict": False})
        tools[function["name"]] = tool
    if "tools" in body:
        body["tools"] = list(tools.values())
    if not isinstance(body.get("tool_choice"), str) or not tools:
        body.pop("tool_choice", None)
    if tools:
        body.pop("ignore_eos", None)
    return body


def _text(value: Any) -> Any:
    return value.replace("<image", "<picture") if isinstance(value, str) else value


def answerable(path: str, body: dict[str, Any], model: str) -> dict[str, Any]:
    """Return a request to a path, valid by the page, as one that a server of ``model`` answers."""
    body = {**json.loads(json.dumps(body)), "model": model}
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            body[name] = conversation(body[name])
    if path == "/tokenize":
        return body
    body = _with_tools(_with_one_form(body))
    if path in LIMITS:
        body[LIMITS[path]] = MOST_TOKENS
        body.pop("max_completion_tokens", None)
    if body.get("min_tokens"):
        body["min_tokens"] = min(body["min_tokens"], MOST_TOKENS)
    if body.get("best_of"):
        body["best_of"] = body.get("n") or 1
    if path == "/v1/completions":
        prompt = body.get("prompt")
        body["prompt"] = [_text(text) for text in prompt] if isinstance(prompt, list) else _text(prompt)
        if not body["prompt"] or "" in body["prompt"]:  # nothing in front of nothing
            body.pop("add_special_tokens", None)
    body.pop("previous_response_id", None)
    return body
