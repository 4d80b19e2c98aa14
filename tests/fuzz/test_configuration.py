"""Any YAML file, mapping, `--set` and run name: a configuration, or one sentence."""

from __future__ import annotations

from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from horovod_lm.train import parse, what_to_train
from horovod_lm.training.run_dir import RunFolder
from horovod_lm.utils.config import Config, all_settings, config_from_dict, load_config, save_config
from tests.conftest import ROOT, TINY
from tests.fuzz.conftest import (
    NUMBERS,
    PLAIN,
    TEXTS,
    cases,
    damaged,
    edited,
    edits,
    succeeds_or_explains,
)

FILES = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
FILES += [TINY.encode(), b"model: {d_ff: 8}\nseed: 1\n"]
PIECES = [
    b"\n", b"\t", b"  ", b": ", b"- ", b"{", b"}", b"[", b"]", b"#", b"'", b'"', b"|", b">", b"? ",
    b"&a ", b"*a", b"<<: ", b"---\n", b"...\n", b"%YAML 9.9\n", b"!!binary ", b"!!set ", b"!<x> ",
    b"!!python/object/apply:os.system [touch executed]", b"!!timestamp ", b"2024-13-45", b"~",
    b"0x1F", b"1e999", b".nan", b"9" * 5000, b"[" * 500, b"\0", b"\xff", b"\xc2\x85", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\x1b[2J", b'"\\uD800"', b"${run_name}", b"../", b"~nobody/",
]  # fmt: skip
SETTINGS = [*all_settings(), "model", "distributed.environment.A", "distributed.hosts.0.name"]
YAML_TEXT = st.text("[]{}:,-#&*!|'\" \n1.e", max_size=9)
WORDS = TEXTS | st.sampled_from([piece.decode("latin-1") for piece in PIECES]) | YAML_TEXT
PAIRS = st.builds("{}={}".format, st.sampled_from(SETTINGS), WORDS | NUMBERS | PLAIN.map(str))


def is_kept_by_a_file(config: Config, folder: Path) -> None:
    """Compare a configuration with what is read after it was saved."""
    assert load_config(save_config(config, folder / "saved.yaml")).to_dict() == config.to_dict()


def nested(levels: int) -> bytes:
    """A text that holds 9 ** levels values once its aliases are followed."""
    lists = ["&a0 [x, x, x, x, x, x, x, x, x]"]
    lists += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return f"data: {{hub_dataset: [{', '.join(lists)}]}}".encode()


@cases(40, 700)
@given(content=st.sampled_from(FILES).flatmap(lambda good: damaged(good, PIECES)))
@example(content=nested(20))
def test_any_file(place, content):
    file = place / "fuzzed.yaml"
    file.write_bytes(content)
    config = succeeds_or_explains(place, load_config, file)
    if config is not None:
        is_kept_by_a_file(config, place)


@cases(40, 700)
@given(changes=edits(Config().to_dict()))
@example(changes=[(("model", "d_model"), 10**5000)])
@example(changes=[(("model",), {"\n": None})])
@example(changes=[(("distributed", "hosts"), {"a": 1}), (("seed",), {"a": 1})])
def test_any_mapping(place, changes):
    content = edited(Config().to_dict(), changes)
    succeeds_or_explains(place, Config().with_overrides, content)
    config = succeeds_or_explains(place, config_from_dict, content, place)
    if config is not None:
        is_kept_by_a_file(config, place)


@cases(40, 900)
@given(changes=st.lists(WORDS | PAIRS, max_size=3), name=WORDS | st.text("ab/\\.\0 ~", max_size=5))
@example(changes=[], name="x" * 300)
@example(changes=[], name="\ud800")
def test_any_set_and_run_name(place, changes, name):
    arguments = ["--config", str(ROOT / "configs" / "tiny.yaml"), f"--run-name={name}"]
    arguments += [f"--set={change}" for change in changes]

    def start() -> None:
        config, run_name, _ = what_to_train(parse(arguments))
        config._project_root = place
        if not any(change.startswith("paths") for change in changes):
            run = RunFolder.of(config, run_name)
            assert run.run_dir.parent == place / "runs"
            run.archive_existing_run()
            run.describe(config, 1, "cpu")

    succeeds_or_explains(place, start)
