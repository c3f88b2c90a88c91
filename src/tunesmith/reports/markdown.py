"""A run's report as Markdown: the same facts as the page, for a terminal, a pull request or a colleague
without a browser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.display import words
from tunesmith.display.console import duration, size
from tunesmith.display.text import escaped
from tunesmith.errors import SHOWN
from tunesmith.evaluation.tasks import QUESTIONS
from tunesmith.reports import glossary
from tunesmith.reports import verdict as evidence
from tunesmith.reports.figures import CURVES, PICTURE
from tunesmith.runs.directory import CONFIG, DROPPED
from tunesmith.settings.config import flat

GROWN = 10  # weights in the table of growth
ROWS = 10  # of each class of rows


def text(run_dir: Path, found: dict[str, Any]) -> str:
    """The whole of it. ``found``: `facts.summary`."""
    lines = [f"# {cell(run_dir.resolve().name)}", "", f"**{cell(found['verdict'])}**", ""]
    for title, section in _sections(run_dir, found):
        lines += [f"## {title}", "", *section, ""]
    return "\n".join(lines) + "\n"


def fence(text: str, language: str = "text") -> list[str]:
    """A code block that ``text`` cannot end: its fence is longer than any run of backticks inside."""
    clean = "".join(
        c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text.replace("\r\n", "\n")
    )
    ticks = "`" * (max([2, *(len(run) for run in re.findall("`+", clean))]) + 1)
    return [ticks + language, *clean.split("\n"), ticks]


def cell(value: Any) -> str:
    """``value`` in a table: on one line, with what Markdown or HTML would act on escaped."""
    if value is None:
        return "–"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.5g}" if isinstance(value, float) else f"{value:,}"
    text = (
        escaped(" ".join(str(value).split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    )
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _sections(run_dir: Path, found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield from _evidence(found)
    yield (
        "Curves",
        [
            f"![verdict, differences and loss]({PICTURE})",
            "",
            f"![loss, learning rate, gradient norm and memory]({CURVES})",
        ],
    )
    if found["validation"]:
        head = ("step", found["counts"].get("loss", "loss"), "perplexity", "rows", "units", "best so far")
        names = ("step", "loss", "perplexity", "rows")
        rows = (
            (*(one[name] for name in names), round(one["units"]), "yes" * one["best"])
            for one in found["validation"]
        )
        yield "Validation", table(head, rows)
    for title, key, seen in (
        (
            "Good against bad, on held-out rows",
            "step",
            [{"step": one["step"], **one["metrics"]} for one in found["validation"]],
        ),
        ("Good against bad, on training rows (means up to a step)", "to_step", found["watched"]),
    ):
        names = list(dict.fromkeys(name for one in seen for name in one if name != key))
        if names:
            yield (
                title,
                table(
                    (key.replace("_", " "), *names),
                    ([one.get(name) for name in (key, *names)] for one in seen),
                ),
            )
    if found["samples"]:
        yield "Samples, before and after", [line for one in found["samples"] for line in _sample(one)]
    if found["scores"]:
        yield (
            "Scores",
            [
                "With 95 % intervals; the change is tuned − base on the same rows.",
                "",
                *_scores(found["scores"]),
            ],
        )
    if found["rows"]:
        yield "Rows of the training data", _rows(found["rows"])
    if found["audit"]:
        said = (
            (one["severity"], one["rule"], one["what"], one["hint"]) for one in found["audit"]["findings"]
        )
        yield (
            "Data audit",
            [cell(found["audit"]["verdict"]), "", *table(("severity", "rule", "what", "what to do"), said)],
        )
    yield "Notices", [_notice(one) for one in found["notices"]] or ["None."]
    lines, dropped = table(("what", "how many"), flat(found["counts"]).items()), found["dropped"]
    if dropped["first"]:
        total, shown = sum(dropped["reasons"].values()), len(dropped["first"])
        lines += ["", f"Rows left out: {total:,}, the first {shown} of them (all: {DROPPED}):", ""]
        lines += table(("row", "reason", "what was found"), (row.values() for row in dropped["first"]))
    yield "Counts", lines
    yield "Time and memory", table(("what", "measured"), costs(found))
    if grown := found["growth"]:
        largest = sorted(grown["norms"].items(), key=lambda item: -float(item[1]))[:GROWN]
        of = [
            (name, norm, grown["relative"].get(name), grown["effective_rank"].get(name))
            for name, norm in largest
        ]
        head = (
            f"largest of {len(grown['norms']):,} adapted weights",
            "Frobenius norm of the change",
            "of the weight's",
            "effective rank",
        )
        wide = 4 if grown["relative"] else 2
        yield (
            f"Growth of the adapter at step {grown['step']:,}",
            table(head[:wide], (row[:wide] for row in of)),
        )
    yield "Checkpoints", [checkpoints(found)]
    yield "How to go on", fence("\n".join(commands(run_dir, found)), "sh")
    given = ((key, found["settings"].get(key), origin) for key, origin in found["settings_given"].items())
    lines = ["Given for this run; all others are defaults:", "", *table(("setting", "value", "from"), given)]
    path = run_dir / CONFIG
    text = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else ""
    yield "Settings", [*lines, "", "All of them:", "", *fence(text, "yaml")]
    yield (
        "Made from",
        table(("what", "value"), ((key, str(value)) for key, value in flat(found["manifest"]).items())),
    )
    if meanings := glossary.meanings(found):
        yield "What the words mean", [f"- **{cell(what)}**: {cell(told)}" for what, told in meanings.items()]
    yield "How to make it anew", fence("\n".join(found["reproduce"]), "sh")


def _evidence(found: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    if found["evidence"]["sentence"]:
        yield "Loss", [cell(found["loss"])]
    if found["answers"]:
        rows = (
            (
                QUESTIONS[one["question"]],
                one["answer"],
                ", ".join(filter(None, [words.title(one), words.subset(one)])),
                words.interval(one, of="base"),
                words.interval(one),
                words.interval(one, of="delta"),
                one["n"],
                ": ".join(filter(None, [one["target"], words.reached(one)])),
            )
            for one in found["answers"]
        )
        head = ("question", "answer", "measured", "base", "tuned", "change", "n", "target")
        yield "Answers", [f"Of checkpoint {cell(evidence.checkpoint(found))}.", "", *table(head, rows)]
    if found["advice"]:
        yield (
            "What to try next",
            [f"1. {cell(one['rule'])}: {cell(one['why'])}. → {cell(one['do'])}" for one in found["advice"]],
        )
    yield "Limits", [f"- {cell(one)}" for one in found["limits"]]


def _scores(scores: Sequence[dict[str, Any]]) -> list[str]:
    names = ("task", "version", "checkpoint", "data")
    rows = (
        (
            *(str(one[name] or "") for name in names[:3]),
            _asked(one),
            words.named(one),
            str(one["n"]),
            words.interval(one),
            words.interval(one, of="delta"),
            one["note"] or "",
            one["verdict"] or "",
            words.met(one),
        )
        for one in scores
    )
    return table((*names, "name", "n", "tuned", "change", "note", "verdict", "target"), rows)


def _asked(one: dict[str, Any]) -> str:
    """The rows, and how few of them."""
    return ", ".join(filter(None, [evidence.elsewhere(one) or str(one["data"] or ""), words.subset(one)]))


def _rows(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['rows']:,} rows over {found['epochs']} epochs. {found['note']}".rstrip()]
    for name, said in found["definitions"].items():
        rows = found[name]
        lines += [
            "",
            f"**{name.replace('_', ' ')}** ({said}): {len(rows):,}"
            + (f", the first {ROWS}" if len(rows) > ROWS else ""),
            "",
        ]
        losses = ([f"{loss:.3g}" for loss in one["losses"] if loss is not None] for one in rows[:ROWS])
        if rows:
            told = (
                (one["source"], " → ".join(loss), one["units"])
                for one, loss in zip(rows[:ROWS], losses, strict=True)
            )
            lines += table(("row", "loss by epoch", "learned tokens"), told)
    return lines


def checkpoints(found: dict[str, Any]) -> str:
    """Which are kept, and which is the best."""
    kept = found["checkpoints"]
    if not kept:
        return "None was saved."
    text = f"Kept: {', '.join(map(str, kept['kept']))}; last {kept['last']}"
    return (
        text
        + (
            ""
            if kept["best"] is None
            else f"; best {kept['best']} ({kept['metric']} {kept['best_value']:.4f})"
        )
        + "."
    )


def commands(run_dir: Path, found: dict[str, Any]) -> list[str]:
    """What can be done with the run now."""
    run = shlex.quote(str(run_dir.resolve()))
    lines = [f"tunesmith watch {run}"] if found["status"] == "running" else []
    lines += (
        [f"tunesmith train --resume {run}" + "  # where it was killed" * bool(lines)]
        if found["status"] not in evidence.DONE
        else []
    )
    verbs = (
        (f"generate {run} --prompt 'Hello'", f"chat {run}", f"evaluate {run}") if found["checkpoints"] else ()
    )
    return [*lines, *(f"tunesmith {verb}" for verb in verbs), f"tunesmith report {run}"]


def _sample(one: dict[str, Any]) -> Iterator[str]:
    answers = [
        (f"step {at['step']:,}", at["answer"]) for at in (one["before"], one["after"]) if at is not None
    ]
    answers += [("reference", one["reference"])] if one["reference"] is not None else []
    yield from [*fence(one["prompt"]), ""]
    yield "<table><tr>" + "".join(f"<th>{name}</th>" for name, _ in answers) + "</tr><tr>"
    for _, text in answers:
        yield from ['<td valign="top">', "", *fence(text), "", "</td>"]
    yield from ["</tr></table>", ""]


def _notice(one: dict[str, Any]) -> str:
    text = one["what"] + (f" (×{one['count']:,})" if one["count"] != 1 else "")
    text += f"; at {', '.join(one['where'][:SHOWN])}" if one["where"] else ""
    text += f" and {len(one['where']) - SHOWN:,} more places" if len(one["where"]) > SHOWN else ""
    text += f"; hint: {one['hint']}" if one["hint"] else ""
    return f"- **{one['level']}**: {cell(text)}"


def costs(found: dict[str, Any]) -> Iterator[tuple[str, str | int]]:
    """Time, speed, memory and what else it took, in words."""
    names = {
        "seconds": "whole run",
        "training_s": "updates",
        "validating_s": "validation",
        "saving_s": "saving",
    }
    yield from ((names[key], duration(value)) for key, value in found["time"].items() if value is not None)
    speeds = found["tokens_per_second"]
    yield from (
        (f"{name} tokens a second", f"{speed:,.1f}") for name, speed in speeds.items() if speed is not None
    )
    yield from (
        (f"memory, {name}, highest reading", size(n_bytes)) for name, n_bytes in found["memory_peak"].items()
    )
    if found["stages"]:
        yield "seconds by stage", ", ".join(f"{name} {value:,.1f}" for name, value in found["stages"].items())
    if found["padding"]:
        yield "padding", f"{found['padding']:.1%} of the positions"
    if found["weights"] is not None:
        yield "trainable weights", "{trainable:,} of {total:,}".format(**found["weights"])
    yield "updates clipped", found["updates"]["clipped"]
    for one in found["updates"]["resumed"]:
        yield "resumed", f"after step {one['step']:,}; {one['redone']:,} updates done again"
