"""For the Shakespeare checkpoints, beside `train.py`: their tokenizer, and the bound that their cards state.

python examples/shakespeare.py tokenizer --text tinyshakespeare.txt --out FOLDER
python examples/shakespeare.py bound CHECKPOINT --text tinyshakespeare.txt

The text: https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import dllm_hf  # noqa: F401  registers the classes
from dllm_hf.training.noising import EPS

CONTEXT = 256
MASK, END = "░", "<|endoftext|>"


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


def held_out(tokens: torch.Tensor) -> torch.Tensor:
    """The last tenth, which `train.py` holds out too."""
    return tokens[len(tokens) - len(tokens) // 10 :]


@torch.no_grad()
def negative_evidence_bound(
    model: PreTrainedModel, tokens: torch.Tensor, levels: int, batch: int = 128, context: int = CONTEXT
) -> float:
    """Nats per token over all of `tokens`, `(number,)`, in windows of `context`.

    Each window is evaluated `levels` times, with noise levels drawn from that many equal intervals; the seed is fixed.
    """
    generator = torch.Generator(tokens.device).manual_seed(0)
    full = len(tokens) // context * context
    batches = [*tokens[:full].view(-1, context).split(batch), tokens[None, full:]]
    total = 0.0
    for windows in batches:
        for level in range(levels if windows.numel() else 0):
            t = (level + torch.rand(len(windows), generator=generator, device=tokens.device)) / levels
            ratio = EPS + (1 - EPS) * t
            masked = torch.rand(windows.shape, generator=generator, device=tokens.device) < ratio[:, None]
            noisy = torch.where(masked, model.config.mask_token_id, windows)
            labels = torch.where(masked, windows, -100)
            total += model(input_ids=noisy, labels=labels, mask_ratio=ratio).loss.item() * windows.numel()
    return total / (levels * len(tokens))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("tokenizer", help="save a tokenizer of the text's characters")
    saving.add_argument("--out", type=Path, required=True, help="the folder to write")
    measuring = commands.add_parser("bound", help="negative evidence bound on the text's last tenth, in float32")
    measuring.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, or a repository of the Hugging Face Hub")
    measuring.add_argument("--levels", type=int, default=64, help="noise levels for each window")
    measuring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for command in (saving, measuring):
        command.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    args = parser.parse_args(argv)
    if not args.text.is_file():
        parser.error(f"--text {args.text} is not a file; where to get the text is said above (--help).")
    try:
        text = args.text.read_text(encoding="utf-8")
        if args.command == "tokenizer":
            character_tokenizer(text).save_pretrained(args.out)
            return
        if args.levels < 1:
            raise ValueError(f"--levels {args.levels} must be at least 1.")
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).to(args.device).eval()
        tokens = held_out(torch.tensor(tokenizer(text, verbose=False).input_ids, device=args.device))
        if not len(tokens):
            raise ValueError(f"--text {args.text} is too short: its last tenth is empty.")
    except (OSError, ValueError) as error:
        parser.exit(2, f"shakespeare.py {args.command}: error: {error}\n")
    loss = negative_evidence_bound(model, tokens, args.levels)
    print(f"{loss:.4f} nats per token (negative evidence bound, {len(tokens):,} tokens, {args.levels} noise levels)")


if __name__ == "__main__":
    sys.exit(main())
