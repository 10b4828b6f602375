"""The contract on correctness: outputs of the original implementations, reproduced from their checkpoints."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import dllm_hf  # noqa: F401  registers the families

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/cases.json"))
CASES = [(folder, case) for folder in FOLDERS for case in json.loads((folder / "cases.json").read_text())]

load_model = cache(AutoModelForCausalLM.from_pretrained)
load_tensors = cache(load_file)


@pytest.mark.parametrize("folder, case", CASES, ids=[f"{folder.name}-{case['id']}" for folder, case in CASES])
def test_outputs_equal_those_of_the_original_implementation(folder, case):
    check_case(load_model(folder), folder, case)


def check_case(model, folder, case):
    tensors = {name: tensor.to(model.device) for name, tensor in load_tensors(folder / "cases.safetensors").items()}
    inputs = {name: tensors[f"{case['id']}.in.{name}"] for name in case["inputs"]}
    expected = {name: tensors[f"{case['id']}.out.{name}"] for name in case["expected"]}

    if case["kind"] == "logits":
        with torch.no_grad():
            logits = model(**inputs, **case["call"]).logits
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(logits[real], expected["logits"][real], atol=1e-4, rtol=0)
        return

    options = {"output_history": "history" in expected, "return_dict_in_generate": True}
    output = model.diffusion_generate(**inputs, **case["call"], **options)
    assert output.sequences.tolist() == expected["sequences"].tolist()
    if "history" in expected:
        assert torch.stack(output.history).tolist() == expected["history"].tolist()
    if "nfe" in expected:
        assert output.num_forward_passes <= int(expected["nfe"])
