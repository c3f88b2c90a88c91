"""Compare every family of `families` with transformers and PEFT on torch, and write the table of
docs/models.md. Needs the parity extra.

    PYTHONPATH=src:tests python tests/parity/family_table.py [--write] [MODEL_TYPE…]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from parity import families, family_life, family_training
from parity.families import Family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 1e-4
COLUMNS = (
    "model",
    "`model_type`",
    "transformers 5",
    "transformers 4",
    "mlx-lm",
    "LoRA and DoRA",
    "batches",
    "4 and 8 bits",
    "a run",
)
START, END = "<!-- families -->\n", "<!-- end of families -->\n"


class Measured(NamedTuple):
    """``error``: largest difference of the logits, as a share of the largest logit; None if the model was
    refused for a ``reason``."""

    error: float | None
    reason: str = ""

    @property
    def verdict(self) -> str:
        """What the table says."""
        if self.error is None:
            return f"refused: {self.reason}"
        return "exact" if self.error <= TOLERANCE else f"wrong: {self.error:.1e}"


def prompt() -> np.ndarray:
    """(2, T) ids."""
    return np.random.default_rng(1).integers(3, families.VOCABULARY, (2, families.LENGTH))


def expected(model: Any) -> np.ndarray:
    """(2, T, V) logits of transformers."""
    import torch

    with torch.no_grad():
        return families.text_model(model)(torch.tensor(prompt())).logits.float().numpy()


def measure(folder: Path, logits: np.ndarray) -> Measured:
    """What the model in ``folder`` computes, against ``logits``."""
    import mlx.core as mx

    from tunesmith.errors import ModelError
    from tunesmith.model import loading

    try:
        loaded = loading.load(loading.ModelSpec(path=str(folder)))
    except ModelError as error:
        first = error.what.splitlines()[0].removeprefix("cannot be loaded: ").split("refused: ")[-1]
        return Measured(None, reason=first.rstrip(".:"))
    found = np.array(loaded.net(mx.array(prompt())).astype(mx.float32))
    return Measured(float(np.abs(found - logits).max() / np.abs(logits).max()))


def gradient_error(folder: Path, model: Any) -> float:
    """Largest difference between the gradients of the loss by the embedding, of the model in ``folder`` and
    of transformers, as a share of the largest entry. They pass through all layers."""
    import mlx.core as mx
    import mlx.nn as nn
    import torch
    from mlx.utils import tree_flatten

    from tunesmith.model import loading

    net = loading.load(loading.ModelSpec(path=str(folder))).net
    ids = prompt()
    text, tensor = families.text_model(model), torch.tensor(ids)
    logits = text(tensor).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tensor[:, 1:].flatten()).backward()
    embedding = text.get_input_embeddings().weight
    wanted, rows = embedding.grad.numpy(), embedding.detach().numpy()
    tables = [module for module in net.modules() if isinstance(module, nn.Embedding)]
    (table,) = [table for table in tables if np.array_equal(np.array(table.weight), rows)]
    table.unfreeze()

    def loss(net: nn.Module) -> mx.array:
        x = mx.array(ids)
        return nn.losses.cross_entropy(net(x)[:, :-1], x[:, 1:], reduction="mean")

    _, gradients = nn.value_and_grad(net, loss)(net)
    ((_, found),) = tree_flatten(gradients)
    return float(np.abs(np.array(found) - wanted).max() / np.abs(wanted).max())


def measured(family: Family, folder: Path) -> list[Measured | None]:
    """From the layouts of transformers 5 and 4, and as mlx-lm converts the older that there is; None where
    transformers 4 or mlx-lm does not know the family."""
    model = families.build(family)
    families.save(model, folder / "new")
    new, old = folder / "new", folder / "old"
    if family.old:
        families.write_old_layout(new, old)
    logits = expected(model)
    first = measure(new, logits)
    if first.error is None:  # refused for its family, whatever the layout
        return [first, first if family.old else None, None]
    again = families.converted(old if family.old else new, folder / "mlx")
    layouts = (new, old if family.old else None, again)
    return [None if layout is None else measure(layout, logits) for layout in layouts]


def cells(family: Family, results: list[Measured | None]) -> list[str]:
    """A row of the table up to the logits."""
    verdicts = ["–" if result is None else result.verdict for result in results]
    if family.rounded and verdicts[2].startswith("wrong"):
        verdicts[2] = "rounded by the conversion"
    return [family.name, f"`{family.model_type}`", *verdicts]


def trained_cells(family: Family, folder: Path) -> list[str]:
    """The rest of the row of a model that is not refused."""
    return [
        *family_training.trained_cells(family, folder / "trained"),
        family_training.quantised_cell(family, folder / "quantised"),
        family_life.cell(family, folder / "life"),
    ]


def rows(page: str) -> dict[str, list[str]]:
    """The cells of the table in the text of docs/models.md, by the name of the family."""
    table = page.split(START)[1].split(END)[0].strip().splitlines()[2:]
    return {
        row[0]: row for row in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in table)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for family in families.FAMILIES:
        if options.names and family.model_type not in options.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = cells(family, measured(family, Path(folder)))
            row += trained_cells(family, Path(folder)) if row[2].startswith("exact") else ["–"] * 4
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
    if options.write and not options.names:
        before, after = PAGE.read_text().split(START)[0], PAGE.read_text().split(END)[1]
        PAGE.write_text(before + START + "\n".join(lines) + "\n" + END + after)


if __name__ == "__main__":
    main()
