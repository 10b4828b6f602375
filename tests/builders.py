"""What the tests build: tiny models, a model that says what the test tells it to, padded batches, a tokenizer."""

import importlib.util
import itertools
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from dllm_hf import (
    DiffusionGenerationMixin,
    DreamConfig,
    DreamModel,
    Fast_dLLM_QwenConfig,
    Fast_dLLM_QwenForCausalLM,
    GLADreamConfig,
    GLADreamModel,
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
    LLaDAMoEModelLM,
    NemotronLabsDiffusionConfig,
    NemotronLabsDiffusionModel,
    SDARConfig,
    SDARForCausalLM,
    SDARMoeConfig,
    SDARMoeForCausalLM,
)
from dllm_hf.generation.window import Window

VOCAB, MASK, END, TURN_END = 64, 60, 61, 62
PAD = END  # as in LLaDA and Dream
POSITIONS = 128
FAMILIES = ("llada", "dream")
POLICIES = ("none", "prefix", "dual")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?\n-:"
SPECIAL = {"mask_token_id": MASK, "eos_token_id": END, "pad_token_id": PAD, "bos_token_id": None}


def llada_config(**changes) -> LLaDAConfig:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "mlp_hidden_size": 48}
    return LLaDAConfig(**{**sizes, "max_sequence_length": POSITIONS, "init_std": 0.3, **SPECIAL, **changes})


def dream_config(**changes) -> DreamConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": POSITIONS}
    return DreamConfig(**{**sizes, "initializer_range": 0.3, **SPECIAL, **changes})


def sdar_sizes() -> dict:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": POSITIONS}
    return {**sizes, "initializer_range": 0.3, "block_size": 4, **SPECIAL}


def sdar_config(**changes) -> SDARConfig:
    return SDARConfig(**{**sdar_sizes(), **changes})


def sdar_moe_config(**changes) -> SDARMoeConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    return SDARMoeConfig(**{**sdar_sizes(), **experts, **changes})


def llada2_config(**changes) -> LLaDA2MoeConfig:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 4, "topk_group": 2}
    return LLaDA2MoeConfig(**{**sdar_sizes(), **experts, **changes})


def llada_moe_config(**changes) -> LLaDAMoEConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "dense_intermediate_size": 48, "expert_intermediate_size": 24}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": POSITIONS}
    return LLaDAMoEConfig(**{**sizes, "initializer_range": 0.3, **SPECIAL, **changes})


def gla_dream_config(**changes) -> GLADreamConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": POSITIONS}
    sizes |= {"block_size": 4, "initializer_range": 0.3}
    return GLADreamConfig(**{**sizes, **SPECIAL, **changes})


def nemotron_diffusion_config(**changes) -> NemotronLabsDiffusionConfig:
    # Queries are scaled from position 16 on.
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 16}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}
    return NemotronLabsDiffusionConfig(**{**sdar_sizes(), "rope_parameters": rope, **changes})


def fast_dllm_v2_config(**changes) -> Fast_dLLM_QwenConfig:
    sizes = {name: value for name, value in sdar_sizes().items() if name != "head_dim"}
    return Fast_dLLM_QwenConfig(**{**sizes, **changes})


BUILDERS = {
    "llada": lambda **changes: LLaDAModelLM(llada_config(**changes)),
    "dream": lambda **changes: DreamModel(dream_config(**changes)),
    "sdar": lambda **changes: SDARForCausalLM(sdar_config(**changes)),
    "sdar_moe": lambda **changes: SDARMoeForCausalLM(sdar_moe_config(**changes)),
    "llada2": lambda **changes: LLaDA2MoeModelLM(llada2_config(**changes)),
    "llada_moe": lambda **changes: LLaDAMoEModelLM(llada_moe_config(**changes)),
    "gla_dream": lambda **changes: GLADreamModel(gla_dream_config(**changes)),
    "nemotron_diffusion": lambda **changes: NemotronLabsDiffusionModel(nemotron_diffusion_config(**changes)),
    "fast_dllm_v2": lambda **changes: Fast_dLLM_QwenForCausalLM(fast_dllm_v2_config(**changes)),
}

# Families of which `conftest.py` tries each promise on one, since every test of all families would take too long.
SAMPLED = ("llada2", "llada_moe", "nemotron_diffusion", "fast_dllm_v2")


def is_sampled(family: str) -> bool:
    """Whether only some of the tests are run with the family: not so where the environment asks for all of them."""
    return family in SAMPLED and not os.environ.get("DLLM_HF_EVERY_FAMILY")


def new_model(family: str, **changes) -> PreTrainedModel:
    """A random model whose best token is well ahead of the second, but not so far that confidences reach 1.

    `changes`: to its configuration.
    """
    torch.manual_seed(1)
    return BUILDERS[family](**changes).eval().float()


@cache
def tiny_model(family: str, **changes) -> PreTrainedModel:
    """[`new_model`], built once for each configuration and left as it is, with learnt positions on top of the rotary ones.

    Attention over equal values is the same wherever one stands: on a canvas of masks alone all positions would have
    equal logits, and rounding would choose between them.
    """
    with torch.random.fork_rng(devices=[]):  # what a test draws must not depend on whether the model was built before
        model = new_model(family, **changes)
        shifts = torch.randn(POSITIONS, model.config.hidden_size)

    def embed(stack, args, kwargs):
        ids, positions = kwargs.pop("input_ids"), kwargs["position_ids"]
        return args, {**kwargs, "inputs_embeds": stack.embed_tokens(ids) + shifts[positions]}

    model.model.register_forward_pre_hook(embed, with_kwargs=True)
    return model


class ScriptedModel(DiffusionGenerationMixin, PreTrainedModel):
    """Whatever it reads, position i is answered with `script[i]`. It notes what it was fed.

    script: `(positions, vocab)` logits, see [`script`].
    fed: the input ids of each forward pass.
    """

    config_class = LLaDAConfig
    cache_policies = POLICIES
    confidence_source = "raw"

    def __init__(self, script: torch.Tensor, **config):
        super().__init__(llada_config(**config))
        self.script = script
        self.nothing = nn.Parameter(torch.zeros(1))
        self.fed: list[torch.Tensor] = []

    def forward(self, input_ids, position_ids, logits_to_keep, **kwargs):
        self.fed.append(input_ids.clone())
        return CausalLMOutputWithPast(logits=self.script[position_ids.gather(1, logits_to_keep)].clone())


class RefusesToRun(ScriptedModel):
    def forward(self, **kwargs):
        raise AssertionError("a forward pass was made")


def refused(model, *mentions, **call):
    """Check that the call is refused with a message that mentions each of these."""
    call = {"max_new_tokens": 4, **call}
    if "input_ids" not in call and "inputs" not in call:
        call["input_ids"] = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError) as error:
        model.diffusion_generate(**call)
    for mention in mentions:
        assert re.search(mention, str(error.value)), f"{mention!r} is not in: {error.value}"


def script(tokens: list[int], strengths: list[float] | float = 4.0, prompt: int = 0) -> torch.Tensor:
    """Logits with which position `prompt + i` proposes `tokens[i]`, the surer the higher `strengths[i]`."""
    if not isinstance(strengths, list):
        strengths = [strengths - 0.01 * i for i in range(len(tokens))]
    logits = torch.zeros(prompt + len(tokens), VOCAB)
    for position, (token, strength) in enumerate(zip(tokens, strengths, strict=True), start=prompt):
        logits[position, token] = strength
    return logits


def left_pad(rows: list[list[int]], pad: int = PAD) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of a batch."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    shape = (len(rows), width)
    return {
        "input_ids": torch.tensor(ids, dtype=torch.long).view(shape),
        "attention_mask": torch.tensor(mask, dtype=torch.long).view(shape),
    }


def generate(model, rows: list[list[int]], **options):
    """A `DiffusionGenerateOutput` for prompts given as lists."""
    return model.diffusion_generate(**left_pad(rows), return_dict_in_generate=True, **options)


def assert_each_row_is_what_it_is_alone(model, rows: list[list[int]], checked: list[int] | None = None, **options):
    """A batch's rows are what each prompt gets alone, with the same generator. `checked`: the rows to look at."""
    width = max(map(len, rows))
    together = generate(model, rows, generator=generators(range(len(rows))), **options)
    for index in range(len(rows)) if checked is None else checked:
        row = rows[index]
        alone = generate(model, [row], generator=generators([index]), **options)
        assert together.sequences[index, width - len(row) :].tolist() == alone.sequences[0].tolist()
        assert together.tokens_per_forward[index] == alone.tokens_per_forward[0]


def new_tokens(model, row: list[int], **options) -> list[int]:
    """What a single prompt is continued with."""
    return generate(model, [row], **options).sequences[0, len(row) :].tolist()


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def window_of(
    columns: torch.Tensor, keep: torch.Tensor, final: torch.Tensor | None = None, slots: list[int] | None = None
) -> Window:
    """A window whose tokens see as many columns as the last of them all has before it, and itself."""
    own = torch.arange(len(columns), device=columns.device)
    own = own if slots is None else torch.tensor(slots, device=columns.device)
    return Window(
        slots=own,
        owners=own[:, None],
        columns=columns,
        lengths=torch.full_like(columns, int(columns.max()) + 1, dtype=torch.int32),
        keep=keep,
        final=columns[:, :1] if final is None else final,
        block=keep,
        shown=torch.ones_like(keep, dtype=torch.bool),
        runs=torch.empty(0, 3, dtype=torch.long, device=columns.device),
        longest=columns.shape[1],
        visible=int(columns.max()) + 1,
        seen="all",
        is_canvas=False,
        is_every_slot=slots is None,
    )


def as_list(window: Window) -> Window:
    """The same positions as a list of tokens."""
    rows, width = window.columns.shape
    first = torch.arange(rows, device=window.slots.device) * width
    return replace(
        window,
        owners=window.slots.repeat_interleave(width),
        columns=window.columns.flatten(),
        lengths=window.lengths.flatten(),
        keep=window.keep + first[:, None],
        runs=torch.stack([window.slots, first, torch.full_like(first, width)], dim=1),
    )


def pairwise(**axes: list) -> pytest.MarkDecorator:
    """`parametrize` over few of all combinations: each two values of two axes meet in one of them."""
    values = [list(axis) for axis in axes.values()]
    combinations = list(itertools.product(*(range(len(axis)) for axis in values)))
    pairs = {each: set(itertools.combinations(enumerate(each), 2)) for each in combinations}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(combinations, key=lambda each: len(pairs[each] & missing))
        missing -= pairs[best]
        chosen.append([axis[index] for axis, index in zip(values, best)])
    return pytest.mark.parametrize(list(axes), chosen)


@contextmanager
def recorded(module: nn.Module):
    """Yields a list that receives the keyword arguments, or the only positional one, of each call of `module`."""
    calls = []

    def note(module, args, kwargs):
        copies = {name: value.clone() if torch.is_tensor(value) else value for name, value in kwargs.items()}
        calls.append(copies or args[0])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def load_script(name: str) -> ModuleType:
    """A file of `examples/` or `benchmarks/`, which are no packages: `examples/train.py`."""
    path = Path(__file__).parents[1] / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of `CHARACTERS`, then the special tokens, with the ids of the tiny models."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)}
    vocabulary |= {"<mask>": MASK, "<end>": END, "<turn>": TURN_END, "<unk>": TURN_END + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token="<mask>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
