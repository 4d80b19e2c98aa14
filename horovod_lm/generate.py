"""Talk to a trained model: load it, continue a prompt, stream text, or converse in a terminal.

python -m horovod_lm.generate --checkpoint runs/my_run --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from horovod_lm.conversation import converse
from horovod_lm.load import choose_device, load_model_for_generation
from horovod_lm.models.sampling import SamplingSettings, decode, make_generator
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.cli import run_cli
from horovod_lm.utils.config import Config, GenerationConfig
from horovod_lm.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from horovod_lm.data.tokenizers import Tokenizer

__all__ = [
    "decode_prompt",
    "generate_text",
    "interactive_generation",
    "load_model_for_generation",
    "stream_text",
    "stream_tokens",
    "whole_characters",
]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are not (yet) a character decode to


def generate_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.9,
    num_samples: int = 1,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> list[str]:
    """Continue a prompt.

    The prompt is read as the beginning of a document: after an end-of-text token, as in training.
    An empty prompt so begins a document of the model's own.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: the tokenizer that it was trained with.
        prompt: any text. Only its end is used when it is longer than the model's context.
        max_new_tokens: the most tokens to add; a text that ends by itself is shorter.
        temperature: 0 is always the likeliest token, 1 the model's own distribution.
        top_k: draw among the k likeliest tokens only; 0 or None: among all.
        top_p: draw among the likeliest tokens that together have this probability; 1 or None: all.
        num_samples: how many continuations to draw, together in one batch.
        device: None: where the model is; else as for `load_model_for_generation`.
        seed: the same seed draws the same texts; None: new ones each time.

    Returns:
        `num_samples` texts, each the prompt and its continuation.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a prompt that cannot be encoded.
    """
    steps = decode_prompt(
        model, tokenizer, prompt, num_samples, max_new_tokens,
        SamplingSettings(temperature, top_k, top_p), device, seed,
    )  # fmt: skip
    columns = [tokens.tolist() for tokens in steps]  # one list of num_samples tokens per step
    rows = zip(*columns, strict=True) if columns else [()] * num_samples
    return [prompt + tokenizer.decode(_until_end(row, tokenizer.eot_id)) for row in rows]


def stream_tokens(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.9,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> Iterator[int]:
    """Continue a prompt as `generate_text` does, yielding each new token as soon as it is drawn.

    Yields:
        Token ids; the end-of-text token is not among them.
    """
    steps = decode_prompt(
        model, tokenizer, prompt, 1, max_new_tokens,
        SamplingSettings(temperature, top_k, top_p), device, seed,
    )  # fmt: skip
    with closing(steps):
        for tokens in steps:
            token = tokens.item()
            if token == tokenizer.eot_id:
                return
            yield token


def stream_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.9,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue a prompt as `generate_text` does, yielding text as soon as its characters are whole.

    Yields:
        Pieces of the continuation; joined, they are what `generate_text` adds to the prompt.
    """
    tokens = stream_tokens(
        model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p, device, seed
    )
    with closing(tokens):
        yield from whole_characters(tokenizer, tokens)


def whole_characters(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they come, holding back bytes that do not yet form a whole character.

    A character beyond ASCII is two to four bytes in UTF-8, and a token may end between them. Such
    an end decodes to one replacement character: it is held back until more is known.
    """
    pending: list[int] = []
    shown = 0  # characters of the pending tokens that are out already
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(pending)
        whole = text.removesuffix(UNFINISHED)
        if len(whole) > shown:
            yield whole[shown:]
            shown = len(whole)
        if len(whole) == len(text):
            pending, shown = [], 0
    if pending:
        yield tokenizer.decode(pending)[shown:]


def interactive_generation(
    model: TransformerLM,
    tokenizer: Tokenizer,
    config: Config,
    device: torch.device | str | None = None,
) -> None:
    """Converse: in a terminal with one prompt after another, in a notebook in a playground.

    In a terminal, `exit`, `quit`, `q`, Ctrl-D or Ctrl-C at the prompt end it; Ctrl-C while the
    model writes stops only that text. `:temperature 0.5` changes a setting, `:help` names them all.
    In a notebook, the call shows a `horovod_lm.jupyter.playground.Playground` and returns.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: its tokenizer.
        config: its `generation` section gives the settings to begin with.
        device: as for `generate_text`.
    """
    if _in_notebook():
        from horovod_lm.jupyter.playground import show_playground

        return show_playground(model, tokenizer, config, device)

    def answer(prompt: str, settings: GenerationConfig) -> Iterator[str]:
        return stream_text(
            model,
            tokenizer,
            prompt,
            device=device,
            **settings.model_dump(exclude={"num_samples"}),
        )

    converse(answer, config)


def _in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this: a terminal's IPython has no kernel."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it long ago
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def decode_prompt(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    num_samples: int,
    max_new_tokens: int,
    settings: SamplingSettings,
    device: torch.device | str | None = None,
    seed: int | None = None,
    watch: Callable[[torch.Tensor], None] | None = None,
) -> Iterator[torch.Tensor]:
    """Start to continue a prompt; the arguments are those of `generate_text`.

    Args:
        watch: is given the logits (num_samples, V) that each step's tokens are drawn from.

    Returns:
        An iterator over each step's (num_samples,) token ids, end-of-text included.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples must be at least 1, got {num_samples}")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens must be 0 or above, got {max_new_tokens}")
    if device is not None:
        model.to(choose_device(device))
    device = next(model.parameters()).device
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the prompt holds half a character, {prompt[error.start]!r} at position "
            f"{error.start}, which has no UTF-8 form: leave it out"
        ) from None
    prompt_ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    input_ids = torch.tensor([prompt_ids] * num_samples, device=device)  # (num_samples, T)
    generator = make_generator(seed, device)
    return decode(
        model, input_ids, max_new_tokens, settings, tokenizer.eot_id,
        generator=generator, watch=watch,
    )  # fmt: skip


def _until_end(tokens: Sequence[int], eot_id: int) -> list[int]:
    return list(tokens[: tokens.index(eot_id)] if eot_id in tokens else tokens)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m horovod_lm.generate",
        description="Let a trained model continue a text. "
        "Without --prompt, on a terminal, it converses.",
        epilog="The model gives every token a probability. --temperature sharpens (below 1) or "
        "flattens (above 1) them, --top-k and --top-p cut off the unlikely ones; then one token is "
        'drawn. For example: --checkpoint runs/my_run --prompt "Once upon a time" --seed 1',
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a checkpoint, or a run's folder")
    add("--config", metavar="FILE", help="settings to use instead of the checkpoint's own")
    add("--prompt", metavar="TEXT", help="the beginning; empty: the model begins by itself")
    add("--max-new-tokens", type=int, metavar="N", help="the most tokens to add")
    add("--temperature", type=float, metavar="T", help="0: always the likeliest; 1: as learned")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens; 0: all")
    add(
        "--top-p", type=float, metavar="P", help="draw among the likeliest P of probability; 1: all"
    )
    add("--num-samples", type=int, metavar="N", help="how many texts to draw")
    add("--seed", type=int, metavar="N", help="the same seed, the same text")
    add("--interactive", action="store_true", help="converse: one prompt after another")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "num_samples", "seed")
    given = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    model, tokenizer, config = load_model_for_generation(
        arguments.checkpoint, arguments.config, arguments.device
    )
    config = config.with_overrides({"generation": given})
    if arguments.interactive or (arguments.prompt is None and sys.stdin.isatty()):
        interactive_generation(model, tokenizer, config)
        return 0
    texts = generate_text(
        model, tokenizer, arguments.prompt or "", **config.generation.model_dump()
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    print("\n\n".join(texts))
    return 0


if __name__ == "__main__":
    run_cli(main)
