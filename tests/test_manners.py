"""Manners of all commands: --json and --quiet, errors, exit codes, help, and what is left out where nobody watches.

A command that is new must be in ``CASES``; its help must end in examples.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table

import commands
import pahq as package
from commands import Pahq
from pahq.cli import codes
from pahq.cli.app import app
from pahq.cli.output import Manner
from pahq.report import machine
from pahq.report.console import make_console
from pahq.report.progress import LiveWatch, PlainWatch, Watch, watch_for

ROOT: Any = typer.main.get_command(app)
COMMON = "--model {files}/model --task {files}/prompts.jsonl --metric kl_div --n 3"
FULL = "run config size figures search precision total_seconds peak_memory largest_edges"
RECORD = "command config figures versions commit machine started finished total_seconds"
EVALUATED = "options runs roc agreement notes versions commit machine started finished total_seconds"
GRID = "format kind command rows failures paper started finished versions commit machine"
ABSENT = "/absent/thing"
CASES: dict[str, tuple[str, str, str]] = {
    "discover": (COMMON + " --threshold 0.01 --no-view --out {out}", "--model m --task ioi", FULL),
    "resume": ("{files}/a --no-view", ABSENT, FULL),
    "show": ("{files}/a", ABSENT, FULL),
    "methods": ("", "", "name family about natural_threshold options"),
    "tasks": ("", "", "name default_metric description"),
    "tasks list": ("", "", "name default_metric description"),
    "tasks show": (
        "{files}/prompts.jsonl --model {files}/model --n 2",
        ABSENT,
        "task description model examples tokens accuracy logit_difference split seed prompts",
    ),
    "truth": ("trained-sum", ABSENT, "name about edges graph metric"),
    "sweep": ("--tasks ioi --models m --thresholds 1,2 --dry-run --out {out}", ABSENT + ".yaml", "out counts runs"),
    "evaluate": ("{files}/a --knockouts 1 --removals 1 --random-circuits 1 --bootstrap 10", ABSENT, EVALUATED),
    "compare": ("{files}/a {files}/b --bootstrap 10", "{files}/a", EVALUATED),
    "plot": ("graph {files}/a --out {out}.svg", "graph {files}/a --out {out}.doc", "file data kind rows notes"),
    "view": ("{files}/a --no-model --out {out}.html", ABSENT, "file bytes"),
    "convert": (
        "{files}/a {out}.json --to eap-ig --force",
        ABSENT + " {out}",
        "what count read_as written_as lost",
    ),
    "policies": ("", "", "policies formats"),
    "precision snr": (COMMON + " --out {out}", COMMON + " --policy no --out {out}", RECORD),
    "precision sensitivity": (
        COMMON + " --formats bf16 --kinds o --budget 0.97x --threshold 0.01 --out {out}",
        COMMON + " --run " + ABSENT,
        RECORD,
    ),
    "precision groups": (COMMON + " --heads 1 --tests 4 --sizes 0,1 --out {out}", COMMON + " --sizes x", RECORD),
    "reproduce table-auc": (
        "--offline --quick --truths trained-sum --metrics kl --methods exact --n 4 --out {out}",
        "--tasks poetry",
        GRID,
    ),
    "reproduce table-runtime": (
        "--offline --quick --one-process --model {files}/model --task {files}/prompts.jsonl --n 3 --out {out}",
        "--thresholds x",
        GRID,
    ),
    "reproduce table-ablation": ("--quick --out {out}", "--thresholds x", GRID),
    "reproduce figure-rtn": (
        "--offline --quick --model {files}/model --task {files}/prompts.jsonl --n 3 --out {out}",
        "--thresholds x",
        GRID,
    ),
    "reproduce gpt2-ioi": (
        "--quick --model {files}/model --task {files}/prompts.jsonl --n 3 --thresholds 0.01 --out {out}",
        "--thresholds x",
        GRID,
    ),
}
"""Command -> a cheap call, one that is refused (empty: there is none), and keys that its JSON always has."""
COMPUTE = {name for name in CASES if name.startswith(("precision", "reproduce"))} | {"discover", "evaluate", "compare"}


def leaves(command: Any = ROOT, words: str = "") -> dict[str, Any]:
    """All commands that do something by themselves, by their words after pahq."""
    found: dict[str, Any] = {}
    for name, below in getattr(command, "commands", {}).items():
        if not hasattr(below, "commands") or below.invoke_without_command:
            found[f"{words}{name}"] = below
        found |= leaves(below, f"{words}{name} ")
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts, and two runs."""
    folder = commands.small_files(tmp_path_factory.mktemp("files"))
    given: Any = {"model": str(folder / "model"), "task": str(folder / "prompts.jsonl"), "metric": "kl_div", "n": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "gemm_peak", lambda *_: 1e11)
        for name, threshold in (("a", 0.01), ("b", 0.1)):
            package.discover(threshold=threshold, out=folder / name, view=False, **given)
    return folder


def test_every_command_is_looked_at() -> None:
    assert set(CASES) == set(leaves())


def test_keys_and_exit_codes_are_documented() -> None:
    docs = Path(__file__).parent.parent / "docs"
    told: dict[str, set[str]] = {}
    for line in (docs / "json.md").read_text().splitlines():
        if line.startswith("| `"):
            names, keys = (re.findall("`([^`]+)`", cell) for cell in line.split("|")[1:3])
            told |= {name: set(keys) for name in names}
    assert set(told) == set(CASES)
    for name, (_, _, keys) in CASES.items():
        assert told[name] == set(keys.split()), name
    codes_told = re.findall(r"^\| (\d+) \|", (docs / "cli.md").read_text(), re.MULTILINE)
    assert list(map(int, codes_told)) == sorted(v for v in vars(codes).values() if isinstance(v, int))


@pytest.mark.parametrize("name", leaves())
def test_every_command_has_the_shared_options(name: str) -> None:
    options = {tuple(param.opts): param for param in leaves()[name].params}
    quiet, as_json = options[("--quiet", "-q")], options[("--json",)]
    assert quiet.help == "Print nothing but errors (and --json's output)."
    assert as_json.help == "Print one JSON document on standard output, errors too."


def groups(command: Any = ROOT, words: str = "") -> list[str]:
    below = getattr(command, "commands", {})
    deeper = [name for child, sub in below.items() for name in groups(sub, f"{words} {child}".strip())]
    return [words, *deeper] if below else []


@pytest.mark.parametrize("name", [*leaves(), *groups()])
def test_help_fits_and_ends_in_examples_that_can_be_copied(
    pahq: Pahq, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = pahq(*name.split(), "--help")
    assert told.code == 0
    lines = told.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if re.match(r"  \S.*\.\.\.$", line)], "a command's line is cut off"
    examples = told.out.split("\n  Examples:\n")[1].partition("\n\n")[0].replace("\\\n", "")
    assert examples.strip()
    for example in examples.splitlines():
        words = shlex.split(example)
        assert words[0] == "pahq"
        assert words[1 : 1 + len(name.split())] == name.split()
        command, context = ROOT, ROOT.make_context("pahq", words[1:], obj=Manner(), resilient_parsing=True)
        rest = words[1:]
        while hasattr(command, "commands") and rest:
            command, rest = command.commands[rest[0]], rest[1:]
        given = [word for word in rest if word.startswith("--")]
        assert set(given) <= {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        if "--config" not in given:
            command.make_context(command.name, rest, parent=context)  # raises for what cannot be


@pytest.mark.parametrize("name", CASES)
def test_json_is_one_document_and_quiet_is_quiet(pahq: Pahq, files: Path, tmp_path: Path, name: str) -> None:
    if name == "plot":
        pytest.importorskip("matplotlib")
    words, _, keys = CASES[name]
    call = [*name.split(), *words.format(files=files, out=tmp_path / "out").split()]
    good = codes.PARTLY if name == "reproduce gpt2-ioi" else codes.DONE  # the model is not GPT-2

    told = pahq(*call, "--json")
    assert told.code == good, told.err
    document = json.loads(told.out)
    (first, *_) = document if isinstance(document, list) else [document]
    assert set(keys.split()) <= set(first), set(first)
    assert "\x1b" not in told.err + told.out
    assert not re.search(r"[━▏█]", told.err), "a progress bar"

    quiet = pahq(*call, "--quiet")
    lost = [line for line in quiet.err.splitlines() if not line.startswith("not kept: ")]
    assert (quiet.code, quiet.out, lost) == (good, "", [])
    if name not in COMPUTE:  # nothing new, and cheap
        plain = pahq(*call)
        assert plain.code == good
        assert plain.out.strip() or name == "resume"
        both = pahq(*call, "--json", "-q")
        assert json.loads(both.out) == document


@pytest.mark.parametrize("name", CASES)
def test_errors_are_json_too(pahq: Pahq, files: Path, tmp_path: Path, name: str) -> None:
    for words in [CASES[name][1].format(files=files, out=tmp_path / "out").split(), ["--no-such-option"]]:
        if not words:
            continue
        plain, told = pahq(*name.split(), *words), pahq(*name.split(), *words, "--json")
        assert plain.out == ""
        assert told.out != ""
        assert told.error == plain.error
        assert (tmp_path / "out").exists() is False


def test_options_before_a_subcommand_are_not_lost(pahq: Pahq) -> None:
    assert pahq("tasks", "--json", "list").error == "--json: it stands before 'list'; write it behind"


def test_exit_codes(pahq: Pahq, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: value for name, value in vars(codes).items() if isinstance(value, int)}
    assert known == {"DONE": 0, "BUG": 1, "REFUSED": 2, "PARTLY": 3, "INTERRUPTED": 130}
    told = " ".join(pahq("--help").out.partition("Exit codes:")[2].split())
    assert [int(code) for code in re.findall(r"(?:^|, )(\d+) ", told)] == sorted(known.values())
    # Done, refused and done in part are what the other tests here see.

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pahq.api.execute", stop)
    words = ["discover", *commands.options(files, threshold=1), "--out", files / "new", "--json"]
    stopped = pahq(*words)
    assert (stopped.code, stopped.err) == (codes.INTERRUPTED, "interrupted; nothing was begun\n")
    message = {"kind": "interrupted", "code": 130, "message": "interrupted; nothing was begun"}
    assert json.loads(stopped.out) == {"error": message}

    monkeypatch.setattr("pahq.cli.app.guarded", stop)  # before anything is guarded, as while torch is imported
    stopped = pahq(*words)
    assert (stopped.code, stopped.err) == (codes.INTERRUPTED, "interrupted; run the same command again\n")


def test_a_bug_is_a_traceback_and_exit_code_1() -> None:
    code = (
        "import sys\n"
        "import pahq.cli.methods as methods\n"
        "from pahq.cli.app import main\n"
        "methods._facts = None\n"
        "sys.argv = ['pahq', 'methods', '--json']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == codes.BUG
    assert "Traceback" in done.stderr
    error = json.loads(done.stdout)["error"]
    assert (error["kind"], error["code"]) == ("bug", 1)
    assert error["message"].startswith("TypeError: ")


class Screen(StringIO):
    def isatty(self) -> bool:
        return True


def printed(stream: StringIO) -> str:
    table = Table("name", "what", box=None)
    table.add_row("x" * 60, "y" * 90, style="bold red")
    make_console(stream).print(table)
    return stream.getvalue()


def test_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    assert "\x1b[" in printed(Screen())
    assert max(len(line) for line in re.sub(r"\x1b\[[\d;]*m", "", printed(Screen())).splitlines()) <= 60
    piped = printed(StringIO())
    assert "\x1b" not in piped
    assert "x" * 60 in piped
    assert "y" * 90 in piped
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[" in printed(Screen())  # empty stands for not set
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(Screen())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in printed(Screen())


def test_progress_bars_are_for_terminals_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert type(watch_for(Screen())) is LiveWatch
    assert type(watch_for(StringIO())) is PlainWatch
    assert type(watch_for(Screen(), quiet=True)) is Watch
    monkeypatch.setenv("TERM", "dumb")
    assert type(watch_for(Screen())) is PlainWatch


# A command without torch, made to print a wide table in colour, or what is asked for.
LIGHT = """
import sys
import pahq.cli.truth as truth
from pahq.cli.app import main
from rich.table import Table
table = Table('name', 'what', box=None)
table.add_row('x' * 60, 'y' * 90, style='bold red')
truth._list = lambda console, names: console.print({what})
sys.argv = ['pahq', 'truth']
main()
"""


def light(what: str = "table") -> list[str]:
    return [sys.executable, "-c", LIGHT.format(what=what)]


@pytest.mark.parametrize(("more", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_a_command_on_a_real_terminal(more: dict[str, str], coloured: bool) -> None:
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "70"} | more
    with subprocess.Popen(light(), stdout=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                part = os.read(master, 1 << 16)
            except OSError:  # as Linux says that the other side has closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert process.returncode == 0
    assert (b"\x1b" in shown) is coloured
    assert b"xxx" in shown
    assert b"y" * 90 not in shown


def test_rows_come_whole_however_narrow_the_terminal_says_it_is() -> None:
    done = subprocess.run(light(), capture_output=True, env=os.environ | {"COLUMNS": "30"}, check=True, text=True)
    assert re.search("x{60} +y{90}", done.stdout)


def test_a_letter_that_the_reader_lacks_ends_no_command() -> None:
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(light("'5 – 3'"), capture_output=True, env=ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"5 ? 3\n", b"")


def test_downloads_show_bars_only_to_those_who_watch(pahq: Pahq, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the hub's own; its library reads this when it is imported."""
    name = "HF_HUB_DISABLE_PROGRESS_BARS"
    monkeypatch.setenv("TERM", "xterm")
    for words, stream, quiet in (
        (["truth"], StringIO(), True),
        (["truth"], Screen(), False),
        (["truth", "-q"], Screen(), True),
    ):
        monkeypatch.delenv(name, raising=False)
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stream)
            assert pahq(*words).code == 0
        assert (os.environ.get(name) == "1") is quiet


def test_a_refusal_stays_one_line_if_the_reader_had_enough() -> None:
    """As ``head`` has."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", "from pahq.cli.app import main; main()", "show", ABSENT, "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr.count("\n")) == (codes.REFUSED, 1)
