"""The rows that the demo mixes in against forgetting, and how their answers were made. ``python -m
tunesmith.demo.retention``

The prompts and the prose in ``retention.jsonl`` were written for this project. Each row says by ``kind`` what
it is for. The answers are those of SmolLM2-135M-Instruct (Apache-2.0) to these prompts, greedy and with at
most ``tokens`` tokens, right or wrong: they show the model what it said before, not what is true. An answer
that did not end by then is shortened to its first sentence. Of the harmful prompts the file has only those
that the base declines. This script asks the base again."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tunesmith.data.formats import Conversation, Message
from tunesmith.evaluation.subject import Said, Subject
from tunesmith.runs import opening

NAME = "retention.jsonl"
_SENTENCE = re.compile(r".{15,}?[a-z0-9)\"”][.!?](?=\s|$)", re.DOTALL)
Row = dict[str, Any]


def rows() -> list[Row]:
    """All rows of the package's file."""
    text = (resources.files("tunesmith.demo") / NAME).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, made: Sequence[Row]) -> Path:
    """``made`` as JSON lines (UTF-8, "\n") at ``path``, whose folder must exist."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made]
    path.write_text("".join(lines), "utf-8", newline="\n")
    return path


def shortened(said: Said) -> str | None:
    """The answer if it ended by itself, else its first sentence; None if that does not end either."""
    if not said.cut:
        return said.text.strip() or None
    found = _SENTENCE.match(said.text.strip())
    return found and found[0]


def asked(made: Sequence[Row], subject: Subject) -> list[Row]:
    """``made`` with new answers of ``subject`` in the rows answered by base. Rows that `shortened` gives no
    answer for are left out."""
    answers: dict[int, str | None] = {}
    for tokens in sorted({row["tokens"] for row in made if "tokens" in row}):
        places = [place for place, row in enumerate(made) if row.get("tokens") == tokens]
        users = [made[place]["messages"][0]["content"] for place in places]
        prompts = [Conversation((Message("user", user),)) for user in users]
        said = subject.answers(prompts, tokens, "rows")
        answers |= dict(zip(places, map(shortened, said), strict=True))
    answered: list[Row] = []
    for place, row in enumerate(made):
        if place not in answers:
            answered.append(row)
        elif answer := answers[place]:
            messages = [row["messages"][0], {"role": "assistant", "content": answer}]
            answered.append({**row, "messages": messages})
    return answered


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tunesmith.demo.retention", description="Ask the base again for its answers."
    )
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct, as the demo fetches it")
    parser.add_argument("--out", type=Path, default=Path(NAME), help="the file to write")
    options = parser.parse_args()
    opened = opening.find(options.model).open()
    before = rows()
    made = asked(before, Subject(opened.loaded.net, opened.renderer, "base"))
    same = sum(row in before for row in made)
    print(f"{write(options.out, made)}: {len(made)} rows, {same} as in the package")


if __name__ == "__main__":
    main()
