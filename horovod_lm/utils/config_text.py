"""Configurations as text: YAML that is read as it is written, and `--set KEY=VALUE` on top."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from horovod_lm.utils.errors import ConfigError


def read_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        yaml.YAMLError: it is no YAML, or has the same key twice.
    """
    return yaml.load(text, Loader=_Loader)


def write_yaml(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML, from which `read_yaml` gives the same values."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(
    content: Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any]
) -> dict[str, Any]:
    """Return `content` with some settings changed; `load_config` says what `overrides` may be.

    Raises:
        ConfigError: a text is not KEY=VALUE.
    """
    result = copy.deepcopy(dict(content))
    if isinstance(overrides, str):
        overrides = [overrides]
    items = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    for key, value in items:
        _set(result, str(key).split("."), value)
    return result


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = str(text).partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"--set takes KEY=VALUE, for example training.learning_rate=1e-3, not {text!r}"
        )
    try:
        return key.strip(), read_yaml(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {key.strip()}: the value {value!r} cannot be read: {one_line(error)}"
        ) from None


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = content.get(key)
        content[key] = below = dict(below) if isinstance(below, Mapping) else {}
        content = below
    last = keys[-1]
    if isinstance(value, Mapping):
        below = content.get(last)
        content[last] = dict(below) if isinstance(below, Mapping) else {}
        for key, inner in value.items():
            _set(content[last], str(key).split("."), inner)
    else:
        content[last] = value


def one_line(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text and keeps the last of two equal keys; this one does neither."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if keys[number] in keys[:number]:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {keys[number]!r} stands there twice (line {line})")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """PyYAML writes Unicode's line breaks raw and reads them as spaces; this escapes them."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        breaks = any(character in text for character in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.yaml_implicit_resolvers = copy.deepcopy(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
# What the loader takes for a number, the dumper must write in quotes when it is a text.
_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
