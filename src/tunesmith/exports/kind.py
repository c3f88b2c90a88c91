"""What a kind of artefact is: what it accepts, how it is written, how it is read back, how far it may be from
the live adapter. A kind is one file under `kinds` that registers a class."""

from __future__ import annotations

import gc
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import mlx.nn as nn
import numpy as np

from tunesmith import adapters
from tunesmith.adapters import merging
from tunesmith.errors import ConfigError, ExportError
from tunesmith.events import Sink
from tunesmith.exports import weights
from tunesmith.exports.spelling import full_name
from tunesmith.model import layouts, mends
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.runs.artefacts import Quantised
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import Run
from tunesmith.tokens.template import Renderer


class Tolerance(NamedTuple):
    """The most that an artefact may differ from the live adapter. ``kl``: mean KL divergence, nats a token.
    ``p99``: its 99th percentile. ``top``: least share of equal top tokens. ``lost``: KL divergence as a share
    of that between the live adapter and the base. ``step``: a tensor whose change is larger than this share
    of the tensor must hold at least half of it, since rounding cannot erase so much; None if the artefact is
    quantised."""

    kl: float
    p99: float
    top: float
    lost: float
    step: float | None = None


UNROUNDED = 1e-4
"""`Tolerance.step` of an artefact that is not rounded."""
ROUNDED = 2**-6
"""`Tolerance.step` of an artefact in 16 bits. bfloat16 moves a value by at most 2⁻⁸ of it; the sketches are
within a factor of about 4."""


class Rounding(NamedTuple):
    """llama.cpp's own. ``kl``: mean KL divergence in nats a token up to which it may be the whole difference.
    ``least``: no tolerance of what llama.cpp reads is narrower."""

    kl: float
    least: Tolerance


OF_CACHE = Rounding(1e-5, Tolerance(kl=0.0, p99=0.0, top=1.0, lost=0.1))
"""Keys and values are rounded to 16 bits, which shows beside a faint adapter."""
SIXTEEN_BIT = Rounding(1e-4, Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1))
EIGHT_BIT = Rounding(3e-4, Tolerance(kl=0.02, p99=0.2, top=0.95, lost=0.25))
"""The inputs of matrices are rounded too: to 16 bits, and to 8 if the matrices are quantised."""


class Importance(NamedTuple):
    """``columns``: by tensor of the net, the mean square of each input. Measured on ``tokens`` tokens of
    ``rows`` training rows."""

    columns: Mapping[str, np.ndarray]
    rows: int
    tokens: int


@dataclass(frozen=True)
class Tuned:
    """A run that is exported. ``source``: the settings of its base. ``loaded``: the base, whose tensors are
    not read yet; the adapter is attached to it once `ExportKind.write` is called. ``ends``: the tokens that
    end an answer, first those that end the rows that it was trained on. ``importance``: None until it was
    measured for another artefact."""

    run: Run
    config: RunConfig
    source: ModelSpec
    checkpoint: Path
    loaded: Loaded
    renderer: Renderer
    ends: tuple[int, ...]
    importance: Importance | None = None

    @property
    def base_config(self) -> dict[str, Any]:
        """config.json of the base."""
        return json.loads((self.loaded.path / "config.json").read_text("utf-8"))

    @property
    def tokenizer(self) -> Path:
        """The folder that the tokenizer was read from."""
        named = self.source.tokenizer
        return Path(named) if named and Path(named).is_dir() else self.loaded.path

    @property
    def located(self) -> ModelSpec:
        """``source`` by the folder in which the base was found: opening it again asks no hub and hashes no
        GGUF file."""
        return self.source.model_copy(update={"path": str(self.loaded.path), "revision": None})

    def tensors(self) -> weights.Tensors:
        """The tensors with the adapter merged, by the names that they have without it, each read and computed
        when its function is called. Dropping the function frees it: ``loaded`` holds other arrays."""
        net = merging.load(self.located, lazily=True).net
        adapters.load(net, self.checkpoint, lazily=True)
        tensors = weights.dense(net)
        del net
        gc.collect()  # its modules refer to each other
        return tensors


class ArtefactNotes(NamedTuple):
    """``survived``: share of the adapter's change of the weights that rounding left, or None if nothing was
    rounded. ``remarks``: what the user should know of the artefact. ``quantised``: how its matrices were
    quantised, if the importance matrix ``importance`` was used."""

    survived: float | None = None
    remarks: tuple[str, ...] = ()
    quantised: Quantised | None = None
    importance: Importance | None = None


class LlamaFiles(NamedTuple):
    """What llama.cpp reads. ``types``: of the matrices of ``model``. ``adapter``: a file for ``--lora``."""

    model: Path
    types: frozenset[str]
    adapter: Path | None = None

    @property
    def rounding(self) -> Rounding:
        if self.types <= {"F32"}:
            return OF_CACHE
        return SIXTEEN_BIT if self.types <= {"F32", "F16", "BF16"} else EIGHT_BIT

    def widened(self, tolerance: Tolerance) -> Tolerance:
        """``tolerance``, but no narrower than llama.cpp's rounding."""
        least = self.rounding.least
        return Tolerance(
            kl=max(tolerance.kl, least.kl),
            p99=max(tolerance.p99, least.p99),
            top=min(tolerance.top, least.top),
            lost=max(tolerance.lost, least.lost),
            step=tolerance.step,
        )


class Reloaded(NamedTuple):
    """An artefact that was read from disk. ``ends``: the tokens at which those who use it stop.
    ``problems``: what could not be placed. ``merge``: merges an adapter that is not one of ours. ``remarks``:
    what the check itself could not do."""

    net: nn.Module
    renderer: Renderer
    ends: tuple[int, ...]
    problems: tuple[str, ...] = ()
    merge: Callable[[], None] | None = None
    remarks: tuple[str, ...] = ()


class ExportKind(ABC):
    """Abstract. A concrete kind is final and registered."""

    name: ClassVar[str]
    what: ClassVar[str]
    """One line for people."""
    tolerance: ClassVar[Tolerance]
    more_precise: ClassVar[str | None] = None
    """The options of the next more precise kind, or None if there is none."""
    stands_alone: ClassVar[bool] = True
    """Whether it can be used without the base."""
    has_own_template: ClassVar[bool] = False
    """Whether its prompts are written without the chat template of the tokenizer, the variables of the run
    included."""

    def require_installed(self) -> None:  # noqa: B027 (most kinds need nothing)
        """Raises SetupError if a package is missing that the kind needs."""

    @abstractmethod
    def accepts(self, tuned: Tuned) -> None:
        """Raises ExportError, naming what cannot be expressed and what to do, before anything is written."""

    def announcement(self, tuned: Tuned) -> str:
        """What is written of this run, in one line for people."""
        return self.what

    @abstractmethod
    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        """Write the artefact into the empty ``folder``."""

    @abstractmethod
    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        """Read the artefact as its users do, and render as ``run`` does. ``source``: the settings of the
        base, for an artefact that stands beside it."""


class ForLlamaCpp(ExportKind):
    """Abstract: its users run it by llama.cpp, which then judges it and measures its cost if it is
    installed."""

    @abstractmethod
    def llama_files(self, base: Callable[[], Tuned], folder: Path, work: Path) -> LlamaFiles:
        """What llama.cpp is given of the artefact in ``folder``. base: opens the run without its adapter, for
        an artefact that stands beside the base; work: where the base can be written. Raises ExportError if it
        cannot be."""


_REGISTERED: dict[str, type[ExportKind]] = {}
KINDS = "tunesmith.exports.kinds"


K = TypeVar("K", bound=type[ExportKind])


def register(kind: K) -> K:
    _REGISTERED[kind.name] = kind
    return kind


def kinds(family: str = "") -> dict[str, type[ExportKind]]:
    """All kinds by name; with ``family``, at least those of the modules whose names begin so: the packages of
    the others need not be loaded."""
    for module in pkgutil.iter_modules(import_module(KINDS).__path__):
        if module.name.startswith(family):
            import_module(f"{KINDS}.{module.name}")
    return dict(sorted(_REGISTERED.items()))


def named(name: str) -> ExportKind:
    """The kind ``name``; ``gguf:q8_0`` is another spelling of ``gguf-q8_0``. Raises ConfigError if there is
    none."""
    name = full_name(name)
    known = kinds(name.partition("-")[0])
    if name not in known:
        known = kinds()
    if name not in known:
        raise ConfigError(f"{name!r} is not a kind of export", where="--to", hint=", ".join(known))
    return known[name]()


def plain(source: ModelSpec, path: Path | None = None) -> ModelSpec:
    """``source`` as it is stored: not quantised, no adapter merged, no rows added; at ``path`` if given."""
    update: dict[str, object] = {"quantize": None, "adapter": None, "resize_embeddings": False}
    if path is not None:
        update |= {"path": str(path), "tokenizer": None, "revision": None}
    return source.model_copy(update=update)


def declared_ends(folder: Path, tokenizer: Renderer) -> tuple[int, ...]:
    """The end tokens that a model folder declares: generation_config.json, else config.json, else the
    tokenizer's own."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
            if ends is not None:
                return tuple(ends) if isinstance(ends, list) else (ends,)
    own = tokenizer.text_end_id
    return tokenizer.eos_ids[-1:] if own is None else (own,)


def refuse(what: str, instead: str) -> ExportError:
    return ExportError(what, hint=instead)


def require_class_of_mlx_lm(tuned: Tuned, kind: str) -> None:
    """Raises ExportError if mlx-lm cannot load the base, which tunesmith loads by a class of another name or
    with layers of its own."""
    if not layouts.has_class(tuned.base_config) or mends.completes(tuned.base_config):
        what = f"{kind}: mlx-lm itself cannot load models of type {tuned.base_config['model_type']}"
        raise refuse(what, "--to hf writes a merged model for transformers")


def require_stored_base(tuned: Tuned, kind: str) -> None:
    """Raises ExportError if an adapter alone cannot be applied to the base as it is stored."""
    source, adapter = tuned.source, tuned.config.adapter
    instead = "--to hf writes a merged model that stands alone"
    if source.adapter is not None:
        raise refuse(f"{kind}: the base of this run has another adapter merged into it", instead)
    if source.resize_embeddings:
        raise refuse(f"{kind}: an adapter cannot hold the embedding rows that were added", instead)
    if source.quantize is not None:
        what = f"{kind}: the base was quantised when it was loaded (model.quantize: {source.quantize})"
        raise refuse(f"{what}, and the adapter fits those weights", instead)
    if Path(source.path).is_file():
        what = f"{kind}: the base is a GGUF file, to which such an adapter cannot be applied"
        raise refuse(what, f"--to gguf-lora writes the adapter for llama.cpp, {instead}")
    if adapter.kind != "full" and adapter.full_modules:
        modules = ", ".join(adapter.full_modules)
        raise refuse(f"{kind}: modules were trained in full beside the adapter ({modules})", instead)
