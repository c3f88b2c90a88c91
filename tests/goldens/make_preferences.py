"""Writes preferences.safetensors of preflight/goldens: loss and gradients of every preference objective by
TRL's own trainers on torch.

Run with the parity extra and TRL: ``pip install trl==1.16.0; python tests/goldens/make_preferences.py``. The
versions are in the file's metadata. The test that reads it (tests/test_parity_preferences.py) needs neither
torch nor TRL."""

from __future__ import annotations

import collections
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny
from goldens.make_sft import ours
from tunesmith.preflight.goldens.cases import (
    ALPHA,
    JUDGED_ROWS,
    PREFERENCES,
    RANK,
    TARGETS,
    VOCABULARY,
    WEIGHTS,
    adapter,
    judged,
    pairs,
)

# Order in which KTO pairs rows here, by index: prompt i takes the completion of the one after it. TRL takes
# the one before, so it is given the rows the other way round.
CASES: dict[str, dict[str, Any]] = {
    "kto": {"rows": JUDGED_ROWS["kto"], "beta": 0.4},
    "kto_weighted": {
        "rows": JUDGED_ROWS["kto_weighted"],
        "beta": 0.1,
        "desirable_weight": WEIGHTS[0],
        "undesirable_weight": WEIGHTS[1],
    },
    "kto_desirable": {"rows": JUDGED_ROWS["kto_desirable"], "beta": 0.4},
    "kto_undesirable": {"rows": JUDGED_ROWS["kto_undesirable"], "beta": 0.4},
    "apo_zero_unpaired": {
        "rows": JUDGED_ROWS["apo_zero_unpaired"],
        "beta": 0.3,
        "loss_type": "apo_zero_unpaired",
    },
    "dpo_sigmoid": {"beta": 0.3},
    "dpo_robust": {"beta": 0.3, "loss_type": ["robust"], "label_smoothing": 0.1},
    "dpo_hinge": {"beta": 0.3, "loss_type": ["hinge"]},
    "dpo_ipo": {"beta": 0.3, "loss_type": ["ipo"]},
    "dpo_sigmoid_norm": {"beta": 5.0, "loss_type": ["sigmoid_norm"]},
    "dpo_apo_zero": {"beta": 0.3, "loss_type": ["apo_zero"]},
    "orpo": {"beta": 0.2},
    "simpo": {"beta": 2.0, "gamma": 0.8},
}


class Oracle:
    """A tiny llama with a LoRA adapter that is not at its start."""

    def __init__(self, folder: Path) -> None:
        import peft
        import torch
        import transformers

        self.torch, self.peft, self.transformers = torch, peft, transformers
        tiny.write_model(folder, VOCABULARY)
        self.folder = folder
        tokens = folder / "tokenizer"
        tokens.mkdir()
        tiny.write_tokenizer(tokens)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokens)
        self.tokenizer.pad_token_id = 0
        self.lora = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), lora_dropout=0.0, bias="none"
        )

    def base(self) -> Any:
        return self.transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.torch.float32)

    def fill(self, model: Any) -> dict[str, Any]:
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        with self.torch.no_grad():
            for name, value in parameters.items():
                value.copy_(self.torch.from_numpy(adapter(ours(name), tuple(value.shape)[::-1]).T.copy()))
        return parameters

    def gradients(self, name: str, loss: Any, parameters: dict[str, Any]) -> dict[str, np.ndarray]:
        loss.backward()
        found = {f"{name}|{ours(key)}": value.grad.numpy().T.copy() for key, value in parameters.items()}
        return found | {f"{name}|loss": np.array([loss.item()])}

    def trainer(self, kind: type, arguments: type, rows: list[dict], folder: str, **settings: Any) -> Any:
        """A real trainer whose rows are tokens already."""
        import datasets

        ready = type(kind.__name__, (kind,), {"_prepare_dataset": lambda self, dataset, *rest: dataset})
        options = arguments(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            per_device_train_batch_size=len(rows),
            remove_unused_columns=False,
            **settings,
        )
        data = datasets.Dataset.from_list(rows)
        return ready(
            model=self.base(),
            args=options,
            train_dataset=data,
            processing_class=self.tokenizer,
            peft_config=self.lora,
        )


def with_trl(oracle: Oracle, name: str, case: dict[str, Any]) -> dict[str, np.ndarray]:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    settings = dict(case)
    if chosen := settings.pop("rows", ()):
        kept = [judged()[index] for index in reversed(chosen)]
        rows = [{"prompt_ids": asked, "completion_ids": said, "label": label} for asked, said, label in kept]
        if "loss_type" not in settings:
            for index, row in enumerate(rows):
                row["KL_completion_ids"] = rows[index - 1]["completion_ids"]
        kinds: tuple[Any, Any] = (KTOTrainer, KTOConfig)
        settings["train_sampling_strategy"] = "sequential"
    else:
        rows = [
            {"prompt_ids": asked, "chosen_ids": good, "rejected_ids": bad} for asked, good, bad in pairs()
        ]
        kinds = (DPOTrainer, DPOConfig)
    with tempfile.TemporaryDirectory() as folder:
        trainer = oracle.trainer(*kinds, rows, folder, **settings)
        parameters = oracle.fill(trainer.model)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        found = oracle.gradients(name, loss, parameters)
        if "kl" in trainer._metrics["train"]:
            found[f"{name}|kl"] = np.array(trainer._metrics["train"]["kl"])
    return found


def with_experimental(oracle: Oracle, name: str, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """ORPO's and CPO's own loss on a batch; what their constructors add is datasets and logging."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    torch = oracle.torch
    model = oracle.peft.get_peft_model(oracle.base(), oracle.lora)
    parameters = oracle.fill(model)
    trainer: Any = object.__new__(ORPOTrainer if name == "orpo" else CPOTrainer)
    same = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    trainer.__dict__ |= {
        "accelerator": same,
        "is_encoder_decoder": False,
        "padding_value": 0,
        "pad_token_id": 0,
        "aux_loss_enabled": False,
        "beta": case["beta"],
        "_stored_metrics": collections.defaultdict(list),
        "alpha": 0.0,
        "cpo_alpha": 0.0,
        "loss_type": "simpo",
        "simpo_gamma": case.get("gamma", 0.0),
        "label_smoothing": 0.0,
        "use_cpo": False,
    }
    batch: dict[str, Any] = {}
    rows = pairs(alike=name == "orpo")
    for column, side in ((1, "chosen"), (2, "rejected")):
        whole = [[*row[0], *row[column]] for row in rows]
        length = max(map(len, whole))
        ids, labels, mask = (torch.full((len(rows), length), fill) for fill in (0, -100, 0))
        for index, (row, tokens) in enumerate(zip(rows, whole, strict=True)):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            mask[index, : len(tokens)] = 1
            labels[index, len(row[0]) : len(tokens)] = torch.tensor(tokens[len(row[0]) :])
        batch |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_attention_mask": mask}
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    return oracle.gradients(name, loss, parameters)


def main() -> None:
    import torch
    import trl

    out: dict[str, np.ndarray] = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            oracle = Oracle(Path(folder))
            out |= (with_experimental if name in ("orpo", "simpo") else with_trl)(oracle, name, case)
        print(name, out[f"{name}|loss"], out.get(f"{name}|kl"))
    versions = {
        "torch": torch.__version__,
        "trl": trl.__version__,
        "transformers": oracle.transformers.__version__,
    }
    save_file(out, PREFERENCES, metadata=versions | {"peft": oracle.peft.__version__})
    print(PREFERENCES, versions)


if __name__ == "__main__":
    main()
