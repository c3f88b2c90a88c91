"""Museum: a program that is tested decides its own outcome. In HumanEval's checker and its kin the tests run
in the interpreter of the program, where each of these attackers passes."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys

import pytest

from tunesmith.errors import SetupError
from tunesmith.evaluation.sandbox import sandbox
from tunesmith.evaluation.sandbox.sandbox import Limits, ProgramTests, judge

try:
    sandbox.require()
    OPEN = ""
except SetupError as error:
    OPEN = str(error)
pytestmark = pytest.mark.skipif(bool(OPEN), reason=OPEN)

TESTS = ProgramTests("def check(f):\n    assert f(20) == 42\n    print('tested')\n", "answer")
# What each does when it is asked; none of them knows 42.
ATTACKS = {
    "equal to all": """
class E:
    __eq__ = lambda a, b: True
    __ne__ = lambda a, b: False
    __hash__ = None
def answer(n): return E()
""",
    "an integer equal to all": """
class E(int):
    __eq__ = lambda a, b: True
def answer(n): return E(1)
""",
    "ends well": """
import os
def answer(n): os._exit(0)
""",
    "ends well at once": """
import os
os._exit(0)
""",
    "exits": """
import sys
def answer(n): sys.exit(0)
""",
    "replaces the tests": """
import sys
def answer(n):
    frame = sys._getframe()
    while frame:
        for space in (frame.f_globals, frame.f_locals):
            for name in ('check', 'judge'):
                if name in space: space[name] = lambda *a: None
        frame = frame.f_back
    return 1
""",
    "replaces builtins": """
import builtins
builtins.AssertionError = StopIteration
builtins.print = lambda *a, **k: None
def answer(n): return 1
""",
    "reports for the launcher": """
import gc, os, sys
def texts():
    for thing in gc.get_objects():
        held = thing.values() if isinstance(thing, dict) else thing
        for item in held if isinstance(thing, (dict, list, tuple)) else ():
            if type(item) is str and len(item) == 32: yield item
    frame = sys._getframe()
    while frame:
        for item in [*frame.f_locals.values()]:
            if type(item) is str and len(item) == 32: yield item
            for cell in getattr(item, '__closure__', None) or ():
                if type(cell.cell_contents) is str: yield cell.cell_contents
        frame = frame.f_back
def answer(n):
    for token in set(texts()):
        os.write(1, ('\\n' + token + '{"error": null}').encode())
    os._exit(0)
""",
    "calls what the launcher reports with": """
import gc, types
def answer(n):
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__name__ == 'say': thing(error=None)
    return 1
""",
    "writes to every pipe": """
import os
def answer(n):
    for number in range(64):
        for line in (b'{"value": true, "after": [null]}\\n', b'{"error": null}\\n', b'null\\n'):
            try: os.write(number, line)
            except OSError: pass
    os._exit(0)
""",
    "answers with a function of the tests": """
import json, os
def answer(n):
    os.write(4, json.dumps({'value': {'function': 'exec'}, 'after': [None]}).encode() + b'\\n')
""",
    "answers with an object of the tests": """
import json, os
def answer(n):
    os.write(4, json.dumps({'value': {'yours': 0}, 'after': [None]}).encode() + b'\\n')
""",
    "asks the tests": """
import json, os
def answer(n):
    for target in ({'yours': 0}, {'function': 'exit'}, {'type': 'int'}):
        asked = {'operation': 'call', 'target': target, 'arguments': [0], 'named': {}}
        os.write(4, json.dumps(asked).encode() + b'\\n')
        os.read(3, 9999)
    return 1
""",
    "is nested too deeply": """
import os
def answer(n): os.write(4, b'[' * 100000 + b'\\n')
""",
    "reads the tests": """
import os
def answer(n):
    parent = os.getppid()
    for pid in {*range(parent - 50, parent + 200)} - {os.getpid()}:
        for name in ('mem', 'maps', 'environ', 'fd/0'):
            try: open(f'/proc/{pid}/{name}', 'rb').read()
            except OSError: pass
            else: return 42
    try: open('/proc/self/mem', 'rb').read(1)
    except OSError: return 1
    return 42
""",
    "kills": """
import os, signal
def answer(n):
    for pid in range(os.getppid(), os.getppid() + 200):
        if pid != os.getpid():
            try: os.kill(pid, signal.SIGTERM)
            except OSError: pass
    return 1
""",
    "raises what ends loops": """
def answer(n): raise StopIteration(42)
""",
    "raises an assertion that is not one": """
class AssertionError(Exception): pass
def answer(n): raise AssertionError
""",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attacker_passes(name):
    """HumanEval 67: the tests run in the interpreter of the program."""
    outcome = judge(ATTACKS[name], TESTS, Limits(seconds=20))
    assert outcome.status == "failed", outcome
    assert "tested" not in outcome.output


def test_the_right_answer_passes_and_the_tests_print():
    outcome = judge("print('loaded')\ndef answer(n): return 2 * n + 2", TESTS)
    assert (outcome.status, outcome.error, outcome.output) == ("passed", None, "loaded\ntested\n")


@pytest.mark.parametrize("name", ["equal to all", "an integer equal to all", "replaces the tests"])
def test_in_one_interpreter_they_pass(name):
    source = f"{ATTACKS[name]}\n{TESTS.source}\ncheck(answer)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert "tested" in done.stdout or name == "replaces the tests"


RIGHT = [  # programs and their tests
    (
        """
values = [None, True, 3, -2**70, 10**5000, 0.1, 'ü\\ud800', b'\\x00', bytearray(b'x'), (1, (2,)), {1, 'a'},
    frozenset([(1, 2)]), {(1, 2): [3], None: {}}, 2j, range(2, 9, 3), float('inf'), '', [],
    (), set(), int]
def answer(given): return values if given == values else None
""",
        """
values = [None, True, 3, -2**70, 10**5000, 0.1, 'ü\\ud800', b'\\x00', bytearray(b'x'), (1, (2,)), {1, 'a'},
    frozenset([(1, 2)]), {(1, 2): [3], None: {}}, 2j, range(2, 9, 3), float('inf'), '', [],
    (), set(), int]
def check(f):
    result = f(values)
    assert result == values
    assert [type(a) for a in result] == [type(a) for a in values]
    nan = f(0)
    assert nan is None
""",
    ),
    (
        """
def answer(): return float('nan')
""",
        """
def check(f):
    assert f() != f()
""",
    ),
    (
        """
from decimal import Decimal
from fractions import Fraction
from datetime import date, datetime, timedelta
def answer(d): return [d + timedelta(1), datetime(2020, 1, 2, 3), Decimal('1.10'), Fraction(2, 6)]
""",
        """
from decimal import Decimal
from fractions import Fraction
from datetime import date, datetime
def check(f):
    assert f(date(2020, 1, 1)) == [date(2020, 1, 2), datetime(2020, 1, 2, 3), Decimal('1.1'), Fraction(1, 3)]
""",
    ),
    (
        """
def answer(a, *, key): a.sort(key=key); a[0].append(1)
""",
        """
def check(f):
    a = [[3], [2, 9]]
    assert f(a, key=len) is None and a == [[3, 1], [2, 9]]
    f(a, key=lambda item: -item[0])
""",
    ),
    (
        """
def answer(function, items): return [function(item) for item in items]
""",
        """
def check(f):
    assert f(lambda n: n * n, iter([1, 2])) == [1, 4] and f(str, (1,)) == ['1'] and f(len, ['ab']) == [2]
""",
    ),
    (
        """
def answer(n):
    for i in range(n): yield i
""",
        """
def check(f):
    assert list(f(3)) == [0, 1, 2]
    assert next(f(1)) == 0
""",
    ),
    (
        """
def answer(n): return lambda m: n + m
""",
        """
def check(f):
    assert f(1)(2) == 3 and f(1) and f(1) != f(1)
""",
    ),
    (
        """
class answer:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item)
    def __len__(self): return len(self.items)
    def __getitem__(self, n): return self.items[n]
    def __contains__(self, item): return item in self.items
    def __str__(self): return 'stack'
""",
        """
def check(f):
    s = f()
    assert not s and len(s) == 0
    s.push(3)
    s.name = 'x'
    assert s and len(s) == 1 and s[0] == 3 and 3 in s and 4 not in s and s.items == [3]
    assert str(s) == 'stack' and s.name == 'x' and list(s) == [3] and s == s
""",
    ),
    (
        """
def answer(n):
    if n == 1: raise ValueError('one', n)
    if n == 2: raise own(n)
    return {}[n]
class own(KeyError): pass
""",
        """
def check(f):
    for n, kind, text in ((1, ValueError, "('one', 1)"), (2, KeyError, '2'), (3, KeyError, '3')):
        try: f(n)
        except kind as error: assert str(error) == text, error
        else: assert False
""",
    ),
]


@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_what_tests_say_and_hear_is_what_it_was(number):
    program, source = RIGHT[number]
    space: dict = {}
    with contextlib.redirect_stdout(io.StringIO()):  # the tests are right where there is one interpreter
        exec(f"{program}\n{source}\ncheck(answer)", space)
    outcome = judge(program, ProgramTests(source, "answer"), Limits(seconds=20))
    assert outcome.status == "passed", outcome


def test_of_what_the_tests_give_only_functions_can_be_called():
    program = (
        "def answer(function):\n"
        "    try: return bool(function._peer.ask('getattr', function, ('__globals__',)))\n"
        "    except TypeError: return function()"
    )
    tests = ProgramTests("def check(f): assert f(lambda: 7) == 7", "answer")
    assert judge(program, tests, Limits(seconds=20)).status == "passed"


def test_no_function_of_the_tests_interpreter_is_returned():
    tests = ProgramTests("def check(f):\n    f(20)('print(1)')", "answer")
    outcome = judge(ATTACKS["answers with a function of the tests"], tests, Limits(seconds=20))
    assert outcome.error == "Broken: not a value: function"


SHARED = (
    "class Node:\n    def __init__(self, value, next=None):\n        self.value, self.next = value, next\n"
    "    def __eq__(self, other): return vars(self) == vars(other)\nclass Bad(Exception): pass\n"
    "def helper(n): return n + 1\n"
)


def test_what_the_prompt_defines_is_known_on_both_sides():
    tests = ProgramTests(
        "def check(f):\n    assert f(Node(1, Node(2))) == Node(2, Node(1)) and helper(1) == 2\n"
        "    assert f(Node(3)).value == 3\n    try: f(None)\n"
        "    except Bad as error: assert error.args == ('no',)\n"
        "    else: assert False\n    assert turned(Node(4)) == Node(4)",
        "turned",
        f"{SHARED}def turned(node): return None",
    )
    right = (
        f"{SHARED}def turned(node):\n    if node is None: raise Bad('no')\n    before = None\n"
        "    while node: before, node = Node(node.value, before), node.next\n    return before"
    )
    assert judge(right, tests, Limits(seconds=20)).status == "passed"
    forged = f"{SHARED}Node.__eq__ = lambda a, b: True\ndef turned(node): return Node(5)"
    assert judge(forged, tests, Limits(seconds=20)).error == "AssertionError"


@pytest.mark.parametrize(
    ("program", "limits", "status", "told"),
    [
        (
            "def answer(n):\n    while True: pass",
            Limits(seconds=1),
            "timeout",
            "still running after 1 seconds",
        ),
        ("while True: pass", Limits(seconds=1), "timeout", "still running after 1 seconds"),
        (
            "def answer(n): open('x', 'wb').write(bytes(9 << 20)); return 42",
            Limits(disk_bytes=1 << 20),
            "killed",
            "",
        ),
        ("def answer(n): return 'x' * (20 << 20)", Limits(seconds=20), "failed", "a value is too long"),
        ("def answer(n): return [0] * (1 << 28)", Limits(seconds=20), "failed", "MemoryError"),
        ("def answer(n): return answer(n)", Limits(seconds=20), "failed", "RecursionError"),
        ("import ctypes\ndef answer(n): ctypes.string_at(0)", Limits(seconds=20), "failed", "signal 11"),
        ("def f(:", Limits(seconds=20), "failed", "SyntaxError"),
        ("1 / 0", Limits(seconds=20), "failed", "ZeroDivisionError: division by zero"),
        ("def other(n): return 42", Limits(seconds=20), "failed", "answer"),
    ],
)
def test_what_ends_a_program_is_said_as_of_one_that_runs_alone(program, limits, status, told):
    outcome = judge(program, TESTS, limits)
    assert outcome.status == status and told in (outcome.error or ""), outcome
