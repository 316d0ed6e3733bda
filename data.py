"""From a text to batches: find it, split it, and cut windows out of it.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Read before: tokenizer.py, corpus.py; after: embeddings.py
Source: Tiny Shakespeare is the text of Karpathy's char-rnn (2015)
"""

import hashlib
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import requests
import torch

import corpus
from tokenizer import BPETokenizer, CharTokenizer
from utils import NoNetwork, UserError, atomic_write, fetch_into

SHAKESPEARE_FILE = "tiny_shakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILTIN_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Dataset:
    """A tokenised text, split where training ends and validation begins.

    train, val: [n], int64 ids. name: for people. sha256: of the text, so that a run can say what it
    was trained on. val_characters: how long the validation text is, so that losses can be compared
    between tokenizers.
    """

    train: torch.Tensor
    val: torch.Tensor
    tokenizer: CharTokenizer | BPETokenizer
    name: str
    sha256: str
    val_characters: int


def load_dataset(cfg, n_ctx, tokenizer=None):
    """The Dataset that a DataConfig asks for.

    n_ctx: the context that its windows must fill. tokenizer: one to use as it is (resuming).
    Raises UserError for a text that is missing, empty, not UTF-8, or too short for one window.
    """
    text, name = load_text(cfg)
    n_train = len(text) - int(len(text) * cfg.val_fraction)
    if tokenizer is None and cfg.tokenizer == "bpe":  # what the validation part is made of is news
        tokenizer = BPETokenizer().train(text[:n_train], cfg.vocab_size)
    tokenizer = tokenizer or CharTokenizer().fit(text)
    train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:n_train], text[n_train:]))
    for part, name_of_part in ((train, "training"), (val, "validation")):
        if len(part) <= n_ctx:
            raise UserError(
                f"{name}: the {name_of_part} part has {len(part)} tokens, and one window of "
                f"n_ctx={n_ctx} needs {n_ctx + 1}; use a longer text or a smaller --model.n_ctx"
            )
    return Dataset(train, val, tokenizer, name, sha256_of(text.encode()), len(text) - n_train)


def load_text(cfg):
    """(text, name) of the file at `path`, of Tiny Shakespeare, or of the built-in corpus."""
    if cfg.path is not None:
        return read_text(Path(cfg.path)), Path(cfg.path).name
    if cfg.dataset != "builtin":
        try:
            return tiny_shakespeare(Path(cfg.folder)), "Tiny Shakespeare"
        except NoNetwork as problem:
            if cfg.dataset == "tiny_shakespeare":
                raise
            print(f"WARNING: {problem}\nWARNING: training on the built-in corpus instead, a little "
                  "language of gifts, songs and scenes", file=sys.stderr)
    return corpus.text(BUILTIN_CHARACTERS), "built-in corpus"


def read_text(path):
    """A UTF-8 file's text. Raises UserError where it is missing, empty, or something else."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start} is "
                        f"{error.object[error.start]:#04x}); save it as UTF-8 first") from None
    if not text:
        raise UserError(f"{path} is empty; give a file with text in it")
    return text


def tiny_shakespeare(folder, mirrors=SHAKESPEARE_MIRRORS):
    """The text of Tiny Shakespeare, from `folder` or, the first time, from a mirror.

    Raises NoNetwork where no mirror answers, UserError where the file is not what it should be.
    """
    path = folder / SHAKESPEARE_FILE
    if not path.exists():
        content = download(mirrors, SHAKESPEARE_SHA256, f"put the file at {path}, or use "
                           "--data.path FILE or --data.dataset builtin")
        with atomic_write(path) as file:
            file.write(content)
    text = read_text(path)
    if (found := sha256_of(text.encode())) != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare: SHA-256 {found[:12]}…, expected "
                        f"{SHAKESPEARE_SHA256[:12]}…; delete it to download it again, or pass "
                        "your own text with --data.path")
    return text


def download(mirrors, sha256, remedy, *, attempts=2, pause=1.0):
    """The bytes behind the first mirror whose content has that SHA-256.

    Each mirror is tried `attempts` times, `pause` seconds apart.
    Raises UserError if only wrong content came, NoNetwork if nothing came.
    """
    wrong, failure = None, None
    for attempt in range(attempts):
        time.sleep(pause if attempt else 0)
        for address in mirrors:
            try:
                content = fetch(address)
            except requests.RequestException as error:
                failure = type(error).__name__
                continue
            if (found := sha256_of(content)) == sha256:
                return content
            wrong = f"{address} sent {len(content):,} bytes with SHA-256 {found[:12]}…"
    if wrong:
        raise UserError(f"{wrong}, expected {sha256[:12]}…; {remedy}")
    raise NoNetwork(f"no network: {len(mirrors)} mirrors did not answer ({failure}); {remedy}")


def fetch(address):
    """The bytes at an address, with a progress line. Raises requests.RequestException."""
    content = io.BytesIO()
    fetch_into(content, address)
    return content.getvalue()


def sha256_of(content):
    """The SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def random_batch(tokens, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: windows from anywhere, and the same one token later.

    tokens: [n]. generator: a CPU torch.Generator, the only source of randomness.
    """
    starts = torch.randint(len(tokens) - n_ctx, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(n_ctx + 1)]  # [batch, pos + 1]
    return windows[:, :-1], windows[:, 1:]


def windows_in_order(tokens, batch_size, n_ctx):
    """Yields (inputs, targets), each [batch, pos], that predict every token after the first once.

    The windows do not overlap; what is left at the end is a shorter one, and comes alone.
    """
    starts = range(0, len(tokens) - n_ctx, n_ctx)  # of the windows that are full
    for first in range(0, len(starts), batch_size):
        some = torch.tensor(starts[first : first + batch_size])
        windows = tokens[some[:, None] + torch.arange(n_ctx + 1)]
        yield windows[:, :-1], windows[:, 1:]
    rest = tokens[len(starts) * n_ctx :]
    if len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:]
