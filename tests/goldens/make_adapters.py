"""Writes adapters.safetensors: output and gradients of one linear layer under PEFT's LoRA and DoRA, with and
without bias.

Run with the parity extra: ``python tests/goldens/make_adapters.py``. The versions are in the file's metadata.
The test that reads it (tests/test_adapters.py) needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).with_name("adapters.safetensors")
INPUTS, OUTPUTS, RANK, ALPHA = 48, 40, 4, 6.0
CASES = {
    f"{kind}{'_bias' if bias else ''}{'_rs' if stabilised else ''}": (kind, bias, stabilised)
    for kind in ("lora", "dora")
    for bias in (False, True)
    for stabilised in (False, True)
}


def values() -> dict[str, np.ndarray]:
    """Weights, adapter, input x (2, 3, in) and the cotangent of the output (2, 3, out), in tunesmith's
    layout."""
    random = np.random.Generator(np.random.PCG64(11))
    shapes = {
        "weight": (OUTPUTS, INPUTS),
        "bias": (OUTPUTS,),
        "lora_a": (INPUTS, RANK),
        "lora_b": (RANK, OUTPUTS),
        "m": (OUTPUTS,),
        "x": (2, 3, INPUTS),
        "cotangent": (2, 3, OUTPUTS),
    }
    drawn = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {"m": np.abs(drawn["m"]) + 1}


def reference() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """``case/y`` and the gradients ``case/x``, ``case/lora_a``, ``case/lora_b``, ``case/m``; the versions
    that gave them."""
    import peft
    import torch

    given = {name: torch.from_numpy(value) for name, value in values().items()}
    found: dict[str, np.ndarray] = {}
    for case, (kind, bias, stabilised) in CASES.items():
        linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias)
        settings = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            use_dora=kind == "dora",
            use_rslora=stabilised,
            target_modules=["0"],
            lora_dropout=0.0,
        )
        with torch.no_grad():
            linear.weight.copy_(given["weight"])
            if bias:
                linear.bias.copy_(given["bias"])
        model = peft.get_peft_model(torch.nn.Sequential(linear), settings)
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        ours = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
        named = {
            ours[next(part for part in name.split(".") if part in ours)]: value
            for name, value in parameters.items()
        }
        with torch.no_grad():
            for name, value in named.items():
                value.copy_(given[name].t())
        x = given["x"].clone().requires_grad_()
        y = model(x)
        (y * given["cotangent"]).sum().backward()
        found |= {f"{case}/y": y.detach().numpy(), f"{case}/x": x.grad.numpy()}
        found |= {
            f"{case}/{name}": np.ascontiguousarray(value.grad.t().numpy()) for name, value in named.items()
        }
    return found, {"torch": torch.__version__, "peft": peft.__version__}


if __name__ == "__main__":
    tensors, versions = reference()
    save_file(tensors, GOLDEN, metadata=versions)
    print(GOLDEN, versions, len(tensors), "tensors")
