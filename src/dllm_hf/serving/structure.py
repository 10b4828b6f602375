"""The form that a request asks for, under the names of OpenAI and of vLLM's newer and older parameters."""

from typing import Any

from ..engine import StructuredOutputsParams
from .errors import ApiError

NAMES = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


def form_of(given: dict[str, Any]) -> StructuredOutputsParams | None:
    """The form that the parameters of a request ask for. Raises an [`ApiError`] that names the one that is wrong."""
    found = {name: _arguments(name, given[name]) for name in NAMES if name in given}
    found = {name: arguments for name, arguments in found.items() if arguments}
    if len(found) > 1:
        first, second, *_ = found
        raise ApiError(400, f"`{first}` and `{second}` ask for a form each: give one of them.", first)
    for name, arguments in found.items():
        try:
            return StructuredOutputsParams(**arguments)
        except ValueError as error:
            raise ApiError(400, f"`{name}`: {error}", name) from error
    return None


def _arguments(name: str, value: Any) -> dict[str, Any]:
    """Of [`StructuredOutputsParams`]; none where nothing is asked for."""
    if name == "response_format":
        return _of_format(value)
    if name == "structured_outputs":
        _check(isinstance(value, dict), name, "an object")
        asked = {kind: each for kind, each in value.items() if each is not None and each is not False}
        if unknown := [kind for kind in asked if kind not in _KINDS]:
            raise ApiError(
                400,
                f"`{name}` has {unknown[0]!r}, but can have one of {', '.join(_KINDS)}.",
                name,
                "unsupported_parameter",
            )
        return asked
    return {name.removeprefix("guided_"): value}


def _of_format(value: Any) -> dict[str, Any]:
    name = "response_format"
    _check(isinstance(value, dict) and isinstance(value.get("type"), str), name, "an object with a `type`")
    if value["type"] == "text":
        return {}
    if value["type"] == "json_object":
        return {"json_object": True}
    if value["type"] != "json_schema":
        known = "text, json_object, json_schema"
        raise ApiError(400, f"`{name}.type` must be one of {known}.", name, "unsupported_parameter")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    _check(isinstance(schema, dict), name, "an object with `json_schema`, which has the `schema`")
    return {"json": schema}


def _check(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise ApiError(400, f"`{name}` must be {expected}.", name)
