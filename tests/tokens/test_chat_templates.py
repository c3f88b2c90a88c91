"""What a template has of its own: frames, openings, ends and switches. The prompt is transformers' rendering,
and the learned tokens read as the template's frame, the words and the end."""

from __future__ import annotations

import json
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import Call, Conversation, Demonstration, Message
from tunesmith.errors import ConfigError, ModelError, TemplateError
from tunesmith.machine.ranks import Ranks
from tunesmith.tokens import template
from tunesmith.tokens.first_rules import FirstRules
from tunesmith.tokens.hugging_face import Vocabulary
from tunesmith.tokens.renderers import HFRenderer, Recorded, load
from tunesmith.tokens.template import TemplateSpec

MARKS = ("<s>", "</s>", "<|u|>", "<|a|>", "<|t|>", "<|end|>", "<|turn|>", "<|ch|>", "<|call|>")
TURNS = "{% for m in messages %}{% if m.role != 'assistant' %}<|u|>{{ m.content }}{% else %}"
CLOSE = "{% endif %}{% endfor %}{% if add_generation_prompt %}"
PLAIN = TURNS + "<|a|>{{ m.content }}<|end|>" + CLOSE + "<|a|>{% endif %}"
OPENED = (  # reasoning is left out of every answer, and the prompt opens it
    TURNS + "<|a|>{{ m.content.split('</think>')[-1] }}<|end|>" + CLOSE + "<|a|><think>\n{% endif %}"
)
SWITCHED = (  # an empty block if thinking is off
    TURNS
    + "<|a|>{% if m.reasoning_content or loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    + "{% endif %}{{ m.content }}<|end|>"
    + CLOSE
    + "<|a|>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
EMPTY_BLOCK = TURNS + "<|a|>{{ m.content }}<|end|>" + CLOSE + "<|a|><think></think>{% endif %}"
CHANNEL = (
    TURNS
    + "<|a|>{% if m.thinking %}analysis<|ch|>{{ m.thinking }}<|t|><|a|>{% endif %}final<|ch|>{{ m.content }}"
    + "<|end|>"
    + CLOSE
    + "<|a|>{% endif %}"
)
NO_END = (
    "{% for m in messages %}{% if m.role == 'user' %}<|u|>{{ m.content }}{% elif m.role == 'tool' %}<|t|>"
    "{{ m.content }}{% else %}<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
    "{% endfor %}{% endif %}{% endfor %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
TWO_ENDS = TURNS + "<|a|>{{ m.content }}<|end|><|turn|>" + CLOSE + "<|a|>{% endif %}"
NEEDS_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + PLAIN
PARTS = PLAIN.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
DATED = "{{ strftime_now('%d %b %Y') }}" + PLAIN
TEXT_ARGUMENTS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    + TURNS
    + "<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    + "{{ c.function.name + '(' + c.function.arguments }})"
    + "{% endfor %}<|end|>"
    + CLOSE
    + "<|a|>{% endif %}"
)
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
)
SHOWN_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
INSTRUCTED = (  # an instruction ends every prompt, and stands behind every answer
    SHOWN_TOOLS
    + TURNS.replace("<|u|>{{ m.content }}", "<|u|>{{ m.content }}<|end|>")
    + "<|a|>{{ m.content }}"
    "{% if m.tool_calls %}" + CALLS + "{% else %}<|end|>{% endif %}{% endif %}{% endfor %}"
    "<|t|>Be helpful.<|end|>{% if add_generation_prompt %}<|a|>{% endif %}"
)
TAGGED = (  # tags close with the same tokens as inside an answer; only the last one ends it
    SHOWN_TOOLS + TURNS + "<|a|>{% if thinking %}<|t|>think<|ch|>{{ m.reasoning or '' }}<|call|>think<|ch|>"
    "{% endif %}<|t|>say<|ch|>{{ m.content }}<|call|>say<|ch|>{% for c in m.tool_calls or [] %}<|t|>"
    + CALLS.replace("{% for c in m.tool_calls or [] %}", "").replace("{% endfor %}", "")
    + "<|call|>call<|ch|>{% endfor %}<|end|>"
    + CLOSE
    + "<|a|>{% if thinking %}<|t|>think<|ch|>{% else %}<|t|>say<|ch|>{% endif %}{% endif %}"
)
CLOSED = (  # the prompt closes the reasoning, whatever the row has
    TURNS
    + "<|a|><think>\n{{ m.reasoning or '' }}\n</think>\n\n{{ m.content }}<|end|>"
    + CLOSE
    + "<|a|><think>\n\n</think>\n\n{% endif %}"
)
OWN_QUOTES = (
    SHOWN_TOOLS + TURNS + "<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}"
    "{{ f.name + '{' }}{% if f.arguments is mapping %}{% for k, v in f.arguments.items() %}{{ k }}:"
    "<|t|>{{ v }}<|t|>{% endfor %}{% else %}{{ f.arguments }}{% endif %}{{ '}' }}{% endfor %}<|end|>"
    + CLOSE
    + "<|a|>{% endif %}"
)
NAMED_CALLS = (  # the id is all that names a call, as in Kimi K2's template
    SHOWN_TOOLS
    + TURNS.replace("<|u|>", "<|u|>{% if m.tool_call_id %}Return of {{ m.tool_call_id }}: {% endif %}")
    + "<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.id }}<|t|>"
    "{{ c.function.arguments | tojson }}{% endfor %}<|end|>" + CLOSE + "<|a|>{% endif %}"
)
CLOSED_RESULTS = (  # a line break follows results, unless they are the last message
    SHOWN_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}<|t|>{{ m.content }}{% if not loop.last %}"
    "{{ '\\n' }}{% endif %}{% elif m.role == 'user' %}<|u|>{{ m.content }}{% else %}<|a|>{{ m.content }}"
    + CALLS
    + "<|end|>"
    + CLOSE
    + "<|a|>{% endif %}"
)
OPENED_CALLS = (  # the prompt opens reasoning, which training shows before words and not before calls
    SHOWN_TOOLS
    + TURNS
    + "<|a|>{% if m.tool_calls %}"
    + CALLS
    + "{% else %}{% if loop.last %}<think>\n{% endif %}"
    "{{ m.content }}{% endif %}<|end|>" + CLOSE + "<|a|><think>\n{% endif %}"
)
MARKED_WORDS = (  # words have a mark of their own behind reasoning, and calls have none
    SHOWN_TOOLS
    + TURNS
    + "<|a|>{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}{% if m.content %}<|t|>"
    "{{ m.content }}{% endif %}" + CALLS + "<|end|>" + CLOSE + "<|a|><think>{% endif %}"
)
LEFT_OPEN = (  # the last answer is left open, and only older calls have ids
    SHOWN_TOOLS
    + TURNS
    + "<|a|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% if m.tool_calls and not loop.last %}{{ m.tool_calls[0].id }}{% endif %}"
    "{% if not loop.last %}<|end|>{% endif %}" + CLOSE + "<|a|>{% endif %}"
)
HIDDEN = TURNS + "<|a|>{{ m.content.split('</think>')[-1] }}<|end|>" + CLOSE + "<|a|>{% endif %}"
TOOL = {"type": "function", "function": {"name": "sky", "description": "of a town", "parameters": {}}}


@pytest.fixture
def made(tmp_path):
    """``made(template, …)``: the renderer of a folder with it. stops: of generation_config.json."""

    def make(template, *, eos="</s>", stops=(), spec=None, recorded=None):
        pieces = {piece: place for place, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        inner = Tokenizer(models.BPE(pieces, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
        fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos)
        fast.chat_template = template
        fast.save_pretrained(tmp_path)
        if stops:
            ids = [inner.token_to_id(mark) for mark in stops]
            (Path(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return load(tmp_path, spec, recorded)

    return make


def asked(*words: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[place % 2], text) for place, text in enumerate(words)))


def learned(renderer, conversation: Conversation) -> list[tuple[str, str]]:
    """Of each row the end of what is not learned, and what is, which follows transformers' prompt."""
    example = Demonstration(conversation=conversation, label=None, id="0", source="x:1", metadata={})
    rows = renderer.rows(example)
    texts = []
    for row in rows:
        start = row.tokens.start
        texts.append((renderer.decode(row.tokens.ids[:start]), renderer.decode(row.tokens.ids[start:])))
    return texts


def test_an_empty_special_token_is_not_a_control_token(made, tmp_path):
    made(PLAIN)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": ""}))
    words = Vocabulary(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert words.in_text.match("words") is None and words.in_text.match("<|end|>") is not None
    assert learned(load(tmp_path, None, None), asked("Hm?", "Seven."))


THOUGHT = "<think>\nthree, four\n</think>\n\nSeven."


@pytest.mark.parametrize(
    ("template", "words", "prompt", "said"),
    [
        (PLAIN, "Seven.", "<|u|>Hm?<|a|>", "Seven.<|end|>"),
        (PLAIN, THOUGHT, "<|u|>Hm?<|a|>", THOUGHT + "<|end|>"),
        (OPENED, THOUGHT, "<|u|>Hm?<|a|><think>\n", "three, four\n</think>\n\nSeven.<|end|>"),
        (OPENED, "Seven.", "<|u|>Hm?<|a|><think>\n", "\n</think>\n\nSeven.<|end|>"),
        (SWITCHED, "Seven.", "<|u|>Hm?<|a|><think>\n\n</think>\n\n", "Seven.<|end|>"),
        (SWITCHED, THOUGHT, "<|u|>Hm?<|a|>", THOUGHT + "<|end|>"),
        (SWITCHED, THOUGHT.removeprefix("<think>\n"), "<|u|>Hm?<|a|>", THOUGHT + "<|end|>"),
        (EMPTY_BLOCK, "Seven.", "<|u|>Hm?<|a|><think></think>", "Seven.<|end|>"),
        (CHANNEL, "Seven.", "<|u|>Hm?<|a|>", "final<|ch|>Seven.<|end|>"),
        (CHANNEL, THOUGHT, "<|u|>Hm?<|a|>", "analysis<|ch|>three, four<|t|><|a|>final<|ch|>Seven.<|end|>"),
        (TWO_ENDS, "Seven.", "<|u|>Hm?<|a|>", "Seven.<|end|><|turn|>"),
        (NEEDS_TOOLS, "Seven.", "<|u|>Hm?<|a|>", "Seven.<|end|>"),
        (PARTS, "Seven.", "<|u|>Hm?<|a|>", "Seven.<|end|>"),
    ],
)
def test_what_is_learned_begins_where_inference_begins(made, template, words, prompt, said):
    renderer = made(template, eos="<|turn|>")
    assert learned(renderer, asked("Hm?", words)) == [(prompt, said)]
    assert prompt == renderer.decode(renderer.prompt(asked("Hm?"))) or "think" in words


def test_a_template_without_end_tokens_ends_with_the_next_role(made):
    """GLM: an answer ends with the next user, calls with their result, since generation stops at both."""
    renderer = made(NO_END, stops=("<|u|>", "<|t|>"))
    calls = (Call("sky", {"town": "Rome"}),)
    messages = (Message("user", "?"), Message("assistant", "", calls), Message("tool", "blue"))
    ((_, said),) = learned(renderer, Conversation((*messages, Message("assistant", "Blue.")), ()))[-1:]
    assert said.endswith("<|t|>blue<|a|>Blue.<|u|>") or said == "Blue.<|u|>"
    assert learned(renderer, asked("?", "b"))[0][1] == "b<|u|>"
    bare = HFRenderer(renderer._tokenizer)
    with pytest.raises(TemplateError, match="ends an answer with no end token"):
        learned(bare, asked("?", "b"))


def test_stops_are_those_of_generation_config_tokenizer_and_template(made):
    renderer = made(PLAIN, eos="</s>", stops=("<|call|>", "</s>"))
    assert [renderer.decode([token]) for token in renderer.eos_ids] == ["<|end|>", "</s>", "<|call|>"]


def test_generation_config_that_cannot_be_read_is_named(made, tmp_path):
    made(PLAIN)
    for content in ("{", '{"eos_token_id": "x"}'):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ModelError, match="generation_config"):
            load(tmp_path)


def test_a_row_with_reasoning_turns_thinking_on_and_a_row_without_off(made):
    """In one conversation too: each answer is a row of its own."""
    renderer = made(SWITCHED)
    rows = learned(renderer, asked("Hm?", "Six.", "And?", THOUGHT))
    assert [said for _, said in rows] == ["Six.<|end|>", THOUGHT + "<|end|>"]
    assert rows[0][0].endswith("<|a|><think>\n\n</think>\n\n") and rows[1][0].endswith("And?<|a|>")
    assert renderer.decode(renderer.prompt(asked("Hm?"))).endswith("</think>\n\n")
    renderer.thinking = True
    assert renderer.decode(renderer.prompt(asked("Hm?"))).endswith("<|a|>")


def test_an_option_decides_for_every_row(made):
    renderer = made(SWITCHED, spec=TemplateSpec(options={"enable_thinking": True}))
    assert learned(renderer, asked("Hm?", "Six.")) == [
        ("<|u|>Hm?<|a|>", "<think>\n\n</think>\n\nSix.<|end|>")
    ]


def test_old_reasoning_is_no_context_if_the_template_leaves_it_to_others(made):
    rows = learned(made(PLAIN), asked("Hm?", THOUGHT, "And?", THOUGHT))
    assert rows[1] == ("<|u|>Hm?<|a|>Seven.<|end|><|u|>And?<|a|>", THOUGHT + "<|end|>")


def test_reasoning_that_the_template_drops_is_refused(made):
    with pytest.raises(TemplateError, match="no place for the reasoning"):
        learned(made(HIDDEN), asked("Hm?", THOUGHT))


def test_an_end_token_inside_an_answer_is_refused(made):
    inside = CHANNEL.replace("<|t|><|a|>", "<|end|><|a|>")
    with pytest.raises(TemplateError, match="stops generation before the answer is whole"):
        learned(made(inside), asked("Hm?", THOUGHT))


def test_arguments_are_given_as_the_template_takes_them(made):
    calls = (Call("sky", {"town": "Rome"}),)
    conversation = Conversation((Message("user", "?"), Message("assistant", "", calls)), (TOOL,))
    assert learned(made(TEXT_ARGUMENTS), conversation)[0][1] == 'sky({"town": "Rome"})<|end|>'


def test_each_turn_is_encoded_once(made, monkeypatch):
    """The ids are those of the whole text, and the number of encoded letters grows with the conversation."""
    renderer = made(PLAIN)
    words, encoded = renderer._words, []
    whole = words._encoded
    monkeypatch.setattr(words, "_encoded", lambda text: encoded.append(len(text)) or whole(text))
    counts = []
    for turns in (20, 40):
        spoken = asked(*(f"message {turns} {number}" for number in range(2 * turns)))
        example = Demonstration(conversation=spoken, label=None, id="0", source="x:1", metadata={})
        encoded.clear()
        (row,) = renderer.rows(example)
        assert row.tokens.ids.tolist() == whole(renderer.decode(row.tokens.ids))
        counts.append(sum(encoded))
    assert counts[1] < 2.5 * counts[0]


@pytest.mark.parametrize(
    ("added", "cut"),
    [
        ([], True),
        ([AddedToken("x<", special=False, normalized=False)], False),
        ([AddedToken("\n<|u|>", special=False, normalized=False)], False),
        ([AddedToken("<|u|>", special=True, normalized=False, lstrip=True)], False),
    ],
)
def test_a_text_is_cut_only_where_its_parts_have_the_ids_of_the_whole(made, added, cut):
    words = made(PLAIN)._words
    inner = Tokenizer.from_str(words.tokenizer.backend_tokenizer.to_str())
    inner.add_tokens(added)
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    words = Vocabulary(fast)
    for text in ("ax<|u|>b", "a\n<|u|>b \n<|u|> c<|a|>", " <|u|>", "", "<|u|><|u|>", "plain"):
        assert words.encode(text) == fast.encode(text, add_special_tokens=False), text
        assert words.encode(text) == fast.encode(text, add_special_tokens=False), text
    assert (words._starts is not None and words._starts.match("<|u|>") is not None) == cut


def test_a_context_that_was_looked_at_is_not_looked_at_again(made, monkeypatch):
    looked = []
    present = template._present
    monkeypatch.setattr(
        template,
        "_present",
        lambda message, text, **given: looked.append(message) or present(message, text, **given),
    )
    learned(made(PLAIN), asked(*(f"message {number}" for number in range(40))))
    assert len(looked) == 40


SKY = Call("sky", {"town": "Rome"})
ASKED_SKY = (Message("user", "?"), Message("assistant", "", (SKY,)), Message("tool", "blue"))


def answers(renderer, tools=(TOOL,)) -> list[tuple[str, str]]:
    """What follows the question in the prompt of a call and of the words after its result, and what is
    learned."""
    called = Conversation((*ASKED_SKY, Message("assistant", "Blue.")), tools)
    texts = []
    for place in (1, 3):
        shown = Conversation(called.messages[: place + 1], tools)
        example = Demonstration(conversation=shown, label=None, id="0", source="x:1", metadata={})
        (row,) = renderer.rows(example, learn="last")
        before = renderer._checked(Conversation(called.messages[:place], tools), Counter())
        start = row.tokens.start
        assert row.tokens.ids[:start].tolist() == renderer.prompt(before)
        text = renderer.decode(row.tokens.ids[:start])
        texts.append((text[text.index("?") + 1 :], renderer.decode(row.tokens.ids[start:])))
    return texts


def test_an_instruction_behind_every_prompt_is_context(made):
    renderer = made(INSTRUCTED, eos="<|end|>")
    prompt = "<|u|>Hm?<|end|><|t|>Be helpful.<|end|><|a|>"
    assert learned(renderer, asked("Hm?", "Seven.")) == [(prompt, "Seven.<|end|>")]
    rows = learned(renderer, asked("Hm?", "Six.", "And?", "Seven."))
    assert rows[1] == (
        "<|u|>Hm?<|end|><|a|>Six.<|end|><|u|>And?<|end|><|t|>Be helpful.<|end|><|a|>",
        "Seven.<|end|>",
    )


def test_calls_without_an_end_of_their_own_are_refused(made):
    """The end token of the next turn is not the end of the calls."""
    with pytest.raises(TemplateError, match="no token ends these calls"):
        answers(made(INSTRUCTED, eos="<|end|>"))


def test_an_end_token_is_not_one_of_the_marks_inside_an_answer(made):
    renderer = made(TAGGED)
    assert renderer.decode(renderer.eos_ids[:1]) == "<|end|>"
    said = "Seven.<|call|>say<|ch|><|end|>"
    assert learned(renderer, asked("Hm?", "Seven.")) == [("<|u|>Hm?<|a|><|t|>say<|ch|>", said)]
    thought = learned(renderer, asked("Hm?", THOUGHT))[0]
    assert thought[0] == "<|u|>Hm?<|a|><|t|>think<|ch|>"
    assert thought[1] == "three, four<|call|>think<|ch|><|t|>say<|ch|>" + said
    call = '<|call|>say<|ch|><|t|>sky{"town": "Rome"}<|call|>call<|ch|><|end|>'
    assert answers(renderer)[0] == ("<|a|><|t|>say<|ch|>", call)
    assert renderer.answer(renderer._encode(said)) == "Seven."
    assert renderer.answer(renderer._encode(thought[1])) == THOUGHT


def test_reasoning_is_never_learned_behind_its_end(made):
    renderer = made(CLOSED)
    assert learned(renderer, asked("Hm?", "Six."))[0][1] == "Six.<|end|>"
    with pytest.raises(TemplateError, match="no place for the reasoning"):
        learned(renderer, asked("Hm?", THOUGHT))


def test_a_template_with_quotes_of_its_own_gets_arguments_as_objects(made):
    assert answers(made(OWN_QUOTES))[0][1] == "sky{town:<|t|>Rome<|t|>}<|end|>"


def test_calls_are_named_in_their_ids_if_nothing_else_names_them(made):
    called, replied = answers(made(NAMED_CALLS))
    assert called[1] == '<|call|>functions.sky:0<|t|>{"town": "Rome"}<|end|>'
    assert "Return of functions.sky:0: blue" in replied[0]


def test_a_context_that_training_shows_otherwise_is_the_one_of_inference(made):
    called, replied = answers(made(CLOSED_RESULTS))
    assert called == ("<|a|>", 'sky{"town": "Rome"}<|end|>')
    assert replied[0].endswith("<|t|>blue<|a|>") and replied[1] == "Blue.<|end|>"


def test_a_call_closes_the_reasoning_that_its_prompt_opens(made):
    called, replied = answers(made(OPENED_CALLS))
    assert called == ("<|a|><think>\n", '\n</think>\n\nsky{"town": "Rome"}<|end|>')
    assert replied[1] == "\n</think>\n\nBlue.<|end|>"
    rows = learned(made(OPENED_CALLS), asked("Hm?", THOUGHT))
    assert rows == [("<|u|>Hm?<|a|><think>\n", THOUGHT.removeprefix("<think>\n") + "<|end|>")]


def test_marks_of_words_stand_once_behind_the_reasoning(made):
    renderer = made(MARKED_WORDS)
    called, replied = answers(renderer)
    assert called == ("<|a|><think>", '</think>sky{"town": "Rome"}<|end|>')
    assert replied[1] == "</think><|t|>Blue.<|end|>"


def test_calls_that_are_left_open_end_as_words_do(made):
    renderer = made(LEFT_OPEN, eos="<|end|>")
    called, replied = answers(renderer)
    assert called[1] == '{"name": "sky", "arguments": {"town": "Rome"}}<|end|>'
    assert replied[1] == "Blue.<|end|>"


RAISES = "{{ raise_exception('no') }}"
NEEDS = {
    "describe each parameter": "{% for t in tools or [] %}"
    "{% for p in t.function.parameters.properties.values() %}"
    "{{ 'x' + p.description }}"
    "{% endfor %}{% endfor %}",
    "one call a turn": "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    + RAISES
    + "{% endif %}{% endfor %}",
    "call without arguments": "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{% if not c.function.arguments %}" + RAISES + "{% endif %}{% endfor %}{% endfor %}",
    "no system role": "{% if messages[0].role == 'system' %}" + RAISES + "{% endif %}",
    "join messages": "{% for m in messages %}{% if m.role == loop.previtem.role %}"
    + RAISES
    + "{% endif %}{% endfor %}",
    "cannot write the tools": "{% if tools %}" + RAISES + "{% endif %}",
    "write them as text": "{% for m in messages %}{% if m.role == 'tool' %}"
    + RAISES
    + "{% endif %}{% endfor %}",
    "drop this row": "{% for m in messages %}{% if 'blue' in m.content %}"
    + RAISES
    + "{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("hint", NEEDS)
def test_the_hint_speaks_of_what_the_template_refuses(made, hint):
    """All rows have all that can be wrong; the template refuses one thing."""
    calls = (Call("sky", {}), Call("sky", {"town": "Rome"}))
    tool = {"type": "function", "function": {"name": "sky", "parameters": {"properties": {"town": {}}}}}
    messages = (
        Message("system", "Be brief."),
        Message("user", "Hm?"),
        Message("user", "Well?"),
        Message("assistant", "", calls),
        Message("tool", "blue"),
        Message("tool", "blue"),
        Message("assistant", "Blue."),
    )
    template = (
        NEEDS[hint]
        + SHOWN_TOOLS
        + TURNS
        + "<|a|>{{ m.content }}"
        + CALLS
        + "<|end|>"
        + CLOSE
        + "<|a|>{% endif %}"
    )
    with pytest.raises(TemplateError) as caught:
        learned(
            made(template.replace("loop.previtem.role", "(loop.previtem or {}).role")),
            Conversation(messages, (tool,)),
        )
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("template", [PLAIN, OPENED, CHANNEL, SWITCHED, TAGGED])
@pytest.mark.parametrize(
    "words",
    [
        "Seven.",
        "Seven.<|call|>say<|ch|>",
        "<|call|>say<|ch|><|t|>x",
        "  final answer: analysis",
        THOUGHT,
        "<think>",
        "",
    ],
)
def test_what_is_settled_of_an_answer_never_changes(made, template, words):
    renderer = made(template)
    for said in (words, f"final<|ch|>{words}", f"analysis<|ch|>three<|t|><|a|>final<|ch|>{words}"):
        ids, shown = renderer._encode(said), ""
        for count in range(1, len(ids) + 1):
            if not renderer.opens(renderer.decode(ids[:count])):
                answer = renderer.answer(ids[:count])
                assert answer.startswith(shown), (said, count)
                shown = answer
        assert renderer.answer(ids).startswith(shown)


def test_words_in_a_channel_are_shown_as_they_come(made):
    renderer = made(CHANNEL)
    ids = renderer._encode("final<|ch|>Seven is it")
    assert all(renderer.opens(renderer.decode(ids[:count])) for count in (1, 5, 6))
    assert not renderer.opens(renderer.decode(ids[:9])) and renderer.answer(ids[:9]) == "Sev"


def test_generated_answers_lose_the_frame(made):
    renderer = made(CHANNEL)
    assert renderer.answer(renderer._encode("final<|ch|>Seven.<|end|>x")) == "Seven."
    said = "analysis<|ch|>three, four<|t|><|a|>final<|ch|>Seven.<|end|>"
    assert renderer.answer(renderer._encode(said)) == THOUGHT
    assert made(PLAIN).answer(renderer._encode("Seven.<|end|>")) == "Seven."


def test_the_date_is_that_of_the_run(made):
    renderer = made(DATED, spec=TemplateSpec(date="2024-07-26"))
    assert learned(renderer, asked("Hm?", "Six."))[0][0].startswith("26 Jul 2024<|u|>")
    begun = made(DATED, recorded=Recorded("another", date(2025, 1, 2), False))
    assert begun.decode(begun.prompt(asked("Hm?"))).startswith("02 Jan 2025")
    assert begun.fingerprint != renderer.fingerprint
    days = [date(2024, 1, 1), date(2024, 1, 2)]
    assert len({made(PLAIN, recorded=Recorded("another", day, False)).fingerprint for day in days}) == 1


def test_a_rank_that_starts_after_midnight_has_the_day_of_the_first(monkeypatch):
    ranks = Ranks(None, 1, 2)
    monkeypatch.setattr(Ranks, "from_first", lambda self, text: "2024-07-26")
    assert Recorded.on_first_rank(ranks) == Recorded(None, date(2024, 7, 26), False)


def test_a_run_of_0_1_0_keeps_its_rules(made):
    renderer = made(SWITCHED)
    first = FirstRules(renderer._tokenizer, date(2026, 1, 1))
    again = made(SWITCHED, recorded=Recorded(first.fingerprint, date(2026, 1, 1), False))
    assert isinstance(again, FirstRules) and again.fingerprint == first.fingerprint != renderer.fingerprint
    shut = "<|u|>Hm?<|a|><think>\n\n</think>\n\n"
    assert learned(again, asked("Hm?", THOUGHT)) == [(shut, THOUGHT + "<|end|>")]
    assert learned(again, asked("Hm?", "Six.")) == learned(made(SWITCHED), asked("Hm?", "Six."))


@pytest.mark.parametrize(
    ("template", "setting", "named"),
    [
        (PLAIN, {"options": {"enable_thinkng": True}}, "template.options.enable_thinkng"),
        (PLAIN, {"date": "2026-01-02"}, "template.date"),
        (PLAIN, {"thinking": "on"}, "template.thinking"),
        (SWITCHED, {"options": {"enable_thinking": True}}, None),
        (SWITCHED, {"thinking": "on"}, None),
        (PLAIN, {"thinking": "off"}, None),
        ("mistral-v3", {"options": {"x": 1}}, "template.options.x"),
        ("mistral-v3", {"date": "2026-01-02"}, "template.date"),
    ],
)
def test_a_setting_that_the_template_does_not_read_is_refused(made, template, setting, named):
    spec = TemplateSpec.model_validate(setting)

    def opened():
        return load(template, spec) if template == "mistral-v3" else made(template, spec=spec)

    if named is None:
        assert opened()
    else:
        with pytest.raises(ConfigError, match=f"{named}: the chat template does not read it"):
            opened()
