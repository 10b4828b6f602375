"""A diffusion model initialised with the parameters of an autoregressive model, for every family that some fit."""

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .generation.configuration import as_token_list

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that say which checkpoint is read.
LOCATION = ("revision", "token", "cache_dir", "subfolder", "gguf_file", "local_files_only")
SPECIAL_TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")


class FromAutoregressive(PreTrainedModel):
    """Goes before `PreTrainedModel` in a class's bases. Which models fit is said by the configuration's `ar_model_types`.

    Attributes:
        replaces_attention: whether the model has an attention of its own, so that some parameters begin anew and some
            of the original's are left out. The others take over every parameter.
    """

    replaces_attention = False

    @classmethod
    def from_ar_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        config: PreTrainedConfig | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """A model of this class initialised from an autoregressive one, to be trained before use. Biases that the original
        lacks are 0. The end, padding and first tokens of the original's generation configuration are taken over, not its
        sampling. `config.started_from` names the original. The tokenizer: [`ar_tokenizer`].

        Args:
            pretrained_model_name_or_path: as for `AutoModelForCausalLM.from_pretrained`.
            config: instead of the configuration made from the checkpoint's (`from_ar_config` of the configuration's class).
            output_loading_info: return the model and the names of the parameters that were `copied`, are `new`, and
                were `left_out` of the checkpoint. They are logged in any case.
            kwargs: fields of the configuration (`mask_token_id`, `block_size`, ...), or arguments of
                `AutoModelForCausalLM.from_pretrained`, as `dtype`, or `gguf_file` for weights in a GGUF.

        Raises:
            ValueError: the checkpoint is of another architecture, a field changes the shape of a parameter, a parameter
                of the checkpoint has no place in this model, or its mask ends texts.
        """
        source, known = pretrained_model_name_or_path, _own_fields(cls.config_class)
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in known}
        location = {name: kwargs[name] for name in LOCATION if name in kwargs}
        attention = {name: kwargs.pop(name) for name in ("attn_implementation",) if name in kwargs}
        ar_config = AutoConfig.from_pretrained(source, **location)
        if config is None:
            config = cls.config_class.from_ar_config(ar_config, **changes)  # type: ignore[union-attr]
        elif changes:
            raise ValueError(f"Give {', '.join(f'`{name}`' for name in changes)} in `config`, or leave `config` out.")
        ar_model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
        model = cls._from_config(config, dtype=ar_model.dtype, **attention).to(ar_model.device)
        info = model._copy_parameters(ar_model)
        for name in SPECIAL_TOKENS:  # of which a generation configuration may name more than that of the model
            value = getattr(ar_model.generation_config, name, None)
            if value is not None and name not in changes:
                setattr(model.generation_config, name, value)
        if model.config.mask_token_id in as_token_list(model.generation_config.eos_token_id):
            raise ValueError(
                f"`mask_token_id={model.config.mask_token_id}` is also an `eos_token_id`: give a token that no text has, as "
                "the first one behind the tokenizer's."
            )
        model.config.started_from = {
            "name_or_path": str(source),
            "model_type": ar_config.model_type,
            **{name: location[name] for name in ("revision", "subfolder", "gguf_file") if name in location},
        }
        if (commit := getattr(ar_config, "_commit_hash", None)) is not None:
            model.config.started_from["commit"] = commit
        for name, parameters in info.items():
            logger.info("%s: %s", name, ", ".join(parameters) or "nothing")
        logger.warning(
            "%s from %s: %d parameters copied, %d new (%s), %d left out. Train it before use.",
            cls.__name__,
            source,
            *(len(info[name]) for name in ("copied", "new")),
            ", ".join(sorted({name.split("self_attn.")[-1] for name in info["new"]})),
            len(info["left_out"]),
        )
        return (model, info) if output_loading_info else model

    def _copy_parameters(self, ar_model: PreTrainedModel) -> dict[str, list[str]]:
        """Copy the parameters that both models have. Returns the names of those `copied`, `new` and `left_out`."""
        source, own = ar_model.state_dict(), self.state_dict()
        shared = own.keys() & source.keys()
        for name in shared:
            if own[name].shape != source[name].shape:
                raise ValueError(
                    f"`{name}` is {tuple(own[name].shape)} here and {tuple(source[name].shape)} in the checkpoint: leave "
                    "the sizes as the checkpoint has them."
                )
        new, left_out = own.keys() - source.keys(), source.keys() - own.keys()
        if left_out and not self.replaces_attention:
            raise ValueError(
                f"The checkpoint has `{min(left_out)}`, for which a {type(self).__name__} has no place: start from a "
                "checkpoint without it, and leave the sizes as the checkpoint has them."
            )
        self.load_state_dict({name: source[name] for name in shared}, strict=False)
        if not self.replaces_attention:
            with torch.no_grad():
                for name in new:
                    if name.endswith(".bias"):
                        self.get_parameter(name).zero_()
        return {"copied": sorted(shared), "new": sorted(new), "left_out": sorted(left_out)}


def ar_tokenizer(pretrained_model_name_or_path: str, mask_token_id: int, **kwargs) -> PreTrainedTokenizerBase:
    """The tokenizer of an autoregressive model, with the mask token of the model that started from it.

    Args:
        mask_token_id: `model.config.mask_token_id`. Behind the tokenizer's vocabulary the token `<|mask|>` is added, with
            others before it where ids are free.
        kwargs: arguments of `AutoTokenizer.from_pretrained`, as `gguf_file`.
    """
    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
    free: list[Any] = [f"<|unused_{index}|>" for index in range(len(tokenizer), mask_token_id)]
    tokenizer.add_tokens(free, special_tokens=True)
    is_new = len(tokenizer) == mask_token_id
    tokenizer.add_special_tokens(
        {"mask_token": "<|mask|>" if is_new else tokenizer.convert_ids_to_tokens(mask_token_id)}
    )
    if tokenizer.mask_token_id != mask_token_id:
        raise ValueError(
            f"The tokenizer's mask would be token {tokenizer.mask_token_id}, not `mask_token_id={mask_token_id}`: give an id "
            "that the tokenizer has, or the first one behind its vocabulary."
        )
    return tokenizer


def _own_fields(config_class: Any) -> set[str]:
    """The fields of a family's configuration, by all their names, without those that every configuration has."""
    names = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    return names | config_class.attribute_map.keys()
