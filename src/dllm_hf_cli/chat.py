"""`dllm-hf chat`."""

import argparse
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .options import did_you_mean
from .output import read_line, tell
from .session import Session

try:
    import readline  # noqa: F401  gives `input` line editing and a history
except ImportError:  # Windows
    pass

COMMANDS = {
    "/clear": "forget the conversation",
    "/help": "list these commands",
    "/quit": "quit, as /exit and Ctrl-D do",
}
TEMPLATE_SECONDS = 10  # for what takes milliseconds
GREETING = [{"role": "user", "content": "Hi"}]


def chat(arguments: argparse.Namespace) -> int:
    session = Session(arguments)
    if not session.tokenizer.chat_template:
        raise ValueError(
            f"{arguments.model} has no chat template, so it was not trained to converse: continue a text with "
            "`dllm-hf generate`, or add a chat_template.jinja to the folder."
        )
    _encode(session, GREETING)  # a broken template is reported before anything is typed
    session.load()
    messages: list[dict[str, str]] = []
    while (line := read_line("> ")) is not None:
        text = line.strip()
        if not line.startswith("/"):
            if text:
                messages = _turn(session, [*messages, {"role": "user", "content": text}]) or messages
        elif text in ("/quit", "/exit"):
            break
        elif text == "/clear":
            messages = []
        elif text == "/help":
            tell("; ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + ". Ctrl-C stops an answer.")
        else:
            hint = did_you_mean(text, COMMANDS)
            tell(f"{text} is no command{hint}: /help lists them. A blank before it makes it a message.")
    return 0


def _turn(session: Session, messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The conversation with the model's answer, or None where there is no answer: the question is then forgotten."""
    try:
        prompt = _encode(session, messages)
        if session.option("mask_token_id") in prompt:
            raise ValueError(
                f"the conversation holds the mask, {session.tokenizer.mask_token!r}, which the model would fill in where "
                "it stands: write it in another way, or infill with `dllm-hf generate`."
            )
        answer = session.complete(prompt, is_turn=True)
    except KeyboardInterrupt:
        tell("(stopped; the question is forgotten)")
        return None
    except ValueError as error:
        tell(f"{error} (the question is forgotten; /clear forgets the whole conversation)")
        return None
    return [*messages, {"role": "assistant", "content": answer}]


def _encode(session: Session, messages: list[dict[str, str]]) -> list[int]:
    """The tokens that the chat template makes of a conversation. Raises a `ValueError` where the template fails, or
    takes too long."""
    file = session.folder / "chat_template.jinja"
    return templated(session.tokenizer, messages, file if file.is_file() else session.folder / "tokenizer_config.json")


def templated(tokenizer: Any, messages: list[dict[str, str]], file: Path) -> list[int]:
    """As [`_encode`]. file: that holds the template."""
    try:
        with _time_limit(TEMPLATE_SECONDS):
            encoding: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except Exception as error:  # the template is a program
        raise ValueError(f"the chat template in {file} fails: {error}") from error
    return list(encoding["input_ids"])


@contextmanager
def _time_limit(seconds: float):
    """Raises a `TimeoutError`. Windows, which has no SIGALRM, has no limit."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"it has not ended after {seconds:g} seconds")

    handler, timer = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
