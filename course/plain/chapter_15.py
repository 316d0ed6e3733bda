"""Chapter 15 as a learner would write it: waves of modular addition, and when a curve turns."""

import math

import torch


def addition_table(p):
    """All pairs of numbers below p, and their sums.

    Returns (pairs [p * p, 2], sums [p * p]), integers: pair a * p + b is (a, b), its sum (a + b)
    mod p.
    """
    a = torch.arange(p).repeat_interleave(p)
    b = torch.arange(p).repeat(p)
    return torch.stack([a, b], 1), (a + b) % p


def fourier_basis(p):
    """The orthonormal waves of length p, p odd: [wave, n].

    Row 0 is constant; rows 2k - 1 and 2k are cos and sin of 2 pi k n / p, for k = 1, …, (p - 1) /
    2. Every row has length 1. Returns [p, p], in float64.
    """
    n = torch.arange(p).double()
    rows = [torch.ones(p).double() / math.sqrt(p)]
    for k in range(1, (p - 1) // 2 + 1):
        angle = 2 * math.pi * k * n / p
        rows.append(math.sqrt(2 / p) * angle.cos())
        rows.append(math.sqrt(2 / p) * angle.sin())
    return torch.stack(rows)


def clock_logits(p, frequencies):
    """The logits of the algorithm itself: add angles, and compare with each answer's angle.

    frequencies: a list of k from 1. Returns [a, b, c], the sum over k of cos(2 pi k (a + b - c) /
    p): largest where c is (a + b) mod p.
    """
    numbers = torch.arange(p)
    difference = numbers[:, None, None] + numbers[:, None] - numbers  # [a, b, c]
    return sum((2 * math.pi * k * difference / p).cos() for k in frequencies)


def frequency_shares(values):
    """The share of each frequency in a function of n = 0, …, p - 1.

    values: [p, d], such as the embedding of p numbers, p odd. fourier_basis(p) may be called: its
    products with the values are the amounts of each wave. Returns [K], K = (p - 1) / 2: the squares
    of cos and sin at k = 1, …, K, summed over d, as shares of the squares at all of them (the
    constant does not count).
    """
    waves = fourier_basis(len(values)) @ values.double()  # [wave, d]
    energy = waves[1:].pow(2).sum(1)  # [2 K]
    by_frequency = energy[0::2] + energy[1::2]  # [K]
    return by_frequency / by_frequency.sum()


def keep_sum_waves(logits, frequencies):
    """The restricted logits: only some waves of a + b, and the mean.

    logits: [a, b, c], float64; frequencies: a list of k from 1. The logits of all pairs with one
    sum are averaged, which leaves a function of s = (a + b) mod p; of that, rows 2k - 1 and 2k of
    fourier_basis(p) are kept for each k, and the constant, row 0. Returns [a, b, c].
    """
    p = len(logits)
    pairs, sums = addition_table(p)
    by_sum = torch.zeros(p, logits.shape[2], dtype=logits.dtype)
    by_sum.index_add_(0, sums, logits[pairs[:, 0], pairs[:, 1]])
    by_sum = by_sum / p  # each sum has p pairs

    rows = [0] + [row for k in frequencies for row in (2 * k - 1, 2 * k)]
    waves = fourier_basis(p)[rows]  # [wave, s]
    kept = waves.T @ (waves @ by_sum)  # [s, c]
    return kept[sums].view(p, p, -1)


def delay_of(steps, train, test, level):
    """How many times later unseen pairs are known than those trained on.

    steps: [n], from 1 on; train, test: [n], accuracies. Returns a float: the first step at which
    test is at least `level`, over the first at which train is; infinity if test never is.
    """
    train_step = next(step for step, value in zip(steps, train, strict=True) if value >= level)
    for step, value in zip(steps, test, strict=True):
        if value >= level:
            return step / train_step
    return math.inf


def distance_to_bigrams(logits, tokens, table):
    """How far a model's predictions are from those of a table of bigrams, in nats per token.

    logits: [batch, pos, d_vocab], the model's, for the token after each position. tokens: [batch,
    pos], what it read. table: [d_vocab, d_vocab], the log-probabilities of the next token (last
    axis) after each token. Returns the mean of KL(table || model) over all positions, a number:
    what the model would lose on a text whose tokens are drawn from the table.
    """
    wanted = table[tokens]  # [batch, pos, d_vocab]
    log_probs = logits.log_softmax(-1)
    divergence = (wanted.exp() * (wanted - log_probs)).sum(-1)  # [batch, pos]
    return divergence.mean()


def ability_step(steps, above, by_trigrams):
    """The step at which an ability has come.

    steps: [n], those at which a training was kept. above: [n], at each of them, by how many nats
    the words that need the ability lie above their floor. by_trigrams: how far trigrams are above
    it. Returns the first step at which `above` is less than half of that; infinity if there is
    none.
    """
    for step, nats in zip(steps, above, strict=True):
        if nats < by_trigrams / 2:
            return step
    return math.inf
