"""Models whose files are damaged, one for each number, and what tunesmith makes of them.

``python tests/damage.py FOLDER FIRST LAST`` damages a copy of a tiny model for each number from FIRST to
LAST - 1, checks a run on it and asks it a question, and prints one line of JSON a case. A case that kills the
process leaves no line."""

from __future__ import annotations

import json
import shutil
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import tiny

WEIRD: list[Any] = [
    None,
    True,
    "",
    "abc",
    "10",
    -1,
    0,
    1,
    3,
    10**9,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.5,
    1e308,
    float("nan"),
]
WEIRD += [
    float("inf"),
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
    {"type": "linear"},
    {"rope_type": "yarn", "factor": "x"},
]
ADDED = {
    "head_dim": 0,
    "sliding_window": -1,
    "layer_types": ["full_attention"],
    "rope_parameters": {"rope_type": 7},
    "rope_scaling": {"type": "linear"},
    "text_config": {"vocab_size": 3},
    "num_local_experts": 10**9,
    "quantization": {"bits": 3},
    "quantization_config": {"quant_method": "nonesuch"},
    "model_file": "own.py",
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "n_routed_experts": -4,
    "partial_rotary_factor": -1,
    "max_position_embeddings": 0,
    "dtype": 5,
    "torch_dtype": "nonesuch",
}
SECONDS = 30
"""A case that takes longer hangs."""


def sources(folder: Path) -> list[Path]:
    """Whole tiny models: one weights file, two shards, a quantised one, Mistral's own tokenizer."""
    plain, shards, packed, mistral = (folder / name for name in ("plain", "shards", "packed", "mistral"))
    if not mistral.exists():
        tiny.write_llama(plain)
        shutil.copytree(plain, shards)
        _shard(shards)
        _pack(shutil.copytree(plain, packed))
        tiny.write_mistral(mistral)
        tiny.write_rows(folder / "rows.jsonl", tiny.conversations(6))
    return [plain, shards, packed, mistral]


def _shard(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for part in range(2):
        name = f"model-0000{part + 1}-of-00002.safetensors"
        own = {key: value for place, (key, value) in enumerate(sorted(tensors.items())) if place % 2 == part}
        save_file(own, folder / name, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _pack(folder: Path) -> None:
    import mlx.nn as nn

    from tunesmith.model import loading

    net = loading.load(loading.ModelSpec(path=str(folder))).net
    nn.quantize(net, group_size=64, bits=4)
    net.save_weights(str(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 64, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


# What is damaged


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in ``tree``; of long lists and objects the first and the last few."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    keys = keys if len(keys) <= 24 else [*keys[:4], *keys[-4:]]
    return [here for key in keys for here in ((*path, key), *places(tree[key], (*path, key)))]


def spoil_json(path: Path, random: Random) -> str:
    tree = json.loads(path.read_text())
    text = ""
    for _ in range(random.choice((1, 1, 1, 2))):
        where = random.choice(places(tree) or [()])
        if not where:
            break
        parent = tree
        for key in where[:-1]:
            parent = parent[key]
        if random.random() < 0.35:
            del parent[where[-1]]
            text += f" {path.name}: {where} removed"
        else:
            value = random.choice(WEIRD)
            parent[where[-1]] = value
            text += f" {path.name}: {where} = {value!r}"
    path.write_text(json.dumps(tree))
    return text


def spoil_text(path: Path, random: Random) -> str:
    content = path.read_bytes()
    kind = random.randrange(5)
    if kind == 0:
        content = content[: random.randrange(len(content))]
    elif kind == 1:
        content = random.choice(
            (b"", b"[]", b"null", b"7", b'"text"', b"{", b"{}", b"\xff\xfe\x00", b"[" * 100_000)
        )
    else:
        spoilt = bytearray(content)
        for _ in range(random.choice((1, 3, 30))):
            spoilt[random.randrange(len(spoilt))] = random.randrange(256)
        content = bytes(spoilt)
    path.write_bytes(content)
    return f" {path.name}: bytes, kind {kind}"


def config_keys(folder: Path, random: Random) -> str:
    return spoil_json(folder / "config.json", random)


def config_text(folder: Path, random: Random) -> str:
    return spoil_text(folder / "config.json", random)


def config_added(folder: Path, random: Random) -> str:
    path = folder / "config.json"
    key = random.choice(sorted(ADDED))
    value = ADDED[key] if random.random() < 0.6 else random.choice(WEIRD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    return f" config.json: {key} = {value!r} added"


def architecture(folder: Path, random: Random) -> str:
    import mlx_lm.models

    names = sorted(file.stem for file in Path(next(iter(mlx_lm.models.__path__))).glob("*.py"))
    path, name = folder / "config.json", random.choice(names)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": name}))
    return f" config.json: model_type = {name!r}" + (
        config_keys(folder, random) if random.random() < 0.3 else ""
    )


def weights_bytes(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.glob("model*.safetensors")))
    kind = random.choice(("cut", "empty", "zeros", "folder", "gone", "flip", "length"))
    content = path.read_bytes()
    if kind in ("folder", "gone"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return f" {path.name}: {kind}"
    head = 8 + int.from_bytes(content[:8], "little")
    if kind == "flip":
        spoilt = bytearray(content)
        spoilt[random.randrange(head)] = random.randrange(256)
        content = bytes(spoilt)
    length = random.choice((0, 1, head + 5, 2**40, 2**63))
    parts = {
        "cut": content[: random.choice((random.randrange(len(content)), random.randrange(head)))],
        "empty": b"",
        "zeros": bytes(len(content)),
        "flip": content,
        "length": struct.pack("<Q", length) + content[8:],
    }
    path.write_bytes(parts[kind])
    return f" {path.name}: {kind}"


def weights_header(folder: Path, random: Random) -> str:
    path = random.choice(sorted(folder.glob("model*.safetensors")))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = random.choice([key for key in header if key != "__metadata__"])
    kind = random.choice(("dtype", "shape", "offsets", "remove", "rename", "weird"))
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = random.choice(("F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "XX", 3))
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = random.choice(
            (shape[::-1], [], [-1, *shape[1:]], [2**40, 2**40], [*shape, 1], [0], "x")
        )
    elif kind == "offsets":
        entry["data_offsets"] = random.choice(([0, 0], [5, 1], [0, 2**62], [-1, 4], [0, 4], "x"))
    elif kind == "remove":
        del header[name]
    elif kind == "rename":
        header[random.choice(("x", "", "model.layers.99.a", name + ".b", "model.layers.-1.w"))] = header.pop(
            name
        )
    else:
        header[name] = random.choice(WEIRD)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    return f" {path.name}: {kind} of {name}"


def weights_values(folder: Path, random: Random) -> str:
    from safetensors.numpy import load_file, save_file

    path = random.choice(sorted(folder.glob("model*.safetensors")))
    tensors = load_file(path)
    name = random.choice([key for key, value in tensors.items() if value.dtype.kind == "f"])
    value = random.choice((np.nan, np.inf, -np.inf))
    tensors[name].reshape(-1)[random.randrange(tensors[name].size)] = value
    save_file(tensors, path, metadata={"format": "mlx"})
    return f" {path.name}: {value} in {name}"


def index(folder: Path, random: Random) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        path.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    return (spoil_json if random.random() < 0.7 else spoil_text)(path, random)


def tokenizer(folder: Path, random: Random) -> str:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3")
    path = random.choice([folder / name for name in names if (folder / name).is_file()])
    if path.suffix == ".v3" or random.random() < 0.2:
        return spoil_text(path, random)
    return spoil_json(path, random)


def ids(folder: Path, random: Random) -> str:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return tokenizer(folder, random)
    tree = json.loads(path.read_text())
    value = random.choice((320, 321, 4_000, 10**6, 10**9, 2**31, 2**32 - 1, 2**32, -1, 5, 0))
    if random.random() < 0.5:
        token = {"content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False}
        tree["added_tokens"].append(token | {"normalized": False, "special": True, "id": value})
    else:
        tree["model"]["vocab"][random.choice(sorted(tree["model"]["vocab"]))] = value
    path.write_text(json.dumps(tree))
    return f" tokenizer.json: an id is {value}"


def template(folder: Path, random: Random) -> str:
    text = random.choice(
        (
            "",
            "{% for",
            "{{ 1/0 }}",
            "{{ messages[99].content }}",
            "{{ raise_exception('no') }}",
            "constant",
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            7,
            [],
            {"default": 1},
            "{{ x.y.z }}",
        )
    )
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | {"chat_template": text}))
    return f" tokenizer_config.json: chat_template = {text!r}"


DAMAGES: list[Callable[[Path, Random], str]] = [
    config_keys,
    config_keys,
    config_keys,
    config_text,
    config_added,
    architecture,
    architecture,
    weights_bytes,
    weights_header,
    weights_values,
    index,
    tokenizer,
    tokenizer,
    tokenizer,
    ids,
    template,
]


def damaged(folder: Path, number: int) -> tuple[Path, str]:
    """A damaged copy of a tiny model under ``folder``, and what was done to it."""
    random = Random(number)
    target = folder / "case"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(random.choice(sources(folder)), target)
    damage = DAMAGES[number % len(DAMAGES)]
    return target, f"{damage.__name__}:{damage(target, random)}"


class Hang(BaseException):
    """Raised by the alarm."""


def outcome(folder: Path, model: Path) -> tuple[str, str]:
    """("fine" | "error" | "traceback" | "hang", the message): of a dry run, then of a question."""
    import tunesmith
    from tunesmith.errors import TunesmithError

    def stop(number: int, frame: object) -> None:
        raise Hang("took too long")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    sets = ("audit.before_training=false", "adapter.rank=2", "loop.steps=1")
    try:
        settings = tunesmith.configure(model=str(model), data=[str(folder / "rows.jsonl")], sets=sets)
        tunesmith.plan(settings)
        tunesmith.generate(str(model), ["the cat"], max_tokens=2)
    except TunesmithError as error:
        return "hang" if "took too long" in str(error) else "error", str(error)
    except Hang:
        return "hang", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.alarm(0)
    return "fine", ""


def main() -> None:
    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for number in range(first, last):
        model, damage = damaged(folder, number)
        print(json.dumps({"case": number, "damage": damage, "starts": True}), flush=True)
        kind, text = outcome(folder, model)
        print(json.dumps({"case": number, "damage": damage, "outcome": kind, "text": text}), flush=True)


if __name__ == "__main__":
    main()
