"""Every benchmark runs, through public names only, and says which commit it measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
QUICK = {
    "limit": [],
    # One setting of each shape.
    "plan": ["--only", "LoRA", "packed", "experts, KTO", "real, DoRA, recomputed"],
    "start": [],
    "train_speed": ["--trainers", "mlx_lm_blas", "trl"],
}
LONGER = (
    "against",
    "audit",
    "bounds",
    "export_memory",
    "generation",
    "guardrails",
    "preferences",
    "speculation",
    "wrappers",
)
LONGEST: dict[str, list[str]] = {
    name: [] for name in ("evaluation", "objectives", "qalora", "ranks", "serving", "shape_7b", "sweeps")
}
OF_MAC = {"experts", "scaling"}  # run by bench/mac.sh
LONGEST["gpu"] = ["--updates", "2"]
PARTS = {"ours", "record", "rivals", "sides", "small", "plot"}  # used by the others; plot draws a result


def smoke(script: str, *words: str, out: Path) -> dict:
    command = [sys.executable, str(BENCH / f"{script}.py"), "--smoke", *words, "--out", str(out)]
    environ = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text("utf-8"))
    assert result["environment"]["OPENBLAS_NUM_THREADS"] == "1"
    assert result["benchmark"] == script
    assert result["commit"] is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", result["commit"])
    assert {"tunesmith", "mlx", "mlx-lm"} <= result["versions"].keys()
    return result


@pytest.mark.parametrize("script", QUICK)
def test_a_benchmark_runs(script, tmp_path):
    result = smoke(script, *QUICK[script], out=tmp_path / "result.json")
    if script == "train_speed":
        assert "tunesmith" in result["races"]["qv"]["speed"]["trainers"]


@pytest.mark.parametrize(
    "script",
    [
        *(pytest.param(script, marks=pytest.mark.real) for script in LONGER),
        *(pytest.param(script, marks=pytest.mark.sweep) for script in LONGEST),
    ],
)
def test_a_benchmark_that_takes_longer_runs(script, tmp_path):
    smoke(script, *LONGEST.get(script, []), out=tmp_path / "result.json")


def test_the_script_for_a_mac_puts_its_results_into_one_file(tmp_path):
    command = ["bash", str(BENCH / "mac.sh"), "--smoke", "--out", str(tmp_path / "all.json")]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "all.json").read_text("utf-8"))
    assert {name: result["benchmark"] for name, result in found.items()} == {name: name for name in OF_MAC}
    assert str(tmp_path) not in json.dumps(found) and str(BENCH) not in json.dumps(found)


def test_the_picture_is_drawn_of_a_result(tmp_path):
    (tmp_path / "train_speed.json").write_bytes((BENCH / "results" / "train_speed.json").read_bytes())
    words = [str(BENCH / "plot.py"), "--results", str(tmp_path), "--out", str(tmp_path / "a.png")]
    subprocess.run([sys.executable, *words], check=True)
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_every_script_is_tried():
    assert {path.stem for path in BENCH.glob("*.py")} == {*QUICK, *LONGER, *LONGEST} | OF_MAC | PARTS


def test_benchmarks_use_public_names_only():
    for path in sorted(BENCH.glob("*.py")):
        text = path.read_text("utf-8")
        used = re.findall(r"(?<!\bself)\.(_[a-z]\w*)", text) + re.findall(r"import (_[a-z]\w*)", text)
        assert set(used) <= {"_asdict"}, path.name  # of a named tuple, which is public
