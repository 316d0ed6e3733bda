"""Chapter 0, what counts as evidence: the error of a mean, and how often chance does as well."""

import torch

from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, random
from course.engine.page import stated
from utils import UserError

IMPORTS = ["import torch", "from utils import UserError"]


# standard_error, paired_difference


def a_standard_error_by_hand(standard_error):
    """1, 2, 3, 4, 5 have a spread of sqrt(10/4) and a standard error of sqrt(0.5)"""
    expect_close(standard_error(torch.arange(1.0, 6)), 0.5**0.5, "the standard error",
                 ask="the spread, sqrt(10 / (5 - 1)), over sqrt(n)")


def four_times_the_values_halve_it(standard_error):
    """four times as many values make it about half as large"""
    few, many = standard_error(random(100)), standard_error(random(400))
    ratio = float(few / many)
    expect(1.7 < ratio < 2.3, f"100 values have a standard error of {float(few):.3f} and 400 one "
           f"of {float(many):.3f}, a ratio of {ratio:.2f}; it should be near 2")


def where_all_are_equal_it_is_zero(standard_error):
    """equal values have a standard error of 0"""
    expect_close(standard_error(torch.full((6,), 3.0)), 0.0, "the standard error of 3, 3, 3, …")


SEED_EFFECT = torch.tensor([1.0, 5, 9, 13])


def what_the_seeds_share_drops_out(paired_difference):
    """the seeds differ much, but with each seed the recipes differ by 0.1: the error is 0"""
    difference, error = pair_of(paired_difference(SEED_EFFECT + 0.1, SEED_EFFECT))
    expect_close(difference, 0.1, "the difference", tolerance=1e-3)
    expect_close(error, 0.0, "its standard error", tolerance=1e-3, ask="the difference was the "
                                                                       "same with each seed, "
                                                                       "although the seeds differ "
                                                                       "much")


def a_paired_difference_by_hand(paired_difference):
    """differences of -1, 2 and 5 are 2 on average, with a standard error of sqrt(3)"""
    other = torch.tensor([4.0, 1, 7])
    difference, error = pair_of(paired_difference(other + torch.tensor([-1.0, 2, 5]), other))
    expect_close(difference, 2.0, "the difference", ask="one - other")
    expect_close(error, 3**0.5, "its standard error")


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two numbers should be returned, such as `return low, high`")
    return result


# seeded_generator


def same_seed_same_numbers(seeded_generator):
    """the same seed gives the same numbers, another seed gives others"""
    generator = seeded_generator(3)
    expect(isinstance(generator, torch.Generator), "a torch.Generator should be returned")
    draws = [torch.randn(3, generator=seeded_generator(seed)) for seed in (3, 3, 4)]
    expect(torch.equal(draws[0], draws[1]), "seed 3 gave two different series")
    expect(not torch.equal(draws[0], draws[2]), "seeds 3 and 4 gave the same series")


def each_call_begins_afresh(seeded_generator):
    """two generators do not take numbers from each other"""
    first, second = seeded_generator(0), seeded_generator(0)
    torch.randn(2, generator=first)
    expect(torch.equal(torch.randn(2, generator=second),
                       torch.randn(2, generator=seeded_generator(0))),
           "drawing from one generator changed another one: are they the same object?")


def the_global_generator_is_left_alone(seeded_generator):
    """torch's global generator is not touched"""
    before = torch.get_rng_state()
    seeded_generator(12)
    expect(torch.equal(before, torch.get_rng_state()), "torch's global generator was set: other "
           "random numbers of the program change with it")


# bootstrap_ci


def it_encloses_the_mean(bootstrap_ci):
    """low is below the mean, high above it"""
    values = random(40)
    low, high = pair_of(bootstrap_ci(values))
    expect(float(low) < values.mean() < float(high), f"the interval is {float(low):.3f} to "
           f"{float(high):.3f}, and the mean {values.mean():.3f} does not lie in it")


def it_is_as_wide_as_two_standard_errors(bootstrap_ci):
    """95 % of means lie within 1.96 standard errors on each side"""
    values = random(100)
    low, high = pair_of(bootstrap_ci(values))
    half = float(high - low) / 2 / float(values.std() / 10)
    expect(1.75 < half < 2.15, f"the interval reaches {half:.2f} standard errors of the mean to "
           "each side, and should reach about 1.96")


def a_lower_level_is_narrower(bootstrap_ci):
    """the middle half of the means lies within 0.67 standard errors"""
    values = random(100)
    low, high = pair_of(bootstrap_ci(values, level=0.5))
    half = float(high - low) / 2 / float(values.std() / 10)
    expect(0.57 < half < 0.77, f"at level 0.5 the interval reaches {half:.2f} standard errors to "
           "each side, and should reach about 0.67: how much lies in each tail?")


def each_column_has_its_own_interval(bootstrap_ci):
    """for values [n, head] it gives a low and a high for each head"""
    values = random(30, 3) + torch.tensor([0.0, 10, 20])
    low, high = pair_of(bootstrap_ci(values))
    expect(getattr(low, "shape", None) == (3,), "for values [30, 3] low should be [3]: draw rows, "
           "and average over them alone")
    expect(bool(((low < values.mean(0)) & (values.mean(0) < high)).all()),
           f"the means {values.mean(0).tolist()} do not lie in their intervals")


def it_can_be_repeated(bootstrap_ci):
    """the same seed gives the same interval, whatever was drawn before"""
    values = random(20)
    first = pair_of(bootstrap_ci(values, seed=5))
    torch.randn(7)
    second = pair_of(bootstrap_ci(values, seed=5))
    expect(float(first[0]) == float(second[0]), f"seed 5 gave a low of {float(first[0]):.4f} and "
           f"then of {float(second[0]):.4f}: does all randomness come from seeded_generator(seed)?")


# permutation_test


def far_apart_is_rare_but_never_zero(permutation_test):
    """groups that are far apart: no draw reaches them, and p is 1/100 with 99 draws"""
    p = permutation_test(torch.arange(12.0), 100 + torch.arange(12.0), n_draws=99)
    expect_close(p, 0.01, "p", ask="no draw reaches the observed difference of 100, and the "
                                   "observed grouping counts as one draw: (1 + 0) / (1 + 99)")


def equal_groups_are_no_news(permutation_test):
    """two groups with the same values: every draw reaches a difference of 0, and p is 1"""
    p = permutation_test(torch.arange(6.0), torch.arange(6.0), n_draws=99)
    expect_close(p, 1.0, "p", ask="a draw counts if its difference is at least the observed one")


def it_is_near_the_exact_share(permutation_test):
    """1, 2, 3 against 4, 5, 9: 2 of the 20 groupings are as far apart, in either direction"""
    p = permutation_test(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 9]), n_draws=2000)
    expect(abs(p - 0.1) < 0.03, f"p is {p:.3f}, and should be near 0.1 (2 of 20 ways; only one of "
           "them has the smaller values in the first group)")


def each_group_keeps_its_size(permutation_test):
    """9 against 1, 2, 3, 4: in 1 of 5 groupings the 9 is alone, and no other is as far apart"""
    p = permutation_test(torch.tensor([9.0]), torch.tensor([1.0, 2, 3, 4]), n_draws=2000)
    expect(abs(p - 0.2) < 0.04, f"p is {p:.3f}, and should be near 0.2: each draw is a new order "
           "of all five values, of which one goes to the first group and four to the other")


def it_does_not_matter_which_group_comes_first(permutation_test):
    """the groups may differ in size, and their order does not matter"""
    one, other = random(4), 0.7 + random(9, seed=1)
    first = permutation_test(one, other, n_draws=1500)
    second = permutation_test(other, one, n_draws=1500)
    expect(abs(first - second) < 0.06, f"p is {first:.3f}, and {second:.3f} with the groups "
           "exchanged: the difference counts in either direction, and each group keeps its size")


# permutation_pvalue


def one_head_counts_its_draws(permutation_pvalue):
    """one head, which 1 of 4 draws reaches: p is (1 + 1) / (1 + 4)"""
    null = torch.tensor([[0.1], [0.9], [0.2], [0.3]])
    expect_close(permutation_pvalue(torch.tensor([0.5]), null), torch.tensor([0.4]), "p", "head")


def as_good_counts_too(permutation_pvalue):
    """a draw that is just as good counts"""
    null = torch.tensor([[0.5], [0.1], [0.1]])
    expect_close(permutation_pvalue(torch.tensor([0.5]), null), torch.tensor([0.5]), "p", "head",
                 ask="at least as large, not larger")


def whoever_looks_at_many_pays_for_it(permutation_pvalue):
    """with two heads, a draw counts by the larger of its two scores"""
    null = torch.tensor([[-0.9, 0.2], [0.6, 0.1], [0.31, 0.7], [0.1, 0.16]])
    expect_close(permutation_pvalue(torch.tensor([0.5, 0.15]), null), torch.tensor([0.6, 1.0]),
                 "p", "head", ask="you chose the best head, so compare it with the best head of "
                                  "each draw")


# check_heads


def it_gives_the_width(check_heads):
    """768 dimensions and 12 heads: 64 each, a whole number"""
    d_head = check_heads(768, 12)
    expect(d_head == 64 and isinstance(d_head, int), f"d_head is {d_head!r}, and should be 64, an "
           "int")


def it_refuses_what_does_not_divide(check_heads):
    """128 dimensions and 5 heads are refused, with a message that has both numbers"""
    try:
        d_head = check_heads(128, 5)
    except UserError as error:
        message = str(error)
        expect("5" in message and "128" in message, f"the message {message!r} lacks one of the "
               "numbers: a reader needs to see which value is wrong")
        return
    raise Wrong(f"5 heads in 128 dimensions were accepted, with d_head {d_head}; all measurements "
                "would then be of another model")


EXERCISES = [
    Exercise(
        name="standard_error", source=None, minutes=10, difficulty=1,
        needed_for="every number of this course", task="By hand, without torch's std.",
        checks=(where_all_are_equal_it_is_zero, a_standard_error_by_hand,
                four_times_the_values_halve_it),
        hints=("First the spread: the root of the mean square distance from the mean.",
               "Divide the sum of squares by n - 1, then take the root.",
               "The mean of n values varies sqrt(n) times less than one of them: divide by it."),
        mistakes=(
            Mistake("when the sum of squares is divided by n, not n - 1", "(len(values) - 1)",
                    "len(values)"),
            Mistake("without the division by sqrt(n): the spread of one value",
                    " / len(values) ** 0.5", ""),
            Mistake("when the spread is divided by n instead of sqrt(n)", "len(values) ** 0.5",
                    "len(values)"),
            Mistake("when the mean is not subtracted", "values - values.mean()", "values"),
            Mistake("when the root of the variance is not taken", "variance.sqrt()", "variance"),
        )),
    Exercise(
        name="paired_difference", source=None, minutes=10, difficulty=1,
        needed_for="clean and corrupted prompts (chapter 9)",
        task="Call standard_error; the check uses our version of it.",
        checks=(a_paired_difference_by_hand, what_the_seeds_share_drops_out),
        hints=("The two runs of a seed share something that does not depend on the recipes.",
               "First take the difference for each seed.",
               "differences = one - other; its mean, and standard_error(differences)."),
        mistakes=(
            Mistake("when the pairs are ignored: the errors of both groups are added",
                    "standard_error(differences)",
                    "(standard_error(one) ** 2 + standard_error(other) ** 2) ** 0.5"),
            Mistake("of other - one", "differences = one - other", "differences = other - one"),
            Mistake("when the differences lose their signs", "differences = one - other",
                    "differences = (one - other).abs()"),
        )),
    Exercise(
        name="seeded_generator", source="utils.seeded_generator", minutes=5, difficulty=1,
        needed_for="everything random", task="Return a new generator, not torch's global one.",
        checks=(same_seed_same_numbers, each_call_begins_afresh,
                the_global_generator_is_left_alone),
        hints=("torch.manual_seed sets the generator that everybody shares.",
               "torch.Generator() is a fresh one, and has manual_seed too.",
               "torch.Generator().manual_seed(seed) returns the generator itself."),
        mistakes=(
            Mistake("when torch's global generator is seeded and returned",
                    "torch.Generator().manual_seed(seed)", "torch.manual_seed(seed)"),
            Mistake("when the seed is not used", ".manual_seed(seed)", ".manual_seed(0)"),
        )),
    Exercise(
        name="bootstrap_ci", source="metrics.bootstrap_ci", minutes=20, difficulty=2,
        needed_for="every interval of this course",
        task="Draw samples from the sample itself, as if it were the whole population.",
        checks=(it_encloses_the_mean, it_is_as_wide_as_two_standard_errors,
                a_lower_level_is_narrower, each_column_has_its_own_interval, it_can_be_repeated),
        hints=("One draw is n indices, each from 0 to n - 1; an index may occur twice.",
               "torch.randint gives all draws at once, [n_draws, n]; values[draws] is "
               "[n_draws, n, ...].",
               "means.quantile((1 - level) / 2, dim=0), and (1 + level) / 2 for the other end."),
        mistakes=(
            Mistake("when values are drawn without repetition: every mean is the same",
                    "torch.randint(n, (n_draws, n), generator=seeded_generator(seed))",
                    "torch.rand(n_draws, n, generator=seeded_generator(seed)).argsort(1)"),
            Mistake("of single values instead of means of n", "values[draws].mean(1)",
                    "values[draws[:, 0]]"),
            Mistake("when each tail holds 1 - level, twice too much",
                    "(1 - level) / 2", "1 - level", also=(("(1 + level) / 2", "level"),)),
            Mistake("with the mean over everything, heads too", "values[draws].mean(1)",
                    "values[draws].flatten(1).mean(1)"),
            Mistake("when the draws come from torch's global generator",
                    ", generator=seeded_generator(seed))", ")"),
        )),
    Exercise(
        name="permutation_test", source=None, minutes=20, difficulty=2,
        needed_for="nulls and controls everywhere",
        task="Shuffle the labels, and see how often chance does as well. Use seeded_generator.",
        checks=(far_apart_is_rare_but_never_zero, equal_groups_are_no_news,
                it_is_near_the_exact_share, each_group_keeps_its_size,
                it_does_not_matter_which_group_comes_first),
        hints=("Put all values into one tensor; a random order makes two new groups.",
               "values[torch.randperm(len(values), generator=…)]: the first len(one) are one "
               "group.",
               "Compare absolute differences of means with >= (a little slack for rounding), and "
               "count the observed grouping as one of the draws."),
        mistakes=(
            Mistake("when the observed grouping is not counted: p can be 0",
                    "(1 + reached) / (1 + n_draws)", "reached / n_draws"),
            Mistake("in one direction only", "observed = (one.mean() - other.mean()).abs()",
                    "observed = other.mean() - one.mean()",
                    also=(("difference = (shuffled[: len(one)].mean() - "
                           "shuffled[len(one) :].mean()).abs()",
                           "difference = shuffled[len(one) :].mean() - "
                           "shuffled[: len(one)].mean()"),)),
            Mistake("in one direction only: draws count if one - other is as large",
                    "observed = (one.mean() - other.mean()).abs()",
                    "observed = one.mean() - other.mean()",
                    also=(("difference = (shuffled[: len(one)].mean() - "
                           "shuffled[len(one) :].mean()).abs()",
                           "difference = shuffled[: len(one)].mean() - "
                           "shuffled[len(one) :].mean()"),)),
            Mistake("when the generator is made anew for each draw: all draws are the same",
                    "generator=generator", "generator=seeded_generator(seed)"),
            Mistake("when the values are cut into halves, whatever size the groups have",
                    "shuffled[: len(one)].mean() - shuffled[len(one) :].mean()",
                    "shuffled[: len(values) // 2].mean() - shuffled[len(values) // 2 :].mean()"),
            Mistake("when values are drawn with repetition, as for the bootstrap",
                    "torch.randperm(len(values), generator=generator)",
                    "torch.randint(len(values), (len(values),), generator=generator)"),
            Mistake("when a draw that is just as far apart does not count",
                    ">= observed - 1e-6", "> observed + 1e-6"),
            Mistake("when the values are not shuffled",
                    "values[torch.randperm(len(values), generator=generator)]", "values"),
            Mistake("when it says how often chance does worse", ">= observed - 1e-6",
                    "< observed - 1e-6"),
        )),
    Exercise(
        name="permutation_pvalue", source="metrics.permutation_pvalue", minutes=15, difficulty=3,
        needed_for="finding one head among many (chapters 8 to 12)",
        task="The same, if the best of many heads was chosen.",
        checks=(one_head_counts_its_draws, as_good_counts_too, whoever_looks_at_many_pays_for_it),
        hints=("Only the best head of each draw matters: take the maximum over heads.",
               "Compare these maxima, a column, with the observed scores, a row.",
               "(null.max(1).values[:, None] >= observed).sum(0), then (1 + …) / (1 + draws)."),
        mistakes=(
            Mistake("when each head is compared only with its own draws",
                    "largest[:, None] >= observed", "null >= observed"),
            Mistake("when the observed value is not counted: p can be 0",
                    "(1 + reached) / (1 + len(null))", "reached / len(null)"),
            Mistake("when a draw that is just as good does not count", ">= observed",
                    "> observed"),
            Mistake("with each head's largest score over the draws, not each draw's over heads",
                    "null.max(1).values", "null.max(0).values"),
            Mistake("when a score far below zero counts as a large one", "null.max(1).values",
                    "null.abs().max(1).values"),
            Mistake("with the mean over heads instead of the largest", "null.max(1).values",
                    "null.mean(1)"),
        )),
    Exercise(
        name="check_heads", source=None, minutes=5, difficulty=1,
        needed_for="attention (chapter 4)", task="Refuse settings that would silently give "
                                                 "another model.",
        checks=(it_gives_the_width, it_refuses_what_does_not_divide),
        hints=("The remainder of a division: %.",
               "raise UserError(f\"… {n_heads} … {d_model} …\").",
               "Return d_model // n_heads, a whole number."),
        mistakes=(
            Mistake("when the width is silently rounded down",
                    "    if d_model % n_heads:\n        raise UserError(f\"n_heads={n_heads} does "
                    "not divide d_model={d_model}; choose a divisor\")\n", ""),
            Mistake("when the width is a float", "d_model // n_heads", "d_model / n_heads"),
            Mistake("when the message has no numbers",
                    'f"n_heads={n_heads} does not divide d_model={d_model}; choose a divisor"',
                    '"bad config"'),
        )),
]

def seed_range():
    """The highest less the lowest loss of three seeds, in nats a character."""
    losses = page.find_numbers(0, "the command above ended at {}, {} and {}.")
    return max(losses) - min(losses)



PREDICTIONS = [
    Prediction("Three runs of `python train.py --data.dataset builtin --train.max_steps 600` have "
               "the seeds 0, 1 and 2 (`--train.seed`). How far apart are the highest and the "
               "lowest validation loss, in nats a character?",
               seed_range, "Expected: 0.3069, 0.3096 and 0.3109"),
    Prediction("The block under Run draws 200 random numbers from a normal distribution of "
               "standard deviation 1. What is the standard error of their mean?",
               stated(0, "mean of 200 seeds: … +- {}"), "the chapter's block"),
]
