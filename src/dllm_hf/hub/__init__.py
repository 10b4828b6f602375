"""Repositories for the Hugging Face Hub that run without this package."""

from .bundle import bundle
from .repository import add_saving_with_code, export, push

__all__ = ["add_saving_with_code", "bundle", "export", "push"]
