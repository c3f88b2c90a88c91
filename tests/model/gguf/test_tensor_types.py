"""The types of tensors in GGUF files: those that llama.cpp's own quantiser chooses."""

from __future__ import annotations

import pytest

from tunesmith.model.gguf import tensor_types

WIDE, NARROW = (8, 512), (8, 576)


def chosen(
    name: str, asked: str, shape: tuple[int, ...] = WIDE, n_blocks: int = 32, head: bool = False
) -> str:
    return tensor_types.choose(name, shape, asked, n_blocks, head=head).type.name


def test_a_mix_gives_more_bits_to_the_blocks_that_llama_cpp_gives_them():
    """Of 32 blocks: the first and the last four, and every third between."""
    more = [number for number in range(32) if chosen(f"blk.{number}.ffn_down.weight", "Q4_K_M") == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert more == [
        number for number in range(32) if chosen(f"blk.{number}.attn_v.weight", "Q5_K_M") == "Q6_K"
    ]
    assert {chosen(f"blk.{number}.attn_q.weight", "Q4_K_M") for number in range(32)} == {"Q4_K"}
    assert {chosen(f"blk.{number}.ffn_down.weight", "Q6_K") for number in range(32)} == {"Q6_K"}


@pytest.mark.parametrize(
    ("asked", "most", "narrow"),
    [("Q4_K_M", "Q4_K", "Q5_0"), ("Q5_K_M", "Q5_K", "Q5_1"), ("Q6_K", "Q6_K", "Q8_0")],
)
def test_rows_that_do_not_fill_blocks_of_256_have_a_larger_type_and_are_counted(asked, most, narrow):
    wide, short = (
        tensor_types.choose("blk.9.ffn_up.weight", shape, asked, 32, head=False) for shape in (WIDE, NARROW)
    )
    assert (wide.type.name, wide.narrow) == (most, False)
    assert (short.type.name, short.narrow) == (narrow, True)
    assert chosen("blk.9.ffn_up.weight", asked, (8, 33)) == "F16"


def test_the_matrix_of_the_logits_is_precise_and_vectors_stay_float32():
    assert chosen("output.weight", "Q4_K_M", head=True) == "Q6_K"
    assert chosen("output.weight", "Q4_K_M", NARROW, head=True) == "Q8_0"
    assert chosen("token_embd.weight", "Q4_K_M") == "Q4_K"
    assert chosen("blk.0.attn_norm.weight", "Q4_K_M", (512,)) == "F32"
