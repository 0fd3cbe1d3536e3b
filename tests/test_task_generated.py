"""The generated tasks, for tokenizers of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task import Prompts, get_task, list_tasks
from pahq.task.induction import repeats
from pahq.task.words import COUNTRIES, FEMALE, NAMES, NUMBERS
from toy_tokenizers import all_words, byte_level, toy_model, word_level

TOKENIZERS = ("words", "gpt2-like", "digits")
CASES = [
    (task.name, kind) for task in list_tasks() for kind in TOKENIZERS if (task.name, kind) != ("greaterthan", "words")
]
every_case = pytest.mark.parametrize(("name", "kind"), CASES)


@cache
def model(kind: str) -> Transformer:
    made = {"words": word_level, "gpt2-like": byte_level, "digits": lambda: byte_level(years=False)}
    return toy_model(made[kind]())


def rows(prompts: Prompts) -> set[tuple[int, ...]]:
    return {tuple(row) for row in prompts.clean.tolist()}


def spell(which: Transformer, ids: torch.Tensor) -> list[str]:
    return [which.tokenizer.decode([i]).strip() for i in ids.flatten().tolist() if i >= 0]


@every_case
def test_shape_and_alignment(name: str, kind: str) -> None:
    which = model(kind)
    prompts = get_task(name).prompts(which, 20)
    assert prompts.clean.shape == prompts.corrupt.shape
    assert len(prompts) == len(prompts.texts) == len(rows(prompts)) == 20
    assert not (prompts.clean == prompts.corrupt).all(1).any()
    assert prompts.pad is None
    unknown = which.tokenizer.unk_token_id
    assert not (prompts.clean == unknown).any()
    assert not (prompts.corrupt == unknown).any()
    for row, (clean, corrupt) in enumerate(prompts.texts):
        for text, ids in ((clean, prompts.clean[row]), (corrupt, prompts.corrupt[row])):
            assert which.tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    if name != "induction":
        assert (prompts.read == prompts.clean.shape[1] - 1).all()
        assert prompts.read_mask.all()
        for right, wrong in zip(prompts.answers.tolist(), prompts.wrong.tolist(), strict=True):
            sides = [{i for i in side[0] if i >= 0} for side in (right, wrong)]
            assert sides[0]
            assert sides[1]
            assert not sides[0] & sides[1]


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in ("induction", "greaterthan")])
def test_answers_continue_the_prompt(name: str, kind: str) -> None:
    """Spelt out, prompt and answer give back the prompt's tokens and then the answer's one."""
    which = model(kind)
    prompts = get_task(name).prompts(which, 8)
    for row, (clean, _) in enumerate(prompts.texts):
        for token in [*prompts.answers[row, 0].tolist(), *prompts.wrong[row, 0].tolist()]:
            if token < 0:
                continue
            answer = " " + which.tokenizer.decode([token]).strip()
            whole = which.tokenizer(clean + answer, add_special_tokens=False)["input_ids"]
            assert whole == [*prompts.clean[row].tolist(), token]


@every_case
def test_deterministic_and_prefix(name: str, kind: str) -> None:
    task, which = get_task(name), model(kind)
    long, again, short = (task.prompts(which, n, seed=3) for n in (12, 12, 5))
    assert torch.equal(long.clean, again.clean)
    assert torch.equal(long.corrupt, again.corrupt)
    assert torch.equal(long.answers, again.answers)
    assert torch.equal(long.clean[:5], short.clean)
    assert rows(long) != rows(task.prompts(which, 12, seed=4))


@every_case
def test_splits_are_disjoint(name: str, kind: str) -> None:
    task, which = get_task(name), model(kind)
    parts = [rows(task.prompts(which, 20, split=split)) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert rows(task.prompts(which, 60, split="all")) == set.union(*parts)


def test_same_in_every_process() -> None:
    """Python's salted hashes must not reach the draw."""
    code = (
        "from test_task_generated import model; from pahq.task import get_task, list_tasks;"
        "print([get_task(t.name).prompts(model('gpt2-like'), 3).clean.tolist() for t in list_tasks()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.path.dirname(__file__)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(outputs) == 1
    assert "[[" in outputs.pop()


def test_bos_is_prepended() -> None:
    which = model("gpt2-like")
    for name in ("ioi", "induction"):
        plain, led = (get_task(name, prepend_bos=on).prompts(which, 4) for on in (False, True))
        bos = torch.full((4, 1), which.tokenizer.bos_token_id)
        assert torch.equal(led.clean, torch.cat((bos, plain.clean), 1))
        assert torch.equal(led.read[led.read_mask], plain.read[plain.read_mask] + 1)


def test_ioi_by_construction() -> None:
    which = model("gpt2-like")
    assert len({text.split()[0] for text, _ in get_task("ioi").prompts(which, 20).texts}) == 1  # one wording
    prompts = get_task("ioi", templates=8).prompts(which, 60)
    orders, starts = set(), set()
    for row, (clean, corrupt) in enumerate(prompts.texts):
        named = [[w for w in text.replace(",", "").split() if w in NAMES] for text in (clean, corrupt)]
        (answer,), (wrong,) = spell(which, prompts.answers[row]), spell(which, prompts.wrong[row])
        assert sorted(named[0]) == sorted([answer, wrong, wrong])
        assert named[0][2] == wrong
        assert len(set(named[1])) == 3
        assert not set(named[0]) & set(named[1])
        assert int((prompts.clean[row] != prompts.corrupt[row]).sum()) == 3
        orders.add(named[0][0] == answer)
        starts.add(clean.split()[0])
    assert orders == {True, False}
    assert len(starts) > 3
    assert prompts.clean.shape[1] == 15


def test_greaterthan_two_digits() -> None:
    which = model("gpt2-like")
    prompts = get_task("greaterthan").prompts(which, 30)
    for row, (clean, corrupt) in enumerate(prompts.texts):
        century, year = clean.split()[6][:2], int(clean.split()[6][2:])
        assert clean.endswith(f" to {century}")
        assert corrupt == clean.replace(f"{century}{year:02}", f"{century}01")
        assert spell(which, prompts.answers[row]) == [f"{y:02}" for y in range(year + 1, 100)]
        assert spell(which, prompts.wrong[row]) == [f"{y:02}" for y in range(year + 1)]
        assert spell(which, prompts.clean[row])[-4:] == [century, f"{year:02}", "to", century]
        assert f"{century}{year:02}" != "1800"


def test_greaterthan_one_digit() -> None:
    which = model("digits")
    prompts = get_task("greaterthan").prompts(which, 30)
    for row, (clean, corrupt) in enumerate(prompts.texts):
        start, end = clean.split()[6], clean.split()[-1]
        assert start[:3] == end
        assert corrupt == clean.replace(start, f"{end}0")
        assert spell(which, prompts.answers[row]) == [str(y) for y in range(int(start[3]) + 1, 10)]
        assert spell(which, prompts.wrong[row]) == [str(y) for y in range(int(start[3]) + 1)]


def test_greaterthan_needs_years_that_split() -> None:
    with pytest.raises(PahqError, match="no year from 1100 to 1899 splits as 17 \\+ 32 nor ends on a digit"):
        get_task("greaterthan").prompts(model("words"), 2)
    with pytest.raises(PahqError, match="splits as 17 \\+ 32 with"):
        get_task("greaterthan", digits=2).prompts(model("digits"), 2)


@pytest.mark.parametrize("lead", [0, 2])
def test_docstring_by_construction(lead: int) -> None:
    which = model("gpt2-like")
    prompts = get_task("docstring", leading=lead).prompts(which, 30)
    for row, texts in enumerate(prompts.texts):
        lists = [text[text.index("self, ") + 6 : text.index("):")].split(", ") for text in texts]
        documented = [[part.split(":")[0] for part in text.split(":param ")[1:]] for text in texts]
        (answer,) = spell(which, prompts.answers[row])
        assert len(lists[0]) == len(lists[1]) == 6
        assert documented[0] == lists[0][lead : lead + 2]
        assert answer == lists[0][lead + 2]
        assert not {*lists[1], *documented[1]} & set(lists[0])
        assert not set(documented[1]) & set(lists[1])
        others = {*lists[0], *lists[1], *documented[1]} - {answer}
        assert set(spell(which, prompts.wrong[row])) == others


def test_induction_by_construction() -> None:
    which = model("gpt2-like")
    prompts = get_task("induction").prompts(which, 10)
    assert prompts.clean.shape[1] == 64
    assert torch.equal(prompts.corrupt, prompts.clean.roll(-1, 0))
    for row in range(10):
        ids = prompts.clean[row].tolist()
        expected = [
            t
            for t in range(1, 63)
            if ids[t] in ids[:t] and all(ids[s + 1] == ids[t + 1] for s in range(t) if ids[s] == ids[t])
        ]
        valid = prompts.read_mask[row]
        assert prompts.read[row][valid].tolist() == expected == repeats(ids)
        assert prompts.answers[row][valid].flatten().tolist() == [ids[t + 1] for t in expected]
        assert (prompts.answers[row][~valid] == -1).all()
    assert get_task("induction", length=300).prompts(which, 2).clean.shape == (2, 300)


def test_short_tasks_by_construction() -> None:
    which = model("words")
    for name in ("pronoun", "capital", "agreement"):
        prompts = get_task(name).prompts(which, 30)
        for row, (clean, corrupt) in enumerate(prompts.texts):
            right, wrong = spell(which, prompts.answers[row]), spell(which, prompts.wrong[row])
            told = [text.replace(",", "").split() for text in (clean, corrupt)]
            changed = [a for a, b in zip(*told, strict=True) if a != b]
            assert len(changed) == 1
            if name == "pronoun":
                assert (right, wrong) == ((["she"], ["he"]) if changed[0] in FEMALE else (["he"], ["she"]))
            elif name == "capital":
                other = next(b for a, b in zip(*told, strict=True) if a != b)
                assert (right, wrong) == ([COUNTRIES[changed[0]]], [COUNTRIES[other]])
            else:
                one, several = ["is", "was", "has"], ["are", "were", "have"]
                assert (right, wrong) == ((one, several) if changed[0] in NUMBERS else (several, one))


def test_dropped_words_leave_a_task() -> None:
    """Names that the tokenizer splits are not used."""
    some = [word for word in all_words() if word not in NAMES] + ["Mary", "John", "Anna", "Paul", "Kate", "Mark"]
    which = toy_model(byte_level(some))
    prompts = get_task("ioi").prompts(which, 20)
    found = {w.strip(",") for clean, _ in prompts.texts for w in clean.split()} & set(NAMES)
    assert found == {"Mary", "John", "Anna", "Paul", "Kate", "Mark"}


@pytest.mark.parametrize(
    ("missing", "name", "rule"),
    [
        (NAMES, "ioi", "keeps 0 of 76 first names as one token after a space, but 5 are needed"),
        (FEMALE, "pronoun", "keeps 0 of 36 women's names"),
        (tuple(COUNTRIES.values()), "capital", "keeps fewer than 2 capitals"),
        (tuple(NUMBERS.values()), "agreement", "keeps no plural noun"),
        (("she",), "pronoun", r"no prompt is left with this tokenizer, by the rule: the answer must be one token"),
    ],
)
def test_error_names_the_rule(missing: tuple[str, ...], name: str, rule: str) -> None:
    which = toy_model(byte_level([word for word in all_words() if word not in missing]))
    with pytest.raises(PahqError, match=rule):
        get_task(name).prompts(which, 3)


def test_too_many_asked_for() -> None:
    with pytest.raises(PahqError, match=r"100000 examples asked for, but split 'test' has \d+ with this tokenizer"):
        get_task("capital").prompts(model("words"), 100_000, split="test")


def test_bad_requests() -> None:
    which = model("gpt2-like")
    for n in (0, -1):
        with pytest.raises(PahqError, match=f"number of examples is {n}"):
            get_task("ioi").prompts(which, n)
    with pytest.raises(PahqError, match="split 'dev' is unknown; choose one of train, validation, test"):
        get_task("ioi").prompts(which, 2, split="dev")
    with pytest.raises(PahqError, match="comes without a tokenizer"):
        get_task("ioi").prompts(toy_model(None), 2)
    with pytest.raises(PahqError, match="ask for at least 2"):
        get_task("induction").prompts(which, 1)
    with pytest.raises(PahqError, match="task 'iio' is unknown; did you mean 'ioi'"):
        get_task("iio")
    with pytest.raises(PahqError, match="choose one of ioi, greaterthan, docstring, induction"):
        get_task("zzzzz")
    with pytest.raises(PahqError, match="option 'colour' is unknown; it has prepend_bos"):
        get_task("ioi", colour=1)
    with pytest.raises(PahqError, match="option length is '64'; give a value of type int"):
        get_task("induction", length="64")
    with pytest.raises(PahqError, match="option prepend_bos is 1; give a value of type bool"):
        get_task("ioi", prepend_bos=1)
    with pytest.raises(PahqError, match="leading is 4; give 0 to 3"):
        get_task("docstring", leading=4)
    with pytest.raises(PahqError, match="digits is 3"):
        get_task("greaterthan", digits=3)
    with pytest.raises(PahqError, match="length is 3"):
        get_task("induction", length=3)
