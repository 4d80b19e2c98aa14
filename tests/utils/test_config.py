"""Settings: the shipped files, defaults, round trips, paths, and every bad input as a sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horovod_lm.utils import config as module
from horovod_lm.utils.config import (
    Config,
    config_from_dict,
    find_project_root,
    load_config,
    resolve_path,
    save_config,
)
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT

SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SECTIONS = ("model", "training", "data", "generation", "paths", "distributed")


@pytest.fixture
def write(tmp_path):
    """Write a configuration file into a project's `configs/` and return its path."""
    (tmp_path / "configs").mkdir()

    def to(content: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / "configs" / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to


def complaint(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Return an error's text, having made sure that it is one line, and nothing of a traceback."""
    text = str(error.value)
    assert text and "\n" not in text and "Traceback" not in text
    assert "pydantic" not in text.lower()
    return text


# The shipped files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_loads(name):
    config = load_config(ROOT / "configs" / name)
    assert config.project_root == ROOT
    assert config.resolve(config.data.data_dir).is_relative_to(ROOT)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_explains_each_key_where_it_stands(name):
    lines = (ROOT / "configs" / name).read_text(encoding="utf-8").splitlines()
    bare = []
    for number, line in enumerate(lines):
        assert not re.search(r"\{.*:", line.split("#")[0]), f"line {number + 1}: one key per line"
        key = re.match(r"\s*(?:- )?(\w+):", line)
        if key is None or key.group(1) in SECTIONS:
            continue
        above = lines[number - 1].lstrip() if number else ""
        if not re.search(r"#\s*\S.{5,}", line) and not above.startswith("#"):
            bare.append(f"{name}:{number + 1}: {key.group(1)}")
    assert bare == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_says_in_its_header_what_it_costs(name):
    header = (ROOT / "configs" / name).read_text(encoding="utf-8").split("\n\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    from horovod_lm.models.transformer_lm import TransformerLM

    shape = load_config(ROOT / "configs" / name).model.model_dump()
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in TransformerLM(**shape).parameters())
    assert f"{parameters:,}" in header


def test_config_yaml_holds_every_setting_there_is():
    content = yaml.safe_load((ROOT / "configs" / "config.yaml").read_text(encoding="utf-8"))
    for section in SECTIONS:
        assert list(content[section]) == list(Config().to_dict()[section]), section
    assert set(content) == {*SECTIONS, "seed"}


# Defaults --------------------------------------------------------------------------------------


def test_defaults_are_the_contracts():
    config = Config()
    model = {"vocab_size": 50257, "d_model": 768, "n_heads": 12, "n_layers": 12, "d_ff": 3072,
             "max_seq_len": 512, "dropout": 0.1, "pad_token_id": 50256,
             "gradient_checkpointing": False}  # fmt: skip
    generation = {"max_new_tokens": 100, "temperature": 0.8, "top_k": 50, "top_p": 0.9,
                  "num_samples": 1, "seed": None}  # fmt: skip
    assert config.model.model_dump() == model == load_config(
        ROOT / "configs" / "config.yaml").model.model_dump()  # fmt: skip
    assert config.generation.model_dump() == generation
    assert config.training.learning_rate == 3e-4
    assert config.training.per_gpu_batch_size == 16
    assert config.training.gradient_accumulation_steps == 2
    assert config.data.data_dir == "notebooks/data/preprocessed/v1"
    assert config.distributed.compression == "none"


def test_every_setting_is_explained_in_the_code():
    for section in SECTIONS:
        for name, field in type(getattr(Config(), section)).model_fields.items():
            assert field.description and field.description.endswith("."), f"{section}.{name}"


# Round trips -----------------------------------------------------------------------------------


@st.composite
def valid_configs(draw) -> dict:
    heads = draw(st.integers(1, 8))
    vocabulary = draw(st.integers(2, 60000))
    rate = st.floats(1e-12, 10, exclude_min=True)
    return {
        "model": {
            "n_heads": heads, "d_model": heads * draw(st.integers(1, 64)), "vocab_size": vocabulary,
            "pad_token_id": draw(st.none() | st.integers(0, vocabulary - 1)),
            "dropout": draw(st.floats(0, 1, exclude_max=True)),
            "gradient_checkpointing": draw(st.booleans()),
        },
        "training": {
            "learning_rate": draw(rate), "epsilon": draw(rate),
            "max_steps": draw(st.none() | st.integers(1, 10**9)),
            "max_grad_norm": draw(st.none() | rate),
            "device": draw(st.sampled_from(["auto", "cpu", "cuda"])),
            "amp_dtype": draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"])),
        },
        "data": {
            "source": "files",
            "path": draw(st.text(min_size=1) | st.lists(st.text(), min_size=1, max_size=3)),
        },
        "generation": {"seed": draw(st.none() | st.integers())},
        "paths": {"run_dir": draw(st.text())},
        "distributed": {
            "threads_per_rank": draw(st.just("auto") | st.integers(1, 64)),
            "hosts": draw(st.lists(st.fixed_dictionaries(
                {"name": st.just("node-1.example"), "slots": st.integers(1, 8),
                 "environment": st.dictionaries(st.just("NCCL_DEBUG"), st.text("a1 $'"))}),
                max_size=2)),
        },
        "seed": draw(st.integers(0, 2**40)),
    }  # fmt: skip


@given(content=valid_configs())
@settings(max_examples=60, deadline=None)
def test_saved_and_loaded_is_the_same(tmp_path_factory, content):
    config = config_from_dict(content, ROOT)
    path = save_config(config, tmp_path_factory.mktemp("run") / "config.yaml")
    loaded = load_config(path)
    assert loaded.to_dict() == config.to_dict()
    assert config_from_dict(config.to_dict(), ROOT) == config
    for section, settings_given in content.items():
        if section != "seed":
            assert config.to_dict()[section] == {**config.to_dict()[section], **settings_given}


@pytest.mark.parametrize(
    "text", ["a\x85b", "\u2028", "x\u2029", "two\nlines", "bücher 本.txt", "3e-4"]
)
def test_strange_texts_are_saved_as_they_are(tmp_path, text):
    config = config_from_dict({"data": {"source": "files", "path": text}}, ROOT)
    assert load_config(save_config(config, tmp_path / "c.yaml")).data.path == text


def test_a_config_cannot_be_changed_only_copied():
    config = Config()
    for change in (lambda: setattr(config, "seed", 1), lambda: setattr(config.model, "d_ff", 1)):
        with pytest.raises(Exception, match="frozen"):
            change()
    with pytest.raises(Exception, match="frozen"):
        del config.model.d_ff
    assert config.with_overrides(["model.d_ff=8"]).model.d_ff == 8
    assert config.model.d_ff == 3072
    config.to_dict()["model"]["d_ff"] = 5
    assert config.model.d_ff == 3072


# Paths (fault 8) -------------------------------------------------------------------------------


def test_relative_paths_start_at_the_project_root_from_any_working_directory(write, monkeypatch):
    path = write("data: {data_dir: notebooks/data/v1}")
    root = path.parent.parent
    (root / "notebooks" / "deep").mkdir(parents=True)
    for folder in (root, root / "notebooks", root / "notebooks" / "deep", root / "configs"):
        monkeypatch.chdir(folder)
        assert find_project_root() == root
        config = load_config("configs/mine.yaml")
        assert config.resolve(config.data.data_dir) == root / "notebooks" / "data" / "v1"
        assert resolve_path("notebooks/data/v1") == root / "notebooks" / "data" / "v1"
        relative = load_config(os.path.relpath(path))
        assert relative.project_root == root
    monkeypatch.chdir("/")
    assert load_config(path).resolve("runs") == root / "runs"
    assert load_config(path).resolve("/elsewhere/runs") == Path("/elsewhere/runs")


def test_a_config_saved_in_a_run_means_the_same_folders(write):
    config = load_config(write("seed: 1"))
    copy = save_config(config, config.resolve(config.paths.run_dir, "first") / "config.yaml")
    assert copy == config.project_root / "runs" / "first" / "config.yaml"
    assert load_config(copy).project_root == config.project_root


@pytest.mark.parametrize("run_dir", ["runs/${run_name}", "${run_name}", "a/b/${run_name}"])
def test_without_configs_paths_start_at_the_files_folder(tmp_path, run_dir):
    own = tmp_path / "mine.yaml"
    own.write_text(f"paths: {{run_dir: '{run_dir}'}}", encoding="utf-8")
    config = load_config(own)
    assert config.project_root == tmp_path
    copy = save_config(config, config.resolve(run_dir, "first") / "config.yaml")
    assert load_config(copy).project_root == tmp_path
    (tmp_path / "configs").mkdir()  # beside the file, and not in it
    assert load_config(own).project_root == load_config(copy).project_root == tmp_path


def test_run_name_stands_in_paths(write):
    config = load_config(write("paths: {log_dir: 'logs/${run_name}/${run_name}.d'}"))
    assert config.resolve(config.paths.log_dir, "a") == config.project_root / "logs" / "a" / "a.d"
    with pytest.raises(ConfigError, match=r"\$\{run_name\}.* needs a run name"):
        config.resolve(config.paths.log_dir)


@pytest.mark.parametrize(
    ("path", "uses"),
    [
        ("~nobody-has-this-name/x", (resolve_path, Config().resolve, load_config)),
        ("a\0b", (resolve_path, Config().resolve, load_config)),
        ("x" * 5000, (load_config,)),
    ],
)
def test_what_cannot_be_a_path_is_a_sentence(path, uses):
    for use in uses:
        with pytest.raises(ConfigError) as error:
            use(path)
        complaint(error)


# YAML, as people write it ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", ".3e-3", "0.0003", "+3e-04"])
def test_a_number_in_exponent_form_is_a_number(write, text):
    path = write(f"training: {{learning_rate: {text}}}")
    assert load_config(path).training.learning_rate == pytest.approx(3e-4, rel=1e-15)
    changed = load_config(write("seed: 1"), [f"training.learning_rate={text}"])
    assert changed.training.learning_rate == load_config(path).training.learning_rate


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n", "model: {}\nseed: 42\n"])
def test_an_empty_file_or_section_means_the_defaults(write, text):
    assert load_config(write(text)).to_dict() == Config().to_dict()


def test_overrides_as_strings_and_as_mappings(write):
    path = write("model: {d_model: 64, n_heads: 4}\ntraining: {max_steps: 5}")
    for overrides in (
        ["model.d_model=32", "training.max_steps=null", "data.path=[a, b]"],
        {"model": {"d_model": 32}, "training": {"max_steps": None}, "data": {"path": ["a", "b"]}},
        {"model.d_model": 32, "training.max_steps": None, "data.path": ["a", "b"]},
        {"model": {"d_model": 32}, "training.max_steps": None, "data": {"path": ["a", "b"]}},
    ):
        config = load_config(path, overrides)
        assert (config.model.d_model, config.model.n_heads) == (32, 4)
        assert config.training.max_steps is None and config.data.paths == ["a", "b"]
    assert load_config(path, "seed=3").seed == 3


# Bad input, one sentence each ------------------------------------------------------------------

BAD_FILES = {
    "an unknown key": ("model: {d_modle: 8}", ["model.d_modle", "the nearest is model.d_model"]),
    "a key in the wrong section": ("data: {d_model: 8}", ["data.d_model", "model.d_model"]),
    "a key outside its section": ("learning_rate: 1", ["learning_rate", "training.learning_rate"]),
    "an unknown section": ("trainning: {}", ["trainning", "the nearest is training"]),
    "an unknown key of a host": ("distributed: {hosts: [{nam: a}]}",
                                 ["distributed.hosts.0.nam ", "distributed.hosts.0.name"]),
    "a missing key": ("distributed: {hosts: [{slots: 2}]}", ["distributed.hosts.0.name"]),
    "a text for a number": ("model: {d_model: wide}",
                            ["model.d_model must be a whole number, not 'wide'"]),
    "a fraction for a whole number": ("model: {n_layers: 1.5}", ["model.n_layers", "1.5"]),
    "true for a number": ("model: {n_layers: true}", ["model.n_layers", "whole number"]),
    "a number for a text": ("data: {data_dir: 3}", ["data.data_dir must be a text, not 3"]),
    "a quoted number": ("seed: '3e-4'", ["seed must be a whole number"]),
    "a list for a section": ("model: [1]", ["model must be a section of settings"]),
    "yes for true": ("training: {compile: 1}", ["training.compile must be true or false"]),
    "an unknown choice": ("training: {optimizer: adam}",
                          ["training.optimizer", "'adamw' or 'sgd'", "not 'adam'"]),
    "a number or auto": ("distributed: {threads_per_rank: all}",
                         ["distributed.threads_per_rank must be a whole number or 'auto'"]),
    "heads that do not divide": ("model: {d_model: 10, n_heads: 3}",
                                 ["d_model (10) must be divisible by n_heads (3)"]),
    "padding outside the vocabulary": ("model: {vocab_size: 10}", ["pad_token_id", "vocab_size"]),
    "a negative rate": ("training: {learning_rate: -1e-3}",
                        ["training.learning_rate must be greater than 0, not -0.001"]),
    "an infinite rate": ("training: {learning_rate: .inf}", ["training.learning_rate", "finite"]),
    "no number": ("training: {weight_decay: .nan}", ["training.weight_decay", "not nan"]),
    "a probability above one": ("generation: {top_p: 1.5}",
                                ["generation.top_p must be at most 1, not 1.5"]),
    "dropout of everything": ("model: {dropout: 1.0}", ["model.dropout must be less than 1"]),
    "files without a path": ("data: {source: files}", ["data", "source 'files' needs a path"]),
    "hub without a name": ("data: {source: hub}", ["data", "hub_dataset"]),
    "a context of one token": ("model: {max_seq_len: 1}", ["model.max_seq_len", "greater than 1"]),
    "a seed below zero": ("seed: -1", ["seed must be at least 0, not -1"]),
    "the project root": ("project_root: /", ["project_root is not a setting"]),
    "one key twice": ("seed: 1\nmodel: {}\nseed: 2", ["'seed' stands there twice (line 3)"]),
    "one key twice within": ("model:\n  d_ff: 1\n  d_ff: 2", ["'d_ff'", "twice (line 3)"]),
    "no sections": ("just words", ["must hold sections", "just words"]),
    "a list": ("- 1", ["must hold sections"]),
    "a key that is a number": ("1: 2", ["1 must be named by a text"]),
    "a key that is a list": ("? [1]\n: 2", ["not valid YAML"]),
    "an open bracket": ("model: {d_ff: 3", ["is not valid YAML", "line 1"]),
    "a tab": ("model:\n\td_ff: 3", ["is not valid YAML", "line 2"]),
    "two documents": ("a: 1\n---\nb: 2", ["is not valid YAML"]),
    "code": ("seed: !!python/object/apply:os.getpid []", ["is not valid YAML"]),
    "no date": ("seed: 2024-13-45", ["cannot be read", "month"]),
    "not a text file": (b"\x80\x02\xff\x00", ["cannot be read", "utf-8"]),
    "zero bytes": (b"\x00\x00", ["is not valid YAML"]),
    "half a character": (r'paths: {run_dir: "\uD800"}', ["cannot be written"]),
    "a knot": ("model: &knot {d_ff: *knot}", ["model.d_ff must be a whole number"]),
    "too deep": ("[" * 5000, ["cannot be read"]),
    "too many digits": ("seed: " + "9" * 5000, ["cannot be read", "digits"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_sentence_with_file_and_key(write, name):
    text, says = BAD_FILES[name]
    path = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    sentence = complaint(error)
    assert sentence.startswith(str(path))
    for part in says:
        assert part in sentence


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.d_modle=8", ["model.d_modle", "the nearest is model.d_model"]),
        ("model.d_model=wide", ["model.d_model must be a whole number, not 'wide'"]),
        ("d_model=8", ["d_model is not a setting", "model.d_model"]),
        ("model.d_model", ["--set takes KEY=VALUE", "'model.d_model'"]),
        ("=8", ["--set takes KEY=VALUE"]),
        ("..=8", ["is not a setting"]),
        ("model.d_model=[8", ["--set model.d_model", "cannot be read"]),
        ("model.d_model.x=8", ["model.d_model must be a whole number"]),
        ("seed.x=8", ["seed must be a whole number"]),
        ("model=8", ["model must be a section"]),
        ("model.n_heads=" + "[" * 5000, ["--set model.n_heads", "cannot be read"]),
    ],
)
def test_a_bad_override_is_one_sentence(write, override, says):
    with pytest.raises(ConfigError) as error:
        load_config(write("seed: 1"), [override])
    for part in says:
        assert part in complaint(error)


def test_a_missing_file_is_one_sentence_that_names_the_others(write, monkeypatch):
    path = write("seed: 1", "tiny.yaml")
    write("seed: 1", "other.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(path.with_name("tinny.yaml"))
    assert "no configuration file" in complaint(error)
    assert "other.yaml" in complaint(error) and "tiny.yaml" in complaint(error)
    monkeypatch.chdir(path.parent.parent)
    with pytest.raises(ConfigError, match="configs/other.yaml, configs/tiny.yaml"):
        load_config("configs/tinny.yaml")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(path.parent)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = (st.sampled_from(module._valid_keys()).map(lambda key: key.rpartition(".")[2])
        | st.sampled_from(SECTIONS) | st.text(max_size=8) | st.integers() | st.none())  # fmt: skip
NESTED = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(content=st.dictionaries(KEYS, NESTED, max_size=5))
@example(content={"model": {"d_model": 10**5000}})
@settings(max_examples=250, deadline=None)
def test_no_mapping_raises_anything_but_a_sentence(content):
    try:
        config_from_dict(content, ROOT)
    except ConfigError as error:
        assert str(error).startswith("the configuration")


@given(text=st.text(max_size=60) | st.text(alphabet="[]{}:,-#&*!|>'\"% \n\tab1.", max_size=60))
@settings(max_examples=250, deadline=None)
def test_no_text_raises_anything_but_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        load_config(path)
    except ConfigError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@given(
    overrides=st.lists(st.text(max_size=20) | st.builds(
        "{}={}".format, st.sampled_from(module._valid_keys()), st.text(max_size=12)), max_size=3)
    | st.dictionaries(KEYS, NESTED, max_size=3)
)  # fmt: skip
@example(overrides={"distributed": {"hosts": {"a": 1}}})
@example(overrides={"seed": {"a": 1}})
@settings(max_examples=250, deadline=None)
def test_no_override_raises_anything_but_a_sentence(overrides):
    full = Config().with_overrides({"distributed.hosts": [{"name": "a"}], "data.path": "b"})
    try:
        assert isinstance(full.with_overrides(overrides), Config)
    except ConfigError as error:
        assert str(error)
