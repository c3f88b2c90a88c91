"""The probe finds a planted rate, stops what diverges at once, and says how sure it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError, TrainingError
from tunesmith.events import HeldOutLosses
from tunesmith.runs.config import RunConfig
from tunesmith.settings.config import load
from tunesmith.sweeps import probe as probing
from tunesmith.sweeps.probe import Halving, RateTrial, paired

QUICK = ("loop.epochs=20", "batch.sequences=4", "audit.before_training=false", "adapter.targets=all-linear")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(30))


@pytest.fixture
def settings(tiny_model, rows):
    def make(*sets: str, data: Path = rows):
        return tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=[*QUICK, *sets])

    return make


def by_rate(finding) -> dict[float, RateTrial]:
    return {trial.rate: trial for trial in finding.trials}


def test_a_planted_best_rate_is_found_within_a_tenth_of_the_run(settings, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(120))
    spec = settings("loop.steps=600", data=data)
    finding = tunesmith.probe(spec, rates=[1e-6, 1e-2, 3.0], out=tmp_path / "p")
    assert finding.rate == 1e-2 and finding.shown and finding.high is not None and finding.high < 0
    assert finding.sentence.startswith("learning rate 0.01: its held-out loss is ")
    assert by_rate(finding)[1e-2].held_out[-1][1] < finding.before
    assert finding.updates <= 0.1 * finding.planned == 60 and finding.rows >= 20


def test_every_rate_starts_from_the_same_weights_on_the_same_rows(settings, tmp_path):
    trials = tunesmith.probe(settings(), rates=[1e-5, 1e-4, 1e-3], updates=40, out=tmp_path / "p").trials
    assert len({trial.losses[0] for trial in trials}) == 1
    assert len({trial.losses[1] for trial in trials}) == 3


def test_a_rate_that_pauses_between_rounds_learns_as_one_that_trains_on(settings, tmp_path):
    spec = settings("adapter.dropout=0.1")
    rounds = tunesmith.probe(spec, rates=[1e-3, 3e-3, 1e-6], updates=18, out=tmp_path / "rounds")
    straight = tunesmith.probe(spec, rates=[1e-3, 3e-3], updates=15, out=tmp_path / "straight")
    for rate in (1e-3, 3e-3):
        paused, trained_on = by_rate(rounds)[rate], by_rate(straight)[rate]
        assert paused.updates == trained_on.updates == 5 and len(paused.held_out) == 2
        assert paused.losses == trained_on.losses and paused.held_out[-1] == trained_on.held_out[-1]


@pytest.fixture(scope="module")
def learned(tiny_model, tmp_path_factory) -> tuple[Path, Path]:
    """Rows, and a run that has learned them: its loss is low, so that it can rise."""
    folder = tmp_path_factory.mktemp("learned")
    answers = "harbour lantern copper violet window".split()
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {answers[n % 5]} {n}."}]}
        | {"completion": [{"role": "assistant", "content": f"It is {answers[n % 5]} and nothing else."}]}
        for n in range(60)
    ]
    data = tiny.write_rows(folder / "rows.jsonl", rows)
    sets = ["adapter=full", "optimizer.learning_rate=1e-2", "loop.steps=40", "batch.sequences=8"]
    sets += ["audit.before_training=false", "loop.samples=0"]
    tunesmith.train(
        tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets), out=folder / "base"
    )
    return data, folder / "base"


def test_a_rank_at_which_a_usual_rate_diverges_is_not_chosen(settings, learned, tmp_path):
    """aprender 2258: rank 256 at 2e-4 diverged, and the run went on. Here it is seen at the first update, and
    the same rate at a small rank is not stopped."""
    data, base = learned
    rates = [1e-6, 1e-5, 1e-2]
    large = settings(f"model.adapter={base}", "adapter.rank=32", "adapter.alpha=512", data=data)
    finding = tunesmith.probe(large, rates=rates, updates=40, out=tmp_path / "large")
    assert finding.rate in (1e-6, 1e-5) and "diverged: 0.01" in finding.notes
    trial = by_rate(finding)[1e-2]
    assert (trial.status, trial.updates, trial.held_out) == ("diverged", 2, [])
    small = settings(f"model.adapter={base}", "adapter.rank=4", "adapter.alpha=8", data=data)
    finding = tunesmith.probe(small, rates=rates, updates=40, out=tmp_path / "small")
    assert by_rate(finding)[1e-2].status != "diverged"


def test_if_every_rate_diverges_it_says_so(settings, learned, tmp_path):
    data, base = learned
    spec = settings(f"model.adapter={base}", "adapter.rank=32", "adapter.alpha=512", data=data)
    with pytest.raises(TrainingError, match="every rate diverged"):
        tunesmith.probe(spec, rates=[0.1, 1.0], updates=30, out=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def losses(values: np.ndarray) -> HeldOutLosses:
    rows = {f"r:{row}": float(value) for row, value in enumerate(values)}
    return HeldOutLosses(1, rows, dict.fromkeys(rows, 1.0))


def trial(rate: float, values: np.ndarray) -> RateTrial:
    return RateTrial(rate, [1.0] * 30, [(30, float(values.mean()))], "finalist", losses(values))


def test_without_a_difference_the_smaller_rate_is_taken():
    rng = np.random.default_rng(1)
    rows = rng.normal(2, 0.5, 40)
    noise = rng.normal(0, 0.1, 40)
    high, low = trial(1e-3, rows + noise - noise.mean() - 0.001), trial(1e-4, rows)
    finding = probing._compared([high, low], [low, high], 3.0, Halving((2,), (30,), 40), 600, 1.0)
    assert finding.rate == 1e-4 and not finding.shown and finding.runner_up == 1e-3
    assert finding.sentence.startswith("no difference shown between 0.0001 and 0.001")
    assert finding.sentence.endswith("the smaller is taken")
    assert finding.difference == pytest.approx(0.001) and finding.low < 0 < finding.high


def test_a_rate_that_was_dropped_is_not_said_to_have_diverged():
    best, dropped, diverged = (trial(rate, np.ones(9)) for rate in (1e-4, 1e-5, 1e-3))
    diverged.status = "diverged"
    halving = Halving((2,), (30,), 40)
    finding = probing._compared([best], [best, diverged], 3.0, halving, 600, 1.0)
    assert finding.sentence == "learning rate 0.0001: every other rate diverged"
    dropped.status = "dropped"
    finding = probing._compared([best], [dropped, best, diverged], 3.0, halving, 600, 1.0)
    assert finding.sentence == "learning rate 0.0001: the other finalist diverged"


def test_a_difference_that_is_not_there_is_shown_in_at_most_five_of_a_hundred():
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(400):
        rows = rng.normal(2, 1, 20)
        _, low, high = paired(losses(rows + rng.normal(0, 0.1, 20)), losses(rows + rng.normal(0, 0.1, 20)))
        shown += low > 0 or high < 0
    assert shown / 400 < 0.075


def test_the_mean_is_over_units_not_over_rows():
    first = HeldOutLosses(1, {"a": 1.0, "b": 2.0}, {"a": 9.0, "b": 1.0})
    second = HeldOutLosses(1, {"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 1.0})
    assert paired(first, second)[0] == pytest.approx(-0.8)
    single = HeldOutLosses(1, {"a": 1.0}, {"a": 9.0})
    assert paired(single, single) == (0.0, None, None)


@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_objectives_with_a_reference_are_probed(objective, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    judged = [
        {
            "messages": [
                {"role": "user", "content": f"Name {n}."},
                {"role": "assistant", "content": f"{n} it is"},
            ]
        }
        | {"label": n % 3 > 0}
        for n in range(30)
    ]
    pairs = [{"prompt": f"Name {n}.", "chosen": f"It is {n}.", "rejected": f"No {n}."} for n in range(30)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", judged if objective == "kto" else pairs)
    spec = settings(f"objective={objective}", data=data)
    finding = tunesmith.probe(spec, updates=40, out=tmp_path / "p")
    middle = spec.spec.optimizer.learning_rate
    assert middle in by_rate(finding) and len(finding.trials) in (3, 5)
    assert finding.rows <= 8


def test_what_changes_memory_and_speed_alone_changes_no_loss(settings, tmp_path):
    plain = tunesmith.probe(settings(), rates=[1e-3, 3e-3], updates=15, out=tmp_path / "plain")
    sets = ("loop.checkpoint_gradients=true", "batch.micro=1", "batch.pack=true")
    other = tunesmith.probe(settings(*sets), rates=[1e-3, 3e-3], updates=15, out=tmp_path / "other")
    for rate, trial in by_rate(plain).items():
        assert by_rate(other)[rate].losses == pytest.approx(trial.losses, rel=1e-4)


def test_full_weights_are_probed_and_come_back(settings, tmp_path):
    finding = tunesmith.probe(settings("adapter=full"), rates=[1e-6, 1e-3], updates=12, out=tmp_path / "p")
    assert finding.rate == 1e-3 and [trial.updates for trial in finding.trials] == [4, 4]


def test_the_ladder_is_as_long_as_the_updates_are_enough_for(settings, tmp_path):
    finding = tunesmith.probe(settings("optimizer.learning_rate=1e-3"), updates=18, out=tmp_path / "p")
    assert [trial.rate for trial in finding.trials] == [4.6e-4, 1e-3, 2.2e-3]
    assert any("few: the result is rough" in note for note in finding.notes)
    full = probing._around(1e-4, 7)
    assert full == [1e-5, 2.2e-5, 4.6e-5, 1e-4, 2.2e-4, 4.6e-4, 1e-3]
    assert probing._sizes(7) == (7, 4, 2) and probing._sizes(5) == (5, 3, 2) and probing._sizes(2) == (2,)


@pytest.mark.parametrize(
    ("sets", "options", "message"),
    [
        (["data.valid=0"], {}, "data.valid: there are no held-out rows"),
        (["loop.steps=40"], {}, "too few to tell 3 rates apart (a tenth of the 40 that"),
        ([], {"rates": [1e-3]}, "--rates: needs two rates or more"),
        ([], {"rates": [1e-3, float("nan")]}, "--rates: needs two rates or more, above zero and finite"),
        ([], {"rates": [-1.0, 1.0]}, "--rates: needs two rates or more, above zero"),
        (
            [],
            {"rates": [1e-3, 1e-4, 1e-5, 1e-6], "updates": 4},
            "4 updates are too few to tell 4 rates apart",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused(sets, options, message, settings, tmp_path):
    with pytest.raises(ConfigError) as refused:
        tunesmith.probe(settings(*sets), out=tmp_path / "p", **options)
    assert message in str(refused.value)


def test_a_folder_that_exists_is_refused(settings, tmp_path):
    with pytest.raises(DataError):
        tunesmith.probe(settings(), updates=15, out=tmp_path)


def test_the_verb_prints_a_table_or_json_and_leaves_settings_result_and_plot(tiny_model, rows, tmp_path):
    words = ["probe", "--model", tiny_model, "--data", rows, "--rates", "1e-5,1e-2", "--updates", 18]
    words += [word for setting in QUICK for word in ("--set", setting)]

    def run(*more: object):
        return CliRunner().invoke(app, [str(word) for word in (*words, *more)], catch_exceptions=False)

    shown = run("--out", tmp_path / "a").stdout
    assert "→    0.01" in shown and "--set optimizer.learning_rate=0.01" in shown and "of the run's" in shown
    printed = json.loads(run("--out", tmp_path / "b", "--json").stdout)
    first, second = printed["trials"]
    assert printed["rate"] == 0.01 and first["losses"][0] == second["losses"][0]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"config.yaml", "probe.json", "probe.png"}
    written = json.loads((tmp_path / "b" / "probe.json").read_text())
    assert written["sentence"] == printed["sentence"] and written["rows"] == printed["rows"]
    assert load(RunConfig, files=[tmp_path / "b" / "config.yaml"]).spec.batch.sequences == 4
    with pytest.raises(ConfigError, match="--rates: must be numbers"):
        CliRunner().invoke(
            app, ["probe", "--model", "m", "--data", "d", "--rates", "fast"], catch_exceptions=False
        )
