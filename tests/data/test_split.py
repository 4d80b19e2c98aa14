"""The split: deterministic, and no text in both parts."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.sources import Document
from horovod_lm.data.split import TRAIN, VAL, CorpusStats, choose_split

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
DOCUMENTS = st.lists(st.lists(TEXT, min_size=1, max_size=3), min_size=1, max_size=30)


def assign(corpus, seed, val_fraction):
    """Return the split's description and its pieces for documents, each a list of pieces."""
    documents = [
        Document("", len("".join(pieces).encode()), partial(iter, pieces)) for pieces in corpus
    ]
    description, split = choose_split(CorpusStats.of(documents, seed), seed, val_fraction)
    return description, list(split(documents))


@settings(deadline=None)
@given(corpus=DOCUMENTS, seed=st.integers(0, 2**32), val_fraction=st.floats(0.01, 0.9))
def test_every_text_is_in_one_part_and_each_part_has_one_if_possible(corpus, seed, val_fraction):
    description, pieces = assign(corpus, seed, val_fraction)
    assert "".join(piece.text for piece in pieces) == "".join(map("".join, corpus))
    assert all(piece.size == len(piece.text.encode()) for piece in pieces)
    if len({document[0] for document in corpus}) > 1:
        assert description == "by document"
        split = iter(pieces)
        parts = {TRAIN: set(), VAL: set()}
        for document in corpus:
            own = [next(split) for _ in document]
            assert [piece.text for piece in own] == document
            assert [piece.starts_document for piece in own] == [True] + [False] * (len(own) - 1)
            assert {piece.part for piece in own} == {own[0].part}
            parts[own[0].part].add(document[0])
        assert parts[TRAIN] and parts[VAL]
        assert not parts[TRAIN] & parts[VAL]  # two copies of a text are in the same part


def test_a_document_keeps_its_part_when_others_are_added_and_another_seed_is_another_split():
    corpus = [[f"document {index}"] for index in range(300)]
    parts = {piece.text: piece.part for piece in assign(corpus, seed=3, val_fraction=0.2)[1]}
    every_other = assign(corpus[::2], seed=3, val_fraction=0.2)[1]
    assert all(parts[piece.text] == piece.part for piece in every_other)
    other_seed = assign(corpus, seed=4, val_fraction=0.2)[1]
    assert any(parts[piece.text] != piece.part for piece in other_seed)


LINES = [f"line {index:03} of the only document\n" for index in range(200)]


@pytest.mark.parametrize("document", [["".join(LINES)], LINES], ids=["whole", "pieces"])
def test_one_document_is_cut_once_at_the_end_of_a_line(document):
    description, pieces = assign([document], seed=0, val_fraction=0.1)
    assert description == "the end of the one document is for validation"
    train, val = (
        "".join(piece.text for piece in pieces if piece.part == part) for part in (TRAIN, VAL)
    )
    assert train + val == "".join(LINES)
    assert train.endswith("\n") and val.startswith("line ")
    assert len(val) / len("".join(LINES)) == pytest.approx(0.1, abs=0.03)
    starts = [index for index, piece in enumerate(pieces) if piece.starts_document]
    assert [pieces[index].part for index in starts] == [TRAIN, VAL] and starts[0] == 0


def test_a_cut_is_between_pieces_or_characters_where_no_line_ends():
    for document in (["a" * 50, "b" * 50], ["ä" * 1000]):
        _, [train, val] = assign([document], seed=0, val_fraction=0.5)
        assert len(train.text) == len(val.text)
        assert (train.part, val.part) == (TRAIN, VAL)
        assert train.starts_document and val.starts_document
