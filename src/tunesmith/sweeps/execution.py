"""The trials as processes: begun in order, so many at a time as memory allows, followed through their logs,
stopped if they are behind, and continued if they were interrupted.

A trial is ``python -m tunesmith train`` in a process and session of its own, so that the crash of one loses
nothing of another. What it prints is kept in ``logs/``."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from tunesmith.display.console import size
from tunesmith.display.text import many
from tunesmith.errors import ConfigError
from tunesmith.evaluation.tasks import EvaluationSpec
from tunesmith.events import Notice, Sink
from tunesmith.runs.directory import MANIFEST
from tunesmith.sweeps import racing
from tunesmith.sweeps.contrasts import RowValues, misfits, panel
from tunesmith.sweeps.ledger import Ledger, TrialEntry
from tunesmith.sweeps.measured import Follower
from tunesmith.sweeps.room import TrialRoom
from tunesmith.sweeps.spec import IntervalRacing, SweepSpec
from tunesmith.sweeps.trials import LOGS, TRIALS, SweepPlan, Trial

POLL_S = 0.2
MARGIN = 1.1
"""What a trial that cannot be estimated needs, as a multiple of what the largest has taken."""
INTERRUPTED = 130
"""Exit status of ``train`` after a signal, when it has saved."""


@dataclass
class TrialProcess:
    """A process of a trial. ``stopping``: racing has asked it to end."""

    trial: Trial
    entry: TrialEntry
    process: subprocess.Popen[bytes]
    stage: Literal["train", "evaluate"]
    stopping: bool = False


@dataclass
class Execution:
    """One call of the sweep. ``part``: (number, count), which of so many parts of the trials are trained.
    ``retry``: trials that failed are tried again. ``followers``: the logs of all trials, by name."""

    folder: Path
    spec: SweepSpec
    plan: SweepPlan
    ledger: Ledger
    parallel: int
    room: TrialRoom
    part: tuple[int, int]
    notify: Sink
    retry: bool = True
    followers: dict[str, Follower] = field(default_factory=dict)
    children: list[TrialProcess] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)

    def run(self) -> None:
        """Until every trial has ended or failed. An interrupt interrupts the trials, which save first."""
        for trial in self.plan.trials:
            self.followers[trial.name] = Follower(self._run_dir(trial))
        with _terminable():
            self._catch_up()
            queue = [trial for trial in self.plan.part(*self.part) if self._is_open(trial)]
            try:
                while queue or self.children:
                    self._begin(queue)
                    self._poll()
                    time.sleep(POLL_S)
            finally:
                self._end_children()

    def _run_dir(self, trial: Trial) -> Path:
        return self.folder / TRIALS / trial.name

    def _is_open(self, trial: Trial) -> bool:
        """Whether there is something left to do."""
        entry = self.ledger.entry(trial.name)
        if entry.state == "failed" and not self.retry:
            return False
        return not entry.ended or (entry.state == "finished" and self._to_evaluate(entry))

    def _to_evaluate(self, entry: TrialEntry) -> bool:
        return bool(self.spec.evaluate) and not entry.evaluated

    def _catch_up(self) -> None:
        """Read the logs of trials that were begun before, and decide what was not yet decided."""
        new = {trial.name: self.followers[trial.name].read() for trial in self.plan.trials}
        for trial in self.plan.trials:
            entry = self.ledger.entry(trial.name)
            if entry.state in ("running", "interrupted"):
                for step in new[trial.name]:
                    self._race(trial, step)
            if entry.state == "running" or (entry.state == "failed" and self.retry):
                entry.state, entry.reason = "interrupted", ""
        self.ledger.write(self.folder)

    # Processes

    def _begin(self, queue: list[Trial]) -> None:
        """Start the next trials of ``queue``, if there is room for them."""
        for trial in list(queue):
            if len(self.children) >= self.parallel:
                return
            entry = self.ledger.entry(trial.name)
            if entry.state == "stopped":  # its setting was, meanwhile
                queue.remove(trial)
            elif _is_locked(self._run_dir(trial)):
                self._say(f"{trial.name} is still being trained by a process of an earlier call: waiting")
            elif not self._fits(trial):
                return
            else:
                queue.remove(trial)
                self._start(trial, entry, "evaluate" if entry.state == "finished" else "train")

    def _fits(self, trial: Trial) -> bool:
        """Whether memory allows ``trial`` beside the processes that run: what is free, less what these will
        still take. Where it cannot be estimated, the most that any trial has taken is asked for."""
        if not self.children:
            return True
        needed = self._needed(trial)
        if needed == 0:
            return False
        to_come = sum(
            max(0, self._needed(child.trial) - _memory(child.process.pid)) for child in self.children
        )
        free = max(0, self.room.free() - to_come)
        if free < needed:
            room = f"{trial.name} would take {size(needed)}, and {size(free)} would be free"
            self._say(f"{many(len(self.children), 'process')} at a time: {room}")
            return False
        return True

    def _needed(self, trial: Trial) -> int:
        """Bytes, 0 if nothing is known yet."""
        measured = max(follower.memory_bytes for follower in self.followers.values())
        return self.room.needed(trial.setting) or round(MARGIN * measured)

    def _start(self, trial: Trial, entry: TrialEntry, stage: Literal["train", "evaluate"]) -> None:
        run_dir = self._run_dir(trial)
        if stage == "evaluate":
            words = ["evaluate", str(run_dir), *_options(self.spec.evaluate, self.spec.evaluation)]
        elif (run_dir / MANIFEST).is_file():
            words = ["train", "--resume", str(run_dir)]
        else:
            words = [*entry.words, "--out", str(run_dir)]
        log = self.folder / LOGS / f"{trial.name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tunesmith", *words],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C comes to the sweep, which asks each trial once
            )
        self.children.append(TrialProcess(trial, entry, process, stage))
        if stage == "train":
            entry.state, entry.reason = "running", ""
            self.ledger.write(self.folder)
        number = self.plan.trials.index(trial) + 1
        verb = "training" if stage == "train" else "evaluating"
        self.notify(Notice(f"{verb} {trial.name} (trial {number} of {len(self.plan.trials)})"))

    def _poll(self) -> None:
        for child in list(self.children):
            status = child.process.poll()
            for step in self.followers[child.trial.name].read() if child.stage == "train" else ():
                self._race(child.trial, step)
            if status is not None:
                self.children.remove(child)
                self._ended(child, status)
                self.ledger.write(self.folder)

    def _ended(self, child: TrialProcess, status: int) -> None:
        entry = child.entry
        if child.stage == "evaluate":
            entry.evaluated, entry.reason = status == 0, ""
            if status:
                self._failed(child, f"evaluation: {self._why(child.trial, status)}")
        elif entry.state == "stopped":
            pass
        elif status == 0:
            entry.state = "finished"
            self.notify(Notice(f"{child.trial.name} is finished"))
            if self._to_evaluate(entry):
                self._start(child.trial, entry, "evaluate")
        elif status == INTERRUPTED:
            entry.state = "interrupted"
        else:
            entry.state = "failed"
            self._failed(child, self._why(child.trial, status))

    def _failed(self, child: TrialProcess, reason: str) -> None:
        child.entry.reason = reason
        log = self.folder / LOGS / f"{child.trial.name}.log"
        hint = f"all that it said: {log}; the same command tries it again"
        self.notify(Notice(f"{child.trial.name} failed: {reason}", level="warning", hint=hint))

    def _why(self, trial: Trial, status: int) -> str:
        """The last error in the trial's log."""
        if status < 0:
            name = signal.Signals(-status).name
            return f"its process was ended by {name}" + (" (no memory left?)" if name == "SIGKILL" else "")
        log = (self.folder / LOGS / f"{trial.name}.log").read_text("utf-8", "replace").splitlines()
        errors = [line.removeprefix("error: ") for line in log if line.startswith("error: ")]
        return errors[-1] if errors else f"exit status {status}"

    def _end_children(self) -> None:
        """Ask the processes that still run to save and end, and wait for them."""
        for child in self.children:
            _signal(child)
        for child in self.children:
            child.process.wait()
            if child.entry.state == "running":
                child.entry.state = "interrupted"
        self.children.clear()
        self.ledger.write(self.folder)

    def _say(self, text: str) -> None:
        """Once."""
        if text not in self._said:
            self._said.add(text)
            self.notify(Notice(text))

    # Racing

    def _race(self, trial: Trial, step: int) -> None:
        """Stop the setting of ``trial`` if its losses at ``step`` show that it is behind, or diverged."""
        race, entry = self.spec.racing, self.ledger.entry(trial.name)
        follower = self.followers[trial.name]
        if not isinstance(race, IntervalRacing) or entry.state == "stopped" or follower.steps is None:
            return
        if 0 < step < follower.steps and not follower.looks[step].finite:  # at 0 the trial fails by itself
            reason = f"the held-out loss of {trial.name} at update {step} is not finite: it diverged"
            self._stop(trial.setting, reason)
            return
        every = trial.settings.get("loop.validate_every")
        looks = racing.looks(follower.steps, every if isinstance(every, int) else 0, race.after)
        if step not in looks:
            return
        n_settings, n_seeds = len(self.plan.settings), len(self.plan.seeds)
        values = self._looks_at(step, follower.steps)
        if trial.setting in misfits(values):
            self._say(f"{trial.name} has other held-out rows than the others: it is not raced")
            return
        allowed = racing.level(race.error, n_settings, len(looks), n_seeds)
        decision = racing.judge(panel(values), trial.setting, n_seeds, allowed)
        if decision is not None:
            leader, difference, p = decision
            reason = (
                f"behind {self.plan.settings[leader].label} by {difference:.4g} at update {step} "
                f"(p {p:.2g}, below {allowed:.2g})"
            )
            self._stop(trial.setting, reason)

    def _looks_at(self, step: int, steps: int) -> list[list[RowValues | None]]:
        """By setting, by seed: the held-out losses at ``step`` of the runs with as many updates."""
        values: list[list[RowValues | None]] = [[None] * len(self.plan.seeds) for _ in self.plan.settings]
        for trial in self.plan.trials:
            follower = self.followers[trial.name]
            if follower.steps == steps:
                values[trial.setting][self.plan.seeds.index(trial.seed)] = follower.looks.get(step)
        return values

    def _stop(self, setting: int, reason: str) -> None:
        """End all trials of ``setting`` that are not finished."""
        self.notify(Notice(f"{self.plan.settings[setting].label} is stopped: {reason}"))
        for trial in self.plan.of(setting):
            entry = self.ledger.entry(trial.name)
            if entry.state != "finished":
                entry.state, entry.reason = "stopped", reason
        for child in self.children:
            if child.trial.setting == setting and child.stage == "train" and not child.stopping:
                child.stopping = True
                _signal(child)
        self.ledger.write(self.folder)


def _options(names: Sequence[str], spec: EvaluationSpec) -> list[str]:
    """The options of ``tunesmith evaluate`` that say what ``spec`` does."""
    words = [word for name in names for word in ("--task", name)]
    values: Mapping[str, object] = spec.model_dump(mode="json")
    defaults: Mapping[str, object] = EvaluationSpec().model_dump(mode="json")
    for key, value in values.items():
        if value == defaults[key]:
            continue
        option = "benchmark" if key == "benchmarks" else key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{option}")
        else:
            parts = value if isinstance(value, list) else [value]
            words += [word for part in parts for word in (f"--{option}", str(part))]
    return words


def _signal(child: TrialProcess) -> None:
    """What Ctrl-C does: the update is finished and saved."""
    with suppress(ProcessLookupError):
        child.process.send_signal(signal.SIGINT)


def _memory(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:  # it has just ended
        return 0


def _is_locked(run_dir: Path) -> bool:
    """Whether another process is training the run."""
    try:
        with (run_dir / ".lock").open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # not begun, or a file system without locks
        return False
    return False


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises ConfigError if another process runs this sweep."""
    with (folder / ".lock").open("a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            hint = f"it is {handle.read(200).strip() or 'an unknown process'}"
            raise ConfigError("another process runs this sweep", where=str(folder), hint=hint) from error
        except OSError:  # a file system without locks
            pass
        handle.truncate(0)
        handle.write(f"process {os.getpid()}\n")
        handle.flush()
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that trials are not left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
