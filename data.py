"""From text to batches: find or download a text, tokenise it, split it, and cut windows from it.

    python data.py prepare texts/ --tokenizer bpe --out data/mine    # texts larger than memory
    python train.py --data.path data/mine

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: config.py, tokenizer.py, corpus.py
Next: embeddings.py
Source: Tiny Shakespeare is the text of Karpathy's char-rnn (2015)
"""

import bisect
import hashlib
import itertools
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import corpus
from config import DataConfig, config_from_dict, flag_parser
from download import download_verified
from token_files import (
    STDIN,
    TOKENS_FILE,
    PrepareConfig,
    TokenFile,
    count_characters,
    prepare,
    read_token_file,
)
from tokenizer import TOKENIZERS, BPETokenizer, CharTokenizer, WordTokenizer
from utils import NoNetwork, UserError, atomic_write, read_text, run_program

SHAKESPEARE_FILE = "tiny_shakespeare.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_MIRRORS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
)
BUILTIN_CHARACTERS = 1_000_000
LARGEST_DOWNLOAD = 1 << 24  # bytes; Tiny Shakespeare has 1.1 million
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
    if tokenizer is not None:
        check_text_fits(text, tokenizer, name)
    elif cfg.tokenizer == "bpe":
        tokenizer = BPETokenizer().train(text[:n_train], cfg.vocab_size)
    else:
        tokenizer = TOKENIZERS[cfg.tokenizer]().fit(text)

    train = torch.tensor(tokenizer.encode_document(text[:n_train]))
    val = torch.tensor(tokenizer.encode_document(text[n_train:]))
    return Dataset(
        train=train, val=val, tokenizer=tokenizer, name=name,
        sha256=sha256_of(text.encode()), val_characters=len(text) - n_train,
        floor=corpus.floor_of(sample, tokenizer, val),
    )


def check_text_fits(text, tokenizer, name):
    """Raises UserError naming the characters or words of a text that a tokenizer lacks."""
    if tokenizer.kind == "bpe":  # it has all bytes
        return
    unknown = sorted(set(tokenizer.split(text)) - set(tokenizer.ids))
    if unknown:
        more = f" and {len(unknown) - 10:,} more" if len(unknown) > 10 else ""
        raise UserError(f"{name} has {tokenizer.unit}s that the model's tokenizer lacks: "
                        f"{' '.join(map(repr, unknown[:10]))}{more}; replace them in the text, or "
                        "train a new model on it")


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
        content = download_verified(mirrors, SHAKESPEARE_SHA256, remedy, LARGEST_DOWNLOAD)
        with atomic_write(path) as file:
            file.write(content)

    text = read_text(path)
    found = sha256_of(text.encode())
    if found != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare (SHA-256 {found[:12]}…); delete it, to "
                        "download it again, or pass your own text with --data.path")
    return text


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


# Texts of any size


def prepared_dataset(cfg, tokenizer=None):
    """The Dataset in the folder cfg.path, made by `prepare`; arguments as in `load_dataset`.

    Raises UserError for a damaged file, and if the config asks for another tokenizer.
    """
    path = Path(cfg.path) / TOKENS_FILE
    ids, found, sha256 = read_token_file(path)
    if tokenizer is not None and tokenizer.state_dict() != found.state_dict():
        raise UserError(f"{path} is of another tokenizer than the run or the model to begin with; "
                        "prepare the text with that one")
    if tokenizer is None and cfg.tokenizer not in (DataConfig().tokenizer, found.kind):
        raise UserError(f"{path} was made with --tokenizer {found.kind}; leave --data.tokenizer "
                        f"{cfg.tokenizer} out, or prepare the text again")

    train, val = ids.split(len(ids) - int(len(ids) * cfg.val_fraction))
    n_characters = count_characters(val, found)
    return Dataset(train, val, found, path.parent.name, sha256, n_characters)


def main(argv=None):
    """The program: makes a token file from texts."""
    parser = flag_parser(PrepareConfig, "Turn texts of any size into ids that train.py reads.")
    parser.usage = "%(prog)s prepare PATH… [flags]"
    parser.add_argument("command", choices=["prepare"], help="the only command")
    parser.add_argument("paths", nargs="+", metavar="PATH", help=(
        "a UTF-8 text, which is one document; a .jsonl file with a document in each line; either "
        "packed as .gz; a folder, for the .txt, .md and .jsonl files in it (.gz too) at any depth, "
        "sorted by path, without hidden ones and without following links to folders; or - for "
        "stdin, one document, which is first copied into the folder --out"))
    parser.epilog = (
        "Documents are joined by <|endoftext|> as one token if the tokenizer has it: GPT-2's does, "
        "and bpe learns it unless there is only one document. Otherwise they are joined by a blank "
        "line. Empty documents are left out. If the program is stopped or killed, the same command "
        "goes on where it stopped; with other flags or changed files it starts again, and always "
        "with stdin.")

    flags = vars(parser.parse_args(argv))
    del flags["command"]
    paths = flags.pop("paths")
    cfg = config_from_dict(PrepareConfig, flags)

    try:
        n_tokens, tokenizer = prepare(paths, cfg)
    except KeyboardInterrupt:
        if STDIN not in paths:
            print("\nthe same command goes on from here", file=sys.stderr)
        raise
    print(f"{n_tokens:,} {tokenizer.unit}s of a vocabulary of {tokenizer.d_vocab:,}; to train on "
          f"them: python train.py --data.path {shlex.quote(cfg.out)}")


if __name__ == "__main__":
    run_program(main)
