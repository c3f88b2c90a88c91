"""A file with reasoning is learned as the template writes it, and how thinking stands is said everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import DataError
from tunesmith.runs import opening, thinking

SWITCHED = (  # as Qwen3: the last answer has a block, which is empty in the prompt if thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
UNSWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYOUTS = {
    "reasoning_content": lambda words, thought: {"content": words, "reasoning_content": thought},
    "thinking": lambda words, thought: {"content": words, "thinking": thought},
    "parts": lambda words, thought: {
        "content": [{"type": "reasoning", "text": thought}, {"type": "text", "text": words}]
    },
    "marks": lambda words, thought: {"content": f"<think>\n{thought}\n</think>\n\n{words}"},
}


def write(path: Path, layout: str, count: int = 20, reasoned: int = 20) -> Path:
    rows = []
    for number in range(count):
        answer = LAYOUTS[layout](f"the cat {number}", f"a mat {number}")
        answer = answer if number < reasoned else {"content": f"the cat {number}"}
        turns = [{"role": "user", "content": f"my note {number}"}, {"role": "assistant", **answer}]
        rows.append({"messages": turns})
    return tiny.write_rows(path, rows)


@pytest.fixture
def model(tmp_path, tiny_model):
    def made(template: str) -> Path:
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        return folder

    return made


def configured(model: Path, rows: Path, *sets: str):
    return tunesmith.configure(
        model=str(model), data=[str(rows)], sets=["loop.steps=2", "loop.sample_tokens=4", *sets]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reasoning_is_learned_where_inference_begins_in_every_layout(layout, tmp_path, model):
    rows = write(tmp_path / "rows.jsonl", layout)
    run = tunesmith.train(configured(model(SWITCHED), rows), out=tmp_path / "run")
    for row in json.loads((run.path / "data" / "rendered.json").read_text()):
        learned = "".join(text for text, weight in row["tokens"] if weight)
        prompt = "".join(text for text, weight in row["tokens"] if not weight)
        assert prompt.endswith("<|im_start|>assistant\n")
        assert learned.startswith("<think>\na mat ") and "</think>\n\nthe cat" in learned
        assert learned.endswith("<|im_end|>")


def test_how_thinking_stands_is_said_in_plan_report_and_card(tmp_path, model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content", reasoned=15)
    config, heard = configured(model(SWITCHED), rows), []
    due = {"answers": 20, "with_reasoning": 15, "switch": "enable_thinking", "decided_by": "rows"}
    assert tunesmith.plan(config)["reasoning"] == due
    run = tunesmith.train(config, out=tmp_path / "run", notify=heard.append)
    line = "thinking is on in prompts: 15 of 20 answers have reasoning"
    assert [event.where for event in heard if isinstance(event, events.Notice) and event.what == line] == [
        "template.thinking"
    ]
    content = json.loads((run.path / "report.json").read_text())
    assert content["counts"]["reasoning"] == due
    for name in ("report.html", "report.md"):
        text = (run.path / name).read_text()
        assert line in text and "reasoning.with_reasoning" in text
    assert f"T{line[1:]}." in (run.path / "model_card.md").read_text()


@pytest.mark.parametrize(
    ("choice", "reasoned", "on"),
    [("auto", 15, True), ("auto", 5, False), ("off", 15, False), ("on", 5, True)],
)
def test_a_run_is_asked_as_most_answers_were_learned_or_as_the_setting_says(
    choice, reasoned, on, tmp_path, model
):
    rows = write(tmp_path / "rows.jsonl", "thinking", reasoned=reasoned)
    config = configured(model(SWITCHED), rows, f"template.thinking={choice}")
    run = tunesmith.train(config, out=tmp_path / "run")
    plan = json.loads((run.path / "data" / "plan.json").read_text())
    assert plan["thinking"] is on
    assert plan["reasoning"]["decided_by"] == ("rows" if choice == "auto" else "template.thinking")
    opened = opening.find(run.path).open()
    assert opened.renderer.thinking is on


def test_without_a_switch_it_is_said_that_reasoning_is_learned(tmp_path, model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content", reasoned=15)
    heard: list[events.Event] = []
    plan = tunesmith.plan(configured(model(UNSWITCHED), rows), notify=heard.append)
    assert plan["reasoning"]["switch"] is None
    texts = [event.what for event in heard if isinstance(event, events.Notice)]
    assert "15 of 20 answers have reasoning, and it is learned" in texts
    assert "reasoning beside answers: learned as the template writes it" in texts


def test_reasoning_beside_answers_is_refused_if_the_template_has_no_form_for_it(tmp_path, tiny_model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content")
    with pytest.raises(DataError, match=r"(?s)reasoning 20.*no form for it") as refused:
        tunesmith.plan(configured(tiny_model, rows))
    assert "data.reasoning: think learns it as <think> text before the answer" in refused.value.what
    for choice in ("think", "omit"):
        plan = tunesmith.plan(configured(tiny_model, rows, f"data.reasoning={choice}"))
        assert plan["reasoning"]["with_reasoning"] == (20 if choice == "think" else 0)


def test_think_text_in_words_is_words_to_a_template_without_reasoning(tmp_path, tiny_model):
    rows = write(tmp_path / "rows.jsonl", "marks")
    assert tunesmith.plan(configured(tiny_model, rows))["reasoning"]["with_reasoning"] == 20


def test_plans_of_older_runs_say_nothing():
    assert thinking.of_counts({"thinking": True}) is None
    assert thinking.of_counts({"reasoning": {"answers": "many"}}) is None
