"""A page in a headless Chromium, driven by the browser's own protocol over two pipes."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
LIMIT = 60  # seconds for anything to be shown


class Page:
    """A page that is open in a window."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._number = commands, answers, 0
        self._left, self._session, self._events = b"", None, list[dict[str, Any]]()

    def open(self, url: str, width: int, height: int) -> None:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command; return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self._events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            received = os.read(self._answers, 2**16)
            assert received, "Chromium has ended"
            self._left += received
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        limit = time.monotonic() + LIMIT
        while not self.value(condition):
            assert time.monotonic() < limit, (condition, self.value("document.body.innerText"), self.complaints())
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        self.value(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field by keys."""
        self.value(f"for (const act of ['focus', 'select']) document.querySelector({json.dumps(selector)})[act]()")
        self.ask("Input.insertText", text=text)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file as its dialog would."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def complaints(self) -> list[str]:
        """Return what the browser has refused or could not load, and exceptions, but answers with a status of 400."""
        said = [event["params"] for event in self._events if event.get("method") == "Log.entryAdded"]
        texts = [each["entry"]["text"] for each in said if "status of 400" not in each["entry"]["text"]]
        thrown = [event["params"] for event in self._events if event.get("method") == "Runtime.exceptionThrown"]
        return [*texts, *(str(each["exceptionDetails"]) for each in thrown)]


@contextmanager
def chromium_page(url: str, width: int, height: int) -> Iterator[Page]:
    """Open a page in a window of a size, in pixels; skip the test where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine")
    (read, commands), (answers, write) = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        shell = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        words = ["bash", "-c", shell, program, *OPTIONS, f"--user-data-dir={profile}"]
        process = subprocess.Popen(words, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        try:
            page = Page(commands, answers)
            page.open(url, width, height)
            yield page
        finally:
            os.close(commands)
            process.terminate()
            process.wait(30)
            os.close(answers)
