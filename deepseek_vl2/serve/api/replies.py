"""The bodies of responses: whole answers and pieces of a stream, in OpenAI's shape."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

from pydantic_core import to_json

from deepseek_vl2 import __version__
from deepseek_vl2.engine.detokenizer import ShownToken, TokenBytes
from deepseek_vl2.engine.request import Delta
from deepseek_vl2.utils.grounding import parse_grounding

from .answers import Answers, answer_error
from .errors import ApiError
from .generation_fields import StreamOptions
from .schemas import ChatRequest
from .tools import CallDelta, CallReader, ToolUse

# JSON has no infinity; OpenAI writes this for what cannot happen.
LEAST_LOGPROB = -9999.0
STREAM_END = b"data: [DONE]\n\n"
logger = logging.getLogger(__name__)


def grounding_of(text: str, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the boxes of an answer, and what was wrong with them, as plain dicts."""
    found = parse_grounding(text, sizes=sizes or None)
    return {
        "objects": [asdict(item) for item in found.objects],
        "problems": [asdict(problem) for problem in found.problems],
    }


def text_of(token_bytes: TokenBytes, ids: Sequence[int]) -> str:
    """Return the text of some tokens."""
    return b"".join(token_bytes[i] for i in ids).decode(errors="replace")


def logprob_entry(token_bytes: TokenBytes, token_id: int, logprob: float) -> dict[str, Any]:
    """Return a token with its log probability."""
    raw = token_bytes[token_id]
    return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}


def token_entry(token_bytes: TokenBytes, token: ShownToken) -> dict[str, Any]:
    """Return a token of an answer with its log probability, and the likeliest ones in its place."""
    assert token.logprobs is not None
    top = [logprob_entry(token_bytes, token_id, logprob) for token_id, logprob in token.logprobs.top]
    return {**logprob_entry(token_bytes, token.token_id, token.logprobs.chosen), "top_logprobs": top}


class StreamedReply(ABC):
    """Writes a response as server-sent events.

    Attributes:
        answers: where the answers come from.
        status: what the response is counted as: an error's, when one ended a stream.
    """

    answers: Answers
    status = 200

    @abstractmethod
    def opening(self) -> list[bytes]:
        """Return the events that begin a stream."""

    @abstractmethod
    def pieces(self, found: tuple[int, Delta]) -> list[bytes]:
        """Return the events for what came next, and of which answer."""

    @abstractmethod
    def closing(self) -> list[bytes]:
        """Return the events that end a stream."""

    def failed(self, error: ApiError) -> list[bytes]:
        """Return the events that end a stream in which something went wrong."""
        return [server_sent(error.body())]

    async def stream(self, first: tuple[int, Delta] | None) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events, those of a moment together; what goes wrong is an event too.

        Args:
            first: what came first, and of which answer; ``None`` when nothing has come yet.
        """
        told = self.opening()
        try:
            if first is not None:
                told += self.pieces(first)
            yield b"".join(told)
            told = []
            async for found in self.answers:
                yield b"".join(self.pieces(found))
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("A stream ended by a fault of the server.")
                error = answer_error(error)
            self.status = error.status
            yield b"".join([*told, *self.failed(error)])  # what begins a stream comes first, whatever went wrong
            return
        yield b"".join(self.closing())


class Reply(StreamedReply):
    """Writes the response to one request.

    Args:
        request: the request.
        model_name: the model's name.
        prompt_tokens: tokens of the prompt, those of images included.
        sizes: (width, height) in pixels of the request's images.
        answers: where the answers come from.
        token_bytes: the tokenizer's table.
        tools: what the answers may call.
    """

    def __init__(
        self,
        request: ChatRequest,
        model_name: str,
        prompt_tokens: int,
        sizes: Sequence[tuple[int, int]],
        answers: Answers,
        token_bytes: TokenBytes,
        tools: ToolUse,
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.sizes = sizes
        self.answers = answers
        self.token_bytes = token_bytes
        self.tools = tools
        self.texts = [""] * len(answers.requests)  # as far as they are streamed
        self.readers = [CallReader() for _ in answers.requests] if tools else []
        self.head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": f"deepseek_vl2-{__version__}",
        }

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens."""
        completion = sum(self.answers.completion_tokens.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    # ---------------------------------------------------------------- log probabilities

    def logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        """Return the log probabilities of some tokens, where the request wants them."""
        if not self.request.logprobs:
            return None
        return {"content": [token_entry(self.token_bytes, token) for token in tokens], "refusal": None}

    # ---------------------------------------------------------------- a whole answer

    async def whole(self) -> dict[str, Any]:
        """Return the response once all answers are done.

        Raises:
            ApiError: one of them failed.
        """
        found = await self.answers.whole()
        choices = [self._choice(i, one.text, one.tokens, one.finish_reason or "") for i, one in enumerate(found)]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def _choice(self, index: int, text: str, tokens: Sequence[ShownToken], reason: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.readers:
            reader = self.readers[index]
            reader.push(text, finished=True)
            if reader.calls:
                message["content"] = reader.text or None
                message["tool_calls"] = [call.as_dict() for call in reader.calls]
            reason = self._reason(index, reason)
        if self.request.grounding:
            message["grounding"] = grounding_of(message["content"] or "", self.sizes)
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": reason}

    def _reason(self, index: int, reason: str) -> str:
        """Return why an answer ended: as at OpenAI, a call that the request named is no reason of its own."""
        called = reason == "stop" and not self.tools.named and self.readers and self.readers[index].calls
        return "tool_calls" if called else reason

    # ---------------------------------------------------------------- a stream

    def _event(self, choices: list[dict[str, Any]], last: bool = False) -> bytes:
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        add_usage(chunk, self.request.stream_options, self.usage, last)
        return server_sent(chunk)

    def _piece(self, index: int, delta: dict[str, Any], tokens: Sequence[ShownToken], reason: str | None) -> bytes:
        logprobs = self.logprobs(tokens) if tokens else None
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def opening(self) -> list[bytes]:
        """Return the events that begin a stream."""
        return [self._piece(i, {"role": "assistant", "content": ""}, [], None) for i in range(len(self.texts))]

    def closing(self) -> list[bytes]:
        """Return the events that end a stream."""
        options = self.request.stream_options
        counted = options is not None and options.include_usage
        return [*([self._event([], last=True)] if counted else []), STREAM_END]

    def pieces(self, found: tuple[int, Delta]) -> list[bytes]:
        """Return the events for what came next, and of which answer."""
        index, delta = found
        text, ended = delta.text, delta.finish_reason is not None
        calls: list[CallDelta] = []
        if self.readers:
            text, calls = self.readers[index].push(delta.text, finished=ended)
        self.texts[index] += text
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        deltas += [{"tool_calls": [call.as_dict()]} for call in calls]
        if not deltas and delta.tokens and self.request.logprobs:
            deltas = [{"content": ""}]
        pieces = [self._piece(index, one, delta.tokens if i == 0 else [], None) for i, one in enumerate(deltas)]
        if ended:
            last = {"grounding": grounding_of(self.texts[index], self.sizes)} if self.request.grounding else {}
            pieces.append(self._piece(index, last, [], self._reason(index, delta.finish_reason or "")))
        return pieces


def add_usage(
    chunk: dict[str, Any], options: StreamOptions | None, usage: Callable[[], dict[str, Any]], last: bool
) -> None:
    """Add to an event of a stream what the request wants to know of the counts of tokens."""
    if options is not None and options.include_usage:
        chunk["usage"] = usage() if last or options.continuous_usage_stats else None


def server_sent(data: dict[str, Any]) -> bytes:
    """Return a dict as a server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"
