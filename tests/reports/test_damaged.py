"""A run folder with any file damaged is read, or refused by an error of ours, never a traceback."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tunesmith import reports
from tunesmith.errors import TunesmithError
from tunesmith.reports import live
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

RUN = Path(__file__).parents[1] / "fixtures" / "runs-0.1.0" / "sft-lora"
DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "a folder": None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda content: b"[]",
    "no keys": lambda content: b"{}",
    "a number": lambda content: b"7",
    "a text for a value": lambda content: content.replace(b": ", b': "x", "y": ', 1),
    "lists for objects": lambda content: re.sub(rb": \{[^{}]*\}", b": [3]", content),
    "null for numbers": lambda content: content.replace(b"true", b"null").replace(b"0", b"null"),
}


@pytest.mark.real
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_damaged_is_read_or_refused(tmp_path, damage):
    names = [path.relative_to(RUN) for path in RUN.rglob("*") if path.is_file()]
    assert len(names) > 15
    for name in names:
        run = Path(shutil.copytree(RUN, tmp_path / "run"))
        change = DAMAGES[damage]
        content = (run / name).read_bytes()
        (run / name).unlink()
        if change is None:
            (run / name).mkdir()
        else:
            (run / name).write_bytes(change(content))
        verbs: list[Callable[[], object]] = [
            lambda run=run: reports.to_json(reports.summarise(run)),
            lambda run=run: live.watch(run, io.StringIO(), once=True),
            lambda run=run: checkpoints.choose(Run.open(run)),
            lambda run=run: (Run.open(run).hashes, Run.open(run).config),
        ]
        for verb in verbs:
            with suppress(TunesmithError):
                verb()
        shutil.rmtree(run)
