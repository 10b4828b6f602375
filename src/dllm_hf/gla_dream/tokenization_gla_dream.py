"""GLADream's tokenizer: Dream's."""

from ..dream.tokenization_dream import DreamTokenizer


class GLADreamTokenizer(DreamTokenizer):
    """Reads `vocab.json` and `merges.txt`, or `tokenizer.json`."""
