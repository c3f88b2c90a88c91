"""A model under test, base or tuned: it is asked the same questions in the same order, on any number of
ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import events
from tunesmith.data.formats import Conversation
from tunesmith.engine import generation, scoring
from tunesmith.events import Sink
from tunesmith.machine.ranks import ONE, Ranks
from tunesmith.model import vocabulary
from tunesmith.tokens.batches import BatchSpec, Cut, Group
from tunesmith.tokens.template import Renderer, Tokens

Side = Literal["base", "tuned"]
Prompt: TypeAlias = Conversation | str
"""A conversation that waits for an answer, or plain text to be continued."""


class Said(NamedTuple):
    """An answer. ``tokens``: how many were generated; ``cut``: it ended at the limit, not by itself."""

    text: str
    tokens: int
    cut: bool


@dataclass
class Subject:
    """Greedy answers and log-probabilities of one model. The net is put into evaluation mode, since an
    attached adapter has its dropout on.

    ``heard``: what the model answered, by the hash of the question, oldest first. A question is asked once,
    and tasks share the answer. A subject that is given the answers of an interrupted evaluation continues in
    the same batches."""

    net: nn.Module
    renderer: Renderer
    side: Side
    batch: BatchSpec = field(default_factory=BatchSpec)
    batch_size: int = 32
    notify: Sink = events.silent
    ranks: Ranks = ONE
    heard: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.net.eval()

    def ids(self, prompt: Prompt) -> list[int]:
        """The tokens of ``prompt`` up to where the answer begins. Raises TemplateError if the template cannot
        express it."""
        return self.renderer.text_prompt(prompt) if isinstance(prompt, str) else self.renderer.prompt(prompt)

    def answers(self, prompts: Sequence[Prompt], max_tokens: int, label: str = "answers") -> list[Said]:
        """One greedy answer a prompt, in order. Raises ModelError if the model does not know a token of
        one."""
        sequences = [self.ids(prompt) for prompt in prompts]
        places = [f"{label}, prompt {place}" for place in range(len(sequences))]
        vocabulary.require_known(self.net, zip(places, sequences, strict=True), self.renderer.decode)
        keys = [_hash(max_tokens, np.array(ids, "<i4")) for ids in sequences]
        new = {key: ids for key, ids in zip(keys, sequences, strict=True) if key not in self.heard}
        mine = list(new.values())[self.ranks.rank :: self.ranks.size]
        made = generation.generate(
            self.net,
            mine,
            max_tokens=max_tokens,
            eos_ids=self.renderer.eos_ids,
            batch_size=self.batch_size,
            on_done=self.ticker(label),
        )
        for key, ids, cut in zip(
            new,
            *self._met(
                [answer.ids for answer in made], [answer.finish == "length" for answer in made], len(new)
            ),
            strict=True,
        ):
            self.heard[key] = Said(self.renderer.answer(ids), len(ids), cut)
        return [Said(*self.heard[key]) for key in keys]

    def _met(self, ids: list[list[int]], cut: list[bool], n: int) -> tuple[list[list[int]], list[bool]]:
        """What all ranks generated, in the order of the ``n`` questions; this rank's are every ``size``-th
        from ``rank``."""
        if self.ranks.size == 1:
            return ids, cut
        mine = range(self.ranks.rank, n, self.ranks.size)
        lengths = np.zeros((n, 2), np.float32)
        lengths[mine] = (
            [[len(answer_ids), end] for answer_ids, end in zip(ids, cut, strict=True)]
            if ids
            else np.zeros((0, 2))
        )
        lengths = np.array(self.ranks.total([mx.array(lengths)])[0])
        table = np.zeros(
            (n, max(1, int(lengths[:, 0].max(initial=0)))), np.float32
        )  # ids under 2**24 are exact
        for place, answer_ids in zip(mine, ids, strict=True):
            table[place, : len(answer_ids)] = answer_ids
        table = np.array(self.ranks.total([mx.array(table)])[0]).astype(int)
        return [row[: int(length)].tolist() for row, (length, _) in zip(table, lengths, strict=True)], [
            bool(end) for _, end in lengths
        ]

    def logps(self, groups: Sequence[Group], label: str = "likelihoods") -> list[list[tuple[float, float]]]:
        """(Σ weight · log p in nats, Σ weight) over the targets of each sequence of each group, in order."""
        new = [group for group in groups if any(_key(tokens) not in self.heard for tokens in group.sequences)]
        mine = range(self.ranks.rank, len(new), self.ranks.size)
        own = [new[index] for index in mine]
        own_sums = (
            scoring.sequence_sums(self.net, own, Cut.forward(self.batch, new), self.ticker(label))
            if own
            else []
        )
        parts = [np.zeros((len(group.sequences), 2)) for group in new]
        for index, sums in zip(mine, own_sums, strict=True):
            parts[index][:] = sums
        summed = self.ranks.total_float(np.concatenate([np.zeros((0, 2)), *parts]))
        sequences = [tokens for group in new for tokens in group.sequences]
        for tokens, (logp, units) in zip(sequences, summed.tolist(), strict=True):
            self.heard.setdefault(_key(tokens), (logp, units))
        return [
            [(logp, units) for logp, units in (self.heard[_key(tokens)] for tokens in group.sequences)]
            for group in groups
        ]

    def ticker(self, label: str):
        return events.ticker(self.notify, f"{self.side}: {label}")


def _key(tokens: Tokens) -> str:
    return _hash("logp", tokens.ids.astype("<i4"), tokens.targets.astype("<f4"))


def _hash(of: int | str, *arrays: np.ndarray) -> str:
    return hashlib.sha256(b"|".join([str(of).encode(), *(array.tobytes() for array in arrays)])).hexdigest()
