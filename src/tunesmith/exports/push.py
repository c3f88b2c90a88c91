"""``tunesmith.push``: an accepted artefact and the run's model card, to a repository of a Hugging Face hub.

MLX is not loaded. Not pushed are the record of the export and whatever holds rows of the data: the record
names folders of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from tunesmith import events
from tunesmith.errors import ConfigError, DataError, ExportError
from tunesmith.events import Notice, Sink
from tunesmith.exports.spelling import full_name
from tunesmith.runs import artefacts
from tunesmith.runs.artefacts import RECORD
from tunesmith.runs.directory import EXPORTS, Run
from tunesmith.settings.origins import JSON

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD, README = "model_card.md", "README.md"
WITH_DATA = {"cluster": "it holds the rows of the training data"}
"""Kinds that are never pushed, and why."""


class PushedFile(TypedDict):
    """``path``: in the repository. ``bytes``: its size."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Pushed:
    """What went to ``repository``, or would go. ``why_not``: why nothing went, or None if it did. ``url``: of
    the commit."""

    repository: str
    kind: str
    private: bool
    files: tuple[PushedFile, ...]
    why_not: str | None
    url: str | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file["bytes"] for file in self.files)

    def to_json(self) -> dict[str, JSON]:
        return {**asdict(self), "size_bytes": self.size_bytes}


def push(
    run: str | Path,
    *,
    to: str,
    kind: str = "peft",
    private: bool = True,
    dry_run: bool = False,
    notify: Sink = events.silent,
) -> Pushed:
    """Commit the run's export ``kind`` with its model card to the repository ``to`` ("you/name"), which is
    made if it does not exist.

    Nothing is sent if ``dry_run``, or if HF_HUB_OFFLINE is set; the result then lists what would go. The
    token is that of HF_TOKEN or of ``hf auth login``, the hub that of HF_ENDPOINT. private: only for a
    repository that is made. Raises ExportError if there is no accepted export or the hub refuses, ConfigError
    for a name that no repository can have."""
    from huggingface_hub import HfApi, constants, get_token

    _require_name(to)
    kind = full_name(kind)
    folder = _artefact(Run.open(run).path, kind)
    sources = _files(Run.open(run).path, folder)
    listed = tuple(PushedFile(path=name, bytes=path.stat().st_size) for name, path in sources.items())
    for doubt in _doubts(folder):
        notify(doubt)
    why_not = "a dry run" if dry_run else "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
    if why_not is not None:
        return Pushed(to, kind, private, listed, why_not)
    if get_token() is None:
        hint = "set HF_TOKEN, or run: hf auth login; --dry-run lists what would be pushed"
        raise ExportError("no token of the hub is set", where=to, hint=hint)
    notify(Notice(f"pushing {len(listed)} files to {to}"))
    url = _commit(HfApi(), to, sources, private, f"Add {kind} export of {Run.open(run).path.resolve().name}")
    return Pushed(to, kind, private, listed, None, url)


def _require_name(repository: str) -> None:
    """Raises ConfigError for a name that no repository can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a repository", where="--to", hint="USER/NAME") from error


def _artefact(run: Path, kind: str) -> Path:
    """The folder of the export. Raises ExportError if there is none that was accepted, ConfigError if
    ``kind`` is a path."""
    if "/" in kind:
        hint = "the name of an export of the run, such as peft or mlx:4"
        raise ConfigError(f"{kind!r} is not a kind of export", where="--kind", hint=hint)
    if kind in WITH_DATA:
        raise ExportError(
            f"{kind} is not pushed: {WITH_DATA[kind]}", where=str(run), hint="--kind peft, or hf"
        )
    folder = run / EXPORTS / kind
    again = f"tunesmith export {run} --to {kind}"
    accepted = [artefact for artefact in artefacts.read(run)[0] if artefact.accepted]
    if not (folder / RECORD).is_file():
        exports = ", ".join(artefact.path.name for artefact in accepted)
        there = f"; there are: {exports}" if exports else ""
        raise ExportError(f"has no export {kind} that was accepted{there}", where=str(run), hint=again)
    artefact = artefacts.load(folder)
    if not artefact.accepted:
        reasons = "; ".join(artefact.reasons)
        raise ExportError(f"the export was rejected: {reasons}", where=str(folder), hint=again)
    return folder


def _files(run: Path, folder: Path) -> dict[str, Path]:
    """Path in the repository → file. The model card takes the place of a README. Raises DataError if there is
    no card."""
    card = run / CARD
    if not card.is_file():
        raise DataError("is missing", where=str(card), hint=f"write it: tunesmith report {run}")
    files = {README: card}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and name not in (RECORD, README):
            files[name] = path
    return files


def _doubts(folder: Path) -> Sequence[Notice]:
    """What the artefact says of this machine, and nobody else can use."""
    path = folder / "adapter_config.json"
    try:
        base = json.loads(path.read_text("utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return []
    if not isinstance(base, str) or not os.path.isabs(base):
        return []
    hint = "those who load it must name the base themselves; a run on a model of the hub names it"
    return [Notice(f"{path.name} names the base by a folder: {base}", level="warning", hint=hint)]


def _commit(api: HfApi, repository: str, files: dict[str, Path], private: bool, message: str) -> str:
    """Make the repository if need be, and add the files in one commit. Returns its address. Raises
    ExportError."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, by its version
    )

    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return api.create_commit(name, operations, commit_message=message).commit_url
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = "the token needs the right to write to it" if status in (401, 403) else "try again later"
        what = (error.server_message or str(error)).strip().splitlines()[0]
        raise ExportError(f"the hub refused: {status} {what}", where=repository, hint=hint) from error
    except ValueError as error:
        raise ExportError(f"the answer of the hub cannot be read: {error}", where=repository) from error
    except (HTTPError, OSError) as error:
        hint = "are you online? --dry-run lists what would be pushed"
        message = f"the hub at {api.endpoint} cannot be reached: {error or type(error).__name__}"
        raise ExportError(message, where=repository, hint=hint) from error
