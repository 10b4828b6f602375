"""What a user does with a repository, in a process that cannot import dllm_hf: `python fresh.py TASKS` prints a JSON
list, for each task of the JSON list in the file TASKS what it gave, or `{"error": traceback}`."""

import contextlib
import functools
import io
import json
import os
import re
import sys
import traceback
from pathlib import Path

sys.modules["dllm_hf"] = None

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertForMaskedLM,
    GenerationMixin,
    pipeline,
)

torch.set_num_threads(1)


@functools.cache
def model_of(name: str):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)


def classes(name: str) -> dict:
    """Where each Auto class finds its class."""
    loaded = {
        "AutoConfig": AutoConfig.from_pretrained(name, trust_remote_code=True),
        "AutoModel": AutoModel.from_pretrained(name, trust_remote_code=True),
        "AutoModelForCausalLM": model_of(name),
    }
    return {auto: [type(thing).__module__, type(thing).__name__] for auto, thing in loaded.items()}


def tokenizer(name: str, text: str) -> dict:
    loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    found = {attribute: getattr(loaded, attribute) for attribute in ("mask_token", "eos_token", "padding_side")}
    return {"ids": loaded(text)["input_ids"], "class": type(loaded).__name__, **found}


def tokens(name: str, ids: list, options: dict, seed: int | None = None) -> list:
    if seed is not None:
        options = {**options, "generator": torch.Generator().manual_seed(seed)}
    return model_of(name).diffusion_generate(torch.tensor([ids]), **options).tolist()[0]


def text(name: str, prompt: str, options: dict) -> str:
    write = pipeline("text-generation", model=name, trust_remote_code=True)
    return write(prompt, **options)[0]["generated_text"]


def hidden(name: str, ids: list) -> list:
    """What `AutoModel` answers: the shape of its first output."""
    with torch.no_grad():
        return list(AutoModel.from_pretrained(name, trust_remote_code=True)(torch.tensor([ids]))[0].shape)


def saved_again(name: str, folder: str) -> list:
    """Save what was loaded, as its user would. Returns the names of the files."""
    model_of(name).save_pretrained(folder)
    with contextlib.suppress(OSError, ValueError):  # some have no tokenizer
        AutoTokenizer.from_pretrained(name, trust_remote_code=True).save_pretrained(folder)
    return sorted(path.name for path in Path(folder).iterdir())


def card(name: str, folder: str) -> str:
    """What the usage code in the card prints. A folder is named by its last part: one stands beside it."""
    code = re.search(r"```python\n(.*?)```", (Path(folder) / "README.md").read_text(encoding="utf-8"), re.S)[1]
    printed, here = io.StringIO(), os.getcwd()
    os.chdir(Path(folder).parent)
    try:
        with contextlib.redirect_stdout(printed):
            exec(code, {"__name__": "a_users_script"})
    finally:
        os.chdir(here)
    return printed.getvalue()


def from_config(name: str) -> list:
    config = AutoConfig.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    return [type(model).__module__, type(model).__name__]


class MaskedBert(BertForMaskedLM, GenerationMixin):
    """A masked model of the library with the library's `generate`."""


def loop(name: str, code: str, rows: list, options: dict) -> list:
    """What the loop alone decodes with a model of the library, of rows that are padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    model = MaskedBert.from_pretrained(name)
    options = {"input_ids": ids, "attention_mask": mask, "custom_generate": code, **options}
    return model.generate(**options, trust_remote_code=True).tolist()


if __name__ == "__main__":
    answers = []
    for task, arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answers.append({"gave": globals()[task](**arguments)})
        except BaseException:
            answers.append({"error": traceback.format_exc()})
    assert not [name for name in sys.modules if name.startswith("dllm_hf.")]
    print(json.dumps(answers))
