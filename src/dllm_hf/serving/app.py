"""The application of FastAPI: every endpoint, on one model."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from ..engine import LLM, SamplingParams
from ..generation import STRATEGIES
from ..generation.inputs import DEFAULT_MAX_NEW_TOKENS
from .api import Api, RequestLog
from .completions import routes as completion_routes
from .errors import ApiError, ErrorBody, add_handlers
from .gate import Gate
from .infill import routes as infill_routes
from .metrics import WithAliases
from .schema import DetokenizeRequest, TokenizeRequest
from .settings import Settings

PAGE = Path(__file__).parent / "page"
# Nothing is loaded from elsewhere, and no page shows this one in a frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(llm: LLM, settings: Settings) -> FastAPI:
    """The application; its lifespan runs the engine's thread. `app.state.api` is its [`Api`]."""
    api = Api(llm, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.engine.start()
        yield
        await asyncio.to_thread(api.engine.close)

    app = FastAPI(
        title="dllm-hf",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # its page is loaded from elsewhere
        redoc_url=None,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
    )
    app.state.api = api
    add_handlers(app)
    for router in (completion_routes(api), infill_routes(api), _about(api), _tokens(api), _page()):
        app.include_router(router)
    app.add_middleware(Gate, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    app.add_middleware(RequestLog, metrics=api.metrics)
    return app


def _about(api: Api) -> APIRouter:
    """The server and its model."""
    router = APIRouter(tags=["Server"])

    @router.get("/health")
    async def health() -> Response:
        api.engine.check()
        return JSONResponse({"status": "ok"})

    @router.get("/version")
    async def version_() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(WithAliases(api.metrics.registry)), media_type=CONTENT_TYPE_LATEST)

    options = api.llm.effective_options(SamplingParams())
    length = DEFAULT_MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    model = {
        "id": api.settings.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "dllm-hf",
        "max_model_len": api.llm.max_model_len,
        "diffusion": {
            "model_type": api.llm.model.config.model_type,
            "mask": api.prompts.mask_text,
            "mask_token_id": api.prompts.mask,
            "has_chat_template": api.prompts.has_chats,
            "max_tokens": min(length, api.llm.max_model_len),
            "block_length": options.block_length,
            "temperature": options.sampling_temperature,
            "cache_policy": options.cache_policy,
            "remasking_strategy": options.remasking_strategy,
            "remasking_strategies": list(STRATEGIES),
        },
    }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != api.settings.name:
            raise ApiError(404, f"There is no model {name!r}.", "model", "model_not_found")
        return model

    return router


def _tokens(api: Api) -> APIRouter:
    router = APIRouter(tags=["Server"])

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "Send one of `prompt` and `messages`.", "prompt")
        if body.messages is not None:
            tokens = await asyncio.to_thread(api.prompts.of_chat, body.messages)
        else:
            tokens = await asyncio.to_thread(api.prompts.of_text, body.prompt or "")
        return {"tokens": tokens, "count": len(tokens), "max_model_len": api.llm.max_model_len}

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        vocab = api.llm.model.config.vocab_size
        if wrong := [token for token in body.tokens if not 0 <= token < vocab]:
            raise ApiError(400, f"`tokens` holds {wrong[0]}, but the vocabulary has {vocab} tokens.", "tokens")
        return {"prompt": await asyncio.to_thread(api.prompts.text, body.tokens)}

    return router


def _page() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for path, file in (("/", "index.html"), *((f"/{name}", name) for name in ("page.css", "page.js", "icon.svg"))):
        router.add_api_route(path, _sender(PAGE / file), methods=["GET"])
    return router


def _sender(file: Path) -> Any:
    async def send() -> Response:
        return FileResponse(file, headers=PAGE_HEADERS)

    return send
