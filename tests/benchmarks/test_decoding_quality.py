"""`benchmarks/decoding_quality.py`: what it counts, on the checkpoints of this repository."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dllm_hf  # noqa: F401  registers the classes
from tests.builders import load_script

ROOT = Path(__file__).parents[2]
TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, and Juliet is the sun.\n" * 40


@pytest.fixture(scope="module")
def script():
    return load_script("benchmarks/decoding_quality.py")


@pytest.fixture(scope="module")
def checkpoint():
    """Tokenizer and model."""
    folder = ROOT / "hub_configs" / "llada-tiny-shakespeare"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def test_the_true_text_is_paid_for_in_the_order_of_the_strategy(script, checkpoint):
    """From left to right, one token a step: the chain rule, computed here by one forward pass for each token."""
    tokenizer, model = checkpoint
    text = torch.tensor(tokenizer(TEXT[:40]).input_ids)[None]
    forcing = script.TeacherForcing(text, tokenizer.mask_token_id, 8)
    setting = {"remasking_strategy": "sequential", "block_length": 8}
    output = script.decode(model, text[:, :16], 24, setting, generation_logits_hook_func=forcing)
    forcing.add_transferred(output.sequences)
    assert torch.equal(output.sequences, text)

    expected = 0.0
    for place in range(16, 40):
        canvas = text.clone()
        canvas[:, place:] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(canvas).logits[0, place]
        logits[tokenizer.mask_token_id] = -torch.inf
        expected -= logits.log_softmax(-1)[text[0, place]].item()
    assert forcing.total.item() == pytest.approx(expected, rel=1e-5)


def test_tokens_transferred_together_are_paid_for_as_if_they_were_independent(script, checkpoint):
    tokenizer, model = checkpoint
    text = torch.tensor(tokenizer(TEXT[:48]).input_ids)[None]
    forcing = script.TeacherForcing(text, tokenizer.mask_token_id, 24)
    setting = {"remasking_strategy": "low_confidence_static", "denoising_steps": 1, "block_length": 24}
    output = script.decode(model, text[:, :24], 24, setting, generation_logits_hook_func=forcing)
    forcing.add_transferred(output.sequences)
    with torch.no_grad():
        canvas = torch.cat([text[:, :24], torch.full((1, 24), tokenizer.mask_token_id)], 1)
        logits = model(canvas).logits[0, 24:]
    logits[:, tokenizer.mask_token_id] = -torch.inf
    expected = -logits.log_softmax(-1).gather(-1, text[0, 24:, None]).sum().item()
    assert forcing.total.item() == pytest.approx(expected, rel=1e-5)


def test_every_setting_of_a_family_s_policies_decodes_a_puzzle(script, tmp_path, monkeypatch):
    """And the figures that are written are those of the puzzles."""
    monkeypatch.setattr(script, "LEVELS", {"33-36 clues": (33, 36)})
    out = tmp_path / "results.jsonl"
    script.main(
        ["measure", str(ROOT / "hub_configs/sdar-tiny-sudoku"), "--rows", "1", "--device", "cpu", "--out", str(out)]
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(script.sudoku_settings(("block", "none")))
    one_by_one = [row for row in rows if script.describe(row) == "`low_confidence_static`"]
    assert all(row["tokens_per_forward"] == pytest.approx(1.0) for row in one_by_one)
    assert one_by_one[0]["solved"] == 1.0
    at_once = [row for row in rows if row.get("steps") == 1]
    assert all(row["nfe"] == 1 and row["solved"] < 1 for row in at_once)


def test_a_report_keeps_what_was_written_by_hand_and_replaces_its_tables(script, tmp_path):
    pytest.importorskip("matplotlib")
    row = {"checkpoint": "a", "device": "CPU", "torch": "1", "transformers": "2", "date": "3", "rows": 4, "nfe": 2.0}
    row |= {"tokens_per_forward": 3.0, "seconds": 1.0, "remasking_strategy": "sequential"}
    results, page = tmp_path / "results.jsonl", tmp_path / "decoding_quality.md"
    results.write_text(json.dumps({**row, "task": "text", "loss": 1.5, "cache_policy": "none"}) + "\n")
    page.write_text("By hand.\n\n" + script.MARKER + "\nold")
    script.main(["report", str(results), "--docs", str(tmp_path)])
    written = page.read_text()
    assert written.startswith("By hand.") and "old" not in written
    assert "| `sequential`, cache none | 1.500, 2.0, 3.0 |" in written
    assert (tmp_path / "decoding_quality_text.png").stat().st_size > 1000


def test_a_text_checkpoint_without_a_text_is_refused(script, tmp_path):
    folder = str(ROOT / "hub_configs/llada-tiny-shakespeare")
    with pytest.raises(SystemExit, match="--text"):
        script.main(["measure", folder, "--out", str(tmp_path / "results.jsonl"), "--device", "cpu"])
