"""Models exported to GGUF, llama.cpp's file format, as folders that `llama_cpp.py` reads. docs/backends.md."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..generation.configuration import as_token_list
from .exported import package
from .exporting import check_exportable, describe, new_folder, tokenizer_folder
from .gguf_tokenizer import add_tokenizer
from .llama_cpp import ARCHITECTURES, FORMAT, MASK_KEY, MODEL_NAME, bindings

REFUSED = {
    "gla_dream": "its cache holds recurrent states, and it is none of llama.cpp's architectures",
    "experts": "its experts are not written yet",
}
TYPES = ("f32", "f16", "q8_0", "q4_k_m")
# Our modules of a layer -> llama.cpp's tensors.
TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BIASES = ("attn_q", "attn_k", "attn_v")  # others are not read by every architecture


def export_gguf(model: Any, out: str | os.PathLike, type: str = "q8_0") -> Path:
    """Write a model as a folder that [`LlamaCppModel`] reads: `model.gguf`, configurations, tokenizer. The file holds the
    tokenizer too, where the model was loaded from a checkpoint with one, so that llama.cpp's own programs run LLaDA and Dream with it.

    Args:
        model: LLaDA, Dream or SDAR, in any floating-point type.
        out: the folder; it must not exist.
        type: of the weights: `"f32"`, `"f16"`, `"q8_0"` (8 bits, a scale for each 32 weights), or `"q4_k_m"`
            (4 to 6 bits, by llama.cpp's quantizer). Vectors stay in float32. Queries' and keys' projections of a model with
            `config.has_identity_norms` are in bfloat16 instead of 16 or 8 bits, and not for `"q4_k_m"`.

    Returns:
        `out`.

    Raises:
        ValueError: the model cannot be exported, and why. Whatever fails, `out` does not exist then.
    """
    target = Path(out)
    check_exportable(model, target, "GGUF", REFUSED)
    _check(model, type)
    with new_folder(target) as (folder, temporary):
        if type == "q4_k_m":
            _write(model, temporary / MODEL_NAME, "f32")
            _quantize(temporary / MODEL_NAME, folder / MODEL_NAME)
        else:
            _write(model, folder / MODEL_NAME, type)
        describe(model, folder, FORMAT, type=type)
    return target


def _check(model: Any, type: str) -> None:
    config, name = model.config, model.__class__.__name__
    if type not in TYPES:
        raise ValueError(f"`type={type!r}` is not possible: choose one of {', '.join(TYPES)}.")
    if type == "q4_k_m" and getattr(config, "has_identity_norms", False):
        raise ValueError(
            f"The norms of queries and keys of {name} change nothing (`has_identity_norms`), and the weights before them are too "
            "small for the float16 scales of `type='q4_k_m'`: take 'q8_0', which leaves these in bfloat16."
        )
    if not model.dtype.is_floating_point or getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised already: load it in a floating-point type to export it.")
    if model.model.rotary_emb.rope_type != "default":
        raise ValueError(
            f"`rope_type={model.model.rotary_emb.rope_type!r}` cannot be exported to GGUF, only 'default'."
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("`use_sliding_window=True` cannot be exported to GGUF: llama.cpp's layers see the whole text.")
    if config.hidden_act != "silu":
        raise ValueError(f"`hidden_act={config.hidden_act!r}` cannot be exported to GGUF, only 'silu'.")
    if _mask_token(model) is None:
        raise ValueError(f"{name} has no `mask_token_id`: set it in its configuration.")
    for each in model.state_dict():
        if each.endswith(".bias") and _name_of(each).removesuffix(".bias").split(".")[-1] not in BIASES:
            raise ValueError(f"{name} has a bias that llama.cpp does not read ({each}): it cannot be exported to GGUF.")
    package("gguf", "gguf")
    if type == "q4_k_m":
        bindings()


def _mask_token(model: Any) -> int | None:
    of_call = getattr(model.generation_config, "mask_token_id", None)
    return model.config.mask_token_id if of_call is None else of_call


def _name_of(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in OUTER_TENSORS:
        return f"{OUTER_TENSORS[module]}.{suffix}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{TENSORS[module]}.{suffix}"


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under llama.cpp's names, without a head that is the embedding."""
    config, weights = model.config, model.state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for ours, tensor in weights.items():
        name = _name_of(ours)
        number = heads.get(name.split(".")[-2])
        if number and config.model_type == "llada":
            # llama.cpp rotates neighbouring pairs of a Llama's head, not its halves: they are interleaved.
            tensor = tensor.view(number, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        yield name, tensor


def _write(model: Any, path: Path, type: str) -> None:
    gguf = package("gguf", "gguf")
    types, sizes = gguf.GGMLQuantizationType, gguf.GGML_QUANT_SIZES
    wanted, has_small = types[type.upper()], getattr(model.config, "has_identity_norms", False)

    def type_of(name: str, tensor: torch.Tensor) -> Any:
        if tensor.ndim == 1:
            return types.F32
        if has_small and type != "f32" and name.split(".")[-2] in ("attn_q", "attn_k"):
            return types.BF16  # the others, or their scales, are in float16, which ends above these weights
        return wanted if tensor.shape[-1] % sizes[wanted][0] == 0 else types.F16

    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type][0])
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_metadata(writer, model)
    for name, tensor in _tensors(model):
        size, number = sizes[type_of(name, tensor)]
        writer.add_tensor_info(
            name, tensor.shape, np.dtype(np.float32), tensor.numel() // size * number, type_of(name, tensor)
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(model):  # one at a time: all of them in float32 may not fit into the memory
            array = tensor.detach().float().contiguous().cpu().numpy()
            writer.write_tensor_data(gguf.quants.quantize(array, type_of(name, tensor)))
    finally:
        writer.close()


def _add_metadata(writer: Any, model: Any) -> None:
    config, head_dim = model.config, model.model.layers[0].self_attn.head_dim
    # Under both names: llama.cpp's programs decode the first by diffusion, and `llama_cpp.py` runs the second.
    for writer.arch in dict.fromkeys(ARCHITECTURES[config.model_type]):
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_vocab_size(config.vocab_size)
        writer.add_causal_attention(False)
    writer.add_diffusion_shift_logits(bool(model.logits_shift))
    if source := tokenizer_folder(model):
        add_tokenizer(writer, source, config.vocab_size)
    else:
        writer.add_tokenizer_model("no_vocab")
    writer.add_uint32(MASK_KEY, _mask_token(model))
    for name in ("bos", "eos", "pad", "eot"):
        for token in as_token_list(getattr(config, f"{name}_token_id", None))[:1]:
            getattr(writer, f"add_{name}_token_id")(token)


def _quantize(source: Path, target: Path) -> None:
    llama = bindings()
    options = llama.llama_model_quantize_default_params()
    options.ftype = llama.LLAMA_FTYPE_MOSTLY_Q4_K_M
    options.nthread = torch.get_num_threads()
    if status := llama.llama_model_quantize(bytes(source), bytes(target), options):
        raise ValueError(f"llama.cpp could not quantise the model: `llama_model_quantize` gave {status}.")
