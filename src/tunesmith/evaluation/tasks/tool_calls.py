"""Does an answer call the right tool, with arguments that the tool takes, and no tool if none is wanted?

The prompts are the user's own rows: the conversation before the last answer of each, and before each earlier
answer that makes a call. Calls are read from the text (`parsers`), since that is what a program gets.
Arguments are checked against the JSON schema that the row declares for the tool (draft 2020-12 unless it
names another; nothing is fetched). Calls are not executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from tunesmith.checks.calls import CHECKS, ReferenceAnswer, asked, asked_last, declared, fits_schema, score
from tunesmith.checks.schemas import validator
from tunesmith.data.formats import JSON, Completion, Demonstration, Document, Message
from tunesmith.errors import EvaluationError
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Said, Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.events import Notice, Sink
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.template import Refused, Renderer


class Written(NamedTuple):
    """``tokens``: their number, with the end token."""

    text: str
    tokens: int


def written(
    references: Sequence[ReferenceAnswer], renderer: Renderer, notify: Sink, task: str
) -> list[Written | None]:
    """Each reference's answer as training would teach it; None, with a notice for each reason, if training
    would refuse the row.

    So no prompt is used from which the template drops something: tools, earlier calls, results."""
    texts: list[Written | None] = []
    refused: dict[str, list[tuple[str, Refused]]] = {}
    for reference in references:
        prompt, answer = reference.prompt, replace(reference.answer, learn=None)
        if isinstance(prompt, str):
            example = Completion(prompt, answer.content)
        else:
            example = Demonstration(replace(prompt, messages=(*prompt.messages, answer)))
        try:
            (row,) = renderer.rows(example, learn="last")
        except Refused as error:
            refused.setdefault(error.code, []).append((reference.source, error))
            texts.append(None)
        else:
            ids = row.tokens.ids[row.tokens.start :].tolist()
            end = next((place for place, token in enumerate(ids) if token in renderer.eos_ids), len(ids))
            texts.append(Written(renderer.decode(ids[:end]), end + 1))
    for reason, rows in refused.items():
        (first, error), sources = rows[0], list(dict.fromkeys(source for source, _ in rows))
        text = f"{task}: not asked, since training would refuse it: {reason}; {first}: {error.what}"
        where = ", ".join(sources[:3]) + ", …" * (len(sources) > 3)
        notify(Notice(text, level="warning", count=len(rows), where=where, hint=error.hint))
    return texts


def _share(check: str) -> Statistic:
    def of(score: ExampleScore) -> float | None:
        return None if score.detail[check] is None else float(score.detail[check] is True)

    return Statistic(check, of, share=True, better="lower" if check == "unwanted_call" else "higher")


TAGGED = ("<function=", "<|python_tag|>")
"""How calls begin in the forms of Qwen3-Coder and of Llama 3."""


class ToolCalls(Task[tuple[ReferenceAnswer, Said]]):
    """Measured: (reference, the model's answer)."""

    name = "tool_calls"
    version = "3"
    statistics = (
        Statistic("tool_calls", lambda example: example.value, share=True, better="higher", headline=True),
        *map(_share, CHECKS),
    )
    parts = ("tool",)
    question, rank = "task", 0
    title, asks, asks_rows = "Tool calls right", "held-out prompts, some of which want a call", True
    options = ("max_tokens",)
    meanings = (
        Meaning(
            "tool_calls",
            "Tool calls right",
            "share of answers that call the right tools in order and readably, or none if none is wanted; "
            "arguments are judged apart",
        ),
        Meaning(
            "well_formed", "Calls well-formed", "if a call is wanted: at least one, all of them readable"
        ),
        Meaning(
            "known_tool",
            "Declared tools only",
            "if a call is wanted and tools are declared: a call is made, and each tool called is declared",
        ),
        Meaning("right_tool", "Right tool", "if a call is wanted: the same tools in the same order"),
        Meaning(
            "keys_present",
            "Arguments present",
            "the right tools, with every argument that the reference has, whatever its value",
        ),
        Meaning(
            "required_arguments",
            "Required arguments present",
            "the right tools, with every argument that their schema requires",
        ),
        Meaning(
            "exact_arguments",
            "Arguments exact",
            "the right tools, with the arguments and values of the reference",
        ),
        Meaning(
            "schema_valid",
            "Calls fit their schema",
            "if a call is wanted and tools are declared: all calls are readable and fit the JSON schemas",
        ),
        Meaning(
            "unwanted_call", "Unwanted calls", "if no call is wanted: the share of answers that make one"
        ),
    )

    def __init__(
        self, asked: Sequence[ReferenceAnswer] = (), *, max_tokens: int = 256, tagged: bool = False
    ) -> None:
        """tagged: whether the template writes calls with one of `TAGGED`."""
        self.asked, self.max_tokens, self._tagged = asked, max_tokens, tagged

    @property
    def identity(self) -> str:
        read = ["tagged"] if self._tagged else []  # tunesmith 0.1.0 did not read these forms
        return digest([_plain(reference) for reference in self.asked], self.max_tokens, *read)

    def measure(self, subject: Subject) -> list[tuple[ReferenceAnswer, Said]]:
        prompts = [reference.prompt for reference in self.asked]
        return list(zip(self.asked, subject.answers(prompts, self.max_tokens), strict=True))

    def score(self, items: Sequence[tuple[ReferenceAnswer, Said]]) -> list[ExampleScore]:
        """``value``: 1 if the right tools are called well-formed, or none if none is wanted. ``cut``: the
        answer reached the limit."""
        if not items:
            raise EvaluationError(
                "no row has an answer to measure against", hint="give rows that end with an answer"
            )
        scores: list[ExampleScore] = []
        for reference, answer in items:
            detail = score(answer.text, reference) | {"cut": answer.cut}
            right = float(detail["value"] == 1.0)
            calls = [
                f"{call.name} {json.dumps(call.arguments, ensure_ascii=False)}" for call in reference.calls
            ]
            wanted = "\n".join(calls) or "an answer in words, no call"
            prompt = asked_last(reference.prompt)
            scores.append(ExampleScore(reference.source, right, 1.0, detail, prompt, wanted, answer.text))
        return scores


def _plain(reference: ReferenceAnswer) -> list[JSON]:
    prompt = reference.prompt
    turns: JSON = prompt if isinstance(prompt, str) else [_turn(message) for message in prompt.messages]
    tools: list[JSON] = [] if isinstance(prompt, str) else list(prompt.tools)
    return [reference.source, turns, tools, [[call.name, call.arguments] for call in reference.calls]]


def _turn(message: Message) -> list[JSON]:
    return [
        message.role,
        message.content,
        [[call.name, call.arguments, call.id] for call in message.calls],
        message.call_id,
    ]


@register(ToolCalls)
def build(material: Material) -> list[ToolCalls]:
    """The task for the rows that can be asked; none if no row asks for a call."""
    notify = material.notify
    rows = [asked(example) for example in material.imitated if not isinstance(example, Document)]
    if lost := sum(unusable for _, unusable in rows):
        message = "tool_calls: answers that cannot be used as a reference are not asked for"
        notify(Notice(message, level="warning", count=lost))
    every = [reference for usable, _ in rows for reference in usable]
    answers = zip(every, written(every, material.renderer, notify, "tool_calls"), strict=True)
    texts = [(reference, answer.text) for reference, answer in answers if answer is not None]
    unread = sum(
        bool(reference.answer.calls) and score(text, reference)["value"] != 1.0 for reference, text in texts
    )
    if unread:
        message = (
            "tool_calls: calls as this template writes them cannot be read back: a right answer scores 0"
        )
        hint = "which forms are read: the documentation, section tool_calls"
        notify(Notice(message, level="warning", count=unread, hint=hint))
    references = [reference for reference, _ in texts]
    if not any(reference.calls for reference in references):
        notify(Notice("tool_calls: no row asks for a call, so it is not measured"))
        return []
    _notify_of_schemas([reference for reference in references if reference.calls], notify)
    tagged = any(tag in text for _, text in texts for tag in TAGGED)
    return [ToolCalls(references, max_tokens=material.spec.max_tokens, tagged=tagged)]


def _notify_of_schemas(calling: Sequence[ReferenceAnswer], notify: Sink) -> None:
    """Count the rows whose schemas cannot be used, and those whose own calls do not fit their schemas."""
    unusable = misfits = 0
    for reference in calling:
        schemas = declared(reference.prompt)
        if not all(map(validator, schemas.values())):
            unusable += 1
        elif schemas:
            misfits += not all(fits_schema(schemas, call.name, call.arguments) for call in reference.calls)
    if unusable:
        text = (
            "tool_calls: rows that declare a tool with an invalid schema: schema_valid is not asked of them"
        )
        notify(Notice(text, level="warning", count=unusable))
    if misfits:
        text = "tool_calls: reference calls that do not fit their own tool's schema"
        hint = "the data teach calls that the tool refuses"
        notify(Notice(text, level="warning", count=misfits, hint=hint))
