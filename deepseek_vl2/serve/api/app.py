"""The server as an ASGI application."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route

from deepseek_vl2 import __version__
from deepseek_vl2.engine import backend
from deepseek_vl2.engine.detokenizer import token_bytes_of
from deepseek_vl2.engine.holder import engine_of, existing_engine, release_model
from deepseek_vl2.engine.scheduler import EngineOptions
from deepseek_vl2.engine.steps import end_ids
from deepseek_vl2.models import DeepseekVLV2ForCausalLM, DeepseekVLV2Processor

from .body import BodyReader
from .chat import GenerationService
from .chat_endpoint import ChatEndpoint
from .completions import CompletionEndpoint, CompletionRequest
from .errors import ApiError, error_response, handle_api_error
from .generation import Generator
from .grammar import GrammarCompiler
from .grammar_process import GrammarService
from .guard import Guard, RunningRequests, check_api_key
from .metrics import Metrics
from .openapi import (
    OBJECT,
    PageLimits,
    complete_page,
    described,
    error_entries,
    generation_responses,
    read_responses,
    request_entry,
)
from .prompts import PromptBuilder
from .request_id import HEADER, RequestIds
from .response_schemas import ResponsesRequest
from .response_store import ResponseStore
from .responses import ResponsesEndpoint
from .responsive import responsive
from .schemas import ChatRequest
from .settings import Settings
from .tokenizing import DetokenizeRequest, TokenizeRequest, TokenService

logger = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2.0


def allowed_methods(app: FastAPI, path: str) -> list[str]:
    """Return the methods that a path takes."""
    routes = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


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
            model, processor, options.max_length, token_bytes.longest(), settings.images, settings.preparing_threads,
            self.engine.launching, options.share_prefixes,
        )  # fmt: skip
        compiler = GrammarCompiler(token_bytes, model.config.language_config.vocab_size, sorted(end_ids(model)))
        self.grammars = GrammarService(compiler, settings.grammars)
        self.running = RunningRequests()
        self.bodies = BodyReader(settings, self.engine.launching)
        self.service = GenerationService(self.engine, self.metrics, settings, self.bodies)
        self.generator = Generator(self.engine, token_bytes, builder, self.grammars, settings)
        self.store = ResponseStore(
            settings.stored_responses, settings.stored_bytes, settings.stored_seconds, settings.replica
        )
        self.app = self._application()

    def _application(self) -> FastAPI:
        app = FastAPI(title="DeepSeek-VL2", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan)
        self._add_middleware(app)
        self._add_error_handlers(app)
        self._add_open_routes(app)
        guarded: dict[str, Any] = {"dependencies": [Depends(self._guard)]}
        self._add_model_routes(app, guarded)
        self._add_generation_routes(app, guarded)
        self._add_token_routes(app, guarded)
        self._add_stored_routes(app, guarded)
        kinds: list[type[BaseModel]] = [
            ChatRequest,
            CompletionRequest,
            ResponsesRequest,
            TokenizeRequest,
            DetokenizeRequest,
        ]
        builder, compiler = self.generator.builder, self.generator.compiler
        complete_page(
            app,
            kinds,
            PageLimits(
                vocabulary=compiler.vocabulary,
                image_token_id=builder.processor.image_token_id,
                max_length=builder.max_length,
                max_choices=self.settings.max_choices,
            ),
        )
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        await anyio.to_thread.run_sync(self.engine.start, self._warm_up)
        with responsive():
            yield
        await self.grammars.stop()
        await anyio.to_thread.run_sync(self.generator.builder.decoders.stop)
        await anyio.to_thread.run_sync(self.engine.stop)
        if existing_engine(self.model) is self.engine:
            release_model(self.model)  # with the server's bounds, which are not for whoever generates later

    def _warm_up(self) -> None:
        """See that who is answered first waits no longer than who is last."""
        for warm_up in (self.engine.warm_up, partial(backend.warm_up_images, self.model)):
            try:
                warm_up()
            except torch.OutOfMemoryError:
                logger.warning("There is too little memory to capture all ahead: the first requests wait longer.")

    async def abort(self) -> None:
        """End the requests at work, each with the answer that the server shuts down."""
        with anyio.move_on_after(LAST_WORDS_SECONDS):
            # The step at work may take longer than anybody should wait.
            await anyio.to_thread.run_sync(self.engine.stop, abandon_on_cancel=True)
            while self.running:  # what waited for the engine ends by itself
                await anyio.sleep(0.05)
        self.running.end()

    async def _guard(self, request: Request) -> None:  # a plain function would be called in another thread
        check_api_key(request, self.settings.api_keys)

    def _add_middleware(self, app: FastAPI) -> None:
        app.add_middleware(Guard, running=self.running, allowed_hosts=self.settings.allowed_hosts)
        if self.settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(self.settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],  # clients send many of their own: the browser's answer names those it asked for
                expose_headers=[HEADER, "Retry-After"],
            )
        app.add_middleware(RequestIds)

    @staticmethod
    def _add_error_handlers(app: FastAPI) -> None:
        async def http_error(request: Request, error: Exception) -> JSONResponse:
            assert isinstance(error, HTTPException)
            answer = error_response(ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))
            answer.headers.update(error.headers or {})
            if error.status_code == 405:  # the router names the methods of one route, and a path may have several
                answer.headers["Allow"] = ", ".join(allowed_methods(app, request.url.path))
            return answer

        async def unforeseen(request: Request, error: Exception) -> JSONResponse:
            answer = error_response(ApiError(500, "The server failed to handle this request."))
            answer.headers[HEADER] = request.state.request_id  # what is caught last passes no middleware
            return answer

        app.add_exception_handler(ApiError, handle_api_error)
        app.add_exception_handler(HTTPException, http_error)
        app.add_exception_handler(Exception, unforeseen)

    def _add_open_routes(self, app: FastAPI) -> None:
        health_entries: dict[int | str, dict[str, Any]] = {200: described("It works.", OBJECT), **error_entries(503)}

        @app.get("/health", responses=health_entries)
        async def health() -> Response:
            """Say whether the server can take requests."""
            if not self.engine.healthy:
                return error_response(ApiError(503, "The engine does not run."))
            return JSONResponse({"status": "ok"})

        @app.get("/version", responses={200: described("The package's version.", OBJECT)})
        async def version() -> JSONResponse:
            """Say which version of the package serves."""
            return JSONResponse({"version": __version__})

        async def ping() -> Response:
            return await health()

        for method in ("GET", "POST"):
            app.add_api_route(
                "/ping", ping, methods=[method], responses=health_entries, operation_id=f"ping_{method.lower()}",
                summary="Ping", description="The same as /health.",
            )  # fmt: skip

    def _add_model_routes(self, app: FastAPI, guarded: dict[str, Any]) -> None:
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

    def _add_generation_routes(self, app: FastAPI, guarded: dict[str, Any]) -> None:
        chat, completion = ChatEndpoint(self.generator), CompletionEndpoint(self.generator)
        responses = ResponsesEndpoint(self.generator, self.store)

        def options(text: str, kind: type[BaseModel]) -> dict[str, Any]:
            return {"responses": generation_responses(text), "openapi_extra": request_entry(kind), **guarded}

        @app.post("/v1/chat/completions", **options("The answers", ChatRequest))
        async def chat_completions(request: Request) -> Response:
            """Answer a conversation."""
            return await self.service.serve(request, chat)

        @app.post("/v1/completions", **options("The texts", CompletionRequest))
        async def completions(request: Request) -> Response:
            """Go on from texts."""
            return await self.service.serve(request, completion)

        @app.post("/v1/responses", **options("The response", ResponsesRequest))
        async def create_response(request: Request) -> Response:
            """Answer a conversation, in the form of the Responses API."""
            return await self.service.serve(request, responses)

    def _add_token_routes(self, app: FastAPI, guarded: dict[str, Any]) -> None:
        service = TokenService(self.generator, self.bodies, self.service.admitted)

        def options(text: str, kind: type[BaseModel]) -> dict[str, Any]:
            return {"responses": read_responses(text), "openapi_extra": request_entry(kind), **guarded}

        @app.post("/tokenize", **options("The tokens.", TokenizeRequest))
        async def tokenize(request: Request) -> Response:
            """Return the tokens of a text or a conversation."""
            return await service.tokenize(request)

        @app.post("/detokenize", **options("The text.", DetokenizeRequest))
        async def detokenize(request: Request) -> Response:
            """Return the text of tokens."""
            return await service.detokenize(request)

    def _add_stored_routes(self, app: FastAPI, guarded: dict[str, Any]) -> None:
        entries = {200: described("The response.", OBJECT), **error_entries(401, 404)}

        def missing(name: str) -> ApiError:
            return ApiError(404, f"There is no response {name[:100]!r} any more.", "response_id", "not_found")

        @app.get("/v1/responses/{response_id}", responses=entries, **guarded)
        async def read_response(response_id: str) -> JSONResponse:
            """Return a response that is still kept."""
            found = self.store.get(response_id)
            if found is None:
                raise missing(response_id)
            return JSONResponse(found.body)

        @app.delete("/v1/responses/{response_id}", responses=entries, **guarded)
        async def delete_response(response_id: str) -> JSONResponse:
            """Forget a response."""
            if not self.store.remove(response_id):
                raise missing(response_id)
            return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    def _card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "deepseek-ai",
            "max_model_len": self.engine.options.max_length,
        }
