"""What every program needs and no lesson is about: errors, seeds, devices, files, progress.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence: the same seed gives the same bits)
Read before: nothing; after: config.py
Source: torch's notes on reproducibility
"""

import contextlib
import difflib
import os
import sys
import tempfile
import time
from pathlib import Path

import torch


class UserError(ValueError):
    """Something that the caller can mend; the message is one line: what, the values, the remedy."""


def closest(name, known):
    """`"; the closest are a, b"` for a misspelt name, or an empty string if nothing is near.

    Names are compared in full and by their last part, so that `hook_patern` finds
    `blocks.0.attn.hook_pattern`.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if not near:
        tails = difflib.get_close_matches(
            name.split(".")[-1], {k.split(".")[-1] for k in known}, n=3, cutoff=0.6
        )
        near = [next(k for k in known if k.split(".")[-1] == tail) for tail in tails]
    return f"; the closest: {', '.join(near)}" if near else ""


def seeded_generator(seed):
    """A fresh CPU `torch.Generator`; all randomness goes through one, so every run can be repeated.

    Drawn on the CPU, the same numbers come out whatever device the model lives on.
    """
    return torch.Generator().manual_seed(seed)


def pick_device(name):
    """The `torch.device` for "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1" or "mps".

    Raises UserError where that device is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": mps_is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    kind, _, index = name.partition(":")
    present = there.get(kind, False) and (kind != "cuda" or int(index or 0) < torch.cuda.device_count())
    if not present:
        found = ", ".join(kind for kind in there if there[kind])
        raise UserError(f"device={name} is not on this machine; choose auto or one of: {found}")
    return torch.device(name)


def mps_is_available():
    """Whether this torch can use an Apple GPU."""
    return torch.backends.mps.is_available()


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yields a file whose content replaces `path` only once it is whole and on the disk.

    A crash, a full disk or a Ctrl-C leaves the old file as it was. Raises UserError if the place
    cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another folder or make room"
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


class Progress:
    """One line on stderr: rewritten in place on a terminal, repeated every ten seconds in a log."""

    def __init__(self, total, unit=""):
        self.total, self.unit = total, unit
        self.start = self.last = time.monotonic()
        self.width = 0

    def show(self, done, text=""):
        """Shows that `done` of `total` is reached, `text`, and the time that is left at this pace."""
        now = time.monotonic()
        on_terminal = sys.stderr.isatty()
        if now - self.last < (0.1 if on_terminal else 10) and done < self.total:
            return
        self.last = now
        left = (now - self.start) / max(done, 1) * (self.total - done)
        line = f"{done:,}/{self.total:,}{self.unit}  {text}  {left:.0f} s left"
        padded = line.ljust(self.width)
        self.width = len(line)
        print(f"\r{padded}" if on_terminal else line, end="" if on_terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    def close(self):
        """Leaves the line, so that what follows starts on a new one."""
        if sys.stderr.isatty() and self.width:
            print(file=sys.stderr, flush=True)


def run_program(main):
    """Runs `main()` as a program: a UserError is one line on stderr and exit code 2, without a trace."""
    try:
        main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
