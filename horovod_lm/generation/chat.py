"""A chat in a terminal: read a prompt, print the generated text as it arrives, repeat."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator

from horovod_lm.utils.config import Config, GenerationConfig
from horovod_lm.utils.errors import ConfigError, UserError

STOP_WORDS = ("exit", "quit", "q")

Answer = Callable[[str, GenerationConfig], Iterator[str]]


def chat(answer: Answer, config: Config) -> None:
    """Read prompts from standard input and print each with its continuation.

    `answer` takes a prompt and settings, and yields the pieces of a continuation; `config` gives
    the initial settings.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history and line editing
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # invalid bytes must not end the chat
    print("Type the beginning of a text. :help shows the settings; exit, quit or q ends.")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line.strip().lower() in STOP_WORDS:
            return
        if line.startswith(":"):
            config = change_setting(line, config)
            continue
        try:
            for piece in itertools.chain([line], answer(line, config.generation)):
                print(printable(piece), end="", flush=True)
            print("\n")
        except KeyboardInterrupt:
            print(" [stopped]\n")  # Ctrl-C stops only this text
        except UserError as error:
            print(f"\n{error}\n")


def change_setting(line: str, config: Config) -> Config:
    """Apply a line such as `:temperature 0.5`; for `:help` or any other, show the settings."""
    name, _, value = line[1:].strip().partition(" ")
    settings = config.generation.model_dump(exclude={"num_samples"})  # a chat has one sample
    if name in settings and value:
        try:
            config = config.with_overrides([f"generation.{name}={value.strip()}"])
            print(f"{name} = {getattr(config.generation, name)}")
        except ConfigError as error:
            print(error)
        return config
    if name not in ("help", *settings):
        print(f"There is no setting {name!r}. The settings are:")
    print("\n".join(f":{name} {value}" for name, value in settings.items()))
    return config


def printable(text: str) -> str:
    """Replace control characters, which could move the cursor or clear the screen."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
