"""What the contracts are tried on: models of every family, and random calls."""

import torch
from hypothesis import assume
from hypothesis import strategies as st

from ..builders import BUILDERS, END, MASK, VOCAB, generate, generators, tiny_model

# Families with the policy `block`, and ways in which one may differ from another.
BLOCK_FAMILIES = ("sdar", "sdar_moe", "llada2", "gla_dream", "nemotron_diffusion", "fast_dllm_v2")
# Families in which a pass of its own decides a block's first token.
SEEDED = ("nemotron_diffusion", "fast_dllm_v2")
BLOCK_MODELS = {
    "sdar": ("sdar", {}),
    "sdar_moe": ("sdar_moe", {}),
    "llada2": ("llada2", {}),
    "gla_dream": ("gla_dream", {}),
    "gla_dream, boundary, shifted, convolved": (
        "gla_dream",
        {"inter_block_injection_mode": "boundary", "logits_shift": 1, "conv_size": 3},
    ),
    "nemotron_diffusion": ("nemotron_diffusion", {}),
    "fast_dllm_v2": ("fast_dllm_v2", {}),
}
UNSEEDED = [kind for kind in BLOCK_MODELS if kind not in SEEDED]
POLICIES = {
    family: ("block", "none") if family in BLOCK_FAMILIES else ("none", "prefix", "dual") for family in BUILDERS
}
PAIRS = [(family, policy) for family, policies in POLICIES.items() for policy in policies]
BLOCK_LENGTHS = (1, 2, 3, 4, 8, 16)
# Of a test that is tried on each family in turn.
EXAMPLES = 60 // len(BLOCK_FAMILIES)

STATIC = {"remasking_strategy": "low_confidence_static"}
# Bounds that models as unsure as the tiny ones reach now and then.
BOUNDS = {
    "low_confidence_dynamic": {"confidence_threshold": 0.3},
    "entropy_bounded": {"entropy_bound": 4.0},
    "factor": {"factor": 2.0},
}
FEW_ENDS = [END, *range(3)]  # a row ends now and then while its neighbours go on
MANY_ENDS = [END, *range(10)]

tokens = st.integers(0, VOCAB - 1).filter(lambda token: token != MASK)
prompts = st.lists(st.one_of(tokens, tokens, tokens, st.just(MASK)), max_size=7)
paces = st.one_of(
    st.just({}),
    st.builds(lambda number: {"steps": number}, st.integers(1, 14)),
    st.builds(lambda number: {"denoising_steps": number}, st.integers(1, 7)),
)
samples = st.fixed_dictionaries(
    {"temperature": st.just(0.8), "top_k": st.sampled_from([None, 5]), "alg_temp": st.sampled_from([None, 0.3])}
)
greedy = st.just({})
gla_dream_changes = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 3, 4]),
        "inter_block_injection_mode": st.sampled_from(["global", "boundary"]),
        "logits_shift": st.sampled_from([0, 1]),
        "conv_size": st.sampled_from([0, 3]),
    }
)


@st.composite
def models(draw, family: str):
    """A model of the family, and the option that says in which blocks it decodes."""
    if family == "gla_dream":
        return tiny_model(family, **draw(gla_dream_changes)), {}
    lengths = st.sampled_from(BLOCK_LENGTHS) if family in BLOCK_FAMILIES else st.none() | st.integers(1, 6)
    options = {"block_length": draw(lengths)}
    if family == "fast_dllm_v2":
        sizes = [size for size in BLOCK_LENGTHS if options["block_length"] % size == 0]
        options["small_block_size"] = draw(st.sampled_from(sizes))
    return tiny_model(family), options


@st.composite
def calls(draw, strategies, fewest_rows=1):
    """Prompts of a batch, and options. Masks in a prompt are positions to fill."""
    rows = draw(st.lists(prompts, min_size=fewest_rows, max_size=draw(st.sampled_from([2, 2, 3]))))
    strategy = draw(strategies)
    options = {
        "max_new_tokens": draw(st.integers(0, 6)),
        "remasking_strategy": strategy,
        **BOUNDS.get(strategy, {}),
        "prefill_chunk_size": draw(st.sampled_from([1, 3, 5, 2048, 2048])),
        "cfg_scale": draw(st.sampled_from([0.0, 0.0, 0.7])),
        "eos_token_id": draw(st.sampled_from([[], [END], FEW_ENDS, MANY_ENDS])),
        **draw(paces),
        **draw(greedy | samples),
    }
    assume(options["max_new_tokens"] or all(rows))
    return rows, options


def span(start: int, end: int) -> list[int]:
    return list(range(start, end))


def columns_fed(calls) -> list[list[list[int]]]:
    """For each forward pass and row, the columns in the window, those that only repeat left out."""
    return [[list(dict.fromkeys(row)) for row in call["position_ids"].tolist()] for call in calls]


def assert_policies_agree(model, rows, **options):
    """`block` and `none` give the same, with the same random numbers for each row. Returns the output of `block`."""
    seeds = range(len(rows) * options.get("num_return_sequences", 1))
    block, none = (
        generate(model, rows, generator=generators(seeds), cache_policy=policy, **options)
        for policy in ("block", "none")
    )
    assert block.sequences.tolist() == none.sequences.tolist()
    assert block.tokens_per_forward.tolist() == none.tokens_per_forward.tolist()
    return block


def texts(rows, output) -> list[list[int]]:
    """Each row's prompt and answer without the padding."""
    width = max(map(len, rows))
    return [sequence[width - len(row) :] for sequence, row in zip(output.sequences.tolist(), rows, strict=True)]


@torch.no_grad()
def assert_cache_is_final(model, cache, **block):
    """What the cache says is final is what one forward pass over these tokens leaves."""
    close = {"atol": 1e-3, "rtol": 1e-3}
    if model.causal_context:
        block = {"use_causal_mask": True}
    for row, length in enumerate(cache.final_lengths):
        if not length:
            continue
        ids, positions = cache.tokens[row : row + 1, :length], torch.arange(length)[None]
        fresh = model(input_ids=ids, position_ids=positions, use_cache=True, **block).past_key_values
        for kept, expected in zip(cache.layers, fresh.layers, strict=True):
            if hasattr(kept, "state"):
                torch.testing.assert_close(kept.state[row], expected.state[0], **close)
            else:
                torch.testing.assert_close(kept.keys[row, :, :length], expected.keys[0], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(kept.values[row, :, :length], expected.values[0], atol=1e-4, rtol=1e-4)
        if model.config.model_type == "gla_dream" and model.logits_shift:
            torch.testing.assert_close(cache.last_hidden[row], fresh.last_hidden[0], **close)
