"""A task is one file: what a class states is in the command line, the record, the report and the
documentation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import EvaluationError
from tunesmith.evaluation import tasks
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, Meaning, Task, digest
from tunesmith.runs.records import ExampleScore

DOCUMENTATION = Path(__file__).parents[3] / "docs" / "evaluation.md"


class Brevity(Task[tuple[str, int]]):
    name, version = "brevity", "7"
    statistics = (Statistic("words", lambda score: score.value, better="lower", headline=True),)
    question, title, asks = "safety", "Short answers", "one odd prompt"
    options = ("embed",)
    meanings = (Meaning("words", "Words an answer", "how many words an answer has, spaces aside"),)

    @property
    def identity(self) -> str:
        return digest(self.name)

    def measure(self, subject: Subject) -> list[tuple[str, int]]:
        answers = subject.answers(["the cat", "a dog"], 6, self.name)
        return [(answer.text, len(answer.text.split())) for answer in answers]

    def score(self, items: Sequence[tuple[str, int]]) -> list[ExampleScore]:
        return [
            ExampleScore(f"prompt {index}", float(count), prompt="the cat", reference="short", answer=text)
            for index, (text, count) in enumerate(items)
        ]


@pytest.fixture
def brevity() -> Iterator[type[Brevity]]:
    @tasks.register(Brevity)
    def build(material: Material) -> list[Task]:
        return [Brevity()]

    yield Brevity
    del tasks._REGISTERED["brevity"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("protocol")
    data = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(12))
    sets = ["loop.steps=1", "adapter.rank=2", "loop.samples=0", "data.valid=0"]
    made = tunesmith.train(
        tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets), out=folder / "run"
    )
    assert made is not None
    return made.path


def test_the_command_line_offers_it_and_says_which_options_are_its_own(brevity):
    text = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "300"}).output
    (task,) = [line for line in text.splitlines() if line.startswith("│") and "--task" in line]
    (embed,) = [line for line in text.splitlines() if "--embed" in line]
    assert "brevity" in task and "brevity: also compare" in embed


def test_its_name_is_known_while_it_is_registered(brevity):
    (group,) = tasks.require(["brevity"], EvaluationSpec())
    assert group.kinds == (Brevity,) and "brevity" in tasks.suite()
    with pytest.raises(EvaluationError, match=r"hint: tasks: .*brevity"):
        tasks.require(["wordiness"], EvaluationSpec())
    assert tasks.known("brevity", "7") is Brevity and tasks.known("brevity", "6") is None


def test_it_is_measured_recorded_and_reported(brevity, run, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    found = tunesmith.evaluate(run, tasks=["brevity"])
    assert found is not None and [(score.task, score.name) for score in found.scores] == [
        ("brevity", "words")
    ]
    assert json.loads((run / "evals" / "brevity@7" / "score.json").read_text())["n"] == 2
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert tasks.QUESTIONS["safety"] in page and Brevity.meanings[0].text in page
    assert "Is it still safe? | " in text and Brevity.meanings[0].text in text
    described = tasks.about("brevity")
    assert described.question == "safety"
    assert described.title_of("words", "tool=search") == "Words an answer, tool=search"


def test_the_documentation_has_a_row_of_it(brevity):
    assert "| `brevity` | `brevity` | Words an answer | one odd prompt | lower |\n" in tasks.table()


def test_the_table_in_the_documentation_is_the_one_of_the_registered_tasks():
    assert tasks.table() in DOCUMENTATION.read_text(encoding="utf-8")
    assert tasks.table().count("\n") >= 13


@pytest.mark.parametrize(
    ("recorded", "question", "title", "group"),
    [
        ("drift.text", "retention", "General text", "drift"),
        ("drift.humour", "retention", "drift.humour", "drift"),
        ("benchmark.mmlu", "benchmarks", "mmlu", "benchmarks"),
        ("safety.jailbreaks", "safety", "safety.jailbreaks", "safety"),
        ("efficiency", "efficiency", "Speed, time to the first token, memory", "efficiency"),
        ("mine", "other", "mine", "mine"),
    ],
)
def test_a_record_of_a_task_that_is_not_here_is_described_by_its_name(recorded, question, title, group):
    described = tasks.about(recorded)
    assert (described.question, described.title, described.group) == (question, title, group)


def test_an_option_of_a_task_that_was_not_chosen_is_refused():
    for option, task in (("knowledge", "drift"), ("safety", "drift"), ("benchmark_data", "benchmarks")):
        spec = EvaluationSpec(**{option: "x" if option == "benchmark_data" else ("x",)})
        with pytest.raises(EvaluationError, match=f"{option}: is for {task}, which is not among the tasks"):
            tasks.require(["perplexity"], spec)
        tasks.require(["perplexity", task], spec)
