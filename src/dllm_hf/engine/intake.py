"""`Intake`: what is checked of a request before it may wait, and the completions that are made of it."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..generation.configuration import DiffusionGenerationConfig, as_token_list, canonical_options
from ..generation.inputs import TooLongError
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.requests import Request
from ..generation.stopping import StopStrings
from .detokenizer import Detokenizer, spell
from .grammar import Grammar, Grammars
from .sampling_params import SamplingParams
from .sequence import Sequence

# Options that need the logits of a whole batch between forward pass and selection.
_BATCH_OPTIONS = {"cfg_scale": (None, 0), "repetition_penalty": (None, 1)}


@dataclass(frozen=True)
class Settings:
    """Parameters that were checked.

    params: a copy. options: the model's own filled in. timeout: seconds.
    """

    params: SamplingParams
    options: DiffusionGenerationConfig
    stop: StopStrings | None
    timeout: float


class Intake:
    """Checks requests. Nothing is computed for that: the model may be one without weights, on the device `meta`.

    Args:
        model: resolves options and knows the vocabulary.
        tokenizer: for texts; None where there is none.
        options: of [`DiffusionGenerationConfig`], for every request that does not say otherwise.
        limits: by the name of the option that raises it, how many columns a completion may take, the scratch column included.
        device: on which completions are decoded here; that of their generators.
    """

    def __init__(
        self,
        model: DiffusionGenerationMixin,
        tokenizer: PreTrainedTokenizerBase | None,
        options: dict,
        limits: dict[str, int],
        device: torch.device,
    ):
        self.model, self.tokenizer, self.options, self.limits, self.device = model, tokenizer, options, limits, device
        for name, limit in limits.items():
            if limit < 3:
                raise ValueError(
                    f"`{name}` has no room for a token of a prompt and a new one: raise it by {3 - limit} or more."
                )
        self._defaults = model.resolve_options(None, options)
        self._spell = lru_cache(2**16)(partial(spell, tokenizer))
        self._grammars: Grammars | None = None

    def settings(self, params: SamplingParams) -> Settings:
        """Check parameters, which many requests may share.

        Raises:
            ValueError: names the argument that is wrong and what to do.
        """
        params = replace(params)
        options = self._options_of(params)
        vocab = self.model.config.vocab_size
        if wrong := [token for token in params.stop_token_ids or () if not 0 <= token < vocab]:
            raise ValueError(f"`stop_token_ids` holds the token id {wrong[0]}, but the vocabulary has {vocab} tokens.")
        ends = as_token_list(options.get("eos_token_id", self._defaults.eos_token_id))
        options["eos_token_id"] = [*([] if params.ignore_eos else ends), *(params.stop_token_ids or ())]
        resolved = self._resolved(options)
        strings = as_token_list(resolved.stop_strings)
        if strings and self.tokenizer is None:
            raise ValueError(f"`stop={strings}` needs the text, and there is no tokenizer: use `stop_token_ids`.")
        stop = StopStrings(self.tokenizer, strings) if strings else None
        return Settings(params, resolved, stop, params.timeout or resolved.max_time or math.inf)

    def prepare(
        self, prompt: list[int], params: SamplingParams, request_id: str, settings: Settings | None = None
    ) -> list[Sequence]:
        """Check a request, and make its completions. `settings`: of `params`, if they were checked before.

        Raises:
            ValueError: names the argument that is wrong and what to do.
        """
        settings = settings or self.settings(params)
        params, strings = settings.params, as_token_list(settings.options.stop_strings)
        first = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        generators = [torch.Generator(self.device).manual_seed(first + index) for index in range(params.n)]
        request = self.model.diffusion_request(prompt, generators[0], params.logprobs, settings.options)
        columns = request.columns(self.model.block_grid)
        for name, limit in self.limits.items():
            if columns > limit:
                raise TooLongError(
                    f"A prompt of {len(prompt)} tokens and `max_tokens={request.max_new_tokens}` take {columns - 1} "
                    f"columns, but there are {limit - 1}: shorten either, or raise `{name}`."
                )
        sequences, grammar = [], self._grammar(params, request)
        for index, generator in enumerate(generators):
            own = replace(request, generator=generator, is_constrained=bool(grammar)) if index or grammar else request
            texts = Detokenizer(self.tokenizer, strings, params.skip_special_tokens)
            form = grammar.copy() if grammar else None
            of = (request_id, index, own, params, settings.timeout, settings.stop, texts, self._spell, form)
            sequences.append(Sequence(*of, columns=columns))
        return sequences

    def _options_of(self, params: SamplingParams) -> dict[str, Any]:
        """The options of a request that are not the model's own."""
        options = canonical_options({**self.options, **params.generation_options()})
        if params.structured_outputs is not None:  # as many steps as a block may have masks: one token a step
            length = options.get("block_length") or self._defaults.block_length or self.limits["max_model_len"]
            options |= {"remasking_strategy": "sequential", "denoising_steps": length, "editing_threshold": None}
            options["self_speculation"] = False
        return options

    def _grammar(self, params: SamplingParams, request: Request) -> Grammar | None:
        """What a constrained completion must be."""
        if params.structured_outputs is None:
            return None
        options = request.options
        if options.mask_token_id in request.prompt:
            raise ValueError(
                "`structured_outputs` are what follows a prompt, and this prompt holds masks: leave one out."
            )
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.model.config.vocab_size)
        left_out = [options.mask_token_id, *as_token_list(options.suppress_tokens)]
        return self._grammars.make(params.structured_outputs, as_token_list(options.eos_token_id), left_out)

    def effective_options(self, params: SamplingParams) -> DiffusionGenerationConfig:
        """The options of a request, the model's own filled in."""
        return self._resolved(self._options_of(params))

    def _resolved(self, options: dict[str, Any]) -> DiffusionGenerationConfig:
        resolved = self.model.resolve_options(None, options)
        for name, neutral in _BATCH_OPTIONS.items():
            if (value := getattr(resolved, name)) not in neutral:
                raise ValueError(
                    f"`{name}={value}` of the model's generation config needs the logits of a whole batch: use "
                    "`diffusion_generate`, or remove it from `model.generation_config`."
                )
        return resolved
