"""Tools that every program needs: errors, seeds, devices, ranks, files, progress.

Chapter: COURSE_ROADMAP.md, 0 (what counts as evidence)
Prerequisites: nothing
Next: config.py
Source: torch's notes on reproducibility
"""

import codecs
import contextlib
import difflib
import importlib
import importlib.util
import io
import json
import math
import operator
import os
import re
import signal
import stat
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

MESSAGE_LENGTH = 2000  # the most characters in an error's line
QUOTE_LENGTH = 100  # the most characters of a file's or server's text that a message quotes
JSON_SIZE = 1 << 27  # the most bytes in a JSON file
FOLDER_BIT = 0x10  # marks a folder in the attributes of an entry of a zip file

BYTE_ORDER_MARK = "\ufeff"  # Windows programs put it at the start of a file to say it is UTF-8

# Errors


def printable(text, length=QUOTE_LENGTH):
    """A text from outside as part of one line: control characters are escaped, and a long text is
    cut. Use it when a message quotes what a file or a server says."""
    text = str(text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: length + 1])
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def list_names(names, most=8):
    """Names from outside, printable and separated by commas; of very many, only the first ones."""
    names = list(names)
    listed = printable(", ".join(map(printable, names[:most])), 2 * QUOTE_LENGTH)
    return listed if len(names) <= most else f"{listed} and {len(names) - most:,} more"


def count_of(number, noun):
    """A number of things in words: `"1 layer"`, `"3 layers"`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class UserError(ValueError):
    """An error that the user can fix; its message is one line: the problem, the values, the remedy.

    The message is always one line without control characters, whatever it quotes.
    """

    def __init__(self, message=""):
        super().__init__(printable(message, MESSAGE_LENGTH))


class NoNetwork(UserError):
    """A file is on another machine that could not be reached."""


class NotThere(UserError):
    """A server does not have the file, or does not give it to us."""


class RankLost(UserError):
    """Another process of the same run has ended, and this one cannot continue alone."""


def check_choice(name, value, choices):
    """The value, if it is one of the choices (strings, or None). Raises UserError listing them."""
    choices = list(choices)
    if value not in choices:
        listed = ", ".join(map(str, choices))
        found = printable(repr(value))
        raise UserError(f"{name}={found} is unknown; choose from: {listed}")
    return value


def as_index(value):
    """A Python int, given a Python or numpy int or a 0-d integer tensor; None for anything else.

    A boolean is not an index, though Python would treat it as 0 or 1.
    """
    is_boolean = isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, bool)
    if is_boolean or getattr(value, "ndim", 0):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_count(name, value, least=1, most=None):
    """The value as an int. Raises UserError unless it is a whole number from `least` to `most`."""
    count = as_index(value)
    if count is None or count < least or (most is not None and count > most):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"{name}={printable(repr(value))} is not possible; choose a whole number, "
                        f"{wanted}")
    return count


def check_number(name, value, holds, wanted):
    """The value as a float. Raises UserError unless it is one real number for which `holds` is
    True; NaN is always refused. wanted: what it must be, in words."""
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not holds(number):
        raise UserError(f"{name}={printable(repr(value))} is not possible; it must be {wanted}")
    return number


def check_tensor(name, value, shape, *, is_float=False):
    """Raises UserError unless the value is a tensor with one axis for each word of `shape`, and,
    with is_float, of real floating-point numbers.

    shape: such as "batch pos d_vocab"; "... pos d_vocab" means two axes or more.
    """
    axes = shape.split()
    least = len(axes) - ("..." in axes)
    if isinstance(value, torch.Tensor):
        fits = value.ndim == least or (value.ndim > least and "..." in axes)
        if fits and (value.is_floating_point() or not is_float):
            return
        found = f"{list(value.shape)} {value.dtype}"
    else:
        found = f"a {type(value).__name__}"
    kind = "a tensor of floats" if is_float else "a tensor"
    raise UserError(f"{name} is {found}; pass {kind} [{', '.join(axes)}]")


def broadcast_shape(*tensors):
    """The shape that tensors broadcast to, or None if they cannot be broadcast.

    It is numpy's function: the first call of torch's loads its compiler, a quarter of a second.
    """
    try:
        return torch.Size(np.broadcast_shapes(*(tensor.shape for tensor in tensors)))
    except ValueError:
        return None


def as_list(name, value, wanted):
    """The value as a list. Raises UserError for a string, and for what cannot be listed. wanted:
    what it must be, in words."""
    try:
        listed = None if isinstance(value, (str, bytes)) else list(value)
    except TypeError:
        listed = None
    if listed is None:
        raise UserError(f"{name}={printable(repr(value))} is not a list; pass {wanted}")
    return listed


def check_function(name, fn):
    """Raises UserError if `fn` cannot be called."""
    if not callable(fn):
        raise UserError(f"{name} is {printable(repr(fn))}; pass a function")


def suggest_closest(name, known):
    """`"; the closest: a, b"` for a misspelt name, or an empty string if nothing is near.

    Names are compared in full and by their last part, so that `hook_patern` finds
    `blocks.0.attn.hook_pattern`.
    """
    known = list(known)
    name = str(name)
    same_end = [other for other in known if "." not in name and other.endswith(f".{name}")]
    matches = same_end[:3] or difflib.get_close_matches(name, known)
    if not matches:
        last_parts = {other.split(".")[-1] for other in known}
        for last_part in difflib.get_close_matches(name.split(".")[-1], last_parts):
            matches.append(next(k for k in known if k.split(".")[-1] == last_part))
    return f"; the closest: {', '.join(matches)}" if matches else ""


def at_least_float32(tensor):
    """The tensor in float32 if it is in half precision, otherwise unchanged.

    Statistics (sums of squares, logarithms, singular values) need this: float16 overflows beyond
    65,504, and bfloat16 has only three digits.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# Seeds and devices


def seeded_generator(seed):
    """A new CPU `torch.Generator`; all randomness comes from one, so every run can be repeated.

    Because it is on the CPU, the numbers do not depend on the model's device.
    """
    if as_index(seed) is None or not -(2**63) <= seed < 2**64:
        raise UserError(f"seed={printable(repr(seed))} is not possible; choose a whole number")
    return torch.Generator().manual_seed(as_index(seed))


def pick_device(name):
    """The `torch.device` for "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:1" or "mps".

    Each process started by torchrun gets its own GPU; MPS cannot be shared.
    Raises UserError if the device does not exist.
    """
    n_cuda = torch.cuda.device_count()
    local_rank = os.environ.get("LOCAL_RANK")  # set by torchrun

    available = []
    if n_cuda > 0:
        available.append("cuda")
    if torch.backends.mps.is_available() and local_rank is None:
        available.append("mps")
    available.append("cpu")

    if name == "auto":
        name = available[0]
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"

    available += [f"cuda:{index}" for index in range(n_cuda)]
    if name not in available:
        choices = ", ".join(available)
        raise UserError(f"device={name} is not on this machine; choose auto, {choices}")
    return torch.device(name)


# Ranks: the processes of one run, started together by torchrun, one for each device


def rank():
    """The number of this process among those that torchrun started; 0 if it is the only one."""
    return int(os.environ.get("RANK", 0))


def n_ranks():
    """The number of processes that `joined_ranks` has joined; 1 outside it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


@contextlib.contextmanager
def joined_ranks(device):
    """A context in which the processes started by torchrun are connected and can average.

    Yields the `torch.device` of the given name. Raises RankLost if another process has ended.
    """
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return

    if device.type == "cuda":
        torch.cuda.set_device(device)
    # If it were imported later, as by DistributedDataParallel, its functions' defaults would hold
    # the group and its threads until Python exits, which sometimes ends in "terminate called".
    importlib.import_module("torch.distributed.nn")
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # torchrun sends SIGTERM when a process is gone; we notice that ourselves and report it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    try:
        torch.distributed.barrier()  # a process that ends early is noticed here
        yield device
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo/" not in str(error):
            raise
        raise RankLost("another rank of this run has stopped; continue with --resume from the last "
                       "checkpoint, which is complete") from None
    finally:
        torch.distributed.destroy_process_group()


def mean_over_ranks(number):
    """The mean of a number over all ranks, bit-identical on each; with one rank, the number."""
    if n_ranks() == 1:
        return number
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(number, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.item() / n_ranks()


# Files


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Yields a file whose content replaces `path` only when it is complete and on the disk.

    A crash, a full disk or a Ctrl-C leaves the old file as it was. Raises UserError if the file
    cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    encoding = None if "b" in mode else "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, encoding=encoding) as file:
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
            temporary.unlink()  # already gone if all went well


def write_json(path, values):
    """Writes plain values as readable JSON; the old file stays until the new one is complete."""
    with atomic_write(path, "w") as file:
        json.dump(values, file, indent=1)
        file.write("\n")


@contextlib.contextmanager
def looking_at(path):
    """A context in which the system's refusal of a path becomes a UserError: a folder that may not
    be looked into, or a name that is too long."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None


def open_regular(path):
    """Opens a file for reading bytes.

    Raises UserError if it does not exist or is not a regular file: a folder, an endless device, or
    a pipe, which would wait for a writer.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except ValueError as error:  # a path with a null character
        raise UserError(f"cannot read {path}: {error}; check the path") from None

    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    found = "Is a directory" if stat.S_ISDIR(mode) else "it is a pipe, a socket or a device"
    raise UserError(f"cannot read {path}: {found}; give a regular file")


def open_locked(path, busy):
    """Opens a file for reading and writing bytes, creating it if needed, and locks it: no other
    process can open it this way until it is closed or this process ends.

    busy: the UserError's message if another process holds the lock. If Python has no fcntl (on
    Windows), nothing is locked. Raises OSError if the file cannot be written.
    """
    has_locks = importlib.util.find_spec("fcntl") is not None
    fcntl = importlib.import_module("fcntl") if has_locks else None
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)), "rb+")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(busy) from None
        except OSError as error:  # some network file systems have no locks
            print(f"WARNING: {path} cannot be locked ({error.strerror}): start no second process "
                  "that writes there", file=sys.stderr)

        # The lock's previous owner may have removed or renamed the file since we opened it.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


@contextlib.contextmanager
def locked(path, busy):
    """A context that only one process at a time can enter for the same path. It uses a temporary
    lock file at that path. busy: as in `open_locked`, which has the details."""
    file = open_locked(path, busy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)  # while locked, so it cannot be another process's file
        file.close()


def read_json(path, remedy="correct it"):
    """The object in a JSON file. Raises UserError if the file does not hold one.

    remedy: what to do then, for the message.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_SIZE:
            raise UserError(f"{path} has {size:,} bytes; a JSON file may have at most "
                            f"{JSON_SIZE:,}")
        try:
            values = json.loads(file.read().decode("utf-8-sig"))  # some editors add a mark first
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({printable(error)}); {remedy}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; {remedy}")
    return values


def read_text(path):
    """A UTF-8 file's text. Raises UserError if the file is missing, empty, or not UTF-8."""
    text = "".join(text_pieces(path))
    if not text:
        raise UserError(f"{path} is empty; give a file with text in it")
    return text


def text_pieces(path, size=1 << 18):
    """Yields the text of a UTF-8 file, without a byte-order mark, `size` bytes at a time.

    Raises UserError if the file cannot be read or is not UTF-8.
    """
    try:
        with open_regular(path) as file:
            for text, _ in decoded_pieces(file, path, size):
                yield text
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None


def decoded_pieces(file, name, size, offset=0):
    """Yields (text, the number of the file's bytes up to its end) of UTF-8, `size` bytes at a time.

    file: open for reading bytes. offset: where to begin, between two characters. A byte-order mark
    at the start of the file is left out. name: the file's, for the UserError if it is not UTF-8.
    """
    file.seek(offset)
    n_read = offset
    file_begins = offset == 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while piece := file.read(size):
            n_read += len(piece)
            text = decoder.decode(piece)
            if text and file_begins:
                text = text.removeprefix(BYTE_ORDER_MARK)
                file_begins = False
            half_character, _ = decoder.getstate()
            yield text, n_read - len(half_character)
        decoder.decode(b"", final=True)  # raises if the last character is incomplete
    except UnicodeDecodeError as error:
        # The decoder counts from the start of its buffer: the last piece, preceded by the bytes of
        # a character that was split between two pieces.
        position = n_read - len(error.object) + error.start
        raise not_utf8(name, position, error.object[error.start]) from None


def not_utf8(name, position, byte):
    """The UserError for a byte that is not UTF-8, at this position in the file of this name."""
    return UserError(f"{name} is not UTF-8 (byte {position} is {byte:#04x}); save it as UTF-8 "
                     "first")


def read_torch_file(path, what, remedy, mmap=False):
    """The content of a file written by `torch.save`, on the CPU: tensors and plain values, no code.

    The file's checksums are verified first, because one flipped bit would give other weights.
    what: the expected kind of file, and remedy: what to do, for the UserError if it is something
    else. mmap: leave the tensors in the file until they are used.
    """
    with open_regular(path) as file:
        try:
            record_sizes = check_zip(file)
            if record_sizes is None:  # the format before torch 1.6, which has no checksums
                mmap = False
            content = os.fspath(path) if mmap else file
            values = torch.load(content, map_location="cpu", weights_only=True, mmap=mmap)
            check_storages(values, record_sizes, os.fstat(file.fileno()).st_size)
        except Exception as error:  # a foreign file can fail anywhere inside the unpickler
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code:
                raise UserError(f"{path} is not {what}: its objects need the code of "
                                f"{printable(code[1])}, and nothing in a file is executed; save "
                                "its tensors alone, with torch.save(model.state_dict(), …)"
                                ) from None
            reason = str(error) if isinstance(error, BadFile) else type(error).__name__
            raise UserError(f"{path} is truncated or not {what} ({reason}); {remedy}") from None
    return values


class BadFile(Exception):
    """A file contradicts itself; the message says how."""


def check_zip(file):
    """The sizes of the records in a zip file, a Counter; None for another kind of file.

    Raises BadFile if a record's checksum is wrong, or if the records, which torch never compresses,
    claim to be larger than the file.
    """
    is_zip = zipfile.is_zipfile(file)
    file.seek(0)
    if not is_zip:
        return None

    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        total = sum(record.file_size for record in records)
        # Where the bit for a folder is set, torch leaves the tensor's memory as it was
        is_stored = all(record.compress_type == zipfile.ZIP_STORED
                        and not record.external_attr & FOLDER_BIT for record in records)
        if len(names) < len(records) or not is_stored or total > file.seek(0, os.SEEK_END):
            raise BadFile("its records are not in torch's format")
        damaged = archive.testzip()
    if damaged is not None:
        raise BadFile(f"the checksum of {printable(damaged)} is wrong: it was damaged")
    file.seek(0)
    return Counter(record.file_size for record in records)


def check_storages(values, record_sizes, file_size):
    """Raises BadFile if the tensors in nested values claim more bytes than the file holds.

    record_sizes: for a zip file, the sizes of its records, which every storage must match; None for
    other files.
    """
    storages = {}
    for tensor in tensors_within(values):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise BadFile(f"a tensor is {tensor.layout} on {tensor.device}")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise BadFile(f"a tensor of shape {printable(list(tensor.shape))} has "
                          f"{storage.nbytes():,} bytes")
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()

    too_many = sum(storages.values()) > file_size
    if too_many or (record_sizes is not None and Counter(storages.values()) - record_sizes):
        raise BadFile("its tensors are longer than their data in the file")


def tensors_within(values):
    """Yields the tensors in nested dicts, lists and tuples; each container is visited once."""
    waiting = [values]
    seen = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value


# Progress


class Progress:
    """A progress line on stderr: updated in place on a terminal, every ten seconds in a log."""

    def __init__(self, total, unit="", done=0):
        self.total = total
        self.unit = unit
        self.done_at_start = done
        self.start = time.monotonic()
        self.last_shown = self.start
        self.width = 0

    def show(self, done, text=""):
        """Shows how much of the total is done, `text`, and the time left at this pace."""
        if rank():
            return

        # Not too often, but always at the end
        now = time.monotonic()
        on_terminal = sys.stderr.isatty()
        pause = 0.1 if on_terminal else 10
        finished = 0 < self.total <= done
        if now - self.last_shown < pause and not finished:
            return
        self.last_shown = now

        line = f"{done:,}{self.unit}  {text}"
        if self.total:
            seconds_left = self.seconds_each(done) * (self.total - done)
            line = f"{done:,}/{self.total:,}{self.unit}  {text}  {seconds_left:.0f} s left"

        if on_terminal:
            # Padded to the width of the last line, so that nothing of it remains.
            print("\r" + line.ljust(self.width), end="", file=sys.stderr, flush=True)
            self.width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def seconds_each(self, done):
        """The mean time that a unit took since the start, if `done` are done now."""
        return (time.monotonic() - self.start) / max(done - self.done_at_start, 1)

    def close(self):
        """Ends the line, so that later output starts on a new one."""
        if sys.stderr.isatty() and self.width:
            print(file=sys.stderr, flush=True)


# Programs


def replace_what_cannot_be_shown():
    """Makes stdout and stderr print a question mark for a character that they cannot show.

    A terminal that is not set to Unicode would otherwise stop the program, perhaps after hours.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def run_program(main):
    """Runs `main()` as a program: a UserError becomes one line on stderr and exit code 2.

    With several ranks, only rank 0 prints. Characters that the terminal cannot show are replaced.
    """
    replace_what_cannot_be_shown()
    try:
        with contextlib.redirect_stdout(None if rank() else sys.stdout):
            main()
    except UserError as error:
        if rank() and not isinstance(error, RankLost):
            # Rank 0 prints the same error, and torchrun then ends this process. If not, print it.
            time.sleep(30)
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
