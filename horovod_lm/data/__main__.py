"""`python -m horovod_lm.data`: prepare the tokens of a configuration."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_lm.data.prepare import prepare_data
from horovod_lm.utils.cli import add_config_arguments, run_cli
from horovod_lm.utils.config import load_config
from horovod_lm.utils.progress import ProgressLine

DESCRIPTION = """\
Tokenize the text of a configuration. Training does this itself; the command does it beforehand.

The text comes from data.source:
  stories   tiny stories with a known entropy, the minimum of the loss
  python    the source of this Python's standard library, about 12 MB
  files     your own UTF-8 text: data.path is a file, a folder, a glob, or a list of them
  hub       a Hugging Face dataset: data.hub_dataset is its name or a local copy

The tokens are written to data.data_dir. If they exist and nothing has changed, nothing is done."""

EXAMPLES = """\
examples:
  python -m horovod_lm.data --config configs/tiny.yaml
  python -m horovod_lm.data --config configs/laptop.yaml --set data.source=files \\
      --set data.path=my_book.txt --set data.data_dir=data/preprocessed/my_book"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.data",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    line, phases = ProgressLine(), []

    def show(phase: str, done: float) -> None:
        line.update(f"{phase}: {done:.0%}", keep=phase not in phases)
        phases.append(phase)

    started = time.perf_counter()
    metadata = prepare_data(config, show)
    seconds = time.perf_counter() - started
    line.say(f"prepared in {seconds:.1f} s" if phases else "nothing has changed: the data exist")
    print_summary(metadata, config.resolve(config.data.data_dir))
    return 0


def print_summary(metadata: dict[str, Any], data_dir: Path) -> None:
    """Print the content of prepared data in a few lines."""
    train, val, tokenizer = metadata["train"], metadata["val"], metadata["tokenizer"]
    bytes_per_token = f"{metadata['bytes_per_token']:.2f} bytes per token"
    print(f"corpus      {metadata['corpus']}")
    print(f"tokenizer   {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, {bytes_per_token}")
    print(f"training    {train['documents']:,} documents, {train['tokens']:,} tokens")
    print(f"validation  {val['documents']:,} documents, {val['tokens']:,} tokens")
    print(f"split       {metadata['split']}")
    print(f"folder      {data_dir}")
    if stories := metadata.get("stories"):
        entropy = stories["entropy_nats_per_story"]
        per_token = entropy / stories["tokens_per_story"]
        print(f"entropy     {entropy:.2f} nats per story, {per_token:.4f} per token")


if __name__ == "__main__":
    run_cli(main)
