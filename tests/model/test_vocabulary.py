"""Ids beyond the embedding: an error with token, id, size and place wherever ids enter; rows on request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import tiny
import tunesmith
from tunesmith import adapters
from tunesmith.adapters import LoRA
from tunesmith.engine import generation, scoring
from tunesmith.errors import ModelError
from tunesmith.evaluation.harness.requests import HarnessRequest, likelihoods
from tunesmith.evaluation.tasks.drift import distributions
from tunesmith.model import loading, vocabulary
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.settings.config import Resolved
from tunesmith.tokens import renderers
from tunesmith.tokens.batches import BatchSpec, Cut, Group
from tunesmith.tokens.template import Tokens

NEW = "<|tool|>"
QUICK = (
    "loop.steps=4",
    "batch.sequences=4",
    "loop.sample_tokens=4",
    "adapter.rank=2",
    "audit.before_training=false",
)


def load(path: Path, **values) -> loading.Loaded:
    return loading.load(loading.ModelSpec(path=str(path), **values))


def with_new_token(source: Path, target: Path) -> Path:
    """The model with one more token in its tokenizer, and as many rows in its embedding as before."""
    shutil.copytree(source, target)
    words = json.loads((target / "tokenizer.json").read_text())
    size = len(words["model"]["vocab"])
    token = {"id": size, "content": NEW, "special": False, "normalized": False}
    words["added_tokens"].append(token | {"single_word": False, "lstrip": False, "rstrip": False})
    (target / "tokenizer.json").write_text(json.dumps(words))
    return target


def untied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.fixture
def grown(tiny_model, tmp_path) -> Path:
    return with_new_token(tiny_model, tmp_path / "grown")


@pytest.fixture
def size(tiny_model) -> int:
    return len(load_file(tiny_model / "model.safetensors")["model.embed_tokens.weight"])


@pytest.fixture
def rows(tmp_path) -> Path:
    """Only the third row has the new token, in its answer."""
    texts = tiny.conversations(12)
    texts[2]["conversations"][-1]["content"] += NEW
    return tiny.write_rows(tmp_path / "rows.jsonl", texts)


def settings(model: Path, data: Path, *sets: str) -> Resolved:
    return tunesmith.configure(model=str(model), data=[str(data)], sets=[*QUICK, *sets])


def refused(error: ModelError, size: int) -> bool:
    text = str(error)
    return f"has {size} rows" in text and f"id {size}" in text


# Limits


def test_limits_are_the_rows_of_the_embedding(tiny_model, size):
    assert vocabulary.limits(load(tiny_model).net) == (size, None)
    assert vocabulary.limits(load(tiny_model, quantize=4).net) == (size, None)
    assert vocabulary.stored(tiny_model) == size


class Positions(nn.Module):
    """Tokens and learned positions, as in GPT-2, and a table that is indexed with neither."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.buckets = nn.Embedding(40, 4), nn.Embedding(7, 4), nn.Embedding(2, 4)

    def __call__(self, ids: mx.array, cache: object = None) -> mx.array:
        return self.words(ids) + self.places(mx.arange(ids.shape[1])) + self.buckets(mx.ones_like(ids))


def test_learned_positions_are_a_limit_too():
    net = Positions()
    assert vocabulary.limits(net) == (40, 7)
    vocabulary.require_known(net, [("row", [39] * 7)])
    with pytest.raises(ModelError, match="row: 8 tokens, and the model has learned positions for 7"):
        vocabulary.require_known(net, [("row", [39] * 8)])


def test_every_id_is_listed_once_with_its_first_place():
    rows = [("a:1", [1, 9]), ("a:2", np.array([12, 9])), ("a:3", [-1])]
    with pytest.raises(ModelError) as caught:
        vocabulary.require(9, rows, lambda ids: f"word{ids[0]}")
    text = str(caught.value)
    assert "has 9 rows" in text and "id 9 ('word9') in a:1 and 1 more" in text
    assert "id 12 ('word12') in a:2" in text and "id -1" in text and "model.resize_embeddings" in text


# Wherever ids enter


def test_training_and_its_dry_run_stop_before_any_weight_is_loaded(grown, rows, size, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were loaded"))
    for verb in (
        lambda: tunesmith.train(settings(grown, rows), out=tmp_path / "run"),
        lambda: tunesmith.plan(settings(grown, rows)),
    ):
        with pytest.raises(ModelError) as caught:
            verb()
        assert (
            refused(caught.value, size) and NEW in str(caught.value) and "rows.jsonl:3" in str(caught.value)
        )
    assert not (tmp_path / "run").exists()


def test_held_out_rows_are_bounded_as_well(grown, rows, size, tmp_path):
    clean = tiny.write_rows(tmp_path / "clean.jsonl", tiny.conversations(9, seed=4))
    with pytest.raises(ModelError) as caught:
        tunesmith.plan(settings(grown, clean, f"data.valid=[{json.dumps(str(rows))}]"))
    assert refused(caught.value, size) and "rows.jsonl:3" in str(caught.value)


def test_the_weights_are_asked_where_config_json_does_not_say(grown, rows, size, monkeypatch):
    monkeypatch.setattr(vocabulary, "stored", lambda folder: None)
    with pytest.raises(ModelError) as caught:
        tunesmith.plan(settings(grown, rows))
    assert refused(caught.value, size)


def test_another_tokenizer_is_refused(tiny_model, rows, size):
    with pytest.raises(ModelError, match=f"which has {size} rows"):
        tunesmith.plan(settings(tiny_model, rows, "model.tokenizer=mistral-v3"))


@pytest.mark.parametrize("embed", [True, False])
def test_the_audit_finds_the_row(grown, rows, size, embed):
    audit = tunesmith.audit(str(rows), model=str(grown), embed=embed, processes=1)
    (finding,) = [finding for finding in audit.findings if finding.rule == "tokenisation.embedding"]
    assert finding.severity == "error" and [row.source for row in finding.rows] == [f"{rows}:3"]
    assert f"{size} ({NEW!r})" in finding.rows[0].note and f"{size} rows" in finding.rows[0].note


def test_the_audit_is_silent_without_a_model(rows):
    audit = tunesmith.audit(str(rows), processes=1)
    assert not [finding for finding in audit.findings if finding.rule == "tokenisation.embedding"]


def test_generating_names_the_token(grown, size):
    with pytest.raises(ModelError) as caught:
        tunesmith.generate(str(grown), ["hello", f"use {NEW} now"])
    assert refused(caught.value, size) and NEW in str(caught.value) and "prompt 1" in str(caught.value)
    with pytest.raises(ModelError) as caught:
        list(tunesmith.chat(str(grown)).say(NEW))
    assert refused(caught.value, size) and NEW in str(caught.value)


def test_no_function_indexes_with_an_unknown_id(tiny_model, size):
    net = load(tiny_model).net
    tokens = Tokens(np.array([1, 2, size], np.int32), np.ones(3, np.float32))
    for call in (
        lambda: generation.generate(net, [[1, 2], [1, size]], eos_ids=(), max_tokens=2),
        lambda: next(generation.stream(net, [size], eos_ids=())),
        lambda: scoring.sequence_sums(net, [Group((tokens,), "rows:1")], Cut(64)),
        lambda: likelihoods(net, [HarnessRequest((1, size), (2,))], BatchSpec()),
        lambda: likelihoods(net, [HarnessRequest((1,), (2, size))], BatchSpec()),
        lambda: distributions(net, [1, size, 2], 1, True),
        lambda: generation.generate(net, [[-1]], eos_ids=()),
    ):
        with pytest.raises(ModelError, match=f"which has {size} rows"):
            call()


def test_ids_of_a_larger_model_are_shown_as_replacement_characters():
    renderer = renderers.load("mistral-v3")
    assert renderer.size == 32768
    ids = renderer.text_prompt("a cat")
    assert renderer.decode([*ids[1:], 40_000]) == renderer.decode(ids[1:]) + "\ufffd"


# Resizing


def test_new_rows_are_the_mean_and_the_old_ones_stay(tiny_model, grown, size):
    for quantize in (None, 8):
        net, base = (
            load(grown, resize_embeddings=True, quantize=quantize).net,
            load(tiny_model, quantize=quantize).net,
        )
        ids = mx.array([[5, 77, 130, 9]])
        old, logits = np.array(base(ids)), np.array(net(ids))
        assert logits.shape[-1] == size + 1 == vocabulary.limits(net).ids
        np.testing.assert_array_equal(logits[..., :size], old)
        table = np.array(base.model.embed_tokens(mx.arange(size)))
        np.testing.assert_allclose(logits[..., size], old.mean(axis=-1), atol=1e-4)
        new = net.model.embed_tokens(mx.array([[size]], dtype=mx.uint32))
        np.testing.assert_allclose(np.array(new)[0, 0], table.mean(axis=0), atol=1e-6)
        assert not tree_flatten(net.trainable_parameters())


def test_an_untied_head_grows_too(tiny_model, tmp_path, size):
    folder = with_new_token(untied(tiny_model, tmp_path / "untied"), tmp_path / "grown")
    net = load(folder, resize_embeddings=True).net
    logits = np.array(net(mx.array([[1, 2, size]])))
    assert logits.shape[-1] == size + 1 and isinstance(net.lm_head, vocabulary.ExtendedHead)
    np.testing.assert_allclose(logits[..., size], logits[..., :size].mean(axis=-1), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_embedding_and_head_grow_and_train(tiny_model, tmp_path, size, tied):
    """As on a GPU, where the weights stay packed; on a CPU loading turns them into float32."""
    net = load(tiny_model if tied else untied(tiny_model, tmp_path / "untied")).net
    nn.quantize(net, 32, 4)
    net.freeze()
    ids = mx.array([[5, 77, 130, 9]])
    old, table = np.array(net(ids)), np.array(net.model.embed_tokens(mx.arange(size)))
    assert vocabulary.resize(net, size + 2) == 2 and vocabulary.limits(net).ids == size + 2
    logits = np.array(net(ids))
    np.testing.assert_array_equal(logits[..., :size], old)
    np.testing.assert_allclose(logits[..., size:], old.mean(axis=-1, keepdims=True).repeat(2, -1), atol=1e-4)
    new = np.array(net.model.embed_tokens(mx.array([[size, size + 1]], dtype=mx.uint32)))
    np.testing.assert_allclose(new[0], table.mean(axis=0)[None].repeat(2, 0), atol=1e-6)
    LoRA(rank=2).attach(net, 0)
    row = mx.array([[1, size, 4, size + 1, 2]])

    def loss(tree) -> mx.array:
        net.update(tree)
        return nn.losses.cross_entropy(net(row)[:, :-1], row[:, 1:], reduction="sum")

    slopes = dict(tree_flatten(mx.grad(loss)(net.trainable_parameters())))
    names = ["model.embed_tokens.rows", *(() if tied else ("lm_head.rows",))]
    assert all((mx.abs(slopes[name]).max(axis=1) > 0).all() for name in names)


def test_the_old_table_is_never_indexed_beyond_its_rows():
    """What it would read there is not used, but it is another's memory."""

    class Bounded(nn.Embedding):
        def __call__(self, ids: mx.array) -> mx.array:
            assert 0 <= mx.min(ids).item() and mx.max(ids).item() < len(self.weight)
            return super().__call__(ids)

    grown = vocabulary.ExtendedEmbedding(Bounded(5, 4), 5, mx.ones((2, 4)))
    for dtype in (mx.int32, mx.uint32):
        values = np.array(grown(mx.array([[0, 4, 5, 6]], dtype=dtype)))
        np.testing.assert_array_equal(values[0, 2:], np.ones((2, 4)))


def test_a_head_with_biases_grows_by_the_mean_of_them():
    head = nn.Linear(4, 3)
    grown = vocabulary.ExtendedHead(head, mx.ones((2, 4)), mx.array([5.0, 7.0]))
    x = mx.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(np.array(grown(x)), np.concatenate([np.array(head(x)), [[15, 17]]], axis=1))


class Tables(nn.Module):
    """Two token embeddings of 40 and 50 rows, and a head of its own size."""

    def __init__(self, n_tables: int, n_heads: int, width: int = 40) -> None:
        super().__init__()
        self.tables = [nn.Embedding(40 + 10 * number, 4) for number in range(n_tables)]
        self.heads = [nn.Linear(4, width) for _ in range(n_heads)]
        self.layers = []

    def __call__(self, ids: mx.array, cache: object = None) -> mx.array:
        x = sum(table(ids) for table in self.tables)
        return self.heads[0](x) if self.heads else x


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Tables(2, 1), "one token embedding can be resized, this model reads tables.0, tables.1"),
        (Tables(1, 2), "one output projection can be resized, this model has"),
        (Tables(1, 1, width=33), "does not follow its embedding: 33 logits, 42 rows"),
    ],
)
def test_a_model_that_cannot_be_resized_is_refused(net, reason):
    assert vocabulary.limits(net).ids == 40
    with pytest.raises(ModelError, match=reason):
        vocabulary.resize(net, 42)


def test_rows_are_counted_by_the_text_model_of_a_wrapper(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, "text_config": {"vocab_size": 5}}))
    assert vocabulary.stored(tmp_path) == 5


def test_the_old_rows_are_trained_too_if_they_are_named(grown, rows, size, tmp_path):
    """New rows alone are trained by default: Adam's state for all of them would be twice the embedding."""
    sets = (
        "model.resize_embeddings=true",
        "adapter.full_modules=[embed_tokens]",
        "optimizer.learning_rate=1e-2",
    )
    run = tunesmith.train(settings(grown, rows, *sets), out=tmp_path / "run")
    saved = load_file(checkpoints.choose(run, "last") / adapters.WEIGHTS)
    assert saved["model.embed_tokens.rows"].shape == (1, 64)
    assert saved["model.embed_tokens.base.weight"].shape == (size, 64)
    before = load_file(grown / "model.safetensors")["model.embed_tokens.weight"]
    assert np.abs(saved["model.embed_tokens.base.weight"] - before).max() > 1e-3
    assert len(tunesmith.generate(str(run.path), [f"say {NEW}"], max_tokens=2)) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_on_a_resized_quantised_base_is_evaluated_and_chatted_with(grown, rows, tmp_path, tied):
    folder = grown if tied else untied(grown, tmp_path / "untied")
    sets = ("model.resize_embeddings=true", "model.quantize=4", "model.group_size=32")
    run = tunesmith.train(settings(folder, rows, *sets), out=tmp_path / "run")
    tunesmith.evaluate(run.path, tasks=["drift"])
    assert list((run.path / "evals").rglob("*.json"))
    assert isinstance("".join(tunesmith.chat(str(run.path), max_tokens=3).say(f"say {NEW}")), str)


def test_resizing_is_part_of_the_fingerprint_only_if_rows_are_added(tiny_model, grown):
    assert load(tiny_model, resize_embeddings=True).fingerprint == load(tiny_model).fingerprint
    assert load(grown, resize_embeddings=True).fingerprint != load(grown).fingerprint


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ["adapter=lora", "adapter=dora", "adapter=full"])
def test_the_rows_are_trained_saved_resumed_and_asked(grown, rows, size, tmp_path, tied, adapter):
    folder = grown if tied else untied(grown, tmp_path / "untied")
    sets = ("model.resize_embeddings=true", adapter, "optimizer.learning_rate=1e-2")
    quick = [text for text in QUICK if not (adapter == "adapter=full" and text.startswith("adapter."))]

    def configured(*more: str) -> Resolved:
        return tunesmith.configure(model=str(folder), data=[str(rows)], sets=[*quick, *sets, *more])

    straight = tunesmith.train(configured("loop.save_every=2"), out=tmp_path / "straight")
    saved = load_file(checkpoints.choose(straight, "last") / adapters.WEIGHTS)
    names = ["model.embed_tokens.rows", *(() if tied else ("lm_head.rows",))]
    start = dict(tree_flatten(load(folder, resize_embeddings=True).net.parameters()))
    for name in names:
        assert saved[name].shape == (1, 64) and np.abs(saved[name] - np.array(start[name])).max() > 1e-3

    stopped = tmp_path / "stopped"
    shutil.copytree(straight.path, stopped)
    shutil.rmtree(stopped / "checkpoints" / "000004")
    Run.open(stopped).mark("interrupted")
    resumed = tunesmith.train(resume=stopped)
    again = (checkpoints.choose(resumed, "last") / adapters.WEIGHTS).read_bytes()
    assert again == (checkpoints.choose(straight, "last") / adapters.WEIGHTS).read_bytes()
    assert len(tunesmith.generate(str(straight.path), [f"say {NEW}"], max_tokens=3)) == 1


def test_training_lowers_the_loss_of_the_new_token(grown, tmp_path, size):
    """Of a language in which the answer is always the new token."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": NEW}]
    texts = [{"conversations": [dict(turns[0], content=f"number {n}"), turns[1]]} for n in range(16)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", texts)
    sets = ("model.resize_embeddings=true", "optimizer.learning_rate=3e-2", "loop.steps=30", "data.valid=0")
    run = tunesmith.train(settings(grown, data, *sets), out=tmp_path / "run")
    assert tunesmith.generate(str(run.path), ["number 3"], max_tokens=1) == [NEW]


def test_an_adapter_with_rows_merges_into_a_resized_base_only(grown, rows, tmp_path, size):
    run = tunesmith.train(settings(grown, rows, "model.resize_embeddings=true"), out=tmp_path / "run")
    values = {"path": str(grown), "adapter": str(checkpoints.choose(run, "last"))}
    merged = adapters.merging.load(loading.ModelSpec(resize_embeddings=True, **values)).net
    tuned = load(grown, resize_embeddings=True).net
    adapters.load(tuned, checkpoints.choose(run, "last"))
    tuned.eval()
    ids = mx.array([[3, size, 4]])
    np.testing.assert_allclose(np.array(merged(ids)), np.array(tuned(ids)), atol=1e-4)
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.rows"):
        adapters.merging.load(loading.ModelSpec(**values))


def test_mlx_lm_refuses_an_adapter_with_rows_by_name(grown, rows, tmp_path):
    from mlx_lm.utils import load as mlx_lm_load

    run = tunesmith.train(settings(grown, rows, "model.resize_embeddings=true"), out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.rows"):
        mlx_lm_load(str(grown), adapter_path=str(checkpoints.choose(run, "last")))


def test_several_adapters_cannot_share_rows(grown, rows, tmp_path):
    run = tunesmith.train(settings(grown, rows, "model.resize_embeddings=true"), out=tmp_path / "run")
    net = load(grown, resize_embeddings=True).net
    with pytest.raises(ModelError, match="trains rows of new tokens"):
        adapters.Routing(net, {"a": adapters.read(checkpoints.choose(run, "last"))})
