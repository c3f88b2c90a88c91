"""CONTRIBUTING, CHANGELOG, SECURITY, the workflows of CI and the hooks of commits name only what exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PROGRAMS = {"make", "bash", "sudo", "test", "uv", "uvx", "pipx", "python", "tunesmith"}
"""What the steps of workflows start with."""


def text(path: Path) -> str:
    return path.read_text("utf-8")


def steps() -> list[tuple[str, dict[str, Any]]]:
    """(workflow, step) of every job."""
    jobs = [(path.stem, job) for path in WORKFLOWS for job in yaml.safe_load(text(path))["jobs"].values()]
    return [(name, step) for name, job in jobs for step in job["steps"]]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", text(ROOT / "Makefile"), re.M))


def commands() -> list[tuple[str, list[str]]]:
    lines = [(name, line) for name, step in steps() for line in step.get("run", "").split("&&")]
    return [(name, line.split()) for name, line in lines if line.strip()]


def test_workflows_call_only_targets_scripts_and_files_that_exist():
    made, scripts = set(), set()
    for name, words in commands():
        assert words[0] in PROGRAMS, f"{name}: {' '.join(words)}"
        if words[0] == "make":
            assert set(words[1:]) <= targets(), f"{name}: {' '.join(words)}"
            made |= set(words[1:])
        if words[0] == "bash":
            assert (ROOT / words[1]).is_file(), f"{name}: {' '.join(words)}"
            scripts.add(words[1])
    assert {"test", "lint", "real", "docs"} <= made
    assert scripts == {".ci/run", "bench/mac.sh"}


def test_workflows_follow_the_schema_of_github():
    assert len(WORKFLOWS) == 3
    command = [str(BIN / "check-jsonschema"), "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_workflows_have_the_least_permissions_and_pinned_actions():
    """zizmor knows what lets others into a workflow."""
    command = [str(BIN / "zizmor"), "--offline", "--no-progress", str(ROOT / ".github")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in WORKFLOWS:
        assert yaml.safe_load(text(path))["permissions"] == {}, path.name
    used = [step["uses"] for _, step in steps() if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+\.\d+\.\d+", name) for name in used)


def test_commits_run_what_make_lint_runs_but_pyright():
    done = subprocess.run(
        [str(BIN / "pre-commit"), "validate-config", str(ROOT / ".pre-commit-config.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    (repository,) = yaml.safe_load(text(ROOT / ".pre-commit-config.yaml"))["repos"]
    hooks = {hook["entry"].removeprefix(".venv/").removesuffix(" --fix") for hook in repository["hooks"]}
    lint = text(ROOT / "Makefile").partition("\nlint:")[2].partition("\n\n")[0]
    commands = {line.strip().replace("$(BIN)", "bin") for line in lint.splitlines()[1:]}
    wanted = {re.sub(r" (--check )?\.$", "", line) for line in commands if "pyright" not in line}
    assert {hook for hook in hooks if "uv lock" not in hook} == wanted


def test_pages_name_targets_files_and_pages_that_exist():
    links = 0
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
            if not target.startswith("https://"):
                assert (ROOT / target.partition("#")[0]).is_file(), f"{page.name}: {target}"
                links += 1
        for words in re.findall(r"`(?:bash )?((?:bench|tests|docs|\.ci)/[\w./-]+)", text(page)):
            assert (ROOT / words).exists(), f"{page.name}: {words}"
        assert set(re.findall(r"`make ([a-z]+)`", text(page))) <= targets(), page.name
    assert links >= 18


def test_the_changelog_has_the_version_of_the_project():
    version = tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["version"]
    headings = re.findall(r"^## (.*)$", text(ROOT / "CHANGELOG.md"), re.M)
    assert headings[0] == "Unreleased" and headings[1].startswith(f"{version} – ")
    groups = set(re.findall(r"^### (.*)$", text(ROOT / "CHANGELOG.md"), re.M))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_names_verbs_that_exist():
    import tunesmith

    verbs = set(re.findall(r"`tunesmith ([a-z]+)", text(ROOT / "CHANGELOG.md")))
    assert len(verbs) >= 12 and verbs <= {*tunesmith.VERBS, "runs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_readme_leads_to(page):
    assert f"({page.name})" in text(ROOT / "README.md")


def test_settings_that_security_names_exist():
    from typer.testing import CliRunner

    from tunesmith.cli import app

    schema = CliRunner().invoke(app, ["init", "--schema"]).output
    assert json.loads(schema) and '"trust_remote_code"' in schema
    assert "`model.trust_remote_code=true`" in text(ROOT / "SECURITY.md")
