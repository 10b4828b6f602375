"""`LLM`: a model, its tokenizer and an engine, for programs that have many prompts."""

import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..families import stranger
from ..generation.cache import column_bytes_of
from ..generation.configuration import DiffusionGenerationConfig
from ..generation.inputs import TooLongError
from ..generation.mixin import DiffusionGenerationMixin
from ..generation.ranks import ranks_of
from ..hub.checkpoint import empty_model, fetch, read_generation_config
from ..quantization import check_runs
from .arguments import check_arguments, gpus_of_replicas
from .detokenizer import Detokenizer
from .driver import ClosedError, Driver, Mailbox
from .engine import Engine, QueueFullError
from .intake import Settings
from .interrupts import interrupts_deferred
from .outputs import Event, Load, RequestOutput
from .prompts import Prompt, encode, prompts_of
from .replicas import Replicas
from .sampling_params import SamplingParams
from .sequence import Sequence
from .workers import Workers

logger = logging.get_logger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096


class LLM:
    """Decodes many requests on one model at once; rows join and leave between steps.

    Args:
        model: a folder, a repository of the Hub, or a loaded model.
        tokenizer: a folder, a repository or a tokenizer; by default that of `model`, if it has one. Without, prompts are
            token ids and texts are empty.
        generation_config: in the place of the model's own; of a loaded model it is to be set there.
        mask_token_id, block_length, cache_policy: for every request; by default those of the model. Where the model offers
            `cache_policy="block"`, that is the default.
        cache_dtype: `"int8"` or `"fp8"` keeps keys and values in 8 bits, so that about twice as many columns fit.
        dtype, trust_remote_code: as in `from_pretrained`; not of a loaded model.
        device: by default a GPU if there is one. Replicas take the GPUs of `CUDA_VISIBLE_DEVICES` in their order.
        max_num_seqs: completions that are decoded together, as long as there is room in the cache.
        max_model_len: columns of each, prompt and new tokens together; by default the model's positions, up to 4,096.
        max_num_batched_tokens: columns of prompts and of whole canvases that a step computes beside the blocks; one such
            window always goes.
        max_queue: completions that may wait.
        num_cache_tokens: columns of the cache, which all completions share: each has as many as its prompt and new tokens
            take, from its first step to its last. By default on a GPU what `gpu_memory_utilization` leaves, elsewhere four
            times `max_model_len`.
        gpu_memory_utilization: part of the GPU's memory that weights and cache may take.
        tensor_parallel_size: GPUs that the model is divided between, a process for each; on CPUs, processes. `model` must be a
            folder or a repository then, and a script must make the `LLM` below `if __name__ == "__main__":`.
        data_parallel_size: replicas of the engine, each in a process and on a GPU of its own. The options above are those of
            each; `max_queue` is that of all. `model` must be a folder or a repository then, and a script must make the `LLM`
            below `if __name__ == "__main__":`.
        enforce_eager: no CUDA graphs and no fused kernels.
        draft_steps: see [`DiffusionGenerationConfig`]; of completions whose steps can be foreseen, in passes of at most 128
            tokens, drafts included. By default what the model's generation config says.

    Raises:
        ValueError, OSError: name what is wrong, before weights are read where that is known by then.
        RuntimeError: a process of a replica or of a divided model has ended before it was ready.
    """

    def __init__(
        self,
        model: str | os.PathLike | DiffusionGenerationMixin,
        *,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        generation_config: DiffusionGenerationConfig | None = None,
        mask_token_id: int | None = None,
        block_length: int | None = None,
        cache_policy: str | None = None,
        cache_dtype: str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        max_num_seqs: int = 32,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 2048,
        max_queue: int = 100_000,
        num_cache_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        enforce_eager: bool = False,
        draft_steps: int | str | None = None,
    ):
        arguments = {name: value for name, value in locals().items() if name not in ("self", "model")}
        check_arguments(model, arguments)
        source = model if isinstance(model, (str, os.PathLike)) else None
        loaded: Any = model
        if data_parallel_size > 1 or tensor_parallel_size > 1:
            gpus = gpus_of_replicas(source, arguments)
            folder = fetch(loaded, code=trust_remote_code)
            source, loaded, device = folder, empty_model(folder, trust_remote_code), None
            loaded.generation_config = read_generation_config(folder, loaded)
        elif source is not None:
            loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not hasattr(loaded, "diffusion_request"):
            config = getattr(loaded, "config", None)
            hint = stranger(getattr(config, "model_type", ""), getattr(config, "auto_map", None))
            raise ValueError(f"`model` is a {type(loaded).__name__}, which does not decode by diffusion{hint}")
        self.model: DiffusionGenerationMixin = loaded if device is None else loaded.to(device)
        check_runs(loaded)
        if generation_config is not None:
            self.model.generation_config = generation_config
        self.tokenizer = self._load_tokenizer(tokenizer, source, trust_remote_code)
        positions = getattr(self.model.config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
        capacity = max_model_len or min(positions, DEFAULT_MAX_MODEL_LEN)
        if capacity > positions:
            raise ValueError(f"`max_model_len={capacity}` is more than the {positions} positions of the model.")
        options = {name: arguments[name] for name in ("mask_token_id", "block_length", "cache_policy", "cache_dtype")}
        if cache_policy is None and self.model.generation_config.cache_policy is None:
            options["cache_policy"] = "block" if "block" in self.model.cache_policies else None
        options = {name: value for name, value in options.items() if value is not None}
        resolved = self.model.resolve_options(None, options)  # refused, if at all, before processes start
        if data_parallel_size > 1:
            engine: Any = Replicas(LLM, str(source), arguments, gpus, self.model, self.tokenizer)
        elif tensor_parallel_size > 1:
            kind = "cpu" if gpus is None else "cuda"
            engine = Workers(LLM, str(source), arguments, self.model, self.tokenizer, kind)
        else:
            engine = self._make_engine(capacity, arguments, options, resolved.cache_dtype)
        self._driver, self._submitted, self._numbers = Driver(engine), Mailbox(), itertools.count()

    def _make_engine(self, capacity: int, arguments: dict[str, Any], options: dict, cache_dtype: str | None) -> Engine:
        """That of this process. `capacity`: columns of a canvas."""
        slots, columns, drafts = (arguments[name] for name in ("max_num_seqs", "num_cache_tokens", "draft_steps"))
        if columns is None:
            columns = self._cache_columns(slots, capacity, arguments["gpu_memory_utilization"], cache_dtype)
        limits = arguments["max_queue"], arguments["max_num_batched_tokens"], columns
        return Engine(
            self.model, self.tokenizer, slots, capacity, options, *limits,
            uses_graphs=not arguments["enforce_eager"],
            draft_steps=self.model.generation_config.draft_steps if drafts is None else drafts,
        )  # fmt: skip

    def _load_tokenizer(self, tokenizer: Any, source: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            return tokenizer
        if tokenizer is not None:
            return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        if source is None:
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            logger.warning("%s has no tokenizer that can be read, so token ids are served: %s", source, error)
            return None
        # Without files some classes make a tokenizer that knows its special tokens alone.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None

    def _cache_columns(self, slots: int, capacity: int, part: float, cache_dtype: str | None) -> int:
        """As many columns of the cache as there is memory for, and no more than all slots could use."""
        device = self.model.device
        if device.type != "cuda":
            return min(slots, 4) * (capacity + 1) + 1
        free, total = torch.cuda.mem_get_info(device)
        columns = int(free - (1 - part) * total) // column_bytes_of(self.model, cache_dtype)
        if (ranks := ranks_of(self.model)) is not None:
            columns = ranks.least(columns, device)
        if columns < capacity + 2:
            raise ValueError(
                f"`gpu_memory_utilization={part}` leaves room for {max(columns, 0)} columns of the cache, and "
                f"`max_model_len={capacity}` needs more: raise the one or reduce the other."
            )
        return min(columns, slots * (capacity + 1) + 1)

    # --- for programs

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Decode prompts.

        Args:
            prompts: one or several, each a string, a list of token ids, or a chat (a list of `{"role", "content"}`); mask
                tokens in them are positions to fill.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: whether a progress bar shows requests and tokens a second.

        Returns:
            An output for each prompt, in their order. After Ctrl-C too: what had not finished by then has the finish
            reason "abort".

        Raises:
            ValueError: a prompt or its parameters are wrong; nothing has been decoded then.
        """
        requests = self._prepare(prompts, sampling_params, streams=False)
        waiting, mailbox, tokens = deque(requests), Mailbox(), 0
        outputs = {each[0].request_id: self._output(each[0]) for each in requests}
        with tqdm(total=len(requests), unit="request", disable=not use_tqdm, dynamic_ncols=True) as bar:
            while waiting or mailbox.is_open:
                try:
                    with interrupts_deferred():
                        self._turn(waiting, mailbox)
                        for event in mailbox.take():
                            if event.output is not None:
                                tokens += len(event.output.token_ids)
                                outputs[event.request_id].outputs.append(event.output)
                                speed = tokens / max(bar.format_dict["elapsed"], 1e-9)
                                bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                                bar.update(event.request_id not in mailbox.left)
                except KeyboardInterrupt:
                    logger.warning("Interrupted: what has finished is returned, the rest as far as it is final.")
                    self._withdraw(waiting, mailbox)
                except BaseException:
                    self._withdraw(waiting, mailbox)
                    raise
        for output in outputs.values():
            output.outputs.sort(key=lambda each: each.index)
        return list(outputs.values())

    def generate_streaming(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        drafts: bool = False,
        request_ids: list[str] | None = None,
    ) -> Iterator[Event]:
        """As [`LLM.generate`], but tells what becomes final as it does, and with `drafts` how each canvas looks after each
        step. Closing the iterator aborts what has not finished. `request_ids`: one for each prompt; by default they are
        numbered."""
        return self._stream(deque(self._prepare(prompts, sampling_params, drafts, request_ids)))

    def _stream(self, waiting: deque[list[Sequence]]) -> Iterator[Event]:
        mailbox = Mailbox()
        try:
            while waiting or mailbox.is_open:
                with interrupts_deferred():
                    self._turn(waiting, mailbox)
                yield from mailbox.take()
        finally:
            self._withdraw(waiting, mailbox)

    def _turn(self, waiting: deque[list[Sequence]], mailbox: Mailbox) -> None:
        """Submit what the queue has room for, and wait for events."""
        while waiting:
            try:
                self._driver.submit(waiting[0], mailbox)
            except QueueFullError:
                break
            except ClosedError:
                self._give_up(waiting, mailbox)
                break
            waiting.popleft()
        self._driver.turn(mailbox)

    def _give_up(self, waiting: deque[list[Sequence]], mailbox: Mailbox) -> None:
        """End requests that have not been submitted."""
        for sequence in (each for sequences in waiting for each in sequences):
            if not sequence.is_finished and not self._driver.knows(sequence.request_id):
                sequence.end("abort")
                mailbox.events.append(sequence.finish())
        waiting.clear()

    def _withdraw(self, waiting: deque[list[Sequence]], mailbox: Mailbox) -> None:
        """Abort requests, submitted or not, and have their last events put into the mailbox."""
        with interrupts_deferred():
            self._give_up(waiting, mailbox)
            self._driver.abort(list(mailbox.left))
            while mailbox.left and not self._driver.is_in_my_step:
                self._driver.turn(None)

    # --- for servers

    def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        drafts: bool = False,
        streams: bool = True,
    ) -> str:
        """Put a request at the end of the queue, from any thread. [`LLM.events`] tells what becomes of it.
        Without `streams` its tokens and its text are in the `output` of its last event alone.

        Returns:
            Its id.

        Raises:
            ValueError: the prompt or its parameters are wrong.
            QueueFullError: too much is waiting.
        """
        request_ids = None if request_id is None else [request_id]
        [sequences] = self._prepare([prompt], sampling_params, drafts, request_ids, streams)
        self._driver.submit(sequences, self._submitted)
        return sequences[0].request_id

    def abort(self, request_id: str) -> None:
        """End a request with what is final of it, from any thread. Nothing happens where it has finished."""
        self._driver.abort([request_id])

    def events(self, wait: bool = False) -> Iterator[Event]:
        """Decode what was submitted, and tell what becomes of it.

        Args:
            wait: where nothing is left, wait for what is submitted next, until [`LLM.close`]; else the iterator ends then.
        """
        while self._submitted.is_open or (wait and not self._driver.is_closed):
            if not self._submitted.is_open:
                self._driver.wait(self._submitted)
                continue
            self._driver.turn(self._submitted)
            yield from self._submitted.take()

    @property
    def max_model_len(self) -> int:
        """Columns that a prompt and its new tokens may take together."""
        return self._driver.engine.capacity

    def effective_options(self, sampling_params: SamplingParams) -> DiffusionGenerationConfig:
        """What a request with these parameters is decoded with: the model's own defaults filled in.

        Raises:
            ValueError: the parameters are wrong.
        """
        return self._driver.engine.intake.effective_options(sampling_params)

    def load(self) -> Load:
        """How much of the engine is in use. For the thread that reads events."""
        return self._driver.engine.load()

    def check(self) -> None:
        """Raises where nothing can be decoded any more: the device is lost, or every replica has died."""
        self._driver.engine.check()

    def close(self) -> None:
        """Abort everything, and end the processes of replicas. Whoever reads events gets the last ones."""
        self._driver.close()
        self._driver.engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    # --- prompts

    def _prepare(
        self,
        prompts: Any,
        params: Any,
        drafts: bool = False,
        request_ids: list[str] | None = None,
        streams: bool = True,
    ) -> list[list[Sequence]]:
        """Check prompts and parameters, and make the completions of each."""
        prompts = prompts_of(prompts)
        if self._driver.is_closed:
            raise ClosedError("The `LLM` is closed: make a new one.")
        names = self._names(len(prompts), request_ids)
        every = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(every) != len(prompts):
            raise ValueError(
                f"`sampling_params` lists {len(every)} for {len(prompts)} prompts: pass one, or one for each."
            )
        intake, default = self._driver.engine.intake, SamplingParams()
        requests, settings = [], dict[int, Settings]()
        for number, (prompt, one) in enumerate(zip(prompts, every, strict=True)):
            one = default if one is None else one
            if not isinstance(one, SamplingParams):
                raise ValueError(f"`sampling_params` must hold `SamplingParams`, but holds {one!r}.")
            name = names[number]
            try:
                if id(one) not in settings:  # most prompts share them
                    settings[id(one)] = intake.settings(one)
                sequences = intake.prepare(encode(prompt, self.tokenizer), one, name, settings[id(one)])
            except ValueError as error:
                where = f"request {name}: " if request_ids else f"prompt {number}: " if len(prompts) > 1 else ""
                kind = TooLongError if isinstance(error, TooLongError) else ValueError
                raise kind(f"{where}{error}") from error
            for sequence in sequences:
                sequence.shows_texts, sequence.shows_drafts = streams, drafts
            requests.append(sequences)
        return requests

    def _names(self, number: int, given: list[str] | None) -> list[str]:
        """The ids of requests."""
        if given is None:
            free = (name for name in (f"request-{each}" for each in self._numbers) if not self._driver.knows(name))
            return list(itertools.islice(free, number))
        if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"`request_ids` must be a list of strings, but is {given!r}.")
        if len(given) != number:
            raise ValueError(f"`request_ids` lists {len(given)} for {number} prompts: pass one for each.")
        for name, count in Counter(given).items():
            if count > 1 or self._driver.knows(name):
                of = "given twice" if count > 1 else "that of a request which has not finished"
                raise ValueError(f"`request_id={name!r}` is {of}: take another.")
        return list(given)

    def _output(self, sequence: Sequence) -> RequestOutput:
        prompt = sequence.request.prompt
        text = None
        if self.tokenizer is not None:
            text = Detokenizer(self.tokenizer, []).decode(prompt, skip_special_tokens=False)
        return RequestOutput(sequence.request_id, prompt, text)
