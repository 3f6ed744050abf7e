"""The bodies and the events of the Responses API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from deepseek_vl2.engine.detokenizer import ShownToken, TokenBytes
from deepseek_vl2.engine.request import Delta

from .answers import Answers
from .errors import ApiError
from .replies import StreamedReply, server_sent, token_entry
from .response_schemas import ResponsesRequest
from .response_store import ResponseStore, new_id
from .schemas import Message
from .tool_schemas import CalledFunction, ToolCall
from .tools import CallDelta, CallReader, ToolUse

STATUS = {"stop": "completed", "length": "incomplete"}


class ResponsesReply(StreamedReply):
    """Writes the response to one request.

    Args:
        request: the request.
        messages: the conversation, without the request's instructions.
        model_name: the model's name.
        prompt_tokens: tokens of the prompt, those of images included.
        answers: where the answer comes from.
        token_bytes: the tokenizer's table.
        tools: what the answer may call.
        store: keeps the response; ``None``: it is not kept.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        messages: Sequence[Message],
        model_name: str,
        prompt_tokens: int,
        answers: Answers,
        token_bytes: TokenBytes,
        tools: ToolUse,
        store: ResponseStore | None,
    ) -> None:
        self.request = request
        self.messages = messages
        self.prompt_tokens = prompt_tokens
        self.answers = answers
        self.token_bytes = token_bytes
        self.store = store
        self.reader = CallReader() if tools else None
        self.id = new_id() if store is None else store.new_id()
        self.created = int(time.time())
        self.model_name = model_name
        self.items: list[dict[str, Any]] = []  # of the output, those at work included
        self.number = 0

    # ---------------------------------------------------------------- bodies

    def body(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        """Return the response as it stands."""
        request = self.request
        asked = request.model_dump(by_alias=True, include={"tools", "text", "metadata"})
        choice = request.tool_choice
        done = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": asked["metadata"] or {},
            "model": self.model_name,
            "output": self.items if done else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": self.store is not None,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": (asked["text"] or {}).get("format") or {"type": "text"}},
            "tool_choice": choice or "auto" if choice is None or isinstance(choice, str) else choice.model_dump(),
            "tools": asked["tools"] or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": self.usage() if done else None,
            "user": request.user,
        }

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens."""
        completion = sum(self.answers.completion_tokens.values())
        return {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + completion,
        }

    async def whole(self) -> dict[str, Any]:
        """Return the response once the answer is done.

        Raises:
            ApiError: it failed.
        """
        (answer,) = await self.answers.whole()
        self._take(answer.text, answer.tokens, ended=True)
        return self._finish(answer.finish_reason or "")

    def _finish(self, reason: str) -> dict[str, Any]:
        """Return the body of a response that is done, and keep it."""
        status = STATUS[reason]
        self._close(status)
        body = self.body(status)
        if self.store is not None:
            self.store.put(body, [*self.messages, self._answer()])
        return body

    def _answer(self) -> Message:
        """Return the answer as a later request's conversation has it."""
        text = "".join(item["content"][0]["text"] for item in self.items if item["type"] == "message")
        calls = [
            ToolCall(id=item["call_id"], function=CalledFunction(name=item["name"], arguments=item["arguments"]))
            for item in self.items
            if item["type"] == "function_call"
        ]
        return Message(role="assistant", content=text, tool_calls=calls or None)

    # ---------------------------------------------------------------- items of the output

    def _take(self, text: str, tokens: Sequence[ShownToken], ended: bool) -> list[bytes]:
        """Add what came to the output; returns the events that tell of it."""
        calls: list[CallDelta] = []
        if self.reader is not None:
            text, calls = self.reader.push(text, finished=ended)
        events = self._add_text(text, tokens) if text or not (self.items or calls or self.reader) else []
        for call in calls:
            events += self._add_call(call)
        if ended and not self.items:  # an answer without a word is a message all the same
            events += self._add_text("", [])
        return events

    def _add_text(self, text: str, tokens: Sequence[ShownToken]) -> list[bytes]:
        events = []
        if not self.items:
            content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [content],
            }
            self.items.append(item)
            events.append(self._event("response.output_item.added", output_index=0, item={**item, "content": []}))
            events.append(self._content_event("response.content_part.added", part=dict(content)))
        content = self.items[0]["content"][0]
        found = [token_entry(self.token_bytes, token) for token in tokens] if self.request.wants_logprobs else []
        content["text"] += text
        content["logprobs"] += found
        if text:
            events.append(self._content_event("response.output_text.delta", delta=text, logprobs=found))
        return events

    def _add_call(self, delta: CallDelta) -> list[bytes]:
        events = []
        if delta.name is not None:
            events += self._close("completed")
            item = {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": delta.id,
                "name": delta.name,
                "arguments": "",
            }
            self.items.append(item)
            added = len(self.items) - 1
            events.append(self._event("response.output_item.added", output_index=added, item=dict(item)))
        current, index = self.items[-1], len(self.items) - 1
        current["arguments"] += delta.arguments
        if delta.arguments:
            name = "response.function_call_arguments.delta"
            events.append(self._event(name, item_id=current["id"], output_index=index, delta=delta.arguments))
        return events

    def _close(self, status: str) -> list[bytes]:
        """Note that the item at work is done; returns the events that tell of it."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item, index = self.items[-1], len(self.items) - 1
        item["status"] = status
        events = []
        if item["type"] == "message":
            content = item["content"][0]
            told = {"text": content["text"], "logprobs": content["logprobs"]}
            events.append(self._content_event("response.output_text.done", **told))
            events.append(self._content_event("response.content_part.done", part=content))
        else:
            name = "response.function_call_arguments.done"
            told = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event(name, item_id=item["id"], output_index=index, **told))
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    # ---------------------------------------------------------------- a stream

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return f"event: {kind}\n".encode() + server_sent(data)

    def _content_event(self, kind: str, **fields: Any) -> bytes:
        """Return an event that tells of the message's text."""
        return self._event(kind, item_id=self.items[0]["id"], output_index=0, content_index=0, **fields)

    def opening(self) -> list[bytes]:
        """Return the events that begin a stream."""
        body = self.body("in_progress")
        return [self._event(f"response.{name}", response=body) for name in ("created", "in_progress")]

    def pieces(self, found: tuple[int, Delta]) -> list[bytes]:
        """Return the events for what came next."""
        _, delta = found
        events = self._take(delta.text, delta.tokens, ended=delta.finish_reason is not None)
        if delta.finish_reason is not None:
            status = STATUS[delta.finish_reason]
            events += self._close(status)
            events.append(self._event(f"response.{status}", response=self._finish(delta.finish_reason)))
        return events

    def closing(self) -> list[bytes]:
        """Return the events that end a stream: the last piece did."""
        return []

    def failed(self, error: ApiError) -> list[bytes]:
        """Return the events that end a stream in which something went wrong."""
        return [self._event("response.failed", response=self.body("failed", error))]
