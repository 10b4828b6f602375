"""Exported programs as backends of the decoding loop, for machines without the model's own code."""
