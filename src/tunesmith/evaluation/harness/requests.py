"""The loaded model, with its adapter, as a language model of EleutherAI's lm-evaluation-harness: likelihoods
and greedy text.

The harness decides what is asked. Here its requests are answered: how likely a continuation is, whether it is
the greedy one, and what the model generates up to a stop string. Equal requests are computed once, and so is
the text with which many of them begin: the choices of a question share its text, the questions of a subject
their solved examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.engine import scoring
from tunesmith.engine.engine import UNLIMITED, Engine
from tunesmith.engine.requests import Request
from tunesmith.evaluation.subject import Subject
from tunesmith.events import Notice
from tunesmith.model import abilities, kernels, logprobs, vocabulary
from tunesmith.model import loading as model
from tunesmith.tokens.batches import BatchSpec, Cut, forward_tokens

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

Ids = tuple[int, ...]
Tick = Callable[[int, int], None]
MAX_TOKENS = 256
"""Of an answer, if a task does not set it."""


class HarnessRequest(NamedTuple):
    """The likelihood of ``said`` after ``context``, which has at least one token."""

    context: Ids
    said: Ids


class Likelihood(NamedTuple):
    """``logp``: Σ log p in nats. ``greedy``: each token was the likeliest."""

    logp: float
    greedy: bool


@dataclass
class _Pass:
    """Tokens to run once, for all ``requests`` that they contain. ``first``: the first position whose
    prediction is needed."""

    ids: Ids
    requests: list[int]
    first: int


def likelihoods(
    net: nn.Module, requests: Sequence[HarnessRequest], batch: BatchSpec, tick: Tick | None = None
) -> list[Likelihood]:
    """One Likelihood a request, in order, in evaluation mode; the mode is restored afterwards. Raises
    ModelError for an id that the model does not know."""
    vocabulary.require_known(net, (("", request.context + request.said) for request in requests))
    scores = [Likelihood(0.0, True)] * len(requests)
    done = 0
    with model.evaluating(net):
        gather = abilities.splits(net)
        passes = _passes(requests)
        families = _families(passes) if gather and abilities.continues(net) else [(0, range(len(passes)))]
        longest = max((len(run.ids) for run in passes), default=1)
        tokens = forward_tokens(batch, longest)
        alone = [member for shared, members in families if not shared for member in members]
        sharing = [(shared, list(members)) for shared, members in families if shared]
        for shared, members in [(0, alone), *sharing]:
            lengths = [len(passes[member].ids) - shared for member in members]
            prompt = kernels.prompt(net, mx.array(passes[members[0]].ids[:shared])[None]) if shared else None
            for part in Cut(tokens, scoring.ANSWERS if shared else None)(lengths, range(len(members))):
                chosen = [passes[members[place]] for place in part]
                for index, score in _measure(net, chosen, requests, shared, prompt, gather):
                    scores[index] = score
                    done += 1
                if tick is not None:
                    tick(done, len(requests))
    return scores


def _passes(requests: Sequence[HarnessRequest]) -> list[_Pass]:
    """The passes in lexicographic order. The tokens of none begin another's, so " A", " B" and " C" after one
    text are one pass."""
    ids_of = [request.context + request.said[:-1] for request in requests]
    passes: list[_Pass] = []
    for ids, index in sorted(zip(ids_of, range(len(requests)), strict=True), reverse=True):
        if not passes or passes[-1].ids[: len(ids)] != ids:
            passes.append(_Pass(ids, [], len(ids)))
        passes[-1].requests.append(index)
        passes[-1].first = min(passes[-1].first, len(requests[index].context) - 1)
    return passes[::-1]


def _families(passes: Sequence[_Pass]) -> list[tuple[int, range]]:
    """The cheapest division of the sorted ``passes``: (number of first tokens that are cached and shared,
    which passes); 0: nothing is shared."""
    sums = [0, *accumulate(len(run.ids) for run in passes)]

    def divide(start: int, end: int) -> tuple[int, list[tuple[int, range]]]:
        """Tokens to compute for passes start to end, and how."""
        apart = sums[end] - sums[start]
        if end - start == 1:
            return apart, [(0, range(start, end))]
        pairs = zip(passes[start].ids, passes[end - 1].ids, strict=False)
        # They are sorted: what the first and the last share, all share.
        depth = next(place for place, (token, other) in enumerate(pairs) if token != other)
        shared = min(depth, *(run.first for run in passes[start:end]))
        together = apart - (end - start - 1) * shared + scoring.WORTH
        cost, families, begin = 0, [], start
        for _, members in groupby(range(start, end), lambda member: passes[member].ids[depth]):
            stop = begin + sum(1 for _ in members)
            part_cost, part = divide(begin, stop)
            cost, families, begin = cost + part_cost, families + part, stop
        return (together, [(shared, range(start, end))]) if shared and together < cost else (cost, families)

    return divide(0, len(passes))[1] if passes else []


def _measure(
    net: nn.Module,
    chosen: Sequence[_Pass],
    requests: Sequence[HarnessRequest],
    shared: int,
    prompt: list[kernels.PromptCache] | None,
    gather: bool,
) -> Iterator[tuple[int, Likelihood]]:
    """(index, likelihood) of all requests of ``chosen``, which run as one batch after the first ``shared``
    tokens."""
    width = max(len(run.ids) for run in chosen) - shared
    tokens = np.zeros((len(chosen), width), np.int32)
    owners, positions, targets = [], [], []
    for row, run in enumerate(chosen):
        tokens[row, : len(run.ids) - shared] = run.ids[shared:]
        for index in run.requests:
            said, before = requests[index].said, row * width + len(requests[index].context) - 1 - shared
            owners += [index] * len(said)
            positions += range(before, before + len(said))
            targets += said
    options = {} if prompt is None else {"cache": prompt}
    states = logprobs.features(net, mx.array(tokens), **options) if gather else net(mx.array(tokens))
    states = states.reshape(-1, states.shape[-1])
    logps, best = [np.zeros(0)], [np.zeros(0, bool)]
    rows = max(1, logprobs.CHUNK // (logprobs.head(net, states[:1]) if gather else states).shape[-1])
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        part, wanted = states[mx.array(positions[chunk])], mx.array(targets[chunk])
        logits = logprobs.head(net, part) if gather else part
        logps.append(np.array(kernels.token_logprobs(logits, wanted)))
        best.append(np.array(logits.argmax(axis=-1) == wanted))
    logp, likeliest, owner = np.concatenate(logps), np.concatenate(best), np.array(owners, int)
    for run in chosen:
        for index in run.requests:
            own = owner == index
            yield index, Likelihood(float(logp[own].sum()), bool(likeliest[own].all()))


def continuations(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    until: Sequence[Sequence[str]],
    max_tokens: Sequence[int],
    label: str,
) -> list[str]:
    """The greedy text after each of ``prompts``, up to the first of its stop strings, without control
    tokens."""
    renderer, tick = subject.renderer, subject.ticker(label)
    # A token has at least one byte; two more, since a decoded text may begin with half a letter or without
    # its space.
    looks = [2 + max((len(stop.encode()) for stop in stops), default=0) for stops in until]
    done = 0

    def text(ids: Sequence[int]) -> str:
        return renderer.decode([token for token in ids if token not in renderer.control_ids])

    with Engine(subject.net, subject.batch_size, prefill_tokens=UNLIMITED) as engine:
        numbers = engine.submit(
            [
                Request(prompt, renderer.eos_ids, most)
                for prompt, most in zip(prompts, max_tokens, strict=True)
            ]
        )
        place_of = {number: place for place, number in enumerate(numbers)}
        said: list[list[int]] = [[] for _ in prompts]
        while tokens := engine.step():
            stopped: list[int] = []
            for number, token, finish, *_ in tokens:
                place = place_of[number]
                if finish != "stop":
                    said[place].append(token)
                end = text(said[place][-looks[place] :]) if until[place] else ""
                if finish is None and any(stop in end for stop in until[place]):
                    stopped.append(number)
                if finish is not None or number in stopped:
                    done += 1
                    tick(done, len(prompts))
            engine.cancel(stopped)
    return [
        functools.reduce(lambda all, stop: all.partition(stop)[0], until[index], text(ids))
        for index, ids in enumerate(said)
    ]


def longest(net: Any) -> int | None:
    """How many tokens the model can read at once, by its own configuration; None if it does not say."""
    try:
        return int(net.args.max_position_embeddings)
    except (AttributeError, TypeError):
        return None


def language_model(subject: Subject, label: str) -> TemplateLM:
    """``subject`` as the harness's model: plain text, no chat template, greedy. ``label``: of its progress.

    Texts are tokenised as training rows are, with a BOS if the tokenizer adds one. What is longer than the
    model can read loses its beginning, and a notice says how often."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    served = _Served(subject, label, longest(subject.net))

    class HarnessModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return subject.renderer.eos_ids[-1]

        @property
        def prefix_token_id(self) -> int:
            bos = subject.renderer.bos_id
            return self.eot_token_id if bos is None else bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return served.ids(string, add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            wanted = [HarnessRequest(tuple(context), tuple(said)) for _, context, said in requests]
            return [(score.logp, score.greedy) for score in served.likelihoods(wanted, cut=True)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            width = served.room or subject.batch.length
            wanted: list[HarnessRequest] = []
            owners: list[int] = []
            for index, request in enumerate(requests):
                ids = served.ids(request.args[0], False)
                for window in get_rolling_token_windows(ids, self.prefix_token_id, width, 1):
                    context, said = make_disjoint_window(window)
                    wanted.append(HarnessRequest(tuple(context), tuple(said)))
                    owners.append(index)
            logps = [score.logp for score in served.likelihoods(wanted, cut=False)]
            return np.bincount(owners, logps, len(requests)).tolist()

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            contexts, settings = ([request.args[place] for request in requests] for place in (0, 1))
            return served.texts(contexts, settings)

    return HarnessModel()


class _Served:
    """Answers the harness's requests. ``room``: how many tokens the model can read, None if unknown."""

    def __init__(self, subject: Subject, label: str, room: int | None) -> None:
        self.subject, self.label, self.room = subject, label, room
        # the choices of a question follow one text
        self._ids = functools.lru_cache(1024)(subject.renderer.text_prompt)

    def ids(self, text: str, bos: bool) -> list[int]:
        start = 1 if not bos and self.subject.renderer.bos_id is not None else 0
        return list(self._ids(text)[start:])

    def likelihoods(self, requests: list[HarnessRequest], *, cut: bool) -> list[Likelihood]:
        if cut and self.room is not None:
            fitting = [_cut(request, self.room) for request in requests]
            text = f"longer than the {self.room} tokens that the model reads, cut at the beginning"
            self._notify(text, _n_different(requests, fitting))
            requests = fitting
        subject = self.subject
        return likelihoods(subject.net, requests, subject.batch, subject.ticker(self.label))

    def texts(self, contexts: Sequence[str], settings: Sequence[dict[str, Any]]) -> list[str]:
        sampled = [bool(own.get("do_sample")) or float(own.get("temperature") or 0) > 0 for own in settings]
        self._notify("answers that the task wants drawn at random are greedy here", sum(sampled))
        tokens = [int(own.get("max_gen_toks", own.get("max_new_tokens", MAX_TOKENS))) for own in settings]
        prompts = [self.ids(context, True) for context in contexts]
        if self.room is not None:
            fitting = [ids[-max(1, self.room - most) :] for ids, most in zip(prompts, tokens, strict=True)]
            text = f"prompts that leave no room for an answer in {self.room} tokens, cut at the beginning"
            self._notify(text, _n_different(prompts, fitting))
            prompts = fitting
        return continuations(self.subject, prompts, list(map(_stops, settings)), tokens, self.label)

    def _notify(self, what: str, count: int) -> None:
        if count:
            self.subject.notify(Notice(f"{self.label}: {what}", level="warning", count=count))


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _cut(request: HarnessRequest, room: int) -> HarnessRequest:
    """The last ``room`` + 1 tokens: the last of them is predicted, not read."""
    return HarnessRequest(request.context[-max(1, room + 1 - len(request.said)) :], request.said[-room:])


def _n_different(before: Sequence[object], after: Sequence[object]) -> int:
    return sum(old != new for old, new in zip(before, after, strict=True))
