"""Typed, frozen settings, read from YAML and written to it.

One class per section of a configuration file. Every field states its meaning, unit and default
here. The comments in `configs/*.yaml` and the help of the commands repeat them; tests compare them.

Relative paths resolve against the project root, never against the working directory, so that the
same file works from the root and from `notebooks/`.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from horovod_lm.utils.errors import ConfigError

RUN_NAME = "${run_name}"
_REPR = reprlib.Repr()  # lists and mappings of any size and depth in a few characters
_REPR.maxstring = _REPR.maxother = 61
TEXTS = (str, str | None, str | list[str] | None)  # types of settings that hold text

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Environment = dict[VariableName, str]


class Section(BaseModel):
    """A frozen group of settings: no unknown keys, no type coercion."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class ModelConfig(Section):
    """The shape of the model: GPT-2's architecture (Radford et al., 2019)."""

    vocab_size: PositiveInt = 50257
    """Rows of the embedding; also the target vocabulary of the BPE."""
    d_model: PositiveInt = 768
    """Width of the residual stream."""
    n_heads: PositiveInt = 12
    """Attention heads; must divide d_model."""
    n_layers: PositiveInt = 12
    """Transformer blocks."""
    d_ff: PositiveInt = 3072
    """Hidden width of the feed-forward layer."""
    max_seq_len: Annotated[int, Field(gt=1)] = 512
    """Context length, and block length of the data, in tokens."""
    dropout: Fraction = 0.1
    """Dropout probability in training."""
    pad_token_id: NonNegativeInt | None = 50256
    """Token that pads finished rows; null: the tokenizer's end-of-text."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, more time."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model ({self.d_model}) must be divisible by n_heads ({self.n_heads})"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id ({self.pad_token_id}) must be smaller than"
                f" vocab_size ({self.vocab_size})"
            )
        return self


class TrainingConfig(Section):
    """How long, how fast and in which precision the model is trained."""

    num_epochs: PositiveInt = 1
    """Passes over the training tokens."""
    max_steps: PositiveInt | None = None
    """Optimizer steps after which training ends; null: num_epochs decides."""
    per_gpu_batch_size: PositiveInt = 16
    """Blocks in a forward pass of one rank (a GPU or a CPU process)."""
    gradient_accumulation_steps: PositiveInt = 2
    """Backward passes per optimizer step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter, 2019) or sgd."""
    learning_rate: PositiveFloat = 3e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Learning rate at the end of the decay, as a fraction of the peak."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up: cosine, linear or constant."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps in which the learning rate rises from 0."""
    scale_lr_with_world_size: bool = False
    """Multiply the peak learning rate by the number of ranks (Goyal et al., 2017)."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of the matrices; biases and norms have none."""
    beta1: Fraction = 0.9
    """AdamW: decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW: decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW: term for numerical stability."""
    momentum: Fraction = 0.9
    """SGD: momentum."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the norm of the averaged gradient to this; null: no clipping."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; auto: GPUs if there are any; cuda: GPUs, or an error."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters; float64 is for exact comparisons."""
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; auto: bfloat16 if that is faster here."""
    log_interval: PositiveInt = 10
    """Optimizer steps between lines of the log."""
    eval_interval: PositiveInt | None = None
    """Optimizer steps between evaluations; null: one per epoch."""
    eval_batches: PositiveInt | None = None
    """Batches per rank in an evaluation; null: all."""
    checkpoint_interval: PositiveInt | None = None
    """Optimizer steps between checkpoints; null: one per epoch.

    Rank 0 copies parameters and moments into CPU memory, which it keeps, and writes the copy while
    training goes on: it needs memory for one checkpoint more.
    """
    keep_last_checkpoints: PositiveInt = 3
    """Numbered checkpoints to keep; best and final are always kept."""
    commit_interval: PositiveInt = 10
    """Elastic: optimizer steps between commits.

    Training returns to the last commit when a rank is lost, and notices new hosts at a commit. The
    expected loss of time is smallest near sqrt(2 x seconds of a commit x seconds between failures)
    (Young, 1974).
    """
    elastic_timeout_seconds: PositiveInt = 60
    """Elastic: save and end if too few ranks are left for this long."""
    compile: bool = False
    """Compile the layers and the loss with torch.compile: slow start, faster steps."""


class DataConfig(Section):
    """Which text, which tokenizer, and where the tokens are stored."""

    source: Literal["stories", "python", "files", "hub"] = "python"
    """Source of the text: stories, python, files or hub."""
    path: str | list[str] | None = None
    """Source files: a file, folder or glob, or a list of them."""
    tokenizer: Literal["bpe", "byte", "gpt2"] = "gpt2"
    """Tokenizer: bpe (trained on the text), byte or gpt2."""
    data_dir: str = "notebooks/data/preprocessed/v1"
    """Folder of the prepared tokens."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Validation share of the documents, if the source has no validation split."""
    num_stories: PositiveInt = 20000
    """Source stories: number of stories."""
    max_bytes: PositiveInt | None = None
    """Maximum size of the text in bytes; null: all."""
    hub_dataset: str | None = None
    """Source hub: name of the dataset, or folder of a local copy."""
    hub_config: str | None = None
    """Source hub: configuration of the dataset."""
    hub_text_field: str = "text"
    """Source hub: field that contains the text."""
    num_workers: NonNegativeInt = 0
    """Processes that load batches, per rank."""
    pin_memory: bool = True
    """Page-lock batches for the copy to a GPU; ignored without one."""

    @model_validator(mode="after")
    def _source_has_its_text(self) -> DataConfig:
        if self.source == "files" and not self.path:
            raise ValueError("source 'files' needs a path: a text file, a folder or a glob")
        if self.source == "hub" and not self.hub_dataset:
            raise ValueError(
                "source 'hub' needs hub_dataset: a dataset's name or the folder of a local copy"
            )
        return self

    @property
    def paths(self) -> list[str]:
        """`path` as a list, empty if it is not set."""
        return [self.path] if isinstance(self.path, str) else self.path or []


class GenerationConfig(Section):
    """How the next token is sampled: top-k (Fan et al., 2018), top-p (Holtzman et al., 2020)."""

    max_new_tokens: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    """Maximum number of tokens after the prompt."""
    temperature: NonNegativeFloat = 0.8
    """Divides the logits; 0: greedy; 1: the model's own distribution."""
    top_k: NonNegativeInt = 50
    """Sample from the k most likely tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Sample from the smallest set of tokens with this probability; 1: from all."""
    num_samples: PositiveInt = 1
    """Texts per prompt."""
    seed: int | None = None
    """The same seed gives the same text; null: another text each time."""


class PathsConfig(Section):
    """Where a run is stored; `${run_name}` stands for the run's name."""

    run_dir: str = f"runs/{RUN_NAME}"
    """Folder of a run: config.yaml, run.json and metrics."""
    checkpoint_dir: str = f"runs/{RUN_NAME}/checkpoints"
    """Checkpoints of a run."""
    log_dir: str = f"runs/{RUN_NAME}/logs"
    """Logs of a run, one JSON-lines file per rank."""
    tensorboard_dir: str = f"runs/{RUN_NAME}/tensorboard"
    """TensorBoard events of a run."""


class HostConfig(Section):
    """One host of a cluster."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name or address that ssh reaches from the first host."""
    slots: PositiveInt = 1
    """Ranks on this host: as many as it has GPUs."""
    environment: Environment = {}
    """Environment variables of its ranks, added to distributed.environment."""


class DistributedConfig(Section):
    """How the ranks communicate. https://horovod.readthedocs.io/en/stable/tensor-fusion_include.html"""

    compression: Literal["none", "fp16"] = "none"
    """Type of the gradients in messages: none (their own) or fp16."""
    fusion_threshold_mb: NonNegativeFloat = 64.0
    """Maximum size in MiB of a message that joins several gradients."""
    cycle_time_ms: PositiveFloat = 50.0
    """Milliseconds between two checks for gradients that are ready; less while a rank waits."""
    reduction_groups: NonNegativeInt = 0
    """Number of fixed groups in which gradients are reduced; 0: grouped by timing."""
    threads_per_rank: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of a rank; auto: the host's cores, divided evenly."""
    stall_warning_seconds: PositiveInt = 10
    """Warn if a rank keeps the others waiting for this long."""
    stall_shutdown_seconds: NonNegativeInt = 60
    """End the job if a rank keeps the others waiting for this long; 0: never."""
    gloo_timeout_seconds: PositiveInt = 30
    """Give up a connection that is silent for this long."""
    hosts: list[HostConfig] = []
    """Hosts, the one that starts the job first; empty: this machine."""
    interface: str | None = None
    """Network interface that the hosts share, for example eth0; null: Horovod's choice."""
    ssh_port: PositiveInt | None = None
    """Port of ssh; null: ssh's own setting."""
    ssh_user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] | None = None
    """User of ssh, only with ssh_identity_file; null: ssh's own setting."""
    ssh_identity_file: str | None = None
    """Private key of ssh; null: ssh's own setting."""
    environment: Environment = {}
    """Environment variables of every rank on every host."""

    @model_validator(mode="after")
    def _user_has_a_key(self) -> DistributedConfig:
        if self.ssh_user and not self.ssh_identity_file:
            raise ValueError(
                "ssh_user needs ssh_identity_file: horovodrun accepts a user only with a key"
            )
        return self


class Config(Section):
    """Everything that a run depends on. Immutable; `with_overrides` makes a changed copy."""

    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    paths: PathsConfig = PathsConfig()
    distributed: DistributedConfig = DistributedConfig()
    seed: NonNegativeInt = 42
    """Seed of every random draw of the run."""
    _project_root: Path = PrivateAttr(default_factory=lambda: find_project_root())

    @property
    def project_root(self) -> Path:
        """The folder where relative paths start."""
        return self._project_root

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested plain Python values, ready for YAML or a checkpoint."""
        return self.model_dump(mode="json")

    def resolve(self, path: str | Path, run_name: str | None = None) -> Path:
        """Return `path` as an absolute path: relative ones start at the project root.

        `run_name` replaces `${run_name}` in it.

        Raises:
            ConfigError: `path` contains `${run_name}` and no run name is given, or is not a path.
        """
        text = str(path)
        if RUN_NAME in text and run_name is None:
            raise ConfigError(f"the path {text} needs a run name; give one with --run-name")
        return _absolute(text.replace(RUN_NAME, run_name or ""), self.project_root)

    def with_overrides(self, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
        """Return a copy with some settings changed; `load_config` documents `overrides`."""
        return config_from_dict(self.to_dict(), self.project_root, overrides=overrides)


def all_settings() -> dict[str, FieldInfo]:
    """Return every setting by its dotted name: `default` and `description` of each."""
    found: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
        else:
            found[name] = field
    return found


def find_project_root(start: str | Path | None = None) -> Path:
    """Return the first folder from `start` (the working directory) upward that holds `configs/`.

    If there is none, return `start` itself.
    """
    start = Path(start or Path.cwd()).resolve()
    folders = (start, *start.parents)
    return next((folder for folder in folders if os.path.isdir(folder / "configs")), start)


def resolve_path(path: str | Path) -> Path:
    """Return `path` as an absolute path: a relative one starts at the project root."""
    return _absolute(path, find_project_root())


def load_config(
    path: str | Path, overrides: Iterable[str] | Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file into a `Config`.

    Args:
        path: the file; a relative path is looked for in the working directory, then in the
            project root.
        overrides: changes on top of the file: strings such as `"training.learning_rate=1e-3"`, or a
            mapping, nested (`{"training": {"learning_rate": 1e-3}}`) or with dotted keys. In a
            string, the value of a text setting is taken as it is, without YAML's special characters
            unless it starts with a quote or a bracket.

    Returns:
        The settings. Keys that are not in the file have the defaults of the classes above.
        Relative paths start at the first folder, from the file's upward, that holds `configs/`; if
        there is none, at the file's folder, or, for the config.yaml of a run, where the run began.

    Raises:
        ConfigError: one sentence with the file, the key, and the nearest valid key.
    """
    file = _find_file(path)
    try:
        content = _yaml().load(file.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise ConfigError(f"{path}, line {line}: {_one_line(error.problem)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except (YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path} must contain sections such as 'model:', not {_short(content)}")
    config = config_from_dict(
        content or {}, find_project_root(file.parent), str(path), overrides or ()
    )
    config._project_root = _root_of_run(config, file)
    return config


def _root_of_run(config: Config, file: Path) -> Path:
    """Return the project root of the run that `file` was saved in; of no run: `config`'s own."""
    folder = file.parent
    run_dir = Path(config.paths.run_dir.replace(RUN_NAME, folder.name))
    above = folder.parents[len(run_dir.parts) - 1 :][:1]
    is_of_run = file.name == "config.yaml" and bool(above) and above[0] / run_dir == folder
    return above[0] if is_of_run and config.project_root == folder else config.project_root


def config_from_dict(
    content: Mapping[str, Any],
    project_root: str | Path | None = None,
    name: str = "the configuration",
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> Config:
    """Make a `Config` of nested plain values, such as `Config.to_dict()` gives.

    Relative paths start at `project_root`, by default found from the working directory. `overrides`
    are changes on top of `content`, as for `load_config`.

    Raises:
        ConfigError: one sentence with `name`, the key, and the nearest valid key.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    if not isinstance(overrides, Mapping):
        overrides = dict(map(_parse_override, overrides))
    try:
        merged = _merge(content, overrides)
        # A section of a file may be empty.
        sections = {key: value for key, value in merged.items() if value is not None}
        config = Config.model_validate(sections)
        config.model_dump_json()  # raises if a text contains an unpaired surrogate
    except ValidationError as error:
        raise ConfigError(f"{name}: {_first_problem(error)}") from None
    except PydanticSerializationError as error:
        raise ConfigError(f"{name} contains a text that cannot be written: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply") from None
    if project_root:
        config._project_root = Path(project_root).resolve()
    return config


def save_config(config: Config, path: str | Path) -> Path:
    """Write `config` as YAML; `load_config` gives an equal one back. Return the path.

    Only its owner can read a file with environment variables.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    yaml = _yaml()
    # The library writes U+0085 as it is and reads it as a space.
    yaml.allow_unicode = "\x85" not in config.model_dump_json()
    settings = config.distributed
    if settings.environment or any(host.environment for host in settings.hosts):
        path.unlink(missing_ok=True)
        path.touch(0o600)  # variables may be secret
    with path.open("w", encoding="utf-8") as file:
        yaml.dump(config.to_dict(), file)
    return path


def _yaml() -> YAML:
    """Return a reader and writer of YAML 1.2: `3e-4` is a number, a duplicate key is an error."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _parse_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE`, and read the value as YAML where it is not a plain text."""
    key, equals, value = (part.strip() for part in str(text).partition("="))
    if not equals or not key:
        raise ConfigError(
            f"--set takes KEY=VALUE, for example training.learning_rate=1e-3, not {text!r}"
        )
    field = all_settings().get(key)
    is_text = key.startswith("distributed.environment.") or (field and field.annotation in TEXTS)
    if is_text and not re.match(r"[\['\"]|(null|~|)$", value):
        return key, value
    try:
        return key, _yaml().load(value)
    except (YAMLError, ValueError, RecursionError):
        return key, value


def _merge(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` with `changes` on top: nested mappings, or dotted keys."""
    merged = dict(content)
    for key, value in changes.items():
        first, dot, rest = str(key).partition(".")
        value = {rest: value} if dot else value
        if isinstance(value, Mapping):
            below = merged.get(first)
            value = _merge(below if isinstance(below, Mapping) else {}, value)
        merged[first] = value
    return merged


def _first_problem(error: ValidationError) -> str:
    """Return one sentence: the first unknown key if there is one, else the first problem."""
    problems = error.errors()
    unknown = (one for one in problems if one["type"] == "extra_forbidden")
    problem = next(unknown, problems[0])
    key, message = _dotted_key(problem["loc"]), problem["msg"]
    if problem["type"] == "extra_forbidden":
        nearest = _nearest_key(key)
        hint = f"; the nearest is {nearest}" if nearest else ""
        return f"{key or repr(key)} is not a setting{hint}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return f"{key}: {message.removeprefix('Value error, ')}"
    # A union such as `int | "auto"` has one problem for each of its types.
    messages = dict.fromkeys(one["msg"] for one in problems if _dotted_key(one["loc"]) == key)
    message = " or ".join(messages).replace(" or Input should be", " or")
    message = re.sub(r"^(Input|String|Keys) should", "must", message)
    message = re.sub(r" or instance of \w+", "", message)
    return f"{key} {message}, not {_short(problem['input'])}"


def _dotted_key(loc: tuple[int | str, ...]) -> str:
    """Return the path of a setting, without the parts that name a type of a union or a key."""
    parts = [str(part) for part in loc if part != "[key]"]
    parts = [part if part.isprintable() else repr(part) for part in parts]
    is_nested = "hosts" in parts or "environment" in parts
    return ".".join(parts if is_nested else parts[:2])


def _nearest_key(key: str) -> str | None:
    """Return the valid key whose last word is most like the one of `key`, or None."""
    hosts = [f"distributed.hosts.0.{name}" for name in HostConfig.model_fields]
    valid_keys = [*hosts, *all_settings(), *Config.model_fields]
    by_word = {valid.rpartition(".")[2]: valid for valid in valid_keys}
    nearest = get_close_matches(key.rpartition(".")[2], by_word, n=1)
    return by_word[nearest[0]] if nearest else None


def _short(value: Any) -> str:
    """Return a value for a sentence, at most 60 characters long."""
    text = "empty" if value is None else _one_line(_REPR.repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _absolute(path: str | Path, root: Path) -> Path:
    try:
        return (root / os.path.expanduser(path)).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise ConfigError(f"{_short(str(path))} is not a path: {_one_line(error)}") from None


def _find_file(path: str | Path) -> Path:
    here, in_project = (_absolute(path, folder) for folder in (Path.cwd(), find_project_root()))
    for file in (here, in_project):
        try:
            if file.is_file():
                return file
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    folder = here.parent if os.path.isdir(here.parent) else in_project.parent
    names = sorted(str(Path(path).parent / file.name) for file in folder.glob("*.yaml"))
    hint = f"; there are {', '.join(names)}" if names else ""
    raise ConfigError(f"there is no configuration file {path}{hint}")
