"""What the configurations of all families share."""

import math
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "n_group",
    "topk_group",
    "head_dim",
    "max_position_embeddings",
    "block_size",
    "gate_low_rank_dim",
)
# What the configuration of a model that starts from an autoregressive one takes over.
TAKEN_OVER = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# A row of the embedding that the tokenizers of these models do not use, for the mask: Dream's and SDAR's.
UNUSED_TOKEN = {"qwen2": 151666, "qwen3": 151669}
MAX_LAYERS = 1000  # the deepest published model has 130; building what a broken file asks for would take hours
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


class DiffusionConfigMixin(PreTrainedConfig):
    """Goes before the library's configuration in a class's bases. Refuses values with which no model can be built, or
    another one than the weights belong to, by their name in `config.json`."""

    is_causal: ClassVar[bool] = False  # read by the library's mask functions: attention is bidirectional
    ar_model_types: ClassVar[tuple[str, ...]] = ()  # of the autoregressive models whose weights fit

    def __post_init__(self, **kwargs):
        self._check_numbers()
        self._complete(kwargs)
        super().__post_init__(**kwargs)
        self._check_numbers()  # again: values that `_complete` derived, and fields of the library's classes
        self._check_attention()
        self._check_special_tokens()

    def _complete(self, kwargs: dict[str, Any]) -> None:
        """Check and derive the fields of one family. `kwargs`: values that are not fields of the class."""

    @classmethod
    def from_ar_config(cls, config: PreTrainedConfig, **fields):
        """The configuration of a model into which the weights of an autoregressive one fit.

        Args:
            config: of one of the `ar_model_types`.
            fields: replace what would be taken over. `mask_token_id` is needed where no token is known to be unused.
        """
        fitting = " or ".join(cls.ar_model_types)
        if config.model_type not in cls.ar_model_types:
            remedy = (
                f"start from a {fitting} checkpoint"
                if fitting
                else "no autoregressive model's weights are known to fit"
            )
            raise ValueError(f"A {config.model_type!r} cannot become a {cls.model_type!r}: {remedy}.")
        if getattr(config, "use_sliding_window", False):
            raise ValueError(
                "The checkpoint attends within a sliding window (`use_sliding_window`), which diffusion models here do not have: "
                "start from one that sees all of the text."
            )
        taken = {name: getattr(config, name) for name in TAKEN_OVER}
        taken["rope_parameters"] = dict(config.rope_parameters)
        taken |= cls._taken_over(config)
        if taken["pad_token_id"] is None:
            ends = taken["eos_token_id"]
            taken["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
        taken["mask_token_id"] = UNUSED_TOKEN.get(config.model_type)
        on_disk = lambda values: {cls.attribute_map.get(name, name): value for name, value in values.items()}
        values = {**on_disk(taken), **on_disk(fields)}
        if values["mask_token_id"] is None:
            raise ValueError(
                f"`mask_token_id` is missing, and of a {config.model_type!r} no token is known to be unused: give the id of one "
                "that no text has, such as a reserved token of the tokenizer."
            )
        return cls(**values)

    @classmethod
    def _taken_over(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Further fields of a model that starts from an autoregressive one: as a rule, none, and heads as wide as the
        hidden size divided by their number."""
        head_dim = getattr(config, "head_dim", None)
        if head_dim not in (None, config.hidden_size // config.num_attention_heads):
            raise ValueError(
                f"The checkpoint's heads are {head_dim} wide, and those of a {cls.model_type!r} are `hidden_size / "
                "num_attention_heads`: start from a checkpoint where that is the same, or choose another family, as SDAR."
            )
        return {}

    def to_dict(self) -> dict[str, Any]:
        """With `rope_theta`, which the original code reads, beside the library's `rope_parameters`."""
        values = super().to_dict()
        values["rope_theta"] = (self.rope_parameters or {}).get("rope_theta", self.default_theta)
        return values

    def _check_numbers(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"`{field.name}={value}` is no number: correct the configuration.")
        for name in SIZES:
            value, disk_name = getattr(self, name, None), self.attribute_map.get(name, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"`{disk_name}={value}` must be at least 1: correct the configuration.")
            if name == "num_hidden_layers" and isinstance(value, int) and value > MAX_LAYERS:
                raise ValueError(f"`{disk_name}={value}` are more than {MAX_LAYERS} layers: correct the configuration.")
        if self.rms_norm_eps <= 0:
            raise ValueError(f"`rms_norm_eps={self.rms_norm_eps}` must be above 0: correct the configuration.")

    def _check_attention(self) -> None:
        if self.is_causal:
            raise ValueError(
                f"`is_causal={self.is_causal!r}` would make attention causal, and a {self.model_type} attends both ways: "
                "leave it out of the configuration."
            )
        rope = self.rope_parameters or {}
        if rope.get("rope_type") not in ROPE_TYPES:
            raise ValueError(
                f"`rope_type={rope.get('rope_type')!r}` is unknown: choose one of {', '.join(ROPE_TYPES)}."
            )
        for name, value in rope.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if (number and not math.isfinite(value)) or (
                name in ("rope_theta", "factor") and not (number and value > 0)
            ):
                raise ValueError(f"`{name}={value!r}` must be a number above 0: correct the configuration.")

    def _check_special_tokens(self) -> None:
        for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            tokens = getattr(self, name)
            for token in tokens if isinstance(tokens, list) else [tokens]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"`{name}={token}` is outside of the vocabulary of {self.vocab_size} tokens: "
                        "give the special tokens that belong to `vocab_size`."
                    )


class BlockDiffusionConfigMixin(DiffusionConfigMixin):
    """Base of the configurations whose blocks see earlier ones. Goes before the library's in a class's bases."""

    def _complete(self, kwargs: dict[str, Any]) -> None:
        if self.use_sliding_window:
            raise ValueError("`use_sliding_window=True` is not supported: a block sees every earlier block.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Published files name the attention of their training, which the library would use for decoding, too. That of the
        # caller is in `kwargs`.
        config_dict = {name: value for name, value in config_dict.items() if name != "attn_implementation"}
        return super().from_dict(config_dict, **kwargs)
