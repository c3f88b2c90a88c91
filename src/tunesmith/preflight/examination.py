"""What can be done with this model? Its family, what the default adapter reaches, which short ways give the
same numbers; and, if torch is installed, how far its logits are from those of transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.adapters.attachment import Handle
from tunesmith.adapters.specs import LoRA, blocks_of
from tunesmith.display.console import size
from tunesmith.engine import batching
from tunesmith.model import abilities, bodies, families, kernels, wrap
from tunesmith.model.loading import Loaded

COMPARED_BYTES = 4 << 30
"""Of a model with larger weights only the first layers are compared."""
FIRST_LAYERS = 2
LENGTH = 48  # tokens of the comparison
FAR = {mx.float32: 1e-3, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""Largest difference of logits that rounding explains, as a share of the largest logit, by the dtype of the
weights."""


class Observation(NamedTuple):
    """``problem``: None if all is well; ``hint``: what to do about it."""

    name: str
    value: str
    problem: Literal["warn", "fail"] | None = None
    hint: str | None = None


def examine(loaded: Loaded) -> list[Observation]:
    return [
        _family(loaded),
        _weights(loaded),
        _targets(loaded.net),
        _abilities(loaded.net),
        _kernels(loaded.net),
        _parity(loaded),
    ]


def layout(config: Mapping[str, Any]) -> str:
    """Which transformers wrote ``config``: 5 moved rotary settings to ``rope_parameters`` and renamed
    ``torch_dtype``."""
    parts = [config, config.get("text_config") or {}]
    new = any("rope_parameters" in part or "dtype" in part for part in parts)
    return "as transformers 5 writes it" if new else "as transformers wrote it before 5"


def _family(loaded: Loaded) -> Observation:
    family = loaded.config["model_type"]
    if bodies.text_model(loaded.net) is not loaded.net:
        inside = (loaded.config.get("text_config") or {}).get("model_type", "text model")
        family += f" (of which {inside}, the text model)"
    value = f"{family}, {len(blocks_of(loaded.net))} blocks; config.json {layout(_written(loaded))}"
    doubt = families.doubt(loaded.config)
    if doubt is None:
        return Observation("family", f"{value}; proven against transformers")
    return Observation("family", f"{value}; not proven", "warn", doubt)


def _written(loaded: Loaded) -> dict[str, Any]:
    """config.json as it lies on disk: what was loaded has the names of before transformers 5."""
    file = loaded.path / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else loaded.config


def _weights(loaded: Loaded) -> Observation:
    weights = loaded.config.get("quantization")
    held = "not quantised" if weights is None else f"quantised to {weights['bits']} bits"
    files = sum(file.stat().st_size for file in loaded.path.glob("model*.safetensors"))
    dtype = str(_dtype(loaded.net)).removeprefix("mlx.core.")
    return Observation("weights", f"{size(float(files))} on disk, {held}, computed in {dtype}")


def _dtype(net: nn.Module) -> mx.Dtype:
    """The dtype of logits."""
    return net(mx.zeros((1, 1), mx.int32)).dtype


def _targets(net: nn.Module) -> Observation:
    """What the adapter's default targets reach, found by attaching such an adapter for a moment."""
    spec = LoRA.model_validate({"rank": 1}).settled(net)
    handle = Handle(net)
    try:
        tensors = spec.attach(net, seed=0).tensors
    finally:
        handle.detach()
    layers = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    counts = Counter(name.rsplit(".", 1)[-1] for name in layers)
    blocks = blocks_of(net)
    reached = {block for name in layers for block in blocks if name.startswith(block)}
    each = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return Observation("targets", f"auto adapts {each}: in {len(reached)} of {len(blocks)} blocks")


ABILITIES: dict[str, tuple[Callable[[nn.Module], bool], str]] = {
    "the head is split": (abilities.splits, "all logits are computed, which takes more memory"),
    "answers are batched": (batching.batches, "answers are generated one by one"),
    "rows can be packed": (abilities.packs, ""),
    "prompts are continued": (abilities.continues, ""),
}
"""Ability → how it is tried, and what is slow without it."""


def _abilities(net: nn.Module) -> Observation:
    has = {name: tried(net) for name, (tried, _) in ABILITIES.items()}
    value = "; ".join(f"{name}: {'yes' if able else 'no'}" for name, able in has.items())
    slow = [costs for name, (_, costs) in ABILITIES.items() if costs and not has[name]]
    return Observation("abilities", value, "warn" if slow else None, "; ".join(slow))


def _kernels(net: nn.Module) -> Observation:
    """Which kernels compute a pass."""
    with kernels.watched() as calls:
        logits = net(mx.arange(16, dtype=mx.int32)[None])[0]
        kernels.token_logprobs(logits, mx.arange(16))
    ours, others = (sorted(name for name, compiled in calls if compiled == kind) for kind in (True, False))
    parts = [f"{', '.join(ours)}: {kernels.described()}"] if ours else []
    parts += [f"{', '.join(others)}: MLX's"] if others else []
    slow = "attention" in others and kernels.choice() == "compiled"
    hint = "the compiled kernels do not cover this attention (sinks, additive masks): it trains more slowly"
    return Observation("model", "; ".join(parts), "warn" if slow else None, hint)


def _parity(loaded: Loaded) -> Observation:
    """How far the logits are from those of transformers on torch, if it is installed."""
    if importlib.util.find_spec("torch") is None:
        return Observation(
            "logits", "not compared with transformers: torch is not installed (the extra parity)"
        )
    if "quantization" in loaded.config or not (loaded.path / "config.json").is_file():
        return Observation("logits", "not compared with transformers: it does not read this format")
    files = sum(file.stat().st_size for file in loaded.path.glob("model*.safetensors"))
    first = FIRST_LAYERS if files > COMPARED_BYTES else None
    ids = _ids(loaded.config)
    try:
        theirs = _by_transformers(loaded.path, ids, first)
    except Exception as error:  # transformers raises anything for a model that it does not know
        return Observation(
            "logits", f"not compared: transformers cannot compute it: {str(error).splitlines()[0]}"
        )
    layers: Any = loaded.net.layers
    with wrap.replaced(layers[first:] if first else [], _identity):
        ours = np.array(loaded.net(mx.array(ids)[None])[0].astype(mx.float32))
    width = min(ours.shape[-1], theirs.shape[-1])  # embeddings may be padded
    error = float(np.abs(ours[:, :width] - theirs[:, :width]).max() / np.abs(theirs).max())
    which = f", first {first} layers" if first else ""
    value = f"worst error {error:.1e} of the largest logit against transformers on torch{which}"
    if error <= FAR[_dtype(loaded.net)]:
        return Observation("logits", value)
    hint = "this model is not computed as transformers does: do not train it here, and report its config.json"
    return Observation("logits", value, "fail", hint)


def _ids(config: Mapping[str, Any]) -> list[int]:
    """Tokens to compare at: random ones, without those that stand for an image or a sound."""
    text = config.get("text_config") or config
    random = np.random.Generator(np.random.PCG64(0))
    special = {
        value
        for part in (config, text)
        for key, value in part.items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    n_tokens = int(text.get("vocab_size") or config["vocab_size"])
    return [token for token in random.integers(0, n_tokens, 2 * LENGTH).tolist() if token not in special][
        :LENGTH
    ]


def _by_transformers(folder: Path, ids: list[int], first: int | None) -> np.ndarray:
    """(T, V) float32 logits of the model in ``folder``, with its ``first`` layers only. Raises anything."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    config: Any = transformers.AutoConfig.from_pretrained(folder)
    if first is not None:
        text = config.get_text_config()
        text.num_hidden_layers = first
        if "layer_types" in text.to_dict():
            text.layer_types = text.layer_types[:first]
    kind = getattr(transformers, config.architectures[0])
    with contextlib.redirect_stderr(io.StringIO()):  # bars and warnings
        net, info = kind.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    if info["missing_keys"]:
        raise ValueError(f"it finds no weights for {', '.join(sorted(info['missing_keys'])[:3])}")
    with torch.no_grad():
        return net.eval()(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def _identity(kind: type[nn.Module]) -> wrap.Call:
    def call(self: nn.Module, x: mx.array, *args: Any, **options: Any) -> mx.array:
        return x

    return call
