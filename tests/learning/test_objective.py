"""An objective costs one file: a subclass of `Objective` is accepted, documented and trained with."""

from __future__ import annotations

from typing import ClassVar, Literal

import mlx.core as mx
import pytest
from pydantic import Field

import tiny
import tunesmith
from tunesmith.events import StepDone
from tunesmith.learning.objective import Objective
from tunesmith.learning.objectives.sft import SFT
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.settings.config import schema
from tunesmith.training import story

SETS = ["batch.sequences=4", "loop.steps=2", "loop.samples=0", "adapter.rank=2"]


@pytest.fixture
def toy():
    class Halved(SFT):
        """Learns half as hard."""

        kind: Literal["toy"] = "toy"  # type: ignore[assignment]
        share: float = Field(default=0.5, gt=0, description="share of the loss that counts")
        suits: ClassVar = {"optimizer.learning_rate": 3e-4}

        def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
            return -self.share * logps

    yield Halved
    del Objective.registered["toy"]


def test_an_objective_of_one_class_is_accepted_documented_and_trained_with(toy, tiny_model, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(16))

    def losses(*sets: str) -> list[float]:
        config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=[*SETS, *sets]).spec
        out = tmp_path / f"run-{len(sets)}"
        events = []
        story.train(config, out=out, notify=events.append)
        assert Run.open(out).config.objective == config.objective
        return [event.loss for event in events if isinstance(event, StepDone)]

    config = tunesmith.configure(model="m", data=["d"], sets=["objective=toy", "objective.share=0.25"])
    assert config.spec.objective == toy(share=0.25)
    assert config.spec.optimizer.learning_rate == 3e-4
    assert config.origins["optimizer.learning_rate"] == "default of toy"
    assert "dpo, kto, orpo, sft, simpo, toy" in tunesmith.init()
    assert "share of the loss that counts" in str(schema(RunConfig))
    imitated = losses("optimizer.learning_rate=3e-4")
    assert losses("objective=toy", "objective.share=0.25")[0] == pytest.approx(imitated[0] / 4, rel=1e-5)


def test_an_unknown_objective_is_refused_with_the_names_there_are():
    with pytest.raises(tunesmith.errors.ConfigError, match="unknown kind") as error:
        tunesmith.configure(model="m", data=["d"], sets=["objective=unheard"])
    assert "apo_zero_unpaired, dpo, kto, orpo, sft, simpo" in str(error.value)
