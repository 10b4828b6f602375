"""Does GLADream learn? Beside an SDAR and a Dream of its size on a text, and on recall across twenty blocks.

usage: gla_dream_learning.py text --text tinyshakespeare.txt [--models boundary global cut sdar dream] [--seeds 0 1 2]
       gla_dream_learning.py recall [--models boundary global cut] [--seeds 0 1 2]

`text`: character by character, blocks of 32, context 512; prints the negative evidence bound in nats per character on
the last tenth of the text. `recall`: the first block holds a pair of a key and a value (or several) among filler, a later block
asks for the value; training asks after 1 to 20 blocks, the accuracy printed is that of `diffusion_generate` after 20.
`cut` is GLADream with the state taken away, so that blocks cannot see each other; its mode of injection is the default.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

from dllm_hf import DreamConfig, DreamModel, GLADreamConfig, GLADreamModel, SDARConfig, SDARForCausalLM
from dllm_hf.training.noising import mask_sequences

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from shakespeare import character_tokenizer, negative_evidence_bound  # noqa: E402

BLOCK, CONTEXT = 32, 512
KEYS = VALUES = FILLERS = 32
DISTANCE = 20
QUESTION, RECALL_MASK = KEYS + VALUES + FILLERS, KEYS + VALUES + FILLERS + 1


def build(
    name: str, width: int, layers: int, vocab: int, mask: int, context: int, heads: int = 4, tied: bool = False, **gla
):
    """A model of the family. The feed-forward networks of SDAR and Dream are wider, so that all models have about as many
    parameters as GLADream with its gates."""
    shape = {"vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    shape |= {"num_key_value_heads": heads, "max_position_embeddings": context, "mask_token_id": mask}
    shape |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    narrow, wide = width * 11 // 4, width * 71 // 16
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    if name == "dream":
        return DreamModel(DreamConfig(intermediate_size=wide, **shape, **rope))
    if name == "sdar":
        shape["head_dim"] = width // 4
        return SDARForCausalLM(SDARConfig(intermediate_size=wide, block_size=BLOCK, **shape, **rope))
    mode = gla if name == "cut" else {"inter_block_injection_mode": name, **gla}
    if tied:
        mode["share_inter_intra_gate_weights"] = True
        narrow += width * 2 // 3
    model = GLADreamModel(GLADreamConfig(intermediate_size=narrow, block_size=BLOCK, **mode, **shape, **rope))
    if name == "cut":
        for layer in model.model.layers:
            layer.self_attn._injected = lambda *args: (0.0, 0.0)
    return model


def drop_out(model, rate: float) -> None:
    """Add dropout to the outputs of each layer's attention and feed-forward network, the same for every family."""

    def hook(module, inputs, output):
        if isinstance(output, tuple):
            return F.dropout(output[0], rate, module.training), *output[1:]
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(hook)
        layer.mlp.register_forward_hook(hook)


def train(model, tokens: torch.Tensor, args: argparse.Namespace) -> None:
    """`transformers.Trainer` is not used: here the noise is drawn on the GPU, and is the same for every model."""
    device = tokens.device
    generator = torch.Generator(device).manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    warmup = min(200, max(1, args.steps // 10))
    decay = lambda step: 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, args.steps - warmup))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: (s + 1) / warmup if s < warmup else decay(s))
    forward = torch.compile(model) if args.compile else model
    mean, began = torch.zeros((), device=device), time.perf_counter()
    for step in range(1, args.steps + 1):
        starts = torch.randint(len(tokens) - CONTEXT + 1, (args.batch, 1), generator=generator, device=device)
        clean = tokens[starts + torch.arange(CONTEXT, device=device)]
        noisy, labels, ratio = mask_sequences(
            clean, torch.ones_like(clean, dtype=torch.bool), model.config.mask_token_id, generator=generator
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = forward(input_ids=noisy, labels=labels, mask_ratio=ratio).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean += loss.detach() / args.log_every
        if step % args.log_every == 0:
            ms = 1000 * (time.perf_counter() - began) / step
            print(f"step {step}/{args.steps}  train loss {mean.item():.3f}  {ms:.1f} ms per step", flush=True)
            mean.zero_()


def gla_of(args: argparse.Namespace) -> dict:
    return {"gate_logit_normalizer": args.gate_logit_normalizer, "conv_size": args.conv_size}


def learn_text(name: str, seed: int, args) -> str:
    text = args.text.read_text(encoding="utf-8")
    tokenizer = character_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids, device=args.device)
    training, held_out = tokens.split([len(tokens) * 9 // 10, len(tokens) - len(tokens) * 9 // 10])
    torch.manual_seed(seed)
    model = build(name, 256, 6, len(tokenizer), tokenizer.mask_token_id, CONTEXT, args.heads, args.tied, **gla_of(args))
    model.to(args.device)
    if args.dropout:
        drop_out(model, args.dropout)
    args.seed = seed
    torch.set_float32_matmul_precision("high")  # for products that autocast leaves in float32
    began = time.perf_counter()
    train(model, training, args)
    took = time.perf_counter() - began
    torch.set_float32_matmul_precision("highest")
    bound = negative_evidence_bound(model.eval(), held_out, args.eval_levels, context=CONTEXT)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{parameters:,} parameters, bound {bound:.4f} nats per character, trained {took:.0f} s"


def recall_batch(rows: int, pairs: int, distance: torch.Tensor, generator: torch.Generator):
    """Texts in which pairs of the first block are asked for again in block `distance`, `(rows,)`.

    Returns:
        `(rows, length)` noisy tokens, with masks for the answers, and the labels.
    """
    device = generator.device
    length = (DISTANCE + 1) * BLOCK

    def draw(number: int, kinds: int) -> torch.Tensor:
        """`(rows, number)` different numbers below `kinds`."""
        return torch.rand(rows, kinds, generator=generator, device=device).argsort(-1)[:, :number]

    tokens = torch.randint(KEYS + VALUES, KEYS + VALUES + FILLERS, (rows, length), generator=generator, device=device)
    keys = draw(pairs, KEYS)
    values = KEYS + torch.randint(VALUES, (rows, pairs), generator=generator, device=device)
    # Pairs begin at even columns of the first block; questions, of three tokens, at multiples of four of the later one.
    columns = 2 * draw(pairs, BLOCK // 2)
    tokens.scatter_(1, columns, keys).scatter_(1, columns + 1, values)
    order = draw(pairs, pairs)
    columns = distance[:, None] * BLOCK + 4 * draw(pairs, BLOCK // 4)
    tokens.scatter_(1, columns, QUESTION).scatter_(1, columns + 1, keys.gather(1, order))
    labels = torch.full_like(tokens, -100).scatter_(1, columns + 2, values.gather(1, order))
    return tokens.scatter_(1, columns + 2, RECALL_MASK), labels


def learn_recall(name: str, seed: int, args) -> str:
    torch.manual_seed(seed)
    generator = torch.Generator(args.device).manual_seed(seed)
    context = (DISTANCE + 1) * BLOCK
    model = build(name, 128, 3, RECALL_MASK + 1, RECALL_MASK, context, args.heads, args.tied, **gla_of(args))
    model.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 200)
    forward = torch.compile(model) if args.compile else model
    began, mean = time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        distance = torch.randint(1, DISTANCE + 1, (args.batch,), generator=generator, device=args.device)
        noisy, labels = recall_batch(args.batch, args.pairs, distance, generator)
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.device != "cpu"):
            loss = forward(input_ids=noisy, labels=labels, mask_ratio=torch.ones(len(noisy), device=args.device)).loss
        loss = loss * labels.numel() / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        mean = loss.detach() if step == 1 else 0.99 * mean + 0.01 * loss.detach()
        if step % args.log_every == 0:
            print(f"  {name} seed {seed} step {step}: loss {float(mean):.3f}", flush=True)
    took = time.perf_counter() - began
    model.eval()
    noisy, labels = recall_batch(512, args.pairs, torch.full((512,), DISTANCE, device=args.device), generator)
    asked = labels != -100
    correct = 0
    for texts, answers, places in zip(noisy.split(64), labels.split(64), asked.split(64)):
        filled = model.diffusion_generate(texts, max_new_tokens=0)
        correct += int((filled == answers)[places].sum())
    return f"accuracy after {DISTANCE} blocks {correct / int(asked.sum()):.4f} (chance {1 / VALUES:.4f}), trained {took:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["text", "recall"])
    parser.add_argument("--text", type=Path, help="a UTF-8 text file; its last tenth is held out")
    parser.add_argument("--models", nargs="+", default=["boundary", "global", "cut", "sdar", "dream"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--pairs", type=int, default=1, help="of a key and a value, in a text of the recall task")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices, on the text")
    parser.add_argument("--dropout", type=float, default=0.0, help="after attention and feed-forward, on the text")
    parser.add_argument("--gate-logit-normalizer", type=float, default=16, help="GLADream's")
    parser.add_argument("--conv-size", type=int, default=0, help="GLADream's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--eval-levels", type=int, default=64, help="noise levels of the held-out bound")
    args = parser.parse_args()
    if args.task == "text" and (args.text is None or not args.text.is_file()):
        parser.error(f"--text {args.text} is not a file.")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}: {' '.join(sys.argv[1:])}")
    for name in args.models:
        for seed in args.seeds:
            torch.compiler.reset()
            found = learn_text(name, seed, args) if args.task == "text" else learn_recall(name, seed, args)
            print(f"{args.task} {name} seed {seed}: {found}", flush=True)


if __name__ == "__main__":
    main()
