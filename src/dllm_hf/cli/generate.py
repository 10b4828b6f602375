"""`dllm-hf generate`."""

import argparse
import sys

from .session import Session


def generate(arguments: argparse.Namespace) -> int:
    prompt = arguments.prompt
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    session = Session(arguments)
    completion = session.complete(list(session.tokenizer(prompt)["input_ids"]) if prompt else [])
    for step in completion.history:
        print(repr(session.tokenizer.decode(step)), file=sys.stderr)
    if not session.streams:
        print("\n\n".join(session.text(tokens) for tokens in completion.tokens), flush=True)
    print(completion.report, file=sys.stderr)
    return 0
