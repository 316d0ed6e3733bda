"""Chapter 2 as a learner would write it: entropy, byte pairs and windows, without heaps."""

import itertools
import math
from collections import Counter

import torch

from tokenizer import merge_pair


def entropy_of(options):
    """How many nats the next word costs on average, if its probabilities are known.

    options: {word: probability}, summing to 1; a probability may be 0. Returns a float.
    """
    return -sum(p * math.log(p) for p in options.values() if p > 0)


def entropy_rate(transitions):
    """How many nats a symbol costs in the long run, if each depends on the one before it.

    transitions: [state, next_state], rows summing to 1: the chance of each next symbol. From any
    start, the share of time in each state converges. Returns a float: the entropy of the rows,
    weighted by these shares.
    """
    shares = torch.full((len(transitions),), 1 / len(transitions), dtype=torch.float64)
    for _ in range(10_000):
        shares = shares @ transitions.double()
    entropies = torch.special.entr(transitions.double()).sum(1)  # [state]
    return (shares * entropies).sum().item()


def character_costs(word, options):
    """How many nats each character of a word costs, if the possible words are known.

    options: {word: probability}; word is one of them, and none is the beginning of another. While
    the word is read, only words with the same beginning remain possible. Returns a list of floats:
    -log of the share of the remaining probability that has this character next.
    """
    costs = []
    possible = options
    for end in range(1, len(word) + 1):
        before = sum(possible.values())
        possible = {other: p for other, p in possible.items() if other.startswith(word[:end])}
        costs.append(-math.log(sum(possible.values()) / before))
    return costs


def count_pairs(words):
    """How often each pair of neighbours occurs.

    words: a list of (pieces, count): the pieces of a word, a list of bytes, and how often the word
    occurs. Returns {(left, right): how often}, a Counter.
    """
    counts = Counter()
    for pieces, count in words:
        for left, right in itertools.pairwise(pieces):
            counts[left, right] += count
    return counts


def learn_merges(word_counts, n_merges):
    """The first n_merges pairs that BPE merges, in order: a list of (bytes, bytes).

    word_counts: {word: how often}. Each word begins as its bytes, [b"a", b"b", …]. In each round
    the most frequent pair becomes one piece in all words; of equally frequent pairs, the one that
    sorts first. It ends early if no pair occurs twice.
    """
    words = [([bytes([byte]) for byte in word.encode()], n) for word, n in word_counts.items()]
    merges = []
    while len(merges) < n_merges:
        counts = count_pairs(words)
        if not counts or max(counts.values()) < 2:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [(merge_pair(pieces, best), n) for pieces, n in words]
    return merges


def bpe_merge(self, word):
    """The pieces of one word, a list of bytes.

    self.ranks: {(left, right): rank}, where the pair that was learned first has rank 0. The word
    begins as its bytes; of the pairs of neighbours that it has, the one of lowest rank is merged,
    everywhere in the word, until no known pair is left.
    """
    pieces = [bytes([byte]) for byte in word.encode()]
    while True:
        pairs = [pair for pair in itertools.pairwise(pieces) if pair in self.ranks]
        if not pairs:
            return pieces
        pieces = merge_pair(pieces, min(pairs, key=self.ranks.get))


def random_batch(tokens, batch_size, n_ctx, generator):
    """Windows drawn from anywhere in a text: (inputs, targets), each [batch, pos], one token apart.

    tokens: [n]. n_ctx: how many positions a window has. generator: a torch.Generator, the only
    source of randomness. Every window of n_ctx + 1 tokens is equally likely.
    """
    starts = torch.randint(len(tokens) - n_ctx, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(n_ctx + 1)]  # [batch, pos + 1]
    return windows[:, :-1], windows[:, 1:]


def window_bounds(last, n_ctx):
    """Consecutive windows in which every token but the first is predicted exactly once.

    last: the position of the last token. A window (begin, end) reads positions begin, …, end - 1
    and predicts begin + 1, …, end: n_ctx of them, the last window perhaps fewer. Returns a list of
    (begin, end).
    """
    return [(begin, min(begin + n_ctx, last)) for begin in range(0, last, n_ctx)]
