"""A merged model as one GGUF file: for llama.cpp, Ollama, LM Studio.

The change is added in float32 and each tensor is rounded once to its type. The tokenizer, the chat template
and the end token are in the file's header."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import mlx.core as mx

from tunesmith import events
from tunesmith.errors import ExportError, ModelError
from tunesmith.events import Sink
from tunesmith.exports import stored, weights
from tunesmith.exports.kind import (
    ROUNDED,
    ArtefactNotes,
    ForLlamaCpp,
    Importance,
    LlamaFiles,
    Reloaded,
    Tolerance,
    Tuned,
    declared_ends,
    plain,
    register,
)
from tunesmith.exports.weights import INSIDE, Tensors
from tunesmith.model import loading, windows
from tunesmith.model.gguf import architectures, conversion, reading, tokenizer_header, writing
from tunesmith.model.gguf.architectures import ARCHITECTURES, Config, Values
from tunesmith.model.gguf.reading import GGUFModel
from tunesmith.model.gguf.writing import Encoding, NewTensor
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.artefacts import Quantised
from tunesmith.runs.directory import Run
from tunesmith.tokens.renderers import MistralRenderer

CONVERTER = "--to hf, then llama.cpp's own: python convert_hf_to_gguf.py FOLDER --outtype "


class WrittenGGUF(NamedTuple):
    """The tensors of a file, and a remark on how precise it is."""

    tensors: list[NewTensor]
    precision: str


class MergedGGUF(ForLlamaCpp):
    """Abstract. ``type``: of the matrices, in the gguf package's spelling."""

    type: ClassVar[str]

    def accepts(self, tuned: Tuned) -> None:
        if _is_file(tuned) and tuned.source.tokenizer is None:
            return
        try:
            if _is_file(tuned):
                tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), ())
            else:
                _header(tuned)
        except ModelError as error:
            hint = error.hint or _converter(self.type)
            raise ExportError(f"{self.name}: {error.what}", hint=hint) from error

    def announcement(self, tuned: Tuned) -> str:
        if _is_file(tuned):
            return f"merged model as GGUF, what changed as {self.type}, all else as in the base"
        return self.what

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        path = folder / f"model-{self.type.lower()}.gguf"
        importance = self.importance(tuned, notify)
        encoding = Encoding(self.type, {} if importance is None else importance.columns)
        make = _write_into_copy if _is_file(tuned) else write_new
        try:
            tensors, precision = make(tuned, path, encoding, _plainly_named(tuned.tensors()), notify)
        except ModelError as error:
            raise ExportError(f"{self.name}: {error.what}", hint="--to gguf-bf16 or gguf-f32") from error
        remarks = (*_remarks(tuned, path), precision)
        if importance is None:
            return ArtefactNotes(remarks=remarks)
        quantised = _quantised(importance, tensors)
        return ArtefactNotes(None, (*remarks, *_of_quantised(quantised)), quantised, importance)

    def importance(self, tuned: Tuned, notify: Sink) -> Importance | None:
        """How much the columns of matrices matter; None if the type does not use it."""
        return None

    def llama_files(self, base: Callable[[], Tuned], folder: Path, work: Path) -> LlamaFiles:
        (model,) = folder.glob("*.gguf")
        return LlamaFiles(model, matrix_types(model))

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent) as work:
            (path,) = folder.glob("*.gguf")
            conversion.write_folder(path, Path(work), loading.stored_dtype(source.dtype), notify)
            loaded = loading.load(plain(source, Path(work)), notify)
            mx.eval(loaded.net.parameters())
            renderer = opening.renderer_of(run, Path(work))
            return Reloaded(loaded.net, renderer, declared_ends(Path(work), renderer))


def write_new(tuned: Tuned, path: Path, encoding: Encoding, tensors: Tensors, notify: Sink) -> WrittenGGUF:
    """Write ``tensors`` with a header that follows from the model. Raises ModelError if a file cannot hold
    it."""
    config = settings(tuned.loaded)
    architecture, values, factors = _header(tuned)
    values |= {
        "general.type": "model",
        "general.name": tuned.loaded.path.name,
        "general.file_type": int(writing.file_type(encoding.type)),
        "general.quantization_version": 2,
    }
    values |= _of_importance(tuned, encoding)
    new = writing.new_tensors(ARCHITECTURES[architecture], config, tensors, factors, encoding)
    writing.write(path, architecture, values, new, tick=events.ticker(notify, "tensors written"))
    return WrittenGGUF(new, f"the file has {writing.bits(new):.1f} bits a weight")


def _write_into_copy(
    tuned: Tuned, path: Path, encoding: Encoding, dense: Tensors, notify: Sink
) -> WrittenGGUF:
    """Keep the header and the tensors of the file that is the base, but those that changed."""
    reader = reading.read(Path(tuned.source.path))
    fields = list(reader.fields.values())
    keys = {field.name: field.contents() for field in fields if field.name.startswith("general.")}
    fields = [field for field in fields if not field.name.startswith("quantize.imatrix.")]
    values = _kept_ends(reader, tuned.ends) | _of_importance(tuned, encoding)
    if tuned.source.tokenizer is not None:
        fields = [field for field in fields if not field.name.startswith("tokenizer.")]
        values |= tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), tuned.ends)
    everything = tuned.source.adapter is not None or tuned.source.quantize is not None
    changed = set(dense) if everything else stored.changed_names(tuned.loaded.net)
    name, config = keys["general.architecture"], settings(tuned.loaded)
    architecture = ARCHITECTURES[name]
    tensors = list(writing.kept_tensors(reader, architecture, config, dense, changed, encoding))
    places = writing.slots(architecture, config["num_hidden_layers"])
    new = [each for each in tensors if each.name in places and places[each.name].tensor in changed]
    if 2 * sum(each.n_weights for each in new) > sum(each.n_weights for each in tensors):
        values["general.file_type"] = int(writing.file_type(encoding.type))  # else that of the base holds
    tick = events.ticker(notify, "tensors written")
    writing.write(path, name, values, tensors, fields, tick=tick)
    types = ", ".join(f"{n} {kind}" for kind, n in Counter(each.type.name for each in new).most_common())
    held = f"of {len(tensors)} tensors {len(new)} changed ({types}), the others are those of the base"
    return WrittenGGUF(tensors, f"{held}: the file has {writing.bits(tensors):.1f} bits a weight")


def _of_importance(tuned: Tuned, encoding: Encoding) -> Values:
    """The keys by which llama.cpp says that a file was quantised with an importance matrix."""
    if not encoding.importance:
        return {}
    return {
        "quantize.imatrix.dataset": f"training rows of {tuned.run.path.resolve().name}",
        "quantize.imatrix.entries_count": len(encoding.importance),
    }


def _converter(type: str) -> str:
    """The commands of llama.cpp that make a file of the type."""
    if type in ("F32", "F16", "BF16", "Q8_0"):
        return f"{CONVERTER}{type.lower()}"
    return f"{CONVERTER}f16, and llama-quantize FILE.gguf {type}"


def matrix_types(path: Path) -> frozenset[str]:
    return frozenset(
        tensor.tensor_type.name for tensor in reading.read(path).tensors if len(tensor.shape) > 1
    )


def _is_file(tuned: Tuned) -> bool:
    return Path(tuned.source.path).is_file()


def settings(loaded: Loaded) -> Config:
    """The settings of the text model, with the defaults of its class."""
    net: Any = loaded.net
    config = loaded.config
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = {**text, **vars(net.language_model.args), "model_type": config["model_type"]}
        return architectures.complete(inner)
    return architectures.complete({**config, **vars(net.args)})


def dense(tuned: Tuned) -> Tensors:
    """The tensors of the base, of which only the shapes are needed before they are written."""
    return _plainly_named(weights.dense(tuned.loaded.net))


def _plainly_named(tensors: Tensors) -> Tensors:
    """The tensors by the names of a text model that stands alone."""
    return {name.removeprefix(INSIDE): make for name, make in tensors.items()}


def _n_tokens(tuned: Tuned) -> int:
    return dense(tuned)["model.embed_tokens.weight"]().shape[0]


def _header(tuned: Tuned) -> tuple[str, Values, dict[str, Any]]:
    """The architecture, all values that follow from the model and its tokenizer, and tensors of factors."""
    config = settings(tuned.loaded)
    numbers, _ = windows.windowed_layers(config)
    if config["model_type"] == "gemma2" and numbers != list(range(0, config["num_hidden_layers"], 2)):
        raise ModelError("layer_types: every second layer with a window expected, from the first")
    architecture, values, factors = writing.described(config, dense(tuned))
    tokenizer = tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), tuned.ends)
    tokenizer_header.require_readable(tokenizer, architecture)
    return architecture, values | tokenizer, factors


def _quantised(importance: Importance, tensors: Sequence[NewTensor]) -> Quantised:
    types = Counter(tensor.type.name for tensor in tensors if len(tensor.shape) > 1)
    return Quantised(
        types=dict(types.most_common()),
        narrow=sum(tensor.narrow for tensor in tensors),
        weighed=sum(tensor.weighed for tensor in tensors),
        rows=importance.rows,
        tokens=importance.tokens,
    )


def _of_quantised(quantised: Quantised) -> list[str]:
    n_matrices = sum(quantised.types.values())
    types = ", ".join(f"{count} {name}" for name, count in quantised.types.items())
    remarks = [
        f"importance matrix: {quantised.tokens} tokens of {quantised.rows} training rows, used for "
        f"{quantised.weighed} of {n_matrices} matrices ({types})"
    ]
    if quantised.narrow:
        remarks.append(
            f"{quantised.narrow} of {n_matrices} matrices have rows that do not fill blocks of 256 values: "
            "they have larger types, as llama.cpp chooses them"
        )
    return remarks


def _kept_ends(reader: GGUFModel, ends: tuple[int, ...]) -> Values:
    """The end tokens, if the trained one is not the first of those in the file."""
    key = "tokenizer.ggml.eos_token_id"
    field = reader.fields.get(key)
    own = None if field is None else int(field.contents())
    if not ends or own == ends[0]:
        return {}
    values: Values = {key: ends[0]}
    return values if own is None else {**values, "tokenizer.ggml.eot_token_id": own}


def _remarks(tuned: Tuned, path: Path) -> tuple[str, ...]:
    remarks = [f"use: llama-server --model {path.name}"]
    config = settings(tuned.loaded)
    numbers, window = windows.windowed_layers(config)
    if numbers and config["model_type"] != "gemma2" and window < config["max_position_embeddings"]:
        remarks.append(f"llama.cpp ignores the sliding window of {window} tokens: longer texts differ")
    if isinstance(tuned.renderer, MistralRenderer):
        remarks.append("start it with --chat-template mistral-v3: it gives the ids of training")
    elif "tokenizer.chat_template" not in reading.Reader(path).fields:
        remarks.append("the base has no chat template to put into the file: name one to the program")
    return tuple(remarks)


@register
class GGUFF32(MergedGGUF):
    name: ClassVar[str] = "gguf-f32"
    what: ClassVar[str] = "merged model as GGUF in float32"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01, step=ROUNDED)
    type: ClassVar[str] = "F32"


@register
class GGUFBF16(MergedGGUF):
    name: ClassVar[str] = "gguf-bf16"
    what: ClassVar[str] = "merged model as GGUF in bfloat16"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "gguf-f32"
    type: ClassVar[str] = "BF16"


@register
class GGUFF16(MergedGGUF):
    name: ClassVar[str] = "gguf-f16"
    what: ClassVar[str] = "merged model as GGUF in float16"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "gguf-f32"
    type: ClassVar[str] = "F16"


@register
class GGUFQ80(MergedGGUF):
    name: ClassVar[str] = "gguf-q8_0"
    what: ClassVar[str] = "merged model as GGUF, 8.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.02, p99=0.2, top=0.95, lost=0.25)
    more_precise: ClassVar[str | None] = "gguf-f16"
    type: ClassVar[str] = "Q8_0"


@register
class GGUFQ51(MergedGGUF):
    name: ClassVar[str] = "gguf-q5_1"
    what: ClassVar[str] = "merged model as GGUF, 6 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.05, p99=0.5, top=0.9, lost=0.4)
    more_precise: ClassVar[str | None] = "gguf-q8_0"
    type: ClassVar[str] = "Q5_1"


@register
class GGUFQ50(MergedGGUF):
    name: ClassVar[str] = "gguf-q5_0"
    what: ClassVar[str] = "merged model as GGUF, 5.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.05, p99=0.5, top=0.9, lost=0.4)
    more_precise: ClassVar[str | None] = "gguf-q5_1"
    type: ClassVar[str] = "Q5_0"


@register
class GGUFQ41(MergedGGUF):
    name: ClassVar[str] = "gguf-q4_1"
    what: ClassVar[str] = "merged model as GGUF, 5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.1, p99=2.0, top=0.85, lost=0.5)
    more_precise: ClassVar[str | None] = "gguf-q5_0"
    type: ClassVar[str] = "Q4_1"


@register
class GGUFQ40(MergedGGUF):
    name: ClassVar[str] = "gguf-q4_0"
    what: ClassVar[str] = "merged model as GGUF, 4.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.1, p99=2.0, top=0.85, lost=0.5)
    more_precise: ClassVar[str | None] = "gguf-q4_1"
    type: ClassVar[str] = "Q4_0"
