"""Chapter 16 as a learner would write it: a claim that can be wrong, its control, its p-values."""

import itertools

import torch


def can_go_either_way(threshold, possible):
    """Whether some possible value fulfils a claim, and another one does not.

    threshold: {"above": limit}, {"below": limit} or {"between": (first, last)}; a value must lie
    strictly above or below the limit, while first and last count as between. possible: (low, high),
    the smallest and the largest value that the number can have, low < high. Returns a bool.
    """
    low, high = possible
    if "above" in threshold:
        return low <= threshold["above"] < high
    if "below" in threshold:
        return low < threshold["below"] <= high

    first, last = threshold["between"]
    some_hold = max(low, first) <= min(high, last)
    all_hold = first <= low and high <= last
    return some_hold and not all_hold


def matched_control(heads, n_heads, generator):
    """Heads to compare a hypothesis with: as many in each layer, and none that it names.

    heads: [(layer, head)], those that the hypothesis names, each once; at most half of a layer's.
    n_heads: how many heads a layer has. generator: a torch.Generator, the only source of
    randomness. Returns [(layer, head)] in any order, none twice. All such sets are equally likely.
    """
    control = []
    for layer in sorted({layer for layer, _ in heads}):
        named = [head for at, head in heads if at == layer]
        others = [head for head in range(n_heads) if head not in named]
        order = torch.randperm(len(others), generator=generator)
        control += [(layer, others[place]) for place in order[: len(named)].tolist()]
    return control


def exact_pvalue(one, other):
    """The p-value of an exact permutation test: is one group larger than the other by luck?

    one, other: lists of numbers, such as a score of trained and of untrained models. Their numbers
    are put together and split into groups of these sizes in every way, by their places: equal
    numbers are still two numbers. Returns the share of splits, the given one among them, whose
    difference (the mean of the first group minus that of the second) is at least the given one. A
    difference that is equal except for rounding (within 1e-9) counts. A float above 0, up to 1.
    """
    pooled = [*one, *other]

    def difference(first):
        rest = sum(pooled) - sum(first)
        return sum(first) / len(one) - rest / len(other)

    least = difference(one) - 1e-9
    splits = list(itertools.combinations(pooled, len(one)))
    reached = sum(difference(split) >= least for split in splits)
    return reached / len(splits)


def holm(p_values):
    """P-values [n] corrected for being n tests, by Holm's method: [n], in the given order.

    The smallest p-value is multiplied by n, the next one by n - 1, and so on. No corrected value is
    smaller than that of a smaller p-value, and none is larger than 1.
    """
    n = len(p_values)
    corrected = torch.zeros_like(p_values)
    largest = 0.0
    for place, index in enumerate(p_values.argsort().tolist()):
        largest = max(largest, min((n - place) * p_values[index].item(), 1.0))
        corrected[index] = largest
    return corrected
