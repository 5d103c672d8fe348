"""The chat page in a real headless browser, driven over the DevTools protocol.

Needs chromium (Debian: apt-get install chromium).
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


class Tab:
    """One page of a headless browser."""

    def __init__(self, folder):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            f"--user-data-dir={folder}",
            "about:blank",
        ]
        self.process = subprocess.Popen([CHROMIUM, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        self.wait(lambda: port_file.exists() and port_file.read_text().strip(), "the browser's port")
        port = port_file.read_text().split()[0]
        pages = self.wait(
            lambda: [
                page
                for page in httpx.get(f"http://127.0.0.1:{port}/json", trust_env=False).json()
                if page["type"] == "page"
            ],
            "a page",
        )
        self.socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=30)
        self.numbers = itertools.count(1)

    def call(self, method: str, **params):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script: str):
        """The value of a script, a promise's included."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, ready, what: str):
        for _ in range(600):
            found = ready()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"waited 30 seconds for {what}")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def picture(self, path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def tab(tmp_path):
    opened = Tab(tmp_path / "browser")
    yield opened
    opened.close()


def test_an_image_and_a_question_are_answered_token_by_token_with_their_probabilities(running, tab, data_uri, tmp_path):
    tab.size(390, 780)
    tab.call("Page.navigate", url=running.url + "/")
    tab.wait(
        lambda: tab.run("document.readyState === 'complete' && document.getElementById('model')?.value") == "tiny",
        "the model's name",
    )
    uri = data_uri(5)
    tab.run(f"""(async () => {{
      const file = new File([await (await fetch({uri!r})).blob()], "a.png", {{ type: "image/png" }});
      const drop = new DataTransfer(); drop.items.add(file);
      window.dispatchEvent(new DragEvent("drop", {{ dataTransfer: drop, bubbles: true, cancelable: true }}));
    }})()""")
    tab.wait(lambda: tab.run("document.querySelectorAll('#images img').length") == 1, "the image")
    tab.run(
        "document.getElementById('limit').value = 12; document.getElementById('text').value = 'what is it'; "
        "document.getElementById('form').requestSubmit()"
    )
    tab.wait(lambda: "tokens/s" in (tab.run("document.querySelector('.figures')?.textContent") or ""), "the answer")

    expected = httpx.post(
        running.url + "/v1/chat/completions", timeout=60, trust_env=False,
        json={"model": "tiny", "temperature": 0, "max_tokens": 12, "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "what is it"}]}]},
    ).json()["choices"][0]["message"]["content"]  # fmt: skip
    shown = tab.run("[...document.querySelectorAll('.assistant .token')].map(token => token.textContent).join('')")
    assert shown.replace("\ufffd", "") == expected.replace("\ufffd", "")
    hovered = tab.run(
        "(() => { const token = document.querySelector('.token'); token.dispatchEvent(new "
        "MouseEvent('mouseover', { bubbles: true })); return document.getElementById('tip').textContent })()"
    )
    assert hovered.count("%") == 5 and len(hovered.splitlines()) == 5
    assert tab.run("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than a phone"
    assert tab.run("document.querySelectorAll('.user img').length") == 1

    light = tab.run("getComputedStyle(document.body).backgroundColor")
    tab.size(1100, 700, dark=True)
    assert tab.run("getComputedStyle(document.body).backgroundColor") != light
    if os.environ.get("MINDVL_KEEP_PICTURES"):
        folder = Path(os.environ["MINDVL_KEEP_PICTURES"])
        tab.picture(folder / "serve-dark.png")
        tab.size(390, 780)
        tab.picture(folder / "serve-phone.png")


def test_an_error_of_the_server_is_shown_and_the_next_question_is_answered(running, tab):
    tab.call("Page.navigate", url=running.url + "/")
    tab.wait(
        lambda: tab.run("document.readyState === 'complete' && document.getElementById('model')?.value") == "tiny",
        "the model's name",
    )
    ask = (
        "document.getElementById('limit').value = 4; document.getElementById('text').value = {}; "
        "document.getElementById('form').requestSubmit()"
    )
    tab.run(ask.format("'x'.repeat(5000)"))
    tab.wait(
        lambda: "the context holds 256" in (tab.run("document.querySelector('.error')?.textContent") or ""), "the error"
    )
    tab.run(ask.format("'hello'"))
    tab.wait(
        lambda: (
            tab.run("document.querySelectorAll('.figures').length") == 2
            and tab.run("document.querySelectorAll('.token').length") > 0
        ),
        "the second answer",
    )
