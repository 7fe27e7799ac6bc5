"""A headless Chromium, told what to do by its DevTools protocol over a pipe: no driver, and no package of ours.

https://chromedevtools.github.io/devtools-protocol: commands and events are JSON objects, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.apt import find, install

OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "about:blank"),
)
TOO_WIDE = """
[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest('{but}')
  && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.outerHTML.slice(0, 100))
"""
"""Elements that reach beyond the right edge."""
SCROLLING = ".scroll, svg, pre"
PATIENCE = 120.0
"""Seconds until it must have answered."""


class Page:
    """A tab. `requests` and `messages` (of the console, errors included) are those since it was opened."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self._loaded = 0
        self.requests: list[str] = []
        self.messages: list[str] = []
        self._session: str | None = None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._count += 1
        number = self._count
        content = {"id": number, "method": method, "params": parameters}
        content |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(content).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, file: Path, width: int, dark: bool = False, media: str = "screen", script: bool = True) -> None:
        """Load a file at a width, and wait until it is there."""
        self.tell("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.tell("Emulation.setScriptExecutionDisabled", value=not script)
        before = self._loaded
        self.tell("Page.navigate", url=file.as_uri())
        while self._loaded == before:  # the event may come before the answer
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """A picture of the whole page."""
        found = self.tell("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def print(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self.tell("Page.printToPDF", preferCSSPageSize=True)["data"])

    def _next(self) -> dict[str, Any]:
        """The next answer or event; events are noted."""
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], PATIENCE)[0], "the browser does not answer"
            received = os.read(self._answers, 1 << 20)
            assert received, "the browser has closed the pipe"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method: str | None, event: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(event["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.messages.append(str(event["args"]))
        elif method == "Log.entryAdded":
            self.messages.append(event["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A page of a Chromium of its own, which is installed with apt if it is missing.

    Args:
        profile: folder that Chromium may fill.

    Raises:
        Unavailable: there is none and it cannot be installed.
    """
    install("Chromium", ["chromium"], ["chromium"])
    program = find("chromium")
    assert program is not None
    (for_commands, commands), (answers, for_answers) = os.pipe(), os.pipe()
    # The pipe's ends have to be 3 and 4 in the browser.
    shell = f'exec "$@" 3<&{for_commands} 4>&{for_answers}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "chromium", program, f"--user-data-dir={profile}", *OPTIONS],
        pass_fds=(for_commands, for_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(for_commands)
    os.close(for_answers)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)  # it ends when nobody can tell it anything
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(answers)


def check_page(page: Page, file: Path) -> None:
    """A page fits its window in every form, asks for nothing but itself, and has nothing to complain of."""
    for width in (1280, 390):
        for dark in (False, True):
            page.open(file, width, dark)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, dark)
            assert page.evaluate(TOO_WIDE.format(but=SCROLLING)) == [], (width, dark)
    page.open(file, 1280, script=False)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.open(file, 1045, media="print")  # A4 across, less its margins
    assert page.evaluate(TOO_WIDE.format(but="svg")) == [], "paper does not scroll"
    assert page.print().startswith(b"%PDF")
    assert {url for url in page.requests if not url.startswith("data:")} == {file.as_uri()}
    assert page.messages == []
