"""`SamplingParams`: what a request asks for, under the names of vLLM and BlockInfer."""

import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from ..generation.configuration import OF_DENOISING_STEPS, canonical_options

# Options of `diffusion_generate` that are one for all requests, by the names that they have in `LLM`.
OF_THE_ENGINE = {name: name for name in ("cache_policy", "cache_dtype", "mask_token_id", "draft_steps")}
OF_THE_ENGINE |= {"disable_compile": "enforce_eager"}
# Options of `diffusion_generate` that are about a whole batch or look at its logits, and what to do instead.
_REMEDIES = {
    "cfg_scale": "guidance runs every row twice: use `diffusion_generate`",
    "repetition_penalty": "it reads the whole sequence between the steps: use `diffusion_generate`",
    "output_history": "pass `drafts=True` to `generate_streaming`",
    "num_return_sequences": "the argument is called `n`",
    "stop_strings": "the argument is called `stop`",
    "logprobs": "it is an argument of its own",
    "max_time": "the argument is called `timeout`",
    "torch_compile": "it is one for all requests: pass `enforce_eager` to `LLM`",
}
_REMEDIES |= {
    name: f"it is one for all requests: pass {'it' if name == own else f'`{own}`'} to `LLM`"
    for name, own in OF_THE_ENGINE.items()
}


MAX_FORM = 2**16  # characters; a parser takes milliseconds for a thousand
# Options that would transfer several tokens in a step, or not the leftmost one.
_OTHER_ORDERS = tuple(name for name in OF_DENOISING_STEPS if name != "remasking_strategy") + ("self_speculation",)


def _own(value: Any) -> Any:
    """A copy, lists and dicts in it too, since the caller may change their own later."""
    if isinstance(value, dict):
        return {name: _own(each) for name, each in value.items()}
    return [*map(_own, value)] if isinstance(value, list) else value


@dataclass(frozen=True)
class StructuredOutputsParams:
    """The form of a completion, one of these (vLLM's names).

    Args:
        json: a JSON schema, as a dict or as text; what of it cannot be kept is refused.
        json_object: any JSON object.
        regex: a regular expression, in the syntax of Rust's `regex`, that the whole text matches.
        choice: texts of which the completion is one.
        grammar: in llguidance's dialect of Lark.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None and value is not False]
        if len(given) != 1:
            raise ValueError(f"`structured_outputs` need one of {', '.join(vars(self))}, and have {given or 'none'}.")
        kinds: dict[str, Any] = {"json": (str, dict), "json_object": bool, "choice": list, "regex": str, "grammar": str}
        [name], value = given, getattr(self, given[0])
        is_text = name != "choice" or (value and all(isinstance(each, str) and each for each in value))
        if not isinstance(value, kinds[name]) or not is_text:
            raise ValueError(f"`{name}` of `structured_outputs` is of the wrong type: {value!r}.")
        if len(self.source[1]) > MAX_FORM:
            raise ValueError(f"`{name}` of `structured_outputs` has more than {MAX_FORM} characters: ask for less.")
        object.__setattr__(self, name, _own(value))

    @property
    def source(self) -> tuple[str, str]:
        """The kind, "json", "regex" or "grammar", and its text."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.json is not None:
            return "json", self.json if isinstance(self.json, str) else json.dumps(self.json)
        if self.choice is not None:
            return "regex", "|".join(map(re.escape, self.choice))
        return ("regex", self.regex) if self.regex is not None else ("grammar", str(self.grammar))


@dataclass(frozen=True)
class SamplingParams:
    """Options of one request. None leaves an option to the model's `generation_config.json` and then to the model.

    Args:
        temperature: 0 proposes the arg-max.
        topk, topp, min_p: 0, 1 and 0 keep all tokens.
        max_tokens: positions to fill after the prompt; 0 only fills masks in it.
        remasking_strategy: one of `dllm_hf.STRATEGIES`.
        block_length: positions decoded together.
        steps, denoising_steps: of the whole completion, or of each block.
        dynamic_threshold: read by `low_confidence_dynamic`, in (0, 1]; 0 leaves it out.
        eb_threshold: nats, read by `entropy_bounded`; 0 leaves it out.
        factor: read by the strategy `factor`.
        stop: a string, or several, at which the text ends. They are looked for whenever a block is finished, and the text
            does not show them.
        stop_token_ids: end the text as the model's end of sequence does.
        ignore_eos: the model's end of sequence does not end the text.
        seed: makes the draws of a request repeatable, whatever runs beside it; completion i draws with `seed + i`.
        n: completions.
        logprobs: log-probabilities of the new tokens: 0 gives that of each token, a number up to 20 those of as many most
            probable ones besides. They are of the step at which a token was transferred, and of the distribution as the model
            gave it, before suppressed tokens, temperature and filters (vLLM's `raw_logprobs`); the mask counts in it.
        timeout: seconds after which a request ends, with what is final then, wherever it stands.
        skip_special_tokens: whether the text leaves them out.
        structured_outputs: the form of the completion, which is then decoded from left to right, one token a step. It has the
            form when it ends with the reason "stop"; one of another reason is the beginning of a text of the form.
        options: more options of [`DiffusionGenerationConfig`], by their names.
    """

    temperature: float | None = None
    topk: int | None = None
    topp: float | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    remasking_strategy: str | None = None
    block_length: int | None = None
    steps: int | None = None
    denoising_steps: int | None = None
    dynamic_threshold: float | None = None
    eb_threshold: float | None = None
    factor: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    timeout: float | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.n) is not int or self.n < 1:
            raise ValueError(f"`n` must be an integer of at least 1, but is {self.n!r}.")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63 - self.n):
            raise ValueError(f"`seed` must be an integer from 0 to 2**63, but is {self.seed!r}.")
        if self.timeout is not None and not (
            type(self.timeout) in (int, float) and 0 < self.timeout <= sys.float_info.max
        ):
            raise ValueError(f"`timeout` must be a number of seconds above 0, but is {self.timeout!r}.")
        for name in ("ignore_eos", "skip_special_tokens"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        tokens = () if self.stop_token_ids is None else self.stop_token_ids
        if not isinstance(tokens, (list, tuple)) or not all(type(token) is int for token in tokens):
            raise ValueError(f"`stop_token_ids` must be a list of token ids, but is {self.stop_token_ids!r}.")
        is_known = self.stop is None or isinstance(self.stop, (str, list, tuple))
        if not is_known or not all(isinstance(string, str) and string for string in self.stop_strings):
            raise ValueError(f"`stop` must be a string or a list of strings, none empty, but is {self.stop!r}.")
        if not isinstance(self.options, dict) or not all(isinstance(name, str) for name in self.options):
            raise ValueError(f"`options` must be a dict of options by their names, but is {self.options!r}.")
        for name in {**self.options, **canonical_options(self.options)}:
            if name in _REMEDIES:
                raise ValueError(f"`{name}` is no option of a request: {_REMEDIES[name]}.")
        if self.structured_outputs is not None:
            self._check_form(self.structured_outputs)
        for name in ("stop", "stop_token_ids", "options"):
            object.__setattr__(self, name, _own(getattr(self, name)))

    def _check_form(self, form: Any) -> None:
        if not isinstance(form, StructuredOutputsParams):
            raise ValueError(f"`structured_outputs` must be `StructuredOutputsParams`, but is {form!r}.")
        if self.stop_strings:
            raise ValueError("`stop` would cut a text out of the form that `structured_outputs` ask for: leave it out.")
        options = canonical_options(self.generation_options())
        wrong = [name for name in _OTHER_ORDERS if name in options]
        if options.get("remasking_strategy", "sequential") != "sequential":
            wrong = [*wrong, "remasking_strategy"]
        if wrong:
            raise ValueError(
                f"`{wrong[0]}` cannot go with `structured_outputs`, which are decoded from left to right, one token a step: "
                "leave it out."
            )

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def generation_options(self) -> dict[str, Any]:
        """The options of [`DiffusionGenerationConfig`] that were given, by its names or those of the originals."""
        own = [
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "seed",
            "n",
            "logprobs",
            "timeout",
            "skip_special_tokens",
            "options",
        ]
        own += ["structured_outputs"]
        given = {name: value for name, value in vars(self).items() if name not in own}
        given |= {name: given[name] or None for name in ("dynamic_threshold", "eb_threshold")}
        given["stop_strings"] = self.stop_strings or None
        return {**{name: value for name, value in given.items() if value is not None}, **self.options}
