"""Our loaded model, with its adapter, as a language model of EleutherAI's lm-evaluation-harness: likelihoods
and greedy text.

What is asked is the harness's affair; how likely a continuation is, whether it is what the model would say,
and what the model says up to a stop string is answered here. Requests that say the same are computed once,
and so is what many of them begin with: the choices of a question share its text, the questions of a subject
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
from tunesmith.evaluation.subject import Subject
from tunesmith.events import Notice
from tunesmith.model import kernels, logprobs
from tunesmith.model import loading as model
from tunesmith.tokens.batches import BatchSpec, Cut

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

Ids = tuple[int, ...]
Tick = Callable[[int, int], None]
MAX_TOKENS = 256  # of an answer, where a task does not say


class Request(NamedTuple):
    """``said`` is to be measured as what follows ``context``, which has one token at least."""

    context: Ids
    said: Ids


class Measured(NamedTuple):
    """``logp``: nats of all that was said. ``greedy``: each of its tokens was the likeliest."""

    logp: float
    greedy: bool


@dataclass
class _Pass:
    """Tokens to run once, for all ``requests`` that they contain. ``first``: the first position that predicts
    what was said."""

    ids: Ids
    requests: list[int]
    first: int


def likelihoods(
    net: nn.Module, requests: Sequence[Request], batch: BatchSpec, tick: Tick | None = None
) -> list[Measured]:
    """One Measured a request, in order, in evaluation mode; the mode is left as it was."""
    found = [Measured(0.0, True)] * len(requests)
    done = 0
    with model.evaluating(net):
        gather = logprobs.splits(net)
        passes = _passes(requests)
        families = _families(passes) if gather and scoring.continues(net) else [(0, range(len(passes)))]
        tokens = batch.tokens or max((len(one.ids) for one in passes), default=1)
        few = min(batch.micro or scoring.ANSWERS, scoring.ANSWERS)
        alone = [member for kept, members in families if not kept for member in members]
        for kept, members in [(0, alone), *((kept, list(members)) for kept, members in families if kept)]:
            lengths = [len(passes[member].ids) - kept for member in members]
            prompt = kernels.prompt(net, mx.array(passes[members[0]].ids[:kept])[None]) if kept else None
            for part in Cut(tokens, few if kept else batch.micro)(lengths, range(len(members))):
                chosen = [passes[members[place]] for place in part]
                for request, measured in _measure(net, chosen, requests, kept, prompt, gather):
                    found[request] = measured
                    done += 1
                if tick is not None:
                    tick(done, len(requests))
    return found


def _passes(requests: Sequence[Request]) -> list[_Pass]:
    """In lexicographic order; no one's tokens begin another's, so " A", " B" and " C" after one text are one
    pass."""
    runs = sorted(((one.context + one.said[:-1], index) for index, one in enumerate(requests)), reverse=True)
    passes: list[_Pass] = []
    for ids, index in runs:
        if not passes or passes[-1].ids[: len(ids)] != ids:
            passes.append(_Pass(ids, [], len(ids)))
        passes[-1].requests.append(index)
        passes[-1].first = min(passes[-1].first, len(requests[index].context) - 1)
    return passes[::-1]


def _families(passes: Sequence[_Pass]) -> list[tuple[int, range]]:
    """(how many first tokens they share and keep, which of the sorted ``passes``), the cheapest division; 0:
    nothing is kept."""
    sums = [0, *accumulate(len(one.ids) for one in passes)]

    def divide(start: int, end: int) -> tuple[int, list[tuple[int, range]]]:
        """Tokens to compute for passes start to end, and how."""
        apart = sums[end] - sums[start]
        if end - start == 1:
            return apart, [(0, range(start, end))]
        pairs = zip(passes[start].ids, passes[end - 1].ids, strict=False)
        depth = next(
            at for at, (one, other) in enumerate(pairs) if one != other
        )  # sorted: what these share, all share
        kept = min(depth, *(one.first for one in passes[start:end]))
        together = apart - (end - start - 1) * kept + scoring.WORTH
        cost, families, at = 0, [], start
        for _, members in groupby(range(start, end), lambda member: passes[member].ids[depth]):
            after = at + sum(1 for _ in members)
            price, found = divide(at, after)
            cost, families, at = cost + price, families + found, after
        return (together, [(kept, range(start, end))]) if kept and together < cost else (cost, families)

    return divide(0, len(passes))[1] if passes else []


def _measure(
    net: nn.Module,
    chosen: Sequence[_Pass],
    requests: Sequence[Request],
    kept: int,
    prompt: list[kernels.Prompt] | None,
    gather: bool,
) -> Iterator[tuple[int, Measured]]:
    """(request, what was measured) of all requests of ``chosen``, which run as one batch after their first
    ``kept`` tokens."""
    width = max(len(one.ids) for one in chosen) - kept
    tokens = np.zeros((len(chosen), width), np.int32)
    owners, positions, targets = [], [], []
    for row, one in enumerate(chosen):
        tokens[row, : len(one.ids) - kept] = one.ids[kept:]
        for index in one.requests:
            said, before = requests[index].said, row * width + len(requests[index].context) - 1 - kept
            owners += [index] * len(said)
            positions += range(before, before + len(said))
            targets += said
    options = {} if prompt is None else {"cache": prompt}
    states = logprobs.features(net, mx.array(tokens), **options) if gather else net(mx.array(tokens))
    states = states.reshape(-1, states.shape[-1])
    logps, best = [np.zeros(0)], [np.zeros(0, bool)]
    rows = max(1, logprobs.CHUNK // (logprobs.head(net, states[:1]) if gather else states).shape[-1])
    for at in range(0, len(targets), rows):
        part, wanted = states[mx.array(positions[at : at + rows])], mx.array(targets[at : at + rows])
        logits = logprobs.head(net, part) if gather else part
        logps.append(np.array(kernels.token_logprobs(logits, wanted)))
        best.append(np.array(logits.argmax(axis=-1) == wanted))
    of, likeliest, owned = np.concatenate(logps), np.concatenate(best), np.array(owners, int)
    for one in chosen:
        for index in one.requests:
            yield index, Measured(float(of[owned == index].sum()), bool(likeliest[owned == index].all()))


def continuations(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    until: Sequence[Sequence[str]],
    max_tokens: Sequence[int],
    label: str,
) -> list[str]:
    """The greedy text after each of ``prompts``, before the first of its stop strings, without control
    tokens."""
    from mlx_lm.generate import BatchGenerator

    renderer, tick = subject.renderer, subject.ticker(label)
    said: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    # A token holds a byte at least; two more, since what a decoded text begins with may be half a letter or a
    # swallowed space.
    looks = [2 + max((len(stop.encode()) for stop in stops), default=0) for stops in until]
    done = 0

    def text(ids: Sequence[int]) -> str:
        return renderer.decode([token for token in ids if token not in renderer.control_ids])

    with model.evaluating(subject.net):
        batch = BatchGenerator(
            subject.net,
            stop_tokens=[[end] for end in renderer.eos_ids],
            completion_batch_size=subject.batch_size,
            prefill_batch_size=min(8, subject.batch_size),
            stream=mx.default_stream(mx.default_device()),
        )
        try:
            inserted = batch.insert(
                [[*prompts[index]] for index in order], [max_tokens[index] for index in order]
            )
            index_of = dict(zip(inserted, order, strict=True))
            while responses := batch.next_generated():
                stopped: list[int] = []
                for response in responses:
                    index = index_of[response.uid]
                    if response.finish_reason != "stop":
                        said[index].append(response.token)
                    end = text(said[index][-looks[index] :]) if until[index] else ""
                    if response.finish_reason is None and any(stop in end for stop in until[index]):
                        stopped.append(response.uid)
                    if response.finish_reason is not None or response.uid in stopped:
                        done += 1
                        tick(done, len(prompts))
                if stopped:
                    batch.remove(stopped)
        finally:
            batch.close()
    return [
        functools.reduce(lambda all, stop: all.partition(stop)[0], until[at], text(ids))
        for at, ids in enumerate(said)
    ]


def longest(net: Any) -> int | None:
    """How many tokens the model can read at once, by its own configuration; None where it does not say."""
    try:
        return int(net.args.max_position_embeddings)
    except (AttributeError, TypeError):
        return None


def language_model(subject: Subject, label: str) -> TemplateLM:
    """``subject`` as the harness wants it: plain text, no chat template, greedy. ``label``: names its
    progress.

    Texts are tokenised as training rows are, with a BOS where the tokenizer adds one. What is longer than the
    model can read loses its beginning, and a notice says how often."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    renderer, room = subject.renderer, longest(subject.net)
    ids_of = functools.lru_cache(1024)(renderer.text_prompt)  # the choices of a question follow one text

    def tell(what: str, count: int) -> None:
        if count:
            subject.notify(Notice(f"{label}: {what}", level="warning", count=count))

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return renderer.eos_ids[-1]

        @property
        def prefix_token_id(self) -> int:
            return renderer.eos_ids[-1] if renderer.bos_id is None else renderer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            start = 1 if add_special_tokens is False and renderer.bos_id is not None else 0
            return list(ids_of(string)[start:])

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            asked = [Request(tuple(context), tuple(said)) for _, context, said in requests]
            if room is not None:
                fit = [_cut(one, room) for one in asked]
                tell(
                    f"longer than the {room} tokens that the model reads, cut at the beginning",
                    _differ(asked, fit),
                )
                asked = fit
            found = likelihoods(subject.net, asked, subject.batch, subject.ticker(label))
            return [(one.logp, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            asked: list[Request] = []
            owners: list[int] = []
            for index, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                for window in get_rolling_token_windows(
                    ids, self.prefix_token_id, room or subject.batch.length, 1
                ):
                    context, said = make_disjoint_window(window)
                    asked.append(Request(tuple(context), tuple(said)))
                    owners.append(index)
            measured = likelihoods(subject.net, asked, subject.batch, subject.ticker(label))
            sums = np.bincount(owners, [one.logp for one in measured], len(requests))
            return [float(one) for one in sums]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            settings = [request.args[1] for request in requests]
            drawn = sum(
                bool(one.get("do_sample")) or float(one.get("temperature") or 0) > 0 for one in settings
            )
            tell("answers that the task wants drawn at random are greedy here", drawn)
            tokens = [int(one.get("max_gen_toks", one.get("max_new_tokens", MAX_TOKENS))) for one in settings]
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            if room is not None:
                fit = [ids[-max(1, room - most) :] for ids, most in zip(prompts, tokens, strict=True)]
                tell(
                    f"prompts that leave no room for an answer in {room} tokens, cut at the beginning",
                    _differ(prompts, fit),
                )
                prompts = fit
            return continuations(subject, prompts, [_stops(one) for one in settings], tokens, label)

    return Adapter()


def _stops(settings: dict[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _cut(request: Request, room: int) -> Request:
    """The last ``room`` + 1 tokens: the last of all is only ever predicted."""
    return Request(request.context[-max(1, room + 1 - len(request.said)) :], request.said[-room:])


def _differ(before: Sequence[object], after: Sequence[object]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))
