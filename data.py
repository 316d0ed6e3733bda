"""From a text to batches: find it, split it, and cut windows out of it.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Read before: tokenizer.py, corpus.py; after: embeddings.py
Source: Tiny Shakespeare is the text of Karpathy's char-rnn (2015)
"""

import bisect
import hashlib
import io
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
import torch.nn.functional as F

import corpus
from config import DataConfig
from tokenizer import TOKENIZERS, BPETokenizer, CharTokenizer
from utils import NoNetwork, UserError, atomic_write, fetch_into

SHAKESPEARE_FILE = "tiny_shakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILTIN_CHARACTERS = 1_000_000
# Where a text can be cut and each token stays what it was, by the kind of tokenizer.
BETWEEN_TOKENS = {"char": "", "word": r"(?<!\w)|(?!\w)", "bpe": r"(?<=\S)(?=[ \n])"}


@dataclass(frozen=True)
class Floor:
    """The best possible prediction of a text: log_probs [n], in nats, the category of each token,
    and where stories begin (`starts`, positions of the ends before them)."""

    log_probs: torch.Tensor
    categories: list
    starts: list

    def above(self, losses):
        """{category: nats} by which losses [n - 1], of the tokens after the first, lie above the
        floor on average; "all" comes first, the others as in corpus.CATEGORIES, if they occur."""
        excess = losses + self.log_probs[1:]
        kinds = {kind: [other == kind for other in self.categories[1:]]
                 for kind in corpus.CATEGORIES}
        return {"all": excess.mean().item()} | {
            kind: excess[torch.tensor(mask)].mean().item() for kind, mask in kinds.items()
            if any(mask)}


@dataclass(frozen=True)
class Dataset:
    """A tokenised text, split where training ends and validation begins.

    train, val: [n], int64 ids. name: for people. sha256: of the text, so that a run can say what it
    was trained on. val_characters: how long the validation text is, so that losses can be compared
    between tokenizers. floor: what each token of `val` costs at best, where that is known.
    """

    train: torch.Tensor
    val: torch.Tensor
    tokenizer: CharTokenizer | BPETokenizer
    name: str
    sha256: str
    val_characters: int
    floor: Floor | None = None


def load_dataset(cfg, n_ctx, tokenizer=None):
    """The Dataset that a DataConfig asks for.

    n_ctx: the context that its windows must fill. tokenizer: one to use as it is (resuming).
    Raises UserError for a text that is missing, empty, not UTF-8, or too short for one window.
    """
    if cfg.tokenizer != "bpe" and cfg.vocab_size != DataConfig().vocab_size:
        raise UserError(f"vocab_size={cfg.vocab_size} does nothing with tokenizer="
                        f"{cfg.tokenizer!r}; leave it out, or use --data.tokenizer bpe")
    text, name, sample = load_text(cfg)
    n_train = len(text) - int(len(text) * cfg.val_fraction)
    if sample is not None:
        # So that validation begins with a whole story.
        n_train = max(0, text.rfind(corpus.END, 0, n_train))
    else:
        n_train = place_to_cut(text, n_train, tokenizer.kind if tokenizer else cfg.tokenizer)
    if tokenizer is None and cfg.tokenizer == "bpe":  # what the validation part is made of is news
        tokenizer = BPETokenizer().train(text[:n_train], cfg.vocab_size)
    tokenizer = tokenizer or TOKENIZERS[cfg.tokenizer]().fit(text)
    train, val = (torch.tensor(tokenizer.encode(part)) for part in (text[:n_train], text[n_train:]))
    for part, name_of_part in ((train, "training"), (val, "validation")):
        if len(part) <= n_ctx:
            raise UserError(
                f"{name}: the {name_of_part} part has {len(part)} tokens, and one window of "
                f"n_ctx={n_ctx} needs {n_ctx + 1}; use a longer text, a smaller --model.n_ctx, or "
                f"another --data.val_fraction than {cfg.val_fraction}"
            )
    return Dataset(train, val, tokenizer, name, sha256_of(text.encode()), len(text) - n_train,
                   floor_of(sample, tokenizer, val))


def place_to_cut(text, n, kind):
    """The last place up to n, if it is near, where no token is cut in two; without one, n."""
    between = re.compile(BETWEEN_TOKENS[kind])
    return next((i for i in range(n, max(0, n - 1000), -1) if between.match(text, i)), n)


def floor_of(sample, tokenizer, val):
    """The Floor of val [n], the last tokens of a corpus.Sample; None where it is not known, which
    is for any other text, and for pieces of words."""
    if sample is None or tokenizer.kind == "bpe":
        return None
    log_probs, categories = sample.log_probs, sample.categories
    if tokenizer.kind == "char":
        log_probs, categories = corpus.characters(sample)
    starts = (val == tokenizer.ids[corpus.END]).nonzero().flatten().tolist()
    return Floor(torch.tensor(log_probs[-len(val):]), categories[-len(val):], starts)


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


def repeated_batch(d_vocab, batch_size, n_ctx, generator):
    """(inputs, targets), each [batch, pos]: random tokens, repeated from the period on, which is
    another one in each row, from 4 to half of the window.

    Nothing in them can be known but what the same tokens were followed by before: what an induction
    head does (Olsson et al. 2022). With one period for all, looking that far back would do.
    """
    drawn = torch.randint(d_vocab, (batch_size, n_ctx + 1), generator=generator)
    longest = max(4, (n_ctx + 1) // 2)
    periods = torch.randint(4, longest + 1, (batch_size, 1), generator=generator)
    windows = drawn.gather(1, torch.arange(n_ctx + 1) % periods)
    return windows[:, :-1], windows[:, 1:]


def windows_in_order(tokens, batch_size, n_ctx, starts=None):
    """Yields (inputs, targets, counted), each [batch, pos], which predict every token after the
    first once: where `counted`. What is not is padding, or belongs to the next window.

    starts: where a window should begin, such as at stories, if it can (it is n_ctx long at most);
    without, one begins where the last one ends.
    """
    begins = [0]
    while (limit := begins[-1] + n_ctx) < len(tokens) - 1:
        last = bisect.bisect_right(starts, limit) - 1 if starts else -1
        begins.append(starts[last] if last >= 0 and starts[last] > begins[-1] else limit)
    begins = torch.tensor(begins)
    lengths = torch.diff(begins, append=torch.tensor([len(tokens) - 1]))
    padded, offsets = F.pad(tokens, (0, n_ctx)), torch.arange(n_ctx + 1)
    for some in torch.arange(len(begins)).split(batch_size):
        windows = padded[begins[some, None] + offsets]
        yield windows[:, :-1], windows[:, 1:], offsets[:-1] < lengths[some, None]
