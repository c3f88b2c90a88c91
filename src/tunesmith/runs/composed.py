"""A run that was not trained: the mixture of the adapters of other runs on their common base, in a run
directory that every verb takes.

Its settings are those of the first source, with the mixture's adapter and the data of all sources. Its one
checkpoint is that of step 0. ``composition.json`` holds how it was made and what was measured of the layers;
the manifest's lineage names the sources, their weights and hashes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import adapters, events
from tunesmith.adapters import composition
from tunesmith.adapters.composition import ComposedLayer, Recipe
from tunesmith.adapters.specs import DoRA, Full, LoRA, QALoRA
from tunesmith.data import formats
from tunesmith.data.examples import Example, prompt_key
from tunesmith.errors import ConfigError, ModelError, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.files import draft, read_json, write_json, write_text
from tunesmith.runs import ancestry, bases, checkpoints, lineage, manifest, opening
from tunesmith.runs.ancestry import Parent
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import COMPOSED, PLAN, VALID, Run, require_free

RECORD = "composition.json"
PLANNED = ("asked_as", "thinking")
"""What the plan of a run says of how the model is asked."""


@dataclass(frozen=True)
class WeightedRun:
    """A source of a mixture: a run with one of its checkpoints. ``name``: that no other source has."""

    name: str
    run: Run
    config: RunConfig
    checkpoint: Path
    weight: float
    model: opening.Source


@dataclass(frozen=True)
class ComposedRun:
    """``run``: the new run directory. ``rank``: of its adapter. ``seen``: for each source, the prompts (as
    `examples.prompt_key` gives them) that other sources were trained on."""

    run: Run
    recipe: Recipe
    rank: int
    sources: tuple[WeightedRun, ...]
    layers: tuple[ComposedLayer, ...]
    seen: tuple[frozenset[str], ...]

    @property
    def retained(self) -> float:
        """Share of the combined update's energy that the result's rank holds, over all layers."""
        total = sum(layer.energy for layer in self.layers)
        return sum(layer.energy * layer.retained for layer in self.layers) / total if total else 1.0

    def to_json(self) -> dict[str, Any]:
        sources = [
            {"run": str(source.run.path), "checkpoint": source.checkpoint.name, "weight": source.weight}
            for source in self.sources
        ]
        layers = [
            {**layer._asdict(), "overlaps": [overlap._asdict() for overlap in layer.overlaps]}
            for layer in self.layers
        ]
        return {
            "run": str(self.run.path),
            **self.recipe.model_dump(mode="json"),
            "rank": self.rank,
            "density": self.recipe.used_density,
            "sources": sources,
            "retained": self.retained,
            "layers": layers,
        }


def compose(
    sources: Mapping[str, float] | Mapping[Path, float],
    recipe: Recipe,
    out: Path,
    *,
    model: str | None = None,
    notify: Sink = events.silent,
) -> ComposedRun:
    """Write the mixture of ``sources`` (run or checkpoint folder → weight) as a new run at ``out``.

    model: path of the base, if it was moved since training. Raises ConfigError for sources that cannot be
    named so, ModelError for adapters that cannot be composed or are not of one base."""
    require_free(out, resumable=False)
    weighted = _found(sources, model, notify)
    _require_one_base(weighted)
    for notice in [*_differing(weighted), *_contained(weighted)]:
        notify(notice)
    opened = weighted[0].model.open(notify)
    net = opened.loaded.net
    notify(Notice(f"reading the updates of {len(weighted)} adapters"))
    updates = []
    specs: list[LoRA | DoRA | QALoRA] = []
    for source in weighted:
        with checkpoints.held(source.checkpoint):
            adapter = adapters.read(source.checkpoint)
            updates.append(composition.read_updates(net, adapter))
        assert not isinstance(adapter.spec, Full)  # it was refused
        specs.append(adapter.spec)
    notify(Notice(f"composing by {recipe.method}"))
    result = composition.compose(
        updates, [source.weight for source in weighted], [spec.rank for spec in specs], recipe
    )
    del updates
    spec = composition.spec_of(result, specs)
    composition.install(net, spec, result)
    if result.rank < result.wanted_rank:
        text = f"rank {result.rank} instead of {result.wanted_rank}: the narrowest layer takes no more"
        hint = "the column retained says what each layer loses"
        notify(Notice(text, level="warning", where="compose", hint=hint))
    made = ComposedRun(Run(out), recipe, result.rank, weighted, result.layers, _seen(weighted, notify))
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft(out) as folder:
        _write(folder, made, spec, opened.loaded.fingerprint, net, notify)
    return made


def _found(
    sources: Mapping[str, float] | Mapping[Path, float], model: str | None, notify: Sink
) -> tuple[WeightedRun, ...]:
    """The runs and checkpoints that are named. Raises ConfigError if none is, or one is not a run."""
    if not sources:
        raise ConfigError("no run is named", where="compose", hint="tunesmith compose RUN=0.7 OTHER=0.3")
    folders = Counter(Path(target).resolve().name for target in sources)
    weighted: list[WeightedRun] = []
    for target, weight in sources.items():
        source = opening.find(target, model=model, notify=notify)
        if source.run is None or source.config is None or source.checkpoint is None:
            raise ConfigError("is not a run", where=str(target), hint="name run directories: RUN=0.7")
        if weight == 0:
            raise ConfigError("has the weight 0", where=str(target), hint="leave it out")
        folder = Path(target).resolve().name
        name = folder if folders[folder] == 1 else str(target)
        weighted.append(WeightedRun(name, source.run, source.config, source.checkpoint, weight, source))
    return tuple(weighted)


def _require_one_base(sources: Sequence[WeightedRun]) -> None:
    """Raises ModelError if the adapters were not trained on the same base, held in the same way."""
    first = sources[0]
    held = ("quantize", "group_size", "resize_embeddings")
    for source in sources[1:]:
        if not bases.are_same(source.run, first.run):
            what = f"was trained on another base than {first.run.path}"
            hint = "only updates of the same weights can be added"
            raise ModelError(what, where=str(source.run.path), hint=hint)
        own, other = source.config.model, first.config.model
        keys = held if own.quantize or other.quantize else held[2:]
        for key in keys:
            if (value := getattr(own, key)) != (expected := getattr(other, key)):
                what = f"model.{key} is {value}, and {expected} in {first.run.path}"
                hint = "only updates of the same weights can be added"
                raise ModelError(what, where=str(source.run.path), hint=hint)


def _differing(sources: Sequence[WeightedRun]) -> list[Notice]:
    """What the sources do not share and the mixture takes from the first of them."""
    first, notices = sources[0], []
    if any(source.run.hashes["base"] != first.run.hashes["base"] for source in sources):
        text = f"the sources were trained on one GGUF file in other dtypes: that of {first.name} is used"
        notices.append(Notice(text, level="warning", where="compose"))
    facts = {"chat template": [source.run.hashes["template"] for source in sources]}
    facts |= {key: [_plan(source.run).get(key) for source in sources] for key in PLANNED}
    words = {"asked_as": "form of the prompts", "thinking": "thinking"}
    for key, values in facts.items():
        if any(value != values[0] for value in values):
            text = f"the sources differ in their {words.get(key, key)}: that of {first.name} is used"
            notices.append(Notice(text, level="warning", where="compose"))
    return notices


def _contained(sources: Sequence[WeightedRun]) -> list[Notice]:
    """The sources whose update is in the adapter of another source too, by the lineage of that."""
    notices: list[Notice] = []
    for source in sources:
        shares: defaultdict[Path, float] = defaultdict(float)
        for run, share in _updates_within(ancestry.parents(source.run.path)):
            shares[run] += share
        for other in sources:
            if share := shares[other.run.path.resolve()]:
                text = f"{source.name} was made from {other.name} and contains its update: the mixture adds "
                text += f"{other.name} {other.weight:g} times, and {source.weight * share:g} times "
                notices.append(Notice(f"{text}within {source.name}", where="compose"))
    return notices


def _updates_within(parents: Sequence[Parent]) -> Iterator[tuple[Path, float]]:
    """The runs whose updates are in an adapter, each with its factor there. What was merged is in the base
    and not in the adapter."""
    for parent in parents:
        if parent.relation != "merged":
            factor = 1.0 if parent.weight is None else parent.weight
            yield parent.run.resolve(), factor
            yield from ((run, factor * share) for run, share in _updates_within(parent.parents))


def _plan(run: Run) -> dict[str, Any]:
    try:
        plan = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _write(folder: Path, made: ComposedRun, spec: LoRA, base: str, net: Any, notify: Sink) -> None:
    """Write the run directory. ``net`` has the mixture attached."""
    first = made.sources[0]
    config = _config(made.sources, spec)
    composed = {
        "method": made.recipe.method,
        "rank": made.rank,
        "density": made.recipe.used_density,
        "seed": made.recipe.seed,
        "sources": [{**_origin(source), "weight": source.weight} for source in made.sources],
    }
    data = {path: value for source in made.sources for path, value in source.run.hashes["data"].items()}
    hashes = {"data": data, "template": first.run.hashes["template"], "base": base}
    day = manifest.recorded(first.run).day
    facts = manifest.facts(config, hashes, lineage={COMPOSED: composed}, day=day)
    run = Run.create(folder, config, {}, facts)
    rows = _held_out(made, notify)
    write_text(run.path / VALID, "".join(rows))
    plan = {key: value for key, value in _plan(first.run).items() if key in PLANNED}
    write_json(run.path / PLAN, {**plan, "rows_valid": len(rows)})
    cursor = Cursor()
    size = sum(value.nbytes for value in adapters.trainable(net).values())
    checkpoints.save(run, cursor, lambda place: adapters.save(net, spec, place), size)
    checkpoints.retain(run, cursor, config.loop)
    write_json(run.path / RECORD, made.to_json())
    run.mark(COMPOSED)


def _origin(source: WeightedRun) -> dict[str, Any]:
    return lineage.origin(str(source.checkpoint.resolve()), source.run.hashes["base"])


def _config(sources: Sequence[WeightedRun], spec: LoRA) -> RunConfig:
    """The settings of the first source with the mixture's adapter and the data of all."""
    first = sources[0].config
    files = dict.fromkeys(path for source in sources for path in source.config.data.trained_on)
    data = first.data.model_copy(update={"train": tuple(files), "mix": ()})
    if any(source.config.data.format != data.format for source in sources):
        data = data.model_copy(update={"format": "auto"})
    return first.model_copy(update={"data": data, "adapter": spec})


def _seen(sources: Sequence[WeightedRun], notify: Sink) -> tuple[frozenset[str], ...]:
    """For each source, the prompts that other sources were trained on."""
    trained = [_trained_prompts(source, notify) if len(sources) > 1 else frozenset() for source in sources]
    return tuple(
        frozenset().union(*(prompts for other, prompts in enumerate(trained) if other != place))
        for place in range(len(sources))
    )


def _trained_prompts(source: WeightedRun, notify: Sink) -> frozenset[str]:
    """The prompts of the training files that the run did not hold out; of files that were changed since, what
    they hold now."""
    data = source.config.data
    try:
        read = formats.read(data.trained_on, data)
    except TunesmithError as error:
        what = f"the training rows of {source.name} cannot be read ({error.what.splitlines()[0]})"
        text = f"{what}: held-out rows of other sources that are among them are not left out"
        notify(Notice(text, level="warning", where="compose"))
        return frozenset()
    recorded = source.run.hashes["data"]
    if any(recorded.get(path, digest) != digest for path, digest in read.files.items()):
        text = f"the training files of {source.name} were changed since: they may not name its training rows"
        notify(Notice(text, level="warning", where="compose"))
    prompts = frozenset(map(prompt_key, read.examples))
    if isinstance(data.valid, tuple):  # held-out files may share prompts with the training files
        return prompts
    return prompts - {prompt_key(row) for row in _held_out_examples(source)}


def _held_out_examples(source: WeightedRun) -> list[Example]:
    path = source.run.path / VALID
    if not path.is_file() or not path.stat().st_size:
        return []
    return formats.read([str(path)], source.config.data.model_copy(update={"format": "auto"})).examples


def _held_out(made: ComposedRun, notify: Sink) -> list[str]:
    """The lines of all sources' held-out rows, each once, without those that another source was trained
    on."""
    lines: dict[str, None] = {}
    for source, seen in zip(made.sources, made.seen, strict=True):
        path = source.run.path / VALID
        if not path.is_file():
            continue
        trained = {
            int(row.source.rpartition(":")[2])
            for row in _held_out_examples(source)
            if prompt_key(row) in seen
        }
        if trained:
            text = f"held-out rows of {source.name} left out: another source was trained on their prompts"
            notify(Notice(text, level="warning", count=len(trained), where="compose"))
        with path.open(encoding="utf-8", newline="\n") as file:
            lines |= dict.fromkeys(
                line if line.endswith("\n") else f"{line}\n"
                for number, line in enumerate(file, 1)
                if number not in trained
            )
    return list(lines)


def add_to_record(run: Run, key: str, value: object) -> None:
    """Write what was measured of the mixture into its record."""
    record = read_json(run.path / RECORD, dict[str, Any], ModelError, "compose it again")
    write_json(run.path / RECORD, {**record, key: value})
