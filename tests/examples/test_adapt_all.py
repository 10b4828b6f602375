"""`examples/adapt_all.py`: what runs when and on which GPU, with a program in the place of `adapt.py` that notes it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.builders import new_model

pytest.importorskip("accelerate")
pytest.importorskip("torchao", reason='needs torchao: pip install "dllm-hf[quantize]"')
EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import adapt_all  # noqa: E402
import adapt_measure  # noqa: E402

PROGRAM = """
import json, os, sys, time
began = time.monotonic()
time.sleep(0.1)
arguments = sys.argv[1:]
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([arguments, os.environ.get("CUDA_VISIBLE_DEVICES"), began, time.monotonic()]) + "\\n")
sys.exit("train" in arguments and "sdar" in arguments)
"""


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """`(arms, gpus) -> (whether all ended well, what ran)`: arguments, GPU, begin and end of each."""
    monkeypatch.setattr(adapt_all, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(arms: list[str], gpus: int):
        options = {"out": str(tmp_path), "gguf": None, "tokens": 512, "batch": 1, "gpus": gpus}
        args = type("Arguments", (), {**options, "tasks": 2, "windows": None, "samples": None})
        jobs = [job for arm in arms for job in adapt_all.jobs_of(arm, args)]
        well = adapt_all.run(jobs, gpus, tmp_path / "logs")
        return well, [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    return run


def test_an_arm_is_trained_on_a_gpu_of_its_own_before_it_is_measured(ran):
    well, found = ran(["control", "dream"], 2)
    assert well and {gpu for _, gpu, *_ in found} == {"0", "1"}
    trained = {line[0][2]: line for line in found if line[0][0] == "train"}
    assert trained["control"][1] != trained["dream"][1]
    for arguments, gpu, began, _ in found:
        if arguments[0] == "evaluate":
            assert began > trained[arguments[2]][3] and arguments[arguments.index("--tasks") + 1] == "2"
            assert not any(gpu == other[1] and other[2] < began < other[3] for other in trained.values())


def test_gla_dream_is_trained_on_half_of_the_gpus_which_nobody_else_has(ran):
    well, found = ran(["gla_dream", "control", "dream"], 4)
    trained = {line[0][2]: line for line in found if line[0][0] == "train"}  # each of its processes notes it
    assert well and sum(line[0][2] == "gla_dream" and line[0][0] == "train" for line in found) == 2
    cards = [trained[arm][1].split(",") for arm in ("gla_dream", "control", "dream")]
    assert len(cards[0]) == 2 and len({card for each in cards for card in each}) == 4


@pytest.mark.parametrize(
    "gpus, batch, steps", [(4, 64, "1"), (1, 64, "2"), (8, 64, "1"), (0, 2, "1"), (1, 48, "2"), (4, 65, "1")]
)
def test_gla_dream_takes_as_many_windows_at_once_as_fit_a_gpu(gpus, batch, steps, tmp_path):
    args = SimpleNamespace(
        out=str(tmp_path), gguf=None, tokens=10**6, batch=batch, gpus=gpus, tasks=None, windows=None, samples=None
    )
    command = adapt_all.jobs_of("gla_dream", args)[0].command
    assert command[command.index("--gradient_accumulation_steps") + 1] == steps


@pytest.mark.parametrize("gpus, most", [(1, adapt_all.SLOTS), (0, 1)])
def test_several_processes_measure_on_a_gpu_and_on_a_cpu_one_does(ran, gpus, most):
    well, found = ran(["original"], gpus)
    assert well and max(sum(other[2] <= began < other[3] for other in found) for _, _, began, _ in found) <= most


def test_an_arm_whose_training_fails_is_left_out_and_the_others_go_on(ran, capsys):
    well, found = ran(["sdar", "control"], 1)
    assert not well and not any(line[0][0] == "evaluate" and "sdar" in line[0] for line in found)
    assert sum(line[0][0] == "evaluate" for line in found) == 3
    printed = capsys.readouterr().out
    assert "train sdar: failed" in printed and "left out, train sdar has failed" in printed


def test_what_was_trained_is_not_trained_again_and_what_was_interrupted_goes_on(ran, tmp_path):
    (tmp_path / "control" / "model").mkdir(parents=True)
    (tmp_path / "control" / "model" / "config.json").touch()
    (tmp_path / "dream" / "run" / "checkpoint-500").mkdir(parents=True)
    _, found = ran(["control", "dream"], 1)
    (training,) = (line[0] for line in found if line[0][0] == "train")
    assert training[2] == "dream" and training[-2:] == ["--resume_from_checkpoint", "last"]


def test_a_job_that_the_system_kills_is_said_to_be_short_of_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(adapt_all, "PROGRAM", tmp_path / "program.py")
    (tmp_path / "program.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert not adapt_all.run([adapt_all.Job("train", ["train"])], 0, tmp_path)
    assert "train: failed (killed: is memory short?) after" in capsys.readouterr().out


def test_weights_in_fp8_are_measured_where_they_can_be_made():
    for gpus in (1, 0):
        options = {"out": "out", "gguf": None, "tokens": 512, "batch": 1, "gpus": gpus}
        args = type("Arguments", (), {**options, "tasks": None, "windows": None, "samples": None})
        commands = [job.command for job in adapt_all.jobs_of("sdar", args)]
        bits = {
            tuple(command[-2:]) for command in commands if command[-2].startswith("--") and command[0] == "evaluate"
        }
        assert {("--weights", "int8"), ("--cache_dtype", "fp8")} < bits and (("--weights", "fp8") in bits) == bool(gpus)


@pytest.mark.parametrize(
    "arm, family",
    {
        "control": None,
        "dream": "dream",
        "llada": "llada",
        "sdar": "sdar",
        "nemotron": "nemotron_diffusion",
        "gla_dream": "gla_dream",
    }.items(),
)
def test_each_measure_of_an_arm_is_that_of_one_job(arm, family, tmp_path):
    """One token a step and five thresholds with each cache, and masks in place of both numbers."""
    args = SimpleNamespace(
        out=str(tmp_path), gguf=None, tokens=512, batch=1, gpus=1, tasks=None, windows=None, samples=None
    )
    jobs = [job.command for job in adapt_all.jobs_of(arm, args) if job.command[0] == "evaluate"]
    asked = [command[-1] for command in jobs if command[-2] == "--only"]
    model = SimpleNamespace() if family is None else new_model(family)
    names = [name for name, *_ in adapt_measure.settings(model)]
    assert "nats" in asked and "left to right" in names
    assert [sum(name.startswith(each) for each in asked) for name in names] == [1] * len(names)
    if family is None:
        return
    form = "suffix and prefix" if model.sees_earlier_blocks else "in place, 48 masks"
    speeds = ("one token a step", 0.95, 0.9, 0.8, 0.7, 0.5)
    assert {f"{form}, cache {policy}, {speed}" for policy in model.cache_policies for speed in speeds} < set(names)
    assert ("in place, true length" in names) == (not model.sees_earlier_blocks)


def test_what_ends_it_ends_what_it_has_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(adapt_all, "PROGRAM", tmp_path / "program.py")
    (tmp_path / "program.py").write_text("import time\ntime.sleep(60)\n")

    def ended(seconds):
        raise SystemExit(143)

    monkeypatch.setattr(adapt_all, "time", SimpleNamespace(sleep=ended, monotonic=time.monotonic))
    job = adapt_all.Job("train", ["train"])
    with pytest.raises(SystemExit, match="143"):
        adapt_all.run([job], 0, tmp_path)
    assert job.process.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--arms", "sdarr"], "invalid choice: 'sdarr'"),
        (["--tokens", "0"], "0 must be at least 1"),
        (["--token", "5"], "unrecognized arguments: --token 5"),
        (["--tokens", "2048"], "--tokens 2048 is less than the 32768 of one step: give more, or a smaller --batch"),
        (["--tasks", "0"], "0 must be at least 1"),
        (["--gpus", "99"], "--gpus 99: there are"),
        (["--out", __file__], "is a file: give a folder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        adapt_all.main(arguments)
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_file_that_is_no_model_is_named_without_a_traceback(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").touch()
    (tmp_path / "bad.gguf").write_text("none")
    with pytest.raises(SystemExit, match="adapt_all.py: .*bad.gguf"):
        adapt_all.main(["--out", str(tmp_path), "--gguf", str(tmp_path / "bad.gguf")])


def test_ctrl_c_while_the_text_is_prepared_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_all, "adapt", interrupted)
    with pytest.raises(SystemExit, match="130"):
        adapt_all.main(["--out", str(tmp_path)])
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_all_and_says_how_to_go_on(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(EXAMPLES)!r})
import adapt_all, pathlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
adapt_all.PROGRAM = pathlib.Path({str(tmp_path / "sleep.py")!r})
print("ready", flush=True)
adapt_all.run([adapt_all.Job("long", ["train"])], 0, pathlib.Path({str(tmp_path)!r}))
"""
    program = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\nprint('at work', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "sleep.py").write_text(program)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    assert process.stdout.readline() == "ready\n" and "begins" in process.stdout.readline()
    while "at work" not in (tmp_path / "long.log").read_text():
        pass
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "the same command goes on" in said
