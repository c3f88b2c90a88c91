"""A report answers from a run directory alone: its page asks for nothing, shows report.json's numbers, runs
no text."""

from __future__ import annotations

import json
import math
import random
import re
import runpy
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm
from typer.testing import CliRunner

import colours
import tiny
from tunesmith import events, reports
from tunesmith.cli import app
from tunesmith.display import charts, words
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import Target
from tunesmith.evaluation.tasks import about, groups
from tunesmith.reports import advice, facts, measures, screen, verdict
from tunesmith.reports.facts import CheckpointIndex, EvaluationFacts, Facts
from tunesmith.reports.measures import Measure
from tunesmith.runs.records import Record, Score

HOSTILE = (
    "</script><img src=x onerror='window.hacked=1'>\"&lt;{{7*7}}{% raw %}`<i>` javascript:window.hacked=1 | "
    "$x^2$ "
    "\x00\x1b[31m\ud800\u202e\u2028"
)


def score(
    task: str, name: str, value: float, delta: float | None, half: float = 0.05, n: int = 60, **more: Any
) -> dict[str, Any]:
    """As `asdict(Score)`, judged: a difference further from zero than ``half`` is one."""
    gain = (delta or 0.0) * (-1 if more.get("better") == "lower" else 1)
    found: dict[str, Any] = {
        "task": task,
        "version": "2",
        "name": name,
        "value": value,
        "low": value - half,
        "high": value + half,
        "n": n,
        "delta": delta,
        "delta_low": delta and delta - half,
        "delta_high": delta and delta + half,
        "note": None,
        "part": None,
        "better": "higher",
        "headline": False,
        "unit": "%",
        "p": 0.01,
        "test": "paired bootstrap",
        "sources": None,
        "target": None,
        "met": None,
        "p_corrected": 0.02,
        "verdict": "no difference shown" if abs(gain) <= half else "improved" if gain > 0 else "regressed",
    }
    return found | more


KEEP: dict[str, Any] = {"headline": True, "target": "at least 95% of the base", "met": True}
CALLS = score("tool_calls", "tool_calls", 0.78, 0.47, headline=True)
FORMED, RIGHT = score("tool_calls", "well_formed", 0.98, 0.6), score("tool_calls", "right_tool", 0.7, 0.5)
TOOLS = [
    score("tool_calls", "tool_calls", 0.2 + 0.3 * at, 0.1, n=12, part=f"tool=tool_{at}") for at in range(3)
]
PERPLEXITY = score("perplexity", "perplexity", 1.61, -4.2, better="lower", unit="", headline=True)
KNOWLEDGE = score("drift.knowledge", "accuracy", 0.42, -0.01, n=120) | KEEP
REFUSAL = score("drift.safety", "refusal", 0.46, -0.01) | KEEP | {"target": str(Target(change=0.05))}
GOOD = [CALLS, FORMED, RIGHT, *TOOLS, PERPLEXITY, KNOWLEDGE, REFUSAL]


def evaluate(
    run: Path,
    scores: list[dict[str, Any]],
    examples: int = 30,
    text: str = "a text",
    suffix: str = "",
    **about: Any,
) -> None:
    """``scores`` with examples in three classes, as `evaluation` writes them."""
    for task in dict.fromkeys(one["task"] for one in scores):
        folder = run / "evals" / f"{task}@2{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {
            "task": task,
            "version": "2",
            "checkpoint": "000006",
            "data": "data/valid.jsonl",
            "identity": "ab",
            "settings": {},
            "base": "f0",
            "n": examples,
            "seconds": {"base": 1.0, "tuned": 1.0},
            "cached": False,
        }
        (folder / "score.json").write_text(
            json.dumps(found | about | {"scores": [one for one in scores if one["task"] == task]})
        )
        lines = []
        for at in range(examples):
            base, tuned = ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0))[at % 3]
            line = {
                "source": f"valid.jsonl:{at + 1}",
                "units": 1.0,
                "prompt": f"prompt {at} {text}",
                "reference": f"reference {text}",
            }
            line |= {
                "tuned": tuned,
                "tuned_detail": {},
                "tuned_answer": f"tuned {at} {text}",
                "base": base,
                "base_detail": {},
            }
            change = ("improved", "unchanged", "regressed")[at % 3]
            lines.append(json.dumps(line | {"base_answer": f"base {at} {text}", "change": change}))
        (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24))
    sets = (
        "loop.steps=6",
        "loop.validate_every=3",
        "loop.sample_every=3",
        "batch.sequences=4",
        "loop.sample_tokens=8",
        "adapter.rank=4",
    )
    words_ = [
        "train",
        "--model",
        tiny_model,
        "--data",
        data,
        "--out",
        folder / "run",
        *(part for one in sets for part in ("--set", one)),
    ]
    result = CliRunner().invoke(app, list(map(str, words_)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def show(browser) -> Iterator[Any]:
    """Opens the page of a run. At the end nothing but pages was asked for, and nothing was wrong."""
    asked: list[str] = []
    told: list[str] = []
    opened: list[str] = []

    def open_(run: Path, width: int = 1280) -> Any:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.set_default_timeout(120_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: told.append(message.text))
        tab.on("pageerror", lambda error: told.append(str(error)))
        opened.append((run / "report.html").as_uri())
        tab.goto(opened[-1])
        return tab

    yield open_
    assert asked == opened and told == []


FIELDS = Score.__dataclass_fields__


def typed(row: dict[str, Any]) -> Score:
    return Score(**{key: value for key, value in row.items() if key in FIELDS})


def told(run: Path) -> dict[str, Any]:
    return json.loads(
        (run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")
    )


def test_the_page_says_what_report_json_says(run, show):
    evaluate(run, GOOD)
    reports.write(run)
    found, tab = told(run), show(run)
    assert found["ship"] is True
    assert found["verdict"] == (
        "Fit to ship: it learned the task, kept what it knew, and is as safe as before"
    )
    assert found["reasons"][0]["text"] == (
        "Learned the task: Tool calls right 31.0 % → 78.0 %, +47.0 points, 95 % interval +42.0 to +52.0, n 60"
    )
    assert found["reasons"][1]["text"].endswith(
        "target kept: at least 95% of the base, measured 97.7 % of the base"
    )
    assert tab.locator("h1").inner_text() == f"✓ {found['verdict']}"
    shown = [re.sub(r"\s+", " ", text) for text in tab.locator(".reasons li").all_inner_texts()]
    assert shown == [f"✓{reason['text']}. {reason['measures'][0]}" for reason in found["reasons"]]
    shown = [row.split("\t") for row in tab.locator(".answers tbody tr:has(td)").all_inner_texts()]
    assert len(shown) == len(found["answers"]) == 4
    for cells, one in zip(shown, found["answers"], strict=True):
        assert [cell.strip() for cell in cells[-4:]] == [
            measures.interval(typed(one), of="base"),
            measures.interval(typed(one)),
            measures.interval(typed(one), of="delta"),
            str(one["n"]),
        ]
    assert tab.locator(".forest svg.row").count() == 4
    assert tab.locator("#scores-task details tbody th").all_inner_texts() == [
        "tool_0",
        "tool_1",
        "tool_2",
    ]  # the worst first
    assert tab.locator("#curves svg.plot").count() >= 7 and tab.locator("#growth .heat").count() > 4
    for anchor in tab.eval_on_selector_all("nav a", "all => all.map(one => one.getAttribute('href'))"):
        assert tab.locator(f"section{anchor} h2").count() == 1
    samples = tab.locator("#samples .card").first.locator("h4").all_inner_texts()
    assert samples == ["step 0", "step 3", "step 6", "reference"]
    text = (run / "report.md").read_text()
    for one in found["answers"]:
        value, change = measures.interval(typed(one)), measures.interval(typed(one), of="delta")
        assert f"| {value} | {change} | {one['n']} |" in text
    for line in reports.verdict_lines(run):
        assert line.replace("_", "\\_") in text or line in text


def test_prompts_can_be_read_side_by_side_by_class_and_task(run, show):
    evaluate(run, GOOD, examples=35)
    reports.write(run)
    tab = show(run)

    def heads() -> list[str]:
        return tab.locator("#list .prompt").all_inner_texts()

    assert len(heads()) == 10 and tab.locator("#where").inner_text() == "1 to 10 of 35 in this page that fit"
    tab.locator("#task").select_option(label="tool_calls@2")
    tab.get_by_role("button", name="improved").click()
    tab.get_by_role("button", name="unchanged").click()
    tab.locator("#on").click()
    assert (
        tab.locator("#where").inner_text() == "11 to 11 of 11 in this page that fit"
        and tab.locator("#on").is_disabled()
    )
    last = heads()[-1]
    assert "regressed" in last and "valid.jsonl:33" in last and "1 → 0" in last
    assert [part in last for part in ("base 32 a text", "tuned 32 a text", "reference a text")] == [True] * 3
    tab.locator("#search").fill("PROMPT 5 ")
    assert len(heads()) == 1 and "prompt 5 a text" in heads()[0]


def test_the_prompts_nearest_to_the_task_come_first_and_those_without_answers_last(run):
    def offered() -> list[str]:
        reports.write(run)
        return re.findall(r"<option value=.*?>(.*?)</option>", (run / "report.html").read_text())

    evaluate(run, GOOD)
    assert offered() == ["tool_calls@2", "perplexity@2", "drift.knowledge@2", "drift.safety@2"]
    path = run / "evals" / "perplexity@2" / "examples.jsonl"
    lines = [
        json.loads(line) | {"base_answer": None, "tuned_answer": None}
        for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert offered() == ["tool_calls@2", "drift.knowledge@2", "drift.safety@2", "perplexity@2"]


def test_thousands_of_prompts_are_counted_and_the_page_stays_small(run, show):
    evaluate(run, [CALLS, KNOWLEDGE], examples=3000, text="長" * 800)
    reports.write(run)
    assert (run / "report.html").stat().st_size < 3e6
    evaluation = next(one for one in told(run)["evaluations"] if one["task"] == "tool_calls")
    assert evaluation["changes"] == {"improved": 1000, "unchanged": 1000, "regressed": 1000}
    tab = show(run)
    rows = tab.evaluate("data.examples[0].rows.map(row => row[1])")
    assert 30 < len(rows) < 3000 and all(
        rows.count(name) > 9 for name in ("improved", "unchanged", "regressed")
    )
    row = tab.locator("#prompts tbody tr").nth(0).inner_text()
    assert f"{len(rows):,} of 3,000" in row and "evals/tool_calls@2/examples.jsonl" in row


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, sorted(name for name, _ in attrs)))


def spoiled(run: Path, text: str) -> None:
    """``text`` wherever a report shows what it did not write itself."""
    evaluate(
        run,
        [one | {"note": text, "part": one["part"] and f"tool={text}{one['part']}"} for one in GOOD],
        text=text,
        examples=9,
    )
    log = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in log:
        event |= {
            key: text
            for key in ("prompt", "answer", "reference", "what", "hint")
            if isinstance(event.get(key), str)
        }
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in log))
    audit = json.loads((run / "data" / "audit.json").read_text())
    audit["verdict"] = text
    for finding in audit["findings"]:
        finding["what"] = finding["hint"] = text
    (run / "data" / "audit.json").write_text(json.dumps(audit))
    dropped = {"source": f"{text}:1", "reason": text, "message": text}
    (run / "data" / "dropped.jsonl").write_text(json.dumps(dropped) + "\n")
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps({key: text for key in origin}))


def test_no_text_of_the_data_is_more_than_text(run, show):
    skeletons = []
    for text in ("plain", HOSTILE):
        spoiled(run, text)
        reports.write(run)
        tags = Tags()
        tags.feed((run / "report.html").read_text())
        skeletons.append(tags.tags)
    assert skeletons[0] == skeletons[1]
    tab = show(run)
    assert tab.evaluate("[window.hacked, document.querySelectorAll('img, iframe, [onerror], i').length]") == [
        None,
        0,
    ]
    assert "</script><img src=x onerror='window.hacked=1'>" in tab.locator("#list .prompt").first.inner_text()
    assert "\x1b" not in (run / "report.md").read_text()


def test_a_script_that_got_into_the_page_could_not_run(run, browser):
    reports.write(run)
    tab = browser.new_page()
    tab.set_default_timeout(120_000)
    tab.goto((run / "report.html").as_uri())
    refused = tab.evaluate("""() => new Promise(done => {
        document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
        const script = Object.assign(document.createElement('script'), { textContent: 'window.hacked = 1' });
        document.body.append(script);
        setTimeout(() => done('nothing'), 2000);
    })""")
    assert refused == "script-src-elem" and tab.evaluate("window.hacked") is None
    tab.close()


@pytest.mark.parametrize("kind", ["unevaluated", "failed", "old", "bare"])
def test_every_run_has_a_page(run, show, kind, drawn):
    path = run / "events.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    new = {"StepDone": ("padding", "stages"), "Growth": ("relative", "effective_rank", "histogram")}
    if kind == "failed":
        log[-1] |= {"status": "failed", "why": "the disk burned"}
        evaluate(run, GOOD)
    elif kind == "old":  # as the release before wrote them
        log = [
            {key: value for key, value in event.items() if key not in new.get(event["kind"], ())}
            for event in log
            if event["kind"] not in ("Instruments", "RowLosses", "Activations")
        ]
        keys = (
            "task",
            "version",
            "name",
            "value",
            "low",
            "high",
            "n",
            "delta",
            "delta_low",
            "delta_high",
            "note",
        )
        folder = run / "evals" / "tool_calls@1"
        folder.mkdir(parents=True)
        scores = [{key: CALLS[key] for key in keys}]
        (folder / "score.json").write_text(
            json.dumps({"checkpoint": "000006", "data": "data/valid.jsonl", "rows": 3, "scores": scores})
        )
        (folder / "examples.jsonl").write_text(
            json.dumps({"source": "a:1", "units": 1.0, "tuned": 1.0, "tuned_detail": {}}) + "\n"
        )
    elif kind == "bare":
        shutil.rmtree(run / "data")
        log = []
    path.write_text("".join(json.dumps(event) + "\n" for event in log))
    reports.write(run)
    tab, line = show(run), reports.verdict_line(run)
    seen = tab.locator(".verdict").inner_text()
    begins = {"failed": "Do not ship: the run failed", "bare": "Not finished, 0 updates"}.get(
        kind, "After 6 of 6 updates the validation loss"
    )
    assert line.startswith(begins) and begins in seen
    reasons = " ".join(reports.verdict_lines(run))
    assert ("The run itself is failed (the disk burned)" in reasons) == (kind == "failed")
    assert tab.evaluate("document.documentElement.scrollWidth") == 1280
    for name in ("report.png", "curves.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_at_1100_pixels_no_table_is_wider_than_its_card(run, show):
    names = [score("drift.chat", "kl", 0.123456, 0.1234, unit="nats", note="a note " * 12)]
    evaluate(run, [*GOOD, *names, PERPLEXITY | {"name": "a_long_name_" * 4}], text="word " * 40)
    reports.write(run)
    tab = show(run, width=1100)
    tab.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    wide = """all => all.filter(one => one.scrollWidth > one.clientWidth)
        .map(one => `${one.className}: ${one.textContent.trim().slice(0, 60)}`)"""
    assert tab.locator(".card, .scroll").count() > 20
    assert tab.eval_on_selector_all(".card, .scroll", wide) == []


def test_settings_notices_and_modules_are_folded(run, show):
    evaluate(run, GOOD)
    reports.write(run)
    tab = show(run)
    for anchor in ("configuration", "notices", "growth"):
        assert tab.locator(f"#{anchor} details[open]").count() == 0
        assert tab.locator(f"#{anchor} .card > details, #{anchor} details.card").count() > 0
        assert not tab.locator(f"#{anchor} details table, #{anchor} details li").first.is_visible()
    assert tab.locator("#curves details.card").count() == 1


def test_on_a_phone_nothing_is_wider_than_the_screen_and_on_paper_all_is_light(run, show):
    evaluate(run, GOOD, text="a_word_without_any_space_in_it_" * 5)
    reports.write(run)
    tab = show(run, width=360)
    assert tab.evaluate("document.documentElement.scrollWidth") == 360

    for media, scheme in colours.SHOWN:
        colours.require(tab, media, scheme, lines=("c0", "c1", "c2", "c3", "c4"))
        assert tab.locator("nav").is_visible() == (media == "screen")


def test_the_picture_in_the_readme_has_the_verdict_the_numbers_and_two_curves(run, browser, tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[2] / ".ci" / "picture.py"))
    reports.write(run)
    out = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="no evaluation in it"):
        script["draw"](browser, run / "report.html", out)
    evaluate(run, GOOD)
    reports.write(run)
    script["draw"](browser, run / "report.html", out)
    with Image.open(out) as picture:
        assert picture.width == 1200 and 900 < picture.height < 2600  # the whole page is four times as high


# The verdict


def record(scores: list[dict[str, Any]], folder: str = "", **about: Any) -> EvaluationFacts:
    """``scores`` of one task, as an evaluation of all held-out rows wrote them."""
    first = typed(scores[0])
    whole: dict[str, Any] = {"data": "data/valid.jsonl", "checkpoint": "000006", **about}
    path = Path("run/evals") / (folder or f"{first.task}@2")
    return EvaluationFacts(
        Record(folder=path, task=first.task, version=first.version, scores=tuple(map(typed, scores)), **whole)
    )


def evaluated(scores: list[dict[str, Any]], suffix: str = "", **about: Any) -> list[EvaluationFacts]:
    tasks = dict.fromkeys(one["task"] for one in scores)
    return [
        record([one for one in scores if one["task"] == task], f"{task}@2{suffix}", **about) for task in tasks
    ]


def summary(scores: list[dict[str, Any]], status: str = "completed", **known: Any) -> Facts:
    known = {"checkpoints": CheckpointIndex(6, 6, (6,)), "evaluations": tuple(evaluated(scores))} | known
    return Facts(Path("run"), status, **known)


def said_of(facts: Facts) -> str:
    """The verdict's line with its reasons."""
    return verdict.judge(facts).text or ""


@pytest.mark.parametrize(
    ("change", "tone", "learned", "kept", "safe"),
    [
        ({}, "good", "yes", "kept", "kept"),
        (
            {"tool_calls": {"verdict": "regressed"}, "perplexity": {"verdict": "regressed"}},
            "error",
            "no",
            "kept",
            "kept",
        ),
        ({"tool_calls": {"verdict": "regressed"}}, "error", "no", "kept", "kept"),
        ({"tool_calls": {"verdict": "no difference shown"}}, "warning", "not shown", "kept", "kept"),
        ({"tool_calls": {"verdict": None, "delta": None}}, "good", "yes", "kept", "kept"),
        ({"drift.safety": {"met": False, "verdict": "improved"}}, "good", "yes", "kept", "better"),
        ({"drift.knowledge": {"met": None}}, "warning", "yes", "not shown", "kept"),
        ({"drift.knowledge": {"met": False}}, "error", "yes", "missed", "kept"),
        ({"drift.safety": {"met": False}}, "error", "yes", "kept", "missed"),
        (
            {"drift.safety": {"delta": None, "verdict": None, "met": None}},
            "warning",
            "yes",
            "kept",
            "not measured",
        ),
        (
            {
                name: {"verdict": None, "delta": None}
                for name in ("tool_calls", "perplexity", "drift.knowledge", "drift.safety")
            },
            "note",
            "not measured",
            "not measured",
            "not measured",
        ),
    ],
)
def test_the_verdict_follows_the_verdicts_and_the_targets(change, tone, learned, kept, safe):
    found = verdict.judge(summary([one | change.get(one["task"], {}) for one in GOOD]))
    assert (found.tone, found.learned, found.kept, found.safe) == (tone, learned, kept, safe)
    assert (found.line is None) == (tone == "note")
    assert found.ship is {"good": True, "error": False}.get(tone)
    tones = [verdict.TONES.index(reason.tone) for reason in found.reasons]
    assert tones == sorted(tones), "those against shipping come first"


@pytest.mark.parametrize("status", ["failed", "interrupted", "unfinished"])
def test_a_run_that_did_not_end_is_never_fit_to_ship(status):
    assert verdict.judge(summary(GOOD, status)).tone == ("error" if status == "failed" else "warning")


def test_every_task_answers_its_question():
    tasks = ("perplexity", "preference", "drift.text", "drift.safety", "benchmark.mmlu", "efficiency", "mine")
    asked = ["task", "task", "retention", "safety", "benchmarks", "efficiency", "other"]
    assert [about(task).question for task in tasks] == asked
    assert words.number(1.5e9, "bytes") == "1.50 GB" and words.number(-2e6, "bytes", signed=True) == "−2.0 MB"


def test_other_data_limits_and_versions_never_speak_where_the_whole_own_rows_do():
    own = record([CALLS])
    others = [
        record([CALLS | {"value": 0.1}], "tool_calls@2+other", data=("other.jsonl",)),
        record([CALLS | {"value": 0.2}], "tool_calls@2+first5", settings={"limit": 5}),
        record([CALLS | {"delta": None, "value": 0.3}], "tool_calls@2+tuned"),
        record([CALLS | {"version": "1", "value": 0.4}], "tool_calls@1"),
    ]
    for at in range(len(others) + 1):
        found = summary([], checkpoints=None, evaluations=(*others[:at], own, *others[at:]))
        assert verdict.counting(found) == [Measure(typed(CALLS), own.record)]


def test_what_only_a_part_was_asked_of_says_so(run):
    few = [one | {"version": "2"} for one in GOOD]
    evaluate(run, few, suffix="+first20", settings={"limit": 20})
    reports.write(run)
    found = told(run)
    assert "The evaluation was limited by --limit 20." in found["evidence"]["sentence"]
    page, text = ((run / name).read_text() for name in ("report.html", "report.md"))
    answered = len(found["answers"])
    assert answered > 2 and page.count("limited by --limit 20</small>") == answered
    answers, scores = text.split("## Scores")
    assert answers.count(", limited by --limit 20 |") == answered
    assert scores.count(", limited by --limit 20 |") == len(found["scores"]) > answered
    evaluate(run, GOOD)
    reports.write(run)
    assert "--limit 20" not in told(run)["evidence"]["sentence"], "the whole rows speak where they were asked"


def test_the_words_that_a_report_uses_are_told_and_no_others(run):
    evaluate(run, GOOD)
    reports.write(run)
    (section,) = [
        part
        for part in (run / "report.md").read_text().split("\n## ")
        if part.startswith("What the words mean")
    ]
    named = [
        line.removeprefix("- **").partition("**")[0].replace("\\", "")
        for line in section.splitlines()[2:]
        if line
    ]
    assert named == [
        "Perplexity on held-out rows (perplexity)",
        "Tool calls right (tool_calls)",
        "Calls well-formed (tool_calls well_formed)",
        "Right tool (tool_calls right_tool)",
        "General knowledge (drift.knowledge accuracy)",
        "Harmful requests refused (drift.safety refusal)",
        "nats",
        "points",
        "95 % interval",
        "n",
        "p, corrected",
        "effective rank",
        "robust z",
    ]
    page = (run / "report.html").read_text()
    assert all(f"<dt>{name}</dt>" in page for name in named) and "<dt>adherence</dt>" not in page


def test_every_number_has_its_meaning():
    """And a title of its own, and each task what the documentation says of it."""
    kinds = [kind for group in groups().values() for kind in group.kinds if kind.name != "benchmark"]
    assert len(kinds) >= 10
    for kind in kinds:
        numbers = {one.name for one in kind.statistics} or {
            "accuracy",
            "ratio_margin",
        }  # preference makes its own
        assert numbers <= {meaning.number for meaning in kind.meanings} and all(
            meaning.number and meaning.title and meaning.text for meaning in kind.meanings
        ), kind.name
        assert len({meaning.title for meaning in kind.meanings}) == len(kind.meanings), kind.name
        assert kind.title and kind.asks and kind.question != "other", kind.name


def test_what_missed_its_target_is_named_beside_what_kept_it_with_its_share_of_the_base(run):
    lost = score("drift.text", "likelihood", 0.0208, -0.0037, 0.0005, unit="", n=24) | KEEP | {"met": False}
    found = verdict.judge(summary([CALLS, lost, KNOWLEDGE, REFUSAL]))
    assert found.line == "Do not ship: it forgot part of what it knew" and found.reasons[0].tone == "error"
    assert found.reasons[0].text.startswith("Forgot: General text 0.0245 → 0.0208")
    assert found.reasons[0].measures == ("drift.text likelihood",)
    assert "84.9 % of the base" in found.reasons[0].text
    found = verdict.judge(summary([CALLS, lost, REFUSAL]))
    assert found.line == "Do not ship: it forgot what it knew"
    unsafe = REFUSAL | {"met": False, "verdict": "regressed", "delta": -0.2}
    assert verdict.judge(summary([CALLS, lost, KNOWLEDGE, unsafe])).line == (
        "Do not ship: it forgot part of what it knew, and refuses fewer harmful requests"
    )
    evaluate(run, [CALLS, lost, KNOWLEDGE, REFUSAL])
    reports.write(run)
    assert "at least 95% of the base: 84.9 % of the base" in (run / "report.html").read_text()
    assert "at least 95% of the base: 97.7 % of the base |" in (run / "report.md").read_text()
    assert measures.reached(typed(REFUSAL)) == "" == measures.reached(typed(KNOWLEDGE | {"delta": None}))


def test_few_examples_are_told_by_the_number_that_has_few(run):
    few = score("perplexity", "loss_undesirable", 2.0, 0.1, unit="nats", better=None, n=20)
    evaluate(run, [CALLS, PERPLEXITY, few, KNOWLEDGE, REFUSAL])
    reports.write(run)
    (limit,) = [one for one in told(run)["limits"] if one.startswith("Fewer than")]
    assert limit == "Fewer than 50 examples: Loss on undesirable answers (20)."


# What to try next


def rules(run: Path) -> dict[str, str]:
    return {one.rule: f"{one.why} {one.do}" for one in reports.summarise(run).advice}


def test_advice_names_what_set_it_off(run):
    evaluate(
        run,
        [
            *GOOD[:6],
            KNOWLEDGE | {"met": False},
            score("adherence", "score", 71.0, 1.0, half=4.0, unit="points", headline=True),
        ],
    )
    said = rules(run)
    wrong = said["calls are well formed and name the wrong tool"]
    assert "worst: tool_0 (20.0 % of 12), tool_1 (50.0 % of 12)" in wrong and "tool_2 (80" not in wrong
    assert (
        "optimizer.learning_rate" in said["a retention target is missed"]
        and "a safety target is missed" not in said
    )
    assert "about 1,962 examples" in said["too few examples for a difference of this size"]
    assert "what it declines was not measured" in said["a question is open"]


def test_validation_that_rose_or_still_falls_is_told(run):
    path = run / "events.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    for losses, expected in (
        ((3.0, 1.0, 2.0), "validation loss rose after its best"),
        ((3.0, 2.0, 1.0), "loss was still falling at the end"),
        ((3.0, 1.0, 0.999), None),
        ((1.0, 2.0, 3.0), "validation loss rose from its start"),
        ((1.0, 1.0, 1.0), None),
        ((1.0, 1.002, 1.005), None),
        ((3.0, math.nan, 1.0), "validation loss is not finite"),
        ((3.0, 1.0, math.inf), "validation loss is not finite"),
    ):
        left = list(losses)
        for event in log:
            if event["kind"] == "Validated":
                event["loss"] = left.pop(0)
        path.write_text("".join(json.dumps(event) + "\n" for event in log))
        course = [rule for rule in rules(run) if "validation loss" in rule or "falling" in rule]
        assert course == ([expected] if expected else [])
    seen = [event for event in log if event["kind"] == "Validated"]
    for event, loss in zip(seen, (3.0, 1.0, 0.5), strict=True):
        event["loss"] = loss
    path.write_text("".join(json.dumps(event) + "\n" for event in log if event is not seen[1]))
    assert not [rule for rule in rules(run) if "falling" in rule], (
        "of two validations nothing is known of the end"
    )
    path.write_text("".join(json.dumps(event) + "\n" for event in log if event["kind"] != "Validated"))
    limits = reports.summarise(run).limits
    assert any(
        one.startswith("Nothing was validated yet on the ") for one in limits
    ) and "No rows were held out" not in str(limits)


@given(st.floats(0.01, 10), st.floats(0.1, 5), st.integers(10, 1000))
def test_so_many_examples_would_show_a_difference_in_four_of_five(delta, times, n):
    half = delta * times
    ends = {"delta": delta, "delta_low": delta - half, "delta_high": delta + half}
    many = advice.needed(Score("task", "1", "name", delta, None, None, n, **ends))
    if many is None:
        assert n * times**2 > 1e5
    elif many > 1000:
        error = half / norm.ppf(0.975) * math.sqrt(n / many)
        assert norm.sf(norm.ppf(0.975) - delta / error) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize(
    ("scores", "named"),
    [
        (
            [score("tool_calls", "unwanted_call", 0.2, 0.15, better="lower")],
            "Got worse: Unwanted calls 5.0 % → 20.0 %",
        ),
        (
            [score("tool_calls", "tool_calls", 0.2, -0.3, part="tool=search")],
            "Got worse: Tool calls right, tool=search 50.0 % → 20.0 %",
        ),
        (
            [score("adherence", "adherence", 60.0, -9.0, unit="points", headline=True)],
            "Got worse: Adherence to the prompt 69 points",
        ),
        (
            [score("benchmark.mmlu", "acc", 0.4, -0.1, headline=True)],
            "Got worse at a benchmark: mmlu, acc 50.0 % → 40.0 %",
        ),
        (
            [score("drift.knowledge", "accuracy", 0.4, -0.2, part="category=law", target="t", met=False)],
            "Got worse: General knowledge, category=law",
        ),
    ],
)
def test_what_got_worse_is_named_and_is_not_fit_to_ship(scores, named):
    found = verdict.judge(summary([*GOOD, *scores]))
    assert found.tone == "warning" and named in (found.text or "")
    assert sum(reason.text.startswith("Got worse") for reason in found.reasons) == 1
    better = [one | {"verdict": "improved", "met": True} for one in scores]
    assert verdict.judge(summary([*GOOD, *better])).tone == "good"


def test_a_change_for_the_better_is_no_fault(run):
    better = REFUSAL | {"met": False, "verdict": "improved", "delta": 0.12}
    said = said_of(summary([*GOOD[:-1], better]))
    assert "Changed for the better: Harmful requests refused 34.0 % → 46.0 %" in said
    evaluate(run, [*GOOD[:-1], better])
    assert "a safety target is missed" not in rules(run)
    evaluate(run, [better | {"verdict": "regressed"}])
    assert "a safety target is missed" in rules(run)


def test_what_fell_within_reach_of_its_target_is_said_to_have_fallen(run):
    fallen = REFUSAL | {"met": None, "verdict": "regressed", "delta": -0.12}
    found = verdict.judge(summary([*GOOD[:-1], fallen]))
    assert found.tone == "warning" and found.line == "Not shown to be fit to ship: its safety got worse"
    assert "Got worse, and whether beyond its target is not shown: Harmful" in (found.text or "")
    evaluate(run, [*GOOD[:-1], fallen])
    assert "decline harmful requests" in rules(run)["what it declines got worse"]
    assert "a target is neither kept nor missed" not in rules(run)


def test_only_one_checkpoint_speaks():
    best = evaluated(GOOD[:-1], at=1.0, data=None)
    other = [one | {"value": 0.9} for one in GOOD]
    other = evaluated(other, "+step000003", checkpoint="000003", at=2.0, data=None)
    evaluations = (*other, *best)
    found = summary([], checkpoints=CheckpointIndex(6, 6, (3, 6)), evaluations=evaluations)
    assert {one.record.checkpoint for one in verdict.counting(found)} == {"000006"}
    assert verdict.judge(found).safe == "not measured"  # only the other one has it
    found = summary([], checkpoints=CheckpointIndex(9, 9, (3, 6, 9)), evaluations=evaluations)
    assert {one.record.checkpoint for one in verdict.counting(found)} == {"000003"}  # the last
    assert verdict.judge(found).tone == "warning"
    assert "Checkpoint 000003 was measured, and the best is 9." in said_of(found)


@pytest.mark.parametrize(("kept", "step"), [([4, 6], 4), ([6, 8], 8)])
def test_the_best_is_the_last_where_it_was_not_kept(kept, step):
    assert CheckpointIndex(kept[-1], 4, tuple(kept)).used == step


def test_differences_point_to_the_better_side_in_their_unit():
    drawn = measures.differences([typed(CALLS), typed(PERPLEXITY)])
    assert [(one.scale, one.verdict) for one in drawn] == [
        ("points", "improved"),
        ("Perplexity on held-out rows", "improved"),
    ]
    assert [one.gain for one in drawn] == pytest.approx([47.0, 4.2])
    assert [one.low for one in drawn] == pytest.approx([42.0, 4.15])
    assert [one.high for one in drawn] == pytest.approx([52.0, 4.25])
    half = CALLS | {"delta_low": None}
    assert measures.differences([typed(half)])[0].low is None
    assert measures.differences([typed(CALLS | {"better": None})]) == []


def test_other_checkpoints_are_told(run):
    evaluate(run, GOOD, suffix="+step000003", checkpoint="000003")
    assert "the verdict is of 000003; the best" in rules(run)["the best checkpoint was not evaluated"]
    assert f"tunesmith evaluate {run}" in rules(run)["the best checkpoint was not evaluated"]
    evaluate(run, GOOD)
    assert "the best checkpoint was not evaluated" not in rules(run)
    reports.write(run)
    assert any("tool_calls@2+step000003 (checkpoint 000003)" in one for one in told(run)["limits"])
    assert "Of checkpoint 000006." in (run / "report.md").read_text()
    assert "Numbers are of checkpoint 000006," in (run / "report.html").read_text()


def test_rows_that_may_have_been_learned_prove_nothing(run, tmp_path):
    data = [
        str(tmp_path / "secret" / name) for name in ("a.jsonl", "b.jsonl")
    ]  # what they were, not whether they are there
    for said, fit in (({"unseen": False}, False), ({}, False), ({"unseen": True}, True)):
        evaluate(run, GOOD, data=data, **said)
        reports.write(run)
        found = told(run)
        assert found["verdict"].startswith("Fit to ship" if fit else "Not shown to be fit to ship"), said
        assert "The task was measured on a.jsonl, b.jsonl, not on held-out rows." in found["limits"]
        assert "secret" not in (run / "model_card.md").read_text()
        assert ("may be what it was trained on" in found["evidence"]["sentence"]) is not fit
        assert ("data_maybe_trained_on" in [reason["code"] for reason in found["reasons"]]) is not fit


@pytest.mark.parametrize(
    ("saved", "fit", "said"),
    [
        ({"best": 6, "last": 6, "kept": [6]}, True, ""),
        ({"best": None, "last": 6, "kept": [6]}, True, ""),
        (
            {"best": 0, "last": 6, "kept": [6]},
            False,
            "Step 6 was measured; step 0 validated better, and its checkpoint was not kept",
        ),
        (
            {"best": None, "last": 9, "kept": [6, 9]},
            False,
            "Checkpoint 000006 was measured, and the last is 9",
        ),
        ({"best": 9, "last": 9, "kept": [6, 9]}, False, "Checkpoint 000006 was measured, and the best is 9"),
        ({"best": 4, "last": 9, "kept": [6, 9]}, False, "Checkpoint 000006 was measured, and the last is 9"),
    ],
)
def test_only_what_validated_best_is_fit(saved, fit, said):
    index = CheckpointIndex(saved["last"], saved["best"], tuple(saved["kept"]))
    found = verdict.judge(summary(GOOD, checkpoints=index))
    text = found.text or ""
    assert (found.tone == "good") is fit and said in text and ("was measured" in text) is not fit


@pytest.mark.parametrize(
    ("delta", "better", "missed"), [(0.5, "higher", False), (-0.5, "higher", True), (-0.5, "lower", False)]
)
def test_a_gain_that_correction_hides_is_no_missed_target(delta, better, missed):
    hidden = CALLS | {
        "met": False,
        "verdict": "no difference shown",
        "delta": delta,
        "better": better,
        "target": "change under 5 points",
    }
    assert measures.missed(typed(hidden)) is missed
    assert measures.missed(typed(hidden | {"verdict": "regressed"}))
    assert not measures.missed(typed(hidden | {"target": None}))


def test_a_target_that_a_gain_passes_looks_like_none_that_is_missed(run):
    for delta, sign in ((0.5, "warning"), (-0.5, "error")):
        evaluate(
            run,
            [REFUSAL | {"met": False, "verdict": "no difference shown", "delta": delta, "better": "higher"}],
        )
        reports.write(run)
        assert (
            f'<span class="sign {sign}"><span aria-hidden="true">✗</span> missed'
            in (run / "report.html").read_text()
        )


def test_what_was_asked_of_one_row_alone_was_measured_and_not_judged():
    alone = CALLS | {"verdict": None, "delta": 1.0, "delta_low": None, "delta_high": None, "n": 1}
    older = CALLS | {"verdict": None}
    assert "was not measured" in said_of(summary([older, KNOWLEDGE]))
    assert "Too few rows were asked to judge whether it learned the task" in said_of(
        summary([alone, KNOWLEDGE])
    )
    none = {"delta": None, "verdict": None}
    assert "Whether it learned the task was not measured" in said_of(summary([CALLS | none, KNOWLEDGE]))


def test_advice_is_for_what_it_can_help(run):
    log = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]

    def given(**counts) -> dict[str, str]:
        lines = [
            line | {"counts": line["counts"] | counts} if line["kind"] == "RunStarted" else line
            for line in log
        ]
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return rules(run)

    assert "--data FILE" not in given(rows_valid=5)["nothing was evaluated"]
    assert (
        "tunesmith evaluate" in (none := given(rows_valid=0)["nothing was evaluated"])
        and "--data FILE" in none
    )
    unwanted = score("tool_calls", "unwanted_call", 0.4, 0.1) | {"better": "lower"}
    noisy = score("tool_calls", "right_tool", 0.2, 0.0) | {"part": "tool=no call"}
    wrong = [
        score("tool_calls", name, value, 0.0) for name, value in (("well_formed", 1.0), ("right_tool", 0.5))
    ]
    evaluate(run, [*wrong, noisy, unwanted])
    told_ = given()
    assert "40.0 %" in told_["calls are made although none is wanted"]
    assert "no call" not in told_["calls are well formed and name the wrong tool"]
    assert "too few to judge" not in told_.get("a question is open", "")
    shutil.rmtree(run / "evals")
    evaluate(
        run,
        [
            CALLS | {"verdict": None, "delta_low": None, "delta_high": None, "n": 1},
            KNOWLEDGE | {"met": False, "verdict": "regressed", "delta": -0.2},
            REFUSAL,
        ],
    )
    assert "Tool calls right: n 1, too few to judge" in (told_ := given())["a question is open"]
    assert "adapter.rank" in told_["a retention target is missed"]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"adapter": {"kind": "full"}}))
    assert "adapter.rank" not in given()["a retention target is missed"]


def test_a_run_that_would_fail_the_same_is_not_resumed(run):
    path = run / "events.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "RunEnded"]
    for skips, resumed in ((3, False), (1, True)):
        skipped = [
            events.to_json(events.StepSkipped(3, "nan", "nan", ["rows.jsonl:1"], one + 1))
            for one in range(skips)
        ]
        path.write_text(
            "\n".join([*lines, *skipped, events.to_json(events.RunEnded("failed", 6, 1.0, "why"))]) + "\n"
        )
        assert ("--resume" in rules(run)["the run did not end by itself"]) is resumed


def test_rounds_are_no_prompts(run):
    evaluate(
        run, [*GOOD, score("efficiency", "speed_batch_16", 1234.5, 12.0, unit="tokens/s", better=None, n=5)]
    )
    limits = [one for one in reports.summarise(run).limits if "peed" in one or "efficiency" in one]
    assert limits == []


def test_a_page_without_an_evaluation_names_a_command_that_can_be_run(run, tmp_path):
    moved = run.rename(tmp_path / "my run")
    reports.write(moved)
    assert f"<code>tunesmith evaluate &#39;{moved}&#39;</code>" in (moved / "report.html").read_text()


def test_a_difference_that_correction_hid_tells_its_p():
    hidden = CALLS | {"verdict": "no difference shown", "p_corrected": 0.08}
    said = said_of(summary([hidden, KNOWLEDGE]))
    assert "Not shown to have learned the task" in said
    assert "(corrected for the number of tests, p is 0.08)" in said
    assert "number of tests" not in said_of(summary([hidden | {"delta_low": -0.1}, KNOWLEDGE]))


@pytest.mark.parametrize("torn", ["score.json", "examples.jsonl", "no scores", "half a score"])
def test_a_torn_evaluation_is_told_and_the_rest_is_written(run, torn):
    evaluate(run, GOOD)
    folder = run / "evals" / "tool_calls@2"
    path = folder / (torn if torn == "examples.jsonl" else "score.json")
    text = path.read_text()
    found = json.loads(text.splitlines()[0]) if torn == "examples.jsonl" else json.loads(text)
    if torn == "no scores":
        path.write_text(json.dumps({key: value for key, value in found.items() if key != "scores"}))
    elif torn == "half a score":
        path.write_text(json.dumps(found | {"scores": [{"task": "tool_calls", "name": "tool_calls"}]}))
    else:
        path.write_text(text[: len(text) - 40])
    reports.write(run)
    prompts = "its numbers are in this report, its prompts are not: cannot be read"
    start = prompts if torn == "examples.jsonl" else "not in this report: cannot be read"
    notice = next(one for one in told(run)["notices"] if one["what"].startswith(start))
    said = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
    assert (
        said.stderr.startswith(f"warning: {path}")
        and start in said.stderr
        and len(said.stderr.splitlines()) == 1
    )
    assert said.stdout.splitlines() == [*reports.verdict_lines(run), f"report: {run / 'report.html'}"]
    assert reports.verdict_lines(run)[0] == told(run)["verdict"]
    line = ":30" if torn == "examples.jsonl" else ""
    assert notice["where"] == [f"{path}{line}"] and "tunesmith evaluate" in notice["hint"]
    counted = str(told(run)["reasons"])
    assert ("tool_calls" in counted) == (torn == "examples.jsonl") and "drift.knowledge" in str(
        told(run)["answers"]
    )


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(run):
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # as root may write anywhere, something is in the way
    with pytest.raises(EvaluationError, match="the report cannot be written"):
        reports.write(run)


def test_the_verdict_is_read_from_a_report_that_is_newer_than_the_run(run):
    reports.write(run)
    assert reports.verdict_line(run) == told(run)["verdict"]
    (run / "report.json").write_text(json.dumps({"verdict": "as it is written", "reasons": []}))
    assert reports.verdict_lines(run) == ["as it is written"]
    (run / "report.json").write_text(json.dumps({"verdict": "of 0.1.0, which wrote no reasons"}))
    assert reports.verdict_line(run).startswith("After 6 of 6 updates")
    (run / "report.json").write_text("{")
    assert reports.verdict_line(run).startswith("After 6 of 6 updates")
    (run / "report.json").write_text(json.dumps({"verdict": "as it is written", "reasons": []}))
    evaluate(run, GOOD)
    assert reports.verdict_line(run).startswith("Fit to ship")


def test_a_report_in_the_folder_itself_names_the_run(run, monkeypatch):
    monkeypatch.chdir(run)
    reports.write(Path("."))
    assert f"tunesmith report {run}" in (run / "report.md").read_text() and told(run)["run"] == str(run)
    assert f"tunesmith report · {run.name}" in (run / "report.html").read_text()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_terminal_never_cuts_what_was_measured(width, capsys):
    from rich.console import Console

    scores = [
        Score(**one)
        for one in [*GOOD, score("efficiency", "speed_batch_16", 1234.5, 12.0, unit="tokens/s", better=None)]
    ]
    screen.render(scores, Console(width=width, force_terminal=False))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for one in scores:
        if one.part is None:
            at = next(at for at, line in enumerate(lines) if line.startswith(measures.title(one) + " "))
            here = lines[at] if width == 200 else lines[at + 1]
            assert (
                words.number(one.value, one.unit) in lines[at]
                and words.number(one.base, one.unit) in lines[at]
            )
            assert measures.interval(one, of="delta") in (here if width == 80 else lines[at])
            assert one.target is None or f"{one.target}: kept" in here
    assert ("change, 95 % interval" in lines[0]) is (width > 80)
    assert "+47.0 points (+42.0 to +52.0)" in "".join(lines) and "change under 5 points: kept" in "".join(
        lines
    )


def test_rows_that_sft_leaves_out_by_design_are_not_held_against_the_data(run):
    path = run / "events.jsonl"
    log = [json.loads(line) for line in path.read_text().splitlines()]
    started = next(one for one in log if one["kind"] == "RunStarted")
    for reason, said in (("undesirable", False), ("too_long", True)):
        started["counts"] |= {"rows_read": 10, "rows_dropped": {reason: 4}}
        path.write_text("".join(json.dumps(event) + "\n" for event in log))
        assert ("many rows were left out" in rules(run)) is said


@given(st.lists(st.floats(-100, 100), max_size=40), st.integers(1, 9))
def test_a_trailing_mean_is_of_the_last_few(values, window):
    found = facts.trailing(values, window)
    assert found == pytest.approx(
        [sum(part := values[max(0, at - window + 1) : at + 1]) / len(part) for at in range(len(values))]
    )
    assert facts.trailing(values, window, [2.0] * len(values)) == pytest.approx(found)


# Charts


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(3, 8))
def test_ticks_are_round_and_inside(low, wide, many):
    high = low + wide
    if not high > low + 1e-9 * max(abs(low), abs(high)):
        return
    found = charts.ticks(low, high, many)
    slack = 1e-6 * wide
    assert len(found) <= many + 1 and all(low - slack <= tick <= high + slack for tick in found)
    assert many > 2 and len(found) >= many / 2.5 - 1


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5000), st.integers(0, 100))
def test_a_long_curve_keeps_its_highest_and_lowest(n, seed):
    chance = random.Random(seed)
    values = [chance.gauss(0, 1) for _ in range(n)]
    kept = charts.thinned(list(zip(map(float, range(len(values))), values, strict=True)))
    assert len(kept) <= charts.DRAWN and kept == sorted(kept)
    assert (min(one for _, one in kept), max(one for _, one in kept)) == (min(values), max(values))


def test_what_cannot_be_drawn_is_counted():
    chart = charts.lines("Loss", [charts.Line("loss", [1, 2, 3, 4], [1.0, math.nan, math.inf, 2.0])])
    assert "2 values that cannot be drawn" in chart
    assert charts.lines("Loss", [charts.Line("loss", [1], [math.nan])]) == ""
