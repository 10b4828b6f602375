"""llama.cpp: decoding with a model that `gguf_export.py` has exported. docs/backends.md."""

import ctypes
import os
import weakref
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..generation.backend import ModelBackend
from ..generation.cache import Copy
from ..generation.window import Window
from .exported import ExportedModel, Format, package, read_description

MODEL_NAME = "model.gguf"
FORMAT = Format("dllm_hf_gguf.json", 1, (MODEL_NAME,), "dllm_hf.runtimes.gguf_export.export_gguf")
MASK_KEY = "tokenizer.ggml.mask_token_id"
# `model_type` -> llama.cpp's architecture that it decodes by diffusion, where it has one, and the one whose layers are the same
# and keep keys and values.
ARCHITECTURES = {"llada": ("llada", "llama"), "Dream": ("dream", "qwen2"), "sdar": ("qwen3", "qwen3")}
# Tokens of one call of llama.cpp, for which it allocates memory, unless a row has more.
MAX_TOKENS = 512
ERROR = 4  # of `ggml_log_level`

_errors: deque[str] = deque(maxlen=4)  # llama.cpp's last ones


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _keep_error(level: int, text: bytes, data: Any) -> None:
    if level == ERROR:
        _errors.append(text.decode(errors="replace").strip())


def bindings() -> Any:
    """`llama_cpp`, with llama.cpp's errors kept and its other messages dropped: the package prints warnings as errors, and
    errors not at all."""
    llama = package("llama_cpp", "llama-cpp")
    llama.llama_log_set(_keep_error, None)
    _errors.clear()
    return llama


class LlamaCppModel(ExportedModel):
    """An exported model, decoded like the one that it was exported from. [`LlamaCppModel.from_pretrained`] makes it. It decodes
    with the policies `none` and `prefix` or `block`: llama.cpp's positions are consecutive, so that it cannot compute a block
    in the middle of a text alone (`dual`). It keeps no conversation (`past_key_values`).

    Attributes:
        pointer: llama.cpp's model. threads: for its matrix products. devices: the number of GPUs.
    """

    takes_devices = True

    def __init__(self, pointer: Any, folder: Path, description: dict[str, Any], threads: int, devices: int):
        super().__init__(folder, description, description["sha256"][MODEL_NAME])
        self.pointer, self.threads, self.devices = pointer, threads, devices
        self.cache_policies = tuple(each for each in self.cache_policies if each != "dual")
        weakref.finalize(self, bindings().llama_model_free, pointer)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, threads: int | None = None, devices: int = 0
    ) -> "LlamaCppModel":
        """Read a folder that [`export_gguf`] wrote.

        Args:
            threads: by default as many as PyTorch uses.
            devices: the number of GPUs that share the layers; 0 computes on the CPU.

        Raises:
            ValueError: names the file that is missing, cut short, or of another version or family, or the device that is
                not there.
        """
        llama, folder = bindings(), Path(folder)
        description = read_description(folder, FORMAT)
        if not 0 <= devices <= (found := _number_of_gpus(llama)):
            raise ValueError(f"`devices={devices}` is not possible: llama.cpp finds {found} GPUs, and 0 is the CPU.")
        options = llama.llama_model_default_params()
        options.n_gpu_layers = -1 if devices else 0
        options.tensor_split = (ctypes.c_float * llama.llama_max_devices())(*[1.0] * devices)
        architecture = ARCHITECTURES[description["family"]][1]
        override = llama.llama_model_kv_override(llama.LLAMA_KV_OVERRIDE_TYPE_STR, b"general.architecture")
        override.value.val_str = architecture.encode()
        options.kv_overrides = (llama.llama_model_kv_override * 2)(override)  # the second, empty one ends the list
        pointer = llama.llama_model_load_from_file(bytes(folder / MODEL_NAME), options)
        again = f"export the model again with `{FORMAT.exporter}`"
        if not pointer:
            raise ValueError(
                f"llama.cpp cannot read {folder / MODEL_NAME} as a {architecture}: {again}. {' '.join(_errors)}"
            )
        model = cls(pointer, folder, description, threads or torch.get_num_threads(), devices)
        if llama.llama_model_meta_val_str(pointer, MASK_KEY.encode(), None, 0) < 0:
            raise ValueError(f"{folder / MODEL_NAME} has no mask token ({MASK_KEY}): {again}.")
        return model

    def make_backend(self, has_cache: bool, **options: Any) -> "LlamaCppBackend":
        return LlamaCppBackend(self, has_cache, **options)

    def _open(self, backend, options, texts, fingerprint, past):
        if past is not None:
            raise ValueError("`past_key_values` is not possible in llama.cpp: pass the whole text without it.")
        return super()._open(backend, options, texts, fingerprint, past)


def _number_of_gpus(llama: Any) -> int:
    if not llama.llama_supports_gpu_offload():
        return 0
    library = llama.llama_cpp._lib
    device_of, type_of = library.ggml_backend_dev_get, library.ggml_backend_dev_type
    device_of.argtypes, device_of.restype, type_of.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
    return sum(type_of(device_of(index)) == 1 for index in range(library.ggml_backend_dev_count()))


class Sequences:
    """Keys and values of rows in a context of llama.cpp, a sequence for each slot. It has them in float32, without flash
    attention, which rounds them.

    Args:
        slots: the number of sequences. width: the columns that each may have.
    """

    def __init__(self, model: LlamaCppModel, slots: int, width: int):
        llama = self.llama = bindings()
        self.model, self.slots = model, slots
        if slots > (most := llama.llama_max_parallel_sequences()):
            raise ValueError(f"{slots} rows are more than the {most} that llama.cpp decodes at a time: give fewer.")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max = slots * width, slots
        # Where attention is not causal, a call must be one physical batch: llama.cpp ends the process otherwise.
        self.max_tokens = options.n_batch = options.n_ubatch = max(width, MAX_TOKENS)
        # Sequences of different lengths in one call are split, and do not see all of their tokens, unless they share a buffer.
        options.kv_unified = True
        options.attention_type = llama.LLAMA_ATTENTION_TYPE_NON_CAUSAL
        options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.type_k = options.type_v = llama.GGML_TYPE_F32
        options.n_threads = options.n_threads_batch = model.threads
        options.offload_kqv = options.op_offload = model.devices > 0
        self.context = llama.llama_init_from_model(model.pointer, options)
        if not self.context:
            errors = " ".join(_errors)
            raise ValueError(f"llama.cpp cannot hold {slots} rows of {width} columns: give less at a time. {errors}")
        weakref.finalize(self, llama.llama_free, self.context)
        self.memory = llama.llama_get_memory(self.context)

    def clear(self, slot: int, column: int) -> None:
        """Drop a sequence's keys and values from a column on."""
        self.llama.llama_memory_seq_rm(self.memory, slot, column, -1)

    def forget(self, slot: int, final_length: int, column: int, block_length: int) -> int:
        """See [`Backend.forget`]. The next pass clears what it writes."""
        return min(final_length, column // block_length * block_length)

    def share(self, copies: list[Copy]) -> list[int]:
        """See [`Backend.share`]."""
        columns = [copy.column // copy.block_length * copy.block_length for copy in copies]
        for copy, column in zip(copies, columns):
            if copy.source != copy.target:
                self.clear(copy.target, 0)
                self.llama.llama_memory_seq_cp(self.memory, copy.source, copy.target, 0, column)
        return columns

    def decode(
        self, tokens: torch.Tensor, columns: torch.Tensor, slots: torch.Tensor, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Compute tokens of which each sees all columns of its sequence.

        Args:
            tokens, columns, slots, wanted: `(tokens,)`; `wanted`: bool, whose logits are needed.

        Returns:
            `(wanted, vocab)`, which the next call overwrites.
        """
        llama, number = self.llama, len(tokens)
        token, position, sequence = (each.numpy().astype(np.int32) for each in (tokens, columns, slots))
        ones, flags = np.ones(number, dtype=np.int32), wanted.numpy().astype(np.int8)
        pointers = sequence.ctypes.data + 4 * np.arange(number, dtype=np.uintp)  # to the sequences of each token, one
        arrays: tuple[np.ndarray, ...] = (token, position, ones, pointers, flags)
        types, names = dict(llama.llama_batch._fields_), ("token", "pos", "n_seq_id", "seq_id", "logits")
        fields = {name: array.ctypes.data_as(types[name]) for name, array in zip(names, arrays)}
        batch = llama.llama_batch(n_tokens=number, **fields)
        if status := llama.llama_decode(self.context, batch):
            raise RuntimeError(
                f"llama.cpp could not compute {number} tokens: `llama_decode` gave {status}. {' '.join(_errors)}"
            )
        shape = (int(wanted.sum()), self.model.config.vocab_size)
        if not shape[0]:
            return torch.empty(shape)
        return torch.from_numpy(np.ctypeslib.as_array(llama.llama_get_logits(self.context), shape))


class LlamaCppBackend(ModelBackend):
    """The backend of a model in llama.cpp. The arguments are those of [`ModelBackend`], but every slot is as long as the longest
    row may be (`arena_columns`). A pass that needs no cache has one too, and computes rows from their first column on."""

    model: LlamaCppModel
    takes_drafts = False

    def __init__(self, model: LlamaCppModel, has_cache: bool, **options: Any):
        super().__init__(model, has_cache, **options)
        self.takes_lists = True

    def open(self, slots: int, width: int) -> Any:
        return Sequences(self.model, slots * self.guidance_copies, width)

    def slots_of(self, state: Any) -> int:
        return state.slots // self.guidance_copies

    def _forward(self, tokens: torch.Tensor, window: Window, state: Any) -> torch.Tensor:
        wanted = torch.zeros(len(tokens), dtype=torch.bool)
        wanted[window.keep.flatten()] = True
        index = wanted.cumsum(0) - 1
        logits = torch.empty(int(wanted.sum()), self.vocab_size)
        for pieces in self._calls(window, state):
            part = torch.cat([torch.arange(*piece) for piece in pieces])
            chosen = wanted[part]
            logits[index[part[chosen]]] = state.decode(tokens[part], window.columns[part], window.owners[part], chosen)
        return logits[index[window.keep]]

    def _calls(self, window: Window, state: Sequences) -> list[list[tuple[int, int]]]:
        """The pieces of a list, (first token, end), of each call. llama.cpp's tokens see all that is there: tokens that see
        fewer columns than others of their row, those of earlier blocks, need a call of their own, before the others."""
        owners, lengths = window.owners, window.lengths
        is_new = torch.ones(len(owners), dtype=torch.bool)
        is_new[1:] = (owners[1:] != owners[:-1]) | (lengths[1:] != lengths[:-1])
        starts = is_new.nonzero().flatten().tolist()
        stages: dict[int, list[tuple[int, int]]] = defaultdict(list)
        counts: Counter[int] = Counter()
        for first, end in zip(starts, [*starts[1:], len(owners)]):
            slot = int(owners[first])
            if not counts[slot]:
                state.clear(slot, int(window.columns[first]))
            stages[counts[slot]].append((first, end))
            counts[slot] += 1
        calls: list[list[tuple[int, int]]] = []
        for pieces in stages.values():
            free = 0
            for first, end in pieces:
                if free < end - first:
                    calls.append([])
                    free = state.max_tokens
                calls[-1].append((first, end))
                free -= end - first
        return calls
