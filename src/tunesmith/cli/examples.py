"""Which commands show what a verb is for? They stand at the end of its help, and in the reference."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "init": (
        "tunesmith init --preset smollm2-demo > run.yaml",
        "tunesmith init --from config.yml > run.yaml",
    ),
    "doctor": ("tunesmith doctor", "tunesmith doctor --plan MODEL"),
    "show": ("tunesmith show mine.jsonl --model MODEL --limit 2", "tunesmith show runs/mytool"),
    "audit": (
        "tunesmith audit mine.jsonl --model MODEL",
        "tunesmith audit mine.jsonl --fix mended.jsonl",
        "tunesmith audit mine.jsonl --against test.jsonl --json",
    ),
    "plan": (
        "tunesmith plan --model MODEL --data mine.jsonl",
        "tunesmith plan --model MODEL --data mine.jsonl --fit 16GB",
        "tunesmith plan --record",
    ),
    "train": (
        "tunesmith train --model MODEL --data mine.jsonl --out runs/mytool",
        "tunesmith train --config run.yaml --set optimizer.learning_rate=2e-4 --dry-run",
        "tunesmith train --resume runs/mytool",
    ),
    "watch": ("tunesmith watch runs/mytool",),
    "probe": ("tunesmith probe --model MODEL --data mine.jsonl",),
    "sweep": ("tunesmith sweep rank --model MODEL --data mine.jsonl", "tunesmith sweep sweep.yaml --dry-run"),
    "evaluate": (
        "tunesmith evaluate runs/mytool",
        "tunesmith evaluate runs/mytool --data test.jsonl --task perplexity --limit 100",
    ),
    "compare": ("tunesmith compare runs/first runs/second --out comparison",),
    "compose": ("tunesmith compose runs/a=0.7 runs/b=0.3 --out runs/c --evaluate",),
    "report": ("tunesmith report runs/mytool",),
    "export": ("tunesmith export runs/mytool --to gguf-q8_0", "tunesmith export runs/mytool --to peft"),
    "push": ("tunesmith push runs/mytool --to you/mytool --kind peft --dry-run",),
    "tag": ("tunesmith tag runs/mytool mytool:2",),
    "generate": (
        "tunesmith generate runs/mytool 'Note: buy milk'",
        "tunesmith generate mytool:2 --json < prompts.txt",
    ),
    "chat": ("tunesmith chat runs/mytool",),
    "votes": ("tunesmith votes runs/mytool",),
    "serve": (
        "tunesmith serve runs/a runs/b --port 8080",
        "tunesmith serve runs/a runs/b --ab writer=runs/a:0.5,runs/b:0.5",
    ),
    "runs": (
        "tunesmith runs --sort best --where objective=kto",
        "tunesmith runs show runs/mytool",
        "tunesmith runs prune --delete",
    ),
}
"""Verb → command lines."""


def shown(verb: str) -> str | None:
    """The examples of a verb as Typer prints them below its help: a paragraph each."""
    lines = EXAMPLES.get(verb)
    return "\n\n".join(["Examples:", *lines]) if lines else None
