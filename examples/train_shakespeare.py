"""Train a character-level LLaDA on a text file and save it as a folder that `from_pretrained` loads.

python examples/train_shakespeare.py --text tinyshakespeare.txt --out llada-tiny-shakespeare

The text: https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from dllm_hf.generation.configuration import DiffusionGenerationConfig
from dllm_hf.llada import LLaDAConfig, LLaDAModelLM

CONTEXT = 256
BLOCK = 32
MASK, END = "░", "<|endoftext|>"
EPS = 1e-3  # the lowest mask probability, as in LLaDA
SIZE = {"d_model": 160, "n_heads": 5, "n_layers": 6, "mlp_hidden_size": 448}  # 1.93M parameters, 3.9 MB in bfloat16
GENERATION = {
    "max_new_tokens": 192,
    "block_length": BLOCK,
    "temperature": 0.7,
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.6,
    "cache_policy": "none",
}


def character_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """One token per character. A character that the text does not have is read as a space."""
    if MASK in text or END in text:
        raise ValueError(f"The text holds {MASK!r} or {END!r}, which stand for the mask and the end here.")
    vocabulary = [*sorted({*text, " "}), END, MASK]
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        mask_token=MASK,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def stratified(rows: int, generator: torch.Generator) -> torch.Tensor:
    """`(rows,)` mask probabilities, one from each of `rows` equal slices of [EPS, 1], in random order."""
    device = generator.device
    slices = torch.randperm(rows, generator=generator, device=device)
    return EPS + (1 - EPS) * (slices + torch.rand(rows, generator=generator, device=device)) / rows


def noise(tokens: torch.Tensor, ratio: torch.Tensor, mask_id: int, generator: torch.Generator):
    """`tokens`, each masked with probability `ratio` (broadcast), and labels: the clean token there, -100 elsewhere."""
    masked = torch.rand(tokens.shape, generator=generator, device=tokens.device) < ratio
    return torch.where(masked, mask_id, tokens), torch.where(masked, tokens, -100)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, tokens: torch.Tensor, levels: int, batch: int = 128, context: int = CONTEXT
) -> float:
    """Negative evidence bound in nats per character over all of `tokens`, in windows of `context`.

    Each window is seen once in each of `levels` equal slices of the noise; the seed is fixed.
    """
    generator = torch.Generator(tokens.device).manual_seed(0)
    full = len(tokens) // context * context
    batches = [*tokens[:full].view(-1, context).split(batch), tokens[None, full:]]
    total = 0.0
    for windows in batches:
        for level in range(levels if windows.numel() else 0):
            t = (level + torch.rand(len(windows), generator=generator, device=tokens.device)) / levels
            ratio = EPS + (1 - EPS) * t
            noisy, labels = noise(windows, ratio[:, None], model.config.mask_token_id, generator)
            total += model(input_ids=noisy, labels=labels, mask_ratio=ratio).loss.item() * windows.numel()
    return total / (levels * len(tokens))


def train(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    held_out: torch.Tensor,
    args: argparse.Namespace,
    context: int = CONTEXT,
) -> None:
    device = tokens.device
    generator = torch.Generator(device).manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
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
        starts = torch.randint(len(tokens) - context + 1, (args.batch, 1), generator=generator, device=device)
        clean = tokens[starts + torch.arange(context, device=device)]
        ratio = stratified(args.batch, generator)
        noisy, labels = noise(clean, ratio[:, None], model.config.mask_token_id, generator)
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
            line = f"step {step}/{args.steps}  train loss {mean.item():.3f}  {ms:.1f} ms per step"
            if step % (10 * args.log_every) == 0:
                line += f"  held out (4 noise levels) {held_out_loss(model, held_out, 4, context=context):.3f}"
            print(line, flush=True)
            mean.zero_()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file; its last tenth is held out")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=256, help=f"sequences of {CONTEXT} characters per step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--eval-levels", type=int, default=64, help="noise levels of the held-out loss")
    args = parser.parse_args(argv)
    if not args.text.is_file():
        parser.error(f"--text {args.text} is not a file; where to get the text is said above (--help).")
    text = args.text.read_text(encoding="utf-8")
    tokenizer = character_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids, device=args.device)
    training, held_out = tokens.split([len(tokens) * 9 // 10, len(tokens) - len(tokens) * 9 // 10])
    if len(training) < CONTEXT:
        parser.error(f"--text {args.text} has {len(text)} characters: at least {CONTEXT * 10 // 9 + 1} are needed.")

    torch.manual_seed(args.seed)
    special = {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    config = LLaDAConfig(vocab_size=len(tokenizer), max_sequence_length=CONTEXT, rope_theta=1e4, **SIZE, **special)
    model = LLaDAModelLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(training):,} characters to learn from")
    try:
        train(model, training, held_out, args)
    except KeyboardInterrupt:
        print("Interrupted: what has been learnt so far is evaluated and saved.")

    model.generation_config = DiffusionGenerationConfig(**GENERATION, **special)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"Saved in {args.out}. What follows is measured on the saved weights, in float32.")
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    loss = held_out_loss(model, held_out, args.eval_levels)
    print(f"held-out loss {loss:.4f} nats per character (negative evidence bound, {args.eval_levels} noise levels)")
    prompt = tokenizer("ROMEO:\n", return_tensors="pt").to(args.device)
    sample = model.diffusion_generate(**prompt, generator=torch.Generator(args.device).manual_seed(args.seed))
    print(tokenizer.decode(sample[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
