"""Each small input that somebody reported, and three siblings of it: the same kind of fault in another
layout, spelling, template or objective. One law holds for all four."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokens.test_chat_templates import TEXT_ARGUMENTS
from tokens.test_template import CHATML, TOOLS
from training.test_reasoning import SWITCHED

import tiny
import tunesmith
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec, Dropped
from tunesmith.errors import ModelError

CASES = Path(__file__).resolve().parents[1].parent / "shared" / "cases"
QUICK = ("loop.steps=1", "loop.sample_tokens=2", "adapter.rank=2", "audit.before_training=false")
MARKS = (
    "<|im_start|> <|im_end|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<start_of_turn> <end_of_turn> <tool_call> </tool_call>"
).split()
Row = dict[str, Any]
Content = list[Row] | tuple[str, bytes]
"""Rows of a JSONL file, or the name and the bytes of a file."""


def given(reported: str, *siblings: Content) -> Any:
    """Runs a test for the file that was reported, and for each sibling."""
    assert len(siblings) >= 3
    inputs = [pytest.param(reported, id=reported)]
    inputs += [pytest.param(rows, id=f"sibling {number}") for number, rows in enumerate(siblings, 1)]
    return pytest.mark.parametrize("data", inputs, indirect=True)


@pytest.fixture
def data(request, tmp_path) -> Path:
    """The input as a file. Skips if the reported files are absent."""
    content: str | Content = request.param
    if isinstance(content, str):
        if not (CASES / content).exists():
            pytest.skip(f"the reported file is absent: shared/cases/{content}")
        return CASES / content
    if isinstance(content, list):
        return tiny.write_rows(tmp_path / "rows.jsonl", content)
    name, raw = content
    (tmp_path / name).write_bytes(raw)
    return tmp_path / name


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Callable[[str], Path]:
    """``tokenizer(template)``: a folder whose tokenizer knows the control tokens of three families. The end
    of plain text, ``<|endoftext|>``, is not that of a turn."""
    from tokenizers import AddedToken, Tokenizer

    made: dict[str, Path] = {}

    def make(template: str) -> Path:
        if template not in made:
            folder = made[template] = tmp_path_factory.mktemp("tokenizer")
            tiny.write_tokenizer(folder, template)
            words = Tokenizer.from_file(str(folder / "tokenizer.json"))
            words.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
            words.save(str(folder / "tokenizer.json"))
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            ends = {"eos_token": "<|endoftext|>"}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings | ends))
        return made[template]

    return make


class Learned(NamedTuple):
    """Of one row: the text that is shown, and the text that is learned."""

    prompt: str
    answer: str


def learned(data: Path, words: Path | str, *sets: str) -> list[Learned]:
    """What is learned of every row; none may be refused."""
    rendered, renderer = tunesmith.show([str(data)], tokenizer=str(words), sets=sets)
    assert rendered.dropped == [] and rendered.rows
    parts = []
    for row in rendered.rows:
        ids, targets = row.tokens
        parts.append(Learned(renderer.decode(ids[targets == 0]), renderer.decode(ids[targets > 0])))
    return parts


def refused(data: Path, words: Path | str, *sets: str) -> list[Dropped]:
    """Why every row is refused."""
    rendered, _ = tunesmith.show([str(data)], tokenizer=str(words), sets=sets)
    assert rendered.rows == [] and rendered.dropped
    return rendered.dropped


def read(data: Path, **settings: Any) -> formats.Read:
    return formats.read([data], DataSpec(train="x", **settings))


def chat(*words: str, **keys: Any) -> Row:
    """A row of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(words)]
    return {"messages": turns} | keys


def comma_separated(*rows: Row) -> tuple[str, bytes]:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    return "rows.csv", text.getvalue().encode()


# Tokens beyond the embedding


@pytest.fixture(scope="module")
def small_embedding(tiny_model, tmp_path_factory) -> Path:
    """A model whose tokenizer has two tokens more than its embedding has rows."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("small") / "model")
    words = json.loads((folder / "tokenizer.json").read_text())
    for token in ("<|note|>", "<|tool|>"):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        at = {"id": len(words["model"]["vocab"]) + (token == "<|tool|>"), "content": token}
        words["added_tokens"].append(at | flags)
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder


@given(
    "01_note.jsonl",
    [{"prompt": f"a cat {n}", "chosen": f"mat {n}", "rejected": f"<|tool|> {n}"} for n in range(4)],
    [chat(f"a cat {n}", f"<|note|> {n}", label=n % 2) for n in range(6)],
    comma_separated(*({"text": f"my <|note|> {n}"} for n in range(4))),
)
def test_a_token_beyond_the_embedding_is_refused_and_rows_are_added_on_request(
    data, small_embedding, tmp_path
):
    keys = read(data).examples
    objective = {formats.Preference: "dpo", formats.Judged: "kto"}.get(type(keys[0]), "sft")
    sets = (*QUICK, f"objective={objective}")
    with pytest.raises(ModelError) as caught:
        tunesmith.plan(tunesmith.configure(model=str(small_embedding), data=[str(data)], sets=sets))
    text = str(caught.value)
    assert "<|note|>" in text or "<|tool|>" in text
    assert f"{data.resolve()}:" in text and "model.resize_embeddings" in text
    sets = (*sets, "model.resize_embeddings=true")
    assert tunesmith.plan(tunesmith.configure(model=str(small_embedding), data=[str(data)], sets=sets))


# Plain text


@given(
    "03_plain.jsonl",
    ("rows.json", json.dumps([{"text": "the cat"}, {"text": "a mat"}]).encode()),
    comma_separated({"prompt": "Q: cat\nA:", "completion": " mat"}),
    [{"instruction": "Add", "output": "4", "system": "Be brief.", "history": [["1 and 1", "2"]]}],
)
def test_plain_text_ends_with_the_token_that_ends_text(data, tokenizer):
    for row in learned(data, tokenizer(CHATML), "data.instruction_layout=instruct"):
        assert row.answer.endswith("<|endoftext|>") and row.answer.count("<|") == 1
        assert "<|" not in row.prompt


@given(
    "04_completion.jsonl",
    [{"text": f"the cat {n}"} for n in range(6)],
    comma_separated(*({"prompt": f"my note {n}:", "completion": " read"} for n in range(6))),
    (
        "rows.json",
        json.dumps([{"prompt": f"Q {n}", "completion": "A", "label": True} for n in range(6)]).encode(),
    ),
)
def test_a_run_on_plain_text_is_asked_by_plain_text(data, tiny_model, tmp_path, monkeypatch):
    from tunesmith.engine import generation
    from tunesmith.tokens import renderers

    seen: list[list[int]] = []
    ask = generation.generate
    monkeypatch.setattr(
        generation, "generate", lambda net, ids, **given: seen.extend(ids) or ask(net, ids, **given)
    )
    config = tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=QUICK)
    run = tunesmith.train(config, out=tmp_path / "run")
    seen.clear()
    tunesmith.generate(run.path, ["the cat"], max_tokens=2)
    assert seen == [renderers.load(tiny_model).text_prompt("the cat")]


# Reasoning

THOUGHT = "<think>\ntwo and two\n</think>\n\n"


@pytest.mark.parametrize("reported", ["06_reasoning_field.jsonl", "06_think.jsonl"])
def test_reported_reasoning_is_learned_where_inference_begins(reported, request, tokenizer):
    if not (CASES / reported).is_file():
        pytest.skip(f"the reported file is absent: shared/cases/{reported}")
    require_reasoning(learned(CASES / reported, tokenizer(SWITCHED)))


def require_reasoning(rows: list[Learned]) -> None:
    for row in rows:
        assert row.prompt.endswith("<|im_start|>assistant\n") and "<think>" not in row.prompt
        assert row.answer.startswith("<think>\n") and row.answer.endswith("<|im_end|>")
        assert row.answer.index("</think>") < len(row.answer) - len("</think>\n\n<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "2+2?", "output": "4.", "reasoning": "two and two"},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": f"{THOUGHT}4."},
            ]
        },
        {
            "messages": json.dumps(
                chat("2+2?")["messages"] + [{"role": "assistant", "thinking": "two", "content": "4."}]
            )
        },
        {"prompt": [{"role": "user", "content": "2+2?"}], "completion": f"{THOUGHT}4."},
    ],
)
def test_siblings_of_reported_reasoning(row, tmp_path, tokenizer):
    require_reasoning(learned(tiny.write_rows(tmp_path / "rows.jsonl", [row]), tokenizer(SWITCHED)))


# Control tokens in plain text


@given(
    "07_text_templated.jsonl",
    [{"text": "[INST] name a tree [/INST] Oak."}],
    [{"prompt": "<s>[INST] name a tree[/INST]", "completion": " Oak.</s>"}],
    comma_separated({"text": "<s>[INST] a [/INST] b </s>[INST] c [/INST] d </s>"}),
)
def test_marks_of_mistral_in_plain_text_are_refused_or_read_as_tokens(data):
    for row in refused(data, "mistral-v3"):
        assert row.reason == "text_control" and "messages" in row.hint
    rendered, _ = tunesmith.show([str(data)], tokenizer="mistral-v3", sets=["data.text_control=read"])
    assert rendered.rows and rendered.dropped == []
    for row in rendered.rows:
        ids = row.tokens.ids.tolist()
        assert ids[:2] == [1, 3] and 4 in ids and ids[-1] == 2  # <s>, [INST], [/INST], </s>
        assert ids.count(1) == 1


@given(
    "07_text_templated_llama3.jsonl",
    [{"text": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>"}],
    [{"text": "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>"}],
    [{"prompt": "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "completion": "hello"}],
)
def test_marks_of_other_families_in_plain_text_are_refused_or_read_as_tokens(data, tokenizer):
    words = tokenizer(CHATML)
    for row in refused(data, words):
        assert row.reason == "text_control" and "messages" in row.hint
    rendered, renderer = tunesmith.show([str(data)], tokenizer=str(words), sets=["data.text_control=read"])
    texts = [json.loads(line) for line in data.read_text().splitlines()]
    for row, text in zip(rendered.rows, texts, strict=True):
        whole = text.get("text") or text["prompt"] + text["completion"]
        ids = row.tokens.ids.tolist()
        tokens = [renderer.decode([token]) for token in ids]
        assert sum(token in MARKS for token in tokens) == sum(whole.count(mark) for mark in MARKS)
        assert renderer.decode(ids).removesuffix("<|endoftext|>") == whole


# Messages stored as text

HELLO = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello friend"}]
AWAY = [HELLO[0], {"role": "assistant", "content": "go away"}]


@given(
    "08_dpo_json_text.jsonl",
    [{"prompt": HELLO[:1], "chosen": json.dumps(HELLO[1:]), "rejected": json.dumps(AWAY[1:])}],
    [{"prompt": repr(HELLO[:1]), "chosen": json.dumps(HELLO[1]), "rejected": repr(AWAY[1])}],
    comma_separated({"chosen": json.dumps(HELLO, indent=1), "rejected": repr(AWAY)}),
)
def test_pairs_of_messages_stored_as_text_are_pairs_of_answers(data, tokenizer):
    rows = learned(data, tokenizer(CHATML), "objective=dpo")
    prompt = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    both = [Learned(prompt, "hello friend<|im_end|>"), Learned(prompt, "go away<|im_end|>")]
    assert rows == both * (len(rows) // 2)


@given(
    "08_messages_text.jsonl",
    comma_separated({"messages": repr(HELLO)}),
    [
        {
            "conversations": json.dumps(
                [{"from": "user", "value": "hi there"}, {"from": "model", "value": "hello friend"}]
            )
        }
    ],
    [{"messages": json.dumps(HELLO, indent=2), "tools": "[]", "label": "true"}],
)
def test_conversations_stored_as_text_are_conversations(data, tokenizer):
    prompt = "<|im_start|>user\nhi there<|im_end|>\n<|im_start|>assistant\n"
    assert set(learned(data, tokenizer(CHATML))) == {Learned(prompt, "hello friend<|im_end|>")}


KIND = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello of cats"}]


@given(
    "08_prompt_json_text.jsonl",
    [{"prompt": repr(KIND), "completion": "answer 1"}],
    [
        {
            "prompt": json.dumps(KIND, indent=1),
            "completion": json.dumps([{"role": "assistant", "content": "answer 2"}]),
        }
    ],
    comma_separated({"prompt": json.dumps(KIND), "completion": "answer 3", "label": "True"}),
)
def test_prompts_stored_as_text_are_turns(data, tokenizer):
    for row in learned(data, tokenizer(CHATML)):
        assert row.prompt.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello ")
        assert row.prompt.endswith(" of cats<|im_end|>\n<|im_start|>assistant\n")
        assert row.answer.startswith("answer ") and row.answer.endswith("<|im_end|>")


# A folder in parts


def parts(count: int, name: str) -> list[Row]:
    return [{"prompt": f"{name} {n}", "completion": f"answer {n}"} for n in range(count)]


def lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FOLDERS: dict[str, dict[str, bytes]] = {
    "arrays": {
        f"{part}.json": json.dumps(parts(count, side)).encode()
        for part, side, count in (("training", "train", 20), ("validation", "valid", 5), ("test", "test", 5))
    },
    "compressed": {
        f"{part}.jsonl.gz": gzip.compress(lines(parts(count, side)))
        for part, side, count in (("train", "train", 20), ("val", "valid", 5), ("test", "test", 5))
    },
    "tables": {
        f"{part}.csv": comma_separated(*parts(count, side))[1]
        for part, side, count in (("Train", "train", 20), ("dev", "valid", 5), ("test", "test", 5))
    },
    "folders": {
        f"data/{part}/part-0.jsonl": lines(parts(count, side))
        for part, side, count in (("train", "train", 20), ("validation", "valid", 5), ("test", "test", 5))
    },
}


@pytest.mark.parametrize("layout", ["09_mlx_folder", *FOLDERS])
def test_a_folder_in_parts_trains_on_train_alone_and_says_so(layout, tmp_path, tiny_model):
    folder = CASES / layout
    if layout in FOLDERS:
        folder = tmp_path / "data"
        for name, content in FOLDERS[layout].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    elif not folder.is_dir():
        pytest.skip(f"the reported folder is absent: shared/cases/{layout}")
    resolved = tunesmith.configure(model=str(tiny_model), data=[str(folder)], sets=QUICK)
    sides = [resolved.spec.data.train, resolved.spec.data.valid]
    for files, name, count in zip(sides, ("train", "valid"), (20, 5), strict=True):
        examples = formats.read(files, resolved.spec.data).examples
        assert len(examples) == count
        assert all(formats.prompt_key(example).startswith(name) for example in examples)
    (note,) = resolved.notes
    assert "held out" in note and "test" in note and "not trained on" in note


# Keys that mean something elsewhere


@given(
    "10_system_beside_prompt.jsonl",
    [{"system": "You speak only French, always.", **chat("Say cat", "chat", label=1)}],
    comma_separated({"system": "You speak only French, always.", "instruction": "Say cat", "output": "chat"}),
    [{"system": "You speak only French, always.", "prompt": "Say cat", "chosen": "chat", "rejected": "cat"}],
)
def test_a_system_text_beside_the_prompt_is_the_system_turn(data, tokenizer):
    for row in learned(data, tokenizer(CHATML)):
        head = "<|im_start|>system\nYou speak only French, always.<|im_end|>\n<|im_start|>user\nSay "
        assert row.prompt.startswith(head)


# Tools


def weather(*calls: tuple[str, Any], answer: str = "Cold.", ids: bool = True) -> Row:
    """A question, calls at once, their results, and an answer."""
    named = [
        ({"id": f"call_{n}"} if ids else {}) | {"function": {"name": name, "arguments": arguments}}
        for n, (name, arguments) in enumerate(calls)
    ]
    results = [
        ({"tool_call_id": f"call_{n}"} if ids else {"name": name})
        | {"role": "tool", "content": f"result {n}"}
        for n, (name, _) in enumerate(calls)
    ]
    turns = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": None, "tool_calls": named},
    ]
    tools = [{"name": name, "parameters": {}} for name in dict.fromkeys(name for name, _ in calls)]
    return {"messages": [*turns, *results, {"role": "assistant", "content": answer}], "functions": tools}


ONE_CALL = TOOLS.replace(  # as Llama 3.2's
    "{% for c in",
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    "{% for c in",
)


@given(
    "12_tool_call.jsonl",
    [weather(("get_weather", {"city": "Zürich"}))],
    [weather(("get_weather", '{"city":"Zürich", "days": [1, {"unit": null}]}'))],
    [
        {
            "conversations": [
                {"from": "human", "value": "How warm?"},
                {
                    "from": "function_call",
                    "value": '{"name": "get_weather", "arguments": {"city": "Zürich"}}',
                },
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "Four."},
            ],
            "tools": '[{"name": "get_weather"}]',
        }
    ],
)
@pytest.mark.parametrize("template", [TOOLS, TEXT_ARGUMENTS], ids=["objects", "text"])
def test_arguments_are_given_as_the_template_wants_them(data, template, tokenizer):
    template = template.replace("<|end|>", "<|im_end|>")
    calls = [row.answer for row in learned(data, tokenizer(template)) if "get_weather" in row.answer]
    assert len(calls) == 1 and "Zürich" in calls[0]
    assert '\\"city\\"' not in calls[0], "arguments as text in text"


@given(
    "12_parallel_calls.jsonl",
    [weather(*(("get_weather", {"city": city}) for city in ("Oslo", "Rome", "Bern")))],
    [weather(("get_weather", "{}"), ("get_time", "{}"))],
    [weather(("get_weather", {"city": "Oslo"}), ("get_weather", {"city": "Rome"}), ids=False)],
)
def test_calls_at_once_are_learned_or_refused_for_their_number(data, tokenizer):
    (example,) = read(data).examples
    names = [call.name for call in example.conversation.messages[1].calls]
    calls = next(row.answer for row in learned(data, tokenizer(TOOLS)))
    assert len(names) >= 2 and all(calls.count(f'"name": "{name}"') == names.count(name) for name in names)
    for row in refused(data, tokenizer(ONE_CALL)):
        assert "one call" in row.message and "system text" not in row.message
        assert row.hint == "write one call a turn: this template cannot write several"


TOOL_CALL = '<tool_call>\n{"name": "get_t", "arguments": {"x": 1}}\n</tool_call>'
RESULT = "<tool_response>\n4\n</tool_response>"


def tagged(*turns: tuple[str, str]) -> Row:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


@given(
    "13_hermes.jsonl",
    [tagged(("human", "t?"), ("gpt", f"I look.\n{TOOL_CALL}"), ("observation", RESULT), ("gpt", "Four."))],
    [
        tagged(
            ("human", "t?"),
            ("gpt", f"{TOOL_CALL}\n{TOOL_CALL}"),
            ("tool", f"{RESULT}\n{RESULT}"),
            ("gpt", "4."),
        )
    ],
    [
        {
            "messages": [
                {"role": "user", "content": "t?"},
                {"role": "assistant", "content": TOOL_CALL},
                {"role": "function", "content": "4"},
                {"role": "assistant", "content": "Four."},
            ]
        }
    ],
)
def test_calls_in_marks_are_read_on_request_and_else_refused_with_the_setting(data):
    for row in read(data).dropped:
        assert "data.structure_calls" in row.hint and "None" not in row.message
    assert read(data).examples == []
    (example,) = read(data, structure_calls=True).examples
    messages = example.conversation.messages
    called = [call for message in messages for call in message.calls]
    answered = [message for message in messages if message.role == "tool"]
    assert called and {call.name for call in called} == {"get_t"}
    assert [message.call_id for message in answered] == [call.id for call in called]
    assert not any("<tool" in message.content for message in messages if message.role != "system")


# Empty texts


@given(
    "14_empty_system.jsonl",
    [{"system": " ", "instruction": f"the cat {n}", "output": f"a mat and {n}"} for n in range(12)],
    [tagged(("system", " \n"), ("human", f"the cat {n}"), ("gpt", f"a mat and {n}")) for n in range(12)],
    [
        {
            "prompt": [{"role": "system", "content": None}, {"role": "user", "content": f"the cat {n}"}],
            "completion": f"{n} mat",
        }
        for n in range(12)
    ],
)
def test_an_empty_system_text_costs_no_row(data, tokenizer, tmp_path):
    rows = learned(data, tokenizer(CHATML), "objective.undesirable=learn")
    assert len(rows) == 12 and not any("system" in row.prompt for row in rows)
    counts = {remark.text: count for remark, count in formats.remarks(read(data).examples).items()}
    assert counts["empty system text left out"] == 12
    fixed = tunesmith.audit(data, fix=tmp_path / "out.jsonl", sets=["data.valid=0"], processes=1).fixed
    assert fixed.written + sum(fixed.removed.values()) == 12 and fixed.written
    assert read(tmp_path / "out.jsonl").dropped == []


@given(
    "18_empty_arguments.jsonl",
    [weather(("now", " \n"))],
    [weather(("now", None))],
    [
        {
            "messages": [
                chat("now?")["messages"][0],
                {"role": "assistant", "function_call": {"name": "now", "arguments": ""}},
            ]
        }
    ],
)
def test_empty_arguments_are_refused_with_how_to_write_none(data):
    (row,) = read(data).dropped
    assert row.reason == "arguments" and row.hint == "write {} if there are none"
    assert "array" not in row.message


# The order of turns


@given(
    "19_role_order.jsonl",
    [chat("hi", "yes", "bye"), chat("hi", ""), {"messages": chat("hi", "yes")["messages"][::-1]}],
    [
        {"prompt": [*HELLO, HELLO[1]], "chosen": "a", "rejected": "b"},
        {"prompt": HELLO * 2, "chosen": "a", "rejected": "b"},
    ],
    [
        tagged(("human", "hi"), ("system", "s"), ("gpt", "yes")),
        tagged(("human", "hi"), ("tool", "4"), ("gpt", "yes")),
    ],
)
def test_an_order_that_no_template_has_is_refused_with_what_to_do(data):
    result = read(data)
    assert result.examples == []
    for row in result.dropped:
        assert row.hint and "None" not in row.message and "array" not in row.message


# Compressed files


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("rows.jsonl", content)
    return archive.getvalue()


PLAIN = lines([chat(f"hello {n}", f"answer {n}") for n in range(12)])


@given(
    "17_rows.jsonl.zst",
    ("rows.jsonl.xz", lzma.compress(PLAIN)),
    ("rows.jsonl.bz2", bz2.compress(PLAIN)),
    ("rows.jsonl.zip", zipped(PLAIN)),
    ("rows.json.gz", gzip.compress(b"[" + PLAIN.strip().replace(b"\n", b",") + b"]")),
)
def test_a_compressed_file_is_read_whole(data):
    if data.suffix == ".zst":
        pytest.importorskip("pyarrow")
    result = read(data)
    assert result.dropped == [] and len(result.examples) >= 12
    assert all(isinstance(example, formats.Demonstration) for example in result.examples)
