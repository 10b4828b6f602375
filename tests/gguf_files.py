"""Files of llama.cpp's, written by the tests."""

from pathlib import Path

import pytest

NAMES = {
    "embed_tokens": "token_embd",
    "layers.": "blk.",
    "self_attn.": "attn_",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
}
NAMES |= {"o_proj": "output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.": "ffn_"}
NAMES |= {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "lm_head": "output",
    "model.norm": "output_norm",
    "model.": "",
}


def write_gguf(model, path: Path, tokens: list[str], merges: list[str]) -> None:
    """A Qwen2 or a Llama as llama.cpp has it, with a byte-level tokenizer, of which tokens like `<this>` are special."""
    gguf = pytest.importorskip("gguf", reason='needs GGUF: pip install "dllm-hf[gguf]"')
    writer, config = gguf.GGUFWriter(path, model.config.model_type), model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if len(token) > 1 and token[0] == "<" else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(model.config.eos_token_id)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:  # then the file has none
            continue
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        if config.model_type == "llama" and ("attn_q." in name or "attn_k." in name):
            # The two numbers that a rotation turns stand side by side there.
            heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
