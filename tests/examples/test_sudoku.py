"""`examples/sudoku.py`: the solver against plain backtracking, what `generate` promises, the tokenizer, and `solve`."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dllm_hf import LLaDAModelLM
from tests.builders import ScriptedModel, llada_config, load_script

SCRIPT = Path(__file__).parents[2] / "examples" / "sudoku.py"
sudoku = load_script("examples/sudoku.py")

TOKENS = {"vocab_size": 11, "mask_token_id": 10, "eos_token_id": 9, "pad_token_id": 9}
# 17 clues, the fewest with which a puzzle has one solution (the first of Gordon Royle's list).
PUZZLE = ".......1.4.........2...........5.4.7..8...3....1.9....3..4..2...5.1........8.6..."
SOLUTION = "693784512487512936125963874932651487568247391741398625319475268856129743274836159"


def grid(text: str) -> list[int]:
    return [int(cell) for cell in text.replace(".", "0")]


def fits(cells: list[int], cell: int, digit: int) -> bool:
    row, column = divmod(cell, 9)
    for other, value in enumerate(cells):
        r, c = divmod(other, 9)
        if (
            other != cell
            and value == digit
            and (r == row or c == column or (r // 3, c // 3) == (row // 3, column // 3))
        ):
            return False
    return True


def count(cells: list[int], limit: int = 2) -> int:
    """The solver's twin: the number of solutions up to `limit`, by trying every digit in the most constrained cell."""
    if not all(fits(cells, cell, digit) for cell, digit in enumerate(cells) if digit):
        return 0
    blanks = {cell: [d for d in range(1, 10) if fits(cells, cell, d)] for cell in range(81) if not cells[cell]}
    if not blanks:
        return 1
    cell, total = min(blanks, key=lambda blank: len(blanks[blank])), 0
    for digit in blanks[cell]:
        total += count([*cells[:cell], digit, *cells[cell + 1 :]], limit - total)
        if total >= limit:
            break
    return total


def is_valid(cells: list[int]) -> bool:
    return all(digit and fits(cells, cell, digit) for cell, digit in enumerate(cells))


@st.composite
def puzzles(draw) -> list[int]:
    """A full grid of which some clues are left, one of them perhaps changed: no, one or several solutions."""
    clues = draw(st.integers(24, 50))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    cells = sudoku.full_grids(1, generator)[0].tolist()
    order = torch.randperm(81, generator=generator).tolist()
    if draw(st.booleans()):
        cells[order[0]] = draw(st.integers(1, 9))
    return [digit if cell in order[:clues] else 0 for cell, digit in enumerate(cells)]


@settings(max_examples=10)
@given(st.lists(puzzles(), min_size=1, max_size=4), st.sampled_from([1, 3, None]))
def test_the_solver_counts_what_backtracking_counts(batch, chunk):
    counts, solutions = sudoku.solutions(torch.tensor(batch), chunk=chunk)
    assert counts.tolist() == [count(cells) for cells in batch]
    for cells, number, solution in zip(batch, counts.tolist(), solutions.tolist(), strict=True):
        assert not number or is_valid(solution)
        assert not number or all(clue in (0, digit) for clue, digit in zip(cells, solution, strict=True))


def test_the_solver_solves_a_puzzle_of_17_clues_and_notices_when_it_is_spoilt():
    without_a_clue = PUZZLE.replace("7", ".")
    unsolvable = "56" + PUZZLE[2:]  # breaks no rule by itself
    assert all(fits(grid(unsolvable), cell, digit) for cell, digit in enumerate(grid(unsolvable)) if digit)
    contradictory = "11" + PUZZLE[2:]
    counts, solutions = sudoku.solutions(
        torch.tensor(list(map(grid, (PUZZLE, without_a_clue, unsolvable, contradictory))))
    )
    assert counts.tolist() == [1, 2, 0, 0]
    assert solutions[0].tolist() == grid(SOLUTION)


def test_the_solver_counts_up_to_its_limit():
    empty = torch.zeros(3, 81, dtype=torch.uint8)
    for limit in (1, 2, 5):
        counts, solutions = sudoku.solutions(empty, limit=limit, chunk=16)
        assert counts.tolist() == [limit] * 3
        assert all(map(is_valid, solutions.tolist()))
    assert sudoku.solutions(empty[:0])[0].shape == (0,)


def test_full_grids_are_valid_and_all_different():
    grids = sudoku.full_grids(200, torch.Generator().manual_seed(0)).tolist()
    assert len(set(map(tuple, grids))) == 200
    assert all(map(is_valid, grids))


@pytest.mark.parametrize("clues, number", [((33, 36), 60), ((26, 26), 10), ((80, 80), 3)])
def test_puzzles_have_one_solution_which_is_the_one_given_and_as_many_clues_as_asked(clues, number):
    puzzles, solutions = sudoku.generate(number, clues, torch.Generator().manual_seed(0), chunk=32)
    assert puzzles.shape == solutions.shape == (number, 81)
    assert all(map(is_valid, solutions.tolist()))
    assert set((puzzles > 0).sum(1).tolist()) == set(range(clues[0], clues[1] + 1))
    for puzzle, solution in zip(puzzles.tolist(), solutions.tolist(), strict=True):
        assert all(clue in (0, digit) for clue, digit in zip(puzzle, solution, strict=True))
    assert all(count(puzzle) == 1 for puzzle in puzzles[:5].tolist())


def test_the_same_seed_gives_the_same_puzzles_and_another_seed_others():
    first, again, other = (sudoku.generate(10, generator=torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert first.equal(again)
    assert not (first[:, None] == other[None]).all(-1).any()


def write(out: Path, *options: str) -> list[dict]:
    assert sudoku.main(["generate", "--device", "cpu", "--out", str(out), *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_file_has_a_puzzle_and_its_solution_on_each_line(tmp_path):
    rows = write(tmp_path / "train.jsonl", "--number", "20", "--clues", "33", "36")
    assert len(rows) == 20
    for row in rows:
        assert row.keys() == {"text", "masked"}
        assert re.fullmatch("[1-9]{81}", row["text"])
        assert re.fullmatch("[1-9.]{81}", row["masked"])
        assert 33 <= 81 - row["masked"].count(".") <= 36
        assert all(clue in (".", digit) for clue, digit in zip(row["masked"], row["text"], strict=True))
    first = (tmp_path / "train.jsonl").read_text().splitlines()[0]
    assert first == json.dumps(rows[0])
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_excluded_solutions_are_not_written_and_others_take_their_place(tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", "--number", "5", "--seed", "1")
    again = write(tmp_path / "train.jsonl", "--number", "5", "--seed", "1")
    assert again == held_out
    train = write(
        tmp_path / "train.jsonl", "--number", "5", "--seed", "1", "--exclude", str(tmp_path / "held_out.jsonl")
    )
    assert len(train) == 5
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}


def test_a_puzzle_that_comes_twice_is_written_once(tmp_path, monkeypatch):
    generate = sudoku.generate
    monkeypatch.setattr(
        sudoku, "generate", lambda *a, **k: tuple(x[torch.arange(len(x)) // 2] for x in generate(*a, **k))
    )
    rows = write(tmp_path / "train.jsonl", "--number", "6")
    assert len({row["masked"] for row in rows}) == len(rows) == 6


def test_an_interrupted_run_leaves_no_half_file_and_the_old_one_as_it_was(tmp_path, monkeypatch, capsys):
    (tmp_path / "train.jsonl").write_text("old")
    batches = iter([sudoku.generate(3)])

    def interrupted(*_, **__):
        for batch in batches:
            return batch
        raise KeyboardInterrupt

    monkeypatch.setattr(sudoku, "generate", interrupted)
    with pytest.raises(SystemExit, match="130"):
        write(tmp_path / "train.jsonl", "--number", "10")
    assert "no file is written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    assert (tmp_path / "train.jsonl").read_text() == "old"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As it is loaded from the folder that `tokenizer` saves."""
    folder = tmp_path_factory.mktemp("tokenizer")
    assert sudoku.main(["tokenizer", "--out", str(folder)]) == 0
    return AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_has_the_digits_the_end_and_the_blank(tokenizer):
    assert tokenizer.convert_ids_to_tokens(range(11)) == [*"123456789", "<|endoftext|>", "."]
    assert len(tokenizer) == 11
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (10, 9, 9)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 81)
    assert tokenizer("9<|endoftext|>.").input_ids == [8, 9, 10]


@given(st.text("123456789.", min_size=81, max_size=81))
def test_the_tokenizer_gives_every_grid_back(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert len(ids) == 81
    assert tokenizer.decode(ids) == text


def test_a_grid_on_nine_lines_with_boxes_and_zeros_is_read_as_one_of_81_characters(tokenizer):
    lines = [PUZZLE[i : i + 9] for i in range(0, 81, 9)]
    boxes = "\n------+-------+------\n".join(
        "\n".join(" | ".join(" ".join(row[i : i + 3]) for i in (0, 3, 6)) for row in lines[band : band + 3])
        for band in (0, 3, 6)
    )
    for pasted in ("\n".join(lines), "\r\n".join(lines) + "\r\n", boxes, boxes.replace(".", "0")):
        assert tokenizer(pasted).input_ids == tokenizer(PUZZLE).input_ids
        assert sudoku.parse(pasted) == (PUZZLE, SOLUTION)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LLaDAModelLM(llada_config(**TOKENS)).save_pretrained(folder)
    sudoku.tokenizer().save_pretrained(folder)
    return folder


def solve(checkpoint: Path, *arguments: str) -> int:
    return sudoku.main(["solve", str(checkpoint), *arguments, "--device", "cpu"])


@pytest.fixture
def knowing(monkeypatch):
    """Makes of a checkpoint a model that answers with these 81 digits, one a little less sure than the last."""

    def patch(digits: str) -> None:
        logits = torch.zeros(81, 11)
        logits[range(81), [digit - 1 for digit in grid(digits)]] = 9 - torch.arange(81) / 81
        logits[:, 9] = 20  # the end of the text, which no cell may hold
        model = ScriptedModel(logits, **TOKENS)
        monkeypatch.setattr(sudoku.AutoModelForCausalLM, "from_pretrained", lambda _: model)

    return patch


@pytest.mark.parametrize(
    "options", [["--steps", "7"], ["--confidence-threshold", "0.1", "--block-length", "81"], ["--steps", "20"]]
)
def test_the_frames_mark_what_each_step_transferred_and_together_they_are_the_blanks(checkpoint, capsys, options):
    assert solve(checkpoint, "--clues", "34", *options) == 1  # who has learnt nothing does not solve
    start, *frames, end = re.split(r"(?m)^(?=step |not solved)", capsys.readouterr().out)
    assert start.startswith("34 clues, 47 blanks")
    assert "[" not in start and start.count(" . ") == 47
    blanks = 47
    for number, frame in enumerate(frames, start=1):
        step, tokens = map(int, re.match(r"step (\d+): (\d+) tokens?\n", frame).groups())
        assert step == number
        assert len(re.findall(r"\[[1-9]\]", frame)) == tokens
        blanks -= tokens
        assert frame.count(" . ") == blanks
    assert blanks == 0
    wrong, passes = map(int, re.match(r"not solved, (\d+) of 47 cells are wrong: (\d+) forward", end).groups())
    assert len(re.findall("![1-9]!", end)) == wrong > 0
    assert passes == len(frames)


def test_a_right_answer_is_a_success(checkpoint, capsys, knowing):
    knowing(SOLUTION)
    assert solve(checkpoint, PUZZLE, "--steps", "8") == 0
    last = capsys.readouterr().out.split("solved: ")[1]
    assert last.startswith("8 forward passes, 8.0 tokens per forward")
    assert re.sub(r"[\s|+-]", "", last.split("\n", 1)[1]) == SOLUTION


def test_a_wrong_answer_is_a_failure_and_its_cells_are_marked(checkpoint, capsys, knowing):
    knowing("9" + SOLUTION[1:])
    assert solve(checkpoint, PUZZLE) == 1
    last = capsys.readouterr().out.split("not solved, 1 of 64 cells are wrong")[1]
    assert re.findall("!(.)!", last) == ["9"]


@pytest.mark.parametrize("no_colour", [False, True])
def test_a_terminal_gets_one_grid_that_changes_in_place(checkpoint, knowing, monkeypatch, no_colour):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", "1" if no_colour else "")
    knowing(SOLUTION)
    assert solve(checkpoint, PUZZLE, "--steps", "8") == 0
    shown = sys.stdout.getvalue()
    first, *frames = re.split("\033\\[15A\033\\[J", shown)
    assert [frame.count("\n") for frame in (first, *frames)] == [15] * 10  # each is drawn from where the last began
    marks = r"\[[1-9]\]" if no_colour else "\033\\[7;32m [1-9] \033\\[0m"
    assert sum(len(re.findall(marks, frame)) for frame in frames) == 64
    assert bool(re.search("\033\\[[0-9;]*m", shown)) is not no_colour


def test_a_puzzle_comes_from_a_file_as_well(checkpoint, tmp_path, capsys, knowing):
    knowing(SOLUTION)
    (tmp_path / "puzzle.txt").write_text("\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9)))
    assert solve(checkpoint, "--file", str(tmp_path / "puzzle.txt")) == 0


@pytest.mark.parametrize(
    "puzzle, says",
    [
        (PUZZLE[:-1], "80 cells"),
        ("x" + PUZZLE[1:], "holds x"),
        ("44" + PUZZLE[2:], "4 twice in row 1"),
        ("4" + PUZZLE[1:], "4 twice in column 1"),
        (PUZZLE[:17] + "4" + PUZZLE[18:], "4 twice in row 2"),
        (PUZZLE[:1] + "4" + PUZZLE[2:], "4 twice in box 1"),
        ("56" + PUZZLE[2:], "no solution"),
        (PUZZLE.replace("7", "."), "several solutions"),
        (SOLUTION, "no blank"),
    ],
)
def test_a_puzzle_that_cannot_be_asked_is_refused_before_a_model_is_loaded(puzzle, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        solve(Path("no such model"), puzzle)
    assert says in capsys.readouterr().err


def test_a_checkpoint_for_something_else_is_refused(checkpoint, tmp_path, capsys):
    elsewhere = Path(__file__).parents[2] / "hub_configs" / "llada-tiny-shakespeare"
    for folder, says in ((elsewhere, "no Sudoku model"), (tmp_path / "nothing", "cannot be used")):
        with pytest.raises(SystemExit, match="2"):
            solve(folder, PUZZLE)
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, says",
    [
        (["--number", "1", "--clues", "10", "12"], "fewer than 17"),
        (["--number", "1", "--clues", "36", "33"], "smaller number first"),
        (["--number", "1", "--clues", "33", "81"], "nothing is left to solve"),
        (["--number", "0"], "--number 0"),
        (["--number", "1", "--device", "nonsense"], "--device nonsense"),
        (["--number", "1", "--exclude", "OUT"], "would replace"),
        (["--number", "1", "--exclude", "BAD"], "line 2"),
        (["--number", "1", "--exclude", "MISSING"], "MISSING"),
    ],
)
def test_arguments_that_cannot_be_are_refused_and_nothing_is_written(options, says, tmp_path, capsys):
    (tmp_path / "BAD").write_text(json.dumps({"text": SOLUTION}) + "\n{}\n")
    paths = [str(tmp_path / option) if option.isupper() else option for option in options]
    with pytest.raises(SystemExit, match="2"):
        sudoku.main(["generate", "--out", str(tmp_path / "OUT"), *paths])
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["BAD"]
