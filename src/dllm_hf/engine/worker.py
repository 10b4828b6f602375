"""One of the processes that a model is divided between (tensor parallelism). Each has an engine of its own, on its part of the
model, and all do the same: see [`Workers`]."""

import os
import signal
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from torch import distributed, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from ..generation.ranks import divides_heads
from .arguments import OF_FILES
from .heart import Heart, frozen_objects
from .outputs import Event, Load
from .remote import Submission


@dataclass(frozen=True)
class Command:
    """What every engine does: take in requests and abort others, in their order, and step. now: the time of all."""

    now: float
    changes: list[Submission | set[str]]


@dataclass(frozen=True)
class Stepped:
    """What came of a step.

    events: those of the first process; the others' are the same.
    digest: what must be equal in all processes.
    error: what went wrong.
    """

    events: list[Event]
    load: Load
    digest: tuple
    error: str | None


def run_worker(
    make: Callable[..., Any],
    connection: Connection,
    rank: int,
    size: int,
    device: str,
    threads: int,
    source: str,
    arguments: dict[str, Any],
) -> None:
    """Do what comes out of the connection until it ends. `make`, `source`, `arguments`: of [`Workers`]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent decides
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)})
    if rank:
        logging.set_verbosity_error()  # the first process says the same
        logging.disable_progress_bar()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is one of the system, which a process that is killed leaves behind
    try:
        _join(connection, rank, size, device)
        config, dtype, trust_remote_code = (arguments.pop(name) for name in OF_FILES)
        model = load_part(source, rank, size, dtype, trust_remote_code)
        model.generation_config = config or model.generation_config
        engine = make(model, **arguments)._driver.engine
    except Exception as error:
        _send_error(connection, error)
        return
    with frozen_objects():
        _follow(connection, engine, rank)


def _follow(connection: Connection, engine: Any, rank: int) -> None:
    """As [`run_worker`], once its engine is there."""
    heart = Heart(connection, engine.model.device)
    heart.send((engine.capacity, engine.intake.options, engine.intake.limits))
    heart.start()
    commands: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, commands), daemon=True).start()
    while True:
        command = commands.get()
        with heart.at_work():
            stepped = _step(engine, command, rank)
        heart.send(stepped)


def _receive(connection: Connection, commands: SimpleQueue) -> None:
    """A thread, so that the parent never waits for a step: it sends the next command meanwhile."""
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        # Not the usual end: that of a group waits for processes that have gone.
        os._exit(0)


def _join(connection: Connection, rank: int, size: int, device: str) -> None:
    """Make the process group. The first process has its store, at a port that the system chooses."""
    if rank == 0:
        store = distributed.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        connection.send(store.port)
    else:
        store = distributed.TCPStore("127.0.0.1", connection.recv(), size, is_master=False)
    options: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, **options)


def load_part(source: str, rank: int, size: int, dtype: str | torch.dtype, trust_remote_code: bool) -> Any:
    """This process' part of a model. Where there are fewer heads of keys and values than processes, several have the same."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    kv_heads = getattr(config, "num_key_value_heads", size)
    repeats_heads = kv_heads < size and divides_heads(config.base_model_tp_plan)
    if repeats_heads:
        plan = config.base_model_tp_plan
        config.base_model_tp_plan = {
            name: style for name, style in plan.items() if not name.endswith(("k_proj", "v_proj"))
        }
    # `tp_plan` by itself is deprecated since 5.18; before, not every version takes it from a `DistributedConfig`.
    is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 18)
    asked: dict[str, Any] = {"tp_plan": "auto"} if is_old else {"distributed_config": DistributedConfig(tp_size=size)}
    model = AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype=dtype, trust_remote_code=trust_remote_code, **asked
    )
    for layer in model.model.layers if repeats_heads else ():
        _keep_one_head(layer.self_attn, rank * kv_heads // size, config.num_attention_heads // size)
    return model.eval()


@torch.no_grad()
def _keep_one_head(attention: Any, index: int, heads: int) -> None:
    """Of the keys and values keep one head, which all `heads` queries of this process read."""
    size = attention.head_dim
    for linear in (attention.k_proj, attention.v_proj):
        for name, parameter in list(linear.named_parameters()):
            kept = parameter[index * size : (index + 1) * size].clone()
            setattr(linear, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        linear.out_features = size
    attention.num_key_value_groups = heads


def _step(engine: Any, command: Command, rank: int) -> Stepped:
    engine.clock, engine.failure = lambda: command.now, None
    for change in command.changes:
        if isinstance(change, set):
            engine.abort(*change)
            continue
        engine.submit(change.sequences(engine.intake))
    events = engine.step()
    load = engine.load()
    told = [(event.request_id, event.index, event.token_ids, event.finish_reason) for event in events]
    digest = (load, zlib.crc32(repr(told).encode()))
    return Stepped([] if rank else events, load, digest, engine.failure)


def _send_error(connection: Connection, error: Exception) -> None:
    try:
        connection.send(error)
    except Exception:  # it cannot be pickled
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
