"""Measures of models: likelihoods, the tasks of `lm-eval`, and lines of programs to fill in. docs/evaluation.md."""

from importlib import import_module

from .likelihood import LogLikelihoodOutput, log_likelihood

# Imported on first use: the models need only the likelihood, and these need packages of the extra `evaluation`.
_LATER = {
    "DiffusionLM": ".harness",
    "InPlace": ".infilling",
    "InfillingResult": ".infilling",
    "LeftToRight": ".infilling",
}

__all__ = ["DiffusionLM", "InPlace", "InfillingResult", "LeftToRight", "LogLikelihoodOutput", "log_likelihood"]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
