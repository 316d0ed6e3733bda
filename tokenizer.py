"""Text to integers and back: one id a character, a word, or a frequent piece (byte-level BPE).

Characters are few, so a text is long. Words make it short, but there is always another one, unless
they come from a list. Byte-pair encoding lies between: it begins with the 256 bytes, which can
write anything, and again and again makes the most frequent pair of neighbours one token.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: utils.py
Next: corpus.py
Source: Shannon 1951 (letters as symbols); Sennrich et al. 2016 (BPE); Radford et al. 2019 (bytes)
"""

import functools
import heapq
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from utils import UserError

ENDOFTEXT = "<|endoftext|>"
MOST_CACHED_WORDS = 1 << 18
# Unicode's White_Space, spelled out: Python's \s has U+001C to U+001F besides.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class CharTokenizer:
    """One id for each distinct character, in the order of their code points.

    The order depends on the characters alone, so the same text gives the same ids everywhere.
    """

    kind, unit = "char", "character"

    def __init__(self):
        self.symbols, self.ids = [], {}

    @property
    def d_vocab(self):
        """How many ids there are: 0 to d_vocab - 1."""
        return len(self.symbols)

    def split(self, text):
        """The symbols of a text."""
        return list(text)

    def join(self, symbols):
        """The text of symbols."""
        return "".join(symbols)

    def fit(self, text):
        """Takes the symbols of `text` as the vocabulary; returns itself."""
        symbols = sorted(set(self.split(text)))
        return self.load_state_dict({"kind": self.kind, "symbols": symbols})

    def encode(self, text):
        """The ids of a text, a list of int. Raises UserError naming the symbols it lacks."""
        symbols = self.split(text)
        if unknown := sorted(set(symbols) - set(self.ids)):
            known = "".join(self.symbols) if self.d_vocab < 300 else "…"
            raise UserError(f"unknown {self.unit}s {' '.join(map(repr, unknown[:10]))}; "
                            f"this tokenizer knows {self.d_vocab}: {known!r}")
        return [self.ids[symbol] for symbol in symbols]

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor. Raises UserError on unknown ids."""
        return self.join(self.to_str_tokens(ids))

    def to_bytes(self, ids):
        """The UTF-8 bytes of ids."""
        return self.decode(ids).encode()

    def to_str_tokens(self, text):
        """The tokens of a text, or of its ids, as a list of str. UserError on unknown ones."""
        ids = self.encode(text) if isinstance(text, str) else text
        return [self.symbols[i] for i in check_ids(ids, self.d_vocab)]

    def state_dict(self):
        """All that `load_state_dict` needs, in plain types."""
        return {"kind": self.kind, "symbols": self.symbols}

    def load_state_dict(self, state):
        """Becomes the tokenizer that `state_dict` came from; returns itself."""
        check_kind(state, self.kind)
        self.symbols = list(state["symbols"])
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        return self


class WordTokenizer(CharTokenizer):
    """One id for each distinct word, mark and end of line; spaces are understood, not kept."""

    kind, unit = "word", "word"

    def split(self, text):
        """The words, marks and ends of lines of a text."""
        return re.findall(r"\w+|[^\w\s]|\n", text)

    def join(self, symbols):
        """The text of words: a space before each, but none before a mark or around a line's end."""
        return re.sub(r" ([^\w\s])| ?(\n) ?", r"\1\2", " ".join(symbols))


class BPETokenizer(CharTokenizer):
    """Byte-pair encoding on the bytes of UTF-8, GPT-2's way.

    A text is cut into words first (`word_pattern`), so that no token spans two of them; a word
    begins as its bytes, and the pair of neighbours that was merged first in training is merged
    first again, until no known pair is left.
    """

    kind, unit = "bpe", "token"

    def __init__(self):
        self.set_([bytes([byte]) for byte in byte_characters()], [])

    def set_(self, tokens, merges):
        """Takes tokens (bytes, by id) and merges (pairs of bytes, first merged first) as its own.

        Raises UserError where a byte or what a merge makes has no id.
        """
        self.symbols = tokens
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.known_words = {}
        needed = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
        missing = [token for token in needed if token not in self.ids]
        if missing:
            raise UserError(f"the vocabulary lacks {missing[0]!r}, which its merges make; use two "
                            "files of one tokenizer")

    @property
    def endoftext_id(self):
        """The id of `<|endoftext|>`. Raises UserError where there is none."""
        if ENDOFTEXT.encode() not in self.ids:
            raise UserError(f"this tokenizer has no {ENDOFTEXT}; leave it out")
        return self.ids[ENDOFTEXT.encode()]

    def train(self, text, vocab_size):
        """Learns merges from `text` until there are vocab_size tokens or no pair occurs twice; ties
        go to the pair that sorts first. Returns itself. UserError for fewer than 256 tokens."""
        if vocab_size < 256:
            raise UserError(f"vocab_size={vocab_size} is less than the 256 bytes; choose more")
        merges = learn_merges(Counter(split_words(text)), vocab_size - 256)
        tokens = [bytes([byte]) for byte in byte_characters()]
        self.set_(tokens + [left + right for left, right in merges], merges)
        return self

    @classmethod
    def from_files(cls, vocab, merges):
        """The tokenizer of GPT-2's files: encoder.json and vocab.bpe, or vocab.json and merges.txt.

        Raises UserError where one is missing or not what it should be.
        """
        try:
            ids = json.loads(Path(vocab).read_text(encoding="utf-8"))
            lines = Path(merges).read_text(encoding="utf-8").split("\n")
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("the ids are not 0, 1, 2, …")
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; GPT-2's tokenizer "
                            "needs a vocabulary and a file of merges") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{vocab} and {merges} are not a tokenizer's files ({error}); download "
                            "them again") from None
        tokens = sorted(ids, key=ids.get)
        return cls().load_state_dict({"kind": cls.kind, "tokens": tokens, "merges": pairs})

    def encode(self, text, endoftext=False):
        """The ids of a text, a list of int. Raises UserError on half a surrogate pair.
        endoftext: read `<|endoftext|>` in it as that one token; else it is plain characters.
        """
        if endoftext:
            first, *others = map(self.encode, text.split(ENDOFTEXT))
            return first + [i for part in others for i in (self.endoftext_id, *part)]
        ids = []
        for word in split_words(text):
            if word not in self.known_words:
                if len(self.known_words) >= MOST_CACHED_WORDS:
                    self.known_words.clear()
                self.known_words[word] = [self.ids[piece] for piece in self.merge(word)]
            ids += self.known_words[word]
        return ids

    def merge(self, word):
        """The pieces of one word, a list of bytes."""
        pieces = [bytes([byte]) for byte in word.encode()]
        while len(pieces) > 1:
            known = [pair for pair in itertools.pairwise(pieces) if pair in self.ranks]
            if not known:
                break
            pieces = merge_pair(pieces, min(known, key=self.ranks.get))
        return pieces

    def to_bytes(self, ids):
        """The bytes of ids; they need not be whole characters."""
        return b"".join(self.symbols[i] for i in check_ids(ids, self.d_vocab))

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor; U+FFFD where bytes are not UTF-8."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def to_str_tokens(self, text):
        """The tokens of a text, or of its ids, as a list of str."""
        ids = self.encode(text) if isinstance(text, str) else text
        return [self.decode([i]) for i in ids]

    def state_dict(self):
        """All that `load_state_dict` needs, in plain types: bytes as GPT-2's visible characters."""
        merges = [[show_bytes(piece) for piece in pair] for pair in self.ranks]
        return {"kind": self.kind, "tokens": [*map(show_bytes, self.symbols)], "merges": merges}

    def load_state_dict(self, state):
        """Becomes the tokenizer that `state_dict` came from; returns itself."""
        check_kind(state, self.kind)
        byte_of = {character: byte for byte, character in byte_characters().items()}

        def hide(shown):
            if any(character not in byte_of for character in shown):
                raise UserError(f"the token {shown!r} is not written in GPT-2's visible bytes")
            return bytes(byte_of[character] for character in shown)

        pairs = [tuple(hide(piece) for piece in pair) for pair in state["merges"]]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError("a line of the merges is not a pair; use the two files of a tokenizer")
        self.set_([hide(token) for token in state["tokens"]], pairs)
        return self


TOKENIZERS = {kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BPETokenizer)}


def load_tokenizer(state):
    """The tokenizer that a state_dict came from, of whichever kind."""
    kind = state.get("kind")
    if kind not in list(TOKENIZERS):
        raise UserError(f"a {kind!r} tokenizer is unknown; there are: {', '.join(TOKENIZERS)}")
    try:
        return TOKENIZERS[kind]().load_state_dict(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the state of a tokenizer ({error!r})") from None


def check_kind(state, kind):
    """Raises UserError for a state of another kind."""
    if state.get("kind") != kind:
        raise UserError(f"a {state.get('kind')!r} tokenizer cannot be loaded as {kind!r}")


def check_ids(ids, d_vocab):
    """The ids as a list of int. Raises UserError where some are not in the vocabulary."""
    ids = [int(i) for i in ids]
    unknown = sorted({i for i in ids if not 0 <= i < d_vocab})
    if unknown:
        raise UserError(f"unknown ids {unknown[:10]}; they run from 0 to {d_vocab - 1}")
    return ids


@functools.cache
def byte_characters():
    """{byte: a visible character}, in GPT-2's order, since its files are text: a byte that Latin-1
    shows stands for itself, the others (space, controls) are U+0100 and on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    codes = {byte: byte for byte in visible} | {byte: 256 + i for i, byte in enumerate(hidden)}
    return {byte: chr(code) for byte, code in codes.items()}


def show_bytes(token):
    """Bytes in GPT-2's visible characters: b" the" is "Ġthe"."""
    return "".join(byte_characters()[byte] for byte in token)


@functools.cache
def word_pattern():
    """GPT-2's rule for what a word is, compiled (a third of a second, once): an English ending ('s,
    'll, …); letters, digits or other signs, each with the one space before it; or blanks, of which
    the last is left for the word that follows."""
    ranges = defaultdict(str)  # of all code points of a general category: L letters, N numbers
    characters = map(chr, range(sys.maxunicode + 1))
    for category, run in itertools.groupby(characters, lambda c: unicodedata.category(c)[0]):
        run = "".join(run)
        ranges[category] += f"{run[0]}-{run[-1]}"
    letter, number = ranges["L"], ranges["N"]
    return re.compile(
        rf"'(?:[sdmt]|ll|ve|re)| ?[{letter}]+| ?[{number}]+| ?[^{SPACES}{letter}{number}]+"
        rf"|[{SPACES}]+(?![^{SPACES}])|[{SPACES}]+"
    )


def split_words(text):
    """A text's words, which put together are the text. Raises UserError on half a surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} is {text[error.start]!r}, half a surrogate pair, "
                        "which is not text; leave it out") from None
    return word_pattern().findall(text)


def merge_pair(pieces, pair):
    """The pieces with every occurrence of the pair, from the left, made one."""
    found, i = [], 0
    while i < len(pieces):
        both = i + 1 < len(pieces) and pieces[i] == pair[0] and pieces[i + 1] == pair[1]
        found.append(pieces[i] + pieces[i + 1] if both else pieces[i])
        i += 2 if both else 1
    return found


def learn_merges(word_counts, n_merges):
    """The first n_merges pairs that BPE merges, in order: a list of (bytes, bytes).

    word_counts: {word: how often}. When a pair is merged, only words that have it are looked at;
    the heap may hold outdated counts, which are passed over when they come up.
    """
    words = [([bytes([byte]) for byte in word.encode()], n) for word, n in word_counts.items()]
    counts, where = Counter(), defaultdict(set)
    for index, (pieces, count) in enumerate(words):
        for pair in itertools.pairwise(pieces):
            counts[pair] += count
            where[pair].add(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        negative, pair = heapq.heappop(heap)
        if -negative != counts[pair]:
            continue
        if counts[pair] < 2:
            break
        merges.append(pair)
        changed = set()
        for index in where.pop(pair):
            pieces, count = words[index]
            for old in itertools.pairwise(pieces):
                counts[old] -= count
                changed.add(old)
            pieces[:] = merge_pair(pieces, pair)
            for new in itertools.pairwise(pieces):
                counts[new] += count
                where[new].add(index)
                changed.add(new)
        for other in changed:
            heapq.heappush(heap, (-counts[other], other))
    return merges
