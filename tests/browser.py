"""A headless Chromium, controlled over a pipe by the protocol of its developer tools: real
mouse and key events, screenshots, and what the page asks the network for."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37,
        "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium():
    """The path of a Chromium. Skips the test where there is none."""
    for path in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path  # and not a stub that only says where to get it
    pytest.skip("no Chromium is installed: apt-get install chromium")


class Browser:
    """One page of it. `asked` holds the addresses that the page asked for, `problems` what went
    wrong in its scripts."""

    def __init__(self, process, to, back):
        self.process = process
        self.to = to
        self.back = back
        self.numbers = itertools.count(1)
        self.unread = b""
        self.asked = []
        self.problems = []

        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method, **params):
        """Asks for something and returns the answer, a dict."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if not method.startswith("Target."):
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def read(self, seconds=60):
        """The next message, within so many seconds."""
        end = time.monotonic() + seconds
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.back], [], [], max(0, end - time.monotonic()))
            assert ready, f"Chromium said nothing for {seconds} s"
            piece = os.read(self.back, 1 << 20)
            assert piece, "Chromium has gone"
            self.unread += piece
        message, _, self.unread = self.unread.partition(b"\0")
        message = json.loads(message)

        # What the tests ask for afterwards
        if message.get("method") == "Network.requestWillBeSent":
            self.asked.append(message["params"]["request"]["url"])
        logged = message.get("params", {}).get("entry", {}).get("level") == "error"
        if logged or message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(message["params"])
        return message

    def open(self, path):
        """Opens a file and waits until it is there."""
        self.send("Page.navigate", url=path.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def run(self, expression):
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def size(self, width, height):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def scheme(self, name):
        """"light" or "dark", as the reader's system prefers it."""
        self.send("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": name}])
        self.run("new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")

    def place(self, selector, at=None):
        """[x, y] in the window of the middle of an element, or of the point `at` in it, in pixels;
        the element is scrolled into sight."""
        left, top, width, height = self.run(
            f"(() => {{ const box = document.querySelector({selector!r});"
            "box.scrollIntoView({block: 'nearest'}); const r = box.getBoundingClientRect();"
            "return [r.x, r.y, r.width, r.height] })()")
        x, y = at or (width / 2, height / 2)
        return left + x, top + y

    def mouse(self, selector, click=False, at=None):
        """Moves the mouse to the middle of an element, or to the point `at` in it."""
        x, y = self.place(selector, at)
        kinds = ("mouseMoved", "mousePressed", "mouseReleased")[: 3 if click else 1]
        for kind in kinds:
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=1,
                      button="none" if kind == "mouseMoved" else "left")

    def tap(self, selector, at=None):
        """Taps an element with a finger, in its middle or at the point `at` in it."""
        x, y = self.place(selector, at)
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.run("new Promise(d => requestAnimationFrame(() => requestAnimationFrame(d)))")

    def key(self, *names, shift=False):
        """Presses keys, one after another."""
        typed = {"Enter": "\r", " ": " "}  # the text of those keys that have one
        modifiers = 8 if shift else 0
        for name in names:
            text = {"text": typed[name]} if name in typed else {}
            key = {"key": name, "modifiers": modifiers, "windowsVirtualKeyCode": KEYS[name]}
            self.send("Input.dispatchKeyEvent", type="keyDown", **key, **text)
            self.send("Input.dispatchKeyEvent", type="keyUp", **key)

    def texts(self):
        """[contrast with what is behind it, font size, right edge] of each element with a text of
        its own; the last two in pixels."""
        return self.run("""(() => {
          const rgb = t => t.match(/[\\d.]+/g).map(Number);
          const behind = box => { const c = rgb(getComputedStyle(box).backgroundColor);
            return c.length == 4 && c[3] == 0 ? box.parentElement ? behind(box.parentElement)
              : [255, 255, 255] : c };
          const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
          const light = c => c.slice(0, 3).map(x => linear(x / 255))
            .reduce((sum, x, k) => sum + x * [.2126, .7152, .0722][k], 0);
          return [...document.querySelectorAll('body *:not(script):not(style):not(option)')]
            .filter(box => [...box.childNodes].some(c => c.nodeType == 3 && c.data.trim()))
            .map(box => { const style = getComputedStyle(box);
              const pair = [light(rgb(style.color)), light(behind(box))];
              return [(Math.max(...pair) + .05) / (Math.min(...pair) + .05),
                parseFloat(style.fontSize), box.getBoundingClientRect().right] })
          })()""")

    def cut_texts(self):
        """The texts that leave the window sideways, or a box around them that would cut them."""
        return self.run("""(() => {
          const cuts = box => { const style = getComputedStyle(box);
            return style.overflowX != 'visible' || /content|paint|strict/.test(style.contain) };
          const found = [];
          const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          while (walk.nextNode()) {
            const text = walk.currentNode;
            const range = document.createRange();
            range.selectNodeContents(text);
            const r = range.getBoundingClientRect();
            if (!text.data.trim() || !r.width) continue;
            let around = [0, innerWidth];
            for (let box = text.parentElement; box; box = box.parentElement)
              if (cuts(box)) {
                const b = box.getBoundingClientRect();
                around = [Math.max(around[0], b.left), Math.min(around[1], b.right)];
              }
            if (r.left < around[0] - 1 || r.right > around[1] + 1) found.push(text.data);
          }
          return found })()""")

    def canvas_texts(self, redraw):
        """[{id of the canvas, text, size of the font, the corners of its line, whether it is
        squeezed}] of all that the JavaScript expression `redraw` writes on canvases; in pixels."""
        return self.run("""(() => {
          const context = CanvasRenderingContext2D.prototype;
          const write = context.fillText;
          const found = [];
          context.fillText = function (text, x, y, ...room) {
            const width = this.measureText(text).width;
            const start = this.textAlign == 'right' ? x - width : x;
            const at = x => { const p = this.getTransform().transformPoint({ x, y });
              return [p.x, p.y] };
            found.push({ id: this.canvas.id, text, size: parseFloat(this.font),
              ends: [at(start), at(start + width)], squeezed: room.length > 0 });
            write.call(this, text, x, y, ...room);
          };
          """ + redraw + """;
          context.fillText = write;
          return found })()""")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser(profile):
    """A Browser, whose files lie in the folder `profile`. Skips the test where none is installed.
    """
    program = find_chromium()
    from_us, to = os.pipe()
    back, from_it = os.pipe()
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (from_us, from_it)]

    def set_descriptors():  # it reads from descriptor 3 and writes to 4
        os.dup2(ends[0], 3)
        os.dup2(ends[1], 4)

    process = subprocess.Popen(
        [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         "--disable-background-networking", f"--user-data-dir={profile}"],
        close_fds=False, preexec_fn=set_descriptors, stderr=subprocess.DEVNULL)
    for end in (*ends, from_us, from_it):
        os.close(end)
    try:
        yield Browser(process, to, back)
    finally:
        process.kill()
        process.wait()
        os.close(to)
        os.close(back)


def open_page(chromium, path):
    """The Browser with a page open, as a fixture's generator. Afterwards the page must have asked
    for nothing but itself, and its script must have had no problem."""
    chromium.asked.clear()
    chromium.problems.clear()
    chromium.size(1400, 1000)
    chromium.scheme("light")
    chromium.open(path)
    yield chromium
    assert chromium.problems == []
    assert chromium.asked == [path.as_uri()]


def text(chromium, selector):
    """The text of the first element of a page that a selector finds."""
    return chromium.run(f"document.querySelector({selector!r}).textContent")
