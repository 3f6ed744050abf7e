"""Chat completions: from a request's bytes to its response."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Iterator

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .answers import Answers, Deadline, Disconnected, unless_disconnected
from .body import check_content_type, read_body
from .engine import Engine
from .errors import ApiError
from .grammar import Constraint, GrammarCompiler
from .metrics import Metrics
from .prompts import PreparedPrompt, PromptBuilder
from .replies import Reply
from .sampling import SamplingOptions
from .schemas import LOWEST_TEMPERATURE, ChatRequest, JsonObjectFormat, JsonSchemaFormat, parse_request
from .sequence import Job
from .settings import Settings

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499  # what nginx calls it; nobody is there to read it
LAST_WORDS_SECONDS = 5.0  # for the event that tells a reading client that time ran out


class EventStream(Response):
    """A stream of server-sent events, which ends when the client leaves.

    Args:
        events: the events.
        close: called at the end, however it comes.
        seconds: when it ends all the same, for a client that stays and reads nothing; ``None`` for never.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None], seconds: float | None = None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events = events
        self.close = close
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with anyio.create_task_group() as group:
                group.start_soon(self._watch, receive, group.cancel_scope)
                if self.seconds is not None:
                    group.cancel_scope.deadline = anyio.current_time() + self.seconds
                with contextlib.suppress(OSError):  # the client left while it was written to
                    async for event in self.events:
                        await send({"type": "http.response.body", "body": event, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                group.cancel_scope.cancel()
        finally:
            self.close()

    @staticmethod
    async def _watch(receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


def sampling_options(request: ChatRequest, index: int) -> SamplingOptions:
    """Return how to choose the tokens of a request's ``index``-th answer."""
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = None if request.seed is None else (request.seed + index) % 2**63
    return SamplingOptions(
        temperature=0.0 if temperature < LOWEST_TEMPERATURE else temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias={int(token): value for token, value in (request.logit_bias or {}).items()},
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


class ChatService:
    """Serves chat completions.

    Args:
        engine: the engine.
        builder: prepares prompts.
        compiler: makes constraints.
        metrics: counts.
        settings: what the operator decided.
    """

    def __init__(
        self,
        engine: Engine,
        builder: PromptBuilder,
        compiler: GrammarCompiler,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self.engine = engine
        self.builder = builder
        self.compiler = compiler
        self.metrics = metrics
        self.settings = settings
        self.in_hand = 0

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[contextlib.ExitStack]:
        """Count a request from its body on; what is put on the stack outlives the block with a stream."""
        if self.in_hand >= self.settings.max_requests:
            raise ApiError(429, f"The server has {self.in_hand} requests in hand. Try again later.", code="queue_full")
        self.in_hand += 1
        stack = contextlib.ExitStack()
        stack.callback(self._release)
        try:
            yield stack
        except BaseException:
            stack.close()
            raise

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
            with self._admitted() as stack:
                stack.callback(answers.cancel)
                response = await self._respond(request, answers, stack)
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
            stack.callback(count, response.status_code)  # a stream is over when its last event is sent
        else:
            count(response.status_code)
        return response

    async def _respond(self, request: Request, answers: Answers, stack: contextlib.ExitStack) -> Response:
        check_content_type(request)
        body = await read_body(request, self.settings.max_body_bytes, self.settings.body_seconds)
        asked = await anyio.to_thread.run_sync(parse_request, body)
        del body
        self._check(asked)

        async def prepare() -> Reply:
            with answers.deadline.enforced():
                return await self._submit(asked, answers)

        reply = await unless_disconnected(request, prepare)
        if asked.stream:
            # Only after the first token, so that what fails before has a status of its own.
            first = await unless_disconnected(request, answers.next)
            left = answers.deadline.left()
            return EventStream(reply.stream(first), stack.close, None if left is None else left + LAST_WORDS_SECONDS)
        response = JSONResponse(await unless_disconnected(request, reply.whole))
        stack.close()
        return response

    def _check(self, asked: ChatRequest) -> None:
        name = self.settings.model_name
        if asked.model != name:
            message = f"There is no model {asked.model[:100]!r} here, but {name!r}."
            raise ApiError(404, message, "model", "model_not_found")
        if asked.n is not None and asked.n > self.settings.max_choices:
            raise ApiError(400, f"n is {asked.n}; this server writes at most {self.settings.max_choices} answers.", "n")
        vocabulary = self.compiler.vocabulary
        for token in asked.logit_bias or {}:
            if int(token) >= vocabulary:
                message = f"logit_bias: there is no token {token}; the vocabulary has {vocabulary}."
                raise ApiError(400, message, "logit_bias")

    async def _submit(self, asked: ChatRequest, answers: Answers) -> Reply:
        """Prepare the prompt and hand the jobs to the engine."""
        count = asked.n or 1
        constraints = await anyio.to_thread.run_sync(self._constraints, asked, count, limiter=self.builder.limiter)
        prepared = await self.builder.build(asked)
        max_tokens = self._max_tokens(asked, prepared)
        jobs = [
            Job(
                prompt=prepared.prompt,
                sampling=sampling_options(asked, index),
                max_tokens=max_tokens,
                deliver=answers.sink(index),
                stop_words=asked.stop_words,
                constraint=constraints[index],
                ignore_eos=bool(asked.ignore_eos),
            )
            for index in range(count)
        ]
        answers.submit(jobs)
        tokens, sizes = len(prepared.prompt), prepared.image_sizes
        return Reply(asked, self.settings.model_name, tokens, sizes, answers, self.engine.token_bytes)

    def _constraints(self, asked: ChatRequest, count: int) -> list[Constraint | None]:
        try:
            return [self._constraint(asked) for _ in range(count)]
        except ValueError as error:
            raise ApiError(400, str(error), "regex" if asked.regex else "response_format") from error

    def _constraint(self, asked: ChatRequest) -> Constraint | None:
        if asked.regex is not None:
            return self.compiler.regex(asked.regex)
        form = asked.response_format
        if isinstance(form, JsonSchemaFormat):
            return self.compiler.json_schema(form.json_schema.schema_)
        return self.compiler.json_object() if isinstance(form, JsonObjectFormat) else None

    def _max_tokens(self, asked: ChatRequest, prepared: PreparedPrompt) -> int:
        """Return how long the answer may become: what was asked for, or all the room there is."""
        prompt, limit = len(prepared.prompt), self.engine.options.max_length
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
    # All of them are compared, each in constant time, so that the time tells nothing.
    matches = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(401, "Give a valid API key: 'Authorization: Bearer KEY'.", code="invalid_api_key")
