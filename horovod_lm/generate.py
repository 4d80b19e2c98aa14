"""Generate text with a trained model: the public functions and the command.

python -m horovod_lm.generate --checkpoint runs/my_run --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from horovod_lm.generation.chat import chat
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import Config, GenerationConfig

if TYPE_CHECKING:
    import torch

    from horovod_lm.data.tokenizers import Tokenizer
    from horovod_lm.generation.load import load_model_for_generation
    from horovod_lm.generation.text import generate_text, stream_text
    from horovod_lm.models.transformer_lm import TransformerLM

__all__ = ["generate_text", "interactive_generation", "load_model_for_generation", "stream_text"]


def __getattr__(name: str) -> Any:
    """Import a function, and torch with it, on first use: `--help` needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "load" if name == "load_model_for_generation" else "text"
    return getattr(import_module(f"horovod_lm.generation.{module}"), name)


def interactive_generation(
    model: TransformerLM,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device | str | None = None,
) -> None:
    """Chat with a model in a terminal, or show a playground in a notebook.

    In a terminal, `exit`, `quit`, `q`, Ctrl-D or Ctrl-C at the prompt end the chat; Ctrl-C during
    generation stops only that text. `:temperature 0.5` changes a setting, `:help` lists them.
    `config.generation` holds the initial settings; `device` is as for `generate_text`.
    """
    from horovod_lm.generation.text import stream_text

    ipython = sys.modules.get("IPython")  # a Jupyter kernel has imported it
    if ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
        from horovod_lm.jupyter.widgets.playground import show_playground

        return show_playground(model, tokenizer, config, device)
    chat(lambda prompt, how: stream_text(model, tokenizer, prompt, how, device), config)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.generate",
        description="Continue a text with a trained model. "
        "Without --prompt, in a terminal, start a chat.",
        epilog="The model gives every token a probability. --temperature sharpens (below 1) or "
        "flattens (above 1) the distribution, --top-k and --top-p remove the most unlikely tokens; "
        "then one token is sampled. "
        'For example: --checkpoint runs/my_run --prompt "Once upon a time" --seed 1',
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a checkpoint, or a run's folder")
    add("--config", metavar="FILE", help="use this configuration instead of the checkpoint's")
    add("--prompt", metavar="TEXT", help="the beginning of the text; may be empty")
    for name, field in GenerationConfig.model_fields.items():
        kind, letter = (float, "X") if isinstance(field.default, float) else (int, "N")
        option = "--" + name.replace("_", "-")
        add(option, type=kind, metavar=letter, help=field.description)
    add("--interactive", action="store_true", help="chat: one prompt after another")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add(
        "--dtype",
        default="float32",
        help="type of the weights: float32, or bfloat16 for half the memory and "
        "slightly different probabilities (default: float32)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    # Imported here, because torch takes a second, which --help need not wait for.
    from horovod_lm.generation.load import load_model_for_generation
    from horovod_lm.generation.text import generate_text

    settings = {name: getattr(arguments, name) for name in GenerationConfig.model_fields}
    given = {name: value for name, value in settings.items() if value is not None}
    model, tokenizer, config = load_model_for_generation(
        arguments.checkpoint, arguments.config, arguments.device, arguments.dtype
    )
    config = config.with_overrides({"generation": given})
    if arguments.interactive or (arguments.prompt is None and sys.stdin.isatty()):
        interactive_generation(model, tokenizer, config)
        return 0
    texts = generate_text(
        model, tokenizer, arguments.prompt or "", **config.generation.model_dump()
    )
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    run_cli(main)
