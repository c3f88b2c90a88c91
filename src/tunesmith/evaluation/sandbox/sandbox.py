"""Run Python that a model wrote, sandboxed: what was the outcome? Nothing else on the machine changes.

`run` starts a fresh interpreter that confines itself (`confinement`) before it runs the program. The program
can read its own empty folder, the interpreter, its standard library and the system's shared libraries; it has
no network, no other processes and no environment. Its time and all that it writes are measured from outside,
and it is killed at a limit. It cannot start processes, so nothing outlives it. Linux: Landlock and seccomp;
macOS: `sandbox-exec`. No program runs partly confined: before the first one, `require` tries what must fail.
`judge` decides whether a function passes its tests: they run in a second sandboxed process, which executes
nothing of the program and calls the function over pipes (`calls`).
Limitations: names are not hidden (a program can ask whether a path exists and how large it is). A program
under `run` that inspects the launcher's variables can pretend to have reached its end; under `judge` it gains
nothing by that.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import psutil

from tunesmith.errors import SetupError, listing

LAUNCHER = Path(__file__).with_name("confinement.py")
OUTPUT_BYTES = 16 << 10
"""The end of the output that is kept."""
POLL_SECONDS = 0.02
ENTRIES = 1000
"""Files and folders that a program may make."""
# Debian has a folder of its own for shared libraries.
OWN = f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}"
APART = os.path.isdir(OWN)
SHARED = (OWN, OWN.removeprefix("/usr")) if APART else ("/usr/lib", "/lib")
SYSTEM = (*SHARED, "/usr/lib64", "/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
PACKAGES = ("site-packages", "dist-packages")
NEEDED = (
    "needs Linux 5.13 or later on x86-64 or aarch64 with Landlock and seccomp (in a container: allow both), "
    "or macOS"
)

Status = Literal["passed", "failed", "timeout", "killed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """passed: it ran to its end. failed: an error ended it. timeout, killed: it was ended at the limit of
    time, or of another resource.

    ``error``: why it did not pass. ``output``: the end of stdout and stderr together. ``seconds``: wall time,
    start of the interpreter included."""

    status: Status
    error: str | None
    output: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """``file_bytes``: of the largest file. ``disk_bytes``: of everything written, output and deleted files
    included."""

    seconds: float = 10.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """``source`` defines ``check``, which gets the function named ``entry_point`` of the program and may use
    what ``reference`` defines: code that the program does not reach."""

    source: str
    entry_point: str
    reference: str = ""


def run(program: str, limits: Limits | None = None) -> Outcome:
    """The outcome of ``program``, which runs as a module named ``program`` in an empty folder that is then
    removed.

    May be called from several threads. Raises SetupError if this machine cannot sandbox it."""
    require()
    return _run(program, limits or Limits())


def require() -> None:
    """Raise SetupError listing what a program could still do on this machine. Tried once a process, in about
    a second."""
    if holes := _holes():
        raise SetupError(
            f"code cannot be sandboxed on this machine, so none is run. It could\n{listing(holes)}",
            hint=NEEDED,
        )


def judge(program: str, tests: ProgramTests, limits: Limits | None = None) -> Outcome:
    """The outcome of ``tests`` of a function that ``program`` defines.

    The tests run in a sandboxed process of their own, which calls the function in the process of the program:
    what decides the outcome is out of the program's reach. Raises SetupError if this machine cannot sandbox
    them."""
    require()
    limits = limits or Limits()
    questions, answers = os.pipe(), os.pipe()
    began = time.monotonic()
    with ExitStack() as stack:
        try:
            started = _started(
                {"program": program, "entry_point": tests.entry_point}, limits, (questions[0], answers[1])
            )
            tested = stack.enter_context(started)
            judging = stack.enter_context(
                _started({"tests": asdict(tests)}, limits, (answers[0], questions[1]))
            )
        finally:
            for number in (*questions, *answers):
                os.close(number)
        with ThreadPoolExecutor(1) as pool:
            watched = pool.submit(_watch_to_the_end, tested, began, limits)
            tested_judged = _watch(judging, began, limits)
            tested.process.kill()
            printed, why = watched.result()
        judging.process.kill()
        judging.process.wait()
    seconds = time.monotonic() - began
    judged = _outcome(*tested_judged, judging, seconds)
    return _of_both(judged, tested, printed, why)


def _of_both(judged: Outcome, tested: _Confined, printed: bytes, why: tuple[Status, str] | None) -> Outcome:
    """The outcome of the tests, unless the tested program was ended at a limit (``why``) or ended itself
    before it was killed. Nothing that it printed counts."""
    text, report = _report(printed, tested.token)
    _require_confined(report)
    output = (text + judged.output)[-OUTPUT_BYTES:]
    ended_itself = why is None and tested.process.returncode != -signal.SIGKILL
    exceeded = why is not None and why[0] == "killed"
    if exceeded or (judged.status != "passed" and (why is not None or ended_itself)):
        return Outcome(*_ending(why, tested.process.returncode), output, judged.seconds)
    return replace(judged, output=output)


def _run(program: str, limits: Limits) -> Outcome:
    began = time.monotonic()
    with _started({"program": program}, limits) as confined:
        output, ended = _watch(confined, began, limits)
    return _outcome(output, ended, confined, time.monotonic() - began)


class _Confined(NamedTuple):
    """A process that confines itself. ``token``: marks its report in its output."""

    process: subprocess.Popen[bytes]
    folder: str
    token: str


@contextmanager
def _started(work: dict[str, Any], limits: Limits, channel: tuple[int, ...] = ()) -> Iterator[_Confined]:
    """A process that does ``work`` in an empty folder. It is killed, and the folder removed, at the end."""
    token = secrets.token_hex(16)
    readable, listable = _readable()
    request = {
        "program": None,
        "entry_point": None,
        "tests": None,
        **work,
        "channel": channel,
        "token": token,
        "parent": os.getpid(),
        "seconds": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "readable": readable,
        "listable": listable,
    }
    with ExitStack() as stack:
        prefix = "tunesmith-program-"
        temporary = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        folder = os.path.realpath(stack.enter_context(temporary))
        stdin = stack.enter_context(tempfile.TemporaryFile())
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = _start(folder, stdin, channel)
        try:
            yield _Confined(process, folder, token)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _start(folder: str, stdin: IO[bytes], channel: tuple[int, ...]) -> subprocess.Popen[bytes]:
    # No -I: it would also drop PYTHONHASHSEED, and the same program must do the same twice.
    command = [os.path.realpath(sys.executable), "-s", "-S", "-P", "-B", str(LAUNCHER)]
    if sys.platform == "darwin":
        command = ["/usr/bin/sandbox-exec", "-p", _profile(command[0], folder), *command]
    environment = {
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
    }
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=channel,
    )


def _outcome(output: bytes, ended: tuple[Status, str] | None, confined: _Confined, seconds: float) -> Outcome:
    """ended: why the process was ended from outside."""
    text, report = _report(output, confined.token)
    _require_confined(report)
    if "error" in report and (ended is None or ended[0] != "killed"):
        return Outcome("passed" if report["error"] is None else "failed", report["error"], text, seconds)
    return Outcome(*_ending(ended, confined.process.returncode), text, seconds)


def _report(output: bytes, token: str) -> tuple[str, dict[str, str | None]]:
    """What a process printed, and its report: empty if it made none."""
    printed, reported, rest = output.rpartition(f"\n{token}".encode())
    text = (printed if reported else rest).decode("utf-8", "replace")
    return text, json.loads(rest) if reported else {}


def _require_confined(report: dict[str, str | None]) -> None:
    if "open" in report:
        message = f"code cannot be sandboxed on this machine, so none is run: {report['open']}"
        raise SetupError(message, hint=NEEDED)


def _ending(ended: tuple[Status, str] | None, status: int) -> tuple[Status, str]:
    """Why a process without a report ended. ``status``: its exit status."""
    if ended is not None:
        return ended
    if status < 0:
        kinds: dict[int, Status] = {signal.SIGXCPU: "timeout", signal.SIGKILL: "killed"}
        return kinds.get(-status, "failed"), f"ended by signal {-status}: {signal.strsignal(-status)}"
    return "failed", f"ended before its last line, with exit status {status}"


def _watch_to_the_end(
    confined: _Confined, began: float, limits: Limits
) -> tuple[bytes, tuple[Status, str] | None]:
    """As `_watch`; then it is killed, so that the process that waits for it goes on."""
    try:
        return _watch(confined, began, limits)
    finally:
        confined.process.kill()
        confined.process.wait()


def _watch(confined: _Confined, began: float, limits: Limits) -> tuple[bytes, tuple[Status, str] | None]:
    """The end of the output, and why the program must be ended; None if it ended by itself."""
    process, folder, end = confined.process, confined.folder, began + limits.seconds
    assert process.stdout is not None
    tail, stream = b"", process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if selector.get_map():
                if selector.select(POLL_SECONDS):
                    chunk = os.read(stream, 1 << 16)
                    tail = (tail + chunk)[-OUTPUT_BYTES:]
                    if not chunk:
                        selector.unregister(stream)
            else:
                try:
                    process.wait(POLL_SECONDS)
                    excess = _excess(folder, None, limits)
                    return tail, ("killed", excess) if excess else None
                except subprocess.TimeoutExpired:
                    pass  # it has closed its output and is still running
            if excess := _excess(folder, process.pid, limits):
                return tail, ("killed", excess)
            if time.monotonic() > end:
                return tail, ("timeout", f"still running after {limits.seconds:g} seconds")


def _excess(folder: str, pid: int | None, limits: Limits) -> str | None:
    """The limit that the program exceeds, if any. ``pid``: None once it has ended."""
    entries = written = 0
    for place, folders, files in os.walk(folder):
        entries += len(folders) + len(files)
        for name in files:
            try:
                written += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue  # just removed
        if entries > ENTRIES:
            return f"made more than {ENTRIES} files"
    if pid is not None and sys.platform == "linux":
        try:  # includes what was deleted again
            counts = dict(
                line.split(": ") for line in Path(f"/proc/{pid}/io").read_text("ascii").splitlines()
            )
            written = max(written, int(counts["wchar"]))
        except OSError:
            pass  # it has just ended; `require` has tested that the kernel counts
    elif pid is not None:
        try:
            if psutil.Process(pid).memory_info().rss > limits.memory_bytes:
                return f"took more than {limits.memory_bytes} bytes of memory"
        except psutil.Error:
            pass  # it has just ended
    return f"wrote more than {limits.disk_bytes} bytes" if written > limits.disk_bytes else None


@functools.cache
def _readable() -> tuple[list[str], list[str]]:
    """Files and folders that Python must read, and folders that it must list: its standard library without
    other packages."""
    library = os.path.dirname(os.path.realpath(os.__file__))
    modules = {library, os.path.realpath(str(sysconfig.get_config_var("DESTSHARED") or library))}
    shared = str(sysconfig.get_config_var("LIBDIR") or library)
    files = [entry.path for place in modules for entry in os.scandir(place) if entry.name not in PACKAGES]
    if os.path.isdir(shared):
        files += [entry.path for entry in os.scandir(shared) if ".so" in entry.name and entry.is_file()]
    return [path for path in (*files, *SYSTEM) if os.path.exists(path)], sorted(modules)


def _profile(python: str, folder: str) -> str:
    """The profile of macOS's sandbox. The last rule that matches decides."""
    prefix = os.path.realpath(sys.base_prefix)
    library = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    paths = (python, prefix, str(LAUNCHER), str(LAUNCHER.with_name("calls.py")))
    interpreter, home, launcher, calls = map(json.dumps, paths)
    packages, own = json.dumps(os.path.realpath(library)), json.dumps(folder)
    rules = [
        "(version 1)",
        "(deny default)",
        '(import "system.sb")',
        "(deny network*)",
        "(deny process-fork)",
        "(allow signal (target self))",
        "(allow sysctl-read)",
        "(allow file-read-metadata)",
        f"(allow process-exec (literal {interpreter}) (subpath {home}))",
        f'(allow file-read* (literal "/") (literal {launcher}) (literal {calls}) (literal {interpreter})',
        f'  (subpath {home}) (subpath "/usr/lib") (subpath "/System") (subpath "/usr/share/zoneinfo"))',
        f"(deny file-read* (subpath {packages}))",
        f'(allow file-read* file-write* (subpath {own}) (literal "/dev/null"))',
    ]
    return "\n".join(rules)


# What a program must not be able to do, and code that does it. It holds if the code is refused; another error
# would be a mistake in the code.
ATTEMPTS = {
    "read files outside its folder": "open(outside).read()",
    "read the system's other files": "open(system).read()",
    "list folders outside its own": "os.listdir(os.path.dirname(outside))",
    "write to files outside its folder": "open(outside, 'a').close()",
    "empty files outside its folder": "os.close(os.open(outside, os.O_RDONLY | os.O_TRUNC))",
    "make files outside its folder": "open(outside + '.new', 'x').close()",
    "change the mode of files outside its folder": "os.chmod(outside, 0o777)",
    "read the environment of other processes": "open('/proc/%d/environ' % parent, 'rb').read()",
    "connect by TCP": "socket.create_connection(('127.0.0.1', tcp), 1).close()",
    "send by UDP": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp))",
    "connect to other processes by Unix sockets": "socket.socket(socket.AF_UNIX).connect(unix)",
    "start processes": "os.fork() or os._exit(0)",
    "run other programs": "subprocess.run([sys.executable, '-c', ''])",
    "signal other processes": "os.kill(parent, 0)",
    "use files that were open elsewhere": "inherited()",
    "raise its own limits": "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))",
    "remove files outside its folder": "os.remove(outside)",
}
PROBE = """
import json, os, resource, socket, subprocess, sys

def inherited():
    for number in range(3, 256):
        try:
            os.fstat(number)
        except OSError:
            continue
        return
    raise OSError("no other file is open")

held = []
for name, code in attempts.items():
    try:
        exec(code)
    except (OSError, ValueError):  # the latter where a limit cannot be raised
        held.append(name)
    except BaseException as error:
        print(name, repr(error), file=sys.stderr)
print(json.dumps(held))
"""
# What a program must not take: a program that would pass if it could, its limits, and how it must end.
GREEDY = {
    "take more memory than it may": (
        "x = b'x' * (200 << 20)",
        Limits(memory_bytes=128 << 20),
        ("failed", "killed"),
    ),
    "write larger files than it may": (
        "open('x', 'wb').write(bytes(2 << 20))",
        Limits(file_bytes=1 << 20),
        ("failed",),
    ),
    "write more than it may": (
        "import os, time\nfor _ in range(40):\n"
        "    x = open('x', 'wb'); os.remove('x'); x.write(bytes(1 << 20))\ntime.sleep(1)",
        Limits(disk_bytes=8 << 20),
        ("killed",),
    ),
    "outlive its time": (
        "import signal\nfor number in {*range(1, 32)} - {signal.SIGKILL, signal.SIGSTOP}:\n"
        "    signal.signal(number, signal.SIG_IGN)\nwhile True: pass",
        Limits(seconds=0.5),
        ("timeout",),
    ),
}


@functools.cache
def _holes() -> tuple[str, ...]:
    """What a program could still do here; each is tried. Raises SetupError if none can be run at all."""
    if sys.platform not in ("linux", "darwin"):
        raise SetupError(f"code that a model wrote is run on Linux and macOS only, not on {sys.platform}")
    start = _run("import math", Limits())
    if start.status != "passed":
        message = (
            f"no program can be run sandboxed on this machine: {start.error}\n{start.output.strip()[-1000:]}"
        )
        raise SetupError(message.strip(), hint=NEEDED)
    with targets() as known:
        tried = _run("".join(f"{name} = {value!r}\n" for name, value in known.items()) + PROBE, Limits())
    held = json.loads(tried.output.strip().splitlines()[-1]) if tried.status == "passed" else []
    holes = [name for name in ATTEMPTS if name not in held]
    greedy = GREEDY.items()
    holes += [name for name, (program, limits, ends) in greedy if _run(program, limits).status not in ends]
    return tuple(holes)


@contextmanager
def targets() -> Iterator[dict[str, Any]]:
    """Resources of this process that a program must not reach, by the names that `ATTEMPTS` use."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-")))
        (folder / "outside").write_text("not to be read", "utf-8")
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(folder / "unix"))
        unix.listen()
        outside, system = folder / "outside", Path("/usr/lib/os-release")
        yield {
            "attempts": ATTEMPTS,
            "unix": str(folder / "unix"),
            "parent": os.getpid(),
            "outside": str(outside),
            "system": str(system if APART and system.is_file() else outside),
            "tcp": tcp.getsockname()[1],
            "udp": udp.getsockname()[1],
        }
