"""Measures on a GPU have the numbers of the CPU."""

import pytest
import torch

from ..builders import BUILDERS, left_pad, new_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", BUILDERS)
def test_a_likelihood_is_that_of_the_cpu(family):
    rows = left_pad([[(7 * index + 3) % 59 for index in range(length)] for length in (3, 17, 30)])
    options = {"num_samples": 32, "batch_size": 16}
    expected = new_model(family).log_likelihood(**rows, **options)
    model = new_model(family).cuda()
    found = model.log_likelihood(**{name: value.cuda() for name, value in rows.items()}, **options)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(found.standard_error, expected.standard_error, atol=1e-2, rtol=1e-2)
    assert found.num_forward_passes == expected.num_forward_passes
