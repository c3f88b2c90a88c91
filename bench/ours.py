"""The benchmarks' contact with tunesmith: public names only, in one place.

Nothing of weight is loaded at import: `backend.setup` must open a fast BLAS before MLX is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tunesmith  # opens the BLAS and sets up the allocator before MLX is loaded
from tunesmith.machine import backend

if TYPE_CHECKING:
    import mlx.nn as nn

    from tunesmith.runs.config import RunConfig
    from tunesmith.tokens.batches import Group
    from tunesmith.training.without_run import UpdatesWithoutRun

STEPS = 1_000_000  # of the plan: more than any benchmark makes


def config(model: str, sections: dict[str, dict[str, Any]]) -> RunConfig:
    """Settings of an update: ``sections`` as in a run's YAML, rows given by hand."""
    backend.setup()
    from tunesmith.runs.config import RunConfig

    common: dict[str, dict[str, Any]] = {
        "model": {"path": model},
        "data": {"train": ("rows of the benchmark",), "valid": 0},
        "loop": {"steps": STEPS},
    }
    names = common.keys() | sections.keys()
    return RunConfig.model_validate({name: common.get(name, {}) | sections.get(name, {}) for name in names})


def group(ids: Any, learned_from: int, source: str) -> Group:
    """A row of token ids, whose tokens from ``learned_from`` on are learned."""
    import numpy as np

    from tunesmith.tokens.batches import Group
    from tunesmith.tokens.template import Tokens

    targets = (np.arange(len(ids)) >= learned_from).astype(np.float32)
    return Group((Tokens(np.asarray(ids, np.int32), targets),), source)


def updates(net: nn.Module, settings: RunConfig, rows: Sequence[Group]) -> UpdatesWithoutRun:
    """Attach the adapter that ``settings`` name to ``net``; each call of the result makes an update."""
    from tunesmith.model import kernels
    from tunesmith.training.without_run import UpdatesWithoutRun

    net.freeze()
    kernels.install(net)
    settings.adapter.attach(net, settings.loop.seed)
    return UpdatesWithoutRun(net, settings, rows)


def load(settings: RunConfig) -> nn.Module:
    from tunesmith.model import loading

    return loading.load(settings.model).net


def folder(model: str) -> Path:
    """Where the model lies with config.json: a GGUF file is converted first."""
    backend.setup()
    from tunesmith.model import loading

    return loading.resolve(model, dtype="float32")


def random_llama(**sizes: Any) -> nn.Module:
    """A frozen llama of these sizes with random weights in float32."""
    backend.setup()
    from mlx_lm.models import llama

    return randomised(lambda: llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, **sizes)))


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that ``build`` makes, frozen, with random weights in float32; the same ones in each call."""
    import mlx.core as mx
    from mlx.utils import tree_map

    mx.random.seed(0)
    net = build()
    net.update(
        tree_map(lambda p: mx.random.normal(p.shape, scale=0.02) if p.ndim > 1 else p, net.parameters())
    )
    net.freeze()
    mx.eval(net.parameters())
    return net


def rendered_rows(data: str, model: str, max_tokens: int) -> tuple[Path, list[tuple[list[int], int]]]:
    """(model folder, (ids, first learned token) of each row that ends with its learned tokens)."""
    sets = ["template.too_long=drop", f"batch.length={max_tokens}", "model.dtype=float32"]
    rendered, _ = tunesmith.show([data], model=model, sets=sets)
    rows: list[tuple[list[int], int]] = []
    for row in rendered.rows:
        learned = row.tokens.targets.tolist()
        offset = learned.index(1.0)
        # mlx-lm knows the length of a prompt, not a mask. Rows labelled bad are not for SFT.
        if row.label is not False and all(weight == 1.0 for weight in learned[offset:]):
            rows.append((row.tokens.ids.tolist(), offset))
    return folder(model), rows


def row_lengths(data: str, tokenizer: str) -> list[tuple[int, int]]:
    """(tokens, learned tokens) of each row, however long."""
    rendered, _ = tunesmith.show([data], tokenizer=tokenizer, sets=[f"batch.length={1 << 20}"])
    return [(len(row.tokens.ids), int((row.tokens.targets[1:] > 0).sum())) for row in rendered.rows]


def product_rate() -> float:
    """Floating-point operations a second of large float32 products on this machine, in this process."""
    backend.setup()
    return max(backend.gflops(size) for size in (1024, 2048, 4096)) * 1e9
