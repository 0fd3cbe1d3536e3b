"""Small tokenizers of different kinds, made on the spot, and a random model around one."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pahq.model.config import ModelConfig
from pahq.model.transformer import Transformer, build, shapes
from pahq.task import docstring, ioi, short, words

SPACE = "Ġ"  # how byte-level tokenizers write a space


def all_words() -> list[str]:
    """Every word of the word lists and templates."""
    lists = (words.NAMES, words.PLACES, words.THINGS, words.SPANS, words.ARGUMENTS, words.NOUNS, words.FUNCTIONS)
    texts = [*ioi.TEMPLATES, *short.PRONOUN_TEMPLATES, *short.CAPITAL_TEMPLATES, *short.AGREEMENT_TEMPLATES]
    texts += ["The lasted from the year to", "he she is was has are were have"]
    texts += [docstring.method("f", ["a"], ["a"], ["w"] * 5)]
    found = [word for part in lists for word in part]
    for table in (words.COUNTRIES, words.NUMBERS):
        found += [*table, *table.values()]
    for text in texts:
        found += re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))
    return list(dict.fromkeys(found))


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_level(known: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """A token a word; spaces vanish; whatever is not ``known`` is unknown."""
    marks = [*list(",.():_'\""), '"""', "):"]
    vocabulary = ["<s>", "</s>", "<unk>", *dict.fromkeys([*(all_words() if known is None else known), *marks])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return wrap(tokenizer)


def byte_level(known: Iterable[str] | None = None, years: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which `` word`` is one token for each known word.

    years: two digits are one token and `` 17`` is one, as in GPT-2; otherwise each digit is a token.
    """
    vocabulary = dict.fromkeys(["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    merges: dict[tuple[str, str], None] = {}

    def chain(symbols: list[str]) -> None:
        """Merges that join the symbols from left to right."""
        left = symbols[0]
        for right in symbols[1:]:
            merges[left, right] = None
            left += right
            vocabulary[left] = None

    listed = list(all_words() if known is None else known)
    if years:
        tens = [str(century) for century in range(10, 20)]
        for pair in [*tens, *(f"{year:02}" for year in range(100))]:
            chain(list(pair))
        for century in tens:
            chain([SPACE, century])
        chain([SPACE, "18", "00"])  # a year with a token of its own, as the common ones have
    for word in listed:  # before words without a space, so that those never break one up
        chain([SPACE, *word])
    for word in listed:
        if word[0].isupper():
            chain(list(word))
    table = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def toy_model(
    tokenizer: PreTrainedTokenizerFast | None, d_vocab: int | None = None, causal: bool = True
) -> Transformer:
    """One random attention layer over the tokenizer's vocabulary."""
    size = d_vocab or (len(tokenizer) if tokenizer is not None else 8)
    config = ModelConfig(
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        d_model=8,
        d_head=4,
        d_mlp=0,
        d_vocab=size,
        d_vocab_out=size,
        n_ctx=512,
        causal=causal,
        name="toy",
    )
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator) for name, (shape, required) in shapes(config).items() if required
    }
    return build(config, weights, tokenizer)
