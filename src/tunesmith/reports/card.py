"""A model card in the Hugging Face hub's format: what the weights of a run are, how they were made, and what
was measured.

Format: huggingface.co/docs/hub/model-cards; its metadata is written by `huggingface_hub`. A card is for
others: it names files without their folders and quotes no row of the data. Nothing is invented: what the run
does not record is left out of the metadata, and the text says that it is unknown."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from tunesmith.data.asking import question
from tunesmith.data.examples import Message
from tunesmith.data.sources import sha256
from tunesmith.display.console import duration, size
from tunesmith.display.markdown import cell, fence, table, verdict
from tunesmith.display.text import escaped, many
from tunesmith.errors import ModelError
from tunesmith.evaluation.tasks import about
from tunesmith.files import write_text
from tunesmith.reports.facts import AuditSummary, Facts
from tunesmith.reports.markdown import exports
from tunesmith.reports.measures import Measure, answer, identifier, interval, label
from tunesmith.reports.summary import Summary
from tunesmith.runs import thinking
from tunesmith.runs.directory import CHECKPOINTS, COMPOSED, VALID
from tunesmith.settings.config import flat

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD = "model_card.md"
OWN = "held-out rows"
SPOKEN = 0.05
"""A language is the model's if it has this share of the rows."""
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
_LANGUAGE = re.compile(r"\b([a-z]{2,3}) (\d+(?:\.\d+)?)%")
_KINDS = {
    "lora": "a LoRA adapter",
    "dora": "a DoRA adapter",
    "qalora": "a QA-LoRA adapter",
    "full": "all weights that were trained",
}


@dataclass(frozen=True)
class CardBase:
    """The base model: its name for readers, its name on the hub and its licence, if these are known."""

    name: str
    hub: str | None = None
    licence: str | None = None


class ShareOfRows(NamedTuple):
    language: str
    share: float


def write(summary: Summary) -> Path:
    """Write the card into the run directory, whole or not at all, and return its path."""
    path = summary.facts.run / CARD
    write_text(path, text(summary))
    return path


def text(summary: Summary) -> str:
    """Metadata and text of the card; the same for the same run directory."""
    base = _base(summary.facts)
    body = [f"# {cell(summary.facts.run.name)}", "", *verdict(summary.lines), ""]
    for title, section in _sections(summary, base):
        body += [f"## {title}", "", *section, ""]
    return f"---\n{_data(summary, base).to_yaml()}\n---\n\n" + escaped("\n".join(body))


def _data(summary: Summary, base: CardBase) -> ModelCardData:
    from huggingface_hub import ModelCardData

    facts, results = summary.facts, _results(summary)
    kinds = [facts.settings.get("adapter.kind"), facts.settings.get("objective.kind")]
    languages = [language for language, share in _languages(facts.audit) if share >= SPOKEN]
    return ModelCardData(
        base_model=base.hub,
        library_name="mlx",
        license=base.licence,
        language=languages or None,
        pipeline_tag="text-generation",
        tags=["mlx", "mlx-lm", "tunesmith", *(str(kind) for kind in kinds if kind)],
        model_name=escaped(facts.run.name) if results else None,
        eval_results=results or None,
    )


def _results(summary: Summary) -> list[EvalResult]:
    """The numbers at the top of the report in the hub's form, each with its interval, its n and the base."""
    return [_result(summary.facts, row) for row in summary.answers if math.isfinite(row.score.value)]


def _result(facts: Facts, row: Measure) -> EvalResult:
    from huggingface_hub import EvalResult

    score, own, asked = row.score, row.record.data == VALID, _asked(facts, row)
    held_out, valid = f"{OWN} of the run{asked.removeprefix(OWN)}", facts.run / VALID
    ends = {"low": score.low, "high": score.high, "base": score.base}
    arguments: dict[str, Any] = {
        key: _shown(value, score.unit)
        for key, value in ends.items()
        if value is not None and math.isfinite(value)
    }
    arguments |= {"n": score.n} | ({"unit": score.unit} if score.unit else {})
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        metric_type=f"{score.task}.{score.name}",
        dataset_type="held-out" if own else score.task,
        dataset_name=held_out if own else f"{escaped(score.task)}, {asked}",
        dataset_config=None if own else row.record.identity,
        dataset_revision=sha256(valid) if own and valid.is_file() else None,
        metric_name=identifier(score),
        metric_value=_shown(score.value, score.unit),
        verified=False,
        metric_args=arguments,
    )


def _shown(value: float, unit: str) -> float:
    """In its unit: a share with the unit "%" is per cent on the hub."""
    return round(100 * value, 10) if unit == "%" else value


def _asked(facts: Facts, row: Measure) -> str:
    """What was asked: files without their folders, how much of them, and the checkpoint if it is not the
    card's."""
    task, record = row.score.task, row.record
    settings, described = record.settings or {}, about(row.score.task)
    files = record.data if isinstance(record.data, tuple) else ()
    if described.files:
        named = settings.get(described.files)
        files = tuple(map(str, named)) if isinstance(named, list) else ()
    names = ", ".join(PurePath(path).name for path in files)
    names = names or ("unknown rows" if described.asks_rows else "its suite")
    parts = [OWN if record.data == VALID else names]
    if settings.get("shots") and task.startswith("benchmark."):
        parts.append(f"{settings['shots']} solved examples")
    if record.limit:
        evenly = task.startswith("drift.")
        parts.append(f"{record.limit}, evenly by kind" if evenly else f"first {record.limit}")
    other = (record.checkpoint or "").lstrip("0")
    if other and other != str(facts.checkpoints and facts.checkpoints.used):
        parts.append(f"checkpoint of step {other}")
    return ", ".join(parts)


def _base(facts: Facts) -> CardBase:
    path = str(facts.settings.get("model.path") or "")
    local, name = Path(path).expanduser(), PurePath(path).name or "unknown"
    if path.endswith(".gguf"):
        return _gguf(local, name) if local.is_file() else CardBase(name)
    if local.is_dir():
        return CardBase(name, None, _licence(local / "README.md"))
    if local.exists() or not _HUB.fullmatch(path):
        return CardBase(name)
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(path, "README.md", revision=facts.settings.get("model.revision"))
    return CardBase(path, path, _licence(Path(card)) if isinstance(card, str) else None)


def _gguf(path: Path, name: str) -> CardBase:
    """As the GGUF file describes itself."""
    from tunesmith.model.gguf import header

    try:
        texts = header.texts(path)
    except ModelError:  # the run was made from this path, so the file was replaced since
        return CardBase(name)
    licence = texts.get("general.license", "")
    hub = texts.get("general.base_model.0.repo_url", "").partition("huggingface.co/")[2].strip("/")
    named = hub if _HUB.fullmatch(hub) else None
    return CardBase(named or name, named, licence if _LICENCE.fullmatch(licence) else None)


def _licence(card: Path) -> str | None:
    """The licence in the metadata of a model card."""
    try:
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), re.DOTALL)
        metadata = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if isinstance(licence, str) and _LICENCE.fullmatch(licence) else None


def _languages(audit: AuditSummary | None) -> list[ShareOfRows]:
    """Languages of the rows with their shares, as the audit found them."""
    findings = audit.findings if audit else ()
    said = [
        finding.what
        for finding in findings
        if finding.rule == "content.languages" and "languages of" in finding.what
    ]
    listed = said[0].partition(": ")[2] if said else ""
    return [ShareOfRows(name, float(share) / 100) for name, share in _LANGUAGE.findall(listed)]


def _sections(summary: Summary, base: CardBase) -> Iterator[tuple[str, list[str]]]:
    facts = summary.facts
    yield "What it is", list(_what(facts, base))
    unstated = "Who trained it has not stated one. It answers as the rows under Data do."
    yield "Intended use", [f"{unstated} Nothing is known about other uses."]
    yield "How it was trained", _trained(facts)
    yield "Data", list(_rows(facts))
    held = [row for row in summary.answers if row.question in ("retention", "safety")]
    others = [row for row in summary.answers if row not in held]
    evaluate = f"tunesmith evaluate {_name(facts)}"
    yield "Results", _scores(facts, others, evaluate)
    yield "Retention and safety", _scores(facts, held, f"{evaluate} --task drift")
    if facts.artefacts:
        yield "Exports", exports(facts.artefacts)
    unlimited = "None is known, which does not mean that there is none."
    yield "Limits", [f"- {cell(limit)}" for limit in summary.limits] or [unlimited]
    yield "How to use it", list(_use(facts, base))
    yield "How to make it again", _again(facts)
    yield "Environment", list(_environment(facts))


def _trained(facts: Facts) -> list[str]:
    keys = [*_MATTER, *(key for key in facts.origins if key not in _MATTER)]
    rows = [
        (key, _setting(key, facts.settings[key]))
        for key in keys
        if facts.settings.get(key) is not None and not key.startswith("audit.")
    ]
    done, planned = facts.updates.done, facts.updates.planned
    of_planned = f" of {planned:,}" if planned not in (None, done) else ""
    settings = table(("setting", "value"), rows) if rows else ["Its settings are unknown."]
    return [f"{done:,} updates{of_planned}; the run is {facts.status}.", "", *settings]


def _again(facts: Facts) -> list[str]:
    again = f"{_name(facts)}-again"
    lines = [f"tunesmith train --config {_name(facts)}/config.yaml --out {again}"]
    lines += [f"tunesmith evaluate {again}"] if facts.measures else []
    hashes = [(PurePath(key).name, value) for key, value in _hashes(facts.manifest)]
    lead = "From the same data, template and base:"
    return [*fence("\n".join(lines), "sh"), "", lead, "", *table(("what", "hash"), hashes)]


_MATTER = (
    "objective.kind",
    "objective.beta",
    "adapter.kind",
    "adapter.rank",
    "adapter.alpha",
    "adapter.dropout",
    "adapter.targets",
    "model.quantize",
    "batch.sequences",
    "batch.length",
    "optimizer.kind",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "loop.epochs",
    "loop.steps",
    "loop.seed",
)
"""Settings that are named whether they were given or not."""


def _setting(key: str, value: Any) -> str:
    """Files without their folders."""
    if key.startswith(("data.", "model.", "adapter.start")):
        paths = map(str, value if isinstance(value, list) else [value])
        return ", ".join(path if _HUB.fullmatch(path) else PurePath(path).name for path in paths)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _what(facts: Facts, base: CardBase) -> Iterator[str]:
    kind = str(facts.settings.get("adapter.kind", ""))
    line = f"It is {_KINDS.get(kind, 'an adapter of unknown kind')} for {cell(base.name)}"
    if version := facts.manifest.get("versions", {}).get("tunesmith"):
        line += f", made by tunesmith {cell(version)}"
    if facts.weights:
        line += f": {facts.weights.trainable:,} of {facts.weights.total:,} weights were trained"
    index = facts.checkpoints
    yield line + (
        f". Its checkpoint is that of step {index.used:,}." if index else ". It has no checkpoint yet."
    )
    yield ""
    if base.licence:
        yield f"- Licence of the base: {cell(base.licence)}."
    else:
        yield "- Licence: unknown; the base names none that could be read."
    languages = ", ".join(f"{name} {share:.0%}" for name, share in _languages(facts.audit))
    if languages:
        yield f"- Languages of the rows: {languages}."
    else:
        yield "- Languages: unknown; the audit did not find any."
    if not base.hub:
        yield "- The base's name on the hub is unknown, so the metadata names none."
    if COMPOSED in facts.manifest.get("lineage", {}):
        yield "- It is composed of other adapters, which `manifest.json` names with their weights."
    elif facts.manifest.get("lineage"):
        yield "- It continues another adapter, see `manifest.json`."


def _rows(facts: Facts) -> Iterator[str]:
    hashes = facts.manifest.get("hashes", {}).get("data", {})
    if not facts.counts and not hashes:
        yield "Unknown."
        return
    if hashes:
        files = ((PurePath(path).name, value) for path, value in hashes.items())
        yield from [*table(("file", "SHA-256"), files), ""]
    names = {
        "rows_read": "rows read",
        "rows_train": "trained on",
        "rows_valid": "held out",
        "tokens": "tokens",
        "supervised_tokens": "of these learned",
    }
    counts = {name: facts.counts.get(key) for key, name in names.items()}
    yield ", ".join(f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int)) + "."
    if mix := facts.counts.get("mix"):
        entries = (
            f"{entry['rows_an_epoch']:,} rows an epoch of {name}"
            f"{' (probabilities of the base are learned)' if entry.get('distilled') else ''}"
            for name, entry in mix.items()
        )
        yield from ["", f"Mixed in beside the task's rows: {cell(', '.join(entries))}."]
    if (line := thinking.of_counts(facts.counts)) is not None:
        yield from ["", f"{line[:1].upper()}{line[1:]}."]
    if dropped := flat({"": facts.counts.get("rows_dropped") or {}}):
        reasons = ", ".join(f"{key.lstrip('.')} {count:,}" for key, count in dropped.items())
        yield from ["", f"Left out: {cell(reasons)}."]
    yield from ["", *(_audit(facts.audit) if facts.audit else ["The rows were not audited."])]


def _audit(audit: AuditSummary) -> Iterator[str]:
    rows = [
        (
            finding.rule,
            finding.severity,
            f"{finding.count:,} of {finding.of:,} rows" if finding.count else "the whole set",
        )
        for finding in audit.findings
        if finding.severity in ("error", "warning") or finding.accepted
    ]
    yield f"Audit of {audit.rows:,} rows: {many(len(rows), 'finding') if rows else 'no findings'} to look at."
    if rows:
        yield from ["", *table(("finding", "severity", "concerns"), rows)]


def _scores(facts: Facts, measures: Sequence[Measure], command: str) -> list[str]:
    """``command``: what would measure them."""
    if not measures:
        return ["Not measured. This does:", "", *fence(command, "sh")]
    head = ("what", "base", "tuned, 95 % interval", "difference, 95 % interval", "n", "answer", "asked")
    rows = [
        (
            label(row.score),
            interval(row.score, of="base"),
            interval(row.score),
            interval(row.score, of="delta"),
            row.score.n,
            answer(row.score),
            _asked(facts, row),
        )
        for row in measures
    ]
    without_base = [row for row in measures if row.score.delta is None]
    if len(without_base) == len(measures):
        lead = "The base was not asked, so nothing is compared."
    else:
        both = "If a base is shown, both" if without_base else "Both"
        lead = f"{both} sides were asked the same; verdicts are corrected for their number."
    return [lead, "", *table(head, rows)]


def _name(facts: Facts) -> str:
    return shlex.quote(facts.run.name)


def _use(facts: Facts, base: CardBase) -> Iterator[str]:
    if facts.checkpoints is None:
        yield "There is nothing to use yet: no checkpoint was saved."
        return
    run, settings = _name(facts), facts.settings
    lines = [f"tunesmith chat {run}", f"tunesmith generate {run} --prompt 'Hello'"]
    why = None
    if str(settings.get("model.path")).endswith(".gguf"):
        why = "the base is a GGUF file"
    elif settings.get("model.quantize"):
        why = "the base was quantised while it was loaded"
    elif settings.get("model.adapter"):
        why = "another adapter is merged into the base"
    elif settings.get("adapter.kind") == "dora" and _has_dora_on_experts(facts, facts.checkpoints.used):
        why = "it has no DoRA on routed experts"
    else:
        adapter = f"{run}/{CHECKPOINTS}/{facts.checkpoints.used:06d}"
        lines.append(
            f"mlx_lm.generate --model {shlex.quote(base.name)} --adapter-path {adapter} {_said(facts)}"
        )
    yield from fence("\n".join(lines), "sh")
    if why:
        yield from ["", f"`mlx_lm.generate` alone does not load it: {why}."]


def _said(facts: Facts) -> str:
    """The prompt for `mlx_lm.generate`, which knows the chat template alone, as the run was trained."""
    kind = facts.counts.get("asked_as")
    if kind not in ("text", "instruct"):
        return "--prompt 'Hello'"
    text = str(question([Message("user", "Hello")], kind))
    return f"--ignore-chat-template --prompt {shlex.quote(text)}"


def _has_dora_on_experts(facts: Facts, step: int) -> bool:
    from tunesmith.adapters import has_dora_on_experts  # loads MLX, which other cards do not need

    return has_dora_on_experts(facts.run / CHECKPOINTS / f"{step:06d}")


def _hashes(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of data, template and base."""
    hashes = manifest.get("hashes", {})
    others = [(key, str(value)) for key, value in hashes.items() if key != "data"]
    return [*hashes.get("data", {}).items(), *others]


def _environment(facts: Facts) -> Iterator[str]:
    manifest = facts.manifest
    versions = flat(manifest.get("machine") or {}) | flat(manifest.get("versions") or {})
    rows = [(key, str(value)) for key, value in versions.items() if value is not None]
    rows += [("created", manifest["created"])] if manifest.get("created") else []
    rows += [("updates took", duration(facts.time.training_s))] if facts.time.training_s else []
    rows += [("whole run took", duration(facts.time.seconds))] if facts.time.seconds else []
    rows += [(f"most memory, {name}", size(n_bytes)) for name, n_bytes in facts.memory_peak.items()]
    yield from table(("what", "measured"), rows) if rows else ["Unknown."]
    yield from ["", "Emissions were not measured."]
