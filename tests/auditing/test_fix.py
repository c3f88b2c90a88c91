"""Made-up results are found and nothing else is; a fixed copy loses no row unsaid, keeps labels, and is not
fixed again."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.auditing import AuditSpec
from tunesmith.auditing.findings import Audit, Finding, FindingRow, Fixed
from tunesmith.auditing.fix import fix, mended, require_free
from tunesmith.auditing.rules.invented import Invented
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data import formats
from tunesmith.data.examples import (
    Call,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
)
from tunesmith.data.formats import DataSpec
from tunesmith.errors import ConfigError, DataError

CALL = 'tool_call: f\narguments: {"a": 1}'
TURNED = f'{CALL}\n\nResult: {{"mail": "ann@example.org"}}\n\nDone.'
LEFT = f"{TURNED}\n\n{CALL}\n\nDone again."
MOJIBAKE, CLEAN = "ChÃ©ri in the Ã\u0089poque, donâ€™t wait", "Chéri in the Époque, don’t wait"
SPEC = DataSpec(train=("x",), valid=0.0)


def said(*texts: str) -> Conversation:
    return Conversation(
        tuple(message for text in texts for message in (Message("user", "u"), Message("assistant", text)))
    )


# Made-up results


def judged(*examples: Example) -> list[Finding]:
    rule, known = Invented(), Context(AuditSpec())
    kept = [rule.look(View(f"f:{at}", example), known) for at, example in enumerate(examples, 1)]
    many = len(examples)
    survey = Survey(
        AuditSpec(), [f"f:{at + 1}" for at in range(many)], [None] * many, [None] * many, [False] * many
    )
    return list(rule.judge(kept, survey))


@pytest.mark.parametrize(
    "text",
    [
        TURNED,
        LEFT,
        f"{CALL}\nResult: saved",
        'tool_call: f\narguments: {"a": 1)\n\nResult: {"x": 1}\n\nDone.',
        "tool_call: f\n\nResult: 1",
        f'{CALL}\n\nI wait.\n\nResult: {{"x": 1}}',
        f"{CALL}\n\nObservation: 3 files",
        f"{CALL}\n\nFunction result:\n{{}}",
        'Action: f\nAction Input: {"q": 1}\nObservation: it rains\nFinal Answer: rain',
        '<tool_call>\n{"name": "f"}\n</tool_call>\n<tool_response>\n{"x": 1}\n</tool_response>',
        '<tool_call>\n{"name": "f"}\n</tool_call>\nTool output: [1]',
        "Here it is.\n<function_results>\n1",
        '[TOOL_CALLS] [{"name": "f"}]\n[TOOL_RESULTS] {"x": 1}',
    ],
)
def test_what_the_environment_should_say_is_found_in_the_assistants_text(text):
    examples = (
        Judged(said("Hello.", text), True),
        Demonstration(said(text)),
        Completion("u", text),
        Document(text),
        Preference(said(text), said("no")),
    )
    (finding,) = judged(Demonstration(said("Hello.")), *examples)
    assert (finding.rule, finding.severity, finding.count, finding.of) == (
        "invented.results",
        "warning",
        5,
        6,
    )
    assert [row.source for row in finding.rows] == [f"f:{at}" for at in range(2, 7)] and finding.rows[
        0
    ].note.startswith("turn 4:")
    assert "ann@example.org" not in str(finding)


@pytest.mark.parametrize(
    "text",
    [
        "Result: we won",
        "Result: {1, 2} is a set",
        "Observation: the sky is blue",
        "The result: 5\nResult: 5\nTool output: what a tool prints",
        f"```\n{TURNED}\n```\nThat is the form.",
        f"It looks so:\n~~~\n{TURNED}\n~~~",
        f"{CALL}\n\nDone.\n\nResult: all is well",
        f"{CALL}",
        f"{CALL}\n\nThen comes `Result: {{}}`, or the Result: {{}} of it.",
        "A `<tool_response>` holds the result.",
    ],
)
def test_prose_about_results_is_no_finding(text):
    turn = Message("assistant", text)
    answered = (
        Message("user", "u"),
        Message("assistant", "", (Call("f", {}),)),
        Message("tool", "Result: {}"),
        turn,
    )
    for finding in judged(Demonstration(said(text)), Document(text), Demonstration(Conversation(answered))):
        assert finding.severity == "good" and not finding.rows


def test_only_the_assistant_makes_results_up_and_only_what_is_learned_counts():
    asked = Conversation((Message("user", TURNED), Message("assistant", "I see.")))
    assert judged(Demonstration(asked), Preference(said("no"), said(TURNED))) == []
    structured = Conversation((Message("user", "u"), Message("assistant", "", (Call("f", {}),))))
    for calling in (said(CALL), structured):
        (finding,) = judged(Demonstration(asked), Demonstration(calling))
        assert (finding.severity, finding.count, finding.of) == ("good", 0, 2)


def test_the_hint_tells_how_many_rows_can_be_turned():
    (finding,) = judged(
        *(Demonstration(said(text)) for text in (TURNED, TURNED, LEFT, f"{CALL}\n\nObservation: 3 files"))
    )
    assert "turns 2 of them" in finding.hint and "2 cannot be turned (unanswered_call 2)" in finding.hint
    (finding,) = judged(Document(TURNED))
    assert finding.hint == "1 cannot be turned (another form 1): mend them or leave them out"


def test_every_made_up_result_of_the_real_rows_is_found_and_no_other(syngen, data_dir):
    examples = formats.read([syngen], SPEC).examples
    (finding,) = judged(*examples)
    expected = [
        f"f:{at}"
        for at, one in enumerate(examples, 1)
        if "\nResult: " in one.conversation.messages[1].content
    ]
    assert [row.source for row in finding.rows] == expected and finding.count == 857
    for name in (
        "alpaca_en_demo.json",
        "kto_en_demo.json",
        "dpo_en_demo.json",
        "glaive_toolcall_en_demo.json",
    ):
        assert [
            one
            for one in judged(*formats.read([data_dir(f"formats/{name}")], SPEC).examples)
            if one.severity != "good"
        ] == []


# The corrected copy


def audit(*findings: Finding) -> Audit:
    return Audit({}, 0, list(findings), {})


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def row(text: str, label: bool | None = None, **extra: object) -> dict:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": text}]
    return {"conversations": turns, **({} if label is None else {"label": label}), **extra}


def book(fixed: Fixed) -> list[dict]:
    return [json.loads(line) for line in fixed.ledger.read_text(encoding="utf-8").splitlines()]


def lawful(paths: list[Path], fixed: Fixed, spec: DataSpec = SPEC) -> list[Example]:
    """What holds for every fixed copy; returns its rows."""
    read, again = formats.read(paths, spec), formats.read([fixed.out], SPEC)
    lines = book(fixed)
    removed = [line for line in lines if line["action"] == "removed"]
    assert (
        not again.dropped
        and fixed.rows == read.rows == fixed.written + len(removed)
        and again.rows == fixed.written
    )
    assert len(removed) == fixed.removed.total() and all(line["row"] is None for line in removed)
    raw = {one.source: one.raw for one in read.dropped}
    assert {line["source"]: line["before"] for line in removed if line["source"] in raw} == raw
    gone = {line["source"] for line in removed}
    kept = [one for one in read.examples if one.source not in gone]
    changed = {line["row"] for line in lines if line["action"] == "changed"}
    for at, (old, new) in enumerate(zip(kept, again.examples, strict=True), 1):
        assert (
            View("", old).label == View("", new).label
            and old.metadata == new.metadata
            and type(old) is type(new)
        )
        assert (replace(new, source=old.source) != old) == (at in changed)
    assert all(line["reason"] and line["rule"] for line in lines)
    assert json.loads(json.dumps(fixed.to_json()))["removed"] == fixed.removed
    once = fix([fixed.out], fixed.out.with_name(f"again-{fixed.out.name}"), SPEC, audit())
    assert not once.changed and not once.removed and once.out.read_bytes() == fixed.out.read_bytes()
    assert not {line["action"] for line in book(once)} - {"left"}
    return again.examples


def test_what_can_be_mended_is_and_the_ledger_says_what_and_why(tmp_path):
    bad = '{"conversations": [{"role": "user", "content": "' + "x" * 500
    file = write(
        tmp_path / "rows.jsonl",
        row("a", True),
        bad,
        row(MOJIBAKE, False, context="c"),
        row("a", True, topic=1),
        row("a", False),
        row(TURNED),
        row(LEFT),
        row(f"{TURNED} {MOJIBAKE}"),
        {"messages": [{"role": "assistant", "content": "a"}]},
    )
    before = file.read_bytes()
    fixed = fix([file], tmp_path / "new" / "out.jsonl", SPEC, audit())
    assert file.read_bytes() == before
    assert (fixed.rows, fixed.written) == (9, 6)
    assert fixed.removed == {"structure.json": 1, "structure.leading_assistant": 1, "duplicates.exact": 1}
    assert fixed.changed == {"content.mojibake": 2, "invented.results": 2} and fixed.left == {
        "invented.results": 1
    }
    examples = lawful([file], fixed)
    assert [View("", one).said.split("\n")[0] for one in examples] == [
        "a",
        CLEAN,
        "a",
        'f {"a": 1}',
        "tool_call: f",
        'f {"a": 1}',
    ]
    assert View("", examples[5]).said.endswith(CLEAN)
    assert examples[1].metadata == {"context": "c"}
    lines = {(line["source"].rpartition(":")[2], line["rule"]): line for line in book(fixed)}
    assert lines["2", "structure.json"]["before"] == bad
    repeated = lines["4", "duplicates.exact"]
    assert json.loads(repeated["before"])["metadata"] == {"topic": 1} and "line 1" in repeated["reason"]
    assert (lines["3", "content.mojibake"]["row"], lines["3", "content.mojibake"]["after"]) == (2, CLEAN)
    assert (
        lines["7", "invented.results"]["action"] == "left"
        and "unanswered_call" in lines["7", "invented.results"]["reason"]
    )


def test_clean_rows_are_copied_and_the_ledger_is_empty(tmp_path):
    pair = {"prompt": "u", "chosen": CLEAN, "rejected": "no", "tag": [1]}
    file = write(
        tmp_path / "rows.jsonl",
        row(CLEAN),
        row("Result: we won", True),
        row("Result: we won", False),
        pair,
        {"text": "Ã"},
    )
    fixed = fix([file], tmp_path / "out.jsonl", SPEC, audit())
    assert book(fixed) == [] and fixed.written == 5
    lawful([file], fixed)


@pytest.mark.parametrize(
    "example",
    [
        Document(MOJIBAKE, True),
        Completion(MOJIBAKE, MOJIBAKE, False),
        Judged(said(MOJIBAKE, "b"), True),
        Demonstration(Conversation((Message("system", MOJIBAKE), *said(MOJIBAKE).messages))),
        Preference(said(MOJIBAKE, "a"), said(MOJIBAKE, "b")),
    ],
)
def test_mojibake_is_decoded_in_every_text_but_the_arguments_of_calls(example):
    now, steps = mended(example)
    parts = [part.text for part in View("", now).parts]
    assert CLEAN in parts and MOJIBAKE not in parts and now.id != example.id
    assert all(
        (step.action, step.rule, step.after) == ("changed", "content.mojibake", CLEAN) for step in steps
    )
    call = Message("assistant", "", (Call("f", {"a": MOJIBAKE}),))
    kept = Demonstration(Conversation((Message("user", "u"), call)))
    assert mended(kept) == (kept, [])


def test_one_repair_can_make_way_for_another():
    now, steps = mended(Demonstration(said(TURNED.replace("arguments: ", "arguments:\u00c2\u00a0"))))
    assert [step.rule for step in steps] == ["content.mojibake", "invented.results"]
    assert [step.action for step in steps] == ["changed"] * 2 and View("", now).messages[1].calls[
        0
    ].text == '{"a": 1}'


def test_mojibake_that_no_decoding_betters_stays():
    kept = Document("\ufffd\u009f")
    assert mended(kept) == (kept, [])


def test_a_row_that_could_not_be_read_when_mended_stays():
    pair = Preference(said(MOJIBAKE), said(CLEAN), source="f:1")  # the same answer twice
    now, steps = mended(pair)
    assert now == pair and [step.action for step in steps] == ["left"]


def test_what_needs_a_person_is_listed_with_its_line_in_the_copy(tmp_path):
    file = write(tmp_path / "rows.jsonl", "{", row("a", True), row("a", True), row("a", False), row(MOJIBAKE))
    place = {at: f"{file}:{at}" for at in range(1, 6)}
    found = audit(
        Finding(
            "conflicts.labels",
            "warning",
            "2 rows say the same",
            rows=tuple(FindingRow(place[at], f"n{at}") for at in (2, 3, 4)),
        ),
        Finding("structure.valid", "error", "1 row", rows=(FindingRow(place[1], "no JSON"),)),
        Finding("content.mojibake", "warning", "1 row", rows=(FindingRow(place[5]),)),
        Finding(
            "content.secrets",
            "note",
            "1 row holds a secret",
            rows=(FindingRow(place[5], "sk-…"), FindingRow("eval.jsonl:1", "sk")),
        ),
        Finding("length.answers", "good", "fine", rows=(FindingRow(place[2]),)),
    )
    fixed = fix([file], tmp_path / "out.jsonl", SPEC, found)
    left = [
        (line["source"], line["row"], line["rule"], line["before"])
        for line in book(fixed)
        if line["action"] == "left"
    ]
    assert left == [
        (place[2], 1, "conflicts.labels", "n2"),
        (place[4], 2, "conflicts.labels", "n4"),
        (place[5], 3, "content.secrets", "sk-…"),
        ("eval.jsonl:1", None, "content.secrets", "sk"),
    ]
    assert fixed.left == {"conflicts.labels": 2, "content.secrets": 2}
    lawful([file], fixed)


def test_the_original_is_never_written_to_and_nothing_is_overwritten(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    file = write(folder / "rows.jsonl", row("a"))
    (tmp_path / "soft.jsonl").symlink_to(file)
    os.link(file, tmp_path / "hard.jsonl")
    trap = write(tmp_path / "out.jsonl.ledger.jsonl", row("b"))
    write(tmp_path / "there.jsonl", row("b"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")}
    for read, out, told in [
        (file, file, "is read"),
        (file, tmp_path / "soft.jsonl", "is read"),
        (file, tmp_path / "hard.jsonl", "is read"),
        (trap, tmp_path / "out.jsonl", "is read"),
        (file, tmp_path / "out.jsonl", "exists already"),
        (file, tmp_path / "there.jsonl", "exists already"),
        (folder, folder / "new" / "x.jsonl", "is in the folder"),
        (file, tmp_path / "x.json.gz", "JSONL"),
        (file, file / "x.jsonl", "cannot be written"),
    ]:
        kind = DataError if told == "exists already" else ConfigError
        if told != "cannot be written":
            with pytest.raises(kind, match=told):
                require_free([read], out)
        with pytest.raises(kind) as error:
            fix([read], out, SPEC, audit())
        assert told in str(error.value) and error.value.hint
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.jsonl")} == before


def test_a_ledger_that_a_killed_process_left_is_replaced_by_its_own_and_by_no_other(tmp_path):
    file = write(tmp_path / "rows.jsonl", row("a"), row("a"), row("b"))
    fixed = fix([file], tmp_path / "out.jsonl", SPEC, audit())
    before = fixed.ledger.read_bytes(), fixed.out.read_bytes()
    fixed.out.unlink()
    require_free([file], fixed.out)
    again = fix([file], fixed.out, SPEC, audit())
    assert (again.ledger.read_bytes(), again.out.read_bytes()) == before
    fixed.out.unlink()
    write(file, row("a"), row("b"), row("b"))
    with pytest.raises(DataError, match="exists already"):
        fix([file], fixed.out, SPEC, audit())
    assert fixed.ledger.read_bytes() == before[0] and not fixed.out.exists()


def test_a_copy_appears_whole_or_not_at_all(tmp_path):
    broken = tmp_path / "rows.json"
    broken.write_text(f"[{json.dumps(row('a'))}, ")
    with pytest.raises(DataError):
        fix([broken], tmp_path / "out.jsonl", SPEC, audit())
    assert list(tmp_path.iterdir()) == [broken]


def test_rows_stream_through(tmp_path):
    file = write(tmp_path / "rows.jsonl", *(row(f"{at} " + "word " * 8_000) for at in range(400)))
    tracemalloc.start()
    fixed = fix([file], tmp_path / "out.jsonl", SPEC, audit())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fixed.written == 400 and peak < 4_000_000 < file.stat().st_size


TEXTS = st.lists(
    st.sampled_from(
        [
            "a",
            "Ã©",
            MOJIBAKE,
            "â€œ",
            "\u00c2\u00a0",
            "é",
            "\u0085",
            "Ã\u00a0",
            "ÃƒÂ©",
            "\n\n",
            " ",
            "☺",
            "\ufffd",
        ]
    )
    | st.sampled_from(
        [CALL, TURNED, LEFT, "Result: ", "```\n", "tool_call: f\narguments: ", '{"a": "Ã©"}\n', "ï»¿", "Ð¶"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
LABELS = st.sampled_from([None, True, False])
ROWS = (
    st.builds(row, TEXTS, LABELS)
    | st.builds(lambda text, extra: row(text, extra=extra), TEXTS, TEXTS)
    | st.builds(
        lambda asked, one, other: {"prompt": asked, "chosen": one, "rejected": other}, TEXTS, TEXTS, TEXTS
    )
    | st.builds(
        lambda asked, text, label: {"prompt": asked, "completion": text, "label": label}, TEXTS, TEXTS, LABELS
    )
    | st.builds(lambda text, label: {"text": text, "label": label}, TEXTS, LABELS)
    | st.builds(lambda *texts: row(texts[0]) | {"system": texts[1], "tools": [{"name": "f"}]}, TEXTS, TEXTS)
    | st.sampled_from(
        ["{", "42", '{"text": "\\ud800"}', '{"text": ""}', '{"instruction": "u", "output": "a"}', "null"]
    )
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROWS, min_size=1, max_size=8))
def test_fixing_what_is_fixed_changes_nothing(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("fix")
    file = write(folder / "rows.jsonl", *rows)
    if not formats.read([file], SPEC).examples:  # then there is nothing to write
        with pytest.raises(DataError, match="no row is left"):
            fix([file], folder / "out.jsonl", SPEC, audit())
        assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
        return
    lawful([file], fix([file], folder / "out.jsonl", SPEC, audit()))


def test_the_real_rows_are_fixed_lawfully(tmp_path, syngen, data_dir):
    think = SPEC.model_copy(update={"reasoning": "think", "structure_calls": True})
    names = ("alpaca_en_demo.json", "kto_en_demo.json", "dpo_en_demo.json", "reason_tool_use_demo_50.jsonl")
    for file in (syngen, *(data_dir(f"formats/{name}") for name in names)):
        fixed = fix([file], tmp_path / f"{file.stem}.jsonl", think, audit())
        examples = lawful([file], fixed, SPEC.model_copy(update={"reasoning": "think"}))
        if file == syngen:
            assert (fixed.rows, fixed.written) == (1000, 981) and fixed.removed == {"duplicates.exact": 19}
            assert (fixed.changed, fixed.left) == ({"invented.results": 719}, {"invented.results": 139})
            assert sum("context" in one.metadata for one in examples) == 48


def test_the_page_is_written_before_the_copy_gets_its_name(tmp_path):
    file, out = write(tmp_path / "rows.jsonl", row("a")), tmp_path / "out.jsonl"
    seen = []

    def interrupted(fixed):
        seen.append((fixed, out.exists()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fix([file], out, SPEC, audit(), ready=interrupted)
    assert list(tmp_path.iterdir()) == [file]
    assert seen == [(fix([file], out, SPEC, audit()), False)]
