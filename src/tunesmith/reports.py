"""What came of a run, for people and for machines: ``report.md``, ``training_report.json`` and ``curves.png``.

Reads the run directory and nothing else, so a report can be written anew at any time: after an interruption, a failure,
or an evaluation. Losses are in the unit of the objective (SFT: nats a learned token), perplexity is e to nats a token,
memory is bytes (GB = 1e9 in the text).
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tunesmith import events
from tunesmith.console import duration, size
from tunesmith.errors import SHOWN
from tunesmith.run import CHECKPOINTS, CONFIG, DROPPED, EVALS, EVENTS, MANIFEST, ORIGIN, PLAN, flat
from tunesmith.writing import write_json, write_text

PAGE, MACHINE, CURVES = "report.md", "training_report.json", "curves.png"
GROWN = 10  # weights in the table of growth

Kind = TypeVar("Kind", bound=events.Event)


def write(run_dir: Path) -> Path:
    """Write the three files into ``run_dir`` and return the path of ``report.md``."""
    found = summary(run_dir)
    write_json(run_dir / MACHINE, found)
    draft = run_dir / f".{CURVES}"
    _draw(_events(run_dir), draft)
    os.replace(draft, run_dir / CURVES)
    lines = [f"# {_cell(run_dir.resolve().name)}", "", f"**{_cell(found['verdict'])}**", ""]
    for title, section in _sections(run_dir, found):
        lines += [f"## {title}", "", *section, ""]
    write_text(run_dir / PAGE, "\n".join(lines) + "\n")
    return run_dir / PAGE


def summary(run_dir: Path) -> dict[str, Any]:
    """All facts of the report as JSON; numbers that are not finite become their names (``"nan"``, ``"inf"``)."""
    log = _events(run_dir)
    steps, validations, growth = _only(log, events.StepDone), _only(log, events.Validated), _only(log, events.Growth)
    started = next(reversed(_only(log, events.RunStarted)), None)
    ended = next(reversed(_only(log, events.RunEnded)), None)
    training = sum(step.seconds for step in steps)
    window = max(1, len(steps) // 20)
    found: dict[str, Any] = {
        "run": str(run_dir),
        "status": ended.status if ended else "unfinished",
        "why": ended.why if ended else None,
        "updates": {
            "planned": started.steps if started else None,
            "done": len(steps),
            "clipped": sum(step.clipped for step in steps),
            "skipped": [asdict(event) for event in _only(log, events.StepSkipped)],
            "resumed": [asdict(event) for event in _only(log, events.Resumed)],
        },
        "weights": {"trainable": started.trainable, "total": started.total} if started else None,
        "counts": started.counts if started else _load(run_dir / PLAN),
        "training_loss": {"first": _mean_loss(steps[:window]), "last": _mean_loss(steps[-window:]), "updates_each": window}
        if steps
        else None,
        "validation": [asdict(event) for event in validations],
        "samples": _samples(_only(log, events.Sampled)),
        "growth": asdict(growth[-1]) if growth else None,
        "scores": [
            {"checkpoint": task["checkpoint"], "data": task.get("data"), **score}
            for task in map(_load, sorted((run_dir / EVALS).glob("*/score.json")))
            for score in task["scores"]
        ],
        "time": {
            "seconds": ended.seconds if ended else None,
            "training_s": training,
            "validating_s": sum(event.seconds for event in validations),
            "saving_s": sum(event.seconds for event in _only(log, events.Saved)),
        },
        "tokens_per_second": {
            "learned": sum(step.units if step.learned is None else step.learned for step in steps) / training
            if training
            else None,
            "all": sum(step.tokens for step in steps) / training if training else None,
        },
        "watched": _watched(steps),
        "memory_peak": {name: max(step.memory[name] for step in steps) for name in (steps[-1].memory if steps else ())},
        "notices": _notices(log),
        "dropped": _dropped(run_dir / DROPPED),
        "checkpoints": _load(run_dir / CHECKPOINTS / "index.json"),
        "settings_given": {key: origin for key, origin in _load(run_dir / ORIGIN).items() if not origin.startswith("default")},
        "manifest": _load(run_dir / MANIFEST),
    }
    text = json.dumps({"verdict": _verdict(found), **found})
    return json.loads(text, parse_constant=lambda name: str(float(name)))


def verdict(run_dir: Path) -> str:
    """One sentence with the numbers, honest where the loss rose."""
    return summary(run_dir)["verdict"]


def _events(run_dir: Path) -> list[events.Event]:
    return list(events.read(run_dir / EVENTS)) if (run_dir / EVENTS).exists() else []


def _load(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``; empty where the run did not get so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _only(log: Sequence[events.Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in log if isinstance(event, kind)]


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
            found.append({"to_step": part[-1].step, **{key: sum(values) / len(values) for key, values in seen.items()}})
    return found


def _mean_loss(steps: Sequence[events.StepDone]) -> float:
    """Mean over the learned tokens of these updates, not over updates: a short one weighs less."""
    units = sum(step.units for step in steps)
    return sum(step.loss * step.units for step in steps) / units if units else math.nan


def _samples(sampled: Sequence[events.Sampled]) -> list[dict[str, Any]]:
    """First and last answer to each prompt; ``after`` is None where it was asked once."""
    asked: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
    for one in sampled:
        asked.setdefault((one.prompt, one.reference), []).append({"step": one.step, "answer": one.answer})
    return [
        {"prompt": prompt, "reference": reference, "before": of[0], "after": of[-1] if len(of) > 1 else None}
        for (prompt, reference), of in asked.items()
    ]


def _notices(log: Sequence[events.Event]) -> list[dict[str, Any]]:
    """Equal notices together: ``count`` adds up, ``where`` lists all places; warnings first, skipped updates among them."""
    notices = _only(log, events.Notice)
    for one in _only(log, events.StepSkipped):
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
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    first = [{key: row[key] for key in ("source", "reason", "message")} for row in rows[:SHOWN]]
    return {"reasons": dict(sorted(Counter(row["reason"] for row in rows).items())), "first": first}


def _verdict(found: dict[str, Any]) -> str:
    updates, loss, measured = found["updates"], found["training_loss"], found["validation"]
    unit = found["counts"].get("loss", "nats a learned token")
    so_far = f"{updates['done']:,}" + ("" if updates["planned"] is None else f" of {updates['planned']:,}") + " updates"
    text = {
        "completed": f"After {so_far} the ",
        "stopped_early": f"Stopped early after {so_far}: the ",
        "interrupted": f"Interrupted after {so_far}: the ",
        "failed": f"FAILED after {so_far}" + (f" ({found['why']})" if found["why"] else "") + ": the ",
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
        text += f"; good answers earn more than bad ones in {accuracy:.1%} of pairs, before {before['metrics']['accuracy']:.1%}"
    best = min(measured, key=lambda one: (math.isnan(one["loss"]), one["loss"]))
    return text + ("." if best["loss"] == last else f"; the lowest was {best['loss']:.4f} at step {best['step']:,}.")


def _fence(text: str, language: str = "text") -> list[str]:
    """A code block that ``text`` cannot end: its fence is longer than any run of backticks inside."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text.replace("\r\n", "\n"))
    ticks = "`" * (max([2, *(len(run) for run in re.findall("`+", clean))]) + 1)
    return [ticks + language, *clean.split("\n"), ticks]


def _cell(value: Any) -> str:
    """``value`` in a table: on one line, with what Markdown or HTML would act on escaped."""
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.5g}" if isinstance(value, float) else f"{value:,}"
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _sections(run_dir: Path, found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield "Curves", [f"![loss, learning rate, gradient norm and memory]({CURVES})"]
    if found["validation"]:
        head = ("step", found["counts"].get("loss", "loss"), "perplexity", "rows", "units", "best so far")
        names = ("step", "loss", "perplexity", "rows")
        rows = ((*(one[name] for name in names), round(one["units"]), "yes" * one["best"]) for one in found["validation"])
        yield "Validation", _table(head, rows)
    for title, key, seen in (
        ("Good against bad, on held-out rows", "step", [{"step": one["step"], **one["metrics"]} for one in found["validation"]]),
        ("Good against bad, on training rows (means up to a step)", "to_step", found["watched"]),
    ):
        names = list(dict.fromkeys(name for one in seen for name in one if name != key))
        if names:
            yield title, _table((key.replace("_", " "), *names), ([one.get(name) for name in (key, *names)] for one in seen))
    if found["samples"]:
        yield "Samples, before and after", [line for one in found["samples"] for line in _sample(one)]
    if found["scores"]:
        names = ("task", "version", "checkpoint", "data", "name", "n")
        rows = (
            (*(str(one[name]) for name in names),
             _interval(one, ("value", "low", "high"), ".4g"),
             _interval(one, ("delta", "delta_low", "delta_high"), "+.4g"), one["note"] or "")
            for one in found["scores"]
        )  # fmt: skip
        lines = _table((*names, "tuned", "change", "note"), rows)
        yield "Scores", ["With 95 % intervals; the change is tuned − base on the same rows.", "", *lines]
    yield "Notices", [_notice(one) for one in found["notices"]] or ["None."]
    lines, dropped = _table(("what", "how many"), flat(found["counts"]).items()), found["dropped"]
    if dropped["first"]:
        total, shown = sum(dropped["reasons"].values()), len(dropped["first"])
        lines += ["", f"Rows left out: {total:,}, the first {shown} of them (all: {DROPPED}):", ""]
        lines += _table(("row", "reason", "what was found"), (row.values() for row in dropped["first"]))
    yield "Counts", lines
    yield "Time and memory", _table(("what", "measured"), _costs(found))
    if grown := found["growth"]:
        largest = sorted(grown["norms"].items(), key=lambda item: -float(item[1]))[:GROWN]
        lines = _table((f"largest of {len(grown['norms']):,} adapted weights", "Frobenius norm of the change"), largest)
        yield f"Growth of the adapter at step {grown['step']:,}", lines
    kept, text = found["checkpoints"], "None was saved"
    if kept:
        text = f"Kept: {', '.join(map(str, kept['kept']))}; last {kept['last']}"
        text += "" if kept["best"] is None else f"; best {kept['best']} ({kept['metric']} {kept['best_value']:.4f})"
    yield "Checkpoints", [text + "."]
    run = shlex.quote(str(run_dir))
    unfinished = found["status"] not in ("completed", "stopped_early")
    lines = [f"tunesmith train --resume {run}"] if unfinished else []
    lines += [f"tunesmith {verb}" for verb in (f"generate {run} --prompt 'Hello'", f"chat {run}", f"evaluate {run}") if kept]
    yield "How to go on", _fence("\n".join([*lines, f"tunesmith report {run}"]), "sh")
    text = (run_dir / CONFIG).read_text(encoding="utf-8")
    values = flat(yaml.safe_load(text))
    given = ((key, values.get(key), origin) for key, origin in found["settings_given"].items())
    lines = ["Given for this run; all others are defaults:", "", *_table(("setting", "value", "from"), given)]
    yield "Settings", [*lines, "", "All of them:", "", *_fence(text.rstrip("\n"), "yaml")]
    yield "Made from", _table(("what", "value"), ((key, str(value)) for key, value in flat(found["manifest"]).items()))


def _sample(one: dict[str, Any]) -> Iterator[str]:
    answers = [(f"step {at['step']:,}", at["answer"]) for at in (one["before"], one["after"]) if at is not None]
    answers += [("reference", one["reference"])] if one["reference"] is not None else []
    yield from [*_fence(one["prompt"]), ""]
    yield "<table><tr>" + "".join(f"<th>{name}</th>" for name, _ in answers) + "</tr><tr>"
    for _, text in answers:
        yield from ['<td valign="top">', "", *_fence(text), "", "</td>"]
    yield from ["</tr></table>", ""]


def _interval(score: dict[str, Any], names: tuple[str, str, str], form: str) -> str | None:
    value, low, high = (score[name] for name in names)
    if value is None:
        return None
    return f"{value:{form}}" + ("" if low is None else f" ({low:{form}} to {high:{form}})")


def _notice(one: dict[str, Any]) -> str:
    text = one["what"] + (f" (×{one['count']:,})" if one["count"] != 1 else "")
    text += f"; at {', '.join(one['where'][:SHOWN])}" if one["where"] else ""
    text += f" and {len(one['where']) - SHOWN:,} more places" if len(one["where"]) > SHOWN else ""
    text += f"; hint: {one['hint']}" if one["hint"] else ""
    return f"- **{one['level']}**: {_cell(text)}"


def _costs(found: dict[str, Any]) -> Iterator[tuple[str, str | int]]:
    words = {"seconds": "whole run", "training_s": "updates", "validating_s": "validation", "saving_s": "saving"}
    yield from ((words[key], duration(value)) for key, value in found["time"].items() if value is not None)
    speeds = found["tokens_per_second"]
    yield from ((f"{name} tokens a second", f"{speed:,.1f}") for name, speed in speeds.items() if speed is not None)
    yield from ((f"memory, {name}, highest reading", size(n_bytes)) for name, n_bytes in found["memory_peak"].items())
    if found["weights"] is not None:
        yield "trainable weights", "{trainable:,} of {total:,}".format(**found["weights"])
    yield "updates clipped", found["updates"]["clipped"]
    for one in found["updates"]["resumed"]:
        yield "resumed", f"after step {one['step']:,}; {one['redone']:,} updates done again"


def _draw(log: Sequence[events.Event], path: Path) -> None:
    """A PNG with four panels over optimizer updates; line styles and markers tell the lines apart without colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, validations = _only(log, events.StepDone), _only(log, events.Validated)
    at, window = [step.step for step in steps], max(1, len(steps) // 20)
    dot = "." if len(steps) < 30 else ""
    rewards = sorted({name for one in (*steps, *validations) for name in one.metrics if name.startswith("reward_")})
    figure = Figure(figsize=(10, 13 if rewards else 11), dpi=110, layout="constrained")
    ratios = (3, 2, 1, 1.4, 1.4) if rewards else (3, 1, 1.4, 1.4)
    axes = list(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))
    labels = [f"loss ({_unit(log)})", *(["reward"] if rewards else []), "learning rate", "gradient norm", "memory (GB)"]
    loss, rate, gradient, memory = axes[0], *axes[-3:]
    for name, mark in zip(rewards, ("o", "x"), strict=False):
        over = f"mean of the last {window} updates" if window > 1 else "each update"
        line = {"ls": "-" if mark == "o" else "--", "label": f"{name.removeprefix('reward_')}, {over}"}
        axes[1].plot(*_smooth(steps, name, window), color="tab:blue" if mark == "o" else "tab:red", **line)
        seen = [(one.step, one.metrics[name]) for one in validations if name in one.metrics]
        if seen:
            axes[1].plot(
                *zip(*seen, strict=True), color="k", ls="", marker=mark, ms=6, label=f"{name.removeprefix('reward_')}, held out"
            )
    loss.plot(at, [step.loss for step in steps], color="0.7", lw=0.8, marker=dot, label="training, each update")
    if window > 1:
        smooth = [_mean_loss(steps[max(0, end - window) : end]) for end in range(1, len(steps) + 1)]
        loss.plot(at, smooth, color="tab:blue", lw=2, label=f"training, mean of the last {window} updates")
    measured = [one.step for one in validations], [one.loss for one in validations]
    loss.plot(*measured, color="tab:red", marker="D", ls="--", ms=6, label="validation")
    rate.plot(at, [step.learning_rate for step in steps], color="tab:blue", marker=dot)
    gradient.plot(at, [step.gradient_norm for step in steps], color="tab:blue", lw=0.8, marker=dot, label="before clipping")
    clipped = [step for step in steps if step.clipped]
    gradient.plot([step.step for step in clipped], [step.gradient_norm for step in clipped], "kx", ms=4, label="clipped")
    for name, style in zip(steps[-1].memory if steps else (), ("-", "--", ":"), strict=False):
        memory.plot(at, [step.memory[name] / 1e9 for step in steps], ls=style, marker=dot, label=name)
    memory.set_ylim(bottom=0)
    for kind, word, style in ((events.StepSkipped, "skipped", ":"), (events.Resumed, "resumed", "-.")):
        for one in _only(log, kind):
            loss.axvline(one.step, color="k", ls=style, lw=1)
            loss.annotate(word, (one.step, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=90, va="top")
    for panel, label in zip(axes, labels, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    memory.set_xlabel("step (optimizer updates)")
    FigureCanvasAgg(figure).print_png(path)


def _unit(log: Sequence[events.Event]) -> str:
    return next((one.counts.get("loss", "nats a learned token") for one in _only(log, events.RunStarted)), "nats a learned token")


def _smooth(steps: Sequence[events.StepDone], name: str, window: int) -> tuple[list[int], list[float]]:
    """Steps and means of a metric over the last ``window`` updates that have it."""
    having = [step for step in steps if name in step.metrics]
    means = [[one.metrics[name] for one in having[max(0, end - window) : end]] for end in range(1, len(having) + 1)]
    return [step.step for step in having], [sum(part) / len(part) for part in means]
