"""A model, its tokenizer, and how the command line decodes with them."""

import argparse
import os
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from dllm_hf.generation.configuration import as_token_list
from dllm_hf.hub.checkpoint import (
    check_size,
    checked_weights,
    empty_model,
    fetched,
    naming,
    read_generation_config,
    read_json,
    refuse_gaps,
    some,
)

from .options import generation_options
from .output import tell
from .streaming import SettledText, TerminalStreamer

MAX_SEQUENCES = 1000  # completions that are decoded together; more are a slip, or somebody else's file


@dataclass
class Completion:
    """tokens: up to each sequence's end, prompt included. report: for the line that ends a run."""

    tokens: list[list[int]]
    history: list[list[int]]
    report: str


class Session:
    """Made of the arguments, it has read and checked everything but the weights, which [`load`] reads."""

    def __init__(self, arguments: argparse.Namespace):
        self.options = generation_options(arguments)
        self.arguments = arguments
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        warnings.simplefilter("ignore")  # they are about code; what is wrong with the files is said below
        name, trust = arguments.model, arguments.trust_remote_code
        if os.path.isdir(name):  # downloads may show their progress
            logging.disable_progress_bar()
        self.device = torch.device(_checked_device(arguments.device))
        self.folder = folder = fetched(name, code=trust)
        if (folder / "adapter_config.json").is_file():  # the library would load another model, the one it names
            raise ValueError(
                f"{folder} holds an adapter: merge it into its model (`merge_and_unload` of peft) and save that."
            )
        model = empty_model(folder, trust)
        if not hasattr(model, "diffusion_generate"):
            raise ValueError(f"{name} is a {type(model).__name__}, which does not decode by diffusion.")
        settings = read_generation_config(folder, model)
        self.sequences = settings.updated(**self.options).num_return_sequences
        if self.sequences > MAX_SEQUENCES:
            raise ValueError(
                f"`num_return_sequences={self.sequences}`, from the command line or {folder / 'generation_config.json'}, "
                f"is more than can be decoded together: give at most {MAX_SEQUENCES}."
            )
        if getattr(model.config, "quantization_config", None) is not None:
            check_size(folder, model)
        else:
            _, unexpected = checked_weights(folder, model)
            if unexpected:
                tell(
                    f"dllm-hf: warning: {folder} holds {some(unexpected)} that the model in its config.json does not read."
                )
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / file).is_file():
                read_json(folder / file)
        with naming(f"{folder} has no tokenizer that can be read"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        self.generator = torch.Generator(self.device)
        if arguments.seed is None:
            self.generator.seed()  # a new one is otherwise the same in every process
        else:
            self.generator.manual_seed(arguments.seed)
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.streams = terminal and not arguments.no_stream and self.sequences == 1

    def load(self) -> None:
        with naming(f"{self.folder} cannot be loaded"):
            model, info = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=self.arguments.dtype,
                trust_remote_code=self.arguments.trust_remote_code,
                output_loading_info=True,
            )
            self.model = model.to(self.device)
        refuse_gaps(self.folder, info["missing_keys"], info["mismatched_keys"])

    def complete(self, prompt: list[int], show_prompt: bool = True, more_ends: list[int] | None = None) -> Completion:
        """Streams where it should; the final text is otherwise left to the caller. After Ctrl-C, what has settled has
        been shown."""
        model, options = self.model, dict(self.options)
        ends = as_token_list(self.option("eos_token_id"))
        if more_ends and "eos_token_id" not in options:
            options["eos_token_id"] = ends = list(dict.fromkeys([*ends, *more_ends]))
        mask = self.option("mask_token_id")
        streamer = None
        if self.sequences == 1:
            kind = TerminalStreamer if self.streams else SettledText
            streamer = kind(self.tokenizer, mask, 0 if show_prompt else len(prompt))
        start = time.perf_counter()
        try:
            output = model.diffusion_generate(
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
            raise ValueError(f"{self.folder}: {error}") from error  # what its configurations ask for
        except (RuntimeError, MemoryError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"decoding with {self.folder} failed: {reason[0]}") from error
        seconds = time.perf_counter() - start
        tokens = [up_to_end(row, len(prompt), ends) for row in output.sequences.tolist()]
        new = sum(len(row) - len(prompt) + prompt.count(mask) for row in tokens)
        passes = output.num_forward_passes
        report = (
            f"{new} tokens, {passes} forward passes, {new / max(passes, 1):.2f} tokens per forward, {seconds:.1f} s"
        )
        return Completion(tokens, [step[0].tolist() for step in output.history or ()], report)

    def encode(self, text: str) -> list[int]:
        with naming(f"the tokenizer in {self.folder} fails"):
            return list(self.tokenizer(text)["input_ids"]) if text else []

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def option(self, name: str):
        """As `diffusion_generate` resolves it."""
        for value in (self.options.get(name), getattr(self.model.generation_config, name, None)):
            if value is not None:
                return value
        return getattr(self.model.config, name, None)


def up_to_end(row: list[int], prompt_length: int, ends: list[int]) -> list[int]:
    """What precedes the padding: a row up to the first end of sequence after the prompt, that token included."""
    for column in range(prompt_length, len(row)):
        if row[column] in ends:
            return row[: column + 1]
    return row


def _checked_device(name: str | None) -> str:
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    return device
