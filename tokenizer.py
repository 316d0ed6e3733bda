"""Tokenizers: text to integer ids and back, by characters, words, or byte-pair encoding (BPE).

There are few different characters, so a text is many tokens long. Words make a text short, but new
words keep coming, unless they are drawn from a list. Byte-pair encoding is in between: it starts
with the 256 bytes, which can spell anything, and repeatedly merges the most frequent pair of
neighbours into one new token.

`<|endoftext|>` separates documents. In a document, a prompt or a stop text, a tokenizer that has
this token reads it as one (`encode_document`). `encode` treats it as plain characters by default,
so that a text about tokens stays what it is.

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

from utils import UserError, check_choice, printable, read_json, text_pieces

ENDOFTEXT = "<|endoftext|>"
MOST_CACHED_WORDS = 1 << 18
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe",
                   "added_tokens.json", "tokenizer_config.json")  # what `read_tokenizer` may read
# What a tokenizer.json must say to mean GPT-2's rules; None: it may be left out
TOKENIZER_JSON = {
    "model.type": ("BPE", None),
    "model.dropout": (None, 0),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.ignore_merges": (None, False),
    "normalizer.type": (None,),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (True, None),
    "post_processor.type": ("ByteLevel", "TemplateProcessing", None),
    "decoder.type": ("ByteLevel", None),
}
# Unicode's White_Space, spelled out, because Python's \s also has U+001C to U+001F.
SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


class CharTokenizer:
    """Character tokenizer: one id for each distinct character, ordered by code point.

    The order depends only on the characters, so the same text gives the same ids everywhere.
    """

    kind = "char"
    unit = "character"  # what one id represents
    has_endoftext = False  # whether `<|endoftext|>` is one token

    def __init__(self):
        self.symbols = []  # by id
        self.ids = {}

    @property
    def d_vocab(self):
        """The number of ids: 0 to d_vocab - 1."""
        return len(self.symbols)

    def split(self, text):
        """The symbols of a text."""
        return list(text)

    def join(self, symbols):
        """The text made of some symbols."""
        return "".join(symbols)

    def fit(self, text):
        """Makes the symbols of `text` the vocabulary; returns itself."""
        symbols = sorted(set(self.split(text)))
        return self.load_state_dict({"kind": self.kind, "symbols": symbols})

    def encode(self, text):
        """The ids of a text, a list of int. Raises UserError naming symbols that have no id."""
        symbols = self.split(text)
        unknown = sorted(set(symbols) - set(self.ids))
        if unknown:
            known = self.join(self.symbols) if self.d_vocab < 300 else "…"
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

        show_unknown: return `<id 50300>` for an id that the tokenizer lacks. A model whose
        vocabulary was padded to a round number has such ids, and a lens may predict them.
        """
        ids = self.encode(text) if isinstance(text, str) else text
        ids = as_ints(ids) if show_unknown else check_ids(ids, self.d_vocab)
        return [self.token_text(i) if 0 <= i < self.d_vocab else f"<id {i}>" for i in ids]

    def token_text(self, i):
        """The text of one id."""
        return self.symbols[i]

    def state_dict(self):
        """Everything that `load_state_dict` needs, in plain types."""
        return {"kind": self.kind, "symbols": self.symbols}

    def load_state_dict(self, state):
        """Restores the tokenizer that `state_dict` came from; returns itself."""
        check_kind(state, self.kind)
        self.symbols = list(state["symbols"])
        self.ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        return self


class WordTokenizer(CharTokenizer):
    """Word tokenizer: one id for each word, punctuation mark and newline. Spaces are restored."""

    kind = "word"
    unit = "word"  # what one id represents

    def split(self, text):
        """The words, punctuation marks and newlines of a text."""
        return re.findall(r"\w+|[^\w\s]|\n", text)

    def join(self, symbols):
        """The text of words: a space before each, except before a mark or around a newline."""
        return re.sub(r" ([^\w\s])| ?(\n) ?", r"\1\2", " ".join(symbols))


class BPETokenizer(CharTokenizer):
    """Byte-pair encoding on UTF-8 bytes, as in GPT-2.

    A text is first cut into words (`word_pattern`), so that no token spans two of them. A word
    starts as its bytes. Then the known pair of neighbours that was learned first is merged first,
    until no known pair is left.
    """

    kind = "bpe"
    unit = "token"  # what one id represents

    def __init__(self):
        self.set_vocabulary_([bytes([byte]) for byte in byte_characters()], [])

    def set_vocabulary_(self, tokens, merges, added=()):
        """Sets the vocabulary: tokens (bytes, by id) and merges (pairs of bytes, in order learned).

        added: texts that are one token each in a document, as `<|endoftext|>` is. Raises UserError
        if one of them, a byte, or the result of a merge, has no id.
        """
        self.symbols = tokens
        self.added = list(added)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.known_words = {}  # {word: its ids}, so that each word is merged only once

        lost = [byte for byte in range(256) if bytes([byte]) not in self.ids]
        if lost:
            raise UserError(f"the vocabulary lacks {len(lost)} of the 256 bytes, such as "
                            f"{bytes(lost[:1])!r}, so it cannot spell every text; train a "
                            "tokenizer that begins with all bytes")
        needed = [left + right for left, right in merges] + [text.encode() for text in added]
        missing = [token for token in needed if token not in self.ids]
        if missing:
            raise UserError(f"the vocabulary lacks {missing[0]!r}, which its merges make; use "
                            "the files of one tokenizer")

    @property
    def has_endoftext(self):
        """Whether `<|endoftext|>` is one token."""
        return ENDOFTEXT.encode() in self.ids

    @property
    def single_texts(self):
        """The texts that are one token each in a document, a list."""
        return [*self.added, ENDOFTEXT] if self.has_endoftext else list(self.added)

    @property
    def endoftext_id(self):
        """The id of `<|endoftext|>`. Raises UserError if there is none."""
        if not self.has_endoftext:
            raise UserError(f"this tokenizer has no {ENDOFTEXT}; leave it out")
        return self.ids[ENDOFTEXT.encode()]

    def train(self, text, vocab_size, endoftext=False):
        """Learns merges from `text` until there are vocab_size tokens or no pair occurs twice.

        Among equally frequent pairs, the one that sorts first is merged. Returns itself.
        endoftext: `<|endoftext|>` separates documents in the text, and becomes one more token.
        Raises UserError for fewer than 256 tokens.
        """
        if vocab_size < 256:
            raise UserError(f"vocab_size={vocab_size} is less than the 256 bytes; choose more")
        documents = text.split(ENDOFTEXT) if endoftext else [text]
        word_counts = Counter(word for document in documents for word in split_words(document))
        merges = learn_merges(word_counts, vocab_size - 256)
        tokens = [bytes([byte]) for byte in byte_characters()]
        tokens += [left + right for left, right in merges]
        if endoftext:
            tokens.append(ENDOFTEXT.encode())
        self.set_vocabulary_(tokens, merges)
        return self

    @classmethod
    def from_files(cls, vocab, merges, added=None):
        """Loads GPT-2's tokenizer files: encoder.json and vocab.bpe, or vocab.json and merges.txt.

        added: {text: id} of further tokens; None if there are none. Raises UserError if a file is
        missing or has other content.
        """
        try:
            ids = json.loads("".join(text_pieces(vocab)))
            lines = "".join(text_pieces(merges)).splitlines()
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            state = vocabulary_state(ids, pairs, added or {})
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}; GPT-2's tokenizer "
                            "needs a vocabulary and a file of merges") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{vocab} and {merges} are not a tokenizer's files ({error}); download "
                            "them again") from None
        return cls().load_state_dict(state)

    @classmethod
    def from_json(cls, path):
        """Loads a tokenizer.json, in which Hugging Face's libraries keep a whole tokenizer.

        Raises UserError naming a setting that is not GPT-2's, because it would give other ids.
        """
        values = read_json(path)
        try:
            check_tokenizer_json(values, path)
            model = values["model"]
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            added = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
            return cls().load_state_dict(vocabulary_state(model["vocab"], pairs, added))
        except UserError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a tokenizer's file ({printable(repr(error))}); "
                            "download it again") from None

    def encode(self, text, endoftext=False):
        """The ids of a text, a list of int. Raises UserError on half a surrogate pair.

        endoftext: read `<|endoftext|>` as its single token; by default it is plain characters.
        """
        if endoftext:
            return self.encode_around([ENDOFTEXT], text)

        ids = []
        for word in split_words(text):
            if word not in self.known_words:
                if len(self.known_words) >= MOST_CACHED_WORDS:
                    self.known_words.clear()
                self.known_words[word] = [self.ids[piece] for piece in self.merge(word)]
            ids += self.known_words[word]
        return ids

    def encode_document(self, text):
        """The ids of a text in which `<|endoftext|>`, if the tokenizer has it, and every other
        added token is one token."""
        return self.encode_around(self.single_texts, text)

    def encode_around(self, single, text):
        """The ids of a text in which each of the texts in the list `single` is one token. Where
        several of them begin, the longest counts."""
        if not single:
            return self.encode(text)
        ids = []
        for part in re.split(f"({any_of(single)})", text):
            if part == ENDOFTEXT and part in single:
                ids.append(self.endoftext_id)
            elif part in single:
                ids.append(self.ids[part.encode()])
            else:
                ids += self.encode(part)
        return ids

    def merge(self, word):
        """The pieces of one word, a list of bytes.

        Each piece knows its neighbours, and pairs that can be merged wait in a heap, so a word of n
        bytes takes n log n steps. A pair in the heap may no longer exist when its turn comes.
        """
        pieces = [bytes([byte]) for byte in word.encode()]  # None once merged into another
        ranks = self.ranks
        heap = [(ranks[pair], place) for place, pair in enumerate(itertools.pairwise(pieces))
                if pair in ranks]
        heapq.heapify(heap)
        end = len(pieces)
        before = list(range(-1, end - 1))
        after = list(range(1, end + 1))

        while heap:
            # Every place of the pair that was learned first, from the left
            first_rank = heap[0][0]
            places = []
            while heap and heap[0][0] == first_rank:
                places.append(heapq.heappop(heap)[1])

            for left in places:
                right = after[left]
                if right == end or ranks.get((pieces[left], pieces[right])) != first_rank:
                    continue  # it no longer exists
                pieces[left] += pieces[right]
                pieces[right] = None
                after[left] = after[right]
                if after[left] != end:
                    before[after[left]] = left

                # The new pairs with its neighbours
                for place in (before[left], left):
                    if place >= 0 and after[place] != end:
                        rank = ranks.get((pieces[place], pieces[after[place]]))
                        if rank is not None:
                            heapq.heappush(heap, (rank, place))
        return [piece for piece in pieces if piece is not None]

    def to_bytes(self, ids):
        """The bytes of ids; they need not form whole characters."""
        return b"".join(self.symbols[i] for i in check_ids(ids, self.d_vocab))

    def decode(self, ids):
        """The text of ids, a sequence of int or a 1-D tensor; U+FFFD for invalid UTF-8."""
        return self.to_bytes(ids).decode("utf-8", errors="replace")

    def token_text(self, i):
        """The text of one id; U+FFFD for bytes that are not UTF-8."""
        return self.decode([i])

    def state_dict(self):
        """Everything that `load_state_dict` needs, in plain types; bytes as visible characters."""
        merges = [[show_bytes(piece) for piece in pair] for pair in self.ranks]
        state = {"kind": self.kind, "tokens": [*map(show_bytes, self.symbols)], "merges": merges}
        return state | {"added": self.added} if self.added else state

    def load_state_dict(self, state):
        """Restores the tokenizer that `state_dict` came from; returns itself."""
        check_kind(state, self.kind)
        pairs = [tuple(map(parse_shown_bytes, pair)) for pair in state["merges"]]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError("a line of the merges is not a pair; use the two files of a tokenizer")
        tokens = [parse_shown_bytes(token) for token in state["tokens"]]
        self.set_vocabulary_(tokens, pairs, state.get("added", []))
        return self


TOKENIZERS = {kind.kind: kind for kind in (CharTokenizer, WordTokenizer, BPETokenizer)}


def load_tokenizer(state):
    """The tokenizer that a state_dict came from, of any kind."""
    kind = check_choice("tokenizer", state.get("kind"), TOKENIZERS)
    try:
        return TOKENIZERS[kind]().load_state_dict(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"this is not the state of a tokenizer ({error!r})") from None


def read_tokenizer(folder):
    """The BPETokenizer of the files in a folder, in Hugging Face's format or OpenAI's; None if
    there are none.

    Raises UserError for files that are damaged, and for settings that give other ids than GPT-2's.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    for name in ("add_prefix_space", "add_bos_token"):
        if settings.get(name):
            raise UserError(f"{path}: {name}=true is not supported; make it false, and write what "
                            "it adds into your texts")

    # One file says all. The two files do not say which of their tokens are one token in a text
    if (folder / "tokenizer.json").exists():
        return BPETokenizer.from_json(folder / "tokenizer.json")
    files = tokenizer_files(folder)
    return None if files is None else BPETokenizer.from_files(*files, added_tokens(folder))


def added_tokens(folder):
    """{text: id} of the tokens that were added to the two files of a tokenizer in a folder."""
    path = folder / "added_tokens.json"
    added = read_json(path) if path.exists() else {}
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    try:
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            check_added_token(token, path)
            added[token["content"]] = int(i)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: added_tokens_decoder is not a tokenizer's "
                        f"({printable(repr(error))}); download it again") from None
    return added


def tokenizer_files(folder):
    """(vocabulary, merges), the paths of a tokenizer's two files in a folder; None without them.

    Hugging Face and OpenAI use different names for the two files; both are accepted.
    """
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() and (folder / merges).exists():
            return folder / vocab, folder / merges
    return None


def check_kind(state, kind):
    """Raises UserError for a state of another kind."""
    if state.get("kind") != kind:
        raise UserError(f"a {state.get('kind')!r} tokenizer cannot be loaded as {kind!r}")


def vocabulary_state(ids, merges, added):
    """The state of a BPETokenizer, given what its files say.

    ids: {token in GPT-2's visible bytes: id}. merges: pairs of such tokens, in the order learned.
    added: {text: id} of tokens that no merge makes; they may stand in ids too, as plain text.
    Raises ValueError if a token has two ids, or if the ids are not 0, 1, 2, …
    """
    shown = {show_bytes(text.encode()): i for text, i in added.items()}
    pieces = {token: i for token, i in ids.items() if token not in added}
    twice = [text for text, i in added.items() if ids.get(text, i) != i] + [*pieces.keys() & shown]
    if twice:
        raise ValueError(f"the added token {twice[0]!r} has two ids")
    pieces |= shown
    if sorted(pieces.values()) != list(range(len(pieces))):
        raise ValueError("the ids are not 0, 1, 2, …")

    state = {"kind": BPETokenizer.kind, "tokens": sorted(pieces, key=pieces.get), "merges": merges}
    more = [text for text in added if text != ENDOFTEXT]
    return state | {"added": more} if more else state


def check_tokenizer_json(values, path):
    """Raises UserError if a tokenizer.json's values say that text becomes tokens by other rules
    than GPT-2's."""
    for setting, accepted in TOKENIZER_JSON.items():
        section, _, name = setting.partition(".")
        part = values.get(section) or {}
        found = part.get(name) if isinstance(part, dict) else part
        if not isinstance(part, dict) or found not in accepted:
            raise UserError(f"{path}: {setting}={printable(repr(found))} is not supported; GPT-2's "
                            f"tokenizer has {' or '.join(map(repr, accepted))}")

    template = (values.get("post_processor") or {}).get("single") or []
    if any("SpecialToken" in piece for piece in template):
        raise UserError(f"{path}: its post_processor puts tokens around each text; take it out of "
                        "the file, and write these tokens into your texts")
    for token in values.get("added_tokens") or []:
        check_added_token(token, path)


def check_added_token(token, path):
    """Raises UserError if an added token, a dict, takes what is around it in a text into itself."""
    for flag in ("lstrip", "rstrip", "single_word"):
        if token.get(flag):
            raise UserError(f"{path}: the added token {printable(repr(token['content']))} "
                            f"has {flag}=true, which is not supported; make it false")


def as_ints(ids):
    """The ids as a list of int. Raises UserError if one is not an integer."""
    try:
        return list(map(operator.index, ids))
    except TypeError:
        raise UserError(f"{ids} are not ids; give integers, in one row") from None


def check_ids(ids, d_vocab):
    """The ids as a list of int. Raises UserError if some are not in the vocabulary."""
    ids = as_ints(ids)
    unknown = sorted({i for i in ids if not 0 <= i < d_vocab})
    if unknown:
        raise UserError(f"unknown ids {unknown[:10]}; they run from 0 to {d_vocab - 1}")
    return ids


@functools.cache
def byte_characters():
    """{byte: the visible character that stands for it in GPT-2's files}, in GPT-2's order.

    A byte that is visible in Latin-1 stands for itself; the others (space, controls) become U+0100
    and up.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    invisible = [byte for byte in range(256) if byte not in visible]
    characters = {byte: chr(byte) for byte in visible}
    for number, byte in enumerate(invisible):
        characters[byte] = chr(256 + number)
    return characters


@functools.cache
def character_bytes():
    """{visible character: its byte}, the inverse of `byte_characters`."""
    return {character: byte for byte, character in byte_characters().items()}


def show_bytes(token):
    """Bytes as GPT-2's visible characters: b" the" is "Ġthe"."""
    return "".join(byte_characters()[byte] for byte in token)


def parse_shown_bytes(shown):
    """The bytes of GPT-2's visible characters: "Ġthe" is b" the". UserError for other text."""
    if any(character not in character_bytes() for character in shown):
        raise UserError(f"the token {shown!r} is not written in GPT-2's visible bytes")
    return bytes(character_bytes()[character] for character in shown)


@functools.cache
def word_pattern():
    """GPT-2's rule for splitting a text into words, as a regular expression.

    A word is an English ending ('s, 'll, …); letters, digits or other signs, with one space before
    them; or blanks, except for the last one if a word follows. Compiling it takes a third of a
    second, so it is done once.
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


def any_of(texts):
    """A pattern for any of some texts; where several of them begin, the longest counts."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def length_of_overlap(text, stop):
    """The length of the longest end of `text` that begins `stop`, but is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def merge_pair(pieces, pair):
    """The pieces with every occurrence of the pair, from the left, made one piece.

    pieces: a list of bytes; pair: (left, right). Returns a list of bytes, in a new list.
    """
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
    """Learns BPE merges: the first n_merges pairs, in order, a list of (bytes, bytes).

    word_counts: {word: how often it occurs}. When a pair is merged, only words that contain it are
    updated. The heap may hold outdated counts, which are skipped when their turn comes.
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

        # Merge it in the words that contain it, and update the counts of lost and new pairs
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
