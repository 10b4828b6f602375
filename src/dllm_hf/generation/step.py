"""The denoising step: it reads the canvas and writes it. Operations on tensors alone, so that a graph can capture it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .canvas import LISTS, NUMBERS, Canvas, list_of
from .divided_head import VocabularyPart
from .drafts import confirmed
from .editing import edit, editing_numbers
from .remasking import RULES, SCORES, select
from .requests import MAX_LOGPROBS, Row
from .sampling import Noise, distribution, filtered, propose
from .sampling import score as score_of
from .self_speculation import verify
from .window import DRAFT, Window

# What a step needs for which a process must have the logits of all tokens: filters rank them.
WHOLE_ROWS = {"filters", "logprobs", "constraint"}


@dataclass(frozen=True)
class Features:
    """What any row of a step asks for. With the shapes, all that the step's code depends on.

    scores, rules: see [`remasking`].
    needs: `"samples"` for a temperature, `"filters"` for top-k, top-p or min-p, `"draws"` for an `alg_temp`, `"edits"` for an
        `editing_threshold`, `"speculates"` for drafts that a pass verifies, `"logprobs"` for log-probabilities of transferred
        tokens, `"top_logprobs"` for those of the most probable ones as well, `"constraint"` for tokens that the caller allows.
    widths: of the lists of `LISTS`; 0 where no row has one.
    mask_token_id: the mask of every row.
    """

    scores: frozenset[str | None]
    rules: frozenset[str]
    needs: frozenset[str]
    widths: tuple[int, ...]
    mask_token_id: int

    @classmethod
    def of(cls, row: Row) -> "Features":
        options, strategy = row.request.options, row.strategy
        needs = {
            "samples": options.sampling_temperature > 0,
            "filters": options.top_k or (options.top_p or 1) < 1 or options.min_p,
            "draws": options.alg_temp,
            "logprobs": row.request.logprobs is not None,
            "top_logprobs": row.request.logprobs,
            "constraint": row.request.is_constrained,
            "edits": row.edits,
            "speculates": row.speculates,
        }
        return cls(
            frozenset([strategy.confidence]),
            frozenset([strategy.selection]),
            frozenset(name for name, is_asked in needs.items() if is_asked),
            tuple(padded_width(len(list_of(row, name))) for name in LISTS),
            row.mask,
        )

    @classmethod
    def union(cls, every: Iterable["Features"]) -> "Features":
        """The features of a step over several rows."""
        every = list({id(each): each for each in every}.values())  # those of many rows are one object
        if len(every) == 1:
            return every[0]
        return cls(
            frozenset().union(*(each.scores for each in every)),
            frozenset().union(*(each.rules for each in every)),
            frozenset().union(*(each.needs for each in every)),
            tuple(map(max, zip(*(each.widths for each in every)))),
            every[0].mask_token_id,
        )


def padded_width(number: int) -> int:
    """A power of two, so that lists of about the same length share graphs; 0 for none."""
    return 1 << (number - 1).bit_length() if number else 0


def draw(
    features: Features, rows: list[Row], shape: tuple[int, int, int], device: torch.device
) -> dict[str, torch.Tensor]:
    """The random numbers of a step, by their use. `shape`: of the logits, `(rows, block, vocab)`."""

    def noise(needs: Callable[[Row], bool]) -> Noise:
        widths = [row.span[1] - row.span[0] if needs(row) else 0 for row in rows]
        return Noise(device, [row.request.generator for row in rows], widths)

    drawn = {}
    if "samples" in features.needs:
        drawn["tokens"] = noise(lambda row: row.request.options.sampling_temperature > 0).gumbel(shape)
    if "random" in features.scores:
        drawn["scores"] = noise(lambda row: row.strategy.confidence == "random").uniform(shape[:2])
    if "draws" in features.needs:
        drawn["positions"] = noise(lambda row: bool(row.request.options.alg_temp)).gumbel(shape[:2]).float()
    return drawn


def denoise(
    canvas: Canvas,
    window: Window,
    forward: Callable[[torch.Tensor, Window], torch.Tensor],
    noise: dict[str, torch.Tensor],
    features: Features,
    reads_raw_logits: bool,
    part: VocabularyPart | None = None,
) -> None:
    """One step: a forward pass, what it proposes, and the transfer of some of it. With drafts in the window, as many steps as
    they turn out to have been right for.

    Args:
        forward: `(tokens, window) -> (rows, block, vocab)`, logits, which may be written to; `tokens` has the shape of
            `window.columns`.
        noise: as [`draw`] returns it.
        reads_raw_logits: whether scores are read before temperature and filters.
        part: where each process has a part of the logits.
    """
    texts, lines = window.owners, window.slots
    if window.draft_columns:
        texts, lines = window.texts, lines + window.draft * canvas.slots
    logits = forward(canvas.tokens[texts, window.columns], window)
    if not window.block.shape[1]:
        return
    now = canvas.tokens[lines[:, None], window.block]
    inside = window.block < canvas.capacity
    is_mask, shown, edits = (now == features.mask_token_id) & inside, window.shown, "edits" in features.needs
    if edits:
        # What stands behind the cut may change a token before it that is edited.
        shown = (shown | (editing_numbers(canvas, window)[0] < 1)) & inside
    level, held = levels(canvas, window) if canvas.drafts else (None, None)
    quota, masked = upcoming(canvas, window, level, is_mask, shown, features)
    if part is not None and features.needs & WHOLE_ROWS:
        logits, part = part.gather(logits), None
    most = min(MAX_LOGPROBS, logits.shape[-1]) if "top_logprobs" in features.needs else 0
    # Before `decide` changes the logits of tokens that it may not propose.
    raw = distribution(logits, most) if "logprobs" in features.needs else None
    proposals, scores, transfers = decide(
        canvas, window, logits, masked, quota, noise, features, reads_raw_logits, part
    )
    final = transfers[:, 0]
    if "speculates" in features.needs:
        now, transfers = verify(canvas, window, now, proposals, transfers, features.mask_token_id)
        final = transfers[:, 0] & (window.speculation != DRAFT)[:, None]
    transferred, goes_on, taken = final.sum(-1), None, None
    if edits:
        replaced, goes_on = edit(canvas, window, now, masked[:, 0], proposals, scores, inside.any(-1, keepdim=True))
        transfers, final = transfers | replaced[:, None], final | replaced
    if held is not None:
        later = transfers[:, 1:] & ~transfers[:, :-1]
        drafted = (held[..., None] & later[:, None]).any(2)
        transfers = torch.cat([transfers[:, :1], transfers[:, :1] | drafted], dim=1)
    nexts = torch.where(transfers, proposals[:, None], now[:, None])
    if level is not None and window.draft_columns:
        taken = confirmed(window.copies, level, now, nexts[:, 0], transferred > 0)
    if raw is not None:
        chosen = logits.gather(-1, proposals[..., None]).squeeze(-1)
        every = [(slice(None), True)] if taken is None else zip(window.copies.unbind(1), taken[..., None].unbind(1))
        for rows, is_taken in every:
            of_rows = (each[rows] for each in (chosen, *raw))
            transfer = final[rows] & is_taken
            keep_logprobs(canvas, window.slots[rows, None], window.block[rows], transfer, *of_rows)
    finish(canvas, window, features, taken, level, nexts, transferred, shown, goes_on)


def levels(canvas: Canvas, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """How many steps each row is ahead of its canvas, `(rows,)`; and the later steps whose proposals its drafts hold,
    `(rows, drafts, steps)` bool."""
    rule = canvas.choices[window.slots, 1]
    kind = ((rule == RULES.index("sequential")) | (rule == RULES.index("bernoulli"))).long()
    draft = window.draft if window.draft_columns else torch.zeros_like(window.slots)
    return canvas.draft_levels[kind, draft], canvas.draft_steps[kind]


def upcoming(
    canvas: Canvas, window: Window, level, is_mask, shown, features: Features
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens each row must have transferred after its next step, and after each of the later ones that drafts hold, if
    the logits did not change: `(rows, steps)`; and which positions may receive one, `(rows, steps, block)` bool.

    Args:
        level: see [`levels`].
        is_mask, shown: `(rows, block)` bool, the masks of the block, and the positions that decide when it is done.
    """
    done = canvas.steps[window.slots, None]
    step = done
    if canvas.drafts:
        done = done + level[:, None]
        step = done + torch.arange(1 + canvas.draft_steps.shape[2], device=done.device)
    # Drafts, and the steps of editing, come to the end of the schedule.
    last = canvas.schedule.shape[1] - 1 if canvas.drafts or "edits" in features.needs else None
    total = lambda steps: canvas.schedule[window.slots[:, None], steps if last is None else steps.clamp(max=last)]
    quota = total(step + 1) - total(done)
    if "edits" in features.needs:  # the steps after the last mask
        quota = quota.clamp(min=1)
    masked = is_mask[:, None].expand(-1, step.shape[1], -1)
    if "bernoulli" in features.rules:
        masked = masked & (canvas.plan[window.slots[:, None], window.block][:, None] <= step[..., None])
    # A row is done once no shown position is masked, whatever is left behind the cut.
    return quota, masked & (masked & shown[:, None]).any(-1, keepdim=True)


def finish(
    canvas: Canvas, window: Window, features: Features, taken, level, nexts, transferred, shown, goes_on
) -> None:
    """Write what a pass has come to into the canvas.

    Args:
        taken: `(canvases, 1 + drafts)` bool, the steps that [`confirmed`] finds; None without drafts in the window.
        level: see [`levels`].
        nexts: `(rows, 1 + drafts, block)`, the tokens of the block after the step, and those of its drafts.
        transferred: `(rows,)`, how many masks have been replaced.
        shown, goes_on: `(rows, block)` and `(rows,)` bool, the positions that decide when a block is done; where tokens are
            edited, whether it goes on without masks.
    """
    slots, block = window.slots, window.block
    if taken is not None:
        first = window.copies[:, 0]
        last = window.copies.gather(1, (taken * (1 + level[window.copies])).argmax(-1, keepdim=True))[:, 0]
        slots, block, nexts, shown = slots[first], block[first], nexts[last], shown[last]
        transferred = (transferred[window.copies] * taken).sum(-1)
        goes_on = None if goes_on is None else goes_on[first]
    inside = (block < canvas.capacity).any(-1)
    if canvas.drafts:
        lines = slots[:, None] + canvas.slots * torch.arange(1 + canvas.drafts, device=slots.device)
        whole = canvas.tokens[slots, None].expand(-1, canvas.drafts, -1)
        canvas.tokens.index_copy_(0, lines[:, 1:].flatten(), whole.flatten(0, 1))
        canvas.tokens.index_put_((lines[..., None], block[:, None].expand_as(nexts)), nexts)
    else:
        canvas.tokens.index_put_((slots[:, None], block), nexts[:, 0])
    steps, passes = inside.long() if taken is None else inside * taken.sum(-1), transferred > 0
    if "speculates" in features.needs:
        speculates = (window.speculation if taken is None else window.speculation[window.copies[:, 0]]) > 0
        steps, passes = torch.where(speculates, transferred, steps), passes | speculates
    canvas.steps.index_add_(0, slots, steps)
    if "edits" in features.needs:
        passes |= (canvas.numbers[slots, NUMBERS.index("editing_threshold")] < 1) & inside
    canvas.counts.index_add_(0, slots, torch.stack([passes.long(), transferred], dim=-1))
    now = nexts[:, 0]
    is_mask = now == features.mask_token_id
    left = (is_mask & shown).any(-1)
    left = left if goes_on is None else left | goes_on
    ended = torch.zeros_like(left)
    if features.widths[0]:
        ends = canvas.lists["eos_token_id", features.widths[0]][slots]
        new = (block >= canvas.choices[slots, 3:]) & (block < canvas.capacity)
        ended = ((now[..., None] == ends[:, None]).any(-1) & new).any(-1)
    report = torch.stack([left, ended, is_mask[:, 0], canvas.steps[slots]], dim=-1)
    # Of idle rows, which have no block in the pass, the last report stays.
    report = torch.where(inside[:, None], report, canvas.report[slots])
    canvas.report.index_copy_(0, slots, report)


def keep_logprobs(canvas: Canvas, slots, block, transfer, chosen, total, top, top_tokens) -> None:
    """Write the log-probabilities of a step's transferred tokens into the canvas, under the distribution that the model gave:
    before suppressed tokens, temperature and filters.

    Args:
        slots: `(rows, 1)`. block: `(rows, block)`, columns. transfer: `(rows, block)` bool.
        chosen: `(rows, block)`, the logits of the proposals.
        total, top, top_tokens: see [`sampling.distribution`].
    """
    own = canvas.logprobs["own"]
    own.index_put_((slots, block), torch.where(transfer, chosen.float() - total, own[slots, block]))
    for name, values in (("top", top), ("top_tokens", top_tokens.int())) if top.shape[-1] else ():
        table = canvas.logprobs[name][..., : top.shape[-1]]
        table.index_put_((slots, block), torch.where(transfer[..., None], values, table[slots, block]))


def decide(
    canvas: Canvas, window: Window, logits, masked, quota, noise, features: Features, reads_raw_logits: bool, part=None
):
    """The proposals of a step and the scores by which each row ranks them, `(rows, block)` each, and which are transferred to
    masks, `(rows, steps, block)`.

    Args:
        logits: `(rows, block, vocab)`, or the `part` of them that this process has; those of tokens that may not be proposed are
            changed.
        masked: `(rows, steps, block)` bool, the positions that may receive a token.
        quota: `(rows, steps)`, how many.
    """
    numbers, choices = canvas.numbers[window.slots], canvas.choices[window.slots]
    temperature, top_p, min_p, threshold, entropy_bound, factor, alg_temp, *_ = (
        column[:, None] for column in numbers.unbind(-1)
    )
    score_index, rule, top_k, _ = (column[:, None] for column in choices.unbind(-1))
    _, suppressed, deferred = (
        canvas.lists[name, width][window.slots] if width else None for name, width in zip(LISTS, features.widths)
    )
    if suppressed is not None:
        suppressed = suppressed if part is None else part.index(suppressed)
        has_any = (suppressed >= 0)[:, None].expand(*logits.shape[:2], -1)
        tokens = suppressed.clamp(min=0)[:, None].expand_as(has_any)
        logits.scatter_(-1, tokens, torch.where(has_any, -torch.inf, logits.gather(-1, tokens)))
    if canvas.allowed is not None and "constraint" in features.needs:
        words = canvas.allowed[window.slots]
        bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
        logits.masked_fill_((bits == 0).flatten(1)[:, None, : logits.shape[-1]], -torch.inf)
    processed = logits
    if "samples" in features.needs:
        processed = logits / torch.where(temperature > 0, temperature, 1.0)[..., None].to(logits.dtype)
    if "filters" in features.needs:
        # Filters count and rank tokens, of which the mask must not be one.
        without_mask = processed.clone()
        without_mask[..., features.mask_token_id] = -torch.inf
        without_mask = filtered(without_mask, *(x[..., None] for x in (top_k, top_p, min_p)))
        has_filter = ((top_k > 0) | (top_p < 1) | (min_p > 0))[..., None]
        processed = torch.where(has_filter, without_mask, processed)
    wanted = features.scores - {"random"}
    is_raw = reads_raw_logits and processed is not logits
    scored = logits if is_raw else processed
    if part is not None:
        proposals, scores = part.propose(processed, scored, features.mask_token_id, noise.get("tokens"))
        is_nan = scores[None].isnan()
    else:
        proposals, scores = propose(
            processed, features.mask_token_id, frozenset() if is_raw else wanted, noise.get("tokens")
        )
        if is_raw:
            scores = {name: score_of(name, logits, proposals, features.mask_token_id) for name in wanted}
        is_nan = logits.gather(-1, proposals[..., None]).squeeze(-1).isnan()
    if "random" in features.scores:
        scores["random"] = noise["scores"]
    score = scores[next(iter(features.scores))]
    for name in features.scores if len(features.scores) > 1 else ():
        score = torch.where(score_index == SCORES.index(name), scores[name], score)
    lowest = torch.finfo(torch.float32).min
    if deferred is not None:
        # Not `torch.isin`, which synchronises with the device if the list is long.
        score = score.masked_fill((proposals[..., None] == deferred[:, None]).any(-1), lowest)
    # Logits that overflowed give NaN scores: such positions are transferred last.
    is_nan = is_nan | score.isnan()
    canvas.saw_nan |= (is_nan & masked[:, 0]).any()
    score = score.nan_to_num(nan=lowest)
    steps = quota.shape[1]
    repeated = lambda x: x if x is None or steps == 1 else x[:, None].expand(-1, steps, -1).flatten(0, 1)
    transfers = select(
        features.rules,
        repeated(rule),
        repeated(score),
        repeated(score_index == SCORES.index("probability")),
        masked.flatten(0, 1),
        quota.reshape(-1, 1),
        *map(repeated, (threshold, entropy_bound, factor, alg_temp, noise.get("positions"))),
    )
    return proposals, score, transfers.unflatten(0, (-1, steps))
