"""What each public template can write, by transformers alone, and whether rows are exactly that.

The judge knows nothing of how `tunesmith.tokens` found out what a template takes: it renders with every form
of input that templates are written for. A template can write an answer if in one of these forms the prompt
shows the whole context, and training shows the words, calls and reasoning before the first token that stops
generation. A row is exact if its prompt is the one of transformers, token for token, and what is learned is
what training shows after that context. The tokenizer is one of bytes with the marks that the template names:
what is compared is the template."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from typing import Any, NamedTuple, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import JSON, Call, Conversation, Demonstration, Message
from tunesmith.tokens.chat_templates import Choices
from tunesmith.tokens.hugging_face import HFRenderer
from tunesmith.tokens.template import Refused, json_text, thought_of

MARK = re.compile(
    r"<\|[^|<>\s{}']{1,40}\|>|<｜[^｜<>{}]{1,40}｜>|\[/?[A-Z_]{3,30}\]|</?s>|<(?:start|end)_of_\w+>|<\|\w+>"
    r"|<\w+\|>|<SPECIAL_\d+>|<seed:\w+>|<extra_id_\d>|\]~b\]|\[e~\[|\]~!b\[|\[\|\w+\|\]|</assistant>|<sep>"
)
EOS = {
    "Apertus": "<|assistant_end|>",
    "Apriel-1.6": "<|end|>",
    "Hy3": "<｜hy_eos:opensource｜>",
    "Laguna": "</assistant>",
    "Reka": "<sep>",
    "exaone": "[|endofturn|]",
    "ohere": "<|END_OF_TURN_TOKEN|>",
    "command": "<|END_OF_TURN_TOKEN|>",
    "aya": "<|END_OF_TURN_TOKEN|>",
}
STOPS = {
    "GLM": ("<|user|>", "<|observation|>"),
    "glm4": ("<|user|>", "<|observation|>"),
    "gemma4": ("<|tool_response>",),
    "gpt-oss": ("<|call|>",),
}
"""What the models' own tokenizer_config.json and generation_config.json say, by a part of the name."""

TOWN: dict[str, JSON] = {
    "type": "object",
    "properties": {"town": {"type": "string", "description": "its name"}},
    "required": ["town"],
}
WEATHER = "weather"
TOOL: JSON = {
    "type": "function",
    "function": {"name": WEATHER, "description": "of a town", "parameters": TOWN},
}
PARIS, ROME = Call(WEATHER, {"town": "Paris"}), Call(WEATHER, {"town": "Rome"})
RESULT = '{"sky": "clear"}'
THOUGHT = "<think>\nthree and four\n</think>\n\n"
CLOSED = re.compile(r"</think|<\|END_THINKING\|>|<channel\|>|\[BEGIN FINAL RESPONSE\]")
BLOCK = re.compile(
    r"<(?:mm:|seed:)?think[\w:]*>.*?</(?:mm:|seed:)?think[\w:]*>|<\|START_THINKING\|>.*?<\|END_THINKING\|>"
    r"|<\|channel>thought.*?<channel\|>|Here are my reasoning steps:|\[BEGIN FINAL RESPONSE\]"
    r"|</?think[\w:]*>|\s",
    re.DOTALL,
)
"""Reasoning, and white space: a prompt may open a block that training leaves out."""

OWN_MARKS = re.compile(r"<\|channel>|START_THINKING|<\|think\|>")
FAR = 250
"""An end token that is further behind the answer than this is the one of another turn."""


def spoken(*turns: str | tuple[Call, ...] | tuple[str, Call], tools: bool = False) -> Conversation:
    """User and assistant in turn; a turn of calls is followed by their results."""
    messages: list[Message] = []
    for turn in turns:
        answers = bool(messages) and messages[-1].role in ("user", "tool")
        if isinstance(turn, str):
            messages.append(Message("assistant" if answers else "user", turn))
            continue
        calls = tuple(part for part in turn if isinstance(part, Call))
        words = "".join(part for part in turn if isinstance(part, str))
        messages.append(Message("assistant", words, calls))
        messages += [Message("tool", RESULT) for _ in calls]
    return Conversation(tuple(messages), (TOOL,) if tools else ())


PLAIN = spoken("How many?", "Exactly seven.", "And then?", "Eight of them.")
KINDS = {
    "plain": replace(PLAIN, messages=PLAIN.messages[:2]),
    "many turns": PLAIN,
    "system": replace(PLAIN, messages=(Message("system", "Be brief."), *PLAIN.messages)),
    "tools": spoken("Paris?", (PARIS,), "Clear.", tools=True),
    "two calls": spoken("Paris, Rome?", (PARIS, ROME), "Both clear.", tools=True),
    "words beside calls": spoken("Paris?", ("Let me look.", PARIS), "Clear.", tools=True),
    "reasoning": spoken("How many?", THOUGHT + "Seven.", "And then?", THOUGHT + "Eight."),
}


class Form(NamedTuple):
    """How a conversation is given to a template. reasoning: the key that holds it, or None if it stands in
    the content. continued: without its first mark. older: whether older answers keep it."""

    arguments: str
    parts: bool
    reasoning: str | None
    continued: bool
    older: bool
    variables: dict[str, bool]


def forms(source: str, conversation: Conversation) -> Iterator[Form]:
    """The forms that can make a difference to this conversation, the usual ones first."""
    calls = any(message.calls for message in conversation.messages)
    thinks = any("<think>" in message.content for message in conversation.messages)
    keys = ("reasoning_content", "reasoning", "thinking", "thought")
    keys = [key for key in keys if re.search(rf"""[.'"]{key}\b""", source)]
    places = [(None, False, True)]
    if thinks:
        marked = bool(keys) and OWN_MARKS.search(source) is not None
        words = [] if marked else [(None, False, True), (None, False, False), (None, True, True)]
        places = [*((key, False, True) for key in keys), *words]
    switches = [name for name in ("enable_thinking", "thinking") if name in source]
    variables = [{}, *({name: value} for name in switches for value in (thinks, not thinks))]
    objects = ("object", "text") if calls else ("object",)
    for arguments, parts, place, chosen in product(objects, (False, True), places, variables):
        yield Form(arguments, parts, *place, chosen)


class Template:
    """A template with a tokenizer of bytes, rendered by transformers."""

    def __init__(self, name: str, source: str) -> None:
        self.source = source
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate(alphabet)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        eos = next((token for part, token in EOS.items() if part in name), "</s>")
        marks = sorted({*MARK.findall(source), "<s>", eos})
        inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
        self.tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
        self.tokenizer.chat_template = source
        named = [mark for part, marks in STOPS.items() if part in name for mark in marks]
        stops = [self.tokenizer.convert_tokens_to_ids(mark) for mark in named]
        self.renderer = HFRenderer(self.tokenizer, Choices({}, datetime.now(UTC).date(), False), stops)
        ends = self.renderer.eos_ids
        self.stops = [self.renderer.decode([token]) for token in ends]

    def rendered(self, form: Form, conversation: Conversation, *, generate: bool) -> str:
        tools = list(conversation.tools)
        variables: dict[str, Any] = dict(form.variables)
        if "xml_tools" in self.source:
            variables["xml_tools"] = tools
        if "functions" in self.source:
            variables["functions"] = "\n".join(map(json_text, conversation.tools))
        if "datetime" in self.source:
            variables["datetime"] = datetime.now(UTC).strftime("%Y-%m-%d")
        entries = self._entries(form, conversation)
        for given in (tools,) if tools else (None, []):  # some templates need a list
            with suppress(Exception):
                return self.tokenizer.apply_chat_template(
                    entries, tools=given, tokenize=False, add_generation_prompt=generate, **variables
                )
        raise ValueError("the template refuses this form")

    def _entries(self, form: Form, conversation: Conversation) -> list[dict[str, Any]]:
        last = max(place for place, message in enumerate(conversation.messages) if message.role == "user")
        names: dict[str | None, str] = {}
        entries = []
        for place, message in enumerate(conversation.messages):
            thought, content = thought_of(message.content), message.content
            if thought.reasoning and form.reasoning is not None:
                content = thought.words
            elif thought.reasoning and place < last and not form.older:
                content = thought.words
            elif thought.reasoning and form.continued:
                content = content.removeprefix("<think>\n")
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if form.parts:
                entry["content"] = [{"type": "text", "text": content}]
            if thought.reasoning and form.reasoning is not None:
                entry[form.reasoning] = thought.reasoning
            if message.calls:
                entry["tool_calls"] = calls = []
                for number, call in enumerate(message.calls):
                    if "'functions.' +" in self.source:  # Kimi K2 names calls so, and its results name them
                        names[call.id] = f"functions.{call.name}:{number}"
                    given = json_text(call.arguments) if form.arguments == "text" else call.arguments
                    function = {"name": call.name, "arguments": given}
                    calls.append(
                        {"id": names.get(call.id, call.id), "type": "function", "function": function}
                    )
            if message.call_id is not None:
                entry |= {"tool_call_id": names.get(message.call_id, message.call_id), "name": message.name}
            entries.append(entry)
        return entries


class Said(NamedTuple):
    """A prompt of inference, and what training shows from the last word of the context on."""

    prompt: str
    tail: str
    added: str


def said(template: Template, form: Form, shown: Conversation) -> Said | None:
    """How ``template`` writes the last message of ``shown`` in this form, or None if it cannot."""
    before, answer = replace(shown, messages=shown.messages[:-1]), shown.messages[-1]
    thought = thought_of(answer.content)
    towns = [str(cast(dict[str, Any], call.arguments)["town"]) for call in answer.calls]
    values = [text for town in towns for text in (WEATHER, "town", town)]
    context = [message.content for message in before.messages if message.role in ("system", "user")]
    marker = "clear" if before.messages[-1].role == "tool" else before.messages[-1].content
    try:
        prompt = template.rendered(form, before, generate=True)
        full = template.rendered(form, shown, generate=False)
        bare = template.rendered(form, before, generate=False)
    except ValueError:
        return None
    asked = prompt[prompt.rfind(marker) + len(marker) :]
    is_dropped = re.search(r"<think>\s*$", asked) is not None and thought.reasoning not in full
    reasoning = "" if is_dropped else thought.reasoning
    parts = [text for text in (reasoning, thought.words, *values) if text]
    place = full.rfind(marker, 0, max(min(full.rfind(part) for part in parts), 0))
    tail = full[place + len(marker) :]
    end = max(tail.rfind(part) + len(part) for part in parts)
    tools = [WEATHER] if before.tools else []
    added = prompt[len(bare) :] if prompt.startswith(bare) else ""
    first = min(max(tail.find(part), 0) for part in parts)
    if (
        place < 0
        or any(part not in prompt for part in (*context, *tools))
        or any(tail.count(part) < parts.count(part) for part in parts)
        or "{'town'" in tail  # as Python writes it
        or (thought.reasoning and CLOSED.search(asked))
        or CLOSED.search(tail[: tail.find(reasoning)] if reasoning else "")
        or tail.find(reasoning) > tail.find(thought.words) >= 0
        or not ends(template, form, shown, asked, tail, end)
        or not any(follows(asked, tail[begin:end], tail, added) for begin in range(first + 1))
    ):
        return None
    return Said(prompt, tail, added)


def follows(asked: str, text: str, tail: str, added: str) -> bool:
    """Whether training shows ``text`` after ``asked``, the end of the prompt, but for a block of reasoning.

    Gemma 4 (trl gemma4_v5) does not, where results follow a turn of words and calls: inference closes that
    turn, and training writes the answer into it."""
    if added and tail.partition(text)[0].endswith(added):
        return True
    shown = BLOCK.sub("", tail)
    return any(
        shown.startswith(BLOCK.sub("", written))
        for written in (asked + text, (asked + text).replace(added, "", 1))
    )


def ends(template: Template, form: Form, shown: Conversation, asked: str, tail: str, end: int) -> bool:
    """Whether the first token that stops generation follows the answer, which ends at ``end``; or begins the
    next turn, if nothing follows the answer."""
    begin = behind_prompt(asked, tail)
    stops = [tail.find(stop, begin) for stop in template.stops if stop in tail[begin:]]
    if stops:
        return end <= min(stops) <= end + FAR
    answer = shown.messages[-1]
    reply = Message("user", "Go on.")
    if answer.calls:
        reply = Message("tool", RESULT, call_id=answer.calls[0].id, name=answer.calls[0].name)
    with suppress(ValueError):
        later = template.rendered(form, replace(shown, messages=(*shown.messages, reply)), generate=False)
        last = tail[:end].rpartition("\n")[2][-20:]
        after = later.rpartition(last)[2]
        return any(after[: FAR // 2].partition(stop)[1] for stop in template.stops)
    return False


def behind_prompt(asked: str, tail: str) -> int:
    """The place in ``tail`` up to which it is ``asked``, but for white space."""
    marks = [(place, letter) for place, letter in enumerate(tail) if not letter.isspace()]
    pairs = list(zip(marks, "".join(asked.split()), strict=False))
    return next(
        (place for (place, letter), other in pairs if letter != other), pairs[-1][0][0] + 1 if pairs else 0
    )


def result(template: Template, conversation: Conversation) -> str:
    """exact; ``refused`` with the code if the template could write it; ``cannot`` with the code if it cannot.
    Raises AssertionError if a row is wrong."""
    renderer = template.renderer
    answers = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    verdict = "exact"
    for place in answers:
        shown = replace(conversation, messages=conversation.messages[: place + 1])
        example = Demonstration(conversation=shown, label=None, id="0", source="x", metadata={})
        checked = renderer._checked(shown, Counter())
        possible = [
            (form, writing)
            for form in forms(template.source, shown)
            if (writing := said(template, form, checked)) is not None
        ]
        possible = [pair for pair in possible if pair[0].arguments == possible[0][0].arguments]
        try:
            (row,) = renderer.rows(example, learn="last")
        except Refused as error:
            if not possible:
                return f"cannot: {error.code}"
            verdict = f"refused: {error.code}"
            continue
        ids, start = row.tokens.ids.tolist(), row.tokens.start
        assert possible, ("a row of what the template cannot write", renderer.decode(ids))
        judge(template, [writing for _, writing in possible], checked, ids, start)
    return verdict


def judge(template: Template, writings: list[Said], shown: Conversation, ids: list[int], start: int) -> None:
    """Raises AssertionError unless the row is one of the ``writings``."""
    renderer, before = template.renderer, shown.messages[-2]
    prompt = renderer.decode(ids[:start])
    same = [writing for writing in writings if writing.prompt == prompt]
    assert same, ("another prompt", prompt, writings[0].prompt)
    assert ids[:start] == template.tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[-1] in renderer.eos_ids
    learned = list(ids[start:])
    while learned[-1] in renderer.eos_ids:
        learned.pop()
    text, thought = renderer.decode(learned), thought_of(shown.messages[-1].content)
    assert thought.words in text and thought.reasoning in text
    marker = "clear" if before.role == "tool" else before.content
    row = prompt[prompt.rfind(marker) + len(marker) :] + text
    if thought.reasoning:
        assert not CLOSED.search(row[: row.find(thought.reasoning)]), ("reasoning after its end", row)
    asked = row.removesuffix(text)
    if any(follows(asked, text, writing.tail, writing.added) for writing in same):
        return
    raise AssertionError(("another answer", row, same[0].tail))


def measured(name: str, source: str) -> tuple[dict[str, str], str | None]:
    """The result of each kind of conversation, WRONG if a row is wrong; and the variable that turns thinking
    on and off."""
    template = Template(name, source)
    results: dict[str, str] = {}
    for kind, conversation in KINDS.items():
        try:
            results[kind] = result(template, conversation)
        except AssertionError as error:
            results[kind] = f"WRONG {error}"
    chat_template = template.renderer.template
    return results, chat_template.forms.switch if chat_template is not None else None
