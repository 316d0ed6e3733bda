"""Other right solutions of the exercises of chapter 2."""

import itertools
import math
from collections import Counter, defaultdict

import torch


def entropy_of_as_torch(options):
    chances = torch.tensor(list(options.values()), dtype=torch.float64)
    return torch.special.entr(chances).sum().item()


def entropy_rate_as_eigenvector(transitions):
    values, vectors = torch.linalg.eig(transitions.double().T)
    stationary = vectors[:, (values - 1).abs().argmin()].real
    stationary = stationary / stationary.sum()
    rate = 0.0
    for share, row in zip(stationary.tolist(), transitions.tolist(), strict=True):
        rate -= share * sum(p * math.log(p) for p in row if p > 0)
    return rate


def entropy_rate_as_power(transitions):
    shares = torch.linalg.matrix_power(transitions.double(), 4096)[0]
    return float(-(shares[:, None] * torch.xlogy(transitions, transitions)).sum())


def character_costs_as_prefixes(word, options):
    def probability_of(prefix):
        return sum(p for other, p in options.items() if other[: len(prefix)] == prefix)

    return [math.log(probability_of(word[:i]) / probability_of(word[: i + 1]))
            for i in range(len(word))]


def count_pairs_as_indices(words):
    counts = defaultdict(int)
    for pieces, count in words:
        for i in range(len(pieces) - 1):
            counts[(pieces[i], pieces[i + 1])] += count
    return Counter(counts)


def merge_pair_as_stack(pieces, pair):
    merged = []
    open_left = False  # whether the last piece may still be the left half of a pair
    for piece in pieces:
        if merged and open_left and merged[-1] == pair[0] and piece == pair[1]:
            merged[-1] = merged[-1] + piece
            open_left = False
        else:
            merged.append(piece)
            open_left = True
    return merged


def learn_merges_as_sorted(word_counts, n_merges):
    words = {word: [bytes([byte]) for byte in word.encode("utf-8")] for word in word_counts}
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                counts[pair] += word_counts[word]
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if not ordered or ordered[0][1] < 2:
            return merges
        merges.append(ordered[0][0])
        words = {word: merge_pair_as_stack(pieces, merges[-1]) for word, pieces in words.items()}
    return merges


def bpe_merge_as_one_at_a_time(self, word):
    pieces = [bytes([byte]) for byte in word.encode()]
    while len(pieces) > 1:
        ranks = [self.ranks.get((pieces[i], pieces[i + 1]), math.inf)
                 for i in range(len(pieces) - 1)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == math.inf:
            break
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
    return pieces


def bpe_merge_as_every_merge_in_order(self, word):
    # a merge makes only pairs that were learned later, so one pass in order is enough
    pieces = [bytes([byte]) for byte in word.encode()]
    for pair in sorted(self.ranks, key=self.ranks.get):
        pieces = merge_pair_as_stack(pieces, pair)
    return pieces


def random_batch_as_slices(tokens, batch_size, n_ctx, generator):
    starts = torch.randint(0, len(tokens) - n_ctx, (batch_size,), generator=generator).tolist()
    inputs = torch.stack([tokens[i : i + n_ctx] for i in starts])
    targets = torch.stack([tokens[i + 1 : i + 1 + n_ctx] for i in starts])
    return inputs, targets


def window_bounds_as_loop(last, n_ctx):
    bounds = []
    begin = 0
    while begin < last:
        end = begin + n_ctx if begin + n_ctx < last else last
        bounds.append((begin, end))
        begin = end
    return bounds
