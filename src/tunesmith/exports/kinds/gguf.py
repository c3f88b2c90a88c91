"""A merged model as one GGUF file: for llama.cpp, Ollama, LM Studio.

The change is added in float32 and each tensor is rounded once to its type. The tokenizer, the chat template
and the end token are in the file's header."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
from gguf import GGUFReader

from tunesmith import events
from tunesmith.errors import ExportError, ModelError
from tunesmith.events import Sink
from tunesmith.exports import stored, weights
from tunesmith.exports.kind import (
    ROUNDED,
    ArtefactNotes,
    ExportKind,
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
from tunesmith.model.loading import Loaded, ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.directory import Run
from tunesmith.tokens.renderers import MistralRenderer

CONVERTER = "--to hf, then llama.cpp's own: python convert_hf_to_gguf.py FOLDER --outtype {}"


class _GGUF(ExportKind):
    """Abstract. ``type``: of the matrices, in the gguf package's spelling."""

    type: ClassVar[str]
    runs_on_mlx: ClassVar[bool] = False

    def accepts(self, tuned: Tuned) -> None:
        if _is_file(tuned) and tuned.source.tokenizer is None:
            return
        try:
            if _is_file(tuned):
                tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), ())
            else:
                _header(tuned)
        except ModelError as error:
            hint = error.hint or CONVERTER.format(self.type.lower())
            raise ExportError(f"{self.name}: {error.what}", hint=hint) from error

    def announcement(self, tuned: Tuned) -> str:
        if _is_file(tuned):
            return f"merged model as GGUF, what changed as {self.type}, all else as in the base"
        return self.what

    def write(self, tuned: Tuned, folder: Path, notify: Sink) -> ArtefactNotes:
        path = folder / f"model-{self.type.lower()}.gguf"
        try:
            write = self._write_into_copy if _is_file(tuned) else self._write_new
            held = write(tuned, path, notify)
        except ModelError as error:
            raise ExportError(f"{self.name}: {error.what}", hint="--to gguf-bf16 or gguf-f32") from error
        return ArtefactNotes(remarks=(*_remarks(tuned, path), held))

    def _write_new(self, tuned: Tuned, path: Path, notify: Sink) -> str:
        """Returns how precise the file is."""
        config, dense = settings(tuned.loaded), _plainly_named(tuned.tensors())
        architecture, values, factors = _header(tuned)
        values |= {
            "general.type": "model",
            "general.name": tuned.loaded.path.name,
            "general.file_type": int(writing.file_type(self.type)),
            "general.quantization_version": 2,
        }
        tensors = writing.new_tensors(ARCHITECTURES[architecture], config, dense, factors, self.type)
        writing.write(path, architecture, values, tensors, tick=events.ticker(notify, "tensors written"))
        return f"the file has {writing.bits(tensors):.1f} bits a weight"

    def _write_into_copy(self, tuned: Tuned, path: Path, notify: Sink) -> str:
        """Keep the header and the tensors of the file that is the base, but those that changed. Returns how
        precise the file is."""
        reader = reading.read(Path(tuned.source.path))
        fields = list(reader.fields.values())
        keys = {field.name: field.contents() for field in fields if field.name.startswith("general.")}
        values = _kept_ends(reader, tuned.ends)
        if tuned.source.tokenizer is not None:
            fields = [field for field in fields if not field.name.startswith("tokenizer.")]
            values |= tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), tuned.ends)
        dense = _plainly_named(tuned.tensors())
        everything = tuned.source.adapter is not None or tuned.source.quantize is not None
        changed = set(dense) if everything else stored.changed_names(tuned.loaded.net)
        name, config = keys["general.architecture"], settings(tuned.loaded)
        architecture = ARCHITECTURES[name]
        tensors = list(writing.kept_tensors(reader, architecture, config, dense, changed, self.type))
        places = writing.slots(architecture, config["num_hidden_layers"])
        new = [each for each in tensors if each.name in places and places[each.name].tensor in changed]
        if 2 * sum(each.n_weights for each in new) > sum(each.n_weights for each in tensors):
            values["general.file_type"] = int(writing.file_type(self.type))  # else that of the base holds
        tick = events.ticker(notify, "tensors written")
        writing.write(path, name, values, tensors, fields, tick=tick)
        types = ", ".join(f"{n} {kind}" for kind, n in Counter(each.type.name for each in new).most_common())
        held = f"of {len(tensors)} tensors {len(new)} changed ({types}), the others are those of the base"
        return f"{held}: the file has {writing.bits(tensors):.1f} bits a weight"

    def reload(self, folder: Path, source: ModelSpec, run: Run, notify: Sink) -> Reloaded:
        with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder.parent) as work:
            (path,) = folder.glob("*.gguf")
            conversion.write_folder(path, Path(work), loading.stored_dtype(source.dtype), notify)
            loaded = loading.load(plain(source, Path(work)), notify)
            mx.eval(loaded.net.parameters())
            renderer = opening.renderer_of(run, Path(work))
            return Reloaded(loaded.net, renderer, declared_ends(Path(work), renderer))


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


def _dense(tuned: Tuned) -> Tensors:
    """The tensors of the base, of which only the shapes are needed before they are written."""
    return _plainly_named(weights.dense(tuned.loaded.net))


def _plainly_named(tensors: Tensors) -> Tensors:
    """The tensors by the names of a text model that stands alone."""
    return {name.removeprefix(INSIDE): make for name, make in tensors.items()}


def _n_tokens(tuned: Tuned) -> int:
    return _dense(tuned)["model.embed_tokens.weight"]().shape[0]


def _header(tuned: Tuned) -> tuple[str, Values, dict[str, Any]]:
    """The architecture, all values that follow from the model and its tokenizer, and tensors of factors."""
    config = settings(tuned.loaded)
    numbers, _ = windows.windowed_layers(config)
    if config["model_type"] == "gemma2" and numbers != list(range(0, config["num_hidden_layers"], 2)):
        raise ModelError("layer_types: every second layer with a window expected, from the first")
    architecture, values, factors = writing.described(config, _dense(tuned))
    tokenizer = tokenizer_header.tokenizer_values(tuned.tokenizer, _n_tokens(tuned), tuned.ends)
    tokenizer_header.require_readable(tokenizer, architecture)
    return architecture, values | tokenizer, factors


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
    elif "tokenizer.chat_template" not in GGUFReader(path).fields:
        remarks.append("the base has no chat template to put into the file: name one to the program")
    return tuple(remarks)


@register
class GGUFF32(_GGUF):
    name: ClassVar[str] = "gguf-f32"
    what: ClassVar[str] = "merged model as GGUF in float32"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01, step=ROUNDED)
    type: ClassVar[str] = "F32"


@register
class GGUFBF16(_GGUF):
    name: ClassVar[str] = "gguf-bf16"
    what: ClassVar[str] = "merged model as GGUF in bfloat16"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "gguf-f32"
    type: ClassVar[str] = "BF16"


@register
class GGUFF16(_GGUF):
    name: ClassVar[str] = "gguf-f16"
    what: ClassVar[str] = "merged model as GGUF in float16"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.005, p99=0.05, top=0.97, lost=0.1, step=ROUNDED)
    more_precise: ClassVar[str | None] = "gguf-f32"
    type: ClassVar[str] = "F16"


@register
class GGUFQ80(_GGUF):
    name: ClassVar[str] = "gguf-q8_0"
    what: ClassVar[str] = "merged model as GGUF, 8.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.02, p99=0.2, top=0.95, lost=0.25)
    more_precise: ClassVar[str | None] = "gguf-f16"
    type: ClassVar[str] = "Q8_0"


@register
class GGUFQ51(_GGUF):
    name: ClassVar[str] = "gguf-q5_1"
    what: ClassVar[str] = "merged model as GGUF, 6 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.05, p99=0.5, top=0.9, lost=0.4)
    more_precise: ClassVar[str | None] = "gguf-q8_0"
    type: ClassVar[str] = "Q5_1"


@register
class GGUFQ50(_GGUF):
    name: ClassVar[str] = "gguf-q5_0"
    what: ClassVar[str] = "merged model as GGUF, 5.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.05, p99=0.5, top=0.9, lost=0.4)
    more_precise: ClassVar[str | None] = "gguf-q5_1"
    type: ClassVar[str] = "Q5_0"


@register
class GGUFQ41(_GGUF):
    name: ClassVar[str] = "gguf-q4_1"
    what: ClassVar[str] = "merged model as GGUF, 5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.1, p99=2.0, top=0.85, lost=0.5)
    more_precise: ClassVar[str | None] = "gguf-q5_0"
    type: ClassVar[str] = "Q4_1"


@register
class GGUFQ40(_GGUF):
    name: ClassVar[str] = "gguf-q4_0"
    what: ClassVar[str] = "merged model as GGUF, 4.5 bits a weight"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.1, p99=2.0, top=0.85, lost=0.5)
    more_precise: ClassVar[str | None] = "gguf-q4_1"
    type: ClassVar[str] = "Q4_0"
