"""What a tokenizer's chat template writes: the text of a conversation, and of one answer after its prompt.

A template is a program that is known by its output only. Before the first row it is tried with neutral words:
how it takes tools, contents and reasoning; which variable turns thinking on and off; how much of an answer
the prompt of inference already holds; and what ends an answer. The text of every prompt is that of
transformers' ``apply_chat_template``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tunesmith.data.formats import JSON, Call, Conversation, Message
from tunesmith.tokens.template import Refused, json_text, thought_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, WORDS, REASONING, VALUE = "zq1u", "zq3w", "zq5r", "zq7v"
"""Neutral texts, which no template writes and which begin like no mark."""

CALL_ID = "zq7v00000"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
SWITCHES = ("enable_thinking", "thinking")
OPEN = re.compile(r"<think>\s*$")
CLOSED = re.compile(r"(?:</[\w:]+>|<\w+\|>|<\|END_\w+\|>|\[/\w+\])\s*$")
CLOSING = "\n</think>\n\n"
"""How a model ends its reasoning if its template leaves reasoning out of every answer, as DeepSeek R1's."""
DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdjmpUwWxXyYHIMSfzZ"))
TOOL: JSON = {
    "type": "function",
    "function": {
        "name": VALUE,
        "description": VALUE,
        "parameters": {"type": "object", "properties": {VALUE: {"type": "string", "description": VALUE}}},
    },
}


class Choices(NamedTuple):
    """What the user decides. ``options``: variables for the template. ``day``: the date that the template
    sees. ``has_day``: whether it was chosen, so that templates that need none show it too."""

    options: dict[str, JSON]
    day: date
    has_day: bool


class Segment(NamedTuple):
    """``prompt``: the text that inference shows. ``rest``: what follows it in training."""

    prompt: str
    rest: str


@dataclass(frozen=True)
class Forms:
    """How a template takes what it is given.

    lists_tools: it needs a list of tools, empty if there are none. contents: of messages. arguments: of
    calls, as JSON if text. reasoning: the key of messages that holds it; ``words`` if it stands in
    <think> marks before the words and the template passes it on; ``marks`` if the template reads the
    marks; None if no form reaches the text. plain, thinking: variables for answers without and with
    reasoning; their openings: what the prompt of inference then holds that the template does not write
    before the answer. closing: what the template writes between reasoning and words."""

    lists_tools: bool = False
    contents: Literal["text", "parts"] = "text"
    arguments: Literal["object", "text"] = "object"
    reasoning: str | None = "words"
    plain: dict[str, JSON] = field(default_factory=dict)
    thinking: dict[str, JSON] = field(default_factory=dict)
    plain_opening: str = ""
    thinking_opening: str = ""
    closing: str = CLOSING

    @property
    def switch(self) -> str | None:
        """The variable that turns thinking on and off, or None if there is none."""
        return next((name for name in SWITCHES if name in {**self.plain, **self.thinking}), None)


class ChatTemplate:
    """The chat template of ``tokenizer``. Raises Refused if it cannot express an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choices: Choices) -> None:
        self._tokenizer = cast(Any, tokenizer)
        self._choices = choices
        given = self._tokenizer.chat_template
        self._source = "\n".join(given.values()) if isinstance(given, dict) else given or ""
        self.forms = self._plain_forms(self._inputs())
        self.forms = self._thinking_forms(self.forms)
        self.forms = self._call_forms(self.forms)

    def names(self, variable: str) -> bool:
        """Whether the template's text has the name."""
        return re.search(rf"\b{re.escape(variable)}\b", self._source) is not None

    @property
    def uses_date(self) -> bool:
        """Whether the text depends on the date."""
        names = ("strftime_now", "datetime") + ("date_string",) * self._choices.has_day
        return any(name in self._source for name in names)

    def text(self, conversation: Conversation, *, generate: bool, thinking: bool) -> str:
        """What transformers renders. Raises Refused if the template does not."""
        return self._text(self.forms, conversation, generate, thinking)

    def segment(self, before: Conversation, answer: Message) -> Segment:
        """The prompt of inference, and what is learned after it. Raises Refused if the template shows another
        context in training than at inference."""
        forms, thought = self.forms, thought_of(answer.content)
        thinking = bool(thought.reasoning) and forms.reasoning != "words"
        shown = replace(before, messages=(*before.messages, answer))
        head = self._text(forms, before, True, thinking)
        full = self._text(forms, shown, False, thinking)
        opening = forms.thinking_opening if thinking else forms.plain_opening
        if full.startswith(head):
            opening = ""
        elif not (opening and head.endswith(opening) and full.startswith(head.removesuffix(opening))):
            raise Refused(
                "prefix",
                "a rendered answer must be its prompt, the answer and an end token",
                "this template shows another context in training than at inference",
            )
        rest = full[len(head) - len(opening) :]
        if not _is_open(head, opening) or (thinking and forms.reasoning is not None):
            return Segment(head, rest)
        if rest.lstrip().startswith(forms.closing.strip()):
            return Segment(head, thought.reasoning * thinking + rest)
        return Segment(head, thought.reasoning * thinking + forms.closing + rest)

    def expected(self, before: Conversation, answer: Message) -> Iterator[str]:
        """What may follow the prompt: the text that the template writes around neutral words, with the words
        and the reasoning of ``answer`` in their place; first as they are, then trimmed."""
        thought = thought_of(answer.content)
        neutral = f"<think>\n{REASONING}\n</think>\n\n" if thought.reasoning else ""
        neutral += WORDS if thought.words.strip() else ""
        frame = self.segment(before, replace(answer, content=neutral)).rest
        trims = (str, str.strip, str.rstrip, str.lstrip)
        for trim_words, trim_reasoning in product(trims, trims if thought.reasoning else trims[:1]):
            text = frame.replace(WORDS, trim_words(thought.words))
            yield text.replace(REASONING, trim_reasoning(thought.reasoning))

    def frame(self, *, thinking: bool) -> tuple[str, str, str] | None:
        """What the template writes before the reasoning, between reasoning and words, and after the words of
        an answer that follows its prompt; without reasoning the first two are one. None if it has no form for
        reasoning."""
        if thinking and self.forms.reasoning in (None, "words"):
            return None
        content = f"<think>\n{REASONING}\n</think>\n\n{WORDS}" if thinking else WORDS
        rest = self.segment(Conversation((Message("user", QUESTION),)), Message("assistant", content)).rest
        before, _, after = rest.partition(WORDS)
        first, _, between = before.partition(REASONING)
        return first, between, after

    def after(self, *, calls: bool) -> tuple[str, str]:
        """What the template writes after the last word or argument of an answer when it is the last message,
        and what it adds when the next turn follows. Raises Refused if it has no calls."""
        result = Message("tool", QUESTION, call_id=CALL_ID, name=VALUE)
        spoken = _called() if calls else _spoken(WORDS)
        reply = result if calls else Message("user", QUESTION)
        followed = replace(spoken, messages=(*spoken.messages, reply))
        full, longer = (
            self._text(self.forms, conversation, False, False) for conversation in (spoken, followed)
        )
        last = full.rpartition(VALUE if calls else WORDS)[2]
        return last, longer[len(full) :] if longer.startswith(full) else longer.rpartition(WORDS)[2]

    # How the template takes what it is given

    def _inputs(self) -> Forms:
        """Forms in which tools and contents reach the text."""
        refused: Refused | None = None
        for lists_tools, contents in product((False, True), ("text", "parts")):
            forms = Forms(lists_tools, cast(Literal["text", "parts"], contents))
            try:
                full = self._text(forms, _spoken(WORDS), False, False)
            except Refused as error:
                refused = refused or error
                continue
            if full.count(WORDS) == 1 and full.count(QUESTION) >= 1:
                return forms
        raise refused or Refused(
            "template",
            "the chat template does not write the words of an answer as they are",
            "write a chat_template.jinja that does",
        )

    def _variables(self, value: bool) -> list[dict[str, JSON]]:
        """What may turn thinking on or off: nothing, then the switches that the template names."""
        return [{}, *({name: value} for name in SWITCHES if self.names(name))]

    def _plain_forms(self, forms: Forms) -> Forms:
        """Answers without reasoning: words and end after the prompt if any variable gives that, else with
        what the template writes around them."""
        best: tuple[int, Forms] | None = None
        refused: Refused | None = None
        for variables in self._variables(False):
            tried = replace(forms, plain=variables)
            try:
                head, rest = self._tried(tried, WORDS, False)
            except Refused as error:
                refused = refused or error
                continue
            opening = _opening(head, rest)
            tail = rest[len(head) - len(opening) :]
            rank = 2 if _is_open(head, opening) else 0 if tail.lstrip().startswith(WORDS) else 1
            if best is None or rank < best[0]:
                best = rank, replace(tried, plain_opening=opening)
        if best is None:
            raise refused or Refused("template", "the chat template does not render an answer")
        return best[1]

    def _thinking_forms(self, forms: Forms) -> Forms:
        """Answers with reasoning: the first form in which it stands before the words."""
        keys = [key for key in REASONING_KEYS if self.names(key)]
        content = f"<think>\n{REASONING}\n</think>\n\n{WORDS}"
        composed: Forms | None = None
        for key, variables in product((*keys, "words"), self._variables(True)):
            tried = replace(forms, reasoning=key, thinking=variables)
            try:
                head, full = self._tried(tried, content, True)
            except Refused:
                continue
            opening = _opening(head, full)
            rest = full[len(head) - len(opening) :]
            if rest.count(REASONING) == 1 == rest.count(WORDS) and rest.find(REASONING) < rest.find(WORDS):
                if key == "words" and not variables and rest.lstrip().startswith(content):
                    return replace(tried, thinking=forms.plain, thinking_opening=forms.plain_opening)
                closing = rest.partition(REASONING)[2].partition(WORDS)[0]
                key = "marks" if key == "words" else key
                return replace(tried, reasoning=key, thinking_opening=opening, closing=closing)
            if composed is None and _is_open(head, opening) and REASONING not in rest:
                composed = replace(tried, reasoning=None, thinking_opening=opening)
        return composed or replace(forms, reasoning=None, thinking=forms.plain)

    def _call_forms(self, forms: Forms) -> Forms:
        """Arguments as JSON text if the template does not write them otherwise."""
        for arguments in ("object", "text"):
            tried = replace(forms, arguments=cast(Literal["object", "text"], arguments))
            with suppress(Refused):
                if VALUE + '"' in self._text(tried, _called(), False, False).rpartition(QUESTION)[2]:
                    return tried
        return forms

    def _tried(self, forms: Forms, content: str, thinking: bool) -> tuple[str, str]:
        """The prompt of inference, and prompt and answer as training shows them."""
        spoken = _spoken(content)
        asked = replace(spoken, messages=spoken.messages[:1])
        return self._text(forms, asked, True, thinking), self._text(forms, spoken, False, thinking)

    def _text(self, forms: Forms, conversation: Conversation, generate: bool, thinking: bool) -> str:
        messages = [_entry(message, forms) for message in _without_old_reasoning(conversation, forms)]
        tools = list(conversation.tools) or ([] if forms.lists_tools else None)
        variables = {**self._shared(conversation), **(forms.thinking if thinking else forms.plain)}
        variables |= self._choices.options
        try:
            template = self._tokenizer.get_chat_template(None, tools)
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=dated(template, self._choices.day),
                tokenize=False,
                add_generation_prompt=generate,
                **variables,
            )
        except Exception as error:  # a template is a program, which may raise anything
            roles = " ".join(message.role for message in conversation.messages)
            raise Refused(
                "template", f"the chat template refuses the roles {roles}: {error}", _hint(conversation)
            ) from error

    def _shared(self, conversation: Conversation) -> dict[str, JSON]:
        """Variables beside messages and tools that this template names, as inference servers pass them."""
        day = self._choices.day
        tools = list(conversation.tools)
        known: dict[str, JSON] = {
            "xml_tools": tools,
            "functions": "\n".join(map(json_text, tools)),
            "datetime": day.strftime("%Y-%m-%d"),
        }
        if self._choices.has_day:
            known["date_string"] = day.strftime("%d %b %Y")
        return {name: value for name, value in known.items() if self.names(name)}


def dated(template: str, day: date) -> str:
    """The template with a ``strftime_now`` that knows one day only."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f' | replace("{name}", "{day.strftime(name)}")' for name in DIRECTIVES)
    macro = "{% macro strftime_now(format) %}{{ format" + filters + " }}{% endmacro %}\n"
    return macro + template  # the newline after a block is not written


def _spoken(content: str) -> Conversation:
    return Conversation((Message("user", QUESTION), Message("assistant", content)))


def _called() -> Conversation:
    """A question that is answered by a call."""
    call = Call(VALUE, {VALUE: VALUE}, CALL_ID)
    return Conversation((Message("user", QUESTION), Message("assistant", "", (call,))), (TOOL,))


def _opening(head: str, full: str) -> str:
    """The end of the prompt that training does not write before the answer; marks stay whole."""
    if full.startswith(head):
        return ""
    stem = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(head, full, strict=False))))
    mark = head.rfind("<", 0, stem)
    if mark > head.rfind(">", 0, stem):
        stem = mark
    if QUESTION in head[stem:]:
        raise Refused("prefix", "this template shows another context in training than at inference")
    return head[stem:]


def _is_open(head: str, opening: str) -> bool:
    """Whether the prompt ends in reasoning that the model has to close."""
    return bool(OPEN.search(head)) or bool(opening.strip() and not CLOSED.search(opening))


def _without_old_reasoning(conversation: Conversation, forms: Forms) -> list[Message]:
    """Messages without the reasoning of answers that a user replied to, if the template leaves that to
    others."""
    messages = list(conversation.messages)
    if forms.reasoning != "words":
        return messages
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=0)
    for place, message in enumerate(messages[:last]):
        if message.role == "assistant" and thought_of(message.content).reasoning:
            messages[place] = replace(message, content=thought_of(message.content).words)
    return messages


def _entry(message: Message, forms: Forms) -> dict[str, JSON]:
    """A message in OpenAI's form, but with parsed arguments."""
    content, reasoning = message.content, ""
    if message.role == "assistant" and forms.reasoning not in ("words", "marks"):
        reasoning, content = thought_of(content)
    entry: dict[str, JSON] = {"role": message.role, "content": content}
    if forms.contents == "parts":
        entry["content"] = [{"type": "text", "text": content}]
    if reasoning and forms.reasoning is not None:
        entry[forms.reasoning] = reasoning
    if message.calls:
        as_text = forms.arguments == "text"
        functions: list[tuple[JSON, JSON]] = [
            (
                call.id,
                {"name": call.name, "arguments": json_text(call.arguments) if as_text else call.arguments},
            )
            for call in message.calls
        ]
        entry["tool_calls"] = [
            {"id": key, "type": "function", "function": function} for key, function in functions
        ]
    optional = {"tool_call_id": message.call_id, "name": message.name}
    return entry | {key: value for key, value in optional.items() if value is not None}


def _hint(conversation: Conversation) -> str:
    roles = [message.role for message in conversation.messages]
    if "system" in roles:
        return "if it has no system role, put the system text into the first user message"
    if "tool" in roles or any(message.calls for message in conversation.messages):
        return "if it has no calls or results in this form, write them as text"
    return "drop this row, or write a chat_template.jinja that renders it"


def openai(conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools in OpenAI's form, but with parsed arguments."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        functions = ((call.id, {"name": call.name, "arguments": call.arguments}) for call in message.calls)
        calls = [{"id": key, "type": "function", "function": function} for key, function in functions]
        optional = {"tool_calls": calls or None, "tool_call_id": message.call_id, "name": message.name}
        given = {key: value for key, value in optional.items() if value is not None}
        messages.append({"role": message.role, "content": message.content, **given})
    return messages, cast("list[dict[str, Any]]", list(conversation.tools)) or None
