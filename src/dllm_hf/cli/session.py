"""A model, its tokenizer, and how the command line decodes with them."""

import argparse
import os
import sys
import time
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..generation.configuration import as_token_list
from .streaming import TerminalStreamer


@dataclass
class Completion:
    """tokens: up to each sequence's end, prompt included. report: for the line that ends a run."""

    tokens: list[list[int]]
    history: list[list[int]]
    report: str


class Session:
    def __init__(self, arguments: argparse.Namespace):
        self.options = arguments.generation
        name, trust = arguments.model, arguments.trust_remote_code
        folder = os.path.isdir(name)
        if not folder and (os.path.exists(name) or name.startswith(("/", ".", "~"))):
            raise OSError(f"{name} is not a folder: give one that holds a model, or a repository's name.")
        if folder and not os.path.exists(os.path.join(name, "config.json")):
            raise OSError(f"{name} holds no model: it has no config.json.")
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        if folder:  # downloads may show their progress
            logging.disable_progress_bar()
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
        try:
            AutoConfig.from_pretrained(name, trust_remote_code=trust)
        except StrictDataclassError as error:
            raise ValueError(f"the config.json of {name} is wrong: {error}") from error
        except OSError as error:
            raise (
                error
                if folder
                else OSError(f"there is no folder {name}, and no repository of that name could be read: {error}")
            ) from error
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        except Exception as error:  # as many kinds as there are ways for files to be missing
            raise ValueError(f"{name} has no tokenizer that can be read: {error}") from error
        model = AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype, trust_remote_code=trust)
        if not hasattr(model, "diffusion_generate"):
            raise ValueError(f"{name} is a {type(model).__name__}, which does not decode by diffusion.")
        self.model = model.to(device)
        self.generator = torch.Generator(device)
        if arguments.seed is None:
            self.generator.seed()  # a new one is otherwise the same in every process
        else:
            self.generator.manual_seed(arguments.seed)
        several = self.options.get("num_return_sequences", model.generation_config.num_return_sequences) > 1
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.streams = terminal and not arguments.no_stream and not several

    def complete(self, prompt: list[int], show_prompt: bool = True, more_ends: list[int] | None = None) -> Completion:
        """Streams where it should; the final text is otherwise left to the caller."""
        model, options = self.model, dict(self.options)
        ends = as_token_list(self._option("eos_token_id"))
        if more_ends and "eos_token_id" not in options:
            options["eos_token_id"] = ends = list(dict.fromkeys([*ends, *more_ends]))
        mask = self._option("mask_token_id")
        streamer = TerminalStreamer(self.tokenizer, mask, 0 if show_prompt else len(prompt)) if self.streams else None
        start = time.perf_counter()
        try:
            output = model.diffusion_generate(
                torch.tensor([prompt], dtype=torch.long).view(1, -1),
                generator=self.generator,
                streamer=streamer,
                return_dict_in_generate=True,
                **options,
            )
        except KeyboardInterrupt:
            if streamer is not None:
                streamer.end()
            raise
        seconds = time.perf_counter() - start
        tokens = [up_to_end(row, len(prompt), ends) for row in output.sequences.tolist()]
        new = sum(len(row) - len(prompt) + prompt.count(mask) for row in tokens)
        passes = output.num_forward_passes
        report = (
            f"{new} tokens, {passes} forward passes, {new / max(passes, 1):.2f} tokens per forward, {seconds:.1f} s"
        )
        return Completion(tokens, [step[0].tolist() for step in output.history or ()], report)

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _option(self, name: str):
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
