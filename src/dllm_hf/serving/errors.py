"""Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`."""

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..engine import QueueFullError, TooLongError
from ..generation.configuration import ALIASES

MAX_MESSAGE = 600  # characters: a message quotes what was sent
RETRY_AFTER = "1"  # seconds, where the queue is full
CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 429: "queue_full"}
# Options of the engine under another name than that of the request.
_NAMES = {"max_new_tokens": "max_tokens", "stop_strings": "stop", "max_time": "timeout"}
_NAMES["eos_token_id"] = "stop_token_ids"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class ApiError(Exception):
    """What a client is told instead of a result.

    Args:
        status: of HTTP.
        param: the parameter that is wrong.
        code: a word for programs; by default that of the status.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code or CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        message = self.message if len(self.message) <= MAX_MESSAGE else self.message[:MAX_MESSAGE] + " ..."
        # JSON can spell half a character, and a message may quote it.
        message = message.encode(errors="backslashreplace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": RETRY_AFTER}}.get(self.status)
        return JSONResponse(self.body, self.status, headers=headers)


def refusal_of(error: Exception, given: set[str], prompt: str = "prompt") -> ApiError:
    """What the engine's refusal of a request means for its client. `given`: the names of its parameters; `prompt`: that of
    the one that holds the text."""
    message = re.sub(r"^request \w+: ", "", str(error))  # an id that no client knows
    if isinstance(error, QueueFullError):
        return ApiError(429, message)
    if isinstance(error, TooLongError):
        return ApiError(413, message, "max_tokens" if "max_tokens" in given else prompt, "context_length_exceeded")
    for name in re.findall(r"`(\w+)", message):
        if name == "structured_outputs":
            spellings = [each for each in given if each in ("response_format", name) or each.startswith("guided_")]
            return ApiError(400, message, next(iter(spellings), None))
        spellings = [name, _NAMES.get(name, name), *(each for each, meant in ALIASES.items() if meant == name)]
        if found := [each for each in spellings if each in given]:
            return ApiError(400, message, found[0])
    return ApiError(400, message, prompt if "prompt" in message else None)


def add_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected_error)


def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return ApiError(404, f"There is no {request.url.path}.").response()
    if error.status_code == 400:  # of FastAPI, about the body: not UTF-8, or nested too deeply
        return ApiError(
            400,
            "The body is no JSON that can be read: not UTF-8, nested too deeply, or a number of thousands of digits.",
            "body",
        ).response()
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    # Of the branches of a union, the one that has come farthest is the one that was meant.
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first['ctx']['error']}.", "body").response()
    where, path = first["loc"][1:], ""
    for part in where:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in {"str", "int", "bool", "float"}:  # no name of a branch of a union
            path += f".{part}" if path else part
    if not path:
        return ApiError(400, "The body must be a JSON object, sent as `application/json`.", "body").response()
    return ApiError(400, f"`{path}`: {first['msg']}.", path).response()


def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """The error itself is in the log."""
    return ApiError(500, "The server failed at this request; its log says why.", code="internal_error").response()
