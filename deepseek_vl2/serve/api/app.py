"""The server as an ASGI application."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from deepseek_vl2 import __version__
from deepseek_vl2.engine.detokenizer import token_bytes_of
from deepseek_vl2.engine.engine import end_ids
from deepseek_vl2.engine.holder import engine_of, existing_engine, release_model
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

from .chat import ChatService, check_api_key
from .errors import ApiError, error_response, handle_api_error
from .grammar import GrammarCompiler
from .grammar_process import GrammarService
from .guard import Guard, RunningRequests
from .metrics import Metrics
from .prompts import PromptBuilder
from .schemas import ChatRequest
from .settings import Settings

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 1.0

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def described(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return a response's entry in the OpenAPI page."""
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def error_entries(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the entries of errors in the OpenAPI page."""
    return {status: described("An error, in OpenAI's shape.", ERROR_SCHEMA) for status in statuses}


def chat_request_entry() -> dict[str, Any]:
    """Return the request body of chat completions for the OpenAPI page; the server reads the body by itself."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answers: one object, or with stream a series of server-sent events.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **error_entries(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
}


class Server:
    """A model with its engine and its application.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        settings: what the operator decided.
        options: the engine's bounds.

    Attributes:
        app: the ASGI application. Its lifespan starts and stops the engine.
        engine: the engine.
    """

    def __init__(
        self,
        model: DeepseekVLV2ForCausalLM,
        processor: DeepseekVLV2Processor,
        settings: Settings,
        options: EngineOptions,
    ) -> None:
        tokenizer = processor.tokenizer
        hidden = {*end_ids(model), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
        token_bytes = token_bytes_of(tokenizer, sorted(hidden))
        if options.max_length is None:
            options = replace(options, max_length=model.config.language_config.max_position_embeddings)
        assert options.max_length is not None
        if options.kv_cache_tokens is not None and options.kv_cache_tokens < options.max_length:
            raise ValueError(
                f"The KV cache of {options.kv_cache_tokens} tokens does not hold one prompt and answer of "
                f"{options.max_length}: give it more memory, or lower the length."
            )
        self.model = model
        self.settings = settings
        self.created = int(time.time())
        self.engine = engine_of(model, options)
        self.metrics = Metrics(self.engine)
        builder = PromptBuilder(
            model, processor, options.max_length, token_bytes.longest(), settings.images, settings.preparing_threads
        )
        compiler = GrammarCompiler(token_bytes, model.config.language_config.vocab_size, sorted(end_ids(model)))
        self.grammars = GrammarService(compiler, settings.grammars)
        self.running = RunningRequests()
        self.chat = ChatService(self.engine, token_bytes, builder, self.grammars, self.metrics, settings)
        self.app = self._application()

    def _application(self) -> FastAPI:
        app = FastAPI(title="DeepSeek-VL2", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self._add_middleware(app)
        self._add_error_handlers(app)
        self._add_open_routes(app)
        self._add_guarded_routes(app)
        self._describe(app)
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await self.grammars.stop()
        await anyio.to_thread.run_sync(self.engine.stop)
        if existing_engine(self.model) is self.engine:
            release_model(self.model)  # with the server's bounds, which are not for whoever generates later

    async def abort(self) -> None:
        """End the requests at work, each with the answer that the server shuts down."""
        await anyio.to_thread.run_sync(self.engine.stop)
        with anyio.move_on_after(LAST_WORDS_SECONDS):
            while self.running:  # what waited for the engine ends by itself
                await anyio.sleep(0.05)
        self.running.end()

    def _add_middleware(self, app: FastAPI) -> None:
        app.add_middleware(Guard, running=self.running, allowed_hosts=self.settings.allowed_hosts)
        if self.settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # clients send many of their own: the browser's answer names those it asked for
                expose_headers=["Retry-After", "X-Request-Id"],
            )

    @staticmethod
    def _add_error_handlers(app: FastAPI) -> None:
        async def http_error(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, HTTPException)
            answer = error_response(ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))
            answer.headers.update(error.headers or {})
            return answer

        async def unforeseen(request: Request, error: Exception) -> JSONResponse:
            return error_response(ApiError(500, "The server failed to handle this request."))

        app.add_exception_handler(ApiError, handle_api_error)
        app.add_exception_handler(HTTPException, http_error)
        app.add_exception_handler(Exception, unforeseen)

    def _add_open_routes(self, app: FastAPI) -> None:
        @app.get("/health", responses={200: described("It works.", {"type": "object"}), **error_entries(503)})
        async def health() -> Response:
            """Say whether the server can take requests."""
            if not self.engine.healthy:
                return error_response(ApiError(503, "The engine does not run."))
            return JSONResponse({"status": "ok"})

    def _add_guarded_routes(self, app: FastAPI) -> None:
        def guard(request: Request) -> None:
            check_api_key(request, self.settings.api_keys)

        guarded: dict[str, Any] = {"dependencies": [Depends(guard)]}
        models_entry = described("A list of one.", {"type": "object"})

        @app.get("/v1/models", responses={200: models_entry, **error_entries(401)}, **guarded)
        async def models() -> JSONResponse:
            """List the one model that is served."""
            return JSONResponse({"object": "list", "data": [self._card()]})

        @app.get("/v1/models/{name:path}", responses={200: models_entry, **error_entries(401, 404)}, **guarded)
        async def model(name: str) -> JSONResponse:
            """Describe the model."""
            if name != self.settings.model_name:
                message = f"There is no model {name[:100]!r} here, but {self.settings.model_name!r}."
                raise ApiError(404, message, "model", "model_not_found")
            return JSONResponse(self._card())

        metrics_entry = {"description": "Prometheus' text format.", "content": {"text/plain": {}}}

        @app.get("/metrics", responses={200: metrics_entry, **error_entries(401)}, **guarded)
        async def metrics() -> Response:
            """Report counts to Prometheus."""
            return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

        @app.post("/v1/chat/completions", responses=CHAT_RESPONSES, openapi_extra=chat_request_entry(), **guarded)
        async def chat_completions(request: Request) -> Response:
            """Answer a conversation."""
            return await self.chat.serve(request)

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "deepseek-ai",
            "max_model_len": self.engine.options.max_length,
        }

    @staticmethod
    def _describe(app: FastAPI) -> None:
        """Complete the OpenAPI page by the schemas of the request that the server reads by itself."""
        page = app.openapi()
        definitions = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}").get("$defs", {})
        page.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        for path in page["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own validation error, which is never sent
        app.openapi_schema = page
