"""Which type has each tensor of a file? Most matrices have the type that the file is named after; a mix gives
more bits to those that suffer most, by the rules of llama.cpp's own quantiser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

PRECISE_HEAD = {"Q4_0": "Q8_0", "Q4_1": "Q8_0", "Q5_0": "Q8_0", "Q5_1": "Q8_0"}
"""The type of the matrix that gives the logits, which suffers most from few bits."""
MIXES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K"}
"""Name of a mix → the type of most of its matrices."""
PRECISE = "Q6_K"
"""The type of other matrices of a mix: of the logits, and of values and the second matrix of the feed-forward
layer in some blocks."""
NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Type with blocks of 256 values → the one with blocks of 32 for rows that do not fill them."""
SENSITIVE = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down|ffn_down_exps)\.weight")


class TensorType(NamedTuple):
    """``narrow``: the rows do not fill the blocks of the type that the file would have for the tensor."""

    type: GGMLQuantizationType
    narrow: bool = False


def choose(name: str, shape: Sequence[int], mix: str, n_blocks: int, *, head: bool) -> TensorType:
    """The type of a tensor in a file that is named after ``mix``, a type or a mix of types; vectors stay
    float32. head: whether the matrix gives the logits."""
    if len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(".bias"):
        return TensorType(GGMLQuantizationType.F32)
    width = shape[-1]
    if mix not in MIXES:
        wanted, others = PRECISE_HEAD.get(mix, mix) if head else mix, []
    elif head:
        wanted, others = PRECISE, ["Q8_0"]
    else:
        wanted = PRECISE if _wants_more_bits(name, n_blocks) else MIXES[mix]
        others = [NARROWER[wanted]]
    for number, candidate in enumerate([wanted, *others]):
        kind = GGMLQuantizationType[candidate]
        if width % GGML_QUANT_SIZES[kind][0] == 0:
            return TensorType(kind, number > 0)
    return TensorType(GGMLQuantizationType.F16, True)


def _wants_more_bits(name: str, n_blocks: int) -> bool:
    """Values and the second matrix of the feed-forward layer: in the first and the last eighth of the blocks,
    and in every third between."""
    match = SENSITIVE.fullmatch(name)
    if match is None:
        return False
    number, eighth = int(match[1]), n_blocks // 8
    return number < eighth or number >= 7 * n_blocks // 8 or (number - eighth) % 3 == 2
