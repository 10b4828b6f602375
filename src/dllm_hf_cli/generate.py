"""`dllm-hf generate`."""

import argparse
import sys

from .output import show, tell
from .session import Session


def generate(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    tokens = session.encode(arguments.prompt)
    session.load()
    completion = session.complete(tokens)
    for step in completion.history:
        print(repr(session.tokenizer.decode(step)), file=sys.stderr)
    if not session.streams:
        show("\n\n".join(map(session.text, completion.tokens)))
    tell(completion.report)
    return 0
