"""A/B tests: one name under which several adapters answer, each a share of the users.

Which adapter answers is a hash of the user, or of the conversation's opening if no user is named: the same
one answers the whole conversation, also after a restart and on another machine. ``NAME/1``, ``NAME/2`` are
the adapters in an order that a hash of the conversation shuffles, for comparisons that must be blind."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tunesmith.data.examples import opening
from tunesmith.data.formats import Conversation
from tunesmith.errors import ConfigError
from tunesmith.serving.question import Question

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)
_SHARE = re.compile(r"(?P<model>.+):(?P<share>0?\.\d+)")
"""A share has a decimal point: tags such as mytool:2 have none."""
EXAMPLE = "for example --ab writer=runs/a:0.5,runs/b:0.5"


@dataclass(frozen=True, slots=True)
class Arm:
    """``model``: as the user named it, a run or a tag."""

    model: str
    share: float


@dataclass(frozen=True, slots=True)
class SplitRoute:
    """A name that is served by one of several models."""

    name: str
    arms: tuple[Arm, ...]

    def renamed(self, name: Callable[[str], str]) -> SplitRoute:
        """The same with other names of models. Raises ConfigError if two are one model."""
        arms = tuple(Arm(name(arm.model), arm.share) for arm in self.arms)
        _require_distinct(self.name, arms)
        return SplitRoute(self.name, arms)

    def chosen(self, question: Question) -> str:
        """The model that answers: by the shares, the same for the whole conversation."""
        place = int.from_bytes(_digest(self.name, asker(question))[:8]) / 2**64
        for arm in self.arms:
            place -= arm.share
            if place < 0:
                return arm.model
        return self.arms[-1].model

    def side(self, number: int, question: Question) -> str:
        """The model behind ``NAME/number``, from 1: every model once, in an order that depends on the
        conversation."""
        order = [arm.model for arm in self.arms]
        random.Random(_digest(self.name, "sides", asker(question))).shuffle(order)
        return order[number - 1]


def parse_route(text: str) -> SplitRoute:
    """``NAME=MODEL[:SHARE],MODEL[:SHARE],…``; equal shares if none is given. Raises ConfigError."""
    name, _, rest = text.partition("=")
    models = [part.strip() for part in rest.split(",") if part.strip()]
    if not _NAME.fullmatch(name) or not models:
        raise ConfigError(f'"{text}" is not NAME=MODEL:SHARE,MODEL:SHARE', where="--ab", hint=EXAMPLE)
    if len(models) < 2:
        raise ConfigError(f"{name} has one model: a comparison needs two", where="--ab", hint=EXAMPLE)
    matches = [_SHARE.fullmatch(part) for part in models]
    arms = [Arm(match["model"], float(match["share"])) for match in matches if match]
    if not arms:
        arms = [Arm(model, 1 / len(models)) for model in models]
    if len(arms) < len(models):
        raise ConfigError(f"{name}: give a share to every model, or to none", where="--ab", hint=EXAMPLE)
    total = math.fsum(arm.share for arm in arms)
    if not math.isclose(total, 1, abs_tol=1e-6) or any(arm.share == 0 for arm in arms):
        raise ConfigError(f"{name}: the shares must be above 0 and sum to 1, not {total:g}", where="--ab")
    _require_distinct(name, arms)
    return SplitRoute(name, tuple(arms))


def _require_distinct(name: str, arms: Sequence[Arm]) -> None:
    if len({arm.model for arm in arms}) < len(arms):
        raise ConfigError(f"{name} names a model twice", where="--ab", hint=EXAMPLE)


class Routes:
    """The A/B tests of a server."""

    def __init__(self, routes: Sequence[SplitRoute] = ()) -> None:
        names = [route.name for route in routes]
        if len({*names}) < len(names):
            raise ConfigError("two A/B tests have one name", where="--ab", hint="give each its own")
        self._routes = {route.name: route for route in routes}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._routes)

    def models(self, name: str) -> tuple[str, ...]:
        """The models behind a name."""
        return tuple(arm.model for arm in self._routes[name].arms)

    def resolve(self, question: Question) -> tuple[str, str | None]:
        """The model that answers, and the name of the A/B test that chose it, or None."""
        name, slash, number = question.model.rpartition("/")
        if question.model in self._routes:
            return self._routes[question.model].chosen(question), question.model
        if slash and name in self._routes and number.isdecimal():
            route = self._routes[name]
            if 1 <= int(number) <= len(route.arms):
                return route.side(int(number), question), name
        return question.model, None


def asker(question: Question) -> str:
    """What stays the same in one conversation: the user, or the texts before the first answer."""
    if question.user:
        return f"user {question.user}"
    prompt = question.prompt
    return f"prompt {opening(prompt) if isinstance(prompt, Conversation) else prompt}"


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
