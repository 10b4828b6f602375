"""Kernels compiled ahead."""

import threading

import pytest
import torch

from dllm_hf.fused.stack import FusedStack
from dllm_hf.kernels.ahead import compiled_ahead
from dllm_hf.kernels.layers import _swiglu, swiglu, swiglu_torch

from ..builders import as_list, new_model, window_of

pytestmark = pytest.mark.gpu


def test_inside_kernels_are_compiled_and_not_launched():
    gate, up = torch.randn(2, 1, 3, 200, device="cuda", dtype=torch.float16)
    cache = _swiglu.device_caches[torch.cuda.current_device()][0]
    before, found = len(cache), []
    with compiled_ahead():
        poisoned = torch.full_like(gate, 7.0)
        _swiglu[(3, 1)](gate, up, poisoned, 200, 200, 200, BLOCK=256, num_warps=4)
        other = threading.Thread(target=lambda: found.append(swiglu(gate.bfloat16(), up.bfloat16())))
        other.start()
        other.join()
    assert len(cache) > before and (poisoned == 7).all()
    torch.testing.assert_close(found[0], swiglu_torch(gate.bfloat16(), up.bfloat16()))
    torch.testing.assert_close(swiglu(gate, up), swiglu_torch(gate, up))


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_a_pass_gives_the_same_whether_its_kernels_were_compiled_ahead(family, monkeypatch):
    model = new_model(family).cuda()
    tokens, columns = torch.randint(60, (2, 8), device="cuda"), torch.arange(8, device="cuda").expand(2, 8)
    found = []
    for is_ahead in (True, False):
        if not is_ahead:
            monkeypatch.setattr(FusedStack, "_compile_for", lambda *_: None)
        stack, cache = FusedStack.of(model), model.make_cache(20)
        stack.prepare(cache, 2)
        found.append(stack(tokens.flatten(), as_list(window_of(columns, columns)), cache))
    assert torch.equal(*found)
