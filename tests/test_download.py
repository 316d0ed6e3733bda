"""Downloads from servers on this machine: bad answers, good ones, mirrors; who loads requests.

That files are continued, checked and named at the end is shown in test_pretrained.py, with a hub.
"""

import contextlib
import hashlib
import http.server
import io
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import download
from download import BadAnswer, download_verified, fetch_into
from utils import NoNetwork, UserError

GOOD = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 2000  # several pieces
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()
LARGEST = 10**7
REMEDY = "do something else"


def test_a_program_that_downloads_nothing_does_not_load_requests():
    program = "import sys, generate; print('requests' in sys.modules)"
    root = Path(download.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True,
                          check=True)
    assert done.stdout == "False\n"


# One answer


@contextlib.contextmanager
def answering(answer):
    """The address of a server that gives one answer to all who ask, and the list of what they
    asked, as long as it is open."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        asked.append(connection.recv(1 << 16))
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/x", asked


def http_answer(status, body=b"", **headers):
    lines = [f"HTTP/1.1 {status}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


GONE_ON = {"Content_Range": "bytes 3-5/6", "Content_Length": 3}
BAD_ANSWERS = {  # what comes, after how many bytes that are there already
    "encoded": (http_answer("200 OK", b"abc", Content_Encoding="gzip", Content_Length=3), 0),
    "a part of what was asked for as a whole": (http_answer("206 P", b"def", **GONE_ON), 0),
    "another part": (http_answer("206 P", b"def", **GONE_ON), 2),
    "a part of nothing": (http_answer("206 P", b"def", Content_Length=3), 3),
    "a part that is none": (http_answer("206 P", b"def", Content_Range="bytes x", a=1), 3),
    "no content": (http_answer("204 No Content"), 0),
    "multiple choices": (http_answer("300 Multiple Choices", b"abc"), 0),
    "always beyond the end": (http_answer("416 Beyond", Content_Range="bytes */6"), 3),
    "not found": (http_answer("404 Not Found", b"abc"), 0),
    "a length that is no number": (http_answer("200 OK", b"abc", Content_Length="many"), 0),
    "a negative length": (http_answer("200 OK", b"abc", Content_Length=-5), 0),
    "a length of other digits": (http_answer("200 OK", b"abc", Content_Length="\u00b2"), 0),
    "a length beyond all numbers": (http_answer("200 OK", b"abc", Content_Length="9" * 5000), 0),
    "more than the most": (http_answer("200 OK", b"", Content_Length=1001), 0),
    "more than the most without a length": (http_answer("200 OK", b"a" * 1001), 0),
    "less than was said": (http_answer("200 OK", b"abc", Content_Length=6), 0),
    "a chunk that is none": (http_answer("200 OK", b"zz\r\n", Transfer_Encoding="chunked"), 0),
    "no HTTP": (b"\xff\xfe once upon a time\r\n\r\n", 0),
    "nothing": (b"", 0),
    "too many headers": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 0),
    "elsewhere for ever": (http_answer("302 Found", Location="/x", Content_Length=0), 0),
    "nowhere": (http_answer("302 Found", Location="http://[", Content_Length=0), 0),
    "elsewhere, not by HTTP": (http_answer("302 Found", Location="file:///etc/passwd"), 0),
}


def test_an_answer_that_cannot_be_the_requested_file_is_a_bad_answer(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for case, (answer, n_there) in BAD_ANSWERS.items():
        file = io.BytesIO(b"x" * n_there)
        with answering(answer) as (address, asked):
            try:
                fetch_into(file, address, largest=1000)
            except BadAnswer as error:
                assert "\n" not in str(error), case
            else:
                raise AssertionError(f"{case}: taken for a file")
        assert len(asked) <= 1 + download.MOST_REDIRECTS, f"{case}: asked {len(asked)} times"
    with answering(http_answer("416 Beyond")) as (address, asked):
        with pytest.raises(BadAnswer, match="HTTPError"):
            fetch_into(io.BytesIO(b"abc"), address)
        assert len(asked) == 2


def test_a_good_answer_is_taken_with_a_length_or_without_and_after_a_part(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    chunks = b"3\r\nabc\r\n3\r\ndef\r\n0\r\n\r\n"
    for answer, there in [
        (http_answer("200 OK", b"abcdef", Content_Length=6), b""),
        (http_answer("200 OK", b"abcdef"), b""), (http_answer("200 OK", b"abcdef"), b"xyz"),
        (http_answer("200 OK", chunks, Transfer_Encoding="chunked"), b""),
        (http_answer("206 Partial", b"def", **GONE_ON), b"abc"),
        (http_answer("200 OK", b"abcdef", Content_Encoding="identity"), b""),
    ]:
        file = io.BytesIO(there)
        with answering(answer) as (address, _):
            fetch_into(file, address, largest=6)
        assert file.getvalue() == b"abcdef", answer


def test_a_very_slow_download_is_given_up(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "SLOW_SECONDS", 0)
    monkeypatch.setattr(download, "SLOWEST_DOWNLOAD", 1e12)
    with answering(http_answer("200 OK", b"abcdef", Content_Length=6)) as (address, _):
        with pytest.raises(BadAnswer, match="per second"):
            fetch_into(io.BytesIO(), address)


# Mirrors


class Mirror(http.server.BaseHTTPRequestHandler):
    """Answers each address with the next of its server's answers: (status, body, stated length)."""

    def do_GET(self):
        self.server.requested.append(self.path)
        answers = self.server.answers[self.path]
        status, body, length = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def mirror():
    """A server on this machine with good and bad addresses, as long as it is open."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.requested = []
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.answers = {"/good": [(200, GOOD, None)], "/wrong": [(200, b"not it", None)],
                      "/missing": [(404, b"not here", None)], "/cut": [(200, GOOD, 10**6)],
                      "/busy": [(503, b"later", None), (200, GOOD, None)]}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(monkeypatch):
    """A mirror; requests go there directly."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with mirror() as server:
        yield server


def nobody():
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/nothing"


def fetch_from(server, *paths):
    mirrors = [nobody() if path == "nobody" else server.url + path for path in paths]
    return download_verified(mirrors, GOOD_SHA256, REMEDY, LARGEST, pause=0)


@pytest.mark.parametrize(("paths", "requested"), [
    (["/good", "/wrong"], ["/good"]),
    (["/missing", "/good"], ["/missing", "/good"]),
    (["/wrong", "/good"], ["/wrong", "/good"]),
    (["/cut", "/good"], ["/cut", "/good"]),
    (["nobody", "/good"], ["/good"]),
    (["/busy"], ["/busy", "/busy"]),
], ids=["good", "missing", "wrong", "cut", "nobody", "busy"])
def test_the_first_mirror_with_the_right_content_is_taken(server, paths, requested):
    assert fetch_from(server, *paths) == GOOD
    assert server.requested == requested


def test_wrong_content_everywhere_is_refused_and_is_not_a_missing_network(server):
    for paths in (["/wrong"], ["/wrong", "nobody"], ["/missing", "/wrong"]):
        with pytest.raises(UserError) as caught:
            fetch_from(server, *paths)
        message = str(caught.value)
        assert "/wrong sent 6 bytes" in message and REMEDY in message, paths
        assert not isinstance(caught.value, NoNetwork), paths


def test_no_content_anywhere_is_a_missing_network(server):
    for paths in (["nobody"], ["nobody", "/missing"], ["/cut"]):
        with pytest.raises(NoNetwork, match=f"{len(paths)} mirrors .*; {REMEDY}"):
            fetch_from(server, *paths)


def test_a_mirror_is_tried_again_after_a_pause(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    mirrors = [server.url + "/busy"]
    assert download_verified(mirrors, GOOD_SHA256, REMEDY, LARGEST, pause=3.0) == GOOD
    assert [pause for pause in pauses if pause] == [3.0]


def test_content_that_is_too_large_is_not_taken_from_a_mirror(server):
    with pytest.raises(NoNetwork, match="bytes are more than"):
        download_verified([server.url + "/good"], GOOD_SHA256, REMEDY, len(GOOD) - 1, pause=0)
    assert fetch_from(server, "/good") == GOOD
