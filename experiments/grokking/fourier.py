"""Decompose functions of two numbers mod p into waves of their sum.

A function of a + b alone is a sum of cos w_k(a + b) and sin w_k(a + b), with w_k = 2 pi k / p and k
from 1 to K = (p - 1) / 2, plus a constant. To project any function of a and b on these waves, take
its mean over all pairs with the same sum, and the Fourier transform of these p means. That replaces
p * p products with waves on the grid.

Shapes: values [a, b, ...], both axes of length p. logits [a, b, c]: of the answer c to a + b.

Chapter: COURSE_ROADMAP.md, 15 (grokking and training dynamics)
Prerequisites: losses.py
Next: experiments/grokking/measure.py
Source: Nanda et al. 2023, section 4 and appendix B (restricted and excluded loss)
"""

import math

import torch


def fourier_basis(p):
    """The orthonormal waves of length p, [wave, n] in float64: a constant, then cos w_1 n,
    sin w_1 n, cos w_2 n, …, up to k = (p - 1) / 2. p: odd."""
    angle = 2 * math.pi / p * torch.outer(torch.arange(1.0, (p + 1) // 2).double(),
                                          torch.arange(p).double())  # [K, n]
    waves = math.sqrt(2 / p) * torch.stack([angle.cos(), angle.sin()], 1).flatten(0, 1)
    return torch.cat([torch.full((1, p), 1 / math.sqrt(p), dtype=torch.float64), waves])


def waves_of(frequencies, p):
    """The rows of `fourier_basis` for some frequencies, [2 * n, p]; frequencies: ints from 1."""
    rows = [row for k in frequencies for row in (2 * k - 1, 2 * k)]
    return fourier_basis(p)[rows]


def pair_sums(p):
    """(a + b) mod p for all pairs, [a, b]."""
    numbers = torch.arange(p)
    return (numbers[:, None] + numbers) % p


def mean_by_sum(values, pairs=None):
    """The mean of values [a, b, ...] over the pairs with the same sum: [sum, ...].

    pairs: [a, b], bool, the pairs that count; None is all.
    """
    p = len(values)
    if pairs is None:
        pairs = torch.ones(p, p, dtype=torch.bool)
    sum_of_pair = pair_sums(p)[pairs]  # [pair]
    totals = values.new_zeros(p, *values.shape[2:]).index_add_(0, sum_of_pair, values[pairs])
    n_pairs = sum_of_pair.bincount(minlength=p).clamp(min=1)
    return totals / n_pairs.view(p, *[1] * (values.ndim - 2))


def sum_waves(values, frequencies, pairs=None):
    """Project values [a, b, ...] on cos w_k(a + b) and sin w_k(a + b) for k in `frequencies`; the
    result has the same shape. pairs: as in `mean_by_sum`."""
    p = len(values)
    waves = waves_of(frequencies, p)
    part = waves.T @ (waves @ mean_by_sum(values, pairs).flatten(1))  # [sum, …]
    return part.view(p, *values.shape[2:])[pair_sums(p)]


def restricted_logits(logits, frequencies, pairs=None):
    """Logits [a, b, c] reduced to the waves of a + b at some frequencies, plus the mean over all
    pairs, which holds no information about single pairs.

    pairs: the pairs from which the waves are computed. With all pairs, memorising also lowers the
    loss of these waves: each memorised pair adds its answer to the mean of its sum.
    """
    counted = logits.flatten(0, 1) if pairs is None else logits[pairs]  # [pair, c]
    return sum_waves(logits, frequencies, pairs) + counted.mean(0)


def excluded_logits(logits, frequencies):
    """Logits [a, b, c] without the waves of a + b at some frequencies."""
    return logits - sum_waves(logits, frequencies)


def centre_logits(logits):
    """Logits [a, b, c] minus their mean over c, which softmax ignores, and over all pairs."""
    logits = logits - logits.mean(-1, keepdim=True)
    return logits - logits.mean((0, 1))


def sum_shares(logits):
    """The share of the variance of logits [a, b, c] in waves of a + b at each frequency, [K].

    The shares sum to at most 1, and to exactly 1 if the logits depend on a + b alone.
    """
    logits = centre_logits(logits)
    waves = fourier_basis(len(logits))[1:] @ mean_by_sum(logits)  # [2 K, c]
    energy = len(logits) * waves.square().sum(1).view(-1, 2).sum(1)  # p pairs have each sum
    return energy / logits.square().sum()


def answer_shares(logits):
    """The share of the variance of logits [a, b, c] that is a multiple of cos w_k(a + b - c), for
    each frequency: [K]. This is the algorithm itself, without its errors."""
    logits = centre_logits(logits)
    basis = fourier_basis(len(logits))[1:]
    waves = basis @ mean_by_sum(logits) @ basis.T  # [2 K of a + b, 2 K of c]
    blocks = waves.unflatten(0, (-1, 2)).unflatten(2, (-1, 2))  # [K, cos or sin, K, cos or sin]
    K = torch.arange(len(blocks))
    blocks = blocks[K, :, K]  # [K, cos or sin of a + b, cos or sin of c]
    along = (blocks[:, 0, 0] + blocks[:, 1, 1]) / math.sqrt(2)  # cos(x - y) = cos cos + sin sin
    return len(logits) * along.square() / logits.square().sum()


def key_frequencies(shares, least=0.01):
    """The frequencies (ints from 1) whose shares [K] are at least `least`, largest share first."""
    ordered, order = shares.sort(descending=True)
    return (order[ordered >= least] + 1).tolist()


def neuron_fits(post):
    """The frequency that explains most of each neuron, and how much.

    post: [a, b, neuron], activations. Returns (shares [neuron], frequencies [neuron]). A frequency
    k explains the part of a neuron's variance over all pairs that lies in the products of 1,
    cos w_k a, sin w_k a with 1, cos w_k b, sin w_k b (8 functions; the constant has no variance).
    A constant neuron has share 0.
    """
    p = len(post)
    basis = fourier_basis(p)
    waves = torch.einsum("ia,abn,jb->ijn", basis, post.double(), basis)  # [wave of a, of b, neuron]
    energy = waves.square()
    energy[0, 0] = 0  # the constant

    # what each frequency explains: waves of a or of b alone, and products of one of each
    K = torch.arange((p - 1) // 2)
    alone = energy[0, 1:] + energy[1:, 0]  # [2 K, neuron]
    together = energy[1:, 1:].unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))[K, K]
    explained = together + alone.unflatten(0, (-1, 2)).sum(1)  # [K, neuron]

    most, which = explained.max(0)
    variance = energy.sum((0, 1))
    return torch.where(variance > 1e-12, most / variance.clamp(min=1e-12), 0.0), which + 1
