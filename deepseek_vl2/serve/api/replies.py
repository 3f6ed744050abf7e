"""The bodies of responses: whole answers and pieces of a stream, in OpenAI's shape."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from typing import Any

from deepseek_vl2 import __version__
from deepseek_vl2.engine.detokenizer import ShownToken, TokenBytes
from deepseek_vl2.engine.request import Delta
from deepseek_vl2.utils.grounding import parse_grounding

from .answers import Answers
from .errors import ApiError
from .schemas import ChatRequest

# JSON has no infinity; OpenAI writes this for what cannot happen.
LEAST_LOGPROB = -9999.0


def grounding_of(text: str, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return the boxes of an answer, and what was wrong with them, as plain dicts."""
    found = parse_grounding(text, sizes=sizes or None)
    return {
        "objects": [asdict(item) for item in found.objects],
        "problems": [asdict(problem) for problem in found.problems],
    }


class Reply:
    """Writes the response to one request.

    Args:
        request: the request.
        model_name: the model's name.
        prompt_tokens: tokens of the prompt, those of images included.
        sizes: (width, height) in pixels of the request's images.
        answers: where the answers come from.
        token_bytes: the tokenizer's table.

    Attributes:
        status: what the response is counted as: an error's, when one ended a stream.
    """

    def __init__(
        self,
        request: ChatRequest,
        model_name: str,
        prompt_tokens: int,
        sizes: Sequence[tuple[int, int]],
        answers: Answers,
        token_bytes: TokenBytes,
    ) -> None:
        self.request = request
        self.prompt_tokens = prompt_tokens
        self.sizes = sizes
        self.answers = answers
        self.token_bytes = token_bytes
        self.status = 200
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

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.token_bytes[token_id]
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(raw)}

    def _entry(self, token: ShownToken) -> dict[str, Any]:
        assert token.logprobs is not None
        top = [self._token(token_id, logprob) for token_id, logprob in token.logprobs.top]
        return {**self._token(token.token_id, token.logprobs.chosen), "top_logprobs": top}

    def logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        """Return the log probabilities of some tokens, where the request wants them."""
        if not self.request.logprobs:
            return None
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

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
        if self.request.grounding:
            message["grounding"] = grounding_of(text, self.sizes)
        return {"index": index, "message": message, "logprobs": self.logprobs(tokens), "finish_reason": reason}

    # ---------------------------------------------------------------- a stream

    @property
    def _include_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return server_sent(chunk)

    def _piece(self, index: int, delta: dict[str, Any], tokens: Sequence[ShownToken], reason: str | None) -> bytes:
        logprobs = self.logprobs(tokens) if tokens else None
        return self._event([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    async def stream(self, first: tuple[int, Delta] | None) -> AsyncIterator[bytes]:
        """Yield the response as server-sent events; what goes wrong from here on is an event too.

        Args:
            first: what came first, and of which answer; ``None`` when nothing has come yet.
        """
        texts = [""] * len(self.answers.requests)
        for index in range(len(texts)):
            yield self._piece(index, {"role": "assistant", "content": ""}, [], None)
        try:
            if first is not None:
                for event in self._pieces(first, texts):
                    yield event
            async for found in self.answers:
                for event in self._pieces(found, texts):
                    yield event
        except ApiError as error:
            self.status = error.status
            yield server_sent(error.body())
            return
        if self._include_usage:
            yield self._event([], self.usage())
        yield b"data: [DONE]\n\n"

    def _pieces(self, found: tuple[int, Delta], texts: list[str]) -> list[bytes]:
        index, delta = found
        texts[index] += delta.text
        pieces = []
        if delta.text or (delta.tokens and self.request.logprobs):
            pieces.append(self._piece(index, {"content": delta.text}, delta.tokens, None))
        if delta.finish_reason is not None:
            last = {"grounding": grounding_of(texts[index], self.sizes)} if self.request.grounding else {}
            pieces.append(self._piece(index, last, [], delta.finish_reason))
        return pieces


def server_sent(data: dict[str, Any]) -> bytes:
    """Return a dict as a server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
