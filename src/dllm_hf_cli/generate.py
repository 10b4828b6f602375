"""`dllm-hf generate`."""

import argparse

from .session import Session


def generate(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    tokens = session.encode(arguments.prompt)
    session.load()
    session.complete(tokens)
    return 0
