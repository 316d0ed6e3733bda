"""Text to integers and back: one id a character, a word, or a frequent piece (byte-level BPE).

There are few characters, so a text has many of them. Words make a text short, but there is always
another word, unless they come from a list. Byte-pair encoding (BPE) lies between: it begins with
the 256 bytes, which can write anything, and again and again makes the most frequent pair of
neighbours one token.

`<|endoftext|>` stands between documents. Where a text is a document, a prompt or a stop, a
tokenizer that has this token reads it as one (`encode_document`). `encode` takes it for plain
characters, unless asked, so that a text about tokens says what it says.

Chapter: COURSE_ROADMAP.md, 2 (text with a known entropy)
Prerequisites: utils.py
Next: corpus.py
Source: Shannon 1951 (letters as symbols); Sennrich et al. 2016 (BPE); Radford et al. 2019 (bytes)
"""

import functools
import heapq
import itertools
import json
import operator
import re
import sys
import unicodedata
from collections import Counter, defaultdict

from utils import UserError, check_choice, text_pieces

ENDOFTEXT = "<|endoftext|>"
MOST_CACHED_WORDS = 1 << 18
# Unicode's White_Space, spelled out: Python's \s has U+001C to U+001F besides.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class CharTokenizer:
    """One id for each distinct character, in the order of their code points.

    The order depends on the characters alone, so the same text gives the same ids everywhere.
    """

    kind = "char"
    unit = "character"  # what an id stands for
    has_endoftext = False  # whether `<|endoftext|>` is one token

    def __init__(self):
        self.symbols = []  # by id
        self.ids = {}

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
        """The ids of a text, a list of int. Raises UserError naming symbols that have no id."""
        symbols = self.split(text)
        unknown = sorted(set(symbols) - set(self.ids))
        if unknown:
            known = "".join(self.symbols) if self.d_vocab < 300 else "…"
            raise UserError(f"unknown {self.unit}s {' '.join(map(repr, unknown[:10]))}; "
                            f"this tokenizer knows {self.d_vocab}: {known!r}")
        return [self.ids[symbol] for symbol in symbols]

    def encode_document(self, text):
        """The ids of a text in which `<|endoftext|>` is one token, if the tokenizer has it."""
        return self.encode(text)

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor. Raises UserError on unknown ids."""
        return self.join(self.to_str_tokens(ids))

    def to_bytes(self, ids):
        """The UTF-8 bytes of ids."""
        return self.decode(ids).encode()

    def to_str_tokens(self, text, show_unknown=False):
        """The tokens of a text, or of its ids, as a list of str. UserError on unknown ones.

        show_unknown: give an id that the tokenizer lacks as `<id 50300>` instead. A model whose
        vocabulary was padded to a round number has such ids, and a lens may find them.
        """
        ids = self.encode(text) if isinstance(text, str) else text
        ids = as_ints(ids) if show_unknown else check_ids(ids, self.d_vocab)
        return [self.token_text(i) if 0 <= i < self.d_vocab else f"<id {i}>" for i in ids]

    def token_text(self, i):
        """The text of one id."""
        return self.symbols[i]

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
    """One id for each distinct word, mark and end of line; spaces are not kept but put back."""

    kind = "word"
    unit = "word"  # what an id stands for

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

    kind = "bpe"
    unit = "token"  # what an id stands for

    def __init__(self):
        self.set_vocabulary_([bytes([byte]) for byte in byte_characters()], [])

    def set_vocabulary_(self, tokens, merges):
        """Takes tokens (bytes, by id) and merges (pairs of bytes, first merged first) as its own.

        Raises UserError where a byte or what a merge makes has no id.
        """
        self.symbols = tokens
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.known_words = {}  # {word: its ids}, so that each is merged once

        needed = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
        missing = [token for token in needed if token not in self.ids]
        if missing:
            raise UserError(f"the vocabulary lacks {missing[0]!r}, which its merges make; use two "
                            "files of one tokenizer")

    @property
    def has_endoftext(self):
        """Whether `<|endoftext|>` is one token."""
        return ENDOFTEXT.encode() in self.ids

    @property
    def endoftext_id(self):
        """The id of `<|endoftext|>`. Raises UserError where there is none."""
        if not self.has_endoftext:
            raise UserError(f"this tokenizer has no {ENDOFTEXT}; leave it out")
        return self.ids[ENDOFTEXT.encode()]

    def train(self, text, vocab_size):
        """Learns merges from `text` until there are vocab_size tokens or no pair occurs twice.

        Of equally frequent pairs, the one that sorts first is merged. Returns itself.
        Raises UserError for fewer than 256 tokens.
        """
        if vocab_size < 256:
            raise UserError(f"vocab_size={vocab_size} is less than the 256 bytes; choose more")
        merges = learn_merges(Counter(split_words(text)), vocab_size - 256)
        tokens = [bytes([byte]) for byte in byte_characters()]
        tokens += [left + right for left, right in merges]
        self.set_vocabulary_(tokens, merges)
        return self

    @classmethod
    def from_files(cls, vocab, merges):
        """The tokenizer of GPT-2's files: encoder.json and vocab.bpe, or vocab.json and merges.txt.

        Raises UserError where one is missing or not what it should be.
        """
        try:
            ids = json.loads("".join(text_pieces([vocab])))
            lines = "".join(text_pieces([merges])).splitlines()
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
            first, *others = text.split(ENDOFTEXT)
            ids = self.encode(first)
            for part in others:
                ids += [self.endoftext_id, *self.encode(part)]
            return ids

        ids = []
        for word in split_words(text):
            if word not in self.known_words:
                if len(self.known_words) >= MOST_CACHED_WORDS:
                    self.known_words.clear()
                self.known_words[word] = [self.ids[piece] for piece in self.merge(word)]
            ids += self.known_words[word]
        return ids

    def encode_document(self, text):
        """The ids of a text in which `<|endoftext|>` is one token, if the tokenizer has it."""
        return self.encode(text, endoftext=self.has_endoftext)

    def merge(self, word):
        """The pieces of one word, a list of bytes.

        Each piece knows its neighbours, and the pairs that can be merged wait in a heap: a word of
        n bytes takes n log n steps. A pair in it may be gone by the time that it comes up.
        """
        pieces = [bytes([byte]) for byte in word.encode()]  # None where one became part of another
        ranks = self.ranks
        heap = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(pieces))
                if pair in ranks]
        heapq.heapify(heap)
        end = len(pieces)
        before = list(range(-1, end - 1))
        after = list(range(1, end + 1))

        while heap:
            # Every place of the pair that was merged first in training, from the left
            first_rank = heap[0][0]
            places = []
            while heap and heap[0][0] == first_rank:
                places.append(heapq.heappop(heap)[1])

            for left in places:
                right = after[left]
                if right == end or ranks.get((pieces[left], pieces[right])) != first_rank:
                    continue  # it is gone
                pieces[left] += pieces[right]
                pieces[right] = None
                after[left] = after[right]
                if after[left] != end:
                    before[after[left]] = left

                # The pairs that it makes with its neighbours
                for place in (before[left], left):
                    if place >= 0 and after[place] != end:
                        rank = ranks.get((pieces[place], pieces[after[place]]))
                        if rank is not None:
                            heapq.heappush(heap, (rank, place))
        return [piece for piece in pieces if piece is not None]

    def to_bytes(self, ids):
        """The bytes of ids; they need not be whole characters."""
        return b"".join(self.symbols[i] for i in check_ids(ids, self.d_vocab))

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor; U+FFFD where bytes are not UTF-8."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, i):
        """The text of one id; U+FFFD where its bytes are not UTF-8."""
        return self.decode([i])

    def state_dict(self):
        """All that `load_state_dict` needs, in plain types: bytes as GPT-2's visible characters."""
        merges = [[show_bytes(piece) for piece in pair] for pair in self.ranks]
        return {"kind": self.kind, "tokens": [*map(show_bytes, self.symbols)], "merges": merges}

    def load_state_dict(self, state):
        """Becomes the tokenizer that `state_dict` came from; returns itself."""
        check_kind(state, self.kind)
        pairs = [tuple(map(parse_shown_bytes, pair)) for pair in state["merges"]]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError("a line of the merges is not a pair; use the two files of a tokenizer")
        tokens = [parse_shown_bytes(token) for token in state["tokens"]]
        self.set_vocabulary_(tokens, pairs)
        return self


TOKENIZERS = {kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BPETokenizer)}


def load_tokenizer(state):
    """The tokenizer that a state_dict came from, of whichever kind."""
    kind = check_choice("tokenizer", state.get("kind"), TOKENIZERS)
    try:
        return TOKENIZERS[kind]().load_state_dict(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the state of a tokenizer ({error!r})") from None


def check_kind(state, kind):
    """Raises UserError for a state of another kind."""
    if state.get("kind") != kind:
        raise UserError(f"a {state.get('kind')!r} tokenizer cannot be loaded as {kind!r}")


def as_ints(ids):
    """The ids as a list of int. Raises UserError where one is not an integer."""
    try:
        return list(map(operator.index, ids))
    except TypeError:
        raise UserError(f"{ids} are not ids; give integers, in one row") from None


def check_ids(ids, d_vocab):
    """The ids as a list of int. Raises UserError where some are not in the vocabulary."""
    ids = as_ints(ids)
    unknown = sorted({i for i in ids if not 0 <= i < d_vocab})
    if unknown:
        raise UserError(f"unknown ids {unknown[:10]}; they run from 0 to {d_vocab - 1}")
    return ids


@functools.cache
def byte_characters():
    """{byte: the visible character that stands for it in GPT-2's files}, in GPT-2's order.

    A byte that Latin-1 shows stands for itself; the others (space, controls) are U+0100 and on.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    invisible = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    for number, byte in enumerate(invisible):
        characters[byte] = chr(256 + number)
    return characters


@functools.cache
def character_bytes():
    """{visible character: the byte that it stands for}: `byte_characters` the other way round."""
    return {character: byte for byte, character in byte_characters().items()}


def show_bytes(token):
    """Bytes in GPT-2's visible characters: b" the" is "Ġthe"."""
    return "".join(byte_characters()[byte] for byte in token)


def parse_shown_bytes(shown):
    """The bytes that `show_bytes` wrote: "Ġthe" is b" the". Raises UserError for other text."""
    if any(character not in character_bytes() for character in shown):
        raise UserError(f"the token {shown!r} is not written in GPT-2's visible bytes")
    return bytes(character_bytes()[character] for character in shown)


@functools.cache
def word_pattern():
    """GPT-2's rule for what a word is, as a regular expression.

    A word is an English ending ('s, 'll, …); letters, digits or other signs, with the one space
    before them; or blanks, of which the last is left for the word that follows. It is compiled
    once, which takes a third of a second.
    """
    # The ranges of code points of each general category: L has the letters, N the numbers.
    ranges = defaultdict(str)
    characters = map(chr, range(sys.maxunicode + 1))
    for category, run in itertools.groupby(characters, lambda c: unicodedata.category(c)[0]):
        run = "".join(run)
        ranges[category] += f"{run[0]}-{run[-1]}"
    letter = ranges["L"]
    number = ranges["N"]

    return re.compile("|".join([
        "'(?:[sdmt]|ll|ve|re)",
        f" ?[{letter}]+",
        f" ?[{number}]+",
        f" ?[^{SPACES}{letter}{number}]+",
        f"[{SPACES}]+(?![^{SPACES}])",
        f"[{SPACES}]+",
    ]))


def split_words(text):
    """The words of a text; joined, they are the text. Raises UserError on half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"character {error.start} is {text[error.start]!r}, half a surrogate pair, "
                        "which is not text; leave it out") from None
    return word_pattern().findall(text)


def length_of_overlap(text, stop):
    """How many characters at the end of a text are the beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def merge_pair(pieces, pair):
    """The pieces with every occurrence of the pair, from the left, made one piece."""
    merged = []
    i = 0
    while i < len(pieces):
        if i + 1 < len(pieces) and pieces[i] == pair[0] and pieces[i + 1] == pair[1]:
            merged.append(pieces[i] + pieces[i + 1])
            i += 2
        else:
            merged.append(pieces[i])
            i += 1
    return merged


def learn_merges(word_counts, n_merges):
    """The first n_merges pairs that BPE merges, in order: a list of (bytes, bytes).

    word_counts: {word: how often}. When a pair is merged, only words that have it are looked at;
    the heap may hold outdated counts, which are passed over when they come up.
    """
    # How often each pair occurs, and in which words
    words = [([bytes([byte]) for byte in word.encode()], n) for word, n in word_counts.items()]
    counts = Counter()
    where = defaultdict(set)
    for index, (pieces, count) in enumerate(words):
        for pair in itertools.pairwise(pieces):
            counts[pair] += count
            where[pair].add(index)

    # The most frequent pair comes up first; of equally frequent ones, the one that sorts first.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)

    merges = []
    while heap and len(merges) < n_merges:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != counts[pair]:  # outdated
            continue
        if counts[pair] < 2:
            break
        merges.append(pair)

        # Merge it in the words that have it, and count the pairs that are lost and made
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
