"""Clusters of prompts, distinct trigrams, kinds of tasks: exact against slow definitions, faults planted,
clean twins quiet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.auditing import AuditSpec, clusters
from tunesmith.auditing.findings import Finding
from tunesmith.auditing.rules import diversity
from tunesmith.auditing.rules.balance import Balance, entropy, first_tool, leading_word
from tunesmith.auditing.rules.diversity import Diversity
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data.examples import Call, Conversation, Demonstration, Document, Judged, Message
from tunesmith.data.formats import Dropped

LETTERS = "bdfgklmnprstvz"


@pytest.fixture(autouse=True)
def small_map(monkeypatch):
    """t-SNE takes most of the time, and hardly any of the tests are about it."""
    monkeypatch.setattr(clusters, "MAPPED", 200)


def vocabulary(count: int, seed: int = 0) -> list[str]:
    """Made-up words, no two alike."""
    random = np.random.Generator(np.random.PCG64(seed))
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice(list(LETTERS)) + random.choice(list("aeiou")) for _ in range(4))] = None
    return list(found)


def topics(count: int, rows: int, seed: int = 0) -> list[str]:
    """``rows`` prompts about each of ``count`` topics, five of a topic's eight words in each."""
    random = np.random.Generator(np.random.PCG64(seed))
    words = np.array(vocabulary(count * 8, seed)).reshape(count, 8)
    return [
        " ".join(random.choice(words[topic], 5, replace=False)) for topic in range(count) for _ in range(rows)
    ]


def prose(rows: int, length: int = 60, seed: int = 0) -> list[str]:
    random = np.random.Generator(np.random.PCG64(seed))
    words = vocabulary(500, seed)
    return [" ".join(random.choice(words, length)) for _ in range(rows)]


def view(asked: str, said: str, label: bool | None = None, at: int = 1) -> View:
    conversation = Conversation((Message("user", asked), Message("assistant", said)))
    source = f"rows.jsonl:{at}"
    if label is None:
        return View(source, Demonstration(conversation, source=source))
    return View(source, Judged(conversation, label, source=source))


def survey(
    views: Sequence[View], share: float = 1.0, embed: Callable | None = None, **asked: float
) -> Survey:
    spec = AuditSpec.model_validate(asked)
    context = Context(spec, share=share, embed=embed)
    return Survey(
        spec,
        [one.source for one in views],
        [one.label for one in views],
        [one.dropped for one in views],
        asked=[one.asked for one in views],
        context=context,
        fetch=lambda rows: {at: views[at] for at in rows},
        kept={rule.name: [rule.look(one, context) for one in views] for rule in (Diversity(), Balance())},
    )


def judged(found: Survey) -> dict[str, Finding]:
    findings = [one for rule in (Diversity(), Balance()) for one in rule.judge(found.kept[rule.name], found)]
    assert len({one.rule for one in findings}) == len(findings)
    return {one.rule: one for one in findings}


def lines(finding: Finding) -> list[int]:
    return [int(row.source.rpartition(":")[2]) for row in finding.rows]


def asking(prompts: Sequence[str], **asked: float) -> Survey:
    said = prose(len(prompts))
    return survey([view(one, said[at], at=at) for at, one in enumerate(prompts)], **asked)


# Clusters


def test_prompts_about_the_same_are_one_cluster_named_after_their_words():
    prompts = topics(6, 60)
    found = clusters.clusters(prompts)
    kept = found.labels.reshape(6, 60)
    for row in kept:
        assert Counter(row.tolist()).most_common(1)[0][1] >= 57
    assert len({Counter(row.tolist()).most_common(1)[0][0] for row in kept}) == 6
    words = np.array(vocabulary(48)).reshape(6, 8)
    for topic, row in enumerate(kept):
        assert set(found.groups[Counter(row.tolist()).most_common(1)[0][0]].name.split(", ")) <= set(
            words[topic]
        )


def test_a_large_topic_is_one_cluster_however_finely_it_could_be_cut():
    words = vocabulary(40, 5)
    poems = [f"compose verses about {one} and {other}" for one in words[:20] for other in words[20:]]
    prompts = topics(40, 15) + poems
    found = clusters.clusters(prompts)
    label, count = Counter(found.labels[600:].tolist()).most_common(1)[0]
    assert count >= 390 and (found.labels[:600] == label).sum() <= 45
    assert label == 0 and found.groups[0].tight


@pytest.mark.parametrize(
    "prompts",
    [
        [""],
        ["one"],
        ["", ""],
        ["one", "two"],
        ["same prompt"] * 60,
        [""] * 60,
        ["!?", "…"] * 30,
        ["1 + 1 = 2"] * 40,
        [str(number) for number in range(80)],
        ["the of and"] * 9 + ["x" * 9000],
        ["\udc80 broken", "\x00", "😀"] * 20,
        ["你好世界朋友", "我想写一首诗"] * 20,
        ["สวัสดีครับ", "ขอบคุณ"] * 20,
        ["हिन्दी में लिखो", "कविता लिखो"] * 20,
        vocabulary(90),
        ["shared " + word for word in vocabulary(90)],
        ["hello"] * 89 + ["world"],
    ],
    ids=lambda prompts: f"{len(prompts)} {prompts[0][:12]!a}",
)
def test_any_prompts_have_clusters_and_the_same_on_each_run(prompts):
    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.array([[len(text), sum(map(ord, text)) % 97, 1.0] for text in texts], dtype=np.float32)

    for given_embed in (None, embed):
        one, other = clusters.clusters(prompts, given_embed), clusters.clusters(prompts, given_embed)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.points, other.points)
        assert np.isfinite(one.points).all() and one.points.shape == (len(one.shown), 2)
        assert one.groups == other.groups and sorted(set(one.labels.tolist())) == list(range(len(one.groups)))


@given(
    st.lists(
        st.lists(st.sampled_from("read note file 你 7 the".split()), max_size=3).map(" ".join),
        min_size=1,
        max_size=40,
    )
)
@settings(max_examples=40, deadline=None)
def test_equal_prompts_share_a_cluster_and_the_largest_is_first(prompts):
    found = clusters.clusters(prompts)
    by: dict[str, set[int]] = {}
    for prompt, label in zip(prompts, found.labels.tolist(), strict=True):
        by.setdefault(prompt, set()).add(label)
    assert all(len(labels) == 1 for labels in by.values())
    sizes = np.bincount(found.labels)
    assert (np.diff(sizes) <= 0).all() and len({group.name for group in found.groups}) == len(sizes)


def test_features_of_a_model_replace_those_of_words_but_names_stay_words():
    prompts = topics(4, 40)
    sides = np.arange(160) % 2  # across the topics

    def embed(texts: Sequence[str]) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64(0))
        side = np.array([sides[prompts.index(text)] for text in texts])
        return np.where(side[:, None] == 0, 5.0, -5.0) * np.ones(16) + random.normal(0, 0.1, (len(texts), 16))

    prompts = [f"{prompt} {at}" for at, prompt in enumerate(prompts)]
    found = clusters.clusters(prompts, embed)
    assert len(found.groups) == 2 and {len(set(found.labels[sides == side])) for side in (0, 1)} == {1}
    assert all(group.tight and group.name.split(", ")[0] in vocabulary(32) for group in found.groups)


def test_clusters_of_the_same_words_have_names_of_their_own():
    prompts = [f"read note {at}" for at in range(100)]
    found = clusters.clusters(
        prompts, lambda texts: np.array([[5.0, 1.0] if int(text[10:]) % 2 else [1.0, 5.0] for text in texts])
    )
    assert len({group.name for group in found.groups}) == len(found.groups) == 2


def test_one_prompt_again_and_again_is_a_topic_to_a_model_too():
    found = judged(
        survey(
            [view("tell me a joke", text, at=at) for at, text in enumerate(prose(80))],
            embed=lambda texts: np.ones((1, 4)),
        )
    )
    assert found["diversity.clusters"].severity == "warning" and "joke" in found["diversity.clusters"].what


def test_the_map_shows_drawn_training_rows_and_is_made_once():
    called: list[int] = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        called.append(len(texts))
        return np.array([[ord(text[0]), len(text), ord(text[-1])] for text in texts], dtype=np.float64)

    prompts = topics(20, 125)
    views = [view(one, "yes", at % 2 == 0, at) for at, one in enumerate(prompts)]
    views[7] = View("rows.jsonl:7", None, Dropped("rows.jsonl:7", "json", "bad", ""))
    for share in (1.0, 0.3):
        called.clear()
        found = survey(views, share, embed)
        judged(found)
        drawn = [at for at in found.training if found.context and found.context.drawn(views[at])]
        assert called == [len({prompts[at] for at in drawn})]
        chart = json.loads(json.dumps(found.charts["map"]))
        assert {len(chart[key]) for key in ("x", "y", "source", "text", "cluster", "label")} == {
            min(len(drawn), clusters.MAPPED)
        }
        assert set(chart["source"]) <= {views[at].source for at in drawn}
        for source, text, label in zip(chart["source"], chart["text"], chart["label"], strict=True):
            at = int(source.rpartition(":")[2])
            assert text == prompts[at] and label == (at % 2 == 0)
        assert max(chart["cluster"]) < len(chart["names"])


# Diversity


def slow(texts: Sequence[str]) -> float:
    said = [tuple(words[at : at + 3]) for words in map(str.split, texts) for at in range(len(words) - 2)]
    return len(set(said)) / len(said)


def saying(answers: Sequence[str], share: float = 1.0, **asked: float) -> dict[str, Finding]:
    prompts = prose(len(answers), 8, seed=3)
    views = [view(prompts[at], one, at=at) for at, one in enumerate(answers)]
    return judged(survey(views, share, **asked))


@given(
    st.lists(
        st.lists(st.sampled_from("a b c déjà 雨 9".split()), max_size=12).map(" ".join),
        min_size=1,
        max_size=12,
    )
)
@settings(max_examples=25, deadline=None)
def test_the_ratio_of_trigrams_is_distinct_to_all(answers):
    found = saying([f"{one} z z z" for one in answers]).get("diversity.trigrams")
    assert found is not None and found.value == pytest.approx(slow([f"{one} z z z" for one in answers]))


def test_a_share_of_the_trigrams_stands_for_all():
    """Also where a few trigrams make up half of all, of which a small share may have none."""
    answers = prose(400, 200, seed=1) + prose(200, 200, seed=1) + ["so be it and " * 100] * 400
    exact = saying(answers)["diversity.trigrams"].value
    assert exact == pytest.approx(slow(answers))
    for share in (0.5, 0.1, 0.02):
        part = saying(answers, share)["diversity.trigrams"].value
        assert part != exact and part == pytest.approx(exact, rel=3 / np.sqrt(80_000 * share))


def test_a_chosen_trigram_is_chosen_in_every_text():
    texts = [diversity.trigrams(text.split()) for text in prose(50, 100)]
    whole = {key for text in texts for key in diversity.chosen(text, 1).tolist()}
    some = {key for text in texts for key in diversity.chosen(text, 0.2).tolist()}
    assert 0.17 < len(some) / len(whole) < 0.23
    for text in texts:
        assert diversity.chosen(text, 0.2).tolist() == [
            key for key in diversity.chosen(text, 1).tolist() if key in some
        ]


def test_trigrams_have_the_same_number_in_every_process():
    assert diversity.hashes(["the", "cat"]).tolist() == [0x3C456DE6, 0x9E5E43A8]
    assert diversity.trigrams("the cat sat".split()).tolist() == [0xA0458DD50C78C0F7]
    assert diversity.trigrams(["two", "words"]).tolist() == []


def test_the_order_of_three_words_matters():
    words = "a b c a c b c b a b a c".split()
    assert len(set(diversity.trigrams(words).tolist())) == len(
        {tuple(words[at : at + 3]) for at in range(len(words) - 2)}
    )


def test_more_trigrams_than_are_sorted_give_nearly_the_same(monkeypatch):
    answers = prose(200, 100, seed=1) + prose(100, 100, seed=1)
    exact = saying(answers)["diversity.trigrams"].value
    monkeypatch.setattr(diversity, "COUNTED", 6_000)
    part = saying(answers)["diversity.trigrams"].value
    assert part != exact and part == pytest.approx(exact, rel=3 / np.sqrt(4_000))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_answers_of_one_pattern_are_found_with_their_rows_and_their_words(share):
    own = prose(100, 40)
    clean = saying(own, share)["diversity.trigrams"]
    assert clean.severity == "good" and not clean.rows
    pattern = (
        "i am very glad that you asked me this question and i will gladly help you with everything about"
    )
    planted = [text if at % 2 else f"{pattern} {text.split()[0]} {pattern}" for at, text in enumerate(own)]
    found = saying(planted, share)["diversity.trigrams"]
    assert found.severity == "warning" and found.value == pytest.approx(
        slow(planted), rel=0.1 if share < 1 else 1e-9
    )
    assert (
        len(found.rows) == diversity.TOLD
        and all(at % 2 == 0 for at in lines(found))
        and 50 <= found.count <= 75
    )
    quoted = found.what.partition("“")[2].partition("”")[0]
    assert quoted in pattern and len(quoted.split()) == 3
    assert saying(planted, min_trigrams=0.3)["diversity.trigrams"].severity == "good"


def test_a_text_that_stands_in_many_rows_is_shown_once_and_numbers_are_not_quoted():
    pattern = "please call 0049 555 1234 or write to us about that again and again"
    found = saying([*prose(30, 30), *[pattern] * 60])["diversity.trigrams"]
    assert found.severity == "warning" and len([at for at in lines(found) if at >= 30]) == 1
    quoted = found.what.split("“")[1:]
    assert len(quoted) == 3 and not any(
        letter.isdigit() for one in quoted for letter in one.partition("”")[0]
    )


def test_a_topic_that_crowds_out_the_others_is_named_and_its_clean_twin_is_not():
    words = vocabulary(40, 5)
    usual = topics(40, 20)
    clean = judged(asking(usual))["diversity.clusters"]
    assert clean.severity == "good" and not clean.rows
    poems = [f"compose verses about {one} and {other}" for one in words[:15] for other in words[20:35]]
    found = judged(asking(usual + poems))["diversity.clusters"]
    assert found.severity == "warning" and 215 <= found.count <= 245
    assert min(lines(found)) >= len(usual) and "compose" in found.what and "verses" in found.what


def test_prompts_that_are_all_one_are_over_represented():
    assert judged(asking(["tell me a joke"] * 80))["diversity.clusters"].count == 80


def test_a_crowd_of_prompts_that_have_nothing_in_common_is_no_topic():
    for prompts in (prose(200, 6), vocabulary(200), [str(number) for number in range(200)], ["…"] * 200):
        assert judged(asking(prompts))["diversity.clusters"].severity == "good"


def test_of_fewer_rows_a_topic_must_have_more():
    poems = [f"compose verses about {one}" for one in vocabulary(40, 5)]
    assert judged(asking(topics(8, 15) + poems))["diversity.clusters"].severity == "good"
    assert judged(asking(topics(8, 15) * 4 + poems * 4))["diversity.clusters"].count == 160


def test_few_rows_have_no_topic_that_stands_out():
    assert "diversity.clusters" not in judged(asking(["tell me a joke"] * 20))


# Balance


def test_entropy_is_that_of_a_uniform_choice():
    for kinds in (1, 2, 8, 32):
        assert entropy([7] * kinds) == pytest.approx(np.log2(kinds))
    assert entropy([]) == entropy([0, 5]) == 0
    assert entropy([9, 1]) == pytest.approx(-(0.9 * np.log2(0.9) + 0.1 * np.log2(0.1)))


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("Create a note", "create"),
        ("Please create a note", "create"),
        ("Can you please create a note?", "create"),
        ("Hey! Could you help me to create it", "create"),
        ("I'd like you to create it", "create"),
        ("Hi, create it", "create"),
        ("I would like to create it", "create"),
        ("I’d like to create it", "create"),
        ("I need to create it", "create"),
        ("Hello — please kindly create it", "create"),
        ("“create” it", "create"),
        ("History of Rome", "history"),
        ("Canyon walks", "canyon"),
        ("I'm cleaning up", "i"),
        ("Please", "please"),
        ("Can you?", "can"),
        ("…", None),
        ("", None),
        ("Écris un poème", "écris"),
        ("Напиши стихи", "напиши"),
        ("请写一首诗", "请写"),
        ("Let's create", "create"),
    ],
)
def test_the_leading_word_is_the_first_that_is_no_courtesy(prompt, word):
    assert leading_word(prompt) == word


def test_hostile_openings_take_linear_time():
    for text in (
        "please " * 200_000,
        "can you" * 200_000,
        " " * 1_000_000 + "go",
        "!" * 1_000_000,
        "i'd like " * 200_000,
    ):
        leading_word(text)


def test_the_first_tool_is_found_as_turn_and_as_text():
    text = (
        'Sure.\n\ntool_call: vault_read\narguments: {"path": "a"}\n\nResult: {}\n\ntool_call: '
        "vault_write\narguments: {}"
    )
    assert first_tool(view("read it", text)) == "vault_read"
    assert first_tool(view("read it", "the words tool_call: are no call")) is None
    turns = (
        Message("user", "go"),
        Message("assistant", "", (Call("search", {}), Call("open", {}))),
        Message("tool", "[]"),
    )
    conversation = Conversation((*turns, Message("tool", "[]"), Message("assistant", text)))
    assert first_tool(View("rows.jsonl:1", Demonstration(conversation))) == "search"
    assert first_tool(View("rows.jsonl:1", Document(text=text))) is None


def calling(tools: Sequence[str], labels: Sequence[bool | None]) -> Survey:
    said = prose(len(tools), 30)
    return survey(
        [
            view(f"{said[at].split()[0]} it", f"tool_call: {tool}\narguments: {{}}\n\n{said[at]}", label, at)
            for at, (tool, label) in enumerate(zip(tools, labels, strict=True))
        ]
    )


TOOLS = [f"tool_{at % 12}" for at in range(360)]
MIXED = [at % 36 < 24 for at in range(360)]  # two of three rows of every tool


def test_entropy_of_very_many_types_takes_linear_time():
    assert entropy([1] * 2**18) == pytest.approx(18)


def test_types_are_balanced_labels_too_and_nothing_is_found():
    found = judged(calling(TOOLS, MIXED))
    of_balance = {rule: one for rule, one in found.items() if rule.startswith("balance")}
    assert set(of_balance) == {"balance.types", "balance.labels", "balance.labels_by_type"}
    assert {one.severity for one in of_balance.values()} == {"good"} and not any(
        one.rows for one in of_balance.values()
    )
    assert found["balance.types"].value == pytest.approx(np.log2(12))


def test_a_type_that_outweighs_the_others_is_named():
    tools = [tool if at % 10 == 0 else "search" for at, tool in enumerate(TOOLS)]
    found = judged(calling(tools, MIXED))["balance.types"]
    assert found.severity == "warning" and found.value == pytest.approx(entropy(Counter(tools).values()))
    assert (
        found.count == tools.count("search")
        and {tools[at] for at in lines(found)} == {"search"}
        and "search (90%)" in found.what
    )
    assert judged(calling(tools[:49], MIXED[:49]))["balance.types"].severity == "note"


def test_one_label_that_is_rare_or_missing_is_told():
    rare = [at % 20 != 0 for at in range(360)]
    found = judged(calling(TOOLS, rare))["balance.labels"]
    assert (found.severity, found.count, found.value) == ("warning", 18, 0.95) and all(
        at % 20 == 0 for at in lines(found)
    )
    turned = judged(calling(TOOLS, [not label for label in rare]))["balance.labels"]
    assert (turned.severity, turned.count, turned.value) == ("warning", 18, pytest.approx(0.05))
    assert judged(calling(TOOLS, [True] * 360))["balance.labels"].severity == "note"
    assert judged(calling(TOOLS, [False] * 360))["balance.labels"].severity == "warning"
    assert "balance.labels" not in judged(calling(TOOLS, [None] * 360))
    half = judged(calling(TOOLS, [label if at % 2 else None for at, label in enumerate(MIXED)]))[
        "balance.labels"
    ]
    assert half.of == 180 and "180 without a label" in half.what


@pytest.mark.parametrize("label", [True, False])
def test_a_tool_with_labels_of_its_own_is_named_with_its_rows(label):
    labels = [label if tool == "tool_3" else one for tool, one in zip(TOOLS, MIXED, strict=True)]
    found = judged(calling(TOOLS, labels))["balance.labels_by_type"]
    assert (
        found.severity == "warning" and found.count == 30 and {TOOLS[at] for at in lines(found)} == {"tool_3"}
    )
    assert f"tool_3 ({30 * label} of 30 desirable)" in found.what and len(found.rows) == 3


def test_a_type_of_few_rows_proves_nothing():
    for few, severity in ((9, "good"), (10, "warning")):
        found = judged(
            calling([*TOOLS, *["rare"] * few], [*[at % 12 != at // 30 for at in range(360)], *[False] * few])
        )
        assert found["balance.labels_by_type"].severity == severity


def test_labels_by_chance_are_hardly_ever_found():
    """1 in 100, of 80 sets."""
    random = np.random.Generator(np.random.PCG64(0))
    base = calling(TOOLS, MIXED)
    wrong = 0
    for share in (0.5, 0.8):
        for _ in range(40):
            base.labels = (random.random(360) < share).tolist()
            (found,) = [
                one
                for one in Balance().judge(base.kept["balance"], base)
                if one.rule == "balance.labels_by_type"
            ]
            wrong += found.severity != "good"
    assert wrong <= 3


def test_the_chart_of_types_counts_every_row_once():
    random = np.random.Generator(np.random.PCG64(0))
    tools = [f"tool_{at}" for at in random.geometric(0.03, 600)]
    labels = [(True, False, None)[at] for at in random.integers(0, 3, 600)]
    found = calling(tools, labels)
    judged(found)
    chart = json.loads(json.dumps(found.charts["types"]))
    sums = [one["true"] + one["false"] + one["none"] for one in chart]
    assert len(chart) == 41 and chart[-1]["type"] == "others" and sum(sums) == 600
    assert sums[:-1] == [size for _, size in Counter(tools).most_common(40)]
    assert sum(one["none"] for one in chart) == labels.count(None)


def test_plain_text_has_clusters_and_trigrams_but_no_types():
    texts = prose(60)
    found = survey([View(f"rows.jsonl:{at}", Document(text=text)) for at, text in enumerate(texts)])
    assert set(judged(found)) == {"diversity.trigrams", "diversity.clusters"}
    assert len(found.charts["map"]["x"]) == 60 and "types" not in found.charts


def test_no_rows_have_no_findings():
    bad = View("rows.jsonl:1", None, Dropped("rows.jsonl:1", "json", "bad", ""))
    assert judged(survey([bad])) == judged(survey([])) == {}
    assert set(judged(survey([view("", "")]))) == set()


def test_the_reference_data(syngen):
    """Counted by hand: 15 rows ask "Do something" and none is desirable; calls carry the same keys in every
    row."""
    from tunesmith.data.formats import DataSpec, read

    found = survey([View(one.source, one) for one in read([syngen], DataSpec(train=(str(syngen),))).examples])
    by = judged(found)
    assert by["diversity.trigrams"].severity == "warning" and 0.6 < by["diversity.trigrams"].value < 0.65
    assert by["diversity.clusters"].severity == "good" and by["balance.types"].value == pytest.approx(
        5.6, abs=0.1
    )
    assert by["balance.labels"].value == 0.746
    assert (
        by["balance.labels_by_type"].count == 15
        and "do … (0 of 15 desirable)" in by["balance.labels_by_type"].what
    )
