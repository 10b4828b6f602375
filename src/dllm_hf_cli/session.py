"""A model, its tokenizer, and how the command line decodes with them."""

import argparse
import os
import sys
import time
import warnings
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from dllm_hf.families import stranger
from dllm_hf.generation.configuration import as_token_list
from dllm_hf.hub import checkpoint
from dllm_hf.quantization import check_runs

from .options import generation_options
from .output import show, tell
from .streaming import FinalText, TerminalStreamer

MAX_SEQUENCES = 1000  # completions that are decoded together; a larger number is a slip, or comes from a strange file


class Session:
    """`Session(arguments)` reads and checks everything but the weights, which [`load`] reads.

    Args:
        takes_token_ids: whether a folder without the files of a tokenizer will do; `tokenizer` is None then.
    """

    def __init__(self, arguments: argparse.Namespace, takes_token_ids: bool = False):
        self.options = generation_options(arguments)
        self.arguments = arguments
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        warnings.simplefilter("ignore")  # warnings of libraries are about code; problems of the files are said below
        name, trust = arguments.model, arguments.trust_remote_code
        if os.path.isdir(name):  # only downloads may show their progress
            logging.disable_progress_bar()
        self.device = checked_device(arguments.device)
        self.folder = folder = checkpoint.fetch(name, code=trust)
        if (folder / "adapter_config.json").is_file():  # the library would load another model, the one it names
            raise ValueError(
                f"{folder} holds an adapter: merge it into its model (`merge_and_unload` of peft) and save that."
            )
        checkpoint.read_json(folder / "config.json")
        model = checkpoint.empty_model(folder, trust)
        if not hasattr(model, "diffusion_generate"):
            hint = stranger(model.config.model_type, getattr(model.config, "auto_map", None))
            raise ValueError(f"{name} is a {type(model).__name__}, which does not decode by diffusion{hint}")
        self.resolved = checkpoint.read_generation_config(folder, model).updated(**self.options)
        sequences = self.resolved.num_return_sequences
        if sequences > MAX_SEQUENCES:
            raise ValueError(
                f"`num_return_sequences={sequences}`, from the command line or {folder / 'generation_config.json'}, is "
                f"more than can be decoded together: give at most {MAX_SEQUENCES}."
            )
        if getattr(model.config, "quantization_config", None) is not None:
            checkpoint.check_size(folder, model)
        elif unexpected := checkpoint.checked_weights(folder, model)[1]:
            tell(
                f"dllm-hf: warning: {folder} holds {checkpoint.summary_of(unexpected)} that the model in its config.json "
                "does not read."
            )
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                checkpoint.read_json(folder / file)
        self.tokenizer: Any = None
        if not takes_token_ids or any(folder.glob("tokenizer*")):
            with checkpoint.failing_with(f"{folder} has no tokenizer that can be read"):
                self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        self.generator = torch.Generator(self.device)
        if arguments.seed is None:
            self.generator.seed()  # a new generator has the same seed in every process
        else:
            self.generator.manual_seed(arguments.seed)
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.streams = terminal and not arguments.no_stream and sequences == 1

    @property
    def is_read_elsewhere(self) -> bool:
        """Whether other processes read the weights."""
        return self.arguments.data_parallel_size > 1 or self.arguments.tensor_parallel_size > 1

    def load(self) -> Any:
        """The model, which is then `model` as well."""
        with checkpoint.failing_with(f"{self.folder} cannot be loaded"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation leaves out
                self.folder,
                dtype=self.arguments.dtype,
                trust_remote_code=self.arguments.trust_remote_code,
                output_loading_info=True,
            )
            model, info = loaded
            self.model = model.to(self.device)
            check_runs(self.model)
        checkpoint.refuse_gaps(self.folder, info["missing_keys"], info["mismatched_keys"])
        return self.model

    def of_engine(self) -> dict[str, Any]:
        """The arguments of an `LLM` that say what it decodes with: the loaded model, or how other processes read it."""
        found: dict[str, Any] = {"tokenizer": self.tokenizer, "device": self.arguments.device}
        if not self.is_read_elsewhere:
            return {**found, "model": self.load()}
        reading = {name: getattr(self.arguments, name) for name in ("dtype", "trust_remote_code")}
        return {**found, "model": self.folder, **reading}

    def complete(self, prompt: list[int], is_turn: bool = False) -> str:
        """Decode, show the text, and report speed on standard error. After Ctrl-C the text that is final is shown.

        Args:
            is_turn: the prompt is a conversation: it is not shown, the end of a turn ends the completion as well, and
                of several completions only the first is shown.

        Returns:
            The text that was shown.
        """
        options = dict(self.options)
        ends = as_token_list(self.option("eos_token_id"))
        if is_turn and "eos_token_id" not in options:
            turn_ends = (self.tokenizer.eos_token_id, getattr(self.model.config, "eot_token_id", None))
            ends = list(dict.fromkeys([*ends, *(token for token in turn_ends if token is not None)]))
            options["eos_token_id"] = ends
        mask = self.option("mask_token_id")
        skipped = len(prompt) if is_turn else 0
        streamer = None
        if self.resolved.num_return_sequences == 1:
            streamer_class = TerminalStreamer if self.streams else FinalText
            streamer = streamer_class(self.text, mask, skipped)
        start = time.perf_counter()
        try:
            output = self.model.diffusion_generate(
                torch.tensor([prompt], dtype=torch.long).view(1, -1),
                generator=self.generator,
                streamer=streamer,
                tokenizer=self.tokenizer,
                return_dict_in_generate=True,
                **options,
            )
        except KeyboardInterrupt:
            if streamer is None:
                tell("dllm-hf: several completions are shown when all are done: nothing is kept of them.")
            else:
                streamer.interrupted()
            raise
        except ValueError as error:
            if any(f"`{name}" in str(error) for name in self.options):
                raise
            raise ValueError(f"{self.folder}: {error}") from error  # about an option from the folder's configurations
        except (RuntimeError, MemoryError) as error:
            raise ValueError(f"decoding with {self.folder} failed: {checkpoint.first_line(error)}") from error
        seconds = time.perf_counter() - start
        for step in output.history or ():
            print(repr(self.tokenizer.decode(step[0])), file=sys.stderr)
        rows = [_up_to_end(row, len(prompt), ends) for row in output.sequences.tolist()]
        text = "\n\n".join(self.text(row[skipped:]) for row in (rows[:1] if is_turn else rows))
        if not self.streams:
            show(text)
        new, passes = sum(len(row) - len(prompt) + prompt.count(mask) for row in rows), output.num_forward_passes
        rate = f"{new / max(passes, 1):.2f} tokens per forward"
        tell(f"{new} tokens, {passes} forward passes, {rate}, {seconds:.1f} s")
        return text

    def encode(self, text: str) -> list[int]:
        with checkpoint.failing_with(f"the tokenizer in {self.folder} fails"):
            return list(self.tokenizer(text)["input_ids"]) if text else []

    def text(self, tokens: list[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return self.tokenizer.batch_decode([tokens], **options)[0]

    def option(self, name: str):
        """A special token, as `diffusion_generate` resolves it."""
        value = getattr(self.resolved, name)
        return getattr(self.model.config, name, None) if value is None else value


def _up_to_end(row: list[int], prompt_length: int, ends: list[int]) -> list[int]:
    """A row without its padding: up to the first end of sequence after the prompt, that token included."""
    for column in range(prompt_length, len(row)):
        if row[column] in ends:
            return row[: column + 1]
    return row


def checked_device(name: str | None) -> torch.device:
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used: {checkpoint.first_line(error)}") from error
