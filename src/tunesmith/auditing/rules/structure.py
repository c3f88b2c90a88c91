"""Whether each row is valid: roles, order, turns and calls as every template needs them, arguments as the
tools declare them.

Rows that `formats` and `examples` refuse are counted by reason. In the rows that can be read, arguments of
calls are checked against the declared JSON schema, calls written as text for a JSON object, and ids of calls
for the form that the target model writes. A row labelled undesirable, and the rejected side of a pair, may
hold a broken call. Not checked are `pattern` and `format`, schemas with `patternProperties` or very many
references, and whether a call was right."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, cast

from tunesmith.auditing.findings import Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.checks.content import masked
from tunesmith.data import calls
from tunesmith.data.examples import Conversation
from tunesmith.data.formats import Dropped
from tunesmith.display.text import excerpt

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

SHOWN = 3
"""Faults of one kind that are written out of a row, and of one call."""
REFERENCES = 24
"""Of a schema: with more, each leading to two others, one check could take hours."""
TELL = {
    "schema": (
        "a call whose arguments break the schema of its tool",
        "mend the call or the schema: it fails when it is run",
    ),
    "text_calls": (
        "a call written as text whose arguments are not a JSON object",
        "mend the JSON: such a call cannot be run",
    ),
    "tool_schema": (
        "a declared tool whose parameters are not a JSON schema",
        "mend the schema: calls of this tool were not checked",
    ),
    "call_ids": (
        "an id of a call that is not nine letters or digits",
        "nothing to do: the renderer makes such an id of it",
    ),
    "read_as": ("something that was read as what it can only mean", "nothing to do, if it is meant so"),
    "unread": (
        "a key that means something elsewhere and is metadata here",
        "rename the key, or use the layout that reads it (docs/data.md)",
    ),
}
"""Faults of rows that can be read, and what to do. The first two make a row invalid."""
ASTRAY = "it cannot be followed: a reference leads nowhere or to itself, or it is nested too deeply"
UNSOUND = ("schema", "text_calls")
HARMLESS = ("call_ids", "read_as")
NINE = re.compile("[A-Za-z0-9]{9}")
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
}


@register
class Structure(Rule):
    name = "structure"
    order = 10
    looks_at = "roles, order, turns and calls, as every template needs them"
    findings: ClassVar = {
        "valid": "rows that cannot be used, or whose calls cannot be run",
        "schema": "arguments of a call break the JSON schema of its tool",
        "text_calls": "a call written as text is not a JSON object",
        "tool_schema": "the parameters of a declared tool are not a JSON schema",
        "call_ids": "the id of a call is not one that the target model would write",
        "read_as": "messages stored as text, verdicts as words, and the like, read as what they mean",
        "unread": "keys that mean something elsewhere, such as `system` beside `text`",
    }
    otherwise = "rows that cannot be read, named by the reason"
    gravest: ClassVar = {"valid": "error", "call_ids": "note", "read_as": "note"}
    bar = "at least 95 % sound (`audit.min_valid`), else an error"

    def look(self, view: View, context: Context) -> dict[str, str] | None:
        """What is wrong, by finding; of a row that was dropped, by reason."""
        if view.dropped is not None:
            return {view.dropped.reason: excerpt(masked(view.dropped.message[:1000]), 400)}
        faults: dict[str, list[str]] = defaultdict(list)
        for rule, note in _faults(view, context):
            if rule not in UNSOUND or view.label is not False:
                faults[rule].append(note)
        return {rule: excerpt(masked(_told(notes)[:1000])) for rule, notes in faults.items()} or None

    def judge(self, facts: list[dict[str, str] | None], survey: Survey) -> Iterator[Finding]:
        if not len(survey):
            return
        dropped: dict[str, list[int]] = defaultdict(list)
        first: dict[str, Dropped] = {}
        faulty: dict[str, list[int]] = defaultdict(list)
        for row, bad in enumerate(survey.dropped):
            if bad is not None:
                dropped[bad.reason].append(row)
                first.setdefault(bad.reason, bad)
            else:
                for rule in facts[row] or ():
                    faulty[rule].append(row)

        def finding(rule: str, severity: Severity, fault: str, concerned: list[int], hint: str) -> Finding:
            evidence = tuple(
                FindingRow(survey.sources[row], (facts[row] or {}).get(rule, "")) for row in concerned
            )
            sentence = f"{counted(len(concerned), len(survey))} {fault}"
            return Finding(
                f"structure.{rule}", severity, sentence, len(concerned), len(survey), rows=evidence, hint=hint
            )

        unsound = {
            row for concerned in [*dropped.values(), *(faulty[rule] for rule in UNSOUND)] for row in concerned
        }
        sound, bar = len(survey) - len(unsound), survey.spec.min_valid
        share, hint = sound / len(survey), "mend the rows that are named with what is wrong"
        sentence = f"{counted(len(unsound), len(survey))} broken" if unsound else "every row is sound"
        yield Finding(
            "structure.valid",
            "good" if share >= bar else "error",
            sentence,
            len(unsound),
            len(survey),
            share,
            f"≥ {bar:.0%}",
            hint="" if share >= bar else hint,
        )
        for reason, concerned in sorted(dropped.items(), key=lambda item: -len(item[1])):
            fault = f"that cannot be used ({reason})" + ", the first" * (len(concerned) > 1)
            fault += f": {excerpt(masked(first[reason].fault[:1000]), 200)}"
            hint = excerpt(masked(first[reason].hint), 400) or "training leaves them out: mend them"
            yield finding(reason, "warning", fault, concerned, hint)
        for rule, (fault, hint) in TELL.items():
            if faulty[rule]:
                yield finding(
                    rule, "note" if rule in HARMLESS else "warning", f"with {fault}", faulty[rule], hint
                )


def _faults(view: View, context: Context) -> Iterator[tuple[str, str]]:
    """(finding, what is wrong) for every fault in what is learned."""
    for remark in view.example.remarks if view.example else ():
        yield ("unread" if remark.doubt else "read_as"), remark.text
    if view.conversation and view.conversation.tools:
        yield from _undeclared(view.conversation)
    for part in view.parts:
        if (
            part.role in ("assistant", "text")
            and "tool_call:" in part.text
            and not part.at.startswith("rejected")
        ):
            yield from (
                ("text_calls", f"{part.at}: {call.name}")
                for call in calls.found(part.text)
                if call.arguments is None
            )
    if context.renderer is not None and context.renderer.nine_letters:
        for turn, message in enumerate(view.messages, 1):
            ids = [call.id for call in message.calls if call.id and not NINE.fullmatch(call.id)]
            yield from (("call_ids", f"turn {turn}: {id}") for id in ids)


def _told(notes: list[str]) -> str:
    return "; ".join(notes[:SHOWN]) + (f"; and {len(notes) - SHOWN:,} more" if len(notes) > SHOWN else "")


def _undeclared(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Invalid schemas, and arguments that break their schema."""
    from jsonschema.exceptions import UnknownType
    from referencing.exceptions import Unresolvable

    checks: dict[str, Validator] = {}
    for tool in conversation.tools:
        function = cast(dict[str, Any], tool)["function"]
        if function.get("parameters") is not None:
            check, problem = _check(json.dumps(function["parameters"]))
            if problem:
                yield "tool_schema", f"{function['name']}: {problem}"
            if check is not None:
                checks[function["name"]] = check
    for turn, message in enumerate(conversation.messages, 1):
        for call in message.calls:
            if (check := checks.get(call.name)) is None:
                continue
            try:
                for error in islice(check.iter_errors(call.arguments), SHOWN):
                    yield "schema", f"turn {turn}, {call.name}: {_wrong(error)}"
            except (Unresolvable, UnknownType, RecursionError, ValueError, ArithmeticError):
                yield "tool_schema", f"{call.name}: {ASTRAY}"


@lru_cache(maxsize=8192)
def _check(text: str) -> tuple[Validator | None, str]:
    """The validator of the schema in ``text``, or None if arguments are not checked; and what is wrong with
    the schema."""
    from jsonschema import Draft202012Validator, FormatChecker, SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        return None, f"{_KINDS[type(schema)]} is not a schema"
    try:
        kind: Any = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema, format_checker=FormatChecker(formats=()))
        if '"patternProperties"' in text or text.count('"$ref"') + text.count('"$dynamicRef"') > REFERENCES:
            return None, ""
        return _bounded(kind)(schema, registry=Registry()), ""  # empty: nothing is fetched from the network
    except SchemaError as error:
        problem = (
            f"{error.instance!r} is not a JSON type" if error.json_path.endswith(".type") else error.message
        )
        return None, f"{error.json_path.removeprefix('$.')}: {problem}"
    except (RecursionError, ValueError):
        return None, ASTRAY


@lru_cache(maxsize=16)
def _bounded(kind: type[Validator]) -> type[Validator]:
    """``kind`` without what takes more than linear time: patterns, and comparing all pairs of items."""
    from jsonschema import ValidationError
    from jsonschema.validators import extend

    def unique(
        validator: Validator, wanted: bool, instance: object, schema: object
    ) -> Iterator[ValidationError]:
        if (
            wanted
            and isinstance(instance, list)
            and len({json.dumps(item, sort_keys=True) for item in instance}) < len(instance)
        ):
            yield ValidationError("the same twice")

    return extend(kind, {"pattern": lambda *_: (), "uniqueItems": unique})


def _wrong(error: ValidationError) -> str:
    """Which key, and what is wrong with it; never the value, which may be private."""
    key = error.json_path.removeprefix("$.") if error.json_path != "$" else "the arguments"
    wanted: Any = error.validator_value
    if error.validator == "type":
        kinds = wanted if isinstance(wanted, str) else " or ".join(wanted)
        return f"{key}: {_KINDS.get(type(error.instance), 'null')}, not {kinds}"
    if error.validator == "enum":
        return f"{key}: none of {excerpt(', '.join(map(str, wanted)), 60)}"
    if error.validator in ("required", "additionalProperties", "dependentRequired"):
        return f"{key}: {error.message}"
    return f"{key}: breaks {error.validator}" + f" ({wanted})" * isinstance(wanted, str | int | float)
