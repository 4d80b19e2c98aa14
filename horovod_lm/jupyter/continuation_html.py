"""Continuations as HTML that needs no kernel: coloured text, a token's origin, side by side."""

from __future__ import annotations

import html
from collections.abc import Sequence

from horovod_lm.jupyter.continuation import Continuation
from horovod_lm.jupyter.drawn_token import DrawnToken
from horovod_lm.jupyter.visible import visible, visible_token

# Orange of Okabe and Ito; its share of the background grows with surprise, so that it also differs
# in lightness, and letters stay readable on it in a light and in a dark theme.
FULL_COLOUR_SHARE = 0.6
TEXT_STYLE = "white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7"
# The theme's colour of letters; a page without JupyterLab has none and inherits.
LINE = "1px solid var(--jp-border-color2, #999)"


def colour_of(surprise: float) -> str:
    """Return the background of a token whose surprise is 0 (none) to 1 (full)."""
    return f"rgba(230, 159, 0, {FULL_COLOUR_SHARE * surprise:.3f})"


def coloured_text(continuation: Continuation) -> str:
    """Return a continuation, each token coloured by how unlikely it was, its number on hovering."""
    prompt = html.escape(visible(continuation.prompt))
    rows = "".join(
        f"<div style='{TEXT_STYLE}'><bdi style='opacity: 0.7'>{prompt}</bdi>"
        + "".join(map(_coloured_token, sample))
        + "</div>"
        for sample in continuation.samples
    )
    return f"<div role='group' aria-label='generated text'>{rows}</div>"


def _coloured_token(token: DrawnToken) -> str:
    return (
        f"<bdi title='probability {token.before:.4g}' "
        f"style='background: {colour_of(token.surprise)}'>{html.escape(token.text)}</bdi>"
    )


def settings_in_words(continuation: Continuation) -> str:
    """Return how a text was drawn, in a line."""
    settings = continuation.settings
    return (
        f"temperature {settings.temperature:g}, top-k {settings.top_k or 'all'}, "
        f"top-p {settings.top_p:g}, seed {settings.seed}, {settings.max_new_tokens} tokens"
        + (f", {settings.num_samples} samples" if settings.num_samples > 1 else "")
    )


def distribution_table(token: DrawnToken) -> str:
    """Return the distribution that a token was drawn from, before and after the filters."""
    found = token.distribution
    candidates = found.candidates
    largest = max(max(one.before, one.after) for one in candidates)  # both columns' one scale
    rows = "".join(
        f"<tr{_mark(one.token_id == token.token_id)}><td><bdi style='white-space: pre'>"
        f"{html.escape(in_a_line(visible_token(token.tokenizer, one.token_id)))}</bdi></td>"
        f"{_bar(one.before, largest)}{_bar(one.after, largest)}</tr>"
        for one in candidates
    )
    rest_before = max(0.0, 1 - sum(one.before for one in candidates))
    rest_after = max(0.0, 1 - sum(one.after for one in candidates))
    others = _bar(rest_before, largest) + _bar(rest_after, largest)
    rest = f"<tr><td><i>all others</i></td>{others}</tr>"
    head = "".join(
        f"<th scope='col' style='text-align: left'>{name}</th>"
        for name in ("token", "as learned", "as drawn, after the filters")
    )
    name = html.escape(in_a_line(token.text))
    words = (
        f"<b>“<bdi>{name}</bdi>”</b>: number {found.rank} by likelihood; "
        f"as learned {token.before:.4f}, as drawn {found.after:.4f} among {found.n_kept:,} "
        f"token{'s' if found.n_kept != 1 else ''} that the filters left"
    )
    return (
        f"<p>{words}</p><table aria-label='distribution that the token was drawn from'>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}{rest}</tbody></table>"
    )


def in_a_line(text: str) -> str:
    """Return `visible` text without the ends of its lines; their pictures stay."""
    return text.replace("\n", "")


def side_by_side(continuations: Sequence[Continuation], names: Sequence[str]) -> str:
    """Return continuations in columns, the settings above each."""
    cells = "".join(
        f"<section aria-label='{html.escape(name, quote=True)}' "
        f"style='flex: 1 1 16em; min-width: 0; border: {LINE}; padding: 0.5em'>"
        f"<b>{html.escape(name)}</b><br>{html.escape(settings_in_words(one))}"
        f"<hr>{coloured_text(one)}</section>"
        for one, name in zip(continuations, names, strict=True)
    )
    return f"<div style='display: flex; flex-wrap: wrap; gap: 0.5em'>{cells}</div>"


def _mark(is_drawn: bool) -> str:
    return " aria-current='true' style='font-weight: bold; outline: 2px solid'" if is_drawn else ""


def _bar(probability: float, largest: float) -> str:
    """Return a probability as a number and a bar, which ends at the largest one's length."""
    width = 120 * min(1.0, probability / largest)
    return (
        "<td style='min-width: 14em'><div style='display: flex; align-items: center; gap: 0.5em'>"
        f"<span style='width: 4.5em; text-align: right'>{probability:.4f}</span>"
        f"<span style='width: {width:.1f}px; height: 0.8em; background: #0072B2'></span>"
        "</div></td>"
    )
