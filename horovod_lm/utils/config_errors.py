"""Complaints of the configuration, as sentences: key, what is wrong, what would be right."""

from __future__ import annotations

import difflib
import math
from typing import Any

from pydantic_core import ErrorDetails


def sentence(errors: list[ErrorDetails], valid_keys: list[str]) -> str:
    """Turn pydantic's first complaint into one sentence; a misspelt key goes before a missing one.

    Args:
        errors: what `ValidationError.errors()` gives.
        valid_keys: every dotted key that exists, for the nearest one to a misspelt key.
    """
    unknown = (error for error in errors if error["type"] == "extra_forbidden")
    error = next(unknown, errors[0])
    key = _dotted_key(error, valid_keys)
    if error["type"] == "extra_forbidden":
        nearest = nearest_key(key, valid_keys)
        return f"{key or describe(key)} is not a setting" + (
            f"; the nearest is {nearest}" if nearest else ""
        )
    if error["type"] == "value_error":
        return (f"{key}: " if key else "") + str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{key} must be given"
    # A union such as `int | "auto"` complains once for each of its branches.
    wanted = dict.fromkeys(_wanted(one) for one in errors if _dotted_key(one, valid_keys) == key)
    return f"{key} must be {' or '.join(wanted)}, not {describe(error.get('input'))}"


def nearest_key(key: str, valid_keys: list[str]) -> str | None:
    """Return the valid dotted key that is most like `key`, wherever it stands, or None."""
    by_last_word = {valid.rpartition(".")[2]: valid for valid in valid_keys}
    last = key.rpartition(".")[2]
    if last in by_last_word:
        return by_last_word[last]
    if close := difflib.get_close_matches(key, valid_keys, n=1):
        return close[0]
    close = difflib.get_close_matches(last, by_last_word, n=1)
    return by_last_word[close[0]] if close else None


def describe(value: Any) -> str:
    """Return a value as it may stand in a sentence: short, and `empty` for nothing."""
    if value is None:
        return "empty"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted_key(error: ErrorDetails, valid_keys: list[str]) -> str:
    """Return the path of the setting: pydantic may add a last part that names a union's branch."""
    parts = [str(part) for part in error["loc"]]
    setting = ".".join(parts[:2])
    within_a_list = len(parts) > 2 and parts[2].isdigit()
    return ".".join(parts) if within_a_list or setting not in valid_keys else setting


def _wanted(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    expected = str(context.get("expected", ""))
    phrases = {
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "string_type": "a text",
        "list_type": "a list",
        "model_type": "a section of settings",
        "model_attributes_type": "a section of settings",
        "invalid_key": "named by a text",
        "literal_error": f"one of {expected}" if " or " in expected else expected,
        "string_pattern_mismatch": "a name of letters, digits, dots and hyphens",
        "greater_than": f"greater than {_number(context.get('gt'))}",
        "greater_than_equal": f"at least {_number(context.get('ge'))}",
        "less_than": f"less than {_number(context.get('lt'))}",
        "less_than_equal": f"at most {_number(context.get('le'))}",
        "finite_number": "a finite number",
    }
    return phrases.get(error["type"]) or error["msg"].removeprefix("Input should be ").lower()


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
