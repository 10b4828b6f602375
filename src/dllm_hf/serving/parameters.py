"""A request's parameters: what the engine is given, what is refused, what is passed over."""

import logging
import random
from collections.abc import Sequence
from typing import Any

from ..engine import LLM, SamplingParams
from ..generation.configuration import ALIASES, NEUTRAL, DiffusionGenerationConfig, canonical_options
from .errors import ApiError, refusal_of
from .schema import Decoding, given
from .settings import Settings
from .structure import NAMES, form_of

logger = logging.getLogger(__name__)

# Parameters of other servers that cannot be served, the values besides null that ask for nothing, and why.
_NO_TOOLS = "tools are not shown to the model, and its answer is not searched for calls"
_NO_PENALTY = "a penalty reads the whole text between two steps: use `diffusion_generate`"
REFUSED: dict[str, tuple[tuple, str]] = {
    "prompt_logprobs": ((), "a bound on the likelihood of a text takes many forward passes, which no request makes"),
    "logit_bias": (({},), "there is no bias for single tokens: `suppress_tokens` excludes tokens"),
    "tools": (([],), _NO_TOOLS),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "function_call": (("none", "auto"), _NO_TOOLS),
    "presence_penalty": ((0,), _NO_PENALTY),
    "frequency_penalty": ((0,), _NO_PENALTY),
    "repetition_penalty": ((1,), _NO_PENALTY),
    "cfg_scale": ((0,), "guidance runs every row twice: use `diffusion_generate`"),
    "best_of": ((1,), "completions are not ranked: use `n`"),
    "use_beam_search": ((False,), "a masked-diffusion model has no beam search"),
    "min_tokens": ((0,), "list the end of sequence in `suppress_tokens`, or use `ignore_eos`"),
    "suffix": (("",), "use /v1/infill, with a mask for each token to fill"),
    "prompt_embeds": ((), "prompts are texts or token ids"),
    "modalities": ((["text"],), "the model writes text"),
    "audio": ((), "the model writes text"),
}
# Of no effect on a result.
PASSED_OVER = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
PASSED_OVER |= {"prompt_cache_key", "include_reasoning", "priority", "stream"}
# Options of `DiffusionGenerationConfig` that are the server's, or go by another name.
_NOT_OF_A_REQUEST = {"num_return_sequences", "max_time", "stop_strings", "cache_policy", "mask_token_id", "mask_id"}
_NOT_OF_A_REQUEST |= {
    "cache_dtype",
    "disable_compile",
    "torch_compile",
    "output_history",
    "return_dict_in_generate",
    "max_length",
}
_NOT_OF_A_REQUEST |= {"pad_token_id", "bos_token_id", "prefill_chunk_size", "check_interval", "steps_per_look"}
_OPTIONS = {*DiffusionGenerationConfig.DEFAULTS, *ALIASES} - _NOT_OF_A_REQUEST - REFUSED.keys()
_KNOWN = {*Decoding.model_fields, "messages", "prompt", "max_completion_tokens", "echo", "blank"}
_KNOWN |= {"logprobs", "top_logprobs", *NAMES}
_KNOWN |= _OPTIONS | PASSED_OVER | NEUTRAL.keys()
# Names of the parameters for lengths.
LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "gen_length")


class Parameters:
    """The parameters of one request.

    Args:
        request: of any endpoint that decodes.
        max_tokens: what holds where the request names no length; None leaves it to the model.
        ends: token ids that end a text besides the model's.

    Attributes:
        given: names and values that are not null.
        n: completions of each prompt.
        sampling: for the engine.
    """

    def __init__(
        self,
        request: Decoding,
        llm: LLM,
        settings: Settings,
        max_tokens: int | None = None,
        ends: Sequence[int] = (),
    ):
        self.given, self.llm, self.settings = given(request), llm, settings
        self._check_model(request.model)
        self._refuse()
        self.n = request.n or 1
        options = {name: value for name, value in self.given.items() if name in _OPTIONS}
        if options.get("top_k") == -1:  # vLLM's word for all tokens
            del options["top_k"]
        self._check_sizes(options)
        lengths = {self.given[name] for name in LENGTHS if name in self.given}
        if len(lengths) > 1:
            raise ApiError(400, f"{', '.join(LENGTHS)} are one parameter: give one of them.", LENGTHS[0])
        for name in LENGTHS:
            options.pop(name, None)
        self.max_tokens = lengths.pop() if lengths else max_tokens
        if self.max_tokens is not None:
            options["max_new_tokens"] = self.max_tokens
        try:
            self.sampling = SamplingParams(
                n=self.n,
                seed=random.getrandbits(48) if request.seed is None else request.seed,
                stop=request.stop,
                stop_token_ids=[*(request.stop_token_ids or []), *([] if request.ignore_eos else ends)],
                ignore_eos=bool(request.ignore_eos),
                logprobs=self._logprobs(),
                timeout=min(request.timeout or settings.request_timeout, settings.request_timeout),
                skip_special_tokens=request.skip_special_tokens is not False,
                structured_outputs=form_of(self.given),
                options=canonical_options(options),
            )
            self.effective = llm.effective_options(self.sampling)
        except ValueError as error:
            raise self.refusal(error) from error

    def refusal(self, error: Exception, prompt: str = "prompt") -> ApiError:
        return refusal_of(error, set(self.given), prompt)

    def _logprobs(self) -> int | None:
        """How many log-probabilities of each token: chats ask by two parameters, others by a number."""
        asked, top = self.given.get("logprobs"), self.given.get("top_logprobs")
        if type(asked) is int:
            return asked
        if top and not asked:
            raise ApiError(400, f"`top_logprobs={top}` needs `logprobs: true`.", "top_logprobs")
        return (top or 0) if asked else None

    def check_choices(self, prompts: int) -> None:
        if prompts * self.n > self.settings.max_choices:
            raise ApiError(
                400,
                f"{prompts} prompts with `n={self.n}` are {prompts * self.n} completions, and one request may ask for "
                f"{self.settings.max_choices}.",
                "n" if self.n > 1 else "prompt",
            )

    def _check_model(self, model: str | None) -> None:
        if model is not None and model != self.settings.name:
            raise ApiError(
                404, f"There is no model {model!r}: this is {self.settings.name!r}.", "model", "model_not_found"
            )

    def _refuse(self) -> None:
        unknown = []
        for name, value in self.given.items():
            if name in REFUSED:
                neutral, reason = REFUSED[name]
                # 0 is False, and 1 is True, for Python alone.
                if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
                    raise ApiError(400, f"`{name}` cannot be served: {reason}.", name, "unsupported_parameter")
            elif name in _NOT_OF_A_REQUEST:
                raise ApiError(400, f"`{name}` is no parameter of a request.", name, "unsupported_parameter")
            elif name not in _KNOWN:
                unknown.append(name)
        if unknown:
            logger.warning("Unknown parameters are passed over: %s", ", ".join(map(ascii, sorted(unknown)))[:200])

    def _check_sizes(self, options: dict[str, Any]) -> None:
        """Numbers that would take memory or time before the engine could refuse them."""
        limit = self.llm.max_model_len
        for name in (*LENGTHS, "block_length", "steps", "max_steps", "denoising_steps"):
            value = self.given.get(name)
            if type(value) is int and value > limit:
                status, code = (413, "context_length_exceeded") if name in LENGTHS else (400, None)
                message = f"`{name}={value}` is more than the {limit} positions that a prompt and its completion have."
                raise ApiError(status, message, name, code)
        vocab = self.llm.model.config.vocab_size
        for name, value in options.items():
            if isinstance(value, list) and len(value) > vocab:
                raise ApiError(400, f"`{name}` lists {len(value)}, more than the vocabulary holds.", name)

    def echo(self, length: int) -> dict[str, Any]:
        """The options that take effect, for the answer. `length`: the new tokens of the first completion."""
        options = self.effective
        names = [
            "block_length",
            "steps",
            "denoising_steps",
            "top_k",
            "top_p",
            "min_p",
            "remasking_strategy",
            "alg_temp",
        ]
        names += {
            "low_confidence_dynamic": ["confidence_threshold"],
            "entropy_bounded": ["entropy_bound"],
            "factor": ["factor"],
        }.get(options.remasking_strategy, [])
        values = {name: getattr(options, name) for name in [*names, "cache_policy", "cache_dtype"]}
        values |= {"temperature": options.sampling_temperature, "seed": self.sampling.seed}
        values["max_tokens"] = length
        return {name: value for name, value in values.items() if value is not None}
