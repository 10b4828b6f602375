"""A GLADream initialised with the parameters of an autoregressive model."""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from .configuration_gla_dream import GLADreamConfig

logger = logging.get_logger(__name__)


def from_autoregressive(
    cls: type[PreTrainedModel], source: str, config: GLADreamConfig | None, output_loading_info: bool, **kwargs
):
    """See [`GLADreamModel.from_ar_pretrained`], whose class is `cls`."""
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name in GLADreamConfig.__annotations__}
    located = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if name in kwargs}
    ar_config = AutoConfig.from_pretrained(source, **located)
    if config is None:
        config = GLADreamConfig.from_ar_config(ar_config, **fields)
    elif fields:
        raise ValueError(f"Give {', '.join(f'`{name}`' for name in fields)} in `config`, or leave `config` out.")
    ar_model = AutoModelForCausalLM.from_pretrained(source, **kwargs)
    model = cls._from_config(config, dtype=ar_model.dtype).to(ar_model.device)
    info = copy_parameters(ar_model, model)
    for name, parameters in info.items():
        logger.info("%s: %s", name, ", ".join(parameters) or "nothing")
    logger.warning(
        "GLADream from %s: %d parameters copied, %d new (%s), %d left out. Train it before use.",
        source,
        *(len(info[name]) for name in ("copied", "new")),
        ", ".join(sorted({name.split("self_attn.")[-1] for name in info["new"]})),
        len(info["left_out"]),
    )
    return (model, info) if output_loading_info else model


def copy_parameters(ar_model: PreTrainedModel, model: PreTrainedModel) -> dict[str, list[str]]:
    """Copy the parameters that both models have. Returns the names of those `copied`, `new` and `left_out`."""
    source, own = ar_model.state_dict(), model.state_dict()
    shared = own.keys() & source.keys()
    for name in shared:
        if own[name].shape != source[name].shape:
            raise ValueError(
                f"`{name}` is {tuple(own[name].shape)} here and {tuple(source[name].shape)} in the checkpoint: leave "
                "the sizes as the checkpoint has them."
            )
    model.load_state_dict({name: source[name] for name in shared}, strict=False)
    left_out = source.keys() - own.keys()
    return {"copied": sorted(shared), "new": sorted(own.keys() - source.keys()), "left_out": sorted(left_out)}
