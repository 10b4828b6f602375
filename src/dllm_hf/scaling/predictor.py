"""`DiffusionPredictor`: the engine as a stage of a dataset of Ray, and `unfinished`, what an earlier run has left."""

import asyncio
import itertools
import json
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from ray.data import Dataset
from ray.data.expressions import col

from ..engine import LLM, CompletionOutput, SamplingParams

COLUMNS = ("text", "token_ids", "filled_prompt", "finish_reason", "num_forward_passes")


class DiffusionPredictor:
    """For `ray.data.Dataset.map_batches`: each actor has an `LLM`, and gives each row its completion.

    ```python
    results = dataset.map_batches(
        DiffusionPredictor,
        fn_constructor_kwargs={"model": "JetLM/SDAR-8B-Chat", "sampling_params": SamplingParams(max_tokens=256)},
        batch_size=64,
        num_gpus=1,
        compute=ActorPoolStrategy(size=4, max_concurrent_calls_per_actor=8),
    )
    ```

    A batch is not a batch of the engine: its rows join those that run, and each leaves by itself. The engine is full as long
    as the batches that an actor works on at a time have more rows than `max_num_seqs`:

    - `batch_size`: rows that come back together. Give one: by default Ray takes whole blocks, which may be a file, and with
      GPUs it refuses that.
    - `max_concurrent_calls_per_actor`: tasks of Ray, each a block with four batches at a time, that an actor works on at a
      time; 1 by default, so that the engine runs empty at the end of each block.
    - `size` of the pool, which `map_batches` calls `concurrency` as well: actors, each with an engine. Only
      `ActorPoolStrategy` has the option above.
    - `num_gpus`: of each actor; `data_parallel_size` times `tensor_parallel_size`.

    The columns of a row, its id among them, stay. New are `text`, `token_ids`, `filled_prompt` (where the prompt has masks),
    `finish_reason` and `num_forward_passes` as in [`CompletionOutput`], and `error`: a row that cannot be decoded has the
    reason there and null in the others, and the other rows are as they are without it. Rows come back in any order.

    An actor that dies is replaced by Ray, which gives the rows of its unfinished tasks to others; one whose device is lost
    ends itself.

    Args:
        model: a folder or a repository, which every machine can read.
        sampling_params: one for all rows, or a function of a row, a dict, for its own; one completion a row (`n=1`). Without
            a seed a row that is computed again has another text.
        prompt_column: of the prompts: strings, token ids, or chats.
        options: of [`LLM`].
    """

    def __init__(
        self,
        model: str | os.PathLike,
        sampling_params: SamplingParams | Callable[[dict[str, Any]], SamplingParams] | None = None,
        *,
        prompt_column: str = "prompt",
        **options: Any,
    ):
        self.prompt_column, self.sampling_params = prompt_column, sampling_params or SamplingParams()
        self.llm, self._numbers = LLM(model, **options), itertools.count()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[CompletionOutput]]] = {}
        threading.Thread(target=self._decode, name="engine", daemon=True).start()

    async def __call__(self, batch: dict[str, numpy.ndarray]) -> dict[str, Any]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        outputs = await asyncio.gather(*(self._complete(row) for row in rows))
        errors = [output if isinstance(output, str) else output.error for output in outputs]
        found: dict[str, list[Any]] = {
            name: [None if error else getattr(output, name) for output, error in zip(outputs, errors)]
            for name in COLUMNS
        }
        return {**batch, **{name: _column(values) for name, values in [*found.items(), ("error", errors)]}}

    async def _complete(self, row: dict[str, Any]) -> CompletionOutput | str:
        """The completion of a row, or what is wrong with the row."""
        loop, name = asyncio.get_running_loop(), f"row-{next(self._numbers)}"
        try:
            params = self.sampling_params
            if not isinstance(params, SamplingParams):
                params = params({key: _plain(value) for key, value in row.items()})
            if params.n != 1:
                raise ValueError(f"`n={params.n}`: a row has one completion. Repeat the row, with another seed.")
            self._waiting[name] = loop, loop.create_future()
            self.llm.submit(_plain(row[self.prompt_column]), params, request_id=name, streams=False)
        except Exception as error:  # of a function of the user's as well
            self._waiting.pop(name, None)
            return f"{type(error).__name__}: {error}".replace(f"request {name}: ", "", 1)
        try:
            return await self._waiting[name][1]
        except asyncio.CancelledError:
            self.llm.abort(name)
            raise

    def _decode(self) -> None:
        """The thread that steps the engine."""
        try:
            for event in self.llm.events(wait=True):
                if event.output is not None:
                    loop, future = self._waiting.pop(event.request_id)
                    loop.call_soon_threadsafe(_resolve, future, event.output)
                    if event.output.error is not None:
                        self.llm.check()
        except BaseException:
            # An exception in a row's place would fail the whole dataset: Ray computes the rows of a dead actor again.
            traceback.print_exc()
            os._exit(1)


def _resolve(future: asyncio.Future, output: CompletionOutput) -> None:
    if not future.done():  # nobody has cancelled it
        future.set_result(output)


def _plain(value: Any) -> Any:
    """A cell as Python spells it: Arrow's lists come as arrays, chats as arrays of dicts."""
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _column(values: list[Any]) -> numpy.ndarray:
    """A cell for each value, also where these are lists of one length."""
    column = numpy.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        column[index] = value
    return column


def unfinished(dataset: Dataset, folder: str | os.PathLike, id_column: str = "id") -> Dataset:
    """The rows of which a folder has no result, which `results.write_json(folder)` has written there. A run that was
    interrupted goes on with them:

    ```python
    rest = unfinished(ray.data.read_json("prompts.jsonl"), "results")
    rest.map_batches(DiffusionPredictor, ...).write_json("results")
    ```

    Rows with an error are tried again: they are removed from the files, as is what a killed process had begun to write. So
    each row is in the files once. No other run may be writing there.

    Args:
        folder: of this machine, or mounted here.
        id_column: strings or integers by which rows are told apart; a set of them goes to every worker.
    """
    done: set[Any] = set()
    for path in sorted(Path(folder).glob("*.json")):
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        results = [json.loads(line) for line in lines]
        kept = [line for line, result in zip(lines, results) if result["error"] is None]
        done.update(result[id_column] for result in results if result["error"] is None)
        if b"".join(kept) != content:
            new = path.with_suffix(".new")
            new.write_bytes(b"".join(kept))
            new.replace(path)
    return dataset.filter(expr=col(id_column).not_in(list(done))) if done else dataset
