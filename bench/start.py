"""How long do ``import tunesmith`` and ``tunesmith --help`` take, and how much memory?

Each in a fresh process, in turn with Python alone. A process reports at least the memory of the one that
started it, so this script imports little.

    python bench/start.py --out bench/results/start.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import small

COMMANDS = {
    "python": ["-c", "pass"],
    "import tunesmith": ["-c", "import tunesmith"],
    "tunesmith --help": ["-m", "tunesmith", "--help"],
}
BAR_S, BAR_BYTES = 0.5, 40e6  # of the help


def measure(words: list[str]) -> tuple[float, int]:
    """(seconds, highest resident bytes) of a process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    scale = 1024 if sys.platform == "linux" else 1
    return time.perf_counter() - start, usage.ru_maxrss * scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    rounds = [
        {name: measure(words) for name, words in COMMANDS.items()}
        for _ in range(1 if options.smoke else options.rounds)
    ]
    commands: dict[str, Any] = {
        name: {
            "seconds": statistics.median(measured[name][0] for measured in rounds),
            "peak_bytes": max(measured[name][1] for measured in rounds),
        }
        for name in COMMANDS
    }
    of_help = commands["tunesmith --help"]
    met = of_help["seconds"] < BAR_S and of_help["peak_bytes"] < BAR_BYTES
    for name, taken in commands.items():
        print(f"{name:18}{taken['seconds']:6.3f} s {taken['peak_bytes'] / 1e6:6.1f} MB", file=sys.stderr)
    result = {"benchmark": "start", "commands": commands, "bar_s": BAR_S, "bar_bytes": BAR_BYTES, "met": met}
    print(json.dumps(record.keep(result, options.out)))
    sys.exit(not met and not options.smoke)


if __name__ == "__main__":
    main()
