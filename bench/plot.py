"""Draw what ``train_speed.py`` measured: learned tokens a second and peak memory of each trainer, in one
picture.

Every bar carries its name and its value and ours are hatched, so nothing hangs on colour.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {
    "tunesmith": "tunesmith",
    "mlx_lm_blas": "mlx-lm + OpenBLAS",
    "trl": "TRL + PEFT",
    "torch": "plain torch + PEFT",
    "tunesmith_checkpointed": "tunesmith, checkpointed",
    "mlx_lm_checkpointed": "mlx-lm + OpenBLAS, checkpointed",
}
TARGETS = {"qv": "adapters on q, v", "all": "adapters on all linear layers"}


def bars(result: dict[str, Any], source: str) -> list[tuple[str, str, float, float]]:
    """(heading, trainer, learned tokens a second, GB) in the order in which they are drawn."""
    rows: list[tuple[str, str, float, float]] = []
    for target, races in result["races"].items():
        for kind in ("speed", "checkpointed"):
            for name, trainer in races.get(kind, {}).get("trainers", {}).items():
                heading = f"{TARGETS[target]}{source}"
                speed, memory = trainer["learned_tokens_per_second"], trainer["peak_rss_bytes"] / 1e9
                rows.append((heading, name, speed, memory))
    return rows


def draw(rows: list[tuple[str, str, float, float]], out: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    places: list[float] = []
    labels: list[str] = []
    headings: list[tuple[float, str]] = []
    place, before = 0.0, None
    for heading, name, _, _ in rows:
        if heading != before:
            place, before = place + (1.4 if before is not None else 1.0), heading
            headings.append((place - 1.0, heading))
        places.append(place)
        labels.append(NAMES[name])
        place += 1.0
    figure, panels = pyplot.subplots(
        1, 2, sharey=True, figsize=(11, 0.42 * place + 1.6), layout="constrained"
    )
    for column, (panel, label) in enumerate(
        zip(panels, ("learned tokens a second", "peak memory, GB"), strict=True)
    ):
        values = [row[2 + column] for row in rows]
        ours = [row[1].startswith("tunesmith") for row in rows]
        drawn = panel.barh(
            places, values, 0.78, color=["#2b5d8a" if own else "#c9c9c9" for own in ours], edgecolor="black"
        )
        for bar, own in zip(drawn, ours, strict=True):
            bar.set_hatch("//" if own else "")
        panel.bar_label(
            drawn, [f"{value:.0f}" if column == 0 else f"{value:.1f}" for value in values], padding=3
        )
        panel.set_xlabel(f"{label} ({'more' if column == 0 else 'less'} is better)")
        panel.set_xlim(0, max(values) * 1.15)
        panel.spines[["top", "right"]].set_visible(False)
        for at, heading in headings:
            panel.text(0, at, f" {heading}" if column == 0 else "", va="center", weight="bold")
    panels[0].set_yticks(places, labels)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize="medium")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_speed.png")
    options = parser.parse_args()
    read = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(options.results.glob("*.json"))
    }
    chosen = {stem: result for stem, result in read.items() if result.get("benchmark") == "train_speed"}
    rows = [
        row
        for stem, result in chosen.items()
        for row in bars(result, f" ({stem})" if len(chosen) > 1 else "")
    ]
    if not rows:
        parser.error(f"{options.results} has no result of train_speed.py with a race in it")
    last = list(chosen.values())[-1]
    disagree = [
        stem
        for stem, result in chosen.items()
        if not all(result[target]["agree"] for target in result["races"])
    ]
    title = (
        f"One LoRA update of SmolLM2-135M, float32, {len(last['row_lengths'])} rows, {last['tokens']} tokens"
        f"; {last['cpu']}, commit {last['commit']}"
    )
    draw(rows, options.out, title + (f"\nLOSSES DISAGREE in {', '.join(disagree)}" if disagree else ""))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
