"""The lineage of a run: what it was made from, and what was made from it, wherever the folders are now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from runs import planted
from typer.testing import CliRunner

from tunesmith.cli import app
from tunesmith.errors import DataError
from tunesmith.runs import ancestry


@pytest.fixture
def folder(tmp_path) -> Path:
    """a, from which b starts; c starts from b; d stands alone."""
    runs = tmp_path / "runs"
    a = planted.run(runs / "a", steps=(10, 20))
    b = planted.run(runs / "b", start=a / "checkpoints" / "000010")
    planted.run(runs / "c", start=b / "checkpoints" / "000010")
    planted.run(runs / "d")
    return runs


def shape(children: tuple[ancestry.Child, ...]) -> dict:
    return {child.run.name: shape(child.children) for child in children}


def test_both_directions_are_followed(folder):
    found = ancestry.lineage(folder / "b")
    assert [parent.run.name for parent in found.parents] == ["a"]
    assert shape(found.children) == {"c": {}}
    assert shape(ancestry.lineage(folder / "a").children) == {"b": {"c": {}}}
    assert [parent.run.name for parent in ancestry.lineage(folder / "c").parents[0].parents] == ["a"]
    alone = ancestry.lineage(folder / "d")
    assert (alone.parents, alone.children) == ((), ())


def test_the_step_that_is_used_is_named(folder):
    (child,) = ancestry.lineage(folder / "a").children
    assert (child.relation, child.step) == ("start", "000010")


def test_a_run_that_was_moved_is_known_by_its_adapter(folder):
    (folder / "a").rename(folder / "renamed")
    assert shape(ancestry.lineage(folder / "renamed").children) == {"b": {"c": {}}}


def test_an_ancestor_that_was_removed_is_still_named(folder):
    shutil.rmtree(folder / "a")
    result = CliRunner().invoke(app, ["runs", "show", str(folder / "c")], catch_exceptions=False)
    assert "starts from" in result.stdout and str(folder / "a") in result.stdout
    assert "no longer there" in result.stdout


def test_a_run_without_a_readable_manifest_is_related_by_its_settings(folder):
    (folder / "b" / "manifest.json").write_text("{")
    assert shape(ancestry.lineage(folder / "a").children) == {"b": {"c": {}}}


def test_runs_that_use_each_other_are_shown_once(folder):
    manifest = json.loads((folder / "a" / "manifest.json").read_text())
    manifest["lineage"] = {"start": {"checkpoint": str(folder / "c" / "checkpoints" / "000010")}}
    (folder / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert shape(ancestry.lineage(folder / "a").children) == {"b": {"c": {}}}
    manifest["lineage"]["merged"] = {"checkpoint": str(folder / "d" / "checkpoints" / "000010")}
    (folder / "a" / "manifest.json").write_text(json.dumps(manifest))
    assert shape(ancestry.lineage(folder / "d").children) == {"a": {"b": {"c": {}}}}


def test_the_sources_of_a_composition_are_its_parents(folder):
    mixture = planted.run(folder / "mix", status="composed", start=folder / "a" / "checkpoints" / "000010")
    manifest = json.loads((mixture / "manifest.json").read_text())
    a, d = (str(folder / name / "checkpoints" / "000010") for name in ("a", "d"))
    sources = [{"checkpoint": a, "weight": 0.7}, {"checkpoint": d, "weight": -0.3}]
    manifest["lineage"] = {"composed": {"method": "svd", "sources": sources}}
    (mixture / "manifest.json").write_text(json.dumps(manifest))
    parents = ancestry.lineage(mixture).parents
    assert [(parent.run.name, parent.weight) for parent in parents] == [("a", 0.7), ("d", -0.3)]
    assert shape(ancestry.lineage(folder / "d").children) == {"mix": {}}
    text = CliRunner().invoke(app, ["runs", "show", str(mixture)], catch_exceptions=False).stdout
    assert "is composed of -0.3 ×" in text


def test_exports_are_listed_with_what_the_gate_said(folder):
    planted.export(folder / "a", "hf")
    planted.export(folder / "a", "mlx-4bit", accepted=False, folder="mlx-4bit.rejected")
    (folder / "a" / "exports" / "torn").mkdir()
    (folder / "a" / "exports" / "torn" / "export.json").write_text("{")
    exports = ancestry.lineage(folder / "a").exports
    assert [(export.kind, export.accepted) for export in exports] == [("hf", True), ("mlx-4bit", False)]
    text = CliRunner().invoke(app, ["runs", "show", str(folder / "a")], catch_exceptions=False).stdout
    assert "exported to hf" in text and "of checkpoint 000020, accepted" in text and "REJECTED" in text
    assert "damaged" in text and "torn/export.json" in text


@pytest.mark.parametrize(
    "lineage",
    ["x", {"start": 3}, {"start": {}}, {"start": {"checkpoint": None}}, {"composed": {"sources": [1]}}],
)
def test_a_damaged_lineage_is_no_traceback(folder, lineage):
    manifest = json.loads((folder / "b" / "manifest.json").read_text())
    (folder / "b" / "manifest.json").write_text(json.dumps(manifest | {"lineage": lineage}))
    for name in ("a", "b"):
        result = CliRunner().invoke(app, ["runs", "show", str(folder / name)], catch_exceptions=False)
        assert result.exit_code == 0


def test_json_holds_both_directions(folder):
    result = CliRunner().invoke(app, ["runs", "show", str(folder / "b"), "--json"], catch_exceptions=False)
    content = json.loads(result.stdout)
    assert content["name"] == "b" and content["made_from"][0]["relation"] == "start"
    assert content["used_by"][0]["path"] == str(folder / "c")


def test_what_is_not_a_run_is_an_error(folder):
    with pytest.raises(DataError, match="not a run"):
        ancestry.lineage(folder)
