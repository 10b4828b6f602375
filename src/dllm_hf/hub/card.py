"""Model cards of repositories."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedConfig

from .. import __version__
from ..families import family

# By the name of the configuration's class: two families share a model type.
DESCRIPTIONS = {
    "LLaDAConfig": "[LLaDA](https://arxiv.org/abs/2502.09992): a Llama with bidirectional attention, which fills in masked tokens.",
    "LLaDAMoEConfig": "[LLaDA-MoE](https://arxiv.org/abs/2509.24389): a Qwen3-MoE with bidirectional attention, which fills in "
    "masked tokens.",
    "LLaDA2MoeConfig": "[LLaDA2](https://arxiv.org/abs/2512.15745): a mixture of experts that decodes block after block, the "
    "tokens of a block by denoising, and may edit them until the block is done.",
    "DreamConfig": "[Dream](https://arxiv.org/abs/2508.15487): a Qwen2 with bidirectional attention, which fills in masked tokens.",
    "SDARConfig": "[SDAR](https://arxiv.org/abs/2510.06303): a Qwen3 that decodes block after block, the tokens of a block by denoising.",
    "SDARMoeConfig": "[SDAR](https://arxiv.org/abs/2510.06303)-MoE: a Qwen3-MoE that decodes block after block, the tokens of a "
    "block by denoising.",
    "GLADreamConfig": "GLADream: block diffusion on gated linear attention, with a state that does not grow with the text.",
    "NemotronLabsDiffusionConfig": "[Nemotron-Labs-Diffusion](https://huggingface.co/nvidia/Nemotron-Labs-Diffusion-8B): a "
    "Ministral 3 that reads causally and decodes block after block, the tokens of a block by denoising.",
    "Fast_dLLM_QwenConfig": "[Fast-dLLM v2](https://arxiv.org/abs/2509.26328): a Qwen2.5 that decodes block after block, the "
    "tokens of a block by denoising its sub-blocks.",
}

CARD = """---
{header}---

# {title}

{description}

The code in this repository is that of `dllm_hf` {version} (Apache-2.0); it needs `transformers` 5.13 or newer and {needs}.
{origin}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name}
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
tokens = model.diffusion_generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
```

`generation_config.json` holds the recommended options; any of them can be given to `diffusion_generate`. Batches are padded on the left. With `import dllm_hf` no `trust_remote_code` is needed.
"""

LOOP_CARD = """---
license: apache-2.0
library_name: transformers
tags:
- custom_generate
- dllm-hf
- diffusion
---

# Decoding by diffusion, for `custom_generate`

The denoising loop of `dllm_hf` {version} for other masked language models: any with bidirectional attention whose `forward(input_ids, attention_mask)` returns `logits` and that has the `generate` of `transformers`.

```python
tokens = model.generate(
    input_ids, custom_generate={name}, trust_remote_code=True, mask_token_id=tokenizer.mask_token_id, max_new_tokens=32
)
```

Options are those of `diffusion_generate` (`block_length`, `steps`, `remasking_strategy`, `temperature`, ...), and `logits_shift=1` for a model whose position i - 1 predicts position i. It keeps no cache: every step is a forward pass over the whole text.
"""


def make_loop_card(name: str) -> str:
    return LOOP_CARD.format(name=_literal(name), version=__version__)


def card_header(folder: Path) -> dict:
    """The header of a folder's card; empty where there is none that can be read."""
    if not (folder / "README.md").is_file():  # reading a named pipe would block
        return {}
    try:
        return metadata_load(folder / "README.md") or {}
    except Exception:  # YAML written by hand can be wrong in any way
        return {}


def make_card(config: PreTrainedConfig, name: str, source: str | None, header: dict, weights: str | None = None) -> str:
    """The card of a repository.

    Args:
        config: of the model.
        name: the name or folder that the card's example loads.
        source: the repository whose weights these are, unchanged; None for weights of a folder or of a model in memory.
        header: the header of the source's card, for its licence and language. It comes from outside: only values of
            the form that the Hub expects are copied.
        weights: the format that they are quantised in; None if they are not.
    """
    licence = _plain(header.get("license"), r"[A-Za-z0-9.+-]{1,64}")
    values: dict[str, Any] = {key: _plain(header.get(key)) for key in ("license_name", "license_link", "language")}
    values |= {
        "license": licence or "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": source or _plain(header.get("base_model"), r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?"),
        "tags": ["dllm-hf", "diffusion", "text-diffusion", config.model_type.lower().replace("_", "-"), "custom_code"],
    }
    names = licence if isinstance(licence, str) else ", ".join(licence or [])
    stated = f"their licence: {names}" if licence else "their licence is not known here"
    origin = f"The weights are those of {source}, unchanged; {stated}." if source else f"The weights: {stated}."
    return CARD.format(
        header=ModelCardData(**values).to_yaml() + "\n",
        title=_escaped(name.rstrip("/").split("/")[-1]),
        description=DESCRIPTIONS[family(config)[0].__name__],
        version=__version__,
        origin=origin,
        needs="nothing else" if weights is None else f"`torchao` for the weights, which are in {weights}",
        name=_literal(name),
    )


def _plain(value, pattern: str = r".{1,200}") -> str | list[str] | None:
    """`value` if it is a short text that matches `pattern`, or a list of such texts; else None."""
    texts = value if isinstance(value, list) else [value]
    is_plain = bool(texts) and all(isinstance(t, str) and t.isprintable() and re.fullmatch(pattern, t) for t in texts)
    return value if is_plain else None


def _escaped(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!~&])", r"\\\1", " ".join(text.split()))


def _literal(text: str) -> str:
    """A Python string literal."""
    return json.dumps(text, ensure_ascii=False) if text.isprintable() else ascii(text)
