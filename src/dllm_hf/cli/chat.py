"""`dllm-hf chat`."""

import argparse
import sys

from .session import Session

try:
    import readline  # noqa: F401  gives `input` line editing and a history
except ImportError:  # Windows
    pass


def chat(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    if not session.tokenizer.chat_template:
        raise ValueError(
            f"{arguments.model} has no chat template, so it was not trained to converse: continue a text with "
            "`dllm-hf generate`, or add a chat_template.jinja to the folder."
        )
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt) as end:
            if sys.stdin.isatty():
                print()  # the shell's prompt belongs on a line of its own
            if isinstance(end, KeyboardInterrupt):
                raise
            return 0
        if line == "/exit":
            return 0
        if line == "/clear":
            messages = []
        elif line:
            messages = _turn(session, [*messages, {"role": "user", "content": line}]) or messages


def _turn(session: Session, messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The conversation with the model's answer, or None where there is no answer: the question is then forgotten."""
    encoding = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    prompt = list(encoding["input_ids"])
    # A turn ends before the sequence does; which token ends it, the tokenizer or LLaDA's config knows.
    ends = [session.tokenizer.eos_token_id, getattr(session.model.config, "eot_token_id", None)]
    try:
        completion = session.complete(prompt, show_prompt=False, more_ends=[end for end in ends if end is not None])
    except KeyboardInterrupt:
        print("(stopped; the question is forgotten)", file=sys.stderr)
        return None
    except ValueError as error:
        print(f"{error} (/clear makes room by forgetting the conversation)", file=sys.stderr)
        return None
    answer = session.text(completion.tokens[0][len(prompt) :])
    if not session.streams:
        print(answer, flush=True)
    print(completion.report, file=sys.stderr)
    return [*messages, {"role": "assistant", "content": answer}]
