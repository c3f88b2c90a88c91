"""Writes sft.safetensors of preflight/goldens: loss and gradients of SFT with LoRA by transformers + PEFT,
and five AdamW updates by torch.

Run with the parity extra: ``python tests/goldens/make_sft.py``. The versions are in the file's metadata. The
test that reads it (tests/test_parity_sft.py) needs no torch."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
from tunesmith.preflight.goldens.cases import (
    ALPHA,
    DECAY,
    MAX_NORM,
    RANK,
    RATE,
    SFT,
    TARGETS,
    UPDATES,
    VOCABULARY,
    WARMUP,
    adapter,
    batch,
)


def ours(name: str) -> str:
    """PEFT's tensor name as ours: ``base_model.model.model.layers.0.….lora_A.default.weight`` →
    ``….lora_a``."""
    return (
        name.replace("base_model.model.", "", 1)
        .replace(".default.weight", "")
        .replace("lora_A", "lora_a")
        .replace("lora_B", "lora_b")
    )


def adapted() -> tuple[Any, dict[str, Any]]:
    """The model of the cases with its adapter, by PEFT, and what is trained of it by PEFT's name."""
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        tiny.write_model(Path(folder), VOCABULARY)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0, bias="none"
    )
    model = peft.get_peft_model(base, settings)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(torch.from_numpy(adapter(ours(name), tuple(value.shape)[::-1]).T.copy()))
    return model, parameters


def padded() -> tuple[Any, Any, Any]:
    """Ids, mask of attention, and labels of the cases' batch."""
    import torch

    rows, masks = batch()
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    attention = torch.zeros_like(ids)
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        ids[index, : len(row)] = torch.from_numpy(row.astype(np.int64))
        attention[index, : len(row)] = 1
        labels[index, : len(row)] = torch.where(torch.from_numpy(mask) > 0, ids[index, : len(row)], -100)
    return ids, attention, labels


def gradients_of(parameters: dict[str, Any]) -> dict[str, np.ndarray]:
    return {f"gradient.{ours(name)}": value.grad.numpy().T.copy() for name, value in parameters.items()}


def distilled() -> dict[str, np.ndarray]:
    """Loss (a sum) and gradients of the divergence from the base, by torch's kl_div and PEFT's way to switch
    an adapter off."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    model, parameters = adapted()
    ids, attention, labels = padded()
    learned = labels[:, 1:] != -100
    with torch.no_grad(), model.disable_adapter():
        base = log_softmax(model(input_ids=ids, attention_mask=attention).logits[:, :-1][learned], -1)
    tuned = log_softmax(model(input_ids=ids, attention_mask=attention).logits[:, :-1][learned], -1)
    loss = kl_div(tuned, base, reduction="sum", log_target=True)
    loss.backward()
    return {"loss": np.array(loss.item())} | gradients_of(parameters)


def reference() -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import peft
    import torch
    import transformers

    model, parameters = adapted()
    ids, attention, labels = padded()
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=DECAY)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, WARMUP, UPDATES)
    out: dict[str, np.ndarray] = {}
    losses = []
    for update in range(UPDATES):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        if update == 0:
            out |= gradients_of(parameters)
        torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM)
        optimizer.step()
        schedule.step()
        out[f"rate.{update}"] = np.array([schedule.get_last_lr()[0]])
    out |= {f"updated.{ours(name)}": value.detach().numpy().T.copy() for name, value in parameters.items()}
    out["losses"] = np.array(losses)
    return out, {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


if __name__ == "__main__":
    tensors, versions = reference()
    save_file(tensors, SFT, metadata=versions)
    print(SFT, versions)
