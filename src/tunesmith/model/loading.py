"""The base model: finding it, loading it completely, and quantising it.

The only module that loads through mlx-lm. Tokenizers are read here only to count their ids, if the embedding
is to be resized. On a CPU everything computes in float32; a quantised base is turned back into float32 after
quantising, since quantised products are about 50 times slower there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import Field

from tunesmith import events
from tunesmith.errors import ModelError, listing
from tunesmith.events import Notice, Sink
from tunesmith.model import (
    families,
    fingerprint,
    integrity,
    kernels,
    layouts,
    mends,
    quantisation,
    vocabulary,
    windows,
)
from tunesmith.settings.config import Spec
from tunesmith.tokens import renderers

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Finish = Literal["stop", "length"]
HUB_FILES = ["*.json", "model*.safetensors", "tokenizer.model*", "tekken.json", "*.txt", "*.jinja", "*.py"]
LEAST_IDS = 16
"""The abilities of a model are tried with the first ids."""


class ModelSpec(Spec):
    """The base model and how its weights are held."""

    path: str = Field(
        min_length=1,
        description="folder, GGUF file, or hub id (owner/name)",
        json_schema_extra={"when": "to a model that was trained to chat, unless your rows are plain text"},
    )
    quantize: Literal[4, 8] | None = Field(
        default=None,
        description="bits of the frozen base; null: as it is stored",
        json_schema_extra={
            "when": "4 if the weights do not fit in memory: they then take 4.5 bits each, scales included"
        },
    )
    group_size: Literal[32, 64, 128] = Field(
        default=64,
        description="weights that share a scale if quantised",
        json_schema_extra={
            "when": "32 loses less and takes more memory; the group limits the rank that qalora can reach"
        },
    )
    dtype: Dtype = Field(
        default="auto",
        description="dtype of the weights that are not quantised; auto: float32 on a CPU, else the file's",
        json_schema_extra={
            "when": "if the device lacks the file's dtype, or to halve the memory of float32 files on a GPU"
        },
    )
    tokenizer: str | None = Field(
        default=None,
        description="folder, or mistral-v3; null: the model's own",
        json_schema_extra={"when": "if the folder has none of its own, or a wrong one"},
    )
    resize_embeddings: bool = Field(
        default=False,
        description="add rows to the embedding for ids of the tokenizer that it lacks, and train them",
        json_schema_extra={"when": "if the data needs special tokens that the model has no row for"},
    )
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of a hub model",
        json_schema_extra={"when": "to repeat a run exactly although the hub's model may change"},
    )
    adapter: str | None = Field(
        default=None,
        description="run, checkpoint, or folder that PEFT or mlx-lm saved, whose adapter is merged into "
        "the base: training starts on top of it",
        json_schema_extra={
            "when": "to train a second task on top of a first one, as with preferences after imitation"
        },
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that comes with the model",
        json_schema_extra={"when": "only for code that you have read: it runs with your rights"},
    )


class Loaded(NamedTuple):
    """``net``: frozen, in evaluation mode. ``path``: folder with config.json.

    ``files``: what `fingerprint.of_folder` gives. ``fingerprint``: the same; with a merged adapter, SHA-256
    over this hash and the adapter's file."""

    net: nn.Module
    path: Path
    config: dict[str, Any]
    fingerprint: str
    files: str


def resolve(path: str, *, dtype: Dtype, revision: str | None = None, notify: Sink = events.silent) -> Path:
    """The folder of a model: a local one, the converted form of a GGUF file, or a snapshot from the hub.

    Raises ModelError if there is none, or if a GGUF file cannot be converted.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file():
        with local.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise ModelError(
                    "is not a GGUF file", where=path, hint="give a GGUF file or the folder of a model"
                )
        from tunesmith.model.gguf import conversion

        return conversion.convert(local, stored_dtype(dtype), notify)
    if not is_hub_id(path):
        raise ModelError(
            "does not exist", where=path, hint="give a folder, a GGUF file, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # the hub client's errors, such as offline, or no such model
        raise not_fetched(path, error) from error


def is_hub_id(path: str) -> bool:
    """Whether ``path``, at which there is nothing, can be the name of a model of the hub."""
    return not (path.endswith(".gguf") or path.startswith((".", "/", "~")) or path.count("/") > 1)


def not_fetched(path: str, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0]
    message = f"is not a local folder or file, and cannot be fetched from the hub: {reason}"
    return ModelError(
        message, where=path, hint="offline, or for a model behind a licence, give a local folder"
    )


def stored_dtype(dtype: Dtype) -> Dtype:
    """The dtype that a GGUF file is converted to."""
    return "float32" if dtype == "auto" and _on_cpu() else dtype


def load(spec: ModelSpec, notify: Sink = events.silent, *, lazily: bool = False) -> Loaded:
    """The base model, frozen, in evaluation mode, quantised if the spec says so; without ``spec.adapter``,
    which `tunesmith.adapters.merging.load` merges.

    lazily: each tensor is read and computed when it is first used, and none is checked for NaN or infinity.
    Raises ModelError if files are missing or damaged, the architecture is unknown, tensors are missing, left
    over or of another shape (it lists all of them), or weights are not finite."""
    path = resolve(spec.path, dtype=spec.dtype, revision=spec.revision, notify=notify)
    net, config = _built(path, spec.trust_remote_code)
    net, config = _converted(net, config, spec, path, notify)
    if (short := families.longrope_range(config)) is not None:
        text = f"LongRoPE has other factors beyond {short:,} tokens: the longest row of a batch decides for "
        text += "all, and a longer prompt is read in parts, the first with the factors of short ones"
        notify(Notice(text, where="model", hint="keep rows and prompts within it"))
    kernels.install(net)
    mends.install(net, config)
    windows.install(net, config)
    if families.depends_on_positions(config):
        kernels.forbid_packing(net)
    if absent := kernels.missing(notify):
        text = f"training and generation are slower here: {absent.missing}"
        notify(Notice(text, where="kernels", hint=absent.hint))
    net.eval()
    net.freeze()
    if not lazily:
        integrity.require_finite(net, path, events.ticker(notify, "weights read", events.QUIET_S))
    n_added = _resized(net, spec, path, notify) if spec.resize_embeddings else 0
    if n_added and not lazily:
        mx.eval(net.parameters())
    files = fingerprint.of_folder(path, n_added)
    return Loaded(net, path, config, files, files)


def load_packed(spec: ModelSpec) -> Loaded:
    """As `load`, to be written only: quantised weights stay packed, on a CPU too."""
    path = resolve(spec.path, dtype=spec.dtype, revision=spec.revision)
    net, config = _built(path, spec.trust_remote_code)
    net, config = _quantised(net, config, spec, path, events.silent)
    files = fingerprint.of_folder(path)
    return Loaded(net, path, config, files, files)


def _built(path: Path, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model, its weights not yet read, and its settings. The graph of a short pass is built as well,
    since some settings are used only there."""
    from mlx_lm import utils

    integrity.require_files(path)
    classes = _StrictClasses()
    try:
        config = layouts.translate(utils.load_config(path))
        if (reason := families.refusal(config)) is not None:
            raise ValueError(f"models of type {config['model_type']} are refused: {reason}")
        net, config = utils.load_model(
            path,
            lazy=True,
            model_config=config,
            get_model_classes=classes,
            trust_remote_code=trust_remote_code,
        )
        if (known := vocabulary.limits(net).ids) < LEAST_IDS:
            raise ValueError(f"the token embedding has {known} rows, at least {LEAST_IDS} expected")
    except (Exception, SystemExit) as error:  # an architecture is a program, which may raise anything
        text = integrity.explained(error, classes.config, classes.arguments)
        raise ModelError(f"cannot be loaded: {text}", where=str(path)) from error
    return net, config


def _converted(
    net: nn.Module, config: dict[str, Any], spec: ModelSpec, path: Path, notify: Sink
) -> tuple[nn.Module, dict[str, Any]]:
    """``net`` in the dtype, and quantised to the bits, that ``spec`` asks for, and its settings. On a CPU,
    quantised weights become float32."""
    net, config = _quantised(net, config, spec, path, notify)
    if not _on_cpu():
        return net, config
    dtype = stored_dtype(spec.dtype)
    if dtype != "float32":
        if "quantization" not in config and _has_experts(net):
            message = f"has routed experts, which MLX multiplies on a CPU in float32 only, not in {dtype}"
            raise ModelError(message, where="model.dtype", hint="leave it out, or model.dtype=float32")
        text = f"{dtype} on a CPU is about 50 times slower than float32"
        notify(Notice(text, level="warning", where="model.dtype"))
    if "quantization" in config:
        net = quantisation.expand(net)
        text = "the quantised weights are held as float32: the same numbers, about 50 times faster on a CPU"
        notify(Notice(text, where="model"))
    return net, config


def _quantised(
    net: nn.Module, config: dict[str, Any], spec: ModelSpec, path: Path, notify: Sink
) -> tuple[nn.Module, dict[str, Any]]:
    """``net`` in the dtype, and quantised to the bits, that ``spec`` asks for, and its settings."""
    dtype = stored_dtype(spec.dtype)
    if dtype != "auto":
        wide = mends.in_float32(net, config)
        net.set_dtype({"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[dtype])
        net.update(tree_unflatten(list(wide.items())))
    bits = config["quantization"]["bits"] if "quantization" in config else None
    if spec.quantize is not None and bits is None:
        settings, notices = quantisation.quantise(net, spec.quantize, spec.group_size)
        config = config | {"quantization": settings, "quantization_config": settings}
        for notice in notices:
            notify(notice)
    elif spec.quantize not in (None, bits):
        hint = "leave out model.quantize, or name the model before it was quantised"
        message = f"is quantised to {bits} bits already, {spec.quantize} asked for"
        raise ModelError(message, where=str(path), hint=hint)
    return net, config


def _resized(net: nn.Module, spec: ModelSpec, path: Path, notify: Sink) -> int:
    """How many rows the embedding was given, so that it has one for each id of the tokenizer."""
    known, size = vocabulary.limits(net).ids, renderers.load(spec.tokenizer or path).size
    n_added = vocabulary.resize(net, size)
    text = f"the embedding has {known:,} rows, the tokenizer {size:,} ids: {n_added:,} rows are added"
    notify(Notice(text, where="model.resize_embeddings"))
    return n_added


def _has_experts(net: nn.Module) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return any(isinstance(module, SwitchLinear | QuantizedSwitchLinear) for module in net.modules())


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


class _StrictClasses:
    """mlx-lm's classes for a config, with a check that lists every tensor that does not fit; its own check
    stops at the first wrong shape. ``config`` and ``arguments``: what the last call was given and found."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.arguments: type | None = None

    def __call__(self, config: dict[str, Any]) -> tuple[Any, Any]:
        from mlx_lm import utils

        self.config = config
        model, self.arguments = utils._get_classes(layouts.with_class(config))

        class Strict(model):
            def __init__(self, *args: Any) -> None:
                nn.Module.__init__(self)  # mlx-lm's RecurrentGemma leaves it out
                super().__init__(*args)
                mends.complete(self, config)

            def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
                weights = layouts.rename(config, weights)
                return super().sanitize(weights) if "sanitize" in dir(model) else weights

            def load_weights(self, weights: list[tuple[str, mx.array]], strict: bool = True) -> nn.Module:
                given = {name: value.shape for name, value in weights}
                due = {name: cast(mx.array, value).shape for name, value in tree_flatten(self.parameters())}
                problems = [
                    f"{name}: the weights have {given.get(name, 'none')}, the model {due.get(name, 'none')}"
                    for name in sorted(given.keys() | due.keys())
                    if given.get(name) != due.get(name)
                ]
                if problems:
                    raise ValueError(f"weights do not fit config.json:\n{listing(problems)}")
                self.__class__ = model  # the check is for loading only
                return self.load_weights(weights, strict)

        return Strict, self.arguments


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards each module has its former mode."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:  # parents come before their children
            if module.training != training:
                module.train(training)
