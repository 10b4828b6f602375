"""Training masked-diffusion models with `transformers.Trainer`."""

from importlib import import_module

from .losses import masked_diffusion_loss

# Imported on first use: the models need only the losses, and importing the library's trainer takes a second.
_LATER = {
    "DataCollatorForMaskedDiffusion": ".collator",
    "MaskedDiffusionSFTTrainer": ".sft",
    "chat_texts": ".data",
    "pack": ".data",
}

__all__ = ["DataCollatorForMaskedDiffusion", "MaskedDiffusionSFTTrainer", "chat_texts", "masked_diffusion_loss", "pack"]


def __getattr__(name: str):
    if name in _LATER:
        return getattr(import_module(_LATER[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
