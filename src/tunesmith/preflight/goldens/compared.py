"""How far from the goldens is what this device computes?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama
from safetensors.numpy import load_file

from tunesmith import adapters
from tunesmith.engine import scoring
from tunesmith.learning import optimizer
from tunesmith.learning.objective import Objective
from tunesmith.learning.objectives.apo import APOZeroUnpaired
from tunesmith.learning.objectives.dpo import DPO
from tunesmith.learning.objectives.kto import KTO
from tunesmith.learning.objectives.orpo import ORPO
from tunesmith.learning.objectives.simpo import SimPO
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.model import kernels
from tunesmith.preflight.goldens import cases
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import reference
from tunesmith.training.gradients import Gradients, dropout_key

EVEN = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
OBJECTIVES: dict[str, Objective] = {
    "kto": KTO.model_validate({"beta": 0.4, **EVEN}),
    "kto_weighted": KTO(desirable_weight=cases.WEIGHTS[0], undesirable_weight=cases.WEIGHTS[1]),
    "kto_desirable": KTO.model_validate({"beta": 0.4, **EVEN}),
    "kto_undesirable": KTO.model_validate({"beta": 0.4, **EVEN}),
    "apo_zero_unpaired": APOZeroUnpaired.model_validate({"beta": 0.3, **EVEN}),
    "dpo_sigmoid": DPO(beta=0.3),
    "dpo_robust": DPO(beta=0.3, loss="robust", label_smoothing=0.1),
    "dpo_hinge": DPO(beta=0.3, loss="hinge"),
    "dpo_ipo": DPO(beta=0.3, loss="ipo"),
    "dpo_sigmoid_norm": DPO(beta=5.0, loss="sigmoid_norm"),
    "dpo_apo_zero": DPO(beta=0.3, loss="apo_zero"),
    "orpo": ORPO(beta=0.2),
    "simpo": SimPO(beta=2.0, gamma=0.8),
}

Gradient = dict[str, np.ndarray]


def net() -> nn.Module:
    """The model of the goldens, without an adapter."""
    settings = llama.ModelArgs(
        model_type="llama",
        hidden_size=cases.WIDTH,
        num_hidden_layers=cases.LAYERS,
        intermediate_size=cases.INNER,
        num_attention_heads=cases.HEADS,
        num_key_value_heads=cases.KV_HEADS,
        rms_norm_eps=1e-5,
        vocab_size=cases.VOCABULARY,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    made = llama.Model(settings)
    made.load_weights([(name, mx.array(value)) for name, value in cases.weights(cases.VOCABULARY).items()])
    kernels.install(made)
    made.freeze()
    return made.eval()


def attach(made: nn.Module) -> None:
    """Attach the adapter of the goldens, which is not at its start."""
    spec = {"rank": cases.RANK, "alpha": cases.ALPHA, "targets": cases.TARGETS}
    adapters.LoRA.model_validate(spec).attach(made, 0)
    tensors = adapters.trainable(made)
    values = [(name, mx.array(cases.adapter(name, value.shape))) for name, value in tensors.items()]
    made.load_weights(values, strict=False)


def tokens(prompt: list[int], answer: list[int]) -> Tokens:
    learned = np.array([0] * len(prompt) + [1] * len(answer), np.float32)
    return Tokens(np.array([*prompt, *answer], np.int32), learned)


def groups_of(name: str) -> list[Group]:
    if name in cases.JUDGED_ROWS:
        chosen = [cases.judged()[index] for index in cases.JUDGED_ROWS[name]]
        return [
            Group((tokens(asked, said),), f"x:{at}", label) for at, (asked, said, label) in enumerate(chosen)
        ]
    rows = cases.pairs(alike=name == "orpo")
    return [Group((tokens(asked, good), tokens(asked, bad)), "x") for asked, good, bad in rows]


def mismatched(groups: list[Group]) -> list[Group]:
    """Each prompt with the completion of the next row, in the order of the case."""
    made: list[Group] = []
    for at, group in enumerate(groups):
        after, asked = groups[(at + 1) % len(groups)].sequences[0], group.sequences[0]
        prompt, answer = asked.ids[asked.targets == 0], after.ids[after.targets > 0]
        made.append(Group((tokens(prompt.tolist(), answer.tolist()),), group.source))
    return made


def preference(name: str, pack: bool = False) -> tuple[float, Gradient, float]:
    """(loss, gradients, z0 before it is held) as a run computes them: reference by the base, baseline,
    micro-batches."""
    made, objective, groups = net(), OBJECTIVES[name], groups_of(name)
    twins = mismatched(groups) if name.startswith("kto") else []
    before = reference.Reference("x")
    for group in (*groups, *twins):
        sums = scoring.sequence_sums(made, [group], Cut(999))[0]
        for sequence, (logp, _) in zip(group.sequences, sums, strict=True):
            before.values[sequence.digest] = logp
    attach(made)
    kl = 0.0
    if twins:
        scores = scoring.sequence_sums(made, twins, Cut(40))
        ratios = [
            logp - before.values[twin.sequences[0].digest]
            for twin, ((logp, _),) in zip(twins, scores, strict=True)
        ]
        kl = float(np.mean(ratios))
    step = Gradients(made, _config({"objective": objective, "batch": {"pack": pack}}))
    filled = before.fill(groups) if objective.needs_reference else groups
    (loss, _), gradients = step(filled, mx.random.key(0), max(0.0, kl))
    flat = {key: np.array(value) / len(groups) for key, value in _flat(gradients)}
    return float(np.array(loss)) / len(groups), flat, kl


def _config(sections: Mapping[str, object]) -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "x"}, "data": {"train": ("x",)}, **sections})


def _flat(tree: object) -> list[tuple[str, mx.array]]:
    flat: list[tuple[str, mx.array]] = tree_flatten(tree)  # pyright: ignore[reportAssignmentType]
    return flat


def deviations() -> Iterator[tuple[str, float]]:
    """(what, largest deviation) of SFT from torch, transformers and PEFT, and of each preference objective
    from TRL: of the loss relative to it, of gradients and weights relative to the largest."""
    yield from _of_sft(load_file(cases.SFT))
    expected = load_file(cases.PREFERENCES)
    for name in OBJECTIVES:
        loss, gradients, _ = preference(name)
        theirs = {key.split("|")[1]: value for key, value in expected.items() if key.startswith(f"{name}|")}
        yield f"{name}: loss", _apart([loss], [theirs["loss"]])
        keys = [key for key in theirs if key not in ("loss", "kl")]
        apart = _apart([gradients[key] for key in keys], [theirs[key] for key in keys])
        yield f"{name}: gradients", apart


def _of_sft(golden: Mapping[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    made = net()
    attach(made)
    groups = [Group((Tokens(row, mask),), "x:1") for row, mask in zip(*cases.batch(), strict=True)]
    gradients_of = Gradients(made, _config({}))
    rates = {"learning_rate": cases.RATE, "weight_decay": cases.DECAY, "max_norm": cases.MAX_NORM}
    spec = OptimizerSpec.model_validate(rates)
    units, state = sum(group.units for group in groups), optimizer.build(spec, made)
    losses: list[float] = []
    for update in range(cases.UPDATES):
        (loss, _), gradients = gradients_of(groups, dropout_key(0, update, 0))
        gradients = tree_map(lambda leaf: leaf / units, gradients)
        losses.append(float(np.array(loss)) / units)
        if update == 0:
            flat = _flat(gradients)
            ours = [np.array(value) for _, value in flat]
            yield "sft: gradients", _apart(ours, [golden[f"gradient.{name}"] for name, _ in flat])
        gradients = optimizer.clip(gradients, optimizer.global_norm(gradients), cases.MAX_NORM)
        # torch's warm-up counts from zero.
        rate = 0.0 if update == 0 else golden[f"rate.{update - 1}"].item()
        optimizer.apply(state, made, gradients, rate)
    yield "sft: losses of five updates", _apart(losses, list(golden["losses"]))
    ends = adapters.trainable(made)
    ours = [np.array(value) for value in ends.values()]
    yield (
        "sft: adapter after five updates of AdamW",
        _apart(ours, [golden[f"updated.{name}"] for name in ends]),
    )


def _apart(ours: list, theirs: list) -> float:
    """Largest difference, relative to the largest of ``theirs``."""
    largest = max(float(np.abs(value).max()) for value in theirs)
    return (
        max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, theirs, strict=True))
        / largest
    )
