"""How long does an audit take, and how much memory? Through the command line, on generated rows and on real
ones.

The rows are labelled conversations with words drawn by the Zipf-Mandelbrot law, about as long as those of the
reference set, one in a hundred a copy, one in a hundred a copy with two words changed, one in a thousand with
a key in it. Seconds are of the whole command, start and page included. Memory is the highest sum over all its
processes, sampled: on Linux their proportional share of what is resident (pages that several map count once),
elsewhere all that is resident.

    python bench/audit.py --out bench/results/audit.json
    python bench/audit.py --rows 1000 --data rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import record
import small

PLANTED = {"copies": 100, "near": 100, "keys": 1000}  # one in so many rows
BARS = {1_000: (10.0, None), 200_000: (180.0, 2e9)}  # rows: seconds, bytes


def generate(path: Path, rows: int, seed: int = 0) -> dict[str, int]:
    """Writes ``rows`` rows; how many of each kind were planted."""
    random = np.random.Generator(np.random.PCG64(seed))
    parts = "ka lo mi ter sun ra ven dor pi sha lun ex qua zen hol bri".split()
    words = np.array(["".join(random.choice(parts, random.integers(1, 5))) for _ in range(30_000)])
    shares = np.cumsum(
        (np.arange(len(words)) + 2.7) ** -1.05
    )  # Mandelbrot's form: the first word is 6 % of a text
    planted = dict.fromkeys(PLANTED, 0)
    before: list[list[str]] = []

    def text(length: int) -> list[str]:
        return words[np.searchsorted(shares, random.uniform(0, shares[-1], length))].tolist()

    with path.open("w", encoding="utf-8") as out:
        for row in range(rows):
            asked, said = text(random.integers(8, 60)), text(random.integers(40, 230))
            if before and row % PLANTED["copies"] == 1:
                asked, said = before[row % len(before)]
                planted["copies"] += 1
            elif before and row % PLANTED["near"] == 2:
                asked, said = before[row % len(before)]
                said = [*said[:-2], *text(2)]
                planted["near"] += 1
            elif len(before) < 1000:
                before.append([asked, said])
            if row % PLANTED["keys"] == 3:
                said = [
                    *said,
                    "ghp_" + "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz0123456789"), 36)),
                ]
                planted["keys"] += 1
            turns = [
                {"role": "user", "content": " ".join(asked)},
                {"role": "assistant", "content": " ".join(said) + "."},
            ]
            out.write(json.dumps({"conversations": turns, "label": bool(random.random() < 0.75)}) + "\n")
    return planted


def measure(path: Path, folder: Path) -> dict[str, Any]:
    """One audit from the command line."""
    words = [sys.executable, "-m", "tunesmith", "audit", str(path), "--html", str(folder / "audit.html")]
    started = time.perf_counter()
    with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)
    if process.returncode not in (0, 3):
        raise SystemExit((folder / "err.txt").read_text())
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "peak_bytes": peak,
        "exit": process.returncode,
    }


def _resident(pid: int) -> int:
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_full_info().pss if psutil.LINUX else process.memory_info().rss
    except psutil.Error:  # it ended meanwhile
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=list(BARS))
    parser.add_argument("--data", type=Path, help="also these rows")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help=small.HELP)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "audit", "runs": []}
    failed = False
    with small.inputs(options, rows=[50]) as folder:
        options.data = None if options.smoke else options.data
        for rows in options.rows:
            path = folder / f"generated-{rows}.jsonl"
            planted = generate(path, rows)
            run = {"rows": rows, "bytes": path.stat().st_size, "planted": planted, **measure(path, folder)}
            seconds, room = BARS.get(rows, (float("inf"), None))
            run["met"] = run["seconds"] < seconds and (room is None or run["peak_bytes"] < room)
            failed |= not run["met"]
            result["runs"].append(run)
            print(json.dumps(run), file=sys.stderr)
            path.unlink()
        if options.data:
            data = Path(options.data)
            run = {"data": data.name, **measure(data.resolve(), folder)}
            result["runs"].append(run)
            print(json.dumps(run), file=sys.stderr)
        print(json.dumps(record.keep(result, options.out)))
    sys.exit(failed)


if __name__ == "__main__":
    main()
