"""Calling functions: told to the model in its prompt, kept to by a grammar, and read from its answer.

The model was not trained on a format of its own. The one used here, a JSON object between ``<tool_call>`` tags, is what
many others were trained on.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .schemas import ChatRequest, Message
from .structured import COMPACT_JSON, Grammar, closed, format_schema, json_options, json_rule
from .tool_schemas import AllowedToolChoice, Function, NamedToolChoice, chosen_names

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"
MAX_CALLS = 16  # of one answer
HEADER = re.compile(r'\s*\{"name": "([A-Za-z0-9_-]+)", "arguments": (?=\{)')

INTRODUCTION = """\
You may call functions. Here they are, one a line, with a JSON schema of their arguments:
<tools>
{functions}
</tools>
To call a function, write its name and its arguments as JSON between tags:
<tool_call>
{{"name": "FUNCTION", "arguments": {{...}}}}
</tool_call>
Its result comes back between <tool_response> tags."""
AUTO = "Call a function only where that helps; otherwise answer in words."
REQUIRED = "Answer with a call."
NAMED = "Answer with a call of {name}."
SINGLE = "Call one function at most."


def quoted(text: str) -> str:
    """Return a text as a literal of a Lark grammar."""
    return json.dumps(text)


@dataclass(frozen=True)
class ToolUse:
    """What a request lets the model call.

    Attributes:
        functions: what may be called; none where the request has no tools or forbids their use.
        required: whether the answer must be a call.
        parallel: whether it may be several.
        named: whether the request names the function.
    """

    functions: tuple[Function, ...] = ()
    required: bool = False
    parallel: bool = True
    named: bool = False

    @classmethod
    def of(cls, request: ChatRequest) -> ToolUse:
        """Return what a request lets the model call."""
        choice = request.tool_choice
        if not request.tools or choice == "none":
            return cls()
        names = chosen_names(choice)
        functions = tuple(tool.function for tool in request.tools if not names or tool.function.name in names)
        if isinstance(choice, NamedToolChoice):
            return cls(functions, required=True, parallel=False, named=True)
        mode = choice.allowed_tools.mode if isinstance(choice, AllowedToolChoice) else choice
        return cls(functions, mode == "required", request.parallel_tool_calls is not False)

    def __bool__(self) -> bool:
        return bool(self.functions)

    def instructions(self) -> str:
        """Return what the model is told, as a part of its system message."""
        lines = []
        for function in self.functions:
            shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
            lines.append(json.dumps({k: v for k, v in shown.items() if v is not None}, ensure_ascii=False))
        rule = AUTO
        if self.required:
            rule = NAMED.format(name=self.functions[0].name) if self.named else REQUIRED
        rules = [rule, *([] if self.parallel or self.named else [SINGLE])]
        return "\n".join([INTRODUCTION.format(functions="\n".join(lines)), *rules])

    def grammar(self, request: ChatRequest) -> Grammar:
        """Return the grammar of answers that hold calls: free text up to the first one, no text after it."""
        options = json_options(request) or COMPACT_JSON
        more = f" (NEXT call){{0,{MAX_CALLS - 1}}}" if self.parallel else ""
        calls = " | ".join(f"call_{i}" for i in range(len(self.functions)))
        lines = ["%llguidance {}", f"call: {calls}", f"NEXT: {quoted(chr(10) + OPEN)}"]
        for index, function in enumerate(self.functions):
            start = quoted(f'\n{{"name": {json.dumps(function.name)}, "arguments": ')
            lines.append(f"call_{index}: {start} {arguments_rule(function, options)} {quoted('}' + chr(10) + CLOSE)}")
        schema = format_schema(request.response_format)
        if self.required:
            lines.insert(1, f"start: {quoted(OPEN)} call{more}")
        elif schema is not None:
            lines.insert(1, f"start: answer | {quoted(OPEN)} call{more}")
            lines.append(f"answer: {json_rule(schema, options)}")
        else:
            lines.insert(1, f"start: FREE | before call{more}")
            lines += [f"before[lazy]: /(.|\\n)*/ {quoted(OPEN)}", f"FREE: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/"]
        return Grammar("tools", "\n".join(lines), "tools")


def arguments_rule(function: Function, options: dict[str, Any]) -> str:
    """Return the piece of a grammar for a function's arguments: an object of the properties that its schema names.

    A part of the schema that cannot be enforced is an error for a strict function and let go for others.
    """
    schema = {"type": "object", "properties": {}, **(function.parameters or {})}
    return json_rule(closed(schema), options, lenient=not function.strict)


def call_text(name: str, arguments: str) -> str:
    """Return a call as the model writes it."""
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments or "{}"}}}\n{CLOSE}'


def assistant_text(message: Message) -> str:
    """Return an assistant's turn with its calls, as the model wrote it."""
    calls = [call_text(call.function.name, call.function.arguments) for call in message.tool_calls or []]
    return "\n".join([*([message.text] if message.text else []), *calls])


def result_text(name: str, content: str) -> str:
    """Return a function's result as the model is shown it."""
    shown = json.dumps({"name": name, "content": content}, ensure_ascii=False)
    return f"{RESULT_OPEN}\n{shown}\n{RESULT_CLOSE}"


def called_names(messages: Sequence[Message]) -> dict[str, str]:
    """Return the function that each call of a conversation named, by the call's id."""
    return {call.id: call.function.name for message in messages for call in message.tool_calls or []}


# ---------------------------------------------------------------- reading answers


@dataclass
class CallDelta:
    """What a step added to a call: a piece of its arguments; its id and name at its beginning."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the piece of a stream."""
        if self.name is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass
class Call:
    """A call as far as it is written."""

    id: str
    name: str
    arguments: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the call as an answer shows it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ObjectScanner:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False

    def scan(self, text: str) -> tuple[int, bool]:
        """Return how many of the characters belong to the object, and whether it ends with them."""
        for index, character in enumerate(text):
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.escaped = character == "\\"
                self.in_string = character != '"'
            elif character == '"':
                self.in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth == 0:
                    return index + 1, True
        return len(text), False


def shared_end(text: str, word: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a word."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-n:])), 0)


@dataclass
class CallReader:
    """Parts an answer, as it comes, into text and calls.

    Attributes:
        text: the text so far.
        calls: the calls so far.
    """

    text: str = ""
    calls: list[Call] = field(default_factory=list)
    _waiting: str = ""
    _state: str = "text"
    _scanner: ObjectScanner = field(default_factory=ObjectScanner)

    def push(self, text: str, finished: bool = False) -> tuple[str, list[CallDelta]]:
        """Add a piece; returns what it adds to the text, and to the calls.

        Args:
            text: the piece.
            finished: whether it is the last one.
        """
        self._waiting += text
        shown, deltas = "", []
        while True:
            step = getattr(self, f"_read_{self._state}")
            more, delta, goes_on = step()
            shown += more
            deltas += [delta] if delta is not None else []
            if not goes_on:
                break
        if finished and self._state == "text":
            shown, self._waiting = shown + self._waiting, ""
        self.text += shown
        return shown, deltas

    def _read_text(self) -> tuple[str, CallDelta | None, bool]:
        before, tag, rest = self._waiting.partition(OPEN)
        if tag:
            self._waiting, self._state = rest, "header"
            return before, None, True
        held = shared_end(before, OPEN)
        shown, self._waiting = before[: len(before) - held], before[len(before) - held :]
        return shown, None, False

    def _read_header(self) -> tuple[str, CallDelta | None, bool]:
        found = HEADER.match(self._waiting)
        if found is None:
            return "", None, False
        self._waiting, self._state = self._waiting[found.end() :], "arguments"
        self._scanner = ObjectScanner()
        call = Call(f"call_{secrets.token_hex(12)}", found[1])
        self.calls.append(call)
        return "", CallDelta(len(self.calls) - 1, "", call.id, call.name), True

    def _read_arguments(self) -> tuple[str, CallDelta | None, bool]:
        if not self._waiting:
            return "", None, False
        count, ended = self._scanner.scan(self._waiting)
        piece, self._waiting = self._waiting[:count], self._waiting[count:]
        self._state = "tail" if ended else "arguments"
        self.calls[-1].arguments += piece
        return "", CallDelta(len(self.calls) - 1, piece), ended

    def _read_tail(self) -> tuple[str, CallDelta | None, bool]:
        """Skip what closes a call, and what stands between it and the next one."""
        _, tag, rest = self._waiting.partition(OPEN)
        if not tag:
            return "", None, False
        self._waiting, self._state = rest, "header"
        return "", None, True
