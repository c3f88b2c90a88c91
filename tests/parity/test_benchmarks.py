"""The same numbers as lm-evaluation-harness with its own model class: transformers on torch, one process,
live."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation.tasks.test_benchmarks import QUESTIONS, material

from tunesmith.demo import __main__ as demo
from tunesmith.evaluation.harness.requests import language_model
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import benchmarks
from tunesmith.model import loading as model
from tunesmith.tokens import renderers
from tunesmith.tokens.batches import BatchSpec

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def both(path: Path):
    """(ours, the harness's own) over the weights of one folder."""
    pytest.importorskip("torch")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = model.load(model.ModelSpec(path=str(path)))
    subject = Subject(loaded.net, renderers.load(loaded.path), "base", BatchSpec(), 8)
    net = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32).eval()
    theirs = HFLM(
        pretrained=net, tokenizer=AutoTokenizer.from_pretrained(loaded.path), batch_size=4, device="cpu"
    )
    return language_model(subject, "ours"), theirs


def compare(ours, theirs, task) -> int:
    requests = [request for part in task._parts for one in part.documents for request in one.requests]
    mine, others = (
        ours.loglikelihood(requests, disable_tqdm=True),
        theirs.loglikelihood(requests, disable_tqdm=True),
    )
    assert [one[0] for one in mine] == pytest.approx([one[0] for one in others], abs=1e-3, rel=0)
    assert [one[1] for one in mine] == [one[1] for one in others]
    return len(requests)


def test_log_likelihoods_of_a_tiny_model(tiny_model, data_dir):
    ours, theirs = both(tiny_model)
    for task in benchmarks.build(
        material(data_dir("benchmarks"), "mmlu:anatomy", "hellaswag", "winogrande", limit=4)
    ):
        assert compare(ours, theirs, task) >= 8


def test_text_of_a_tiny_model(tiny_model, data_dir):
    ours, theirs = both(tiny_model)
    (task,) = benchmarks.build(material(data_dir("benchmarks"), "gsm8k", limit=3))
    requests = [request for one in task._parts[0].documents for request in one.requests]
    for request in requests:
        request.args[1]["max_gen_toks"] = 32
    said = ours.generate_until(requests, disable_tqdm=True)
    assert said == theirs.generate_until(requests, disable_tqdm=True) and all(said)
    stops = [one[len(one) // 2 :][:3] for one in said]
    for request, stop in zip(requests, stops, strict=True):
        request.args[1]["until"] = [stop]
    cut = ours.generate_until(requests, disable_tqdm=True)
    assert cut == theirs.generate_until(requests, disable_tqdm=True) and cut != said


def test_rolling_log_likelihood_of_a_tiny_model(tiny_model):
    from lm_eval.api.instance import Instance

    ours, theirs = both(tiny_model)
    theirs.custom_prefix_token_id = ours.prefix_token_id
    requests = [Instance("loglikelihood_rolling", {}, (" ".join(QUESTIONS) * times,), 0) for times in (1, 3)]
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-3, rel=0)


def test_log_likelihoods_of_the_demo_model(data_dir, tmp_path):
    ours, theirs = both(demo.fetch_model(tmp_path))
    folder = data_dir("benchmarks")
    compared = 0
    for settings in ({"shots": 0, "limit": 6}, {"shots": 5, "limit": 2}):
        compared += compare(ours, theirs, *benchmarks.build(material(folder, "mmlu:anatomy", **settings)))
    compared += compare(ours, theirs, *benchmarks.build(material(folder, "hellaswag", limit=6)))
    assert compared == 4 * (6 + 2 + 6)
