"""The tutorial runs from top to bottom: on a tiny model always, as its readers see it with the mark heavy."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TUTORIAL = Path(__file__).resolve().parent.parent / "examples" / "tutorial.py"


def run(folder: Path, **more: str) -> str:
    """What the tutorial prints, in a process of its own; fails if it fails or anything warns."""
    env = os.environ | {"TUTORIAL_FOLDER": str(folder)} | more
    command = [sys.executable, "-W", "error::UserWarning", str(TUTORIAL)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Not taken from the tutorial itself: the random weights, and so the circuit, would change with each word of it.
# "the" is unknown, and read as "The".
WORDS = "The near is are house houses tree trees key keys book books car cars boy boys picture pictures dog dogs"


def save_model_with_words(folder: Path) -> None:
    """A random GPT-2 that knows the words of the tutorial."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = WORDS.split()
    with torch.random.fork_rng():
        torch.manual_seed(3)  # some seeds have no circuit at this threshold
        config = GPT2Config(
            vocab_size=len(words), n_positions=16, n_embd=32, n_layer=6, n_head=8, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(16)
    model.save_pretrained(folder)
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="The"))
    known.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]  (missing in its stubs)
    PreTrainedTokenizerFast(tokenizer_object=known, unk_token="The").save_pretrained(folder)


def prompts_of(folder: Path) -> list[str]:
    """All texts of the prompt file that the tutorial writes."""
    pairs = [json.loads(line) for line in (folder / "agreement.jsonl").read_text().splitlines()]
    return [text for p in pairs for text in (p["clean"], p["corrupt"], *p["answers"], *p["wrong_answers"])]


def test_on_a_tiny_model(tmp_path: Path) -> None:
    save_model_with_words(tmp_path / "model")
    out = run(tmp_path / "out", TUTORIAL_MODEL=str(tmp_path / "model"))
    assert all(word in ["the", *WORDS.split()] for line in prompts_of(tmp_path / "out") for word in line.split())
    for part in ("48 pairs", "Circuit(model: ", "recover", "random circuits of this size", "without a"):
        assert part in out
    random = re.search(r"random circuits of this size: ([+-]\d+)%", out)
    assert random is not None  # with its sign: circuits can be worse than none
    assert (tmp_path / "out" / "circuit.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "run" / "run.json").exists()
    again = run(tmp_path / "out", TUTORIAL_MODEL=str(tmp_path / "model"))
    assert again == out  # the finished run is taken up again


@pytest.mark.heavy
def test_as_its_readers_run_it(tmp_path: Path) -> None:
    out = run(tmp_path)
    recovered = re.search(r"recover (\d+)%", out)
    assert recovered is not None
    assert int(recovered[1]) > 60
    before, after = (float(x) for x in re.findall(r"difference (-?[\d.]+), was (-?[\d.]+)", out)[0][::-1])
    assert after < before - 1  # the head matters to the whole model
