"""Chapter 16, independent research: a claim that can be wrong, and a fair trial for it."""

import itertools
from collections import Counter

import torch

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, expect_equal
from course.engine.page import stated
from course.plain.chapter_16 import can_go_either_way
from experiments.cards.model import Card

IMPORTS = ["import itertools", "import torch", "from experiments.cards.model import holds"]


# can_go_either_way


def check_cases(function, cases):
    """Raises Wrong for the first of [(threshold, possible, what it should be)] that is not so."""
    given = [function(threshold, possible) for threshold, possible, _ in cases]
    for (threshold, (low, high), want), got in zip(cases, given, strict=True):
        (word, limits), = threshold.items()
        shown = " and ".join(f"{limit:g}" for limit in torch.tensor(limits).reshape(-1).tolist())
        why = "both can happen" if want else "only one of the two can happen"
        expect(got in (True, False), f"it returned {got!r}, and should return True or False")
        expect(got == want, f"{word} {shown}, of a number from {low:g} to {high:g}, is {got}, and "
               f"should be {want}: the claim can hold, and can be refuted? {why}")


def a_limit_inside_can_go_either_way(can_go_either_way):
    """a limit among the possible values can, and one far outside can't"""
    check_cases(can_go_either_way, [
        ({"above": 0.5}, (0, 1), True), ({"below": 0.5}, (0, 1), True),
        ({"above": -0.1}, (0, 1), False), ({"above": 1.5}, (0, 1), False),
        ({"below": -0.1}, (0, 1), False), ({"below": 1.5}, (0, 1), False)])


def the_edge_counts_on_one_side(can_go_either_way):
    """a share can be above 0 or not, and never above 1"""
    check_cases(can_go_either_way, [
        ({"above": 0.0}, (0, 1), True), ({"above": 1.0}, (0, 1), False),
        ({"below": 1.0}, (0, 1), True), ({"below": 0.0}, (0, 1), False)])


def a_range_must_overlap_and_leave_something_out(can_go_either_way):
    """a range that holds every possible value, or none, can't"""
    infinity = float("inf")
    check_cases(can_go_either_way, [
        ({"between": (0.2, 0.3)}, (0, 1), True), ({"between": (-1.0, 2.0)}, (0, 1), False),
        ({"between": (2.0, 3.0)}, (0, 1), False), ({"between": (0.0, 1.0)}, (0, 1), False),
        ({"between": (1.0, 1.0)}, (0, 1), True), ({"between": (-5.0, 0.5)}, (0, 1), True),
        ({"between": (-1.0, 2.0)}, (-infinity, infinity), True)])


# verdict_of


def check_verdicts(verdict_of, cases):
    """Raises Wrong for the first of [(measured, other way or None, null, verdict)] that is not so;
    the claim is "above 0.5"."""
    card = Card("one", {}, {"above": 0.5}, (0.0, 1.0), 0.8, (10, 11))
    given = []
    for measured, way, null, _ in cases:
        ways = {} if way is None else {"by zero": way}
        given.append(verdict_of(card, {"measured": measured, "null": null, "ways": ways}))
    for (measured, way, null, want), got in zip(cases, given, strict=True):
        also = "" if way is None else f", in another way {way}"
        expect_equal(got, want, f"the verdict on \"above 0.5\", measured {measured}{also}, with a "
                     f"null of {null},")


def every_seed_must_hold(verdict_of):
    """one seed that is not above the threshold refutes the claim"""
    check_verdicts(verdict_of, [
        ([0.9, 0.8], None, [0.1, 0.2], "HOLDS"), ([0.9, 0.4], None, [0.1, 0.2], "REFUTED"),
        ([0.9, 0.5], None, [0.1, 0.2], "REFUTED"), ([0.3, 0.4], None, [0.1, 0.2], "REFUTED")])


def a_null_that_passes_leaves_it_undecided(verdict_of):
    """a null that holds for every seed: UNDECIDED, unless the claim is refuted anyway"""
    check_verdicts(verdict_of, [
        ([0.9, 0.8], None, [0.6, 0.7], "UNDECIDED"), ([0.9, 0.8], None, [0.6, 0.2], "HOLDS"),
        ([0.9, 0.4], None, [0.6, 0.7], "REFUTED")])


def ways_that_disagree_are_a_result(verdict_of):
    """where two ways of measuring disagree, the verdict depends on the way"""
    check_verdicts(verdict_of, [
        ([0.9, 0.8], [0.7, 0.6], [0.1, 0.2], "HOLDS"),
        ([0.9, 0.8], [0.7, 0.4], [0.1, 0.2], "DEPENDS"),
        ([0.9, 0.4], [0.7, 0.6], [0.1, 0.2], "DEPENDS"),
        ([0.9, 0.4], [0.7, 0.3], [0.1, 0.2], "REFUTED"),
        ([0.9, 0.4], [0.7, 0.6], [0.6, 0.7], "UNDECIDED")])


# matched_control

NAMED = [(0, 2), (2, 0), (2, 3)]  # of 6 heads a layer


def draws_of(matched_control, n=200):
    """The controls of n seeds, each a list of (layer, head)."""
    draws = []
    for seed in range(n):
        drawn = matched_control(list(NAMED), 6, torch.Generator().manual_seed(seed))
        if not isinstance(drawn, (list, tuple)) or not all(
                isinstance(each, (list, tuple)) and len(each) == 2 for each in drawn):
            raise Wrong(f"it returned {drawn!r}, and should return pairs, [(layer, head), …]")
        draws.append([(int(layer), int(head)) for layer, head in drawn])
    return draws


def each_layer_has_as_many(matched_control):
    """one head of layer 0 and two of layer 2 were named, and so many come back"""
    for drawn in draws_of(matched_control):
        layers = sorted(layer for layer, _ in drawn)
        expect(layers == [0, 2, 2], f"the control is {drawn}, of layers {layers}, and should be of "
               "layers [0, 2, 2]: what differs in its layer differs in more than the hypothesis")


def no_named_head_is_in_the_control(matched_control):
    """none of the named heads, and no head twice"""
    for drawn in draws_of(matched_control):
        both = sorted(set(drawn) & set(NAMED))
        expect(not both, f"the control {drawn} has {both}, which the hypothesis names")
        expect(len(set(drawn)) == len(drawn), f"the control {drawn} has a head twice")


def every_other_head_is_drawn_as_often(matched_control):
    """each other head is drawn as often as those of its layer; the generator decides"""
    draws = draws_of(matched_control, 600)
    count = Counter(head for drawn in draws for head in drawn)
    for layer, share in ((0, 1 / 5), (2, 2 / 4)):
        others = [(layer, head) for head in range(6) if (layer, head) not in NAMED]
        for head in others:
            found = count[head] / len(draws)
            expect(abs(found - share) < 0.08, f"head {head} is in {found:.2f} of 600 controls, and "
                   f"should be in about {share:.2f}")
    torch.manual_seed(99)
    again = matched_control(list(NAMED), 6, torch.Generator().manual_seed(3))
    expect([tuple(map(int, each)) for each in again] == draws[3], "the same generator gave two "
           "controls: draw from it, and from nothing else")


# exact_pvalue


def the_largest_of_all_splits(exact_pvalue):
    """3 numbers that are larger than 3 others: one split of 20; and the other way round all 20"""
    found = [exact_pvalue(*groups) for groups in (
        ([7.0, 8, 9], [1.0, 2, 3]), ([1.0, 2, 3], [7.0, 8, 9]), ([4.0, 5], [1.0, 2, 3, 9]))]
    expect_close(found[0], 1 / 20, "the p-value of 7, 8, 9 against 1, 2, 3",
                 ask="the given split is one of the 20")
    expect_close(found[1], 1.0, "the p-value of 1, 2, 3 against 7, 8, 9",
                 ask="the test asks whether the first group is larger")
    sums = [sum(each) for each in itertools.combinations([4, 5, 1, 2, 3, 9], 2)]
    expect_close(found[2], sum(each >= 9 for each in sums) / 15,
                 "the p-value of 4, 5 against 1, 2, 3, 9")


def ties_count(exact_pvalue):
    """a split with the same difference counts, and equal numbers are two numbers"""
    found = [exact_pvalue(*groups) for groups in (
        ([2.0, 2, 1], [2.0, 1, 1]), ([3.0, 3], [3.0, 3, 3]), ([1.0, 0], [0.0, 0, 1]))]
    expect_close(found[0], 10 / 20, "the p-value of 2, 2, 1 against 2, 1, 1",
                 ask="do splits with the same difference count, each by its places?")
    expect_close(found[1], 1.0, "the p-value of numbers that are all the same")
    expect_close(found[2], 7 / 10, "the p-value of 1, 0 against 0, 0, 1")


def rounding_does_not_break_a_tie(exact_pvalue):
    """0.6 + 0.5 + 0.8 and 0.7 + 0.4 + 0.8 are a tie, though not to the last digit"""
    groups = (([6, 5, 8], [1, 7, 4]), ([1, 2, 4], [2, 7, 2]))  # in tenths
    found = [exact_pvalue([n / 10 for n in one], [n / 10 for n in other]) for one, other in groups]
    for (one, other), got in zip(groups, found, strict=True):
        sums = [sum(each) for each in itertools.combinations([*one, *other], 3)]
        expect_close(got, sum(each >= sum(one) for each in sums) / 20,
                     f"the p-value of {one} tenths against {other} tenths",
                     ask="does a difference count that is equal except for rounding?")


# holm


def the_smallest_pays_most(holm):
    """0.01, 0.02 and 0.04 become 0.03, 0.04 and 0.04"""
    expect_close(holm(torch.tensor([0.01, 0.02, 0.04])), torch.tensor([0.03, 0.04, 0.04]),
                 "the corrected p-value", "test")


def the_order_is_the_given_one(holm):
    """each corrected value stands where its p-value stood"""
    p = torch.tensor([0.3, 0.001, 0.02, 0.05])
    expect_close(holm(p), torch.tensor([0.3, 0.004, 0.06, 0.1]), "the corrected p-value", "test")
    expect_close(p, torch.tensor([0.3, 0.001, 0.02, 0.05]), "the p-value that was given", "test")


def none_falls_below_a_smaller_one_or_rises_above_1(holm):
    """a larger p-value is never corrected to less, and 1 is the most"""
    p = torch.tensor([0.015, 0.01, 0.012, 0.6, 0.7])
    expect_close(holm(p), torch.tensor([0.05, 0.05, 0.05, 1.0, 1.0]), "the corrected p-value",
                 "test")


EXERCISES = [
    Exercise(
        name="can_go_either_way", source=None, minutes=15, difficulty=2,
        needed_for="refusing a card that nothing could refute",
        task="Say whether some possible value meets a threshold, and another one misses it.",
        checks=(a_limit_inside_can_go_either_way, the_edge_counts_on_one_side,
                a_range_must_overlap_and_leave_something_out),
        hints=("Two questions: does some possible value hold, and does some other one fail?",
               "Above: the largest value must hold, high > limit; the smallest must fail, low <= "
               "limit.",
               "Between: the ranges overlap, max(low, first) <= min(high, last), and the possible "
               "one is not inside the other."),
        mistakes=(
            Mistake("when a limit at an edge is never accepted",
                    'low <= threshold["above"] < high', 'low < threshold["above"] < high',
                    also=(('low < threshold["below"] <= high', 'low < threshold["below"] < high'),
                          )),
            Mistake("when a limit at either edge is accepted",
                    'low <= threshold["above"] < high', 'low <= threshold["above"] <= high',
                    also=(('low < threshold["below"] <= high', 'low <= threshold["below"] <= high'),
                          )),
            Mistake("when a claim that can't hold is accepted",
                    'low <= threshold["above"] < high', 'low <= threshold["above"]',
                    also=(('low < threshold["below"] <= high', 'threshold["below"] <= high'),
                          ("some_hold and not all_hold", "not all_hold"))),
            Mistake("when a claim that can't be refuted is accepted",
                    'low <= threshold["above"] < high', 'threshold["above"] < high',
                    also=(('low < threshold["below"] <= high', 'low < threshold["below"]'),
                          ("some_hold and not all_hold", "some_hold"))),
            Mistake("when a range must lie inside the possible values",
                    "max(low, first) <= min(high, last)", "low <= first <= last <= high"),
        )),
    Exercise(
        name="verdict_of", source="experiments.cards.report.verdict_of", minutes=15, difficulty=2,
        needed_for="every card",
        task="Give the verdict on a claim. holds(card.threshold, value) says whether a value is as "
             "the card says.",
        checks=(every_seed_must_hold, a_null_that_passes_leaves_it_undecided,
                ways_that_disagree_are_a_result),
        hints=("First a helper: do all values of a list hold?",
               "The measured values are one way of measuring; found['ways'] has the others.",
               "No way holds: REFUTED. Else the null holds: UNDECIDED. Else not all: DEPENDS."),
        mistakes=(
            Mistake("when one seed is enough", "return all(holds(", "return any(holds("),
            Mistake("with the mean over the seeds",
                    "return all(holds(card.threshold, value) for value in values)",
                    "return holds(card.threshold, sum(values) / len(values))"),
            Mistake("without the other ways of measuring",
                    '(found["measured"], *found["ways"].values())', '(found["measured"],)'),
            Mistake("without a look at the null", 'if all_hold(found["null"]):', "if False:"),
            Mistake("when the null is asked before the claim", "if verdicts == {False}:",
                    'if verdicts == {False} and not all_hold(found["null"]):'),
            Mistake("when one seed of the null is enough to leave it undecided",
                    'if all_hold(found["null"]):',
                    'if any(holds(card.threshold, value) for value in found["null"]):'),
            Mistake("when one way that fails refutes the claim", "if verdicts == {False}:",
                    "if False in verdicts:"),
            Mistake("when one way that holds is enough",
                    'return "DEPENDS" if len(verdicts) > 1 else "HOLDS"', 'return "HOLDS"'),
        )),
    Exercise(
        name="matched_control", source=None, minutes=15, difficulty=2,
        needed_for="a control that differs in the hypothesis alone",
        task="Draw control heads for a claim about some heads.",
        checks=(each_layer_has_as_many, no_named_head_is_in_the_control,
                every_other_head_is_drawn_as_often),
        hints=("Go layer by layer: which heads are named, which are left?",
               "torch.randperm(n, generator=generator) puts n things into a random order.",
               "The first len(named) of the shuffled others."),
        mistakes=(
            Mistake("when named heads can be drawn", " if head not in named]", "]"),
            Mistake("with one head for each layer", "order[: len(named)]", "order[:1]"),
            Mistake("when a head can be drawn twice",
                    "torch.randperm(len(others), generator=generator)",
                    "torch.randint(len(others), (len(named),), generator=generator)"),
            Mistake("with the first other heads, never drawn",
                    "torch.randperm(len(others), generator=generator)",
                    "torch.arange(len(others))"),
            Mistake("with heads of other layers", "(layer, others[place])",
                    "(2 - layer, others[place])"),
        )),
    Exercise(
        name="exact_pvalue", source=None, minutes=20, difficulty=2,
        needed_for="three models against three",
        task="Count all splits of the numbers into two groups.",
        checks=(the_largest_of_all_splits, ties_count, rounding_does_not_break_a_tie),
        hints=("itertools.combinations(pooled, len(one)) gives the first group of every split.",
               "The second group has the rest: its sum is the whole sum less the first's.",
               "The share of splits whose difference is at least the given one, less 1e-9."),
        mistakes=(
            Mistake("when ties do not count", "difference(one) - 1e-9", "difference(one) + 1e-9"),
            Mistake("when rounding decides about ties", "difference(one) - 1e-9",
                    "difference(one)"),
            Mistake("when the first group may be smaller, too",
                    "sum(difference(split) >= least for split in splits)",
                    "sum(abs(difference(split)) >= abs(least) for split in splits)"),
            Mistake("of the question whether the first group is smaller",
                    "sum(difference(split) >= least for split in splits)",
                    "sum(difference(split) <= least + 2e-9 for split in splits)"),
            Mistake("when equal numbers are one number",
                    "list(itertools.combinations(pooled, len(one)))",
                    "set(itertools.combinations(sorted(pooled), len(one)))"),
            Mistake("without the given split", "return reached / len(splits)",
                    "return (reached - 1) / len(splits)"),
            Mistake("as for random draws, with one more in both counts",
                    "return reached / len(splits)", "return (reached + 1) / (len(splits) + 1)"),
        )),
    Exercise(
        name="holm", source="metrics.holm", minutes=15, difficulty=2,
        needed_for="a table of many claims", task="Correct p-values for the number of tests.",
        checks=(the_smallest_pays_most, the_order_is_the_given_one,
                none_falls_below_a_smaller_one_or_rises_above_1),
        hints=("p_values.argsort() gives the places from the smallest to the largest.",
               "The one at place 0 is multiplied by n, that at place 1 by n - 1.",
               "Keep the largest corrected value so far; write it where the p-value stood."),
        mistakes=(
            Mistake("by Bonferroni's method: each is multiplied by n", "(n - place) *", "n *"),
            Mistake("when the largest pays most", "(n - place) *", "(place + 1) *"),
            Mistake("when a larger p-value may be corrected to less",
                    "max(largest, min((n - place) * p_values[index].item(), 1.0))",
                    "min((n - place) * p_values[index].item(), 1.0)"),
            Mistake("when it may be above 1", "min((n - place) * p_values[index].item(), 1.0)",
                    "(n - place) * p_values[index].item()"),
            Mistake("in the order of size", "corrected[index] = largest",
                    "corrected[place] = largest"),
            Mistake("with factors that are one too small", "(n - place) *",
                    "max(n - place - 1, 1) *"),
        )),
]


def count_refused():
    """How many of the three thresholds of the chapter's block can't go either way."""
    return sum(not can_go_either_way({"above": limit}, (0.0, 1.0)) for limit in (-0.1, 0.5, 1.0))


PREDICTIONS = [
    Prediction("Three thresholds for a share are \"above −0.1\", \"above 0.5\" and \"above 1\". "
               "How many of them are refused?", count_refused, "counted",
               "{} of these three thresholds are refused"),
    Prediction("A model has 12 heads that do nothing. In what share of such models is the smallest "
               "p-value below 0.05?",
               stated(16, "as they are: below 0.05 in {} of models"), "the chapter's block"),
    Prediction("And in what share after Holm's correction?",
               stated(16, "corrected: below 0.05 in {} of models"), "the chapter's block"),
    Prediction("You compare a score of three trained models with that of three untrained ones, by "
               "an exact permutation test. What is the smallest p-value that can come out?",
               stated(16, "3 models against 3: no p-value is below {};"), "the chapter's block"),
]
