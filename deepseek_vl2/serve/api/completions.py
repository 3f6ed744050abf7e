"""Completions: text that goes on from a prompt, without the turns of a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import anyio.to_thread
from pydantic import ConfigDict, Field, model_validator

from deepseek_vl2 import __version__
from deepseek_vl2.engine.detokenizer import ShownToken
from deepseek_vl2.engine.request import Delta, Prompt

from .answers import Answers
from .errors import ApiError
from .generation import Generator, sampling_params
from .generation_fields import (
    LENGTH_MARK,
    TEXT_MARK,
    GenerationFields,
    Number,
    ResponseFormat,
    StreamOptions,
    TokenId,
)
from .json_size import MAX_VALUES
from .page_rules import all_of, needs, not_together
from .replies import LEAST_LOGPROB, STREAM_END, StreamedReply, add_usage, server_sent, text_of
from .structured import Grammar, format_schema, json_grammar, json_options, requested_grammar
from .tool_schemas import WHOLE

MAX_PROMPTS = 64
DEFAULT_TOKENS = 16  # as at OpenAI

PROMPT_LENGTH: dict[str, Any] = {LENGTH_MARK: -1}  # there is to be room for an answer
TextToken = Annotated[TokenId, Field(json_schema_extra={TEXT_MARK: True})]
Tokens = Annotated[list[TextToken], Field(min_length=1, fail_fast=True, json_schema_extra=PROMPT_LENGTH)]


class CompletionRequest(GenerationFields):
    """The body of a completion request."""

    model_config = ConfigDict(
        json_schema_extra=all_of(
            needs("stream_options", "stream"), not_together("echo", "logprobs"), not_together("n", "best_of")
        )
    )

    model: str
    prompt: (
        Annotated[str, Field(description="A text; the token that begins every sequence is put in front.")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[
            list[TextToken],
            Field(
                min_length=1,
                fail_fast=True,
                description="Tokens, taken as they are.",
                json_schema_extra=PROMPT_LENGTH,
            ),
        ]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Number | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        default=None, description="Nothing else than n is supported."
    )
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = Field(
        default=None, description="Default: 16. At most what fits."
    )
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    echo: bool | None = Field(default=None, description="Begin the text with the prompt.")
    suffix: Literal[""] | None = None
    response_format: ResponseFormat | None = None
    add_special_tokens: bool | None = Field(default=None, description="false: nothing is put in front of a text.")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of must be n: this server returns every answer that it writes")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo cannot be used with logprobs: the prompt's tokens have no log probabilities here")
        return self

    def forms(self) -> list[str]:
        """Return the names of the fields given that constrain the answer."""
        formatted = self.response_format is not None and self.response_format.type != "text"
        return [*["response_format"] * formatted, *super().forms()]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, each a text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item,return-value]


def completion_grammar(request: CompletionRequest) -> Grammar | None:
    """Return the grammar that the answers follow; errors as `chat_grammar`."""
    schema = format_schema(request.response_format)
    if schema is not None:
        return json_grammar(schema, "response_format", json_options(request))
    try:
        return requested_grammar(request)
    except ValueError as error:
        raise ApiError(400, str(error), request.forms()[0]) from error


class CompletionEndpoint:
    """Serves ``/v1/completions``.

    Args:
        generator: prepares requests for answers.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def parse(self, body: bytes) -> CompletionRequest:
        """Read a request; errors as `Generator.parse`."""
        return self.generator.parse(body, CompletionRequest, MAX_VALUES + self.generator.builder.max_length)

    def check(self, request: CompletionRequest) -> None:
        """Check a request; errors as `Generator.check`."""
        self.generator.check(request, request.n)

    async def submit(self, request: CompletionRequest, answers: Answers) -> CompletionReply:
        """Prepare the prompts and hand a request for each answer to the engine.

        Raises:
            ApiError: a prompt or the grammar cannot be used, or the engine does not take them.
        """
        generator, count = self.generator, request.n or 1
        self._check_number(count * len(request.prompts))
        prompts = await anyio.to_thread.run_sync(self._prompts, request, limiter=generator.builder.limiter)
        constraints = await generator.constraints(
            bool(request.forms()), lambda: completion_grammar(request), count * len(prompts)
        )
        wanted = DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
        limits = [generator.max_tokens(len(prompt), request, wanted, "prompt") for prompt in prompts]
        requests = []
        for index, constraint in enumerate(constraints):
            grammar = None if constraint is None else (lambda constraint=constraint: constraint)
            prompt, number = prompts[index // count], index % count
            params = sampling_params(
                request, limits[index // count], number, logprobs=request.logprobs, grammar=grammar
            )
            requests.append(generator.request(params, prompt, answers.sink(index)))
        answers.submit(requests)
        return CompletionReply(request, generator, prompts, answers)

    def _check_number(self, answers: int) -> None:
        """Refuse more answers than would ever be taken together."""
        engine = self.generator.engine
        queue_size = engine.options.queue_size
        most = None if queue_size is None else engine.scheduler.max_batch + queue_size
        if most is not None and answers > most:
            message = f"prompt: {answers} answers are more than the {most} that this server takes at once."
            raise ApiError(400, message, "prompt")

    def _prompts(self, request: CompletionRequest) -> list[Prompt]:
        builder = self.generator.builder
        processor, found = builder.processor, []
        for source in request.prompts:
            if isinstance(source, str):
                builder.check_size(len(source), "prompt")
                ids = builder.encode_text(source, bos=request.add_special_tokens is not False)
                if not ids:
                    raise ApiError(400, "The prompt is empty, and add_special_tokens puts nothing in front.", "prompt")
            else:
                self.generator.check_tokens(source, "prompt")
                ids = source
                if processor.image_token_id in ids:
                    raise ApiError(400, "The prompt has tokens of images, which belong to chat completions.", "prompt")
            found.append(Prompt(ids, shared=True))
        return found


class CompletionReply(StreamedReply):
    """Writes the response to a completion request.

    Args:
        request: the request.
        generator: knows the model's name and tokens.
        prompts: the prompts.
        answers: where the answers come from: ``n`` for each prompt, in order.
    """

    def __init__(
        self, request: CompletionRequest, generator: Generator, prompts: Sequence[Prompt], answers: Answers
    ) -> None:
        self.request = request
        self.answers = answers
        self.token_bytes = generator.token_bytes
        self.prompts = prompts
        self.prompt_tokens = sum(map(len, prompts))
        self.starts = [len(self._echo(i)) for i in range(len(answers.requests))]  # of the answer within the text
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generator.settings.model_name,
            "system_fingerprint": f"deepseek_vl2-{__version__}",
        }

    def _echo(self, index: int) -> str:
        """Return the text of an answer's prompt, where it is to be shown."""
        if not self.request.echo:
            return ""
        source = self.request.prompts[index // (self.request.n or 1)]
        return source if isinstance(source, str) else text_of(self.token_bytes, source)

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens."""
        completion = sum(self.answers.completion_tokens.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def logprobs(self, tokens: Sequence[ShownToken], start: int) -> dict[str, Any] | None:
        """Return the log probabilities of some tokens of an answer, where the request wants them.

        Args:
            tokens: the tokens.
            start: where the answer begins in the text that is shown.
        """
        if self.request.logprobs is None:
            return None
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            assert token.logprobs is not None
            text = self._text(token.token_id)
            likely = [*token.logprobs.top, (token.token_id, token.logprobs.chosen)]
            found["tokens"].append(text)
            found["token_logprobs"].append(max(token.logprobs.chosen, LEAST_LOGPROB))
            found["top_logprobs"].append({self._text(i): max(value, LEAST_LOGPROB) for i, value in likely})
            found["text_offset"].append(start + token.start)
        return found

    def _text(self, token_id: int) -> str:
        return self.token_bytes[token_id].decode(errors="replace")

    async def whole(self) -> dict[str, Any]:
        """Return the response once all answers are done.

        Raises:
            ApiError: one of them failed.
        """
        choices = []
        for index, answer in enumerate(await self.answers.whole()):
            logprobs = self.logprobs(answer.tokens, self.starts[index])
            choices.append(self._choice(index, self._echo(index) + answer.text, logprobs, answer.finish_reason))
        return {**self.head, "choices": choices, "usage": self.usage()}

    @staticmethod
    def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    # ---------------------------------------------------------------- a stream

    def _event(self, choices: list[dict[str, Any]], last: bool = False) -> bytes:
        chunk: dict[str, Any] = {**self.head, "choices": choices}
        add_usage(chunk, self.request.stream_options, self.usage, last)
        return server_sent(chunk)

    def opening(self) -> list[bytes]:
        """Return the events that begin a stream: the prompts, where they are to be shown."""
        if not self.request.echo:
            return []
        return [self._event([self._choice(i, self._echo(i), None, None)]) for i in range(len(self.answers.requests))]

    def pieces(self, found: tuple[int, Delta]) -> list[bytes]:
        """Return the events for what came next, and of which answer."""
        index, delta = found
        logprobs = self.logprobs(delta.tokens, self.starts[index])
        return [self._event([self._choice(index, delta.text, logprobs, delta.finish_reason)])]

    def closing(self) -> list[bytes]:
        """Return the events that end a stream."""
        options = self.request.stream_options
        counted = options is not None and options.include_usage
        return [*([self._event([], last=True)] if counted else []), STREAM_END]
