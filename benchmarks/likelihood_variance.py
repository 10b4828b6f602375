"""How much less a bound varies with stratified masks than with masks as LLaDA's paper draws them, for as many forward
passes, and whether the standard error that is told is the one that is: docs/evaluation.md.

    python benchmarks/likelihood_variance.py hub_configs/llada-tiny-shakespeare hub_configs/dream-tiny-shakespeare
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  # registers the models

TEXT = """JULIET:
O Romeo, Romeo! wherefore art thou Romeo?
Deny thy father and refuse thy name;
Or, if thou wilt not, be but sworn my love,
"""


@torch.no_grad()
def as_in_the_paper(model, ids: torch.Tensor, number: int) -> float:
    """One estimate by arXiv:2502.09992, equation 6: the number of masks is drawn uniformly for each of `number` masks."""
    length = ids.shape[1]
    sizes = torch.randint(1, length + 1, (number, 1))
    masked = torch.rand(number, length).argsort(1).argsort(1) < sizes
    logits = model(input_ids=ids.expand(number, -1).masked_fill(masked, model.config.mask_token_id)).logits
    if model.logits_shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    logs = logits.log_softmax(-1).gather(2, ids.expand(number, -1)[..., None])[..., 0]
    return ((logs * masked).sum(1) * length / sizes[:, 0]).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="of families that see the whole canvas")
    parser.add_argument("--masks", type=int, default=32, help="of one estimate (default: 32)")
    parser.add_argument("--estimates", type=int, default=40, help="default: 40")
    arguments = parser.parse_args()
    for name in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        ids = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt")["input_ids"]
        torch.manual_seed(0)
        paper = torch.tensor([as_in_the_paper(model, ids, arguments.masks) for _ in range(arguments.estimates)])
        outputs = [model.log_likelihood(ids, num_samples=arguments.masks, seed=s) for s in range(arguments.estimates)]
        ours = torch.cat([output.log_likelihood for output in outputs])
        told = torch.cat([output.standard_error for output in outputs]).square().mean().sqrt()
        print(
            f"{name}: {ids.shape[1]} tokens, {arguments.masks} masks: {ours.mean() / ids.shape[1]:.3f} nats a token; standard "
            f"deviation of the sum {ours.std():.2f}, told {told:.2f}; as in the paper {paper.mean() / ids.shape[1]:.3f} and "
            f"{paper.std():.2f}: a variance {(paper.var() / ours.var()).item():.0f} times as large"
        )


if __name__ == "__main__":
    main()
