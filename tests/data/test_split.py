"""The split: deterministic, and no text in both parts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.data.sources import Document, text_document
from horovod_lm.data.split import TRAIN, VAL, CorpusStats, choose_split, document_number

TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=30
)


def in_pieces(*pieces: str) -> Document:
    return Document("pieces", len("".join(pieces).encode()), lambda: iter(pieces))


def assign(texts, seed, val_fraction):
    """Return the split's description and its pieces for texts or documents."""
    documents = [text if isinstance(text, Document) else text_document("", text) for text in texts]
    description, split = choose_split(CorpusStats.of(documents, seed), seed, val_fraction)
    return description, list(split(documents))


@settings(deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 2**32), val_fraction=st.floats(0.01, 0.9))
def test_every_text_is_in_one_part_and_each_part_has_one_if_possible(texts, seed, val_fraction):
    description, pieces = assign(texts, seed, val_fraction)
    assert "".join(piece.text for piece in pieces) == "".join(texts)
    assert all(piece.size == len(piece.text.encode()) for piece in pieces)
    if len(set(texts)) > 1:
        assert description == "by document"
        assert [piece.text for piece in pieces] == texts
        train, val = ({one.text for one in pieces if one.part == part} for part in (TRAIN, VAL))
        assert train and val
        assert not train & val  # two copies of a text are in the same part


def test_a_document_keeps_its_part_when_others_are_added_and_another_seed_is_another_split():
    texts = [f"document {index}" for index in range(300)]
    parts = {piece.text: piece.part for piece in assign(texts, seed=3, val_fraction=0.2)[1]}
    every_other = assign(texts[::2], seed=3, val_fraction=0.2)[1]
    assert all(parts[piece.text] == piece.part for piece in every_other)
    other_seed = assign(texts, seed=4, val_fraction=0.2)[1]
    assert any(parts[piece.text] != piece.part for piece in other_seed)


def test_the_validation_fraction_is_the_requested_one():
    numbers = [document_number(f"document {index}", seed=0) for index in range(20_000)]
    for fraction in (0.05, 0.5):
        share = sum(number < fraction for number in numbers) / len(numbers)
        error = (fraction * (1 - fraction) / len(numbers)) ** 0.5
        assert share == pytest.approx(fraction, abs=4 * error)


LINES = [f"line {index:03} of the only document\n" for index in range(200)]


@pytest.mark.parametrize("document", ["".join(LINES), in_pieces(*LINES)], ids=["whole", "pieces"])
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
    for document in (in_pieces("a" * 50, "b" * 50), "ä" * 1000):
        _, [train, val] = assign([document], seed=0, val_fraction=0.5)
        assert len(train.text) == len(val.text)
        assert (train.part, val.part) == (TRAIN, VAL)
        assert train.starts_document and val.starts_document


def test_the_pieces_of_a_long_document_stay_together():
    corpus = [in_pieces(f"{index} starts", " goes on", " ends") for index in range(50)]
    _, pieces = assign(corpus, 1, 0.3)
    assert len({piece.part for piece in pieces}) == 2
    for first in range(0, len(pieces), 3):
        assert len({piece.part for piece in pieces[first : first + 3]}) == 1
        starts = [piece.starts_document for piece in pieces[first : first + 3]]
        assert starts == [True, False, False]
