"""Chat completions: what a request means, and what the engine is asked."""

from __future__ import annotations

from .answers import Answers
from .errors import ApiError
from .generation import Generator, sampling_params
from .replies import Reply
from .schemas import ChatRequest
from .structured import Grammar, format_schema, json_grammar, json_options, requested_grammar
from .tools import ToolUse
from .turns import conversation_turns


def chat_grammar(request: ChatRequest, tools: ToolUse) -> Grammar | None:
    """Return the grammar that the answers to a request follow.

    Raises:
        ApiError: a field does not hold what its name says.
    """
    if tools:
        return tools.grammar(request)
    schema = format_schema(request.response_format)
    if schema is not None:
        return json_grammar(schema, "response_format", json_options(request))
    try:
        return requested_grammar(request)
    except ValueError as error:
        raise ApiError(400, str(error), request.forms()[0]) from error


class ChatEndpoint:
    """Serves ``/v1/chat/completions``.

    Args:
        generator: prepares requests for answers.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def parse(self, body: bytes) -> ChatRequest:
        """Read a request; errors as `Generator.parse`."""
        return self.generator.parse(body, ChatRequest)

    def check(self, request: ChatRequest) -> None:
        """Check a request; errors as `Generator.check`."""
        self.generator.check(request, request.n)

    async def submit(self, request: ChatRequest, answers: Answers) -> Reply:
        """Prepare the prompt and hand a request for each answer to the engine.

        Raises:
            ApiError: prompt or grammar cannot be used, or the engine does not take them.
        """
        generator, tools, count = self.generator, ToolUse.of(request), request.n or 1
        asked = bool(tools or request.forms())
        constraints = await generator.constraints(asked, lambda: chat_grammar(request, tools), count)
        prepared = await generator.builder.build(conversation_turns(request.messages, tools), ending=request.ending)
        max_tokens = generator.max_tokens(len(prepared.prompt), request, request.wanted_tokens)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        requests = []
        for index, constraint in enumerate(constraints):
            grammar = None if constraint is None else (lambda constraint=constraint: constraint)
            params = sampling_params(request, max_tokens, index, logprobs=logprobs, grammar=grammar)
            requests.append(generator.request(params, prepared.prompt, answers.sink(index)))
        answers.submit(requests)
        tokens, sizes = len(prepared.prompt), prepared.image_sizes
        name = generator.settings.model_name
        return Reply(request, name, tokens, sizes, answers, generator.token_bytes, tools)
