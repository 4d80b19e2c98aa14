"""The chat: what ends it, what stops only a text, how settings change, what is printed."""

from __future__ import annotations

import io

import pytest

from horovod_lm.generation.chat import change_setting, chat, printable
from horovod_lm.utils.config import config_from_dict
from horovod_lm.utils.errors import DataError

CONFIG = config_from_dict({})


def talk(monkeypatch, capsys, lines: str) -> tuple[list, str]:
    asked = []

    def answer(prompt, settings):
        asked.append((prompt, settings))
        if prompt == "bad":
            raise DataError("that cannot be read")
        yield from "…!"

    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat(answer, CONFIG)
    return asked, capsys.readouterr().out


@pytest.mark.parametrize("end", ["exit\nmore\n", "q\nmore\n", " QUIT \nmore\n", ""])
def test_stop_words_and_end_of_file_end_it(monkeypatch, capsys, end):
    asked, _ = talk(monkeypatch, capsys, f"hello\n{end}")
    assert [prompt for prompt, _ in asked] == ["hello"]


def test_a_user_error_is_printed_and_the_chat_continues(monkeypatch, capsys):
    _, output = talk(monkeypatch, capsys, "bad\ngood\nq\n")
    assert "that cannot be read" in output and "good…!" in output


def test_settings_apply_to_later_prompts(monkeypatch, capsys):
    asked, output = talk(monkeypatch, capsys, "a\n:temperature 0.5\n:top_k -3\n:seed 7\nb\nq\n")
    (_, before), (_, after) = asked
    assert (before.temperature, before.seed) == (0.8, None)
    assert (after.temperature, after.top_k, after.seed) == (0.5, 50, 7)
    assert "top_k must be greater than or equal to 0" in output


@pytest.mark.parametrize("line", [":help", ":", ":nonsense 3", ":temperature"])
def test_anything_else_shows_the_settings(capsys, line):
    assert change_setting(line, CONFIG) == CONFIG
    output = capsys.readouterr().out
    assert ":temperature 0.8" in output and ":max_new_tokens 100" in output
    assert ("nonsense" in output) == ("nonsense" in line)


def test_control_characters_are_replaced():
    assert printable("a\x1b[2J\x07\x9b\r🙂\n\tש") == "a\ufffd[2J\ufffd\ufffd\ufffd🙂\n\tש"
