"""Which slots hold the beginning of which text: rows with the same one compute it once."""

import hashlib
from array import array


class Beginnings:
    """Finds the longest run of whole blocks that a text has in common with what stands in a slot.

    Blocks are known by a hash of themselves and of all that stands before them (SHA-256: a collision would show one text's
    keys to another), and by the block length, on which keys and values depend.
    """

    def __init__(self) -> None:
        self._slots: dict[bytes, set[int]] = {}
        self._keys: dict[int, list[bytes]] = {}

    def put(self, slot: int, tokens: list[int], block_length: int) -> None:
        """A slot holds, or is about to, the whole blocks of `tokens`, instead of what it held."""
        self.drop(slot)
        self._keys[slot] = keys = _keys_of(tokens, block_length)
        for key in keys:
            self._slots.setdefault(key, set()).add(slot)

    def __contains__(self, slot: int) -> bool:
        return slot in self._keys

    def drop(self, slot: int) -> None:
        """A slot holds nothing that can be relied on."""
        for key in self._keys.pop(slot, []):
            self._slots[key].discard(slot)
            if not self._slots[key]:
                del self._slots[key]

    def find(self, tokens: list[int], block_length: int) -> tuple[list[int], int]:
        """The slots with the longest common beginning, and its length in columns; no slots where there is none."""
        keys = _keys_of(tokens, block_length)
        for index in reversed(range(len(keys))):
            if keys[index] in self._slots:
                return sorted(self._slots[keys[index]]), (index + 1) * block_length
        return [], 0


def _keys_of(tokens: list[int], block_length: int) -> list[bytes]:
    key, keys = block_length.to_bytes(8, "little"), []
    for start in range(0, len(tokens) // block_length * block_length, block_length):
        key = hashlib.sha256(key + array("q", tokens[start : start + block_length]).tobytes()).digest()
        keys.append(key)
    return keys
