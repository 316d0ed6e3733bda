"""Downloads: small content from several mirrors, or a large file, continued where it stopped.

No other module uses requests. It takes a quarter of the time to load that all of ours take, and few
programs download anything; so it is imported when the first request is made.

Nothing is taken on trust: a server may send an error page with status 200, a part of the file, more
than was asked for, or another file. What arrives gets its name when it has been checked.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: utils.py
Next: formats.py
Source: RFC 9110 (HTTP: ranges, redirects, entity tags); git's names of blobs
"""

import hashlib
import http
import io
import os
import re
import time
import urllib.parse

from utils import NoNetwork, NotThere, Progress, UserError, locked, printable

SLOWEST_DOWNLOAD = 1000  # bytes per second, on average since the start
SLOW_SECONDS = 60  # a download is not called too slow before this many seconds
MOST_REDIRECTS = 10  # followed for one file
NOT_THERE = (401, 403, 404)  # a server's answers for a file that it lacks, or does not show us


class BadAnswer(Exception):
    """No answer of a server, or one that cannot be the requested file; the message says why.

    response: what requests returned, if it was an answer with a status; else None.
    """

    def __init__(self, why, response=None):
        super().__init__(why)
        self.response = response


# Small content, from several mirrors


def download_verified(mirrors, sha256, remedy, largest, *, attempts=2, pause=1.0):
    """Downloads content with a given SHA-256 from the first mirror that has it; returns its bytes.

    Each mirror is tried `attempts` times, `pause` seconds apart. remedy: what the user can do, for
    the error. largest: the most bytes accepted. Raises UserError if only wrong content arrived,
    NoNetwork if nothing did.
    """
    wrong = None
    failure = None
    for attempt in range(attempts):
        time.sleep(pause if attempt else 0)
        for address in mirrors:
            file = io.BytesIO()
            try:
                fetch_into(file, address, largest)
            except BadAnswer as error:
                failure = error
                continue

            content = file.getvalue()
            found = hashlib.sha256(content).hexdigest()
            if found == sha256:
                return content
            wrong = f"{address} sent {len(content):,} bytes with SHA-256 {found[:12]}…"

    if wrong:
        raise UserError(f"{wrong}, expected {sha256[:12]}…; {remedy}")
    raise NoNetwork(f"no network: {len(mirrors)} mirrors did not answer ({failure}); {remedy}")


# A file, which may be large


def download_file(address, path, largest, what_is_wrong, *, sha256=None, attempts=3):
    """Downloads a file to `path`, continuing an earlier attempt that stopped.

    The file gets its name only when it is complete, matches the server's checksum and the published
    one, and has the right content. Until then it is called NAME.part.
    largest: the most bytes accepted. what_is_wrong: a function that looks at NAME.part and says in
    words what is wrong with the content, or returns None. sha256: the published one, if known.
    Raises NoNetwork, NotThere, or UserError if the file is wrong, if another process is downloading
    it, or if it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    lock = path.with_name(path.name + ".lock")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock, f"another process is downloading {path}; wait until it ends"):
            response = fetch_with_patience(part, address, largest, attempts)
            problem = wrong_checksum(part, response, sha256) or what_is_wrong(part)
            if problem:
                part.unlink()
                raise UserError(f"the file from {address} {problem}; try again, or put the "
                                f"right file at {path}")
            os.replace(part, path)

    except BadAnswer as error:
        if is_not_there(error):
            if not part.stat().st_size:
                part.unlink()
            raise NotThere(f"{address} is not there, or not public") from None
        raise NoNetwork(f"no network: {address} did not answer ({printable(error)}); the part "
                        "received is kept; try again to continue, or put the file at "
                        f"{path}") from None
    except OSError as error:
        raise UserError(f"cannot write {part}: {error.strerror}; make room or choose another "
                        "--cache_dir") from None


def fetch_with_patience(part, address, largest, attempts):
    """Downloads into a file at that path, retrying when it stops. Returns the response."""
    while True:
        attempts -= 1
        try:
            with open(part, "ab") as file:
                return fetch_into(file, address, largest)
        except BadAnswer as error:
            if attempts == 0 or is_not_there(error):
                raise


def is_not_there(error):
    """Whether a BadAnswer says that the server has no such file for us.

    An answer after a redirect does not count: the first server has the file, and keeps its content
    elsewhere.
    """
    response = error.response
    return response is not None and response.status_code in NOT_THERE and not response.history


def wrong_checksum(path, response, sha256):
    """What is wrong with the checksum of a downloaded file, in words; None if it is right.

    sha256: the published one, or None if it is not known.
    """
    if not content_matches(path, response):
        return "does not match its checksum"
    if sha256 is not None and file_digest(path, hashlib.sha256()) != sha256:
        return f"is not the published one, whose SHA-256 is {sha256}"
    return None


def content_matches(path, response):
    """Whether a file has the checksum that its server gives; True if it gives none.

    Hugging Face's hub gives one. Its first response, before it redirects to the storage of large
    files, has the checksum as its tag. This is the SHA-256 of a large file; for a small one it is
    git's SHA-1 of "blob", its length and its content.
    """
    first_answer = (*response.history, response)[0].headers
    tag = first_answer.get("X-Linked-ETag", first_answer.get("ETag", ""))
    checksum = tag.removeprefix("W/").strip('"')
    algorithm = {64: "sha256", 40: "sha1"}.get(len(checksum))
    if algorithm is None:
        return True

    digest = hashlib.new(algorithm)
    if algorithm == "sha1":
        digest.update(b"blob %d\0" % path.stat().st_size)
    return file_digest(path, digest) == checksum


def file_digest(path, digest):
    """A file's content added to a digest of hashlib, as hexadecimal digits."""
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# One request


def fetch_into(file, address, largest=1 << 34):
    """Downloads a file and appends it to an open binary file, continuing at that file's end.

    A server that cannot continue in the middle sends the whole file, and ours is emptied first.
    largest: the most bytes accepted. Returns the response, for its headers. Raises BadAnswer; the
    bytes received so far stay.
    """
    import requests  # only here and below: see the top of this page

    try:
        response = request_rest(file, address)
        if response.status_code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            response.close()
            file.seek(0)  # our file is not shorter than the server's: start again, once
            file.truncate()
            response = request_rest(file, address)
        with response:
            receive(file, response, largest)
    except requests.RequestException as error:
        raise BadAnswer(type(error).__name__, error.response) from None
    except (requests.exceptions.BaseHTTPError, ValueError) as error:
        # errors of the libraries below requests, which it lets through
        raise BadAnswer(f"a broken answer, {type(error).__name__}") from None
    return response


def request_rest(file, address):
    """Requests a file from the end of an open one onwards. Returns the response, unread."""
    import requests

    start = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    passed_on = []
    for _ in range(MOST_REDIRECTS + 1):
        response = requests.get(address, stream=True, timeout=(5, 30), headers=headers,
                                allow_redirects=False)
        if not response.is_redirect:
            response.history = passed_on
            return response
        # requests itself would read a redirect's body, whatever its size
        response.close()
        passed_on.append(response)
        address = urllib.parse.urljoin(address, response.headers["Location"])
    raise BadAnswer(f"it redirects more than {MOST_REDIRECTS} times")


def receive(file, response, largest):
    """Writes a response's content to an open file: to its end, or to its start if it is whole."""
    # Does the server continue after our last byte, or send the whole file?
    response.raise_for_status()
    start = file.seek(0, os.SEEK_END)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise BadAnswer(f"the content is encoded as {printable(encoding)}, which was not requested")
    if response.status_code == http.HTTPStatus.PARTIAL_CONTENT:
        said = response.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|[*])", said.strip())
        if not start or not found or int(found[1]) != start:
            raise BadAnswer(f"it continues with {printable(said)!r} after {start:,} bytes")
    elif response.status_code == http.HTTPStatus.OK:
        start = file.seek(0)
        file.truncate()
    else:
        raise BadAnswer(f"the status is {response.status_code}")

    # How many bytes are still to come?
    length = response.headers.get("Content-Length", "0").strip()
    if not re.fullmatch("[0-9]{1,18}", length):
        raise BadAnswer(f"the length is {printable(length)!r}")
    n_bytes = start + int(length)
    if n_bytes > largest:
        file.seek(0)
        file.truncate()
        raise BadAnswer(f"{n_bytes:,} bytes are more than {largest:,}")

    progress = Progress(n_bytes, " bytes", start)
    host = printable(response.request.url.split("/")[2])
    began = time.monotonic()
    while piece := response.raw.read1(1 << 16):
        file.write(piece)
        n_there = file.tell()
        seconds = time.monotonic() - began
        if n_there > largest:
            file.seek(0)
            file.truncate()
            raise BadAnswer(f"it sent more than {largest:,} bytes")
        if seconds > SLOW_SECONDS and n_there - start < SLOWEST_DOWNLOAD * seconds:
            raise BadAnswer(f"it sent less than {SLOWEST_DOWNLOAD:,} bytes per second")
        progress.show(n_there, f"from {host}")
    progress.close()
    if n_bytes > start and file.tell() != n_bytes:
        raise BadAnswer(f"it sent {file.tell():,} of {n_bytes:,} bytes")
