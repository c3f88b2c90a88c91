"""What is trained is what inference sees: laws of the two renderers, mistral-common id for id, and bugs of
the field."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.data import formats
from tunesmith.data.formats import (
    Call,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Judged,
    Message,
    Preference,
)
from tunesmith.errors import DataError, ModelError, TemplateError
from tunesmith.tokens.renderers import HFRenderer, MistralRenderer, load
from tunesmith.tokens.template import Refused, TemplateSpec, render

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "mistral.json").read_text(encoding="utf-8"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    + CHATML
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% "
    "endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor "
    "%}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_ONCE = "<s>" + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
IGNORES_TOOL_ROLE = TOOLS.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
TRIMS = CHATML.replace("m.content", "m.content | trim")
THINKS = (  # history without reasoning; an answer without reasoning gets an empty one unless thinking is off
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}<think></think>{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
# Like the template of Mistral-7B-Instruct-v0.3: the system text is written only when the user has the last
# word.
V3_LIKE = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ "
    "m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]")


def write(
    folder: Path,
    template: str | None,
    *,
    bos: str | None = None,
    eos: str = "<|im_end|>",
    adds=False,
    pad=None,
) -> Path:
    """A tokenizer folder: bytes and a few merges; ``adds``: plain text gets a BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ċ", "Ċ"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ġ", "Ġ")]
    vocabulary = {piece: at for at, piece in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds:
        inner.post_processor = processors.TemplateProcessing(
            f"{bos} $A", None, [(bos, inner.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """``make(template, **options)``: the HF renderer of such a tokenizer."""
    return lambda template, **options: load(write(tmp_path_factory.mktemp("tokenizer"), template, **options))


@pytest.fixture(scope="module")
def chatml(make):
    return make(CHATML)


@pytest.fixture(scope="module")
def mistral():
    return load("mistral-v3")


def say(*words: str, system: str | None = None, tools=()) -> Conversation:
    """User and assistant in turn."""
    first = () if system is None else (Message("system", system),)
    return Conversation(
        (*first, *(Message(("user", "assistant")[at % 2], text) for at, text in enumerate(words))), tools
    )


def demo(conversation: Conversation, source="x.jsonl:1") -> Demonstration:
    return Demonstration(conversation=conversation, label=None, id="0", source=source, metadata={})


def weather(name="weather") -> dict:
    parameters = {"type": "object", "properties": {"town": {"type": "string"}}}
    return {
        "type": "function",
        "function": {"name": name, "description": "of a town", "parameters": parameters},
    }


WEATHER = weather()


def tool_use(content: str = "", tools=(WEATHER,)) -> Conversation:
    """A question, two calls without ids, two results, an answer."""
    calls = (
        Call("weather", {"town": "Paris", "days": 3}),
        Call("weather", {"town": "Rom", "deep": {"list": [1, "two"]}}),
    )
    messages = (
        Message("user", "Paris and Rome?"),
        Message("assistant", content, calls),
        Message("tool", '{"sky": "clear"}'),
        Message("tool", "hot"),
        Message("assistant", "Rome is hotter."),
    )
    return Conversation(messages, tools)


def learned(row) -> list[int]:
    return [int(token) for token, weight in zip(*row.tokens, strict=True) if weight == 1]


def from_openai(case: dict) -> Conversation:
    messages = []
    for entry in case["messages"]:
        calls = tuple(
            Call(call["function"]["name"], json.loads(call["function"]["arguments"]), call["id"])
            for call in entry.get("tool_calls", ())
        )
        messages.append(Message(entry["role"], entry["content"] or "", calls, entry.get("tool_call_id")))
    return Conversation(tuple(messages), tuple(case["tools"]))


# Mistral v3 against mistral-common


@pytest.mark.parametrize("case", GOLDENS["cases"], ids=[case["name"] for case in GOLDENS["cases"]])
def test_mistral_ids_equal_goldens(mistral, case):
    conversation = from_openai(case)
    for answer in case["answers"]:
        at = answer["message"]
        one = replace(conversation, messages=conversation.messages[: at + 1])
        (row,) = mistral.rows(demo(one), learn="last")
        assert row.tokens.ids.tolist() == answer["ids"]
        assert row.tokens.targets.tolist() == [0] * len(answer["prompt"]) + [1] * (
            len(answer["ids"]) - len(answer["prompt"])
        )
        assert mistral.prompt(replace(one, messages=one.messages[:-1])) == answer["prompt"]
    every = [(answer["ids"], answer["message"]) for answer in case["answers"]]
    rows = [(row.tokens.ids.tolist(), row.turn) for row in mistral.rows(demo(conversation))]
    assert rows == every or rows == every[-1:]


def test_there_are_goldens():
    assert len(GOLDENS["cases"]) >= 14


def test_mistral_worked_example(mistral):
    (row,) = mistral.rows(demo(say("Hi", "Hello")))
    assert row.tokens.ids.tolist() == [1, 3, 16127, 4, 23325, 2]
    assert row.tokens.ids.dtype == np.int32 and row.tokens.targets.dtype == np.float32
    assert row.tokens.targets.tolist() == [0, 0, 0, 0, 1, 1]


WORDS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=12)
HOSTILE = st.sampled_from(
    ["[INST]", "[/INST]</s>", "[TOOL_CALLS] []", " <s> ", "\n\n", "hello", "  x ", "\u00a0é"]
)
TEXT = st.one_of(WORDS, HOSTILE, st.builds(str.__add__, HOSTILE, WORDS))
ANSWER = TEXT.filter(str.strip)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4), st.one_of(st.none(), TEXT))
def test_mistral_learns_exactly_the_answers(turns, system):
    """Against mistral-common itself: the ids are its own, and the learned tokens read as the answers."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    ours = test_mistral_learns_exactly_the_answers.__dict__.setdefault("ours", MistralRenderer())
    reference = test_mistral_learns_exactly_the_answers.__dict__.setdefault(
        "reference", MistralTokenizer.v3()
    )
    conversation = say(*(text for turn in turns for text in turn), system=system)
    rows = ours.rows(demo(conversation))
    expected = [answer.rstrip(" ") + "</s>" for _, answer in turns]
    assert "".join(ours.decode(learned(row)) for row in rows) == "".join(expected)
    entries = [{"role": message.role, "content": message.content} for message in conversation.messages]
    prompt = reference.encode_chat_completion(ChatCompletionRequest.from_openai(entries[:-1])).tokens
    assert (
        rows[-1].tokens.ids.tolist()[: len(prompt)]
        == prompt
        == ours.prompt(replace(conversation, messages=conversation.messages[:-1]))
    )


def test_mistral_splits_only_where_history_depends_on_what_follows(mistral):
    turns = ("a", "b", "c", "d", "e", "f")
    notes: Counter[str] = Counter()
    assert [row.turn for row in mistral.rows(demo(say(*turns)), notes=notes)] == [5] and not notes
    assert [row.turn for row in mistral.rows(demo(say(*turns, system="S")), notes=notes)] == [2, 4, 6]
    assert [row.turn for row in mistral.rows(demo(say(*turns, tools=(weather(),))), notes=notes)] == [1, 3, 5]
    assert notes == {"split into one row per assistant turn": 2}


def test_mistral_calls_read_as_json_with_made_ids(mistral):
    notes: Counter[str] = Counter()
    (row,) = mistral.rows(demo(tool_use()), notes=notes)
    said = mistral.decode(learned(row))
    calls = json.loads(said.removeprefix("[TOOL_CALLS] ").partition("</s>")[0])
    assert [call["arguments"] for call in calls] == [
        {"town": "Paris", "days": 3},
        {"town": "Rom", "deep": {"list": [1, "two"]}},
    ]
    assert len({call["id"] for call in calls}) == 2 and all(len(call["id"]) == 9 for call in calls)
    assert said.endswith("</s>Rome is hotter.</s>")
    text = mistral.decode(row.tokens.ids)
    assert all(f'"call_id": "{call["id"]}"' in text for call in calls)
    assert notes == {"tool call id made of nine letters and digits": 2}


def test_ids_of_another_form_are_replaced_alike_in_call_and_result(mistral):
    messages = list(tool_use().messages)
    messages[1] = replace(
        messages[1], calls=tuple(replace(call, id=f"call_{at}") for at, call in enumerate(messages[1].calls))
    )
    messages[2], messages[3] = replace(messages[2], call_id="call_1"), replace(messages[3], call_id="call_0")
    (row,) = mistral.rows(demo(Conversation(tuple(messages))))
    text = mistral.decode(row.tokens.ids)
    calls = json.loads(text.partition("[TOOL_CALLS] ")[2].partition("</s>")[0])
    assert text.index(f'"call_id": "{calls[1]["id"]}"') < text.index(f'"call_id": "{calls[0]["id"]}"')


def test_results_without_ids_find_their_calls_by_name(mistral):
    calls = (Call("a", {}), Call("b", {}))
    results = (Message("tool", "of b", name="b"), Message("tool", "of a", name="a"))
    messages = (Message("user", "x"), Message("assistant", "", calls), *results, Message("assistant", "y"))
    (row,) = mistral.rows(demo(Conversation(messages)))
    text = mistral.decode(row.tokens.ids)
    made = [call["id"] for call in json.loads(text.partition("[TOOL_CALLS] ")[2].partition("</s>")[0])]
    assert [f'"of {name}", "call_id": "{key}"' in text for name, key in zip("ab", made, strict=True)] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("code", "conversation"),
    [
        (
            "answer",
            Conversation((Message("assistant", "I begin"), Message("user", "a"), Message("assistant", "b"))),
        ),
        (
            "answer",
            Conversation((Message("user", "a"), Message("assistant", "b"), Message("assistant", "c"))),
        ),
        (
            "answer",
            Conversation((Message("system", "S"), Message("assistant", "Welcome"), Message("user", "a"))),
        ),
        ("words_beside_calls", tool_use("Let me look.")),
        (
            "call_id",
            Conversation(
                (
                    *tool_use().messages[:2],
                    Message("tool", "x", call_id="nobodys00"),
                    Message("assistant", "y"),
                )
            ),
        ),
        ("answer", say("a", " \n")),
        ("not_text", say("a", "b\ud800")),
        ("words", say("a", "b\u2581c")),
        ("left_out", say("b\u2581c", "a")),
        ("template", say("a", "b", tools=({"function": {"name": "two words"}},))),
        ("template", Conversation((Message("user", "a"), Message("assistant", "", (Call("f", [1]),))))),
        (
            "template",
            Conversation((Message("user", "a"), Message("assistant", "", (Call("not a name", {}),)))),
        ),
        ("no_target", Conversation((Message("user", "a"),))),
    ],
)
def test_mistral_refuses_by_code_and_names_the_row(mistral, code, conversation):
    with pytest.raises(TemplateError) as caught:
        mistral.rows(demo(conversation, "d.jsonl:7"))
    assert caught.value.code == code and str(caught.value).startswith("d.jsonl:7: ")
    (dropped,) = render([demo(conversation, "d.jsonl:7")], mistral, TemplateSpec(), 100).dropped
    assert (dropped.source, dropped.reason) == ("d.jsonl:7", code)


def test_lost_parts_of_a_tool_are_counted(mistral):
    tool = weather()
    tool["function"]["returns"] = "text"
    notes: Counter[str] = Counter()
    mistral.rows(demo(say("a", "b", tools=(weather(),))), notes=notes)
    assert not notes
    mistral.rows(demo(say("a", "b", tools=(tool,))), notes=notes)
    assert notes == {"a declared tool is not written in full by the template": 1}


TYPESCRIPT = (
    "{% for t in tools or [] %}// {{ t.function.description }}\ntype {{ t.function.name }} = (_: "
    "{% for name, p in t.function.parameters.properties.items() %}{{ name }}: string// {{ p.description }}"
    "{% endfor %}) => any;{% endfor %}" + CHATML
)


def test_a_tool_in_another_notation_is_whole_if_its_names_and_descriptions_are_written(make):
    where = {"type": "string", "description": "its name"}
    tool = weather()
    tool["function"] |= {"description": "of a town"}
    tool["function"]["parameters"] = {"type": "object", "properties": {"at": where}, "required": ["at"]}
    for template, lost in ((TYPESCRIPT, 0), (TYPESCRIPT.replace("{{ p.description }}", ""), 1)):
        notes: Counter[str] = Counter()
        make(template).rows(demo(say("a", "b", tools=(tool,))), notes=notes)
        assert notes["a declared tool is not written in full by the template"] == lost


# Hugging Face templates

PLAIN = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(
    lambda text: not any(s in text for s in SPECIAL)
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(PLAIN, PLAIN.filter(str.strip)), min_size=1, max_size=4), st.one_of(st.none(), PLAIN)
)
def test_chatml_learns_exactly_the_answers(chatml, turns, system):
    conversation = say(*(text for turn in turns for text in turn), system=system)
    rows = chatml.rows(demo(conversation))
    assert "".join(chatml.decode(learned(row)) for row in rows) == "".join(
        f"{answer}<|im_end|>" for _, answer in turns
    )
    prompt = chatml.prompt(replace(conversation, messages=conversation.messages[:-1]))
    assert rows[-1].tokens.ids.tolist()[: len(prompt)] == prompt
    entries = [{"role": message.role, "content": message.content} for message in conversation.messages[:-1]]
    assert prompt == chatml._tokenizer.apply_chat_template(
        entries, add_generation_prompt=True, return_dict=False
    )


def test_chatml_is_one_row_and_the_newline_after_the_end_is_not_learned(chatml):
    (row,) = chatml.rows(demo(say("hello", "hello", "a", "later", system="S")))
    end = chatml.eos_ids[0]
    encode = chatml._encode
    assert learned(row) == [*encode("hello"), end, *encode("later"), end]
    assert row.tokens.ids[-1] == end and row.turn == 4


def test_a_token_over_the_boundary_is_cut_so_that_inference_sees_the_same(chatml):
    """A newline ends the prompt and two begin the answer: in the whole text the first two are one token."""
    conversation = say("a", "\n\nb")
    (row,) = chatml.rows(demo(conversation))
    prompt = chatml.prompt(say("a"))
    assert row.tokens.ids.tolist() == [*prompt, *chatml._encode("\n\nb"), chatml.eos_ids[0]]
    assert chatml._encode("\n\n\nb") != [*chatml._encode("\n"), *chatml._encode("\n\nb")]  # the merge is real
    assert (
        len(chatml.rows(demo(say("a", "\n\nb", "c", "d")))) == 2
    )  # history is read merged, so it is no prefix


def test_a_default_system_message_of_the_template_is_context(make):
    ours = make(DEFAULT_SYSTEM)
    (row,) = ours.rows(demo(say("a", "b", "c", "d")))
    assert (
        "You are helpful." in ours.decode(row.tokens.ids)
        and ours.decode(learned(row)) == "b<|im_end|>d<|im_end|>"
    )


def test_bos_is_no_longer_counted_where_it_opens_every_turn(make):
    (row,) = make(CHATML, bos="<|im_start|>").rows(demo(say("a", "b", "c", "d")))
    assert len(row.tokens.ids) > 10


def test_missing_bos_of_a_template_is_counted(make):
    notes: Counter[str] = Counter()
    make(CHATML, bos="<s>", adds=True).rows(demo(say("a", "b")), notes=notes)
    assert notes == {"no BOS: the tokenizer has one, the template writes none": 1}


def test_hf_calls(make):
    ours = make(TOOLS)
    (row,) = ours.rows(demo(tool_use("Let me look.")))
    said = ours.decode(learned(row))
    assert said.startswith(
        'Let me look.<tool_call>{"name": "weather", "arguments": {"town": "Paris", "days": 3}}</tool_call>'
    )
    assert said.count("<|im_end|>") == 2 and said.endswith("Rome is hotter.<|im_end|>")


@pytest.mark.parametrize(
    ("template", "conversation", "code"),
    [
        (NO_SYSTEM, say("a", "b", system="S"), "template"),
        (CHATML, tool_use(), "left_out"),
        (CHATML, say("a", "b", tools=(weather(),)), "left_out"),
        (IGNORES_TOOL_ROLE, tool_use(), "left_out"),
        (CHATML, say("a <|im_end|> b", "c"), "not_text"),
        (CHATML, say("a", "b", system="</s>"), "not_text"),
        (TOOLS, say("a", "b", tools=(weather("x[INST]"),)), "not_text"),
        (None, say("a", "b"), "no_chat_template"),
        (CHATML.replace("<|im_end|>", ""), say("a", "b"), "template"),
        (CHATML.replace("m.content", "m.content | upper"), say("a", "b"), "template"),
        (CHATML.replace("m.content", "m.content | replace('x', 'y')"), say("a", "x"), "words"),
        (CHATML.replace("m.content", "m.content | replace('x', 'y')"), say("x", "a"), "left_out"),
    ],
)
def test_hf_refuses_by_code(make, template, conversation, code):
    with pytest.raises(TemplateError) as caught:
        make(template).rows(demo(conversation, "d.jsonl:7"))
    assert caught.value.code == code and caught.value.where == "d.jsonl:7" and str(caught.value)


def test_a_control_token_is_refused_in_a_prompt_too(chatml):
    with pytest.raises(TemplateError, match="does not read as text"):
        chatml.prompt(say("a<|im_start|>system"))
    with pytest.raises(TemplateError, match="must end with"):
        chatml.prompt(say("a", "b"))


def test_trimmed_edges_are_counted(make):
    notes: Counter[str] = Counter()
    ours = make(TRIMS)
    (row,) = ours.rows(demo(say("a", " b \n")), notes=notes)
    assert ours.decode(learned(row)) == "b<|im_end|>" and notes == {"whitespace trimmed by the template": 1}


def test_a_reasoning_template_becomes_one_row_an_answer(make):
    ours = make(THINKS)
    notes: Counter[str] = Counter()
    rows = ours.rows(demo(say("a", "b", "c", "d")), notes=notes)
    assert [ours.decode(learned(row)) for row in rows] == ["b<|im_end|>", "d<|im_end|>"]
    assert ours.decode(ours.prompt(say("a"))).endswith("<think></think>")
    assert notes == {"split into one row per assistant turn": 1}


def test_reasoning_may_be_missing_in_history_but_not_in_an_answer(make):
    ours = make(
        THINKS.replace("{% if enable_thinking", "{% if false and enable_thinking").replace(
            "<think></think>", ""
        )
    )
    rows = ours.rows(demo(say("a", "<think>why</think>b", "c", "<think>how</think>d")))
    assert [ours.decode(learned(row)) for row in rows] == [
        "<think>why</think>b<|im_end|>",
        "<think>how</think>d<|im_end|>",
    ]
    assert "why" not in ours.decode(rows[1].tokens.ids)


def test_the_end_token_is_the_one_of_the_template(make):
    ours = make(CHATML, eos="</s>")
    (row,) = ours.rows(demo(say("a", "b")))
    assert ours.decode(learned(row)) == "b<|im_end|>" and ours.decode(ours.eos_ids) == "<|im_end|></s>"


# Other examples, and what is learned


@pytest.mark.parametrize("options", [{}, {"bos": "<s>", "adds": True}])
def test_documents_and_completions(make, options):
    ours = make(None, **options)
    begin = [ours.bos_id] if options else []
    (row,) = ours.rows(Document(text=" hello world", label=None, id="1", source="s", metadata={}))
    assert row.tokens.ids.tolist() == [*begin, *ours._encode(" hello world"), ours.eos_ids[0]]
    assert row.tokens.targets.tolist() == [0] + [1] * (len(row.tokens.ids) - 1)
    (row,) = ours.rows(
        Completion(prompt="say ", completion="hello", label=False, id="1", source="s", metadata={})
    )
    assert ours.decode(learned(row)) == "hello<|im_end|>" and row.label is False
    prompt = ours.text_prompt("say ")
    assert row.tokens.ids.tolist()[: len(prompt)] == prompt and prompt[: len(begin)] == begin


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS.filter(bool), WORDS.filter(bool))
def test_mistral_completions_read_as_written(mistral, prompt, completion):
    (row,) = mistral.rows(
        Completion(prompt=prompt, completion=completion, label=None, id="1", source="s", metadata={})
    )
    ids = row.tokens.ids.tolist()
    assert ids[: len(mistral.text_prompt(prompt))] == mistral.text_prompt(prompt)
    assert mistral.decode(ids) == f"<s>{prompt}{completion}</s>"


@pytest.mark.parametrize(
    ("prompt", "completion"), [("hel", "lo"), ("ab", "cd"), ("a ", "b"), ("été", "s"), ("☺", "☺")]
)
def test_mistral_completions_go_on_inside_a_word(mistral, prompt, completion):
    """The whole word is one token, and a segment alone would get a space before it: neither may be
    trained."""
    (row,) = mistral.rows(
        Completion(prompt=prompt, completion=completion, label=None, id="1", source="s", metadata={})
    )
    ids, before = row.tokens.ids.tolist(), mistral.text_prompt(prompt)
    assert ids[: len(before)] == before and mistral.decode(ids) == f"<s>{prompt}{completion}</s>"


@pytest.mark.parametrize(("prompt", "completion"), [("", "a"), ("a", "")])
def test_a_completion_needs_both_parts(make, prompt, completion):
    with pytest.raises(TemplateError, match="is empty"):
        make(None).rows(
            Completion(prompt=prompt, completion=completion, label=None, id="1", source="s", metadata={})
        )


def test_which_answers_are_learned(chatml):
    marks = (None, True, None, False, None, None)
    messages = [
        replace(m, learn=mark)
        for m, mark in zip(say("a", "b", "c", "d", "e", "f").messages, marks, strict=True)
    ]
    example = demo(Conversation(tuple(messages)))
    read = {}
    notes: Counter[str] = Counter()
    for learn in ("all", "last", "marked"):
        (row,) = chatml.rows(example, learn=learn, notes=notes)
        read[learn] = chatml.decode(learned(row))
    assert read == {"all": "b<|im_end|>f<|im_end|>", "last": "f<|im_end|>", "marked": "b<|im_end|>"}
    assert notes == {"answer not learned: it says learn: false": 1}


def test_prompt_weight_is_on_all_other_tokens_but_the_first(mistral):
    (row,) = mistral.rows(demo(say("a", "b", "c", "d")), prompt_weight=0.25)
    (plain,) = mistral.rows(demo(say("a", "b", "c", "d")))
    expected = np.where(plain.tokens.targets == 1, 1, 0.25)
    expected[0] = 0
    assert row.tokens.targets.tolist() == expected.tolist()


@pytest.mark.parametrize("desirable", [True, False])
def test_judged_rows_carry_their_label(mistral, desirable):
    example = Judged(
        conversation=say("a", "b", system="S"), desirable=desirable, id="9", source="s", metadata={}
    )
    (row,) = mistral.rows(example)
    assert (row.label, row.kind, row.example_id, row.source) == (desirable, "completion", "9", "s")


def preference(chosen: Conversation, rejected: Conversation) -> Preference:
    return Preference(chosen=chosen, rejected=rejected, id="1", source="s", metadata={})


def test_preferences_are_two_rows_learned_from_where_they_part(chatml, mistral):
    for ours, end in ((chatml, "<|im_end|>"), (mistral, "</s>")):
        rows = ours.rows(
            preference(say("a", "b", "c", "good", system="S"), say("a", "b", "c", "bad", system="S"))
        )
        assert [(row.kind, ours.decode(learned(row))) for row in rows] == [
            ("chosen", f"good{end}"),
            ("rejected", f"bad{end}"),
        ]
        starts = [int(np.argmax(row.tokens.targets)) for row in rows]
        assert rows[0].tokens.ids[: starts[0]].tolist() == rows[1].tokens.ids[: starts[1]].tolist()
        for other, match in ((say("other", "b"), "do not diverge"), (say("a", "b"), "no answer")):
            with pytest.raises(TemplateError, match=match):
                ours.rows(preference(say("a", "b"), other))
    with pytest.raises(TemplateError, match="do not diverge"):
        mistral.rows(
            preference(say("a", "b", tools=(weather("one"),)), say("a", "c", tools=(weather("two"),)))
        )


# Too long


LONG = say("one " * 30, "first", "two " * 30, "second", "three", "third", system="S")


def test_refuse_lists_the_rows(chatml):
    examples = [demo(LONG, f"x.jsonl:{at}") for at in range(30)]
    with pytest.raises(DataError, match="30 rows have more than 50 tokens") as caught:
        render(examples, chatml, TemplateSpec(), 50)
    assert "x.jsonl:19" in str(caught.value) and "and 10 more" in str(caught.value)


def test_drop_counts(chatml):
    out = render([demo(LONG), demo(say("a", "b"))], chatml, TemplateSpec(too_long="drop"), 50)
    assert [row.turn for row in out.rows] == [1] and [d.reason for d in out.dropped] == ["too_long"]


@pytest.mark.parametrize("which", ["chatml", "mistral"])
@pytest.mark.parametrize("length", range(20, 420, 20))
def test_cut_never_cuts_an_answer_and_loses_none_in_silence(request, which, length):
    ours = request.getfixturevalue(which)
    out = render([demo(LONG)], ours, TemplateSpec(too_long="cut"), length)
    end = "<|im_end|>" if which == "chatml" else "</s>"
    said = "".join(ours.decode(learned(row)) for row in out.rows)
    kept = [word for word in ("first", "second", "third") if word in said]
    assert said == "".join(word + end for word in kept)
    assert len(out.dropped) == 3 - len(kept) and all(d.reason == "too_long" for d in out.dropped)
    for row in out.rows:
        text = ours.decode(row.tokens.ids)
        assert len(row.tokens.ids) <= length and "S" in text
    longest = max(len(row.tokens.ids) for row in ours.rows(demo(LONG)))
    assert ("cut at a turn boundary" in out.notes) == (bool(kept) and length < longest and kept != ["first"])


def test_cut_keeps_the_context_of_a_pair_alike(chatml):
    pair = preference(LONG, replace(LONG, messages=(*LONG.messages[:-1], Message("assistant", "worse"))))
    chosen, rejected = render([pair], chatml, TemplateSpec(too_long="cut"), 200).rows
    assert "two" in chatml.decode(chosen.tokens.ids) and "one" not in chatml.decode(chosen.tokens.ids)
    assert chatml.decode(rejected.tokens.ids) == chatml.decode(chosen.tokens.ids).replace("third", "worse")
    long = preference(say("a", "b"), say("a", "b" * 100))
    out = render([long], chatml, TemplateSpec(too_long="drop"), 100)
    assert not out.rows and [d.reason for d in out.dropped] == ["too_long"]  # never half a pair


def test_a_pair_of_two_long_answers_is_one_bad_row(chatml):
    pair = preference(say("a", "b" * 150), say("a", "c" * 200))
    longest = max(len(row.tokens.ids) for row in chatml.rows(pair))
    out = render([pair], chatml, TemplateSpec(too_long="drop"), 100)
    assert [row.fault for row in out.dropped] == [f"{longest} tokens, the limit is 100"]


def test_a_conversation_of_which_several_answers_are_too_long_counts_once(chatml):
    out = render([demo(LONG, "x.jsonl:1")], chatml, TemplateSpec(too_long="cut"), 20)
    assert len(out.dropped) == 3
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used, 50\.0% \(too_long 1\)"):
        formats.require(formats.Read([demo(LONG)], out.dropped, 2, {"x.jsonl": ""}), 0.0)


# Which renderer


def test_auto_finds_the_renderer(tmp_path, mistral):
    assert isinstance(load(write(tmp_path / "hf", CHATML)), HFRenderer)
    own = write(tmp_path / "v3", CHATML)
    (own / "tokenizer.model.v3").write_bytes(Path(mistral._pieces.file_path).read_bytes())
    assert isinstance(load(own), MistralRenderer) and isinstance(
        load(own, TemplateSpec(renderer="hf")), HFRenderer
    )
    assert load(own).fingerprint == mistral.fingerprint
    pieces = {mistral._pieces.id_to_piece(at): at for at in range(mistral._pieces.n_words)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(pieces, []))).save_pretrained(
        tmp_path / "same"
    )
    assert isinstance(load(tmp_path / "same"), MistralRenderer)
    for bad in (tmp_path / "absent", tmp_path):
        with pytest.raises(ModelError):
            load(bad)


def test_fingerprints_follow_what_decides_the_ids(make, mistral):
    prints = [
        make(CHATML).fingerprint,
        make(DEFAULT_SYSTEM).fingerprint,
        make(CHATML, eos="</s>").fingerprint,
        mistral.fingerprint,
    ]
    assert len(set(prints)) == 4 and make(CHATML).fingerprint == prints[0]


def test_answers_of_the_model_end_at_the_end_token(mistral, chatml):
    (row,) = mistral.rows(demo(tool_use()))
    start = int(np.argmax(row.tokens.targets))
    assert mistral.answer(row.tokens.ids[start:].tolist()).startswith('[TOOL_CALLS] [{"name": "weather"')
    assert chatml.answer([*chatml._encode("hello"), chatml.eos_ids[0], 5, 6]) == "hello"


def test_progress(chatml):
    seen = []
    render([demo(say("a", "b"))] * 3, chatml, TemplateSpec(), 99, lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Bugs of the field (field notes, section 3)


def test_museum_13_null_content_with_tool_calls(mistral, make):
    """A call has no words (``content: null``): mlx-lm 185 crashes, mlx-openai-server 205 drops the turn."""
    for ours in (mistral, make(TOOLS)):
        (row,) = ours.rows(demo(replace(tool_use(""), messages=tool_use("").messages[:2])))
        assert "Paris" in ours.decode(learned(row))


def test_museum_14_double_bos(make):
    """mlx-examples 1095, mlx-lm-lora: encodes a templated string with special tokens again."""
    ours = make(BOS_ONCE, bos="<s>", adds=True)
    (row,) = ours.rows(demo(say("a", "b", "c", "d")))
    assert row.tokens.ids.tolist().count(ours.bos_id) == 1 and row.tokens.ids[0] == ours.bos_id
    ours._encode = lambda text: ours._tokenizer.encode(text)  # the bug
    with pytest.raises(TemplateError, match="2 BOS"):
        ours.rows(demo(say("a", "b", "c", "d")))


def test_museum_15_eos_is_learned_though_it_pads(make):
    """TRL #976, #1623: masking by the id of the padding takes the end token along."""
    ours = make(CHATML, pad="<|im_end|>")
    (row,) = ours.rows(demo(say("a", "b", "c", "d")))
    assert learned(row).count(ours.eos_ids[0]) == 2


def test_museum_16_truncation_never_eats_the_answer(chatml):
    """TRL #3927, #6668: rows are cut at the length, answer and all."""
    out = render([demo(say("word " * 50, "answer"))], chatml, TemplateSpec(too_long="cut"), 100)
    assert not out.rows and [d.reason for d in out.dropped] == ["too_long"]
    with pytest.raises(DataError):
        render([demo(say("word " * 50, "answer"))], chatml, TemplateSpec(), 100)


def test_museum_the_v3_template_drops_the_system_prompt(make, mistral):
    """The chat template of Mistral v0.3 (and of Ollama, 5803) leaves the system text out when the assistant
    has the last word: the row has the prompt of inference, and the answer that follows it."""
    hf = make(V3_LIKE, bos="<s>", eos="</s>")
    example = demo(say("a", "b", "c", "d", system="Be brief."))
    assert "Be brief." in hf.decode(hf.prompt(say("a", system="Be brief.")))
    first, last = hf.rows(example)
    for row, shown in ((first, say("a", system="Be brief.")), (last, say("a", "b", "c", system="Be brief."))):
        prompt = hf.prompt(shown)
        assert row.tokens.ids[: len(prompt)].tolist() == prompt and row.tokens.start == len(prompt)
        assert "Be brief." in hf.decode(prompt)
    ends = [[*hf._encode(f" {word}"), hf.eos_ids[0]] for word in "bd"]
    assert [learned(row) for row in (first, last)] == ends
    rows = mistral.rows(example)
    assert len(rows) == 2 and all("Be brief." in mistral.decode(row.tokens.ids) for row in rows)


def test_real_rows_all_render(syngen, mistral, chatml):
    rows = [json.loads(line) for line in syngen.read_text(encoding="utf-8").splitlines()]
    examples = [
        Judged(
            conversation=Conversation(tuple(Message(m["role"], m["content"]) for m in row["conversations"])),
            desirable=row["label"],
            id=str(at),
            source=f"syngen:{at}",
            metadata={},
        )
        for at, row in enumerate(rows[:200], 1)
    ]
    for ours in (mistral, chatml):
        out = render(examples, ours, TemplateSpec(), 20_000)
        assert len(out.rows) == 200 and not out.dropped and not out.notes


def test_a_whole_prompt_is_the_prompt_or_says_what_the_template_leaves_out(make, chatml, mistral):
    asked = Conversation((Message("system", "Be brief."), Message("user", "Hello?")))
    for renderer in (chatml, mistral):
        assert renderer.whole_prompt(asked) == renderer.prompt(asked)
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    armed = replace(asked, tools=(tool,))
    assert mistral.whole_prompt(armed) == mistral.prompt(armed)
    with pytest.raises(Refused, match="look"):
        chatml.whole_prompt(armed)
    deaf = make(CHATML.replace("in messages %}", "in messages if m.role != 'system' %}"))
    assert deaf.whole_prompt(replace(asked, messages=asked.messages[1:]))
    with pytest.raises(Refused, match="missing"):
        deaf.whole_prompt(asked)


def test_reasoning_is_switched_only_if_the_template_can(make, chatml):
    block = (
        "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    )
    thinks = make(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + block + "{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    on = thinks.with_thinking(True)
    asked = Conversation((Message("user", "Hello?"),))
    assert thinks.thinking_switch == "enable_thinking" and not thinks.thinking and on.thinking
    assert on.prompt(asked) != thinks.prompt(asked) and on.fingerprint == thinks.fingerprint
    assert thinks.with_thinking(False) is thinks and chatml.with_thinking(False) is chatml
    for unable in (chatml, make(THINKS)):  # the second can turn off what it never asks for
        with pytest.raises(Refused, match="cannot turn reasoning on"):
            unable.with_thinking(True)
