"""Which layers of a mixture are routed experts, routers, or too narrow to adapt."""

from __future__ import annotations

import mlx.nn as nn

from tunesmith.adapters.mixtures import Mixture


def linear(**outputs: int) -> dict[str, nn.Module]:
    return {name.replace("_of_", "."): nn.Linear(8, count) for name, count in outputs.items()}


def test_a_gate_is_a_router_only_beside_experts():
    dense = linear(mlp_of_gate=4, mlp_of_up=8)
    assert not Mixture.of(dense).routers and not Mixture.of(dense).spared("all-linear", None)
    mixed = dense | linear(mlp_of_experts_of_0_of_up=8)
    assert Mixture.of(mixed).routers == {"mlp.gate"} == Mixture.of(mixed).spared("all-linear", None)


def test_a_router_one_output_wide_is_counted_once():
    mixture = Mixture.of(linear(mlp_of_gate=1, mlp_of_experts_of_0_of_up=8))
    assert mixture.narrow == {"mlp.gate"} and not mixture.routers
    assert mixture.coverage([]) == "1 layer one output wide not adapted (gate)"
    assert mixture.spared("mlp.gate", None) == {"mlp.gate"}
