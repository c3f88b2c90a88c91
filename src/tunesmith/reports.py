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
    steps, validations, saved = _only(log, events.StepDone), _only(log, events.Validated), _only(log, events.Saved)
    started = _only(log, events.RunStarted)[-1:]
    ended = _only(log, events.RunEnded)[-1:]
    training = sum(step.seconds for step in steps)
    found: dict[str, Any] = {
        "run": str(run_dir),
        "status": ended[0].status if ended else "unfinished",
        "why": ended[0].why if ended else None,
        "updates": {
            "planned": started[0].steps if started else None,
            "done": max((step.step for step in steps), default=0),
            "clipped": sum(step.clipped for step in steps),
            "skipped": [asdict(event) for event in _only(log, events.StepSkipped)],
            "resumed": [asdict(event) for event in _only(log, events.Resumed)],
        },
        "weights": {"trainable": started[0].trainable, "total": started[0].total} if started else None,
        "counts": started[0].counts if started else _load(run_dir / PLAN),
        "training": _training(steps),
        "validation": [asdict(event) for event in validations],
        "samples": _samples(_only(log, events.Sampled)),
        "growth": _growth(_only(log, events.Growth)),
        "scores": list(_scores(run_dir)),
        "time": {
            "seconds": ended[0].seconds if ended else None,
            "training_s": training,
            "validating_s": sum(event.seconds for event in validations),
            "saving_s": sum(event.seconds for event in saved),
        },
        "tokens_per_second": {
            "learned": sum(step.units for step in steps) / training if training else None,
            "all": sum(step.tokens for step in steps) / training if training else None,
        },
        "memory_peak": _peaks(steps),
        "notices": _notices(_only(log, events.Notice)),
        "dropped": _dropped(run_dir),
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


def _training(steps: Sequence[events.StepDone]) -> dict[str, Any] | None:
    if not steps:
        return None
    window = _window(len(steps))
    return {"loss_first": _mean_loss(steps[:window]), "loss_last": _mean_loss(steps[-window:]), "updates_each": window}


def _peaks(steps: Sequence[events.StepDone]) -> dict[str, int]:
    return {name: max(step.memory.get(name, 0) for step in steps) for name in (steps[-1].memory if steps else ())}


def _samples(sampled: Sequence[events.Sampled]) -> list[dict[str, Any]]:
    """First and last answer to each prompt; ``after`` is None where it was asked once."""
    asked: dict[tuple[str, str | None], list[events.Sampled]] = {}
    for one in sampled:
        asked.setdefault((one.prompt, one.reference), []).append(one)
    return [
        {
            "prompt": prompt,
            "reference": reference,
            "before": {"step": of[0].step, "answer": of[0].answer},
            "after": {"step": of[-1].step, "answer": of[-1].answer} if of[-1].step > of[0].step else None,
        }
        for (prompt, reference), of in asked.items()
    ]


def _growth(grown: Sequence[events.Growth]) -> dict[str, Any] | None:
    if not grown:
        return None
    ranked = sorted(grown[-1].norms.items(), key=lambda item: -item[1])
    return {"step": grown[-1].step, "weights": len(ranked), "largest": dict(ranked[:GROWN])}


def _scores(run_dir: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run_dir / EVALS).glob("*/score.json")):
        one = _load(path)
        for score in one["scores"]:
            yield {"checkpoint": one["checkpoint"], **score}


def _notices(notices: Sequence[events.Notice]) -> list[dict[str, Any]]:
    """Equal notices together: ``count`` adds up, ``where`` lists all places; warnings first."""
    found: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    for one in sorted(notices, key=lambda one: one.level != "warning"):
        key = (one.level, one.what, one.hint)
        entry = found.setdefault(key, {"level": one.level, "what": one.what, "count": 0, "where": [], "hint": one.hint})
        entry["count"] += one.count
        entry["where"] += [] if one.where is None else [one.where]
    return list(found.values())


def _dropped(run_dir: Path) -> dict[str, Any]:
    path = run_dir / DROPPED
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    first = [{key: row[key] for key in ("source", "reason", "message")} for row in rows[:SHOWN]]
    return {"reasons": dict(sorted(Counter(row["reason"] for row in rows).items())), "first": first}


def _verdict(found: dict[str, Any]) -> str:
    done, planned, why = found["updates"]["done"], found["updates"]["planned"], found["why"]
    so_far = f"{done:,} of {planned:,} updates" if planned is not None else f"{done:,} updates"
    begin = {
        "completed": f"After {so_far} the ",
        "stopped_early": f"Stopped early after {so_far}: the ",
        "interrupted": f"Interrupted after {so_far}: the ",
        "failed": f"FAILED after {so_far}" + (f" ({why})" if why else "") + ": the ",
    }.get(found["status"], f"Not finished, {so_far} and no end recorded: the ")
    measured = found["validation"]
    if not measured:
        loss = found["training"]
        if loss is None:
            return f"{begin}model is as it was before, since no update was made and nothing was validated."
        return (
            f"{begin}training loss went from {loss['loss_first']:.4f} to {loss['loss_last']:.4f} nats a learned token, "
            "and nothing was validated, so it is not known what that means for unseen rows."
        )
    before, after, best = measured[0], measured[-1], min(measured, key=lambda one: one["loss"])
    if len(measured) == 1:
        return (
            f"{begin}validation loss was measured once, at step {before['step']:,}: {before['loss']:.4f} nats a learned "
            f"token (perplexity {before['perplexity']:.4g}), so there is no before and after."
        )
    first, last = before["loss"], after["loss"]
    moved = "fell" if last < first else "stayed the same," if last == first else "ROSE"
    text = f"{begin}validation loss {moved} from {first:.4f} to {last:.4f} nats a learned token"
    text += f" ({(last - first) / first:+.1%})" if first and math.isfinite(last - first) else ""
    text += f", perplexity from {before['perplexity']:.4g} to {after['perplexity']:.4g}, on {after['rows']:,} held-out rows"
    if before["step"]:
        text += f" (first measured at step {before['step']:,})"
    if not last <= first:
        text += "; on these rows the model got worse"
    if best["loss"] < last:
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
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([_cell("–" if value is None else value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _page(run_dir: Path, found: dict[str, Any]) -> Iterator[str]:
    yield from [f"# {_cell(run_dir.resolve().name)}", "", f"**{_cell(found['verdict'])}**", ""]
    yield from ["## Curves", "", f"![loss, learning rate, gradient norm and memory]({CURVES})", ""]
    if found["validation"]:
        yield from ["## Validation", ""]
        rows = [
            (one["step"], f"{float(one['loss']):.4f}", one["perplexity"], one["rows"], round(one["units"]), "yes" if one["best"] else "")
            for one in found["validation"]
        ]
        yield from _table(("step", "loss (nats)", "perplexity", "rows", "learned tokens", "best so far"), rows)
        yield ""
    if found["samples"]:
        yield from ["## Samples, before and after", ""]
        for one in found["samples"]:
            yield from _sample(one)
    if found["scores"]:
        yield from ["## Scores", "", "With 95 % intervals; the change is tuned − base on the same rows.", ""]
        names = ("task", "version", "checkpoint", "name", "n")
        rows = [
            [*(str(one[name]) for name in names), _interval(one, "value", "low", "high"),
             _interval(one, "delta", "delta_low", "delta_high"), one["note"] or ""]
            for one in found["scores"]
        ]  # fmt: skip
        yield from [*_table((*names, "tuned", "change", "note"), rows), ""]
    yield from ["## Notices", ""]
    yield from _notice_lines(found)
    yield from ["", "## Counts", ""]
    yield from _table(("what", "how many"), list(flat(found["counts"]).items()))
    yield from ["", *_dropped_lines(found["dropped"])]
    yield from ["## Time and memory", "", *_table(("what", "measured"), _costs(found)), ""]
    if found["growth"] is not None:
        grown = found["growth"]
        yield from [f"## Growth of the adapter at step {grown['step']:,}", ""]
        yield from [f"The largest of {grown['weights']:,} adapted weights, by the Frobenius norm of their change.", ""]
        yield from [*_table(("weight", "norm of the change"), list(grown["largest"].items())), ""]
    yield from ["## Checkpoints", ""]
    kept = found["checkpoints"]
    if kept:
        best = f"; best {kept['best']} ({kept['metric']} {kept['best_value']:.4f})" if kept["best"] is not None else ""
        yield f"Kept: {', '.join(str(step) for step in kept['kept'])}; last {kept['last']}{best}."
    else:
        yield "None was saved."
    yield from ["", "## How to go on", "", *_fence("\n".join(_commands(run_dir, found)), "sh"), ""]
    text = (run_dir / CONFIG).read_text(encoding="utf-8")
    values = flat(yaml.safe_load(text))
    given = [(key, values.get(key), origin) for key, origin in found["settings_given"].items()]
    yield from ["## Settings", "", "Given for this run; all others are defaults:", ""]
    yield from [*_table(("setting", "value", "from"), given), "", "All of them:", "", *_fence(text.rstrip("\n"), "yaml")]
    yield from ["", "## Made from", "", *_table(("what", "value"), [(k, str(v)) for k, v in flat(found["manifest"]).items()])]


def _sample(one: dict[str, Any]) -> Iterator[str]:
    yield from _fence(one["prompt"])
    after = one["after"]
    answers = [(f"step {one['before']['step']:,}", one["before"]["answer"])]
    answers += [(f"step {after['step']:,}", after["answer"])] if after is not None else []
    answers += [("reference", one["reference"])] if one["reference"] is not None else []
    yield from ["", "<table><tr>" + "".join(f"<th>{name}</th>" for name, _ in answers) + "</tr><tr>"]
    for _, text in answers:
        yield from ['<td valign="top">', "", *_fence(text), "", "</td>"]
    yield from ["</tr></table>", ""]


def _interval(score: dict[str, Any], value: str, low: str, high: str) -> str | None:
    if score[value] is None:
        return None
    form = "+.4g" if value == "delta" else ".4g"
    limits = "" if score[low] is None else f" ({score[low]:{form}} to {score[high]:{form}})"
    return f"{score[value]:{form}}{limits}"


def _notice_lines(found: dict[str, Any]) -> Iterator[str]:
    if not found["notices"] and not found["updates"]["skipped"]:
        yield "None."
    for one in found["notices"]:
        where = ", ".join(one["where"][:SHOWN])
        more = f" and {len(one['where']) - SHOWN:,} more places" if len(one["where"]) > SHOWN else ""
        text = f"{one['what']} (×{one['count']:,})" + (f"; at {where}{more}" if where else "")
        text += f"; hint: {one['hint']}" if one["hint"] else ""
        yield f"- **{one['level']}**: {_cell(text)}"
    for one in found["updates"]["skipped"]:
        text = f"step {one['step']} skipped: loss {one['loss']}, gradient norm {one['gradient_norm']}, rows "
        yield f"- **warning**: {_cell(text + ', '.join(one['rows']))}"


def _dropped_lines(dropped: dict[str, Any]) -> Iterator[str]:
    if dropped["first"]:
        total = sum(dropped["reasons"].values())
        yield from [f"Rows left out: {total:,}, the first {len(dropped['first'])} of them (all: {DROPPED}):", ""]
        rows = [(row["source"], row["reason"], row["message"]) for row in dropped["first"]]
        yield from [*_table(("row", "reason", "what was found"), rows), ""]


def _costs(found: dict[str, Any]) -> Iterator[tuple[str, str | int]]:
    names = {"seconds": "whole run", "training_s": "updates", "validating_s": "validation", "saving_s": "saving"}
    for key, name in names.items():
        if found["time"][key] is not None:
            yield name, duration(found["time"][key])
    for name, speed in found["tokens_per_second"].items():
        if speed is not None:
            yield f"{name} tokens a second", f"{speed:,.1f}"
    for name, n_bytes in found["memory_peak"].items():
        yield f"memory, {name}, highest reading", size(n_bytes)
    weights = found["weights"]
    if weights is not None:
        yield "trainable weights", f"{weights['trainable']:,} of {weights['total']:,}"
    yield "updates clipped", found["updates"]["clipped"]
    for one in found["updates"]["resumed"]:
        yield "resumed", f"after step {one['step']:,}; {one['redone']:,} updates done again"


def _commands(run_dir: Path, found: dict[str, Any]) -> Iterator[str]:
    run = shlex.quote(str(run_dir))
    if found["status"] not in ("completed", "stopped_early"):
        yield f"tunesmith train --resume {run}"
    if found["checkpoints"]:
        yield f"tunesmith generate {run} --prompt 'Hello'"
        yield f"tunesmith chat {run}"
        yield f"tunesmith evaluate {run}"
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
