"""`examples/edge_sudoku.py`: its puzzle can be solved, and what it calls solved is."""

import torch

from tests.builders import load_script

edge_sudoku, sudoku = load_script("examples/edge_sudoku.py"), load_script("examples/sudoku.py")
PUZZLE = edge_sudoku.PUZZLE


def test_the_puzzle_has_one_solution_and_only_that_one_counts():
    cells = torch.tensor([[int(cell) for cell in PUZZLE.replace(".", "0")]])
    number, grids = sudoku.solutions(cells)
    solution = "".join(map(str, grids[0].tolist()))
    assert number.tolist() == [1] and edge_sudoku.is_solved(PUZZLE, solution)
    swapped = solution.translate(str.maketrans("12", "21"))  # a valid grid of other clues
    assert not edge_sudoku.is_solved(PUZZLE, swapped) and edge_sudoku.is_solved("." * 81, swapped)
    assert not edge_sudoku.is_solved("." * 81, solution[1:] + solution[0])
