"""A fast tokenizer from the vocabulary inside a GGUF file."""

from __future__ import annotations

from typing import Any

from pahq.errors import PahqError

# The splitting rules are part of what a vocabulary was trained with; GGUF only names them.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
PLAIN = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais")
SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
BY_REGEX = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "qwen2": QWEN2_SPLIT}

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types


def build_tokenizer(metadata: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """GGUF metadata -> (``tokenizers.Tokenizer``, special-token settings), or None if the file has no vocabulary.

    Nothing is added around a prompt unless the metadata asks for it (``add_bos_token``).
    Raises PahqError for a kind of vocabulary that is not known.
    """
    kind, tokens = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    if not tokens or kind in (None, "none", "no_vocab"):
        return None
    builders = {"gpt2": byte_level, "llama": sentencepiece}
    if kind not in builders:
        raise PahqError(f"GGUF tokenizer: the kind '{kind}' is not supported; known are gpt2 and llama")
    try:
        tokenizer = builders[kind](metadata, tokens)
        return tokenizer, add_special_tokens(tokenizer, metadata, tokens)
    except PahqError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise PahqError(f"GGUF tokenizer: its vocabulary is damaged ({error}); download the file again") from None


def merges_of(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [line.split(" ") for line in metadata.get("tokenizer.ggml.merges", [])]
    return [(left, right) for left, right in pairs]


def byte_level(metadata: dict[str, Any], tokens: list[str]) -> Any:
    """GPT-2's kind: bytes spelled as letters, merged by rank, after a split named by ``tokenizer.ggml.pre``."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = metadata.get("tokenizer.ggml.pre", "default")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges_of(metadata)))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    if pre in PLAIN:
        tokenizer.pre_tokenizer = plain
    elif pre in SINGLE_DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    elif pre in BY_REGEX:
        split = pre_tokenizers.Split(Regex(BY_REGEX[pre]), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
    else:
        known = ", ".join((*PLAIN, *SINGLE_DIGITS, *BY_REGEX))
        raise PahqError(f"GGUF tokenizer: the splitting rule '{pre}' is not supported; known: {known}")
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Any:
    """Llama 2's kind: pieces with scores, spaces as "▁", unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_of(metadata) or merges_from_scores(vocab, metadata["tokenizer.ggml.scores"])
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    end: list[Any] = [decoders.Strip(" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return tokenizer


def merges_from_scores(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores best: list all pairs in that order."""
    found = []
    for piece, index in vocab.items():
        splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[index], -index, pair) for pair in splits]
    found.sort(key=lambda item: item[:2], reverse=True)
    return [pair for *_, pair in found]


def add_special_tokens(tokenizer: Any, metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Marks control tokens; returns the settings of ``PreTrainedTokenizerFast``."""
    from tokenizers import AddedToken, processors

    types = metadata.get("tokenizer.ggml.token_type", [])
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        chosen = [AddedToken(tokens[i], normalized=False, special=special) for i, t in enumerate(types) if t == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)
    settings: dict[str, Any] = {}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and int(index) < len(tokens):
            settings[f"{name}_token"] = tokens[int(index)]
    ids = {token: i for i, token in enumerate(tokens)}
    ends = [
        settings[f"{x}_token"] if metadata.get(f"tokenizer.ggml.add_{x}_token") and f"{x}_token" in settings else None
        for x in ("bos", "eos")
    ]
    if metadata.get("tokenizer.ggml.model") == "llama" and "tokenizer.ggml.add_bos_token" not in metadata:
        ends[0] = settings.get("bos_token")  # this kind adds it unless told otherwise
    if any(ends):
        template = [token for token in (ends[0], "$A", ends[1]) if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, ids[token]) for token in ends if token]
        )
    return settings
