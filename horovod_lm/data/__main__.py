"""`python -m horovod_lm.data`: prepare the tokens that a configuration asks for, and look."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from horovod_lm.data.corpora import open_corpus
from horovod_lm.data.prepare import prepare_data
from horovod_lm.utils.cli import add_config_arguments, run_cli
from horovod_lm.utils.config import Config, load_config

DESCRIPTION = """\
Turn text into tokens, once, before training.

The text comes from data.source:
  stories   tiny stories whose entropy, the best possible loss, is known exactly
  python    the source of this Python's standard library, about 12 MB
  files     your own UTF-8 text: data.path is a file, a folder, a glob, or a list of them
  hub       a Hugging Face dataset: data.hub_dataset is its name or a local copy

The tokens go to data.data_dir. Nothing is done when they are there already and nothing has changed.
Training prepares its data by itself; this command is for doing it beforehand, and for looking."""

EXAMPLES = """\
examples:
  python -m horovod_lm.data --config configs/tiny.yaml
  python -m horovod_lm.data --config configs/tiny.yaml --show 3
  python -m horovod_lm.data --config configs/laptop.yaml --set data.source=files \\
      --set data.path=my_book.txt"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.data",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--force", action="store_true", help="prepare again even when nothing has changed"
    )
    parser.add_argument(
        "--show", type=int, metavar="N", help="print the beginning of N documents and stop"
    )
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.show is not None:
        show_documents(config, arguments.show)
        return 0
    started = time.perf_counter()
    progress = ProgressLine()
    metadata = prepare_data(config, force=arguments.force, progress=progress)
    progress.clear()
    seconds = time.perf_counter() - started
    if progress.phase:
        print(f"prepared in {seconds:.1f} s")
    else:
        print("nothing has changed: the data are there already")
    print(summary(metadata, config.resolve(config.data.data_dir)))
    return 0


def show_documents(config: Config, count: int, width: int = 500) -> None:
    """Print the first `width` characters of the first `count` documents."""
    for document in islice(open_corpus(config).documents(), count):
        text = next(iter(document.pieces()), "")
        print(f"--- {document.name} ({document.size:,} bytes)")
        print(text[:width].rstrip() + (" ..." if document.size > width else ""))


def summary(metadata: dict[str, Any], data_dir: Path) -> str:
    """Return what was prepared, as a few lines of text."""
    train, val, tokenizer = metadata["train"], metadata["val"], metadata["tokenizer"]
    bytes_per_token = f"{metadata['bytes_per_token']:.2f} bytes per token"
    lines = [
        f"corpus      {metadata['corpus']}",
        f"tokenizer   {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, {bytes_per_token}",
        f"training    {train['documents']:,} documents, {train['tokens']:,} tokens",
        f"validation  {val['documents']:,} documents, {val['tokens']:,} tokens",
        f"split       {metadata['split']}",
        f"where       {data_dir}",
    ]
    if stories := metadata.get("stories"):
        entropy = stories["entropy_nats_per_story"]
        per_token = entropy / stories["tokens_per_story"]
        lines.append(
            f"best loss   {entropy:.2f} nats per story, {per_token:.4f} per token: entropy"
        )
    return "\n".join(lines)


class ProgressLine:
    """Says how far the work is: one line that changes on a terminal, a line per phase elsewhere."""

    def __init__(self) -> None:
        self.phase: str | None = None
        self._terminal = sys.stderr.isatty()

    def __call__(self, phase: str, done: float) -> None:
        if self._terminal:
            print(end=f"\r\033[K{phase} {done:4.0%}", file=sys.stderr, flush=True)
        elif phase != self.phase:
            print(f"{phase} ...", file=sys.stderr, flush=True)
        self.phase = phase

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._terminal:
            print(end="\r\033[K", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_cli(main)
