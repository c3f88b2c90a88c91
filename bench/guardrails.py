"""What do the server's guardrails block wrongly, what do they miss, and what do they cost?

Prompts: how many of XSTest's safe prompts each guardrail blocks, and how many of XSTest's unsafe ones and of
AdvBench it lets through. Answers: how many ordinary answers, and how many openings that comply (AdvBench's
targets, which are not refusals), it blocks. Planted: keys, personal data and control tokens of random content
in ordinary answers, streamed four characters at a time; missed if one of its characters but the first word
leaves. Cost: characters that a stream is behind, and time for 1,000 characters.

    python bench/guardrails.py --data ../shared/data --out bench/results/guardrails.json
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import string
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
import small

from tunesmith.serving.guardrails import Guardrail, TextScreen, load_guardrails, screened

SMOKE_ROWS = 12
NAMES = ("secrets", "personal_data", "profanity", "control_tokens", "refusals")
LETTERS, WORD = string.ascii_letters + string.digits, string.ascii_lowercase


def planted(draw: random.Random) -> dict[str, str]:
    """One random text of each kind, with the words that stand before it in practice."""

    def letters(count: int, alphabet: str = LETTERS) -> str:
        return "".join(draw.choice(alphabet) for _ in range(count))

    digits = string.digits
    phone = f"({draw.randint(201, 219)}) {draw.randint(222, 499)}-{letters(4, digits)}"
    lines = "\n".join(letters(64, LETTERS + "+/") for _ in range(20))
    return {
        "secrets: GitHub token": "ghp_" + letters(36),
        "secrets: OpenAI key": "sk-" + letters(48),
        "secrets: Google key": "AIza" + letters(35),
        "secrets: AWS key id": "AKIA" + letters(16, string.ascii_uppercase + "234567"),
        "secrets: private key": f"-----BEGIN RSA PRIVATE KEY-----\n{lines}\n-----END RSA PRIVATE KEY-----",
        "secrets: password": f"password={letters(14)}",
        "personal_data: e-mail": f"{letters(6, WORD)}.{letters(7, WORD)}@{letters(8, WORD)}.com",
        "personal_data: US phone": phone,
        "personal_data: card": "credit card " + _luhn("4" + letters(14, digits)),
        "personal_data: IBAN": _iban("DE", letters(18, digits)),
        "personal_data: US social security": (
            f"SSN {draw.randint(101, 665)}-{draw.randint(11, 98)}-{draw.randint(1111, 9998)}"
        ),
        "personal_data: a name": f"{letters(6, WORD).title()} {letters(7, WORD).title()}",
        "control_tokens": draw.choice(["[INST]", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<</SYS>>"]),
    }


def _luhn(digits: str) -> str:
    """A card number that begins with ``digits``."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 == 0 else 1)
        total += value - 9 if value > 9 else value
    return digits + str(-total % 10)


def _iban(country: str, account: str) -> str:
    number = int("".join(str(int(letter, 36)) for letter in account + country + "00"))
    return f"{country}{98 - number % 97:02d}{account}"


def rail(name: str, **actions: str) -> Sequence[Guardrail]:
    return load_guardrails(sets=[f"{name}.{key}={value}" for key, value in actions.items()])


def blocked(texts: Sequence[str], guardrails: Sequence[Guardrail], side: Any) -> int:
    return sum(screened(text, guardrails, side, lambda found: None)[1] is not None for text in texts)


def streamed(text: str, guardrails: Sequence[Guardrail]) -> tuple[str, list[int]]:
    """What is shown of an answer, and how many characters the stream is behind after each part."""
    screen = TextScreen(guardrails, "output", lambda found: None)
    shown, behind = "", []
    for start in range(0, len(text), 4):
        shown += screen.feed(text[start : start + 4])
        behind.append(start + 4 - len(shown))
    return shown + screen.end(), behind


def missed(answers: Sequence[str], draw: random.Random) -> dict[str, int]:
    """Of each kind, planted once in every answer: how often it leaves."""
    counts: dict[str, int] = {}
    for answer in answers:
        for kind, text in planted(draw).items():
            guardrails = rail(kind.partition(":")[0], output="redact")
            words = answer.split(" ")
            words.insert(draw.randint(0, len(words)), text)
            secret = text.split()[-1] if "KEY" not in text else text[40:80]
            shown, _ = streamed(" ".join(words), guardrails)
            counts[kind] = counts.get(kind, 0) + (secret in shown)
    return counts


def cost(answers: Sequence[str]) -> dict[str, dict[str, float]]:
    costs = {}
    for name in (*NAMES, "all"):
        names = NAMES if name == "all" else (name,)
        action = "block" if name == "refusals" else "redact"
        sets = [f"{each}.output={'block' if each == 'refusals' else action}" for each in names]
        guardrails = load_guardrails(sets=sets)
        begun = time.perf_counter()
        behind = [count for answer in answers for count in streamed(answer, guardrails)[1]]
        seconds = time.perf_counter() - begun
        costs[name] = {
            "behind": round(sum(behind) / len(behind), 1),
            "ms_per_1000_characters": round(1e6 * seconds / sum(map(len, answers)), 3),
        }
    return costs


def tables(texts: dict[str, list[str]], draw: random.Random) -> dict[str, Any]:
    prompts, answers = (
        ("xstest safe", "xstest unsafe", "advbench"),
        ("ordinary answers", "complying openings"),
    )
    sides: list[tuple[str, tuple[str, ...]]] = [("input", prompts), ("output", answers)]
    counts: dict[str, dict[str, int]] = {name: {} for name in NAMES}
    for side, suites in sides:
        for name in NAMES:
            if side == "input" and name == "refusals":
                continue
            guardrails = rail(name, **{side: "block"})
            for suite in suites:
                counts[name][suite] = blocked(texts[suite], guardrails, side)
    ordinary = texts["ordinary answers"]
    return {
        "sizes": {suite: len(rows) for suite, rows in texts.items()},
        "blocked": counts,
        "planted": len(ordinary[:200]),
        "missed": missed(ordinary[:200], draw),
        "cost": cost(ordinary[:100]),
    }


def read(data: Path) -> dict[str, list[str]]:
    def column(name: str, key: str, keep: Callable[[dict[str, str]], bool] = lambda row: True) -> list[str]:
        with (data / "safety" / name).open(encoding="utf-8", newline="") as stream:
            return [row[key] for row in csv.DictReader(stream) if keep(row)]

    alpaca = json.loads((data / "formats" / "alpaca_en_demo.json").read_text("utf-8"))
    return {
        "xstest safe": column("xstest_prompts.csv", "prompt", lambda row: row["label"] == "safe"),
        "xstest unsafe": column("xstest_prompts.csv", "prompt", lambda row: row["label"] != "safe"),
        "advbench": column("advbench_harmful_behaviors.csv", "goal"),
        "ordinary answers": [row["output"] for row in alpaca],
        "complying openings": column("advbench_harmful_behaviors.csv", "target"),
    }


def generated(draw: random.Random) -> dict[str, list[str]]:
    """Texts for a smoke test."""
    words = "the a river house tells people often about green small things".split()
    suites = ("xstest safe", "xstest unsafe", "advbench", "ordinary answers", "complying openings")
    return {suite: [" ".join(draw.choices(words, k=60)) for _ in range(SMOKE_ROWS)] for suite in suites}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with safety/ and formats/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    draw = random.Random(0)
    if options.data is None and not options.smoke:
        parser.error("--data names the folder of the suites")
    texts = generated(draw) if options.smoke else read(options.data)
    result = {"benchmark": "guardrails", **tables(texts, draw)}
    print(json.dumps(result, indent=1), file=sys.stderr)
    print(json.dumps(record.keep(result, options.out)))


if __name__ == "__main__":
    main()
