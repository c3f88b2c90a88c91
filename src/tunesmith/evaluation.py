"""Measure the base and the tuned model on the same rows, and say how sure the difference is.

Reads a run directory only (or, on request, other rows). The base is the run's own model before its adapter is attached,
so both sides share weights, tokenizer, prompts and order of rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from tunesmith import adapters, events, formats, model, scoring, template
from tunesmith.batches import Cut, Group
from tunesmith.errors import EvaluationError
from tunesmith.events import Notice, Sink
from tunesmith.formats import JSON
from tunesmith.objectives.dpo import DPO
from tunesmith.objectives.kto import KTO
from tunesmith.objectives.sft import SFT
from tunesmith.run import EVALS, VALID, Run, RunConfig
from tunesmith.tasks import ExampleScore, Score, preference, summarise
from tunesmith.tasks.perplexity import Perplexity
from tunesmith.tasks.tool_calls import Reference, ToolCalls, references
from tunesmith.writing import write_json, write_text

TASKS = ("perplexity", "tool_calls", "preference")
IMITATED = SFT()
"""Whatever the objective was, these tasks ask how well the model says what is to be said: demonstrations, desirable, chosen."""


@dataclass(frozen=True)
class Answered:
    """One prompt with both answers; ``base`` is None where only the tuned model was asked."""

    prompt: str
    reference: str
    base: str | None
    tuned: str
    source: str


@dataclass(frozen=True)
class Evaluation:
    run: Run
    checkpoint: Path
    scores: list[Score]
    answers: list[Answered]

    def summary(self) -> dict[str, Any]:
        return {
            "run": str(self.run.path),
            "checkpoint": self.checkpoint.name,
            "scores": [
                {**asdict(score), "base": None if score.delta is None else score.value - score.delta} for score in self.scores
            ],
        }


Measured = dict[str, list[Any]]


def evaluate(
    run: Run,
    *,
    data: Sequence[str] = (),
    checkpoint: str = "best",
    tasks: Sequence[str] = TASKS,
    base: bool = True,
    limit: int | None = None,
    max_tokens: int = 256,
    notify: Sink = events.silent,
) -> Evaluation:
    """Scores of ``tasks`` for the checkpoint, paired with the base's; written to ``evals/<task>@<version>/``.

    data: files to measure on instead of the run's held-out rows. limit: only the first so many rows (said in a notice).
    base: also measure the model without its adapter. Raises EvaluationError where no row can be used.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise EvaluationError(f"no task is called {unknown[0]!r}", hint=f"tasks: {', '.join(TASKS)}")
    config = run.config
    folder = run.choose(checkpoint, notify)
    everything, examples = _examples(run, data, limit, notify)
    loaded = model.load(config.model, notify)
    renderer = template.renderer(config.model.tokenizer or loaded.path, config.template.renderer)
    run.require_base(loaded.fingerprint, renderer.fingerprint)
    rendered = template.render(examples, renderer, config.template, config.batch.length)
    for row in rendered.dropped:
        notify(Notice(f"not measured: {row.message}", level="warning", where=row.source))
    groups = IMITATED.groups(rendered.rows)
    cut, _ = Cut.around(config.batch, groups)
    asked = [reference for example in examples if (reference := references(example)) is not None]
    if "tool_calls" in tasks and len(asked) < len(examples):
        left_out = len(examples) - len(asked)
        notify(Notice("tool_calls: rows without a usable reference answer are not asked", level="warning", count=left_out))
    if "tool_calls" in tasks and not any(reference.calls for reference in asked):
        notify(Notice("tool_calls: no row asks for a call, so it is not measured"))
        tasks = [task for task in tasks if task != "tool_calls"]
    judged: list[Group] = []
    if "preference" in tasks and base:
        judged = _judged(everything, renderer, config, notify)
    if tuple(tasks) == ("preference",) and not judged:
        if not base:
            raise EvaluationError("answers are compared with the base, and it was left out", hint="without --no-base, then")
        raise EvaluationError(
            "no good and bad answers to compare", hint="give --data with rows labelled true and false, or pairs"
        )
    if "preference" in tasks and not judged:
        asked_for = tuple(tasks) != TASKS or config.objective.watched
        if asked_for or any(isinstance(one, formats.Preference | formats.Judged) for one in everything):
            notify(Notice("preference: it needs the base, and good and bad answers: not measured"))
        tasks = [task for task in tasks if task != "preference"]
    if not tasks or not (groups or judged):
        raise EvaluationError("there is no row to measure", hint="give --data, or hold rows out with data.valid")

    def measure(side: str) -> Measured:
        found: Measured = {}
        if "preference" in tasks:
            tick = events.ticker(notify, f"{side}: answers compared")
            found["preference"] = scoring.sequence_sums(loaded.net, judged, Cut.around(config.batch, judged)[0], tick)
        if "perplexity" in tasks:
            tick = events.ticker(notify, f"{side}: loss")
            sums = scoring.row_losses(loaded.net, groups, cut, tick)
            found["perplexity"] = [(group.source, *sums_of_row) for group, sums_of_row in zip(groups, sums, strict=True)]
        if "tool_calls" in tasks:
            found["tool_calls"] = _answer(loaded.net, renderer, asked, max_tokens, events.ticker(notify, f"{side}: answers"))
        return found

    before = measure("base") if base else None
    adapters.load(loaded.net, folder)
    after = measure("tuned")
    scores: list[Score] = []
    for task in (Perplexity(), ToolCalls()):
        if task.name in tasks:
            tuned = task.score(after[task.name])
            old = None if before is None else task.score(before[task.name])
            found = summarise(task, old, tuned, config.loop.seed)
            scores += found
            # Only all held-out rows, measured on both sides, are the run's evidence; the rest stands beside it.
            parts = [Path(path).stem for path in data] + ([f"first{limit}"] if limit else []) + ([] if base else ["tuned"])
            name = "+".join([f"{task.name}@{task.version}", *parts])
            measured = {"checkpoint": folder.name, "data": list(data) or VALID, "rows": len(examples), "max_tokens": max_tokens}
            _write(run, name, measured, found, old, tuned)
    if before is not None and judged:
        items = _compared(judged, before["preference"], after["preference"])
        found = preference.scores(items, config.loop.seed)
        scores += found
        parts = [Path(path).stem for path in data] + ([f"first{limit}"] if limit else [])
        measured = {"checkpoint": folder.name, "data": list(data) or VALID, "rows": len(judged)}
        name = "+".join([f"{preference.NAME}@{preference.VERSION}", *parts])
        _write(run, name, measured, found, None, preference.examples(items))
    return Evaluation(run, folder, scores, _pairs(before, after))


def _judged(examples: Sequence[formats.Example], renderer: template.Renderer, config: RunConfig, notify: Sink) -> list[Group]:
    """The pairs, or the labelled rows where these are more; none where good or bad is missing. What is not taken is said."""
    long = "drop" if config.template.too_long == "refuse" else config.template.too_long
    spec = config.template.model_copy(update={"prompt_weight": 0.0, "too_long": long})
    found: list[tuple[list[Group], list[formats.Dropped]]] = [([], [])]
    for objective in (DPO(), KTO(unlabelled="leave_out")):
        rendered = template.render(objective.select(examples).examples, renderer, spec, config.batch.length)
        groups = objective.groups(rendered.rows)
        both = {flag for group in groups for flag in objective.imitated(group)} == {True, False}
        found.append((groups if both else [], rendered.dropped))
    groups, dropped = max(found, key=lambda one: len(one[0]))
    for row in dropped:
        notify(Notice(f"preference: not measured: {row.message}", level="warning", where=row.source))
    if passed := sum(len(others) for others, _ in found) - len(groups):
        what = "labelled rows" if groups[0].label is not None else "pairs"
        notify(Notice(f"preference: only {what} are compared, the others are not", level="warning", count=passed))
    return groups


def _compared(groups: Sequence[Group], base: Sequence[Any], tuned: Sequence[Any]) -> list[preference.Compared]:
    items: list[preference.Compared] = []
    for index, (group, before, after) in enumerate(zip(groups, base, tuned, strict=True)):
        paired = len(group.sequences) == 2
        for at, ((old, tokens), (new, _)) in enumerate(zip(before, after, strict=True)):
            good = at == 0 if paired else group.label is True
            items.append(preference.Compared(group.source, good, old, new, tokens, index if paired else None))
    return items


def _examples(
    run: Run, data: Sequence[str], limit: int | None, notify: Sink
) -> tuple[list[formats.Example], list[formats.Example]]:  # fmt: skip
    """All rows, and those that say what is to be said."""
    config = run.config
    paths = list(data) or [str(run.path / VALID)]
    # The run's own held-out rows are written in one layout, whatever the files of the user look like.
    read = formats.read(paths, config.data if data else config.data.model_copy(update={"format": "auto"}))
    if not read.rows:
        raise EvaluationError("has no held-out rows", where=paths[0], hint="give --data FILE")
    formats.require(read, config.data.max_dropped)
    if read.dropped:
        notify(Notice("rows that could not be read", level="warning", count=len(read.dropped)))
    imitate = config.objective if isinstance(config.objective, SFT) else IMITATED
    everything = read.examples[:limit]
    if len(everything) < len(read.examples):
        notify(Notice(f"only the first {limit} of {len(read.examples)} rows are measured", level="warning"))
    examples, left_out, _ = imitate.select(everything)
    for reason, count in Counter(reason for _, reason in left_out).items():
        notify(Notice(f"rows not asked for loss and calls: {reason}", count=count))
    return everything, examples


def _answer(
    net: nn.Module, renderer: template.Renderer, asked: Sequence[Reference], max_tokens: int, tick: Callable[[int, int], None]
) -> list[tuple[Reference, str]]:
    """Greedy answers, in order."""
    prompts = [renderer.text_prompt(one.prompt) if isinstance(one.prompt, str) else renderer.prompt(one.prompt) for one in asked]
    net.eval()
    answers = model.generate(net, prompts, max_tokens=max_tokens, eos_ids=renderer.eos_ids, on_done=tick)
    return [(one, renderer.answer(answer.ids)) for one, answer in zip(asked, answers, strict=True)]


def _pairs(before: Measured | None, after: Measured) -> list[Answered]:
    pairs: list[Answered] = []
    for index, (one, tuned) in enumerate(after.get("tool_calls", [])):
        prompt = one.prompt if isinstance(one.prompt, str) else one.prompt.messages[-1].content
        wanted = "\n".join(f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in one.calls)
        pairs.append(Answered(prompt, wanted, None if before is None else before["tool_calls"][index][1], tuned, one.source))
    return pairs


def _write(
    run: Run,
    name: str,
    measured: Mapping[str, object],
    scores: list[Score],
    base: list[ExampleScore] | None,
    tuned: list[ExampleScore],
) -> None:
    folder = run.path / EVALS / name
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for index, score in enumerate(tuned):
        line: dict[str, JSON] = {"source": score.source, "units": score.units, "tuned": score.value}
        line |= {"tuned_detail": score.detail}
        if base is not None:
            line |= {"base": base[index].value, "base_detail": base[index].detail}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(folder / "examples.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "score.json", {**measured, "scores": [asdict(score) for score in scores]})
