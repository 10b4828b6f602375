"""Sudoku for a diffusion language model: puzzles to learn from, a tokenizer, and the grid as it fills in.

python examples/sudoku.py generate --number 1000000 --clues 33 36 --seed 0 --out train.jsonl
python examples/sudoku.py tokenizer --out sudoku
python examples/sudoku.py solve CHECKPOINT --confidence-threshold 0.9 --delay 0.5

A grid is 81 characters, row by row: "text" in a line of the file is the solution, "masked" the puzzle, with . for a blank.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import dllm_hf  # noqa: F401  registers the models

MASK, END = ".", "<|endoftext|>"
ANY = 0b111111111  # all candidates of a cell: a bit for each digit; `cells` are int32 tensors `(81, puzzles)` of them
FEWEST = 22  # clues; one grid of 25 can be emptied down to 22, and one of 370 to fewer
GENERATION_OPTIONS = {"remasking_strategy": str, "confidence_threshold": float, "steps": int, "block_length": int}
LINE = b'{"text": "%s", "masked": "%s"}\n' % (b"." * 81, b"." * 81)
TEXT, MASKED = slice(LINE.index(b"."), LINE.index(b".") + 81), slice(LINE.rindex(b".") - 80, LINE.rindex(b".") + 1)


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`(9, 27)`: the nine cells of each row, column and box. `(3, 81)`: the row, column and box of each cell.
    `(512,)`: the number of candidates in each set of them; 10 for sets of one or none, so that `argmin` finds a cell that
    is still open."""
    cells = torch.arange(81).view(9, 9)
    boxes = cells.view(3, 3, 3, 3).transpose(1, 2).reshape(9, 9)
    members = torch.cat([cells, cells.T, boxes])
    of_cell = torch.stack([(members == cell).any(1).nonzero()[:, 0] for cell in range(81)])
    counts = torch.tensor([bits.bit_count() for bits in range(512)], dtype=torch.uint8)
    return members.T.to(device), of_cell.T.to(device), counts.masked_fill(counts < 2, 10).to(device)


def _narrow(cells: torch.Tensor, rounds: int = 3) -> tuple[torch.Tensor, ...]:
    """`rounds` of naked and hidden singles: a known digit leaves its peers, and a digit that has one place takes it.

    cells: `(81, puzzles)` candidates.
    Returns them narrowed, and which puzzles are solved, contradict themselves, or did not change in the last round,
    each `(puzzles,)` bool.
    """
    members, of_cell, _ = _tables(cells.device)
    for _ in range(rounds):
        before = cells
        known = torch.where(cells & (cells - 1) == 0, cells, 0)
        bits = known << 9 | cells  # both are counted in one go
        once = bits[members[0]]  # (27, puzzles): the digits that at least one cell of the unit has
        twice = torch.zeros_like(once)  # those that at least two cells have
        for nth_cells in members[1:]:
            more = bits[nth_cells]
            twice |= once & more
            once |= more
        seen = once & ~(twice & ANY)
        seen = seen[of_cell[0]] | seen[of_cell[1]] | seen[of_cell[2]]
        cells = torch.where(known != 0, cells, cells & ~(seen >> 9))
        hidden = cells & seen
        cells = torch.where(hidden != 0, hidden, cells)
    broken = (twice > ANY).any(0) | (once & ANY != ANY).any(0) | (before == 0).any(0)
    return cells, (known != 0).all(0) & ~broken, broken, (cells == before).all(0)


def _chunk(device: torch.device) -> int:
    return 65536 if device.type == "cuda" else 2048  # as many as fit into a CPU's cache


@torch.no_grad()
def solutions(puzzles: torch.Tensor, limit: int = 2, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact number of solutions of each puzzle, counted up to `limit`, and one of them (any digits without one).

    Where [`_narrow`] comes to rest, the most constrained cell is split: its lowest candidate, or the others. Depth
    first, at most `chunk` puzzles at a time, so that memory grows with the depth and not with the tree.

    Args:
        puzzles: `(puzzles, 81)` integers, 0 for a blank.

    Returns:
        `(puzzles,)` and `(puzzles, 81)`.
    """
    device, chunk = puzzles.device, chunk or _chunk(puzzles.device)
    cells = torch.where(puzzles > 0, 1 << (puzzles.int() - 1).clamp(min=0), ANY).T.contiguous()
    solved_cells = torch.ones_like(cells)
    counts = torch.zeros(len(puzzles), dtype=torch.int32, device=device)
    rows = torch.arange(len(puzzles), device=device)
    stack = list(zip(cells.split(chunk, 1), rows.split(chunk)))
    while stack:
        cells, rows = stack.pop()
        while stack and len(rows) + len(stack[-1][1]) <= chunk:
            cells, rows = (torch.cat([one, other], -1) for one, other in zip((cells, rows), stack.pop()))
        cells, solved, broken, stuck = _narrow(cells)
        counts.index_add_(0, rows, solved.int())
        done = solved.nonzero()[:, 0]
        solved_cells[:, rows[done]] = cells[:, done]
        left = (~solved & ~broken & (counts[rows] < limit)).nonzero()[:, 0]
        if len(left) == 0:
            continue
        cells, rows, stuck = cells[:, left], rows[left], stuck[left]
        cell = _tables(device)[2][cells].argmin(0, keepdim=True)
        candidates = cells.gather(0, cell)
        lowest = candidates & -candidates
        split = stuck.nonzero()[:, 0]
        if len(split):
            others = cells[:, split].scatter(0, cell[:, split], (candidates ^ lowest)[:, split])
            stack.append((others, rows[split]))
        stack.append((cells.scatter(0, cell, torch.where(stuck, lowest, candidates)), rows))
    return counts.clamp(max=limit), _digits(solved_cells)


def _digits(cells: torch.Tensor) -> torch.Tensor:
    """`(81, puzzles)` cells of one candidate each to `(puzzles, 81)` uint8 digits."""
    return (cells.T.float().log2().round() + 1).to(torch.uint8)


def full_grids(number: int, generator: torch.Generator) -> torch.Tensor:
    """`(number, 81)` uint8: random complete grids, on the generator's device.

    Three boxes on the diagonal are drawn, then always the most constrained cell; grids that contradict themselves are
    dropped and others begun. Every grid can come out, though not all are equally likely.
    """
    device = generator.device
    diagonal = _tables(device)[0][:, [18, 22, 26]]
    grids = [torch.zeros(0, 81, dtype=torch.uint8, device=device)]
    while missing := number - sum(map(len, grids)):
        cells = torch.full((81, missing), ANY, dtype=torch.int32, device=device)
        orders = torch.rand(9, 3, missing, generator=generator, device=device).argsort(0)
        cells[diagonal] = (1 << orders).int()
        while cells.shape[1]:
            cells, solved, broken, stuck = _narrow(cells)
            grids.append(_digits(cells[:, solved]))
            left = (~solved & ~broken).nonzero()[:, 0]
            cells, stuck = cells[:, left], stuck[left]
            ties = torch.rand(cells.shape, generator=generator, device=device)
            cell = (_tables(device)[2][cells] + ties).argmin(0, keepdim=True)
            candidates = cells.gather(0, cell)
            is_candidate = candidates >> torch.arange(9, device=device)[:, None] & 1
            draws = 1 + torch.rand(is_candidate.shape, generator=generator, device=device)
            drawn = (1 << (is_candidate * draws).argmax(0)).int()
            cells = cells.scatter(0, cell, torch.where(stuck, drawn, candidates))
    return torch.cat(grids)


@torch.no_grad()
def generate(
    number: int,
    clues: tuple[int, int] = (33, 36),
    generator: torch.Generator | None = None,
    chunk: int | None = None,
    progress: Callable[[int], None] = lambda finished: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puzzles with one solution, and the solutions; the numbers of clues are drawn uniformly from a range.

    Cells of a full grid are emptied in random order, several at a time, half as many after each failure. A grid that
    loses no further cell above its number of clues gives way to another one.

    Args:
        clues: the fewest and the most.
        generator: on the device that is to be used.
        chunk: number of puzzles that are emptied at a time.
        progress: called with the number of puzzles that were finished since the last call.

    Returns:
        `(number, 81)` uint8 each, 0 for a blank.
    """
    _check_clues(*clues)
    generator = generator or torch.Generator().manual_seed(0)
    device = generator.device
    chunk = chunk or _chunk(device)
    targets = torch.randint(clues[0], clues[1] + 1, (number,), generator=generator, device=device)
    finished = torch.zeros(2, number, 81, dtype=torch.uint8, device=device)
    waiting = torch.arange(number, device=device)
    rows = waiting[:0]  # the row of `finished` that each grid in work will fill
    work = tuple(torch.zeros(0, *size, dtype=torch.long, device=device) for size in ((81,), (81,), (81,), (), ()))
    while len(waiting) or len(rows):
        if len(waiting) and len(rows) <= chunk // 2:
            new, waiting = waiting.split([n := min(chunk - len(rows), len(waiting)), len(waiting) - n])
            full = full_grids(n, generator)
            turn = torch.rand(n, 81, generator=generator, device=device).argsort(1)
            fresh = (full, full, turn, torch.zeros_like(new), torch.full_like(new, 24))
            rows, work = torch.cat([rows, new]), tuple(map(torch.cat, zip(work, fresh)))
        grid, puzzle, turn, position, group = work
        # `turn`: the rank of each cell in the random order. Ranks below `position` are decided, the next `group` are tried.
        size = torch.minimum(group, (puzzle != 0).sum(1) - targets[rows])
        is_tried = (turn >= position[:, None]) & (turn < (position + size)[:, None])
        without = puzzle.masked_fill(is_tried, 0)
        unique = solutions(without, chunk=chunk)[0] == 1
        puzzle = torch.where(unique[:, None], without, puzzle)
        position = torch.where(unique | (size == 1), position + size, position)
        group = torch.where(unique, group, (size // 2).clamp(min=1))
        excess = (puzzle != 0).sum(1) - targets[rows]
        done, stuck = excess == 0, excess > 81 - position
        finished[:, rows[done]] = torch.stack([puzzle[done], grid[done]]).to(torch.uint8)
        progress(int(done.sum()))
        waiting = torch.cat([waiting, rows[stuck & ~done]])
        left = (~done & ~stuck).nonzero()[:, 0]
        rows, work = rows[left], tuple(x[left] for x in (grid, puzzle, turn, position, group))
    return finished[0], finished[1]


def _check_clues(fewest: int, most: int) -> None:
    if not FEWEST <= fewest <= most <= 80:
        raise ValueError(
            f"From {fewest} to {most} clues is impossible: choose a range within {FEWEST} to 80, the smaller number "
            "first. With fewer than 17 clues no puzzle has a single solution (arXiv:1201.0749), with fewer than "
            f"{FEWEST} they are too rare to be met at random, and with 81 nothing is left to solve."
        )


def write_puzzles(
    out: Path, number: int, clues: tuple[int, int], generator: torch.Generator, excluded: set[bytes]
) -> None:
    """Write `number` different puzzles, none of which has one of the `excluded` solutions."""
    part, seen = out.with_name(out.name + ".part"), set()
    try:
        with part.open("wb") as file, tqdm(total=number, unit=" puzzles", disable=None) as bar:
            while missing := number - len(seen):
                puzzles = generate(min(missing, 1 << 17), clues, generator, progress=bar.update)
                masked, text = (48 + grids.cpu().numpy() for grids in puzzles)
                lines = np.tile(np.frombuffer(LINE, np.uint8), (len(text), 1))
                lines[:, TEXT], lines[:, MASKED] = text, np.where(masked == 48, ord(MASK), masked)
                before = len(seen)
                for line in map(bytes, lines):
                    if line[MASKED] not in seen and line[TEXT] not in excluded:
                        seen.add(line[MASKED])
                        file.write(line)
                bar.update(len(seen) - before - len(lines))
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def read_solutions(path: Path) -> set[bytes]:
    grids = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not (match := re.search(r'"text": ?"([1-9]{81})"', line)):
            raise ValueError(f'--exclude {path}: line {number} has no "text" of 81 digits, as `generate` writes it.')
        grids.add(match[1].encode())
    return grids


def tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """One token per cell. Line breaks, spaces and the box lines | - + are skipped, and 0 is a blank as well.

    Args:
        begin: put an end-of-sequence token before the grid, for a Dream, which predicts a token at the position before
            it.
    """
    ids = {token: i for i, token in enumerate([*"123456789", END, MASK])}
    backend = Tokenizer(models.WordLevel(ids))
    skip, zero = normalizers.Replace(Regex(r"[\s|+-]"), ""), normalizers.Replace("0", MASK)
    backend.normalizer = normalizers.Sequence([skip, zero])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if begin:
        backend.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, ids[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token=MASK,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=81 + begin,
        clean_up_tokenization_spaces=False,
    )


def parse(text: str) -> tuple[str, str]:
    """A puzzle as it was typed to its 81 characters and those of its solution. ValueError says what is wrong with it."""
    puzzle = re.sub(r"[\s|+-]", "", text).replace("0", MASK)
    if strange := sorted({*puzzle} - {*"123456789", MASK}):
        raise ValueError(f"The puzzle holds {' '.join(strange)}: write the digits 1 to 9, and . or 0 for a blank.")
    if len(puzzle) != 81:
        raise ValueError(f"The puzzle has {len(puzzle)} cells: write all 81, row by row, with . or 0 for a blank.")
    for unit, cells in enumerate(_tables(torch.device("cpu"))[0].T.tolist()):
        for digit in "123456789":
            if [puzzle[cell] for cell in cells].count(digit) > 1:
                name = ("row", "column", "box")[unit // 9]
                raise ValueError(f"The puzzle has {digit} twice in {name} {unit % 9 + 1}: correct one of them.")
    if MASK not in puzzle:
        raise ValueError("The puzzle has no blank: write . or 0 where the model is to fill in a digit.")
    count, solution = solutions(torch.tensor([[int(cell.replace(MASK, "0")) for cell in puzzle]]))
    if count != 1:
        problem = "several solutions: add clues until one is left" if count else "no solution: check its clues"
        raise ValueError(f"The puzzle has {problem}.")
    return puzzle, "".join(map(str, solution[0].tolist()))


class Board:
    """A streamer that draws the grid after each step, in place in a terminal and one below the other elsewhere.

    Args:
        puzzle: 81 characters.
        tokens: the character of each token id.
        delay: seconds after each frame.
        before: number of tokens before the grid.
    """

    COLOURS = {"clue": "1", "old": "36", "new": "7;32", "wrong": "7;31"}
    SIDES = {"clue": "  ", "old": "  ", "new": "[]", "wrong": "!!"}  # where there are no colours

    def __init__(self, puzzle: str, tokens: list[str], delay: float = 0.0, before: int = 0):
        self.puzzle, self.tokens, self.delay = puzzle, tokens, delay
        self.cells, self.final, self.step, self.rows = list(puzzle), -before, 0, 0
        self.in_place = sys.stdout.isatty()
        self.in_colour = self.in_place and not os.environ.get("NO_COLOR")

    def put(self, value: torch.Tensor) -> None:
        """Tokens that are final: later drafts begin after them."""
        self.final += len(value)

    def put_draft(self, value: torch.Tensor) -> None:
        """The tokens after a step, from the end of the final ones to the end of the block, masks included."""
        before, self.step = list(self.cells), self.step + 1
        self.cells[self.final : self.final + len(value)] = [self.tokens[token] for token in value.tolist()]
        new = {i for i in range(81) if self.cells[i] != before[i]}
        self.draw(f"step {self.step}: {len(new)} token{'s' * (len(new) != 1)}", new=new)

    def end(self) -> None:
        pass

    def draw(self, header: str, **marked: set[int]) -> None:
        """`marked`: for a style the cells that are drawn in it."""
        rows, line = [header], f"+{'-' * 9}" * 3 + "+"
        for start in range(0, 81, 9):
            cells = [self._cell(i, marked) for i in range(start, start + 9)]
            rows += [line] * (start % 27 == 0) + ["|" + "|".join("".join(cells[i : i + 3]) for i in (0, 3, 6)) + "|"]
        up = f"\033[{self.rows}A\033[J" if self.in_place and self.rows else ""
        self.rows = len(rows) + 2
        print(up + "\n".join([*rows, line, ""]), flush=True)
        time.sleep(self.delay)

    def _cell(self, i: int, marked: dict[str, set[int]]) -> str:
        usual = "clue" if self.puzzle[i] != MASK else "old"
        style = next((style for style, cells in marked.items() if i in cells), usual)
        if self.in_colour and self.cells[i] != MASK:
            return f"\033[{self.COLOURS[style]}m {self.cells[i]} \033[0m"
        return self.cells[i].join(self.SIDES[style])


def solve(args: argparse.Namespace, puzzle: str, solution: str) -> bool:
    """Show how a model fills in a puzzle. Returns whether the solution is right."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint).to(args.device).eval()
        ids = tokenizer(puzzle).input_ids
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise ValueError(f"{args.checkpoint} cannot be used: {error}") from error
    mask_id = tokenizer.convert_tokens_to_ids(MASK)
    before = len(ids) - 81
    if (
        before not in (0, 1)
        or tokenizer.convert_ids_to_tokens(ids)[before:] != list(puzzle)
        or model.config.mask_token_id != mask_id
    ):
        raise ValueError(
            f"{args.checkpoint} is no Sudoku model: its tokenizer does not make 81 tokens of 81 cells, with . as its "
            "mask. Train one with the tokenizer that `sudoku.py tokenizer` saves."
        )
    characters = tokenizer.convert_ids_to_tokens(range(model.config.vocab_size))
    blanks = puzzle.count(MASK)
    board = Board(puzzle, characters, args.delay, before)
    board.draw(f"{81 - blanks} clues, {blanks} blanks")
    options = {name: getattr(args, name) for name in GENERATION_OPTIONS}
    output = model.diffusion_generate(
        torch.tensor([ids], device=args.device),
        max_new_tokens=0,
        suppress_tokens=[i for i, character in enumerate(characters) if character not in set("123456789")],
        streamer=board,
        generator=torch.Generator(args.device).manual_seed(args.seed),
        return_dict_in_generate=True,
        **options,
    )
    # The puzzle has one solution: a grid that breaks no rule and no clue is equal to it.
    wrong = {i for i in range(81) if board.cells[i] != solution[i]}
    verdict = f"not solved, {len(wrong)} of {blanks} cells are wrong" if wrong else "solved"
    speed = f"{output.num_forward_passes} forward passes, {output.tokens_per_forward.item():.1f} tokens per forward"
    board.draw(f"{verdict}: {speed}", wrong=wrong)
    return not wrong


def run(args: argparse.Namespace) -> int:
    """The exit status. ValueError says what is wrong with the arguments."""
    if args.command == "tokenizer":
        tokenizer(args.begin).save_pretrained(args.out)
        return 0
    try:
        generator = torch.Generator(args.device).manual_seed(args.seed)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"--device {args.device} is not there: {str(error).partition('. ')[0]}.") from error
    if args.command == "solve":
        text = args.file.read_text(encoding="utf-8") if args.file else args.puzzle
        if text is None:
            text = "".join(map(str, generate(1, (args.clues, args.clues), generator)[0][0].tolist()))
        return 0 if solve(args, *parse(text)) else 1
    if args.number < 1:
        raise ValueError(f"--number {args.number}: ask for at least one puzzle.")
    if args.exclude and args.exclude.resolve() == args.out.resolve():
        raise ValueError(f"--out {args.out} would replace the file that --exclude reads: name another.")
    excluded = read_solutions(args.exclude) if args.exclude else set()
    write_puzzles(args.out, args.number, tuple(args.clues), generator, excluded)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("generate", help="write puzzles with one solution each, and their solutions")
    making.add_argument("--number", type=int, required=True)
    making.add_argument("--clues", type=int, nargs=2, default=(33, 36), metavar=("FEWEST", "MOST"))
    making.add_argument("--out", type=Path, required=True, help="the .jsonl file to write; one that exists is replaced")
    making.add_argument("--exclude", type=Path, help="a .jsonl file whose solutions must not occur: the held-out ones")
    saving = commands.add_parser("tokenizer", help="save the tokenizer")
    saving.add_argument("--out", type=Path, required=True, help="the folder to write")
    saving.add_argument("--begin", action="store_true", help="for a Dream: a token stands before the grid")
    solving = commands.add_parser("solve", help="show how a model fills in a puzzle; the exit status is 0 if it can")
    solving.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a repository of the Hugging Face Hub")
    source = solving.add_mutually_exclusive_group()
    source.add_argument("puzzle", metavar="PUZZLE", nargs="?", help="81 cells; . or 0 is a blank")
    source.add_argument("--file", type=Path, help="a text file with the puzzle, on nine lines if you like")
    source.add_argument("--clues", type=int, default=33, help="generate a puzzle with so many clues (default: 33)")
    generation = solving.add_argument_group("generation", "Default: what the checkpoint's generation_config.json says.")
    for name, kind in GENERATION_OPTIONS.items():
        generation.add_argument("--" + name.replace("_", "-"), type=kind)
    solving.add_argument("--delay", type=float, default=0.0, help="seconds between frames")
    for command in (making, solving):
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"sudoku.py {args.command}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted" + ": no file is written.\n" * (args.command == "generate"))


if __name__ == "__main__":
    sys.exit(main())
