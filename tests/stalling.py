"""Messages that do something in the process where they are unpacked, and passes that take long."""

import random
import time
from collections.abc import Callable
from typing import Any

from dllm_hf.generation.decoder import Decoder


class Told:
    """What is unpacked as the result of `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def before_the_next_pass(work: Callable[[], object], passes: int = 1) -> None:
    """Of this process; or before each of so many."""
    plain, left = Decoder.launch, passes

    def launch(self):
        nonlocal left
        left -= 1
        if not left:
            Decoder.launch = plain
        work()
        return plain(self)

    Decoder.launch = launch


def move_about(seconds: float) -> None:
    """Be now at one instruction, now at another."""

    def dig(depth: int) -> None:
        dig(depth - 1) if depth else time.sleep(0.01)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        dig(random.randrange(100))
