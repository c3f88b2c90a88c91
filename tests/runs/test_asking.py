"""A run is asked as it was trained: the prompt that `generate` and `chat` give is that of its rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.cli import app
from tunesmith.data.asking import asked_as, question, read_tools
from tunesmith.data.examples import Completion, Conversation, Demonstration, Document, Message
from tunesmith.data.formats import DataSpec, row
from tunesmith.data.sources import Raw
from tunesmith.display import console
from tunesmith.engine import generation
from tunesmith.errors import ConfigError, DataError, ResumeMismatch, TemplateError
from tunesmith.runs import config
from tunesmith.runs.asking import of_run
from tunesmith.runs.directory import Run
from tunesmith.tokens import renderers

SETS = ["loop.steps=1", "audit.before_training=false", "adapter.rank=2", "loop.sample_tokens=4"]
ROWS = {
    "text": [{"text": f"the cat sat {n}"} for n in range(8)],
    "completion": [{"prompt": f"Q: the cat {n}\nA:", "completion": " sat"} for n in range(8)],
    "instruct": [{"instruction": f"say {n}", "input": "a mat", "output": "mat"} for n in range(8)],
    "chat": tiny.conversations(8),
}
KIND = {"text": "text", "completion": "text", "instruct": "instruct", "chat": "chat"}


def trained(folder: Path, model: Path, rows: str) -> Path:
    data = tiny.write_rows(folder / "rows.jsonl", ROWS[rows])
    sets = [*SETS, *(["data.instruction_layout=instruct"] if rows == "instruct" else [])]
    tunesmith.train(tunesmith.configure(model=str(model), data=[str(data)], sets=sets), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> dict[str, Path]:
    return {rows: trained(tmp_path_factory.mktemp(rows), tiny_model, rows) for rows in ROWS}


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The ids that models are asked to continue."""
    seen: list[list[int]] = []
    ask = generation.generate

    def heard(net, ids, **options):
        seen.extend(ids)
        return ask(net, ids, **options)

    monkeypatch.setattr(generation, "generate", heard)
    return seen


def test_most_rows_decide():
    chat = Demonstration(Conversation((Message("user", "u"), Message("assistant", "a"))))
    marked = row(
        Raw("f:1", json.dumps(ROWS["instruct"][0])), DataSpec(train="x", instruction_layout="instruct")
    )
    assert asked_as([]) == asked_as([chat]) == asked_as([chat, Document("t")]) == "chat"
    assert asked_as([Document("t"), Completion("p", "c"), chat]) == "text"
    assert asked_as([marked]) == "instruct"


def test_the_question_under_marks_is_the_prompt_of_a_row():
    given = {"instruction": "say", "output": "mat", "system": "s", "history": [["q", "a"]]}
    example = row(Raw("f:1", json.dumps(given)), DataSpec(train="x", instruction_layout="instruct"))
    turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "say")]
    assert question([Message(*turn) for turn in turns], "instruct") == example.prompt


@pytest.mark.parametrize("rows", ROWS)
def test_a_run_keeps_how_it_is_asked(runs, rows):
    run = Run.open(runs[rows])
    assert of_run(run) == KIND[rows]


@pytest.mark.parametrize("rows", ROWS)
def test_an_older_run_is_asked_as_its_held_out_rows(runs, rows, tmp_path):
    plan = runs[rows] / "data" / "plan.json"
    content = json.loads(plan.read_text())
    whole = plan.read_text()
    try:
        plan.write_text(json.dumps({key: value for key, value in content.items() if key != "asked_as"}))
        assert of_run(Run.open(runs[rows])) == KIND[rows]
    finally:
        plan.write_text(whole)


def test_texts_of_a_run_that_does_not_name_their_end_end_as_they_did(runs, tmp_path):
    file = runs["text"] / "config.yaml"
    assert config.of_run(file).template.text_end == "eos"
    assert config.of_run(file).data.text_control == "refuse"
    older = tmp_path / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    older.write_text(
        "".join(line for line in lines if "text_end:" not in line and "text_control:" not in line)
    )
    assert config.of_run(older).data.text_control == "letters"
    assert config.of_run(older).template.text_end == "turn"
    assert config.of_run(older, ["loop.keep_last=2"]).template.text_end == "turn"
    assert config.of_run(older, ["template.text_end=eos"]).template.text_end == "eos"


@pytest.mark.parametrize("rows", ROWS)
def test_generate_gives_the_prompt_of_training(runs, rows, tiny_model, prompts):
    renderer = renderers.load(tiny_model)
    tunesmith.generate(runs[rows], ["the cat"], max_tokens=2)
    asked = question([Message("user", "the cat")], KIND[rows])
    expected = renderer.text_prompt(asked) if isinstance(asked, str) else renderer.prompt(asked)
    assert prompts == [expected]
    prompts.clear()
    tunesmith.generate(runs[rows], ["the cat"], max_tokens=2, raw=True)
    assert prompts == [renderer.text_prompt("the cat")]


def test_chat_with_plain_text_continues_what_was_said_last(runs):
    talk = tunesmith.chat(runs["completion"], max_tokens=2)
    for text in ("the cat", "my note"):
        list(talk.say(text))
    alone = tunesmith.chat(runs["completion"], max_tokens=2)
    assert "".join(alone.say("my note")) == talk.messages[-1].content


def test_a_plain_model_is_asked_in_a_chat_unless_raw(tiny_model, prompts):
    renderer = renderers.load(tiny_model)
    tunesmith.generate(tiny_model, ["the cat"], max_tokens=2)
    tunesmith.generate(tiny_model, ["the cat"], max_tokens=2, raw=True)
    asked = Conversation((Message("user", "the cat"),))
    assert prompts == [renderer.prompt(asked), renderer.text_prompt("the cat")]


def test_a_model_without_template_can_be_asked_what_it_learned(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    tiny.write_model(model, tiny.write_tokenizer(model, template=None))
    run = trained(tmp_path, model, "completion")
    (answer,) = tunesmith.generate(run, ["Q: the cat\nA:"], max_tokens=4)
    assert isinstance(answer, str)


@pytest.mark.parametrize("key", ["rows_train", "tokens", "supervised_tokens"])
def test_a_run_whose_rows_give_other_tokens_now_is_not_resumed(tmp_path, tiny_model, key):
    run = trained(tmp_path, tiny_model, "chat")
    state = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(state | {"status": "interrupted"}))
    plan = json.loads((run / "data" / "plan.json").read_text())
    (run / "data" / "plan.json").write_text(json.dumps(plan | {key: plan[key] + 1}))
    with pytest.raises(ResumeMismatch, match=f"{key}: {plan[key] + 1} → {plan[key]}"):
        tunesmith.train(resume=run)
    (run / "data" / "plan.json").write_text(json.dumps(plan))
    assert tunesmith.train(resume=run).manifest["status"] == "completed"


def test_a_finished_run_says_how_to_train_further(runs):
    heard = []
    tunesmith.train(resume=runs["text"], notify=heard.append)
    assert heard[-1].hint == f"to train further, begin a run with --set adapter.start={runs['text']}"
    with pytest.raises(ResumeMismatch, match="To train further"):
        tunesmith.train(resume=runs["text"], sets=["loop.steps=2"])
    with pytest.raises(ResumeMismatch) as caught:
        tunesmith.train(resume=runs["text"], sets=["loop.seed=2"])
    assert "further" not in str(caught.value)


def test_growth_of_full_weights_is_not_told_as_nothing():
    text = console.readable(events.Growth(3, {}))
    assert "0 weights" not in text and "largest" not in text


def test_plain_text_has_no_system_message(runs):
    with pytest.raises(ConfigError, match="no system message"):
        tunesmith.generate(runs["text"], ["the cat"], system="s")
    with pytest.raises(ConfigError, match="no system message"):
        tunesmith.chat(runs["chat"], system="s", raw=True)


@pytest.mark.parametrize("rows", ROWS)
def test_the_commands_of_the_card_work(runs, rows, monkeypatch):
    card = (runs[rows] / "model_card.md").read_text()
    lines = re.findall(r"^tunesmith (?:generate|chat) .*$", card, re.M)
    assert len(lines) == 2
    monkeypatch.chdir(runs[rows].parent)
    for line in lines:
        result = CliRunner().invoke(app, [*shlex.split(line)[1:], "--max-tokens", "2"], input="the cat\n\n")
        assert result.exit_code == 0, result.output
    (command,) = re.findall(r"^mlx_lm.generate [^`]*?(?=\n```)", card, re.M)
    plain = "--ignore-chat-template" in command
    assert plain == (KIND[rows] != "chat")
    asked = question([Message("user", "Hello")], KIND[rows])
    assert shlex.split(command)[-1] == (asked if plain else "Hello")


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"town": {}}}},
}
MUSIC = {"type": "function", "function": {"name": "music"}}
DECLARING = "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}" + tiny.CHATML


def with_tools(count: int, *lists: list[dict]) -> list[dict]:
    rows = tiny.conversations(count)
    return [row | {"tools": lists[index % len(lists)]} for index, row in enumerate(rows)]


@pytest.fixture(scope="module")
def declaring(tmp_path_factory) -> Path:
    """A model whose template writes the names of the tools."""
    folder = tmp_path_factory.mktemp("declaring")
    tiny.write_model(folder, tiny.write_tokenizer(folder, DECLARING))
    return folder


@pytest.fixture(scope="module")
def calling(tmp_path_factory, declaring) -> Path:
    """A run whose rows declare one tool."""
    ROWS["tools"] = with_tools(8, [WEATHER])
    try:
        return trained(tmp_path_factory.mktemp("tools"), declaring, "tools")
    finally:
        del ROWS["tools"]


def about_tools(heard: list[events.Event]) -> list[events.Notice]:
    return [event for event in heard if isinstance(event, events.Notice) and "tools" in event.what]


def test_tools_are_declared_in_the_prompt_as_rows_declare_them(calling, declaring, prompts):
    renderer, heard = renderers.load(declaring), []
    tunesmith.generate(calling, ["the cat"], tools=[WEATHER], max_tokens=2, notify=heard.append)
    assert prompts == [renderer.prompt(Conversation((Message("user", "the cat"),), (WEATHER,)))]
    assert "<tool>weather</tool>" in renderer.decode(prompts[0]) and not about_tools(heard)
    talk = tunesmith.chat(calling, tools=[WEATHER["function"]], max_tokens=2, notify=heard.append)
    assert talk.tools == (WEATHER,) and not about_tools(heard)
    first = "".join(talk.say("the cat"))
    assert [first] == tunesmith.generate(calling, ["the cat"], tools=[WEATHER], max_tokens=2)


def test_a_run_whose_rows_declare_tools_says_how_to_declare_them(calling, prompts):
    heard: list[events.Event] = []
    tunesmith.generate(calling, ["the cat"], max_tokens=2, notify=heard.append)
    tunesmith.chat(calling, notify=heard.append)
    (notice, other) = about_tools(heard)
    assert notice.what == other.what == "no tools are declared to the model; rows of the run declare weather"
    assert notice.hint == f"--tools {calling / 'data' / 'valid.jsonl'}"
    words = ["generate", str(calling), "the cat", *str(notice.hint).split(), "--max-tokens", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and not re.search("no tools are declared", result.stderr)
    assert len(prompts[1]) > len(prompts[0])


def test_a_run_whose_rows_declare_different_tools_asks_for_a_list(tmp_path, declaring, monkeypatch):
    monkeypatch.setitem(ROWS, "both", with_tools(40, [WEATHER], [MUSIC]))
    run, heard = trained(tmp_path, declaring, "both"), []
    tunesmith.generate(run, ["the cat"], max_tokens=2, notify=heard.append)
    (notice,) = about_tools(heard)
    assert "weather" in notice.what and "music" in notice.what
    assert notice.hint == "--tools FILE, a JSON list of tools"
    with pytest.raises(DataError, match="different lists of tools"):
        read_tools(run / "data" / "valid.jsonl")


def test_tools_that_the_template_leaves_out_are_refused(tiny_model):
    with pytest.raises(TemplateError, match=r"leaves out the declared tools \(weather\)"):
        tunesmith.generate(tiny_model, ["the cat"], tools=[WEATHER])
    with pytest.raises(TemplateError, match=r"leaves out the declared tools \(weather\)"):
        list(tunesmith.chat(tiny_model, tools=[WEATHER]).say("the cat"))


def test_an_answer_that_cannot_stand_in_a_prompt_ends_the_chat_with_the_reason(tiny_model):
    talk = tunesmith.chat(tiny_model, max_tokens=2)
    with pytest.raises(TemplateError) as refused:
        list(talk.say("the <|im_end|>"))
    assert talk.messages == [], "the chat goes on as if that had not been said"
    assert "answer" not in refused.value.what
    talk.messages[:] = [Message("user", "the cat"), Message("assistant", "a call<|im_end|>")]
    with pytest.raises(TemplateError, match="earlier answer cannot stand in the prompt") as refused:
        list(talk.say("my note"))
    assert refused.value.hint == "begin a new chat"


def test_nothing_is_said_of_tools_if_no_row_declares_any(runs):
    heard: list[events.Event] = []
    for rows in ROWS:
        tunesmith.generate(runs[rows], ["the cat"], max_tokens=2, notify=heard.append)
    assert not about_tools(heard)


def test_tools_without_a_name_and_beside_plain_text_are_refused(runs):
    with pytest.raises(ConfigError, match="expected text, found null"):
        tunesmith.generate(runs["chat"], ["the cat"], tools=[{"description": "d"}])
    with pytest.raises(ConfigError, match="plain text declares no tools"):
        tunesmith.generate(runs["text"], ["the cat"], tools=[WEATHER])


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([WEATHER, MUSIC]),
        json.dumps([WEATHER, MUSIC], indent=2),
        json.dumps([WEATHER["function"], MUSIC["function"]]),
        json.dumps({"tools": [WEATHER, MUSIC], "messages": []}),
        json.dumps({"functions": json.dumps([WEATHER["function"], MUSIC["function"]])}),
        "\n".join([json.dumps({"tools": [WEATHER, MUSIC], "prompt": str(n)}) for n in range(3)]),
        "\n".join([json.dumps({"tools": tools, "prompt": ""}) for tools in ([], [WEATHER, MUSIC], [])]),
    ],
)
def test_a_file_of_tools_is_a_list_or_rows_that_declare_the_same(content, tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(content)
    assert read_tools(file) == (WEATHER, MUSIC)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "holds JSON"),
        ("[]", "declares no tools"),
        ('{"messages": []}', "declares no tools"),
        ('[{"name": 3}]', "expected text, found 3"),
        ('{"tools": [{"name": "a"}]}\n{"tools": [{"name": "b"}]}', "holds 2 different lists"),
        (None, "No such file"),
    ],
)
def test_a_file_without_one_list_of_tools_is_refused_with_its_place(content, fault, tmp_path):
    file = tmp_path / "tools.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=fault) as refused:
        read_tools(file)
    assert str(refused.value.where).startswith(str(file))
