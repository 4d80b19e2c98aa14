"""The split: deterministic, and no text in both parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.sources import Document, text_document
from horovod_lm.data.split import (
    TRAIN,
    VAL,
    CorpusStats,
    DocumentSplit,
    TailSplit,
    choose_split,
    document_number,
)

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=30
)
FRACTIONS = st.floats(0.01, 0.9)


def documents(texts):
    return [text_document(str(index), text) for index, text in enumerate(texts)]


def assign(texts, seed, val_fraction):
    split = choose_split(CorpusStats.of(documents(texts), seed), seed, val_fraction)
    return split, list(split.assign(documents(texts)))


@settings(deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 2**32), val_fraction=FRACTIONS)
def test_every_text_is_in_one_part_and_each_part_has_one_if_possible(texts, seed, val_fraction):
    split, pieces = assign(texts, seed, val_fraction)
    assert "".join(piece.text for piece in pieces) == "".join(texts)
    assert all(piece.size == len(piece.text.encode()) for piece in pieces)
    if len(set(texts)) > 1:
        assert isinstance(split, DocumentSplit)
        assert [piece.text for piece in pieces] == texts
        sides = {
            part: {piece.text for piece in pieces if piece.part == part} for part in (TRAIN, VAL)
        }
        assert not sides[TRAIN] & sides[VAL]  # two copies of a text are in the same part
        assert sides[TRAIN] and sides[VAL]


def test_a_document_keeps_its_part_when_others_are_added_or_removed():
    texts = [f"document {index}" for index in range(300)]
    _, everything = assign(texts, seed=3, val_fraction=0.2)
    _, every_other = assign(texts[::2], seed=3, val_fraction=0.2)
    sides = {piece.text: piece.part for piece in everything}
    assert all(sides[piece.text] == piece.part for piece in every_other)


def test_the_validation_fraction_is_the_requested_one():
    numbers = [document_number(f"document {index}", seed=0) for index in range(20_000)]
    for fraction in (0.05, 0.5):
        share = sum(number < fraction for number in numbers) / len(numbers)
        assert share == pytest.approx(
            fraction, abs=4 * (fraction * (1 - fraction) / len(numbers)) ** 0.5
        )


def test_another_seed_is_another_split():
    texts = [f"document {index}" for index in range(100)]
    sides = [[piece.part for piece in assign(texts, seed, 0.3)[1]] for seed in (0, 1)]
    assert sides[0] != sides[1]


def test_one_document_is_cut_at_the_end_of_a_line():
    lines = [f"line {index} of the only document\n" for index in range(200)]
    split, pieces = assign(["".join(lines)], seed=0, val_fraction=0.1)
    assert isinstance(split, TailSplit)
    train, val = (
        "".join(piece.text for piece in pieces if piece.part == part) for part in (TRAIN, VAL)
    )
    assert train + val == "".join(lines)
    assert train.endswith("\n") and val.startswith("line ")
    assert len(val) / len("".join(lines)) == pytest.approx(0.1, abs=0.03)
    assert [piece.ends_document for piece in pieces] == [True, True]


def test_one_document_in_many_pieces_is_cut_once():
    pieces = [f"piece {index:03}\n" for index in range(100)]
    only = Document("only", sum(map(len, pieces)), lambda: iter(pieces))
    split = choose_split(CorpusStats.of([only], 0), 0, 0.25)
    sides = [piece.part for piece in split.assign([only])]
    assert sides == sorted(sides)  # "train" before "val", and never back
    train = sum(piece.size for piece in split.assign([only]) if piece.part == TRAIN)
    assert train / only.size == pytest.approx(0.75, abs=0.15)


def test_a_line_without_spaces_is_cut_between_characters():
    text = "ä" * 1000
    _, pieces = assign([text], seed=0, val_fraction=0.1)
    assert [piece.text for piece in pieces] == ["ä" * 900, "ä" * 100]


def test_the_pieces_of_a_long_document_stay_together():
    def many(name):
        return Document(name, 30, lambda: iter([f"{name} starts", " goes on", " ends"]))

    corpus = [many(f"document {index}") for index in range(50)]
    split = choose_split(CorpusStats.of(corpus, 1), 1, 0.3)
    pieces = list(split.assign(corpus))
    assert len({piece.part for piece in pieces}) == 2
    for first in range(0, len(pieces), 3):
        assert len({piece.part for piece in pieces[first : first + 3]}) == 1
        assert [piece.ends_document for piece in pieces[first : first + 3]] == [False, False, True]
