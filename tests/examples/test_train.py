"""`examples/train.py` on small files: what it reads, what it refuses, and what it leaves behind when it is killed."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tests.builders import load_script

pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train.py"
SHAKESPEARE = ROOT / "hub_configs" / "llada-tiny-shakespeare"
RUN = (
    "--max_steps 4 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --context 16 --use_cpu --report_to none "
    "--eval_strategy steps --eval_steps 2 --logging_steps 1 --disable_tqdm true --save_strategy no --learning_rate 1e-2"
).split()
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def script():
    return load_script("examples/train.py")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A configuration of a layer of 16, with the tokenizer of the checkpoint beside it and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(SHAKESPEARE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 24}
    values = json.loads((SHAKESPEARE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **sizes}))
    shutil.copy(SHAKESPEARE / "generation_config.json", folder)
    return folder / "config.json"


def write(path: Path, rows: list | str) -> Path:
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    return path


TEXT = "".join(random.Random(0).choices(["wherefore ", "art thou, ", "sweet night? ", "Ay.\n"], k=60))
INFILLING = [{"text": "abcdefgh", "masked": "ab░░ef░h"}] * 20
RAGGED = [{"text": "abcdefgh"[:length], "masked": "ab░░░░░░"[:length]} for length in (3, 8, 5, 6)] * 5
ANSWERS = [{"prompt": "what? ", "completion": "this"}, {"prompt": "and then? ", "completion": "no"}] * 10
CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 20


@pytest.fixture
def train(script, config, tmp_path):
    """Runs the script on rows or a text, and gives its output folder and what it printed."""

    def run(rows, *options, model=config):
        suffix = ".txt" if isinstance(rows, str) else ".jsonl"
        data = write(tmp_path / f"data{suffix}", rows)
        folder = tmp_path / "out"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            script.main(["--model", str(model), "--dataset", str(data), "--output_dir", str(folder), *RUN, *options])
        return folder, printed.getvalue()

    return run


# --- what it reads


@pytest.mark.parametrize(
    "rows, options",
    [
        (TEXT, ["--stride", "8"]),
        ([{"text": line} for line in TEXT.split("\n")], []),
        (INFILLING, ["--schedule", "dream", "--weighting", "cart"]),
        (RAGGED, []),
        (ANSWERS, ["--eos_padding"]),
        (ANSWERS, ["--packing", "--context", "32"]),
        (CHATS, ["--context", "32"]),
        (CHATS, ["--context", "64", "--packing"]),
    ],
    ids=["text", "documents", "infilling", "ragged infilling", "answers", "packed answers", "chats", "packed chats"],
)
def test_each_kind_of_rows_trains_and_is_evaluated_and_sampled(train, rows, options):
    folder, printed = train(rows, *options)
    assert printed.count("'eval_loss'") == 2
    assert "--- step 2\n" in printed and "--- step 4\n" in printed and "Saved in" in printed
    for sample in printed.split("--- step ")[1:]:
        assert "░" not in sample.split("---")[0]
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_tokenizer_that_does_not_name_its_mask_takes_the_model_s(script, train, config, tmp_path):
    """As LLaDA's published one, whose mask is an added token."""
    folder = shutil.copytree(config.parent, tmp_path / "unnamed")
    tokenizer = AutoTokenizer.from_pretrained(folder, mask_token=None)
    assert tokenizer.mask_token is None and "░" in tokenizer.get_vocab()
    tokenizer.save_pretrained(folder)
    out, printed = train(INFILLING, model=folder / "config.json")
    assert "'eval_loss'" in printed and "'eval_loss': '0'," not in printed
    assert AutoTokenizer.from_pretrained(out).mask_token == "░"


def test_what_it_saves_decodes(train):
    folder, _ = train(TEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.block_length == 32  # of the folder that the configuration came from
    prompt = tokenizer("Ay, ", return_tensors="pt")
    sequences = model.diffusion_generate(**prompt, max_new_tokens=8)
    assert sequences.shape == (1, 12)
    assert "░" not in tokenizer.decode(sequences[0])


def test_a_folder_that_holds_a_model_is_not_written_over(train):
    folder, _ = train(TEXT, "--max_steps", "1")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="--output_dir .* name another folder"):
        train(TEXT, "--max_steps", "1")
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_checkpoint_is_trained_further(train, tmp_path):
    folder, _ = train(TEXT, "--save_dtype", "float32")
    first = shutil.move(folder, tmp_path / "first")
    again, _ = train(TEXT, "--save_dtype", "float32", "--learning_rate", "0", model=first)
    before, after = (load_file(Path(place) / "model.safetensors") for place in (first, again))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_prompt_is_continued_after_each_evaluation(train):
    _, printed = train(TEXT, "--sample_prompt", "Ay, art")
    assert printed.count("\nAy, art") == 2


def test_a_dataset_may_be_held_out_by_name(train, tmp_path):
    held_out = write(tmp_path / "held_out.txt", TEXT[:100])
    assert "'eval_loss'" in train(TEXT, "--eval_dataset", str(held_out))[1]


def test_texts_whose_prompt_fills_the_row_are_left_out(train):
    _, printed = train([{"prompt": "far too long a question", "completion": "yes"}, *ANSWERS])
    assert "1 of 19 texts are left out" in printed


@pytest.mark.parametrize("family, schedule", [("sdar", "complementary"), ("gla_dream", "llada"), ("dream", "dream")])
def test_other_families_train_too(train, config, tmp_path, family, schedule):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes |= {"intermediate_size": 24, "vocab_size": 67, "max_position_embeddings": 64, "mask_token_id": 66}
    sizes |= {"eos_token_id": 65, "pad_token_id": 65, "bos_token_id": None}
    if family != "dream":
        sizes |= {"block_size": 4}
    folder = tmp_path / family
    shutil.copytree(config.parent, folder)
    (folder / "generation_config.json").unlink()
    from dllm_hf.families import lines_of

    lines_of({"dream": "Dream"}.get(family, family))[0][0](**sizes).save_pretrained(folder)
    out, printed = train(INFILLING, "--schedule", schedule, model=folder / "config.json")
    assert printed.count("'eval_loss'") == 2
    AutoModelForCausalLM.from_pretrained(out)


# --- what it refuses


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (TEXT[:100], [], "A part of the dataset has 10 tokens.*--context 16"),
        ([{"body": "a"}] * 20, [], "body"),
        ([], [], "no rows|--eval_fraction"),
        ([{"text": "a"}, {"other": "b"}] * 10, [], "Row 1 has no `text`"),
        ([{"text": None}] * 20, [], "Row 0 has no `text`"),
        (["a"] * 20, [], "line 1.*object"),
        ([{"text": "abc", "masked": "a░"}] * 20, [], "Row 0.*3 tokens.*2"),
        ([{"text": "a" * 17, "masked": "░" * 17}] * 20, [], "Row 0.*17 tokens.*--context 16"),
        ([{"prompt": "a" * 16, "completion": "b"}] * 20, [], "--context 16"),
        ([{"messages": [{"role": "user", "content": "a"}]}] * 20, [], "'assistant'"),
        (ANSWERS[:3], [], "--eval_fraction 0.1 of 3 rows"),
        (ANSWERS, ["--packing", "--eos_padding", "--context", "32"], "`eos_padding`"),
        (TEXT, ["--eval_fraction", "1.5"], "--eval_fraction 1.5"),
        (TEXT, ["--eval_fraction", "0"], "--eval_fraction 0"),
        (TEXT, ["--context", "0"], "--context 0"),
        (TEXT, ["--stride", "-1"], "--stride -1"),
        (TEXT, ["--weighting", "cart"], "`weighting='cart'`"),
        (TEXT, ["--schedule", "dream", "--weighting", "cart", "--cart_p", "7"], "`cart_p=7.0`"),
        (TEXT, ["--schedule", "complementary"], "--schedule complementary"),
        (TEXT, ["--resume_from_checkpoint", "last"], "holds no checkpoint"),
        (TEXT, ["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere"),
        (TEXT, ["--eval_dataset", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_refused_before_training(script, train, monkeypatch, rows, options, message):
    monkeypatch.setattr(script.Trainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    with pytest.raises(SystemExit, match=message):
        train(rows, *options)


@pytest.mark.parametrize("option", ["schedule", "weighting", "save_dtype"])
def test_an_unknown_choice_is_refused_with_those_that_there_are(train, option, capsys):
    with pytest.raises(SystemExit):
        train(TEXT, f"--{option}", "linear")
    printed = capsys.readouterr().err
    assert f"--{option}" in printed and "choose from" in printed


def test_a_model_that_is_not_there_or_no_diffusion_model_is_refused(train, config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match="there is no such file"):
        train(TEXT, model=tmp_path / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty.*config.json"):
        train(TEXT, model=tmp_path / "empty")
    other = tmp_path / "gpt2"
    shutil.copytree(config.parent, other)
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 67}))
    with pytest.raises(SystemExit, match="gpt2"):
        train(TEXT, model=other / "config.json")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(train, config, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(config.parent, small)
    values = json.loads(config.read_text())
    special = {"mask_token_id": 59, "eos_token_id": 58, "pad_token_id": 58}
    (small / "config.json").write_text(
        json.dumps({**values, **dict.fromkeys(["vocab_size", "embedding_size"], 60), **special})
    )
    with pytest.raises(SystemExit, match="67 tokens.*60"):
        train(TEXT, model=small / "config.json")


def test_a_dataset_that_is_not_there_or_no_json_is_refused(script, config, tmp_path):
    run = ["--model", str(config), "--output_dir", str(tmp_path / "out"), *RUN]
    for name in ("text.txt", "rows.jsonl"):
        with pytest.raises(SystemExit, match=name):
            script.main([*run, "--dataset", str(tmp_path / name)])
    with pytest.raises(SystemExit, match="rows.jsonl, line 2: .*JSON"):
        script.main([*run, "--dataset", str(write(tmp_path / "rows.jsonl", '{"text": "a"}\n{"text":\n'))])


def test_a_dataset_by_name_asks_for_the_package_that_reads_it(script, config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="pip install datasets"):
        script.main(["--model", str(config), "--dataset", "some/name", "--output_dir", str(tmp_path), *RUN])


def test_a_dataset_is_read_by_name(script, config, tmp_path):
    pytest.importorskip("datasets")  # of the extra `train`
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": TEXT}] * 20)
    script.main(["--model", str(config), "--dataset", str(folder), "--output_dir", str(tmp_path / "out"), *RUN])
    assert (tmp_path / "out" / "model.safetensors").is_file()


# --- killed and resumed


@pytest.mark.parametrize("saves", [True, False])
def test_ctrl_c_says_how_to_go_on(script, train, monkeypatch, capsys, saves):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    make = script.make_trainer

    def make_interrupted(*args):
        trainer = make(*args)
        trainer.add_callback(Interrupt())
        return trainer

    monkeypatch.setattr(script, "make_trainer", make_interrupted)
    with pytest.raises(SystemExit) as stopped:
        train(TEXT, *(["--save_strategy", "steps", "--save_steps", "2"] if saves else []))
    assert stopped.value.code == 130
    said = capsys.readouterr().err
    assert (
        ("--resume_from_checkpoint last" in said and "checkpoint-2" in said) if saves else "no checkpoint yet" in said
    )


def test_a_run_that_is_killed_and_resumed_ends_with_the_weights_of_the_unbroken_one(script, config, tmp_path, capsys):
    data = write(tmp_path / "text.txt", TEXT)
    steps = "--max_steps 100 --save_strategy steps --save_steps 10 --save_dtype float32 --eval_strategy no".split()
    arguments = ["--model", str(config), "--dataset", str(data), *RUN, *steps]
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments, "--output_dir", str(broken)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for _ in process.stdout:  # a line for each step
        if (broken / "checkpoint-10" / "trainer_state.json").exists():
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (broken / "model.safetensors").exists()
    # It might have been killed while it wrote this one.
    (broken / "checkpoint-90").mkdir(exist_ok=True)
    (broken / "checkpoint-90" / "trainer_state.json").write_text('{"epoch": 1')

    script.main([*arguments, "--output_dir", str(unbroken)])
    capsys.readouterr()
    script.main([*arguments, "--output_dir", str(broken), "--resume_from_checkpoint", "last"])
    said = capsys.readouterr()
    assert "checkpoint-90 is not complete" in said.out + said.err
    one, other = (load_file(folder / "model.safetensors") for folder in (unbroken, broken))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-5)
