"""A run's report as one HTML file that needs no network: what was learned, kept and lost, how sure that is,
and why.

Texts of the data are only ever text: the template escapes them, the script sets them as text, and a content
policy in the page forbids every other script and every request. How pages look is in ``base.html``, what this
one says in ``page.html``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.display import charts, page, words
from tunesmith.evaluation.tasks import QUESTIONS
from tunesmith.reports import curves, glossary, markdown
from tunesmith.reports import verdict as evidence
from tunesmith.runs import records
from tunesmith.settings.config import flat

BYTES = 1_500_000
"""Of prompts with their answers, over all evaluations."""
LETTERS, SAMPLES, STEPS = 1_500, 12, 8
TITLES = {
    "answers": "What came of it",
    "next": "Limits, and what to try next",
    "differences": "Differences",
    "configuration": "Configuration",
    "curves": "Curves",
    "samples": "Samples along the way",
    "scores-task": "The task",
    "scores-retention": "Retention",
    "scores-safety": "Safety",
    "scores-benchmarks": "Benchmarks",
    "scores-other": "Other tasks",
    "prompts": "Every prompt",
    "growth": "Growth of the adapter",
    "rows": "Rows of the training data",
    "scores-efficiency": "Efficiency",
    "cost": "Time and memory",
    "scores-beside": "Measured beside it",
    "the-data": "Data",
    "notices": "Notices",
    "words": "What the words mean",
    "reproduce": "How to make it anew",
}

FILTERS: dict[str, Callable[..., Any]] = {
    "number": words.number,
    "interval": words.interval,
    "based": words.base,
    "named": words.named,
    "titled": words.title,
    "met": words.met,
    "missed": evidence.missed,
    "subset": words.subset,
    "reached": words.reached,
    "quoted": shlex.quote,
    "cut": words.cut,
    "setting": words.setting,
}
"""What templates of this package use beside the filters of `display.page`."""


def render(template: str, data: Mapping[str, Any], *, verb: str, tone: str, **facts: Any) -> str:
    """``template``, a file of this package, filled by `display.page.render`."""
    signs = {"signs": words.SIGNS, "tones": words.TONES}
    return page.render(
        template,
        data,
        package="tunesmith.reports",
        verb=verb,
        tone=tone,
        filters=FILTERS,
        facts=facts | signs,
    )


def html(run_dir: Path, found: dict[str, Any], log: Sequence[events.Event]) -> str:
    """The page of a run. ``found``: `facts.summary`; ``log``: its events."""
    order = {
        folder: at for at, folder in enumerate(_folders(found))
    }  # what can be read comes first, then what speaks
    shown = sorted(
        _examples(run_dir, found["evaluations"]), key=lambda one: (not one["answered"], order[one["folder"]])
    )
    drawn = {
        "forest": charts.forest(evidence.differences(found)),
        "curves": curves.training(log),
        "stages": curves.stages(found["stages"]),
        "modules": curves.modules(found["gradients"]),
        "growth": curves.growth(found["growth"]) if found["growth"] else [],
        "samples": _samples(found["samples"]),
        "tables": _tables(found),
    }
    counts = list(flat(found["counts"]).items())
    meanings = glossary.meanings(found)
    there = {
        "answers": True,
        "differences": drawn["forest"],
        "configuration": True,
        "curves": drawn["curves"],
        "samples": found["samples"],
        **drawn["tables"],
        "prompts": shown,
        "growth": drawn["growth"],
        "rows": found["rows"],
        "cost": True,
        "the-data": found["audit"] or counts or found["dropped"]["first"],
        "notices": True,
        "next": True,
        "reproduce": True,
        "words": meanings,
    }
    return render(
        "page.html",
        {
            "examples": [{key: one[key] for key in ("columns", "rows")} for one in shown],
            "signs": words.SIGNS,
            "tones": words.TONES,
        },
        verb="report",
        tone=_tone(found),
        found=found,
        name=run_dir.resolve().name,
        model=Path(str(found["settings"].get("model.path"))).name,
        sections=[(anchor, TITLES[anchor]) for anchor in TITLES if there.get(anchor)],
        questions=QUESTIONS,
        examples=shown,
        meanings=meanings,
        costs=[*markdown.costs(found)],
        counts=counts,
        dropped=sum(found["dropped"]["reasons"].values()),
        commands=markdown.commands(run_dir, found),
        states=words.STATES,
        speaker=evidence.checkpoint(found),
        checkpoints=markdown.checkpoints(found),
        made=[*flat(found["manifest"]).items()],
        **drawn,
    )


def _tone(found: Mapping[str, Any]) -> str:
    if found["evidence"]["sentence"]:
        return found["evidence"]["tone"]
    worse = "got worse" in found["loss"]
    return (
        "error"
        if found["status"] == "failed"
        else "warning"
        if worse or found["status"] not in evidence.DONE
        else "note"
    )


def _folders(found: Mapping[str, Any]) -> list[str]:
    """Of all evaluations: those that speak for their tasks first, in the order of the questions."""
    return list(dict.fromkeys(one["folder"] for one in [*evidence.speaking(found), *found["evaluations"]]))


def _tables(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By section: each evaluation that speaks for its task with all its numbers, apart by part; then all
    others."""
    chosen = {one["folder"] for one in evidence.speaking(found)}
    tables: dict[str, list[dict[str, Any]]] = {}
    for folder in _folders(found):
        of = [one for one in found["scores"] if one["folder"] == folder]
        if not of:
            continue
        task = str(of[0]["task"])
        parts: dict[str, list[Any]] = {}
        for one in of:
            if one.get("part"):
                parts.setdefault(one["part"].partition("=")[0], []).append(one)
        told = f"{task}, version {of[0]['version']}, checkpoint {of[0]['checkpoint']}"
        told += (
            f", on {evidence.elsewhere(of[0]) or of[0]['data']}" if evidence.question(task) == "task" else ""
        )
        told += f", {subset}" if (subset := words.subset(of[0])) else ""
        entry = {
            "task": task,
            "told": told + ".",
            "rows": [one for one in of if not one.get("part")],
            "parts": {key: sorted(rows, key=lambda one: float(one["value"])) for key, rows in parts.items()},
        }
        section = f"scores-{evidence.question(task)}" if folder in chosen else "scores-beside"
        tables.setdefault(section, []).append(entry)
    return tables


def _samples(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first prompts, each with its answers: the first, the last, and evenly between."""
    rows, thinned = [], 0
    for one in found[:SAMPLES]:
        answers = one["answers"]
        few = min(len(answers), STEPS)
        kept = [answers[round(at * (len(answers) - 1) / max(few - 1, 1))] for at in range(few)]
        thinned = max(thinned, len(answers) - few)
        answered = [{"step": at["step"], "answer": words.cut(at["answer"], LETTERS)} for at in kept]
        rows.append(
            {
                "prompt": words.cut(one["prompt"], LETTERS),
                "reference": words.cut(one["reference"], LETTERS),
                "answers": answered,
            }
        )
    told = f"{thinned:,} of the steps between are in report.json." if thinned else ""
    return {"rows": rows, "more": max(0, len(found) - SAMPLES), "steps": told}


def _examples(run_dir: Path, evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each evaluation the rows that fit its share of `BYTES`, taken in turn from those that regressed,
    improved and stayed."""
    asked = [one for one in evaluations if one["examples"]]
    by_folder = {record.name: record for record in records.read(run_dir)[0]}
    found = []
    for one in asked:
        classes: dict[str | None, list[list[Any]]] = {
            "regressed": [],
            "improved": [],
            "unchanged": [],
            None: [],
        }
        for number, example in enumerate(by_folder[one["folder"]].examples()):
            texts = (example.prompt, example.reference, example.base_answer, example.tuned_answer)
            told = [
                words.cut(str(example.source), 300),
                example.change,
                *(words.cut(text, LETTERS) for text in texts),
                None if example.base is None else words.number(example.base),
                words.number(example.tuned),
            ]
            classes.setdefault(example.change, []).append([number, told])
        left, kept = BYTES // len(asked), []
        for turn in zip_longest(*classes.values()):
            for numbered in filter(None, turn):
                left -= len(json.dumps(numbered[1], ensure_ascii=False).encode("utf-8", "replace"))
                kept += [numbered] if left >= 0 else []
            if left < 0:
                break
        rows = [told for _, told in sorted(kept, key=lambda numbered: numbered[0])]
        columns = [
            name for name, at in (("base", 4), ("tuned", 5)) if any(row[at] is not None for row in rows)
        ]
        about = {
            "folder": one["folder"],
            "counts": one["changes"],
            "of": one["examples"],
            "answered": bool(columns),
        }
        found.append({**about, "rows": rows, "columns": columns})
    return found
