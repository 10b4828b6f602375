"""What a tolerance for ties brings and what it costs.

    python benchmarks/tie_tolerance.py [--device cuda] [--rows 24]

For each model and dtype: by how much scores differ that are equal in exact arithmetic; and for several tolerances of
`remasking.rank_of`, how many rows of masks alone depend on the other rows of their batch, and how many steps over texts do
not take the best score. The models are the small checkpoints of `hub_configs/`, and random ones of several confidences.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from dllm_hf import LLaDAConfig, LLaDAModelLM, SDARConfig, SDARForCausalLM
from dllm_hf.generation import remasking, step

HUB = Path(__file__).parents[1] / "hub_configs"
STRATEGIES = ("low_confidence_static", "entropy", "topk_margin")


def models(device):
    """Yields names and models in float32."""
    for family in ("llada", "dream", "sdar"):
        for task in ("shakespeare", "sudoku"):
            folder = HUB / f"{family}-tiny-{task}"
            if (folder / "model.safetensors").exists():
                yield folder.name, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    for scale in (1.0, 4.0, 16.0):
        torch.manual_seed(0)
        sizes = {
            "vocab_size": 4096,
            "init_std": 0.02,
            "mask_token_id": 4000,
            "eos_token_id": 4001,
            "pad_token_id": 4001,
        }
        model = LLaDAModelLM(LLaDAConfig(d_model=1024, n_heads=16, n_layers=8, mlp_hidden_size=2816, **sizes))
        model.lm_head.weight.data *= scale
        yield f"llada-random x{scale:g}", model.to(device).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 4096, "mask_token_id": 4000, "eos_token_id": 4001, "pad_token_id": 4001, "block_size": 8}
    config = SDARConfig(hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, head_dim=64, num_hidden_layers=8, intermediate_size=2816, **sizes)  # fmt: skip
    model = SDARForCausalLM(config)
    model.lm_head.weight.data *= 8
    yield "sdar-random x8", model.to(device).eval()


def mask_rows(model, rows: int) -> list[list[int]]:
    """Canvases of masks alone, of different lengths: every position sees the same, so that all scores are equal in exact
    arithmetic."""
    return [[model.config.mask_token_id] * (4 + 11 * index % 45) for index in range(rows)]


def text_rows(model, rows: int) -> list[list[int]]:
    """Texts that end with sixteen masks."""
    generator = torch.Generator().manual_seed(1)
    limit = min(model.config.vocab_size, model.config.mask_token_id) - 1
    lengths = torch.randint(4, 60, (rows,), generator=generator).tolist()
    texts = [torch.randint(1, limit, (length,), generator=generator).tolist() for length in lengths]
    return [text + [model.config.mask_token_id] * 16 for text in texts]


def batch_of(rows: list[list[int]], device) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class Recorder:
    """Keeps the scores and the choice of each step."""

    def __init__(self):
        self.steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __enter__(self):
        self.select = select = step.select

        def note(rules, rule, scores, is_probability, masked, *others, **kwargs):
            chosen = select(rules, rule, scores, is_probability, masked, *others, **kwargs)
            self.steps.append((scores.cpu(), masked.cpu(), chosen.cpu()))
            return chosen

        step.select = note
        return self

    def __exit__(self, *error):
        step.select = self.select


def by_position(scores, masked, chosen) -> int:
    """The number of rows whose chosen positions are not those of the best scores."""
    count = chosen.sum(-1)
    best = torch.where(masked, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    wrong = 0
    for row in range(len(scores)):
        wrong += set(best[row, : count[row]].tolist()) != set(chosen[row].nonzero().flatten().tolist())
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    arguments = parser.parse_args()
    print(f"{arguments.device}, torch {torch.__version__}")
    for name, model in models(arguments.device):
        for dtype in arguments.dtypes:
            model = model.to(getattr(torch, dtype))
            measure(f"{name} {dtype}", model, arguments)


def widest_gap(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The largest difference between neighbours in rank, of positions whose scores are equal in exact arithmetic:
    `(absolute, relative)`."""
    gaps = [torch.zeros(2)]
    for row, here in zip(scores.double(), masked):
        falling = row[here].sort(descending=True).values
        if len(falling) > 1:
            gap = (falling[:-1] - falling[1:]).max()
            gaps.append(torch.stack([gap, gap / falling.abs().max().clamp(min=1e-300)]).float())
    return torch.stack(gaps).amax(0)


def run(model, rows: list[list[int]], options: dict):
    with Recorder() as recorder:
        return model.diffusion_generate(**batch_of(rows, model.device), **options), recorder.steps


@torch.no_grad()
def measure(name: str, model, arguments) -> None:
    kept = remasking.ABSOLUTE, remasking.RELATIVE
    for strategy in STRATEGIES:
        options = {"max_new_tokens": 0, "remasking_strategy": strategy, "temperature": 0.0, "eos_token_id": []}
        options |= {"suppress_tokens": None, "block_length": 64 if model.block_grid == "prompt" else None}
        options |= {"cache_policy": "dual" if "dual" in model.cache_policies else "block", "disable_compile": True}

        columns, gap, scores = [], torch.zeros(2), None
        for remasking.ABSOLUTE, remasking.RELATIVE in ((0.0, 0.0), (1e-7, 4e-7), kept, (2e-6, 2.0)):
            rows, wrong = mask_rows(model, arguments.rows), 0
            batch, together = run(model, rows, options)
            gap = torch.maximum(gap, widest_gap(*together[0][:2]))
            for index, row in enumerate(rows):
                alone, steps = run(model, [row], options)
                gap = torch.maximum(gap, widest_gap(*steps[0][:2]))
                wrong += alone[0].tolist() != batch[index, -alone.shape[1] :].tolist()
            _, steps = run(model, text_rows(model, arguments.rows), options)
            scores = steps[0][0][steps[0][1]].abs()
            positional = sum(by_position(*step) for step in steps) / (len(steps) * arguments.rows)
            columns.append(f"{remasking.ABSOLUTE:g}, {remasking.RELATIVE:g}: {wrong} rows, {positional:.0%} steps")
        print(f"{name} {strategy}: ties {gap[0]:.2g} apart, relative {gap[1]:.2g}; |scores| {scores.min():.2g} to {scores.max():.2g}")  # fmt: skip
        print("    " + " | ".join(columns), flush=True)
    remasking.ABSOLUTE, remasking.RELATIVE = kept


if __name__ == "__main__":
    main()
