"""The model and the rows of the goldens: functions of seeds, with numpy only, so that torch and MLX get the
same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SFT, PREFERENCES = (Path(__file__).with_name(f"{name}.safetensors") for name in ("sft", "preferences"))
VOCABULARY = 96
LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 2, 64, 128, 4, 2
RANK, ALPHA = 4, 8.0
TARGETS = ("q_proj", "v_proj")
UPDATES = 5
RATE, DECAY, MAX_NORM, WARMUP = 1e-2, 0.1, 0.5, 2
WEIGHTS = (0.8, 2.2)
"""Of desirable and undesirable rows in one case of KTO."""
JUDGED_ROWS = {
    "kto": (3, 1, 4, 0, 2),
    "kto_weighted": (3, 1, 4, 0, 2),
    "kto_desirable": (0, 2, 4),
    "kto_undesirable": (3, 1),
    "apo_zero_unpaired": (0, 1, 2, 3, 4),
}
"""Case → the order of `judged` rows in it. Other cases have `pairs`."""


def weights(
    vocabulary: int, *, layers: int = LAYERS, hidden: int = WIDTH, tied: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 weights of a llama with `HEADS` and `KV_HEADS` heads and MLPs of twice the width, by the
    names of Hugging Face's files."""
    random = np.random.Generator(np.random.PCG64(seed))
    inner, width = 2 * hidden, hidden // HEADS

    def weight(*shape: int) -> np.ndarray:
        return random.normal(0, 0.08, shape).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weight(vocabulary, hidden),
        "model.norm.weight": 1 + weight(hidden),
    }
    if not tied:
        tensors["lm_head.weight"] = weight(vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "self_attn.q_proj.weight": weight(HEADS * width, hidden),
            prefix + "self_attn.k_proj.weight": weight(KV_HEADS * width, hidden),
            prefix + "self_attn.v_proj.weight": weight(KV_HEADS * width, hidden),
            prefix + "self_attn.o_proj.weight": weight(hidden, HEADS * width),
            prefix + "mlp.gate_proj.weight": weight(inner, hidden),
            prefix + "mlp.up_proj.weight": weight(inner, hidden),
            prefix + "mlp.down_proj.weight": weight(hidden, inner),
            prefix + "input_layernorm.weight": 1 + weight(hidden),
            prefix + "post_attention_layernorm.weight": 1 + weight(hidden),
        }
    return tensors


def adapter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A fixed non-zero value for an adapter tensor, by its name."""
    return np.random.Generator(np.random.PCG64(sum(name.encode()))).normal(0, 0.05, shape).astype(np.float32)


def batch() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(ids, which of them are learned) of three rows of different lengths with several learned spans; one
    starts with its learned tokens."""
    random = np.random.Generator(np.random.PCG64(7))
    rows = [random.integers(1, VOCABULARY, length).astype(np.int32) for length in (11, 5, 17)]
    masks = [np.zeros(len(row), np.float32) for row in rows]
    masks[0][4:8] = masks[0][10:] = masks[1][1:] = masks[2][15:] = 1
    return rows, masks


def judged() -> list[tuple[list[int], list[int], bool]]:
    """Prompt, completion, label of five rows; no two lengths alike."""
    random = np.random.Generator(np.random.PCG64(11))
    sizes = [(4, 6, True), (2, 3, False), (9, 1, True), (5, 12, False), (3, 8, True)]
    return [
        (random.integers(1, VOCABULARY, asked).tolist(), random.integers(1, VOCABULARY, said).tolist(), label)
        for asked, said, label in sizes
    ]


def pairs(alike: bool = False) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen, rejected of three pairs; no two lengths alike.

    With ``alike`` prompts are one token and chosen answers six, for ORPO: TRL's likelihood is over the prompt
    too (its first token is never predicted) and a mean over the tokens of the batch, where ours is over the
    answer, a mean of the pairs' means."""
    random = np.random.Generator(np.random.PCG64(13))
    sizes = [(1, 6, 9), (1, 6, 2), (1, 6, 6)] if alike else [(4, 5, 9), (2, 11, 2), (7, 1, 6)]
    return [
        (
            random.integers(1, VOCABULARY, asked).tolist(),
            random.integers(1, VOCABULARY, chosen).tolist(),
            random.integers(1, VOCABULARY, rejected).tolist(),
        )
        for asked, chosen, rejected in sizes
    ]
