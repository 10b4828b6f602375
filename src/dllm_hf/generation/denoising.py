"""The one denoising loop: block after block, step after step, for every model and every cache policy."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.utils import logging

from .cache import CachePolicy
from .canvas import Block, Canvas, Window, still_open
from .configuration import DiffusionGenerationConfig, as_token_list
from .graphs import FastPath
from .remasking import STRATEGIES, bernoulli_plan, bernoulli_quotas, select, transfer_quotas
from .sampling import Noise, confidence, make_warpers, process, propose, read_best
from .stopping import StopStrings

logger = logging.get_logger(__name__)


@dataclass
class Hooks:
    """What the caller runs between the steps.

    tokens: `(step, sequences, logits) -> sequences`, Dream's `generation_tokens_hook_func`. Called with `None, ..., None`
        before the first step; logits are `None` as well where a step needed no forward pass.
    logits: `(step, sequences, logits) -> logits`, Dream's `generation_logits_hook_func`; logits are those of the block,
        `(batch, block, vocab)`.
    processors: see `(rows, vocab)`, a row for each position of the block.
    criteria: asked after each block; rows for which they hold end there.
    stop: looked for after each block.
    """

    tokens: Callable | None = None
    logits: Callable | None = None
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    stop: StopStrings | None = None


# Options that decide what a step transfers, besides strategy and temperature.
DECISIVE = ("mask_token_id", "top_k", "top_p", "min_p", "confidence_threshold", "entropy_bound", "factor", "alg_temp")
DECISIVE += ("cfg_scale", "suppress_tokens", "confidence_suppress_tokens", "torch_compile")


class Denoiser:
    """Fills the masks of a canvas.

    Args:
        forward: `Window -> (batch, block, vocab)`, one forward pass over a window of the canvas.
        canvas: what is decoded, in place.
        policy: what each step feeds.
        config: resolved: `mask_token_id`, `pad_token_id` and `remasking_strategy` are set.
        confidence_source: `"raw"` reads confidence from the logits before the warpers, `"processed"` after them.
        fast: runs the steps whose windows it takes.
    """

    def __init__(
        self,
        forward: Callable[[Window], torch.Tensor],
        canvas: Canvas,
        policy: CachePolicy,
        config: DiffusionGenerationConfig,
        confidence_source: str,
        hooks: Hooks,
        generator: torch.Generator | list[torch.Generator] | None = None,
        streamer: Any = None,
        fast: FastPath | None = None,
    ):
        self.forward, self.canvas, self.policy, self.config, self.hooks = forward, canvas, policy, config, hooks
        self.strategy = STRATEGIES[config.remasking_strategy]
        self.temperature = config.sampling_temperature
        self.warpers, self.filters = make_warpers(config)
        self.reads_raw_logits = confidence_source == "raw" or not (self.warpers or self.filters)
        self.generator = generator
        self.stream = Stream(streamer, canvas) if streamer is not None else None
        device, batch = canvas.tokens.device, canvas.tokens.shape[0]
        self.end_tokens = _token_tensor(config.eos_token_id, device)
        self.suppressed = _token_tensor(config.suppress_tokens, device)
        self.confidence_suppressed = _token_tensor(config.confidence_suppress_tokens, device)
        self.fast = fast
        # What `decide` and guidance depend on, besides their arguments.
        self.constants = (self.suppressed, self.confidence_suppressed)
        options = (str(getattr(config, name)) for name in DECISIVE)
        self.settings = (self.strategy, self.temperature, self.reads_raw_logits, *options)
        if fast is not None:  # where its graphs find them
            self.ended = fast.graphs.ended
            self.row_forward_passes, self.row_transfers = fast.graphs.row_forward_passes, fast.graphs.row_transfers
            self.saw_nan = fast.graphs.saw_nan
        else:
            self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
            self.row_forward_passes, self.row_transfers = torch.zeros(2, batch, dtype=torch.long, device=device)
            self.saw_nan = torch.zeros((), dtype=torch.bool, device=device)
        # The column behind a row's last token, as far as it has ended.
        self.ends_at = torch.full((batch,), canvas.width, device=device)
        self.rows_running = [True] * batch  # the host's copy of ~ended, as old as the last block
        self.step = 0
        self.num_forward_passes = 0
        self.history: list[torch.Tensor] | None = [] if config.output_history else None

    @torch.no_grad()
    def run(self) -> None:
        """Decode every block. Afterwards no mask is left among the columns that are shown."""
        if self.hooks.tokens is not None:
            self._run_tokens_hook(None, None)
        self._confirm()
        self._decode_blocks()
        if self.hooks.tokens is not None:
            # The hook may have put masks back where no step was left for them.
            self.hooks = replace(self.hooks, tokens=None)
            self._decode_blocks()
        self._confirm()
        self._pad_after_end()
        if self.stream:
            self.stream.end()
        if bool(self.saw_nan):
            logger.warning_once(
                "The model gave logits that are no numbers, and what was decoded from them means nothing. In float16 this "
                "is an overflow: load the model with `dtype=torch.bfloat16` or `torch.float32`."
            )

    def _decode_blocks(self) -> None:
        blocks = self.canvas.blocks()
        steps = self._steps_of_blocks(blocks)
        for index, block in enumerate(blocks):
            if any(self._masks(block)):
                self._decode_block(block, [row[index] for row in steps])
                self._finish_block(block)

    def _masks(self, block: Block) -> list[int]:
        """The masks that each row has to decode in a block, before it starts."""
        return [masks if running else 0 for running, masks in zip(self.rows_running, block.masks, strict=True)]

    def _steps_of_blocks(self, blocks: list[Block]) -> list[list[int | None]]:
        """The denoising steps of each row's blocks: `steps` are spread over them, the remainder on the first."""
        rows = []
        for row in range(self.canvas.tokens.shape[0]):
            count = sum(block.masks[row] > 0 for block in blocks)
            if self.config.steps is None:
                rows.append([self.config.denoising_steps] * len(blocks))
            else:
                each, rest = divmod(self.config.steps, max(count, 1))
                rows.append([max(each + (index < rest), 1) for index in range(len(blocks))])
        return rows

    def _decode_block(self, block: Block, steps: list[int | None]) -> None:
        strategy, canvas = self.strategy, self.canvas
        masks = self._masks(block)
        masked = canvas.masked(block) & ~self.ended[:, None]
        plan = None
        if strategy.selection == "bernoulli":
            # Without a number of steps: as many as there are masks, so that one token a step is expected.
            steps = [count or 1 if number is None else number for number, count in zip(steps, masks, strict=True)]
            noise = self._noise(block, masked.any(-1))
            plan = bernoulli_plan(noise.uniform(block.columns.shape), steps, self.config.eps)
            quotas = bernoulli_quotas(plan, masked)
        else:
            quotas = transfer_quotas(masks, steps, strategy, self.config.eps)
        needs_forward = quotas.any(0).tolist()
        # Where the logits or a hook decide how much is transferred, only the canvas knows what is left.
        looks_at_canvas = strategy.is_adaptive or self.hooks.tokens is not None or block.is_cut
        quotas = quotas.to(masked.device)

        for window in self.policy.prefill(block, self.rows_running):
            self.forward(window)
            self.num_forward_passes += 1
        is_first, next_window, taken = True, None, 0
        for index, wanted in enumerate(needs_forward):
            logits = None
            if wanted:
                may_be_done = looks_at_canvas and taken % self.config.steps_per_look == 0
                if may_be_done and (taken or self.hooks.tokens) and not bool(self._left(block).any()):
                    break
                taken += 1
                if is_first:
                    window = self.policy.first_window(block, self.rows_running)
                else:
                    window = next_window = next_window or self.policy.next_window(block, self.rows_running)
                is_first = False
                allowed = block.valid if plan is None else block.valid & (plan <= index)
                logits = self._denoise(block, window, allowed, quotas[:, index])
            is_first |= self._after_step(block, wanted, logits)

    def _left(self, block: Block) -> torch.Tensor:
        """`(batch, block)` bool, what is still to be decoded: of a row that has ended, or whose columns that are shown
        are final, nothing."""
        return still_open(self.canvas.masked(block) & ~self.ended[:, None], block.shown)

    def _denoise(self, block: Block, window: Window, allowed, quota) -> torch.Tensor | None:
        """One forward pass and the transfer of what it proposes.

        Args:
            allowed: `(batch, block)` bool, the positions that may receive a token if they are masks.
            quota: `(batch,)`.

        Returns:
            The logits, `(batch, block, vocab)`; None on the fast path.
        """
        canvas = self.canvas
        takes_part = None
        if isinstance(self.generator, (list, tuple)):
            takes_part = (self._left(block) & allowed).any(-1) & (quota > 0)
        noise = self._noise(block, takes_part)
        self.num_forward_passes += 1
        if self.fast is not None and self.fast.takes(window):
            self.fast.denoise(self, block, window, allowed, quota, noise)
            return None
        logits = self.forward(window)
        if self.hooks.logits is not None:
            logits = self.hooks.logits(self.step, canvas.to_sequences(), logits)
        if self.hooks.processors:
            logits = self._process(logits)
        proposals, transfer = self.decide(logits, self._left(block) & allowed, quota, noise)
        canvas.write(block, torch.where(transfer, proposals, canvas.at(block.columns)))
        transferred = transfer.sum(-1)
        self.row_forward_passes += transferred > 0
        self.row_transfers += transferred
        return logits

    def decide(self, logits: torch.Tensor, transferable: torch.Tensor, quota: torch.Tensor, noise):
        """What a step proposes, `(batch, block)` tokens, and which of it is transferred, `(batch, block)` bool.

        Nothing in it looks at the device, and all shapes are fixed, so that it can be captured in a graph.

        Args:
            logits: `(batch, block, vocab)`; those of suppressed tokens are changed.
            transferable: `(batch, block)` bool, the masks that may receive a token.
            quota: `(batch,)`.
        """
        config = self.config
        if self.suppressed is not None:
            logits.index_fill_(-1, self.suppressed, -torch.inf)
        if (
            self.fast is not None
            and not self.filters
            and self.temperature == 0
            and self.strategy.confidence != "random"
        ):
            proposals, scores = read_best(self.strategy.confidence, logits, config.mask_token_id)
        else:
            processed = process(self.warpers, None, logits) if self.warpers else logits
            if self.filters:
                # They count and rank tokens: the mask must not be among them.
                processed = processed.clone()
                processed[..., config.mask_token_id] = -torch.inf
                processed = process(self.filters, None, processed)
            proposals = propose(processed, config.mask_token_id, self.temperature, noise)
            scores = confidence(
                self.strategy.confidence,
                logits if self.reads_raw_logits else processed,
                proposals,
                config.mask_token_id,
                noise,
            )
        lowest = torch.finfo(torch.float32).min
        if self.confidence_suppressed is not None:
            # `torch.isin` looks at the device where the list is long.
            is_suppressed = (proposals[..., None] == self.confidence_suppressed).any(-1)
            scores = scores.masked_fill(is_suppressed, lowest)
        # Logits that overflowed give no number, and nothing to prefer: such positions go last, but they go.
        is_nan = scores.isnan() | logits.gather(-1, proposals[..., None]).squeeze(-1).isnan()
        self.saw_nan |= (is_nan & transferable).any()
        scores = scores.nan_to_num(nan=lowest)
        if self.strategy.selection == "bernoulli":
            return proposals, transferable
        transfer = select(
            self.strategy,
            scores,
            transferable,
            quota,
            threshold=config.confidence_threshold,
            entropy_bound=config.entropy_bound,
            factor=config.factor,
            gumbel=noise.gumbel(scores.shape).float() if config.alg_temp else None,
            alg_temp=config.alg_temp or 0.0,
        )
        return proposals, transfer

    def _after_step(self, block: Block, was_forward: bool, logits: torch.Tensor | None) -> bool:
        """Whether a hook changed what the policy's cache holds."""
        is_stale = self.hooks.tokens is not None and self._run_tokens_hook(self.step, logits)
        if self.history is not None:
            self.history.append(self.canvas.to_sequences())
        if self.stream and was_forward:
            self.stream.draft(block)
        self.step += 1
        return is_stale

    def _run_tokens_hook(self, step: int | None, logits: torch.Tensor | None) -> bool:
        before = self.canvas.at(None).clone()
        self.canvas.from_sequences(self.hooks.tokens(step, self.canvas.to_sequences(), logits))
        unchanged = (self.canvas.at(None) == before).long().cumprod(-1).sum(-1)
        return self.policy.rewind(unchanged.tolist())

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Run the processors. Rows of different lengths go one by one, without padding: a row's tokens must not depend on
        what its neighbours made necessary."""
        canvas, processors = self.canvas, self.hooks.processors
        if len(set(canvas.row_lengths)) == 1:
            return process(processors, canvas.to_sequences(), logits)
        rows = [canvas.tokens[row : row + 1, :length] for row, length in enumerate(canvas.row_lengths)]
        each = [process(processors, row, of_row[None]) for row, of_row in zip(rows, logits, strict=True)]
        return torch.cat(each)

    def _finish_block(self, block: Block) -> None:
        """End the rows whose block holds an end-of-sequence token or a stop string after the prompt, or that a criterion
        ends."""
        canvas, hooks = self.canvas, self.hooks
        if self.end_tokens is not None:
            is_end = self._is_end(canvas.at(block.columns), block.columns) & block.valid
            self.ended |= is_end.any(-1)
        if hooks.criteria or hooks.stop:
            # Row by row and without padding: a row is asked about what it would be asked about alone.
            for row, masks in enumerate(self._masks(block)):
                if masks:
                    self._ask(row, new_tokens=block.columns.shape[1])
        if self.end_tokens is not None or hooks.criteria or hooks.stop:
            self.rows_running = (~self.ended).tolist()
        self._confirm()

    def _ask(self, row: int, new_tokens: int) -> None:
        """Ask criteria and stop strings about a row, up to its first position that is still open."""
        canvas, hooks = self.canvas, self.hooks
        sequence = canvas.tokens[row, : canvas.row_lengths[row]]
        final = sequence[(sequence == self.config.mask_token_id).cumsum(0) == 0]
        end = hooks.stop.find(final.tolist(), int(canvas.prompt_lengths[row])) if hooks.stop else None
        if end is None and hooks.criteria and hooks.criteria(final[None], None, new_token_length=new_tokens)[0]:
            end = len(final)
        if end is not None:
            self.ended[row], self.ends_at[row] = True, end

    def _is_end(self, tokens: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return torch.isin(tokens, self.end_tokens) & (columns >= self.canvas.prompt_lengths[:, None])

    def _ends(self) -> torch.Tensor:
        """`(batch,)`, the column behind the last token of each row: the first end of sequence after its prompt, or, of a
        row that has ended, the token before the first position that is still open."""
        tokens = self.canvas.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        first = lambda here: torch.where(here, columns, tokens.shape[1]).amin(-1)
        is_open = (tokens == self.config.mask_token_id) & self.ended[:, None]
        ends = torch.minimum(self.ends_at, first(is_open))
        return ends if self.end_tokens is None else torch.minimum(ends, first(self._is_end(tokens, columns)) + 1)

    def _confirm(self) -> None:
        if self.stream:
            self.stream.confirm(int(self._ends()[0]))

    def _pad_after_end(self) -> None:
        """Replace what stands behind the end of each row."""
        canvas, tokens = self.canvas, self.canvas.tokens
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        canvas.tokens = tokens.masked_fill(columns >= self._ends()[:, None], self.config.pad_token_id)
        # A cache must not be taken to hold what has only now been put there.
        self.policy.rewind((canvas.tokens == tokens).long().cumprod(-1).sum(-1).tolist())

    def _noise(self, block: Block, takes_part: torch.Tensor | None) -> Noise:
        """The random numbers of a step. `takes_part`: `(batch,)` bool, the rows that may receive tokens, read where there
        is a generator for each row."""
        widths = None
        if isinstance(self.generator, (list, tuple)):
            spans = zip(block.spans, takes_part.tolist(), strict=True)
            widths = [end - start if busy else 0 for (start, end), busy in spans]
        return Noise(self.canvas.tokens.device, self.generator, widths)


class Stream:
    """Feeds a streamer: drafts of a block while it settles (where the streamer takes drafts), then the tokens that are
    final, from left to right, as far as no mask stands before them."""

    def __init__(self, streamer: Any, canvas: Canvas):
        self.streamer, self.canvas = streamer, canvas
        self.column, self.has_begun = 0, False

    def draft(self, block: Block) -> None:
        """Show the tokens from the last final one up to the block's end."""
        if hasattr(self.streamer, "put_draft"):
            end = min(block.spans[0][1], self.canvas.row_lengths[0])
            self.streamer.put_draft(self.canvas.tokens[0, self.column : end].cpu())

    def confirm(self, end: int) -> None:
        """Pass on what has become final. `end`: the column behind the row's last token, as far as it is known."""
        row = self.canvas.tokens[0, : self.canvas.row_lengths[0]].tolist()
        limit = row.index(self.canvas.mask_token_id) if self.canvas.mask_token_id in row else len(row)
        limit = max(min(limit, end), self.column)
        if limit > self.column or not self.has_begun:  # streamers take the first that they get for the prompt
            self.streamer.put(torch.tensor(row[self.column : limit]))
        self.column, self.has_begun = limit, True

    def end(self) -> None:
        self.streamer.end()


def _token_tensor(tokens, device) -> torch.Tensor | None:
    tokens = as_token_list(tokens)
    return torch.tensor(tokens, device=device) if tokens else None
