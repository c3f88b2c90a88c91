"""Votes on disk, what they say, and the rows that are learned from them."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import random
import shlex
import shutil
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from tunesmith.cli import app
from tunesmith.data import formats
from tunesmith.data.formats import Call, Conversation, DataSpec, Judged, Message, Preference
from tunesmith.errors import ConfigError, DataError, ServeError
from tunesmith.serving import tally, votes
from tunesmith.serving.pieces import AnswerEnded, CallArguments, CallBegun, Piece, Reasoned, Words
from tunesmith.serving.votes import RememberedAnswer, RememberedAnswers, UnknownAnswer

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def answer(text: str, model: str = "a", asked: str = "Why?", **options) -> RememberedAnswer:
    conversation = Conversation((Message("system", "Be brief."), Message("user", asked)))
    message = Message("assistant", text)
    return RememberedAnswer(
        f"id-{model}-{text}-{asked}", conversation, message, model, f"digest {model}", **options
    )


def written(path: Path, every: list[votes.Vote]) -> Path:
    for vote in every:
        votes.append(path, vote)
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "folder" / "votes.jsonl"


def test_a_vote_is_read_as_it_was_written(path):
    first, second = answer("Yes", "a", test="w"), answer("No", "b", test="w")
    every = [votes.thumb(first, up=True, user="ann"), votes.preference(first, second, "second", user="ann")]
    assert votes.read(written(path, every)) == (every, 0)
    assert every[1].test == "w" and every[1].blind and len(every[1].answers) == 2
    assert "ann" not in path.read_text(), "users are named by a hash"
    assert path.stat().st_mode & 0o077 == 0


def test_a_later_vote_of_the_same_user_replaces_the_earlier(path):
    first, second = answer("Yes", "a"), answer("No", "b")
    every = [
        votes.preference(first, second, "first", user="ann"),
        votes.preference(first, second, "first", user="bob"),
        votes.preference(second, first, "first", user="ann"),
        votes.thumb(first, up=True),
        votes.thumb(first, up=True),
    ]
    assert votes.read(written(path, every))[0] == [*every[1:3], every[4]], "without a user: as of one"


def test_a_line_that_a_killed_process_left_harms_no_other(path):
    first, second = (votes.thumb(answer("Yes"), up=False, user=user) for user in ("ann", "bob"))
    written(path, [first])
    with path.open("a") as stream:
        stream.write('{"time": "2026-')
    written(path, [second])
    assert votes.read(path) == ([first, second], 1)
    path.write_text('{"verdict": "up"}\n')
    with pytest.raises(DataError, match=r"votes.jsonl:1: .*the key time is missing"):
        votes.read(path)


def _append_many(path: Path, name: str) -> None:
    for number in range(40):
        votes.append(path, votes.thumb(answer("long " * 3000, name, str(number)), up=True))


def test_several_processes_append_whole_lines(path):
    path.parent.mkdir()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, name)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    every, torn = votes.read(path)
    assert (len(every), torn) == (160, 0)


def test_a_vote_waits_while_another_process_writes(path):
    written(path, [votes.thumb(answer("Yes"), up=True)])
    with path.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=votes.append, args=(path, votes.thumb(answer("No"), up=True)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and len(path.read_bytes().splitlines()) == 1
    waiting.join(20)
    assert len(votes.read(path)[0]) == 2


def test_only_answers_to_one_prompt_can_be_compared():
    with pytest.raises(ServeError, match="not answer the same prompt"):
        votes.preference(answer("Yes"), answer("No", asked="How?"), "first")
    with pytest.raises(ServeError, match="the same answer"):
        votes.preference(answer("Yes"), answer("Yes"), "first")


def test_the_newest_answers_are_remembered():
    memory = RememberedAnswers(most=3, characters=1000)
    for number in range(4):
        memory.add(answer(f"{number}"))
    assert memory.get("id-a-3-Why?").message.content == "3"
    with pytest.raises(UnknownAnswer):
        memory.get("id-a-0-Why?")
    memory.add(answer("x" * 990))
    assert memory.get(answer("x" * 990).id)
    with pytest.raises(UnknownAnswer):
        memory.get("id-a-3-Why?")


def test_tools_and_calls_count_as_characters_that_are_remembered():
    memory = RememberedAnswers(characters=1000)
    call = Message("assistant", "", (Call("find", {"x": "y" * 600}, "c1"),))
    conversation = Conversation((Message("user", "Why?"), call), ({**TOOL, "description": "z" * 600},))
    for changed in (replace(answer("Yes"), message=call), replace(answer("No"), conversation=conversation)):
        memory.add(answer("before"))
        memory.add(changed)
    with pytest.raises(UnknownAnswer):
        memory.get(answer("before").id)


def test_rows_do_not_replace_the_votes_that_they_are_made_of(path, tmp_path):
    before = written(path, side_by_side(1, 0)).read_bytes()
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for to in (path, path.parent / ".." / path.parent.name / path.name, link):
        with pytest.raises(ConfigError, match="would replace the votes"):
            tunesmith.votes(path, to=to)
    assert path.read_bytes() == before


def test_all_pairs_share_the_5_percent(path):
    every = side_by_side(3, 3)
    for number in range(4):
        for model, test in product("ab", "vw"):
            every.append(votes.thumb(answer("x", model, f"{test} {number}", test=test), up=True))
    pairs = tunesmith.votes(written(path, every)).pairs
    assert [pair.by for pair in pairs] == ["side by side", "thumbs", "thumbs"]
    assert {round(pair.needed_evidence) for pair in pairs} == {60}


def test_an_answer_is_remembered_as_the_message_of_its_conversation():
    pieces: list[Piece] = [Reasoned("Hm."), Words("Wait"), Words("."), CallBegun(0, "c1", "find")]
    pieces += [CallArguments(0, '{"x"'), CallArguments(0, ": 1}"), AnswerEnded("tool_calls")]
    expected = Message("assistant", "Wait.", (Call("find", {"x": 1}, "c1"),))
    assert votes.message_of(pieces) == expected


def side_by_side(wins: int, losses: int) -> list[votes.Vote]:
    """Votes in turns, each of another user."""
    every = []
    for number in range(wins + losses):
        first, second = answer("Yes", "runs/a", str(number)), answer("No", "runs/b", str(number))
        won = number * wins // (wins + losses) < (number + 1) * wins // (wins + losses)
        every.append(votes.preference(first, second, "first" if won else "second", user=f"user {number}"))
    return every


def test_the_summary_says_who_is_preferred_and_when_that_was_decided(path):
    written(path, side_by_side(45, 15))
    summary = tunesmith.votes(path)
    (pair,) = summary.pairs
    assert (pair.first, pair.second, pair.wins, pair.losses, pair.users) == ("runs/a", "runs/b", 45, 15, 60)
    assert pair.outcome == "first" and pair.decided_after is not None and 15 < pair.decided_after < 60
    assert pair.low > 0.5 > 1 - pair.low and pair.high < 0.9
    output = CliRunner().invoke(app, ["votes", str(path)]).output
    assert "runs/a preferred in 45 of 60 (75.0%; 95 % at any time:" in output
    assert f"decided after {pair.decided_after} votes: runs/a is preferred" in output
    as_json = json.loads(CliRunner().invoke(app, ["votes", str(path), "--json"]).output)
    assert as_json["pairs"][0]["outcome"] == "first"


def test_the_votes_of_a_run_are_found_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "run" / "votes.jsonl", side_by_side(3, 2))
    assert tunesmith.votes("run").votes == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty/votes.jsonl: cannot be read"):
        tunesmith.votes("empty")


def test_without_a_preference_no_share_is_told(path):
    first, second = answer("Yes", "runs/a", "1"), answer("No", "runs/b", "1")
    written(path, [votes.preference(first, second, "tie", user="me")])
    output = CliRunner().invoke(app, ["votes", str(path)]).output
    assert "no vote prefers either yet, 1 tie" in output and "preferred in" not in output


def test_the_side_on_which_an_answer_stood_does_not_matter(path, tmp_path):
    every = side_by_side(30, 20)
    turned = [
        replace(
            vote,
            answers=vote.answers[::-1],
            verdict={"first": "second", "second": "first"}[vote.verdict],  # type: ignore[arg-type]
        )
        for vote in every
    ]
    other = written(tmp_path / "other.jsonl", turned)
    assert tunesmith.votes(written(path, every)).pairs == tunesmith.votes(other).pairs


def test_the_model_with_more_votes_is_named_first(path):
    output = CliRunner().invoke(app, ["votes", str(written(path, side_by_side(5, 20)))]).output
    assert "runs/b against runs/a" in output
    assert "runs/b preferred in 20 of 25 (80.0%" in output and "runs/b is preferred" in output


def test_thumbs_of_an_ab_test_are_paired_in_order_and_others_are_only_counted(path):
    every = []
    for number in range(40):
        good = answer("Yes", "a", f"{number}", test="w")
        bad = answer("No", "b", f"{number} too", test="w")
        every += [votes.thumb(good, up=number % 4 != 0), votes.thumb(bad, up=number % 4 == 1)]
    every.append(votes.thumb(answer("Well", "c"), up=True))
    summary = tunesmith.votes(written(path, every))
    (pair,) = summary.pairs
    assert (pair.by, pair.test, pair.wins, pair.losses, pair.ties) == ("thumbs", "w", 20, 0, 20)
    assert pair.outcome == "first"
    approvals = {(shown.test, shown.model): (shown.up, shown.down) for shown in summary.approvals}
    assert approvals == {("w", "a"): (30, 10), ("w", "b"): (10, 30), (None, "c"): (1, 0)}


def test_thumbs_of_two_equally_good_models_are_decided_in_at_most_5_percent():
    draw, decided = random.Random(5), 0
    up = {
        share: [votes.thumb(answer("x", model, test="w"), up=share) for model in "ab"]
        for share in (True, False)
    }
    for _ in range(150):
        every = [up[draw.random() < 0.7][draw.random() < 0.3] for _ in range(400)]
        (pair,) = tally._pairs(every, {(model, f"digest {model}"): model for model in "ab"})
        decided += pair.decided_after is not None
    assert decided / 150 <= 0.05


def test_few_votes_decide_nothing_and_the_summary_says_how_many_are_missing(path):
    written(path, side_by_side(4, 2))
    (pair,) = tunesmith.votes(path).pairs
    assert pair.outcome == "open" and pair.votes_needed is not None
    assert f"at this rate after about {pair.votes_needed} more votes" in CliRunner().invoke(
        app, ["votes", str(path)]
    ).output.replace("\n", " ")


def test_a_model_that_was_replaced_under_its_name_is_another_model(path):
    first, second = answer("Yes", "a"), replace(answer("No", "a"), digest="other digest")
    written(path, [votes.preference(first, second, "first")])
    (pair,) = tunesmith.votes(path).pairs
    assert {pair.first, pair.second} == {"a (digest a)", "a (other di)"}


def read_rows(path: Path) -> list[formats.Example]:
    read = formats.read([path], DataSpec(train=(str(path),)))
    assert read.dropped == []
    return read.examples


def test_kto_rows_take_the_majority_of_thumbs_and_preferences(path, tmp_path):
    good, bad, even = answer("Yes"), answer("No", "b"), answer("Hm")
    every = [
        votes.thumb(good, up=True, user="ann"),
        votes.thumb(good, up=True, user="bob"),
        votes.thumb(good, up=False, user="cat"),
        votes.thumb(even, up=True, user="ann"),
        votes.thumb(even, up=False, user="bob"),
        votes.preference(bad, good, "second", user="ann"),
        votes.preference(bad, good, "tie", user="bob"),
    ]
    to = tmp_path / "rows.jsonl"
    summary = tunesmith.votes(written(path, every), to=to)
    rows = read_rows(to)
    assert all(isinstance(row, Judged) for row in rows)
    labels = {row.conversation.messages[-1].content: row.desirable for row in rows if isinstance(row, Judged)}
    assert labels == {"Yes": True, "No": False}
    assert summary.written is not None and summary.written.objective == "kto"
    assert summary.written.left_out == {
        "votes for neither of two answers": 1,
        "answers with as many votes for as against": 1,
    }


def test_dpo_rows_are_pairs_of_preferences_and_of_opposite_thumbs(path, tmp_path):
    good, bad = answer("Yes"), answer("No", "b")
    up, down, lone = answer("Fine", asked="How?"), answer("Bad", asked="How?"), answer("So", asked="When?")
    every = [
        votes.preference(good, bad, "first"),
        votes.preference(good, bad, "first", user="ann"),
        votes.preference(bad, good, "first", user="bob"),
        votes.thumb(up, up=True),
        votes.thumb(down, up=False),
        votes.thumb(lone, up=True),
    ]
    to = tmp_path / "rows.jsonl"
    summary = tunesmith.votes(written(path, every), to=to, objective="dpo")
    rows = [row for row in read_rows(to) if isinstance(row, Preference)]
    sides = {(row.chosen.messages[-1].content, row.rejected.messages[-1].content) for row in rows}
    assert sides == {("Yes", "No"), ("Fine", "Bad")}
    assert rows[0].chosen.messages[0] == Message("system", "Be brief.")
    assert summary.written is not None
    assert summary.written.left_out == {"thumbs without an opposite one on the same prompt": 1}
    only_pairs = written(tmp_path / "pairs.jsonl", every[:3])
    assert tunesmith.votes(only_pairs, to=to).written.objective == "dpo"  # type: ignore[union-attr]


def test_every_thumb_that_makes_no_pair_is_counted(path, tmp_path):
    good, bad, even = (answer(text, asked="How?") for text in ("Fine", "Bad", "Hm"))
    lone, torn = answer("So", asked="When?"), answer("Well", asked="Where?")
    every = [
        *(votes.thumb(lone, up=False, user=user) for user in ("ann", "bob")),
        *(votes.thumb(torn, up=up, user=f"{up}") for up in (True, False)),
        votes.thumb(good, up=True),
        votes.thumb(bad, up=False),
        *(votes.thumb(even, up=up, user=f"{up}") for up in (True, False)),
    ]
    written_rows = tunesmith.votes(written(path, every), to=tmp_path / "rows.jsonl", objective="dpo").written
    assert written_rows is not None and written_rows.rows == 1
    assert written_rows.left_out == {
        "thumbs without an opposite one on the same prompt": 4,
        "answers with as many votes for as against": 1,
    }


def test_secrets_and_personal_data_do_not_get_into_rows_and_are_counted(path, tmp_path):
    token = "ghp_x9Jq2kVfT8WcYb3nZr5uLh7dPgS0eXoQmB1a"
    call = Call("find", {"mail": "jane.miller@gmail.com"}, "c1")
    conversation = Conversation((Message("user", f"Use {token}."),), (TOOL,))
    remembered = RememberedAnswer("id", conversation, Message("assistant", "", (call,)), "a", "d")
    to = tmp_path / "rows.jsonl"
    written(path, [votes.thumb(remembered, up=True)])
    output = CliRunner().invoke(app, ["votes", str(path), "--to", str(to)]).output
    assert token not in to.read_text() and "jane" not in to.read_text()
    (row,) = read_rows(to)
    assert isinstance(row, Judged) and row.conversation.tools == (TOOL,)
    assert row.conversation.messages[-1].calls[0].arguments == {"mail": "[EMAIL]"}
    assert "secrets and personal data replaced: github_token 1, email 1" in " ".join(output.split())


@pytest.mark.parametrize("objective", ["kto", "dpo"])
def test_train_takes_the_rows(path, tmp_path, tiny_model, objective):
    to = tmp_path / "rows.jsonl"
    asked = [f"What is {number} and {number}?" for number in range(12)]
    every = [
        votes.preference(
            answer("Yes, it is.", "a", text), answer("No.", "b", text), "first", user=f"{number}"
        )
        for number, text in enumerate(asked)
    ]
    summary = tunesmith.votes(written(path, every), to=to, objective=objective)
    assert summary.written is not None and summary.written.left_out == {}
    words = ["train", "--model", str(tiny_model), "--data", str(to), "--set", f"objective={objective}"]
    words += ["--set", "audit.before_training=false", "--dry-run", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "nothing was trained" in result.output


@pytest.mark.parametrize(
    ("name", "objective", "n_votes"),
    [("writer", "dpo", 1), ("writer", "dpo", 2), ("caller", "dpo", 12), ("caller", "kto", 2)],
)
def test_the_command_that_is_shown_trains_the_run_further(served_runs, tmp_path, name, objective, n_votes):
    run = tmp_path / "my run"
    shutil.copytree(served_runs[name], run)
    texts = [f"What is {number} and {number}?" for number in range(n_votes)]
    every = [
        votes.preference(answer("Yes, it is.", "a", text), answer("No.", "b", text), "first")
        for text in texts
    ]
    written(run / "votes.jsonl", every)
    shown = ["votes", str(run), "--to", str(tmp_path / "rows.jsonl"), "--objective", objective]
    output = CliRunner().invoke(app, shown).output
    [line] = [line for line in output.splitlines() if "learn from them: " in line]
    command = shlex.split(line.partition("learn from them: ")[2])
    assert command[0] == "tunesmith" and f"adapter.start={run}" in command
    assert ("data.valid=0" in command) == (n_votes < 10)
    result = CliRunner().invoke(app, [*command[1:], "--dry-run", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "nothing was trained" in result.output


def test_without_a_run_the_model_is_left_to_the_user(path, tmp_path):
    every = [votes.preference(answer("Yes."), answer("No.", "b"), "first")]
    summary = tunesmith.votes(written(path, every), to=tmp_path / "rows.jsonl")
    assert summary.written is not None
    sets = "--set objective=dpo --set data.valid=0"
    assert summary.written.command == f"tunesmith train --model MODEL --data {tmp_path}/rows.jsonl {sets}"


def asked_in(turns: int) -> Conversation:
    """A conversation that waits for an answer: a question, a tool's result, or a second question."""
    messages = (
        Message("system", "Be brief."),
        Message("user", "What is 6 times 7?"),
        Message("assistant", "", (Call("find", {"x": [1, "two"]}, "c1"),)),
        Message("tool", "42", call_id="c1", name="find"),
        Message("assistant", "It is 42."),
        Message("user", "Thanks, and now?"),
    )
    return Conversation(messages[:turns], (TOOL,))


@pytest.mark.parametrize("turns", [2, 4, 6])
def test_a_conversation_with_tools_comes_back_from_its_row_as_it_was(path, tmp_path, turns):
    said = Message("assistant", "So.", (Call("find", {}, "c2"),))
    written(path, [votes.thumb(RememberedAnswer("id", asked_in(turns), said, "a", "d"), up=False)])
    to = tmp_path / "rows.jsonl"
    tunesmith.votes(path, to=to)
    (row,) = read_rows(to)
    assert isinstance(row, Judged) and not row.desirable
    assert row.conversation == Conversation((*asked_in(turns).messages, said), (TOOL,))
