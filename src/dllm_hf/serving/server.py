"""`serve`: the application behind a port, until SIGTERM."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ..engine import LLM
from ..engine.heart import frozen_objects
from .app import create_app
from .settings import Settings

logger = logging.getLogger(__name__)

# After the requests in flight have been aborted: to send their last bytes.
LAST_BYTES_SECONDS = 3


def bind(host: str, port: int) -> socket.socket:
    """A port of this machine, which nobody reaches before [`serve`] listens at it.

    Raises:
        OSError: says which address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} --port {port} cannot be had: {why}") from error
    listener.set_inheritable(True)
    return listener


def serve(llm: LLM, settings: Settings, listener: socket.socket) -> None:
    """Answer requests until SIGTERM or Ctrl-C. Those in flight then have `shutdown_timeout` seconds to finish, and are
    aborted after them or at a second signal."""
    app = create_app(llm, settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_timeout) + LAST_BYTES_SECONDS,
    )
    server = _Server(config, settings.shutdown_timeout)
    host, port = listener.getsockname()[:2]
    logger.info("%s: http://%s:%d", settings.name, f"[{host}]" if ":" in host else host, port)
    with frozen_objects():
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """uvicorn's own raises the signal again when it has shut down, so that the process would not exit with 0."""

    def __init__(self, config: uvicorn.Config, shutdown_timeout: float):
        super().__init__(config)
        self._shutdown_timeout = shutdown_timeout

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._stop, loop)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        abort_all = self.config.app.state.api.engine.abort_all  # type: ignore[union-attr]  # it is no path of a module
        if self.should_exit:
            abort_all()
        else:
            logger.info("Stopping: requests in flight have %.0f s to finish.", self._shutdown_timeout)
            loop.call_later(self._shutdown_timeout, abort_all)
        self.should_exit = True
