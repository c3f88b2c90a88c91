"""From the file of a sweep to trials: settings, names and commands.

A trial is what ``tunesmith train`` would do with the same settings, and is made by that command, in a process
of its own."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path

from tunesmith.errors import ConfigError
from tunesmith.files import write_bytes
from tunesmith.runs.config import RunConfig
from tunesmith.runs.configure import configure
from tunesmith.runs.directory import MANIFEST
from tunesmith.settings.config import Resolved, flat
from tunesmith.sweeps.contrasts import SweptKey
from tunesmith.sweeps.spec import LOSS, SEED, BaseSpec, IntervalRacing, SweepSpec

BASE, TRIALS, LOGS = "base", "trials", "logs"
LONGEST = 60
"""Letters of a value in a name."""


@dataclass(frozen=True)
class SweptSetting:
    """One point of the sweep. ``changes``: key → value, over the base. ``label``: its short name."""

    label: str
    changes: Mapping[str, object]


@dataclass(frozen=True)
class Trial:
    """A setting with a seed. ``setting``: place of the setting. ``seed``: None if it is the base's own.
    ``settings``: all of them by dotted key. ``words``: of the command, without ``--out``."""

    name: str
    setting: int
    seed: int | None
    settings: Mapping[str, object]
    words: tuple[str, ...]


@dataclass(frozen=True)
class SweepPlan:
    """All trials: with the first seed those of all settings, then with the second."""

    settings: tuple[SweptSetting, ...]
    seeds: tuple[int | None, ...]
    keys: tuple[SweptKey, ...]
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()

    def of(self, setting: int) -> list[Trial]:
        return [trial for trial in self.trials if trial.setting == setting]

    def part(self, number: int, count: int) -> tuple[Trial, ...]:
        """Of the trials dealt out to ``count`` machines, those of machine ``number``, counted from 1."""
        return self.trials[number - 1 :: count]


def expand(spec: SweepSpec, base: BaseSpec, place: str, environ: Mapping[str, str]) -> SweepPlan:
    """base: that of ``spec`` with the options of the command line over it. place: the file, for errors.

    Raises ConfigError if a trial's settings are wrong."""
    changes = [dict(zip(spec.grid, values, strict=True)) for values in product(*spec.grid.values())]
    changes = [*(changes if spec.grid else []), *map(dict, spec.trials)] or [{}]
    seeds: tuple[int | None, ...] = spec.seeds or (None,)
    resolved: list[Resolved[RunConfig]] = []
    distinct: dict[str, dict[str, object]] = {}
    notes: list[str] = []
    for change in changes:
        label = ", ".join(_assignments(change)) or "the base"
        try:
            made = configured(base, change, environ)
        except ConfigError as error:
            where = f"{place}: {label}" + (f": {error.where}" if error.where else "")
            raise ConfigError(error.what, where=where, hint=error.hint) from error
        _require_rows(spec, made.spec, f"{place}: {label}")
        identity = json.dumps(_settings(made), sort_keys=True)
        if identity in distinct:
            notes.append(f"{label} has the same settings as another trial: it is trained once")
            continue
        distinct[identity] = change
        resolved.append(made)
    kept = list(distinct.values())
    settings = tuple(map(SweptSetting, _labels(kept), kept))
    keys = _keys(kept, [_settings(made) for made in resolved])
    trials: list[Trial] = []
    for seed in seeds:
        for number, (setting, made) in enumerate(zip(settings, resolved, strict=True)):
            of_trial = _settings(made) | ({} if seed is None else {SEED: seed})
            own = words(base, setting.changes, seed)
            trials.append(Trial(_name(setting.label, seed), number, seed, of_trial, own))
    return SweepPlan(settings, seeds, keys, _distinct(trials), tuple(notes))


def _require_rows(spec: SweepSpec, config: RunConfig, where: str) -> None:
    """Raises ConfigError if trials could not be trained, compared, or raced, as ``spec`` says."""
    for path in (path for entry in config.data.mix for path in entry.path):
        if not Path(path).expanduser().exists():
            hint = (
                "put general rows there, such as chats on other subjects with answers that the model should "
                "keep giving, in any format of training files; or name your own file in a copy of the sweep"
            )
            raise ConfigError(f"{path} does not exist", where=f"{where}: data.mix", hint=hint)
    if spec.metric == LOSS and config.data.valid in (0, ()):
        hint = "hold rows out, or compare by a task: evaluate and metric"
        raise ConfigError("data.valid is 0: no held-out loss to compare by", where=where, hint=hint)
    if isinstance(spec.racing, IntervalRacing) and config.loop.validate_every == 0:
        hint = "give loop.validate_every, or racing: off"
        raise ConfigError("loop.validate_every is 0: racing has nothing to look at", where=where, hint=hint)


def configured(
    base: BaseSpec, changes: Mapping[str, object], environ: Mapping[str, str]
) -> Resolved[RunConfig]:
    """The settings of a trial, as ``train`` reads them."""
    return configure(
        preset=base.preset,
        config=base.config,
        model=base.model,
        data=base.data,
        sets=[*_assignments(base.settings), *_assignments(changes)],
        environ=environ,
    )


def _settings(resolved: Resolved[RunConfig]) -> dict[str, object]:
    return flat(resolved.spec.model_dump(mode="json"))


def _assignments(values: Mapping[str, object]) -> list[str]:
    """``key=value``; JSON is YAML."""
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: object) -> str:
    """A value as it would be typed: text without quotes where YAML reads it as text."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value):
        if value.lower() not in ("true", "false", "null"):
            return value
    return json.dumps(value, ensure_ascii=False)


def words(base: BaseSpec, changes: Mapping[str, object], seed: int | None) -> tuple[str, ...]:
    """Of the command that trains a trial, without ``--out``."""
    sets = [*_assignments(base.settings), *_assignments(changes)]
    sets += [] if seed is None else [f"{SEED}={seed}"]
    return ("train", *base_words(base), *(word for text in sets for word in ("--set", text)))


def base_words(base: BaseSpec) -> list[str]:
    """The options that name preset, files, model and rows."""
    options = [] if base.preset is None else ["--preset", base.preset]
    options += [word for file in base.config for word in ("--config", file)]
    options += [] if base.model is None else ["--model", base.model]
    return options + [word for file in base.data for word in ("--data", file)]


def _labels(changes: Sequence[Mapping[str, object]]) -> list[str]:
    """Each setting by its changes, with the last part of each key unless two keys share it."""
    keys = dict.fromkeys(key for change in changes for key in change)
    ends = Counter(key.rpartition(".")[2] for key in keys)

    def short(key: str) -> str:
        end = key.rpartition(".")[2]
        return end if ends[end] == 1 and end != "kind" else key.removesuffix(".kind")

    return [
        ", ".join(f"{short(key)}={_text(value)}" for key, value in change.items()) or "base"
        for change in changes
    ]


def _name(label: str, seed: int | None) -> str:
    """The folder of a trial."""
    plain = re.sub(r"[^A-Za-z0-9.=+-]+", "_", label).strip("_.") or "trial"
    if len(plain) > LONGEST:
        plain = f"{plain[:LONGEST].strip('_.')}-{sha256(label.encode()).hexdigest()[:6]}"
    return plain if seed is None else f"{plain}_seed={seed}"


def _distinct(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """With a number where two names are the same, also on file systems that know no capitals."""
    seen: Counter[str] = Counter()
    unique: list[Trial] = []
    for trial in trials:
        seen[trial.name.lower()] += 1
        count = seen[trial.name.lower()]
        unique.append(trial if count == 1 else replace(trial, name=f"{trial.name}-{count}"))
    return tuple(unique)


def _keys(
    changes: Sequence[Mapping[str, object]], every: Sequence[Mapping[str, object]]
) -> tuple[SweptKey, ...]:
    """The keys that are varied, with the value of each in each setting; the base's where a trial leaves it
    out. Keys that always change together are one, with the values of the first."""
    swept: dict[tuple[int, ...], SweptKey] = {}
    for key in dict.fromkeys(key for change in changes for key in change):
        given = [change.get(key, settings.get(key)) for change, settings in zip(changes, every, strict=True)]
        texts = [json.dumps(value, sort_keys=True) for value in given]
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        levels = tuple(places[text] for text in texts)
        if levels in swept:
            together = swept[levels]
            swept[levels] = replace(together, key=f"{together.key} with {key}")
        elif len(places) > 1:
            swept[levels] = SweptKey(key, tuple(json.loads(text) for text in places), levels)
    return tuple(swept.values())


def frozen_base(base: BaseSpec, folder: Path) -> BaseSpec:
    """``base`` with copies of its files in ``folder``, so that a file that is edited while the sweep runs
    changes no trial."""
    copies: list[str] = []
    for number, file in enumerate(base.config, 1):
        if (Path(file).parent / MANIFEST).is_file():  # a run's own settings, which it never changes
            copies.append(file)
            continue
        copy = folder / BASE / f"{number}-{Path(file).name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_bytes() != Path(file).read_bytes():
            write_bytes(copy, Path(file).read_bytes())
        copies.append(str(copy))
    return base.model_copy(update={"config": tuple(copies)})


def command(trial: Trial) -> str:
    """What trains this trial alone."""
    return shlex.join(["tunesmith", *trial.words])
