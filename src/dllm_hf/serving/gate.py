"""`Gate`: what a request must have before it is looked at: the key, and a body of bearable size."""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

OPEN_PATHS = {"/health"}
BODY_SECONDS = 30.0  # to send a body in
# Of a body that is too large, so much is read and thrown away: a client that is still sending sees no answer.
DISCARDED_BYTES = 64 * 2**20


class Gate:
    """An ASGI middleware. Browsers, which ask for a name and a password, give the key as the password."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS and not self._is_let_in(headers.get("authorization", "")):
            response = ApiError(401, "A key is needed: `Authorization: Bearer KEY`.").response()
            if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
                response.headers["WWW-Authenticate"] = 'Basic realm="dllm-hf: the key is the password"'
            return await response(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            return await ApiError(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.").response()(
                scope, receive, send
            )
        if body is None:
            limit = self.settings.max_body_bytes
            response = ApiError(413, f"The body is larger than {limit} bytes.", "body", "body_too_large").response()
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        await self.app(scope, _replayed(body, receive), send)

    def _is_let_in(self, authorization: str) -> bool:
        if self.settings.api_key is None:
            return True
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        elif scheme.lower() != "bearer":
            given = ""
        return hmac.compare_digest(given.strip().encode(), self.settings.api_key.encode())

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where it is too large."""
        chunks, size = list[bytes](), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"".join(chunks)
            size += len(message.get("body", b""))
            if size <= self.settings.max_body_bytes:
                chunks.append(message.get("body", b""))
            if not message.get("more_body", False) or size > DISCARDED_BYTES:
                return b"".join(chunks) if size <= self.settings.max_body_bytes else None


def _replayed(body: bytes, receive: Receive) -> Callable:
    """What the application receives: the body in one piece, then whatever comes after it."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
