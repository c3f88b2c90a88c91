"""Does hostile or huge input end within a bound of time?

The tests that feed such input to the audit, the readers, the constraints and the sandbox assert what is
found. How long they may take is asserted here, because it depends on the machine and on its load. A bound
is a generous multiple of the time on two quiet cores: it catches work that became quadratic.

    python bench/bounds.py --out bench/results/bounds.json
    python bench/bounds.py --smoke
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import record

ROOT = Path(__file__).parents[1]
REPEATS = "tests/auditing/rules/test_repeats.py"
ADHERENCE, SANDBOX = "tests/evaluation/tasks/test_adherence.py", "tests/evaluation/sandbox/test_sandbox.py"
SMOKE = f"{REPEATS}::test_five_thousand_answers_to_one_prompt_make_three_findings"
BOUNDS = {
    SMOKE: 3.0,
    "tests/data/test_calls.py::test_huge_and_hostile_texts_are_read": 60.0,
    "tests/auditing/test_audit.py::test_a_hostile_row_leaves_its_neighbours_alone": 30.0,
    "tests/auditing/test_audit.py::test_the_reference_set_shows_what_is_known_of_it": 30.0,
    "tests/auditing/rules/test_content.py::test_ten_million_letters_are_looked_at_in_part": 3.0,
    "tests/auditing/rules/test_structure.py::test_no_schema_can_hold_up_the_audit": 5.0,
    f"{ADHERENCE}::test_a_pattern_that_takes_too_long_does_not_hold_and_is_shown_so": 2.0,
    f"{SANDBOX}::test_limits_and_outcomes": 15.0,
    f"{SANDBOX}::test_many_at_once_keep_apart": 10.0,
}
"""Test → seconds that each of its cases may take, set-up included."""


def durations(tests: list[str]) -> dict[str, list[float]]:
    """Test → seconds of each of its cases. Raises SystemExit if a test fails or does not exist."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stdout)
        cases = list(xml.parse(report).iter("testcase"))
    found: dict[str, list[float]] = {test: [] for test in tests}
    for case in cases:
        module, name = case.attrib["classname"], case.attrib["name"].partition("[")[0]
        found[f"{module.replace('.', '/')}.py::{name}"].append(float(case.attrib["time"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one test only, and a missed bound is no failure"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tests: dict[str, Any] = {}
    for test, seconds in durations([SMOKE] if options.smoke else [*BOUNDS]).items():
        longest = max(seconds, default=0.0)
        tests[test] = {
            "cases": len(seconds),
            "longest_s": longest,
            "bound_s": BOUNDS[test],
            "met": longest <= BOUNDS[test],
        }
        word = "met" if tests[test]["met"] else "MISSED"
        print(f"{word:<7}{longest:6.1f} of {BOUNDS[test]:g} s  {test}", file=sys.stderr)
    print(json.dumps(record.keep({"benchmark": "bounds", "tests": tests}, options.out)))
    sys.exit(not options.smoke and not all(test["met"] for test in tests.values()))


if __name__ == "__main__":
    main()
