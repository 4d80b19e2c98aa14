"""Typed, frozen settings, read from YAML and written to it.

One class per section of a configuration file. Every field states its meaning, unit and default
here; the files under `configs/` repeat the meaning beside each key that they set.

Relative paths resolve against the project root, never against the working directory, so that the
same file works from the root and from `notebooks/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticSerializationError

from horovod_lm.utils.config_errors import describe, sentence
from horovod_lm.utils.config_text import apply_overrides, one_line, read_yaml, write_yaml
from horovod_lm.utils.errors import ConfigError

RUN_NAME = "${run_name}"

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Environment = dict[VariableName, str]


class Section(BaseModel):
    """A frozen group of settings: unknown keys are refused, types are not bent."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """The shape of the model: GPT-2's architecture (Radford et al., 2019)."""

    vocab_size: PositiveInt = 50257
    """Rows of the embedding; also the BPE's target vocabulary."""
    d_model: PositiveInt = 768
    """Width of the residual stream."""
    n_heads: PositiveInt = 12
    """Attention heads; must divide d_model."""
    n_layers: PositiveInt = 12
    """Transformer blocks."""
    d_ff: PositiveInt = 3072
    """Width inside the feed-forward layer."""
    max_seq_len: Annotated[int, Field(gt=1)] = 512
    """Context length, and block length of the data, in tokens."""
    dropout: Fraction = 0.1
    """Probability that an activation is dropped in training."""
    pad_token_id: NonNegativeInt | None = 50256
    """Fills rows that ended; null: the tokenizer's end-of-text."""
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
    """Stop after so many optimizer steps, whatever the epochs say."""
    per_gpu_batch_size: PositiveInt = 16
    """Blocks in one forward pass of one rank (a GPU or a CPU process)."""
    gradient_accumulation_steps: PositiveInt = 2
    """Backward passes before one optimizer step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov & Hutter, 2019) or sgd."""
    learning_rate: PositiveFloat = 3e-4
    """Peak rate, reached after the warm-up."""
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """End of the decay, as a fraction of the peak."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps in which the rate rises from 0."""
    scale_lr_with_world_size: bool = False
    """Multiply the peak rate by the number of ranks (Goyal et al., 2017)."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of the matrices; biases and norms are not decayed."""
    beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """AdamW's term for numerical stability."""
    momentum: Fraction = 0.9
    """SGD's momentum."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the averaged gradient's norm to this; null: do not clip."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ranks train; auto: on GPUs where torch sees one; cuda: on GPUs or not at all."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the parameters; float64 is for exact comparisons."""
    amp_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the matrix products; auto: bfloat16 where the hardware has it."""
    log_interval: PositiveInt = 10
    """Optimizer steps between lines of the log."""
    eval_interval: PositiveInt | None = None
    """Optimizer steps between evaluations; null: at the end of each epoch."""
    eval_batches: PositiveInt | None = None
    """Batches per rank in one evaluation; null: all."""
    checkpoint_interval: PositiveInt | None = None
    """Optimizer steps between checkpoints; null: at the end of each epoch."""
    keep_last_checkpoints: PositiveInt = 3
    """Numbered checkpoints kept; best and final are always kept."""
    commit_interval: PositiveInt = 10
    """Elastic: optimizer steps between commits, where training goes back to when a rank is lost.

    Least time is lost near sqrt(2 x seconds of a commit x seconds between failures) (Young, 1974).
    Hosts that join or leave are noticed at a commit, too.
    """
    elastic_timeout_seconds: PositiveInt = 60
    """Elastic: save and end when too few ranks are left for so long."""
    compile: bool = False
    """Run the model through torch.compile: minutes at the start, faster steps."""


class DataConfig(Section):
    """Which text, which tokenizer, and where the tokens are kept."""

    source: Literal["stories", "python", "files", "hub"] = "python"
    """Where the text comes from."""
    path: str | list[str] | None = None
    """Source files: a file, folder or glob, or a list of them."""
    tokenizer: Literal["bpe", "byte", "gpt2"] = "gpt2"
    """BPE is trained on the corpus; byte and gpt2 are fixed."""
    data_dir: str = "notebooks/data/preprocessed/v1"
    """Folder of the prepared tokens."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out for validation."""
    num_stories: PositiveInt = 20000
    """Source stories: how many are written."""
    max_bytes: PositiveInt | None = None
    """Use no more than so many bytes of text; null: all."""
    hub_dataset: str | None = None
    """Source hub: a dataset's name or a local copy of it."""
    hub_config: str | None = None
    """Source hub: the dataset's configuration."""
    hub_text_field: str = "text"
    """Source hub: the field that holds the text."""
    num_workers: NonNegativeInt = 0
    """Processes that load batches, per rank."""
    pin_memory: bool = True
    """Page-lock batches on their way to a GPU; ignored without one."""

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
        """`path` as a list, empty when it is not set."""
        return (
            []
            if self.path is None
            else [self.path]
            if isinstance(self.path, str)
            else list(self.path)
        )


class GenerationConfig(Section):
    """How a trained model draws its next token."""

    max_new_tokens: PositiveInt = 100
    """Tokens written after the prompt."""
    temperature: NonNegativeFloat = 0.8
    """0: always the likeliest token; 1: the model's own distribution."""
    top_k: NonNegativeInt = 50
    """Draw from the k likeliest tokens (Fan et al., 2018); 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Draw from the smallest set that holds this much probability (Holtzman et al., 2020)."""
    num_samples: PositiveInt = 1
    """Continuations of each prompt."""
    seed: int | None = None
    """The same seed writes the same text; null: another each time."""


class PathsConfig(Section):
    """Where a run is kept; `${run_name}` stands for the run's name."""

    run_dir: str = f"runs/{RUN_NAME}"
    """Config, run.json and metrics of one run."""
    checkpoint_dir: str = f"runs/{RUN_NAME}/checkpoints"
    """The run's checkpoints."""
    log_dir: str = f"runs/{RUN_NAME}/logs"
    """The run's logs, one JSON-lines file per rank."""
    tensorboard_dir: str = f"runs/{RUN_NAME}/tensorboard"
    """The run's TensorBoard events."""


class HostConfig(Section):
    """One machine of a cluster."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A name or address that ssh reaches."""
    slots: PositiveInt = 1
    """Ranks that it runs: as many as it has GPUs."""
    environment: Environment = {}
    """Environment variables of its ranks alone, on top of distributed.environment."""


class DistributedConfig(Section):
    """How the ranks talk to each other. See https://horovod.readthedocs.io/en/stable/tensor-fusion_include.html"""

    compression: Literal["none", "fp16"] = "none"
    """Type of the gradients on the wire."""
    fusion_threshold_mb: NonNegativeFloat = 64.0
    """Gradients are joined into messages of up to so many MiB."""
    cycle_time_ms: PositiveFloat = 10.0
    """Milliseconds between two looks at what is ready to be reduced."""
    reduction_groups: NonNegativeInt = 0
    """Fixed groups of gradients that are reduced together; 0: by timing."""
    threads_per_rank: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of a rank; auto: the host's cores shared evenly."""
    stall_warning_seconds: PositiveInt = 20
    """Warn when a rank has been waited for so long."""
    stall_shutdown_seconds: NonNegativeInt = 60
    """End the job when a rank has been waited for so long; 0: never."""
    gloo_timeout_seconds: PositiveInt = 30
    """Give up a connection that says nothing for so long."""
    hosts: list[HostConfig] = []
    """The machines; empty: this one."""
    interface: str | None = None
    """The network interface that the hosts share, for example eth0."""
    ssh_port: PositiveInt | None = None
    """The port of ssh; null: as ssh itself is set up."""
    ssh_user: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$")] | None = None
    """The user for ssh, with ssh_identity_file only; null: as ssh itself is set up."""
    ssh_identity_file: str | None = None
    """The private key for ssh; null: as ssh itself is set up."""
    environment: Environment = {}
    """Environment variables of every rank on every host."""

    @model_validator(mode="after")
    def _user_has_a_key(self) -> DistributedConfig:
        if self.ssh_user and not self.ssh_identity_file:
            raise ValueError(
                "ssh_user needs ssh_identity_file: horovodrun takes a user only with a key"
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
    """Every random draw of the run follows from it."""
    project_root: Path = Field(
        default_factory=lambda: find_project_root(), exclude=True, repr=False
    )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as nested plain Python values, ready for YAML or a checkpoint."""
        return self.model_dump(mode="json")

    def resolve(self, path: str | Path, run_name: str | None = None) -> Path:
        """Return `path` as an absolute path: relative ones start at the project root.

        Args:
            path: a path that may hold `${run_name}`.
            run_name: what stands for `${run_name}`.

        Raises:
            ConfigError: `path` holds `${run_name}` and no run name is given, or cannot be a path.
        """
        text = str(path)
        if RUN_NAME in text and run_name is None:
            raise ConfigError(f"the path {text} needs a run name; give one with --run-name")
        return _absolute(text.replace(RUN_NAME, run_name or ""), self.project_root)

    def with_overrides(self, overrides: Iterable[str] | Mapping[str, Any]) -> Config:
        """Return a copy with some settings changed; `load_config` says what `overrides` may be."""
        return config_from_dict(
            apply_overrides(self.to_dict(), overrides), self.project_root, "the configuration"
        )


def find_project_root(start: str | Path | None = None) -> Path:
    """Return the first folder from `start` (the working directory) upward that holds `configs/`.

    Where there is none, `start` itself.
    """
    start = Path(start or Path.cwd()).resolve()
    return next(
        (folder for folder in (start, *start.parents) if (folder / "configs").is_dir()), start
    )


def resolve_path(path: str | Path) -> Path:
    """Return `path` as an absolute path: a relative one starts at the project root."""
    return _absolute(path, find_project_root())


def load_config(
    path: str | Path, overrides: Iterable[str] | Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file into a `Config`.

    Args:
        path: the file; a relative path is looked for from the working directory, then from the
            project root.
        overrides: changes on top of the file: strings such as `"training.learning_rate=1e-3"`, or a
            mapping, nested (`{"training": {"learning_rate": 1e-3}}`) or with dotted keys.

    Returns:
        The settings. Keys that the file leaves out have the defaults of the classes above.
        Relative paths in it start at the first folder, from the file's upward, that holds
        `configs/`; without one, at the file's folder, or where a run's folder started.

    Raises:
        ConfigError: one sentence with the file, the key, and the nearest valid key.
    """
    file = _find_file(path)
    try:
        content = read_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} must hold sections such as 'model:' and 'training:', not {describe(content)}"
        )
    folder = file.resolve().parent
    config = config_from_dict(
        apply_overrides(content, overrides or {}), find_project_root(folder), str(path)
    )
    return config.model_copy(update={"project_root": _root_of_run(config, file.resolve())})


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
) -> Config:
    """Make a `Config` of nested plain values, such as `Config.to_dict()` gives.

    Args:
        content: sections and their settings.
        project_root: where relative paths start; default: found from the working directory.
        name: what to call the source in an error.

    Raises:
        ConfigError: one sentence with `name`, the key, and the nearest valid key.
    """
    root = Path(project_root).resolve() if project_root else find_project_root()
    if "project_root" in content:
        raise ConfigError(
            f"{name}: project_root is not a setting: it follows from the file's place"
        )
    try:
        given = {
            key: value for key, value in content.items() if value is not None
        }  # a section may stand empty
        config = Config.model_validate({**given, "project_root": root})
        config.model_dump_json()  # half a character, "\uD800", is text to YAML and to no file
        return config
    except PydanticSerializationError as error:
        raise ConfigError(f"{name} holds a text that cannot be written: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{name}: {sentence(error.errors(), _valid_keys())}") from None


def save_config(config: Config, path: str | Path) -> Path:
    """Write `config` as YAML; `load_config` gives an equal one back. Return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(config.to_dict()), encoding="utf-8")
    return path


def _valid_keys() -> list[str]:
    """Return every key a file may hold, sections first, in dotted form."""
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    del sections["project_root"]
    of_sections = [
        f"{name}.{field}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Section)
        for field in section.model_fields
    ]
    return [
        *sections,
        *of_sections,
        *(f"distributed.hosts.0.{key}" for key in HostConfig.model_fields),
    ]


def _absolute(path: str | Path, root: Path) -> Path:
    try:
        return (root / Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, ~nobody
        raise ConfigError(f"{describe(str(path))} cannot be a path: {one_line(error)}") from None


def _find_file(path: str | Path) -> Path:
    try:
        given = Path(path).expanduser()
        candidates = [file for file in (given, find_project_root() / given) if file.is_file()]
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{describe(str(path))} cannot be a path: {one_line(error)}") from None
    if candidates:
        return candidates[0]
    folder = given.parent if given.parent.is_dir() else find_project_root() / given.parent
    names = (
        sorted(str(given.parent / file.name) for file in folder.glob("*.yaml"))
        if folder.is_dir()
        else []
    )
    hint = f"; there are {', '.join(names)}" if names else ""
    raise ConfigError(f"there is no configuration file {path}{hint}")
