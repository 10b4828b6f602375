"""A server of one model: OpenAI's API, infilling, and a page. `pip install "dllm-hf[serve]"`."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f'The server needs packages of an extra: `pip install "dllm-hf[serve]"`. {error}') from error

from .app import create_app
from .server import bind, serve
from .settings import Settings

__all__ = ["Settings", "bind", "create_app", "serve"]
