"""`DreamEdge` and `load_hf_model`: what document 003 describes."""

import os

import pytest
import torch

from dllm_hf.edge import DreamEdge, StaticCache, load_hf_model, model_loader

from ..builders import new_model
from ..runtimes.comparing import CHECKPOINTS, GOLDEN


@pytest.fixture(params=sorted(CHECKPOINTS))
def loaded(request):
    return load_hf_model(GOLDEN / CHECKPOINTS[request.param], dtype=torch.float32)


@pytest.fixture
def ids():
    return torch.randint(0, 300, (2, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_forward_pass_gives_the_logits_of_the_model(loaded, ids):
    model, model_type, config = loaded
    assert config.model_type == model_type
    logits, cache = model(ids)
    assert cache is None and torch.equal(logits, model.model(ids).logits)


@torch.no_grad()
def test_padding_of_a_mask_is_not_seen(loaded, ids):
    model = loaded[0]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    logits, _ = model(ids, attention_mask=mask)
    torch.testing.assert_close(logits[:1, :4], model(ids[:1, :4])[0], atol=5e-5, rtol=0)
    torch.testing.assert_close(logits[1:], model(ids[1:])[0], atol=5e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_used_as_it_is(loaded, ids, dtype):
    model = loaded[0]
    sees = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    mask = sees if dtype == torch.bool else torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(dtype).min)
    causal, cache = model(ids, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(model(ids, attention_mask=mask)[0], causal, atol=5e-5, rtol=0)
    # Attention that is causal: what comes later changes nothing before it.
    changed, _ = model(ids.flip(0).where(torch.arange(10) > 5, ids), attention_mask=mask)
    torch.testing.assert_close(changed[:, :6], causal[:, :6], atol=5e-5, rtol=0)


@torch.no_grad()
def test_a_pass_goes_on_from_the_cache(loaded, ids):
    """SDAR's blocks are of 4: the first passes end where blocks do, so that the logits are those of the whole text. The others
    see earlier columns as they were when they were written."""
    model, model_type, _ = loaded
    first, cache = model(ids[:, :8], use_cache=True)
    torch.testing.assert_close(first, model(ids[:, :8])[0], atol=5e-5, rtol=0)
    second, again = model(ids[:, 8:], position_ids=torch.tensor([[8, 9]]), past_key_values=cache, use_cache=True)
    assert again is cache and cache.filled == 10
    if model_type == "sdar":
        torch.testing.assert_close(second, model(ids)[0][:, 8:], atol=5e-5, rtol=0)
    rewritten, _ = model(ids, position_ids=torch.arange(10)[None], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rewritten, model(ids)[0], atol=5e-5, rtol=0)


@torch.no_grad()
def test_padding_in_the_cache_is_not_seen(loaded, ids):
    model = loaded[0]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 4:] = 0
    logits, _ = model(ids, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(logits[:1, :4], model(ids[:1, :4])[0], atol=5e-5, rtol=0)


@torch.no_grad()
def test_what_does_not_fit_the_cache_is_refused(ids):
    model = DreamEdge(new_model("dream"))
    ids = ids % 16
    cache = StaticCache.for_model(model.model, 2, 8)
    with pytest.raises(ValueError, match="2 rows of 8 columns, and 2 rows of 10 are needed"):
        model(ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="2 rows of 8 columns, and 1 rows of 4"):
        model(ids[:1, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="use_cache=True"):
        model(ids, past_key_values=cache)


@torch.no_grad()
def test_eight_bits_are_close(ids):
    path = GOLDEN / CHECKPOINTS["dream"]
    (eight, *_), (model, *_) = load_hf_model(path, dtype=torch.qint8, optimize_cpu=True), load_hf_model(path)
    expected = model(ids)[0]
    error = (eight(ids)[0] - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 0.2


@pytest.mark.parametrize("flags, dtype", [("fpu avx512_bf16", torch.bfloat16), ("fpu avx2", torch.float32)])
def test_only_a_dtype_that_the_processor_has_units_for_is_picked(tmp_path, monkeypatch, flags, dtype):
    new_model("dream").bfloat16().save_pretrained(tmp_path)
    (tmp_path / "cpuinfo").write_text(f"flags: {flags}")
    monkeypatch.setattr(model_loader, "CPUINFO", tmp_path / "cpuinfo")
    assert load_hf_model(tmp_path, optimize_cpu=True)[0].model.dtype == dtype
    assert load_hf_model(tmp_path)[0].model.dtype == torch.float32
    assert load_hf_model(tmp_path, dtype=torch.float16, optimize_cpu=True)[0].model.dtype == torch.float16  # as asked


def test_threads_are_the_cores_unless_the_environment_says_how_many(monkeypatch):
    threads = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        model_loader.optimize_for_cpu()
        assert 1 <= torch.get_num_threads() <= (os.cpu_count() or 1)
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        model_loader.optimize_for_cpu()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_other_families_are_refused_by_name(tmp_path):
    new_model("gla_dream").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a .*: `load_hf_model` loads llada, Dream, sdar"):
        load_hf_model(tmp_path)
