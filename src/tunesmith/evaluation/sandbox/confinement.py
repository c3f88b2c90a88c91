"""The inside of `sandbox`: a fresh interpreter runs this file, which confines the process and then runs the
program that it was given; or the function of a program for tests in another such process, or those tests.

It reads a request (JSON) from its standard input, and imports only the standard library and `calls`. On Linux
it applies three restrictions that cannot be lifted again: limits of the process (setrlimit); Landlock, which
allows only listed files to be opened (docs.kernel.org/userspace-api/landlock.html); and a seccomp filter that
allows the system calls that a single Python process needs, so that there are no sockets, no new processes or
threads, no signals to others, no new folders and no changes of mode or owner. If a restriction cannot be
applied, it reports that and runs nothing. On macOS `sandbox-exec` has confined the process before it starts,
and only limits are set."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import importlib
import json
import linecache
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types
from collections.abc import Callable
from typing import IO, Any, NoReturn

OWN = os.path.dirname(__file__) + os.sep
NAME = "program.py"
CHANNEL = (3, 4)
"""File descriptors by which tests and program call each other."""

# Calls that a single process needs: number on x86-64, on aarch64 (None: it has none).
CALLS: dict[str, tuple[int, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "poll": (7, None),
    "lseek": (8, 62),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "pipe": (22, None),
    "select": (23, None),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "dup": (32, 23),
    "dup2": (33, None),
    "pause": (34, None),
    "nanosleep": (35, 101),
    "getitimer": (36, 102),
    "alarm": (37, None),
    "setitimer": (38, 103),
    "getpid": (39, 172),
    "sendfile": (40, 71),
    "exit": (60, 93),
    "uname": (63, 160),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "ftruncate": (77, 46),
    "getdents": (78, None),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "unlink": (87, None),
    "readlink": (89, None),
    "umask": (95, 166),
    "gettimeofday": (96, 169),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "getuid": (102, 174),
    "getgid": (104, 176),
    "geteuid": (107, 175),
    "getegid": (108, 177),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getgroups": (115, 158),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "arch_prctl": (158, None),
    "gettid": (186, 178),
    "time": (201, None),
    "futex": (202, 98),
    "sched_getaffinity": (204, 123),
    "getdents64": (217, 61),
    "set_tid_address": (218, 96),
    "restart_syscall": (219, 128),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "exit_group": (231, 94),
    "epoll_wait": (232, None),
    "epoll_ctl": (233, 21),
    "newfstatat": (262, 79),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22),
    "epoll_create1": (291, 20),
    "dup3": (292, 24),
    "pipe2": (293, 59),
    "getcpu": (309, 168),
    "renameat2": (316, 276),
    "getrandom": (318, 278),
    "statx": (332, 291),
    "rseq": (334, 293),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    # Only with the arguments that `conditions` lists.
    "open": (2, None),
    "mmap": (9, 222),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "fcntl": (72, 25),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "openat": (257, 56),
    "prlimit64": (302, 261),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS; AUDIT_ARCH_*
RECENT = 424
"""From here on calls have one number everywhere, and libraries fall back from them only at ENOSYS."""

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 8, 14)
)
HANDLED = {1: (1 << 13) - 1, 2: 1 << 13, 3: TRUNCATE, 5: 1 << 15}
"""Rights over files, by the version of Landlock that introduced them."""

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38


class NotConfined(Exception):
    """A restriction could not be applied."""


def conditions(own: int) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """call: (argument, mask, values): allowed if argument & mask is one of the values. ``own``: this
    process."""
    every = 0xFFFFFFFF
    opened = (1, 2, 0, 0o1001, 0o1002)  # not O_RDONLY with O_TRUNC, which empties a file that is read-only
    return {
        "open": (1, 0o1003, opened),
        "openat": (2, 0o1003, opened),
        "mmap": (3, 0x21, (0, 0x20, 0x21)),  # no shared map of a file, whose writes would not be counted
        # is it a terminal, how wide, close on exec
        "ioctl": (1, every, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),
        "fcntl": (1, every, (*range(8), 1030)),  # not F_SETOWN, which sends signals
        "kill": (0, every, (own,)),
        "tkill": (0, every, (own,)),
        "tgkill": (0, every, (own,)),
        "prlimit64": (0, every, (0, own)),
    }


def bpf(machine: str, own: int) -> bytes:
    """The seccomp filter: listed calls pass, others give EPERM (ENOSYS if recent), those of another
    architecture kill. Raises NotConfined."""
    if machine not in MACHINES:
        raise NotConfined(f"no list of system calls for {machine}, only for {' and '.join(MACHINES)}")
    column, architecture = MACHINES[machine]
    load, equal, least, mask, leave = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, refuse, unknown, kill = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS, 0x80000000
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    only = conditions(own)
    for name, numbers in CALLS.items():
        number = numbers[column]
        if number is None:
            continue
        body = [(leave, 0, 0, allow)]
        if name in only:
            argument, bits, values = only[name]
            body = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
            for value in values:
                body += [(equal, 0, 1, value), (leave, 0, 0, allow)]
            body.append((leave, 0, 0, refuse))
        code += [(equal, 0, len(body), number), *body]
    x32 = 0x40000000
    code += [(least, 2, 0, x32), (least, 0, 1, RECENT), (leave, 0, 0, unknown), (leave, 0, 0, refuse)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def limit(request: dict[str, Any]) -> None:
    """Set hard limits of the process. Raises NotConfined."""
    seconds = int(request["seconds"]) + 2  # in case the parent, which ends it earlier, is dead
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if sys.platform == "linux":  # macOS accepts this limit and does not enforce it
        limits |= {resource.RLIMIT_AS: request["memory_bytes"], resource.RLIMIT_MEMLOCK: 0}
    for kind, value in limits.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError) as error:
            raise NotConfined(f"the process cannot be limited (limit {kind} to {value}): {error}") from None


class Kernel:
    """Linux system calls by number, for those that have no function in Python."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)

    def call(self, what: str, *arguments: int | bytes | None) -> int:
        """Raises NotConfined, saying ``what`` failed."""
        values = [
            ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value) for value in arguments
        ]
        if (result := self.libc.syscall(*values)) < 0:
            raise NotConfined(f"{what}: {os.strerror(ctypes.get_errno())}")
        return result

    def prctl(self, what: str, *arguments: int) -> None:
        if self.libc.prctl(*map(ctypes.c_ulong, (*arguments, 0, 0, 0)[:5])) < 0:
            raise NotConfined(f"{what}: {os.strerror(ctypes.get_errno())}")

    def quieten(self, parent: int) -> None:
        """Give up privileges, now and later, and end with the parent."""
        self.prctl("the process cannot give up new privileges", PR_SET_NO_NEW_PRIVS, 1)
        self.prctl("the process cannot be tied to its parent", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            raise NotConfined("its parent is gone")
        if self.libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24)) < 0:
            raise NotConfined(f"root's privileges cannot be given up: {os.strerror(ctypes.get_errno())}")

    def landlock(self, readable: list[str], listable: list[str], folder: str) -> None:
        """Allow only these paths, and all below them, to be opened; plain files in ``folder`` also for
        writing."""
        lacks = "the kernel has no Landlock (Linux 5.13 or later, switched on)"
        version = self.call(lacks, LANDLOCK_CREATE, None, 0, 1)
        handled = sum(bits for since, bits in HANDLED.items() if since <= version)
        # TCP since version 4; abstract sockets and signals since 6
        attributes = [handled, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
        packed = struct.pack(f"{len(attributes)}Q", *attributes)
        rules = self.call(lacks, LANDLOCK_CREATE, packed, len(packed), 0)
        own = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_FILE | MAKE_REG | TRUNCATE
        granted = [*((path, READ_FILE) for path in readable), *((path, READ_DIR) for path in listable)]
        granted += [(folder, own), (os.devnull, READ_FILE | WRITE_FILE | TRUNCATE)]
        for path, rights in granted:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights & handled, place)
            self.call(f"Landlock does not take a rule for {path}", LANDLOCK_ADD, rules, 1, rule, 0)
            os.close(place)
        self.call("Landlock does not lock", LANDLOCK_RESTRICT, rules, 0)
        os.close(rules)

    def filter(self) -> None:
        code = bpf(platform.machine(), os.getpid())
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        address = ctypes.cast(ctypes.c_char_p(program), ctypes.c_void_p).value or 0
        self.prctl("the kernel takes no filter of system calls (seccomp)", PR_SET_SECCOMP, 2, address)


def confine(request: dict[str, Any]) -> None:
    """Apply all restrictions. Raises NotConfined naming the first that cannot be applied."""
    limit(request)
    if sys.platform == "linux":
        kernel = Kernel()
        kernel.quieten(request["parent"])
        try:
            kernel.landlock(request["readable"], request["listable"], os.getcwd())
        except OSError as error:
            raise NotConfined(f"a file that Python needs cannot be reached: {error}") from None
        kernel.filter()


def run(source: str) -> BaseException | None:
    """Run ``source`` as a module of its own; return None, or the error that ended it."""
    linecache.cache[NAME] = (len(source), None, source.splitlines(keepends=True), NAME)
    module = types.ModuleType("program")
    sys.modules["program"] = module
    return ended_by(lambda: exec(compile(source, NAME, "exec", dont_inherit=True), vars(module)))


def ended_by(work: Callable[[], object]) -> BaseException | None:
    """None, or the error that ended ``work``. Its traceback is printed."""
    try:
        work()
    except BaseException as error:  # the program's own, SystemExit too
        try:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename.startswith(OWN):
                trace = trace.tb_next
            traceback.print_exception(type(error), error, trace)
        except BaseException:  # printing runs code of the program again
            pass
        return error
    return None


def described(error: BaseException) -> str:
    """The class of an error, and its text if there is one."""
    try:
        text = str(error)
    except BaseException:  # code of the program
        text = "and its text cannot be had"
    return f"{type(error).__name__}: {text[:1000]}" if text else type(error).__name__


def channel(numbers: list[int]) -> tuple[IO[bytes], IO[bytes]]:
    """The two pipes that the parent has opened as ``numbers``, to read from and to write to."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 1 << 9) for number in numbers]
    for number in numbers:
        os.close(number)
    for number, copy in zip(CHANNEL, high, strict=True):
        os.dup2(copy, number)
        os.close(copy)
    return open(CHANNEL[0], "rb"), open(CHANNEL[1], "wb")


def main() -> NoReturn:
    request = json.load(sys.stdin.buffer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pipes = channel(request["channel"]) if request["channel"] else None
    os.closerange(CHANNEL[1] + 1 if pipes else CHANNEL[0], 64)
    calls: Any = None
    if pipes:
        sys.path.insert(0, OWN)
        calls = importlib.import_module("calls")
        del sys.path[0]
    write, leave, dumps, token = os.write, os._exit, json.dumps, request["token"]
    sys.argv[:] = [NAME]

    def say(**report: str | None) -> NoReturn:
        write(1, f"\n{token}{dumps(report)}".encode())
        leave(0)

    try:
        confine(request)
    except NotConfined as error:
        say(open=str(error))
    tests = request["tests"]
    if pipes and not tests:
        token = request["token"] = ""  # the program has nothing to report
    if pipes and tests:
        error = ended_by(functools.partial(calls.judge, tests, *pipes))
    else:
        error = run(request["program"])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # the program may have put anything there
            continue
    if pipes and not tests:
        calls.serve(sys.modules["program"], request["entry_point"], error, *pipes)
    say(error=None if error is None else described(error))


if __name__ == "__main__":
    main()
