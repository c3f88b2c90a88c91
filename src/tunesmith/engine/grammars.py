"""Which tokens may an answer take next, so that it is JSON, follows a schema, or calls tools?

The grammars are llguidance's (https://github.com/guidance-ai/llguidance). Around JSON stands what the model's
template writes around words, and around calls what it writes around calls: both are derived from answers that
the renderer writes, so that a constrained answer has the form that the model was trained on. Control tokens
are allowed only where that form has them.

A schema is enforced whole or refused. Narrower than JSON Schema are three things: properties come in the
order in which the schema lists them, the formats of strings are enforced, and control characters without a
short escape cannot be written."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from typing import NamedTuple, cast

import llguidance
import llguidance.numpy
import numpy as np

from tunesmith.checks import parsers
from tunesmith.data.formats import JSON, Call, Conversation, Message
from tunesmith.engine.requests import TokenConstraint
from tunesmith.engine.schema_support import require_enforceable, require_small
from tunesmith.errors import ModelError, TemplateError
from tunesmith.tokens.template import Renderer

QUESTION, WORDS, REASONING = "zq1u", "zq3w", "zq5r"
THOUGHT = f"<think>\n{REASONING}\n</think>\n\n"
TOOL_NAME, KEY, VALUE = "zq7n", "zq7k", "zq7v"
CALL_IDS = ("zq9c00000", "zq9c00001", "zq9c00002")
"""Neutral texts, which no template writes."""
NAME, ARGUMENTS, CALL_ID, ANSWER, THINKING = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"
"""One character each for what differs between answers of one form."""
CONTROL = 0xF0000
"""The code point that stands for the first control token of a vocabulary."""
WRITTEN_ARGUMENTS = re.compile(rf'\{{\s*"{KEY}"\s*:\s*"{VALUE}"\s*\}}')
CALL_ID_PATTERN = "/[a-zA-Z0-9]{9}/"
"""Call ids as Mistral wants them; every other template takes them too."""
TOOL_NAMES = re.compile(r"[\w.-]+")
JSON_NOTATION: JSON = {"whitespace_pattern": r"[ \n\r\t]{1,32}", "json_allowed_escapes": 'nrbtf\\"'}
"""White space is bounded: a model that writes only that would never end. Escapes by number are left out: they
would write the name of a property in a way that escapes its schema."""
MOST_GRAMMARS = 64
"""Grammars that are kept; compiling one takes 1 to 100 ms."""


class CallForm(NamedTuple):
    """How calls are written: ``first``, then any number of ``more``, then ``closing``, with `NAME`,
    `ARGUMENTS` and `CALL_ID` where these differ. ``more`` is None if an answer makes one call."""

    first: str
    more: str | None
    closing: str


OPENAI = CallForm(
    f'{{"name": "{NAME}", "arguments": {ARGUMENTS}}}', f'\n{{"name": "{NAME}", "arguments": {ARGUMENTS}}}', ""
)
"""The form for a model whose template writes no calls."""


class Grammars:
    """Constraints for the vocabulary and the template of ``renderer``. ``token_bytes``: those of the renderer
    if they were computed already. Raises ModelError if the bytes of its tokens are not known, or it has no
    end token."""

    def __init__(self, renderer: Renderer, token_bytes: Sequence[bytes] | None = None) -> None:
        if not renderer.eos_ids:
            raise ModelError("constrained answers need an end token", hint="set eos_token")
        self.renderer = renderer
        self._bytes = renderer.token_bytes() if token_bytes is None else token_bytes
        self._controls = sorted(renderer.control_ids)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Source(renderer, self._bytes)), eos_token=list(renderer.eos_ids)
        )
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._thought = THOUGHT if renderer.thinking and renderer.writes_reasoning else ""
        self._frame = self._words_frame()
        self._mark = self._reasoning_mark()
        self.call_form = self._written_calls()

    def json_object(self) -> TokenConstraint:
        """An answer that is any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: JSON) -> TokenConstraint:
        """An answer that is JSON of ``schema``. Raises ModelError if the schema is invalid, too large, cannot
        be satisfied, or has a keyword that cannot be enforced."""
        require_small([schema])
        require_enforceable(schema)
        return self._answer(f"%json {_notation(schema)}")

    def calls(
        self, tools: Sequence[Mapping[str, JSON]], *, one_named: str | None = None, parallel: bool = True
    ) -> TokenConstraint:
        """An answer that calls ``tools``, in OpenAI's layout, at least once, with arguments of their schemas.

        They are written in the template's own form, or in `OPENAI` if it writes no calls. ``one_named``: the
        only tool that may be called. ``parallel``: whether several calls may be made. Raises ModelError as
        `json_schema` does, and if there is no such tool."""
        own = self.call_form is not None
        form = self.call_form or OPENAI
        functions = [cast("Mapping[str, JSON]", tool["function"]) for tool in tools]
        if one_named is not None:
            functions = [function for function in functions if function["name"] == one_named]
        if not functions:
            raise ModelError(f"there is no tool {one_named!r}" if one_named else "there are no tools to call")
        for function in functions:
            if not TOOL_NAMES.fullmatch(str(function["name"])):
                hint = "letters, digits, _, - and . are allowed"
                raise ModelError(f"{function['name']!r} cannot be the name of a tool", hint=hint)
        require_small([function.get("parameters") or {} for function in functions])
        rules = [f"id: {CALL_ID_PATTERN}"]
        for number, function in enumerate(functions):
            rules.append(f"arguments{number}: %json {_notation(_arguments_schema(function))}")
        rules.append(self._choices("first", form.first, functions))
        parts = ["first"]
        if parallel and form.more is not None:
            rules.append(self._choices("more", form.more, functions))
            parts.append("more*")
        rules.append(f"calls: {' '.join([*parts, *self._expressions(form.closing, {CALL_ID: 'id'})])}")
        return self._constraint("\n".join([*rules, *self._framed("calls", ANSWER if own else self._frame)]))

    def _choices(self, rule: str, text: str, functions: Sequence[Mapping[str, JSON]]) -> str:
        """A rule for ``text``, which is one call, of any of the ``functions``."""
        choices: list[str] = []
        for number, function in enumerate(functions):
            holes = {CALL_ID: "id", ARGUMENTS: f"arguments{number}", THINKING: "reasoning"}
            choices.append(" ".join(self._expressions(text.replace(NAME, str(function["name"])), holes)))
        return f"{rule}: {' | '.join(choices)}"

    def _answer(self, content: str) -> TokenConstraint:
        """``content`` between what the template writes around words."""
        return self._constraint("\n".join([f"answer: {content}", *self._framed("answer", self._frame)]))

    def _framed(self, rule: str, frame: str) -> list[str]:
        """Rules for an answer that is ``rule`` at the place of `ANSWER` in ``frame``."""
        before, _, after = frame.partition(ANSWER)
        holes = {THINKING: "reasoning"}
        opening, closing = self._expressions(before, holes), self._expressions(after, holes)
        if not before.strip():  # tokenizers of sentencepiece write a space
            opening = [f"{space}?" for space in opening]
        reasoning = "reasoning: /(?s:.*)/"
        if self._mark:
            reasoning = f"reasoning[lazy]: REASONED\nREASONED: /(?s:.*)/ {json.dumps(self._mark)}"
        return [f"start: {' '.join([*opening, rule, *closing])}", reasoning]

    def _constraint(self, grammar: str) -> TokenConstraint:
        if grammar not in self._compiled:
            # Without forcing, tokens may cut the text in another way than the tokenizer itself would.
            source = llguidance.LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{grammar}')
            is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source, self._tokenizer)
            if messages:
                kind = "cannot be enforced" if is_error else "would be enforced in part"
                raise ModelError(f"this constraint {kind}: {messages[0]}", hint="leave out what is named")
            matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
            if matcher.is_error():
                hint = "ask for less at once"
                raise ModelError(f"this constraint cannot be enforced: {matcher.get_error()}", hint=hint)
            self._compiled[grammar] = matcher
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > MOST_GRAMMARS:
            self._compiled.popitem(last=False)
        return GrammarConstraint(self._compiled[grammar].deep_copy(), self.renderer)

    def _expressions(self, text: str, rules: Mapping[str, str]) -> list[str]:
        """Parts of a rule that matches ``text``: literals, control tokens, and the ``rules`` for characters
        that stand for them."""
        if self._mark:  # the rule for reasoning has it
            text = re.sub(rf"{THINKING}\s*{re.escape(self._mark)}", THINKING, text)
        parts: list[str] = []
        for is_literal, run in groupby(text, lambda letter: letter not in rules and ord(letter) < CONTROL):
            letters = "".join(run)
            if is_literal:
                parts.append(json.dumps(letters, ensure_ascii=False))
            else:
                parts += [
                    rules.get(letter) or f"<[{self._controls[ord(letter) - CONTROL]}]>" for letter in letters
                ]
        return parts

    def _words_frame(self) -> str:
        """What the template writes around the words of an answer, which are `ANSWER`."""
        before = Conversation((Message("user", QUESTION),))
        try:
            text = self._written(before, Message("assistant", self._thought + WORDS))
        except TemplateError:  # plain text can still be continued
            return ANSWER
        if text.count(WORDS) != 1:
            raise ModelError("the template does not write the words of an answer as they are")
        return text.replace(WORDS, ANSWER)

    def _reasoning_mark(self) -> str:
        """The text that ends reasoning; empty if a control token ends it, or prompts do not ask for any."""
        mark = self._frame.partition(THINKING)[2].partition(ANSWER)[0].strip()
        return "" if mark[:1] >= chr(CONTROL) else mark

    def _written_calls(self) -> CallForm | None:
        """The form of the template's calls, or None if it writes none, or `checks.parsers` does not read
        them."""
        parameters: JSON = {"type": "object", "properties": {KEY: {"type": "string"}}}
        function: JSON = {"name": TOOL_NAME, "description": TOOL_NAME, "parameters": parameters}
        before = Conversation((Message("user", QUESTION),), ({"type": "function", "function": function},))
        texts: list[str] = []
        for count in (1, 2, 3):
            calls = tuple(Call(TOOL_NAME, {KEY: VALUE}, call_id) for call_id in CALL_IDS[:count])
            answer = Message("assistant", self._thought, calls)
            try:
                text = self._written(before, answer)
                said = self.renderer.answer(self.renderer.answered(before, answer))
            except TemplateError:
                break
            if parsers.parse(said) != [parsers.ParsedCall(TOOL_NAME, {KEY: VALUE})] * count:
                break
            for call_id in CALL_IDS:
                text = text.replace(call_id, CALL_ID)
            texts.append(WRITTEN_ARGUMENTS.sub(ARGUMENTS, text).replace(TOOL_NAME, NAME))
        return call_form(texts)

    def _written(self, before: Conversation, answer: Message) -> str:
        """The text that is generated for ``answer``, up to the end token, with one character for each control
        token. Raises TemplateError if the template cannot write it."""
        ids = self.renderer.answered(before, answer)
        end = next(place for place, token in enumerate(ids) if token in self.renderer.eos_ids)
        text = ""
        for is_control, run in groupby(ids[:end], self.renderer.control_ids.__contains__):
            if is_control:
                text += "".join(chr(CONTROL + self._controls.index(token)) for token in run)
            else:
                text += b"".join(self._bytes[token] for token in run).decode()
        return text.replace(REASONING, THINKING)


class GrammarConstraint:
    """One answer that follows a grammar; ``matcher`` stands at its beginning. If ``problem`` is not None, the
    matcher gave up for that reason, and the answer is not valid."""

    def __init__(self, matcher: llguidance.LLMatcher, renderer: Renderer) -> None:
        self._matcher = matcher
        self._size, self._ends = renderer.size, list(renderer.eos_ids)
        self._bits = llguidance.numpy.allocate_token_bitmask(1, self._size)
        self._mask: np.ndarray | None = None
        self.problem: str | None = None

    def allowed(self) -> np.ndarray:
        """(V,) bool: V is the size of the tokenizer's vocabulary."""
        if self._mask is None:
            self._mask = self._computed()
        return self._mask

    def _computed(self) -> np.ndarray:
        if not self._matcher.is_error():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, self._bits)
        bits = np.unpackbits(self._bits[0].view(np.uint8), count=self._size, bitorder="little").astype(bool)
        if self._matcher.is_error() or not bits.any():
            self.problem = self.problem or self._matcher.get_error() or "no token continues the answer"
            bits[:] = False
            bits[self._ends] = True
        return bits

    def advance(self, token: int) -> None:
        self._mask = None
        if not self._matcher.consume_token(token):
            self.problem = self.problem or self._matcher.get_error() or f"token {token} was not allowed"


class _Source:
    """A vocabulary in the layout of llguidance's TokenizerWrapper."""

    def __init__(self, renderer: Renderer, tokens: Sequence[bytes]) -> None:
        self.eos_token_id, self.bos_token_id = renderer.eos_ids[0], renderer.bos_id
        self.tokens = tokens
        unknown = () if renderer.unknown_id is None else (renderer.unknown_id,)
        self.special_token_ids = sorted({*renderer.control_ids, *unknown, *renderer.eos_ids})
        self._encode = renderer.encoded_part

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def call_form(texts: Sequence[str]) -> CallForm | None:
    """The form of the calls in ``texts``: answers of one, two and three equal calls, as many as the template
    writes. None if it has none, or its arguments are not JSON."""
    if not texts or texts[0].count(NAME) != 1 or texts[0].count(ARGUMENTS) != 1:
        return None
    once = CallForm(texts[0], None, "")
    if len(texts) < 3:
        return once
    one, two, three = texts
    place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
    more = two[place : place + len(two) - len(one)]
    first, closing = one[:place], one[place:]
    same = two == first + more + closing and three == first + more + more + closing
    whole = all(part.count(NAME) == part.count(ARGUMENTS) == 1 for part in (first, more))
    return CallForm(first, more, closing) if same and whole else once


def _arguments_schema(function: Mapping[str, JSON]) -> JSON:
    """The schema of the arguments of a tool, which are an object."""
    schema = function.get("parameters") or {}
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise ModelError(f"the parameters of the tool {function['name']} are not those of an object")
    require_enforceable(schema, where=f"the tool {function['name']}")
    return {**schema, "type": "object"}


def _notation(schema: JSON) -> str:
    """``schema`` as llguidance reads it, with bounds on white space."""
    if schema is False:
        raise ModelError("no value satisfies the schema false")
    own = schema if isinstance(schema, dict) else {}
    return json.dumps({**own, "x-guidance": JSON_NOTATION})
