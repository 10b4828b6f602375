"""`DiffusionGenerationMixin`: `diffusion_generate` and `generate` for masked-diffusion models."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass

import torch
from transformers import Cache, GenerationMixin, LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.utils import GENERATION_CONFIG_NAME, ModelOutput, cached_file, logging

from .backend import ModelBackend
from .cache import CanvasCache, identity_of
from .canvas import Canvas
from .configuration import ALIASES, PIPELINE_DEFAULTS, DiffusionGenerationConfig, as_token_list
from .decoder import Decoder
from .evaluation_mode import evaluating
from .graphs import are_possible
from .hooks import Hooks, Session
from .inputs import (
    DEFAULT_MAX_NEW_TOKENS,
    check_batch,
    check_fits,
    check_inputs,
    count_new_tokens,
    row_lengths,
    unpack_inputs,
)
from .pool import Workspace, acquire, capacity_for, fused_of, hold, pointers_of, release, release_all
from .requests import Request, Row
from .sampling import make_processors
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
        sees_earlier_blocks: whether a block sees earlier ones alone, or a token the whole canvas.
        makes_masks: whether attention takes a made mask; else the model knows by itself what its tokens see.
        has_fixed_block_length: whether it decodes in blocks of `default_block_length` alone.
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
    sees_earlier_blocks: bool = False
    makes_masks: bool = True
    has_fixed_block_length: bool = False
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
        whole = max(width, config.block_length) if self.block_grid == "zero" else width
        each = config.num_return_sequences
        check_batch(len(input_ids) * each, whole, generator, streamer)
        input_ids = input_ids.repeat_interleave(each, dim=0)
        requests = make_requests(input_ids, attention_mask, new_tokens, config, generator)
        # Blocks of the grid at 0 are decoded whole, which may take a few positions more.
        columns = max(len(request.canvas(self.block_grid)) for request in requests)
        check_fits(self.config, columns, new_tokens, f", in whole blocks of `block_length={config.block_length}`,")
        hooks = Hooks(
            generation_tokens_hook_func,
            generation_logits_hook_func,
            LogitsProcessorList(make_processors(config) + list(logits_processor or [])),
            StoppingCriteriaList(make_criteria(config) + list(stopping_criteria or [])),
            StopStrings(tokenizer, config.stop_strings) if config.stop_strings else None,
            streamer,
            config.output_history,
        )
        with nullcontext() if past_key_values is None else used_by_one(past_key_values):
            return self._decode(requests, columns, input_ids, hooks, past_key_values)

    def _decode(
        self, requests: list[Request], columns: int, input_ids: torch.Tensor, hooks: Hooks, past: CanvasCache | None
    ) -> DiffusionGenerateOutput | torch.LongTensor:
        """Decode a batch whose arguments are right. `columns`: of the longest canvas."""
        config, device = requests[0].options, self.device
        fused, fingerprint = None, ()
        if are_possible(device) and not (config.disable_compile or config.cache_policy == "none" or hooks.sees_logits):
            fused, fingerprint = fused_of(self)
        backend = ModelBackend(self, config.cache_policy != "none", fused, config.cfg_scale, config.torch_compile)
        workspace, cache, final_lengths = self._open(backend, requests, columns, fingerprint, past)
        sessions: list[Session] = []
        decoder = Decoder(
            backend,
            workspace,
            fused is not None,
            (lambda *step: sessions[0].process(*step)) if hooks.sees_logits else None,
            lambda has_passed: sessions[0].after_step(has_passed),
            hooks.tokens is not None,
        )
        # Graphs and Triton's kernels run on the current device, whatever the tensors are on.
        with evaluating(self), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            rows = decoder.add(*requests, final_lengths=final_lengths)
            sessions.append(Session(hooks, workspace.canvas, input_ids, rows, decoder.forget))
            run(decoder, sessions[0])
        canvas, session = workspace.canvas, sessions[0]
        if bool(canvas.saw_nan):
            logger.warning_once(
                "The model gave logits that are no numbers, and what was decoded from them means nothing. In float16 this "
                "is an overflow: load the model with `dtype=torch.bfloat16` or `torch.float32`."
            )
        output = DiffusionGenerateOutput(
            session.sequences(),
            tuple(session.history) if hooks.keeps_history else None,
            decoder.num_forward_passes,
            canvas.counts[:, 1] / canvas.counts[:, 0].clamp(min=1),
        )
        returns_dict, is_reusable = config.return_dict_in_generate or config.output_history, False
        if config.cache_policy == "block" and not config.cfg_scale:
            is_reusable, cache.identity = True, identity_of(self)
            final_lengths = [row.final_length for row in rows]
            cache.remember(canvas.tokens[:, :columns].clone(), final_lengths, config.block_length)
        if fused is not None and past is not None:
            workspace.pointers = pointers_of(cache)
        elif fused is not None and is_reusable and returns_dict:
            cache = hold(self, workspace)
        elif fused is not None:
            release(self, workspace)
        output.past_key_values = cache if is_reusable else None
        return output if returns_dict else output.sequences

    def _open(
        self,
        backend: ModelBackend,
        requests: list[Request],
        columns: int,
        fingerprint: tuple,
        past: CanvasCache | None,
    ) -> tuple[Workspace, CanvasCache | None, list[int] | None]:
        """The buffers for a batch, their cache, and up to where it holds what is final, where it goes on from a turn."""
        slots, options = len(requests), requests[0].options
        has_graphs = backend.fused is not None
        capacity = capacity_for(columns, self.capacity_step) if has_graphs else columns
        key = (fingerprint, slots, capacity, backend.guidance_copies)

        def make() -> Workspace:
            canvas = Canvas(slots, capacity, self.device)
            return Workspace(canvas, backend.open(slots, capacity + 1), key)

        if past is None:
            workspace = acquire(self, key, make) if has_graphs else make()
            return workspace, workspace.state, None
        if options.cache_policy != "block":
            raise ValueError(
                f"`past_key_values` needs `cache_policy='block'`, but it is {options.cache_policy!r}: only blocks "
                "that see no later ones have keys that stay valid."
            )
        if options.cfg_scale:
            raise ValueError(
                "`cfg_scale` masks the whole prompt, the earlier turns too, so that nothing of `past_key_values` "
                "would stay valid: start without it."
            )
        past.check(self, slots, options.block_length)
        workspace = past.workspace
        fits = workspace is not None and (workspace.key[:2], workspace.pointers) == (key[:2], pointers_of(past))
        if not (has_graphs and fits and workspace.canvas.capacity >= columns):
            # Not the cache itself, which holds its workspace.
            workspace = Workspace(Canvas(slots, capacity, self.device), copy(past) if has_graphs else past, key)
            past.workspace = workspace if has_graphs else None
        texts = [request.canvas(self.block_grid) for request in requests]
        tokens = torch.tensor([text + [0] * (columns - len(text)) for text in texts]).to(self.device)
        past.reserve(slots)
        final_lengths = past.resume(tokens, options.block_length, workspace.canvas.capacity + 1)
        if has_graphs:
            backend.fused.prepare(past, slots)
        return workspace, past, final_lengths

    def diffusion_request(self, prompt: list[int], generator: torch.Generator | None = None, **options) -> Request:
        """What a [`Decoder`] decodes in one row: a prompt with the options of [`diffusion_generate`], resolved as it does."""
        config = self._prepare_diffusion_config(None, options)
        new_tokens = DEFAULT_MAX_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
        return Request(list(prompt), new_tokens, config, generator)

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
        config.block_length = config.block_length or self.default_block_length
        if self.has_fixed_block_length and config.block_length != self.default_block_length:
            raise ValueError(
                f"`block_length={config.block_length}` is not the model's `block_size={self.default_block_length}`, in "
                "which its state moves on: leave `block_length` out."
            )
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

    def release_graphs(self) -> None:
        """Give back the memory that the fast path keeps for the next calls: the caches and CUDA graphs of the last ones."""
        release_all(self)

    def step_forward(self) -> Callable | None:
        """What runs the steps on a GPU in the place of `forward`, without guidance: `(tokens, window, cache) -> (rows, kept,
        vocab)`, with the methods `covers(window)`, whether it does all that a window asks for, and `prepare(cache, slots)`,
        which allocates. It is kept for the model and must not hold it. None where the model has no such thing."""
        return None

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


def make_requests(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, new_tokens: int, config, generator
) -> list[Request]:
    """A request for each row of a batch, `num_return_sequences` for each of its mask's rows."""
    lengths = row_lengths(input_ids, None)
    if attention_mask is not None:
        lengths = row_lengths(input_ids, attention_mask).repeat_interleave(config.num_return_sequences)
    prompts = [row[len(row) - length :] for row, length in zip(input_ids.tolist(), lengths.tolist(), strict=True)]
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(prompts)
    return [Request(prompt, new_tokens, config, one) for prompt, one in zip(prompts, generators, strict=True)]


def run(decoder: Decoder, session: Session) -> None:
    """Decode every row, with the hooks of a session."""

    def decode(changed: list[Row]) -> None:
        for row in changed:
            row.begin(decoder.canvas.tokens[row.slot, : row.length].tolist())
        session.confirm()
        while decoder.busy:
            session.finish_blocks(decoder.step())

    is_hooked = session.hooks.tokens is not None
    if is_hooked:
        session.run_tokens_hook(None)
    decode(session.rows if is_hooked else [])
    if is_hooked:
        # The hook may have put masks back where no step was left for them.
        session.hooks.tokens = None
        decode([row for row in session.rows if not row.has_ended])
    session.confirm()
    session.pad_after_ends()
    if session.hooks.streamer is not None:
        session.hooks.streamer.end()


def used_by_one(cache: CanvasCache):
    if not hasattr(cache, "used_by_one"):
        raise ValueError(f"`past_key_values` is a {type(cache).__name__}: pass the one that an earlier call returned.")
    return cache.used_by_one()
