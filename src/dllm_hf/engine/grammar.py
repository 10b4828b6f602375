"""Output of a form that is asked for: JSON, a regular expression, a choice, a grammar.

Such a completion is decoded one token a step, always at the leftmost open position. All text to the left is known then, and
what may follow it is known exactly, as with an autoregressive model; in any other order it is not, since what is allowed at
a position depends on others that are open. The parser is llguidance (https://github.com/guidance-ai/llguidance): it refuses
what it does not implement, where others leave it out without a word.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy
from transformers import PreTrainedTokenizerBase

from .sampling_params import StructuredOutputsParams


class FormError(ValueError):
    """A completion cannot go on in the form that was asked for: the parser has met one of its limits."""


class Grammars:
    """Makes grammars for one model.

    Args:
        vocab_size: of its logits.

    Raises:
        ValueError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int):
        if tokenizer is None:
            raise ValueError("`structured_outputs` need the text of tokens, and there is no tokenizer.")
        try:
            self._library, reader = import_module("llguidance"), import_module("llguidance.hf")
        except ImportError as error:
            raise ValueError(
                f'`structured_outputs` need llguidance: `pip install "dllm-hf[grammar]"`. {error}'
            ) from error
        # Which tokens end a completion is the request's affair, see [`Grammar`].
        self._end = int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else vocab_size - 1)
        try:
            self._tokens = reader.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=self._end)
        except Exception as error:
            raise ValueError(
                f"`structured_outputs` need a tokenizer that llguidance reads, and {type(tokenizer).__name__} is none: {error}"
            ) from error
        self._limits = self._library.LLParserLimits(verbose_errors=False)
        self.vocab_size, self._matcher = vocab_size, lru_cache(64)(self._make)

    def make(self, form: StructuredOutputsParams, ends: list[int], left_out: list[int]) -> "Grammar":
        """A grammar at its beginning.

        Args:
            ends: tokens that may end the text where it is complete, if they are special ones.
            left_out: tokens that may never be given.

        Raises:
            ValueError: the form is none, or the vocabulary has no token to begin it with.
        """
        matcher = self._matcher(*form.source).deep_copy()
        inner, final = numpy.ones(self.vocab_size, dtype=bool), numpy.zeros(self.vocab_size, dtype=bool)
        inner[[self._end, *ends, *left_out]] = False
        # A text that has the form must not show its end.
        final[[token for token in ends if token not in left_out and self._tokens.is_special_token(token)]] = True
        grammar = Grammar(matcher, _packed(inner), _packed(final))
        if grammar.problem is not None:
            raise ValueError(f"`structured_outputs` cannot be begun: {grammar.problem}")
        return grammar

    def _make(self, kind: str, source: str) -> Any:
        matcher = self._library.LLMatcher
        make = {"json": matcher.grammar_from_json_schema, "regex": matcher.grammar_from_regex}
        try:
            grammar = make.get(kind, matcher.grammar_from_lark)(source)
            is_wrong, messages = matcher.validate_grammar_with_warnings(grammar, self._tokens, limits=self._limits)
        except ValueError as error:  # no JSON, or half a character
            is_wrong, messages = True, [str(error)]
        if is_wrong:
            raise ValueError(f"`structured_outputs` hold no {kind} that can be kept: {messages[0]}")
        return matcher(self._tokens, grammar, log_level=0, limits=self._limits)


class Grammar:
    """How far one completion has come in its form.

    Args:
        inner, final: the tokens that may stand inside of it, and those that may end it, as bits.

    Attributes:
        number: tokens that it has taken.
        allowed: `(words,)` int32, a bit for each token that may come next.
        is_over: whether nothing can follow, and the text is whole.
        problem: why it cannot go on, where it cannot and is not over.
    """

    def __init__(self, matcher: Any, inner: numpy.ndarray, final: numpy.ndarray):
        self._matcher, self._inner, self._final = matcher, inner, final
        self.number, self.is_over = 0, False
        self.problem: str | None = None
        self.allowed = self._find()

    def copy(self) -> "Grammar":
        """One at the same place, for another completion."""
        return Grammar(self._matcher.deep_copy(), self._inner, self._final)

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self.number += 1
        if self._final[token >> 5] >> (token & 31) & 1:
            self.is_over = True
            return
        self._matcher.consume_token(token)
        self.is_over = self._matcher.is_stopped() and not self._matcher.is_error()
        if not self.is_over:
            self.allowed = self._find()

    def _find(self) -> numpy.ndarray:
        allowed = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.int32) & self._inner
        reason = self._matcher.get_error().partition("\n")[0]
        if reason and "NoExtension" not in reason:
            self.problem = f"the parser of the form gives up: {reason}."
        elif self._matcher.is_accepting():
            allowed = allowed | self._final
            self.is_over = not allowed.any()
        elif not allowed.any():
            self.problem = "no token that may be proposed goes on with a text of this form."
        return allowed


def _packed(flags: numpy.ndarray) -> numpy.ndarray:
    """Bits, 32 to an int32, the first token's the lowest."""
    padded = numpy.pad(flags, (0, -len(flags) % 32))
    return numpy.packbits(padded, bitorder="little").view("<i4").astype(numpy.int32)
