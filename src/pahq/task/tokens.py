"""What the tasks ask of a tokenizer: prompts as token ids, and answers as single tokens that continue them."""

from __future__ import annotations

from collections.abc import Iterable

from pahq.errors import PahqError
from pahq.model.transformer import Transformer

CARRIER = "The"
"""A word in front of which others are tried: some tokenizers treat the first word of a text differently."""


class Tokens:
    """A model's tokenizer for one task.

    task: its name, for messages. prepend_bos: start every prompt with the beginning-of-sequence token.
    Raises PahqError if the model has no tokenizer, or no such token where it is asked for.
    """

    def __init__(self, model: Transformer, task: str, prepend_bos: bool = False) -> None:
        if model.tokenizer is None:
            raise PahqError(
                f"task '{task}': model {model.config.name} comes without a tokenizer; "
                "load it from a folder or file that holds one"
            )
        self.tokenizer = model.tokenizer
        self.task = task
        self.d_vocab = min(model.config.d_vocab, model.config.d_vocab_out)
        self.prefix: list[int] = []
        if prepend_bos:
            if self.tokenizer.bos_token_id is None:
                raise PahqError(
                    f"task '{task}': the tokenizer has no beginning-of-sequence token; leave prepend_bos off"
                )
            self.prefix = [self.tokenizer.bos_token_id]
        self._cache: dict[str, list[int]] = {}

    def raw(self, text: str) -> list[int]:
        """Token ids of ``text``, no special token added."""
        if text not in self._cache:
            self._cache[text] = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._cache[text]

    def prompt(self, text: str) -> list[int]:
        """Token ids of a whole prompt, with the beginning-of-sequence token where it is asked for."""
        return self.prefix + self.raw(text)

    def after(self, context: str, text: str) -> list[int] | None:
        """Ids of ``text`` as it continues ``context``; None where the two merge into other tokens."""
        base, whole = self.raw(context), self.raw(context + text)
        return whole[len(base) :] if whole[: len(base)] == base else None

    def known(self, token: int) -> bool:
        """Whether ``token`` is in the model's vocabulary and not the tokenizer's mark for unknown text."""
        return 0 <= token < self.d_vocab and token != self.tokenizer.unk_token_id

    def single(self, text: str, context: str = CARRIER) -> int | None:
        """The one token that ``text`` is after ``context``, or None if it is several, or unknown."""
        ids = self.after(context, text)
        return ids[0] if ids is not None and len(ids) == 1 and self.known(ids[0]) else None

    def answer(self, prompt: str, answer: str) -> int | None:
        """The one token that continues ``prompt`` with ``answer``, or None if there is none.

        Where the tokenizer would merge the prompt's end with the answer (" 17" + "50" may have a token
        of its own), the answer's own token counts if it spells the same text.
        """
        token = self.single(answer, prompt)
        if token is not None:
            return token
        alone = self.raw(answer)
        if len(alone) != 1 or not self.known(alone[0]):
            return None
        spelt = [self.decode(self.raw(prompt) + tail) for tail in ([], alone)]
        return alone[0] if spelt[1] == spelt[0] + answer else None

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def keep(self, words: Iterable[str], what: str, need: int) -> list[str]:
        """The words that are one token after a space. PahqError naming this rule if fewer than ``need`` remain."""
        words = list(words)
        kept = [word for word in words if self.single(f" {word}") is not None]
        if len(kept) < need:
            raise PahqError(
                f"task '{self.task}': this tokenizer keeps {len(kept)} of {len(words)} {what} as one token "
                f"after a space, but {need} are needed; give a file of your own prompts"
            )
        return kept
