"""Settings: the shipped files, defaults, round trips, paths, and every bad input as a sentence."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from horovod_lm import generate
from horovod_lm.utils.config import (
    Config,
    GenerationConfig,
    HostConfig,
    all_settings,
    config_from_dict,
    find_project_root,
    load_config,
    resolve_path,
    save_config,
)
from horovod_lm.utils.errors import ConfigError
from tests.conftest import ROOT

SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SETTINGS = all_settings() | {
    f"distributed.hosts.{name}": field for name, field in HostConfig.model_fields.items()
}


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
    """Return an error's text, after a check that it is one line without a traceback."""
    text = str(error.value)
    assert text and "\n" not in text and "Traceback" not in text
    assert "pydantic" not in text.lower()
    return text


# One source: the fields of config.py -----------------------------------------------------------


def settings_in(name: str) -> list[tuple[str, str]]:
    """Return the dotted keys of a shipped file, in order, and the comments beside them."""
    found, section = [], ""
    for line in (ROOT / "configs" / name).read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(?:- )?(\w+):([^#]*)(?:# (.*))?$", line)
        if match is None:
            assert not line or line.lstrip().startswith("#"), line  # one key per line
        elif not match[1] and match[2] != "seed":
            section = match[2]
        else:
            parent = {0: "", 2: f"{section}.", 4: f"{section}.hosts.", 6: f"{section}.hosts."}
            found.append((parent[len(match[1])] + match[2], match[4] or ""))
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_comment_of_a_key_is_the_description_of_its_field(name):
    config = load_config(ROOT / "configs" / name)
    assert config.project_root == ROOT
    assert config.resolve(config.data.data_dir).is_relative_to(ROOT)
    for key, comment in settings_in(name):
        field = SETTINGS[key]
        meaning = field.description.split("\n")[0]
        assert meaning.endswith("."), key
        if name == "config.yaml":  # it has every setting, so it is where a default is looked up
            section, _, word = key.rpartition(".")
            value = getattr(getattr(config, section) if section else config, word)
            if value != field.default:
                is_word = field.default is None or isinstance(field.default, bool)
                shown = json.dumps(field.default) if is_word else field.default
                meaning = meaning[:-1] + f" (default: {shown})."
        assert comment + "." == meaning, key


def test_config_yaml_has_every_setting_in_the_order_of_the_fields():
    assert [key for key, _ in settings_in("config.yaml")] == list(all_settings())


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_of_a_file_and_the_readme_have_its_number_of_parameters(name):
    torch = pytest.importorskip("torch")
    from horovod_lm.models.transformer_lm import TransformerLM

    header = (ROOT / "configs" / name).read_text(encoding="utf-8").split("\n\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert "default" in header and "horovod_lm/utils/config.py" in header
    with torch.device("meta"):
        model = TransformerLM(**load_config(ROOT / "configs" / name).model.model_dump())
    parameters = sum(tensor.numel() for tensor in model.parameters())
    assert f"{parameters:,} parameters" in header
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [row] = re.findall(rf"^\| \[{re.escape(name)}\].*$", readme, re.MULTILINE)
    assert f" {parameters:,} " in row or f" {parameters / 1e6:.0f} M " in row


def test_the_options_of_a_command_are_explained_as_the_settings_are():
    options = {action.dest: action.help for action in generate.build_parser()._actions}
    for name, field in GenerationConfig.model_fields.items():
        assert options[name] == field.description


# Round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_file_is_saved_and_loaded_as_it_is(tmp_path, name):
    config = load_config(ROOT / "configs" / name)
    assert load_config(save_config(config, tmp_path / "c.yaml")).to_dict() == config.to_dict()
    assert config_from_dict(config.to_dict(), ROOT) == config


@pytest.mark.parametrize(
    "text", ["a\x85b", "\u2028", "x\u2029", "two\nlines", "bücher 本.txt", "3e-4"]
)
def test_strange_texts_are_saved_as_they_are(tmp_path, text):
    config = config_from_dict({"data": {"source": "files", "path": text}}, ROOT)
    assert load_config(save_config(config, tmp_path / "c.yaml")).data.path == text


def test_a_config_cannot_be_changed_only_copied():
    config = Config()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 1
    with pytest.raises(Exception, match="frozen"):
        del config.model.d_ff
    config.to_dict()["model"]["d_ff"] = 5
    assert config.with_overrides(["model.d_ff=8"]).model.d_ff == 8
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
    assert load_config(path).resolve("~nobody.txt") == root / "~nobody.txt"  # as in a shell
    assert load_config(path).resolve("~/x") == Path.home().resolve() / "x"


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
    assert config.resolve(config.paths.log_dir, "a") == config.project_root / "logs/a/a.d"
    with pytest.raises(ConfigError, match=r"\$\{run_name\}.* needs a run name"):
        config.resolve(config.paths.log_dir)


@pytest.mark.parametrize("use", [resolve_path, Config().resolve, load_config])
def test_what_cannot_be_a_path_is_a_sentence(use):
    with pytest.raises(ConfigError, match="is not a path") as error:
        use("a\0b")
    complaint(error)


# YAML, as people write it ----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3e-4", "3.0E-4", "0.0003", "+3e-04"])
def test_a_number_in_exponent_form_is_a_number(write, text):
    path = write(f"training: {{learning_rate: {text}}}")
    assert load_config(path).training.learning_rate == pytest.approx(3e-4, rel=1e-15)
    changed = load_config(write("seed: 1"), [f"training.learning_rate={text}"])
    assert changed.training.learning_rate == load_config(path).training.learning_rate


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("*.txt", "*.txt"),
        ("my #1 book.txt", "my #1 book.txt"),
        ("Chapter 1: x.txt", "Chapter 1: x.txt"),
        ("1984", "1984"),
        ("[2024] books", "[2024] books"),
        ("&a!%@`|>-", "&a!%@`|>-"),
        ("[a, '*.txt']", ["a", "*.txt"]),
        ("'null'", "null"),
        ("null", None),
        ("", None),
    ],
)
def test_set_takes_a_text_as_it_is(write, value, path):
    assert load_config(write("seed: 1"), [f"data.path={value}"]).data.path == path


def test_settings_of_an_anchor_are_merged_below_ones_own(write):
    hosts = "hosts: [&first {name: one, slots: 4}, {<<: *first, name: two}]"
    hosts = load_config(write(f"distributed: {{{hosts}}}")).distributed.hosts
    assert [(host.name, host.slots) for host in hosts] == [("one", 4), ("two", 4)]


@pytest.mark.parametrize("text", ["", "# nothing\n", "model:\n"])
def test_an_empty_file_or_section_means_the_defaults(write, text):
    assert load_config(write(text)).to_dict() == Config().to_dict()


def test_overrides_as_strings_and_as_mappings(write):
    path = write("model: {d_model: 64, n_heads: 4}\ntraining: {max_steps: 5}")
    for overrides in (
        ["model.d_model=32", "training.max_steps=null", "data.path=[a, b]"],
        {"model": {"d_model": 32}, "training": {"max_steps": None}, "data": {"path": ["a", "b"]}},
        {"model.d_model": 32, "training": {"max_steps": None}, "data.path": ["a", "b"]},
    ):
        config = load_config(path, overrides)
        assert (config.model.d_model, config.model.n_heads) == (32, 4)
        assert config.training.max_steps is None and config.data.paths == ["a", "b"]
    config = load_config(path, "distributed.environment.OMP_NUM_THREADS=1")
    assert config.distributed.environment == {"OMP_NUM_THREADS": "1"}  # a text


# Bad input, one sentence each ------------------------------------------------------------------

# A file's text, and parts of the sentence about it.
BAD_FILES = [
    ("model: {d_modle: 8}", ["model.d_modle is not a setting; the nearest is model.d_model"]),
    ("data: {d_model: 8}", ["data.d_model", "the nearest is model.d_model"]),
    ("learning_rate: 1", ["learning_rate", "the nearest is training.learning_rate"]),
    ("zzz: 1", ["zzz is not a setting"]),
    ("distributed: {hosts: [{nam: a}]}", ["hosts.0.nam ", "nearest is distributed.hosts.0.name"]),
    ("distributed: {hosts: [{slots: 2}]}", ["distributed.hosts.0.name is missing"]),
    ("distributed: {environment: {MY-VAR: a}}",
     ["distributed.environment.MY-VAR must match pattern '^[A-Za-z_][A-Za-z0-9_]*$'"]),
    ("distributed: {threads_per_rank: all}",
     ["distributed.threads_per_rank must be a valid integer or 'auto', not 'all'"]),
    ("distributed: {ssh_user: me}", ["distributed: ssh_user needs ssh_identity_file"]),
    ("model: {n_layers: true}", ["model.n_layers must be a valid integer, not True"]),
    ("data: {path: 3}", ["data.path must be a valid string or a valid list, not 3"]),
    ("model: [1]", ["model must be a valid dictionary, not [1]"]),
    ("training: {optimizer: adam}", ["training.optimizer must be 'adamw' or 'sgd', not 'adam'"]),
    ("model: {d_model: 10, n_heads: 3}", ["d_model (10) must be divisible by n_heads (3)"]),
    ("model: {vocab_size: 10}", ["pad_token_id", "vocab_size"]),
    ("training: {learning_rate: -1e-3}", ["learning_rate must be greater than 0, not -0.001"]),
    ("generation: {top_p: 1.5}", ["generation.top_p must be less than or equal to 1, not 1.5"]),
    ("data: {source: files}", ["data: source 'files' needs a path"]),
    ("model:\n  d_ff: 1\n  d_ff: 2", [', line 3: found duplicate key "d_ff"']),
    ("just words", ["must contain sections", "just words"]),
    ("1: 2", ["1 must be strings, not 1"]),
    ("model: {d_ff: 3", ["line 1: expected ',' or '}'"]),
    ("seed: !!python/object/apply:os.getpid []", ["line 1: could not determine a constructor"]),
    ("seed: 2024-13-45", ["cannot be read", "month"]),
    (b"\x80\x02\xff\x00", ["is not UTF-8 text: save it as UTF-8"]),
    (r'paths: {run_dir: "\uD800"}', ["cannot be written"]),
    ("model: &knot {d_ff: *knot}", ["model.d_ff must be a valid integer"]),
    ("[" * 5000, ["cannot be read"]),
    ("seed: " + "9" * 5000, ["cannot be read", "digits"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), BAD_FILES, ids=lambda value: str(value)[:40])
def test_a_bad_file_is_one_sentence_with_file_and_key(write, text, says):
    path = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    sentence = complaint(error)
    assert sentence.startswith(str(path))
    for part in says:
        assert part in sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("d_model=8", "d_model is not a setting; the nearest is model.d_model"),
        ("model.d_model", "--set takes KEY=VALUE, .*not 'model.d_model'"),
        ("=8", "--set takes KEY=VALUE"),
        ("model.d_model=[8", r"model.d_model must be a valid integer, not '\[8'"),
        ("model.d_model.x=8", "model.d_model must be a valid integer"),
        ("model.n_heads=" + "[" * 5000, "model.n_heads must be a valid integer"),
        ("model=&knot {d_ff: *knot}", "is nested too deeply"),
    ],
)
def test_a_bad_override_is_one_sentence(write, override, sentence):
    with pytest.raises(ConfigError, match=sentence) as error:
        load_config(write("seed: 1"), [override])
    complaint(error)


def test_a_missing_file_is_one_sentence_that_names_the_others(write, monkeypatch):
    path = write("seed: 1", "tiny.yaml")
    write("seed: 1", "other.yaml")
    with pytest.raises(ConfigError, match="no configuration file .*other.yaml, .*/tiny.yaml"):
        load_config(path.with_name("tinny.yaml"))
    monkeypatch.chdir(path.parent.parent)
    with pytest.raises(ConfigError, match="configs/other.yaml, configs/tiny.yaml"):
        load_config("configs/tinny.yaml")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(path.parent)


def test_a_file_that_cannot_be_read_is_not_called_missing(unprivileged):
    for path in ("secret/mine.yaml", "hidden.txt"):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: .*Permission denied"):
            load_config(unprivileged / path)
    with pytest.raises(ConfigError, match="xxx cannot be read: File name too long"):
        load_config("x" * 300)
