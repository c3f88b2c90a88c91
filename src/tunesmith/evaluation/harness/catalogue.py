"""Which tasks of EleutherAI's lm-evaluation-harness does a name mean, and where are their documents?

A task is one YAML file of the harness, a group is a tree of them. Documents come from local files in the
hub's schema, or from the hub. A local task requests nothing from the hub, writes nothing into a cache, and
never takes its solved examples from the split that it measures. The harness decides what is asked of a
document and how an answer is scored, except for IFEval (`constraints`)."""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.checks import constraints
from tunesmith.data import sources
from tunesmith.errors import DataError, EvaluationError, SetupError
from tunesmith.events import Notice, Sink

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

HARNESS = "0.4.13"
HINT = "pip install 'lm-eval==0.4.13'"
FORM = "ifeval"
TOGETHER = {"truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2")}
"""The harness's tag has a third task, which is judged by other models."""
STEMS = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}
"""Two tasks that share one file."""
LEVELS = (
    "prompt_level_strict_acc",
    "inst_level_strict_acc",
    "prompt_level_loose_acc",
    "inst_level_loose_acc",
)
SEED = 1234
"""The harness's own, for the choice of solved examples."""


class Leaf(NamedTuple):
    """One task of the harness. ``groups``: those it was reached through, outermost first. ``changed``: their
    settings."""

    name: str
    path: Path
    version: str
    subject: str
    groups: tuple[str, ...] = ()
    changed: Mapping[str, Any] = {}


class Chosen(NamedTuple):
    """The tasks that one name means. ``partial``: a group, whose tasks need not all have documents."""

    title: str
    version: str
    leaves: tuple[Leaf, ...]
    partial: bool


def require() -> None:
    """Raise SetupError if the harness is missing, or is another version than this module was written for."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("lm_eval")
    except PackageNotFoundError:
        raise SetupError("benchmarks need EleutherAI's lm-evaluation-harness", hint=HINT) from None
    if installed != HARNESS:
        raise SetupError(f"benchmarks need lm-eval {HARNESS}, {installed} is installed", hint=HINT)


@contextlib.contextmanager
def warnings_as_notices(notify: Sink) -> Iterator[None]:
    """Send the harness's warnings as notices, each once with its count; no progress bars. Logging is restored
    afterwards."""
    import datasets

    counts: Counter[str] = Counter()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: counts.update([record.getMessage()])
    logger, showed = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield
        counts.update(
            str(warning.message)
            for warning in warned
            if not issubclass(warning.category, DeprecationWarning | FutureWarning)
        )
    finally:
        logger.handlers, logger.propagate = before
        if showed:
            datasets.enable_progress_bars()
        for text, count in counts.items():
            notify(Notice(f"lm-eval: {text}", level="warning", count=count))


def resolve(name: str) -> list[Chosen]:
    """The tasks that ``name`` (``task``, ``group``, ``group:part``) means. Raises EvaluationError if it means
    none."""
    import lm_eval.tasks

    whole, _, part = name.partition(":")
    root = Path(lm_eval.tasks.__file__).parent
    for folders in _searches(root, whole):
        known = _index(folders)
        try:
            leaves = [leaf for member in TOGETHER.get(whole, [whole]) for leaf in _leaves(known, member)]
        except KeyError:
            continue
        break
    else:
        names = sorted({path.stem for path in root.rglob("*.yaml")} | {path.name for path in root.iterdir()})
        raise _unknown(f"no benchmark is called {whole!r}", whole, names, "`lm-eval ls tasks` lists them")
    group = f"{whole}_{part}" if part else whole
    inside = [leaf for leaf in leaves if group in leaf.groups]
    if inside:
        return [Chosen(group, _version(known[group]), tuple(inside), True)]
    alone = [leaf for leaf in leaves if not part or leaf.name == group or leaf.subject == part]
    if not alone:
        names = {leaf.subject for leaf in leaves} | {
            group.removeprefix(f"{whole}_") for leaf in leaves for group in leaf.groups[1:]
        }
        raise _unknown(
            f"{whole} has no part called {part!r}",
            part,
            sorted(names),
            f"its parts: {', '.join(sorted(names)[:20])}",
        )
    return [Chosen(leaf.name, leaf.version, (leaf,), False) for leaf in alone]


def _searches(root: Path, name: str) -> Iterator[tuple[Path, ...]]:
    """Folders that may define ``name``, the likeliest first: reading the settings of all 14,000 tasks takes
    ten seconds."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir()]
    yield tuple(path for path in folders if f"{name}_".startswith(f"{path.name}_"))
    mention = (path for path in root.rglob("*.yaml") if name.encode() in path.read_bytes())
    mentioning = tuple(root / part for part in sorted({path.relative_to(root).parts[0] for path in mention}))
    yield from (mentioning, (root,)) if mentioning else ()


@functools.cache
def _index(folders: tuple[Path, ...]) -> Mapping[str, Any]:
    """The harness's tasks, groups and tags below ``folders``, by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False, include_path=[*folders]).task_index


def _unknown(what: str, name: str, names: Sequence[str], hint: str) -> EvaluationError:
    close = difflib.get_close_matches(name, names, n=3)
    return EvaluationError(
        what, where="--benchmark", hint=f"did you mean {' or '.join(close)}?" if close else hint
    )


def _version(entry: Any) -> str:
    return str((entry.cfg.get("metadata") or {}).get("version", "0"))


def _leaves(
    known: Mapping[str, Any],
    member: str | dict[str, Any],
    groups: tuple[str, ...] = (),
    changed: Mapping[str, Any] = {},
) -> list[Leaf]:
    """All tasks below a task, group or tag, or in a group's own list. Raises KeyError for a name that is not
    ``known``."""
    if isinstance(member, dict):
        inside = member.get("task")
        if isinstance(inside, list):
            return [
                leaf for each in inside for leaf in _leaves(known, each, (*groups, member["group"]), changed)
            ]
        own = {key: value for key, value in member.items() if key not in ("group", "task")}
        return _leaves(known, str(member.get("group", inside)), groups, {**changed, **own})
    entry = known[member]
    if entry.kind.name == "GROUP":
        return [
            leaf for each in entry.cfg["task"] for leaf in _leaves(known, each, (*groups, member), changed)
        ]
    if entry.kind.name == "TAG":
        return [leaf for each in sorted(entry.tags) for leaf in _leaves(known, each, groups, changed)]
    subject = entry.cfg.get("dataset_name")
    return [
        Leaf(
            member,
            entry.yaml_path,
            _version(entry),
            subject if isinstance(subject, str) else member,
            groups,
            changed,
        )
    ]


class MissingFile(NamedTuple):
    """No local file has the documents of a task. ``names``: the names that it may have."""

    names: tuple[str, ...]


def load(leaf: Leaf, folder: Path | None, shots: int, notify: Sink) -> ConfigurableTask | MissingFile:
    """The harness's own task, with its documents from ``folder`` or the hub and ``shots`` solved examples
    before each question.

    Raises EvaluationError for a task that cannot be measured here, DataError for a row that is not a JSON
    object."""
    from lm_eval.api.task import ConfigurableTask

    config = _config(leaf, notify)
    if config.get("num_fewshot") == 0 and shots:
        text = f"{leaf.name} is asked without solved examples by its authors, whatever --shots says"
        notify(Notice(text, level="warning"))
        shots = 0
    config["num_fewshot"] = shots
    if "process_docs" in config:
        # the harness asks for its documents again and again
        config["process_docs"] = functools.cache(config["process_docs"])
    if folder is None:
        try:
            task = config.get("class", ConfigurableTask)(config=config)
        except Exception as error:  # the hub's client, and the data's own code, may raise anything
            text = f"{leaf.name} could not be fetched from the hub: {' '.join(str(error).split())[:200]}"
            hint = "offline, give --benchmark-data, a folder with its files"
            raise EvaluationError(text, hint=hint) from error
    else:
        task = _local(leaf, config, folder, shots)
        if isinstance(task, MissingFile):
            return task
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(SEED)
    return task


def _config(leaf: Leaf, notify: Sink) -> dict[str, Any]:
    """The task's settings. Raises EvaluationError for a task that cannot be measured here."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config: dict[str, Any] = {**load_yaml(leaf.path, resolve_func=False), **leaf.changed}
    if config.get("unsafe_code"):
        message = f"{leaf.name} runs code that the model writes"
        raise EvaluationError(message, hint="only humaneval can be sandboxed here")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise EvaluationError(f"{leaf.name} asks about pictures or sound", hint="choose a benchmark of text")
    if leaf.name == FORM:  # the harness's own scorer fetches data when it is imported
        metrics = [{"metric": level, "aggregation": "mean", "higher_is_better": True} for level in LEVELS]
        config |= {"metric_list": metrics, "process_results": _form, "process_docs": _checkable(notify)}
    else:
        config = {**load_yaml(leaf.path, resolve_func=True), **leaf.changed}
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    return config | {"task": leaf.name, "metadata": config.get("metadata") or {}}


def _local(leaf: Leaf, config: dict[str, Any], folder: Path, shots: int) -> ConfigurableTask | MissingFile:
    """The task with the documents of ``folder``."""
    from lm_eval.api.task import ConfigurableTask

    if "class" in config:
        message = f"{leaf.name} is a program that reads the hub itself"
        raise EvaluationError(message, hint="leave --benchmark-data out")
    data = _splits(leaf, config, folder, shots)
    if isinstance(data, MissingFile):
        return data

    class Local(ConfigurableTask):
        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            self.dataset = data

    try:
        return Local(config=config)
    except Exception as error:  # templates are filled with the first document
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        message = f"{leaf.name}: the documents are not as the hub's: {reason}"
        hint = "keep the names and types of the hub's columns"
        raise EvaluationError(message, where=str(folder), hint=hint) from error


def _splits(leaf: Leaf, config: dict[str, Any], folder: Path, shots: int) -> dict[str, Any] | MissingFile:
    """The splits that are needed, as data sets; other splits are removed from ``config``."""
    import datasets
    import lm_eval.tasks

    few = dict(config.get("fewshot_config") or {})
    measured = config.get("test_split") or config.get("validation_split") or "test"
    wanted = {measured: True}
    if shots and not few.get("samples"):
        others = (
            config.get("fewshot_split"),
            few.get("split"),
            config.get("training_split"),
            config.get("validation_split"),
        )
        solved = next((split for split in others if split and split != measured), None)
        if solved is None:
            raise EvaluationError(
                f"{leaf.name} has no solved examples outside the split it measures", hint="--shots 0"
            )
        wanted[solved] = False
    family = leaf.path.relative_to(Path(lm_eval.tasks.__file__).parent).parts[0]
    name = config.get("dataset_name")
    stems = [STEMS.get(leaf.name, leaf.name), *([f"{family}/{name}", name] if isinstance(name, str) else [])]
    data: dict[str, Any] = {}
    for split, whole in wanted.items():
        path = file(folder, stems, split, whole)
        if isinstance(path, MissingFile):
            return path
        data[split] = datasets.Dataset.from_list(list(_rows(path)))
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        config[key] = config.get(key) if config.get(key) in data else None
    if few.get("split") and few["split"] not in data:
        config["fewshot_config"] = {key: value for key, value in few.items() if key != "split"}
    return data


def file(folder: Path, stems: Sequence[str], split: str, whole: bool = True) -> Path | MissingFile:
    """The file of a split: ``stem/split.jsonl``, ``stem_split.jsonl`` (a number may follow the split), or
    ``stem.jsonl``."""
    names = [f"{stem}{mark}{split}.jsonl" for mark in "_/" for stem in stems]
    names += [f"{stem}.jsonl" for stem in stems] if whole else []
    for name in names:
        if (folder / name).is_file():
            return folder / name
    numbered = [path for stem in stems for path in sorted(folder.glob(f"{stem}_{split}_[0-9]*.jsonl"))]
    if len(numbered) > 1:
        message = f"more than one file may be meant: {', '.join(path.name for path in numbered)}"
        raise EvaluationError(message, where=str(folder), hint="leave one there")
    return (
        numbered[0]
        if numbered
        else MissingFile((names[0], *(f"{stem}/{split}.jsonl" for stem in stems[1:2])))
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for raw in sources.raws(path):
        value = sources.value(raw.text)
        if not isinstance(value, dict):
            raise DataError(
                f"is not a JSON object: {value}", where=raw.source, hint="one document a line, as on the hub"
            )
        yield value


def _checkable(notify: Sink) -> Callable[[Any], Any]:
    """Keeps the documents of IFEval whose instructions can be checked; notices say why the others cannot."""

    def keep(docs: Any) -> Any:
        checkable: list[int] = []
        reasons: Counter[str] = Counter()
        for index, doc in enumerate(docs):
            try:
                constraints.declared(doc)
                checkable.append(index)
            except ValueError as error:
                reasons[str(error)] += 1
        for reason, count in reasons.items():
            notify(Notice(f"{FORM}: not asked: {reason}", level="warning", count=count))
        return docs.select(checkable)

    return keep


def _form(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """IFEval's metrics: strict, and loose, which also tries the answer without the first line, the last,
    both, or asterisks (Zhou et al. 2023, section 2.2)."""
    wanted, lines = constraints.declared(doc), results[0].split("\n")
    parts = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [text for part in (results[0], *parts) for text in (part, part.replace("*", ""))]
    strict = [constraint.holds(results[0]) for constraint in wanted]
    loose = [any(constraint.holds(text) for text in variants) for constraint in wanted]
    return dict(zip(LEVELS, (all(strict), strict, all(loose), loose), strict=True))
