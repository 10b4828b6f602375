"""`benchmarks/draft_steps.py`: what drafts save on the Shakespeare checkpoints of this repository."""

import pytest

from tests.builders import load_script


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_four_drafts_save_passes_on_text_and_change_none_of_it(family, monkeypatch):
    """One of the benchmark's eight texts; 1.6 times fewer were asked for."""
    script = load_script("benchmarks/draft_steps.py")
    monkeypatch.setattr(script, "SPEAKERS", ("ROMEO",))
    options = {"block_length": 32, "cache_policy": "dual"}
    (alone, _, _, texts), (drafted, _, steps, same) = (
        script.shakespeare(family, d, 1, "cpu", **options) for d in (0, 4)
    )
    assert same == texts and alone == 192
    assert alone / drafted >= 1.6
    assert sum(steps) + 6 == alone  # the first pass of each block has no drafts
