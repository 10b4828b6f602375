"""Dream's tokenizer: Qwen2's, under the name that the published checkpoints ask for."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """Reads `vocab.json` and `merges.txt`, or `tokenizer.json`."""
