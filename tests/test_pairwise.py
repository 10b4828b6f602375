"""`pairwise`, by which tests are sampled."""

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from .pairwise import pairwise


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4, unique=True), min_size=2, max_size=4))
def test_each_value_of_a_parameter_meets_each_value_of_every_other_one(parameters):
    found = pairwise(*parameters)
    assert len(found) == len(set(found)) and set(found) <= set(product(*parameters))
    for first, second in combinations(range(len(parameters)), 2):
        met = {(each[first], each[second]) for each in found}
        assert met == set(product(parameters[first], parameters[second]))
