"""Several processes train one model: through `mlx.launch` and the command line, over the ring on this
machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

import tiny
from processes import LAUNCH, TUNESMITH, TWO_RANKS, cache_folder
from tunesmith import errors, events
from tunesmith.machine import backend, ranks
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import interruption

FORKED = [sys.executable, "-m", "tunesmith"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_model) -> list[str]:
    rows = tiny.write_rows(tmp_path_factory.mktemp("ranks") / "rows.jsonl", tiny.conversations(32))
    # Five rows an update, of two ranks: an odd share; and a last update of an epoch with one row, so that one
    # rank has none. SGD: Adam's updates are as large for a gradient of 1e-9 as for one of 1, and a BLAS of
    # two threads rounds unlike two of one.
    sets = {
        "loop.epochs": 1,
        "batch.sequences": 5,
        "loop.validate_every": 3,
        "loop.samples": 1,
        "loop.sample_tokens": 4,
        "loop.save_every": 2,
        "optimizer.kind": "sgd",
        "optimizer.learning_rate": 1.0,
        "optimizer.max_norm": 0.5,
    }
    return [
        "--model",
        str(tiny_model),
        "--data",
        str(rows),
        *(word for pair in sets.items() for word in ("--set", "=".join(map(str, pair)))),
    ]


@pytest.fixture(scope="module")
def judged(settings, tmp_path_factory) -> list[str]:
    """The same with every third row labelled undesirable, learned by KTO."""
    rows = [row | {"label": index % 3 != 0} for index, row in enumerate(tiny.conversations(32))]
    path = tiny.write_rows(tmp_path_factory.mktemp("judged") / "rows.jsonl", rows)
    words = [
        str(path) if before == "--data" else word
        for before, word in zip(["", *settings], settings, strict=False)
    ]
    return [*words, "--set", "objective=kto"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def log(folder: Path, kind: type[events.Event]) -> list:
    return [event for event in events.read(folder / "events.jsonl") if isinstance(event, kind)]


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_two_ranks_are_one(tmp_path, settings, judged, objective, monkeypatch):
    settings = settings if objective == "sft" else judged
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache_folder(tmp_path.parent / f"cache-{tmp_path.name}")))
    assert forks.run([*FORKED, "train", *settings, "--out", str(tmp_path / "one")]).returncode == 0
    done = run(*TWO_RANKS, *TUNESMITH, "train", *settings, "--out", str(tmp_path / "two"))
    assert done.returncode == 0 and done.stdout.count("report: ") == 1, done.stderr
    one, two = ([step.loss for step in log(tmp_path / name, events.StepDone)] for name in ("one", "two"))
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-5)
    steps = [log(tmp_path / name, events.StepDone) for name in ("one", "two")]
    for here, there in zip(*steps, strict=True):
        assert there.metrics == pytest.approx(here.metrics, rel=1e-3, abs=1e-4) and bool(here.metrics) == (
            objective == "kto"
        )
    for kind, fields in (
        (events.Instruments, ("gradient", "weight", "update")),
        (events.RowLosses, ("losses", "units")),
    ):
        measured = [log(tmp_path / name, kind) for name in ("one", "two")]
        assert [event.step for event in measured[0]] == (
            [1, 6] if kind is events.Instruments else [1, 2, 3, 4, 5, 6]
        )
        for here, there in zip(*measured, strict=True):
            for name in fields:
                assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-3, abs=1e-6)
    one, two = ([one.loss for one in log(tmp_path / name, events.Validated)] for name in ("one", "two"))
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-6)
    one, two = (
        load_file(checkpoints.choose(Run.open(tmp_path / name), "last") / "adapters.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=0, atol=2e-5 * abs(value).max(), err_msg=name)
    assert Run.open(tmp_path / "two").manifest["machine"]["ranks"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_two_ranks_are_one_with_mixed_rows_in_order_of_difficulty_by_adherence(judged, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache_folder(tmp_path.parent / f"cache-{tmp_path.name}")))
    general = tiny.write_rows(
        tmp_path / "general.jsonl", [row | {"label": True} for row in tiny.conversations(9, seed=7)]
    )
    sets = [f"data.mix=[{{path: {general}, share: 0.3}}]", "data.order=difficulty", "loop.best=adherence"]
    words = [*judged, *(word for text in [*sets, "audit.before_training=false"] for word in ("--set", text))]
    assert forks.run([*FORKED, "train", *words, "--out", str(tmp_path / "one")]).returncode == 0
    done = run(*LAUNCH, *TUNESMITH, "train", *words, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    for kind, fields in (
        (events.StepDone, ("loss", "units", "mixed_loss", "mixed_units")),
        (events.Validated, ("loss", "adherence", "best")),
        (events.RowLosses, ("losses",)),
    ):
        one, two = (log(tmp_path / name, kind) for name in ("one", "two"))
        assert len(one) == len(two) > 2
        for here, there in zip(one, two, strict=True):
            for name in fields:
                expected = pytest.approx(getattr(here, name) or 0.0, rel=1e-3)
                assert (getattr(there, name) or 0.0) == expected, (kind, name)
    assert any(step.mixed_loss for step in log(tmp_path / "two", events.StepDone))


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.sweep), 1])
def test_a_lost_rank_is_told_and_the_run_goes_on_elsewhere(tmp_path, settings, lost):
    out = tmp_path / "run"
    longer = [*settings, "--set", "loop.steps=150", "--set", "loop.validate_every=0"]
    process = subprocess.Popen(
        [*LAUNCH, *TUNESMITH, "train", *longer, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    waited = time.monotonic() + 300
    while not (out / "checkpoints" / "000004").exists():
        assert time.monotonic() < waited and process.poll() is None
        time.sleep(0.05)
    os.kill(_pid(process.pid, lost), signal.SIGKILL)
    said, _ = process.communicate(timeout=300)
    assert f"error: rank {1 - lost} of 2: another rank is gone" in said
    assert "start all ranks again with --resume" in said
    if lost == 0:
        return  # the other one wrote nothing; the run goes on as it does below
    step = Run.open(out).checkpoints()[-1]
    again = forks.run([*FORKED, "train", "--resume", str(out), "--set", "loop.save_every=1"])
    assert again.returncode == 0, again.stderr
    assert "machine.ranks 2 → 1" in again.stderr
    assert log(out, events.Resumed)[-1].step == step


def test_a_signal_does_not_come_before_the_reason():
    """`mlx.launch` sends SIGTERM again and again to the ranks that are left: not one of them may end this one
    unheard."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(errors.RankLost), interruption.interruptible(ranks.Ranks(None, 1, 2)) as stop:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
            raise errors.RankLost("another rank is gone")
        os.kill(os.getpid(), signal.SIGTERM)  # and what the launcher sends while the reason is written
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for among, number in ((ranks.ONE, signal.SIGTERM), (ranks.Ranks(None, 1, 2), signal.SIGINT)):
        with pytest.raises(KeyboardInterrupt), interruption.interruptible(among):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) is before[number]


def _pid(launcher: int, rank: int) -> int:
    """The process of ``rank`` under a launcher that is still running."""
    import psutil

    found = [
        child
        for child in psutil.Process(launcher).children(recursive=True)
        if child.environ().get("MLX_RANK") == str(rank)
    ]
    return next(child.pid for child in found if "tunesmith" in " ".join(child.cmdline()))


def test_sums_lose_no_digit(monkeypatch):
    """float64 values travel as three float32 parts."""
    monkeypatch.setattr(mx.distributed, "all_sum", lambda line, group: line * 2)
    values = np.array([1 / 3, 1e9 + 1e-6, 0.0, -2.5e-12])
    np.testing.assert_array_equal(ranks.Ranks(None, 0, 2).total_float(values), 2 * values)
    assert ranks.ONE.total_float(values) is values


def test_ranks_that_differ_are_refused(monkeypatch):
    here = ranks.Ranks(None, 1, 2)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda line, group: line * 2)
    here.require_agreement("settings", {"data": "a"})
    monkeypatch.setattr(mx.distributed, "all_sum", lambda line, group: line + mx.arange(line.size))
    with pytest.raises(
        errors.TrainingError, match="rank 1 of 2: the ranks do not start from the same settings"
    ):
        here.require_agreement("settings", {"data": "a"})


def test_a_rank_without_its_others_is_told(tmp_path, settings):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:1"]]')
    words = [*TUNESMITH, "train", *settings, "--out", str(tmp_path / "run")]
    environ = {**os.environ, "MLX_RANK": "5", "MLX_HOSTFILE": str(hosts)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=environ)
    assert done.returncode == 10 and "cannot reach the others" in done.stderr, done.stderr


def test_a_rank_whose_host_file_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "none.json"))
    with pytest.raises(errors.SetupError, match=r"none\.json: MLX_HOSTFILE does not name a file"):
        ranks.join()


def test_a_rank_that_waits_says_so(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    hosts.write_text("[]")
    for name, value in (("MLX_RANK", "1"), ("MLX_HOSTFILE", str(hosts))):
        monkeypatch.setenv(name, value)
    said: list[events.Notice] = []

    class Group:
        rank, size = staticmethod(lambda: 1), staticmethod(lambda: 2)

    def init(strict):
        while not said:
            time.sleep(0.01)
        return Group

    monkeypatch.setattr(mx.distributed, "init", init)
    monkeypatch.setattr(ranks, "PATIENCE_S", 0.05)
    found = ranks.join(said.append)
    assert (found.rank, found.size) == (1, 2) and "rank 1 still waits for the others" in said[0].what


@pytest.mark.skipif(sys.platform != "linux", reason="settings of OpenBLAS on Linux")
def test_ranks_on_one_machine_share_its_cores(tmp_path, monkeypatch):
    assert backend._ranks_here() == 1
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["10.0.0.1:5000"], ["10.0.0.2:5000"], ["10.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(hosts))
    for rank, here in (("0", 2), ("1", 1), ("2", 2)):
        monkeypatch.setenv("MLX_RANK", rank)
        assert backend._ranks_here() == here
    monkeypatch.setenv("MLX_RANK", "9")
    assert backend._ranks_here() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="kernels of a Linux CPU")
@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (8, 4), (9, 4)])
def test_the_kernels_of_two_ranks_share_the_cores_of_their_machine(cores, threads, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert backend.cpu_threads() == cores
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "2")
    assert backend.cpu_threads() == threads
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "two")
    assert backend.cpu_threads() == cores


@pytest.mark.skipif(sys.platform != "linux", reason="settings of OpenBLAS on Linux")
def test_what_the_user_set_for_openblas_stays(monkeypatch):
    names = ("OPENBLAS_THREAD_TIMEOUT", "OPENBLAS_NUM_THREADS")
    for name in names:
        monkeypatch.setenv(name, "mine")
    backend._tune_openblas()
    assert [os.environ[name] for name in names] == ["mine"] * 2


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.setattr(mx.distributed, "init", lambda: pytest.fail("nothing to join"))
    assert ranks.join() == ranks.ONE
