"""Every family that can start from an autoregressive model computes what that model computes."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dllm_hf import (
    DreamModel,
    Fast_dLLM_QwenForCausalLM,
    GLADreamModel,
    LLaDA2MoeModelLM,
    LLaDAModelLM,
    NemotronLabsDiffusionModel,
    SDARForCausalLM,
    ar_tokenizer,
)
from dllm_hf.sdar.identity_norms import norm_weights

from .builders import END, MASK, POSITIONS, VOCAB, character_tokenizer, generate, nemotron_diffusion_config
from .gguf_files import write_gguf

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": END,
}
SIZES |= {
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}
SIZES |= {"pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "ministral3": (
        Ministral3Config,
        Ministral3ForCausalLM,
        {"head_dim": 12, "rope_parameters": nemotron_diffusion_config().rope_parameters},
    ),
}
FITTING = [
    (LLaDAModelLM, "llama"),
    (LLaDAModelLM, "qwen2"),
    (DreamModel, "llama"),
    (DreamModel, "qwen2"),
    (Fast_dLLM_QwenForCausalLM, "llama"),
    (Fast_dLLM_QwenForCausalLM, "qwen2"),
    (SDARForCausalLM, "llama"),
    (SDARForCausalLM, "qwen2"),
    (SDARForCausalLM, "qwen3"),
    (NemotronLabsDiffusionModel, "ministral3"),
    (NemotronLabsDiffusionModel, "llama"),
]
TOKENS = torch.arange(40)[None]


def build(kind: str, **changes):
    config_class, model_class, own = CLASSES[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict:
    """For each kind, the autoregressive model and its folder."""
    found = {}
    for kind in CLASSES:
        found[kind] = build(kind), tmp_path_factory.mktemp(kind)
        found[kind][0].save_pretrained(found[kind][1])
    return found


def started(cls, folder, **kwargs):
    return cls.from_ar_pretrained(folder, **{"mask_token_id": MASK, **kwargs}).eval()


@torch.no_grad()
@pytest.mark.parametrize("cls, kind", FITTING, ids=lambda each: getattr(each, "__name__", each))
def test_it_begins_as_the_model_that_it_started_from(originals, cls, kind):
    """On one token, and on a text where an attention mask shows each token those before it."""
    original, folder = originals[kind]
    model = started(cls, folder)
    assert torch.equal(model(TOKENS[:, :1]).logits, original(TOKENS[:, :1]).logits)
    causal = torch.full((40, 40), torch.finfo(torch.float32).min).triu(1)[None, None]
    logits = model(TOKENS, attention_mask=causal, position_ids=TOKENS).logits
    torch.testing.assert_close(logits, original(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert model.config.started_from == {"name_or_path": str(folder), "model_type": kind}
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.mask_token_id) == (END, END, MASK)
    assert generate(model, [[1, 2, 3], [4]], max_new_tokens=6).sequences.shape == (2, 9)


@pytest.fixture(params=["llama", "qwen2"])
def shifted(request, originals):
    """A model without norms of queries and keys, and an SDAR that started from it."""
    original, folder = originals[request.param]
    return original, started(SDARForCausalLM, folder)


@torch.no_grad()
def test_an_sdar_with_blocks_of_one_token_says_what_the_original_says(shifted):
    original, model = shifted
    assert (model.logits_shift, model.config.has_identity_norms) == (1, True)
    torch.testing.assert_close(model(TOKENS, block_size=1).logits, original(TOKENS).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_sdar_decodes_with_blocks_of_one_token_what_the_original_generates(shifted):
    """Its seeds are the next tokens."""
    original, model = shifted
    options = {"max_new_tokens": 12, "eos_token_id": []}
    expected = original.generate(
        TOKENS[:, :5], do_sample=False, suppress_tokens=[MASK], max_new_tokens=12, eos_token_id=-1
    )
    assert torch.equal(model.diffusion_generate(TOKENS[:, :5], block_length=1, **options), expected)


@torch.no_grad()
def test_a_llama_drafts_its_own_text_as_a_nemotron(originals):
    """Whatever the drafts of a model that has not been trained are worth."""
    original, folder = originals["llama"]
    model = started(NemotronLabsDiffusionModel, folder)
    expected = original.generate(
        TOKENS[:, :5], do_sample=False, suppress_tokens=[MASK], max_new_tokens=12, eos_token_id=-1
    )
    options = {"max_new_tokens": 12, "eos_token_id": [], "self_speculation": True, "temperature": 0.0}
    assert torch.equal(model.diffusion_generate(TOKENS[:, :5], **options), expected)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str)
@torch.no_grad()
def test_norms_that_were_left_out_are_written_as_norms_that_change_nothing(shifted, tmp_path, dtype, tolerance):
    original, model = shifted
    model.to(dtype).save_pretrained(tmp_path)
    loaded, info = SDARForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and hasattr(loaded.model.layers[0].self_attn.q_norm, "weight")
    expected = original.__class__(original.config)
    expected.load_state_dict({name: value.to(dtype).float() for name, value in original.state_dict().items()})
    logits = loaded.eval()(TOKENS, block_size=1).logits
    torch.testing.assert_close(logits, expected.eval()(TOKENS).logits, atol=tolerance, rtol=0)
    loaded.drop_identity_norms()
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.float()), name
    model.float()


def test_a_training_step_without_norms_is_the_same_after_saving_and_loading(shifted, tmp_path):
    _, model = shifted
    noisy = torch.where(TOKENS % 3 == 0, MASK, TOKENS)
    labels = torch.where(noisy == MASK, TOKENS, -100)
    loss = model(noisy, labels=labels).loss
    loss.backward()
    model.save_pretrained(tmp_path)
    loaded = SDARForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="drop_identity_norms"):
        loaded(noisy, labels=labels)
    loaded.drop_identity_norms()
    loaded(noisy, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(loaded.get_parameter(name).grad, parameter.grad), name
    model.zero_grad()


def test_a_block_s_first_token_is_learnt_from_the_clean_text_before_it(shifted):
    """As it is decoded: what is masked in the block before does not matter to it."""
    _, model = shifted
    labels = torch.full_like(TOKENS, -100)
    labels[:, 8] = TOKENS[:, 8]
    noisy = TOKENS.clone()
    noisy[:, 8] = MASK
    noisier = noisy.clone()
    noisier[:, 4:8] = MASK
    also = labels.clone()
    also[:, 4:8] = TOKENS[:, 4:8]
    with torch.no_grad():
        logits = [model(ids, labels=each).logits[0, 7] for ids, each in ((noisy, labels), (noisier, also))]
        expected = model(TOKENS[:, :8]).logits[0, 7]
    torch.testing.assert_close(logits[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1], expected, atol=1e-5, rtol=1e-5)


def test_norms_that_change_something_are_not_taken_for_those_that_do_not(shifted, originals):
    _, model = shifted
    other = started(SDARForCausalLM, originals["qwen3"][1])
    with pytest.raises(ValueError, match="has_identity_norms"):
        other.drop_identity_norms()
    state = model.state_dict()
    state["model.layers.1.self_attn.q_norm.weight"] = torch.ones(model.config.head_dim)
    with pytest.raises(ValueError, match="layers.1.self_attn.q_norm.weight.*not those of norms that change nothing"):
        model.load_state_dict(state)
    with pytest.raises(ValueError, match="float16 is too narrow"):
        norm_weights(1e-6, torch.float16)


@torch.no_grad()
def test_a_gguf_is_a_source_as_well(originals, tmp_path):
    """Also of the tokenizer, which then has the mask, and what is saved is an ordinary checkpoint."""
    original, _ = originals["qwen2"]
    tokens = [*map(chr, range(97, 123)), "ab", "yz", *(f"<{index}>" for index in range(28, VOCAB))]
    write_gguf(original, tmp_path / "weights.gguf", tokens, ["a b", "y z"])
    model = started(DreamModel, tmp_path, gguf_file="weights.gguf")
    tokenizer = ar_tokenizer(tmp_path, MASK, gguf_file="weights.gguf")
    assert tokenizer.mask_token == f"<{MASK}>"
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config.started_from["gguf_file"] == "weights.gguf"
    torch.testing.assert_close(loaded(TOKENS[:, :1]).logits, original(TOKENS[:, :1]).logits, atol=1e-5, rtol=1e-5)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = f"abc<{MASK}>d"
    assert again(text).input_ids == tokenizer(text).input_ids == [26, 2, MASK, 3]
    assert again.mask_token_id == MASK


def test_a_mask_behind_the_vocabulary_is_added_to_the_tokenizer(tmp_path):
    """Ids between its tokens and the mask, of rows of the embedding without a token, get names."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for gap in (0, 2):
        found = ar_tokenizer(tmp_path, len(tokenizer) + gap)
        assert found("a<|mask|>").input_ids == [0, len(tokenizer) + gap] and len(found) == len(tokenizer) + gap + 1


@pytest.mark.parametrize(
    "cls, kind, sentence",
    [
        (DreamModel, "qwen3", "'qwen3' cannot become a 'Dream': start from a qwen2 or llama checkpoint"),
        (LLaDA2MoeModelLM, "llama", "'llama' cannot become a 'llada2_moe': no autoregressive model's weights"),
        (GLADreamModel, "ministral3", "start from a qwen2 or qwen3 or llama"),
    ],
    ids=str,
)
def test_a_model_that_does_not_fit_is_refused_with_those_that_do(originals, cls, kind, sentence):
    with pytest.raises(ValueError, match=sentence):
        started(cls, originals[kind][1])


@pytest.mark.parametrize(
    "kind, change, sentence",
    [
        (
            "llama",
            {"attention_bias": True},
            "`model.layers.0.self_attn.o_proj.bias`, for which a DreamModel has no place",
        ),
        ("llama", {"head_dim": 12}, "heads are 12 wide"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding window"),
    ],
    ids=str,
)
def test_what_a_family_has_no_place_for_is_refused(tmp_path, kind, change, sentence):
    build(kind, **change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        started(DreamModel, tmp_path)


def test_a_llama_needs_a_mask_token(originals):
    with pytest.raises(ValueError, match="`mask_token_id` is missing"):
        DreamModel.from_ar_pretrained(originals["llama"][1])
