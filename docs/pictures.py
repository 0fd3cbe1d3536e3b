"""Makes the pictures of the documentation: ``python docs/pictures.py`` (some minutes; it needs Chromium and selenium).

The run is that of the quickstart, with its viewer as a browser shows it and the figures that ``pahq plot`` draws.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PICTURES = Path(__file__).resolve().parent / "pictures"
PAHQ = [sys.executable, "-c", "from pahq.cli.app import main; main()"]
RUN = ["--model", "smollm2-135m", "--task", "ioi", "--threshold", "0.5", "--n", "4"]
CHROMIUM = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb")
SELECTED = "a23.0"
"""The head whose paths, pattern and words the viewer's picture shows."""


def pahq(*words: object) -> None:
    """Runs a command of pahq; raises CalledProcessError if it fails."""
    subprocess.run([*PAHQ, *map(str, words)], check=True)


def browser(width: int, height: int) -> Any:
    """A selenium driver of headless Chromium."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit(
            "pictures: there is no Chromium with chromedriver; install both (Debian: chromium chromium-driver)"
        )
    options.binary_location = binary
    for option in (*CHROMIUM, f"--window-size={width},{height}"):
        options.add_argument(option)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def viewer(page: Path, picture: Path, selected: str | None = None) -> None:
    """A picture of a run's viewer, with a node chosen by its search as a reader would."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    driver = browser(1280, 1050)
    try:
        driver.get(page.as_uri())
        time.sleep(2)
        if selected is not None:
            driver.find_element(By.ID, "search").send_keys(selected, Keys.ENTER)
            time.sleep(1.5)
        driver.save_screenshot(str(picture))
    finally:
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=Path, help="folder in which the runs lie, or are kept (default: a temporary one)"
    )
    given = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        runs = Path(temporary) if given is None else given
        pahq("discover", *RUN, "--out", runs / "ioi")
        pahq("view", runs / "ioi")
        PICTURES.mkdir(exist_ok=True)
        viewer((runs / "ioi" / "viewer.html").resolve(), PICTURES / "viewer.png", SELECTED)
        for kind, width in (("graph", 5), ("timeline", 5)):
            pahq("plot", kind, runs / "ioi", "--out", PICTURES / f"{kind}.png", "--width", width)
            (PICTURES / f"{kind}.csv").unlink()
        for picture in PICTURES.glob("*.png"):
            print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
