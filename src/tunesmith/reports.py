"""What came of a run, for people and for machines: ``report.md``, ``training_report.json`` and ``curves.png``.

Reads the run directory and nothing else, so a report can be written anew at any time: after an interruption, a failure,
or an evaluation. Losses are nats a learned token, perplexity is e to the loss, memory is bytes (GB = 1e9 in the text).
"""

from __future__ import annotations

import io
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
from tunesmith.run import CHECKPOINTS, CONFIG, DROPPED, EVALS, EVENTS, MANIFEST, ORIGIN, PLAN, flat, write_json, write_text

PAGE, MACHINE, CURVES = "report.md", "training_report.json", "curves.png"
GROWN = 10  # weights in the table of growth

Kind = TypeVar("Kind", bound=events.Event)


def write(run_dir: Path) -> Path:
    """Write the three files into ``run_dir`` and return the path of ``report.md``."""
    log = _events(run_dir)
    found = _summary(run_dir, log)
    write_json(run_dir / MACHINE, found)
    draft = run_dir / f".{CURVES}"
    draft.write_bytes(_picture(log))
    os.replace(draft, run_dir / CURVES)
    write_text(run_dir / PAGE, "\n".join(_page(run_dir, found)) + "\n")
    return run_dir / PAGE


def summary(run_dir: Path) -> dict[str, Any]:
    """All facts of the report as JSON; numbers that are not finite become their names (``"nan"``, ``"inf"``)."""
    return _summary(run_dir, _events(run_dir))


def verdict(run_dir: Path) -> str:
    """One sentence with the numbers, honest where the loss rose."""
    return summary(run_dir)["verdict"]


# Facts


def _events(run_dir: Path) -> list[events.Event]:
    return list(events.read(run_dir / EVENTS)) if (run_dir / EVENTS).exists() else []


def _load(path: Path) -> dict[str, Any]:
    """The JSON object at ``path``; empty where the run did not get so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _only(log: Sequence[events.Event], kind: type[Kind]) -> list[Kind]:
    return [event for event in log if isinstance(event, kind)]


def _summary(run_dir: Path, log: Sequence[events.Event]) -> dict[str, Any]:
    steps, validations, grown = _only(log, events.StepDone), _only(log, events.Validated), _only(log, events.Growth)
    started = next(reversed(_only(log, events.RunStarted)), None)
    ended = next(reversed(_only(log, events.RunEnded)), None)
    training = sum(step.seconds for step in steps)
    window = _window(len(steps))
    largest = sorted(grown[-1].norms.items(), key=lambda item: -item[1])[:GROWN] if grown else []
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
        "growth": {"step": grown[-1].step, "weights": len(grown[-1].norms), "largest": dict(largest)} if grown else None,
        "scores": [
            {"checkpoint": task["checkpoint"], **score}
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
            "learned": sum(step.units for step in steps) / training if training else None,
            "all": sum(step.tokens for step in steps) / training if training else None,
        },
        "memory_peak": {name: max(step.memory[name] for step in steps) for name in (steps[-1].memory if steps else ())},
        "notices": _notices(_only(log, events.Notice)),
        "dropped": _dropped(run_dir / DROPPED),
        "checkpoints": _load(run_dir / CHECKPOINTS / "index.json"),
        "settings_given": {key: origin for key, origin in _load(run_dir / ORIGIN).items() if origin != "default"},
        "manifest": _load(run_dir / MANIFEST),
    }
    return _finite({"verdict": _verdict(found), **found})


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def _window(n_steps: int) -> int:
    return max(1, n_steps // 20)


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


def _notices(notices: Sequence[events.Notice]) -> list[dict[str, Any]]:
    """Equal notices together: ``count`` adds up, ``where`` lists all places; warnings first."""
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
    so_far = f"{updates['done']:,}" + ("" if updates["planned"] is None else f" of {updates['planned']:,}") + " updates"
    begin = {
        "completed": f"After {so_far} the ",
        "stopped_early": f"Stopped early after {so_far}: the ",
        "interrupted": f"Interrupted after {so_far}: the ",
        "failed": f"FAILED after {so_far}" + (f" ({found['why']})" if found["why"] else "") + ": the ",
    }.get(found["status"], f"Not finished, {so_far} and no end recorded: the ")
    if not measured and loss is None:
        return f"{begin}model is as it was before, since no update was made and nothing was validated."
    if not measured:
        text = f"{begin}training loss went from {loss['first']:.4f} to {loss['last']:.4f} nats a learned token, and nothing "
        return text + "was validated, so it is not known what that means for unseen rows."
    before, after = measured[0], measured[-1]
    first, last = before["loss"], after["loss"]
    if before is after:
        text = f"{begin}validation loss was measured once, at step {before['step']:,}: {first:.4f} nats a learned token "
        return text + f"(perplexity {before['perplexity']:.4g}), so there is no before and after."
    moved = "fell" if last < first else "stayed the same," if last == first else "ROSE"
    text = f"{begin}validation loss {moved} from {first:.4f} to {last:.4f} nats a learned token"
    text += f" ({(last - first) / first:+.1%})" if first and math.isfinite(last - first) else ""
    text += f", perplexity from {before['perplexity']:.4g} to {after['perplexity']:.4g}, on {after['rows']:,} held-out rows"
    text += f" (first measured at step {before['step']:,})" if before["step"] else ""
    text += "" if last <= first else "; on these rows the model got worse"
    best = min((one for one in measured if math.isfinite(one["loss"])), key=lambda one: one["loss"], default=after)
    if best["loss"] < last or not math.isfinite(last):
        text += f"; the lowest was {best['loss']:.4f} at step {best['step']:,}"
    return text + "."


# The page


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
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _page(run_dir: Path, found: dict[str, Any]) -> Iterator[str]:
    yield from [f"# {_cell(run_dir.resolve().name)}", "", f"**{_cell(found['verdict'])}**", ""]
    for title, lines in _sections(run_dir, found):
        yield from [f"## {title}", "", *lines, ""]


def _sections(run_dir: Path, found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield "Curves", [f"![loss, learning rate, gradient norm and memory]({CURVES})"]
    if found["validation"]:
        head = ("step", "loss (nats)", "perplexity", "rows", "learned tokens", "best so far")
        rows = [
            (one["step"], f"{float(one['loss']):.4f}", one["perplexity"], one["rows"], round(one["units"]), "yes" * one["best"])
            for one in found["validation"]
        ]
        yield "Validation", _table(head, rows)
    if found["samples"]:
        yield "Samples, before and after", [line for one in found["samples"] for line in _sample(one)]
    if found["scores"]:
        names = ("task", "version", "checkpoint", "name", "n")
        rows = [
            (*(str(one[name]) for name in names),
             _interval(one, ("value", "low", "high"), ".4g"),
             _interval(one, ("delta", "delta_low", "delta_high"), "+.4g"), one["note"] or "")
            for one in found["scores"]
        ]  # fmt: skip
        lines = _table((*names, "tuned", "change", "note"), rows)
        yield "Scores", ["With 95 % intervals; the change is tuned − base on the same rows.", "", *lines]
    yield "Notices", list(_notice_lines(found)) or ["None."]
    dropped = found["dropped"]
    lines = _table(("what", "how many"), flat(found["counts"]).items())
    if dropped["first"]:
        total, shown = sum(dropped["reasons"].values()), len(dropped["first"])
        lines += ["", f"Rows left out: {total:,}, the first {shown} of them (all: {DROPPED}):", ""]
        lines += _table(("row", "reason", "what was found"), (row.values() for row in dropped["first"]))
    yield "Counts", lines
    yield "Time and memory", _table(("what", "measured"), _costs(found))
    if found["growth"] is not None:
        grown = found["growth"]
        text = f"The largest of {grown['weights']:,} adapted weights, by the Frobenius norm of their change."
        lines = [text, "", *_table(("weight", "norm of the change"), grown["largest"].items())]
        yield f"Growth of the adapter at step {grown['step']:,}", lines
    kept = found["checkpoints"]
    text = f"Kept: {', '.join(map(str, kept['kept']))}; last {kept['last']}" if kept else "None was saved"
    if kept and kept["best"] is not None:
        text += f"; best {kept['best']} ({kept['metric']} {kept['best_value']:.4f})"
    yield "Checkpoints", [text + "."]
    yield "How to go on", _fence("\n".join(_commands(run_dir, found)), "sh")
    text = (run_dir / CONFIG).read_text(encoding="utf-8")
    values = flat(yaml.safe_load(text))
    given = [(key, values.get(key), origin) for key, origin in found["settings_given"].items()]
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


def _notice_lines(found: dict[str, Any]) -> Iterator[str]:
    for one in found["notices"]:
        where = ", ".join(one["where"][:SHOWN])
        more = f" and {len(one['where']) - SHOWN:,} more places" if len(one["where"]) > SHOWN else ""
        text = f"{one['what']} (×{one['count']:,})" + (f"; at {where}{more}" if where else "")
        text += f"; hint: {one['hint']}" if one["hint"] else ""
        yield f"- **{one['level']}**: {_cell(text)}"
    for one in found["updates"]["skipped"]:
        text = f"step {one['step']} skipped: loss {one['loss']}, gradient norm {one['gradient_norm']}, rows "
        yield f"- **warning**: {_cell(text + ', '.join(one['rows']))}"


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


def _commands(run_dir: Path, found: dict[str, Any]) -> Iterator[str]:
    run = shlex.quote(str(run_dir))
    if found["status"] not in ("completed", "stopped_early"):
        yield f"tunesmith train --resume {run}"
    if found["checkpoints"]:
        yield from (f"tunesmith generate {run} --prompt 'Hello'", f"tunesmith chat {run}", f"tunesmith evaluate {run}")
    yield f"tunesmith report {run}"


# The picture


def _picture(log: Sequence[events.Event]) -> bytes:
    """PNG with four panels over optimizer updates; line styles and markers tell the lines apart without colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, validations = _only(log, events.StepDone), _only(log, events.Validated)
    at, window = [step.step for step in steps], _window(len(steps))
    dot = "." if len(steps) < 30 else ""
    figure = Figure(figsize=(10, 11), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss, rate, gradient, memory = axes = figure.subplots(4, 1, sharex=True, height_ratios=(3, 1, 1.4, 1.4))
    if steps:
        smooth = [_mean_loss(steps[max(0, end - window) : end]) for end in range(1, len(steps) + 1)]
        loss.plot(at, [step.loss for step in steps], color="0.7", lw=0.8, marker=dot, label="training, each update")
        if window > 1:
            loss.plot(at, smooth, color="tab:blue", lw=2, label=f"training, mean of the last {window} updates")
        rate.plot(at, [step.learning_rate for step in steps], color="tab:blue", marker=dot)
        norms = [step.gradient_norm for step in steps]
        gradient.plot(at, norms, color="tab:blue", lw=0.8, marker=dot, label="before clipping")
        clipped = [(step.step, step.gradient_norm) for step in steps if step.clipped]
        if clipped:
            gradient.plot(*zip(*clipped, strict=True), "kx", ms=4, label="clipped")
        if min(norms) > 0 and max(norms) > 20 * min(norms):
            gradient.set_yscale("log")
        for name, style in zip(steps[-1].memory, ("-", "--", ":"), strict=False):
            readings = [step.memory.get(name, 0) / 1e9 for step in steps]
            memory.plot(at, readings, ls=style, marker=dot, label=name)
        gradient.legend(fontsize=8)
        memory.legend(fontsize=8)
        memory.set_ylim(bottom=0)
    if validations:
        points = [one.step for one in validations], [one.loss for one in validations]
        loss.plot(*points, color="tab:red", marker="D", ls="--", ms=6, label="validation")
    marks = [(one.step, "skipped", ":") for one in _only(log, events.StepSkipped)]
    for step, word, style in [*marks, *((one.step, "resumed", "-.") for one in _only(log, events.Resumed))]:
        loss.axvline(step, color="k", ls=style, lw=1)
        loss.annotate(word, (step, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=90, va="top")
    if steps or validations:
        loss.legend()
    else:
        loss.text(0.5, 0.5, "no update was made", transform=loss.transAxes, ha="center")
    for panel, label in zip(axes, ("loss (nats a learned token)", "learning rate", "gradient norm", "memory (GB)"), strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    memory.set_xlabel("step (optimizer updates)")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()
