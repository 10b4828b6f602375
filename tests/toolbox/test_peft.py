"""LoRA by `peft`.

`peft` has no list of target modules for these model types: `target_modules` must be given, and "all-linear" works.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ..builders import new_model
from .conftest import TOKENS, decoded, logits_of, training_batch

# Original LLaDA's names of what an adapter can sit on.
ORIGINAL_NAMES = {
    "model.layers.": "model.transformer.blocks.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.down_proj.": ".ff_out.",
    ".mlp.": ".",
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def lora(peft, **options):
    """Adapters that change something from the start, where they are not to be trained."""
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_training_changes_the_adapters_and_nothing_else(peft, family, model, targets):
    if family == "llada2" and targets != "all-linear":
        targets = ["query_key_value"]
    adapted = peft.get_peft_model(model, lora(peft, target_modules=targets, init_lora_weights=True)).train()
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    adapted(**training_batch()).loss.backward()
    optimizer.step()
    changed = {name for name, parameter in adapted.named_parameters() if not parameter.equal(before[name])}
    assert changed == {name for name in before if "lora_B" in name}  # which start at zero, so that A has no gradient


def test_the_loss_falls(peft, model):
    adapted = peft.get_peft_model(model, lora(peft, init_lora_weights=True)).train()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(adapted(**training_batch()).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_saved_adapters_are_loaded_by_peft_and_by_the_auto_class(peft, model, folder, tmp_path):
    adapted = peft.get_peft_model(load(folder), lora(peft)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits_of(adapted)
    assert (expected - logits_of(model)).abs().max() > 0.1
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), expected, atol=0, rtol=0)
    torch.testing.assert_close(logits_of(load(tmp_path / "adapter")), expected, atol=0, rtol=0)


def test_adapters_added_by_the_library_are_saved_and_loaded(peft, folder, tmp_path):
    adapted = load(folder)
    adapted.add_adapter(lora(peft))
    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(load(tmp_path / "adapter")), logits_of(adapted.eval()), atol=0, rtol=0)


def test_adapters_trained_on_the_original_llada_fit(peft, tmp_path):
    from safetensors.torch import load_file, save_file

    adapted = peft.get_peft_model(new_model("llada"), lora(peft)).eval()
    adapted.save_pretrained(tmp_path)
    weights, file = {}, tmp_path / "adapter_model.safetensors"
    for name, weight in load_file(file).items():
        for ours, original in ORIGINAL_NAMES.items():
            name = name.replace(ours, original)
        weights[name] = weight
    assert "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight" in weights
    save_file(weights, file, metadata={"format": "pt"})
    again = peft.PeftModel.from_pretrained(new_model("llada"), tmp_path)
    torch.testing.assert_close(logits_of(again), logits_of(adapted), atol=0, rtol=0)


def test_merged_adapters_give_the_same_logits_and_a_model_like_any_other(peft, family, model, tmp_path):
    adapted = peft.get_peft_model(model, lora(peft)).eval()
    expected = logits_of(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(new_model(family))
    torch.testing.assert_close(logits_of(merged), expected, atol=2e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(load(tmp_path)), logits_of(merged), atol=0, rtol=0)


def test_diffusion_generate_works_through_the_wrapper(peft, model):
    plain = decoded(model)
    adapted = peft.get_peft_model(model, lora(peft)).eval()
    through = decoded(adapted)
    assert through == decoded(adapted.base_model.model) != plain
    options = {"max_new_tokens": 4, "remasking_strategy": "low_confidence_static"}
    assert adapted.generate(input_ids=TOKENS, **options).tolist() == through
    with adapted.disable_adapter():
        assert decoded(adapted) == plain


def test_gradient_checkpointing_reaches_the_adapters(peft, model):
    adapted = peft.get_peft_model(model, lora(peft)).train()

    def gradients():
        adapted.zero_grad()
        adapted(**training_batch()).loss.backward()
        return {name: x.grad.clone() for name, x in adapted.named_parameters() if x.requires_grad}

    expected = gradients()
    adapted.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_the_experts_of_sdar_moe_are_reached_by_their_parameters(peft):
    """They are stacked in one parameter, which "all-linear" does not see."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = new_model("sdar_moe")
    adapted = peft.get_peft_model(model, lora(peft, target_modules=["q_proj"], target_parameters=experts)).train()
    adapted(**training_batch()).loss.backward()
    reached = {name for name, x in adapted.named_parameters() if x.grad is not None and x.grad.any()}
    assert len([name for name in reached if "experts" in name]) == 2 * 2 * 2  # layers, parameters, A and B
    expected = logits_of(adapted.eval())
    torch.testing.assert_close(logits_of(adapted.merge_and_unload()), expected, atol=1e-4, rtol=1e-4)
