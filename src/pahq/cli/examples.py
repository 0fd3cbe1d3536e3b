"""The examples at the end of each command's help; all of them can be copied as they stand."""

from __future__ import annotations

import re
from typing import Any

from pahq.cli.codes import TOLD

WIDTH = 76
EXAMPLES = {
    "": (
        "pahq discover --model smollm2-135m --task ioi --threshold 0.5 --n 4 --out runs/ioi",
        "pahq show runs/ioi",
        "pahq view runs/ioi --open",
    ),
    "discover": (
        "pahq discover --model smollm2-135m --task ioi --threshold 0.3 --out runs/ioi",
        "pahq discover --model ./model --task prompts.jsonl --method eap-ig --method-option steps=10 --edges 200",
        "pahq discover --config runs/ioi/run.json --seed 1 --out runs/seed1",
    ),
    "resume": ("pahq resume runs/ioi", "pahq resume runs/ioi --streams none --quiet"),
    "show": ("pahq show runs/ioi", "pahq show runs/ioi --json"),
    "methods": ("pahq methods", "pahq methods --json"),
    "tasks": ("pahq tasks", "pahq tasks show ioi --model smollm2-135m --n 3"),
    "tasks list": ("pahq tasks list --json",),
    "tasks show": (
        "pahq tasks show ioi --model smollm2-135m --n 3",
        "pahq tasks show prompts.jsonl --pad --split all --json",
    ),
    "truth": ("pahq truth", "pahq truth ioi-gpt2", "pahq truth tracr-reverse --json"),
    "sweep": (
        "pahq sweep --tasks ioi,greaterthan --models smollm2-135m --thresholds 0.3,0.1 --n 4 --jobs 2",
        "pahq sweep sweep.yaml --jobs 2 --out runs/mine",
        "pahq sweep paper --dry-run --only 'ioi_*'",
    ),
    "evaluate": (
        "pahq evaluate runs/ioi --out runs/ioi-evaluation",
        "pahq evaluate runs/ioi --truth ioi-gpt2 --json",
        "pahq evaluate runs/ioi --against runs/seed1 --n 50 --removals 0",
    ),
    "compare": (
        "pahq compare runs/a runs/b runs/c --truth truth.json --out comparison",
        "pahq compare --config comparison/comparison.json --n 50",
    ),
    "plot": (
        "pahq plot graph runs/ioi --out circuit.pdf",
        "pahq plot roc comparison --out roc.svg",
    ),
    "view": (
        "pahq view runs/ioi --open",
        "pahq view runs/ioi --truth ioi-gpt2 --out ioi.html",
        "pahq view runs/ioi --against runs/seed1 --json",
    ),
    "convert": (
        "pahq convert runs/ioi graph.json --to eap-ig",
        "pahq convert importances.json runs/read --model ./model",
        "pahq convert autocircuit.json prompts.jsonl",
    ),
    "policies": ("pahq policies", "pahq policies --json"),
    "precision": ("pahq precision snr --model smollm2-135m --task ioi --policy pahq",),
    "precision snr": (
        "pahq precision snr --model smollm2-135m --task ioi --policy pahq --n 4 --out runs/snr",
        "pahq precision snr --model smollm2-135m --task ioi --edge 'm0->a23.0.v'",
    ),
    "precision sensitivity": (
        "pahq precision sensitivity --model smollm2-135m --task ioi --threshold 0.1 --tests 100",
        "pahq precision sensitivity --model smollm2-135m --task ioi --run runs/ioi --budget 0.4x",
    ),
    "precision groups": ("pahq precision groups --model smollm2-135m --task ioi --policy pahq --sizes 0,1,4",),
    "reproduce": ("pahq reproduce table-auc --offline --quick",),
    "reproduce table-auc": (
        "pahq reproduce table-auc --offline --quick",
        "pahq reproduce table-auc --tasks ioi --methods acdc,pahq,eap --thresholds acdc",
    ),
    "reproduce table-runtime": ("pahq reproduce table-runtime --offline --n 4",),
    "reproduce table-ablation": ("pahq reproduce table-ablation --quick --json",),
    "reproduce figure-rtn": ("pahq reproduce figure-rtn --offline --methods acdc,rtn",),
    "reproduce gpt2-ioi": ("pahq reproduce gpt2-ioi --thresholds 0.0251",),
}
"""By the command's words after ``pahq``."""


def epilog(*commands: str) -> str:
    """Commands as a help's last paragraph, each line at most ``WIDTH`` long and continued as shells want it."""
    lines = ["Examples:"]
    for command in commands:
        line = " "
        for word in re.split(r" (?=-)", command):  # a flag stays with its value
            if len(line) + 1 + len(word) + 2 > WIDTH:
                lines.append(f"{line} \\")
                line = "     "
            line += f" {word}"
        lines.append(line)
    return "\b\n" + "\n".join(lines)  # click takes the backspace for: leave the lines as they are


def add_examples(app: Any, words: str = "") -> None:
    """Gives all commands of a typer app, and of those below it, their examples, unless they have some."""
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.replace("_", "-")
        command.epilog = command.epilog or _of(f"{words}{name}")
    for group in app.registered_groups:
        group.epilog = _of(f"{words}{group.name}")
        add_examples(group.typer_instance, f"{words}{group.name} ")
    if not words:
        app.info.epilog = f"{_of('')}\n\n{TOLD}"


def _of(words: str) -> str | None:
    return epilog(*EXAMPLES[words]) if words in EXAMPLES else None
