"""The same LoRA update by several trainers, each in a process of its own, measured in turn.

A worker loads its model once and then waits. On each word from the parent it makes one optimizer update over
all rows of its job, and answers with what that took. Libraries, BLAS builds and allocators therefore never
mix, and the peak of resident memory is the trainer's own. The parent lets one worker run at a time, turns the
order from round to round, and measures again when other programs used the machine meanwhile: ratios inside a
round are steady where times are not.

Worker and parent talk in JSON lines: a job, then ``update`` as often as wanted; the end of the input ends the
worker."""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import record

# Nothing that loads a BLAS here: a worker chooses its own before anything of weight is loaded.

TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
OPENBLAS = "libopenblas.so.0"
VECTORS = {
    "widest": {},
    # As on a processor without AVX-512, for each library that chooses by itself.
    "avx2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "TUNESMITH_CXXFLAGS": "-march=haswell",
    },
}
"""Environment of the trainers, by the widest vectors that they may use."""
WITH_OPENBLAS = ("mlx_lm_blas", "checkpointed")
NEEDS = {"trl": ("torch", "peft", "trl", "datasets"), "torch": ("torch", "peft")}
DISTURBED = 0.08  # share of all cores that others may use before a measurement is made again
REPEATS = 3
PATIENCE_S = 120.0  # longest wait for a quiet machine before a measurement is made again
LOSS_TOLERANCE = 1e-4  # relative; MLX and torch were 3e-5 apart over 16 tokens, MLX and MLX 1e-7
SEED = 0


@dataclass(frozen=True)
class Row:
    """``ids[offset:]`` are learned, the tokens before are prompt."""

    ids: list[int]
    offset: int

    @property
    def learned(self) -> int:
        return len(self.ids) - max(
            self.offset, 1
        )  # the first token has nothing before it to be predicted from


@dataclass(frozen=True)
class Job:
    """One update: ``rows`` in batches of ``batch`` (tunesmith plans its own). All trainers take the same LoRA
    and AdamW."""

    model: str  # a folder in Hugging Face's layout, float32
    rows: list[Row]
    targets: tuple[str, ...]
    batch: int = 2
    rank: int = 16
    alpha: float = 32.0
    learning_rate: float = 1e-4

    @property
    def batches(self) -> list[list[Row]]:
        return [self.rows[start : start + self.batch] for start in range(0, len(self.rows), self.batch)]


def our_rows(data: str, model: str, max_tokens: int) -> tuple[Path, list[Row]]:
    """(model folder, rows of ``data`` as tunesmith renders them, at most ``max_tokens`` long and with a
    learned suffix)."""
    import ours  # opens a fast BLAS

    folder, rows = ours.rendered_rows(data, model, max_tokens)
    return folder, [Row(ids, offset) for ids, offset in rows]


# --------------------------------------------------------------------------------------------------
# The worker's side.


class Gate:
    """Waits for the parent's word, runs the clock, answers. Other libraries' prints go to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._start = self._seconds = 0.0
        self.job_line = sys.stdin.readline()

    def loaded(self) -> None:
        _release()
        self._answers.write('{"loaded": true}\n')

    def wait(self) -> bool:
        """True when an update is wanted, False when it is over. The clock starts."""
        wanted = sys.stdin.readline().strip() == "update"
        self._seconds, self._start = 0.0, time.perf_counter()
        return wanted

    def stop(self) -> None:
        """The clock stops; the first stop counts."""
        self._seconds = self._seconds or time.perf_counter() - self._start

    def done(self, loss: float, learned_tokens: int, **further: float) -> None:
        """Answer, after the memory that the update left behind is given back: the workers share one
        machine."""
        self.stop()
        answer = {
            "seconds": self._seconds,
            "loss": loss,
            "learned_tokens": learned_tokens,
            "peak_rss_bytes": _peak(),
        } | further
        _release()
        self._answers.write(json.dumps(answer) + "\n")


def _peak() -> int:
    """Bytes: the highest resident size of this process so far, loading included."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _release() -> None:
    gc.collect()
    mx = sys.modules.get("mlx.core")
    if mx is not None:
        mx.clear_cache()
    # Where all workers fit in memory at once, nothing is given back: no training run does that between its
    # updates.
    if sys.platform == "linux" and "BENCH_KEEP_MEMORY" not in os.environ:
        ctypes.CDLL(None).malloc_trim(0)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def tunesmith_worker(job: Job, gate: Gate, checkpointed: bool = False) -> None:
    """The loop of a run, with its own plan of micro-batches; only the run directory is missing."""
    import ours  # opens a fast BLAS

    settings = ours.config(
        job.model,
        {
            "model": {"dtype": "float32"},
            "adapter": {
                "kind": "lora",
                "rank": job.rank,
                "alpha": job.alpha,
                "dropout": 0.0,
                "targets": job.targets,
            },
            "batch": {"sequences": len(job.rows)},
            "optimizer": {
                "kind": "adamw",
                "learning_rate": job.learning_rate,
                "schedule": "constant",
                "max_norm": 1.0,
            },
            "loop": {"checkpoint_gradients": checkpointed, "seed": SEED},
        },
    )
    rows = [ours.group(row.ids, row.offset, f"row {index}") for index, row in enumerate(job.rows)]
    update = ours.updates(ours.load(settings), settings, rows)
    gate.loaded()
    while gate.wait():
        done = update()
        gate.done(done.loss, round(done.units))


def mlx_lm_worker(job: Job, gate: Gate, blas: bool = True, checkpointed: bool = False) -> None:
    """mlx-lm's own ``train``, called once, so that what it compiles for a shape stays compiled.

    The iterator of batches is the gate: it asks the parent before the first micro-batch of an update, and is
    asked for the next one when ``train`` has evaluated the last. Inside the clock: making the batches, step,
    evaluation, clearing the cache."""
    if blas:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import utils
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    class Tokenised:
        """Rows as records, as mlx-lm's chat data set holds them, so that it batches them as it does its
        users' rows."""

        def __len__(self) -> int:
            return len(job.rows)

        def __getitem__(self, index: int) -> dict[str, int]:
            return {"row": index}

        def process(self, record: dict[str, int]) -> tuple[list[int], int]:
            row = job.rows[record["row"]]
            return row.ids, row.offset

    class Report(TrainingCallback):
        loss, trained = 0.0, 0

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.loss, self.trained = float(train_info["train_loss"]), int(train_info["trained_tokens"])

    mx.random.seed(SEED)
    net, _ = utils.load_model(Path(job.model))
    net.set_dtype(mx.float32)
    net.freeze()
    keys = [name for name, _ in net.layers[0].named_modules() if name.rsplit(".", 1)[-1] in job.targets]
    lora = {"rank": job.rank, "scale": job.alpha / job.rank, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(net, len(net.layers), lora)
    mx.eval(net.parameters())
    rows = CacheDataset(Tokenised())

    # default_loss learns one padding token a row (its mask ends one late). Without it, the loss must be
    # everybody's.
    total, count = 0.0, 0
    for batch, lengths in iterate_batches(rows, job.batch, 4096):
        mean, tokens = default_loss(net, batch, lengths - mx.array([0, 1]))
        total, count = total + float(mean.item()) * int(tokens.item()), count + int(tokens.item())

    report = Report()

    def gated(*arguments: Any, **options: Any) -> Iterator[tuple[mx.array, mx.array]]:
        batches = iterate_batches(*arguments, **options)
        gate.loaded()
        while gate.wait():
            before = report.trained
            for _ in job.batches:
                yield next(batches)
            gate.done(report.loss, report.trained - before, loss_same_tokens=total / count)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=job.batch,
            iters=1_000_000,
            val_batches=0,
            steps_per_report=len(job.batches),
            steps_per_eval=2_000_000,
            steps_per_save=2_000_000,
            max_seq_length=4096,
            adapter_file=f"{folder}/adapters.safetensors",
            grad_checkpoint=checkpointed,
            grad_accumulation_steps=len(job.batches),
        )
        optimizer = optim.AdamW(job.learning_rate, weight_decay=0.0, bias_correction=True)
        train(net, optimizer, rows, args=arguments, iterate_batches=gated, training_callback=report)


def _labels(row: Row) -> list[int]:
    return [-100] * row.offset + row.ids[row.offset :]


def _learned(labels: Sequence[Sequence[int]]) -> int:
    return sum(label != -100 for row in labels for label in row[1:])


def trl_worker(job: Job, gate: Gate) -> None:
    """TRL's SFTTrainer over PEFT on torch, gated by a callback. Inside the clock: all of a step, its metrics
    too."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(SEED)
    torch.set_num_threads(_cores())
    learned = _learned([_labels(row) for row in job.rows])

    class Hold(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            if not gate.wait():
                raise SystemExit

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            gate.stop()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **options: Any
        ) -> None:
            if "loss" in logs:
                gate.done(float(logs["loss"]), learned)

    net = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    rows = Dataset.from_list([{"input_ids": row.ids, "labels": _labels(row)} for row in job.rows])
    lora = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=list(job.targets),
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        # TRL's defaults for a GPU are switched off: bfloat16, and checkpointing, which would cost it time
        # here.
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=job.batch,
            gradient_accumulation_steps=len(job.batches),
            max_steps=1_000_000,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            max_length=None,
            packing=False,
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=SEED,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
        hold = Hold()
        trainer = SFTTrainer(
            net, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora, callbacks=[hold]
        )
        gate.loaded()
        trainer.train()


def torch_worker(job: Job, gate: Gate) -> None:
    """A plain loop over torch and PEFT: what a careful user writes by hand."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    torch.set_num_threads(_cores())
    net: Any = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    lora = LoraConfig(
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        target_modules=list(job.targets),
        task_type="CAUSAL_LM",
    )
    net = get_peft_model(net, lora)
    net.train()
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=job.learning_rate, weight_decay=0.0)
    units = _learned([_labels(row) for row in job.rows])

    def padded(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
        labels = torch.tensor([_labels(row) + [-100] * (width - len(row.ids)) for row in rows])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        return ids, mask, labels

    gate.loaded()
    while gate.wait():
        total, learned = 0.0, 0
        for rows in job.batches:
            ids, mask, labels = padded(rows)
            logits = net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            loss = (
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
                )
                / units
            )
            loss.backward()
            total, learned = total + float(loss.detach()), learned + int((labels[:, 1:] != -100).sum())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.done(total, learned)


WORKERS: dict[str, Callable[[Job, Gate], None]] = {
    "tunesmith": tunesmith_worker,
    "tunesmith_checkpointed": lambda job, gate: tunesmith_worker(job, gate, checkpointed=True),
    "mlx_lm": lambda job, gate: mlx_lm_worker(job, gate, blas=False),
    "mlx_lm_blas": mlx_lm_worker,
    "mlx_lm_checkpointed": lambda job, gate: mlx_lm_worker(job, gate, checkpointed=True),
    "trl": trl_worker,
    "torch": torch_worker,
}


# --------------------------------------------------------------------------------------------------
# The parent's side.


@dataclass
class Measurement:
    """One update. ``others``: share of the machine that other programs used meanwhile. ``rejected``: tries
    before it."""

    trainer: str
    round: int  # 0 is the warm-up
    seconds: float
    loss: float
    learned_tokens: int
    peak_rss_bytes: int
    others: float
    rejected: int = 0
    further: dict[str, float] = field(default_factory=dict)


class Worker:
    """A trainer's process: ``command`` reads the job, then waits. Leaving the context ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        job: Mapping[str, Any],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self._command, self._job, self._environ = name, command, job, environ or {}

    def __enter__(self) -> Worker:
        import psutil

        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"bench-{self.name}-", suffix=".log")
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        # The variables of OpenBLAS that tunesmith set in this process are not for the rivals, and a kernel
        # that the user chose would slow one BLAS and not another: each library chooses for this processor.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS_")}
        self._process = subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**environ, **quiet, **VECTORS[os.environ.get("BENCH_VECTORS", "widest")], **self._environ},
        )
        self._usage = psutil.Process(self._process.pid)
        self._ask(json.dumps(self._job))
        return self

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait(timeout=120)
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-25:])
            raise RuntimeError(f"the worker {self.name} ended with code {self._process.returncode}:\n{tail}")
        return json.loads(answer)

    def update(self, number: int) -> Measurement:
        own, busy, start = self._own(), _busy(), time.perf_counter()
        answer = self._ask("update")
        wall = time.perf_counter() - start
        others = max(0.0, (_busy() - busy) - (self._own() - own)) / (wall * (os.cpu_count() or 1))
        known = {key: answer.pop(key) for key in ("seconds", "loss", "learned_tokens", "peak_rss_bytes")}
        return Measurement(self.name, number, **known, others=round(others, 4), further=answer)

    def _own(self) -> float:
        times = self._usage.cpu_times()  # with children: MLX runs a compiler in the warm-up
        return times.user + times.system + times.children_user + times.children_system

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if kind is not None:
            self._process.kill()
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def _busy() -> float:
    """CPU seconds of all programs on this machine since it started, and those that its host took away."""
    import psutil

    times = psutil.cpu_times()._asdict()  # guest time is part of user time
    return sum(
        value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")
    )


def _quiet() -> None:
    """Return when the machine was idle for two seconds, or after ``PATIENCE_S``. The workers all wait
    meanwhile."""
    end = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < end:
        busy, start = _busy(), time.perf_counter()
        time.sleep(2.0)
        if (_busy() - busy) / ((time.perf_counter() - start) * (os.cpu_count() or 1)) <= DISTURBED:
            return


def undisturbed(worker: Worker, number: int, say: Callable[[str], None], repeats: int) -> Measurement:
    """A measurement during which others left the machine alone; the least disturbed one if there is none
    after ``repeats`` more."""
    tries: list[Measurement] = []
    while not tries or (tries[-1].others > DISTURBED and len(tries) <= repeats):
        if tries:
            _quiet()
        tries.append(worker.update(number))
        if tries[-1].others > DISTURBED:
            share, seconds = tries[-1].others, tries[-1].seconds
            say(f"{worker.name}: others used {share:.0%} of the machine, {seconds:.1f} s not counted")
    best = min(tries, key=lambda measurement: measurement.others)
    best.rejected = len(tries) - 1
    return best


def race(title: str, jobs: Mapping[str, Job], rounds: int, repeats: int = REPEATS) -> dict[str, Any]:
    """`compete` of the trainers that ``jobs`` names."""
    script = str(Path(__file__).resolve())
    workers = [Worker(name, [script, "--worker", name], asdict(job)) for name, job in jobs.items()]
    return compete(title, workers, rounds, repeats, n_rows=len(next(iter(jobs.values())).rows))


def compete(
    title: str, workers: Sequence[Worker], rounds: int, repeats: int, n_rows: int = 0
) -> dict[str, Any]:
    """Warm each worker up once, then ``rounds`` updates each in turn. The others are compared with the first.
    repeats: most measurements that are made again because other programs used the machine.

    The result: ``trainers`` (speed, memory, losses), ``ratios`` of seconds inside a round, ``agree`` and why
    not."""

    def say(text: str) -> None:
        print(f"{datetime.now():%H:%M:%S}  {title}: {text}", file=sys.stderr, flush=True)

    measured: dict[str, list[Measurement]] = {worker.name: [] for worker in workers}
    with ExitStack() as stack:
        warm: dict[str, Measurement] = {}
        for worker in workers:
            name = worker.name
            say(f"{name}: loading and warming up")
            warm[name] = stack.enter_context(worker).update(0)
            say(f"{name}: first update {warm[name].seconds:.1f} s, loss {warm[name].loss:.6f}")
        left = sum(measurement.seconds for measurement in warm.values())
        for number in range(1, rounds + 1):
            end = datetime.fromtimestamp(time.time() + left * (rounds - number + 1))
            say(f"round {number} of {rounds}, expected end {end:%H:%M}")
            for position in range(len(workers)):
                worker = workers[(position + number - 1) % len(workers)]
                measurement = undisturbed(worker, number, say, repeats)
                measured[worker.name].append(measurement)
                per_second = measurement.learned_tokens / measurement.seconds
                say(f"{worker.name}: {measurement.seconds:.2f} s, {per_second:.1f} learned tokens a second")
    problems = disagreements(warm, n_rows)
    for text in problems:
        say(f"DISAGREE: {text}")
    return raced(warm, measured, problems)


def raced(
    warm: Mapping[str, Measurement], measured: Mapping[str, list[Measurement]], problems: list[str]
) -> dict[str, Any]:
    """The result of a race."""
    names = list(measured)
    first = measured[names[0]]
    learned = warm[names[0]].learned_tokens  # the same for all: mlx-lm's padding tokens are not wanted work
    ratios: dict[str, dict[str, float]] = {}
    for name in names[1:]:
        each = [other.seconds / ours.seconds for ours, other in zip(first, measured[name], strict=True)]
        ratios[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
    return {
        "trainers": {
            name: {
                "seconds": statistics.median(update.seconds for update in measured[name]),
                "learned_tokens_per_second": statistics.median(
                    learned / update.seconds for update in measured[name]
                ),
                "peak_rss_bytes": max(update.peak_rss_bytes for update in measured[name]),
                "learned_tokens": warm[name].learned_tokens,
                "loss_first_update": warm[name].loss,
                **warm[name].further,
            }
            for name in names
        },
        "ratios": ratios,
        "agree": not problems,
        "disagreements": problems,
        "rejected": sum(update.rejected for updates in measured.values() for update in updates),
        "disturbed": [
            f"{update.trainer} {update.round}"
            for updates in measured.values()
            for update in updates
            if update.others > DISTURBED
        ],
        "measurements": [
            asdict(update) for updates in (list(warm.values()), *measured.values()) for update in updates
        ],
    }


def disagreements(warm: Mapping[str, Measurement], n_rows: int) -> list[str]:
    """Where the first updates, which all start from B = 0, did not compute the same.

    mlx-lm means over micro-batches and learns one padding token in each padded row. It is held to the loss
    over the tokens that the others learn, which its worker computes before the first update, and its count
    may be up to ``n_rows`` too high."""
    first, *others = warm.values()
    problems: list[str] = []
    for other in others:
        name, loss = other.trainer, other.further.get("loss_same_tokens", other.loss)
        apart = abs(loss - first.loss) / first.loss
        more = other.learned_tokens - first.learned_tokens
        if not apart <= LOSS_TOLERANCE:
            problems.append(
                f"{name} has a loss of {loss:.7f}, {first.trainer} {first.loss:.7f}: {apart:.1e} apart"
            )
        if not 0 <= more <= (n_rows if name.startswith("mlx_lm") else 0):
            problems.append(
                f"{name} learned {other.learned_tokens} tokens, {first.trainer} {first.learned_tokens}"
            )
    return problems


# --------------------------------------------------------------------------------------------------
# What the benchmarks share.


def quantiles(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` rows at the middle of equal parts of the length distribution, shuffled, so that trainers pair
    them at random."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    chosen = [ordered[(2 * index + 1) * len(ordered) // (2 * count)] for index in range(count)]
    random.Random(seed).shuffle(chosen)
    return chosen


def rounded(value: Any) -> Any:
    """Four significant digits for people; the file keeps losses whole in its measurements."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def finish(result: dict[str, Any], summary: dict[str, Any], problems: list[str], out: Path) -> int:
    """Everything to ``out``, the summary as one line to stdout, missed bars and disagreements to stderr; the
    exit code."""
    result["missed"] = problems
    shared = ("versions", "commit", "cpu", "cores", "environment", "date", "command", "row_lengths")
    record.keep(result, out)
    print(json.dumps(rounded(summary | {key: result[key] for key in shared}), ensure_ascii=False), flush=True)
    disagree = [name for name, race in summary.items() if isinstance(race, dict) and not race["agree"]]
    for text in [*problems, *(f"{name}: the losses disagree, the ratios mean nothing" for name in disagree)]:
        print(f"FAILED  {text}", file=sys.stderr)
    return 1 if disagree or problems else 0


def missed(values: Mapping[str, float | None], bars: Mapping[str, float]) -> list[str]:
    """The bars that are not reached: memory must be at most, all else at least so much. What was not measured
    is not judged."""
    found: list[str] = []
    for name, bar in bars.items():
        value = values.get(name)
        if value is not None and (value > bar if name.startswith("memory") else value < bar):
            found.append(f"{name} is {value:.3g}, the bar {bar:g}")
    return found


def default_data() -> str:
    return str(Path(__file__).resolve().parents[2] / "shared" / "data" / "syngen_toolset_v1.0.0_claude.jsonl")


def default_model() -> str:
    return str(Path(__file__).resolve().parents[1] / "demo" / "model" / "SmolLM2-135M-Instruct.Q4_1.gguf")


def skipped(trainers: Sequence[str]) -> dict[str, str]:
    """Trainer → why it cannot run here."""
    reasons: dict[str, str] = {}
    for name in trainers:
        missing = [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
        if missing:
            reasons[name] = f"not installed: {', '.join(missing)}"
        elif name in WITH_OPENBLAS and not _openblas():
            reasons[name] = f"no {OPENBLAS}"
    for name, reason in reasons.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    return reasons


def _openblas() -> bool:
    probe = f"import ctypes; ctypes.CDLL({OPENBLAS!r})"
    return subprocess.run([sys.executable, "-c", probe], stderr=subprocess.DEVNULL).returncode == 0


def require_inputs(parser: argparse.ArgumentParser, data: str, model: str) -> None:
    if not Path(data).is_file():
        parser.error(f"--data: {data} is not there")
    if not Path(model).exists():
        parser.error(f"--model: {model} is not there; `make demo` fetches it")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One trainer, waiting for its parent. The benchmarks start it."
    )
    parser.add_argument("--worker", choices=sorted(WORKERS), required=True)
    name = parser.parse_args().worker
    gate = Gate()
    given = json.loads(gate.job_line)
    rows = [Row(**row) for row in given.pop("rows")]
    WORKERS[name](Job(**given | {"rows": rows, "targets": tuple(given["targets"])}), gate)


if __name__ == "__main__":
    main()
