"""Any prompt, magic's line, and cell: a result, or a sentence."""

from __future__ import annotations

import pickle
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from horovod_lm.data.tokenizers import ByteTokenizer
from horovod_lm.generation.text import generate_text
from horovod_lm.jupyter.run_cell.job_result import JobResult
from horovod_lm.jupyter.run_cell.magics import HorovodMagics, _check, _check_syntax, _parse, _spec
from horovod_lm.jupyter.run_cell.rank_cell import describe, execute
from horovod_lm.models.transformer_lm import TransformerLM
from tests.fuzz.conftest import NUMBERS, SCALARS, TEXTS, cases, succeeds_or_explains

torch.manual_seed(0)
MODEL = TransformerLM(vocab_size=257, d_model=4, n_heads=1, n_layers=1, d_ff=4, max_seq_len=8,
                      pad_token_id=256)  # fmt: skip
SETTINGS = dict.fromkeys(["temperature", "top_k", "top_p", "seed"], SCALARS)
SETTINGS["num_samples"] = st.integers(-1, 3) | st.none() | TEXTS
PROMPTS = st.text(max_size=30) | TEXTS | st.just("<|endoftext|>") | st.just("a\u202eb" * 9)


@pytest.mark.filterwarnings("ignore:the prompt has")
@cases(40, 1000)
@given(prompt=PROMPTS, settings=st.fixed_dictionaries({}, optional=SETTINGS))
def test_any_prompt(place, prompt, settings):
    generate = partial(generate_text, MODEL, ByteTokenizer(), max_new_tokens=2, **settings)
    texts = succeeds_or_explains(place, generate, prompt)
    if texts is not None:
        assert len(texts) == settings.get("num_samples", 1)
        assert all(text.startswith(prompt) for text in texts)


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
    def start() -> None:
        arguments = _parse(HorovodMagics.horovodrun, line)
        _check(arguments)
        _check_syntax(cell)
        spec = _spec(arguments)
        assert 1 <= spec.size and 1 <= int(spec.env["OMP_NUM_THREADS"])
        assert int(spec.env.get("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", 0)) >= 0
        assert not arguments.out or arguments.out.isidentifier()

    succeeds_or_explains(place, _parse, HorovodMagics.px, line)
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
