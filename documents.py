"""Documents from files, folders, JSON lines and gzip, as one stream of text in pieces.

A file is one document. A file of JSON lines (`.jsonl`) has one document in each line. Either may be
packed by gzip (`.gz`). No file is ever in memory as a whole, and reading can go on from any `Place`
between two pieces, so a program that was killed can continue.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: utils.py
Next: token_files.py
Source: RFC 8259 (JSON); RFC 1952 (gzip); Gao et al. 2020 (a document in each line)
"""

import codecs
import contextlib
import gzip
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from utils import (
    Progress,
    UserError,
    decoded_pieces,
    list_names,
    not_utf8,
    open_regular,
    printable,
)

SUFFIXES = (".txt", ".md", ".jsonl")  # what is read in a folder; also with .gz
LONGEST_LINE = 1 << 26  # the most bytes in a line of JSON, which is in memory as a whole
PIECE_SIZE = 1 << 18  # the number of bytes or characters read at once


class Place(NamedTuple):
    """A place between two pieces of text.

    file: the number of the file. offset: in bytes from the start of the file, unpacked if it is
    gzip; in JSON lines, the start of a line. n_lines: the number of lines before that one.
    n_characters: how much of that line's document is before the place. n_bytes: how much of all
    files, as they are on the disk, has been read.
    """

    file: int = 0
    offset: int = 0
    n_lines: int = 0
    n_characters: int = 0
    n_bytes: int = 0


START = Place()


def is_json_lines(path):
    """Whether each line of a file is a document, by the file's name."""
    return path.lower().removesuffix(".gz").endswith(".jsonl")


def find_files(paths):
    """The files of `paths`, in order, a list of str; a folder gives the texts in it, at any depth.

    The texts of a folder are its files with a name in SUFFIXES, sorted by path. Hidden files and
    folders are left out, and links to folders are not followed: they might lead back.
    Raises UserError if a path cannot be read or a folder has no texts.
    """
    files = []
    for path in map(os.fspath, paths):
        if os.path.isdir(path):
            files += texts_in_folder(path)
        else:
            files.append(path)
    for path in files:
        open_regular(path).close()  # all of them, before the first is read
    return files


def texts_in_folder(folder):
    """The texts in a folder, at any depth; see `find_files`."""

    def refuse(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}; check its permissions")

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            is_text = name.lower().removesuffix(".gz").endswith(SUFFIXES)
            if is_text and not name.startswith("."):
                found.append(os.path.join(place, name))
    if not found:
        raise UserError(f"{folder} has no texts; a folder's texts end in {', '.join(SUFFIXES)}, "
                        "or in one of these and .gz")
    return sorted(found, key=lambda path: Path(path).parts)


def document_pieces(files, field="text", *, between="", size=PIECE_SIZE, place=START, what=None):
    """Yields (text, the Place after it): the documents of files, joined, in pieces.

    field: where a JSON line has its text. between: what is put between two documents; empty ones
    are left out. size: the number of bytes read at once; a piece has half as many characters or
    more. place: an earlier Place, to go on from there. what: words for a progress line; None for no
    such line.
    Raises UserError for a file that cannot be read, is not UTF-8, or has a broken line.
    """
    total = sum(map(os.path.getsize, files))
    progress = Progress(total, " bytes", done=place.n_bytes)
    after = place
    texts = []
    n_waiting = 0
    for text, after in joined_parts(files, field, between, size, place):
        texts.append(text)
        n_waiting += len(text)
        if 2 * n_waiting >= size:
            yield "".join(texts), after
            texts = []
            n_waiting = 0
            if what and after.n_bytes < total:
                progress.show(after.n_bytes, f"{what}, {rate(progress, after.n_bytes)}")
    if texts:
        yield "".join(texts), after
    if what:
        progress.show(total, f"{what}, {rate(progress, total)}")
        progress.close()


def rate(progress, n_bytes):
    """The speed until now, in words: megabytes of the files a second."""
    return f"{1e-6 / max(progress.seconds_each(n_bytes), 1e-12):.1f} MB/s"


def joined_parts(files, field, between, size, place):
    """Yields (text, Place after it) as `document_pieces`, in parts of any length: a short document
    is one part, a long one several."""
    any_text = place != START
    n_bytes = sum(os.path.getsize(path) for path in files[: place.file])
    for number in range(place.file, len(files)):
        path = files[number]
        here = place if number == place.file else Place(number)
        parts_of = line_parts if is_json_lines(path) else text_parts
        with opened(path) as (file, packed):
            for text, begins, after in parts_of(file, path, field, size, here):
                separator = between if begins and any_text else ""
                any_text = True
                yield separator + text, after._replace(n_bytes=n_bytes + packed.tell())
        n_bytes += os.path.getsize(path)


@contextlib.contextmanager
def opened(path):
    """A context with (file, the file as it is on the disk); the first is unpacked if it is gzip."""
    try:
        with open_regular(path) as packed:
            if not path.lower().endswith(".gz"):
                yield packed, packed
                return
            with gzip.GzipFile(fileobj=packed) as file:
                yield file, packed
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is cut off or not gzip ({printable(error)}); get it again"
                        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None


def text_parts(file, path, field, size, place):
    """Yields (text, whether it begins a document, Place after it) of a file that is a document.

    Arguments as in `line_parts`; a plain text needs no field.
    """
    begins = place.offset == 0
    for text, offset in decoded_pieces(file, unpacked_name(path), size, place.offset):
        if text:
            yield text, begins, place._replace(offset=offset)
            begins = False


def line_parts(file, path, field, size, place):
    """Yields (text, whether it begins a document, Place after it) of a file of JSON lines.

    file: open, and unpacked. path: its name, for errors. field, size: as in `document_pieces`.
    place: where to begin in the file.
    """
    _, offset, n_lines, n_given, _ = place
    file.seek(offset)
    while line := file.readline(LONGEST_LINE + 1):
        text = text_of_line(line, path, field, n_lines + 1, offset)

        # A long text comes in several parts, and all but the last leave us before its line
        this_line = Place(place.file, offset, n_lines)
        offset += len(line)
        n_lines += 1
        for start in range(n_given, len(text), size):
            end = start + size
            is_last = end >= len(text)
            after = Place(place.file, offset, n_lines) if is_last else this_line._replace(
                n_characters=end)
            yield text[start:end], start == 0, after
        n_given = 0


def text_of_line(line, path, field, number, offset):
    """The text in a line of JSON, in bytes; "" for a blank line. UserError for a broken one.

    number: the line's, counted from 1. offset: where it begins in the file, for the error.
    """
    where = f"{path}, line {number:,},"
    if len(line) > LONGEST_LINE:
        raise UserError(f"{where} is longer than {LONGEST_LINE:,} bytes; use files that are "
                        "documents (.txt) for such texts")
    if offset == 0 and line.startswith(codecs.BOM_UTF8):
        offset = len(codecs.BOM_UTF8)
        line = line[offset:]
    try:
        line = line.decode()
        record = json.loads(line) if line.strip() else {field: ""}
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise not_utf8(unpacked_name(path), offset + error.start, byte) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({printable(error)}); repair or remove it") from None

    if not isinstance(record, dict):
        raise UserError(f"{where} is not a JSON object; each line must be one, such as "
                        f'{{"{field}": "…"}}')
    if field not in record:
        raise UserError(f"{where} has no field {field!r}, only {list_names(record)}; choose one "
                        "with --field")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where} has {printable(json.dumps(text))} in {field!r}, which is not a "
                        "text; repair or remove it, or choose another --field")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} has {text[error.start]!r}, half a surrogate pair, which is not "
                        "text; repair or remove it") from None
    return text


def unpacked_name(path):
    """A file's name in a message about its bytes, which are counted after unpacking."""
    return f"{path}, unpacked," if path.lower().endswith(".gz") else path
