"""Repositories for the Hugging Face Hub that run without this package."""

from .bundle import bundle
from .export import export, export_loop
from .publish import add_saving_with_code, push
from .quantize import quantize

__all__ = ["add_saving_with_code", "bundle", "export", "export_loop", "push", "quantize"]
