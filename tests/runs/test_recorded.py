"""Limits hold for what a user sets, not for what a run has recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.reports import facts
from tunesmith.runs import configure
from tunesmith.runs.config import RunConfig, of_run
from tunesmith.settings.config import dump, load, schema

BEYOND = {
    "loop.steps": 2_000_000,
    "loop.epochs": 1e7,
    "loop.sample_tokens": 1 << 17,
    "optimizer.learning_rate": 1e-13,
    "batch.sequences": 1 << 21,
    "batch.length": 1 << 25,
}


def written(folder: Path, *sets: str) -> Path:
    """config.yaml of a run in ``folder``."""
    text = dump(load(RunConfig, sets=["model.path=m", "data.train=[rows.jsonl]", *sets]).spec)
    (folder / "manifest.json").write_text("{}")
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("key", BEYOND)
def test_a_number_beyond_the_range_is_read_of_a_run_and_refused_of_a_user(tmp_path, key):
    path = written(tmp_path)
    block, name = key.split(".")
    before = path.read_text()
    start = before.index(f"  {name}: ", before.index(f"\n{block}:\n"))
    end = before.index("\n", start)
    path.write_text(f"{before[:start]}  {name}: {BEYOND[key]}{before[end:]}")
    assert of_run(path).model_dump()[block][name] == BEYOND[key]
    with pytest.raises(ConfigError, match=rf"--set: {key}: must be an? \w+ (≥|>) \S+ and ≤ \S+"):
        configure.configure(model="m", data=["x"], sets=[f"{key}={BEYOND[key]}"])


@pytest.mark.parametrize("key", BEYOND)
def test_a_number_beside_the_settings_of_a_run_is_a_users(tmp_path, key):
    with pytest.raises(ConfigError, match=f"--set: {key}: must be"):
        configure.configure(config=[written(tmp_path)], sets=[f"{key}={BEYOND[key]}"])


def test_what_no_user_may_set_no_run_may_have_recorded(tmp_path):
    path = written(tmp_path)
    path.write_text(path.read_text().replace("learning_rate: 0.0001", "learning_rate: -1.0"))
    with pytest.raises(ConfigError, match="learning_rate: must be a number ≥ 1e-12 and ≤ 100, not -1"):
        of_run(path)


def test_a_run_of_thousands_of_files_is_read_reported_and_begun_again(tmp_path):
    names = [f"/data/{'folder' * 10}/{number:06d}.jsonl" for number in range(4000)]
    path = written(tmp_path)
    path.write_text(path.read_text().replace("[rows.jsonl]", "[" + ", ".join(names) + "]"))
    assert path.stat().st_size > 256 << 10
    assert of_run(path).data.train == tuple(names)
    assert facts.settings(tmp_path)["data.train"] == names
    assert configure.configure(config=[path]).spec.data.train == tuple(names)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="has more than 256 kB"):
        configure.configure(config=[path])


def test_aliases_are_counted_in_what_a_run_has_recorded(tmp_path):
    path = written(tmp_path)
    nested = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    path.write_text(path.read_text() + nested)
    with pytest.raises(ConfigError, match="values\nhint: aliases"):
        of_run(path)


def test_the_ranges_are_in_the_schema():
    loop = schema(RunConfig)["$defs"]["LoopSpec"]["properties"]  # type: ignore[index,call-overload]
    assert loop["steps"]["maximum"] == 1_000_000  # type: ignore[index,call-overload]
