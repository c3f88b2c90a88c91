"""Each verb loads the heavy packages that it uses and no others, and never torch, even if it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks

import tiny
import tunesmith
from tunesmith.cli import app

SETTINGS = {"mlx.core", "numpy", "rich"}
"""Loaded where settings are read and progress is shown."""
MISTRAL = {"mistral_common", "sentencepiece", "jsonschema", "huggingface_hub"}
TEMPLATE = {"transformers", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub"}
"""A tokenizer of Hugging Face with its chat template."""
MODEL = TEMPLATE | {"mlx_lm"}
"""mlx-lm imports transformers itself."""
AUDIT = {"py3langid", "pygarble", "ftfy", "rapidfuzz", "rensa", "scipy", "jsonschema"}
MAP = {"sklearn", "joblib", "scipy.stats", "narwhals"}
"""For the t-SNE of the map of prompts, which training does not draw."""
REPORT = {"jinja2", "matplotlib"}
CARD = {"huggingface_hub"}
TASKS = {"scipy", "scipy.stats", "sacrebleu", "rapidfuzz", "pygarble"}
HEAVY = SETTINGS | MISTRAL | MODEL | AUDIT | MAP | REPORT | CARD | TASKS
SERVER = {"starlette", "uvicorn", "prometheus_client", "llguidance"}
HEAVY |= {"torch", "pandas", "pyarrow", "plotext", "datasets", "lm_eval", "gguf", "numba", *SERVER}

VERBS = {
    "init --presets": {"rich"},
    "init --model model --data rows.jsonl": SETTINGS,
    "doctor": SETTINGS | MODEL,
    "show rows.jsonl": SETTINGS | MISTRAL,
    "show rows.jsonl --model model": SETTINGS | TEMPLATE,
    "audit rows.jsonl --accept diversity": SETTINGS | MISTRAL | AUDIT | MAP | {"jinja2"},
    "plan --model model --data rows.jsonl --fit 1GB": SETTINGS | MODEL | AUDIT,
    "plan --record --folder .": SETTINGS,
    "train --dry-run --model model --data rows.jsonl": SETTINGS | MODEL | AUDIT,
    "train --model model --data rows.jsonl --out other --set loop.steps=2": (
        SETTINGS | MODEL | AUDIT | REPORT
    ),
    "watch run --once": SETTINGS | {"plotext", "jinja2"},
    "evaluate run --limit 4 --max-tokens 4": SETTINGS | MODEL | REPORT | TASKS,
    "report run": SETTINGS | REPORT | CARD,
    "compare run other": SETTINGS | {"jinja2"},
    "compose run=1 other=-1 --out mixed": SETTINGS | MODEL | REPORT,
    "sweep sweep.yaml --dry-run": SETTINGS | MODEL,
    "probe --model model --data rows.jsonl --updates 18 --out probed": (
        SETTINGS | MODEL | AUDIT | REPORT | {"scipy.stats"}
    ),
    "generate model --prompt hello --max-tokens 2": SETTINGS | MODEL,
    "chat run": SETTINGS | MODEL,
    "tag run tool:1": {"rich"},
    "runs --folder .": {"rich"},
    "runs show run": {"rich"},
    "runs prune --folder .": {"rich"},
    "export run --to peft": SETTINGS | MODEL | REPORT | {"scipy"},
    "push run --to me/it --dry-run": {"rich"} | CARD,
    "votes votes.jsonl": SETTINGS,
    "serve run --port 0 --bench 20 --bench-seconds 0.5": SETTINGS | MODEL | SERVER | {"rich"},
}
"""Command → the heavy packages that it may have loaded when it ends. Commands run in this order."""
WRITES_ITS_MODULES = """
import atexit, os, pathlib, sys
atexit.register(lambda: pathlib.Path(os.environ["LOADED"]).write_text(" ".join(sys.modules)))
from tunesmith.cli import main
main()
"""
PROGRAM = "writes_its_modules"


@dataclass(frozen=True)
class Place:
    """A folder with a tiny model, rows and a run. The ``torch`` on its path ends the process at import."""

    folder: Path

    def heavy(self, *words: str, forked: Forks | None = None) -> set[str]:
        """The heavy packages in ``sys.modules`` when the verb has ended. ``forked``: it runs in a fork, which
        has also what was imported before."""
        loaded = self.folder / "loaded.txt"
        environ = os.environ | {"PYTHONPATH": os.pathsep.join(self.path), "LOADED": str(loaded)}
        if forked is None:
            command = [sys.executable, "-m", PROGRAM, *words]
            options = {"cwd": self.folder, "env": environ, "input": ""}
            done = subprocess.run(command, capture_output=True, text=True, **options)
        else:
            done = forked.run([PROGRAM, *words], environ, self.folder)
        assert done.returncode == 0, done.stdout + done.stderr
        return HEAVY & set(loaded.read_text().split())

    @property
    def path(self) -> list[str]:
        return [str(self.folder / "site"), str(Path(tunesmith.__file__).parents[1])]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    folder = tmp_path_factory.mktemp("start")
    tiny.write_llama(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.conversations(40))
    (folder / "votes.jsonl").touch()
    (folder / "sweep.yaml").write_text("base: {model: model, data: rows.jsonl}\nseeds: [0]\n")
    package = folder / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    metadata = folder / "site" / "torch-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
    (folder / "site" / f"{PROGRAM}.py").write_text(WRITES_ITS_MODULES)
    place = Place(folder)
    place.heavy(*"train --model model --data rows.jsonl --set loop.steps=2 --out run".split())
    return place


def test_the_planted_torch_is_what_transformers_would_import(place):
    code = "from transformers import AutoTokenizer"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(place.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert "torch was imported" in done.stderr

    code = "from tunesmith.machine import imports; imports.hide('torch'); " + code
    subprocess.run([sys.executable, "-c", code], env=environ, check=True)


def test_nothing_is_hidden_after_transformers_has_looked():
    code = "from tunesmith.machine import imports; {}imports.hide('colorsys'); import colorsys"
    commands = [[sys.executable, "-c", code.format(before)] for before in ("", "import transformers; ")]
    hidden, seen = (subprocess.run(command, capture_output=True, text=True) for command in commands)
    assert "ModuleNotFoundError" in hidden.stderr and seen.returncode == 0, seen.stderr


def test_a_verb_loads_what_it_uses_and_no_more(place):
    # Verbs are forks of processes that have imported part of what they may load, the slowest part of which
    # is mlx-lm.
    with (
        closing(Forks(["tunesmith.cli"], place.path)) as light,
        closing(Forks(["tunesmith.cli", "mlx_lm.utils"], place.path)) as heavy,
    ):
        excess = {}
        for command, may in VERBS.items():
            forked = heavy if may >= MODEL else light if may >= SETTINGS else None
            excess[command] = place.heavy(*command.split(), forked=forked) - may
    assert not any(excess.values()), excess


def test_every_verb_is_held_to_what_it_loads():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.typer_instance.info.name for group in app.registered_groups}
    assert {command.split()[0] for command in VERBS} == verbs and len(verbs) >= 11


@pytest.mark.parametrize(
    ("words", "uses"),
    [
        (["doctor", "--model", "m"], True),
        (["doctor", ".", "--model=m"], True),
        (["doctor"], False),
        (["train", "--model", "m"], False),
        ([], False),
    ],
)
def test_only_the_comparison_with_transformers_sees_torch(words, uses):
    from tunesmith import cli

    assert cli._compares_with_torch(words) == uses
