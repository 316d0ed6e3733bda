"""From a text to batches: find it, split it, and cut windows out of it.

    python data.py prepare FILE… --tokenizer bpe --out data/mine     # more than fits into memory
    python train.py --data.path data/mine

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: config.py, tokenizer.py, corpus.py
Next: embeddings.py
Source: Tiny Shakespeare is the text of Karpathy's char-rnn (2015)
"""

import bisect
import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch

import corpus
from config import DataConfig, config_from_dict, flag_parser, option
from tokenizer import TOKENIZERS, BPETokenizer, CharTokenizer, load_tokenizer, split_words
from utils import (
    NoNetwork,
    UserError,
    atomic_write,
    download_verified,
    read_text,
    run_program,
    sha256_of,
    text_pieces,
)

SHAKESPEARE_FILE = "tiny_shakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILTIN_CHARACTERS = 1_000_000
TOKENS_FILE = "tokens.bin"  # a line of JSON, then the ids
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
PIECE, SAMPLE = 1 << 18, 1 << 21  # how many bytes or ids at once; and bytes for bpe to learn from
# Where a text can be cut and each token stays what it was, by the kind of tokenizer.
BETWEEN_TOKENS = {"char": "", "word": r"(?<!\w)|(?!\w)", "bpe": r"(?<=\S)(?=[ \n])"}


@dataclass(frozen=True)
class Dataset:
    """A tokenised text, split where training ends and validation begins.

    train, val: [n], int64 ids, in memory or a TokenFile. name: for people. sha256: of the text, or
    of a TokenFile, for the record. val_characters: how long the validation text is, to compare
    losses between tokenizers. floor: what each token of `val` costs at best, where it is known.
    """

    train: "torch.Tensor | TokenFile"
    val: "torch.Tensor | TokenFile"
    tokenizer: CharTokenizer | BPETokenizer
    name: str
    sha256: str
    val_characters: int
    floor: corpus.Floor | None = None


def load_dataset(cfg, n_ctx, tokenizer=None):
    """The Dataset that a DataConfig asks for.

    n_ctx: the context that its windows must fill. tokenizer: one to use as it is (resuming).
    Raises UserError for a text that is missing, empty, not UTF-8, or too short for one window.
    """
    if cfg.tokenizer != "bpe" and cfg.vocab_size != DataConfig().vocab_size:
        raise UserError(f"vocab_size={cfg.vocab_size} does nothing with tokenizer="
                        f"{cfg.tokenizer!r}; leave it out, or use --data.tokenizer bpe")
    if cfg.path is not None and Path(cfg.path).name == TOKENS_FILE:
        cfg = replace(cfg, path=str(Path(cfg.path).parent))
    prepared = cfg.path is not None and (Path(cfg.path) / TOKENS_FILE).exists()
    dataset = (prepared_dataset if prepared else text_dataset)(cfg, tokenizer)
    for part, name_of_part in ((dataset.train, "training"), (dataset.val, "validation")):
        if len(part) <= n_ctx:
            raise UserError(
                f"{dataset.name}: the {name_of_part} part has {len(part)} tokens, a window {n_ctx}"
                " and one more; use a longer text, a smaller --model.n_ctx, or another "
                f"--data.val_fraction than {cfg.val_fraction}")
    return dataset


def text_dataset(cfg, tokenizer=None):
    """The Dataset of a text that is read as a whole; arguments as in `load_dataset`."""
    text, name, sample = load_text(cfg)
    n_train = len(text) - int(len(text) * cfg.val_fraction)
    if sample is not None:
        n_train = max(0, text.rfind(corpus.END, 0, n_train))  # it begins with a whole story
    else:
        n_train = place_to_cut(text, n_train, tokenizer.kind if tokenizer else cfg.tokenizer)
    if tokenizer is None and cfg.tokenizer == "bpe":  # what the validation part is made of is news
        tokenizer = BPETokenizer().train(text[:n_train], cfg.vocab_size)
    tokenizer = tokenizer or TOKENIZERS[cfg.tokenizer]().fit(text)
    train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:n_train], text[n_train:]))
    return Dataset(train, val, tokenizer, name, sha256_of(text.encode()), len(text) - n_train,
                   corpus.floor_of(sample, tokenizer, val))


def place_to_cut(text, n, kind):
    """The last place up to n, if it is near, where no token is cut in two; without one, n."""
    between = re.compile(BETWEEN_TOKENS[kind])
    return next((i for i in range(n, max(0, n - 1000), -1) if between.match(text, i)), n)


def load_text(cfg):
    """(text, name, sample) of the file at `path`, of Tiny Shakespeare, or of the built-in corpus,
    which alone has a corpus.Sample."""
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
    """The text of Tiny Shakespeare, from `folder` or, the first time, from a mirror. Raises
    NoNetwork where no mirror answers, UserError where the file is not what it should be."""
    path = folder / SHAKESPEARE_FILE
    if not path.exists():
        content = download_verified(mirrors, SHAKESPEARE_SHA256, f"put the file at {path}, or use "
                           "--data.path FILE or --data.dataset builtin")
        with atomic_write(path) as file:
            file.write(content)
    text = read_text(path)
    if (found := sha256_of(text.encode())) != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare (SHA-256 {found[:12]}…); delete it, to "
                        "download it again, or pass your own text with --data.path")
    return text


def random_batch(tokens, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: windows from anywhere, and the same one token later.

    tokens: [n]. generator: a CPU torch.Generator, the only source of randomness.
    """
    starts = torch.randint(len(tokens) - n_ctx, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(n_ctx + 1)]  # [batch, pos + 1]
    return windows[:, :-1], windows[:, 1:]


def repeated_batch(d_vocab, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: random tokens, repeated from the period on, which is
    another one in each row, from 4 to half of the window.

    Nothing in them can be known but what the same tokens were followed by before: what an induction
    head does (Olsson et al. 2022). With one period for all, looking that far back would do.
    """
    drawn = torch.randint(d_vocab, (batch_size, n_ctx + 1), generator=generator)
    periods = torch.randint(4, max(4, (n_ctx + 1) // 2) + 1, (batch_size, 1), generator=generator)
    windows = drawn.gather(1, torch.arange(n_ctx + 1) % periods)
    return windows[:, :-1], windows[:, 1:]


def windows_in_order(tokens, batch_size, n_ctx, starts=None):
    """Yields (inputs, targets, counted), each [batch, pos], which predict every token after the
    first once: where `counted`. What is not is padding, or belongs to the next window.

    starts: where a window should begin, such as at stories, if it can (it is n_ctx long at most);
    without, one begins where the last one ends.
    """
    last, offsets = len(tokens) - 1, torch.arange(n_ctx + 1)
    bounds = window_bounds(last, n_ctx, starts)
    while some := list(itertools.islice(bounds, batch_size)):
        begins, ends = torch.tensor(some).T[..., None]  # [batch, 1]
        windows = tokens[(begins + offsets).clamp(max=last)]
        yield windows[:, :-1], windows[:, 1:], begins + offsets[:-1] < ends


def window_bounds(last, n_ctx, starts):
    """Yields (begin, end) of windows that lie end to begin from 0 to the position `last`."""
    begin = 0
    while begin < last:
        end = min(begin + n_ctx, last)
        if starts and end < last:
            story = starts[bisect.bisect_right(starts, end) - 1]
            end = story if begin < story <= end else end
        yield begin, end
        begin = end


@dataclass(frozen=True)
class TokenFile:
    """Ids on the disk, [n]: what is indexed is read, as int64; nothing else is kept in memory.
    file: open, so that another one of its name changes nothing. offset: of the first, in bytes."""

    file: BinaryIO
    dtype: str
    offset: int
    n_tokens: int

    def __len__(self):
        return self.n_tokens

    def __getitem__(self, where):
        # Mapped anew each time: pages once read count as ours until their map is closed.
        ids = np.memmap(self.file, self.dtype, "r", self.offset, (self.n_tokens,))
        return torch.from_numpy(ids[where].astype(np.int64))

    def split(self, n_first):
        """Two of them: the first n_first ids, and the others."""
        later = self.offset + n_first * np.dtype(self.dtype).itemsize
        return (TokenFile(self.file, self.dtype, self.offset, n_first),
                TokenFile(self.file, self.dtype, later, self.n_tokens - n_first))


def prepared_dataset(cfg, tokenizer=None):
    """The Dataset in the folder cfg.path, which `prepare` made; UserError for a damaged file, and
    for another tokenizer than was asked for. Arguments as in `load_dataset`."""
    path = Path(cfg.path) / TOKENS_FILE
    ids, found, sha256 = read_token_file(path)
    if cfg.tokenizer not in (DataConfig().tokenizer, found.kind):
        raise UserError(f"{path} was made with --tokenizer {found.kind}; leave --data.tokenizer "
                        f"{cfg.tokenizer} out, or prepare the text again")
    if tokenizer is not None and tokenizer.state_dict() != found.state_dict():
        raise UserError(f"{path} is of another tokenizer than the run; put that one back")
    train, val = ids.split(len(ids) - int(len(ids) * cfg.val_fraction))
    n_characters = 0 if found.kind == "bpe" else len(val)
    for start in range(0, len(val), PIECE) if found.kind == "bpe" else ():
        text = np.frombuffer(found.to_bytes(val[start : start + PIECE].tolist()), np.uint8)
        n_characters += int((text & 0xC0 != 0x80).sum())  # the bytes that begin a character
    return Dataset(train, val, found, path.parent.name, sha256, n_characters)


def read_token_file(path):
    """(TokenFile, tokenizer, SHA-256 of that and the ids) of a file that `prepare` wrote; it is
    read once, piece by piece. Raises UserError where it is cut off, changed, or something else."""
    again, highest = "make it again with: python data.py prepare", 0
    try:
        file = open(path, "rb")
        line = file.readline(1 << 26)
        header = json.loads(line)
        tokenizer, n_tokens = load_tokenizer(header["tokenizer"]), int(header["n_tokens"])
        sha256 = hashlib.sha256(json.dumps(header["tokenizer"]).encode())
        ids = TokenFile(file, DTYPES[header["dtype"]], len(line), n_tokens)
        while len(piece := np.fromfile(file, ids.dtype, PIECE)):
            highest = max(highest, piece.max().item())
            sha256.update(piece)
        there = (file.seek(0, 2) - len(line)) / np.dtype(ids.dtype).itemsize
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is cut off or not a token file ({error}); {again}") from None
    if there != n_tokens:
        raise UserError(f"{path} has {there:,.0f} ids in place of {n_tokens:,}; {again}")
    if highest >= tokenizer.d_vocab:
        raise UserError(f"{path} has the id {highest}, and its tokenizer knows 0 to "
                        f"{tokenizer.d_vocab - 1}; {again}")
    if sha256.hexdigest() != header["sha256"]:
        raise UserError(f"{path} has changed since it was made; {again}")
    return ids, tokenizer, header["sha256"]


@dataclass(frozen=True)
class PrepareConfig:
    """How texts of any size become a token file."""

    tokenizer: Literal["char", "bpe"] = option("char", "an id for each character or frequent piece")
    vocab_size: int = option(1024, "how many tokens bpe learns, 256 bytes among them")
    gpt2: str | None = option(None, "take bpe from this folder of GPT-2's two files instead")
    out: str = option("data/prepared", f"the folder that {TOKENS_FILE} is written to")


def prepare(paths, cfg, size=PIECE):
    """Writes the ids of texts, joined, into the folder of a PrepareConfig, `size` bytes of text at
    a time. Returns (how many ids, their tokenizer)."""
    tokenizer, n_tokens = fitted_tokenizer(paths, cfg), 0
    dtype, state = "uint16" if tokenizer.d_vocab <= 1 << 16 else "uint32", tokenizer.state_dict()
    sha256 = hashlib.sha256(json.dumps(state).encode())

    def header():  # as long now as when all is known
        known = {"dtype": dtype, "n_tokens": f"{n_tokens:20}", "sha256": sha256.hexdigest()}
        return json.dumps(known | {"tokenizer": state}).encode() + b"\n"

    with atomic_write(Path(cfg.out) / TOKENS_FILE) as file:
        file.write(header())
        for ids in encoded_in_order(text_pieces(paths, size, "made tokens"), tokenizer):
            piece = np.array(ids, DTYPES[dtype]).tobytes()
            file.write(piece)
            sha256.update(piece)
            n_tokens += len(ids)
        if not n_tokens:
            raise UserError(f"{', '.join(paths)}: nothing in it; give files with text in them")
        file.seek(0)
        file.write(header())
    return n_tokens, tokenizer


def fitted_tokenizer(paths, cfg):
    """The tokenizer that a PrepareConfig asks for; bpe learns from the beginning of the text."""
    if cfg.gpt2 is not None:
        published = Path(cfg.gpt2, "encoder.json"), Path(cfg.gpt2, "vocab.bpe")
        renamed = Path(cfg.gpt2, "vocab.json"), Path(cfg.gpt2, "merges.txt")
        return BPETokenizer.from_files(*(renamed if renamed[0].exists() else published))
    if cfg.tokenizer == "bpe":
        sample = "".join(itertools.islice(text_pieces(paths), SAMPLE // PIECE))
        half = sum(map(os.path.getsize, paths)) // 2  # of the bytes: the end is to validate on
        return BPETokenizer().train(sample.encode()[:half].decode(errors="ignore"), cfg.vocab_size)
    characters = set()
    for piece in text_pieces(paths, what="read for their characters"):
        characters |= set(piece)
    return CharTokenizer().fit(characters)


def encoded_in_order(pieces, tokenizer):
    """Yields the ids of a text that comes in pieces: those of the whole text, wherever it is cut.
    Two words are kept until more is there ("'l" is two, and "'ll" one), and blanks before them, of
    which the last one belongs to what follows."""
    kept = ""
    for piece in pieces:
        text = kept + piece
        words = split_words(text) if tokenizer.kind == "bpe" else []
        end = max(0, len(words) - 2)
        while end and words[end - 1].isspace():
            end -= 1
        kept = "".join(words[end:])
        yield tokenizer.encode(text[: len(text) - len(kept)])
    yield tokenizer.encode(kept)


def main(argv=None):
    """The program: makes a token file of texts."""
    parser = flag_parser(PrepareConfig, "Turn texts of any size into ids that train.py reads.")
    parser.usage = "%(prog)s prepare FILE… [flags]"
    parser.add_argument("command", choices=["prepare"], help="the one thing there is to do")
    parser.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 texts, joined as they are")
    flags = vars(parser.parse_args(argv))
    _, files = flags.pop("command"), flags.pop("files")
    n_tokens, tokenizer = prepare(files, cfg := config_from_dict(PrepareConfig, flags))
    print(f"{n_tokens:,} {tokenizer.unit}s of a vocabulary of {tokenizer.d_vocab:,}; to train on "
          f"them: python train.py --data.path {shlex.quote(cfg.out)}")


if __name__ == "__main__":
    run_program(main)
