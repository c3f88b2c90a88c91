"""The life of a run on every family of `families`: train, interrupt, resume, evaluate; then answers in
batches of several sizes, and the adapter in mlx-lm."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from parity import families
from parity.families import Family
from training.test_laws import final

import tiny
import tunesmith
from tunesmith import adapters
from tunesmith.engine import generation
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.model import families as standing
from tunesmith.model import loading
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import story

STEPS, INTERRUPTED = 4, 2
BATCH_SIZES = (1, 2, 4, 5)
NEW_TOKENS = 9
TIE = 1e-4
"""Two tokens whose logits differ by less than this share of the largest logit: rounding may choose either."""
PROMPT_LENGTHS = (1, 13, 7, 40, 22)
SETTINGS = {
    "loop.steps": STEPS,
    "loop.save_every": 1,
    "loop.keep_last": 99,
    "loop.samples": 1,
    "batch.sequences": 4,
    "batch.micro": 2,
    "adapter.dropout": 0.1,
}


def write_model(family: Family, folder: Path) -> Path:
    """The model in the layout of transformers 5, in float32, with a row of its embedding for each token of a
    tokenizer, which is there too."""
    folder.mkdir(parents=True)
    size = tiny.write_tokenizer(folder)
    names = [name for name in family.settings if name.startswith("vocab_size")]
    settings = family.settings | dict.fromkeys(["vocab_size", *names], size)
    families.build(family._replace(settings=settings)).save_pretrained(folder)
    return folder


def trained(model: Path, out: Path) -> Run:
    rows = tiny.write_rows(out.with_suffix(".jsonl"), tiny.conversations(24))
    sets = [f"{key}={value}" for key, value in SETTINGS.items()]
    run = story.train(tunesmith.configure(model=str(model), data=[str(rows)], sets=sets).spec, out=out)
    assert run is not None
    return run


def resumed(straight: Run, out: Path) -> Run:
    """A copy of ``straight`` whose process died in the middle, resumed."""
    shutil.copytree(straight.path, out)
    for step in straight.checkpoints():
        if step > INTERRUPTED:
            shutil.rmtree(Run(out).checkpoint(step))
    Run(out).mark("running")
    story.train(straight.config, resume=Run.open(out))
    return Run.open(out)


def differing_answers(net: nn.Module, more: int) -> list[str]:
    """Greedy answers of batches of `BATCH_SIZES` that are not what the model gives without a cache, one row
    at a time. ``more``: tokens before each prompt."""
    random = np.random.default_rng(11)
    prompts = [random.integers(3, 200, more + size).tolist() for size in PROMPT_LENGTHS]
    problems: list[str] = []
    for size in BATCH_SIZES:
        answers = generation.generate(net, prompts, max_tokens=NEW_TOKENS, eos_ids=[], batch_size=size)
        for place, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits = np.array(net(mx.array([[*prompt, *answer.ids[:-1]]]))[0, len(prompt) - 1 :])
            if (problem := _wrong_token(logits, answer.ids)) is not None:
                problems.append(f"prompt {place} in batches of {size}: {problem}")
    return problems


def _wrong_token(logits: np.ndarray, answer: Sequence[int]) -> str | None:
    """The first token of ``answer`` that is not the likeliest."""
    if len(answer) != NEW_TOKENS or not np.isfinite(logits).all():
        return f"{len(answer)} tokens"
    below = logits.max(axis=-1) - logits[np.arange(len(answer)), answer]
    wrong = np.nonzero(below > TIE * np.abs(logits).max())[0]
    return f"token {wrong[0]} is {below[wrong[0]]:.2g} below the likeliest" if len(wrong) else None


def mlx_lm_error(model: Path, folder: Path) -> float:
    """Largest difference of the logits when mlx-lm reads the adapter in ``folder``, as a share of the
    largest."""
    from mlx_lm.utils import load_adapters

    base, theirs = (loading.load(loading.ModelSpec(path=str(model))).net for _ in range(2))
    theirs = load_adapters(theirs, str(folder)).eval()
    ids = mx.array(np.random.default_rng(2).integers(3, 200, (2, 24)))
    plain = np.array(base(ids))
    adapters.load(base, folder)
    ours = np.array(base.eval()(ids))
    assert np.abs(ours - plain).max() > 0
    return float(np.abs(np.array(theirs(ids)) - ours).max() / np.abs(ours).max())


def problems(family: Family, folder: Path) -> list[str]:
    """What goes wrong in the life of a run; nothing if all is right."""
    model = write_model(family, folder / "model")
    straight = trained(model, folder / "run")
    wrong: list[str] = []
    if final(resumed(straight, folder / "resumed")) != final(straight):
        wrong.append("resumed to other bytes")
    evaluated = evaluate(straight, tasks=["perplexity"], checkpoint="last")
    assert evaluated is not None
    net, _, config, *_ = loading.load(loading.ModelSpec(path=str(model)))
    checkpoint = checkpoints.choose(straight, "last")
    adapters.load(net, checkpoint)
    short = standing.longrope_range(config)
    # All prompts on one side of it, also without the last token, which is read in a pass of its own.
    more = short + 1 if short is not None and short < max(PROMPT_LENGTHS) else 0
    wrong += differing_answers(net.eval(), more)
    if (difference := mlx_lm_error(model, checkpoint)) > 1e-5:
        wrong.append(f"mlx-lm computes something else with the adapter: {difference:.1e}")
    return wrong


def cell(family: Family, folder: Path) -> str:
    """What the table says of the life of a run."""
    return f"wrong: {'; '.join(found)}" if (found := problems(family, folder)) else "exact"
