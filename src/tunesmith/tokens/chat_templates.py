"""What a tokenizer's chat template writes: the text of a conversation, and of one answer after its prompt.

A template is a program that is known by its output only. Before the first row it is tried with neutral words:
how it takes tools, calls, contents and reasoning; which variable turns thinking on and off; how much of an
answer the prompt of inference already holds; and what ends an answer. The text of every prompt is that of
transformers' ``apply_chat_template``."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tunesmith.data.formats import JSON, Call, Conversation, Message
from tunesmith.tokens.amendments import amendments
from tunesmith.tokens.template import Refused, json_text, thought_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.tokens.prefixes import TemplateRun

QUESTION, WORDS, REASONING = "zq1u", "zq3w", "zq5r"
NAME, KEY, VALUE, CALL_ID = "zq7n", "zq7k", "zq7v", "zq9c00000"
"""Neutral texts, which no template writes and which begin like no mark."""

THOUGHT = f"<think>\n{REASONING}\n</think>\n\n"
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
SWITCHES = ("enable_thinking", "thinking")
OPEN = re.compile(r"<think>\s*$")
CLOSED = re.compile(r"(?:</[\w:]+>|<\w+\|>|<\|END_\w+\|>|\[/\w+\])\s*$")
CLOSES = re.compile(r"</think")
CLOSING = "\n</think>\n\n"
"""How a model ends its reasoning if its template leaves reasoning out of every answer, as DeepSeek R1's."""
DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBcdjmpUwWxXyYHIMSfzZ"))
TOOL: JSON = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": NAME,
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": KEY}}},
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


class AnswerEnd(NamedTuple):
    """``last``: what follows the last word of an answer that is the last message. ``own``: as much of it as
    follows the word of an older answer, too. ``later``: what stands there before the next turn, or what is
    added when it follows."""

    last: str
    own: str
    later: str


class After(NamedTuple):
    """``head``: the prompt of inference. ``rest``: what training shows after it. ``is_open``: whether the
    prompt ends in reasoning that the model has to close."""

    head: str
    rest: str
    is_open: bool


@dataclass(frozen=True)
class Forms:
    """How a template takes what it is given.

    lists_tools: it needs a list of tools, empty if there are none. contents: of messages. arguments: of
    calls, as JSON if text. writes_calls: whether one of these forms reaches the text. call_ids: ``given`` as
    the row has them, or ``functions.NAME:N``, numbered through a ``turn`` or the ``conversation``.
    reasoning: the key of messages that holds it; ``words`` if it stands in <think> marks before the words and
    the template passes it on; ``marks`` if the template reads the marks; None if no form reaches the text.
    plain, thinking: variables for answers without and with reasoning. plain_opening, call_opening,
    thinking_opening: what the prompt of inference then holds that the template does not write before words,
    calls and reasoning. closing: what the template writes between reasoning and words."""

    lists_tools: bool = False
    contents: Literal["text", "parts"] = "text"
    arguments: Literal["object", "text"] = "object"
    writes_calls: bool = False
    call_ids: Literal["given", "turn", "conversation"] = "given"
    reasoning: str | None = "words"
    plain: dict[str, JSON] = field(default_factory=dict)
    thinking: dict[str, JSON] = field(default_factory=dict)
    plain_opening: str = ""
    call_opening: str = ""
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
        self._expected: Conversation | None = None
        self._runs: dict[tuple[bool, str], TemplateRun | None] = {}
        self.forms = self._plain_forms(self._inputs())
        self.forms = self._call_forms(self.forms)
        self.forms = self._thinking_forms(self.forms)

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
        head, rest, is_open = self._after_prompt(before, answer, thinking)
        if thinking and forms.reasoning is None and not is_open:
            raise Refused(
                "left_out",
                "the template has no place for the reasoning of an answer",
                "data.reasoning: omit leaves it out; or template.options turns reasoning on, if it can",
            )
        if not is_open or (thinking and forms.reasoning is not None):
            return Segment(head, rest)
        if rest.lstrip().startswith(forms.closing.strip()):
            return Segment(head, thought.reasoning * thinking + rest)
        return Segment(head, thought.reasoning * thinking + forms.closing + rest)

    def _after_prompt(self, before: Conversation, answer: Message, thinking: bool) -> After:
        """The prompt of inference, and what training shows after it."""
        forms = self.forms
        shown = replace(before, messages=(*before.messages, answer))
        head = self._text(forms, before, True, thinking)
        full = self._text(forms, shown, False, thinking)
        calls = bool(answer.calls) and not answer.content.strip()
        opening = forms.call_opening if calls else forms.plain_opening
        opening = forms.thinking_opening if thinking else opening
        if full.startswith(head):
            return After(head, full[len(head) :], bool(OPEN.search(head)))
        if opening and head.endswith(opening) and full.startswith(head.removesuffix(opening)):
            return After(head, *_behind(opening, full[len(head) - len(opening) :], head))
        return self._as_if_alone(before, answer, thinking, full)

    def _as_if_alone(self, before: Conversation, answer: Message, thinking: bool, full: str) -> After:
        """What follows the prompt if training shows another context than inference: what the template writes
        for this answer to one question, if the whole ends with it and it follows the same prompt.

        Mistral's templates show the system text in the last turn of the user, if nothing follows it."""
        if answer.calls and not self.forms.writes_calls:
            raise Refused(
                "left_out", "the template does not write the calls of an answer", "write them as text"
            )
        alone = replace(before, messages=(Message("user", QUESTION),))
        if before.messages == alone.messages:
            raise Refused(
                "prefix",
                "a rendered answer must be its prompt, the answer and an end token",
                "this template shows another context in training than at inference",
            )
        _, rest, is_open = self._after_prompt(alone, answer, thinking)
        head = self._text(self.forms, before, True, thinking)
        asked = before.messages[-1].content.strip()
        same = _beginning(head[::-1], full.removesuffix(rest)[::-1])[::-1]
        added = [self._added(conversation, thinking) for conversation in (before, alone)]
        if not full.endswith(rest) or not (asked in same or (added[0] and added[0] == added[1])):
            raise Refused(
                "prefix",
                "the template shows another context in training than at inference, and the answer cannot be "
                "told from it",
                "write a chat_template.jinja that renders older turns as it renders the last one",
            )
        return After(head, rest, is_open)

    def _added(self, conversation: Conversation, thinking: bool) -> str:
        """What the template adds to a conversation so that the assistant answers; empty if nothing."""
        whole = self._text(self.forms, conversation, True, thinking)
        context = self._text(self.forms, conversation, False, thinking)
        return whole[len(context) :] if whole.startswith(context) else ""

    def expected(self, before: Conversation, answer: Message) -> Iterator[str]:
        """What may follow the prompt: the text that the template writes around neutral words, with the words
        and the reasoning of ``answer`` in their place; first as they are, then trimmed."""
        thought = thought_of(answer.content)
        neutral = (THOUGHT if thought.reasoning else "") + (WORDS if thought.words.strip() else "")
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
        content = (THOUGHT if thinking else "") + WORDS
        rest = self.segment(Conversation((Message("user", QUESTION),)), Message("assistant", content)).rest
        before, _, after = rest.partition(WORDS)
        first, _, between = before.partition(REASONING)
        return first, between, after

    def ending(self, *, calls: bool) -> AnswerEnd:
        """What the template writes after the last word or argument of an answer. Raises Refused if it has no
        calls."""
        result = Message("tool", QUESTION, call_id=CALL_ID, name=NAME)
        spoken = _called() if calls else _spoken(WORDS)
        reply = result if calls else Message("user", QUESTION)
        followed = replace(spoken, messages=(*spoken.messages, reply))
        full, longer = (
            self._text(self.forms, conversation, False, False) for conversation in (spoken, followed)
        )
        mark = VALUE if calls else WORDS
        last, older = full.rpartition(mark)[2], longer.rpartition(mark)[2]
        if longer.startswith(full):
            return AnswerEnd(last, last, longer[len(full) :])
        return AnswerEnd(last, _beginning(last, older), older)

    def inside(self) -> str:
        """What the template writes before the last word of an answer with reasoning; empty without a form for
        it."""
        before = self.frame(thinking=True)
        return "".join(before[:2]) if before else ""

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
            tail, is_open = _behind(opening, rest[len(head) - len(opening) :], head)
            rank = 2 if is_open else 0 if tail.lstrip().startswith(WORDS) else 1
            if best is None or rank < best[0]:
                best = rank, replace(tried, plain_opening=opening)
        if best is None:
            raise refused or Refused("template", "the chat template does not render an answer")
        return best[1]

    def _thinking_forms(self, forms: Forms) -> Forms:
        """Answers with reasoning: the first form in which it stands before the words, and the prompt of
        inference does not close it."""
        keys = [key for key in REASONING_KEYS if self.names(key)]
        places = [*keys, *([] if self._thinks_before_calls(forms, keys) else ["words"])]
        composed: Forms | None = None
        for key, variables in product(places, self._variables(True)):
            tried = replace(forms, reasoning=key, thinking=variables)
            try:
                head, full = self._tried(tried, THOUGHT + WORDS, True)
                opening = _opening(head, full)
            except Refused:
                continue
            rest, is_open = _behind(opening, full[len(head) - len(opening) :], head)
            if CLOSED.search(opening):
                continue
            if rest.count(REASONING) == 1 == rest.count(WORDS) and rest.find(REASONING) < rest.find(WORDS):
                before, _, after = rest.partition(REASONING)
                if CLOSES.search(before) or (is_open and OPEN.search(before)):
                    continue  # behind its end, or opened twice
                if key == "words" and not variables and rest.lstrip().startswith(THOUGHT + WORDS):
                    return replace(tried, thinking=forms.plain, thinking_opening=forms.plain_opening)
                key = "marks" if key == "words" else key
                closing = self._closing(forms, after)
                return replace(tried, reasoning=key, thinking_opening=opening, closing=closing)
            if composed is None and is_open and REASONING not in rest:
                composed = replace(tried, reasoning=None, thinking_opening=opening)
        closed = replace(forms, reasoning=None, thinking=forms.plain, thinking_opening=forms.plain_opening)
        return composed or closed

    def _thinks_before_calls(self, forms: Forms, keys: Sequence[str]) -> bool:
        """Whether the template has marks of its own for reasoning before calls."""
        called = _called(THOUGHT)
        for key, variables in product(keys, self._variables(True)):
            with suppress(Refused):
                tried = replace(forms, reasoning=key, thinking=variables)
                if REASONING in self._text(tried, called, False, True):
                    return True
        return False

    def _closing(self, forms: Forms, after: str) -> str:
        """What stands between reasoning and words: ``after``, which follows the reasoning, without what the
        template writes for the words alone."""
        head, full = self._tried(forms, WORDS, False)
        plain = _behind(forms.plain_opening, full[len(head) - len(forms.plain_opening) :], head)[0]
        return after.removesuffix(plain) if after.endswith(plain) else after.partition(WORDS)[0]

    def _call_forms(self, forms: Forms) -> Forms:
        """Arguments as objects if the template writes them by itself, else as JSON."""
        for arguments in ("object", "text"):
            tried = replace(forms, arguments=cast(Literal["object", "text"], arguments), writes_calls=True)
            with suppress(Refused):
                written = self._text(tried, _called(), False, False).rpartition(QUESTION)[2]
                if self._writes_call(written, arguments):
                    return self._call_openings(self._id_forms(tried))
        return forms

    def _writes_call(self, written: str, arguments: str) -> bool:
        """Whether the text of a call holds its arguments, and not as Python or quoted JSON writes them."""
        if KEY not in written or VALUE not in written:
            return False
        return f'"{KEY}": "{VALUE}"' in written if arguments == "text" else f"'{KEY}'" not in written

    def _id_forms(self, forms: Forms) -> Forms:
        """The ids of calls as the template writes them, or as ``functions.NAME:N`` if it writes the id and
        not the name. Kimi K2's results name their call so."""
        called = _called()
        result = Message("tool", QUESTION, call_id=CALL_ID, name=NAME)
        twice = replace(called, messages=(*called.messages, result, *called.messages), tools=())
        try:
            written = self._text(forms, twice, False, False)
        except Refused:
            return forms
        if f"functions.{NAME}:0" in written:
            through = f"functions.{NAME}:1" in written
            return replace(forms, call_ids="conversation" if through else "turn")
        calls = written.partition(QUESTION)[2].partition(QUESTION)[0]
        return replace(forms, call_ids="conversation") if CALL_ID in calls and NAME not in calls else forms

    def _call_openings(self, forms: Forms) -> Forms:
        called = _called()
        asked = replace(called, messages=called.messages[:1])
        head, full = self._text(forms, asked, True, False), self._text(forms, called, False, False)
        with suppress(Refused):
            return replace(forms, call_opening=_opening(head, full))
        return forms

    def _tried(self, forms: Forms, content: str, thinking: bool) -> tuple[str, str]:
        """The prompt of inference, and prompt and answer as training shows them."""
        spoken = _spoken(content)
        asked = replace(spoken, messages=spoken.messages[:1])
        return self._text(forms, asked, True, thinking), self._text(forms, spoken, False, thinking)

    def _text(self, forms: Forms, conversation: Conversation, generate: bool, thinking: bool) -> str:
        try:
            return self._written(forms, conversation, generate, thinking)
        except Exception as error:  # a template is a program, which may raise anything
            roles = " ".join(message.role for message in conversation.messages)
            hint = self._advice(forms, conversation, generate, thinking)
            message = f"the chat template refuses the roles {roles}: {error}"
            raise Refused("template", message, hint) from error

    def _written(self, forms: Forms, conversation: Conversation, generate: bool, thinking: bool) -> str:
        """What transformers renders. Raises what the template raises."""
        return self._rendered(forms, conversation, generate, self._options_of(forms, thinking))

    def _options_of(self, forms: Forms, thinking: bool) -> dict[str, JSON]:
        return {**(forms.thinking if thinking else forms.plain), **self._choices.options}

    def needed_options(self, conversation: Conversation, *, thinking: bool) -> dict[str, JSON]:
        """The variables of a prompt, if the template renders it otherwise without them."""
        options = self._options_of(self.forms, thinking)
        if not options:
            return {}
        expected = self.text(conversation, generate=True, thinking=thinking)
        try:
            bare = self._rendered(self.forms, conversation, True, {})
        except Exception:  # a template is a program, which may raise anything
            return options
        return options if bare != expected else {}

    def _rendered(
        self, forms: Forms, conversation: Conversation, generate: bool, options: Mapping[str, JSON]
    ) -> str:
        text = self._beginning_of_run(forms, conversation, generate, options)
        return self._by_transformers(forms, conversation, generate, options) if text is None else text

    def _by_transformers(
        self, forms: Forms, conversation: Conversation, generate: bool, options: Mapping[str, JSON]
    ) -> str:
        tools = self._tools(forms, conversation)
        return self._tokenizer.apply_chat_template(
            _entries(conversation, forms),
            tools=tools,
            chat_template=self._program(tools),
            tokenize=False,
            add_generation_prompt=generate,
            **{**self._shared(conversation), **options},
        )

    def _tools(self, forms: Forms, conversation: Conversation) -> list[JSON] | None:
        return list(conversation.tools) or ([] if forms.lists_tools else None)

    def _program(self, tools: list[JSON] | None) -> str:
        """The text of the template for a conversation with these tools."""
        return dated(self._tokenizer.get_chat_template(None, tools), self._choices.day)

    def expect(self, conversation: Conversation) -> None:
        """Prepares for the texts of many prefixes of ``conversation``, which ends with an answer."""
        self._expected, self._runs = conversation, {}

    def _beginning_of_run(
        self, forms: Forms, conversation: Conversation, generate: bool, options: Mapping[str, JSON]
    ) -> str | None:
        """The text of a prefix of the expected conversation, or None if it has to be rendered by itself."""
        expected = self._expected
        if expected is None or forms is not self.forms or not _begins(expected, conversation):
            return None
        key = generate, json_text(options)
        if key not in self._runs:
            self._runs[key] = self._run(expected, generate, options)
        run = self._runs[key]
        return None if run is None else run.prefix(len(conversation.messages))

    def _run(self, expected: Conversation, generate: bool, options: Mapping[str, JSON]) -> TemplateRun | None:
        """A run of the template over the whole conversation, or up to the prompt of its last answer. It is
        compared with what transformers renders, for the longest prefix and for the shortest."""
        from tunesmith.tokens.prefixes import run_of  # loads jinja2

        whole = replace(expected, messages=expected.messages[:-1]) if generate else expected
        if _without_old_reasoning(whole, self.forms) != list(whole.messages):
            return None  # what is left out of an answer depends on later messages
        tools = self._tools(self.forms, whole)
        variables = {
            **self._tokenizer.special_tokens_map,
            **self._shared(whole),
            **options,
            "tools": tools,
            "add_generation_prompt": generate,
        }
        run = run_of(self._program(tools), _entries(whole, self.forms), variables)
        if run is None:
            return None
        for size in (min(run.proven), len(whole.messages)):
            part = replace(whole, messages=whole.messages[:size])
            text = run.prefix(size) if size in run.proven else run.text
            try:
                if text != self._by_transformers(self.forms, part, generate, options):
                    return None
            except Exception:  # a template is a program, which may raise anything
                return None
        return run

    def _advice(self, forms: Forms, conversation: Conversation, generate: bool, thinking: bool) -> str:
        """What to change, found by rendering the conversation with one change at a time."""
        for hint, changed in amendments(conversation):
            with suppress(Exception):
                self._written(forms, changed, generate, thinking)
                return hint
        return "drop this row, or write a chat_template.jinja that renders it"

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


def _called(content: str = "") -> Conversation:
    """A question that is answered by a call."""
    call = Call(NAME, {KEY: VALUE}, CALL_ID)
    return Conversation((Message("user", QUESTION), Message("assistant", content, (call,))), (TOOL,))


def _beginning(first: str, second: str) -> str:
    """The longest text with which both begin."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(letter for letter, _ in pairs)


def _opening(head: str, full: str) -> str:
    """The end of the prompt that training does not write before the answer; marks stay whole."""
    if full.startswith(head):
        return ""
    stem = len(_beginning(head, full))
    mark = head.rfind("<", 0, stem)
    if mark > head.rfind(">", 0, stem):
        stem = mark
    if QUESTION in head[stem:]:
        raise Refused("prefix", "this template shows another context in training than at inference")
    return head[stem:]


def _behind(opening: str, rest: str, head: str) -> tuple[str, bool]:
    """What follows a prompt that ends with ``opening``, where training shows ``rest`` after what stands
    before the opening; and whether the opening is of reasoning that the model has to close.

    The end of the opening may be the mark that training writes before the answer, too. Such an opening is
    context: Command R+ ends every prompt with an instruction."""
    for size in range(min(len(opening), len(rest)), 0, -1):
        if opening.endswith(rest[:size]) and rest[:size].strip():
            return rest[size:], False
    return rest, bool(OPEN.search(head)) or bool(opening.strip() and not CLOSED.search(opening))


def _with_call_ids(messages: Sequence[Message], forms: Forms) -> list[Message]:
    """Messages with the ids of calls and results that the template is made for."""
    if forms.call_ids == "given":
        return list(messages)
    number, names = 0, dict[str | None, str]()
    named: list[Message] = []
    for message in messages:
        if message.calls and forms.call_ids == "turn":
            number = 0
        calls: list[Call] = []
        for call in message.calls:
            names[call.id] = f"functions.{call.name}:{number}"
            calls.append(replace(call, id=names[call.id]))
            number += 1
        named.append(
            replace(message, calls=tuple(calls), call_id=names.get(message.call_id, message.call_id))
        )
    return named


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


def _begins(whole: Conversation, part: Conversation) -> bool:
    """Whether ``whole`` begins with the messages of ``part``, and has its tools. They must be the same
    objects: equal ones may be written otherwise (the arguments 1 and 1.0, or keys in another order)."""
    if whole.tools is not part.tools or len(part.messages) > len(whole.messages):
        return False
    return all(map(operator.is_, whole.messages, part.messages))


def _entries(conversation: Conversation, forms: Forms) -> list[dict[str, JSON]]:
    """The messages as the template takes them."""
    messages = _with_call_ids(_without_old_reasoning(conversation, forms), forms)
    return [_entry(message, forms) for message in messages]


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
