"""An adapter that is detached leaves the model exactly as it was."""

from __future__ import annotations

import mlx.core as mx
import pytest
from adapters.test_layers import IDS, adapted, fresh
from mlx.utils import tree_flatten

from tunesmith import adapters
from tunesmith.adapters import DoRA, Full, LoRA
from tunesmith.errors import ModelError

SPECS = {
    "lora": LoRA(rank=4, targets="all-linear"),
    "dora": DoRA(rank=4, targets=("q_proj", "lm_head")),
    "hybrid": LoRA(rank=4, full_modules=("input_layernorm", "norm")),
    "full": Full(targets=("mlp",)),
}


def state(net):
    """All that a net is made of: module objects, their classes and order, arrays, what is frozen."""
    modules = [(name, id(module), type(module), tuple(module)) for name, module in net.named_modules()]
    arrays = [(name, id(value)) for name, value in tree_flatten(net.parameters())]
    trained = [name for name, _ in tree_flatten(net.trainable_parameters())]
    return modules, arrays, trained, [module.training for module in net.modules()]


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_detached_adapter_leaves_the_same_modules_arrays_and_outputs(kind, bits, frozen, tmp_path):
    if kind == "full" and bits:
        pytest.skip("quantised weights cannot be trained in full")
    dtype = mx.float32 if bits else mx.bfloat16
    adapters.save(adapted(SPECS[kind], dtype=dtype, bits=bits), SPECS[kind], tmp_path)
    net = fresh(bits, dtype=dtype)
    if frozen:
        net.freeze()
    before, outputs = state(net), net(IDS)
    handle = adapters.read(tmp_path).attach(net)
    assert not mx.array_equal(net(IDS), outputs)
    handle.detach()
    assert state(net) == before and mx.array_equal(net(IDS), outputs)
    with adapters.attached(net, tmp_path) as adapter:
        assert adapter.spec == SPECS[kind] and state(net) != before
    assert state(net) == before
    handle.detach()  # twice is once
    assert state(net) == before


def test_one_base_carries_one_adapter_after_another(tmp_path):
    net = fresh()
    for number, spec in enumerate([LoRA(rank=4), DoRA(rank=2, targets="all-linear"), LoRA(rank=4)]):
        folder = tmp_path / str(number)
        alone = adapted(spec, seed=number)
        adapters.save(alone, spec, folder)
        with adapters.attached(net, folder):
            assert mx.array_equal(net(IDS), alone.eval()(IDS))


def test_an_adapter_that_does_not_fit_leaves_the_net_alone(tmp_path):
    spec = LoRA(rank=4, targets="all-linear")
    adapters.save(adapted(spec), spec, tmp_path)
    net = fresh(layers=2)
    before = state(net)
    with pytest.raises(ModelError, match="do not fit the model"):
        adapters.read(tmp_path).attach(net)
    assert state(net) == before
    adapters.save(adapted(LoRA(rank=4, layers=3)), LoRA(rank=4, layers=3), tmp_path)
    with pytest.raises(ModelError, match="3 is more than the model's 2 blocks"):
        adapters.read(tmp_path).attach(net)
    assert state(net) == before


def test_detaching_gives_each_module_its_former_mode(tmp_path):
    net, spec = fresh(), LoRA(rank=2)
    spec.attach(net, 0)
    adapters.save(net, spec, tmp_path / "adapter")
    bare = fresh()
    bare.eval()
    handle = adapters.read(tmp_path / "adapter").attach(bare)
    bare.train()
    handle.detach()
    assert not any(module.training for module in bare.modules())


def test_a_file_that_is_cut_short_is_refused_before_it_is_used(tmp_path):
    net, spec = fresh(), LoRA(rank=2)
    spec.attach(net, 0)
    adapters.save(net, spec, tmp_path)
    whole = (tmp_path / adapters.WEIGHTS).read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 20, 4):
        (tmp_path / adapters.WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(ModelError, match="cannot be read"):
            adapters.read(tmp_path)
