"""Rows that repeat or contradict others, or what they will be measured on: planted, found with their row, and
no clean twin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rapidfuzz import process
from rapidfuzz.distance import Levenshtein

from tunesmith.auditing import AuditSpec, near, survey
from tunesmith.auditing.findings import Audit, Finding
from tunesmith.auditing.rules.conflicts import Conflicts
from tunesmith.auditing.rules.contamination import EvaluationPrompt, PromptIndex, load
from tunesmith.auditing.views import Context, View, normal
from tunesmith.data import formats
from tunesmith.errors import ConfigError, DataError

WORDS = (
    "river window copper lantern orbit saddle meadow pencil harbour violet engine thunder basket mirror "
    "cactus ribbon"
).split()


def sentence(seed: int, length: int = 40) -> str:
    random = np.random.Generator(np.random.PCG64(seed))
    return " ".join(random.choice(WORDS, length)) + f" {seed}"


def row(asked: str, said: str, label: bool | None = None, **more: object) -> dict:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns} | ({} if label is None else {"label": label}) | more


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def audited(path: Path, tokenizer: str | None = None, **asked: object) -> Audit:
    spec = AuditSpec.model_validate(asked)
    data = formats.DataSpec.model_validate({"train": str(path), "valid": 0.0})
    return survey.audit([path], survey.Setup(data, spec, tokenizer))


def finding(found: Audit, rule: str) -> Finding:
    (one,) = [one for one in found.findings if one.rule == rule]
    return one


def lines(one: Finding) -> list[int]:
    return sorted(int(row.source.rpartition(":")[2]) for row in one.rows)


CLEAN = [row(f"Question {sentence(seed, 12)}?", sentence(seed + 1000), seed % 2 == 0) for seed in range(40)]
NEXT = len(CLEAN) + 1  # the line of what is added to them


def test_nothing_repeats_in_clean_rows(tmp_path):
    found = audited(write(tmp_path / "clean.jsonl", CLEAN))
    assert {one.severity for one in found.findings if one.dimension in ("duplicates", "conflicts")} == {
        "good"
    }


def test_each_kind_of_repetition_is_found_once_with_the_row_that_it_repeats(tmp_path):
    asked, said = (turn["content"] for turn in CLEAN[2]["messages"])
    shouted = row(asked.upper(), said.replace(" ", "  ") + "!", True)
    changed = row(
        asked,
        said.replace("river", "stream", 1) if "river" in said else said.replace(said.split()[5], "stream", 1),
        True,
    )
    found = audited(write(tmp_path / "rows.jsonl", [*CLEAN, CLEAN[2], shouted, changed]))
    for rule, line in (("exact", NEXT), ("normalised", NEXT + 1), ("near", NEXT + 2)):
        one = finding(found, f"duplicates.{rule}")
        assert lines(one) == [line] and one.rows[0].note.endswith("rows.jsonl:3"), rule
        assert one.count == 1 and one.of == 43 and one.severity == "note"


def test_rows_of_the_same_words_with_other_tools_are_not_the_same_to_the_letter(tmp_path):
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    found = audited(write(tmp_path / "rows.jsonl", [*CLEAN, CLEAN[0] | {"tools": [tool]}]))
    assert finding(found, "duplicates.exact").severity == "good" and lines(
        finding(found, "duplicates.normalised")
    ) == [NEXT]


def test_a_star_of_near_rows_is_one_group_and_only_later_rows_are_named(tmp_path):
    words = sentence(3, 100).split()
    head, tail = (["swapped"] * 6 + words[6:], words[:-6] + ["swapped"] * 6)
    found = audited(
        write(tmp_path / "rows.jsonl", [row("Tell", " ".join(one)) for one in (head, tail, words)])
    )
    one = finding(found, "duplicates.near")
    assert lines(one) == [2, 3] and all("rows.jsonl:" in each.note for each in one.rows)
    first, other, again = (
        row("Tell", " ".join(words)),
        row("Tell", " ".join(tail)),
        row("Tell", " ".join(words).upper()),
    )
    found = audited(write(tmp_path / "again.jsonl", [first, other, again]))
    assert lines(finding(found, "duplicates.near")) == [2] and lines(
        finding(found, "duplicates.normalised")
    ) == [3]


def test_a_shared_system_text_or_instruction_makes_no_rows_near(tmp_path):
    long = sentence(1, 400)
    for shared in (
        lambda at: {
            "messages": [
                {"role": "system", "content": long},
                *row(sentence(at, 12), sentence(at + 500, 12))["messages"],
            ]
        },
        lambda at: row(f"{long} {sentence(at, 12)}", sentence(at + 500, 12)),
    ):
        rows = [shared(at) for at in range(30)]
        data, held = write(tmp_path / "rows.jsonl", rows[:20]), write(tmp_path / "held.jsonl", rows[20:])
        assert finding(audited(data, against=[str(held)]), "duplicates.near").severity == "good"
        assert finding(audited(data, against=[str(held)]), "contamination.evaluation_near").severity == "good"


def test_a_sign_makes_another_question_and_another_answer(tmp_path):
    asked = ["Write hello world in C", "12 + 7 = ?", "Is -5 < 3 or is it not?"]
    (tmp_path / "set.txt").write_text("Write hello world in C++\n12 * 7 = ?\nIs 5 > 3 or is it not?\n")
    data = write(
        tmp_path / "rows.jsonl",
        [row(one, "-x", True) for one in asked] + [row(one, "x", False) for one in asked],
    )
    found = audited(data, against=[str(tmp_path / "set.txt")])
    assert finding(found, "contamination.evaluation_exact").severity == "good"
    assert (
        finding(found, "conflicts.labels").severity == "good"
        and finding(found, "conflicts.prompts").count == 6
    )


def test_thousands_of_like_prompts_are_each_compared_with_few():
    against = PromptIndex(
        [
            EvaluationPrompt(f"set:{at}", f"Tell what a number such as this one is: {at}", "")
            for at in range(3000)
        ],
        held_out=True,
    )
    assert max(len(places) for band in against.bands for places in band.values()) == near.BUCKET
    kind, _, similarity = against.hit(["Tell what a number such as this one is: x"], "", 0.9) or ("", 0, 0.0)
    assert kind == "near" and similarity >= 0.9


def test_five_thousand_answers_to_one_prompt_make_three_findings(tmp_path):
    data = write(tmp_path / "rows.jsonl", [row("Tell", f"answer {at} of many", True) for at in range(5000)])
    kept = [
        Conflicts().look(View("", one), Context(AuditSpec()))
        for one in formats.read([data], formats.DataSpec(train=("x",))).examples
    ]
    whole = survey.Survey(AuditSpec(), ["x"] * 5000, [True] * 5000, [None] * 5000)
    assert len(list(Conflicts().judge(kept, whole))) == 3


def test_many_repeated_rows_are_a_warning(tmp_path):
    assert (
        finding(audited(write(tmp_path / "rows.jsonl", CLEAN + CLEAN[:3])), "duplicates.exact").severity
        == "warning"
    )


def test_the_same_words_with_opposite_labels_are_a_conflict_and_no_duplicate(tmp_path):
    asked, said = (turn["content"] for turn in CLEAN[0]["messages"])
    found = audited(write(tmp_path / "rows.jsonl", [*CLEAN, row(asked, said, False)]))
    one = finding(found, "conflicts.labels")
    assert lines(one) == [1, NEXT] and one.severity == "warning"
    assert "desirable" in one.rows[0].note and f"rows.jsonl:{NEXT}" in one.rows[0].note
    assert finding(found, "duplicates.exact").severity == "good"
    assert finding(found, "duplicates.normalised").rows[0].note.endswith("with the other label")


def test_another_answer_with_the_opposite_label_is_a_contrast_not_a_contradiction(tmp_path):
    asked = CLEAN[0]["messages"][0]["content"]
    found = audited(write(tmp_path / "rows.jsonl", [*CLEAN, row(asked, sentence(77), False)]))
    assert (
        lines(finding(found, "conflicts.prompts")) == [1, NEXT]
        and finding(found, "conflicts.labels").severity == "good"
    )
    assert finding(found, "conflicts.answers").severity == "good"


def test_two_good_answers_to_one_prompt_are_named_but_not_under_another_system_text(tmp_path):
    asked = CLEAN[0]["messages"][0]["content"]
    other = row(asked, sentence(78), True)
    found = audited(write(tmp_path / "rows.jsonl", [*CLEAN, other]))
    assert lines(finding(found, "conflicts.answers")) == [NEXT]
    other["messages"].insert(0, {"role": "system", "content": "Answer as a pirate."})
    assert (
        finding(audited(write(tmp_path / "b.jsonl", [*CLEAN, other])), "conflicts.answers").severity == "good"
    )


def test_near_duplicates_are_those_that_brute_force_finds_on_real_rows(syngen):
    """All pairs of 1,000 real rows and 300 changed copies of them: precision and recall."""
    read = formats.read([syngen], formats.DataSpec(train=("x",)))
    texts = [normal(View(one.source, one).whole) for one in read.examples]
    random = np.random.Generator(np.random.PCG64(5))
    for _ in range(300):  # near ones are rare among the real rows: 1 to 15 % of the words of some are changed
        words = texts[int(random.integers(1000))].split(" ")
        for _ in range(max(1, int(len(words) * random.uniform(0.01, 0.15)))):
            words[int(random.integers(len(words)))] = str(random.choice(WORDS))
        texts.append(" ".join(words))
    least = 0.9
    table = process.cdist(
        texts, texts, scorer=Levenshtein.normalized_similarity, score_cutoff=least, dtype=np.float64
    )
    truth = {
        (int(one), int(other)) for one, other in zip(*np.nonzero(table >= least), strict=True) if one < other
    }
    pairs = near.pairs(
        [near.signature(text) for text in texts], lambda places: {at: texts[at] for at in places}, least
    )
    found = {(one, other) for one, other, _ in pairs}
    assert len(truth) > 250
    assert found <= truth, "precision 1: every pair is verified"
    assert len(found) >= 0.98 * len(truth), f"recall {len(found) / len(truth):.3f}"


def test_a_bucket_of_thousands_takes_linear_work_and_is_one_group():
    many = [near.signature("the same text in every one of these rows")] * 5000
    pairs = near.candidates(many)
    assert len(pairs) < 10_000 and near.groups(pairs) == [list(range(5000))]


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [
        ("exact", "WHAT is the   capital of the northern province?"),
        ("near", "What is the capital of the northern provinces?"),
    ],
)
def test_a_prompt_of_an_evaluation_set_is_found_in_each_layout(tmp_path, kind, prompt):
    question = "What is the capital of the northern province?"
    sets = {
        "set.jsonl": json.dumps({"question": question, "choices": ["Alta", "Boro"], "answer": 0}) + "\n",
        "set.json": json.dumps([{"messages": row(question, "Alta")["messages"]}]),
        "set.csv": f'id,prompt,type\n1,"{question}",fact\n',
        "set.txt": f"something else entirely\n{question}\n",
    }
    data = write(tmp_path / "rows.jsonl", [*CLEAN, row(prompt, "Alta.", True)])
    for name, text in sets.items():
        (tmp_path / name).write_text(text)
        found = audited(data, against=[str(tmp_path / name)])
        one = finding(found, f"contamination.evaluation_{kind}")
        assert lines(one) == [NEXT] and name in one.rows[0].note, name
        assert one.severity == ("error" if kind == "exact" else "warning")
        clean = audited(write(tmp_path / "clean.jsonl", CLEAN), against=[str(tmp_path / name)])
        assert {each.severity for each in clean.findings if each.dimension == "contamination"} == {"good"}


def test_thirteen_words_of_an_evaluation_set_inside_an_answer_are_found_and_twelve_are_not(tmp_path):
    passage = sentence(5, 30)
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": "Why?", "passage": passage}) + "\n")
    words = passage.split()
    for length, expected in ((13, [NEXT]), (12, [])):
        said = f"{sentence(900)} {' '.join(words[3 : 3 + length])} {sentence(901)}"
        found = audited(
            write(tmp_path / "rows.jsonl", [*CLEAN, row("Tell me", said)]),
            against=[str(tmp_path / "set.jsonl")],
        )
        assert lines(finding(found, "contamination.evaluation_passages")) == expected


def test_a_held_out_file_may_not_share_a_prompt(tmp_path):
    data, held = (
        write(tmp_path / "rows.jsonl", CLEAN),
        write(tmp_path / "held.jsonl", [CLEAN[3], row("Something else", "Yes")]),
    )
    spec = formats.DataSpec.model_validate({"train": str(data), "valid": [str(held)]})
    one = finding(survey.audit([data], survey.Setup(spec, AuditSpec())), "contamination.validation_exact")
    assert lines(one) == [4] and one.severity == "error" and "held.jsonl:1" in one.rows[0].note


def test_real_benchmarks_are_read_and_do_not_stand_in_the_reference_set(syngen):
    folder = syngen.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("../shared/data/benchmarks is not here")
    files = [
        folder / "gsm8k_test.jsonl",
        folder / "ifeval_train.jsonl",
        syngen.parent / "safety" / "xstest_prompts.csv",
    ]
    assert [len(load(str(path), formats.DataSpec(train=("x",))).items) for path in files] == [1319, 541, 450]
    found = audited(syngen, against=list(map(str, files)))
    assert finding(found, "contamination.evaluation_exact").severity == "good"


def test_rows_of_an_evaluation_set_are_read_as_training_reads_them_and_the_unreadable_counted(tmp_path):
    rows = [{"instruction": "Translate to French", "input": word, "output": "…"} for word in WORDS[:5]]
    data = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "set.jsonl").write_text(
        data.read_text() + '{"broken\n' + '{"a": ' * 3000 + "1" + "}" * 3000 + "\n"
    )
    found = audited(data, against=[str(tmp_path / "set.jsonl")])
    assert finding(found, "contamination.evaluation_exact").count == 5
    assert finding(found, "contamination.unreadable").count == 2


def test_an_evaluation_set_that_is_not_there_or_holds_nothing_is_told(tmp_path):
    data = write(tmp_path / "rows.jsonl", CLEAN)
    with pytest.raises(DataError, match="no such file"):
        audited(data, against=[str(tmp_path / "missing.jsonl")])
    (tmp_path / "empty.jsonl").write_text('{"number": 3}\n')
    with pytest.raises(DataError, match="no prompt to compare"):
        audited(data, against=[str(tmp_path / "empty.jsonl")])


def test_accepting_lets_a_finding_pass_and_says_so(tmp_path):
    held = tmp_path / "set.txt"
    held.write_text(CLEAN[0]["messages"][0]["content"] + "\n")
    data = write(tmp_path / "rows.jsonl", CLEAN)
    with pytest.raises(DataError, match=r"contamination.evaluation_exact.*rows.jsonl:1"):
        survey.require(audited(data, against=[str(held)]))
    found = audited(data, against=[str(held)], accept=["contamination.evaluation_exact"])
    survey.require(found)
    one = finding(found, "contamination.evaluation_exact")
    assert (one.severity, one.accepted) == ("note", "error")
    with pytest.raises(ConfigError, match=r"did you mean contamination\?"):
        audited(data, accept=["contaminations.exact"])
