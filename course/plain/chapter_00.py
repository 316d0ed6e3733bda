"""Chapter 0 as a learner would write it: means, their errors, and how often chance does as well."""

import torch

from utils import UserError


def standard_error(values):
    """The standard error of a mean of n values: their spread over sqrt(n).

    values: [n], such as a loss under n seeds; the spread is the standard deviation with division by
    n - 1, since the mean is taken from the same values. Returns a scalar.
    """
    centred = values - values.mean()
    variance = centred.pow(2).sum() / (len(values) - 1)
    return variance.sqrt() / len(values) ** 0.5


def paired_difference(one, other):
    """The mean difference of two recipes that were run with the same seeds, and its error.

    one, other: [n], value i of both with seed i. Returns (difference, standard_error), scalars: the
    mean of one - other, and its standard error.
    """
    differences = one - other
    return differences.mean(), standard_error(differences)


def seeded_generator(seed):
    """A fresh CPU torch.Generator; all randomness goes through one, so every run can be repeated.

    seed: a whole number. torch's global generator does not change.
    """
    return torch.Generator().manual_seed(seed)


def bootstrap_ci(values, *, level=0.95, n_draws=2000, seed=0):
    """An interval for the mean of some values, by the bootstrap.

    values: [n] or [n, ...]. n_draws times, n of the n values are drawn, with repetition, and their
    mean is taken. Returns (low, high), each [...], between which the middle `level` of these means
    lie. Draw with seeded_generator(seed).
    """
    n = len(values)
    draws = torch.randint(n, (n_draws, n), generator=seeded_generator(seed))  # [draw, n]
    means = values[draws].mean(1)  # [draw, ...]
    low = means.quantile((1 - level) / 2, dim=0)
    high = means.quantile((1 + level) / 2, dim=0)
    return low, high


def permutation_test(one, other, *, n_draws=999, seed=0):
    """How often chance separates two groups as far as they are: a p-value.

    one: [n], other: [m]. If the labels mean nothing, any other grouping of the n + m values is as
    likely. Returns (1 + the number of n_draws random groupings whose means differ at least as much,
    in either direction) / (1 + n_draws), a float.
    """
    generator = seeded_generator(seed)
    values = torch.cat([one, other])
    observed = (one.mean() - other.mean()).abs()
    reached = 0
    for _ in range(n_draws):
        shuffled = values[torch.randperm(len(values), generator=generator)]
        difference = (shuffled[: len(one)].mean() - shuffled[len(one) :].mean()).abs()
        reached += int(difference >= observed - 1e-6)
    return (1 + reached) / (1 + n_draws)


def permutation_pvalue(observed, null):
    """How often chance does as well as each of several heads, if the best one was chosen.

    observed: [head], the score of each. null: [draw, head], scores of the same heads if there is
    nothing to find. A draw counts for a head if the draw's largest score, over all heads, is at
    least the head's own. Returns [head]: (1 + draws that count) / (1 + draws), never 0.
    """
    largest = null.max(1).values  # [draw]
    reached = (largest[:, None] >= observed).sum(0)  # [head]
    return (1 + reached) / (1 + len(null))


def check_heads(d_model, n_heads):
    """Refuses a number of heads that does not divide the width of the stream.

    Returns d_head, the width of a head. Raises UserError, whose message has both numbers, if
    n_heads does not divide d_model.
    """
    if d_model % n_heads:
        raise UserError(f"n_heads={n_heads} does not divide d_model={d_model}; choose a divisor")
    return d_model // n_heads
