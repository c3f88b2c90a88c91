"""How likely sequences are to a model, without gradient; a prompt that several answers share is computed
once, together with other prompts of its length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith.model import abilities, kernels, logprobs, vocabulary
from tunesmith.tokens.batches import Cut, Group, collate
from tunesmith.tokens.template import Tokens

WORTH = 192
"""Tokens that sharing prompts must save, for what its passes cost beside their tokens
(`bench/objectives.py`): one more pass than whole rows would take or several. For a part of a pass, that part;
for none, none."""
ANSWERS = 8
"""At once after the prompt of one family: each layer concatenates its keys with those of every answer."""


def sequence_sums(
    net: nn.Module, groups: Sequence[Group], cut: Cut, tick: Callable[[int, int], None] | None = None
) -> list[list[tuple[float, float]]]:
    """(Σ weight · log p in nats, Σ weight) of each sequence of each group, in order, in evaluation mode. None
    is left out. Raises ModelError for an id that the model does not know."""
    net.eval()
    gather = abilities.splits(net)
    sequences = [sequence for group in groups for sequence in group.sequences]
    vocabulary.require_rows(net, groups)
    pairs: list[tuple[float, float]] = [(0.0, 0.0)] * len(sequences)
    done = 0
    shared = _shared(sequences, cut)
    if shared and not (gather and abilities.continues(net)):
        shared = []
    together = {member for batch in shared for member in batch.owners}

    def score(cut: Cut, chosen: dict[int, Tokens], prompts: _Prompts | None = None) -> None:
        nonlocal done
        lengths = {member: max(1, len(tokens.ids) - 1) for member, tokens in chosen.items()}
        places = list(chosen)
        for part in cut(list(lengths.values()), range(len(places))):
            members = [places[place] for place in part]
            batch = collate([Group((chosen[member],), "") for member in members], pack=cut.pack)
            prompt = None if prompts is None else prompts(members)
            sums = logprobs.batch_sums(net, batch, gather=gather, prompt=prompt)
            for member, pair in zip(members, sums, strict=True):
                pairs[member] = pair
            done += len(members)
            if tick is not None:
                tick(done, len(sequences))

    single = replace(cut, each=1)
    score(single, {member: tokens for member, tokens in enumerate(sequences) if member not in together})
    for batch in shared:
        tails = {
            member: Tokens(sequences[member].ids[batch.split :], sequences[member].targets[batch.split :])
            for member in batch.owners
        }
        score(batch.rest(single), tails, batch.computed(net, sequences))
    ends = iter(pairs)
    return [[next(ends) for _ in group.sequences] for group in groups]


_Prompts = Callable[[list[int]], list[kernels.PromptCache]]
"""The cache with the prompt of each of these members."""


class _SharedPrompts(NamedTuple):
    """Families whose prompts have one length and are computed at once.

    ``split``: tokens of a prompt without its last one, which predicts the first of the answer and goes with
    it. ``width``: positions of the longest answer."""

    split: int
    width: int
    families: tuple[list[int], ...]

    @property
    def owners(self) -> dict[int, int]:
        """The family of each member."""
        return {member: row for row, members in enumerate(self.families) for member in members}

    @property
    def tokens(self) -> int:
        """On the device at once: those of the prompts and, padded, of all answers."""
        return len(self.families) * self.split + len(self.owners) * self.width

    def fits(self, cut: Cut) -> bool:
        # A layer holds the keys of a prompt once for each answer: for ANSWERS prompts they are as many as a
        # family alone may have.
        few = max(map(len, self.families)) <= ANSWERS
        return few and self.tokens <= cut.tokens and (cut.micro is None or len(self.owners) <= cut.micro)

    def pays(self, sequences: Sequence[Tokens], cut: Cut) -> bool:
        saved = (len(self.owners) - len(self.families)) * self.split
        whole = sum(len(sequences[member].ids) - 1 for member in self.owners) / cut.tokens
        passes = 1 + max(1, len(self.owners) * self.width / cut.tokens)
        return saved >= WORTH * min(1, max(0, passes - whole))

    def rest(self, cut: Cut) -> Cut:
        """The cut of the answers: what the prompts leave of the budget, or, of a single family, ANSWERS at
        once."""
        if len(self.families) == 1:
            return replace(cut, pack=False, micro=min(cut.micro or ANSWERS, ANSWERS))
        return replace(cut, pack=False, tokens=cut.tokens - len(self.families) * self.split)

    def computed(self, net: nn.Module, sequences: Sequence[Tokens]) -> _Prompts:
        ids = np.stack([sequences[members[0]].ids[: self.split] for members in self.families])
        prompts, owners = kernels.prompt(net, mx.array(ids)), self.owners
        if len(self.families) == 1:
            return lambda members: prompts
        return lambda members: kernels.each_after(prompts, [owners[member] for member in members])


def _shared(sequences: Sequence[Tokens], cut: Cut) -> list[_SharedPrompts]:
    """The families whose prompts are worth sharing: with the longest prompts first, as many at once as fit
    the budget."""
    single: list[_SharedPrompts] = []
    for members in families(sequences):
        split = sequences[members[0]].start - 1
        if len(members) > 1 and split > 0:
            width = max(1, *(len(sequences[member].ids) - 1 - split for member in members))
            single.append(_SharedPrompts(split, width, (members,)))
    batches: list[_SharedPrompts] = []
    # Answers of similar length together: they are padded.
    for family in sorted(single, key=lambda family: (-family.split, -family.width)):
        if batches and batches[-1].split == family.split:
            grown = batches[-1]._replace(families=batches[-1].families + family.families)
            if grown.fits(cut):
                batches[-1] = grown
                continue
        batches.append(family)
    return [batch for batch in batches if batch.pays(sequences, cut)]


def row_losses(
    net: nn.Module, groups: Sequence[Group], cut: Cut, tick: Callable[[int, int], None] | None = None
) -> list[tuple[float, float]]:
    """(−Σ weight · log p in nats, Σ weight) of each group, all its sequences together."""
    scores = sequence_sums(net, groups, cut, tick)
    return [(-sum(logp for logp, _ in group), sum(units for _, units in group)) for group in scores]


def families(sequences: Sequence[Tokens]) -> list[list[int]]:
    """All of ``sequences`` by index, those with the same tokens before the first learned one together, in
    order of the first."""
    by_prompt: dict[bytes, list[int]] = {}
    for index, tokens in enumerate(sequences):
        by_prompt.setdefault(tokens.ids[: tokens.start].astype("<i4").tobytes(), []).append(index)
    return list(by_prompt.values())
