"""The page of a sweep, in a browser: it sorts, finds and links; whatever names and reasons hold stays text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from browser import chromium, until
from pahq.sweeps.page import page
from pahq.sweeps.status import KEYS, counted

ODD = "</script><img src=x onerror=document.title='hit'>&amp; \ud800"


def row(run: str, state: str = "done", **facts: Any) -> dict[str, Any]:
    known: dict[str, Any] = dict.fromkeys(KEYS)
    known |= {"task": "ioi", "model": "gpt2", "method": "acdc", "policy": "fp32", "threshold": 0.1, "metric": "kl_div"}
    return known | {"run": run, "state": state, "log": f"{run}.log", "viewer": f"{run}/viewer.html", **facts}


def record(rows: list[dict[str, Any]], finished: str | None = "2026-01-02T00:00:00+00:00") -> dict[str, Any]:
    versions = {"pahq": "1", "torch": "2"}
    facts = {
        "name": ODD,
        "command": f"pahq sweep '{ODD}'",
        "versions": versions,
        "started": "2026-01-01T00:00:00+00:00",
    }
    return {**facts, "finished": finished, "counts": counted(rows), "runs": rows}


ROWS = [
    row("a", edges=1000, recovered_test=0.5, total_seconds=90.0, host_bytes=2**30),
    row("b", edges=20, recovered_test=-0.25, threshold=None, edges_asked=20, method="eap", model=ODD),
    row("c", "failed", reason=ODD, viewer=None),
    row("d?%#1", edges=300, recovered_test=1.25, task="greaterthan"),
    row("e", "waiting"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("downloads")) as made:
        yield made


@pytest.fixture
def shown(driver: Any, tmp_path: Path) -> Any:
    """The driver with the page open; at the end the console must be empty."""
    (tmp_path / "index.html").write_bytes(page(record(ROWS), "now"))
    driver.get((tmp_path / "index.html").as_uri())
    yield driver
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.images.length") == 0


def seen(driver: Any) -> list[str]:
    """Names of the runs in sight, from top to bottom."""
    return driver.execute_script(
        "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.id)"
    )


def click(driver: Any, what: str) -> None:
    driver.execute_script(f"document.querySelector({what!r}).click()")


@pytest.mark.browser
def test_odd_text_stays_text(shown: Any) -> None:
    text = shown.execute_script("return document.body.innerText")
    assert text.count("</script><img src=x onerror=document.title='hit'>&amp;") == 4  # name, command, model, reason
    assert shown.title.startswith("Sweep: </script>")
    assert shown.title != "hit"
    links = shown.execute_script("return [...document.querySelectorAll('tbody a')].map(a => a.getAttribute('href'))")
    assert [unquote(link) for link in links] == [
        "a/viewer.html", "a.log", "b/viewer.html", "b.log", "c.log", "d?%#1/viewer.html", "d?%#1.log",
    ]  # fmt: skip
    assert shown.execute_script("return new URL(document.getElementById('d?%#1').querySelector('a').href).search") == ""


@pytest.mark.browser
def test_columns_sort_by_value_and_what_is_unknown_comes_last(shown: Any) -> None:
    names = [line["run"] for line in ROWS]
    assert seen(shown) == names
    for key, order in (("edges", "b d?%#1 a c e"), ("recovered_test", "b a d?%#1 c e"), ("state", "a b d?%#1 c e")):
        click(shown, f"th[data-key={key}] button")
        assert seen(shown) == order.split(), key
        assert shown.execute_script(f"return document.querySelector('th[data-key={key}]').ariaSort") == "ascending"
    click(shown, "th[data-key=edges] button")
    click(shown, "th[data-key=edges] button")
    assert seen(shown) == ["a", "d?%#1", "b", "c", "e"]


@pytest.mark.browser
def test_runs_are_found_and_a_reload_keeps_the_view(shown: Any) -> None:
    shown.execute_script(
        "const box = document.querySelector('#search'); box.value = 'EAP ioi'; box.dispatchEvent(new Event('input'))"
    )
    assert seen(shown) == ["b"]
    shown.refresh()
    assert seen(shown) == ["b"]
    shown.execute_script(
        "const box = document.querySelector('#search'); box.value = ''; box.dispatchEvent(new Event('input'))"
    )
    click(shown, "button[data-state=failed]")
    assert seen(shown) == ["c"]
    click(shown, "button[data-state=failed]")
    assert len(seen(shown)) == len(ROWS)
    shown.execute_script(
        "const box = document.querySelector('#search'); box.value = 'nothing'; box.dispatchEvent(new Event('input'))"
    )
    assert "no run matches" in shown.execute_script("return document.body.innerText")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 420])
def test_it_fits_wide_and_narrow_screens(shown: Any, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert shown.execute_script("return document.documentElement.scrollWidth") <= width
    visible = shown.execute_script("return getComputedStyle(document.querySelector('#order')).display")
    assert (visible != "none") == (width == 420)
    if width == 420:
        shown.execute_script(
            "const list = document.querySelector('#order select'); list.value = 'edges';"
            "list.dispatchEvent(new Event('change'))"
        )
        assert seen(shown)[0] == "b"
    shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_the_page_of_a_sweep_that_goes_on_loads_itself_anew(
    driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pahq.sweeps.page.RELOAD", 0.2)
    file = tmp_path / "index.html"
    file.write_bytes(page(record(ROWS[4:], None), "now"))
    driver.get(file.as_uri())
    assert "1 waiting" in driver.execute_script("return document.body.innerText")
    file.write_bytes(page(record(ROWS[:1]), "later"))
    until(lambda: "1 done" in driver.execute_script("return document.body.innerText"))
    assert driver.execute_script("return document.documentElement.dataset.reload") is None


def test_the_page_needs_nothing_else() -> None:
    text = page(record(ROWS), "now").decode()
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<script>") == 1
    assert "default-src 'none'" in text
