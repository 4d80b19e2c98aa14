"""Any prompt, line of a chat, magic's line, cell, and output of a rank: a result, or a sentence."""

from __future__ import annotations

import io
import os
import pickle
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generation.chat import chat
from horovod_lm.generation.text import generate_text, stream_text
from horovod_lm.jupyter.run_cell.framed_horovodrun import _lines
from horovod_lm.jupyter.run_cell.job_result import JobResult
from horovod_lm.jupyter.run_cell.magics import HorovodMagics, _check, _check_syntax, _parse, _spec
from horovod_lm.jupyter.run_cell.rank_cell import describe, execute
from horovod_lm.models.transformer_lm import TransformerLM
from horovod_lm.utils.config import config_from_dict
from tests.fuzz.conftest import NUMBERS, SCALARS, TEXTS, cases, succeeds_or_explains

CONFIG = config_from_dict(
    {
        "model": {"vocab_size": 257, "d_model": 4, "n_heads": 1, "n_layers": 1, "d_ff": 4,
                  "max_seq_len": 8, "pad_token_id": 256},
        "generation": {"max_new_tokens": 2},
    }
)  # fmt: skip
torch.manual_seed(0)
MODEL = TransformerLM(**CONFIG.model.model_dump())
SETTINGS = dict.fromkeys(["temperature", "top_k", "top_p", "seed"], SCALARS)
SETTINGS["num_samples"] = st.integers(-1, 3) | st.none() | TEXTS
PROMPTS = st.text(max_size=30) | TEXTS | st.just("<|endoftext|>") | st.just("a\u202eb" * 9)


@pytest.mark.filterwarnings("ignore:the prompt has")
@cases(40, 800)
@given(prompt=PROMPTS, settings=st.fixed_dictionaries({}, optional=SETTINGS))
def test_any_prompt(place, prompt, settings):
    arguments = {"max_new_tokens": 2, **settings}
    texts = succeeds_or_explains(
        place, lambda: generate_text(MODEL, ByteTokenizer(), prompt, **arguments)
    )
    if texts is not None:
        assert len(texts) == arguments.get("num_samples", 1)
        assert all(text.startswith(prompt) for text in texts)


NAMES = [*SETTINGS, "help", ""]
MANY = [":max_new_tokens 10000000000000000000000000", ":max_new_tokens 3"]
COMMANDS = st.sampled_from(MANY) | st.builds(
    ":{} {}".format, st.sampled_from(NAMES) | TEXTS, NUMBERS | TEXTS
)


@pytest.mark.filterwarnings("ignore:the prompt has")
@cases(20, 400)
@given(
    lines=st.lists(
        COMMANDS.map(lambda line: line.encode("utf-8", "surrogatepass")) | st.binary(max_size=12),
        max_size=4,
    )
)
def test_any_conversation(place, lines):
    typed, stdin = io.TextIOWrapper(io.BytesIO(b"\n".join(lines)), encoding="utf-8"), sys.stdin
    shown, stdout = io.TextIOWrapper(io.BytesIO(), "ascii", errors="replace"), sys.stdout
    sys.stdin, sys.stdout = typed, shown
    try:
        succeeds_or_explains(
            place,
            chat,
            lambda prompt, how: stream_text(MODEL, ByteTokenizer(), prompt, how),
            CONFIG,
        )
    finally:
        sys.stdin, sys.stdout = stdin, stdout


OPTIONS = ["-np", "--num-proc", "--stall", "--threads", "--timeline", "--push", "--out", "--", "-h"]
WORDS = st.sampled_from(
    [*OPTIONS, "python", "x.py", "a,b", "1", "2", "-1", "1_0", "'a b'", "'", '"', "\\", "$HOME"]
)
LINES = st.lists(WORDS | NUMBERS.map(str) | TEXTS.filter(str.isprintable), max_size=6).map(" ".join)
CODE = st.sampled_from([
    "x", "1", " ", "\n", "(", ")", "[", "'", '"', "\\", "=", ":", "if ", "def f():", "    ", "\t",
    "f'{", "}", "lambda", "await ", "return", "yield", "import os", "@", "#", "# coding: x\n", "\0",
    "\f", "\r", "é", "\ud800", "0o9", "9" * 5000, "%px", "!ls", "match x:", "-" * 30000,
])  # fmt: skip
CELLS = st.lists(CODE, max_size=9).map("".join) | st.text(max_size=20)


@cases(60, 900)
@given(line=LINES, cell=CELLS)
@example(line="", cell="-" * 100_000 + "1")
@example(line="", cell="a" + ".b" * 100_000)
@example(line="", cell="\ud800")
@example(line="--stall -1", cell="1")
@example(line="--threads -1", cell="1")
@example(line="--out 'a b'", cell="1")
def test_any_magic(place, line, cell):
    def read() -> None:
        _parse(HorovodMagics.px, line)

    def start() -> None:
        arguments = _parse(HorovodMagics.horovodrun, line)
        _check(arguments)
        _check_syntax(cell)
        spec = _spec(arguments)
        assert 1 <= spec.size and 1 <= int(spec.env["OMP_NUM_THREADS"])
        assert int(spec.env.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0)) >= 0
        assert not arguments.out or arguments.out.isidentifier()

    succeeds_or_explains(place, read)
    succeeds_or_explains(place, start)


STATEMENTS = st.sampled_from([
    "x = 1", "x", "1 / 0", "raise ValueError", "raise ValueError('a\\nb')", "raise SystemExit(3)",
    "raise KeyboardInterrupt", "raise OSError(2, 'x', '\\udcff')", "exec('1 +')", "eval('\\0')",
    "def f(): f()\nf()", "class E(Exception):\n    __str__ = None\nraise E",
    "class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "raise Exception('\\ud800')",
    "class M(type):\n    __name__ = 1\nclass E(Exception, metaclass=M): pass\nraise E",
    "try: 1 / 0\nexcept ZeroDivisionError as e: raise e from e", "raise BaseException",
    "e = SyntaxError('x')\ne.lineno = 'x'\nraise e", "assert False, object()", "import nothing",
])  # fmt: skip


@cases(30, 600)
@given(cell=st.lists(STATEMENTS, min_size=1, max_size=3).map("\n".join), wanted=st.booleans())
def test_any_error_in_a_cell(cell, wanted):
    """The notebook is told of every error, whatever it is made of."""
    result = JobResult(1, code=0)
    try:
        execute(cell, {}, "%%horovodrun", wanted)
    except BaseException as error:
        result.take(0, {"error": pickle.loads(pickle.dumps(describe(error)))})
    error = result.error()
    if error is not None:
        assert str(error).startswith("rank 0: ")
        "\n".join(error._render_traceback_()).encode()


@cases(40, 600)
@given(
    chunks=st.lists(
        st.binary(max_size=40)
        | st.sampled_from([b"\r\n", b"\n", b"\r", b"\x1e", b"0: [x]\n", b"\xe2\x82", b"Killed\n"])
    )
)
def test_any_output_of_a_rank(chunks):
    """Nothing that a rank prints is lost."""
    reader, writer = os.pipe()
    os.write(writer, b"".join(chunks))
    os.close(writer)
    lines = list(_lines(reader))
    os.close(reader)
    text = b"".join(chunks).decode("utf-8", "replace")
    assert "".join(lines).removesuffix("\n") == text.removesuffix("\n")
    result = JobResult(1, code=0)
    for line in lines:
        result.add({"event": "output", "rank": 0, "text": line})
    assert result.text(0) == "".join(lines) and result.error() is None
