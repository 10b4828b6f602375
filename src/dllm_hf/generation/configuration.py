"""`DiffusionGenerationConfig`: every option of `diffusion_generate`, checked when it is set."""

import copy
import difflib
import math
from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from .remasking import STRATEGIES

logger = logging.get_logger(__name__)

# Dream's schedule is a table with an entry for each step.
MAX_STEPS = 1_000_000
MAX_DRAFTS = 64
DRAFTS = f"an integer from 0 to {MAX_DRAFTS} or 'auto'"
CACHE_POLICIES = ("none", "prefix", "dual", "block")
CACHE_DTYPES = ("int8", "fp8")

# The names that the original implementations use for our options (LLaDA, Fast-dLLM, Dream, SDAR, BlockInfer).
ALIASES = {
    "gen_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_steps": "steps",
    "remasking": "remasking_strategy",
    "alg": "remasking_strategy",
    "threshold": "confidence_threshold",
    "dynamic_threshold": "confidence_threshold",
    "eb_threshold": "entropy_bound",
    "mask_id": "mask_token_id",
    "temperature_": "temperature",
    "topk": "top_k",
    "topp": "top_p",
    "steps_per_look": "check_interval",  # this package's own earlier name
}
# LLaDA's switches stand for the model's special tokens, so they are resolved when decoding starts.
LLADA_SWITCHES = ("logits_eos_inf", "confidence_eos_eot_inf")

# An option that only one strategy reads selects that strategy where the caller names none.
STRATEGY_OF_OPTION = {
    "confidence_threshold": "low_confidence_dynamic",
    "entropy_bound": "entropy_bounded",
    "factor": "factor",
}

# What decides how denoising steps transfer tokens, and means nothing where they are drafted and verified.
OF_DENOISING_STEPS = ("remasking_strategy", *STRATEGY_OF_OPTION, "steps", "denoising_steps", "alg_temp", "eps")

# What the library's text-generation pipeline fills in for options that the caller leaves out. The values are meant for
# autoregressive models: here an option that is left out has the model's own default.
PIPELINE_DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

_METADATA = ("transformers_version", "_commit_hash", "_from_model_config", "_original_object_hash")
# Options of the library's `generate` that scripts and harnesses pass out of habit, each with the value that changes
# nothing. With that value they are accepted, with any other they are refused.
NEUTRAL = {
    "use_cache": True,
    "renormalize_logits": False,
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), False),
    **dict.fromkeys(("synced_gpus", "early_stopping", "remove_invalid_values", "token_healing", "low_memory"), False),
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("length_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), 1.0),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("diversity_penalty", "epsilon_cutoff", "eta_cutoff", "penalty_alpha"), 0.0),
}
# Frequent options of the library's autoregressive `generate`, and what to use here.
_REMEDIES = {
    "cache_implementation": "choose a `cache_policy`",
    "num_beams": "a masked-diffusion model has no beam search; choose a `remasking_strategy`",
    "min_new_tokens": "list the end-of-sequence token in `suppress_tokens`",
    "min_length": "list the end-of-sequence token in `suppress_tokens`",
    "guidance_scale": "the option is called `cfg_scale`",
    "block_size": "the option is called `block_length`",
    "causal_context": "whether the text before a block is causal is a matter of the model (`model.causal_context`), so leave it out",
    "max_denoising_steps": "the option is called `denoising_steps` (per block) or `steps` (in all)",
}


# Two forms of one option: giving the first in a call drops the second from what was stored.
REPLACES = {
    "max_new_tokens": "max_length",
    "max_length": "max_new_tokens",
    "steps": "denoising_steps",
    "denoising_steps": "steps",
    "temperature": "do_sample",
}
# Options, their type, what must hold of a value, and how an error says it.
_CHECKS: tuple[tuple[tuple[str, ...], Any, Callable[[Any], bool], str], ...] = (
    (("max_new_tokens",), int, lambda v: v >= 0, "an integer of at least 0"),
    (("draft_steps",), (int, str), lambda v: v == "auto" or (type(v) is int and 0 <= v <= MAX_DRAFTS), DRAFTS),
    (("max_post_steps",), int, lambda v: 0 <= v <= MAX_STEPS, f"an integer from 0 to {MAX_STEPS}"),
    (("max_length", "block_length", "prefill_chunk_size"), int, lambda v: v >= 1, "an integer of at least 1"),
    (("small_block_size",), int, lambda v: v >= 1, "an integer of at least 1"),
    (("num_return_sequences", "check_interval"), int, lambda v: v >= 1, "an integer of at least 1"),
    (("steps", "denoising_steps"), int, lambda v: 1 <= v <= MAX_STEPS, f"an integer from 1 to {MAX_STEPS}"),
    (("top_k",), int, lambda v: v >= 0, "an integer of at least 0 (0 turns it off)"),
    (("temperature", "cfg_scale", "alg_temp"), float, lambda v: v >= 0, "a number of at least 0"),
    (("entropy_bound", "factor", "repetition_penalty", "max_time"), float, lambda v: v > 0, "a number above 0"),
    (("min_p", "editing_threshold"), float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    (("confidence_threshold", "top_p"), float, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    (("eps",), float, lambda v: 0 < v < 1, "a number between 0 and 1"),
    (("do_sample", "disable_compile", "torch_compile", *LLADA_SWITCHES), bool, lambda v: True, "True or False"),
    (("output_history", "return_dict_in_generate", "use_block_cache"), bool, lambda v: True, "True or False"),
    (("self_speculation",), bool, lambda v: True, "True or False"),
    (("mask_token_id", "pad_token_id", "bos_token_id"), int, lambda v: v >= 0, "a token id"),
)


def canonical_options(options: dict[str, Any]) -> dict[str, Any]:
    """Translate the originals' argument names, and name the strategy that a given option implies.

    Fast-dLLM asks for parallel decoding with `remasking="low_confidence", threshold=0.9` (or `factor=`), so the
    original name `low_confidence`, like no name at all, gives way to the strategy that reads the option.
    """
    canonical: dict[str, Any] = {}
    for name, value in options.items():
        value = _plain(value)
        if is_neutral(name, value):
            continue
        if name == "use_cache" and value is False:
            name, value = "cache_policy", "none"
        target = ALIASES.get(name, name)
        if target in canonical and canonical[target] != value:
            raise ValueError(f"`{name}={value!r}` contradicts `{target}={canonical[target]!r}`: give only one of them.")
        canonical[target] = value
    if canonical.get("remasking_strategy") in (None, "low_confidence"):
        given = [option for option in STRATEGY_OF_OPTION if option in canonical]
        if len(given) > 1:
            raise ValueError(f"{given} belong to different strategies: name the `remasking_strategy` you want.")
        if given:
            canonical["remasking_strategy"] = STRATEGY_OF_OPTION[given[0]]
    return canonical


def is_neutral(name: str, value: Any) -> bool:
    """Whether an option asks for nothing: it is None, or one of the library's at a value that changes nothing."""
    return value is None or (name in NEUTRAL and isinstance(value, (bool, int, float)) and value == NEUTRAL[name])


class DiffusionGenerationConfig(GenerationConfig):
    """Options of [`DiffusionGenerationMixin.diffusion_generate`], stored in a repository's `generation_config.json`.

    `None` means that the model's own default applies. The originals' names for the same options are accepted (see
    `ALIASES`); anything unknown or impossible is a `ValueError` that names it.

    Args:
        max_new_tokens (`int`, defaults to 128): positions to fill after the prompt; 0 only fills masks in the prompt.
        max_length (`int`): length of prompt and new tokens together; used where `max_new_tokens` is not given.
        block_length (`int`): positions decoded together.
        small_block_size (`int`): Fast-dLLM v2 decodes a block in sub-blocks of so many positions, from left to right.
        use_block_cache (`bool`): once the first position of a sub-block is decided, passes feed the sub-block alone. The keys of
            the rest of the block are then those of the last pass over all of it: an approximation.
        steps (`int`): denoising steps of the whole completion, spread evenly over its blocks.
        denoising_steps (`int`): denoising steps of each block. Without either, a step transfers one token.
        draft_steps (`int` or `"auto"`, defaults to 0): up to so many further denoising steps in each forward pass, with the same
            tokens: the pass feeds guesses of the next canvases beside the present one, as rows of their own, and goes as far as
            they were right ([`drafts`]). Only where nothing is drawn at random in a step, and the strategy knows beforehand how
            many tokens it transfers. `"auto"`: as many as are worth what their rows cost on the GPU, which is measured once; none on
            a CPU.
        self_speculation (`bool`): the tokens of autoregressive decoding, those of `block_length=1`: a pass drafts a block, and
            another one keeps of it what it would have given itself ([`self_speculation`]). No strategy decides anything then.
            Only for models whose text is causal (`causal_context`).
        temperature (`float`, defaults to 0.0): 0 proposes the arg-max.
        do_sample (`bool`): `False` means temperature 0; `True` where no temperature is set means temperature 1.
        top_k (`int`), top_p, min_p (`float`): the library's warpers, applied after the temperature, without the mask.
        repetition_penalty (`float`): above 1 makes the tokens that stand on the row's canvas less likely (the library's
            processor, arXiv:1909.05858).
        remasking_strategy (`str`): which proposals a step transfers, one of `STRATEGIES`.
        confidence_threshold (`float` in (0, 1], defaults to 0.9): read by `low_confidence_dynamic`.
        entropy_bound (`float`, defaults to 0.1): nats, read by `entropy_bounded`.
        factor (`float`, defaults to 1.0): read by `factor`.
        editing_threshold (`float` in [0, 1]): a token of the block, not one of the prompt, is replaced by a proposal of a
            higher probability; 1 replaces none. Only for models that edit tokens (`supports_editing`).
        max_post_steps (`int`, defaults to 16): with `editing_threshold`, a block whose masks are gone goes on until a step
            has replaced nothing, and for so many steps at most.
        alg_temp (`float`): > 0 draws the quota from `softmax(confidence / alg_temp)` instead of taking the best.
        eps (`float`, defaults to 1e-3): the last timestep of Dream's schedule.
        cfg_scale (`float`, defaults to 0.0): classifier-free guidance; doubles the batch of every forward pass.
        cache_policy (`str`): one of the model's `cache_policies`.
        cache_dtype (`str`): `"int8"` and `"fp8"` keep keys and values in 8 bits with a scale for each head and token, in half
            the memory, `"int8"` nearer to what they were; without it they have the model's type.
        prefill_chunk_size (`int`, defaults to 2048): with `cache_policy="block"`, a longer prompt is computed in pieces.
        suppress_tokens (`list[int]`): never proposed.
        bad_words_ids (`list[list[int]]`): words of one token each, never proposed either.
        stop_strings (`str` or `list[str]`): a row ends with the token that completes one of them after its prompt; needs
            `tokenizer=` in the call. They are looked for whenever a block is finished.
        max_time (`float`): seconds after which a row ends with the block that is being decoded.
        confidence_suppress_tokens (`list[int]`): a position where one of them is proposed is transferred last.
        num_return_sequences (`int`, defaults to 1): completions of each prompt.
        check_interval (`int`, defaults to 1): where the logits decide when a block is done, the host checks every so many
            steps, and waits for the GPU each time. Steps after the block is done are forward passes that transfer nothing.
            `steps_per_look`, its name before, is accepted.
        disable_compile (`bool`): no CUDA graphs and no fused kernels.
        torch_compile (`bool`): on a GPU with a cache, the forward pass of a step goes through `torch.compile` before it is
            captured. The first call then takes half a minute or more. Dynamo compiles eight shapes in a process
            (`torch._dynamo.config.recompile_limit`); others run as without. `disable_compile` overrides it.
        output_history (`bool`): return the canvas after each step; implies `return_dict_in_generate`.
        return_dict_in_generate (`bool`): return a [`DiffusionGenerateOutput`] instead of the sequences alone.
        mask_token_id, pad_token_id, bos_token_id (`int`), eos_token_id (`int` or `list[int]`): special tokens.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    # `Any`: optional here, but set in the options of a row (`DiffusionGenerationMixin.diffusion_request`). Only models
    # without a cache policy `block` leave `block_length` at None there.
    block_length: Any = None
    small_block_size: int | None = None
    use_block_cache: bool = False
    steps: int | None = None
    denoising_steps: int | None = None
    draft_steps: int | str | None = None
    self_speculation: bool = False
    temperature: float = 0.0
    do_sample: bool | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    remasking_strategy: Any = None  # as `block_length`
    confidence_threshold: float = 0.9
    entropy_bound: float = 0.1
    factor: float = 1.0
    editing_threshold: float | None = None
    max_post_steps: Any = None  # as `block_length`, where there is an `editing_threshold`
    alg_temp: float | None = None
    eps: float = 1e-3
    cfg_scale: float = 0.0
    cache_policy: Any = None  # as `block_length`
    cache_dtype: str | None = None
    prefill_chunk_size: int = 2048
    suppress_tokens: list[int] | None = None
    bad_words_ids: list[list[int]] | None = None
    stop_strings: str | list[str] | None = None
    max_time: float | None = None
    confidence_suppress_tokens: list[int] | None = None
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False
    num_return_sequences: int = 1
    check_interval: int = 1
    disable_compile: bool = False
    torch_compile: bool = False
    output_history: bool = False
    return_dict_in_generate: bool = False
    mask_token_id: Any = None  # as `block_length`
    pad_token_id: Any = None  # as `block_length`
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # The options above: what this class body holds so far.
    DEFAULTS = {name: default for name, default in vars().items() if not name.startswith("_")}

    def __init__(self, **kwargs):
        # `super().__init__` is left out: it sets seventy attributes, options that diffusion does not read.
        for name in _METADATA:
            setattr(self, name, kwargs.pop(name, None))
        options = canonical_options(kwargs)
        _refuse_unknown(options)
        for name, default in self.DEFAULTS.items():
            setattr(self, name, copy.copy(options.get(name, default)))
        self.validate()

    def updated(self, /, **kwargs) -> "DiffusionGenerationConfig":
        """A copy of this configuration in which `kwargs` (the originals' names included) replace what they name."""
        options = canonical_options(kwargs)
        _refuse_unknown(options)
        if options.get("do_sample") is True and options.get("temperature") == 0:
            raise ValueError("`do_sample=True` contradicts `temperature=0`: give a temperature above 0, or drop one.")
        config = copy.copy(self)  # no value is ever changed, only replaced
        for given, stored in REPLACES.items():
            if given in options and stored not in options:
                setattr(config, stored, None)
        for name, value in options.items():
            setattr(config, name, value)
        config.validate()
        unread = [f"`{name}`" for name in OF_DENOISING_STEPS if name in options]
        if unread and config.self_speculation:
            raise ValueError(
                f"`self_speculation=True` keeps the tokens of autoregressive decoding, in which {', '.join(unread)} would have no "
                "part: leave that out, or give `self_speculation=False`."
            )
        return config

    @property
    def sampling_temperature(self) -> float:
        """The temperature that decoding uses, `do_sample` taken into account."""
        if self.do_sample is False:
            return 0.0
        return 1.0 if self.do_sample and not self.temperature else float(self.temperature)

    def validate(self, **unused):
        """Raises a `ValueError` that names the first impossible value. Called by the library on saving as well."""
        for names, kind, holds, expected in _CHECKS:
            for name in names:
                _check(self, name, kind, holds, expected)
        for name in ("eos_token_id", "suppress_tokens", "confidence_suppress_tokens"):
            for token in as_token_list(getattr(self, name)):
                if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                    raise ValueError(f"`{name}` must be a token id or a list of token ids, but holds {token!r}.")
        words = self.bad_words_ids
        if words is not None and not (isinstance(words, list) and all(_is_word(word) for word in words)):
            raise ValueError(
                f"`bad_words_ids` must list words of one token each, as `[[5], [7]]`, but is {words!r}: the tokens of a "
                "longer word may become final in one step, so that it cannot be kept out."
            )
        if not all(isinstance(text, str) and text for text in as_token_list(self.stop_strings)):
            raise ValueError(
                f"`stop_strings` must be a string or a list of strings, none empty: {self.stop_strings!r}."
            )
        if self.steps is not None and self.denoising_steps is not None:
            raise ValueError(
                f"`steps={self.steps}` (for the whole completion) and `denoising_steps={self.denoising_steps}` "
                "(for each block) exclude each other: give one of them."
            )
        offered = " that the model offers in `cache_policies`"
        for name, known, which in (
            ("remasking_strategy", tuple(STRATEGIES), ""),
            ("cache_policy", CACHE_POLICIES, offered),
            ("cache_dtype", CACHE_DTYPES, ", or leave it out for the model's own"),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                choice = f"choose one of {', '.join(known)}{which}"
                raise ValueError(f"`{name}={value!r}` is unknown{_did_you_mean(value, known)}: {choice}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "DiffusionGenerationConfig":
        """Read a `generation_config.json`. Options of the library's that have no meaning here are dropped, with a
        warning where they were set to something other than the library's default, so that published files load."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"Options are a JSON object, `{{...}}`, and not {config_dict!r}.")
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known = {*cls.DEFAULTS, *ALIASES, *_METADATA}
        library = GenerationConfig().to_dict()
        options = {}
        for name, value in config_dict.items():
            if name in known or name not in library:
                options[name] = value
            elif not is_neutral(name, value):
                logger.warning_once(f"`{name}={value!r}` in the generation config has no meaning here and is ignored.")
        unused = {name: kwargs.pop(name) for name in list(kwargs) if name not in known}
        config = cls(**{**options, **kwargs})
        return (config, unused) if return_unused else config  # type: ignore[return-value]  # as the library's does

    @classmethod
    def from_model_config(cls, model_config) -> "DiffusionGenerationConfig":
        """The special tokens of a model's configuration; everything else at its default."""
        values = model_config if isinstance(model_config, dict) else model_config.to_dict()
        names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
        return cls(_from_model_config=True, **{name: values.get(name) for name in names})

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs) -> dict[str, Any]:
        """Set the attributes that `kwargs` name and return the rest, as the library's method does. With `defaults_only`
        nothing is set: the values are the library's defaults, and `None` has a meaning here."""
        unused = {}
        for name, value in kwargs.items():
            if name not in self.DEFAULTS:
                unused[name] = value
            elif not defaults_only:
                setattr(self, name, value)
        self.validate()
        return unused

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that differ from the defaults, and always those of `PIPELINE_DEFAULTS`: the pipelines of transformers
        5.23 and later fill in an option that is missing here."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in PIPELINE_DEFAULTS or (value is not None and value != self.DEFAULTS.get(name))
        }

    def to_json_string(
        self, use_diff: bool = True, ignore_metadata: bool = False, keys_to_pop: list[str] | None = None
    ) -> str:
        """The content of `generation_config.json`: with `use_diff`, what differs from the defaults."""
        defaults = [
            name for name in PIPELINE_DEFAULTS if use_diff and getattr(self, name) in (None, self.DEFAULTS[name])
        ]
        return super().to_json_string(use_diff, ignore_metadata, [*(keys_to_pop or []), *defaults])

    def get_generation_mode(self, *args, **kwargs):
        raise ValueError("A masked-diffusion model has one way to decode: there is no generation mode to choose.")


def as_token_list(values) -> list:
    """The values of an option that may be one value, several, or None, as `eos_token_id`."""
    if values is None:
        return []
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _plain(value):
    """Numbers of numpy and torch as Python's; their arrays, and sets, as lists."""
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=repr)
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _is_word(word: Any) -> bool:
    return isinstance(word, list) and len(word) == 1 and type(word[0]) is int and word[0] >= 0


def _check(
    config: DiffusionGenerationConfig, name: str, kind: Any, holds: Callable[[Any], bool], expected: str
) -> None:
    value = getattr(config, name)
    if value is None:
        return
    if kind is float and type(value) is int and abs(value) < 10**300:
        value = float(value)  # torch takes no integers of more than 64 bits
        setattr(config, name, value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits or not holds(value) or (kind is float and not math.isfinite(value)):
        raise ValueError(f"`{name}` must be {expected}, but is {value!r}.")


def _did_you_mean(name: Any, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _refuse_unknown(options: dict[str, Any]) -> None:
    known = DiffusionGenerationConfig.DEFAULTS
    for name, value in options.items():
        if name in known:
            continue
        if name in _REMEDIES:
            raise ValueError(f"`{name}` is not an option of `diffusion_generate`: {_REMEDIES[name]}.")
        if name in NEUTRAL or hasattr(GenerationConfig(), name):
            raise ValueError(f"`{name}={value!r}` has no meaning for decoding by diffusion: leave it out.")
        raise ValueError(
            f"`{name}` is not an option of `diffusion_generate`{_did_you_mean(name, [*known, *ALIASES])}. "
            f"The options are {', '.join(known)}."
        )
