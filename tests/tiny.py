"""A tiny random model and prompts for it, as the files a user would have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pahq.model import ModelConfig, Transformer, build
from pahq.model.transformer import shapes
from pahq.task import Task
from pahq.task.prompts import Prompts, last_position

WORDS = 40


def transformer(layers: int = 4, heads: int = 4, seed: int = 0) -> Transformer:
    """A random model, one strong head in four, so that some edges matter and most do not."""
    cfg = ModelConfig(
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        d_model=32,
        d_head=8,
        d_mlp=48,
        d_vocab=WORDS,
        d_vocab_out=WORDS,
        n_ctx=16,
        name="tiny",
    )
    draw = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, (shape, _) in shapes(cfg).items():
        if name.endswith(".w"):
            weights[name] = torch.ones(shape)
        elif ".b" in name:
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.randn(shape, generator=draw) / 6
    for layer in range(layers):
        gain = torch.ones(heads)
        gain[:: max(heads // 2, 1)] = 4
        weights[f"blocks.{layer}.attn.W_O"] *= gain[:, None, None]
    return build(cfg, weights)


@dataclass(frozen=True)
class RandomTask(Task):
    """Random tokens; the corrupted prompt differs in two of them."""

    name: str = "random"
    description: str = "random tokens"
    default_metric: str = "kl_div"
    limit: int | None = None
    """Examples of the test split; None for as many as are asked for."""

    def prompts(self, model: Transformer, n: int, seed: int = 0, split: str = "validation") -> Prompts:
        from pahq.errors import PahqError

        if split == "test" and self.limit is not None and n > self.limit:
            raise PahqError(f"task 'random': {n} examples asked for, but split 'test' has {self.limit}; ask for fewer")
        draw = torch.Generator().manual_seed(seed + {"validation": 0, "test": 1000, "train": 2000}[split])
        clean = torch.randint(0, WORDS, (n, 6), generator=draw)
        corrupt = clean.clone()
        corrupt[:, 2:4] = torch.randint(0, WORDS, (n, 2), generator=draw)
        answers = torch.randint(0, WORDS // 2, (n,), generator=draw).tolist()
        return last_position(clean, corrupt, [[a] for a in answers], [[a + WORDS // 2] for a in answers]).to(
            model.device
        )


def save_model(folder: Path, layers: int = 4, heads: int = 4, seed: int = 0) -> None:
    """A random GPT-2 with a tokenizer of the words w0, w1, … in ``transformers``' format."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=WORDS, n_positions=16, n_embd=32, n_layer=layers, n_head=heads, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(8)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]  (missing in its stubs)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def save_prompts(file: Path, count: int = 24) -> None:
    """Prompt pairs of six words with an answer and a wrong answer each, as JSON lines."""
    draw = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(count):
        clean = torch.randint(1, WORDS, (6,), generator=draw).tolist()
        corrupt = clean[:2] + torch.randint(1, WORDS, (2,), generator=draw).tolist() + clean[4:]
        right = int(torch.randint(1, WORDS - 1, (1,), generator=draw))
        lines.append(
            {
                "clean": " ".join(f"w{i}" for i in clean),
                "corrupt": " ".join(f"w{i}" for i in corrupt),
                "answers": [f" w{right}"],
                "wrong_answers": [f" w{right + 1}"],
            }
        )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
