"""Tasks from the user's own files, good and bad."""

from __future__ import annotations

import csv
import json
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from pahq.errors import PahqError
from pahq.model.transformer import Transformer
from pahq.task import SPLITS, get_task
from pahq.task.custom import FileTask
from toy_tokenizers import byte_level, toy_model, word_level

NAMES = ("Mary", "John", "Anna", "Paul", "Kate", "Mark", "Emma", "Adam", "Rose", "Luke", "Jane", "Frank")


@pytest.fixture(scope="module")
def model() -> Transformer:
    return toy_model(byte_level())


def pair(i: int = 0, **changes: Any) -> dict[str, Any]:
    """A prompt pair of 4 tokens each (", " and a name are one token each)."""
    first, second, third = (NAMES[(i + k) % len(NAMES)] for k in range(3))
    row = {"clean": f" {first} and {second},", "corrupt": f" {third} and {second},", "answers": [f" {first}"]}
    return {**row, "wrong_answers": [f" {third}"], **changes}


def jsonl(folder: Path, rows: list[Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def table(folder: Path, header: list[str], rows: list[list[Any]]) -> str:
    path = folder / "pairs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_jsonl(tmp_path: Path, model: Transformer) -> None:
    task = get_task(jsonl(tmp_path, [pair(i) for i in range(9)]))
    prompts = task.prompts(model, 9, split="all")
    encode = model.tokenizer.encode
    for i in range(9):
        row = pair(i)
        assert prompts.texts[i] == (row["clean"], row["corrupt"])
        assert prompts.clean[i].tolist() == encode(row["clean"])
        assert prompts.corrupt[i].tolist() == encode(row["corrupt"])
        assert prompts.answers[i].tolist() == [encode(row["answers"][0])]
        assert prompts.wrong[i].tolist() == [encode(row["wrong_answers"][0])]
    assert (prompts.read == prompts.clean.shape[1] - 1).all()
    parts = [
        {p.texts[k] for k in range(3)} for s in ("train", "validation", "test") for p in [task.prompts(model, 3, 1, s)]
    ]
    assert set.union(*parts) == set(prompts.texts)
    assert sum(map(len, parts)) == 9
    assert task.prompts(model, 3, 1).texts == task.prompts(model, 3, 1).texts
    assert len({task.prompts(model, 3, seed).texts for seed in range(4)}) > 1


def test_other_tools_files(tmp_path: Path, model: Transformer) -> None:
    """A JSON object with a list of prompts; a CSV with token ids, alone or as lists."""
    rows = [pair(i) for i in range(4)]
    expected = get_task(jsonl(tmp_path, rows)).prompts(model, 4, split="all")
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"prompts": rows, "word_idxs": {"IO": 3}}))

    def ids(text: str) -> int:
        return model.tokenizer.encode(text)[0]

    other = [
        [r["clean"], r["corrupt"], r["corrupt"], ids(r["answers"][0]), f"[{ids(r['wrong_answers'][0])}]"] for r in rows
    ]
    files = [
        str(path),
        table(tmp_path, ["clean", "corrupted", "corrupted_hard", "correct_idx", "incorrect_idx"], other),
    ]
    for file in files:
        found = get_task(file).prompts(model, 4, split="all")
        for name in ("clean", "corrupt", "answers", "wrong", "read"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_years_as_labels(tmp_path: Path, model: Transformer) -> None:
    """Greater-than prompts as published: the label is the prompt's year, right are the later ones."""

    def text(year: int) -> str:
        return f"The war lasted from the year 17{year:02} to the year 17"

    years = (32, 5, 98, 0)
    rows = [[text(year), text(1), str(year)] for year in years[:3]] + [[text(0), text(1), "00"]]
    task = get_task(table(tmp_path, ["clean", "corrupted", "label"], rows))
    assert (task.default_metric, task.summed) == ("greaterthan", True)
    prompts = task.prompts(model, 4, split="all")
    token = [model.tokenizer.encode(f"{year:02}")[0] for year in range(100)]
    assert len(set(token)) == 100
    for i, year in enumerate(years):
        right, wrong = (side[i, 0][side[i, 0] >= 0].tolist() for side in (prompts.answers, prompts.wrong))
        assert right == token[year + 1 :]
        assert wrong == token[: year + 1]
        assert prompts.clean[i, 7].item() == token[year]

    with pytest.raises(PahqError, match=r"pairs.csv: line 2: a label needs a tokenizer with one token for a year's"):
        task.prompts(toy_model(byte_level(years=False)), 4, split="all")
    numbers = get_task(jsonl(tmp_path, [{"clean": text(5), "corrupt": text(1), "label": 5}]))
    assert torch.equal(numbers.prompts(model, 1, split="all").answers[0, 0, :94], prompts.answers[1, 0, :94])
    both = get_task(jsonl(tmp_path, [pair(label="positive")]))  # answers given: a label of another kind is no matter
    assert both.default_metric == "logit_diff"
    for bad in ("99", "-1", "173", "1.5", "positive", ""):
        with pytest.raises(PahqError, match=rf"line 2: 'label' is '{bad}', not the last two digits"):
            get_task(table(tmp_path, ["clean", "corrupted", "label"], [[text(5), text(1), bad]]))


def test_csv_texts_and_lists(tmp_path: Path, model: Transformer) -> None:
    rows = [
        [" Mary and John,", " Anna and John,", " Mary", "[' Anna', \" Paul\"]"],
        [" Mary and John,", " Anna and John,", '[" Mary"]', " Anna"],
    ]
    prompts = get_task(table(tmp_path, ["clean", "corrupt", "answers", "wrong_answers"], rows)).prompts(
        model, 2, split="all"
    )
    assert (prompts.answers >= 0).sum(-1).tolist() == [[1], [1]]
    assert (prompts.wrong >= 0).sum(-1).tolist() == [[2], [1]]
    assert torch.equal(prompts.answers[0], prompts.answers[1])


def test_padding(tmp_path: Path, model: Transformer) -> None:
    long = pair(clean=" Mary and John and Paul,", corrupt=" Anna and John and Paul,")
    file = jsonl(tmp_path, [pair(), long])
    with pytest.raises(PahqError, match=r"line 2 has 6 tokens, but line 1 has 4; .* allow padding"):
        get_task(file).prompts(model, 2, split="all")
    prompts = get_task(file, pad=True).prompts(model, 2, split="all")
    assert prompts.read.tolist() == [[3], [5]]
    assert prompts.pad is not None
    assert prompts.pad.tolist() == [[False] * 4 + [True] * 2, [False] * 6]
    alone = get_task(jsonl(tmp_path, [pair()])).prompts(model, 1, split="all")
    assert torch.equal(prompts.clean[0, :4], alone.clean[0])
    with pytest.raises(PahqError, match="not causal"):
        get_task(file, pad=True).prompts(toy_model(model.tokenizer, causal=False), 2, split="all")


def test_answer_that_would_merge_with_the_prompt(tmp_path: Path, model: Transformer) -> None:
    """`` 1800`` has a token of its own, but after `` 18`` the answer is the token ``00``."""
    row = pair(clean=" to 18", corrupt=" to 17", answers=["00"], wrong_answers=["01"])
    prompts = get_task(jsonl(tmp_path, [row])).prompts(model, 1, split="all")
    assert prompts.answers.flatten().tolist() == model.tokenizer.encode("00")


def test_second_kind_of_tokenizer(tmp_path: Path) -> None:
    prompts = get_task(jsonl(tmp_path, [pair()])).prompts(toy_model(word_level()), 1, split="all")
    assert prompts.clean.shape == (1, 4)


def test_wrong_answers_may_be_left_out(tmp_path: Path) -> None:
    row = {name: value for name, value in pair().items() if name != "wrong_answers"}
    prompts = get_task(jsonl(tmp_path, [row])).prompts(toy_model(byte_level()), 1, split="all")
    assert (prompts.answers >= 0).any()
    assert not (prompts.wrong >= 0).any()


def test_a_file_of_another_ending_is_told_of_its_ending(tmp_path: Path) -> None:
    path = Path(jsonl(tmp_path, [pair()])).rename(tmp_path / "pairs.txt")
    with pytest.raises(PahqError, match=r"pairs\.txt: its name ends in '\.txt'; let it end in one of \.jsonl, "):
        get_task(str(path))


BAD_LINES: list[tuple[list[Any], str]] = [
    ([pair(), "", pair(1)], "line 2 is empty"),
    ([pair(), '{"clean": '], "line 2: broken JSON"),
    (["[1]"], "line 1 is no object"),
    ([pair(), {"clean": "a", "answers": ["b"]}], "line 2 has no 'corrupt'"),
    ([{k: v for k, v in pair().items() if k != "answers"}], "line 1 has no 'answers'; a row needs clean, corrupt and"),
    ([pair(answers=[])], "line 1 has no answers"),
    ([pair(answers=[1.5])], r"line 1: 'answers' holds 1\.5"),
    ([pair(answers=[True])], "line 1: 'answers' holds True"),
    ([pair(wrong_answers=None)], "line 1: 'wrong_answers' holds None"),
    ([pair(clean=3)], "line 1: 'clean' is 3"),
    ([pair(clean="")], "line 1: 'clean' is ''"),
    (["[" * 100_000], "line 1: (JSON nested too deeply|broken JSON)"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_LINES)
def test_bad_lines(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(PahqError, match=message) as caught:
        get_task(jsonl(tmp_path, rows))
    assert "\n" not in str(caught.value)
    assert "pairs.jsonl" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(corrupt=" Anna and John"), "line 2: clean has 4 tokens and corrupt 3"),
        (pair(corrupt=pair()["clean"]), "line 2: clean and corrupt are the same; change in corrupt what the answer"),
        (pair(answers=[" Mary John"]), "line 2: answer ' Mary John' is 2 tokens"),
        (pair(answers=["ary"]), "line 2: answer 'ary' is 3 tokens"),
        (pair(answers=[10**6]), "line 2: answer token 1000000 is not among"),
        (pair(answers=[-1]), "line 2: answer token -1 is not among"),
        (pair(wrong_answers=[" Mary"]), "line 2: ' Mary' is a right and a wrong answer"),
    ],
)
def test_bad_rows_for_a_tokenizer(tmp_path: Path, model: Transformer, row: dict[str, Any], message: str) -> None:
    task = get_task(jsonl(tmp_path, [pair(), row, pair(1)]))
    with pytest.raises(PahqError, match=message):
        task.prompts(model, 3, split="all")
    with pytest.raises(PahqError, match=message):  # also where that row is not drawn
        task.prompts(model, 1, split="test")
    with pytest.raises(PahqError, match=message):  # and before more rows are asked for
        task.prompts(model, 30)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["a", "b", "c"]], "line 2 has 3 cells, but the header has 4"),
        ([["a", "b", "[c", "d"]], r"line 2: answers: '\[c' is no list"),
        ([["a", "b", "[__import__('os')]", "d"]], "is no list"),
        ([["a", "b", " x", "d"], []], "line 3 is empty"),
        ([["a", "two\nlines", " x", "d"], ["a"]], "line 4 has 1 cells"),
    ],
)
def test_bad_csv(tmp_path: Path, rows: list[list[Any]], message: str) -> None:
    with pytest.raises(PahqError, match=message):
        get_task(table(tmp_path, ["clean", "corrupt", "answers", "wrong_answers"], rows))


def test_bad_csv_columns(tmp_path: Path) -> None:
    with pytest.raises(PahqError, match="line 2 has no 'corrupt'"):
        get_task(table(tmp_path, ["clean", "answers", "wrong_answers"], [["a", "b", "c"]]))
    with pytest.raises(PahqError, match="line 2: correct_idx: ' Mary' is no token id"):
        get_task(table(tmp_path, ["clean", "corrupted", "correct_idx", "incorrect_idx"], [["a", "b", " Mary", 2]]))
    with pytest.raises(PahqError, match="no prompt pair"):
        get_task(table(tmp_path, ["clean", "corrupt", "answers", "wrong_answers"], []))
    path = tmp_path / "open.csv"
    path.write_text('clean,corrupt,answers,wrong_answers\n"a,b,c,d\n')
    with pytest.raises(PahqError, match="broken CSV"):
        get_task(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"{]", "line 1: broken JSON"),
        (b'{"a": 1}', "no list of prompts"),
        (b'{"prompts": []}', "no prompt pair"),
        (b'{"prompts": [3]}', "prompt 1 is no object"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(PahqError, match=message):
        get_task(str(path))


NEAR = (
    ("wrong_answer", "wrong_answers", "wrong_answers"),
    ("Wrong_Answers", "wrong_answers", "wrong_answers"),
    ("incorrect", "wrong_answers", "incorrect_idx"),
    ("answer", "answers", "answers"),
    ("corupt", "corrupt", "corrupt"),
    ("corruptd", "corrupt", "corrupted"),
)


@pytest.mark.parametrize(("given", "column", "meant"), NEAR)
def test_misspelt_columns(tmp_path: Path, given: str, column: str, meant: str) -> None:
    bad = {given if name == column else name: value for name, value in pair().items()}
    message = rf"'{given}' is unknown; did you mean '{meant}'\?$"
    with pytest.raises(PahqError, match=f"pairs.jsonl: line 3: {message}"):
        get_task(jsonl(tmp_path, [pair(), pair(1), bad]))
    cells = [json.dumps(value) if isinstance(value, list) else value for value in bad.values()]
    with pytest.raises(PahqError, match=f"pairs.csv: line 1: {message}"):
        get_task(table(tmp_path, list(bad), [cells]))
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"prompts": [pair(), bad]}))
    with pytest.raises(PahqError, match=f"pairs.json: prompt 2: {message}"):
        get_task(path)


def test_columns_of_notes_are_left_alone(tmp_path: Path, model: Transformer) -> None:
    notes = {"id": 3, "note": "x", "corrupted_hard": "y", "correct": True, "label": "positive", "answer": "Mary", "": 0}
    for row in (pair(**notes), {name: value for name, value in pair(**notes).items() if name != "wrong_answers"}):
        prompts = get_task(jsonl(tmp_path, [row])).prompts(model, 1, split="all")
        assert prompts.texts == ((pair()["clean"], pair()["corrupt"]),)


def test_missing_file_and_unknown_option(tmp_path: Path) -> None:
    with pytest.raises(PahqError, match="no such file"):
        get_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(PahqError, match="option 'length' is unknown; it has pad, prepend_bos"):
        get_task(jsonl(tmp_path, [pair()]), length=3)


def test_too_few_rows(tmp_path: Path, model: Transformer) -> None:
    task = get_task(jsonl(tmp_path, [pair(i) for i in range(5)]))
    with pytest.raises(PahqError, match=r"3 examples asked for, .* 'validation' has 2 \(3 splits share 5 rows\)"):
        task.prompts(model, 3)


SEEDS = range(8)
ROWS = [pair(i, clean=f" {a} and {b},", corrupt=f" {b} and {a},") for i, (a, b) in enumerate(combinations(NAMES, 2))]
"""Pairs that share no prompt; ``mirror`` gives another that shares two."""
LINKED = [pair(i, corrupt=" Rose and Luke,", clean=f" {name} and Luke,") for i, name in enumerate(NAMES[:7])]


def mirror(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"clean": row["corrupt"], "corrupt": row["clean"]}


def splits_of(task: Any, model: Transformer, seed: int) -> dict[str, list[tuple[str, str]]]:
    """All that each split has; fails unless that is what it says."""
    found = {}
    for split in SPLITS:
        count = task.available(split, model)
        assert count == task.available(split)
        found[split] = list(task.prompts(model, count, seed, split).texts)
        with pytest.raises(PahqError, match=rf"split '{split}' has {count} \(3 splits share"):
            task.prompts(model, count + 1, seed, split)
    return found


def test_rows_without_a_common_prompt_are_dealt_in_turn(tmp_path: Path, model: Transformer) -> None:
    for count in (9, 10, 11, 40):
        rows = ROWS[:count]
        task = get_task(jsonl(tmp_path, rows))
        for seed in SEEDS:
            order = list(range(count))
            random.Random(f"rows {seed}").shuffle(order)
            texts = [(rows[i]["clean"], rows[i]["corrupt"]) for i in order]
            expected = {"train": texts[0::3], "validation": texts[1::3], "test": texts[2::3]}
            assert splits_of(task, model, seed) == expected


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([*ROWS[:9], *map(mirror, ROWS[:9])], (6, 6, 6)),
        ([*ROWS[:4], *map(mirror, ROWS[:4]), ROWS[4]], (4, 3, 2)),  # as in the documentation
        ([*ROWS[:9], *ROWS[:1], *map(mirror, ROWS[:2])], (4, 4, 4)),
        ([*ROWS[:2], mirror(ROWS[0]), mirror(ROWS[1])], (2, 2, 0)),
        ([*LINKED, *ROWS[:2]], (7, 1, 1)),
    ],
)
def test_rows_with_a_common_prompt_stay_together(
    tmp_path: Path, model: Transformer, rows: list[dict[str, Any]], counts: tuple[int, ...]
) -> None:
    task = get_task(jsonl(tmp_path, rows))
    assert "link" not in task.description
    dealt = set()
    for seed in SEEDS:
        if 0 in counts:
            held = [set(task.prompts(model, 2, seed, split).texts) for split in ("validation", "test")]
            assert isinstance(task, FileTask)
            assert [task.available(split) for split in ("validation", "test", "train")] == list(counts)
            with pytest.raises(
                PahqError, match=r"'train' has 0 \(3 splits share 4 rows, those with a prompt in common"
            ):
                task.prompts(model, 1, seed, "train")
        else:
            found = splits_of(task, model, seed)
            assert [len(found[split]) for split in ("validation", "test", "train")] == list(counts)
            dealt_out = sorted(texts for part in found.values() for texts in part)
            assert dealt_out == sorted((row["clean"], row["corrupt"]) for row in rows)
            held = [set(found[split]) for split in SPLITS]
        for one, other in combinations([{text for texts in part for text in texts} for part in held], 2):
            assert not one & other
        dealt.add(tuple(frozenset(part) for part in held))
    assert len(dealt) > 1 or 7 in counts


def test_rows_that_are_linked_throughout_cannot_be_kept_apart(tmp_path: Path, model: Transformer) -> None:
    """They are dealt singly, and that is said."""
    task = get_task(jsonl(tmp_path, LINKED))
    assert "shared prompts link them all" in task.description
    assert {split: len(texts) for split, texts in splits_of(task, model, 0).items()} == {
        "train": 3,
        "validation": 2,
        "test": 2,
    }
    assert "link" not in get_task(jsonl(tmp_path, LINKED[:1])).description


def test_prompts_are_the_same_where_their_tokens_are(tmp_path: Path) -> None:
    """Words that the tokenizer does not know are all one."""
    model = toy_model(word_level())
    rows = [pair(i, clean=f" {name} and Mary,", corrupt=f" {name} and John,") for i, name in enumerate(NAMES[:6])]
    rows += [
        pair(i, clean=f" {name} and Mary,", corrupt=f" {name} and Paul,") for i, name in enumerate(("Xa", "Xb", "Xc"))
    ]
    task = get_task(jsonl(tmp_path, rows))
    assert isinstance(task, FileTask)
    assert [task.available(split, model) for split in SPLITS] == [3, 3, 3]
    for seed in SEEDS:
        held = [{text for text, _ in task.prompts(model, 3, seed, split).texts if "X" in text} for split in SPLITS]
        assert sorted(map(len, held)) == [0, 0, 3]
    same = pair(clean=" Xa and Mary,", corrupt=" Xb and Mary,")
    with pytest.raises(PahqError, match="line 1: clean and corrupt are the same tokens; change in corrupt"):
        get_task(jsonl(tmp_path, [same])).prompts(model, 1, split="all")
