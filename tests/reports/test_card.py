"""A model card is read back by the hub's own code, holds the run's numbers, invents nothing and names no
folder of its maker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from reports.test_comparison import HOSTILE, a_run, benchmarked, evaluated, unfenced

from tunesmith.data.sources import sha256
from tunesmith.errors import ModelError
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.tasks import about
from tunesmith.evaluation.tasks.drift import SafetyDrift
from tunesmith.reports import card, facts, to_json
from tunesmith.reports.summary import summarise
from tunesmith.runs.directory import VALID

SECTIONS = [
    "What it is",
    "Intended use",
    "How it was trained",
    "Data",
    "Results",
    "Retention and safety",
    "Limits",
    "How to use it",
    "How to make it again",
    "Environment",
]


def with_settings(run: Path, **changed: object) -> Path:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in changed.items():
        part, _, name = key.partition("__")
        config.setdefault(part, {})[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def with_checkpoint(run: Path) -> Path:
    (run / "checkpoints").mkdir()
    kept = {"last": 40, "best": 20, "metric": "validation loss", "best_value": 1.0, "kept": [20, 40]}
    (run / "checkpoints" / "index.json").write_text(json.dumps(kept))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    base = tmp_path / "bases" / "a-model"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    run = with_checkpoint(a_run(tmp_path / "people" / "ann" / "the-run"))
    with_settings(run, model__path=str(base), adapter__kind="lora", adapter__rank=8)
    evaluated(run, [1.0] * 40 + [0.0] * 20)
    return run


def read(run: Path) -> ModelCard:
    return ModelCard.load(card.write(summarise(run)))


def text_of(run: Path) -> str:
    return card.text(summarise(run))


def data_of(run: Path) -> dict:
    """What the metadata says, read by the hub's client and once more by YAML alone."""
    found = read(run)
    assert isinstance(found.data, ModelCardData)
    plain = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text_of(run), re.DOTALL)[1])  # type: ignore[index]
    assert yaml.safe_load(found.data.to_yaml()) == plain
    return plain


def test_the_hubs_client_reads_back_what_was_written_and_writes_it_the_same(run):
    found = read(run)
    assert found.content == (run / card.CARD).read_text(encoding="utf-8") == text_of(run)
    assert (
        found.data.library_name == "mlx"
        and found.data.license == "apache-2.0"
        and found.data.base_model is None
    )
    assert (
        found.data.tags == ["mlx", "mlx-lm", "tunesmith", "lora", "sft"]
        and found.data.model_name == "the-run"
    )
    assert re.findall(r"^## (.*)$", found.text, re.MULTILINE) == SECTIONS


def test_each_result_is_a_number_of_the_report_with_its_interval_and_the_hash_of_its_rows(run):
    evaluated(run, [1.0] * 30 + [0.0] * 10, task=_Safety)
    wanted = {f"{one['task']}.{one['name']}": one for one in to_json(summarise(run))["answers"]}
    results = read(run).data.eval_results
    assert results is not None and {one.metric_type for one in results} == set(wanted) and len(wanted) == 2
    for one in results:
        score = wanted[one.metric_type]
        assert score["unit"] == "%" and one.verified is False  # a share to us, per cent to readers of the hub
        assert one.metric_value == pytest.approx(100 * score["value"]) and one.metric_args is not None
        ends = {key: pytest.approx(100 * score[key]) for key in ("low", "high")}
        assert one.metric_args == {"n": score["n"], "unit": "%", **ends}
        own = one.metric_type.startswith("tool_calls")
        assert (
            one.dataset_revision == (sha256(run / VALID) if own else None)
            and (one.dataset_type == "held-out") == own
        )


class _Safety:
    """The safety task's name and numbers, over examples of this file."""

    name, version = "drift.safety", SafetyDrift.version
    statistics = (
        Statistic("refusal", lambda one: one.value, share=True, better="higher", headline=True, unit="%"),
    )


def test_a_result_says_what_was_asked_how_much_of_it_and_by_which_checkpoint(run):
    (folder,) = (run / "evals").iterdir()
    about = json.loads((folder / "score.json").read_text())

    def told(**changed: object) -> tuple[str, str]:
        (folder / "score.json").write_text(json.dumps(about | changed))
        (row,) = [
            line for line in text_of(run).splitlines() if line.startswith("| Tool calls right (tool_calls) |")
        ]
        results = read(run).data.eval_results
        assert results is not None
        return row.split(" | ")[-1].removesuffix(" |"), results[0].dataset_name

    assert told(checkpoint="000020") == ("held-out rows", "held-out rows of the run")
    assert told(checkpoint="000020", settings={"limit": 6}) == (
        "held-out rows, first 6",
        "held-out rows of the run, first 6",
    )
    files = told(checkpoint="000004", data=["/home/ann/x.jsonl"], settings={})
    assert files == ("x.jsonl, checkpoint of step 4", "tool_calls, x.jsonl, checkpoint of step 4")
    assert "The base was not asked, so nothing is compared." in text_of(run) and "Both sides" not in text_of(
        run
    )


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, "its suite"),
        ({"safety": ["/x/a.jsonl"], "chats": ["no.jsonl"]}, "a.jsonl"),
        ({"limit": 9}, "its suite, 9, evenly by kind"),
    ],
)
def test_a_suite_is_named_as_one_and_files_in_its_place_by_their_names(run, settings, asked):
    evaluated(run, [1.0] * 30 + [0.0] * 10, task=_Safety, checkpoint="000020", settings=settings)
    assert f"| {asked} |" in text_of(run) and "unknown rows" not in text_of(run)


def test_a_benchmark_has_its_place_with_its_shots(run):
    benchmarked(run, 1, 0.8, checkpoint="000020", settings={"shots": 5})
    (row,) = [line for line in text_of(run).splitlines() if "(benchmark.mmlu_stem acc_norm) |" in line]
    assert row.endswith("| its suite, 5 solved examples |")
    results = read(run).data.eval_results
    assert results is not None
    (one,) = [one for one in results if one.metric_type == "benchmark.mmlu_stem.acc_norm"]
    assert (
        one.dataset_type == "benchmark.mmlu_stem"
        and one.metric_args is not None
        and one.metric_args["n"] == 60
    )


def test_what_makes_it_again_makes_another_folder(run):
    name, text = run.name, text_of(run)
    assert f"tunesmith train --config {name}/config.yaml --out {name}-again\n" in text


def test_a_card_of_facts_at_hand_reads_none_again(run, monkeypatch):
    found, text = summarise(run), text_of(run)
    monkeypatch.setattr(facts, "read", None)
    assert card.write(found).read_text(encoding="utf-8") == text


def test_what_is_known_is_said_and_what_is_not_is_said_to_be_unknown(run, tmp_path):
    text = text_of(run)
    for words_ in (
        "a LoRA adapter for a-model, made by tunesmith 0.1.0: 10 of 100 weights were trained",
        "that of step 20",
        "Licence of the base: apache-2.0",
        "Languages: unknown",
        "| Tool calls right (tool_calls) | – | 66.7 % (",
        "9 trained on",
        "--model a-model --adapter-path the-run/checkpoints/000020",
        "| updates took | 20 s |",
        "were not audited",
        "Not measured. This does:\n\n```sh\ntunesmith evaluate the-run --task drift\n```",
    ):
        assert words_ in text, words_
    bare = a_run(tmp_path / "bare")
    (bare / "events.jsonl").unlink()
    (bare / "manifest.json").write_text('{"status": "running"}')
    text = text_of(bare)
    for words_ in (
        "an adapter of unknown kind for m",
        "It has no checkpoint yet",
        "Licence: unknown",
        "Not measured. This does:",
        "There is nothing to use yet",
    ):
        assert words_ in text, words_
    assert (
        "license" not in data_of(bare)
        and "model-index" not in data_of(bare)
        and "base_model" not in data_of(bare)
    )
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS


@pytest.mark.parametrize(
    ("path", "hub"),
    [("owner/a-model", "owner/a-model"), ("/no/such/folder", None), ("./owner/x", None), ("a", None)],
)
def test_a_base_is_named_where_it_has_a_name_on_the_hub(run, path, hub):
    assert data_of(with_settings(run, model__path=path)).get("base_model") == hub


@pytest.mark.parametrize(
    "front", ["license: [a, b]", "license: 'x\n  y: <b>'", ": :", "licence: mit", "license: MY OWN"]
)
def test_a_licence_that_cannot_be_read_is_left_out(run, front):
    base = Path(yaml.safe_load((run / "config.yaml").read_text())["model"]["path"])
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    assert "license" not in data_of(run) and "Licence: unknown" in text_of(run)


def test_a_gguf_file_says_its_own_licence(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_string("general.base_model.0.repo_url", "https://huggingface.co/owner/a-model")
    writer.add_tensor("w", np.zeros(4, np.float32))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    found = data_of(with_settings(run, model__path=str(path)))
    assert found["license"] == "mit" and found["base_model"] == "owner/a-model"
    assert "does not load it: the base is a GGUF file" in text_of(
        run
    ) and "mlx_lm.generate --model" not in text_of(run)
    path.write_bytes(b"another file now")
    assert "license" not in data_of(run)


def test_texts_of_a_gguf_header_are_those_that_its_own_reader_finds_and_a_torn_one_is_an_error(tmp_path):
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    from tunesmith.model.gguf.header import texts

    writer = GGUFWriter(path := tmp_path / "x.gguf", "llama")
    writer.add_license("mit")
    for name in (
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "float32",
        "uint64",
        "int64",
        "float64",
        "bool",
    ):
        getattr(writer, f"add_{name}")(f"x.{name}", 1)
        writer.add_array(f"y.{name}", [1, 2, 3])
    writer.add_array("tokens", ["a", "ü", ""])
    writer.add_array("nested", [["a", "b"], ["c"]])
    writer.add_string("tokenizer.chat_template", "{{ 'ü' }}\n" * 99)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    fields = {
        name: field
        for name, field in GGUFReader(path).fields.items()
        if field.types == [GGUFValueType.STRING]
    }
    assert texts(path) == {name: field.contents() for name, field in fields.items()} and len(fields) == 3
    whole = path.read_bytes()
    for end in [*range(0, len(whole) - 32, 7), len(whole) - 32]:
        path.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="is not a GGUF file with a readable header"):
            texts(path)


def test_languages_are_those_that_the_audit_told(run):
    what = "languages of 200 rows with enough words to tell: en 90.0%, de 8.5%, fr 1.5%"
    finding = {
        "rule": "content.languages",
        "severity": "note",
        "what": what,
        "count": 3,
        "of": 200,
        "hint": "",
        "accepted": None,
    }
    warned = {**finding, "rule": "content.secrets", "severity": "warning", "what": "a key: hunter2"}
    (run / "data" / "audit.json").write_text(
        json.dumps({"verdict": "fit", "rows": 200, "findings": [finding, warned]})
    )
    assert data_of(run)["language"] == ["en", "de"]
    text = text_of(run)
    assert (
        "Languages of the rows: en 90%, de 8%, fr 2%." in text
        and "| content.secrets | warning | 3 of 200 rows |" in text
    )
    assert "hunter2" not in text  # a card is for others, and quotes no row


def test_no_folder_of_the_maker_is_in_it(run):
    with_settings(run, data__train=["/home/ann/secret-project/rows.jsonl"])
    origins = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps(origins | {"data.train": "--data"}))
    text = text_of(run)
    assert "rows.jsonl" in text and "the-run" in text
    for part in ("secret-project", "people", "/ann", "bases", str(run.parent)):
        assert part not in text, part


def test_no_text_is_more_than_text(tmp_path):
    name = HOSTILE.replace("/", "").replace("\x00", "").replace("\ud800", "")[:60] + "\n---\nlicense: mit"
    run = with_checkpoint(
        a_run(tmp_path / name, versions={"tunesmith": HOSTILE}, machine={"device": f"---\n{HOSTILE}"})
    )
    evaluated(run, [1.0, 0.0], name="of a", version="1", text=HOSTILE)
    found = data_of(run)
    assert "license" not in found and set(found) <= {"library_name", "pipeline_tag", "tags", "model-index"}
    text = text_of(run)
    body = text.split("\n---\n", 1)[1]
    assert (
        [line for line in unfenced(body) if "<" in line] == [] and "\x1b" not in text and "\u202e" not in text
    )


def test_every_question_of_the_report_has_its_place(run):
    evaluated(run, [1.0] * 30 + [0.0] * 10, task=_Safety)
    text = text_of(run)
    kept = text[text.index("## Retention and safety") : text.index("## Limits")]
    for one in to_json(summarise(run))["answers"]:
        assert (f"({one['task']}" in kept) == (about(one["task"]).question in ("retention", "safety"))
