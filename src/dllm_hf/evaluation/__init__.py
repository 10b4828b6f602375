"""Measures of models: likelihoods, the tasks of `lm-eval`, and lines of programs to fill in. docs/evaluation.md."""
