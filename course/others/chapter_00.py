"""Other right solutions of the exercises of chapter 0."""

import itertools
import math
import statistics

import numpy as np
import torch

from utils import UserError


def standard_error_as_torch(values):
    return values.std() / math.sqrt(values.numel())


def standard_error_as_statistics(values):
    return statistics.stdev(values.tolist()) / math.sqrt(len(values))


def paired_difference_as_torch(one, other):
    return one.mean() - other.mean(), (one - other).std() / len(one) ** 0.5


def seeded_generator_as_two_steps(seed):
    generator = torch.Generator(device="cpu")
    generator.manual_seed(seed)
    return generator


def bootstrap_ci_as_numpy(values, *, level=0.95, n_draws=2000, seed=0):
    random = np.random.default_rng(seed)
    means = np.stack([values.numpy()[random.integers(0, len(values), len(values))].mean(0)
                      for _ in range(n_draws)])
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(means, [tail, 100 - tail], axis=0)
    return torch.as_tensor(low), torch.as_tensor(high)


def permutation_test_as_numpy(one, other, *, n_draws=999, seed=0):
    random = np.random.default_rng(seed)
    values = np.concatenate([one.numpy(), other.numpy()])
    draws = np.stack([random.permutation(values) for _ in range(n_draws)])
    n = len(one)
    null = abs(draws[:, :n].mean(1) - draws[:, n:].mean(1))
    return (1 + (null >= abs(values[:n].mean() - values[n:].mean()) - 1e-6).sum()) / (1 + n_draws)


def permutation_test_as_all_ways(one, other, *, n_draws=999, seed=0):
    # of two small groups, all ways to share them out
    values = torch.cat([one, other]).tolist()
    total = sum(values)
    n, m = len(one), len(other)
    observed = abs(sum(values[:n]) / n - sum(values[n:]) / m)
    null = [abs(sum(part) / n - (total - sum(part)) / m)
            for part in itertools.islice(itertools.combinations(values, n), 100_000)]
    share = sum(value >= observed - 1e-6 for value in null) / len(null)
    return (1 + share * n_draws) / (1 + n_draws)


def permutation_pvalue_as_loop(observed, null):
    p_values = []
    for score in observed:
        reached = sum(1 for draw in null if draw.max() >= score)
        p_values.append((1 + reached) / (1 + null.shape[0]))
    return torch.tensor(p_values)


def check_heads_as_divmod(d_model, n_heads):
    d_head, rest = divmod(d_model, n_heads)
    if rest != 0:
        raise UserError(f"{d_model} dimensions cannot be shared by {n_heads} heads")
    return d_head
