"""`python -m dllm_hf.evaluation --model dllm ...`: the command `lm_eval`, which knows models from outside of its own package
only once something has imported them (https://github.com/EleutherAI/lm-evaluation-harness/issues/3282)."""

from .harness import DiffusionLM  # noqa: F401  # imported to be registered

from lm_eval.__main__ import cli_evaluate  # isort: skip  # behind our import, whose error names the extra

if __name__ == "__main__":
    cli_evaluate()
