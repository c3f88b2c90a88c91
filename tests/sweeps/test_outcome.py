"""What a sweep says of planted results: trials that were never trained, with logs as training writes them."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tunesmith import events
from tunesmith.evaluation.statistics import Statistic
from tunesmith.sweeps import outcome, page, screen
from tunesmith.sweeps.contrasts import Contrast, MixedStudent, RowValues, SweptKey, compare, panel
from tunesmith.sweeps.ledger import GENERATOR, Ledger, TrialEntry
from tunesmith.sweeps.measured import NOT_FINITE, Metric, cost, scored
from tunesmith.sweeps.trials import SweepPlan, SweptSetting, Trial

LOSS = Metric("held-out loss", "", True)
RANKS, RATES = (8, 16, 32), (1e-4, 2e-4)
ROWS = 80


def planted(
    folder: Path,
    effects: dict[tuple[int, float], float],
    *,
    seeds: int = 2,
    memory: dict[int, int] | None = None,
    states: dict[str, str] | None = None,
    failing_seeds: set[int] | None = None,
) -> outcome.SweepOutcome:
    """The outcome of a grid of ranks and rates whose settings differ by ``effects``."""
    random = np.random.default_rng(8)
    hard = random.gamma(2.0, 0.5, ROWS)
    settings, trials, entries = [], [], []
    for number, (rank, rate) in enumerate(product(RANKS, RATES)):
        label = f"rank={rank}, rate={rate:g}"
        settings.append(SweptSetting(label, {"rank": rank, "rate": rate}))
        for seed in range(seeds):
            name = f"{number}-{seed}"
            values = hard + effects.get((rank, rate), 0.0) + random.normal(0, 0.1, ROWS)
            write_run(folder / "trials" / name, values, rank * 100, (memory or {}).get(rank, 1_000_000))
            concerned = failing_seeds is None or seed in failing_seeds
            state = (states or {}).get(label, "finished") if concerned else "finished"
            trials.append(Trial(name, number, seed, {}, ()))
            entries.append(
                TrialEntry(name, label, seed, [], {}, state, "" if state == "finished" else "it fell")
            )
    keys = (SweptKey("rank", RANKS, (0, 0, 1, 1, 2, 2)), SweptKey("rate", RATES, (0, 1, 0, 1, 0, 1)))
    plan = SweepPlan(tuple(settings), tuple(range(seeds)), keys, tuple(trials))
    return outcome.outcome("planted", folder, plan, Ledger(GENERATOR, 0.0, {}, entries), LOSS)


def write_run(run_dir: Path, values: np.ndarray, trainable: int, memory: int) -> None:
    rows = {f"rows.jsonl:{number}": float(value) for number, value in enumerate(values)}
    log = [
        events.RunStarted(str(run_dir), 4, trainable, 10_000, {}),
        events.Validated(0, 9.0, 9.0, 9.0, ROWS, 1.0, True),
        events.StepDone(4, 1.0, 1.0, 1.0, 10, 1e-4, 1.0, False, 2.0, {"resident": memory}),
        events.HeldOutLosses(4, rows, dict.fromkeys(rows, 5.0)),
        events.Validated(4, float(values.mean()), 1.0, 9.0, ROWS, 1.0, True),
    ]
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "events.jsonl").write_text("".join(events.to_json(event) + "\n" for event in log))
    index = {"last": 4, "best": 4, "kept": [4], "metric": "validation loss", "best_value": 1.0}
    (run_dir / "checkpoints" / "index.json").write_text(json.dumps(index))


def test_the_only_key_that_matters_is_named_and_the_smaller_of_the_rest_is_taken(tmp_path):
    result = planted(tmp_path, {(rank, 1e-4): 0.3 for rank in RANKS})
    matter = {key.key: key.matters for key in result.keys}
    assert matter == {"rank": False, "rate": True}
    assert any(line.startswith("rate matters: 0.0002 is better than 0.0001 by 0.") for line in result.lines)
    assert "rank: no difference shown" in result.lines
    assert result.choice == 1  # the smallest rank at the better rate
    assert "rank=8, rate=0.0002" in result.verdict
    assert [setting.worse for setting in result.settings] == [True, False] * 3


def test_where_nothing_matters_the_smaller_is_taken(tmp_path):
    result = planted(tmp_path, {})
    assert result.verdict.startswith("no difference shown between 6 settings")
    assert result.verdict.endswith("take the smaller, rank=8, rate=0.0001") and result.choice == 0
    assert not any(setting.worse for setting in result.settings)
    assert (
        any("is worse than" in line and line.endswith("(95 %)") for line in result.lines) or result.best == 0
    )


def test_of_settings_with_as_many_weights_the_cheapest_is_taken_not_the_smaller(tmp_path):
    states = {f"rank={rank}, rate={rate:g}": "failed" for rank in (16, 32) for rate in RATES}
    assert ": take the cheapest, rank=8, rate=0.0001" in planted(tmp_path, {}, states=states).verdict


def test_what_is_larger_is_taken_if_it_is_shown_to_be_better(tmp_path):
    result = planted(tmp_path, {(rank, rate): -0.01 * rank for rank in RANKS for rate in RATES})
    assert result.choice in (4, 5) and {key.key for key in result.keys if key.matters} == {"rank"}


def test_the_best_is_taken_with_how_much_the_others_are_behind(tmp_path):
    effects = {(rank, rate): -0.01 * rank + (0.3 if rate == 1e-4 else 0) for rank in RANKS for rate in RATES}
    verdict = planted(tmp_path, effects).verdict
    assert verdict.startswith("take rank=32, rate=0.0002: held-out loss 0.")
    assert re.search(r"; all others are shown to be worse, the nearest by 0\.1[4-8]\d?$", verdict)


def test_among_equal_weights_less_memory_decides_then_tokens_then_fewer_changes_and_never_time():
    def cheapest(*costs: tuple[int, float], changes: tuple[int, ...] = (0, 0)) -> int | None:
        behind = Contrast(0.0, 1.0, MixedStudent(9.0), 1.0, 1.0)
        settings = [
            outcome.SettingResult(
                "",
                dict.fromkeys(map(str, range(n_changes))),
                1,
                "finished",
                1.0,
                cost=outcome.TrialCost(10, memory_bytes, 1.0 if place else 900.0, tokens),
                behind=behind,
            )
            for place, ((memory_bytes, tokens), n_changes) in enumerate(zip(costs, changes, strict=True))
        ]
        return outcome._cheapest(settings, range(len(settings)), [], [], 0)

    assert cheapest((120, 1.0), (100, 5.0)) == 1
    assert cheapest((100, 6.0), (104, 5.0)) == 1
    assert cheapest((100, 5.2), (104, 5.0)) == 0
    assert cheapest((100, 5.2), (104, 5.0), changes=(2, 1)) == 1


def test_padding_is_work(tmp_path):
    write_run(tmp_path, np.ones(ROWS), 10, 100)
    log = tmp_path / "events.jsonl"
    log.write_text(log.read_text().replace('"padding": 0.0', '"padding": 0.5'))
    assert cost(tmp_path) == outcome.TrialCost(10, 100, 2.0, 20.0)


def test_what_was_never_compared_with_the_best_is_not_taken():
    costs = [outcome.TrialCost(weights, 100, 1.0, 1.0) for weights in (20, 10)]
    settings = [outcome.SettingResult("", {}, 1, "finished", 1.0, cost=cost) for cost in costs]
    assert outcome._cheapest(settings, range(2), [], [], 0) == 0


def test_a_trial_whose_held_out_loss_is_not_finite_is_not_compared(tmp_path):
    planted(tmp_path, {})
    log = tmp_path / "trials" / "3-0" / "events.jsonl"
    for text in ("NaN", "Infinity"):
        log.write_text(re.sub(r'("rows.jsonl:7": )[^,}]+', rf"\g<1>{text}", log.read_text(), count=1))
        assert scored(tmp_path / "trials" / "3-0", LOSS) == NOT_FINITE


def test_shares_and_their_differences_are_in_percent_and_points():
    share = Metric("it", "%", False)
    assert (share.text(0.851), share.difference(-0.031, signed=True)) == ("85.1 %", "−3.1 points")
    assert (LOSS.text(1.23456), LOSS.difference(0.01234)) == ("1.235", "0.0123")
    result = outcome.SettingResult("x", {}, 2, "finished", 0.851, 0.8, 0.9)
    assert screen.cells(result, share)[:2] == ("85.1 %", "80.0 % to 90.0 %")


def test_trials_that_failed_are_listed_and_not_compared(tmp_path):
    result = planted(
        tmp_path, {}, states={"rank=8, rate=0.0001": "failed", "rank=16, rate=0.0001": "stopped"}
    )
    assert [setting.state for setting in result.settings][:3] == ["failed", "finished", "stopped"]
    assert [setting.value is None for setting in result.settings] == [True, False, True, False, False, False]
    assert "rank=8, rate=0.0001: it fell" in result.lines
    assert "6 settings" not in result.verdict and result.choice == 1


def test_the_mean_of_a_value_is_over_what_all_values_have(tmp_path):
    effects = {(rank, 1e-4): 0.3 for rank in RANKS}
    result = planted(tmp_path, effects, states={"rank=16, rate=0.0001": "failed"})
    means = [mean for _, mean in result.keys[0].levels]
    assert max(means) - min(means) < 0.1  # not 0.15, for which the rate alone would be to blame


def test_a_result_before_all_trials_have_ended_is_called_preliminary(tmp_path):
    result = planted(tmp_path / "some", {}, states={"rank=8, rate=0.0001": "waiting"})
    assert result.lines[0] == "2 of 12 trials have not ended: preliminary"
    assert not any("preliminary" in line for line in planted(tmp_path / "all", {}).lines)


def test_one_seed_says_that_the_variance_between_seeds_is_unknown(tmp_path):
    assert outcome.ONE_SEED in planted(tmp_path / "one", {}, seeds=1).lines
    assert outcome.ONE_SEED not in planted(tmp_path / "two", {}).lines
    entries = {f"rank={rank}, rate={rate:g}": "failed" for rank in RANKS for rate in RATES}
    one_failed = planted(tmp_path / "failed", {}, states=entries, failing_seeds={1})
    assert outcome.ONE_SEED in one_failed.lines


def test_a_trial_with_other_rows_is_not_compared(tmp_path):
    planted(tmp_path, {})
    for seed in range(2):
        path = tmp_path / "trials" / f"3-{seed}" / "events.jsonl"
        path.write_text(path.read_text().replace('"rows.jsonl:7"', '"other.jsonl:7"'))
    # Read again from what was written.
    plan_settings = [SweptSetting(str(number), {"rank": number}) for number in range(6)]
    trials = [Trial(f"{number}-{seed}", number, seed, {}, ()) for number in range(6) for seed in range(2)]
    entries = [TrialEntry(trial.name, str(trial.setting), trial.seed, [], {}, "finished") for trial in trials]
    plan = SweepPlan(tuple(plan_settings), (0, 1), (), tuple(trials))
    result = outcome.outcome("again", tmp_path, plan, Ledger(GENERATOR, 0.0, {}, entries), LOSS)
    assert [setting.value is None for setting in result.settings] == [number == 3 for number in range(6)]
    assert result.settings[3].notes == ("not compared: its held-out rows or their tokens are others",)


def test_a_trial_whose_loss_ends_above_its_start_is_said_to_have_diverged(tmp_path):
    # aprender 2258: rank 256 at 2e-4 diverges, and the run goes on
    result = planted(tmp_path, {(32, 2e-4): 20.0})
    worst = result.settings[5]
    assert worst.worse and worst.notes == (outcome.DIVERGED,) and result.choice != 5


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_page_shows_every_setting_key_and_cost(tmp_path, seeds):
    result = planted(tmp_path, {(rank, 1e-4): 0.3 for rank in RANKS}, seeds=seeds, memory={8: 500_000})
    text = page.html(result, ["tunesmith", "sweep", "x.yaml"])
    for needed in ("rank=16, rate=0.0002", "By rank", "By rate", "By trained weights", "By memory", "x.yaml"):
        assert needed in text
    assert text == page.html(result, ["tunesmith", "sweep", "x.yaml"])
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize("falls", [False, True])
def test_differences_are_in_the_units_of_the_metric_whichever_way_it_turns(tmp_path, falls):
    # A likelihood falls as the loss rises; a perplexity rises with it.
    finish = (lambda loss: np.exp(-loss)) if falls else np.exp
    better = "higher" if falls else "lower"
    statistic = Statistic("it", lambda score: score.value, finish, better=better, headline=True)
    metric = Metric("it", "", not falls, "task", "1", statistic)
    weights = dict.fromkeys(map(str, range(30)), 1.0)
    rows = [RowValues({row: mean + 0.01 * int(row) for row in weights}, weights) for mean in (1.0, 1.1)]
    compared = compare(panel([[values] for values in rows]), [])
    best = compared.means[0]
    difference = compared.scaled(metric.slope(best)).between(0, 1)
    exact = metric.shown(compared.means[1]) - metric.shown(best)
    assert difference.value == pytest.approx(exact, rel=0.1) and (difference.value < 0) is falls
    assert difference.p == compared.between(0, 1).p
