"""Training masked-diffusion models with `transformers.Trainer`."""

from .losses import masked_diffusion_loss

__all__ = ["masked_diffusion_loss"]
