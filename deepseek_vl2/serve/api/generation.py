"""What all endpoints that generate have in common: checks of a request, its grammar, what the engine is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio
import anyio.to_thread

from deepseek_vl2.engine.detokenizer import TokenBytes
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.request import Event, Prompt, Request
from deepseek_vl2.engine.sampling_params import Constraint, SamplingParams

from .errors import ApiError
from .generation_fields import LOWEST_TEMPERATURE, GenerationFields
from .grammar_process import GrammarService
from .json_size import MAX_VALUES
from .prompts import PromptBuilder
from .schemas import RequestT, parse_body
from .settings import Settings
from .structured import Grammar

LEAST_TOP_P = 1e-9  # keeps the most likely token alone, as 0 does


def sampling_params(request: GenerationFields, max_tokens: int, index: int = 0, **more: Any) -> SamplingParams:
    """Return how a request's ``index``-th answer is to be written.

    Args:
        request: the request.
        max_tokens: the most tokens that the answer may have.
        index: which of its answers.
        **more: fields of `SamplingParams` that the endpoint finds out by itself.
    """
    temperature = 1.0 if request.temperature is None else request.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < LOWEST_TEMPERATURE else temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, LEAST_TOP_P),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        min_tokens=request.min_tokens or 0,
        seed=None if request.seed is None else (request.seed + index) % 2**63,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias={int(token): value for token, value in (request.logit_bias or {}).items()},
        stop=request.stop_words,
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        **more,
    )


class Generator:
    """Checks requests and prepares what the engine is asked.

    Args:
        engine: the engine.
        token_bytes: the tokenizer's table.
        builder: prepares prompts.
        grammars: makes constraints.
        settings: what the operator decided.
    """

    def __init__(
        self,
        engine: Engine,
        token_bytes: TokenBytes,
        builder: PromptBuilder,
        grammars: GrammarService,
        settings: Settings,
    ) -> None:
        self.engine = engine
        self.token_bytes = token_bytes
        self.builder = builder
        self.grammars = grammars
        self.compiler = grammars.compiler
        self.settings = settings

    def parse(self, body: bytes, kind: type[RequestT], most_values: int = MAX_VALUES) -> RequestT:
        """Read a request's body; errors as `parse_body`, and for another model than this server's."""
        return parse_body(body, kind, self.check_model, most_values)

    def check(self, request: GenerationFields, n: int | None = None) -> None:
        """Check what a request says about this server's limits.

        Raises:
            ApiError: it asks for too many answers, or tokens that there are not.
        """
        if n is not None and n > self.settings.max_choices:
            raise ApiError(400, f"n is {n}; this server writes at most {self.settings.max_choices} answers.", "n")
        self.check_tokens([int(token) for token in request.logit_bias or {}], "logit_bias")
        self.check_tokens(request.stop_token_ids or [], "stop_token_ids")

    def check_model(self, model: str) -> None:
        """Raise an `ApiError` where a request names another model."""
        name = self.settings.model_name
        if model != name:
            message = f"There is no model {model[:100]!r} here, but {name!r}."
            raise ApiError(404, message, "model", "model_not_found")

    def check_tokens(self, ids: list[int], field: str) -> None:
        """Raise an `ApiError` where one of the ids is no token."""
        vocabulary = self.compiler.vocabulary
        wrong = next((i for i in ids if i >= vocabulary), None)
        if wrong is not None:
            raise ApiError(400, f"{field}: there is no token {wrong}; the vocabulary has {vocabulary}.", field)

    async def constraints(
        self, asked: bool, grammar: Callable[[], Grammar | None], count: int
    ) -> Sequence[Constraint | None]:
        """Return a constraint for each of some answers; their grammar is written and compiled once.

        Args:
            asked: whether the request says anything about the form of its answers.
            grammar: returns the grammar, if there is one; called in another thread.
            count: the number of answers.

        Raises:
            ApiError: the grammar cannot be used.
        """
        found = await anyio.to_thread.run_sync(grammar, limiter=self.builder.limiter) if asked else None
        if found is None:
            return [None] * count
        try:
            return await self.grammars.constraints(found.kind, found.text, count)
        except ValueError as error:
            raise ApiError(400, str(error), found.field) from error

    def max_tokens(self, prompt: int, request: GenerationFields, wanted: int | None, field: str = "messages") -> int:
        """Return how long the answer may become: what was asked for, but no more than there is room for.

        Raises:
            ApiError: there is no room at all, or ``min_tokens`` cannot be reached.
        """
        limit = self.builder.max_length
        if prompt >= limit:
            what = f"The prompt has {prompt} tokens, which leaves no room for an answer within"
            raise self.builder.too_long(what, field)
        room = limit - prompt if wanted is None else min(wanted, limit - prompt)
        if (request.min_tokens or 0) > room:
            message = f"min_tokens is {request.min_tokens}, but the answer may have {room} tokens at most."
            raise ApiError(400, message, "min_tokens")
        return room

    def request(self, params: SamplingParams, prompt: Prompt, deliver: Callable[[Event], None]) -> Request:
        """Return what the engine is asked for one answer."""
        return Request(prompt=prompt, params=params, deliver=deliver, token_bytes=self.token_bytes)
