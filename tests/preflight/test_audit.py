"""An audit leaves a page only of what was done."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith.auditing import fix
from tunesmith.errors import ConfigError


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello there"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.mark.parametrize("before", [False, True], ids=["new page", "older page"])
def test_a_copy_that_cannot_get_its_name_leaves_no_new_page(tmp_path, monkeypatch, before):
    data, page, out = rows(tmp_path), tmp_path / "audit.html", tmp_path / "out.jsonl"
    if before:
        tunesmith.audit(data, page=page, sets=["data.valid=0"])

    def full(*_paths: object) -> None:
        assert page.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fix, "_publish", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        tunesmith.audit(data, fix=out, page=page, sets=["data.valid=0"])
    assert not out.exists() and page.exists() == before


def test_the_page_of_a_copy_stays(tmp_path):
    data, page, out = rows(tmp_path), tmp_path / "audit.html", tmp_path / "out.jsonl"
    tunesmith.audit(data, fix=out, page=page, sets=["data.valid=0"])
    assert out.exists() and page.exists()


def test_mixed_files_are_audited_with_the_task_and_not_copied(tmp_path):
    data = rows(tmp_path)
    general = tmp_path / "general.jsonl"
    general.write_text(data.read_text())
    sets = ["data.valid=0", f"data.mix=[{{path: {general}, share: 0.5}}]"]
    found = tunesmith.audit(data, sets=sets)
    assert found.rows == 2 and "duplicates" in {
        finding.dimension for finding in found.findings if finding.rows
    }
    fixed = tunesmith.audit(data, fix=tmp_path / "out.jsonl", sets=sets)
    assert fixed.rows == 1
