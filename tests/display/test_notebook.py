"""A notebook shows the results of the verbs as HTML and their progress in one display that is updated."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

import colours
import tiny
import tunesmith
from tunesmith import events
from tunesmith.auditing.findings import Audit
from tunesmith.display import notebook
from tunesmith.evaluation.evaluate import AnsweredPrompt
from tunesmith.runs.directory import Run
from tunesmith.sweeps.measured import Metric
from tunesmith.sweeps.outcome import KeyResult, SettingResult, SweepOutcome
from tunesmith.sweeps.probe import RateFinding, RateTrial
from tunesmith.sweeps.verb import SweepReport

HOSTILE = "</pre></td></style><script>window.hacked=1</script><img src=x onerror=hacked> \x1b[31m\u202e\ud800"
GROUNDS = ("#ffffff", "#111111", "#1e1e1e", "#1e2129")
"""Of JupyterLab, light and dark, of VS Code and of the site."""


class Tags(HTMLParser):
    """The tags of a cell with their attributes, and its visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] != "style":
            self.text += data


def require_harmless(html: str) -> Tags:
    """No script, no request, no handler; whole as UTF-8, and what is hostile is there as text."""
    html.encode("utf-8")
    parsed = Tags(html)
    assert not {"script", "img", "iframe", "link", "object"} & {tag for tag, _ in parsed.tags}
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name in ("src", "href")]
    assert "\x1b" not in html and "\u202e" not in html and "@import" not in html and "url(" not in html
    return parsed


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """40 rows, of which each fifth has a hostile request."""
    path = tmp_path_factory.mktemp("notebook") / "rows.jsonl"
    made = tiny.conversations(40)
    for row in made[::5]:
        row["conversations"][0]["content"] += HOSTILE.replace("\ud800", "")
    return tiny.write_rows(path, made)


@pytest.fixture(scope="module")
def settings(rows, tiny_model):
    sets = ["loop.steps=4", "loop.validate_every=2", "loop.samples=0", "data.valid=0.3", "batch.micro=4"]
    return tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory) -> Run:
    made = tunesmith.train(settings, out=tmp_path_factory.mktemp("runs") / "run <b>")
    assert made is not None
    return made


def html(result: Any) -> Tags:
    assert isinstance(result, notebook.NotebookResult)
    bundle = result._repr_mimebundle_()
    assert bundle["text/html"] == result._repr_html_()
    assert 0 < len(bundle["text/plain"]) <= notebook.PLAIN + 200
    return require_harmless(bundle["text/html"])


def test_a_run_shows_its_verdict_and_its_loss(run):
    shown = html(run)
    assert "After 4 of 4 updates the validation loss" in shown.text
    assert "Loss" in shown.text and "4 of 4 updates" in shown.text and "run <b>" in shown.text
    assert len([tag for tag, attributes in shown.tags if attributes.get("class") == "plot"]) >= 4
    assert [tag for tag, _ in shown.tags].count("details") >= 2


def test_a_run_whose_files_are_damaged_says_so(run, tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    assert "cannot be read" in html(Run(tmp_path)).text


def test_an_evaluation_shows_scores_and_answers(run):
    result = tunesmith.evaluate(run.path, tasks=["perplexity", "adherence"], max_tokens=4)
    shown = html(result)
    assert "change, 95 % interval" in shown.text and "Loss" in shown.text
    answers = [AnsweredPrompt(HOSTILE, "", None, HOSTILE, ""), *result.answers]
    shown = html(replace(result, answers=answers))
    assert shown.text.count("<script>window.hacked=1</script>") == 2


def test_a_comparison_shows_what_differs(run, settings, tmp_path):
    other = tunesmith.train(
        tunesmith.configure(
            model=settings.spec.model.path,
            data=[*settings.spec.data.train],
            sets=["loop.steps=2", "loop.samples=0", "data.valid=0.3", "batch.micro=4"],
        ),
        out=tmp_path / "other",
    )
    shown = html(tunesmith.compare([run.path, other.path], out=tmp_path / "compared"))
    assert "loop.steps" in shown.text and "run <b>" in shown.text and "Training loss by step" in shown.text


def test_an_audit_shows_findings_with_their_rows(rows):
    audit = tunesmith.audit(str(rows))
    shown = html(audit)
    assert audit.verdict in shown.text and audit.of("warning")
    assert all(finding.hint in shown.text for finding in audit.of("warning"))
    assert (
        "<script>window.hacked=1</script>"
        in html(
            Audit(
                {},
                1,
                audit.findings,
                {"a": 1.0},
                {"worst": [{"source": HOSTILE, "score": 1, "why": [], "text": ""}]},
            )
        ).text
    )


def test_a_plan_shows_what_is_needed(settings):
    shown = html(tunesmith.plan(settings))
    assert "peak of MLX" in shown.text and "4 updates" in shown.text and "fits" in shown.text


def test_rows_are_shown_with_their_learned_tokens_marked(rows, tiny_model):
    shown = tunesmith.show([str(rows)], model=str(tiny_model), limit=3)
    rendered, renderer = shown
    parsed = html(shown)
    marked = "".join(re.findall(r"<mark>(.*?)</mark>", shown._repr_html_() or "", re.S))
    row = rendered.rows[0]
    learned = renderer.decode(row.tokens.ids[row.tokens.targets > 0].tolist())
    assert notebook.escape(learned.removesuffix("<|im_end|>")) in marked
    assert "<script>window.hacked=1</script>" in parsed.text


def test_mixed_rows_are_counted_beside_those_of_the_task(rows, tiny_model, tmp_path):
    general = tiny.write_rows(tmp_path / "general.jsonl", tiny.conversations(7, seed=3))
    mix = [f"data.mix=[{{path: {general}, repeat: 1}}]"]
    shown = tunesmith.show([str(rows)], model=str(tiny_model), sets=mix, limit=5)
    assert "5 rows, 0 left out" in html(shown).text and "data.mix: general.jsonl: 5 rows" in html(shown).text


def test_a_probe_shows_each_rate_and_the_chosen_one():
    low, high = (
        RateTrial(1e-4, [3.0, 2.5], [(2, 2.4)], "dropped"),
        RateTrial(1e-3, [3.0, 9.0], [], "diverged"),
    )
    best = RateTrial(3e-4, [3.0, 2.0], [(2, 1.9)], "finalist")
    trials = (low, best, high)
    numbers = (-0.5, -0.6, -0.4, True)
    shown = html(RateFinding(3e-4, 1e-4, *numbers, HOSTILE, ("a note",), 3.1, trials, 20, 6, 60, 1.0))
    assert "→0.000321.9000finalist" in shown.text and "0.0012–diverged" in shown.text
    assert "a note" in shown.text and "Loss of each update, by rate" in shown.text


def test_a_sweep_shows_each_setting_and_its_choice(tmp_path):
    metric = Metric("held-out loss", "", True)
    settings = (
        SettingResult("rank=8", {"rank": 8}, 1, "finished", 2.0, 1.9, 2.1),
        SettingResult(HOSTILE, {"rank": 16}, 1, "failed", notes=("it fell",)),
    )
    keys = (KeyResult("rank", (("8", 2.0), ("16", 1.0))),)
    outcome = SweepOutcome("s", metric, "Take rank=8", ("because",), settings, keys, 0, 0, 1, 1, 80)
    shown = html(SweepReport(tmp_path, outcome))
    assert "Take rank=8" in shown.text and "→rank=821.9 to 2.1" in shown.text and "failed" in shown.text
    assert "By rank" in shown.text and "because" in shown.text


def test_a_result_without_a_view_is_plain(tmp_path):
    class Plain(notebook.NotebookResult):
        def __repr__(self) -> str:
            return "plain"

    assert Plain()._repr_html_() is None and Plain()._repr_mimebundle_() == {"text/plain": "plain"}


def test_colours_stand_out_on_light_and_dark_grounds():
    """3, as for graphics. Words have the colour of the notebook."""
    style = notebook.cell(notebook.Markup(""))
    found = re.findall(r"--(?:good|warning|error|note|c\d): (#[0-9a-f]{6})", style)
    assert len(found) == 9
    for colour in found:
        for ground in GROUNDS:
            high, low = sorted((colours.light(colour), colours.light(ground)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)


class Displayed:
    """Stands where IPython displays: what each output showed, in order."""

    def __init__(self) -> None:
        self.outputs: list[list[dict[str, str]]] = []

    def __call__(self, content: dict[str, str]) -> notebook.CellOutput:
        shown = [content]
        self.outputs.append(shown)
        return SimpleNamespace(update=lambda obj, *, raw: shown.append(obj))  # type: ignore[return-value]


def step(number: int, at: float) -> events.StepDone:
    memory = {"resident": 1_000_000_000}
    return events.StepDone(number, number / 10, 3.0 / number, 9.0, 30, 1e-3, 1.0, False, 1.0, memory, at=at)


@pytest.fixture
def clock(monkeypatch):
    """Time that a test moves."""
    now = SimpleNamespace(time=lambda: now.at, at=1000.0)
    monkeypatch.setattr(notebook.time, "time", now.time)
    return now


def test_progress_is_one_display_with_rate_and_end(clock):
    displayed = Displayed()
    with notebook.sink(displayed) as notify:
        notify(events.RunStarted("runs/a", 100, 10, 1000, {}, at=clock.at))
        for number in range(1, 51):
            clock.at += 1
            notify(step(number, clock.at))
        (output,) = displayed.outputs
        during = require_harmless(output[-1]["text/html"])
        assert "step 50/100" in during.text and "50 s to go" in during.text
        assert "9 learned tokens/s" in during.text and "Loss" in during.text
        assert "width:50.0%" in output[-1]["text/html"]
        notify(events.Notice(HOSTILE, "warning", at=clock.at))
        notify(events.RunEnded("completed", 50, 50.0, at=clock.at))
    (output,) = displayed.outputs
    after = require_harmless(output[-1]["text/html"])
    assert "completed at step 50 after 50 s" in after.text and "warning: </pre>" in after.text
    assert 'class="progress"' not in output[-1]["text/html"] and output[-1]["text/plain"].startswith(
        "completed"
    )


def test_other_work_shows_rate_and_end_once_it_has_taken_long(clock):
    displayed = Displayed()
    with notebook.sink(displayed) as notify:
        for done in range(0, 6):
            notify(events.Working("rows audited", done, 60, at=clock.at))
            clock.at += 1
        (output,) = displayed.outputs
        assert "rows audited: 5 of 60 · 1.0/s · 55 s to go, ends" in Tags(output[-1]["text/html"]).text


def test_many_updates_in_a_moment_are_shown_once(clock):
    displayed = Displayed()
    with notebook.sink(displayed) as notify:
        notify(events.RunStarted("runs/a", 1000, 10, 1000, {}, at=clock.at))
        for number in range(1, 1001):
            clock.at += 0.01
            notify(step(number, clock.at))
    assert len(displayed.outputs[0]) <= 22


def test_nothing_is_displayed_if_nothing_happens():
    displayed = Displayed()
    with notebook.sink(displayed):
        pass
    assert displayed.outputs == []


def test_early_messages_are_counted_where_there_are_many(clock):
    displayed = Displayed()
    with notebook.sink(displayed) as notify:
        for number in range(notebook.KEPT + 50):
            notify(events.Notice(f"message {number}", at=clock.at))
    text = Tags(displayed.outputs[0][-1]["text/html"]).text
    assert "… 50 earlier messages" in text and "message 50\n" in text and "message 49\n" not in text


@pytest.fixture
def kernel(monkeypatch) -> Displayed:
    """This program as the kernel of a notebook."""
    displayed = Displayed()
    shell = type("ZMQInteractiveShell", (), {})
    ipython = SimpleNamespace(
        get_ipython=shell, display=SimpleNamespace(display=lambda content, **_: displayed(content))
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", SimpleNamespace(ZMQInteractiveShell=shell))
    return displayed


def test_in_a_notebook_a_verb_shows_its_progress_unless_it_is_told_where_to(kernel):
    def verb(number: int, *, notify: events.Sink = events.silent) -> int:
        notify(events.Notice("working"))
        return number + 1

    heard: list[events.Event] = []
    shown = notebook.with_progress(verb)
    assert shown(1) == 2 and len(kernel.outputs) == 1 and shown.__name__ == "verb"
    assert shown(2, notify=heard.append) == 3 and len(kernel.outputs) == 1 and len(heard) == 1


def test_a_verb_that_fails_shows_what_it_said_before(kernel):
    def verb(*, notify: events.Sink = events.silent) -> None:
        notify(events.Notice("so far"))
        raise ValueError

    with pytest.raises(ValueError):
        notebook.with_progress(verb)()
    assert "so far" in kernel.outputs[0][-1]["text/html"]


def test_elsewhere_a_verb_is_what_it_was():
    assert not notebook.running() and notebook.with_progress(json.dumps) is json.dumps
    assert notebook.with_progress(tunesmith.train) is tunesmith.train
