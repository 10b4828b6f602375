"""`Prompts`: texts, chats and texts with blanks as token ids, and back."""

from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..engine import LLM
from ..engine.prompts import encode
from ..generation.configuration import as_token_list
from .errors import ApiError
from .schema import Message


class Prompts:
    """What the tokenizer of a served model does. All methods may take long with long texts: they run in worker threads.

    Attributes:
        mask: the mask's token id. mask_text: how a text spells it, None without a tokenizer.
        turn_ends: token ids that end an answer in a chat.
        has_chats: whether there is a chat template.
    """

    def __init__(self, llm: LLM):
        self.tokenizer, self.limit, self.model = llm.tokenizer, llm.max_model_len, llm.model
        config: Any = llm.model.config
        stored = llm.model.generation_config.mask_token_id
        self.mask: int = config.mask_token_id if stored is None else stored
        self.mask_text: str | None = None
        self._longest, self.turn_ends = 1, list[int]()
        if self.tokenizer is not None:
            spelled = str(self.tokenizer.convert_ids_to_tokens(self.mask))
            self.mask_text = spelled if encode(spelled, self.tokenizer).count(self.mask) == 1 else None
            self._longest = max(map(len, self.tokenizer.get_vocab()))
            ends = [self.tokenizer.eos_token_id, *as_token_list(getattr(config, "eot_token_id", None))]
            self.turn_ends = [token for token in ends if token is not None]
        self.has_chats = self.tokenizer is not None and self.tokenizer.chat_template is not None
        self._piece = lru_cache(2**16)(self._decode_one)

    def of_text(self, text: str, name: str = "prompt") -> list[int]:
        self._check_length(len(text), name)
        return self._encode(text, name)

    def of_chat(self, messages: list[Message]) -> list[int]:
        if self._needed("messages").chat_template is None:
            raise ApiError(400, "The model has no chat template: use /v1/completions.", "messages")
        turns = []
        for message in messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            # OpenAI's newer name for the same role; templates know the older one.
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": text})
        self._check_length(sum(len(turn["content"]) for turn in turns), "messages")
        return self._encode(turns, "messages")

    def of_blanks(self, text: str, blank: str | None) -> list[int]:
        """A text with masks, as token ids."""
        if blank is not None:
            if self.mask_text is None:
                raise ApiError(400, "The tokenizer cannot spell the mask: send token ids.", "blank")
            text = text.replace(blank, self.mask_text)
        return self.of_text(text)

    def complete(self, tokens: list[int], name: str) -> list[int]:
        """A prompt to be continued: a mask in it would be filled, which nobody has asked for."""
        if self.mask in tokens:
            raise ApiError(400, f"`{name}` holds the mask token, id {self.mask}: /v1/infill fills masks.", name)
        return tokens

    def default_length(self, prompt: list[int], wanted: int, block_length: int | None) -> int:
        """New tokens where a request does not say: as many as the model wants, where there is room for them."""
        room = self.limit
        if self.model.block_grid == "zero" and block_length:
            room -= room % block_length
        return max(min(wanted, room - len(prompt)), 1)

    def text(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        if self.tokenizer is None:
            return ""
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(tokens, **options))

    def pieces(self, tokens: list[int]) -> list[str | None]:
        """The text of each token of a canvas, None for masks. A character of several tokens stands at the first of them."""
        pieces: list[str | None] = []
        index = 0
        while index < len(tokens):
            if tokens[index] == self.mask:
                pieces.append(None)
                index += 1
                continue
            size, text = 1, self._piece((tokens[index],))
            while "\ufffd" in text and size < 4 and index + size < len(tokens) and tokens[index + size] != self.mask:
                size += 1
                text = self._piece(tuple(tokens[index : index + size]))
            if "\ufffd" in text:
                size, text = 1, self._piece((tokens[index],))
            pieces += [text, *[""] * (size - 1)]
            index += size
        return pieces

    def _decode_one(self, tokens: tuple[int, ...]) -> str:
        return self.text(list(tokens))

    def _encode(self, prompt: Any, name: str) -> list[int]:
        try:
            return encode(prompt, self._needed(name))
        except ValueError as error:
            raise ApiError(400, str(error), name) from error

    def _needed(self, name: str) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ApiError(400, "The model has no tokenizer: send token ids to /v1/completions.", name)
        return self.tokenizer

    def _check_length(self, characters: int, name: str) -> None:
        """Refuse what cannot fit before it is cut into tokens, which takes as long as the text is."""
        if characters > self.limit * self._longest:
            message = f"`{name}` of {characters} characters is more than the {self.limit} positions of the model hold."
            raise ApiError(413, message, name, "context_length_exceeded")
