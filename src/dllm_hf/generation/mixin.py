"""`DiffusionGenerationMixin`: `diffusion_generate` and `generate` for masked-diffusion models."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace

import torch
from transformers import Cache, GenerationMixin, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file, logging

from .attention import without_flash_attention
from .cache import POLICIES, BlockCache, CachePolicy, CanvasCache, identity_of
from .canvas import Canvas, Window
from .configuration import ALIASES, PIPELINE_DEFAULTS, DiffusionGenerationConfig, as_token_list
from .denoising import Denoiser, Hooks
from .evaluation_mode import evaluating
from .graphs import (
    FastPath,
    StepGraphs,
    are_possible,
    capacity_for,
    fingerprint_of,
    lend,
    places_of,
    put_back,
    release,
    take,
)
from .inputs import check_batch, check_fits, check_inputs, count_new_tokens, row_lengths, unpack_inputs
from .sampling import guide, make_processors
from .stopping import StopStrings, make_criteria

logger = logging.get_logger(__name__)


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `diffusion_generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new tokens)`): the prompt as it was given, the new
            tokens, `pad_token_id` after the end of sequence.
        history (`tuple[torch.LongTensor]`): the sequences after each step; with `output_history=True`.
        num_forward_passes (`int`): forward passes of the call (NFE).
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`): tokens that the row received, divided by the
            forward passes that gave it any.
        past_key_values (`Cache`): the cache, where the policy keeps one that a later call can use.
    """

    sequences: torch.LongTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    past_key_values: Cache | None = None


class DiffusionGenerationMixin(GenerationMixin):
    """Decoding for masked-diffusion language models. Goes before `PreTrainedModel` in a class's bases.

    The class attributes are what the loop asks of a model; it knows nothing else of the architecture.

    Attributes:
        logits_shift: the logits of position i stand at position i - `logits_shift`.
        block_grid: `"prompt"` aligns the blocks to the prompt's end, `"zero"` to position 0.
        cache_policies: the policies that the model can decode with, the default first.
        default_block_length: positions decoded together; `None` decodes all masks as one block.
        default_remasking_strategy: used where neither call nor `generation_config.json` names one.
        confidence_source: `"raw"` reads confidence from the logits as the model gave them, `"processed"` after
            temperature, top-k and top-p.
        capacity_step: on the fast path there is room for a multiple of so many columns. A conversation that outgrows it
            has its steps captured anew.
    """

    generation_config_class = DiffusionGenerationConfig
    logits_shift: int = 0
    block_grid: str = "prompt"
    cache_policies: tuple[str, ...] = ("none",)
    default_block_length: int | None = 32
    default_remasking_strategy: str = "low_confidence_static"
    confidence_source: str = "processed"
    capacity_step: int = 256

    def generate(
        self, inputs: torch.Tensor | None = None, generation_config: DiffusionGenerationConfig | None = None, **kwargs
    ) -> DiffusionGenerateOutput | torch.LongTensor:
        """[`~DiffusionGenerationMixin.diffusion_generate`], under the name that the library's tools call."""
        return self.diffusion_generate(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer=None,
        past_key_values: CanvasCache | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_tokens_hook_func: Callable | None = None,
        generation_logits_hook_func: Callable | None = None,
        **kwargs,
    ) -> DiffusionGenerateOutput | torch.LongTensor:
        """Continue prompts, and fill the masks in them, by denoising block after block.

        Args:
            inputs or input_ids: `(batch, prompt)`, left-padded, or all that a tokenizer gives. Mask tokens in it are
                positions to fill.
            generation_config: replaces the model's own; `kwargs` replace single options of either.
            attention_mask: `(batch, prompt)`, 0 on the padding.
            logits_processor: the library's processors; each position of a block is a row to them, and they see the
                whole sequence, masks included.
            stopping_criteria: asked after each block; a row for which they hold ends there: behind its first position
                that is still open, padding follows.
            generator: for reproducible sampling, or a list with one for each row, which makes a row's draws
                independent of the rows beside it.
            streamer: `TextDiffusionStreamer`, or any other of the library's; for a batch of one.
            past_key_values: the cache that an earlier call with `cache_policy="block"` returned, for a prompt that goes
                on from there: only what is new is computed.
            tokenizer: needed for `stop_strings`.
            generation_tokens_hook_func, generation_logits_hook_func: `(step, sequences, logits)`, run at each step;
                they return the sequences, or the logits of the block, `(batch, block, vocab)`.
            kwargs: options of [`DiffusionGenerationConfig`], or the originals' names for them.

        Returns:
            `(batch, prompt + max_new_tokens)` token ids, or a [`DiffusionGenerateOutput`] with
            `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument that is wrong and what to do, before any forward pass.
        """
        input_ids, attention_mask = unpack_inputs(inputs, input_ids, attention_mask, kwargs)
        config = self._prepare_diffusion_config(generation_config, kwargs)
        if config.stop_strings and tokenizer is None:
            raise ValueError(f"`stop_strings={config.stop_strings!r}` needs the text: pass `tokenizer=` as well.")
        input_ids, attention_mask = check_inputs(input_ids, attention_mask, self.config.vocab_size)
        new_tokens = count_new_tokens(config, input_ids, attention_mask)
        width = int(row_lengths(input_ids, attention_mask).max()) + new_tokens
        check_fits(self.config, width, new_tokens)
        config.block_length = config.block_length or self.default_block_length
        whole = max(width, config.block_length) if self.block_grid == "zero" else width
        check_batch(len(input_ids) * config.num_return_sequences, whole, generator, streamer)
        if config.num_return_sequences > 1:
            input_ids = input_ids.repeat_interleave(config.num_return_sequences, dim=0)
            if attention_mask is not None:
                attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, dim=0)
        hooks = Hooks(
            generation_tokens_hook_func,
            generation_logits_hook_func,
            LogitsProcessorList(make_processors(config) + list(logits_processor or [])),
            StoppingCriteriaList(make_criteria(config) + list(stopping_criteria or [])),
            StopStrings(tokenizer, config.stop_strings) if config.stop_strings else None,
        )
        canvas = Canvas(
            input_ids.to(self.device),
            None if attention_mask is None else attention_mask.to(self.device),
            new_tokens,
            config.block_length,
            self.block_grid,
            config.mask_token_id,
        )
        # Blocks of the grid at 0 are decoded whole, which may take a few positions more.
        check_fits(self.config, canvas.width, new_tokens, f", in whole blocks of `block_length={config.block_length}`,")
        with nullcontext() if past_key_values is None else used_by_one(past_key_values):
            return self._denoise(canvas, config, hooks, generator, streamer, past_key_values)

    def _denoise(
        self, canvas: Canvas, config: DiffusionGenerationConfig, hooks: Hooks, generator, streamer, past_key_values
    ) -> DiffusionGenerateOutput | torch.LongTensor:
        fused = None
        if are_possible(canvas.tokens.device) and not (config.disable_compile or config.cache_policy == "none"):
            # What these hooks do is unknown: they run between the parts of a step, which a graph has not.
            if not (hooks.tokens or hooks.logits or hooks.processors):
                fused = self.step_forward()
        policy, cache, graphs = self._make_policy(canvas, config, past_key_values, fused is not None)
        fast = None
        if graphs is not None:
            fused.prepare(cache, graphs.rows * graphs.repeats)
            forward = self._make_fused_forward(fused, config, cache)
            compiled = torch.compile(forward, dynamic=False) if config.torch_compile else forward
            fast = FastPath(graphs, forward, compiled, canvas, config.block_length or 1, fused)
        denoiser = Denoiser(
            self._make_forward(canvas, config, cache, fast),
            canvas,
            policy,
            config,
            self.confidence_source,
            hooks,
            generator,
            streamer,
            fast,
        )
        device = canvas.tokens.device
        # Graphs and Triton's kernels run on the current device, whatever the tensors are on.
        with evaluating(self), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            denoiser.run()
        sequences = canvas.to_sequences()
        returns_dict = config.return_dict_in_generate or config.output_history
        is_reusable = config.cache_policy == "block" and not config.cfg_scale
        if is_reusable:
            cache.identity = identity_of(self)
            cache.remember(canvas.at(None).clone(), policy.written, config.block_length)
        tokens_per_forward = denoiser.row_transfers / denoiser.row_forward_passes.clamp(min=1)
        if graphs is not None and past_key_values is not None:
            graphs.places = places_of(cache)
        elif graphs is not None:
            # Other calls may have the buffers from here on, or when the caller drops the cache.
            if is_reusable and returns_dict:
                cache = lend(self, graphs)
            else:
                put_back(self, graphs)
        if not returns_dict:
            return sequences
        return DiffusionGenerateOutput(
            sequences=sequences,
            history=None if denoiser.history is None else tuple(denoiser.history),
            num_forward_passes=denoiser.num_forward_passes,
            tokens_per_forward=tokens_per_forward,
            past_key_values=cache if is_reusable else None,
        )

    def _prepare_diffusion_config(self, generation_config, kwargs) -> DiffusionGenerationConfig:
        """Merge call, given configuration and the model's, fill in the model's defaults, and check the result."""
        base = self.generation_config if generation_config is None else generation_config
        if not hasattr(base, "updated"):
            base = self.generation_config_class.from_dict(base.to_dict())
        config = base.updated(**kwargs)
        own = self.generation_config_class.from_model_config(self.config)
        for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(own, name))
        ends = as_token_list(config.eos_token_id)
        if config.mask_token_id is None:
            raise ValueError("The model's configuration has no `mask_token_id`: pass it, or set it in the config.")
        if config.mask_token_id in ends:
            raise ValueError(f"`mask_token_id={config.mask_token_id}` is also an `eos_token_id`: one of them is wrong.")
        if config.pad_token_id == config.mask_token_id:
            raise ValueError(
                f"`pad_token_id={config.pad_token_id}` is the mask: what follows the end of a sequence would be masks. "
                "Pass another `pad_token_id`."
            )
        if config.pad_token_id is None:
            config.pad_token_id = ends[0] if ends else 0
        if config.bad_words_ids:
            words = [token for word in config.bad_words_ids for token in word]
            config.suppress_tokens = [*as_token_list(config.suppress_tokens), *words]
        for name in ("mask_token_id", "pad_token_id", "eos_token_id", "suppress_tokens", "confidence_suppress_tokens"):
            for token in as_token_list(getattr(config, name)):
                if token >= self.config.vocab_size:
                    raise ValueError(
                        f"`{name}` holds {token}, but the vocabulary has {self.config.vocab_size} tokens: "
                        "check the special tokens of the model's configuration."
                    )
        turn_end = as_token_list(getattr(self.config, "eot_token_id", None))
        for switch, option, tokens in (
            ("logits_eos_inf", "suppress_tokens", ends),
            ("confidence_eos_eot_inf", "confidence_suppress_tokens", ends + turn_end),
        ):
            if getattr(config, switch):
                if not tokens:
                    raise ValueError(f"`{switch}=True` needs an `eos_token_id`, and neither call nor config has one.")
                setattr(config, option, [*as_token_list(getattr(config, option)), *tokens])
        config.remasking_strategy = config.remasking_strategy or self.default_remasking_strategy
        config.cache_policy = config.cache_policy or self.cache_policies[0]
        if config.cache_policy not in self.cache_policies:
            raise ValueError(
                f"`cache_policy={config.cache_policy!r}` is not possible with {type(self).__name__}: "
                f"choose one of {', '.join(self.cache_policies)}."
            )
        return config

    def _prepare_generation_config(self, generation_config: DiffusionGenerationConfig, **kwargs):
        """Called by the pipelines of transformers before 5.23: with a configuration of the caller's or the model's, or
        with their own defaults, which must not replace the model's."""
        if not hasattr(generation_config, "updated"):
            said = {
                name: value
                for name, value in generation_config.to_diff_dict().items()
                if name in self.generation_config_class.DEFAULTS and value != PIPELINE_DEFAULTS.get(name)
            }
            generation_config = self.generation_config.updated(**said)
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in (*generation_config.DEFAULTS, *ALIASES)}
        return generation_config.updated(**options), kwargs

    def _make_fused_forward(self, fused, config: DiffusionGenerationConfig, cache: CanvasCache):
        """The forward pass of [`FastPath`]."""
        guided = config.cfg_scale > 0

        def forward(tokens, columns, lengths, keep, given, settled):
            if guided:
                tokens = torch.cat([tokens, torch.where(given, config.mask_token_id, tokens)])
                columns, lengths, keep, settled = (x.repeat(2, 1) for x in (columns, lengths, keep, settled))
            logits = fused(tokens, columns, lengths, keep, settled, cache)
            return guide(logits, config.cfg_scale) if guided else logits

        return forward

    def _make_forward(
        self, canvas: Canvas, config: DiffusionGenerationConfig, cache: CanvasCache | None, fast: FastPath | None
    ):
        """One forward pass over a window: `Window -> (batch, block, vocab)`."""
        guided = config.cfg_scale > 0
        repeats = 2 if guided else 1
        every_column = torch.arange(canvas.width, device=canvas.tokens.device).expand(len(canvas.tokens), -1)
        decoding_kwargs = self.decoding_kwargs(config.block_length)

        def repeat(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None or repeats == 1 else tensor.repeat(repeats, 1)

        def forward(window: Window) -> torch.Tensor:
            if fast is not None and fast.covers(window):
                return fast.logits(window)
            tokens = canvas.at(window.columns)
            if guided:
                is_prompt = canvas.given[:, :-1] if window.columns is None else canvas.given.gather(1, window.columns)
                tokens = torch.cat([tokens, torch.where(is_prompt, config.mask_token_id, tokens)])
            columns = every_column if window.columns is None else window.columns
            if cache is not None:
                cache.place(replace(window, columns=repeat(window.columns), settled=repeat(window.settled)))
            # FlashAttention takes padded queries to be the last ones of their keys; a window stands anywhere.
            unfit = window.columns is not None and window.key_mask is not None
            with without_flash_attention(self.config) if unfit else nullcontext():
                logits = self(
                    input_ids=tokens,
                    attention_mask=repeat(window.key_mask),
                    position_ids=repeat(columns),
                    past_key_values=cache,
                    use_cache=cache is not None,
                    return_dict=True,
                    logits_to_keep=repeat(window.keep),
                    **decoding_kwargs,
                ).logits
            return guide(logits, config.cfg_scale) if guided else logits

        return forward

    def decoding_kwargs(self, block_length: int | None) -> dict:
        """What the model's forward pass needs to know besides the window."""
        return {}

    def release_graphs(self) -> None:
        """Give back the memory that the fast path keeps for the next calls: the caches and CUDA graphs of the last ones."""
        release(self)

    def step_forward(self) -> Callable | None:
        """What [`FastPath`] runs in the place of `forward`, without guidance: `(tokens, columns, lengths, keep, settled,
        cache) -> (batch, kept, vocab)`, with the methods `covers(window)`, whether it does all that a window asks for,
        and `prepare(cache, batch)`. None where the model has no such thing."""
        return None

    def _make_policy(
        self,
        canvas: Canvas,
        config: DiffusionGenerationConfig,
        past_key_values: CanvasCache | None,
        with_graphs: bool,
    ) -> tuple[CachePolicy, CanvasCache | None, StepGraphs | None]:
        """The policy and, where it keeps one, its cache; with its graphs if asked for."""
        rows, width = len(canvas.tokens), canvas.width + 1  # rows that wait write to the column behind
        repeats = 2 if config.cfg_scale else 1
        graphs = None
        if with_graphs and past_key_values is None:
            graphs = take(self, rows, repeats, width, self.make_cache)
        if config.cache_policy != "block":
            if past_key_values is not None:
                raise ValueError(
                    f"`past_key_values` needs `cache_policy='block'`, but it is {config.cache_policy!r}: only blocks "
                    "that see no later ones have keys that stay valid."
                )
            cache = graphs.cache if graphs else None if config.cache_policy == "none" else self.make_cache(canvas.width)
            return POLICIES[config.cache_policy](canvas, self.logits_shift), cache, graphs
        written = [0] * rows
        cache = past_key_values
        if cache is None:
            cache = graphs.cache if graphs else self.make_cache(width)
        else:
            if config.cfg_scale:
                raise ValueError(
                    "`cfg_scale` masks the whole prompt, the earlier turns too, so that nothing of `past_key_values` "
                    "would stay valid: start without it."
                )
            cache.check(self, rows, config.block_length)
            graphs = cache.graphs
            if graphs is not None:
                fits = graphs.fits(self, rows, width) and graphs.places == places_of(cache)
                if not (with_graphs and fits):
                    graphs = cache.graphs = graphs.retire()
            if with_graphs and graphs is None:
                # Not the cache itself, which holds its graphs.
                shared = copy(cache)
                capacity = capacity_for(width, self.capacity_step)
                graphs = StepGraphs(shared, rows, repeats, capacity, self.device, fingerprint_of(self))
                cache.graphs = graphs
            written = cache.resume(canvas.at(None), config.block_length, graphs.capacity if with_graphs else width)
        policy = BlockCache(canvas, self.logits_shift, cache, written, config.prefill_chunk_size, config.block_length)
        return policy, cache, graphs if with_graphs else None

    def make_cache(self, width: int) -> CanvasCache:
        """An empty cache for a canvas of `width` columns."""
        return CanvasCache(self, width)

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Called by `from_pretrained`: read `generation_config.json` into a [`DiffusionGenerationConfig`]. Without the
        file, the special tokens of the model's configuration stay as `__init__` took them over."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            kwargs.pop("trust_remote_code", None)
            try:
                self.generation_config = self.generation_config_class.from_pretrained(
                    pretrained_model_name_or_path,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                    **kwargs,
                )
            except OSError as error:
                if _is_there(pretrained_model_name_or_path, kwargs):
                    raise ValueError(
                        f"The generation_config.json of {pretrained_model_name_or_path} cannot be read, and with it its "
                        f"recommended options: mend it or remove it. {error}"
                    ) from error
                logger.info("No generation_config.json: using the special tokens of the model's configuration.")
            except ValueError as error:
                raise ValueError(f"The generation_config.json of {pretrained_model_name_or_path}: {error}") from error


def _is_there(name: str | os.PathLike, kwargs: dict) -> bool:
    """Whether a checkpoint has a `generation_config.json`, readable or not."""
    if os.path.isdir(name):
        return os.path.lexists(os.path.join(name, kwargs.get("subfolder", ""), GENERATION_CONFIG_NAME))
    where = {key: kwargs[key] for key in ("cache_dir", "revision", "subfolder") if kwargs.get(key) is not None}
    # What was fetched is in the library's cache, however broken.
    return isinstance(
        cached_file(
            name,
            GENERATION_CONFIG_NAME,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **where,
        ),
        str,
    )


def used_by_one(cache: CanvasCache):
    if not hasattr(cache, "used_by_one"):
        raise ValueError(f"`past_key_values` is a {type(cache).__name__}: pass the one that an earlier call returned.")
    return cache.used_by_one()
