"""docs/reference/ is what the source says, and leaves nothing out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

import tiny
import tunesmith
from tunesmith.auditing.registry import Rule
from tunesmith.cli import app
from tunesmith.cli.examples import EXAMPLES
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec
from tunesmith.data.layout import layouts
from tunesmith.reports import verdict
from tunesmith.runs.config import RunConfig
from tunesmith.settings.config import meanings

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def reference() -> Iterator[ModuleType]:
    """The program that writes the pages, .ci/reference."""
    from importlib.util import module_from_spec, spec_from_file_location

    folder = ROOT / ".ci" / "reference"
    spec = spec_from_file_location("reference", folder / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


def test_every_page_is_what_the_source_says(reference):
    """If this fails: make reference."""
    assert reference.stale(FOLDER, write=False) == []
    assert len(list(FOLDER.glob("*.md"))) >= 9


def test_a_stale_a_missing_and_a_foreign_page_are_found_and_put_right(reference, tmp_path):
    for path in FOLDER.glob("*.md"):
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    (tmp_path / "events.md").write_text("old", "utf-8")
    (tmp_path / "http.md").unlink()
    (tmp_path / "foreign.md").write_text("mine", "utf-8")
    assert reference.stale(tmp_path, write=True) == ["events.md", "foreign.md", "http.md"]
    assert reference.stale(tmp_path, write=False) == []


def test_every_setting_says_its_effect_and_when_to_change_it():
    settings = meanings(RunConfig)
    page = (FOLDER / "settings.md").read_text("utf-8")
    for setting in settings:
        assert setting.effect and setting.when, setting.key
        assert f"- when to change it: {setting.when.split('`')[0].split('_')[0]}" in page, setting.key
    assert len(settings) >= 100
    filled = tunesmith.init(model="m", data=["d"])
    assert filled.count("when to change it: ") >= 80


def test_every_key_of_a_complete_configuration_is_a_setting():
    known = {setting.key for setting in meanings(RunConfig)}
    config = tunesmith.configure(model="m", data=["d"]).spec.model_dump()
    keys = {f"{block}.{key}" for block, values in config.items() for key in values}
    assert {
        key.replace("objective.kind", "objective").replace("adapter.kind", "adapter") for key in keys
    } <= known


def test_every_verb_has_examples_that_the_command_line_takes():
    root = typer.main.get_command(app)
    assert EXAMPLES.keys() == root.commands.keys()  # type: ignore[attr-defined]
    count = 0
    for verb, lines in EXAMPLES.items():
        for line in lines:
            program, *words = shlex.split(re.split(r" [<>] ", line)[0])
            context = root.make_context(program, list(words))
            assert words[0] == verb
            name, command, rest = root.resolve_command(context, words)  # type: ignore[attr-defined]
            command.make_context(name, rest, parent=context)
            count += 1
    assert count >= 35


def test_the_example_of_every_layout_is_read_as_it(tmp_path):
    for layout in layouts().values():
        rows = layout.example.splitlines()
        assert rows, layout.name
        path = tmp_path / f"{layout.name}.jsonl"
        path.write_text(layout.example)
        read = formats.read([path], DataSpec(train=(str(path),), format=layout.name))
        assert (len(read.examples), read.dropped) == (len(rows), []), layout.name
        assert all(set(layout.keys) <= json.loads(row).keys() for row in rows)


def test_every_code_of_a_reason_in_the_source_has_a_meaning():
    text = Path(verdict.__file__).read_text("utf-8")
    given = set(re.findall(r'Reason\("(\w+)"|_reason\("(\w+)"|code = "(\w+)" if .* else "(\w+)"', text))
    codes = {code for found in given for code in found if code}
    assert len(codes) >= 18 and codes <= verdict.CODES.keys()


def test_a_finding_graver_than_its_rule_states_is_refused():
    from tunesmith.auditing.findings import Finding

    class Mild(Rule):
        name, findings, otherwise = "mild", {"small": "a small thing", "large": ""}, "others"
        gravest = {"small": "note"}  # noqa: RUF012

    assert Mild.allows(Finding("mild.small", "note", "")) and Mild.allows(Finding("mild.small", "good", ""))
    assert not Mild.allows(Finding("mild.small", "warning", ""))
    assert Mild.allows(Finding("mild.large", "warning", "")) and not Mild.allows(
        Finding("mild.x", "error", "")
    )


def test_every_file_of_a_run_is_on_the_page_of_the_run_directory(reference, tiny_model, tmp_path):
    import run_pages  # of .ci/reference

    labelled = [row | {"label": place % 2 == 0} for place, row in enumerate(tiny.conversations(24))]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", labelled)
    sets = ["loop.steps=2", "loop.samples=0", "data.order=difficulty", "objective.kind=kto"]
    sets.append("loop.tensorboard=true")
    config = tunesmith.configure(
        model=str(tiny_model), data=[str(rows)], sets=[*sets, "loop.tensorboard=true"]
    )
    run = tunesmith.train(config, out=tmp_path / "runs" / "a")
    tunesmith.evaluate(run.path, tasks=["perplexity"])
    tunesmith.export(run.path, to="mlx", rows=1)
    tunesmith.tag(run.path, "mine:1")
    paths = [path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()]
    unknown = [path for path in paths if not any(file.matches(path) for file in run_pages.FILES)]
    assert unknown == []
    absent = [file.name for file in run_pages.FILES if not any(map(file.matches, paths)) and not file.when]
    assert absent == []
