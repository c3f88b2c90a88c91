"""README and docs/ name only what exists: files, functions, verbs, options, links. Their examples run."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections import Counter
from functools import cache
from operator import attrgetter
from pathlib import Path

import click
import mlx.core as mx
import typer
from PIL import Image
from typer.core import TyperGroup
from typer.testing import CliRunner

import tunesmith
from tunesmith.auditing import AuditSpec, registry, survey
from tunesmith.cli import app
from tunesmith.data import formats, layout
from tunesmith.data.formats import DataSpec
from tunesmith.evaluation import tasks
from tunesmith.learning.objective import Objective
from tunesmith.serving.guardrails import guardrail, load_guardrails, screened

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tunesmith"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
LINKED = re.compile(r"\[([^\]]+)\]\([^)]+\)")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*(?:\.(?:py|md|yaml|html|css|sh)|/)")
DOTTED = re.compile(r"(\w+)\.(\w+(?:\.\w+)*)(?:\(.*|[:=].*)?")
VERB = re.compile(r"tunesmith ([a-z]+)\b([^`\n#|;]*)")
WORDS = set("already and cannot trains updates measures adds needs runs did is on".split())
"""What follows "tunesmith" in sentences."""
ENDINGS = {"html", "md", "json", "jsonl", "png", "safetensors", "log", "yaml"}
"""Of files in a run directory, that look like names with a dot."""
EXAMPLES = {"brevity.py", "shouting.py", "riddle.py", "slic.py", "whispering.py"}
FOLDERS = {entry.stem for entry in SOURCE.iterdir() if not entry.name.startswith("_")}
"""The folders and modules of the package."""


@cache
def text(page: Path) -> str:
    return page.read_text("utf-8")


def prose(page: Path) -> str:
    return FENCE.sub("", text(page))


def exists(name: str) -> bool:
    """Whether a file is there, named from the root, from the package, or from a folder of the package."""
    folders = [ROOT, SOURCE, *(folder for folder in SOURCE.iterdir() if folder.is_dir())]
    return any((folder / name).exists() for folder in folders)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one, with or without ``tunesmith.`` before it."""
    parts = ["tunesmith", *name.removeprefix("tunesmith.").split(".")]
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        try:
            attrgetter(".".join(parts[length:]))(value) if parts[length:] else None
        except AttributeError:
            return False
        return True
    return False


def anchors(page: Path) -> list[str]:
    """The anchors that the headings of a page get on GitHub, and on the site (.ci/site.py)."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    plain = [re.sub(r"[^\w\- ]", "", LINKED.sub(r"\1", heading)).lower() for heading in headings]
    return [heading.strip().replace(" ", "-") for heading in plain]


def test_links_and_anchors_resolve():
    count = 0
    for page in PAGES:
        for target in LINK.findall(prose(page)):
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(other), f"{page.name}: {target}: {sorted(anchors(other))}"
            count += 1
    assert count >= 25


def test_no_two_headings_of_a_page_have_one_anchor():
    """GitHub and the site number equal anchors differently."""
    for page in PAGES:
        repeated = [anchor for anchor, count in Counter(anchors(page)).items() if count > 1]
        assert not repeated, f"{page.name}: {repeated}"


def navigation() -> set[Path]:
    """The pages that the site lists beside each page."""
    lines = re.findall(r"^ +- .*: (\S+\.md)$", text(ROOT / "mkdocs.yml"), re.M)
    return {ROOT / "docs" / line for line in lines}


def test_every_page_is_reached_from_the_readme():
    """By links of pages; the first page of the site has the navigation."""
    seen, waiting = set(), [PAGES[0]]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        linked = {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(page))}
        linked |= navigation() if page == ROOT / "docs" / "index.md" else set()
        waiting += [other for other in linked if other in PAGES and other not in seen]
    assert set(PAGES) - seen == set()


def test_files_that_are_named_exist():
    roots = {*FOLDERS, "src", "tests", "docs", "bench", ".ci"}
    count = 0
    for page in PAGES:
        for name in CODE.findall(prose(page)):
            if FILE.fullmatch(name) and name.split("/")[0] in roots and Path(name).name not in EXAMPLES:
                assert exists(name), f"{page.name}: {name}"
                count += 1
    assert count >= 14


def test_functions_and_settings_that_are_named_exist():
    """A name with a dot whose first part is a folder of the package or a part of the settings."""
    schema = json.loads(CliRunner().invoke(app, ["init", "--schema"]).output)
    settings = set(re.findall(r'"(\w+)": \{', json.dumps(schema)))
    first = {*FOLDERS, *schema["properties"], "tunesmith"}
    counts = {"functions": 0, "settings": 0}
    for page in PAGES:
        if page.parent.name == "reference":  # written from the source, also keys of files of sweeps
            continue
        for code in CODE.findall(prose(page)):
            name = DOTTED.fullmatch(code)
            if not name or name[2] in ENDINGS or name[1] not in first:
                continue
            if name[1] in schema["properties"] and name[2] in settings:
                counts["settings"] += 1
            elif not FILE.fullmatch(code):
                assert resolves(f"{name[1]}.{name[2]}"), f"{page.name}: {code}"
                counts["functions"] += 1
    assert counts["functions"] >= 40 and counts["settings"] >= 50, counts


def test_verbs_and_options_exist():
    verbs: dict[str, click.Command] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    count = 0
    for page in PAGES:
        for verb, rest in VERB.findall(text(page)):
            if verb not in verbs:
                assert verb in WORDS, f"{page.name}: tunesmith {verb}"
                continue
            command = verbs[verb]
            if isinstance(command, TyperGroup):  # a verb of verbs, as `runs show`
                command = command.commands.get(rest.split()[0] if rest.split() else "", command)
            options = {name for option in command.params for name in [*option.opts, *option.secondary_opts]}
            for option in re.findall(r"(--[a-z-]+)", rest):
                assert option in options, f"{page.name}: tunesmith {verb} {option}"
                count += 1
    assert count >= 30


def test_the_house_has_the_folders_that_its_page_shows_in_the_order_of_the_layers():
    """errors, events and files are shown in the order in which they are read."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    present = [name for name in reversed(layers) if not name.startswith("(") and name != "__main__"]
    shown = re.findall(r"^(\w+)(?:/|\.py) ", block("# How the code"), re.M)
    assert sorted(shown[:3]) == sorted(present[:3]) == ["errors", "events", "files"]
    assert shown[3:] == [*present[3:], "__init__"]
    assert len(shown) >= 20


def block(heading: str) -> str:
    """The first block of docs/house.md after a heading."""
    page = text(ROOT / "docs" / "house.md")
    match = FENCE.search(page, page.index(heading))
    assert match is not None
    return match[2]


def execute(heading: str) -> None:
    """Run the example below a heading of docs/house.md as a module of its own."""
    exec(compile(block(heading), heading, "exec", dont_inherit=True), {"__name__": "example"})


def test_the_example_of_a_task_is_a_task():
    execute("### A task")
    try:
        assert "| `brevity` | `brevity` | Words an answer | one prompt | lower |" in tasks.table()
        output = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "300"}).output
        assert "brevity" in output
    finally:
        del tasks._REGISTERED["brevity"]


def test_the_example_of_a_rule_finds_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Question {index}?", "completion": "Quiet."} for index in range(9)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "Why?", "completion": "LOUD"}])))
    execute("### A rule")
    try:
        setup = survey.Setup(DataSpec(train=(str(path),)), AuditSpec())
        audit = survey.audit([path], setup, processes=1)
        (finding,) = [finding for finding in audit.findings if finding.rule == "shouting.capitals"]
        assert [row.source for row in finding.rows] == [f"{path}:10"]
        assert "shouting" in registry.table()
    finally:
        registry.unregister("shouting")


def test_the_example_of_a_layout_reads_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"riddle": "What has keys?", "solution": "A piano."}\n')
    execute("### A layout")
    try:
        (row,) = formats.read([path], DataSpec(train=("x",))).examples
        assert (row.prompt, row.completion) == ("What has keys?", "A piano.")  # type: ignore[union-attr]
    finally:
        layout.unregister("riddle")


def test_the_example_of_an_objective_is_accepted_and_computes_its_loss():
    execute("### An objective")
    try:
        config = tunesmith.configure(model="m", data=["d"], sets=["objective=slic", "objective.margin=2"])
        losses = config.spec.objective.losses(mx.array([-1.0, -3.5, -2.0, -1.0]), mx.zeros((4, 2)))
        assert losses.tolist() == [0.0, 3.0]
    finally:
        del Objective.registered["slic"]


def test_the_example_of_a_guardrail_redacts():
    execute("### A guardrail")
    try:
        guardrails = load_guardrails(sets=["whispering.output=redact", "whispering.least=10"])
        text = "Loud words here. so very quiet words. Loud again."
        assert screened(text, guardrails, "output", print)[0] == "Loud words here. [WHISPER]. Loud again."
    finally:
        guardrail.unregister("whispering")


def test_the_rows_that_the_readme_shows_are_read(tmp_path):
    (rows_shown,) = [body for kind, body in FENCE.findall(text(PAGES[0])) if kind == "json"]
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_shown)
    rows = formats.read([path], DataSpec(train=("x",)))
    assert (len(rows.examples), len(rows.dropped)) == (3, 0)


def test_the_readme_fits_what_it_promises():
    """The first screen is read in one minute, the whole in five."""
    screen = text(PAGES[0]).partition("## Install")[0]
    assert 100 < len(screen.split()) < 300
    assert len(text(PAGES[0]).splitlines()) < 120 and len(text(PAGES[0]).split()) < 1200


def test_the_readme_shows_a_report():
    """Below the first result, in words too, and small enough to load at once."""
    screen = text(PAGES[0]).partition("## Install")[0]
    ((words, path),) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", screen)
    assert screen.index("verdict  ") < screen.index(words) and len(words) > 80
    with Image.open(ROOT / path) as picture:
        assert picture.width == 1200
    assert (ROOT / path).stat().st_size < 250_000
