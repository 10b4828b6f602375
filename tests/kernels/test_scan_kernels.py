"""The kernels of GLADream for whole texts against their definitions: outputs and gradients, and what `torch.compile` makes of
them."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers.utils import is_torch_greater_or_equal

pytest.importorskip("triton")

from dllm_hf.gla_dream import attention_gla_dream, scan_kernels
from dllm_hf.gla_dream import gated_linear_attention as module
from dllm_hf.gla_dream.gated_linear_attention import MIN_LOG_DECAY, block_scans, block_states, recurrent_gla
from dllm_hf.gla_dream.scan_kernels import block_reads, takes_scans
from dllm_hf.gla_dream.scan_kernels import block_scans as scans_of_kernels

from ..builders import new_model, pairwise
from ..gla_dream.oracles import DECAYS, TOLERANCES, assert_near, scan_inputs
from .test_kernels import DEVICE

NAMES = ("query", "key", "value", "log_decay")
CLEAN = torch.arange(2 * 44).view(2, 44) % 50
NOISY = CLEAN.masked_fill(CLEAN % 3 == 0, 57)
LABELS = torch.where(NOISY == 57, CLEAN, -100)


def gradients(function, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and the gradient of each input, for random gradients of the outputs."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(**inputs)
    generator = torch.Generator().manual_seed(0)
    read = sum((x.double() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in outputs)
    found = torch.autograd.grad(read, list(inputs.values()))
    return {**dict(zip("ab", outputs)), **dict(zip(inputs, found))}


def by_definition(query, key, value, log_decay):
    return [recurrent_gla(query, key, value, log_decay, reverse=reverse)[0] for reverse in (False, True)]


@pairwise(
    sizes=[(1, 16, 16), (3, 40, 24), (8, 64, 64), (12, 96, 33), (32, 128, 128), (33, 16, 100), (64, 128, 128)],
    decays=list(DECAYS),
    dtype=list(TOLERANCES),
    rows=[1, 2, 6],
)
def test_scans_of_every_block_and_head_size_and_their_gradients(sizes, decays, dtype, rows):
    length, key_dim, value_dim = sizes
    options = {"batch": 6, "heads": 3, "key_dim": key_dim, "value_dim": value_dim, "device": DEVICE}
    inputs = scan_inputs(length, decays, dtype=dtype, **options)
    found = gradients(lambda **each: scans_of_kernels(**each, rows=rows), inputs)
    expected = gradients(by_definition, {name: x.double() for name, x in inputs.items()})
    assert all(found[name].dtype == inputs[name].dtype for name in NAMES)
    assert_near(found, expected, TOLERANCES[dtype])


def test_scans_of_strided_inputs_where_everything_is_large():
    inputs = scan_inputs(64, "near the clamp", batch=3, device=DEVICE)
    inputs = {name: x.mT.contiguous().mT for name, x in inputs.items()}
    inputs |= {name: inputs[name] * 1e8 for name in ("query", "key", "value")}
    inputs["log_decay"].fill_(MIN_LOG_DECAY)
    found = scans_of_kernels(**inputs, rows=1)
    assert_near(
        dict(zip("ab", found)), dict(zip("ab", by_definition(**{n: x.double() for n, x in inputs.items()}))), 1e-4
    )


def test_the_decays_of_a_block_get_nothing_of_a_neighbour_s_gradients():
    """A program takes both, and the sums over its tokens are 0 for a whole block, in tf32 too."""
    inputs = {
        name: x.requires_grad_() for name, x in scan_inputs(8, batch=2, dtype=torch.bfloat16, device=DEVICE).items()
    }
    read = sum((x[1].float() ** 2).sum() for x in scans_of_kernels(**inputs, rows=1))
    (found,) = torch.autograd.grad(read, inputs["log_decay"])
    assert found[0].norm() < 1e-5 * found[1].norm()


@pairwise(
    sizes=[(1, 3, 4), (7, 64, 64), (5, 33, 100), (4, 128, 128)],
    reads_and_adds=[(1, 2), (32, 16), (40, 24), (64, 32)],
    decay=[1e-3, 1.0, 40.0],
    samples=[None, [0, 0, 1, 1, 2, 2, 2], [3, 4, 4, 4, 5, 5, 6]],
)
def test_what_is_read_of_the_states_and_its_gradients(sizes, reads_and_adds, decay, samples):
    (blocks, key_dim, value_dim), (reads, adds) = sizes, reads_and_adds
    generator = torch.Generator().manual_seed(blocks)
    random = lambda *shape: torch.randn(2, blocks, 3, *shape, generator=generator).to(DEVICE)
    inputs = {"queries": random(reads, key_dim), "keys": random(adds, key_dim), "values": random(adds, value_dim)}
    inputs["log_decays"] = -decay * random(key_dim).abs()
    if samples is not None:
        samples = torch.tensor([samples[:blocks], [0] * blocks], device=DEVICE)

    def with_states(queries, keys, values, log_decays):
        return [queries @ block_states(keys.mT @ values, log_decays, samples=samples)[0]]

    found = gradients(lambda **each: [block_reads(**each, samples=samples, is_exact=True)], inputs)
    assert_near(found, gradients(with_states, {name: x.double() for name, x in inputs.items()}), 1e-5)
    rough = gradients(lambda **each: [block_reads(**each, samples=samples, is_exact=False)], inputs)
    assert_near(rough, found, 1e-2)


def test_the_operators_keep_what_pytorch_asks_of_one():
    inputs = scan_inputs(8, batch=4, device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(scans_of_kernels, [*(x.requires_grad_() for x in inputs.values()), 2], test_utils=checks)
    random = lambda *shape: torch.randn(*shape, device=DEVICE, requires_grad=True)
    reads = (random(2, 3, 2, 5, 16), random(2, 3, 2, 4, 16), random(2, 3, 2, 4, 8), random(2, 3, 2, 16), None, True)
    torch.library.opcheck(block_reads, reads, test_utils=checks)


def test_no_text_at_all_has_no_scans_and_no_states():
    inputs = scan_inputs(8, batch=0, device=DEVICE)
    found = gradients(lambda **each: scans_of_kernels(**each, rows=0), inputs)
    assert all(x.shape == inputs["value"].shape for x in found.values())
    shapes = {"queries": (4, 16), "keys": (2, 16), "values": (2, 8), "log_decays": (16,)}
    inputs = {name: torch.randn(0, 3, 2, *shape, device=DEVICE) for name, shape in shapes.items()}
    found = gradients(lambda **each: [block_reads(**each, samples=None, is_exact=True)], inputs)
    assert found["a"].shape == (0, 3, 2, 4, 8)


def test_a_nan_in_one_text_reaches_no_other():
    inputs = scan_inputs(3, batch=4, device=DEVICE)  # of which a program takes five blocks
    expected = scans_of_kernels(**inputs, rows=2)
    for name in NAMES:
        spoilt = {**inputs, name: inputs[name].clone()}
        spoilt[name][1] = float("nan")
        for got, clean in zip(scans_of_kernels(**spoilt, rows=2), expected):
            assert got[1].isnan().all() and torch.equal(got[2:], clean[2:])


def test_code_that_comes_with_a_checkpoint_has_operators_of_its_own(tmp_path):
    """One registered under a name that exists would replace the other, of a model that is loaded already."""
    source = Path(scan_kernels.__file__).read_text().replace("from ..kernels", "from dllm_hf.kernels")
    copy = tmp_path / "copy.py"
    copy.write_text(source.replace("key_dim**-0.5", "2 * key_dim**-0.5"))
    inputs = scan_inputs(4, batch=2, device=DEVICE)
    before = scans_of_kernels(**inputs, rows=1)[0]
    spec = importlib.util.spec_from_file_location("transformers_modules.copy.scan_kernels", copy)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    assert other.NAMESPACE != scan_kernels.NAMESPACE == "dllm_hf"
    assert torch.equal(scans_of_kernels(**inputs, rows=1)[0], before)
    torch.testing.assert_close(other.block_scans(**inputs, rows=1)[0], 2 * before)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels serve on a CPU too, in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr("dllm_hf.gla_dream.scan_kernels.has_kernels", lambda x: True)


def test_a_model_has_the_gradients_of_its_torch_form(kernels, monkeypatch):
    """In packed rows too, of which each sample starts from zeros."""
    packed = torch.cat([torch.arange(20), torch.arange(24)]).expand(2, -1)

    called = []
    for owner, name in ((module, "scans_of_kernels"), (attention_gla_dream, "block_reads")):
        kernel = getattr(owner, name)
        noted = lambda *inputs, name=name, kernel=kernel: called.append(name) or kernel(*inputs)
        monkeypatch.setattr(owner, name, noted)

    def of_parameters(mode, positions):
        model = new_model("gla_dream", attn_mode=mode, mask_token_id=57).to(DEVICE)
        more = {} if positions is None else {"position_ids": positions.to(DEVICE)}
        model(NOISY.to(DEVICE), labels=LABELS.to(DEVICE), **more).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    for positions in (None, packed):
        called.clear()
        found = of_parameters("auto", positions)
        assert called == ["scans_of_kernels", "block_reads"] * new_model("gla_dream").config.num_hidden_layers
        assert_near(found, of_parameters("torch", positions), 1e-4)
        assert len(called) == 2 * new_model("gla_dream").config.num_hidden_layers  # none of `torch`


before_2_11 = pytest.mark.skipif(not is_torch_greater_or_equal("2.11"), reason="PyTorch's option changes nothing")


@pytest.mark.parametrize("autocasts", [False, pytest.param(True, marks=before_2_11)])
def test_compiled_layers_have_the_same_gradients_also_under_autocast(autocasts, kernels):
    """From the kernels, with what examples/adapt.py sets: else float32 has its backward pass in bfloat16."""
    called = set()

    def backend(graph, inputs):
        called.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def of_parameters(compiles):
        torch._dynamo.reset()
        model = new_model("gla_dream", mask_token_id=57).to(DEVICE)
        for layer in model.model.layers if compiles else ():
            layer.compile(backend=backend, fullgraph=True)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocasts):
            loss = model(NOISY.to(DEVICE), labels=LABELS.to(DEVICE)).loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with torch._functorch.config.patch(backward_pass_autocast="off"):
        assert_near(of_parameters(True), of_parameters(False), 1e-4)
    assert called >= {"dllm_hf.block_scans.default", "dllm_hf.block_reads.default"}


def test_an_exported_program_needs_pytorch_alone(kernels):
    model = new_model("gla_dream").to(DEVICE).eval()
    tokens = torch.arange(24, device=DEVICE)[None] % 50
    program = torch.export.export(model, (tokens,), {"use_cache": False})
    assert not [node for node in program.graph.nodes if "dllm_hf" in str(node.target)]
    found, expected = (forward(tokens, use_cache=False).logits for forward in (program.module(), model))
    assert_near({"logits": found}, {"logits": expected}, 1e-5)


@pytest.mark.parametrize("length", [17, 65])  # more than pays, more than a program holds
def test_larger_blocks_have_other_forms(length, kernels):
    inputs = scan_inputs(length, batch=2, device=DEVICE)
    assert takes_scans(inputs["query"], inputs["value"]) == (length <= 64)
    assert_near(dict(zip("ab", block_scans(**inputs))), dict(zip("ab", by_definition(**inputs))), 1e-4)
