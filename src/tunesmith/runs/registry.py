"""Which runs lie under a folder, and what is each worth?

All is read from small files of the runs, anew each time; there is no index that could be lost. MLX is not
loaded. A folder that is damaged is listed with its faults."""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from typing_extensions import TypedDict

from tunesmith.errors import ConfigError, DataError, TunesmithError
from tunesmith.files import checked, read_json, read_regular
from tunesmith.runs import bases, tags
from tunesmith.runs.directory import CONFIG, INDEX, RESTORE, Manifest, Run
from tunesmith.runs.search import FOLDER, folders
from tunesmith.settings import origins
from tunesmith.settings.config import JSON

REPORT, LOCK = "report.json", ".lock"
FINISHED = ("completed", "stopped_early")
SORTS = ("created", "name", "model", "objective", "best", "verdict", "state", "size")
T = TypeVar("T")


@dataclass(frozen=True)
class BestValue:
    """``metric``: what was measured, as "validation loss"."""

    value: float
    metric: str
    step: int


@dataclass(frozen=True)
class RegisteredRun:
    """A run as the list shows it; a field is None or empty if it is not known.

    ``model``: its path; for a folder that a GGUF file was converted to, the path of that file. ``state``: the
    status in its manifest; "died" if the manifest says that it is running and no process trains it.
    ``mixed``: the files of ``data.mix``. ``ship``: whether its report says to ship it.
    ``faults``: what cannot be read of it."""

    path: Path
    created: str | None
    state: str | None
    model: str | None
    data: tuple[str, ...]
    mixed: tuple[str, ...]
    objective: str | None
    best: BestValue | None
    verdict: str | None
    ship: bool | None
    size_bytes: int
    tags: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.name

    def to_json(self) -> dict[str, JSON]:
        best = None
        if self.best is not None:
            finite = math.isfinite(self.best.value)
            best = asdict(self.best) | ({} if finite else {"value": str(self.best.value)})
        return {"name": self.name, **asdict(self), "path": str(self.path), "best": best}


class _Model(TypedDict):
    path: str


class _Mixed(TypedDict):
    path: list[str] | str


class _Data(TypedDict):
    train: list[str] | str
    mix: NotRequired[list[_Mixed]]


class _Objective(TypedDict):
    kind: str


class _Settings(TypedDict):
    """The part of ``config.yaml`` that is listed."""

    model: _Model
    data: _Data
    objective: _Objective


class ListedCheckpoints(TypedDict):
    """The part of ``checkpoints/index.json`` that is listed."""

    best: NotRequired[int | None]
    metric: NotRequired[str]
    best_value: NotRequired[float | None]


class _Report(TypedDict):
    """The part of ``report.json`` that is listed."""

    verdict: NotRequired[str]
    ship: NotRequired[bool | None]


def read(path: Path) -> RegisteredRun:
    """What is listed of the run at ``path``. Never raises an error of the run's files."""
    faults: list[str] = []

    def part(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except (TunesmithError, OSError) as error:
            faults.append(fault_line(error))
            return None

    manifest = part(lambda: Run.open(path).manifest)
    settings = part(lambda: _settings(path / CONFIG))
    best = part(lambda: _best(path / INDEX))
    state = None if manifest is None else _state(path, manifest)
    report = part(lambda: _report(path, state))
    base = None if manifest is None else manifest.get("hashes", {}).get("base")
    return RegisteredRun(
        path=path,
        created=None if manifest is None else manifest.get("created"),
        state=state,
        model=None if settings is None else bases.named(settings["model"]["path"], base),
        data=() if settings is None else _files(settings["data"]["train"]),
        mixed=() if settings is None else _mixed(settings["data"]),
        objective=None if settings is None else settings["objective"]["kind"],
        best=best,
        verdict=None if report is None else report.get("verdict"),
        ship=None if report is None else report.get("ship"),
        size_bytes=size(path),
        tags=tuple(part(lambda: tags.read(path)) or ()),
        faults=tuple(faults),
    )


def _files(paths: list[str] | str) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else tuple(paths)


def _mixed(data: _Data) -> tuple[str, ...]:
    return tuple(file for entry in data.get("mix", []) for file in _files(entry["path"]))


def fault_line(error: Exception) -> str:
    """What an error says, in one line and without its hint."""
    return " ".join(str(error).partition("\nhint:")[0].split())


def _settings(path: Path) -> _Settings:
    return checked(origins.skim(path), _Settings, str(path), DataError, RESTORE)


def _best(path: Path) -> BestValue | None:
    if not os.path.lexists(path):  # no checkpoint was saved yet
        return None
    index = read_json(path, ListedCheckpoints, DataError, RESTORE)
    step, value = index.get("best"), index.get("best_value")
    if step is None or value is None:
        return None
    return BestValue(value, index.get("metric", "validation loss"), step)


def _report(path: Path, state: str | None) -> _Report | None:
    """The report, unless the run goes on: it is then of an earlier time."""
    if state == "running" or not os.path.lexists(path / REPORT):
        return None
    return read_json(path / REPORT, _Report, DataError, "write it again: tunesmith report RUN")


def _state(path: Path, manifest: Manifest) -> str:
    status = manifest["status"]
    return "died" if status == "running" and not is_training(path) else status


def is_training(path: Path) -> bool:
    """Whether a process trains the run, by what it wrote into the run's lock: the lock itself is not touched,
    so that a training that begins now gets it."""
    try:
        owner = read_regular(path / LOCK, 200).decode("utf-8", errors="replace")
    except OSError:
        return False
    match = re.fullmatch(r"process (\d{1,9}) on (.*)\n?", owner)
    if match is None or match[2] != socket.gethostname():
        return match is not None  # by another machine
    try:
        os.kill(int(match[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def size(path: Path) -> int:
    """Bytes of all files in a folder; of a file, its own."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size if os.path.lexists(path) else 0
    total = 0
    waiting = [str(path)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:  # removed meanwhile, or no permission
            continue
    return total


def list_runs(
    folder: str | Path = FOLDER, *, sort: str = "created", reverse: bool = False, where: Sequence[str] = ()
) -> list[RegisteredRun]:
    """The runs under ``folder``. sort: one of `SORTS`; the newest, the lowest best value and the largest come
    first, unless ``reverse``. where: conditions that all must hold, as "objective=kto", "best<0.5" or
    "size>500MB".

    Raises ConfigError for an unknown sort or condition, DataError if there is no such folder."""
    if sort not in SORTS:
        raise ConfigError(f"cannot sort by {sort!r}", where="--sort", hint=", ".join(SORTS))
    conditions = [_condition(text) for text in where]
    runs = [read(path) for path in folders(Path(folder))]
    runs = [run for run in runs if all(holds(run) for holds in conditions)]
    runs.sort(key=lambda run: run.name)
    known = [run for run in runs if _key(run, sort) is not None]
    unknown = [run for run in runs if _key(run, sort) is None]
    known.sort(key=lambda run: _key(run, sort), reverse=(sort in ("created", "size")) != reverse)
    return [*known, *unknown]


def _key(run: RegisteredRun, sort: str) -> Any:
    values = {
        "best": None if run.best is None or math.isnan(run.best.value) else run.best.value,
        "model": run.model and Path(run.model).name,
        "size": run.size_bytes,
    }
    return values[sort] if sort in values else _texts(run)[sort] or None


def _texts(run: RegisteredRun) -> dict[str, str]:
    """What a condition can ask."""
    return {
        "created": run.created or "",
        "name": run.name,
        "model": run.model or "",
        "data": " ".join(run.data),
        "objective": run.objective or "",
        "verdict": run.verdict or "",
        "ship": {True: "yes", False: "no", None: "unknown"}[run.ship],
        "state": run.state or "damaged",
        "tag": " ".join(run.tags),
        "fault": " ".join(run.faults),
    }


_CONDITION = re.compile(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*")
_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*([kMG]?)B?", re.I)
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def _condition(text: str) -> Callable[[RegisteredRun], bool]:
    """``key=text``: the value contains the text; ``!=``: it does not. ``best`` and ``size`` are numbers."""
    match = _CONDITION.fullmatch(text)
    numbers = ("best", "size")
    names = (
        *numbers,
        "created",
        "name",
        "model",
        "data",
        "objective",
        "verdict",
        "ship",
        "state",
        "tag",
        "fault",
    )
    hint = f"KEY=TEXT, KEY!=TEXT, best<0.5, size>500MB; keys: {', '.join(names)}"
    if match is None or match[1] not in names:
        raise ConfigError(f"{text!r} is not a condition", where="--where", hint=hint)
    key, operator, wanted = match.groups()
    if key in numbers:
        return _comparison(key, operator, wanted, hint)
    if operator not in ("=", "!="):
        raise ConfigError(f"{key} is not a number", where=f"--where {text}", hint=hint)
    return lambda run: (wanted.casefold() in _texts(run)[key].casefold()) == (operator == "=")


def _comparison(key: str, operator: str, wanted: str, hint: str) -> Callable[[RegisteredRun], bool]:
    match = _NUMBER.fullmatch(wanted)
    if match is None:
        raise ConfigError(f"{wanted!r} is not a number", where=f"--where {key}{operator}{wanted}", hint=hint)
    limit = float(match[1]) * _UNITS[match[2].lower()]

    def holds(run: RegisteredRun) -> bool:
        value = _key(run, key)
        if value is None:
            return False
        return {
            "=": value == limit,
            "!=": value != limit,
            "<": value < limit,
            "<=": value <= limit,
            ">": value > limit,
            ">=": value >= limit,
        }[operator]

    return holds


def tag(run: str | Path, name: str | None = None, *, move: bool = False, remove: bool = False) -> list[str]:
    """Give ``run`` the tag ``name`` (``mytool:2``), or ``remove`` it; returns the run's tags.

    A tag names one run of those around (docs/register.md); ``move`` takes it from the run that has it. Raises
    DataError if another run has it, ConfigError if it is not a name and a version."""
    path = Run.open(run).path
    if name is None and (move or remove):
        raise ConfigError("which tag?", where="--move" if move else "--remove", hint="name it: mytool:2")
    if move and remove:
        raise ConfigError("a tag is moved or removed, not both", where="--move, --remove")
    if name is not None and remove:
        tags.remove(path, name)
    elif name is not None:
        tags.add(path, name, move=move)
    return tags.read(path)
