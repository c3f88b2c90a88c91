"""A file with reasoning is learned as the template writes it, and how thinking stands is said everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.errors import ConfigError, DataError
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
CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"
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


def learned(model: Path, rows: Path, *sets: str) -> list[tuple[str, str]]:
    """What each row shows before its first learned token, and what is learned in it."""
    rendered, renderer = tunesmith.show([str(rows)], model=str(model), sets=sets)
    assert rendered.dropped == []
    parts = []
    for row in rendered.rows:
        ids, targets = row.tokens
        parts.append((renderer.decode(ids[: row.tokens.start]), renderer.decode(ids[targets > 0])))
    return parts


def test_each_answer_of_a_conversation_is_learned_with_its_own_reasoning(tmp_path, model):
    turns = []
    for number in (1, 2, 3):
        turns += [{"role": "user", "content": f"my note {number}"}]
        turns += [{"role": "assistant", "content": f"cat {number}", "reasoning": f"mat {number}"}]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}])
    parts = learned(model(SWITCHED), rows)
    assert [answer for _, answer in parts] == [
        f"<think>\nmat {number}\n</think>\n\ncat {number}<|im_end|>" for number in (1, 2, 3)
    ]
    assert not any("mat" in prompt for prompt, _ in parts), "older reasoning is no context"


def test_a_pair_has_reasoning_on_both_sides_or_is_refused_with_the_reason(tmp_path, model):
    asked = {"role": "user", "content": "my note"}
    chosen = {"role": "assistant", "content": "a cat", "thinking": "a mat"}
    rejected = {"role": "assistant", "thinking": "a tool", "content": "a timer"}
    row = {"prompt": [asked], "chosen": [chosen], "rejected": [rejected]}
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    parts = learned(model(SWITCHED), rows, "objective=dpo")
    assert [answer for _, answer in parts] == [
        "<think>\na mat\n</think>\n\na cat<|im_end|>",
        "<think>\na tool\n</think>\n\na timer<|im_end|>",
    ]
    del rejected["thinking"]
    tiny.write_rows(rows, [row] * 2)
    (refused, _) = tunesmith.show([str(rows)], model=str(tmp_path / "model"), sets=["objective=dpo"])[
        0
    ].dropped
    assert "chosen has reasoning and rejected has none" in refused.message


def test_reasoning_before_a_call_is_learned(tmp_path, model):
    template = SWITCHED.replace(
        "{{ m.content }}<|im_end|>",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
        "{% endfor %}<|im_end|>",
    )
    call = {"id": "c", "type": "function", "function": {"name": "cat", "arguments": {"mat": "note"}}}
    answer = {"role": "assistant", "content": "", "reasoning_content": "a tool", "tool_calls": [call]}
    row = {"messages": [{"role": "user", "content": "my note"}, answer]}
    row["messages"] += [{"role": "tool", "tool_call_id": "c", "content": "4"}]
    row["messages"] += [{"role": "assistant", "content": "four", "learn": False}]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [row])
    ((_, text),) = learned(model(template), rows)
    assert text.startswith("<think>\na tool\n</think>\n\n<tool_call>") and '"mat": "note"' in text


@pytest.mark.parametrize("name", ["06_reasoning_field.jsonl", "06_think.jsonl"])
def test_the_reported_files_are_learned_behind_the_prompt_of_inference(name, model):
    if not (CASES / name).is_file():
        pytest.skip(f"the reported file is absent: shared/cases/{name}")
    parts = learned(model(SWITCHED), CASES / name)
    assert parts
    for prompt, answer in parts:
        assert prompt.endswith("<|im_start|>assistant\n") and "<think>" not in prompt
        assert answer.startswith("<think>\n") and answer.endswith("<|im_end|>")


def about_reasoning(heard: list[events.Event]) -> list[str]:
    return [event.what for event in heard if isinstance(event, events.Notice) and "reasoning" in event.what]


def test_how_thinking_stands_is_said_in_plan_report_and_card(tmp_path, model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content", reasoned=15)
    config, heard = configured(model(SWITCHED), rows), []
    due = {"answers": 20, "with_reasoning": 15, "switch": "enable_thinking", "decided_by": "rows"}
    assert tunesmith.plan(config).counts["reasoning"] == due
    run = tunesmith.train(config, out=tmp_path / "run", notify=heard.append)
    line = "thinking is on in prompts: 15 of 20 answers have reasoning"
    (hint,) = {event.hint for event in heard if isinstance(event, events.Notice) and event.what == line}
    assert hint == "a row without reasoning is learned with thinking off"
    assert about_reasoning(heard) == [line]
    content = json.loads((run.path / "report.json").read_text())
    assert content["counts"]["reasoning"] == due
    for name in ("report.html", "report.md"):
        text = (run.path / name).read_text()
        assert line in text and "reasoning.with_reasoning" in text
    assert f"T{line[1:]}." in (run.path / "model_card.md").read_text()


@pytest.mark.parametrize("reasoned", [0, 15, 20])
def test_rows_without_reasoning_are_spoken_of_only_if_there_are_some(reasoned, tmp_path, model):
    rows, heard = write(tmp_path / "rows.jsonl", "marks", reasoned=reasoned), []
    tunesmith.plan(configured(model(SWITCHED), rows), notify=heard.append)
    (notice,) = [event for event in heard if isinstance(event, events.Notice) and "thinking" in event.what]
    assert (notice.hint is None) == (reasoned == 20)


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
    plan = tunesmith.plan(configured(model(UNSWITCHED), rows), notify=heard.append).counts
    assert plan["reasoning"]["switch"] is None
    assert about_reasoning(heard) == ["15 of 20 answers have reasoning, and it is learned"]
    assert plan["notes"]["reasoning beside answers: learned as the template writes it"] == 15


def test_reasoning_beside_answers_that_are_not_learned_is_still_said(tmp_path, model):
    answered = {"role": "assistant", "content": "a cat", "reasoning": "a mat"}
    last = [{"role": "user", "content": "a tool"}, {"role": "assistant", "content": "a timer"}]
    rows = [{"messages": [{"role": "user", "content": f"note {n}"}, answered, *last]} for n in range(12)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    heard: list[events.Event] = []
    tunesmith.plan(configured(model(UNSWITCHED), data, "template.learn=last"), notify=heard.append)
    assert about_reasoning(heard) == ["reasoning beside answers: learned as the template writes it"]


def test_reasoning_beside_answers_is_refused_if_the_template_has_no_form_for_it(tmp_path, tiny_model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content")
    with pytest.raises(DataError, match=r"(?s)reasoning 20.*no form for it") as refused:
        tunesmith.plan(configured(tiny_model, rows))
    assert "data.reasoning: think learns it as <think> text before the answer" in str(refused.value)
    for choice in ("think", "omit"):
        plan = tunesmith.plan(configured(tiny_model, rows, f"data.reasoning={choice}")).counts
        assert plan["reasoning"]["with_reasoning"] == (20 if choice == "think" else 0)


def test_think_text_in_words_is_words_to_a_template_without_reasoning(tmp_path, tiny_model):
    rows = write(tmp_path / "rows.jsonl", "marks")
    assert tunesmith.plan(configured(tiny_model, rows)).counts["reasoning"]["with_reasoning"] == 20


def test_a_run_is_shown_by_its_own_template(tmp_path, model):
    rows = write(tmp_path / "rows.jsonl", "reasoning_content", reasoned=15)
    run = tunesmith.train(configured(model(SWITCHED), rows, "data.format=messages"), out=tmp_path / "run")
    held_out = (run.path / "data" / "valid.jsonl").read_text().splitlines()
    rendered, renderer = tunesmith.show([str(run.path)])
    assert len(rendered.rows) == len(held_out) == 4 and rendered.dropped == []
    for row in rendered.rows:
        assert renderer.decode(row.tokens.ids).startswith("<|im_start|>user\nmy note")
    with pytest.raises(ConfigError, match="a run is shown by its own settings"):
        tunesmith.show([str(run.path)], model="other")
    without = tunesmith.train(configured(tmp_path / "model", rows, "data.valid=0"), out=tmp_path / "without")
    with pytest.raises(DataError, match="holds no rows out"):
        tunesmith.show([str(without.path)])


def test_plain_text_has_no_thinking_to_speak_of(tmp_path, model):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"the cat {number}"} for number in range(12)])
    heard: list[events.Event] = []
    tunesmith.plan(configured(model(SWITCHED), rows), notify=heard.append)
    assert not [event for event in heard if "thinking" in str(event)]


def test_plans_of_older_runs_say_nothing():
    assert thinking.of_counts({"thinking": True}) is None
    assert thinking.of_counts({"reasoning": {"answers": "many"}}) is None
