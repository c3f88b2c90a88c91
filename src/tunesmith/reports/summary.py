"""All that a run directory says about its run, as JSON: what every form of the report shows.

Reads the run directory and nothing else, so a report can be written anew at any time: after an interruption,
a failure, or an evaluation. Losses are in the unit of the objective (SFT: nats a learned token), perplexity
is e to nats a token, memory is bytes (GB = 1e9 in the text), times are seconds."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from operator import mul
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tunesmith import events
from tunesmith.display import console, words
from tunesmith.errors import SHOWN, EvaluationError
from tunesmith.reports import advice
from tunesmith.reports import verdict as evidence
from tunesmith.runs import records
from tunesmith.runs.directory import AUDIT, CHECKPOINTS, CONFIG, DROPPED, EVENTS, MANIFEST, ORIGIN, PLAN
from tunesmith.settings.config import flat

Kind = TypeVar("Kind", bound=events.Event)
SURROGATE = re.compile("[\ud800-\udfff]")


def summary(run_dir: Path, told: Sequence[events.Event] | None = None) -> dict[str, Any]:
    """All facts of the report as JSON; numbers that are not finite become their names (``"nan"``, ``"inf"``).

    told: the run's log where it was read already. An evaluation that cannot be read is left out, and a notice
    says so. Raises EvaluationError where another file of the run is no JSON."""
    run_dir = run_dir.resolve()
    told = log(run_dir) if told is None else told
    steps, validations, growth = (
        only(told, events.StepDone),
        only(told, events.Validated),
        only(told, events.Growth),
    )
    started = next(reversed(only(told, events.RunStarted)), None)
    last = next(
        (
            one
            for one in reversed(told)
            if isinstance(one, events.RunEnded | events.RunStarted | events.Resumed)
        ),
        None,
    )
    ended = last if isinstance(last, events.RunEnded) else None  # one that was resumed has not ended
    made = _load(run_dir / MANIFEST)
    running = made.get("status") == "running"
    training = sum(step.seconds for step in steps)
    window = max(1, len(steps) // 20)
    evaluations, unread = _evaluations(run_dir)
    staged = [
        step for step in steps if step.stages and step.padding < 1
    ]  # of older ones the padding is not known
    positions = sum(step.tokens / (1 - step.padding) for step in staged)
    found: dict[str, Any] = {
        "run": str(run_dir),
        "status": ended.status if ended else "running" if running else "unfinished",
        "why": ended.why if ended else None,
        "updates": {
            "planned": started.steps if started else None,
            "done": len(steps),
            "clipped": sum(step.clipped for step in steps),
            "skipped": [asdict(event) for event in only(told, events.StepSkipped)],
            "resumed": [asdict(event) for event in only(told, events.Resumed)],
        },
        "weights": {"trainable": started.trainable, "total": started.total} if started else None,
        "counts": started.counts if started else _load(run_dir / PLAN),
        "training_loss": {
            "first": mean_loss(steps[:window]),
            "last": mean_loss(steps[-window:]),
            "updates_each": window,
        }
        if steps
        else None,
        "validation": [asdict(event) for event in validations],
        "samples": samples(only(told, events.Sampled)),
        "growth": asdict(growth[-1]) if growth else None,
        "evaluations": [{key: value for key, value in one.items() if key != "scores"} for one in evaluations],
        "scores": [_score(one, score) for one in evaluations for score in one["scores"]],
        "time": {
            "seconds": ended.seconds if ended else None,
            "training_s": training,
            "validating_s": sum(event.seconds for event in validations),
            "saving_s": sum(event.seconds for event in only(told, events.Saved)),
        },
        "stages": _stages(steps),
        "tokens_per_second": {
            "learned": sum(step.units if step.learned is None else step.learned for step in steps) / training
            if training
            else None,
            "all": sum(step.tokens for step in steps) / training if training else None,
        },
        "padding": 1 - sum(step.tokens for step in staged) / positions if positions else None,
        "watched": _watched(steps),
        "gradients": _gradients(told),
        "rows": _rows(told),
        "memory_peak": {
            name: max(step.memory[name] for step in steps if name in step.memory)
            for name in dict.fromkeys(name for step in steps for name in step.memory)
        },
        "audit": _audit(run_dir),
        "notices": _notices([*told, *unread]),
        "unread": [console.readable(one) for one in unread],
        "dropped": _dropped(run_dir / DROPPED),
        "checkpoints": _load(run_dir / CHECKPOINTS / "index.json"),
        "settings_given": {
            key: origin for key, origin in _load(run_dir / ORIGIN).items() if not origin.startswith("default")
        },
        "settings": settings(run_dir),
        "manifest": made,
        "reproduce": _reproduce(run_dir, bool(evaluations)),
    }
    found["loss"] = _loss(found)
    found["evidence"] = asdict(evidence.weigh(found))
    found["answers"] = evidence.answers(found)
    whole = {"verdict": found["evidence"]["sentence"] or found["loss"], **found, **advice.given(found)}
    # What a model says can hold half of a pair of surrogates, which no file can: it is written out.
    text = SURROGATE.sub(lambda half: f"\\\\u{ord(half[0]):04x}", json.dumps(whole, ensure_ascii=False))
    return json.loads(text, parse_constant=lambda name: str(float(name)))


def log(run_dir: Path) -> list[events.Event]:
    """The run's events in order; none where it did not get so far."""
    return list(events.read(run_dir / EVENTS)) if (run_dir / EVENTS).exists() else []


def only(log: Sequence[events.Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in log if isinstance(event, kind)]


def settings(run_dir: Path) -> dict[str, Any]:
    """Every setting as key path → value."""
    path = run_dir / CONFIG
    return flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def unit(log: Sequence[events.Event]) -> str:
    """Of the loss."""
    return next(
        (one.counts.get("loss", "nats a learned token") for one in only(log, events.RunStarted)),
        "nats a learned token",
    )


def mean_loss(steps: Sequence[events.StepDone]) -> float:
    """Mean over the learned tokens of these updates, not over updates: a short one weighs less."""
    units = sum(step.units for step in steps)
    return sum(step.loss * step.units for step in steps) / units if units else math.nan


def trailing(values: Sequence[float], window: int, weights: Sequence[float] | None = None) -> list[float]:
    """The mean of each value and those before it, ``window`` in all; weighted where ``weights`` are given."""
    of = weights if weights is not None else [1.0] * len(values)
    parts = [slice(max(0, end - window), end) for end in range(1, len(values) + 1)]
    sums = [(sum(map(mul, values[part], of[part])), sum(of[part])) for part in parts]
    return [total / weight if weight else math.nan for total, weight in sums]


def samples(sampled: Sequence[events.Sampled]) -> list[dict[str, Any]]:
    """All answers to each prompt, and the first and the last; ``after`` is None where it was asked once."""
    asked: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for one in sampled:
        asked.setdefault((one.prompt, one.reference), []).append({"step": one.step, "answer": one.answer})
    return [
        {
            "prompt": prompt,
            "reference": reference,
            "before": of[0],
            "after": of[-1] if len(of) > 1 else None,
            "answers": of,
        }
        for (prompt, reference), of in asked.items()
    ]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON object of each line; none where the run did not get so far."""
    if path.exists():
        with path.open("rb") as lines:
            yield from (
                _parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
            )


def _load(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``; empty where the run did not get so far."""
    return _parsed(path.read_bytes(), str(path)) if path.exists() else {}


def _parsed(text: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"cannot be read: {error}", where=where) from error
    if not isinstance(found, dict):
        raise EvaluationError("cannot be read: it is no JSON object", where=where)
    return found


def _evaluations(run_dir: Path) -> tuple[list[dict[str, Any]], list[events.Notice]]:
    """Each with its folder, how its prompts moved and how many answers were cut; and what could not be
    read."""
    found: list[dict[str, Any]] = []
    evaluations, unreadable = records.read(run_dir)
    unread = [_unread("not in this report", error) for error in unreadable]
    for record in evaluations:
        one = asdict(record) | {"folder": record.name, "cut": 0, "examples": 0, "changes": None}
        one["data"] = list(record.data) if isinstance(record.data, tuple) else record.data
        found.append(one)
        try:
            examples = list(record.examples())
        except EvaluationError as error:
            unread.append(_unread("its numbers are in this report, its prompts are not", error))
            continue
        moved = Counter(example.change for example in examples if example.change is not None)
        one |= {"cut": sum(example.cut for example in examples), "examples": len(examples)}
        if moved:
            one["changes"] = {name: moved[name] for name in ("improved", "unchanged", "regressed")}
    return found, unread


def _unread(what: str, error: EvaluationError) -> events.Notice:
    return events.Notice(f"{what}: {error.what}", "warning", where=error.where, hint=error.hint)


def _score(evaluation: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, Any]:
    about = {
        name: evaluation.get(name) for name in ("checkpoint", "data", "folder", "identity", "at", "unseen")
    }
    limit = (evaluation.get("settings") or {}).get("limit")
    return {**about, "limit": limit, **score, "base": words.base(score)}


def _stages(steps: Sequence[events.StepDone]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.stages)
    return dict(total)


def five(values: Sequence[float]) -> list[float]:
    """Least, quarter, median, three quarters, most."""
    ranked = sorted(values)
    return [ranked[round(share * (len(ranked) - 1))] for share in (0, 0.25, 0.5, 0.75, 1)]


def module(weight: str) -> str:
    """What a weight belongs to, whatever the layer: ``model.layers.3.self_attn.q_proj.lora_a`` →
    ``self_attn.q_proj.lora_a``."""
    parts = weight.split(".")
    last = max((at for at, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or weight


def layer(weight: str) -> str:
    """The number of the layer of a weight, "–" where it is in none."""
    return next((part for part in reversed(weight.split(".")) if part.isdigit()), "–")


def _gradients(told: Sequence[events.Event]) -> dict[str, dict[str, list[float]]]:
    """By module: five numbers of the gradient norms, and of ‖update‖ / ‖weight‖, over its layers and the
    updates looked at."""
    found: dict[str, dict[str, list[float]]] = {"gradient": {}, "ratio": {}}
    for one in only(told, events.Instruments):
        for name, value in one.gradient.items():
            found["gradient"].setdefault(module(name), []).append(value)
        for name, value in one.ratios.items():
            found["ratio"].setdefault(module(name), []).append(value)
    return {key: {name: five(values) for name, values in sorted(of.items())} for key, of in found.items()}


def _audit(run_dir: Path) -> dict[str, Any] | None:
    """Verdict and findings on the data, without their rows."""
    found = _load(run_dir / AUDIT)
    keys = ("rule", "severity", "what", "count", "of", "hint", "accepted")
    return found and {
        "verdict": found.get("verdict"),
        "rows": found.get("rows"),
        "findings": [{key: one.get(key) for key in keys} for one in found.get("findings", [])],
    }


def _rows(told: Sequence[events.Event]) -> dict[str, Any] | None:
    """Which rows were memorised, never learned, or do not fit; None where no losses of rows were logged."""
    from tunesmith.training import instruments

    return instruments.rows(told) if only(told, events.RowLosses) else None


def _reproduce(run_dir: Path, evaluated: bool) -> list[str]:
    """The commands that make this run anew, wherever its data and base are still the same."""
    run = shlex.quote(str(run_dir))
    lines = [f"tunesmith train --config {shlex.quote(str(run_dir / CONFIG))} --out {run}-again"]
    return lines + ([f"tunesmith evaluate {run}-again"] if evaluated else [])


def _watched(steps: Sequence[events.StepDone]) -> list[dict[str, Any]]:
    """What the objective watches, as means over tenths of the run: a step alone has few rows of each kind."""
    size = -(-len(steps) // 10) if steps else 1
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    found: list[dict[str, Any]] = []
    for part in parts:
        seen: dict[str, list[float]] = {}
        for step in part:
            for key, value in step.metrics.items():
                seen.setdefault(key, []).append(value)
        if seen:
            found.append(
                {"to_step": part[-1].step, **{key: sum(values) / len(values) for key, values in seen.items()}}
            )
    return found


def _notices(log: Sequence[events.Event]) -> list[dict[str, Any]]:
    """Equal notices together: ``count`` adds up, ``where`` lists all places; warnings first, skipped updates
    among them."""
    notices = only(log, events.Notice)
    for one in only(log, events.StepSkipped):
        text = f"step {one.step} skipped: loss {one.loss}, gradient norm {one.gradient_norm}, rows {', '.join(one.rows)}"
        notices.append(events.Notice(text, level="warning"))
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for one in sorted(notices, key=lambda one: one.level != "warning"):
        entry = {"level": one.level, "what": one.what, "count": 0, "where": [], "hint": one.hint}
        entry = found.setdefault((one.level, one.what, one.hint), entry)
        entry["count"] += one.count
        entry["where"] += [] if one.where is None else [one.where]
    return list(found.values())


def _dropped(path: Path) -> dict[str, Any]:
    rows = list(_lines(path))
    first = [{key: row[key] for key in ("source", "reason", "message")} for row in rows[:SHOWN]]
    return {"reasons": dict(sorted(Counter(row["reason"] for row in rows).items())), "first": first}


def _loss(found: dict[str, Any]) -> str:
    """One sentence with the numbers of the loss, honest where it rose."""
    updates, loss, measured = found["updates"], found["training_loss"], found["validation"]
    unit = found["counts"].get("loss", "nats a learned token")
    so_far = (
        f"{updates['done']:,}"
        + ("" if updates["planned"] is None else f" of {updates['planned']:,}")
        + " updates"
    )
    text = {
        "completed": f"After {so_far} the ",
        "stopped_early": f"Stopped early after {so_far}: the ",
        "interrupted": f"Interrupted after {so_far}: the ",
        "failed": f"FAILED after {so_far}" + (f" ({found['why']})" if found["why"] else "") + ": the ",
        "running": f"Still running, or killed, after {so_far}: the ",
    }.get(found["status"], f"Not finished, {so_far} and no end recorded: the ")
    if not measured and loss is None:
        return f"{text}model is as it was before, since no update was made and nothing was validated."
    if not measured:
        text += f"training loss went from {loss['first']:.4f} to {loss['last']:.4f} {unit}, and nothing "
        return text + "was validated, so it is not known what that means for unseen rows."
    before, after = measured[0], measured[-1]
    first, last = before["loss"], after["loss"]
    if before is after:
        text += f"validation loss was measured once, at step {before['step']:,}: {first:.4f} {unit} "
        return text + f"(perplexity {before['perplexity']:.4g}), so there is no before and after."
    close = f"{first:.4f}" == f"{last:.4f}"
    moved = "stayed the same," if close else "fell" if last < first else "ROSE"
    text += f"validation loss {moved} from {first:.4f} to {last:.4f} {unit}"
    text += f" ({(last - first) / first:+.1%})" if first and math.isfinite(last - first) else ""
    if math.isfinite(before["perplexity"]):  # it is of what is to become likelier, and there may be none
        text += f", perplexity from {before['perplexity']:.4g} to {after['perplexity']:.4g}"
    text += f", on {after['rows']:,} held-out rows"
    text += f" (first measured at step {before['step']:,})" if before["step"] else ""
    text += "" if last <= first or close else "; on these rows the model got worse"
    if (accuracy := after["metrics"].get("accuracy")) is not None:
        text += f"; good answers earn more than bad ones in {accuracy:.1%} of pairs"
        text += "" if (then := before["metrics"].get("accuracy")) is None else f", before {then:.1%}"
    best = min(measured, key=lambda one: (math.isnan(one["loss"]), one["loss"]))
    return text + (
        "." if best["loss"] == last else f"; the lowest was {best['loss']:.4f} at step {best['step']:,}."
    )
