"""How is the next token of each row chosen from its logits?

All rows of a batch are drawn at once, and each as if it were alone: every operation works along the
vocabulary of one row, and the random numbers come from keys of that row's request."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from tunesmith.engine.requests import Request
from tunesmith.model import kernels

SEEDS = 1 << 64
"""Seeds are taken modulo this, so that a negative one is a seed too."""
BLOCK = 64
"""Keys that are made at once."""
COLDEST = 1e-30
"""Least divisor of logits: a smaller temperature would make all of them infinite."""
BELOW_ONE = 1 - 2.0**-23
"""Largest share of the total that is drawn: rounded up to all of it, no place would be left."""


class Draws:
    """The random keys of one request, one for each token, a function of its seed and stream alone."""

    def __init__(self, request: Request) -> None:
        # SeedSequence takes no negative number.
        entropy = np.random.SeedSequence([request.seed % SEEDS, request.stream])
        self._next = mx.random.key(int(entropy.generate_state(1, np.uint32)[0]))
        self._keys = np.zeros((0, 2), np.uint32)

    def key(self, place: int) -> np.ndarray:
        """(2,) uint32: the key of the token at ``place`` of the continuation."""
        while place >= len(self._keys):
            keys = []
            for _ in range(BLOCK):
                self._next, key = mx.random.split(self._next)
                keys.append(key)
            self._keys = np.concatenate([self._keys, np.array(mx.stack(keys))])
        return self._keys[place]


class Edits:
    """Penalties and biases of one request. Counts of its tokens stay on the device, so that a token need not
    be known before the next pass begins."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._bias: mx.array | None = None
        self._seen: mx.array | None = None  # (V,) whether the prompt or the continuation has the token
        self._counts: mx.array | None = None  # (V,) how often the continuation has it

    @staticmethod
    def wanted(request: Request) -> bool:
        penalties = request.presence_penalty, request.frequency_penalty, request.repetition_penalty - 1
        return any(penalties) or bool(request.logit_bias)

    def __call__(self, logits: mx.array, new: mx.array | None) -> mx.array:
        """(V,) → (V,) float32. ``new`` (1,): the token that was generated since the last call."""
        request, logits = self._request, logits.astype(mx.float32)
        if self._bias is None:
            self._bias = _biases(request, logits.size)
        # What nobody reads is not updated: it would hold on to the arrays of all earlier tokens.
        if request.repetition_penalty != 1:
            if self._seen is None:
                self._seen = mx.array(np.bincount(request.ids, minlength=logits.size)) > 0
            if new is not None:
                self._seen = mx.put_along_axis(self._seen, new, mx.array(True), axis=0)
            penalty = request.repetition_penalty
            repeated = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(self._seen, repeated, logits)
        if request.presence_penalty or request.frequency_penalty:
            if self._counts is None:
                self._counts = mx.zeros(logits.size)
            if new is not None:
                self._counts = self._counts.at[new].add(1.0)
            logits = logits - request.frequency_penalty * self._counts
            logits = logits - request.presence_penalty * (self._counts > 0)
        return logits + self._bias


def _biases(request: Request, size: int) -> mx.array:
    biases = np.zeros(size, np.float32)
    for token, bias in request.logit_bias.items():
        biases[token] = bias
    return mx.array(biases)


def choose(logits: mx.array, requests: Sequence[Request], keys: Sequence[np.ndarray | None]) -> mx.array:
    """(B, V) → (B,) tokens: the likeliest, or drawn where the request has a temperature. ``keys``: (2,) of
    each row that is drawn, from `Draws`."""
    drawn = [place for place, request in enumerate(requests) if request.temperature > 0]
    if not drawn:
        return mx.argmax(logits, axis=-1)
    chosen = [requests[place] for place in drawn]
    row_keys = mx.array(np.stack([key for place in drawn if (key := keys[place]) is not None]))
    if len(drawn) == len(requests):
        return _draw(logits, chosen, row_keys)
    tokens, places = mx.argmax(logits, axis=-1), mx.array(drawn)
    tokens[places] = _draw(logits[places], chosen, row_keys)
    return tokens


def _draw(logits: mx.array, requests: Sequence[Request], keys: mx.array) -> mx.array:
    """(B, V), (B, 2) → (B,)"""
    logprobs = logits.astype(mx.float32) - kernels.log_sums(logits)[:, None]
    temperatures = _column([max(request.temperature, COLDEST) for request in requests])
    scaled = _filtered(logprobs / temperatures, requests)
    # As `mx.random.categorical` draws from one row: the first place where the running sum passes a share of
    # the total.
    sums = mx.cumsum(mx.exp(scaled - scaled.max(axis=-1, keepdims=True)), axis=-1)
    shares = mx.vmap(lambda key: mx.random.uniform(shape=(1,), key=key))(keys)
    totals = sums[:, -1:]
    passed = mx.minimum(shares * totals, totals * BELOW_ONE)
    return (sums <= passed).sum(axis=-1)


def _filtered(logits: mx.array, requests: Sequence[Request]) -> mx.array:
    """(B, V) float32, −inf where top_k, top_p and then min_p of the row leave the token out. Tokens that tie
    with the last one inside stay."""
    if any(request.top_k or request.top_p < 1 for request in requests):
        most = [min(request.top_k, logits.shape[-1]) or logits.shape[-1] for request in requests]
        ranked = _ranked(logits, max(most))
        inside = mx.arange(ranked.shape[-1])[None] < _column(most).astype(mx.int32)
        if any(request.top_p < 1 for request in requests):
            shares = mx.softmax(mx.where(inside, ranked, -mx.inf), axis=-1)
            before = mx.cumsum(shares, axis=-1) - shares
            shared = before < _column([request.top_p if request.top_p < 1 else 2.0 for request in requests])
            inside = inside & shared
        least = mx.where(inside, ranked, mx.inf).min(axis=-1, keepdims=True)
        logits = mx.where(logits >= least, logits, -mx.inf)
    if any(request.min_p for request in requests):
        shares = np.array([[request.min_p] for request in requests], np.float32)
        with np.errstate(divide="ignore"):
            least = logits.max(axis=-1, keepdims=True) + mx.array(np.log(shares))
        logits = mx.where(logits >= least, logits, -mx.inf)
    return logits


def _ranked(logits: mx.array, count: int) -> mx.array:
    """(B, V) → (B, count) the largest, in falling order. Sorting the whole vocabulary takes several times as
    long as finding the largest; on a CPU NumPy sorts it, in a fraction of the time that MLX takes."""
    if count == logits.shape[-1] and mx.default_device().type == mx.DeviceType.cpu:
        whole = np.negative(np.array(logits))
        whole.sort(axis=-1)
        return -mx.array(whole)
    largest = -logits
    if count < logits.shape[-1]:
        largest = mx.partition(largest, count - 1, axis=-1)[:, :count]
    return -mx.sort(largest, axis=-1)


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(np.array(values, np.float32)[:, None])


class Scores:
    """Log-probabilities of the tokens of one pass, for the rows whose requests want them.

    They are the model's own: before penalties, biases, constraints and temperature."""

    def __init__(self, logits: mx.array, tokens: mx.array, requests: Sequence[Request]) -> None:
        """(B, V) raw logits, (B,) chosen tokens."""
        wanting = [place for place, request in enumerate(requests) if request.logprobs is not None]
        self._places = {place: index for index, place in enumerate(wanting)}
        self._counts = [requests[place].logprobs or 0 for place in wanting]
        self.arrays: list[mx.array] = []
        self._numbers: list[np.ndarray] = []  # of the same, once they are read
        if not wanting:
            return
        rows = mx.array(wanting)
        logprobs = logits[rows].astype(mx.float32)
        logprobs = logprobs - kernels.log_sums(logprobs)[:, None]
        self.arrays = [mx.take_along_axis(logprobs, tokens[rows][:, None], axis=-1)[:, 0]]
        most = min(max(self._counts), logits.shape[-1])
        if most:
            likeliest = mx.argpartition(-logprobs, kth=most - 1, axis=-1)[:, :most]
            values = mx.take_along_axis(logprobs, likeliest, axis=-1)
            order = mx.argsort(-values, axis=-1)
            self.arrays += [mx.take_along_axis(array, order, axis=-1) for array in (likeliest, values)]

    def kept(self, places: Sequence[int]) -> Scores:
        """The same of fewer rows, which ``places`` lists in their new order."""
        kept = copy.copy(self)
        kept._places = {new: self._places[place] for new, place in enumerate(places) if place in self._places}
        return kept

    def of(self, place: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """The log-probability of the token of row ``place``, and the likeliest tokens with theirs."""
        index = self._places.get(place)
        if index is None:
            return None, ()
        if not self._numbers:
            self._numbers = [np.array(array) for array in self.arrays]
        logprob, count = float(self._numbers[0][index]), self._counts[index]
        if not count:
            return logprob, ()
        ids, values = (array[index, :count].tolist() for array in self._numbers[1:])
        return logprob, tuple(zip(ids, values, strict=True))
