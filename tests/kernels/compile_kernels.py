"""usage: compile_kernels.py DTYPE FLOATS

Compiles every kernel for an H100 with pointers to DTYPE (bfloat16, float32) and numbers of type FLOATS (fp32, or fp64, as
Inductor passes them), launches nothing, and prints as JSON how many bytes of shared memory a program of each takes.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dllm_hf.generation.remasking import RULES
from dllm_hf.gla_dream.kernels_gla_dream import LARGEST, mix_scans, move_states, read_block, short_convolutions
from dllm_hf.gla_dream.scan_kernels import block_reads, block_scans
from dllm_hf.kernels.attention import Cascade, canvas_attention
from dllm_hf.kernels.best_tokens import best_tokens
from dllm_hf.kernels.columns import copy_columns
from dllm_hf.kernels.eight_bits import ENCODINGS
from dllm_hf.kernels.experts import choose_experts, routed_experts
from dllm_hf.kernels.layers import Float8Rows, add_rms_norm, quantize_rows, rotate_and_store, swiglu
from dllm_hf.kernels.products import few_rows_product
from dllm_hf.kernels.reduce import divide_add_rms_norm, push_add_rms_norm
from dllm_hf.kernels.selection import select_positions

DTYPE, FLOATS = getattr(torch, sys.argv[1]), sys.argv[2]
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
POINTERS |= {torch.uint8: "*u8", torch.int16: "*i16", torch.float8_e4m3fn: "*fp8e4nv", torch.int8: "*i8"}
NUMBERS = {bool: "i1", int: "i32", float: FLOATS}
found: dict[str, int] = {}


def compiled(kernel, *args, grid, warmup, **options) -> None:
    """In the place of `JITFunction.run`, which would launch."""
    given = dict(zip(kernel.arg_names, args)) | {name: x for name, x in options.items() if name in kernel.arg_names}
    constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    signature = {
        name: "constexpr" if name in constants else POINTERS[x.dtype] if torch.is_tensor(x) else NUMBERS[type(x)]
        for name, x in given.items()
    }
    # As a launch does: pointers, and numbers that are multiples of 16, are known to be.
    even = [i for i, name in enumerate(kernel.arg_names) if name not in constants and is_even(given[name])]
    attrs = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    options = {name: x for name, x in options.items() if name not in kernel.arg_names}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found[kernel.__name__] = max(found.get(kernel.__name__, 0), result.metadata.shared)


def is_even(x) -> bool:
    return torch.is_tensor(x) or (type(x) is int and x % 16 == 0)


def new(*shape: int, dtype=DTYPE) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


JITFunction.run = compiled
x, angles, columns = new(1, 32, 4096), new(1, 32, 128), new(1, 32, dtype=torch.long)
# In one part, and with the keys split over programs.
for window, heads, kv_heads in ((32, 32, 8), (4, 4, 1)):
    keys, base = new(kv_heads, 768, 128), new(1, dtype=torch.long)
    query, lengths, runs = new(1, window, heads, 128), new(1, window, dtype=torch.int32), new(2, 3, dtype=torch.long)
    canvas_attention(query, keys, keys, lengths, base, 768, 0.1)
    canvas_attention(query, keys, keys, lengths, base.repeat(2), 768, 0.1, runs, window)
    canvas_attention(query, keys, keys, lengths, base.repeat(2), 768, 0.1, runs, window, base.repeat(2, 2))
    canvas_attention(query, keys, keys, lengths, base.repeat(2), 768, 0.1, runs, window, own=base.repeat(3, 2))
    small, scales = new(kv_heads, 768, 128, dtype=torch.uint8), new(kv_heads, 768, 2, dtype=torch.bfloat16)
    places = (base.repeat(2, 2), base.repeat(3, 2))
    for encoding in ENCODINGS:
        canvas_attention(
            query, small, small, lengths, base.repeat(2), 768, 0.1, runs, window, *places, scales, encoding
        )
cascade = Cascade(lengths, base.repeat(2), runs, 64, base.repeat(2))
for arena in ((keys, keys, None, None), *((small, small, scales, encoding) for encoding in ENCODINGS)):
    sees = (lengths, base.repeat(2), 768, 0.1, runs, window, places[0], None, *arena[2:])
    canvas_attention(query, *arena[:2], *sees, cascade=cascade)
for each in (keys, small, scales):
    copy_columns(each, new(2, 3, dtype=torch.long), 40)
for residual, rounds_once in ((None, True), (x, False)):
    for quantizes in (False, True):
        add_rms_norm(x, residual, new(4096), 1e-6, rounds_once, quantizes)
for ranks in (2, 8):
    addresses, both = new(ranks, dtype=torch.long), new(2, ranks, dtype=torch.long)
    push_add_rms_norm(x, addresses, 0, 512, x, new(4096), 1e-6)
    for is_whole in (False, True):
        divide_add_rms_norm(addresses, both, 0, x, new(4096), 1e-6, both, is_whole, ranks == 2)
for quantizes in (False, True):
    swiglu(x, x, quantizes)
quantize_rows(x)
scales = new(6144, 1, dtype=torch.float32)
for number in (4, 32, 64):
    few_rows_product(
        Float8Rows.empty((number, 4096), x.device), new(6144, 4096, dtype=torch.float8_e4m3fn), scales, new(6144), DTYPE
    )
    if DTYPE != torch.float32:
        few_rows_product(new(number, 4096), new(6144, 4096, dtype=torch.int8), scales, None, DTYPE)
keys = new(8, 64, 128)
for norms in ((), (new(128), new(128), 1e-6)):
    rotate_and_store(x, x[..., :1024], x[..., :1024], angles, angles, columns, keys, keys, *norms)
small, scales = new(8, 64, 128, dtype=torch.uint8), new(8, 64, 2, dtype=torch.bfloat16)
for encoding in ENCODINGS:
    rotate_and_store(x, x[..., :1024], x[..., :1024], angles, angles, columns, small, small, *norms, scales, encoding)
best_tokens(new(1, 32, 126464), 5)
for size in (4, 64):
    scores, numbers, flags = (
        new(2, size, dtype=torch.float32),
        new(2, 1, dtype=torch.long),
        new(2, 64, dtype=torch.bool),
    )
    bounds = [scores[:, :1]] * 3
    select_positions(RULES, (5e-7, 4e-6), numbers, scores, scores, flags[:, :1], flags[:, :size], numbers, *bounds)
logits = new(32, 256, dtype=torch.float32)
weights, chosen = choose_experts(logits, 8, True, logits[0], 8, 4, 2.5)
choose_experts(new(32, 96), 8, False)
for inside, number in ((512, 2), (768, 256)):
    routed_experts(
        new(512, 2048),
        chosen.repeat(16, 1),
        weights.repeat(16, 1),
        new(number, 2 * inside, 2048),
        new(number, 2048, inside),
    )
state = new(1, 16, 128, 128, dtype=torch.float32)
# The largest block takes the most memory where its numbers do too: in float32.
size, rank = (LARGEST[0], LARGEST[3]) if DTYPE == torch.float32 else (32, 16)
for is_global, moves_on in ((False, False), (DTYPE == torch.bfloat16, True)):
    block, turns = new(1, size, 4096), new(1, size, 128)
    parts = block.split((2048, 1024, 1024), dim=-1)
    short_convolutions(parts, [new(part.shape[2], 1, 5) for part in parts])
    _, *ends = read_block(
        *parts, block[..., :rank], new(1024, rank), new(1024), turns, turns, state, base, new(128), 1e-6, 16.0, is_global,
        moves_on,
    )  # fmt: skip
for keeps in (False, True):
    move_states(state, base, *ends[:2], new(1, 2048), new(1, dtype=torch.int32), keeps)
# Operators lose what their kernels would have written: only the launch is wanted.
query, wide = new(2, 64, 1, 128).requires_grad_(), new(2, 4, 1, 32, 128, dtype=torch.float32).requires_grad_()
block_scans(query, query, query, new(2, 64, 1, 128, dtype=torch.float32), 1)[0].sum().backward()
for samples in (None, new(2, 4, dtype=torch.long)):
    block_reads(wide, wide, wide, wide[..., 0, :], samples, False).sum().backward()
mix_scans(x, x[..., :2048], x[..., :2048])
print(json.dumps(found))
