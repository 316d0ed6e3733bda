"""From text to batches: find or download a text, tokenise it, split it, and cut windows from it.

    python data.py prepare FILE… --tokenizer bpe --out data/mine     # texts larger than memory
    python train.py --data.path data/mine

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: config.py, tokenizer.py, corpus.py
Next: embeddings.py
Source: Tiny Shakespeare is the text of Karpathy's char-rnn (2015)
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import requests
import torch

import corpus
from config import DataConfig, config_from_dict, flag_parser, option
from tokenizer import (
    ENDOFTEXT,
    TOKENIZERS,
    BPETokenizer,
    CharTokenizer,
    WordTokenizer,
    length_of_overlap,
    load_tokenizer,
    split_words,
)
from utils import (
    NoNetwork,
    UserError,
    atomic_write,
    fetch_into,
    open_regular,
    printable,
    read_text,
    run_program,
    text_pieces,
)

SHAKESPEARE_FILE = "tiny_shakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILTIN_CHARACTERS = 1_000_000
LARGEST_DOWNLOAD = 1 << 24  # bytes; Tiny Shakespeare has 1.1 million
TOKENS_FILE = "tokens.bin"  # a line of JSON, followed by the ids
TOKEN_DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # numpy's names, little-endian
PIECE_SIZE = 1 << 18  # the number of bytes or ids read at once
BPE_SAMPLE_SIZE = 1 << 21  # the number of bytes of a text from which bpe learns
# For each kind of tokenizer, a pattern for the places where cutting a text changes no token
TOKEN_BOUNDARIES = {"char": "", "word": r"(?<!\w)|(?!\w)", "bpe": r"(?<=\S)(?=[ \n])"}


@dataclass(frozen=True)
class Dataset:
    """A tokenised text, split into a training part and a validation part.

    train, val: [n], int64 ids, in memory or a TokenFile. name: shown to people. sha256: of the
    text, or of a TokenFile, so that a resumed run can check that it is the same. val_characters:
    the length of the validation text, to compare losses between tokenizers. floor: the lowest
    possible loss of each token of `val`, if it is known.
    """

    train: "torch.Tensor | TokenFile"
    val: "torch.Tensor | TokenFile"
    tokenizer: CharTokenizer | WordTokenizer | BPETokenizer
    name: str
    sha256: str
    val_characters: int
    floor: corpus.Floor | None = None


def load_dataset(cfg, n_ctx, tokenizer=None):
    """The Dataset that a DataConfig asks for.

    n_ctx: the context that its windows must fill. tokenizer: one to use unchanged (for resuming).
    Raises UserError for a text that is missing, empty, not UTF-8, or too short for one window.
    """
    if cfg.tokenizer != "bpe" and cfg.vocab_size != DataConfig().vocab_size:
        raise UserError(f"vocab_size={cfg.vocab_size} does nothing with tokenizer="
                        f"{cfg.tokenizer!r}; leave it out, or use --data.tokenizer bpe")

    # A token file is given by its folder, or by its own path
    if cfg.path is not None and Path(cfg.path).name == TOKENS_FILE:
        cfg = replace(cfg, path=str(Path(cfg.path).parent))
    if cfg.path is not None and (Path(cfg.path) / TOKENS_FILE).exists():
        dataset = prepared_dataset(cfg, tokenizer)
    else:
        dataset = text_dataset(cfg, tokenizer)

    for part, name_of_part in ((dataset.train, "training"), (dataset.val, "validation")):
        if len(part) <= n_ctx:
            raise UserError(
                f"{dataset.name}: the {name_of_part} part has {len(part)} tokens, a window {n_ctx}"
                " and one more; use a longer text, a smaller --model.n_ctx, or another "
                f"--data.val_fraction than {cfg.val_fraction}")
    return dataset


# Texts that fit into memory


def text_dataset(cfg, tokenizer=None):
    """The Dataset of a text that is read into memory; arguments as in `load_dataset`."""
    text, name, sample = load_text(cfg)

    # Where the training part ends
    n_train = len(text) - int(len(text) * cfg.val_fraction)
    if sample is not None:
        n_train = max(0, text.rfind(corpus.END, 0, n_train))  # validation begins between stories
    else:
        kind = tokenizer.kind if tokenizer else cfg.tokenizer
        n_train = last_token_boundary(text, n_train, kind)

    # Characters and words are listed from the whole text; bpe must not learn from the validation
    # part.
    if tokenizer is None and cfg.tokenizer == "bpe":
        tokenizer = BPETokenizer().train(text[:n_train], cfg.vocab_size)
    elif tokenizer is None:
        tokenizer = TOKENIZERS[cfg.tokenizer]().fit(text)

    train = torch.tensor(tokenizer.encode_document(text[:n_train]))
    val = torch.tensor(tokenizer.encode_document(text[n_train:]))
    return Dataset(
        train=train, val=val, tokenizer=tokenizer, name=name,
        sha256=sha256_of(text.encode()), val_characters=len(text) - n_train,
        floor=corpus.floor_of(sample, tokenizer, val),
    )


def last_token_boundary(text, n, kind):
    """The last place up to n at which a text can be cut between two tokens of this tokenizer kind.

    Returns n itself if there is none within a thousand characters.
    """
    boundary = re.compile(TOKEN_BOUNDARIES[kind])
    for place in range(n, max(0, n - 1000), -1):
        if boundary.match(text, place):
            return place
    return n


def load_text(cfg):
    """(text, name, sample) from the file at `path`, Tiny Shakespeare, or the built-in corpus.

    sample: the corpus.Sample of the built-in corpus; None for the other texts.
    """
    if cfg.path is not None:
        return read_text(Path(cfg.path)), Path(cfg.path).name, None

    if cfg.dataset != "builtin":
        try:
            return tiny_shakespeare(Path(cfg.folder)), "Tiny Shakespeare", None
        except NoNetwork as problem:
            if cfg.dataset == "tiny_shakespeare":
                raise
            print(f"WARNING: {problem}\nWARNING: training on the built-in corpus instead, a little "
                  "language of gifts, songs and questions", file=sys.stderr)

    sample = corpus.sample_of_length(BUILTIN_CHARACTERS)
    return corpus.spell(sample.words), "built-in corpus", sample


def tiny_shakespeare(folder, mirrors=SHAKESPEARE_MIRRORS):
    """The text of Tiny Shakespeare, from `folder` or, the first time, from a mirror.

    Raises NoNetwork if no mirror answers, UserError if the file has other content.
    """
    path = folder / SHAKESPEARE_FILE
    if not path.exists():
        remedy = f"put the file at {path}, or use --data.path FILE or --data.dataset builtin"
        print("downloading Tiny Shakespeare (1 MB); without a network this gives up in a minute or "
              "two", file=sys.stderr)
        content = download_verified(mirrors, SHAKESPEARE_SHA256, remedy)
        with atomic_write(path) as file:
            file.write(content)

    text = read_text(path)
    found = sha256_of(text.encode())
    if found != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare (SHA-256 {found[:12]}…); delete it, to "
                        "download it again, or pass your own text with --data.path")
    return text


def download_verified(mirrors, sha256, remedy, *, attempts=2, pause=1.0):
    """Downloads content with a given SHA-256 from the first mirror that has it; returns its bytes.

    Each mirror is tried `attempts` times, `pause` seconds apart. remedy: what the user can do, for
    the error. Raises UserError if only wrong content arrived, NoNetwork if nothing did.
    """
    wrong = None
    failure = None
    for attempt in range(attempts):
        time.sleep(pause if attempt else 0)
        for address in mirrors:
            file = io.BytesIO()
            try:
                fetch_into(file, address, LARGEST_DOWNLOAD)
            except requests.RequestException as error:
                failure = type(error).__name__
                continue

            content = file.getvalue()
            found = sha256_of(content)
            if found == sha256:
                return content
            wrong = f"{address} sent {len(content):,} bytes with SHA-256 {found[:12]}…"

    if wrong:
        raise UserError(f"{wrong}, expected {sha256[:12]}…; {remedy}")
    raise NoNetwork(f"no network: {len(mirrors)} mirrors did not answer ({failure}); {remedy}")


def sha256_of(content):
    """The SHA-256 hash of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


# Batches and windows


def random_batch(tokens, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: windows from random places, targets one token later.

    tokens: [n]. generator: a CPU torch.Generator, the only source of randomness.
    """
    starts = torch.randint(len(tokens) - n_ctx, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(n_ctx + 1)]  # [batch, pos + 1]
    return windows[:, :-1], windows[:, 1:]


def repeated_batch(d_vocab, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: random tokens that repeat periodically.

    Each row draws its own period, from 4 to half of the window. The only predictable thing is that
    a token is followed by what followed it before. Predicting this is what an induction head does
    (Olsson et al. 2022). If all rows had the same period, looking back by it would be enough.
    """
    drawn = torch.randint(d_vocab, (batch_size, n_ctx + 1), generator=generator)
    periods = torch.randint(4, max(4, (n_ctx + 1) // 2) + 1, (batch_size, 1), generator=generator)
    windows = drawn.gather(1, torch.arange(n_ctx + 1) % periods)
    return windows[:, :-1], windows[:, 1:]


def windows_in_order(tokens, batch_size, n_ctx, starts=None):
    """Yields (inputs, targets, counted), each [batch, pos], windows that cover a text in order.

    Where `counted` is True, every token after the first is predicted exactly once; the other places
    are padding, or belong to the next window.
    tokens: [n]. starts: positions at which windows should begin if n_ctx allows, such as the starts
    of stories; without it, each window begins where the last one ends.
    """
    last = len(tokens) - 1
    offsets = torch.arange(n_ctx + 1)
    bounds = window_bounds(last, n_ctx, starts)
    while batch := list(itertools.islice(bounds, batch_size)):
        begins_and_ends = torch.tensor(batch)  # [batch, 2]
        begins = begins_and_ends[:, :1]
        ends = begins_and_ends[:, 1:]
        windows = tokens[(begins + offsets).clamp(max=last)]  # [batch, pos + 1]
        yield windows[:, :-1], windows[:, 1:], begins + offsets[:-1] < ends


def window_bounds(last, n_ctx, starts):
    """Yields (begin, end) of consecutive windows from 0 to the position `last`."""
    begin = 0
    while begin < last:
        end = min(begin + n_ctx, last)
        if starts and end < last:
            # if no start is that early, index -1 gives the last start, which the next line excludes
            last_start = starts[bisect.bisect_right(starts, end) - 1]
            if begin < last_start <= end:
                end = last_start
        yield begin, end
        begin = end


# Texts of any size, with ids in a file


@dataclass(frozen=True)
class TokenFile:
    """Token ids on disk, [n]: only indexed parts are read, as int64.

    file: kept open, so that replacing the file on disk changes nothing. dtype: numpy's name for
    it. offset: the place of the first id in the file, in bytes.
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


def prepared_dataset(cfg, tokenizer=None):
    """The Dataset in the folder cfg.path, made by `prepare`; arguments as in `load_dataset`.

    Raises UserError for a damaged file, and if the config asks for another tokenizer.
    """
    path = Path(cfg.path) / TOKENS_FILE
    ids, found, sha256 = read_token_file(path)
    if cfg.tokenizer not in (DataConfig().tokenizer, found.kind):
        raise UserError(f"{path} was made with --tokenizer {found.kind}; leave --data.tokenizer "
                        f"{cfg.tokenizer} out, or prepare the text again")
    if tokenizer is not None and tokenizer.state_dict() != found.state_dict():
        raise UserError(f"{path} is of another tokenizer than the run; put the run's back")

    train, val = ids.split(len(ids) - int(len(ids) * cfg.val_fraction))
    n_characters = count_characters(val, found)
    return Dataset(train, val, found, path.parent.name, sha256, n_characters)


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


@dataclass(frozen=True)
class PrepareConfig:
    """How texts of any size become a token file."""

    tokenizer: Literal["char", "bpe"] = option(
        "char", "one id for each character or frequent piece")
    vocab_size: int = option(1024, "the number of tokens that bpe learns, including 256 bytes")
    gpt2: str | None = option(None, "use bpe from this folder with GPT-2's two files instead")
    out: str = option("data/prepared", f"the folder that {TOKENS_FILE} is written to")


def prepare(paths, cfg, size=PIECE_SIZE):
    """Writes the ids of texts, joined, into the folder of a PrepareConfig.

    If the tokenizer has `<|endoftext|>`, it is one token in texts, and is put between two files.
    size: the number of bytes of text read at once. Returns (number of ids, their tokenizer).
    """
    tokenizer = fit_tokenizer(paths, cfg)
    state = tokenizer.state_dict()
    dtype = "uint16" if tokenizer.d_vocab <= 1 << 16 else "uint32"
    sha256 = hashlib.sha256(json.dumps(state).encode())
    n_tokens = 0

    def header():
        # The count is padded, so the final header is as long as the first one.
        known = {"dtype": dtype, "n_tokens": f"{n_tokens:20}", "sha256": sha256.hexdigest()}
        return json.dumps(known | {"tokenizer": state}).encode() + b"\n"

    with atomic_write(Path(cfg.out) / TOKENS_FILE) as file:
        file.write(header())
        between = ENDOFTEXT if tokenizer.has_endoftext else ""
        pieces = text_pieces(paths, size, "made tokens", between=between)
        for ids in encode_pieces(pieces, tokenizer):
            piece = np.array(ids, TOKEN_DTYPES[dtype]).tobytes()
            file.write(piece)
            sha256.update(piece)
            n_tokens += len(ids)
        if not n_tokens:
            raise UserError(f"{', '.join(paths)}: no text found; give files with text in them")
        file.seek(0)
        file.write(header())
    return n_tokens, tokenizer


def fit_tokenizer(paths, cfg):
    """The tokenizer that a PrepareConfig asks for; bpe learns from the beginning of the text."""
    if cfg.gpt2 is not None:
        folder = Path(cfg.gpt2)
        if (folder / "vocab.json").exists():  # Hugging Face's names for the two files
            return BPETokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
        return BPETokenizer.from_files(folder / "encoder.json", folder / "vocab.bpe")

    if cfg.tokenizer == "bpe":
        pieces = itertools.islice(text_pieces(paths), BPE_SAMPLE_SIZE // PIECE_SIZE)
        content = "".join(pieces).encode()
        half = sum(map(os.path.getsize, paths)) // 2  # in bytes: the end is for validation
        return BPETokenizer().train(content[:half].decode(errors="ignore"), cfg.vocab_size)

    characters = set()
    for piece in text_pieces(paths, what="read for their characters"):
        characters |= set(piece)
    return CharTokenizer().fit(characters)


def encode_pieces(pieces, tokenizer):
    """Yields the ids of a document that arrives in pieces; they do not depend on where it is cut.

    The last two words of a piece are kept back until more arrives, because what follows may change
    them ("'l" is two words, "'ll" is one). The blanks before these words are kept too, because the
    last blank belongs to the next word, and so is a possible beginning of `<|endoftext|>`.
    """
    kept = ""
    new = ""
    for piece in pieces:
        new += piece
        if len(new) < len(kept):
            continue  # a long word: splitting it again for every piece would take quadratic time
        text = kept + new
        new = ""

        # Keep back the end, which the next piece may change
        words = []
        unsure = ""
        if tokenizer.kind == "bpe":
            last_document = text
            if tokenizer.has_endoftext:
                # Text before this token cannot be changed by text after it
                last_document = text.rpartition(ENDOFTEXT)[2]
                n_unsure = length_of_overlap(last_document, ENDOFTEXT)
                unsure = last_document[len(last_document) - n_unsure :]
            words = split_words(last_document.removesuffix(unsure))

        end = max(0, len(words) - 2)
        while end and words[end - 1].isspace():
            end -= 1
        kept = "".join(words[end:]) + unsure
        yield tokenizer.encode_document(text[: len(text) - len(kept)])
    yield tokenizer.encode_document(kept + new)


def main(argv=None):
    """The program: makes a token file from texts."""
    parser = flag_parser(PrepareConfig, "Turn texts of any size into ids that train.py reads.")
    parser.usage = "%(prog)s prepare FILE… [flags]"
    parser.add_argument("command", choices=["prepare"], help="the only command")
    parser.add_argument("files", nargs="+", metavar="FILE",
                        help="UTF-8 texts, joined, by <|endoftext|> if the tokenizer has it")

    flags = vars(parser.parse_args(argv))
    del flags["command"]
    files = flags.pop("files")
    cfg = config_from_dict(PrepareConfig, flags)

    n_tokens, tokenizer = prepare(files, cfg)
    print(f"{n_tokens:,} {tokenizer.unit}s of a vocabulary of {tokenizer.d_vocab:,}; to train on "
          f"them: python train.py --data.path {shlex.quote(cfg.out)}")


if __name__ == "__main__":
    run_program(main)
