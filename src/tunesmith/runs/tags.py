"""Names for runs, as ``mytool:2``: kept in the run, in ``tags.json``, and understood wherever a run is asked.

A tag names one run under ``./runs`` and the current folder; of a run outside of them, one under
`search.around`. It is looked for under ``./runs``, then under the current folder; or under the folder before
it: ``experiments/mytool:2``. A path that exists is never taken for a tag."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from typing_extensions import TypedDict

from tunesmith.errors import ConfigError, DataError
from tunesmith.files import distinct, read_json, write_json
from tunesmith.runs.search import DEPTH, FOLDER, around, folders

TAGS = "tags.json"
_TAG = re.compile(r"[A-Za-z0-9][\w.-]{0,99}:[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


class Tags(TypedDict):
    """``tags.json``."""

    tags: list[str]


def find(target: str | Path) -> Path:
    """The folder that ``target`` names: a path, or the run with this tag. Raises DataError if no run has the
    tag, or more than one."""
    path = Path(target)
    if _exists(path) or not _TAG.fullmatch(path.name):
        return path
    tag, place = path.name, path.parent
    holders = _holders(_runs(Path(FOLDER)), tag) if place == Path() else []
    holders = holders or _holders(_runs(place), tag)
    if len(holders) == 1:
        return holders[0]
    if holders:
        names = " and ".join(map(str, holders))
        last = shlex.quote(str(holders[-1]))
        hint = f"name the folder, or take it from one: tunesmith tag {last} {tag} --remove"
        raise DataError(f"the tag is ambiguous: {names} have it", where=str(target), hint=hint)
    hint = f"tunesmith runs --folder {shlex.quote(str(place))} lists the runs with their tags"
    under = "the current folder" if place == Path() else str(place)
    raise DataError(f"no run under {under} has this tag", where=str(target), hint=hint)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _runs(folder: Path) -> list[Path]:
    return folders(folder) if folder.is_dir() else []


def _searched(run: Path) -> list[Path]:
    """The folders under which a tag of ``run`` names one run."""
    place = around(run)
    return [Path(FOLDER), place] if place == Path() else [place]


def _holders(runs: Iterable[Path], tag: str) -> list[Path]:
    """The runs that have the tag. A damaged list of tags names none."""
    holders: list[Path] = []
    for run in runs:
        with suppress(DataError):
            if tag in read(run):
                holders.append(run)
    return holders


def read(run: Path) -> list[str]:
    """The tags of a run. Raises DataError if they cannot be read."""
    path = run / TAGS
    if not os.path.lexists(path):
        return []
    hint = f"remove the file, and tag the run again: tunesmith tag {shlex.quote(str(run))} NAME:VERSION"
    return read_json(path, Tags, DataError, hint)["tags"]


def add(run: Path, tag: str, *, move: bool = False) -> None:
    """Give the run a tag. ``move``: take it from the run that has it. Raises DataError if another run around
    it has it, or no search would find the run, ConfigError if it is not a tag."""
    if not _TAG.fullmatch(tag):
        hint = "a name and a version, of letters, digits, '.', '-' and '_': mytool:2"
        raise ConfigError(f"{tag!r} is not a tag", where="tag", hint=hint)
    with _alone(run):
        place = around(run)
        listed = dict.fromkeys(other for folder in _searched(run) for other in _runs(folder))
        runs = distinct(list(listed), place)
        if not any(other.samefile(run) for other in runs):
            raise _out_of_reach(run, place, tag)
        others = [other for other in _holders(runs, tag) if not other.samefile(run)]
        if others and not move:
            hint = f"take it from there: tunesmith tag {shlex.quote(str(run))} {tag} --move"
            raise DataError(f"{others[0]} has the tag {tag}", where=str(run), hint=hint)
        # First given, then taken: if the process dies between the two, both have it and none has lost it.
        if tag not in (tags := read(run)):
            _write(run, [*tags, tag])
        for other in others:
            _write(other, [name for name in read(other) if name != tag])


def _out_of_reach(run: Path, place: Path, tag: str) -> DataError:
    above, name = (shlex.quote(text) for text in (str(run.resolve().parent), run.resolve().name))
    under = "the current folder" if place == Path() else str(place)
    what = f"the tag would not be found under {under}: runs are looked for {DEPTH} folders deep, "
    what += "not in hidden folders and not inside other runs"
    hint = f"move the run nearer, or use the tag from the folder above it: cd {above} && "
    return DataError(what, where=str(run), hint=f"{hint}tunesmith tag {name} {tag}")


def remove(run: Path, tag: str) -> None:
    """Take a tag from the run. Raises DataError if it has no such tag."""
    with _alone(run):
        tags = read(run)
        if tag not in tags:
            hint = f"it has {', '.join(tags)}" if tags else "it has no tags"
            raise DataError(f"has no tag {tag}", where=str(run), hint=hint)
        _write(run, [name for name in tags if name != tag])


def _write(run: Path, tags: list[str]) -> None:
    try:
        write_json(run / TAGS, Tags(tags=tags))
    except OSError as error:
        hint = "make the run's folder writable, and the disk not full"
        raise DataError(f"cannot be written: {error.strerror}", where=str(run / TAGS), hint=hint) from error


@contextmanager
def _alone(run: Path) -> Iterator[None]:
    """Let one process at a time change tags around ``run``, whatever the current folder of each.

    What two processes search overlaps if a folder of one lies in a folder of the other. So the searched
    folders are locked exclusively, and those above them are shared; from the top, so that two processes never
    wait for each other."""
    import fcntl

    searched = {folder.resolve() for folder in _searched(run)}
    above = {parent for folder in searched for parent in folder.parents}
    with ExitStack() as handles:
        for folder in sorted(searched | above):
            with suppress(OSError):  # no such folder, no permission, or a file system without locks
                handle = os.open(folder, os.O_RDONLY)
                handles.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX if folder in searched else fcntl.LOCK_SH)
        yield
