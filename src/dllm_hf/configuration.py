"""What the configurations of all families share."""

from typing import Any


class DiffusionConfigMixin:
    """Goes before the library's configuration in a class's bases."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            tokens = getattr(self, name)
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"`{name}={token}` is outside of the vocabulary of {self.vocab_size} tokens: "
                        "give the special tokens that belong to `vocab_size`."
                    )

    def to_dict(self) -> dict[str, Any]:
        """With `rope_theta`, which the original code reads, beside the library's `rope_parameters`."""
        values = super().to_dict()
        values["rope_theta"] = (self.rope_parameters or {}).get("rope_theta", self.default_theta)
        return values
