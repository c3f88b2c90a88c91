"""Words to tokens: which ids a conversation becomes, and which of them are learned.

An answer's place is the difference of two renderings, the prompt that inference sees and the prompt with the answer,
compared token by token; never the result of a search for text. Every row is checked: what is learned, decoded, is the
assistant's words and the end token; there is one BOS; no message is missing; something is learned. ``renderers`` knows
how a conversation is written.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from tunesmith import formats
from tunesmith.config import Spec
from tunesmith.errors import DataError, ModelError, TemplateError, listing
from tunesmith.formats import Call, Completion, Conversation, Demonstration, Document, Judged, Message, Preference

Learn = Literal["all", "last", "marked"]

SURROGATES = r"[\ud800-\udfff]"  # halves of a character: no tokenizer can encode them
ANCHOR = "☺"  # merges with nothing, and shields what follows from the space that some tokenizers put before a text
SPLIT, CUT = "split into one row per assistant turn", "cut at a turn boundary"


class TemplateSpec(Spec):
    """How conversations become tokens, and which tokens are learned."""

    renderer: Literal["auto", "hf", "mistral-v3"] = Field(
        "auto", description="hf: the tokenizer's chat template; mistral-v3: mistral-common; auto: by the tokenizer"
    )
    learn: Learn = Field("all", description="all answers but those with learn: false; the last; those with learn: true")
    prompt_weight: float = Field(
        0.0, ge=0, le=1, description="weight of the tokens before and between answers; 0.01 to 0.5 helps short answers"
    )
    too_long: Literal["refuse", "drop", "cut"] = Field(
        "refuse", description="a row beyond batch.length: stop, leave it out, or drop its oldest turns, never an answer"
    )


class Tokens(NamedTuple):
    """ids: (T,) int32. targets: (T,) float32, the weight of learning the token at its own index; 0 is not learned."""

    ids: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence to train on. turn: place of its last learned message. kind: completion | chosen | rejected."""

    tokens: Tokens
    source: str
    example_id: str
    turn: int
    label: bool | None
    kind: str = "completion"


@dataclass
class Rendered:
    """notes: how often something was done to a row that its author may not expect."""

    rows: list[Row]
    dropped: list[formats.Dropped]
    notes: Counter[str]


class Refused(TemplateError):
    """A row that cannot be rendered faithfully; ``code`` is the reason under which it is counted."""

    def __init__(self, code: str, what: str, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.code = code


class Turn(NamedTuple):
    """An answer in its context: ids[:start] is the prompt, ids[start:] the answer with its end token."""

    place: int
    ids: list[int]
    start: int
    notes: tuple[str, ...] = ()


class Answered(NamedTuple):
    """A rendering up to an answer. said, wrote: the answer without its end token, decoded and as written; text: all."""

    prompt: list[int]
    ids: list[int]
    said: str
    wrote: str
    text: str


class Renderer(ABC):
    """Examples to rows, prompts to ids, ids to text. ``bos_id`` is None where plain text gets no BOS."""

    name: str
    fingerprint: str
    eos_ids: tuple[int, ...]
    bos_id: int | None
    vocabulary: int
    _control: re.Pattern[str]  # what must not stand in a text, since it would not be encoded as text
    _chat_bos: int | None  # the id that opens a rendered conversation, once
    _nine: bool  # the format wants call ids of nine letters or digits

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` with special tokens written out."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _drops(self, tool: dict[str, Any]) -> int:
        """How many keys of a tool in OpenAI's form are not rendered."""

    @abstractmethod
    def _prompt(self, conversation: Conversation) -> list[int]: ...

    @abstractmethod
    def _answered(self, before: Conversation, shown: Conversation) -> Answered: ...

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids up to where the assistant starts to speak. Raises TemplateError, also when the assistant spoke last."""
        if not conversation.messages or conversation.messages[-1].role == "assistant":
            raise Refused("order", "a prompt must end with a message of the user or of a tool")
        return self._prompt(self._checked(conversation, Counter()))

    def text_prompt(self, text: str) -> list[int]:
        """Ids of plain text to be continued: BOS where the tokenizer adds one, then the text."""
        self._refuse_control((text,))
        return [*self._begin(), *self._encode(text)]

    def answer(self, ids: Sequence[int]) -> str:
        """What was generated, as text, up to the first end token; other special tokens are written out."""
        return self.decode(ids[: next((at for at, token in enumerate(ids) if token in self.eos_ids), len(ids))])

    def rows(
        self, example: formats.Example, *, learn: Learn = "all", prompt_weight: float = 0.0,
        cut: int | None = None, notes: Counter[str] | None = None,
    ) -> list[Row]:  # fmt: skip
        """One row where all answers fit in one rendering, else one for each learned answer.

        cut: drop the oldest turns of a row with more tokens than this, as far as that helps. notes: is added to.
        Raises TemplateError with the example's source.
        """
        counts: Counter[str] = Counter()
        try:
            parts = self._parts(example, learn, cut, counts)
        except TemplateError as error:
            error.where = example.source
            raise
        rows = []
        for kind, group in parts:
            ids = np.array(group[-1].ids, dtype=np.int32)
            targets = np.full(len(ids), prompt_weight, dtype=np.float32)
            targets[0] = 0  # BOS, or a token with nothing before it
            for turn in group:
                targets[turn.start : len(turn.ids)] = 1
                counts.update(turn.notes)
            label = None if isinstance(example, Preference | Demonstration) else (
                example.desirable if isinstance(example, Judged) else example.label)  # fmt: skip
            rows.append(Row(Tokens(ids, targets), example.source, example.id, group[-1].place, label, kind))
        if notes is not None:
            notes.update(+counts)  # without the zeros
        return rows

    def _parts(
        self, example: formats.Example, learn: Learn, cut: int | None, notes: Counter[str]
    ) -> list[tuple[str, list[Turn]]]:
        """The turns of each row, with its kind."""
        match example:
            case Document(text=text):
                ids, start = [*self.text_prompt(text), self._eos()], len(self._begin())
                same = self._same(self.decode(ids[start:-1]), text)
                bare = () if start else ("first token of a text not learned: nothing stands before it",)
                return [("completion", [Turn(0, ids, 1, same + bare)])]
            case Completion(prompt=before, completion=after):
                self._refuse_control((before, after))
                head = self.text_prompt(before)
                if not head or not after:
                    raise Refused("empty", "a completion or its context is empty", 'use {"text": …} for text alone')
                ids = [*self._continue(self._begin(), before, head, after), self._eos()]
                same = self._same(self._between(ids, len(head), len(ids) - 1), after)
                return [("completion", [Turn(0, ids, len(head), same)])]
            case Preference(chosen=chosen, rejected=rejected):
                return self._pair([chosen, rejected], learn, cut, notes)
            case Demonstration() | Judged():
                conversation = self._checked(example.conversation, notes)
                learned = _learned(conversation, learn, 0, notes)
                groups = self._groups(conversation, learned)
                return [("completion", part) for group in groups for part in self._fit(conversation, group, cut)]

    def _pair(self, both: list[Conversation], learn: Learn, cut: int | None, notes: Counter[str]) -> list[tuple[str, list[Turn]]]:
        """Chosen and rejected, one row each, in the same context, learned from where they part."""
        sides = [self._checked(side, notes) for side in both]
        a, b = (side.messages for side in sides)
        part = next((at for at, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        if sides[0].tools != sides[1].tools or any(part >= len(m) or m[part].role != "assistant" for m in (a, b)):
            raise Refused("pair", "chosen and rejected do not part at an answer", "they need one prompt, two answers")
        places = [_learned(side, learn, part, notes) for side in sides]
        groups: list[list[list[Turn]]] = []
        for start in (0, *_starts(sides[0], part)):
            groups = [self._groups(side, learned, start) for side, learned in zip(sides, places, strict=True)]
            if any(len(group) > 1 for group in groups):
                raise Refused("pair", "one side of a preference would need several rows", "set template.learn: last")
            if cut is None or all(len(group[0][-1].ids) <= cut for group in groups):
                break
        return [("chosen", groups[0][0]), ("rejected", groups[1][0])]

    def _groups(self, conversation: Conversation, learned: Sequence[int], start: int = 0) -> list[list[Turn]]:
        """The learned turns by row: together if each rendering begins with the one before, else each alone.

        start: the message that follows the system messages; older ones are left out.
        """
        system = tuple(message for message in conversation.messages[:start] if message.role == "system")
        shown = replace(conversation, messages=(*system, *conversation.messages[start:]))
        shift = start - len(system)
        turns = [self._turn(shown, index - shift)._replace(place=index) for index in learned]
        nested = all(later.ids[: len(turn.ids)] == turn.ids for turn, later in pairwise(turns))
        turns[0] = turns[0]._replace(notes=turns[0].notes + (SPLIT,) * (not nested) + (CUT,) * (start > 0))
        return [turns] if nested else [[turn] for turn in turns]

    def _fit(self, conversation: Conversation, group: list[Turn], cut: int | None) -> list[list[Turn]]:
        """The group without so many of its oldest turns that it fits; the answers left out get rows of their own.

        An answer that is too long even behind its own user turn stays so: the caller drops it.
        """
        if cut is None or len(group[-1].ids) <= cut:
            return [group]
        earlier, groups = group[:-1], [group[-1:]]
        for start in _starts(conversation, group[-1].place):
            shorter = self._groups(conversation, [turn.place for turn in group if turn.place > start], start)
            if all(len(part[-1].ids) <= cut for part in shorter):
                earlier, groups = [turn for turn in group if turn.place < start], shorter
                break
        return [*(self._fit(conversation, earlier, cut) if earlier else []), *groups]

    def _turn(self, conversation: Conversation, index: int) -> Turn:
        """The answer ``messages[index]`` in its context, checked."""
        before = replace(conversation, messages=conversation.messages[:index])
        shown = replace(conversation, messages=conversation.messages[: index + 1])
        message = conversation.messages[index]
        if not message.calls and not message.content.strip():
            raise Refused("empty", "an answer has neither words nor tool calls")
        if index == 0 or before.messages[-1].role == "assistant":
            what = "two assistant turns follow each other" if index else "the conversation begins with the assistant"
            raise Refused("order", what, "no prompt leads to such an answer: join it, remove it, or do not learn it")
        whole = self._answered(before, shown)
        if whole.ids[: len(whole.prompt)] != whole.prompt or whole.ids[-1] not in self.eos_ids:
            raise Refused("prefix", "a rendered answer must be its prompt, the answer and an end token",
                          "this template shows another context in training than at inference")  # fmt: skip
        once = self._chat_bos
        if once is not None and (whole.ids[0] != once or whole.ids.count(once) != 1):
            raise Refused("bos", f"{whole.ids.count(once)} BOS tokens; there must be one, at the start")
        notes = self._same(whole.said, whole.wrote if message.calls else message.content)
        for other in shown.messages:
            _present(other, whole.said if other is message else whole.text, last=other is message)
        missing = [name for _, name in map(_tool, shown.tools) if name not in whole.text]
        if missing:
            raise Refused("left_out", f"the template leaves out the declared tools ({', '.join(missing)})",
                          "a model with this template cannot see them: tell of them in the system text")  # fmt: skip
        if self.bos_id is not None and once is None and self.bos_id not in whole.ids:
            notes += ("no BOS: the tokenizer has one, the template writes none",)
        return Turn(index, whole.ids, len(whole.prompt), notes)

    def _continue(self, begin: list[int], head: str, prompt: list[int], rest: str) -> list[int]:
        """``prompt`` (begin and the ids of head) and the ids of ``rest``: of the whole text if that begins with the
        prompt, else of the segment, since inference never sees a token that spans the boundary."""
        whole = [*begin, *self._encode(head + rest)]
        if whole[: len(prompt)] == prompt:
            return whole
        for segment in (self._encode(rest), self._encode(ANCHOR + rest)[len(self._encode(ANCHOR)) :]):
            ids = [*prompt, *segment]
            if _plain(self._between(ids, len(prompt), len(ids))) == _plain(rest):
                return ids
        raise Refused("boundary", "the tokens of the prompt and of the answer cannot be told apart")

    def _between(self, ids: Sequence[int], start: int, stop: int) -> str:
        """The text of ids[start:stop] as it reads behind the token before it; alone, it may lose its first space."""
        before, both = self.decode(ids[start - 1 : start]), self.decode(ids[start - 1 : stop])
        return both[len(before) :] if both.startswith(before) else self.decode(ids[start:stop])

    def _same(self, said: str, words: str) -> tuple[str, ...]:
        """Notes on an allowed difference of the learned tokens, decoded, from the words. Raises Refused on another."""
        if said == words:
            return ()
        if _plain(said) == _plain(words):
            return ("Unicode normalised by the tokenizer",)
        if _plain(said.strip()) != _plain(words.strip()):
            raise Refused("words", f"the learned tokens read {_short(said)}, the assistant's words are {_short(words)}",
                          "the template or the tokenizer changes the answer")  # fmt: skip
        return (f"whitespace {'trimmed' if len(said) < len(words) else 'added'} by the template",)

    def _begin(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    def _eos(self) -> int:
        if not self.eos_ids:
            raise Refused("end_token", "this tokenizer has no end token", "set eos_token in tokenizer_config.json")
        return self.eos_ids[0]

    def _refuse_control(self, texts: Iterable[str]) -> None:
        for text in texts:
            found = self._control.search(text)
            if found:
                code = "unicode" if "\ud800" <= found.group() <= "\udfff" else "control_token_in_text"
                raise Refused(code, f"a text holds {found.group()!a}, which this tokenizer does not read as text",
                              "repair the encoding, or remove it from the text")  # fmt: skip

    def _checked(self, conversation: Conversation, notes: Counter[str]) -> Conversation:
        """Only encodable text, and each result with the id and name of its call; without an id it answers in order."""
        self._refuse_control(message.content for message in conversation.messages)
        self._refuse_control((json_text(conversation.tools),))
        tools = [_tool(tool) for tool in conversation.tools]
        declared = {name for _, name in tools}
        notes["keys of a tool that the format has no place for"] += sum(self._drops(tool) for tool, _ in tools)
        messages: list[Message] = []
        waiting: list[tuple[str | None, Call]] = []
        for at, message in enumerate(conversation.messages):
            if message.calls:
                waiting = []
                for place, call in enumerate(message.calls):
                    self._refuse_control((call.name, json_text(call.arguments)))
                    if not isinstance(call.arguments, dict):
                        raise Refused("arguments", f"the arguments of {call.name} are not a JSON object")
                    notes["call of a tool that is not declared"] += bool(declared) and call.name not in declared
                    key = call.id or f"{at}.{place} {call.name} {json_text(call.arguments)}"
                    if call.id is None or (self._nine and not re.fullmatch("[A-Za-z0-9]{9}", key)):
                        notes["tool call id made of nine letters and digits"] += 1
                        key = _nine(key)
                    waiting.append((call.id, replace(call, id=key)))
                message = replace(message, calls=tuple(named for _, named in waiting))
            elif message.role == "tool":
                match = next((pair for pair in waiting if message.call_id in (None, pair[0])), None)
                if match is not None:
                    waiting.remove(match)
                    message = replace(message, call_id=match[1].id, name=message.name or match[1].name)
                elif self._nine or waiting:
                    raise Refused("call_id", f"a tool result (call id {message.call_id}) answers no open call",
                                  "each result needs the id of a call just before it")  # fmt: skip
            messages.append(message)
        return Conversation(tuple(messages), tuple(tool for tool, _ in tools))


def renderer(path: Path | str, spec_name: str = "auto") -> Renderer:
    """The renderer of a model or tokenizer folder, or of ``mistral-v3``: the tokenizer that mistral-common ships.

    Raises ModelError when the tokenizer cannot be read. Code that comes with a tokenizer is never run.
    """
    from tunesmith.renderers import HFRenderer, MistralRenderer

    folder = Path(path)
    if str(path) != "mistral-v3" and not folder.is_dir():
        raise ModelError("no such tokenizer folder", where=str(path), hint="give a model's folder, or mistral-v3")
    own = folder / "tokenizer.model.v3" if (folder / "tokenizer.model.v3").is_file() else None
    if str(path) == "mistral-v3" or spec_name == "mistral-v3" or (own and spec_name == "auto"):
        return MistralRenderer(own)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"the tokenizer cannot be read: {error}", where=str(path)) from error
    v3 = len(tokenizer) == 32768 and tokenizer.convert_tokens_to_ids(["[INST]", "[TOOL_CALLS]"]) == [3, 5]
    return MistralRenderer() if v3 and spec_name == "auto" else HFRenderer(tokenizer)


def render(
    examples: Sequence[formats.Example], renderer: Renderer, spec: TemplateSpec, length: int,
    progress: Callable[[int, int], None] | None = None,
) -> Rendered:  # fmt: skip
    """All rows of at most ``length`` tokens; what cannot be rendered is in ``dropped`` with its reason.

    Raises DataError when a row is longer and ``spec.too_long`` is refuse.
    """
    result = Rendered([], [], Counter())
    long: list[str] = []
    for done, example in enumerate(examples, 1):
        try:
            rows = renderer.rows(
                example, learn=spec.learn, prompt_weight=spec.prompt_weight,
                cut=length if spec.too_long == "cut" else None, notes=result.notes,
            )  # fmt: skip
        except TemplateError as error:
            code = error.code if isinstance(error, Refused) else "template"
            hint = "" if error.hint is None else f" (hint: {error.hint})"
            result.dropped.append(formats.Dropped(example.source, code, error.what + hint, ""))
            rows = []
        lengths = [len(row.tokens.ids) for row in rows if len(row.tokens.ids) > length]
        for tokens in lengths:
            long.append(f"{example.source}: {tokens} tokens")
            what = f"{tokens} tokens, the limit is {length}"
            result.dropped.append(formats.Dropped(example.source, "too_long", what, ""))
        if not (lengths and isinstance(example, Preference)):  # a pair is kept or dropped as a whole
            result.rows += [row for row in rows if len(row.tokens.ids) <= length]
        if progress is not None:
            progress(done, len(examples))
    if long and spec.too_long == "refuse":
        raise DataError(f"{len(long)} rows have more than {length} tokens:\n{listing(long)}",
                        hint="raise batch.length, or set template.too_long: drop or cut")  # fmt: skip
    return result


def _learned(conversation: Conversation, learn: Learn, first: int, notes: Counter[str]) -> list[int]:
    """Places of the learned answers from ``first`` on. Raises Refused when there is none."""
    messages = conversation.messages
    spoken = [at for at in range(first, len(messages)) if messages[at].role == "assistant"]
    if learn == "marked":
        learned = [at for at in spoken if messages[at].learn]
    else:
        asked = spoken if learn == "all" else spoken[-1:]
        learned = [at for at in asked if messages[at].learn is not False]
        notes["answer not learned: it says learn: false"] += len(asked) - len(learned)
    if not learned:
        raise Refused("no_target", "no answer to learn", "template.learn says which answers are learned")
    notes["message after the last answer left out"] += len(messages) - 1 - spoken[-1]
    return learned


def _starts(conversation: Conversation, before: int) -> list[int]:
    """Where a conversation can begin without its oldest turns: at user messages behind an answer, oldest first."""
    roles = [message.role for message in conversation.messages]
    return [at for at in range(1, before) if roles[at] == "user" and roles[at - 1] in ("assistant", "tool")]


def _tool(tool: formats.JSON) -> tuple[dict[str, Any], str]:
    """A tool in OpenAI's form, from that or from a bare function, and its name. Raises Refused."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(tool, dict) or not isinstance(name, str):
        raise Refused("tools", f"a tool without a name: {_short(tool)}", "it is a function with name and parameters")
    return (tool if "function" in tool else {"type": "function", "function": tool}), name


def _present(message: Message, text: str, *, last: bool) -> None:
    """Raises Refused when words, a call's name or an argument are not in ``text``, as they are or in JSON.

    A template may leave the reasoning out of answers that are history (``last`` is False).
    """
    words = message.content.strip()
    if message.role == "assistant" and not last:
        words = words.rpartition("</think>")[2].strip()
    parts = [words, *(part for call in message.calls for part in (call.name, *_leaves(call.arguments)))]
    for part in parts:
        forms = [part, _plain(part), json_text(part)[1:-1], json.dumps(part)[1:-1]]
        if message.role == "tool" and part[:1] in ("{", "["):
            try:  # a JSON result may be written anew
                forms.append(json_text(json.loads(part)))
            except ValueError:
                pass  # not JSON after all: it must be there as it is
        if not any(form in text for form in forms):
            raise Refused("left_out", f"{_short(part)} ({message.role}) is missing in the rendering",
                          "the template cannot express this role or call: put it into the words")  # fmt: skip


def _leaves(value: formats.JSON) -> list[str]:
    """Keys, strings and numbers at every depth; true, false and null are written differently by each template."""
    if isinstance(value, dict):
        return [part for key, inner in value.items() for part in (key, *_leaves(inner))]
    if isinstance(value, list | tuple):
        return [part for inner in value for part in _leaves(inner)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _nine(text: str) -> str:
    number, letters = int.from_bytes(hashlib.sha256(text.encode()).digest()), string.ascii_letters + string.digits
    return "".join(letters[number // 62**place % 62] for place in range(9))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def json_text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _short(value: object) -> str:
    text = ascii(value) if "\\ud" in ascii(value) else repr(value)
    return text if len(text) <= 120 else f"{text[:80]} … {text[-35:]}"
