"""Diffusion language models for processors: models with a static cache, and their export to ExecuTorch. docs/edge.md."""

from ..runtimes.executorch_runtime import DiffusionEdge
from .export import export_model
from .model import DreamEdge, StaticCache
from .model_loader import load_hf_model, optimize_for_cpu

__all__ = ["DiffusionEdge", "DreamEdge", "StaticCache", "export_model", "load_hf_model", "optimize_for_cpu"]
