"""Where text comes from: four sources behind one name, `data.source`.

A corpus is a series of documents, and a document a series of pieces of text: nothing is ever held
in memory whole, so that a corpus may be larger than the machine.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from horovod_lm.data.network import check_reachable
from horovod_lm.data.stories import RULES, generate_stories
from horovod_lm.utils.config import Config
from horovod_lm.utils.errors import DataError

NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
PIECE_BYTES = 1 << 16  # files are read in pieces: a BPE holds 256 of them while it trains


@dataclass(frozen=True)
class Document:
    """One text: its name, its size in UTF-8 bytes, and a function that reads it piece by piece."""

    name: str
    size: int
    pieces: Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Corpus:
    """A series of documents that can be read again and again, in the same order.

    Args:
        description: what the corpus is, in a few words.
        documents: starts to read the documents from the first one.
        fingerprint: plain values that change when the text changes.
    """

    description: str
    documents: Callable[[], Iterator[Document]]
    fingerprint: dict[str, Any]


def open_corpus(config: Config) -> Corpus:
    """Return the corpus that `config.data` asks for, of at most `data.max_bytes` bytes.

    Raises:
        DataError: there is no such text, or it cannot be read.
    """
    sources = {"stories": _stories, "python": _python, "files": _files, "hub": _hub}
    corpus = sources[config.data.source](config)
    limit = config.data.max_bytes
    if limit is None:
        return corpus
    return replace(corpus, documents=lambda: _first_bytes(corpus.documents(), limit))


def text_document(name: str, text: str) -> Document:
    """Return a document whose text is already in memory."""
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
    files = sorted(_library_files(root))
    if not files:
        raise DataError(
            f"the standard library has no source files in {root}; use data.source=stories instead"
        )
    return _file_corpus(f"the standard library of Python {sys.version.split()[0]}", files, root)


def _library_files(root: Path) -> Iterator[Path]:
    """Yield the library proper: no tests, nothing that tests read, no third-party packages."""
    for folder, folders, names in os.walk(root):
        # What is taken out is never looked into: site-packages may hold a hundred thousand files.
        folders[:] = [name for name in folders if name not in NOT_THE_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _files(config: Config) -> Corpus:
    files = sorted(
        {file for pattern in config.data.paths for file in _matching_files(config, pattern)}
    )
    return _file_corpus(", ".join(config.data.paths), files, config.project_root)


def _matching_files(config: Config, pattern: str) -> list[Path]:
    """Return the files that a path, a folder or a glob stands for; never none."""
    path = config.resolve(pattern)
    if path.is_file():
        return [path]
    wanted = str(path / "**" / "*") if path.is_dir() else str(path)
    names = map(Path, glob.glob(wanted, recursive=True))  # hidden ones are not among them
    ours = config.resolve(config.data.data_dir)
    files = [name for name in names if name.is_file() and name.parent != ours]
    if not files:
        what = "the folder is empty" if path.is_dir() else "no such file, and no file matches it"
        raise DataError(f"data.path {pattern}: {what} ({path})")
    return files


def _file_corpus(description: str, files: list[Path], root: Path) -> Corpus:
    """Return a corpus with a document for each file that is not empty."""

    def documents() -> Iterator[Document]:
        for file in files:
            size = file.stat().st_size
            if size:
                yield Document(str(file), size, lambda file=file: read_text_file(file))

    return Corpus(description, documents, {"files": _listing(files, root)})


def _listing(files: Iterable[Path], root: Path) -> str:
    """Return a hash of the files' names, sizes and times of change: what `make` looks at."""
    stats = []
    for file in files:
        name = file.relative_to(root) if file.is_relative_to(root) else file
        stats.append((str(name), file.stat().st_size, file.stat().st_mtime_ns))
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def read_text_file(file: Path, piece_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces that end at a line's end where they can.

    Args:
        file: the file; a byte-order mark at its start is dropped.
        piece_bytes: read about so many bytes at a time.

    Raises:
        DataError: a byte is not UTF-8 (the message names the file and the byte's offset), or the
            file cannot be read.
    """
    held_back = ""
    for text in _decode(file, piece_bytes):
        text = held_back + text
        cut = text.rfind("\n") + 1 or len(text)
        if text[:cut]:
            yield text[:cut]
        held_back = text[cut:]
    if held_back:
        yield held_back


def _decode(file: Path, piece_bytes: int) -> Iterator[str]:
    """Yield the text of a UTF-8 file, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    try:
        with file.open("rb") as stream:
            while block := stream.read(piece_bytes):
                yield decoder.decode(block)
                offset += len(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # The decoder may have kept the first bytes of a character that a block had cut in two.
        kept = len(error.object) - len(block)
        raise _bad_byte(file, error, offset - kept + error.start) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def _bad_byte(file: Path, error: UnicodeDecodeError, offset: int) -> DataError:
    byte = error.object[error.start]
    return DataError(
        f"{file} is not UTF-8 text: byte 0x{byte:02x} at offset {offset} ({error.reason}); "
        f"save it as UTF-8, or leave it out with a glob such as 'folder/**/*.txt'"
    )


def _hub(config: Config) -> Corpus:
    name, field = str(config.data.hub_dataset), config.data.hub_text_field

    def documents() -> Iterator[Document]:
        rows = _open_hub_dataset(config)
        try:
            for index, row in enumerate(rows):
                if field not in row:
                    fields = ", ".join(row)
                    raise DataError(
                        f"{name} has no field {field!r}: set data.hub_text_field to one of {fields}"
                    )
                if row[field]:
                    yield text_document(f"{name} row {index}", row[field])
        except DataError:
            raise
        except Exception as error:  # a stream can break in any of the libraries under it
            raise _hub_error(name, error) from None

    folder = config.resolve(name)
    local_files = sorted(file for file in folder.rglob("*") if file.is_file())
    return Corpus(f"the dataset {name}", documents, {"local_files": _listing(local_files, folder)})


def _open_hub_dataset(config: Config) -> Iterable[dict[str, Any]]:
    """Return the rows of the dataset's training split, streamed or memory-mapped."""
    name, subset = str(config.data.hub_dataset), config.data.hub_config
    try:
        import datasets
    except ImportError:
        raise DataError(
            "data.source=hub needs the library 'datasets': pip install 'horovod_lm[hub]', "
            "or use another data.source"
        ) from None
    local = config.resolve(name)
    try:
        if any((local / file).exists() for file in ("dataset_info.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(local))
            return saved["train"] if isinstance(saved, dict) else saved
        if local.exists():
            return datasets.load_dataset(str(local), subset, split="train", streaming=True)
        check_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        return datasets.load_dataset(name, subset, split="train", streaming=True)
    except Exception as error:  # whatever one of the many libraries under it raises
        raise _hub_error(name, error) from None


def _hub_error(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(
        f"the dataset {name} cannot be read ({type(error).__name__}: {reason}); "
        "check data.hub_dataset, data.hub_config and the network"
    )


def _first_bytes(documents: Iterator[Document], limit: int) -> Iterator[Document]:
    """Yield whole documents while they fit into `limit` bytes; a first one too large is cut."""
    room = limit
    for document in documents:
        if document.size > room:
            if room == limit:
                yield Document(
                    document.name, limit, lambda document=document: _cut(document.pieces(), limit)
                )
            return
        room -= document.size
        yield document


def _cut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Yield the first `size` bytes of text, without half a character at the end."""
    for piece in pieces:
        encoded = piece.encode("utf-8")
        if len(encoded) >= size:
            yield encoded[:size].decode("utf-8", errors="ignore")
            return
        size -= len(encoded)
        yield piece
