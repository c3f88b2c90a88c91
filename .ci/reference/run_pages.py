"""Every file of a run directory: who writes it, what it holds, and its fields."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sources import class_of, fields_of
from writing import code, prose, table

INTRODUCTION = """# The run directory

A run is one folder. Every verb after `train` reads only it, and it may be moved or copied. Files are written
to a temporary name, flushed and renamed, so that each is whole or absent. Fields that a later version adds
are left alone by an earlier one.
"""


class RunFile(NamedTuple):
    """``name``: a pattern, with a name of what varies in <>. ``writer``: the verb. ``fields``: names of the
    classes of the package that have them, or the fields themselves with their meanings. ``when``: empty if
    every run has it."""

    name: str
    writer: str
    holds: str
    fields: tuple[str, ...] | dict[str, str] = ()
    when: str = ""

    def matches(self, path: str) -> bool:
        return fnmatchcase(path, "".join("*" if part else before for before, part in _pieces(self.name)))


def _pieces(name: str) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    while name:
        before, found, rest = name.partition("<")
        pieces.append((before, ""))
        if found:
            inside, _, rest = rest.partition(">")
            pieces.append(("", inside))
        name = rest
    return pieces


COUNTS = {
    "rows_read": "rows in the files",
    "rows_dropped": "reason → rows left out",
    "rows_train, rows_valid": "rows to train on, and held out",
    "sequences_train, sequences_valid": "sequences of tokens made of them",
    "tokens, supervised_tokens": "tokens of the training rows, and those that are learned",
    "padding_share": "share of padding in the micro-batches",
    "steps": "updates of the run",
    "loss": "what the loss is a mean over",
    "notes": "remark → rows that were changed in a way that their author may not expect",
    "asked_as": "how most rows ask: as a chat, as plain text, or as an instruction",
    "thinking": "whether prompts ask for reasoning",
    "answers_with_reasoning": "learned answers that have reasoning",
    "mix": "counts of the rows of `data.mix`",
}
FILES = (
    RunFile("config.yaml", "train", "every setting, defaults included: [every setting](settings.md)"),
    RunFile("origin.json", "train", "key of a setting → where its value came from"),
    RunFile(
        "manifest.json", "train", "versions, machine, hashes of the inputs, and the status", ("Manifest",)
    ),
    RunFile(
        "plan.json",
        "train",
        "what was expected, and what was measured",
        ("PlanFile", "Forecast", "MeasuredRun", "Term", "Amount"),
    ),
    RunFile(
        "events.jsonl",
        "train",
        "what happened, an object a line: [events](events.md)",
        when="composed runs have none",
    ),
    RunFile("training.log", "train", "the same for people", when="composed runs have none"),
    RunFile(
        "data/audit.json",
        "train",
        "findings of the audit",
        ("Audit", "Finding", "FindingRow"),
        "unless `audit.before_training` is false",
    ),
    RunFile(
        "data/dropped.jsonl",
        "train",
        "rows that were left out, an object a line",
        {
            "source": "file and line",
            "reason": "a code",
            "message": "what is wrong, and what to do",
            "raw": "the row as it was",
        },
    ),
    RunFile("data/valid.jsonl", "train", "held-out rows, in the layout `messages` or that of their kind"),
    RunFile("data/plan.json", "train", "counts", COUNTS),
    RunFile(
        "data/rendered.json",
        "train",
        "the first rows as they are learned",
        {"source": "file and line", "tokens": "pairs of a token's text and its weight; 0 is not learned"},
    ),
    RunFile(
        "reference.safetensors",
        "train",
        "log-probabilities of the rows before training",
        when="kto, apo_zero_unpaired, dpo",
    ),
    RunFile(
        "difficulty.safetensors", "train", "loss of each row before training", when="`data.order: difficulty`"
    ),
    RunFile(
        "frozen/<states>",
        "train",
        "hidden states of the frozen layers; removed at the end",
        when="`loop.cache_frozen`, while it trains",
    ),
    RunFile(
        "checkpoints/index.json",
        "train",
        "which checkpoints there are",
        {
            "last, best": "steps",
            "metric": "what decides the best",
            "best_value": "its value at the best",
            "kept": "steps that have a folder",
        },
    ),
    RunFile("checkpoints/<step>/adapters.safetensors", "train", "weights that were trained"),
    RunFile(
        "checkpoints/<step>/adapter_config.json", "train", "rank, scale and targets, as mlx-lm reads them"
    ),
    RunFile(
        "checkpoints/<step>/optimizer.safetensors",
        "train",
        "state of the optimizer",
        when="composed runs have none",
    ),
    RunFile("checkpoints/<step>/cursor.json", "train", "where training stands", ("Cursor",)),
    RunFile("evals/<task@version>/score.json", "evaluate", "scores of one task", ("Record", "Score")),
    RunFile(
        "evals/<task@version>/examples.jsonl",
        "evaluate",
        "an example a line, with both answers",
        ("ExampleRecord",),
    ),
    RunFile("evals/.lock", "evaluate", "lets one evaluation write at a time"),
    RunFile(
        "exports/<kind>/export.json",
        "export",
        "what was written and measured",
        ("Exported", "Distances", "Stops", "Cost"),
        "exported runs",
    ),
    RunFile("exports/<kind>/<files>", "export", "the artefact: [export](../export.md)", when="exported runs"),
    RunFile(
        "composition.json",
        "compose",
        "sources, weights, and what the sum holds of each layer",
        when="composed runs",
    ),
    RunFile("tags.json", "tag", "names of the run", ("Tags",), "tagged runs"),
    RunFile(
        "votes.jsonl",
        "serve",
        "votes of users, one a line",
        ("Vote", "VotedAnswer"),
        "served runs that got votes",
    ),
    RunFile(
        "report.html",
        "train, evaluate, export, report",
        "the report for people: one file, no request leaves it",
    ),
    RunFile("report.md", "as report.html", "the same as text"),
    RunFile(
        "report.json", "as report.html", "the same for programs, with the [codes of the reasons](reasons.md)"
    ),
    RunFile("report.png", "as report.html", "the verdict as a picture"),
    RunFile("curves.png", "as report.html", "the course of training"),
    RunFile("model_card.md", "as report.html", "the card for those who receive the weights"),
    RunFile("tensorboard/<files>", "train", "curves for TensorBoard", when="`loop.tensorboard`"),
    RunFile(".lock", "train", "lets one process train the run"),
)


def text() -> str:
    rows = [(code(file.name), file.writer, file.holds, file.when) for file in FILES]
    parts = [INTRODUCTION, table(["file", "written by", "holds", "only"], rows)]
    for file in FILES:
        heading = f"## {file.name.replace('<', '&lt;')}\n"
        if isinstance(file.fields, dict):
            rows = [(code(name), meaning) for name, meaning in file.fields.items()]
            parts += [heading, table(["field", "meaning"], rows)]
        elif file.fields:
            parts.append(heading)
            for number, name in enumerate(file.fields):
                parts += described(name, class_of(name), heading=number > 0)
    return "\n".join(parts)


def described(name: str, kind: Any, *, heading: bool) -> list[str]:
    rows = [(code(field.name), code(field.annotation)) for field in fields_of(kind) if field.name[:2] != "__"]
    words = "" if (kind.__doc__ or "").startswith(f"{name}(") else prose(kind.__doc__) + "\n"
    return [f"**{name}**\n"] * heading + [words, table(["field", "type"], rows)]
