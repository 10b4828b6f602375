"""Which slots hold the beginning of which text: rows with the same one compute it once."""

import numpy


class Beginnings:
    """Finds the longest run of whole blocks that a text has in common with what stands in a slot. Tokens are compared, and no
    hashes of them: that is exact, and takes a tenth of the time.

    Args:
        slots: the number of slots.
        columns: no text is longer.
    """

    def __init__(self, slots: int, columns: int):
        self._tokens = numpy.zeros((slots, columns), dtype=numpy.int32)
        self._lengths, self._block_lengths = numpy.zeros((2, slots), dtype=int)

    def put(self, slot: int, tokens: numpy.ndarray, block_length: int) -> None:
        """A slot holds, or is about to, the whole blocks of `tokens`, `(columns,)`, instead of what it held."""
        self._tokens[slot, : len(tokens)] = tokens
        self._lengths[slot], self._block_lengths[slot] = len(tokens), block_length

    def __contains__(self, slot: int) -> bool:
        return bool(self._lengths[slot])

    def drop(self, slot: int) -> None:
        """A slot holds nothing that can be relied on."""
        self._lengths[slot] = 0

    def find(self, tokens: numpy.ndarray, block_length: int) -> tuple[list[int], int]:
        """The slots with the longest common beginning, and its length in columns; no slots where there is none."""
        whole = len(tokens) // block_length * block_length
        text = tokens[:whole].astype(numpy.int32)
        # Most texts differ in their first block.
        alike = (self._lengths >= block_length) & (self._block_lengths == block_length)
        alike &= (self._tokens[:, :block_length] == text[:block_length]).all(1) if whole else False
        (slots,) = alike.nonzero()
        if not len(slots):
            return [], 0
        differs = self._tokens[slots, :whole] != text
        first = differs.argmax(1)
        first[~differs[numpy.arange(len(slots)), first]] = whole  # there is no difference
        common = numpy.minimum(first, self._lengths[slots]) // block_length * block_length
        return slots[common == common.max()].tolist(), int(common.max())
