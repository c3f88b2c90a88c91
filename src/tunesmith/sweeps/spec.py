"""The file of a sweep: what is varied over which base, and how trials are judged."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.errors import ConfigError
from tunesmith.evaluation.tasks import EvaluationSpec
from tunesmith.settings.config import Spec, Texts, flat, load

LOSS = "loss"
"""The metric that every trial has: the loss of the held-out rows, of the checkpoint that is used."""
SEED = "loop.seed"


def _files(value: object) -> object:
    """A file, or a list of files, in place of the block ``base``."""
    return {"config": value} if isinstance(value, str | list | tuple) else value


def _flat(value: object) -> object:
    """Nested blocks as dotted keys."""
    return flat(value) if isinstance(value, dict) else value


def _grid(value: object) -> object:
    """Dotted keys, each with a list."""
    for key, values in flat(value).items() if isinstance(value, dict) else ():
        if not isinstance(values, list | tuple):
            raise ValueError(f"{key} needs a list of values, not {values}")
    return _flat(value)


def _all_flat(value: object) -> object:
    return tuple(map(_flat, value)) if isinstance(value, list | tuple) else value


class BaseSpec(Spec):
    """The settings that all trials share, as the options of ``tunesmith train`` give them."""

    preset: str | None = Field(default=None, description="a named set of settings")
    config: Texts = Field(default=(), description="YAML files of settings, later ones win")
    model: str | None = Field(default=None, description="model folder, GGUF file or hub id")
    data: Texts = Field(default=(), description="training files")
    settings: Annotated[dict[str, object], BeforeValidator(_flat)] = Field(
        default={}, description="more settings, as adapter.dropout: 0.05"
    )


class SpaceSpec(Spec):
    """The values of one key that a search may try: ``choices``, or all from ``low`` to ``high``."""

    low: int | float | None = Field(default=None, description="the least")
    high: int | float | None = Field(default=None, description="the most; integers if both are")
    log: bool = Field(default=False, description="draw on a logarithmic scale, as for learning rates")
    choices: tuple[object, ...] = Field(default=(), description="the values; a list stands for itself")

    @model_validator(mode="after")
    def _choices_or_range(self) -> SpaceSpec:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give choices, or low and high")
        if not self.choices and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("low must be below high")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs low above 0")
        return self


def _choices(value: object) -> object:
    return {"choices": value} if isinstance(value, list | tuple) else value


class NoRacing(Spec):
    """Every trial is trained to its end."""

    kind: Literal["off"] = "off"


class IntervalRacing(Spec):
    """A trial is stopped once its held-out loss is shown to be above the leader's at the same update, or is
    not finite."""

    kind: Literal["interval"] = "interval"
    error: float = Field(
        default=0.05, gt=0, lt=0.5, description="probability that the best setting is stopped, at most"
    )
    after: float = Field(
        default=0.25, ge=0, lt=1, description="share of the updates before which nothing is stopped"
    )


class SweepSpec(Spec):
    """A sweep."""

    name: str | None = Field(default=None, description="name of its folder; null: that of the file")
    base: Annotated[BaseSpec, BeforeValidator(_files)] = Field(
        default_factory=BaseSpec, description="what all trials share; a file of settings stands for itself"
    )
    grid: Annotated[dict[str, tuple[object, ...]], BeforeValidator(_grid)] = Field(
        default={}, description="key → values: all combinations are trials"
    )
    trials: Annotated[tuple[dict[str, object], ...], BeforeValidator(_all_flat)] = Field(
        default=(), description="changes of single trials; {} is the base as it is"
    )
    space: dict[str, Annotated[SpaceSpec, BeforeValidator(_choices)]] = Field(
        default={}, description="key → what --optuna may try: {low, high, log}, or a list of values"
    )
    seeds: tuple[Annotated[int, Field(ge=0, le=2**63 - 1)], ...] = Field(
        default=(), description="each setting is trained with each seed (empty: loop.seed of the base)"
    )
    metric: str = Field(
        default=LOSS,
        description="loss (of the held-out rows), or a task of `evaluate` as task or task/number",
    )
    evaluate: Texts = Field(default=(), description="tasks that every trial is evaluated on")
    evaluation: EvaluationSpec = Field(
        default_factory=lambda: EvaluationSpec.model_validate({}), description="how it is evaluated"
    )
    racing: NoRacing | IntervalRacing = Field(
        default_factory=NoRacing, description="stop trials that are shown to be worse"
    )
    parallel: int = Field(default=1, ge=1, le=256, description="processes at a time, if memory allows")

    @model_validator(mode="after")
    def _consistent(self) -> SweepSpec:
        if not (self.grid or self.trials or self.seeds or self.space):
            raise ValueError("nothing is varied: give grid, trials, seeds or space")
        if self.space and isinstance(self.racing, IntervalRacing):
            raise ValueError(
                "racing shares its error among all settings: it needs a grid or trials, not a space"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        for key in {*self.grid, *self.space, *(key for trial in self.trials for key in trial)}:
            if key == SEED:
                raise ValueError(f"{SEED} is not a setting to choose: use seeds")
            if key.startswith("objective") and self.metric == LOSS:
                raise ValueError(
                    f"{key} changes what the loss is, so it cannot be compared: name a task under evaluate "
                    "and as metric (perplexity)"
                )
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no value")
        if self.metric != LOSS and not self.evaluate:
            raise ValueError(f"metric is {self.metric}, and evaluate names no task")
        if isinstance(self.racing, IntervalRacing) and self.metric != LOSS:
            raise ValueError("racing compares the loss of held-out rows: it needs metric: loss")
        return self


def ready() -> dict[str, Path]:
    """Name → file of the sweeps that come with the package, by name."""
    folder = Path(str(resources.files(__package__ or "tunesmith.sweeps")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(file: str | Path) -> Path:
    """The file of a sweep, or of the ready-made sweep of that name. Raises ConfigError if there is none."""
    path = Path(file)
    if path.is_file():
        return path
    if str(file) in ready():
        return ready()[str(file)]
    hint = f"give a YAML file, or one of the ready-made sweeps: {', '.join(ready())}"
    raise ConfigError("there is no such file", where=str(file), hint=hint)


def read(path: Path) -> SweepSpec:
    """Raises ConfigError naming every key that is wrong."""
    return load(SweepSpec, files=[path]).spec
