"""Other right solutions of the exercises of chapter 16."""

import itertools
import math

import torch

from experiments.cards.model import holds


def can_go_either_way_as_trials(threshold, possible):
    low, high = possible
    limits = threshold.get("between") or tuple(threshold.values())
    beside = [math.nextafter(limit, end) for limit in limits for end in (-math.inf, math.inf)]
    tried = [value for value in (low, high, *limits, *beside) if low <= value <= high]
    return len({holds(threshold, value) for value in tried}) == 2


def can_go_either_way_as_two_questions(threshold, possible):
    low, high = possible
    if "between" in threshold:
        first, last = threshold["between"]
        can_hold = not (last < low or high < first)
        can_fail = low < first or last < high
    else:
        above = "above" in threshold
        limit = threshold["above" if above else "below"]
        can_hold = high > limit if above else low < limit
        can_fail = low <= limit if above else high >= limit
    return can_hold and can_fail


def verdict_of_as_counting(card, found):
    def holds_for_all(values):
        return sum(holds(card.threshold, value) for value in values) == len(values)

    rows = [found["measured"], *found["ways"].values()]
    n_held = sum(map(holds_for_all, rows))
    if n_held == 0:
        return "REFUTED"
    if holds_for_all(found["null"]):
        return "UNDECIDED"
    return "HOLDS" if n_held == len(rows) else "DEPENDS"


def matched_control_as_one_after_another(heads, n_heads, generator):
    control = []
    for layer, _ in heads:
        free = [(layer, head) for head in range(n_heads)
                if (layer, head) not in heads and (layer, head) not in control]
        control.append(free[torch.randint(len(free), (1,), generator=generator).item()])
    return control


def matched_control_as_trial_and_error(heads, n_heads, generator):
    control = []
    for layer, _ in heads:
        while True:
            drawn = (layer, torch.randint(n_heads, (), generator=generator).item())
            if drawn not in heads and drawn not in control:
                control.append(drawn)
                break
    return control


def exact_pvalue_as_sums(one, other):
    # the difference of the means grows with the first group's sum
    values = [*one, *other]
    splits = itertools.combinations(range(len(values)), len(one))
    sums = torch.tensor([sum(values[place] for place in split) for split in splits]).double()
    return (sums >= sum(one) - 1e-6).double().mean().item()


def exact_pvalue_as_orders(one, other):
    values = torch.tensor([*one, *other]).double()
    orders = torch.tensor(list(itertools.permutations(range(len(values)))))
    found = values[orders]
    differences = found[:, : len(one)].mean(1) - found[:, len(one) :].mean(1)
    return (differences >= differences[0] - 1e-6).double().mean().item()


def holm_as_cummax(p_values):
    ordered, order = p_values.sort()
    factors = torch.arange(len(p_values), 0, -1)
    corrected = (ordered * factors).cummax(0).values.clamp(max=1)
    return corrected[order.argsort()]


def holm_as_loops(p_values):
    values = p_values.tolist()
    corrected = []
    for p in values:
        smaller = [q for q in values if q <= p]
        corrected.append(min(1.0, max((len(values) - sum(r < q for r in values)) * q
                                      for q in smaller)))
    return torch.tensor(corrected)
