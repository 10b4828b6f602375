"""LLaDA from Python with the model in C++: a class that decodes with exported models. docs/backends.md."""

import os
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from transformers import AutoTokenizer

from ..generation.decoder import Decoder
from ..generation.inputs import check_inputs
from ..generation.requests import Row
from ..generation.stopping import end_of
from ..generation.window import Frame, make_list, make_window
from ..hub.checkpoint import failing_with
from .exported import load_exported


class DeviceType(IntEnum):
    DEVICE_TYPE_CPU = 0
    DEVICE_TYPE_NVIDIA = 1


@dataclass(eq=False)
class InferTask:
    """A request, and how far it is.

    Args:
        tokens: the prompt; masks in it are positions to fill.
        max_tokens: to append.
        temperature: 0 takes the most likely tokens. topk, topp: 0 and 1 turn them off.
        end_tokens: the text ends with the first of them; None: with the model's own.
        block_length, max_steps, remasking: as in [`LLaDAForCauslLM.generate`].
        seed: of this task's draws; None draws from PyTorch's own generator.

    Attributes:
        canvas: the prompt and the positions to fill, as they are now; in the end up to the first of the end tokens.
        is_done: whether nothing is left to fill.
        batch: with which the task has begun.
    """

    tokens: list[int]
    max_tokens: int
    temperature: float = 0.0
    topk: int = 0
    topp: float = 1.0
    end_tokens: list[int] | None = None
    block_length: int | None = None
    max_steps: int | None = None
    remasking: str | None = None
    seed: int | None = None
    canvas: list[int] = field(init=False, default_factory=list)
    is_done: bool = field(init=False, default=False)
    batch: "LLaDABatchedTask | None" = field(init=False, default=None, repr=False)

    def options(self) -> dict[str, Any]:
        """As options of [`DiffusionGenerationConfig`]; those that are None are the model's own."""
        return {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.topk,
            "top_p": self.topp,
            "eos_token_id": self.end_tokens,
            "block_length": self.block_length,
            "steps": self.max_steps,
            "remasking_strategy": self.remasking,
        }


class LLaDABatchedTask:
    """Tasks that begin together, each in a slot of a decoder: ragged texts and options of their own become its tables, and each
    task gets what it would get alone.

    Args:
        model: an exported model.

    Attributes:
        decoder: `decoder.canvas` has the tables. rows: of the decoder, in the order of the tasks.
    """

    def __init__(self, model: Any, tasks: list[InferTask]):
        seeded = [None if task.seed is None else torch.Generator().manual_seed(task.seed) for task in tasks]
        requests = [
            model.diffusion_request(task.tokens, generator, **task.options()) for task, generator in zip(tasks, seeded)
        ]
        capacity = max(len(request.canvas(model.block_grid)) for request in requests)
        backend = model.make_backend(requests[0].options.cache_policy != "none")
        self.tasks, self.decoder = tasks, Decoder.open(backend, len(tasks), capacity)
        self.rows = self.decoder.add(*requests)
        for task, row in zip(tasks, self.rows):
            task.batch = self
            self._update(task, row)

    @torch.no_grad()
    def step(self) -> list[list[int]]:
        """A denoising step of all tasks that are not done. Returns for each the tokens that it has got, from left to right."""
        before = [list(task.canvas) for task in self.tasks]
        self.decoder.step()
        for task, row in zip(self.tasks, self.rows):
            self._update(task, row)
        return [[new for old, new in zip(text, task.canvas) if old != new] for text, task in zip(before, self.tasks)]

    def _update(self, task: InferTask, row: Row) -> None:
        text = self.decoder.canvas.text(row).tolist()
        task.canvas, task.is_done = text[: end_of(row, text)] if row.is_done else text, row.is_done


class LLaDAForCauslLM:
    """LLaDA in a runtime for exported models: ExecuTorch, llama.cpp or ONNX Runtime, by what the folder holds. There are no
    logits but the runtime's: what fails raises.

    Args:
        model_dir_path: a folder of `export_model`, `export_gguf` or `export_onnx`.
        device: the CPU, or GPUs where the runtime can.
        ndev: the number of devices, which share the layers.

    Raises:
        ValueError: names what is wrong with the folder, or the device that the runtime lacks.
    """

    def __init__(
        self, model_dir_path: str | os.PathLike, device: DeviceType = DeviceType.DEVICE_TYPE_CPU, ndev: int = 1
    ):
        on_cpu = DeviceType(device) == DeviceType.DEVICE_TYPE_CPU
        if ndev < 1 or (on_cpu and ndev > 1):
            raise ValueError(
                f"`ndev={ndev}` is not possible: a CPU is one device, and of GPUs there must be one at least."
            )
        self.folder, self.model = model_dir_path, load_exported(model_dir_path, 0 if on_cpu else ndev)
        if self.model.family != "llada":
            raise ValueError(f"{model_dir_path} is of the family {self.model.family!r}: decode with `load_exported`.")
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            with failing_with(f"{self.folder} has no tokenizer that can be read"):
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        return self._tokenizer

    def generate(
        self,
        prompts: str | list[str],
        max_steps: int = 128,
        gen_length: int = 128,
        block_length: int = 128,
        temperature_: float = 0.0,
        cfg_scale: float = 0.0,
        remasking: str = "low_confidence",
        verbose: bool = False,
        mask_id: int | None = None,
        logits_eos_inf: bool = False,
        confidence_eos_eot_inf: bool = False,
        **options: Any,
    ) -> str | list[str]:
        """Continue texts.

        Args:
            prompts: one, or several, which are decoded together.
            max_steps: denoising steps of the whole completion.
            gen_length: tokens to append. block_length: positions decoded together.
            temperature_, cfg_scale, remasking, mask_id, logits_eos_inf, confidence_eos_eot_inf, options: see
                [`DiffusionGenerationConfig`], whose other options are taken too.
            verbose: print each step.

        Returns:
            The completions, without special tokens; for one prompt, one.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
        sequences = self.model.diffusion_generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            steps=max_steps,
            max_new_tokens=gen_length,
            block_length=block_length,
            temperature=temperature_,
            cfg_scale=cfg_scale,
            remasking_strategy=remasking,
            mask_token_id=mask_id,
            logits_eos_inf=logits_eos_inf,
            confidence_eos_eot_inf=confidence_eos_eot_inf,
            generation_tokens_hook_func=self._print_step if verbose else None,
            **options,
        )
        new = sequences[:, inputs["input_ids"].shape[1] :]
        completions = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return completions[0] if isinstance(prompts, str) else completions

    generate_with_cpp_model = generate  # there is no other model

    def _print_step(self, step: int | None, sequences: torch.Tensor, logits: Any) -> torch.Tensor:
        if step is not None:  # before the first one
            for text in self.tokenizer.batch_decode(sequences):
                print(f"step {step + 1}: {text}")
        return sequences

    def batch_infer_one_round(self, tasks: list[InferTask]) -> list[list[int]]:
        """A denoising step of tasks; those that are new begin together.

        Returns:
            For each task the tokens that it has got, from left to right; none where it is done. [`InferTask.canvas`] has them
            at their positions.

        Raises:
            ValueError: of tasks that have begun together some are missing.
        """
        if new := [task for task in tasks if task.batch is None]:
            LLaDABatchedTask(self.model, new)
        batches = list(dict.fromkeys(task.batch for task in tasks if task.batch is not None))
        for batch in batches:
            if missing := [task for task in batch.tasks if not task.is_done and task not in tasks]:
                raise ValueError(
                    f"{len(missing)} tasks that began with others are missing: pass them on until they are done."
                )
        found = {task: tokens for batch in batches for task, tokens in zip(batch.tasks, batch.step())}
        return [found[task] for task in tasks]

    @torch.no_grad()
    def forward_logits_batch(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of texts, each of which sees the whole of itself.

        Args:
            input_ids: `(batch, length)`. attention_mask: `(batch, length)`, 0 on the padding, which is on the left.

        Returns:
            `(batch, length, vocab)` float32; NaN on the padding.
        """
        input_ids, lengths = check_inputs(input_ids, attention_mask, self.model.config.vocab_size)
        (rows, width), columns = input_ids.shape, max(lengths)
        texts = torch.stack([row.roll(length - width) for row, length in zip(input_ids, lengths)])
        backend = self.model.make_backend(False)
        state, make = backend.open(rows, columns + 1), make_list if backend.takes_lists else make_window
        logits = torch.full((rows, width, backend.vocab_size), torch.nan)
        most = getattr(self.model, "max_block_length", columns)  # positions whose logits a pass gives
        for first in range(0, columns, most):
            spans = [(min(first, length), min(first + most, length)) for length in lengths]
            frames = [Frame(0, length, *span, length, length, 0, 0) for length, span in zip(lengths, spans)]
            window = make(frames, list(range(rows)), rows, columns, shift=0)
            found = backend(texts[window.owners.expand_as(window.columns), window.columns], window, state)
            for row, (start, end) in enumerate(spans):
                logits[row, width - lengths[row] :][start:end] = found[row, : end - start]
        return logits


LLaDAForCausalLM = LLaDAForCauslLM
