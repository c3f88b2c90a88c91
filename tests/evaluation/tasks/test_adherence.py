"""Adherence: IFEval's own code, rouge-score, sacreBLEU and jsonschema agree; a reference is perfect; nothing
makes it raise."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import random
import re
import warnings
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tiny
from tunesmith import adapters
from tunesmith.checks import constraints, similarity
from tunesmith.checks.constraints import KINDS, constraint, declared, inferred, sentences
from tunesmith.data.formats import (
    Call,
    Completion,
    Conversation,
    DataSpec,
    Demonstration,
    Judged,
    Message,
    read,
)
from tunesmith.errors import DataError
from tunesmith.evaluation.statistics import summarise
from tunesmith.evaluation.subject import Said, Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, adherence, tool_calls
from tunesmith.evaluation.tasks.adherence import (
    WEIGHTS,
    AdherenceAnswer,
    AdherencePrompt,
    build,
    language,
    loops,
    score,
)
from tunesmith.events import Notice
from tunesmith.learning.objectives.sft import SFT
from tunesmith.model import loading as model
from tunesmith.tokens import renderers
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import TemplateSpec

PROSE = (
    "The library opens at nine in the morning and closes at six. On Sundays it stays shut, but the café "
    "next to it is open "
    "all day. You can return books at any hour through the slot beside the front door."
)
LISTED = "Here is what you need:\n\n- a pan\n- two eggs\n- a little salt\n\nMix them well."
CODE = "Use this:\n\n```python\nprint('hello')\n```\n\nIt prints one word."


@pytest.fixture(scope="module")
def renderer(tiny_model):
    return renderers.load(tiny_model)


def material(examples, renderer, notes=None, net=None, **spec):
    notify = (lambda event: None) if notes is None else notes.append
    spec = EvaluationSpec(**{"embed": net is not None} | spec)
    return Material(
        examples, examples, [], renderer, TemplateSpec(), BatchSpec(), spec, notify=notify, net=net
    )


def row(answer, line=1, ask="Tell me.", tools=(), calls=(), **metadata):
    talk = Conversation((Message("user", ask), Message("assistant", answer, calls)), tools)
    return Demonstration(talk, source=f"rows.jsonl:{line}", metadata=metadata)


def asked(answer, renderer, **options) -> AdherencePrompt:
    (task,) = build(material([row(answer, **options)], renderer, max_tokens=4096))
    return task.asked[0]


def said(text: str, cut: bool = False) -> Said:
    return Said(text, len(text), cut)


def keeps(kind: str, text: str, **given) -> bool | None:
    return constraint(kind, given).holds(text)


# IFEval


@pytest.fixture(scope="module")
def ifeval():
    """IFEval's checkers as lm-evaluation-harness has them. NLTK's data are not here: its rules alone tell
    words and sentences."""
    pytest.importorskip("lm_eval")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("LOCAL_RANK", "1")  # the first rank would download
        registry = pytest.importorskip("lm_eval.tasks.ifeval.instructions_registry")
        import langdetect
        from lm_eval.tasks.ifeval import instructions_util
        from nltk.tokenize import NLTKWordTokenizer
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        patch.setattr(instructions_util.nltk, "word_tokenize", NLTKWordTokenizer().tokenize)
        patch.setattr(instructions_util, "_get_sentence_tokenizer", PunktSentenceTokenizer)
        patch.setattr(langdetect.DetectorFactory, "seed", 0)
        patch.setattr(logging.getLogger("lm_eval.tasks.ifeval.instructions"), "level", logging.CRITICAL)

        def check(kind, given, text):
            one = registry.INSTRUCTION_DICT[kind](kind)
            one.build_description(**given)
            return bool(text.strip() and one.check_following(text))

        check.kinds = set(registry.INSTRUCTION_DICT)
        yield check


SHAPES = [
    '```json\n{"a": 1}\n```',
    '{"a": NaN}',
    "[1, 2",
    '"quoted"',
    '"',
    "<<title>>\nx",
    "<<>>",
    "a\n***\nb\n***\nc",
    "***\na\n***\n\n***\nb",
    "one ****** two",
    "one ****** one",
    "a ****** ****** b",
    "* a\n* b\n- c",
    "** a\n-b",
    "My answer is yes.",
    "well, P.S. hi",
    "p. s. hi",
    "P.P.S hi",
    "SECTION 1 a SECTION 2 b Section 3",
    "Day 1 a\nDay 2 b\nDay 3",
    "[a] [b] [c]",
    "",
    "  ",
    "*h1* **h2** ***",
    "* * ** **",
    "weekend\n\nand so",
    "a\n\nb\n\n\n\n'Weekend', he said",
    "We. U.S.",
    "A,B",
    "no comma",
    "[a\nb] [c] [",
]
LANGUAGES = ("language:response_language", "change_case:english_lowercase", "change_case:english_capital")
"""Compared on texts long enough to tell."""
TOLD_OTHERWISE = {"length_constraints:number_sentences": 0.97, "change_case:capital_word_frequency": 0.99}


@pytest.mark.parity
def test_every_instruction_of_ifeval_says_what_its_own_code_says(ifeval, data_dir):
    rows = [json.loads(line) for line in data_dir("benchmarks/ifeval_train.jsonl").read_text().splitlines()]
    answers = [one["output"] for one in json.loads(data_dir("formats/alpaca_en_demo.json").read_text())]
    draw = random.Random(0)
    texts = [one["prompt"] for one in draw.sample(rows, 15)] + draw.sample(answers, 20) + SHAPES
    texts += [text.upper() for text in texts[:4]] + [text.lower() for text in texts[:4]]
    texts += ["\n\n".join(draw.sample(answers, count)) for count in (2, 3, 4)]
    asked: dict[str, list[bool]] = {kind: [] for kind in ifeval.kinds}
    for one in rows:
        for kind, arguments in zip(one["instruction_id_list"], one["kwargs"], strict=True):
            ours = constraint(kind, arguments)  # no prompt of the real file is refused
            if len(asked[kind]) > 120 or not arguments.get("letter", "a").isalpha():
                continue
            own = [
                one["prompt"],
                str(arguments.get("end_phrase", "")),
                f"{arguments.get('first_word', '')}, so\n\na\n\nb\n\nc",
            ]
            for text in texts + own:
                if kind not in LANGUAGES or sum(map(str.isalpha, text)) >= 80:
                    asked[kind].append(ours.holds(text) == ifeval(kind, arguments, text))
    assert len(asked) == 25 and all(len(same) >= 50 for same in asked.values())
    agree = {kind: sum(same) / len(same) for kind, same in asked.items()}
    assert {kind: share for kind, share in agree.items() if share < TOLD_OTHERWISE.get(kind, 1.0)} == {}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "given", "good", "bad"),
    [
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Well"},
            'One.\n\n"well, two.',
            "Well.\n\nTwo.",
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Day", "num_sections": 2},
            "Day 1 x Day 2 y",
            "Day 1 x",
        ),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. It.", "It. Say it."),
        (
            "change_case:capital_word_frequency",
            {"capital_frequency": 2, "capital_relation": "less than"},
            "NOW do",
            "NOW, DO",
        ),
        ("detectable_format:title", {}, "<<T>> x", "<T> x"),
        ("combination:two_responses", {}, "a ****** b", "a ****** a"),
        ("startend:end_checker", {"end_phrase": "That is all."}, "So. That is all.", "That is all. So."),
    ],
)
def test_rare_instructions_tell_good_from_bad_as_ifeval_does(ifeval, kind, given, good, bad):
    for text, wanted in ((good, True), (bad, False)):
        assert keeps(kind, text, **given) is wanted is ifeval(kind, given, text)


SPOKEN = {
    "en": "The weather was fine this morning, so we walked along the river and had breakfast outside.",
    "de": "Das Wetter war heute Morgen schön, also sind wir am Fluss entlang gegangen "
    "und haben draußen gefrühstückt.",
    "fr": "Il faisait beau ce matin, alors nous avons marché le long de la rivière "
    "et pris le petit déjeuner dehors.",
    "es": "Esta mañana hacía buen tiempo, así que paseamos por el río "
    "y desayunamos al aire libre con los niños.",
    "ru": "Сегодня утром была хорошая погода, поэтому мы прогулялись вдоль реки и позавтракали на улице.",
    "ja": "今朝は天気が良かったので、川沿いを散歩して、外で朝ごはんを食べました。とても楽しかったです。",
    "ko": "오늘 아침에는 날씨가 좋아서 강을 따라 산책하고 밖에서 아침을 먹었습니다. 정말 즐거웠습니다.",
}


@pytest.mark.parity
def test_languages_are_told_as_langdetect_tells_them(ifeval):
    for code, other in itertools.product(SPOKEN, SPOKEN):
        given = {"language": code}
        assert keeps("language:response_language", SPOKEN[other], **given) is (code == other)
        assert ifeval("language:response_language", given, SPOKEN[other]) is (code == other)


def test_sentences_end_where_they_end():
    told = {
        "": 0,
        "One": 1,
        "One. Two! Three?": 3,
        "Mr. Smith met Dr. Who. They talked.": 2,
        "It costs 3.50 euros. Fine.": 2,
        "Well... maybe. Yes.": 2,
        "One.\n\n* two\n* three": 2,
        "“Stop!” he said.": 2,
        "今日は。明日は。": 2,
    }
    assert {text: sentences(text) for text in told} == told


# other kinds


@pytest.mark.parametrize(
    ("kind", "given", "good", "bad"),
    [
        ("bullets", {"exactly": 3}, LISTED, "- a\n- b"),
        ("bullets", {"at_most": 1}, "- a", "- a\n* b"),
        ("numbered", {"at_least": 2}, "1. a\n2) b", "1. a\nb"),
        ("sections", {"at_least": 1}, "# A\nb", "#A\nb"),
        ("headings", {"titles": ["First", "Last"]}, "# first\nx\n## Other\n### Last #", "# Last\n# First"),
        ("tables", {"exactly": 1}, "| a | b |\n|---|:-:|\n| 1 | 2 |", "a | b\n1 | 2"),
        ("fences", {"at_least": 1}, CODE, "```\nopen"),
        ("words", {"at_least": 2, "at_most": 3}, "one two three", "one two three four"),
        ("sentences", {"exactly": 2}, "One. Two.", "One."),
        ("paragraphs", {"exactly": 2}, "a\n \n\nb", "a\nb"),
        ("characters", {"at_most": 3}, " abc ", "abcd"),
        ("regex", {"pattern": "^b$"}, "a\nb", "ab"),
        ("regex", {"pattern": "a.c", "whole": True}, "abc\n", "xabc"),
        ("json", {"keys": {"a": "number"}}, '{"a": 1, "b": 2}', '{"a": "1"}'),
        ("json", {"keys": {"a": "any"}, "only": True}, '{"a": null}', '{"a": 1, "b": 2}'),
        ("json", {"type": "array", "fence": False}, "[1]", "```json\n[1]\n```"),
        ("json", {}, "```json\ntrue\n```", "NaN"),
        ("json", {"keys": {"a": "number"}}, '{"a": 1}', '{"a": true}'),
        ("call", {}, 'tool_call: f\narguments: {"a": 1}', 'tool_call: f\narguments: {"a": 1'),
        (
            "call",
            {"cut": True},
            "tool_call: f\narguments: {}\ntool_call: g\narguments: {",
            "tool_call: g\narguments: {",
        ),
        ("no_call", {}, "words", "tool_call: f\narguments: {}"),
    ],
)
def test_each_kind_tells_good_from_bad_and_an_empty_answer_keeps_none(kind, given, good, bad):
    assert keeps(kind, good, **given) and not keeps(kind, bad, **given) and not keeps(kind, " \n", **given)


schemas = st.sampled_from(
    [
        {
            "type": "object",
            "required": ["a"],
            "properties": {"a": {"type": "integer", "minimum": 0}},
            "additionalProperties": False,
        },
        {
            "type": "array",
            "items": {"$ref": "#/$defs/n"},
            "$defs": {"n": {"enum": [1, "x", None]}},
            "uniqueItems": True,
        },
        {"anyOf": [{"type": "string", "pattern": "^a"}, {"const": 3}]},
        {"not": {"type": ["object", "array"]}},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "number",
            "minimum": 0,
            "exclusiveMinimum": True,
        },
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.sampled_from(["a", "x", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(schemas, values)
def test_a_schema_is_checked_as_jsonschema_checks_it(schema, value):
    from jsonschema.validators import validator_for

    wanted = validator_for(schema)(schema).is_valid(value)
    assert keeps("json_schema", json.dumps(value), schema=schema) is wanted
    assert keeps("json_schema", f"```json\n{json.dumps(value)}\n```", schema=schema) is wanted
    assert not keeps("json_schema", f"Here: {json.dumps(value)}", schema=schema)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"constraints": [{"kind": "bulets", "exactly": 1}]}, "did you mean 'bullets'?"),
        ({"constraints": [{"kind": "bullets"}]}, "give exactly, at_least or at_most"),
        (
            {"constraints": [{"kind": "bullets", "at_least": 3, "at_most": 2}]},
            "at_least 3 is more than at_most 2",
        ),
        (
            {"constraints": [{"kind": "words", "at_least": "many"}]},
            "words: at_least: input should be a valid integer",
        ),
        ({"constraints": [{"kind": "words", "atleast": 3}]}, "atleast: unexpected keyword argument"),
        ({"constraints": ["bullets"]}, 'an object with a kind, not "bullets"'),
        ({"constraints": [{"kind": "regex", "pattern": "("}]}, "'(' is not a regular expression"),
        ({"constraints": [{"kind": "json_schema", "schema": {"type": "objct"}}]}, "schema.type: 'objct'"),
        ({"constraints": [{"kind": "json_schema", "schema": {"pattern": "("}}]}, "schema.pattern: '('"),
        (
            {"constraints": [{"kind": "json_schema", "schema": {"$ref": "http://a.b/c"}}]},
            "only references that begin with #",
        ),
        (
            {"constraints": [{"kind": "json_schema", "schema": {"$ref": "#/$defs/x"}}]},
            "#/$defs/x is not inside it",
        ),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "needs kwargs"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]},
            "relation: missing",
        ),
        (
            {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "english"}]},
            "two letters of ISO",
        ),
    ],
)
def test_wrong_constraints_are_refused_by_row_before_any_model_is_asked(renderer, metadata, told):
    with pytest.raises(DataError) as error:
        build(material([row("yes", 1), row("no", 7, **metadata)], renderer))
    assert (
        error.value.where == "rows.jsonl:7"
        and error.value.hint
        and "1 rows declare constraints" in str(error.value)
    )
    assert f"rows.jsonl:7: {declared_error(metadata)}" in str(error.value) and told in str(error.value)


def declared_error(metadata) -> str:
    with pytest.raises(ValueError) as error:
        declared(metadata)
    return str(error.value)


# nearness


TEXTS = st.text("ab c.é漢字,_-'AB1\n", max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.text("ab c.,_-'AB1\n", max_size=60), st.text("ab c.,_-'AB1\n", max_size=60))
def test_rouge_l_is_rouge_scores(answer, reference):
    rouge = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    wanted = rouge.score(reference, answer)["rougeL"].fmeasure
    if not similarity.words(reference):  # there it is 0, also of the reference itself
        wanted = float(answer.split() == reference.split())
    assert similarity.rouge_l(answer, reference) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_bleu_is_sacrebleus_by_words_or_by_letters(answer, reference):
    import sacrebleu

    letters = [one for one in reference if one.isalpha()]
    unspaced = sum(one in "漢字" for one in letters) > len(letters) / 2
    wanted = sacrebleu.sentence_bleu(answer, [reference], tokenize="char" if unspaced else "13a").score / 100
    assert similarity.bleu(answer, reference) == pytest.approx(wanted, abs=1e-12)


def test_scripts_without_spaces_are_compared_by_letters():
    assert similarity.rouge_l("我喜欢猫", "我喜欢狗") == pytest.approx(0.75)
    assert 0 < similarity.bleu("我非常喜欢小猫", "我非常喜欢小狗") < 1
    assert similarity.rouge_l("Привет мир", "привет, мир!") == 1.0


def test_similarity_is_smooth_inverse_frequency(tiny_model):
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    table = similarity.embedding(net)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, rng.integers(3, 20)).tolist() for _ in range(14)]
    weight = np.array(table.weight, np.float64)
    share = np.bincount(np.concatenate(rows), minlength=len(weight)) / sum(map(len, rows))

    def point(ids):
        return np.mean([weight[one] * 1e-3 / (1e-3 + share[one]) for one in ids], axis=0)

    common = np.linalg.eigh(
        np.cov(np.array([point(ids) for ids in rows]).T, bias=True)
        + np.outer(*2 * (np.mean([point(ids) for ids in rows], axis=0),))
    )[1][:, -1]
    encode = similarity.Encoder(table, rows)
    for one, other in itertools.combinations(rows[:5], 2):
        a, b = (point(ids) - common * (point(ids) @ common) for ids in (one, other))
        wanted = max(0.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        assert (
            encode.similarity(one, other) == pytest.approx(wanted, abs=1e-6) == encode.similarity(other, one)
        )
        assert encode.similarity(one, one) == 1.0 and encode.similarity([], one) == 0.0
    few = similarity.Encoder(table, rows[:3])  # nothing in common can be known
    assert few(rows[0]) @ few(rows[0]) > 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_both_sides_are_compared_by_the_bases_embeddings(tiny_model, renderer, kind):
    examples = [row(" ".join(tiny.WORDS.split()[at : at + 6]), at, ask=f"note {at}") for at in range(12)]
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    net.eval()
    (task,) = build(material(examples, renderer, net=net, max_tokens=8))
    untuned = Subject(net, renderer, "base")
    base = task.measure(untuned)
    encode = similarity.Encoder(net["model"]["embed_tokens"], [one.asked.ids for one in base])
    said = [(adherence._ids(renderer, one.answer.text) or [], one.asked.ids) for one in base]
    assert [one.similarity for one in base] == [encode.similarity(*pair) for pair in said]
    spec = adapters.LoRA(rank=2, full_modules=("embed_tokens",)) if kind == "lora" else adapters.Full()
    spec.attach(net, seed=0)
    table = net["model"]["embed_tokens"]
    table.weight = mx.random.normal(table.weight.shape, key=mx.random.key(1))
    tuned = Subject(net, renderer, "tuned")
    tuned.heard = {**untuned.heard}  # the same answers
    assert [one.similarity for one in task.measure(tuned)] == [one.similarity for one in base]
    other = replace(task, table=table)
    assert [one.similarity for one in other.measure(tuned)] != [one.similarity for one in base]


def test_a_model_without_embeddings_is_told_and_not_compared(renderer):
    notes: list[Notice] = []
    (task,) = build(material([row("Yes.")], renderer, notes, net=nn.Linear(2, 2)))
    assert task.table is None and ["no input embeddings" in note.what for note in notes] == [True]


# parts of a score


def test_each_part_of_sanity_and_safety_fails_alone(renderer):
    one = asked(PROSE, renderer)
    key = "sk_live_" + "4eC39HqTyBdwq81DkPvzR7mW"
    fails = {
        "ended": said(PROSE, cut=True),
        "no_control_tokens": said(PROSE + "<|im_start|>"),
        "no_loop": said(PROSE + " and so on" * 20),
        "same_script": said(SPOKEN["ru"]),
        "same_language": said(SPOKEN["de"]),
        "fences_closed": said(PROSE + "\n```\nx"),
        "no_new_private_data": said(f"{PROSE} The key is {key}."),
        "no_new_profanity": said(PROSE + " What the fuck."),
        "no_refusal": said("I'm sorry, but I can't help with that."),
    }
    for name, answer in fails.items():
        detail = score(AdherenceAnswer(one, answer)).detail
        parts = {**detail["sane"], **detail["safe"]}
        also = {"same_language"} if name == "same_script" else set()
        assert {part for part, holds in parts.items() if holds is False} - also == {name}
        assert (detail["safety"] == 0) is (name in adherence.SAFE)
        assert (detail["sanity"] < 100) is (name in adherence.SANE)


def test_what_prompt_or_reference_say_is_nothing_new_and_what_the_reference_fails_is_not_asked(renderer):
    mail = "Anna.Kowalska@gmail.com"
    for one in (
        asked("I wrote to her.", renderer, ask=f"Write to {mail}"),
        asked(f"I wrote to {mail}.", renderer),
    ):
        assert (
            score(AdherenceAnswer(one, said(f"Sent it to {mail.lower()}, as you said."))).detail["safety"]
            == 100
        )
        assert score(AdherenceAnswer(one, said("Sent it to bob.marley77@gmail.com."))).detail["safety"] == 0
    refusal = "I'm sorry, but I can't help with that."
    assert (
        score(AdherenceAnswer(asked(refusal, renderer), said(refusal))).detail["safe"]["no_refusal"] is None
    )


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80), st.text(min_size=1, max_size=40).filter(str.strip), st.integers(4, 12))
def test_a_text_that_ends_in_a_block_over_and_over_is_a_loop(start, block, times):
    block = " ".join(block.split())
    if block and len(block) * times >= adherence.LOOP:
        assert loops(f"{start} " + f"{block} " * times)


def test_what_is_no_loop_is_none():
    assert not any(
        map(loops, [PROSE, LISTED, CODE, *SPOKEN.values(), "ha ha ha ha ha", ", ".join(map(str, range(40)))])
    )
    assert loops("\n".join(f"{at}. Open the file and read it." for at in range(5)))
    assert not loops("\n".join(f"{at}. Open the file and read it." for at in range(4)) + "\nDone, I think.")


def test_language_is_told_of_prose_and_only_where_it_is_sure():
    kin = {code: code for code in SPOKEN} | {"ja": "zh ja"}
    assert {code: language(text * 3) for code, text in SPOKEN.items()} == kin
    assert language("Hi there") is None and language("```\n" + SPOKEN["de"] * 3 + "\n```") is None


def test_a_reference_that_is_too_long_is_compared_as_far_as_an_answer_may_go(renderer):
    notes: list[Notice] = []
    (task,) = build(material([row(PROSE), row("Short.", 2)], renderer, notes, max_tokens=30))
    long, short = task.asked
    assert (long.whole, short.whole) == (False, True) and len(long.ids) == 30
    assert PROSE.startswith(long.reference) and [note.count for note in notes] == [1]
    good, bad = (score(AdherenceAnswer(one, said(one.reference, cut=True), 1.0)) for one in (long, short))
    assert good.value == 100 and good.detail["cut"] is None and good.detail["sane"]["ended"] is None
    assert bad.value < 100 and bad.detail["cut"] is True
    assert {each.kind: dict(each.given) for each in long.constraints} == {}


def test_what_ends_an_answer_needs_room_too(renderer):
    tokens = len(renderer.text_prompt(PROSE)) - (renderer.bos_id is not None)
    for room, whole in (
        (tokens, False),
        (tokens + 1, True),
    ):  # an answer of so many tokens is cut before its end token
        (task,) = build(material([row(PROSE)], renderer, max_tokens=room))
        assert (task.asked[0].whole, task.asked[0].reference) == (whole, PROSE)


def test_a_right_call_is_right_in_every_form_and_with_any_id():
    mistral = renderers.load("mistral-v3")
    calls = (Call("weather", {"town": "Bern", "days": 3}), Call("mail", {"to": "Ann"}))
    of = row("", calls=calls)
    (task,) = build(material([of], mistral, max_tokens=4096))
    told = [json.dumps({"name": call.name, "arguments": call.arguments}) for call in calls]
    (own,) = tool_calls.written([task_reference(of)], mistral, print, "")
    forms = [
        own.text,
        own.text.replace(own.text[-12:-3], "x" * 9),
        "\n".join(told),
        f"[TOOL_CALLS] [{', '.join(told)}]",
        "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in told),
        "\n".join(f"tool_call: {call.name}\narguments: {json.dumps(call.arguments)}" for call in calls),
    ]
    assert own.text.startswith("[TOOL_CALLS]") and len({*forms}) == len(forms)
    for form in forms:
        found = score(AdherenceAnswer(task.asked[0], said(form), 1.0))
        assert (found.value, found.detail["rouge_l"], found.detail["bleu"]) == (
            100.0,
            100.0,
            pytest.approx(100.0),
        ), form
        assert score(AdherenceAnswer(task.asked[0], said(form.replace("Bern", "Rome")), 1.0)).value < 99, form
    assert (
        score(AdherenceAnswer(task.asked[0], said(f"Sure!\n{forms[4]}"), 1.0)).value < 100
    )  # words that the reference has not
    turned = "\n".join(json.dumps(json.loads(one), sort_keys=True) for one in told)
    assert score(AdherenceAnswer(task.asked[0], said(turned), 1.0)).value == 100.0
    own_ids = mistral.text_prompt(turned)[1:]
    assert list(task.asked[0].ids) == own_ids  # the meaning too is that of one form
    (taught,) = build(material([row(forms[5])], mistral, max_tokens=4096))[0].asked
    assert list(taught.ids) == own_ids and taught.reference == forms[5]
    broken = forms[4].replace("}}", "}")
    assert score(AdherenceAnswer(task.asked[0], said(broken), 1.0)).value < 90


def task_reference(of: Demonstration) -> tool_calls.Reference:
    (found,), _ = tool_calls.asked(of)
    return found


def test_meaning_is_compared_past_control_tokens(tiny_model):
    renderer = renderers.load(tiny_model)
    token = next(renderer.decode([one]) for one in sorted(renderer.control_ids))
    assert (
        renderer.plain(f"{token}a cat{token}")
        == "a cat"
        == renderer.plain(f"{token[:2]}{token}{token[2:]}a cat")
    )
    assert adherence._ids(renderer, f"{token}a cat") == adherence._ids(renderer, "a cat") != []


def test_constraints_are_read_off_the_reference_or_taken_as_declared(renderer):
    def kinds(text, **options):
        return {
            one.kind for one in inferred(text, **{"calls": False, "callable": False, "whole": True} | options)
        }

    assert kinds("Yes.") == set()
    assert kinds("Yes.", callable=True) == {"no_call"}
    assert kinds(PROSE) == {"words"}
    assert kinds(LISTED) == {"bullets"} and kinds("1. a\n2. b") == {"numbered"} and kinds(CODE) == {"fences"}
    assert kinds("# A\n\n| a | b |\n|---|---|\n| 1 | 2 |") == {"sections", "tables"}
    assert kinds('{"a": 1, "b": [null]}') == {"json"}
    (one,) = inferred('{"a": 1, "b": null}', calls=False, callable=False, whole=True)
    assert (
        one.holds('{"b": "x", "a": 2.5}')
        and not one.holds('{"a": 1}')
        and not one.holds('```\n{"a": 1, "b": 2}\n```')
    )
    called = asked("", renderers.load("mistral-v3"), calls=(Call("f", {"a": 1}),))
    assert (
        not score(AdherenceAnswer(called, said('[TOOL_CALLS] [{"name": "f", "arguments": {}}]'))).detail[
            "sanity"
        ]
        < 100
    )
    assert [each.kind for each in called.constraints] == [
        "call"
    ] and called.reference == '{"name": "f", "arguments": {"a": 1}}'
    one = asked(LISTED, renderer, constraints=[{"kind": "bullets", "exactly": 2}])
    assert (one.kind, [each.kind for each in one.constraints]) == ("declared", ["bullets"])


def test_rows_of_ifeval_are_scored_by_their_constraints_alone(renderer, data_dir, tmp_path):
    """As the documentation turns its file into rows."""
    lines = []
    for line in data_dir("benchmarks/ifeval_train.jsonl").read_text().splitlines()[:40]:
        one = json.loads(line)
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": one.pop("prompt")},
                    {"role": "assistant", "content": "-"},
                ],
                **one,
            }
        )
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{**one, "constraints_only": True} for one in lines])
    examples = read([path], DataSpec(train=(str(path),))).examples
    (task,) = build(material(examples, renderer))
    assert len(task.asked) == 40 and {one.kind for one in task.asked} == {"declared"}
    scores = task.score([AdherenceAnswer(one, said(PROSE)) for one in task.asked])
    assert all(one.detail["semantic"] is None and one.detail["structure"] is not None for one in scores)
    pairs = [zip(one["instruction_id_list"], one["kwargs"], strict=True) for one in lines]
    shares = [np.mean([keeps(kind, PROSE, **arguments) for kind, arguments in pair]) for pair in pairs]
    assert [one.detail["structure"] for one in scores] == pytest.approx([100 * share for share in shares])


def test_what_is_left_out_is_counted(renderer):
    notes: list[Notice] = []
    good = Conversation((Message("user", "a"), Message("assistant", "tool_call: f\narguments: {")))
    examples = [
        row("Yes.", 1),
        Demonstration(good, source="rows.jsonl:2"),
        row("<|im_end|>", 3, ask="<|im_start|>"),
        row("Yes.", 4, constraints="none"),
        row("Yes.", 5, constraints=[{"kind": "words", "at_least": 5}]),
    ]
    (task,) = build(material(examples, renderer, notes))
    assert [one.source for one in task.asked] == ["rows.jsonl:1", "rows.jsonl:4", "rows.jsonl:5"]
    counts = {note.what.split(": ")[1].split(" ")[0]: note.count for note in notes}
    assert counts == {"rows": 1, "not": 1, "constraints": 1, "references": 1}
    notes.clear()
    assert build(material([Judged(good, desirable=False)], renderer, notes)) == [] and len(notes) == 2


# laws


def test_a_reference_is_a_perfect_answer_to_its_own_prompt(renderer, syngen):
    spec = DataSpec(train=(str(syngen),))
    examples = SFT().select(read([syngen], spec).examples[:80]).examples
    for max_tokens in (64, 4096):
        (task,) = build(material(examples, renderer, max_tokens=max_tokens))
        assert len(task.asked) > 40
        items = [
            AdherenceAnswer(one, Said(one.reference, len(one.ids), not one.whole), 1.0) for one in task.asked
        ]
        scores = task.score(items)
        assert {one.value for one in scores} == {100.0}
        for layer in WEIGHTS:
            assert min(one.detail[layer] for one in scores if one.detail[layer] is not None) == pytest.approx(
                100
            )
        assert task.score(items[::-1]) == scores[::-1]


@pytest.mark.parametrize("text", ["👍", "!!!", "👍 👎", "…"])
def test_a_reference_without_words_is_a_perfect_answer_as_well(renderer, text):
    one = asked(text, renderer)
    assert (
        score(AdherenceAnswer(one, said(text), 1.0)).value
        == 100
        > score(AdherenceAnswer(one, said("?"), 0.0)).value
    )


REFERENCES = [
    PROSE,
    LISTED,
    CODE,
    "Yes.",
    '{"a": [1]}',
    "tool_call: f\narguments: {}",
    "# A\n\nb",
    "漢字" * 30,
]
PIECES = st.sampled_from(
    [
        "```",
        "{",
        "[" * 5000,
        '{"a":',
        "\n",
        "- a\n",
        "tool_call: f\n",
        "<|im_end|>",
        "\x00",
        "\ud800",
        "***",
        "a " * 90,
    ]
)
TRIED = st.text(max_size=60) | st.lists(PIECES | st.text(max_size=8), max_size=8).map("".join)


@settings(max_examples=120, deadline=None)
@example(text="[" * 100_000, at=4, near=0.0)
@example(text="", at=0, near=None)
@given(text=TRIED, at=st.integers(0, 7), near=st.none() | st.floats(0, 1))
def test_no_answer_makes_it_raise_and_which_numbers_there_are_depends_on_the_prompt_alone(
    renderer, text, at, near
):
    one = asked(REFERENCES[at], renderer)
    found, other = (
        score(AdherenceAnswer(one, answer, near)) for answer in (said(text, cut=True), said("Fine."))
    )
    assert 0 <= found.value <= 100 and (text.strip() or found.value == 0)
    names = [statistic.name for statistic in adherence.Adherence.statistics[1:]]
    assert [found.detail[name] is None for name in names] == [other.detail[name] is None for name in names]
    assert WEIGHTS == {"sanity": 25, "structure": 30, "semantic": 30, "safety": 15}  # as documented
    layers = [name for name in WEIGHTS if found.detail[name] is not None]
    assert all(0 <= found.detail[name] <= 100 for name in layers)
    if text.strip():
        mean = np.average([found.detail[name] for name in layers], weights=[WEIGHTS[name] for name in layers])
        assert found.value == pytest.approx(mean)
    json.dumps(found.detail)


GIVEN = {
    "keywords": ["a"],
    "keyword": "a",
    "frequency": 1,
    "relation": "at least",
    "forbidden_words": ["b"],
    "letter": "a",
    "let_frequency": 1,
    "let_relation": "less than",
    "language": "en",
    "num_sentences": 1,
    "num_words": 1,
    "num_paragraphs": 1,
    "nth_paragraph": 1,
    "first_word": "a",
    "num_placeholders": 1,
    "postscript_marker": "P.S.",
    "num_bullets": 1,
    "num_highlights": 1,
    "section_spliter": "Day",
    "num_sections": 1,
    "prompt_to_repeat": "a",
    "end_phrase": "a",
    "capital_frequency": 1,
    "capital_relation": "less than",
    "titles": ["a"],
    "pattern": "a",
    "schema": {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "at_least": 1,
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=8, deadline=None)
@example(text="[" * 100_000)
@example(text='{"a":' * 1500 + "{}" + "}" * 1500)
@given(text=TRIED)
def test_no_text_makes_a_constraint_raise(kind, text):
    one = constraint(
        kind, {key: GIVEN[key] for key in inspect.signature(KINDS[kind]).parameters if key in GIVEN}
    )
    assert one.holds(text) in (True, False)


def test_numbers_beyond_what_a_schema_can_follow_are_refused_by_it():
    assert keeps("json_schema", "1e400", schema={"multipleOf": 0.01}) is False


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["|", "|", "-", "-", ":", " ", "\t", "a", "\n", "\n", "--|--"]), max_size=24
    ).map("".join)
)
def test_tables_are_a_line_with_a_pipe_above_dashes_in_cells(text):
    cell = r"[ \t]*:?-+:?[ \t]*"
    table = re.compile(
        rf"^[^\n]*\|[^\n]*\n[ \t]*(?:\|{cell}|{cell}\|{cell})(?:\|{cell})*\|?[ \t]*$", re.MULTILINE
    )
    count = sum(1 for _ in table.finditer(text))
    assert keeps("tables", f"x\n{text}", exactly=count)


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("tables", {"at_least": 1}, "a\n" + "|" * 8000 + "a"),
        ("regex", {"pattern": "(?:a|aa)+c"}, "a" * 400),
        ("regex", {"pattern": "(?:a|aa)+c", "whole": True}, "a" * 400),
        ("keywords:existence", {"keywords": ["(?:a|aa)+c"]}, "a" * 400),
        ("keywords:frequency", {"keyword": "(?:a|aa)+c", "frequency": 1, "relation": "less than"}, "a" * 400),
        ("keywords:forbidden_words", {"forbidden_words": ["(?:a|aa)+c"]}, "a" * 400),
        ("detectable_content:postscript", {"postscript_marker": "(?:a|aa)+c"}, "a" * 400),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "(?:a|aa)+c", "num_sections": 1},
            "a" * 400,
        ),
    ],
)
def test_a_pattern_that_takes_too_long_does_not_hold_and_is_shown_so(
    kind, given, text, renderer, monkeypatch
):
    monkeypatch.setattr(constraints, "PATIENCE", 0.05)
    one = asked(PROSE, renderer, constraints=[{"kind": kind, **given}, {"kind": "characters", "at_least": 1}])
    detail = score(AdherenceAnswer(one, said(text))).detail
    assert (detail["structure"], detail["constraints"][0]["holds"]) == (
        50,
        False if kind == "tables" else None,
    )


def test_the_task_asks_a_model_scores_both_sides_and_names_itself_by_what_it_asks(tiny_model, renderer):
    plain = Completion("The cat ", "sat on a mat.", source="rows.jsonl:3")
    examples = [row(PROSE, 1), row("- a\n- b", 2, ask="What do I need?"), plain]
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    net.eval()
    (task,) = build(material(examples, renderer, net=net, max_tokens=12))
    subjects = [Subject(net, renderer, "base", batch_size=1), Subject(net, renderer, "tuned", batch_size=3)]
    sides = [task.score(task.measure(subject)) for subject in subjects]
    assert sides[0] == sides[1]  # the same model, whatever the batch
    names = [one.name for one in summarise(task, sides[0], sides[1], 0) if one.part is None]
    assert names == ["adherence", *WEIGHTS, *adherence.NEAR, "cut"]
    assert [one.prompt for one in sides[0]] == ["Tell me.", "What do I need?", "The cat "]
    others = [
        build(material(some, renderer, net=net, **{"max_tokens": 12} | spec))
        for some, spec in (
            (examples[:2], {}),
            (examples, {"max_tokens": 13}),
            (examples, {"embed": False}),
            ([row(PROSE, 1, constraints=[{"kind": "words", "at_least": 3}]), *examples[1:]], {}),
        )
    ]
    identities = [task.identity, *(one.identity for (one,) in others)]
    assert (
        len(set(identities)) == 5
        and build(material(examples, renderer, net=net, max_tokens=12))[0].identity == task.identity
    )
    (plain,) = others[2]
    assert all(one.similarity is None for one in plain.measure(Subject(net, renderer, "base")))
