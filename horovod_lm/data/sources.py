"""Text sources: `data.source` selects stories, the Python library, files or a hub dataset.

A corpus is a series of documents, and a document a series of pieces of text. Both are read as
streams, so a corpus may be larger than memory.
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from horovod_lm.data.synthetic.stories import RULES, generate_stories
from horovod_lm.data.tokenizers import check_reachable
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DataError

NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
GENERATED = {"encodings", "pydoc_data"}  # a table in validation would be much like one in training
PIECE_BYTES = 1 << 16  # files are read in pieces: BPE training buffers 256 of them
SAVE_OR_EXCLUDE = "save it as UTF-8, or exclude it with a glob such as 'folder/**/*.txt'"
ARTICLE_HEADING = re.compile(r" = (?!= ).+(?<! =) = \n?")  # WikiText: ` = Title = `


@dataclass(frozen=True)
class Document:
    """One text: its name, its size in UTF-8 bytes, and a function that reads it in pieces."""

    name: str
    size: int
    pieces: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Corpus:
    """A series of documents that can be read repeatedly, in the same order.

    `documents` and `validation` start reading from the first document. `validation` is the source's
    own validation split: if it is not empty, `documents` are for training only. `fingerprint` holds
    plain values that change when the text changes.
    """

    description: str
    documents: Callable[[], Iterator[Document]]
    fingerprint: dict[str, Any]
    validation: Callable[[], Iterator[Document]] = lambda: iter(())


def open_corpus(config: Config) -> Corpus:
    """Return the corpus of `config.data`, limited to `data.max_bytes` bytes.

    Raises:
        DataError: the text does not exist or cannot be read.
    """
    sources = {"stories": _stories, "python": _python, "files": _files, "hub": _hub}
    with _as_data_error():
        corpus = sources[config.data.source](config)
    if not (limit := config.data.max_bytes):
        return corpus
    val_limit = max(1, round(limit * config.data.val_fraction))
    return replace(
        corpus,
        documents=lambda: _first_bytes(corpus.documents(), limit),
        validation=lambda: _first_bytes(corpus.validation(), val_limit),
    )


@contextmanager
def _as_data_error(file: Path | None = None) -> Iterator[None]:
    """Raise DataError, which names the file, for what the system does not allow."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or file} cannot be read: {error.strerror}") from None


def text_document(name: str, text: str) -> Document:
    """Return a document whose text is in memory."""
    return Document(name, len(text.encode("utf-8")), lambda: [text])


def _stories(config: Config) -> Corpus:
    count, seed = config.data.num_stories, config.seed

    def documents() -> Iterator[Document]:
        for index, story in enumerate(generate_stories(count, seed)):
            yield text_document(f"story {index}", story)

    grammar = hashlib.sha256(repr(RULES).encode()).hexdigest()
    return Corpus(f"{count:,} tiny stories", documents, {"grammar": grammar})


def _python(config: Config) -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for folder in _folders(root, NOT_THE_LIBRARY | GENERATED)
        for file in folder.glob("*.py")
    ]
    description = f"the standard library of Python {sys.version.split()[0]}"
    return _file_corpus(description, sorted(files), root)


def _files(config: Config) -> Corpus:
    files = {file for pattern in config.data.paths for file in _matching_files(config, pattern)}
    return _file_corpus(", ".join(config.data.paths), sorted(files), config.project_root)


def _matching_files(config: Config, pattern: str) -> list[Path]:
    """Return the files of a path, a folder or a glob; at least one.

    The longest beginning of the path that exists is taken literally, whatever its characters.
    """
    path = config.resolve(pattern)
    if path.is_file():
        return [path]
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if path == existing and not path.is_dir():
        raise DataError(f"data.path {pattern} is neither a file nor a folder ({path})")
    parts = path.relative_to(existing).parts or ("**", "*")
    data_dir = config.resolve(config.data.data_dir)
    files = [file for file in _matches(existing, parts) if file.parent != data_dir]
    if not files:
        problem = "the folder has no files" if path == existing else "no such file or match"
        raise DataError(f"data.path {pattern}: {problem} ({path})")
    return files


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the files in `folder` that match the parts of a glob, without hidden ones."""
    first, *rest = parts
    if first == "**":
        for below in _folders(folder):
            yield from _matches(below, rest or ["*"])
        return
    for path in folder.iterdir():
        is_hidden = path.name.startswith(".") and not first.startswith(".")
        if is_hidden or not fnmatch.fnmatchcase(path.name, first):
            continue
        if rest and path.is_dir():
            yield from _matches(path, rest)
        elif not rest and path.is_file():
            yield path


def _folders(folder: Path, excluded: Collection[str] = ()) -> Iterator[Path]:
    """Yield a folder and those below it, once each, without hidden and excluded ones.

    Links are followed, but not to a folder that was visited or that contains `folder`.
    """

    def fail(error: OSError) -> NoReturn:
        raise error

    visited = {str(parent) for parent in folder.resolve().parents}
    for name, below, _ in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(name)
        if real in visited:
            below.clear()
            continue
        visited.add(real)
        # Pruned, not filtered: site-packages may contain a hundred thousand files.
        below[:] = [one for one in below if one not in excluded and not one.startswith(".")]
        yield Path(name)


def _file_corpus(description: str, files: list[Path], root: Path) -> Corpus:
    """Return a corpus with a document for each file that is not empty."""

    def documents() -> Iterator[Document]:
        for file in files:
            with _as_data_error():
                size = file.stat().st_size
            if size:
                yield Document(str(file), size, partial(read_text_file, file))

    return Corpus(description, documents, {"files": _listing(files, root)})


def _listing(files: Iterable[Path], root: Path) -> str:
    """Return a hash of the files' names, sizes and modification times."""
    stats = []
    for file in files:
        name = file.relative_to(root) if file.is_relative_to(root) else file
        stats.append((str(name), file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def read_text_file(file: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces of about `piece_bytes`, cut at line ends.

    A byte-order mark at its start is removed.

    Raises:
        DataError: a byte is not UTF-8 (the message has the file and the byte's offset), a quarter
            of the beginning is zero bytes, or the file cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size, rest = 0, ""  # bytes read, and the text after the last line end
    try:
        with _as_data_error(file), file.open("rb") as stream:
            while block := stream.read(piece_bytes):
                if size == 0 and 4 * block.count(0) > len(block):
                    raise DataError(
                        f"{file} is not UTF-8 text: {block.count(0)} of its first {len(block)} "
                        f"bytes are 0, as in UTF-16 or a binary file; {SAVE_OR_EXCLUDE}"
                    )
                size += len(block)
                text = rest + decoder.decode(block)
                cut = text.rfind("\n") + 1 or len(text)
                if cut:
                    yield text[:cut]
                rest = text[cut:]
        if rest := rest + decoder.decode(b"", final=True):
            yield rest
    except UnicodeDecodeError as error:
        offset = size - len(error.object) + error.start
        raise DataError(
            f"{file} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {offset} "
            f"({error.reason}); {SAVE_OR_EXCLUDE}"
        ) from None


def _hub(config: Config) -> Corpus:
    name = str(config.data.hub_dataset)
    open_once = cache(partial(_open_hub_dataset, config))

    def documents(split: str) -> Iterator[Document]:
        try:
            rows = open_once().get(split, ())
            for index, text in enumerate(_join_articles(_row_texts(config, rows))):
                yield text_document(f"{name} {split} {index}", text)
        except DataError:
            raise
        except Exception as error:  # any of the libraries behind a stream may raise
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the dataset {name} cannot be read ({type(error).__name__}: {reason}); "
                "check data.hub_dataset, data.hub_config and the network"
            ) from None

    folder = config.resolve(name)
    folders = _folders(folder) if folder.is_dir() else ()
    local_files = sorted(file for below in folders for file in below.iterdir() if file.is_file())
    return Corpus(
        f"the dataset {name}",
        partial(documents, "train"),
        {"local_files": _listing(local_files, folder)},
        partial(documents, "validation"),
    )


def _row_texts(config: Config, rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    field = config.data.hub_text_field
    for row in rows:
        if field not in row:
            raise DataError(
                f"{config.data.hub_dataset} has no field {field!r}: set data.hub_text_field to one "
                f"of {', '.join(row)}"
            )
        yield row[field] or ""


def _join_articles(rows: Iterator[str]) -> Iterator[str]:
    """Yield the rows that are not empty, or articles if the first one is a heading of WikiText.

    In WikiText each row is a line, and an article starts with a row ` = Title = `.
    """
    first = next(filter(None, rows), "")
    rows = itertools.chain([first], rows)
    if not ARTICLE_HEADING.fullmatch(first):
        yield from filter(None, rows)
        return
    article = ""
    for row in rows:
        if article and ARTICLE_HEADING.fullmatch(row):
            yield article
            article = ""
        article += row if row.endswith("\n") else row + "\n"
    yield article


def _open_hub_dataset(config: Config) -> dict[str, Iterable[dict[str, Any]]]:
    """Return the rows of each split of the dataset, streamed or memory-mapped."""
    name, subset = str(config.data.hub_dataset), config.data.hub_config
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.source=hub needs the library 'datasets': pip install 'horovod_lm[hub]', "
            "or use another data.source"
        ) from None
    local = config.resolve(name)
    if any((local / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(str(local))
        return saved if isinstance(saved, dict) else {"train": saved}
    if local.exists():
        if "[" in str(local):  # https://github.com/huggingface/datasets/issues/7468
            raise DataError(
                f"the library 'datasets' finds no files in {local}, because it takes brackets in a "
                "path for a pattern: rename the folder, or use a copy made with save_to_disk"
            )
        return datasets.load_dataset(str(local), subset, streaming=True)
    check_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    return datasets.load_dataset(name, subset, streaming=True)


def _first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """Yield whole documents of at most `limit` bytes together; cut a larger first one."""
    room = limit
    for document in documents:
        if document.size > room:
            if room == limit:
                yield Document(document.name, limit, partial(_cut, document, limit))
            return
        room -= document.size
        yield document


def _cut(document: Document, size: int) -> Iterator[str]:
    """Yield the first `size` bytes of a document, without an incomplete character at the end."""
    for piece in document.pieces():
        encoded = piece.encode("utf-8")
        if len(encoded) >= size:
            yield encoded[:size].decode("utf-8", errors="ignore")
            return
        size -= len(encoded)
        yield piece
