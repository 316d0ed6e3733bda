"""Token files: the ids of texts of any size, made once, and read from the disk while training.

`prepare` reads documents piece by piece, so neither a text nor its ids are ever in memory as a
whole. The end of a piece may cut a word or `<|endoftext|>` in two. What could still change waits
for the next piece, so the ids are those of the whole text. A killed `prepare` can go on.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: config.py, tokenizer.py, documents.py
Next: activation_cache.py
Source: Radford et al. 2019 (documents joined by a token of their own)
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

from config import option
from documents import PIECE_SIZE, START, Place, document_pieces, find_files, is_json_lines
from tokenizer import (
    ENDOFTEXT,
    TOKENIZER_FILES,
    BPETokenizer,
    CharTokenizer,
    any_of,
    length_of_overlap,
    load_tokenizer,
    read_tokenizer,
    split_words,
)
from utils import UserError, list_names, locked, open_regular, printable, read_json, write_json

TOKENS_FILE = "tokens.bin"  # a line of JSON, followed by the ids
TOKEN_DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # numpy's names, little-endian
STDIN = "-"  # stands for the standard input among paths
BLANK_LINE = "\n\n"  # between two documents, if the tokenizer has no <|endoftext|>
BPE_SAMPLE_SIZE = 1 << 21  # the number of bytes of a text from which bpe learns
LONGEST_WORD = 1 << 23  # the most characters in a word of bpe, which is in memory as a whole
SECONDS_BETWEEN_NOTES = 5  # the most work that a kill of `prepare` loses

# Reading


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk, [n]: only indexed parts are read, as int64.

    file: kept open, so that replacing the file on disk changes nothing. dtype: of the ids, as numpy
    names it. offset: the place of the first id in the file, in bytes. n_tokens: how many ids follow
    from there.
    """

    file: BinaryIO
    dtype: str
    offset: int
    n_tokens: int

    def __len__(self):
        return self.n_tokens

    def __getitem__(self, where):
        # Mapped again each time: pages that were read count as our memory until the map is closed.
        ids = np.memmap(self.file, self.dtype, "r", self.offset, (self.n_tokens,))
        return torch.from_numpy(ids[where].astype(np.int64))

    def split(self, n_first):
        """Two TokenFiles: the first n_first ids, and the rest."""
        split_offset = self.offset + n_first * np.dtype(self.dtype).itemsize
        first = TokenFile(self.file, self.dtype, self.offset, n_first)
        others = TokenFile(self.file, self.dtype, split_offset, self.n_tokens - n_first)
        return first, others


def read_token_file(path):
    """(TokenFile, tokenizer, SHA-256 of both) from a file that `prepare` wrote.

    The file is read once, piece by piece. Raises UserError if it is cut off, changed, or of another
    kind.
    """
    remedy = "make it again with: python data.py prepare"
    highest = 0
    try:
        file = open_regular(path)
        line = file.readline(1 << 26)
        header = json.loads(line)
        tokenizer = load_tokenizer(header["tokenizer"])
        checksum = str(header["sha256"])
        n_tokens = int(str(header["n_tokens"])[:20])
        ids = TokenFile(file, TOKEN_DTYPES[header["dtype"]], len(line), n_tokens)

        sha256 = hashlib.sha256(json.dumps(header["tokenizer"]).encode())
        piece = np.fromfile(file, ids.dtype, PIECE_SIZE)
        while len(piece):
            highest = max(highest, piece.max().item())
            sha256.update(piece)
            piece = np.fromfile(file, ids.dtype, PIECE_SIZE)
        n_found = (file.seek(0, 2) - len(line)) / np.dtype(ids.dtype).itemsize
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is cut off or not a token file ({printable(error)}); {remedy}"
                        ) from None

    if n_found != n_tokens:
        raise UserError(f"{path} has {n_found:,.0f} ids instead of {n_tokens:,}; {remedy}")
    if highest >= tokenizer.d_vocab:
        raise UserError(f"{path} has the id {highest}, and its tokenizer knows 0 to "
                        f"{tokenizer.d_vocab - 1}; {remedy}")
    if sha256.hexdigest() != checksum:
        raise UserError(f"{path} has changed since it was made; {remedy}")
    return ids, tokenizer, checksum


def count_characters(ids, tokenizer):
    """The number of characters in the text of ids [n]; a TokenFile is read piece by piece."""
    if tokenizer.kind != "bpe":
        return len(ids)

    n_characters = 0
    for start in range(0, len(ids), PIECE_SIZE):
        piece = ids[start : start + PIECE_SIZE].tolist()
        text = np.frombuffer(tokenizer.to_bytes(piece), np.uint8)
        n_characters += int((text & 0xC0 != 0x80).sum())  # the bytes that begin a character
    return n_characters


# Encoding a text that comes in pieces


class PieceEncoder:
    """Encodes a text that arrives in pieces; the ids do not depend on where it is cut.

    The last two words of a piece are kept back until more arrives, because what follows may change
    them ("'l" is two words, "'ll" is one). The blanks before these words are kept too, because the
    last blank belongs to the next word, and so is a possible beginning of `<|endoftext|>` or of
    another added token.
    """

    def __init__(self, tokenizer, waiting=""):
        """waiting: text that comes before the first piece, such as another encoder's `waiting`."""
        self.tokenizer = tokenizer
        self.kept = ""
        self.new = waiting

    @property
    def waiting(self):
        """The text that has arrived and has no ids yet."""
        return self.kept + self.new

    def add(self, piece):
        """The ids, a list of int, of the waiting text and a piece, without what the next piece may
        change. Raises UserError for a word that is too long to wait for its end."""
        self.new += piece
        if len(self.new) < len(self.kept):
            return []  # a long word: splitting it again for every piece would take quadratic time
        text = self.kept + self.new
        self.new = ""
        self.kept = self.end_that_may_change(text)
        if len(self.kept) > LONGEST_WORD:
            raise UserError(f"the text has a word of more than {LONGEST_WORD:,} characters without "
                            "a blank; put blanks or line ends into it, or use --tokenizer char")
        return self.tokenizer.encode_document(text[: len(text) - len(self.kept)])

    def end_that_may_change(self, text):
        """The end of a text whose ids the next piece may change; see the class. "" for characters.
        """
        if self.tokenizer.kind != "bpe":
            return ""

        # Words alone: behind the last added token, before what may become one when more text comes
        single = self.tokenizer.single_texts
        begin = 0
        stop = len(text) - max((length_of_overlap(text, token) for token in single), default=0)
        for match in re.finditer(any_of(single), text) if single else ():
            if match.end() <= stop:
                begin = match.end()  # text before a token cannot be changed by text after it
            else:
                stop = min(stop, match.start())

        words = split_words(text[begin:stop])
        end = max(0, len(words) - 2)
        while end and words[end - 1].isspace():
            end -= 1
        return "".join(words[end:]) + text[stop:]

    def finish(self):
        """The ids of the waiting text, when no more comes."""
        return self.tokenizer.encode_document(self.waiting)


# Making a token file


@dataclass(frozen=True)
class PrepareConfig:
    """How texts of any size become a token file."""

    tokenizer: Literal["char", "bpe"] = option(
        "char", "one id for each character or frequent piece")
    vocab_size: int = option(1024, "the number of tokens that bpe learns, including 256 bytes")
    gpt2: str | None = option(
        None, "use the bpe of a model instead: the folder with GPT-2's two files or tokenizer.json")
    field: str = option("text", "where a line of a .jsonl file has its text")
    out: str = option("data/prepared", f"the folder that {TOKENS_FILE} is written to")


def prepare(paths, cfg, size=PIECE_SIZE):
    """Writes the ids of documents, joined, into the folder of a PrepareConfig.

    Between two documents is `<|endoftext|>` if the tokenizer has it as a token, or a blank line.
    If the process is killed, the next call with the same arguments goes on where it stopped.
    paths: files and folders, as in `find_files`; "-" is the standard input, one document, which is
    first copied to the disk. size: the number of bytes of text read at once.
    Returns (number of ids, their tokenizer). Raises UserError for texts that cannot be used.
    """
    if list(paths).count(STDIN) > 1:
        raise UserError(f"{STDIN} is given twice, but stdin can be read only once; give it once")
    if STDIN in paths and sys.stdin is None:
        raise UserError(f"{STDIN} is given, but stdin is closed; pipe a text into it")
    files = []
    for path in paths:
        files += [path] if path == STDIN else find_files([path])
    if cfg.field != PrepareConfig.field and not any(map(is_json_lines, files)):
        raise UserError(f"--field {cfg.field} is for files of JSON lines (.jsonl), and none is "
                        "given; leave it out, or name the file so")

    folder = Path(cfg.out)
    work = UnfinishedWork(folder)
    copy = folder / ".stdin"
    busy = f"another process prepares a text in {folder}; wait for it, or choose another --out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{TOKENS_FILE}.lock", busy):
            try:
                if STDIN in files:
                    with open(copy, "wb") as file:
                        shutil.copyfileobj(sys.stdin.buffer, file)
                    files[files.index(STDIN)] = str(copy)
                else:
                    work.made_of = describe_source(files, cfg)
                return prepare_files(files, cfg, size, work)
            except UserError:
                work.discard()  # the texts or settings must change before anything can go on
                raise
            finally:
                copy.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder / TOKENS_FILE}: {error.strerror or error}; choose "
                        "another folder or make room") from error


def prepare_files(files, cfg, size, work):
    """As `prepare`, for files alone. work: an UnfinishedWork of the folder."""
    # The tokenizer, and how far an earlier process has come
    noted, writer = work.load()
    if writer is None:
        tokenizer = fit_tokenizer(files, cfg, size, work, noted)
        writer = TokenWriter(open(work.partial, "wb+"), tokenizer)
        noted = {"place": START, "waiting": ""}

    # The ids of the text from there on
    with writer.file:
        work.save(writer, **noted)
        between = ENDOFTEXT if writer.tokenizer.has_endoftext else BLANK_LINE
        encoder = PieceEncoder(writer.tokenizer, noted["waiting"])
        pieces = document_pieces(files, cfg.field, between=between, size=size,
                                 place=noted["place"], what="made tokens")
        for text, place in pieces:
            writer.append(encoder.add(text))
            if work.is_due():
                work.save(writer, place=place, waiting=encoder.waiting)
        writer.append(encoder.finish())

        if not writer.n_tokens:
            raise UserError(f"{list_names(files)}: no text found; give files with text in them")
        writer.write_header()
        flush_to_disk(writer.file)
    work.finish()
    return writer.n_tokens, writer.tokenizer


def fit_tokenizer(files, cfg, size, work, noted):
    """The tokenizer that a PrepareConfig asks for, made from the text of files.

    noted: what an earlier process has noted in `work`, an UnfinishedWork, while it did the same.
    """
    if cfg.gpt2 is not None:
        tokenizer = read_tokenizer(Path(cfg.gpt2))
        if tokenizer is None:
            raise UserError(f"{cfg.gpt2} has no tokenizer: vocab.json and merges.txt, encoder.json "
                            "and vocab.bpe, or tokenizer.json; give the folder that has one")
        return tokenizer
    if cfg.tokenizer == "bpe":
        return learn_bpe(files, cfg)

    characters = set(noted.get("characters", ""))
    pieces = document_pieces(files, cfg.field, between=BLANK_LINE, size=size,
                             place=noted.get("place", START), what="read for their characters")
    for text, place in pieces:
        characters |= set(text)
        if work.is_due():
            work.save(None, place=place, characters="".join(sorted(characters)))
    return CharTokenizer().fit(characters)


def learn_bpe(files, cfg):
    """bpe that learned from the first half of the text, because the end is for validation.

    Of a long text it learns from the first BPE_SAMPLE_SIZE bytes. Unless there is one document
    only, `<|endoftext|>` becomes a token, to stand between them.
    """
    several_documents = len(files) > 1 or any(map(is_json_lines, files))
    between = ENDOFTEXT if several_documents else ""
    content = bytearray()
    for text, _ in document_pieces(files, cfg.field, between=between):
        content += text.encode()
        if len(content) >= 2 * BPE_SAMPLE_SIZE:
            break
    half = min(len(content) // 2, BPE_SAMPLE_SIZE)
    learned_from = content[:half].decode(errors="ignore")
    return BPETokenizer().train(learned_from, cfg.vocab_size, endoftext=several_documents)


def describe_source(files, cfg):
    """What decides the ids that `prepare` makes: the settings, and the state of the files."""
    read = list(files)
    if cfg.gpt2 is not None:
        paths = [Path(cfg.gpt2) / name for name in TOKENIZER_FILES]
        read += [path for path in paths if path.exists()]
    states = [(os.path.abspath(path), os.stat(path)) for path in read]
    states = [(path, state.st_size, state.st_mtime_ns) for path, state in states]
    settings = asdict(cfg)
    del settings["out"]
    return settings | {"files": hashlib.sha256(json.dumps(states).encode()).hexdigest()}


# Files that a kill leaves usable


def flush_to_disk(file):
    """Returns when everything written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


class TokenWriter:
    """Writes a token file: a header with the number of ids and a checksum, and the ids.

    The header is written first, and again when the numbers are known; it has the same length.
    """

    def __init__(self, file, tokenizer):
        """file: open for reading and writing bytes; its first line is replaced by the header."""
        self.file = file
        self.tokenizer = tokenizer
        self.state = tokenizer.state_dict()
        self.dtype = "uint16" if tokenizer.d_vocab <= 1 << 16 else "uint32"
        self.sha256 = hashlib.sha256(json.dumps(self.state).encode())
        self.n_tokens = 0
        self.write_header()

    def write_header(self):
        """Writes the header to the start of the file."""
        header = {
            "dtype": self.dtype,
            "n_tokens": f"{self.n_tokens:20}",  # padded, so that every count is as long
            "sha256": self.sha256.hexdigest(),
            "tokenizer": self.state,
        }
        self.file.seek(0)
        self.file.write(json.dumps(header).encode() + b"\n")

    def append(self, ids):
        """Writes ids, a list of int, after those that are there."""
        piece = np.array(ids, TOKEN_DTYPES[self.dtype]).tobytes()
        self.file.write(piece)
        self.sha256.update(piece)
        self.n_tokens += len(ids)

    def keep(self, n_tokens):
        """Keeps the first n_tokens ids that follow the header in the file, and removes the rest."""
        size = np.dtype(TOKEN_DTYPES[self.dtype]).itemsize
        while piece := self.file.read(min(PIECE_SIZE, n_tokens - self.n_tokens) * size):
            self.sha256.update(piece)
            self.n_tokens += len(piece) // size
        self.file.truncate()


class UnfinishedWork:
    """What `prepare` has done so far in a folder, for the next process if this one is killed.

    It is in two hidden files. `partial` is the token file so far. `note` is JSON: what the file is
    made of, and how far it has come. A note is written only when the ids that it counts are on the
    disk, so after a kill at any moment the two agree, except that `partial` may be longer.
    """

    def __init__(self, folder):
        self.folder = folder
        self.partial = folder / f".{TOKENS_FILE}.partial"
        self.note = folder / f".{TOKENS_FILE}.note"
        self.made_of = None  # as in `describe_source`; None if nobody can go on, as with stdin
        self.last_saved = time.monotonic()

    def load(self):
        """(what an earlier process has noted, a TokenWriter after the ids that it had written).

        The writer is None if there are no ids yet, and the note is {} if nobody can go on from it.
        """
        if not self.note.exists():
            return {}, None
        try:
            noted = read_json(self.note)
            before = noted.pop("made_of")
            other = [name for name in self.made_of or () if before[name] != self.made_of[name]]
            if self.made_of is None or other:
                changed = "stdin" if self.made_of is None else " and ".join(other)
                print(f"{self.folder} has unfinished work with other {changed}: starting again",
                      file=sys.stderr)
                return {}, None
            noted["place"] = Place(*noted["place"])
            writer = self.reopen(noted) if "n_tokens" in noted else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"the unfinished work in {self.folder} is damaged ({printable(error)}): starting "
                  "again", file=sys.stderr)
            return {}, None
        print(f"going on where the last run stopped, after {noted['place'].n_bytes:,} bytes",
              file=sys.stderr)
        return noted, writer

    def reopen(self, noted):
        """A TokenWriter of `partial` that continues after the ids that are noted.

        Raises UserError if they are not the ids that were written.
        """
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(self.partial, "rb+"))
            header = json.loads(file.readline(1 << 26))
            writer = TokenWriter(file, load_tokenizer(header["tokenizer"]))
            writer.keep(noted["n_tokens"])
            if writer.sha256.hexdigest() != noted["sha256"]:
                raise UserError("its ids have changed")
            stack.pop_all()  # the file stays open
        return writer

    def is_due(self):
        """Whether it is time for the next note."""
        due = time.monotonic() >= self.last_saved + SECONDS_BETWEEN_NOTES
        return due and self.made_of is not None

    def save(self, writer, **progress):
        """Notes the progress; writer: the TokenWriter of `partial`, or None before there is one."""
        if self.made_of is None:
            return
        if writer is not None:
            flush_to_disk(writer.file)
            progress |= {"n_tokens": writer.n_tokens, "sha256": writer.sha256.hexdigest()}
        write_json(self.note, {"made_of": self.made_of} | progress)
        self.last_saved = time.monotonic()

    def finish(self):
        """Makes `partial` the token file."""
        os.replace(self.partial, self.folder / TOKENS_FILE)
        self.discard()

    def discard(self):
        """Removes the hidden files, and what a kill left of the writing of a note."""
        for path in (self.partial, self.note, *self.folder.glob(f".{self.note.name}.*")):
            path.unlink(missing_ok=True)
