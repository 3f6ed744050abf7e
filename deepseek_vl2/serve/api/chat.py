"""Chat completions: from a request's bytes to its response."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
from collections.abc import Iterator, Sequence

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from deepseek_vl2.engine.detokenizer import TokenBytes
from deepseek_vl2.engine.engine import Engine
from deepseek_vl2.engine.request import Delta
from deepseek_vl2.engine.request import Request as EngineRequest
from deepseek_vl2.engine.sampling_params import Constraint, SamplingParams

from .answers import Answers, Deadline, Disconnected, Mailbox, unless_disconnected
from .body import BodyBudget, check_content_type, read_body
from .errors import ApiError
from .event_stream import CLIENT_LEFT, EventStream
from .grammar_process import GrammarService
from .grammar_rules import Kind
from .metrics import Metrics
from .prompts import PreparedPrompt, PromptBuilder
from .replies import Reply
from .schemas import LOWEST_TEMPERATURE, ChatRequest, JsonObjectFormat, JsonSchemaFormat, parse_request
from .settings import Settings

logger = logging.getLogger(__name__)

PARSING_THREADS = 2  # Python runs one at a time; the event loop is to be the next in turn
LAST_WORDS_SECONDS = 5.0  # for the event that tells a reading client that time ran out


LEAST_TOP_P = 1e-9  # keeps the most likely token alone, as 0 does


def sampling_params(
    request: ChatRequest, index: int, max_tokens: int, constraint: Constraint | None = None
) -> SamplingParams:
    """Return how to choose the tokens of a request's ``index``-th answer, and what ends it."""
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = None if request.seed is None else (request.seed + index) % 2**63
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < LOWEST_TEMPERATURE else temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, LEAST_TOP_P),
        seed=seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias={int(token): value for token, value in (request.logit_bias or {}).items()},
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        stop=request.stop_words,
        ignore_eos=bool(request.ignore_eos),
        grammar=None if constraint is None else lambda: constraint,
    )


def grammar_of(asked: ChatRequest) -> tuple[Kind, str] | None:
    """Return the grammar that a request's answers must follow."""
    if asked.regex is not None:
        return "regex", asked.regex
    form = asked.response_format
    if isinstance(form, JsonSchemaFormat):
        return "json_schema", json.dumps(form.json_schema.schema_)
    return ("json_schema", json.dumps({"type": "object"})) if isinstance(form, JsonObjectFormat) else None


class ChatService:
    """Serves chat completions.

    Args:
        engine: the engine.
        token_bytes: the tokenizer's table.
        builder: prepares prompts.
        grammars: makes constraints.
        metrics: counts.
        settings: what the operator decided.
    """

    def __init__(
        self,
        engine: Engine,
        token_bytes: TokenBytes,
        builder: PromptBuilder,
        grammars: GrammarService,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self.engine = engine
        self.token_bytes = token_bytes
        self.mailbox: Mailbox | None = None
        self.builder = builder
        self.grammars = grammars
        self.metrics = metrics
        self.settings = settings
        self.in_hand = 0
        self.bodies = BodyBudget(settings.body_bytes)
        self.parsing = anyio.CapacityLimiter(PARSING_THREADS)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[contextlib.ExitStack]:
        """Count a request; what is put on the stack outlives the block with a stream."""
        self._check_room()
        self.in_hand += 1
        stack = contextlib.ExitStack()
        stack.callback(self._release)
        try:
            yield stack
        except BaseException:
            stack.close()
            raise

    def _check_room(self) -> None:
        if self.in_hand >= self.settings.max_requests:
            raise ApiError(429, f"The server has {self.in_hand} requests in hand. Try again later.", code="queue_full")

    def _release(self) -> None:
        self.in_hand -= 1

    async def serve(self, request: Request) -> Response:
        """Return the response to a request.

        Raises:
            ApiError: with the status to answer.
        """
        deadline = Deadline(self.settings.request_seconds)
        answers = Answers(self.engine, deadline)

        def count(status: int) -> None:
            self.metrics.count(status, deadline.elapsed(), answers.first_token_seconds)

        try:
            asked = await self._read(request)
            with self._admitted() as stack:
                stack.callback(answers.cancel)
                response = await self._respond(request, asked, answers, stack)
        except ApiError as error:
            count(error.status)
            raise
        except (Disconnected, ClientDisconnect):
            count(CLIENT_LEFT)
            return Response(status_code=CLIENT_LEFT)
        except BaseException:
            count(500)
            raise
        if isinstance(response, EventStream):
            response.on_end = count  # a stream is over when its last event is sent
        else:
            count(response.status_code)
        return response

    async def _read(self, request: Request) -> ChatRequest:
        """Read a request's body; until it has come, however slowly, it takes nobody's place."""
        check_content_type(request)
        self._check_room()
        settings = self.settings
        body = await read_body(request, settings.max_body_bytes, settings.body_seconds, self.bodies)
        return await anyio.to_thread.run_sync(parse_request, body, limiter=self.parsing)

    async def _respond(
        self, request: Request, asked: ChatRequest, answers: Answers, stack: contextlib.ExitStack
    ) -> Response:
        self._check(asked)

        async def prepare() -> Reply:
            with answers.deadline.enforced():
                return await self._submit(asked, answers)

        reply = await unless_disconnected(request, prepare)
        if asked.stream:
            # After the first token, so that what fails before has a status of its own; but not much later, since
            # clients and proxies give up a connection on which nothing comes.
            first = await unless_disconnected(request, functools.partial(self._first, answers))
            left = answers.deadline.left()
            seconds = None if left is None else left + LAST_WORDS_SECONDS
            return EventStream(
                reply.stream(first), stack.close, seconds, self.settings.ping_seconds, lambda: reply.status
            )
        response = JSONResponse(await unless_disconnected(request, reply.whole))
        stack.close()
        return response

    async def _first(self, answers: Answers) -> tuple[int, Delta] | None:
        """Return what comes first; ``None`` when it takes long."""
        with anyio.move_on_after(self.settings.first_byte_seconds):
            return await answers.next()
        return None

    def _check(self, asked: ChatRequest) -> None:
        name = self.settings.model_name
        if asked.model != name:
            message = f"There is no model {asked.model[:100]!r} here, but {name!r}."
            raise ApiError(404, message, "model", "model_not_found")
        if asked.n is not None and asked.n > self.settings.max_choices:
            raise ApiError(400, f"n is {asked.n}; this server writes at most {self.settings.max_choices} answers.", "n")
        vocabulary = self.grammars.compiler.vocabulary
        for token in asked.logit_bias or {}:
            if int(token) >= vocabulary:
                message = f"logit_bias: there is no token {token}; the vocabulary has {vocabulary}."
                raise ApiError(400, message, "logit_bias")

    async def _submit(self, asked: ChatRequest, answers: Answers) -> Reply:
        """Prepare the prompt and hand a request for each answer to the engine."""
        count = asked.n or 1
        constraints = await self._constraints(asked, count)
        prepared = await self.builder.build(asked)
        max_tokens = self._max_tokens(asked, prepared)
        if self.mailbox is None or self.mailbox.loop is not asyncio.get_running_loop():
            self.mailbox = Mailbox()
        requests = [
            EngineRequest(
                prompt=prepared.prompt,
                params=sampling_params(asked, index, max_tokens, constraints[index]),
                deliver=answers.sink(index, self.mailbox),
                token_bytes=self.token_bytes,
            )
            for index in range(count)
        ]
        answers.submit(requests)
        tokens, sizes = len(prepared.prompt), prepared.image_sizes
        return Reply(asked, self.settings.model_name, tokens, sizes, answers, self.token_bytes)

    async def _constraints(self, asked: ChatRequest, count: int) -> Sequence[Constraint | None]:
        """Return the grammar of each answer; it is compiled once for all of them."""
        grammar = await anyio.to_thread.run_sync(grammar_of, asked, limiter=self.parsing)
        if grammar is None:
            return [None] * count
        try:
            return await self.grammars.constraints(*grammar, count)
        except ValueError as error:
            raise ApiError(400, str(error), "regex" if asked.regex else "response_format") from error

    def _max_tokens(self, asked: ChatRequest, prepared: PreparedPrompt) -> int:
        """Return how long the answer may become: what was asked for, or all the room there is."""
        prompt, limit = len(prepared.prompt), self.builder.max_length
        if prompt >= limit:
            raise self.builder.too_long(f"The prompt has {prompt} tokens, which leaves no room for an answer within")
        wanted = asked.wanted_tokens
        if wanted is not None and prompt + wanted > limit:
            raise self.builder.too_long(f"The prompt has {prompt} tokens, max_tokens is {wanted}: together more than")
        return limit - prompt if wanted is None else wanted


def check_api_key(request: Request, keys: tuple[str, ...]) -> None:
    """Raise an `ApiError` for a request that bears none of the keys."""
    if not keys:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes: some clients write other letters than ASCII in UTF-8, some in Latin-1.
    forms = given.strip().encode("latin-1"), given.strip().encode()
    # All of them are compared, each in constant time, so that the time tells nothing.
    matches = [secrets.compare_digest(form, key.encode()) for key in keys for form in forms]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "Give a valid API key: 'Authorization: Bearer KEY'.", code="invalid_api_key")
