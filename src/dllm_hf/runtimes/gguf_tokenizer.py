"""A tokenizer as GGUF holds it, so that llama.cpp's own programs read and write text with the file alone."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The pattern that splits a text before tokens are merged -> llama.cpp's name for the same.
SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": "bailingmoe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer of a checkpoint: byte-level BPE, or a token for each character.

    Args:
        writer: a `gguf.GGUFWriter`.
        vocab_size: of the model; ids without a token are written as unused ones.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = described["model"], {each["id"]: each for each in described["added_tokens"]}
    tokens = {index: text for text, index in tokenizer.get_vocab().items()}
    if max(tokens) >= vocab_size:
        raise ValueError(f"The tokenizer of {folder} has the token {max(tokens)}, but the model {vocab_size} tokens.")
    if model["type"] == "BPE":
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        split = _split_of(described["pre_tokenizer"], folder)
    else:
        is_split = (described["pre_tokenizer"] or {}).get("pattern") == {"Regex": r"[\s\S]"}
        if model["type"] != "WordLevel" or not is_split:
            raise ValueError(
                f"The tokenizer of {folder} is a {model['type']}, which cannot be written to GGUF: only byte-level BPE can, "
                "and one that has a token for each character."
            )
        characters = {index: text for index, text in tokens.items() if len(text) == 1 and index not in added}
        texts, merges = _bytes_of(characters)
        tokens, split = {**tokens, **texts}, "qwen2"
    if described["normalizer"] not in (None, {"type": "NFC"}):
        logger.warning(f"llama.cpp has no normalizers: give it texts as the tokenizer of {folder} normalises them.")
    types = [UNUSED] * vocab_size
    for index in tokens:
        types[index] = NORMAL if index not in added else CONTROL if added[index]["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    first = next(iter(tokenizer("")["input_ids"]), None)
    writer.add_add_bos_token(first is not None and first == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_of(described: dict | None, folder: Path) -> str:
    """llama.cpp's name for the way in which a byte-level BPE splits texts."""
    steps = (described or {}).get("pretokenizers", [described])
    patterns = [each["pattern"].get("Regex") for each in steps if each and each["type"] == "Split"]
    level = next((each for each in steps if each and each["type"] == "ByteLevel"), None)
    if level and not patterns and level["use_regex"] and not level["add_prefix_space"]:
        return "gpt-2"
    if level and len(patterns) == 1 and patterns[0] in SPLITS:
        return SPLITS[patterns[0]]
    raise ValueError(
        f"The tokenizer of {folder} cannot be written to GGUF: it is no byte-level BPE that splits texts as one that llama.cpp "
        f"knows ({', '.join(SPLITS.values())}, gpt-2)."
    )


def _bytes_of(characters: dict[int, str]) -> tuple[dict[int, str], list[str]]:
    """Tokens of single characters as byte-level BPE has them: texts, and merges that make a character of several bytes one."""
    level = bytes_to_unicode()
    texts = {index: "".join(level[each] for each in character.encode()) for index, character in characters.items()}
    merges = [f"{text[:end]} {text[end]}" for text in texts.values() for end in range(1, len(text))]
    return texts, list(dict.fromkeys(merges)) or [f"{level[0]} {level[0]}"]  # llama.cpp needs a list, if of no use
