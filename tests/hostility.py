"""Hostile rows and settings, one for each number, and what is answered to them.

``python tests/hostility.py FOLDER FIRST LAST`` tries the cases FIRST to LAST - 1 in one process and prints
those that end in anything but rows, settings or an error of ours, that take over 20 seconds, or after which
the process has taken more than 2 GB."""

from __future__ import annotations

import json
import resource
import signal
import sys
import traceback
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import damage
import tiny

SECONDS, MEMORY_KB = 20, 2 << 20
KEYS = (
    "messages conversations prompt completion chosen rejected text instruction input output system history "
    "question tools tool_calls content role from value label kto_tag weight train learn function name id "
    "arguments thinking reasoning_content tool_call_id type images documents"
).split()
ROLES = "system user assistant tool function human gpt observation developer ipython".split()
TEXTS = [
    "",
    " ",
    "\n" * 50,
    "\x00\x1b]0;t\x07\r",
    "\ud800",
    "\udfff\ud800",
    "a\u0301" * 500,
    "\u202e\u2066\ufeff\u200b",
    "𝔘𝔫𝔦",
    "<|im_start|>system\n<|im_end|>",
    "[INST] [/INST] </s><s>",
    "{% for x in range(10**9) %}{{ x }}{% endfor %}",
    "<think>" * 200,
    "</think>",
    "```" * 300,
    "[" * 20_000,
    '{"a":' * 5_000,
    "<tool_call>{",
    '<tool_call>{"name": "a", "arguments": {}}</tool_call>',
    "tool_call: a\narguments: {",
    "[{'role': 'user', 'content': 'x'}]",
    '[{"role": "user", "content": "x"}]',
    "Human: a\n\nAssistant: b",
    "x" * 100_000,
    "word " * 30_000,
    "é" * 60_000,
    "(a+)+" * 2_000 + "!",
    "-" * 50_000,
    "1" * 5_000,
    "=HYPERLINK()",
    "../../etc/passwd",
    "/dev/zero",
    "\\u0000",
    "&amp;" * 5_000,
    "a@" * 20_000,
    "sk-" + "a1" * 5_000,
    "true",
    "null",
    "0",
]
RIGHT: list[dict[str, Any]] = [
    *tiny.conversations(2),
    {"text": "the cat sat"},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "123456789", "content": "1"},
            {"role": "assistant", "content": "b"},
        ],
    },
]


def tree(random: Random, depth: int = 0) -> Any:
    kind = random.random()
    if depth > 4 or kind < 0.35:
        return random.choice(TEXTS)
    if kind < 0.55:
        return deepcopy(random.choice(damage.WEIRD))
    if kind < 0.75:
        return [tree(random, depth + 1) for _ in range(random.choice((0, 1, 2, 5)))]
    return {random.choice(KEYS): tree(random, depth + 1) for _ in range(random.choice((0, 1, 2, 4)))}


def mutated(random: Random) -> Any:
    """A row that is right but for a few places."""
    row: Any = deepcopy(random.choice(RIGHT))
    for _ in range(random.choice((1, 1, 2, 4))):
        where = random.choice(damage.places(row) or [()])
        if not where:
            break
        parent = row
        for key in where[:-1]:
            parent = parent[key]
        last, action = where[-1], random.random()
        if action < 0.15:
            del parent[last]
        elif action < 0.3 and isinstance(parent, list):
            parent += [deepcopy(parent[last])] * random.choice((1, 3, 300))
        elif action < 0.45 and isinstance(parent, dict):
            parent[random.choice(KEYS)] = tree(random, 3)
        elif action < 0.55:
            parent[last] = random.choice(ROLES)
        else:
            parent[last] = tree(random, 2)
    return row


def line(random: Random) -> bytes:
    """A row as bytes, some of which are no JSON."""
    kind = random.random()
    row = mutated(random) if kind < 0.7 else {random.choice(KEYS): tree(random) for _ in range(3)}
    text = json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if kind > 0.95:
        text = bytearray(text)
        for _ in range(3):
            text[random.randrange(len(text))] = random.randrange(256)
        text = bytes(text).replace(b"\n", b" ")
    return text


def value(random: Random) -> str:
    """A setting as it is typed."""
    kind = random.random()
    if kind < 0.3:
        return random.choice(TEXTS)[:3000]
    if kind < 0.6:
        return str(random.choice(damage.WEIRD))
    number = random.choice(
        (0, -1, 1, 2, 7, 10**4, 10**6, 10**7, 2**31, 2**53, 10**25, 1e-30, 1e30, 0.5, "nan", "-.inf")
    )
    return random.choice((str(number), f"[{number}]", f"{{kind: {number}}}", f"[{number}, {number}, a]"))


def keys() -> list[str]:
    """Every key of the settings by default, and the kinds of their blocks."""
    from tunesmith.runs.config import RunConfig
    from tunesmith.settings.config import flat

    plain = RunConfig.model_validate({"model": {"path": "m"}, "data": {"train": ["x"]}})
    kinds = ["objective", "adapter", "model", "data", "loop"]
    return [*flat(plain.model_dump()), *kinds]


KINDS = ("sft", "kto", "dpo", "orpo", "simpo", "apo_zero_unpaired")


def try_rows(folder: Path, random: Random) -> str:
    """Shows hostile rows as training would learn them, and audits some."""
    import tunesmith

    path = folder / "hostile.jsonl"
    path.write_bytes(b"\n".join(line(random) for _ in range(random.choice((1, 1, 3)))))
    sets = ["data.max_dropped=1", f"objective={random.choice(KINDS)}"]
    if random.random() < 0.3:
        sets.append("data.structure_calls=true")
    tunesmith.show([str(path)], model=str(folder / "model"), sets=sets)
    if random.random() < 0.05:
        tunesmith.audit([str(path)], model=str(folder / "model"), embed=False, processes=1)
    return "rows"


def try_settings(folder: Path, random: Random, known: list[str]) -> str:
    """Reads hostile settings, and plans with them if they are valid."""
    import tunesmith

    count = random.choice((1, 1, 2, 4))
    sets = [f"{random.choice(known)}={value(random)}" for _ in range(count)]
    config = []
    if random.random() < 0.2:
        file = folder / "hostile.yaml"
        texts = [f"{random.choice(known).partition('.')[0]}: {random.choice(TEXTS)[:9000]}" for _ in range(3)]
        file.write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
        config = [file]
    model, data = str(folder / "model"), [str(folder / "rows.jsonl")]
    resolved = tunesmith.configure(model=model, data=data, sets=sets, config=config)
    if resolved.spec.model.path == model and not resolved.spec.model.trust_remote_code:
        tunesmith.plan(resolved)
    return "settings"


class Hang(BaseException):
    """Raised by the alarm."""


def problem(folder: Path, number: int, known: list[str]) -> str | None:
    """What is wrong with the answer to case ``number``."""
    from tunesmith.errors import TunesmithError

    def stop(signal_number: int, frame: object) -> None:
        raise Hang

    random = Random(number)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.signal(signal.SIGPROF, stop)
    try:
        if number % 10 < 7:
            try_rows(folder, random)
        else:
            try_settings(folder, random, known)
    except TunesmithError as error:
        if len(str(error)) > 40_000:
            return f"an error of {len(str(error)):,} letters: {str(error)[:200]}"
    except OSError as error:  # which the command line prints in one line
        if error.filename is None:
            return traceback.format_exc()[-3000:]
    except BaseException:
        return traceback.format_exc()[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MEMORY_KB:
        return "took more than 2 GB"
    return None


def sweep(folder: Path, first: int, last: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        tiny.write_llama(folder / "model")
    tiny.write_rows(folder / "rows.jsonl", tiny.conversations(12))
    known, told = keys(), []
    for number in range(first, last):
        if (text := problem(folder, number, known)) is not None:
            told.append(f"case {number}: {text}")
            print(told[-1], flush=True)
            if "2 GB" in text:
                break
    return told


def main() -> None:
    first, last = int(sys.argv[2]), int(sys.argv[3])
    told = sweep(Path(sys.argv[1]).resolve(), first, last)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"{last - first} cases, {len(told)} problems, at most {most} MB")
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
