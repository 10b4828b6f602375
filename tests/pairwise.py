"""Combinations of parameters for tests that are too slow for all of them."""

from collections.abc import Collection
from itertools import combinations, product
from typing import Any


def pairwise(*parameters: Collection[Any]) -> list[tuple]:
    """Combinations, some of all, in which each value of a parameter meets each value of every other one."""
    every = list(product(*(range(len(values)) for values in parameters)))
    pairs = lambda combination: set(combinations(enumerate(combination), 2))
    left = set().union(*map(pairs, every))
    chosen = []
    while left:
        best = max(every, key=lambda combination: len(pairs(combination) & left))
        chosen.append(best)
        left -= pairs(best)
    values = [list(each) for each in parameters]
    return [tuple(of[index] for of, index in zip(values, combination)) for combination in sorted(chosen)]
