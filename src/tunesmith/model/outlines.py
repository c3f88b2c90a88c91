"""A model of which only the settings, the tokenizer and the headers of the weights are read.

MLX builds a net of the headers without reading a weight. A GGUF file, and a model of the hub that is not
here yet, become a folder whose weights file has a header and no content: the file system stores its bytes as
a hole."""

from __future__ import annotations

from pathlib import Path

from tunesmith import events
from tunesmith.events import Notice, Sink
from tunesmith.model import loading, stored
from tunesmith.model.loading import ModelSpec


def outlined(spec: ModelSpec, folder: Path, notify: Sink = events.silent) -> ModelSpec:
    """``spec`` with the folder of its model, of which headers are in place; what must be made for that is
    written to ``folder``. Raises ModelError as `loading.resolve` does."""
    local = Path(spec.path).expanduser()
    if local.is_dir():
        return spec
    if local.is_file():
        from tunesmith.model.gguf import conversion

        dtype = loading.stored_dtype(spec.dtype)
        conversion.write_outline(local, folder, dtype)
        return spec.model_copy(update={"path": str(folder)})
    if not loading.is_hub_id(spec.path) or _is_cached(spec):
        return spec
    _fetch_headers(spec, folder)
    notify(Notice(f"{spec.path}: only its settings and headers were fetched", where="model.path"))
    return spec.model_copy(update={"path": str(folder)})


def _is_cached(spec: ModelSpec) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = snapshot_download(spec.path, revision=spec.revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError):
        return False
    return any(Path(path).glob("model*.safetensors"))


def _fetch_headers(spec: ModelSpec, folder: Path) -> None:
    from huggingface_hub import get_safetensors_metadata, snapshot_download

    small = [pattern for pattern in loading.HUB_FILES if "safetensors" not in pattern]
    try:
        snapshot_download(spec.path, revision=spec.revision, allow_patterns=small, local_dir=folder)
        metadata = get_safetensors_metadata(spec.path, revision=spec.revision)
    except (OSError, ValueError) as error:
        raise loading.not_fetched(spec.path, error) from error
    for name, file in metadata.files_metadata.items():
        entries = {
            tensor: {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
            for tensor, info in file.tensors.items()
        }
        stored.write_hollow(folder / name, entries)
