"""Files and folders that are written whole or not at all, and are on the disk when the call returns; and JSON
that is checked against a type when it is read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_DRAFT = re.compile(r"\.(?P<pid>\d+)-(?P<system>[0-9a-f]{8})[0-9a-f]{8}\.(?P<name>.+)")
_NAMELESS = re.compile(r"\.[0-9a-f]{8}\.(?P<name>.+)|\.(?P<before>.+)\.[0-9a-f]{8}")
"""A draft of 0.1.0, which does not name its process."""
_LATE_S = 60.0
"""A draft that does not name its process is abandoned if nothing in it has changed for so long."""
_LATE_ELSEWHERE_S = 3600.0
"""The same for a draft of another container, another machine or before a restart, whose process cannot be
looked up."""
_open: set[Path] = set()
"""The drafts that this process is writing."""


def draft_name(path: Path) -> Path:
    """A free hidden name beside ``path``, which names this process. MLX and matplotlib go by the suffix, so
    that the name of ``path`` stays last."""
    return path.with_name(f".{os.getpid()}-{_system()}{uuid.uuid4().hex[:8]}.{path.name}")


@cache
def _system() -> str:
    """Eight hex digits of what gives processes their numbers: this machine since it started, and on Linux the
    container."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text("ascii") + os.readlink(
            "/proc/self/ns/pid"
        )
    except OSError:  # not Linux
        import psutil

        identity = f"{uuid.getnode()} {psutil.boot_time():.0f}"
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


@contextmanager
def draft(path: Path) -> Iterator[Path]:
    """Give a free name beside ``path``, at which the body creates a file or a folder. It is flushed and
    renamed to ``path`` when the body ends, or removed if the body raises."""
    temporary = draft_name(path)
    _open.add(temporary.absolute())
    try:
        yield temporary
        is_folder = temporary.is_dir()
        for file in [part for part in temporary.rglob("*") if part.is_file()] if is_folder else [temporary]:
            flush(file)
        temporary.rename(path)
        if is_folder:
            flush(path.parent)
    finally:
        _open.discard(temporary.absolute())
        remove(temporary)


@contextmanager
def workspace(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` for what is needed until ``path`` is written. It is removed at the end;
    if the process is killed, `remove_drafts` removes it."""
    folder = draft_name(path)
    _open.add(folder.absolute())
    try:
        folder.mkdir()
        yield folder
    finally:
        _open.discard(folder.absolute())
        remove(folder)


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_drafts(folder: Path, of: str | None = None) -> None:
    """Remove what processes that have ended left unfinished in ``folder``: all drafts, or those ``of`` one
    name."""
    if not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        if (match := _DRAFT.fullmatch(path.name)) is not None:
            here = match["system"] == _system()
            abandoned = _has_ended(int(match["pid"]), path) if here else _is_older(path, _LATE_ELSEWHERE_S)
            name = match["name"]
        elif (match := _NAMELESS.fullmatch(path.name)) is not None:
            name, abandoned = match["name"] or match["before"], _is_older(path, _LATE_S)
        else:
            continue
        if abandoned and of in (None, name):
            with suppress(OSError):  # the folder may be read-only
                remove(path)


def _has_ended(pid: int, draft: Path) -> bool:
    """Whether the process of this system that writes ``draft`` is gone."""
    if pid == os.getpid():  # of an earlier process with this number
        return draft.absolute() not in _open
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _is_older(draft: Path, seconds: float) -> bool:
    """Whether nothing in ``draft`` has changed for so long."""
    try:
        changed = [path.lstat().st_mtime for path in (draft, *draft.rglob("*"))]
    except FileNotFoundError:  # it is being written or removed
        return False
    return time.time() - max(changed) > seconds


def is_linked(path: Path, folder: Path) -> bool:
    """Whether a symbolic link leads from ``folder`` to ``path`` below it."""
    return path.resolve() != folder.resolve() / path.relative_to(folder)


def distinct(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Of several paths below ``folder`` to the same place, only one: rather one without a link."""
    chosen: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: is_linked(path, folder)):
        chosen.setdefault(path.resolve(), path)
    retained = set(chosen.values())
    return [path for path in paths if path in retained]


def write_bytes(path: Path, content: bytes) -> None:
    with draft(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_regular(path: Path, most: int = -1) -> bytes:
    """The content of a file, or its first ``most`` bytes. Raises OSError for what is not a regular
    file, such as a pipe, from which reading would not end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read(most)


def read_json(path: Path, kind: type[T], error: type[TunesmithError], hint: str | None) -> T:
    """The JSON of a file as a ``kind``: a dataclass, a TypedDict, or a type such as ``dict[str, str]``.
    Raises ``error`` with the file, the key that is wrong and the hint."""
    try:
        content = read_regular(path)
    except OSError as failure:
        reason = failure.strerror or str(failure)
        raise error(f"cannot be read: {reason}", where=str(path), hint=hint) from failure
    return parse_json(content, kind, str(path), error, hint)


def parse_json(text: bytes, kind: type[T], where: str, error: type[TunesmithError], hint: str | None) -> T:
    """``text`` as a ``kind``. Raises ``error`` as `read_json` does."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise error(f"cannot be read: {failure}", where=where, hint=hint) from failure
    return checked(content, kind, where, error, hint)


def checked(content: object, kind: type[T], where: str, error: type[TunesmithError], hint: str | None) -> T:
    """Parsed JSON as a ``kind``. Raises ``error`` as `read_json` does."""
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_python(content)
    except (ValidationError, RecursionError) as failure:
        problem = _problem(failure) if isinstance(failure, ValidationError) else "nested too deeply"
        raise error(f"cannot be read: {problem}", where=where, hint=hint) from failure


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _problem(error: Any) -> str:
    """The first finding of pydantic, with its key."""
    finding = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in finding["loc"] if not str(part).startswith("function-"))[:200]
    if finding["type"] == "missing":
        return f"the key {key} is missing"
    message = finding["msg"].replace("Input should be", "must be").replace("valid dictionary", "JSON object")
    message = message.replace("an instance of", "of the form of").replace("a dictionary or ", "")
    return f"{key}: {message}" if key else message


def flush(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
