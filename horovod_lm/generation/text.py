"""From a prompt to text: the whole text at once, or streamed token by token."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

import torch

from horovod_lm.data.tokenizers import UNKNOWN, Tokenizer, check_text
from horovod_lm.generation.sampling import generate_tokens, generation_config, make_generator
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import GenerationConfig
from horovod_lm.utils.distributed import choose_device


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

    The prompt is the beginning of a document: an end-of-text token precedes it, as in training.

    Args:
        model: the model; it is moved to `device`.
        tokenizer: the model's tokenizer.
        prompt: any text, also an empty one; only its end if it is longer than the model's context.
        max_new_tokens, temperature, top_k, top_p: as for `TransformerLM.generate`.
        num_samples: number of texts to return, each the prompt and a continuation.
        device: as for `choose_device`; None: the model's own.
        seed: the same seed gives the same texts; None: new ones each time.

    Raises:
        ConfigError: an invalid setting.
        DataError: a prompt that cannot be encoded.
    """
    settings = generation_config(max_new_tokens, temperature, top_k, top_p, num_samples, seed)
    steps = continue_prompt(model, tokenizer, prompt, settings, device)
    texts = []
    for row in torch.stack(list(steps), dim=1).tolist():  # (num_samples, new)
        end = row.index(tokenizer.eot_id) if tokenizer.eot_id in row else len(row)
        texts.append(prompt + tokenizer.decode(row[:end]))
    return texts


def stream_text(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    device: torch.device | str | None = None,
) -> Iterator[str]:
    """Continue a prompt once and yield the text as soon as its characters are complete.

    Joined, the pieces are what `generate_text` adds to the prompt.
    """
    settings = settings.model_copy(update={"num_samples": 1})
    with closing(continue_prompt(model, tokenizer, prompt, settings, device)) as steps:
        yield from decode_stream(tokenizer, (int(tokens) for tokens in steps))


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens up to end-of-text as they arrive, whole characters only.

    A character beyond ASCII has two to four bytes in UTF-8, and a token may end between them. An
    incomplete character decodes to one replacement character, which is held back.
    """
    pending: list[int] = []
    n_shown = 0  # characters of the pending tokens that have been yielded
    for token in tokens:
        if token == tokenizer.eot_id:
            break
        pending.append(token)
        text = tokenizer.decode(pending)
        complete = text.removesuffix(UNKNOWN)
        if len(complete) > n_shown:
            yield complete[n_shown:]
            n_shown = len(complete)
        if len(complete) == len(text):
            pending, n_shown = [], 0
    if pending:
        yield tokenizer.decode(pending)[n_shown:]


def continue_prompt(
    model: TransformerLM,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerationConfig,
    device: torch.device | str | None = None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> Generator[torch.Tensor, None, None]:
    """Start generating continuations of a prompt; arguments as for `generate_text`.

    `on_logits` is called with the logits (num_samples, V) that each step samples from. Returns an
    iterator over each step's (num_samples,) token ids, end-of-text included.
    """
    if device is not None:
        model.to(choose_device(device))
    device = next(model.parameters()).device
    check_text(prompt, "the prompt")
    prompt_ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    input_ids = torch.tensor([prompt_ids] * settings.num_samples, device=device)  # (B, T)
    return generate_tokens(
        model, input_ids, settings, tokenizer.eot_id,
        generator=make_generator(settings.seed, device), on_logits=on_logits,
    )  # fmt: skip
