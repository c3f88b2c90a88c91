"""A model card in the Hugging Face hub's format: what the weights of a run are, how they were made, and what
was measured.

Format: huggingface.co/docs/hub/model-cards, its metadata written by `huggingface_hub` itself. A card is for
others: it names files without their folders and quotes no row of the data. Nothing is invented: what a run
does not know is left out of the metadata, and the text says so in one line."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith.data.sources import sha256
from tunesmith.display import words
from tunesmith.display.console import duration, size
from tunesmith.display.text import escaped
from tunesmith.errors import ModelError
from tunesmith.evaluation.tasks import about
from tunesmith.files import write_text
from tunesmith.reports import summary as facts
from tunesmith.reports import verdict as evidence
from tunesmith.reports.markdown import cell, fence, table
from tunesmith.runs.directory import VALID
from tunesmith.settings.config import flat

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

CARD = "model_card.md"
OWN = "held-out rows"
SPOKEN = 0.05
"""Share of the rows from which on a language is one of the model's."""
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
_LANGUAGE = re.compile(r"\b([a-z]{2,3}) (\d+(?:\.\d+)?)%")
_KINDS = {"lora": "a LoRA adapter", "dora": "a DoRA adapter", "full": "all weights that were trained"}


def write(run_dir: Path, found: dict[str, Any] | None = None) -> Path:
    """Write the card into ``run_dir``, whole or not at all, and return its path. ``found``: `facts.summary`,
    if at hand."""
    write_text(run_dir / CARD, text(run_dir, found))
    return run_dir / CARD


def text(run_dir: Path, found: dict[str, Any] | None = None) -> str:
    """Metadata and text of the card; of the same run directory always the same."""
    found = found or facts.summary(run_dir)
    base, known = _base(found)
    body = [f"# {cell(run_dir.resolve().name)}", "", f"**{cell(found['verdict'])}**", ""]
    for title, section in _sections(run_dir, found, base, known):
        body += [f"## {title}", "", *section, ""]
    return f"---\n{_data(run_dir, found, base, known).to_yaml()}\n---\n\n" + escaped("\n".join(body))


def _data(run_dir: Path, found: Mapping[str, Any], base: str, known: Mapping[str, str]) -> ModelCardData:
    from huggingface_hub import ModelCardData

    settings, results = found["settings"], _results(run_dir, found)
    told = [settings.get("adapter.kind"), settings.get("objective.kind")]
    languages = [name for name, share in _languages(found) if share >= SPOKEN]
    return ModelCardData(
        base_model=known.get("hub"),
        library_name="mlx",
        license=known.get("licence"),
        language=languages or None,
        pipeline_tag="text-generation",
        tags=["mlx", "mlx-lm", "tunesmith", *(str(one) for one in told if one)],
        model_name=escaped(run_dir.resolve().name) if results else None,
        eval_results=results or None,
    )


def _results(run_dir: Path, found: Mapping[str, Any]) -> list[EvalResult]:
    """Each number at the top of the report, as the hub has them: with its interval, its n and the base beside
    it."""
    from huggingface_hub import EvalResult

    results: list[EvalResult] = []
    for one in found["answers"]:
        if not _finite(one["value"]):
            continue
        own, asked, unit = one["data"] == VALID, _asked(found, one), one["unit"] or ""
        held_out = f"{OWN} of the run{asked.removeprefix(OWN)}"
        about = {"low": one["low"], "high": one["high"], "base": words.base(one)}
        about = {
            key: _shown(value, unit) for key, value in about.items() if value is not None and _finite(value)
        }
        about |= {"n": one["n"]} | ({"unit": unit} if unit else {})
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                metric_type=f"{one['task']}.{one['name']}",
                dataset_type="held-out" if own else str(one["task"]),
                dataset_name=held_out if own else f"{escaped(str(one['task']))}, {asked}",
                dataset_config=None if own else one["identity"],
                dataset_revision=sha256(run_dir / VALID) if own and (run_dir / VALID).is_file() else None,
                metric_name=words.title(one),
                metric_value=_shown(one["value"], unit),
                verified=False,
                metric_args=about,
            )
        )
    return results


def _shown(value: float, unit: str) -> float:
    """In its unit: of "%" per cent, as the hub's readers expect, where ours are shares."""
    return round(100 * value, 10) if unit == "%" else value


def _finite(value: Any) -> bool:
    """Facts call what is not finite by its name."""
    return value not in ("nan", "inf", "-inf") and not (isinstance(value, float) and not math.isfinite(value))


def _asked(found: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    """On what, files without their folders; how much of it; and by which checkpoint where that is not the
    card's."""
    task = str(score["task"])
    settings = (
        next((one.get("settings") for one in found["evaluations"] if one["folder"] == score["folder"]), None)
        or {}
    )
    files = score["data"] if isinstance(score["data"], list) else []
    described = about(task)
    if described.files:
        files = settings.get(described.files) or []
    named = ", ".join(PurePath(str(one)).name for one in files) or (
        "unknown rows" if described.asks_rows else "its suite"
    )
    told = [OWN if score["data"] == VALID else named]
    told += (
        [f"{settings['shots']} solved examples"]
        if settings.get("shots") and task.startswith("benchmark.")
        else []
    )
    if settings.get("limit"):
        told.append(
            f"{settings['limit']}, evenly by kind"
            if task.startswith("drift.")
            else f"first {settings['limit']}"
        )
    other = str(score["checkpoint"] or "").lstrip("0")
    return ", ".join(
        [*told, *([f"checkpoint of step {other}"] if other and other != str(evidence.best(found)) else [])]
    )


def _base(found: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """What the base is called; and, as far as known, its name on the ``hub`` and its ``licence``."""
    path = str(found["settings"].get("model.path") or "")
    local = Path(path).expanduser()
    known: dict[str, str] = {}
    if path.endswith(".gguf"):
        known = _gguf(local) if local.is_file() else {}
    elif not local.exists() and _HUB.fullmatch(path):
        known = {"hub": path}
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(path, "README.md", revision=found["settings"].get("model.revision"))
        known |= _licence(Path(card)) if isinstance(card, str) else {}
    elif local.is_dir():
        known = _licence(local / "README.md")
    return known.get("hub") or PurePath(path).name or "unknown", known


def _gguf(path: Path) -> dict[str, str]:
    """What a GGUF file says of itself."""
    from tunesmith.model import gguf

    try:
        told = gguf.texts(path)
    except ModelError:  # the run was made from it, so it is another file now
        return {}
    licence = told.get("general.license", "")
    hub = told.get("general.base_model.0.repo_url", "").partition("huggingface.co/")[2].strip("/")
    known = {"licence": licence} if _LICENCE.fullmatch(licence) else {}
    return known | ({"hub": hub} if _HUB.fullmatch(hub) else {})


def _licence(card: Path) -> dict[str, str]:
    """The licence that the front matter of a model card names."""
    try:
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8"), re.DOTALL)
        found = yaml.safe_load(front[1]) if front else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    licence = found.get("license") if isinstance(found, dict) else None
    return {"licence": licence} if isinstance(licence, str) and _LICENCE.fullmatch(licence) else {}


def _languages(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Languages of the rows with their shares, as far as the audit told them."""
    findings = (found["audit"] or {}).get("findings", ())
    said = next(
        (
            one["what"]
            for one in findings
            if one["rule"] == "content.languages" and "languages of" in one["what"]
        ),
        "",
    )
    return [(name, float(share) / 100) for name, share in _LANGUAGE.findall(said.partition(": ")[2])]


def _sections(
    run_dir: Path, found: Mapping[str, Any], base: str, known: Mapping[str, str]
) -> Iterator[tuple[str, list[str]]]:
    settings, manifest = found["settings"], found["manifest"]
    yield "What it is", list(_what(found, base, known))
    yield (
        "Intended use",
        [
            "Who trained it has not stated one. It answers as the rows under Data do; of other uses nothing is known."
        ],
    )
    keys = [*_MATTER, *(key for key in found["settings_given"] if key not in _MATTER)]
    rows = [
        (key, _setting(key, settings[key]))
        for key in keys
        if settings.get(key) is not None and not key.startswith("audit.")
    ]
    done, planned = found["updates"]["done"], found["updates"]["planned"]
    text = (
        f"{done:,} updates"
        + (f" of {planned:,}" if planned not in (None, done) else "")
        + f"; the run is {found['status']}."
    )
    yield (
        "How it was trained",
        [text, "", *(table(("setting", "value"), rows) if rows else ["Its settings are unknown."])],
    )
    yield "Data", list(_rows(found))
    parts = {True: [], False: []}
    for one in found["answers"]:
        parts[one["question"] in ("retention", "safety")].append(one)
    evaluate = f"tunesmith evaluate {_name(run_dir)}"
    yield "Results", _scores(found, parts[False], evaluate)
    yield "Retention and safety", _scores(found, parts[True], f"{evaluate} --task drift")
    yield (
        "Limits",
        [f"- {cell(one)}" for one in found["limits"]]
        or ["None is known, which does not mean that there is none."],
    )
    yield "How to use it", list(_use(run_dir, found, base))
    again = f"{_name(run_dir)}-again"
    lines = [f"tunesmith train --config {_name(run_dir)}/config.yaml --out {again}"]
    lines += [f"tunesmith evaluate {again}"] if found["scores"] else []
    hashes = table(("what", "hash"), ((PurePath(key).name, value) for key, value in _hashes(manifest)))
    yield (
        "How to make it again",
        [*fence("\n".join(lines), "sh"), "", "From the same data, template and base:", "", *hashes],
    )
    yield "Environment", list(_environment(found))


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
        some = value if isinstance(value, list) else [value]
        return ", ".join(
            one if _HUB.fullmatch(str(one)) else PurePath(str(one)).name for one in map(str, some)
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _what(found: Mapping[str, Any], base: str, known: Mapping[str, str]) -> Iterator[str]:
    kind = str(found["settings"].get("adapter.kind", ""))
    text = f"It is {_KINDS.get(kind, 'an adapter of unknown kind')} for {cell(base)}"
    if version := found["manifest"].get("versions", {}).get("tunesmith"):
        text += f", made by tunesmith {cell(version)}"
    if found["weights"]:
        text += ": {trainable:,} of {total:,} weights were trained".format(**found["weights"])
    kept = found["checkpoints"]
    yield text + (
        f". Its checkpoint is that of step {evidence.best(found):,}."
        if kept
        else ". It has no checkpoint yet."
    )
    yield ""
    licence, languages = known.get("licence"), _languages(found)
    yield (
        f"- Licence of the base: {cell(licence)}."
        if licence
        else "- Licence: unknown; the base names none that could be read."
    )
    spoken = ", ".join(f"{name} {share:.0%}" for name, share in languages)
    yield (
        f"- Languages of the rows: {spoken}."
        if languages
        else "- Languages: unknown; the audit did not tell them."
    )
    if not known.get("hub"):
        yield "- The base's name on the hub is unknown, so the metadata names none."
    if found["manifest"].get("lineage"):
        yield "- It goes on from another adapter, see `manifest.json`."


def _rows(found: Mapping[str, Any]) -> Iterator[str]:
    counts = found["counts"]
    hashed = found["manifest"].get("hashes", {}).get("data", {})
    if not counts and not hashed:
        yield "Unknown."
        return
    if hashed:
        yield from [
            *table(("file", "SHA-256"), ((PurePath(path).name, value) for path, value in hashed.items())),
            "",
        ]
    named = {
        "rows_read": "rows read",
        "rows_train": "learned from",
        "rows_valid": "held out",
        "tokens": "tokens",
        "supervised_tokens": "of these learned",
    }
    yield (
        ", ".join(
            f"{counts[key]:,} {name}" for key, name in named.items() if isinstance(counts.get(key), int)
        )
        + "."
    )
    left_out = flat({"": counts.get("rows_dropped") or {}})
    if left_out:
        told = ", ".join(f"{key.lstrip('.')} {count:,}" for key, count in left_out.items())
        yield from ["", f"Left out: {cell(told)}."]
    audit = found["audit"]
    if not audit:
        yield from ["", "The rows were not audited."]
        return
    rows = [
        (
            one["rule"],
            one["severity"],
            f"{one['count']:,} of {one['of']:,} rows" if one["count"] else "the whole set",
        )
        for one in audit["findings"]
        if one["severity"] in ("error", "warning") or one["accepted"]
    ]
    yield from [
        "",
        f"Audit of {audit['rows']:,} rows: {len(rows) or 'no'} finding{'s' * (len(rows) != 1)} to look at.",
    ]
    if rows:
        yield from ["", *table(("finding", "severity", "concerns"), rows)]


def _scores(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], command: str) -> list[str]:
    """``command``: what would measure them."""
    if not rows:
        return ["Not measured. This does:", "", *fence(command, "sh")]
    head = ("what", "base", "tuned, 95 % interval", "difference, 95 % interval", "n", "answer", "asked")
    lines = table(
        head,
        (
            (
                words.title(one),
                words.interval(one, of="base"),
                words.interval(one),
                words.interval(one, of="delta"),
                one["n"],
                evidence.answer(one),
                _asked(found, one),
            )
            for one in rows
        ),
    )
    alone = [one for one in rows if one["delta"] is None]
    if len(alone) == len(rows):
        return ["The base was not asked, so nothing is compared.", "", *lines]
    both = "Where a base is shown, both" if alone else "Both"
    return [f"{both} sides were asked the same; verdicts are corrected for their number.", "", *lines]


def _name(run_dir: Path) -> str:
    return shlex.quote(run_dir.resolve().name)


def _use(run_dir: Path, found: Mapping[str, Any], base: str) -> Iterator[str]:
    kept, settings = found["checkpoints"], found["settings"]
    if not kept:
        yield "There is nothing to use yet: no checkpoint was saved."
        return
    run, path = _name(run_dir), str(settings.get("model.path"))
    lines = [f"tunesmith chat {run}", f"tunesmith generate {run} --prompt 'Hello'"]
    why = "the base is a GGUF file" if path.endswith(".gguf") else ""
    why = why or ("the base was quantised while it was loaded" if settings.get("model.quantize") else "")
    why = why or ("another adapter is merged into the base" if settings.get("model.adapter") else "")
    if not why:
        adapter = f"{run}/checkpoints/{evidence.best(found):06d}"
        lines.append(f"mlx_lm.generate --model {shlex.quote(base)} --adapter-path {adapter} --prompt 'Hello'")
    yield from fence("\n".join(lines), "sh")
    if why:
        yield from ["", f"`mlx_lm.generate` alone does not load it: {why}."]


def _hashes(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of data, template and base; files keep their dots."""
    hashes = manifest.get("hashes", {})
    return [
        *hashes.get("data", {}).items(),
        *((key, str(value)) for key, value in hashes.items() if key != "data"),
    ]


def _environment(found: Mapping[str, Any]) -> Iterator[str]:
    manifest, spent, peak = found["manifest"], found["time"], found["memory_peak"]
    told = flat(manifest.get("machine") or {}) | flat(manifest.get("versions") or {})
    rows = [(key, str(value)) for key, value in told.items() if value is not None]
    rows += [("created", manifest["created"])] if manifest.get("created") else []
    rows += [("updates took", duration(spent["training_s"]))] if spent["training_s"] else []
    rows += [("whole run took", duration(spent["seconds"]))] if spent["seconds"] else []
    rows += [(f"most memory, {name}", size(n_bytes)) for name, n_bytes in peak.items()]
    yield from table(("what", "measured"), rows) if rows else ["Unknown."]
    yield from ["", "Emissions were not measured."]
