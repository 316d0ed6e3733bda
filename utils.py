"""What every program needs and no lesson is about: errors, seeds, devices, ranks, files, progress.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence: the same seed gives the same bits)
Prerequisites: nothing
Next: config.py
Source: torch's notes on reproducibility
"""

import codecs
import contextlib
import difflib
import hashlib
import importlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import requests
import torch


class UserError(ValueError):
    """Something that the caller can mend; the message is one line: what, the values, the remedy."""


class NoNetwork(UserError):
    """What was asked for is elsewhere, and could not be reached."""


class RankLost(UserError):
    """Another process of the same run is gone, and this one can't go on alone."""


def suggest_closest(name, known):
    """`"; the closest are a, b"` for a misspelt name, or an empty string if nothing is near.

    Names are compared in full and by their last part, so that `hook_patern` finds
    `blocks.0.attn.hook_pattern`.
    """
    near = difflib.get_close_matches(name, known := list(known))
    if not near:
        tails = difflib.get_close_matches(name.split(".")[-1], {k.split(".")[-1] for k in known})
        near = [next(k for k in known if k.split(".")[-1] == tail) for tail in tails]
    return f"; the closest: {', '.join(near)}" if near else ""


def check_choice(name, value, choices):
    """The value, if it is one of the choices. Raises UserError listing them for any other."""
    if value not in list(choices):
        raise UserError(f"{name}={value!r} is unknown; choose from: {', '.join(map(str, choices))}")
    return value


def seeded_generator(seed):
    """A fresh CPU `torch.Generator`; all randomness goes through one, so every run can be repeated.

    Drawn on the CPU, the same numbers come out whatever device the model lives on.
    """
    return torch.Generator().manual_seed(seed)


def pick_device(name):
    """The `torch.device` for "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1" or "mps".

    Of the processes that torchrun started, each gets a GPU of its own; MPS can't be shared.
    Raises UserError where that device is not there.
    """
    n_cuda, number = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
    mps = torch.backends.mps.is_available() and number is None
    there = ["cuda"] * (n_cuda > 0) + ["mps"] * mps + ["cpu"]
    if name == "auto":
        name = there[0]
    if name == "cuda" and number is not None:
        name = f"cuda:{number}"
    there += [f"cuda:{index}" for index in range(n_cuda)]
    if name not in there:
        raise UserError(f"device={name} is not on this machine; choose auto, {', '.join(there)}")
    return torch.device(name)


def rank():
    """Which of the processes that torchrun started together this is; 0 where it is alone."""
    return int(os.environ.get("RANK", 0))


def n_ranks():
    """How many processes `joined_ranks` has joined; 1 outside of it."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


@contextlib.contextmanager
def joined_ranks(device):
    """Yields the `torch.device` of that name. While open, the processes that torchrun started can
    average. Raises RankLost where one of the others is gone."""
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Were it imported later, as by DistributedDataParallel, its functions' defaults would hold the
    # group, and threads that take Python's lock while it ends: "terminate called", now and then.
    importlib.import_module("torch.distributed.nn")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, where one is gone: we say so
    try:
        torch.distributed.barrier()  # whoever gives up now is missed in a place that expects it
        yield device
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        raise RankLost("another rank of this run has stopped; go on with --resume from the last "
                       "checkpoint that was written, which is whole") from None
    finally:
        torch.distributed.destroy_process_group()


def mean_over_ranks(number):
    """The mean of a number over all ranks, the same bits on each; itself where there is one."""
    if n_ranks() == 1:
        return number
    where = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(number, dtype=torch.float64, device=where)
    torch.distributed.all_reduce(total)
    return total.item() / n_ranks()


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yields a file whose content replaces `path` only once it is whole and on the disk.

    A crash, a full disk or a Ctrl-C leaves the old file as it was. Raises UserError if the place
    cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another folder or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # gone already where all went well


def write_json(path, values):
    """Writes plain values as readable JSON, whole or not at all."""
    with atomic_write(path, "w") as file:
        json.dump(values, file, indent=1)
        file.write("\n")


def read_json(path):
    """The object in a JSON file. Raises UserError where there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); mend it or download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; mend it or download it again")
    return values


def read_text(path):
    """A UTF-8 file's text. Raises UserError where it is missing, empty, or something else."""
    text = "".join(text_pieces([path]))
    if not text:
        raise UserError(f"{path} is empty; give a file with text in it")
    return text


def text_pieces(paths, size=1 << 18, what=None):
    """Yields the text of UTF-8 files, one after another, `size` bytes at a time; with a progress
    line that says `what` is done. Raises UserError where one can't be read, or is something else.
    """
    try:
        progress, done = Progress(sum(map(os.path.getsize, paths)), " bytes"), 0
        for path in paths:
            decoder, begin = codecs.getincrementaldecoder("utf-8")(), done
            with open(path, "rb") as file:
                while piece := file.read(size):
                    done += len(piece)
                    yield decoder.decode(piece)
                    if what:
                        progress.show(done, what)
                decoder.decode(b"", final=True)  # raises where the last character is cut off
        progress.close()
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        position = done - begin - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8 (byte {position} is "
                        f"{error.object[error.start]:#04x}); save it as UTF-8 first") from None


class Progress:
    """One line on stderr: rewritten in place on a terminal, repeated every ten seconds in a log."""

    def __init__(self, total, unit="", done=0):
        self.total, self.unit, self.first = total, unit, done
        self.start = self.last = time.monotonic()
        self.width = 0

    def show(self, done, text=""):
        """Shows how much of the total is done, `text`, and the time left at this pace."""
        if rank():
            return
        now = time.monotonic()
        on_terminal = sys.stderr.isatty()
        finished = 0 < self.total <= done
        if now - self.last < (0.1 if on_terminal else 10) and not finished:
            return
        self.last = now
        line = f"{done:,}{self.unit}  {text}"
        if self.total:
            left = (now - self.start) / max(done - self.first, 1) * (self.total - done)
            line = f"{done:,}/{self.total:,}{self.unit}  {text}  {left:.0f} s left"
        begin, end = ("\r", "") if on_terminal else ("", "\n")
        print(begin + line.ljust(self.width), end=end, file=sys.stderr, flush=True)
        self.width = len(line) if on_terminal else 0

    def close(self):
        """Leaves the line, so that what follows starts on a new one."""
        if sys.stderr.isatty() and self.width:
            print(file=sys.stderr, flush=True)


def fetch_into(file, address):
    """Appends what lies at an address to an open binary file, from where the file ends.

    A server that can't go on in the middle sends all of it, and the file is emptied first. Returns
    the response, for its headers. Raises requests.RequestException; what came by then stays.
    """
    start = file.seek(0, os.SEEK_END)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(address, stream=True, timeout=(5, 30), headers=headers) as response:
        nothing_more = response.status_code == requests.codes.requested_range_not_satisfiable
        if not nothing_more:
            response.raise_for_status()
        if start and response.status_code != requests.codes.partial_content:
            start = file.seek(0)
            file.truncate()
        if nothing_more:  # the file is longer than what lies there: begin again
            return fetch_into(file, address)
        progress = Progress(start + int(response.headers.get("Content-Length", 0)), " bytes", start)
        for piece in response.iter_content(1 << 16):
            file.write(piece)
            progress.show(file.tell(), f"from {address.split('/')[2]}")
        progress.close()
    return response


def download_verified(mirrors, sha256, remedy, *, attempts=2, pause=1.0):
    """The bytes behind the first mirror whose content has that SHA-256.

    Each mirror is tried `attempts` times, `pause` seconds apart.
    Raises UserError if only wrong content came, NoNetwork if nothing came.
    """
    wrong, failure = None, None
    for attempt in range(attempts):
        time.sleep(pause if attempt else 0)
        for address in mirrors:
            content = io.BytesIO()
            try:
                fetch_into(content, address)
            except requests.RequestException as error:
                failure = type(error).__name__
                continue
            content = content.getvalue()
            if (found := sha256_of(content)) == sha256:
                return content
            wrong = f"{address} sent {len(content):,} bytes with SHA-256 {found[:12]}…"
    if wrong:
        raise UserError(f"{wrong}, expected {sha256[:12]}…; {remedy}")
    raise NoNetwork(f"no network: {len(mirrors)} mirrors did not answer ({failure}); {remedy}")


def sha256_of(content):
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def stop_on_signal():
    """While open, Ctrl-C and SIGTERM set `.requested` on what it yields, so that no step is cut in
    two; a second one stops at once."""
    stop = SimpleNamespace(requested=False)

    def request(number, frame):
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def run_program(main):
    """Runs `main()` as a program: a UserError becomes one line on stderr and exit code 2. Of
    several ranks, the first one prints."""
    try:
        with contextlib.redirect_stdout(None if rank() else sys.stdout):
            main()
    except UserError as error:
        if rank() and not isinstance(error, RankLost):
            time.sleep(30)  # rank 0 says the same, and torchrun ends this one; if not, it is news
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
