"""Tokens without an answer: ``/tokenize`` and ``/detokenize``, as vLLM has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Annotated, Any

import anyio
import anyio.to_thread
from pydantic import ConfigDict, Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse

from .body import BodyReader
from .endings import ONE_ENDING, Ending, ending_of
from .errors import ApiError
from .generation import Generator
from .generation_fields import LENGTH_MARK, TokenId
from .json_size import MAX_VALUES
from .replies import text_of
from .schemas import ContinueFinalMessage, GenerationPrompt, ImagePart, Messages, TemplateOptions
from .tool_schemas import MAX_TOOLS, Strict, Tool
from .tools import ToolUse
from .turns import conversation_turns


def _given(types: dict[str, str], required: str) -> dict[str, Any]:
    """Return what JSON Schema says of one of the two ways to ask."""
    return {"properties": {name: {"type": kind} for name, kind in types.items()}, "required": [required]}


class TokenizeRequest(Strict):
    """The body of a request for the tokens of a text, or of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "anyOf": [
                        _given({"prompt": "string", "messages": "null", "tools": "null"}, "prompt"),
                        _given({"prompt": "null", "messages": "array"}, "messages"),
                    ]
                },
                ONE_ENDING,
            ]
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(default=None, description="false: nothing is put in front of a text.")
    add_generation_prompt: GenerationPrompt = None
    continue_final_message: ContinueFinalMessage = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _text_or_conversation(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools belong to messages")
        self.ending  # noqa: B018 - says what contradicts itself
        for index, message in enumerate(self.messages or []):
            for number, part in enumerate(message.parts):
                if isinstance(part, ImagePart):
                    part.at(f"messages.{index}.content.{number}.image_url")
        return self

    @property
    def ending(self) -> Ending:
        """Return where the conversation ends."""
        role = self.messages[-1].role if self.messages else ""
        return ending_of(self.chat_template_kwargs, role, self.add_generation_prompt, self.continue_final_message)


class DetokenizeRequest(Strict):
    """The body of a request for the text of tokens."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, json_schema_extra={LENGTH_MARK: 0})]


class TokenService:
    """Serves ``/tokenize`` and ``/detokenize``.

    Args:
        generator: knows the model's name, its tokens and its prompts.
        bodies: reads requests.
        admitted: counts requests in hand, see `GenerationService.admitted`.
    """

    def __init__(
        self,
        generator: Generator,
        bodies: BodyReader,
        admitted: Callable[[], AbstractContextManager[ExitStack]],
    ) -> None:
        self.generator = generator
        self.bodies = bodies
        self.admitted = admitted

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        values = MAX_VALUES + self.generator.builder.max_length
        return await self.bodies.read(request, lambda body: self.generator.parse(body, kind, values))

    async def tokenize(self, request: Request) -> JSONResponse:
        """Return the tokens of a prompt, those of images included.

        Raises:
            ApiError: the request is not one, or its prompt cannot be used.
        """
        asked: TokenizeRequest = await self._read(request, TokenizeRequest)
        generator = self.generator
        with self.admitted() as stack, stack:
            if asked.messages is not None:
                tools = ToolUse(tuple(tool.function for tool in asked.tools or []))
                turns = conversation_turns(asked.messages, tools)
                ids = (await generator.builder.build(turns, ending=asked.ending)).prompt.ids
            else:
                ids = await anyio.to_thread.run_sync(self._text_ids, asked, limiter=generator.builder.limiter)
        found: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": generator.builder.max_length,
            "tokens": ids,
            "token_strs": None,
        }
        if asked.return_token_strs:
            found["token_strs"] = generator.builder.processor.tokenizer.convert_ids_to_tokens(ids)
        return JSONResponse(found)

    def _text_ids(self, asked: TokenizeRequest) -> list[int]:
        assert asked.prompt is not None
        builder = self.generator.builder
        builder.check_size(len(asked.prompt), "prompt")
        return builder.encode_text(asked.prompt, bos=asked.add_special_tokens is not False)

    async def detokenize(self, request: Request) -> JSONResponse:
        """Return the text of tokens.

        Raises:
            ApiError: the request is not one, or names tokens that there are not.
        """
        asked: DetokenizeRequest = await self._read(request, DetokenizeRequest)
        limit = self.generator.builder.max_length
        if len(asked.tokens) > limit:
            raise ApiError(400, f"tokens: {len(asked.tokens)} are more than the {limit} of a prompt.", "tokens")
        self.generator.check_tokens(asked.tokens, "tokens")
        return JSONResponse({"prompt": text_of(self.generator.token_bytes, asked.tokens)})
