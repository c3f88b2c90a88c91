"""Who answers in an A/B test: by share, sticky, and shuffled where it must be blind."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.data.formats import Conversation, Message
from tunesmith.errors import ConfigError
from tunesmith.serving.ab import Arm, Routes, parse_route
from tunesmith.serving.question import Question


def asked(*texts: str, model: str = "writer", user: str | None = None) -> Question:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[turn % 2], text) for turn, text in enumerate(texts))
    return Question(model, Conversation((Message("system", "Be kind."), *messages)), user=user)


def test_shares_are_read_and_tags_keep_their_colon():
    route = parse_route("writer=runs/a:0.25,mytool:2:0.75")
    assert route.arms == (Arm("runs/a", 0.25), Arm("mytool:2", 0.75))
    assert parse_route("w=mytool:1,mytool:2").arms == (Arm("mytool:1", 0.5), Arm("mytool:2", 0.5))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("writer", "is not NAME=MODEL"),
        ("=a,b", "is not NAME=MODEL"),
        ("writer=a", "one model"),
        ("writer=a:0.5,b", "to every model, or to none"),
        ("writer=a:0.5,b:0.6", "sum to 1, not 1.1"),
        ("writer=a:0.5,a:0.5", "names a model twice"),
    ],
)
def test_what_is_not_a_test_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_route(text)


def test_users_are_split_by_the_shares():
    routes = Routes([parse_route("writer=a:0.3,b:0.7")])
    counts = Counter(routes.resolve(asked("Hi", user=f"user {number}"))[0] for number in range(4000))
    assert counts["a"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert counts.total() == 4000 == counts["a"] + counts["b"]


def test_one_model_answers_the_whole_conversation_and_all_of_one_user():
    routes = Routes([parse_route("writer=a,b")])
    models = set()
    for number in range(50):
        first = routes.resolve(asked(f"Question {number}"))
        assert first == routes.resolve(asked(f"Question {number}", "Answer", "And then?"))
        models.add(first)
        users = {routes.resolve(asked(f"{number}", f"{turn}", "x", user="ann"))[0] for turn in range(5)}
        assert len(users) == 1
    assert models == {("a", "writer"), ("b", "writer")}


def test_sides_are_all_models_once_in_an_order_that_the_conversation_shuffles():
    routes = Routes([parse_route("writer=a,b")])
    orders: Counter[tuple[str, ...]] = Counter()
    for number in range(2000):
        sides = [routes.resolve(asked("Hi", model=f"writer/{side}", user=f"{number}"))[0] for side in (1, 2)]
        orders[tuple(sides)] += 1
    assert set(orders) == {("a", "b"), ("b", "a")}
    assert orders["a", "b"] / 2000 == pytest.approx(0.5, abs=0.05)


def test_other_names_are_left_alone():
    routes = Routes([parse_route("writer=a,b")])
    for model in ("runs/a", "writer/3", "writer/0", "writer/x", "a/1"):
        assert routes.resolve(asked("Hi", model=model)) == (model, None)
    with pytest.raises(ConfigError, match="one name"):
        Routes([parse_route("w=a,b"), parse_route("w=c,d")])
