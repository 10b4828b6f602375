"""`DiffusionGenerationMixin`: `diffusion_generate` and `generate` for masked-diffusion models."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, logging

from .backend import ModelBackend
from .cache import CanvasCache, identity_of
from .cache_layers import CACHE_LAYERS
from .canvas import Canvas, warn_of_nan
from .configuration import ALIASES, PIPELINE_DEFAULTS, DiffusionGenerationConfig, as_token_list
from .contract import DenoisingModel, models_with
from .decoder import Decoder
from .draft_costs import room_for_drafts
from .drafts import check_drafts
from .editing import check_editing
from .evaluation_mode import evaluating
from .graphs import are_possible
from .hooks import Hooks, Session
from .inputs import check_batch, check_block, check_fits, check_inputs, check_tokens, count_new_tokens, unpack_inputs
from .pool import Workspace, acquire, capacity_for, fused_of, hold, pointers_of, release, release_all
from .ranks import Ranks, SharedCriterion, ranks_of
from .requests import Request
from .sampling import make_processors
from .self_speculation import check_self_speculation
from .stopping import StopStrings

logger = logging.get_logger(__name__)


@dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `diffusion_generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences (`torch.LongTensor` of shape `(batch, prompt + new tokens)`): the prompt as it was given, the new
            tokens, `pad_token_id` after the end of sequence.
        history (`tuple[torch.LongTensor]`): the sequences after each step; with `output_history=True`.
        num_forward_passes (`int`): forward passes of the call (NFE).
        tokens_per_forward (`torch.FloatTensor` of shape `(batch,)`): the row's new tokens per forward pass, counting the
            passes in which the row received any.
        past_key_values (`Cache`): the cache, where the policy keeps one that a later call can use.
        logprobs (`torch.FloatTensor` of shape `(batch, prompt + new tokens)`): with `logprobs`, the log-probability of each
            token at the step that transferred it, NaN for tokens that no step transferred. See `diffusion_generate`.
        top_logprobs (`torch.FloatTensor` of shape `(batch, prompt + new tokens, k)`): those of the `k` most probable tokens
            at that step, falling, with `logprobs=k` above 0.
        top_token_ids (`torch.LongTensor` of that shape): these tokens.
    """

    sequences: torch.Tensor | None = None
    history: tuple[torch.Tensor, ...] | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: torch.Tensor | None = None
    past_key_values: Cache | None = None
    logprobs: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None
    top_token_ids: torch.Tensor | None = None


class DiffusionGenerationMixin(GenerationMixin, DenoisingModel):
    """Decoding for masked-diffusion language models. Goes before `PreTrainedModel` in a class's bases. The class attributes
    that describe a model are those of [`contract.DenoisingModel`]."""

    generation_config_class: type[GenerationConfig] = DiffusionGenerationConfig
    generation_config: Any  # `PreTrainedModel` takes it for a `GenerationConfig`

    def generate(  # type: ignore[override]  # the library's other positional arguments do not apply
        self, inputs: torch.Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs
    ) -> DiffusionGenerateOutput | torch.Tensor:
        """[`~DiffusionGenerationMixin.diffusion_generate`], under the name that the library's tools call."""
        return self.diffusion_generate(inputs, generation_config, **kwargs)

    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        stopping_criteria: list[StoppingCriteria] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer=None,
        past_key_values: CanvasCache | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        logprobs: int | None = None,
        generation_tokens_hook_func: Callable | None = None,
        generation_logits_hook_func: Callable | None = None,
        **kwargs,
    ) -> DiffusionGenerateOutput | torch.Tensor:
        """Continue prompts, and fill the masks in them, by denoising block after block.

        Args:
            inputs or input_ids: `(batch, prompt)`, left-padded, or all that a tokenizer gives. Mask tokens in it are
                positions to fill.
            generation_config: replaces the model's own; `kwargs` replace single options of either.
            attention_mask: `(batch, prompt)`, 0 on the padding.
            logits_processor: the library's processors. Each position of a block is a row to them, and they get the whole
                sequence, masks included.
            stopping_criteria: asked after each block. A row for which one holds ends before its first open position;
                padding follows.
            generator: for reproducible sampling, or a list with one for each row, which makes a row's draws
                independent of the rows beside it.
            streamer: `TextDiffusionStreamer`, or any other of the library's; for a batch of one.
            past_key_values: the cache that an earlier call with `cache_policy="block"` returned, for a prompt that goes
                on from there: only what is new is computed.
            tokenizer: needed for `stop_strings`.
            logprobs: return log-probabilities as well, and a [`DiffusionGenerateOutput`]: 0 gives that of each transferred
                token, a number up to 20 those of as many most probable tokens besides. They are of the distribution at the
                step at which the token was transferred, as the model gave it (vLLM's `raw_logprobs`): after guidance, hooks
                and processors, before suppressed tokens, temperature and filters; the mask counts in it. In float32. They do
                not add up to the likelihood of the text, since each was read beside other masks.
            generation_tokens_hook_func, generation_logits_hook_func: `(step, sequences, logits)`, run at each step;
                they return the sequences, or the logits of the block, `(batch, block, vocab)`.
            kwargs: options of [`DiffusionGenerationConfig`], or the originals' names for them.

        Returns:
            `(batch, prompt + max_new_tokens)` token ids; a [`DiffusionGenerateOutput`] if `return_dict_in_generate=True`.

        Raises:
            ValueError: names the argument that is wrong and what to do, before any forward pass.
        """
        input_ids, attention_mask = unpack_inputs(inputs, input_ids, attention_mask, kwargs)
        check_drafts(config := self.resolve_options(generation_config, kwargs))
        input_ids, lengths = check_inputs(input_ids, attention_mask, self.config.vocab_size)
        new_tokens = count_new_tokens(config, input_ids.shape[1], max(lengths))
        check_fits(self.config, width := max(lengths) + new_tokens, new_tokens)
        whole_block = config.block_length or 0 if self.block_grid == "zero" else 0
        check_batch(len(lengths) * config.num_return_sequences, max(width, whole_block), generator, streamer)
        of_caller = (generation_tokens_hook_func, generation_logits_hook_func, logits_processor)
        hooks = _hooks(config, *of_caller, _criteria(config, stopping_criteria, ranks_of(self)), tokenizer, streamer)
        rows = zip(input_ids.tolist(), lengths, strict=True)
        prompts = [row[len(row) - length :] for row, length in rows for _ in range(config.num_return_sequences)]
        input_ids = input_ids.repeat_interleave(config.num_return_sequences, dim=0)
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(prompts)
        if ranks := ranks_of(self):
            ranks.agree(self, prompts, config.to_dict(), generators)
        asked = zip(prompts, generators, strict=True)
        requests = [Request(prompt, new_tokens, config, one, self.quota_source, logprobs) for prompt, one in asked]
        texts = [request.canvas(self.block_grid) for request in requests]
        # A grid at 0 decodes whole blocks, which may take a few positions more.
        check_fits(
            self.config, max(map(len, texts)), new_tokens, f", in whole blocks of `block_length={config.block_length}`,"
        )
        if past_key_values is None:
            return self._decode(requests, texts, input_ids, hooks)
        if not hasattr(past_key_values, "used_by_one"):
            name = type(past_key_values).__name__
            raise ValueError(f"`past_key_values` is a {name}: pass the one that an earlier call returned.")
        with past_key_values.used_by_one():
            return self._decode(requests, texts, input_ids, hooks, past_key_values)

    def _decode(
        self,
        requests: list[Request],
        texts: list[list[int]],
        input_ids: torch.Tensor,
        hooks: Hooks,
        past: CanvasCache | None = None,
    ) -> DiffusionGenerateOutput | torch.Tensor:
        """Decode a batch whose arguments are right. `texts`: the canvas of each row."""
        config, device, columns = requests[0].options, self.device, max(map(len, texts))
        fused, fingerprint = None, ()
        is_plain = config.disable_compile or config.cache_policy == "none" or hooks.sees_logits
        if not is_plain and are_possible(device) and CACHE_LAYERS[config.cache_dtype].has_kernels(device):
            fused, fingerprint = fused_of(self)
        drafts, draft_tokens = room_for_drafts(config.draft_steps, self, fused, config, (len(texts), columns))
        capacity = columns if fused is None else capacity_for(self, len(texts), columns, config.cache_dtype)
        # A pass feeds a block and the column before it, or all from there on.
        widest = capacity if config.cache_policy == "prefix" else min(config.block_length or capacity, capacity) + 1
        backend = self.make_backend(
            config.cache_policy != "none",
            fused=fused,
            cfg_scale=config.cfg_scale,
            compiles=config.torch_compile,
            cache_dtype=config.cache_dtype,
            draft_columns=drafts and (draft_tokens or len(texts) * drafts * widest),
        )
        workspace, final_lengths = self._open(backend, config, texts, (capacity, drafts), fingerprint, past)
        decoder = Decoder(
            backend,
            workspace,
            fused is not None,
            is_hooked=hooks.tokens is not None,
            watches_steps=hooks.sees_steps,
            draft_tokens=draft_tokens,
        )
        # Graphs and Triton's kernels run on the current device, whatever device the tensors are on.
        with evaluating(self.modules()), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            rows = decoder.add(*requests, final_lengths=final_lengths)
            session = Session(hooks, workspace.canvas, input_ids, rows, decoder.seats)
            decoder.process = session.process if hooks.sees_logits else None
            decoder.after_step = session.after_step
            session.run(decoder)
        canvas = workspace.canvas
        if bool(canvas.saw_nan):
            warn_of_nan()
        sequences, logprobs = session.sequences(), session.logprobs()
        returns_dict = config.return_dict_in_generate or config.output_history or bool(logprobs)
        cache = workspace.state if past is None else past
        if not isinstance(cache, CanvasCache) or config.cache_policy != "block" or config.cfg_scale:
            cache = None  # of no use to a later call
        else:
            cache.identity = identity_of(self)
            final_lengths = [row.final_length for row in rows]
            cache.remember(canvas.tokens[: len(rows), :columns].clone(), final_lengths, config.block_length)
        if fused is not None and past is not None:
            workspace.pointers = pointers_of(past)
        elif fused is not None and cache is not None and returns_dict:
            cache = hold(self, workspace)
        elif fused is not None:
            release(self, workspace)
        if not returns_dict:
            return sequences
        return DiffusionGenerateOutput(
            sequences,
            tuple(session.history) if hooks.keeps_history else None,
            decoder.num_forward_passes,
            canvas.counts[:, 1] / canvas.counts[:, 0].clamp(min=1),
            cache,
            **logprobs,
        )

    def _open(
        self,
        backend: ModelBackend,
        options: DiffusionGenerationConfig,
        texts: list[list[int]],
        room: tuple[int, int],
        fingerprint: tuple,
        past: CanvasCache | None,
    ) -> tuple[Workspace, list[int] | None]:
        """The buffers for a batch, and for the next turn of a conversation the column up to which each row is final. `room`:
        the columns of a canvas, and its drafts."""
        slots, columns, (capacity, drafts) = len(texts), max(map(len, texts)), room
        has_graphs, copies = backend.fused is not None, (backend.guidance_copies, drafts, backend.draft_columns)
        key = (fingerprint, slots, capacity, copies, options.cache_dtype)

        def make() -> Workspace:
            # + 1: the scratch column.
            return Workspace(Canvas(slots, capacity, self.device, drafts), backend.open(slots, capacity + 1), key)

        if past is None:
            return acquire(self, key, make) if has_graphs else make(), None
        past.check(self, slots, options)
        workspace = past.workspace
        same = lambda key, pointers: (*key[:2], *key[3:], pointers)  # all but the capacity
        fits = workspace is not None and same(workspace.key, workspace.pointers) == same(key, pointers_of(past))
        if not (has_graphs and fits and workspace.canvas.capacity >= columns):
            # A shallow copy: cache -> workspace -> cache would be a reference cycle.
            workspace = Workspace(Canvas(slots, capacity, self.device, drafts), copy(past) if has_graphs else past, key)
            past.workspace = workspace if has_graphs else None
        tokens = torch.tensor([text + [0] * (columns - len(text)) for text in texts]).to(self.device)
        past.reserve(slots)
        final_lengths = past.resume(tokens, options.block_length, workspace.canvas.capacity + 1)
        backend.make_room(past)
        if backend.fused is not None:
            backend.fused.prepare(past, slots)
        return workspace, final_lengths

    def diffusion_request(self, prompt: list[int], generator=None, logprobs=None, config=None, **options) -> Request:
        """What a [`Decoder`] decodes in one row: a prompt, and options resolved as [`diffusion_generate`] resolves them, or
        those of another request, `config`."""
        config = self.resolve_options(None, options) if config is None else config
        new_tokens = count_new_tokens(config, len(prompt), len(prompt))
        request = Request(list(prompt), new_tokens, config, generator, self.quota_source, logprobs)
        check_tokens(request.ids, self.config.vocab_size)
        check_fits(self.config, len(prompt) + new_tokens, new_tokens)
        check_fits(self.config, request.length(self.block_grid), new_tokens)
        return request

    def resolve_options(
        self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
    ) -> DiffusionGenerationConfig:
        """A new configuration: that of the call, of the given one and the model's, with the model's defaults; checked."""
        base = self.generation_config if generation_config is None else generation_config
        if not hasattr(base, "updated"):
            base = DiffusionGenerationConfig.from_dict(base.to_dict())
        config = base.updated(**kwargs)
        for name in ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(config, name) is None:
                setattr(config, name, getattr(self.config, name, None))
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
        if len({config.mask_token_id, *as_token_list(config.suppress_tokens)}) >= self.config.vocab_size:
            raise ValueError(
                "`suppress_tokens` (with `bad_words_ids` and `logits_eos_inf`) holds every token but the mask, so that none "
                "is left to propose: list fewer."
            )
        config.remasking_strategy = config.remasking_strategy or self.default_remasking_strategy
        check_editing(self, config)
        check_self_speculation(self, config)
        config.block_length = config.block_length or self.default_block_length
        if self.has_fixed_block_length and config.block_length != self.default_block_length:
            raise ValueError(
                f"`block_length={config.block_length}` is not the model's `block_size={self.default_block_length}`, in "
                "which its state moves on: leave `block_length` out."
            )
        self._prepare_sub_blocks(config)
        if self.block_grid == "zero":
            check_block(self.config, config)
        config.cache_policy = config.cache_policy or self.cache_policies[0]
        if config.cache_policy not in self.cache_policies:
            raise ValueError(
                f"`cache_policy={config.cache_policy!r}` is not possible with {type(self).__name__}: "
                f"choose one of {', '.join(self.cache_policies)}."
            )
        if config.cache_dtype not in (None, *self.cache_dtypes):
            raise ValueError(
                f"`cache_dtype={config.cache_dtype!r}` is not possible with {type(self).__name__}, whose cache does not hold "
                "keys and values as tensors of PyTorch: leave it out."
            )
        if config.cache_dtype and config.cache_policy == "none":
            needs = f"`cache_dtype={config.cache_dtype!r}` needs a cache"
            raise ValueError(f"{needs}: choose another `cache_policy` than 'none'.")
        if config.use_block_cache and config.cache_policy != "block":
            raise ValueError("`use_block_cache=True` needs the keys of the block: choose `cache_policy='block'`.")
        return config

    def _prepare_sub_blocks(self, config: DiffusionGenerationConfig) -> None:
        """Fill in the model's `small_block_size`, and check what is given."""
        size, default, length = config.small_block_size, self.default_small_block_size, config.block_length
        if default is None:
            if size is not None or config.use_block_cache:
                name = "use_block_cache" if size is None else "small_block_size"
                raise ValueError(
                    f"`{name}={getattr(config, name)}` is for models that decode a block in sub-blocks "
                    f"({models_with('default_small_block_size')}), and {type(self).__name__} has none: leave it out."
                )
        elif size is None:
            config.small_block_size = length if length % default else default
        elif length % size:
            raise ValueError(
                f"`small_block_size={size}` does not divide `block_length={length}`: choose one that does, or leave it out."
            )

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[DiffusionGenerationConfig, dict[str, Any]]:
        """Called by the pipelines of transformers before 5.23: with a configuration of the caller's or the model's, or
        with the pipeline's own defaults, which must not replace the model's."""
        defaults, config = DiffusionGenerationConfig.DEFAULTS, self.generation_config
        if generation_config is not None and hasattr(generation_config, "updated"):
            config = generation_config
        elif generation_config is not None:
            given = generation_config.to_diff_dict().items()
            config = config.updated(**{k: v for k, v in given if k in defaults and v != PIPELINE_DEFAULTS.get(k)})
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in (*defaults, *ALIASES)}
        return config.updated(**options), kwargs

    def release_graphs(self) -> None:
        """Give back the memory that the fast path keeps for the next calls: the caches and CUDA graphs of the last ones. Of a
        model that is divided between processes, before the process group is destroyed: NCCL waits for such graphs."""
        release_all(self)

    def make_backend(self, has_cache: bool, **options: Any) -> ModelBackend:
        """What gives the logits. The arguments are those of [`ModelBackend`]."""
        return ModelBackend(self, has_cache, **options)

    def make_cache(self, width: int) -> CanvasCache:
        return CanvasCache(self, width)

    def adjust_generation_fn(
        self, generation_config, from_auto_class, from_pipeline, pretrained_model_name_or_path, *args, **kwargs
    ):
        """Called by `from_pretrained`: read `generation_config.json` into a [`DiffusionGenerationConfig`]. Without the
        file, the special tokens of the model's configuration stay as `__init__` took them over."""
        if generation_config is not None:
            self.generation_config = DiffusionGenerationConfig.from_dict(generation_config.to_dict())
        elif pretrained_model_name_or_path is not None:
            name = pretrained_model_name_or_path
            kwargs.pop("trust_remote_code", None)
            try:
                self.generation_config = DiffusionGenerationConfig.from_pretrained(
                    name, _from_auto=from_auto_class, _from_pipeline=from_pipeline, **kwargs
                )
            except OSError as error:
                # A local file that cannot be opened is there all the same.
                is_there = os.path.lexists(os.path.join(name, kwargs.get("subfolder", ""), GENERATION_CONFIG_NAME))
                if is_there or isinstance(error.__context__, (json.JSONDecodeError, UnicodeDecodeError)):
                    raise ValueError(
                        f"The generation_config.json of {name} cannot be read, and with it its recommended options: "
                        f"mend it or remove it. {error}"
                    ) from error
                logger.info("No generation_config.json: using the special tokens of the model's configuration.")
            except (ValueError, TypeError) as error:  # TypeError: of a file without an object, in older transformers
                raise ValueError(f"The generation_config.json of {name}: {error}") from error


def _hooks(config: DiffusionGenerationConfig, tokens, logits, processors, criteria, tokenizer, streamer) -> Hooks:
    """What a call of `diffusion_generate` watches or changes."""
    every = LogitsProcessorList([*make_processors(config), *(processors or [])])
    strings = StopStrings(tokenizer, config.stop_strings) if config.stop_strings else None
    return Hooks(tokens, logits, every, criteria, strings, streamer, config.output_history).checked(config)


def _criteria(config: DiffusionGenerationConfig, given: Any, ranks: Ranks | None) -> StoppingCriteriaList:
    """Those of a call; of a model that several processes have parts of, the first process' answers count."""
    criteria = [*([] if config.max_time is None else [MaxTimeCriteria(config.max_time)]), *(given or [])]
    return StoppingCriteriaList(criteria if ranks is None else [SharedCriterion(each, ranks) for each in criteria])
