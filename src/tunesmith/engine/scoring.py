"""How likely sequences are to a model, without gradient; a prompt that several answers share is computed
once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from tunesmith.model import abilities, kernels, logprobs, vocabulary
from tunesmith.tokens.batches import Cut, Group, collate
from tunesmith.tokens.template import Tokens

WORTH = 192
"""Tokens that sharing a prompt must save, for what its two passes cost beside their tokens
(`bench/objectives.py`)."""
ANSWERS = 8  # at once after a shared prompt: each layer concatenates its keys with those of every answer


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
    shared = [
        members
        for members in families(sequences)
        if (len(members) - 1) * (sequences[members[0]].start - 1) >= WORTH
    ]
    if shared and not (gather and abilities.continues(net)):
        shared = []
    together = {member for members in shared for member in members}

    def score(cut: Cut, chosen: dict[int, Tokens], prompt: list[kernels.PromptCache] | None = None) -> None:
        nonlocal done
        lengths = {member: max(1, len(tokens.ids) - 1) for member, tokens in chosen.items()}
        places = list(chosen)
        for part in cut(list(lengths.values()), range(len(places))):
            members = [places[place] for place in part]
            batch = collate([Group((chosen[member],), "") for member in members], pack=cut.pack)
            sums = logprobs.batch_sums(net, batch, gather=gather, prompt=prompt)
            for member, pair in zip(members, sums, strict=True):
                pairs[member] = pair
            done += len(members)
            if tick is not None:
                tick(done, len(sequences))

    single = replace(cut, each=1)
    score(single, {member: tokens for member, tokens in enumerate(sequences) if member not in together})
    few = replace(single, pack=False, micro=min(cut.micro or ANSWERS, ANSWERS))
    for members in shared:
        first = sequences[members[0]]
        split = (
            first.start - 1
        )  # the last token of the prompt predicts the first of the answer: it goes with it
        tails = {
            member: Tokens(sequences[member].ids[split:], sequences[member].targets[split:])
            for member in members
        }
        score(few, tails, kernels.prompt(net, mx.array(first.ids[:split])[None]))
    ends = iter(pairs)
    return [[next(ends) for _ in group.sequences] for group in groups]


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
