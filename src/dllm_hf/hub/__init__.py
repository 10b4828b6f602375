"""Repositories for the Hugging Face Hub that run without this package."""

from .bundle import bundle
from .repository import add_saving_with_code, export, export_loop, push

__all__ = ["add_saving_with_code", "bundle", "export", "export_loop", "push"]
