"""Chapter 15, grokking and training dynamics: waves that add, and what a model resembles."""

import math

import torch
import torch.nn.functional as F

from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, random
from course.engine.page import stated

IMPORTS = ["import math", "import torch"]


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two tensors should be returned, (pairs, sums)")
    return result


# addition_table


def every_pair_once(addition_table):
    """all 25 pairs of numbers below 5, in order"""
    pairs, _ = pair_of(addition_table(5))
    want = torch.tensor([[a, b] for a in range(5) for b in range(5)])
    expect_close(pairs, want, "the pair", "number a_or_b")


def sums_wrap_round(addition_table):
    """3 + 4 is 2, modulo 5"""
    _, sums = pair_of(addition_table(5))
    expect_close(sums, torch.tensor([(a + b) % 5 for a in range(5) for b in range(5)]), "the sum",
                 "number")


# fourier_basis


def it_is_orthonormal(fourier_basis):
    """two different waves have product 0, and each with itself has 1"""
    basis = fourier_basis(7)
    expect(getattr(basis, "shape", None) == (7, 7), "for p = 7 there should be 7 waves of length 7")
    expect_close(basis @ basis.T, torch.eye(7), "the product of two waves", "wave wave",
                 ask="every row has length 1: sqrt(2 / p), and 1 / sqrt(p) for the constant")


def the_rows_are_cos_and_sin_in_turn(fourier_basis):
    """row 0 is constant, rows 3 and 4 are cos and sin of twice the basic frequency"""
    basis = fourier_basis(7)
    n = torch.arange(7).double()
    expect_close(basis[0], torch.full((7,), 7**-0.5), "row 0", "n")
    expect_close(basis[3], (2 / 7) ** 0.5 * (4 * math.pi * n / 7).cos(), "row 3", "n")
    expect_close(basis[4], (2 / 7) ** 0.5 * (4 * math.pi * n / 7).sin(), "row 4", "n")


# clock_logits


def the_answer_is_the_largest(clock_logits):
    """the largest logit of each pair is that of its sum"""
    logits = clock_logits(11, [1, 3])
    expect(getattr(logits, "shape", None) == (11, 11, 11), "it should be [a 11, b 11, c 11]")
    n = torch.arange(11)
    wrong = (logits.argmax(-1) != (n[:, None] + n) % 11).nonzero()
    expect(len(wrong) == 0, f"for (a, b) = {wrong[:1].tolist()} the largest logit is not that of "
           "the sum")


def each_frequency_adds_one_at_the_answer(clock_logits):
    """at the answer every cosine is 1; elsewhere it is cos of the distance"""
    logits = clock_logits(7, [1, 2, 3])
    expect_close(logits[2, 6, 1], 3.0, "the logit of 2 + 6 = 1 (mod 7), with three frequencies,")
    want = sum(math.cos(2 * math.pi * k * 2 / 7) for k in (1, 2, 3))
    expect_close(logits[0, 2, 0], want, "the logit of c = 0 for 0 + 2")


# frequency_shares


def a_pure_wave_is_all_at_its_frequency(frequency_shares):
    """cos and sin of frequency 2 lie at frequency 2 alone"""
    n = torch.arange(7).double()
    angle = 4 * math.pi * n / 7
    values = torch.stack([angle.cos(), 3 * angle.sin()], 1)
    expect_close(frequency_shares(values), torch.tensor([0.0, 1, 0]), "the share", "frequency",
                 tolerance=1e-3)


def the_constant_does_not_count(frequency_shares):
    """a constant added to all values changes nothing, and shares sum to 1"""
    values = random(9, 4)
    shares = frequency_shares(values)
    expect_close(shares.sum(), 1.0, "the sum of the shares")
    expect_close(frequency_shares(values + 5), shares, "the share after adding 5", "frequency",
                 tolerance=1e-3)


def squares_of_cos_and_sin_add_up(frequency_shares):
    """frequencies of amplitude 1 and 2 have shares of 1/5 and 4/5"""
    n = torch.arange(7).double()
    values = ((2 * math.pi * n / 7).cos() + 2 * (6 * math.pi * n / 7 + 1).cos())[:, None]
    expect_close(frequency_shares(values), torch.tensor([0.2, 0, 0.8]), "the share", "frequency",
                 tolerance=1e-3, ask="squares, of cos and sin together")


# keep_sum_waves


def the_clock_stays(keep_sum_waves):
    """logits that are waves of a + b at these frequencies stay as they are"""
    n = torch.arange(7).double()
    difference = n[:, None, None] + n[:, None] - n
    logits = sum((2 * math.pi * k * difference / 7).cos() for k in (1, 3))
    expect_close(keep_sum_waves(logits, [1, 3]), logits, "the logit", "a b c")
    only = (2 * math.pi * 3 * difference / 7).cos()
    expect_close(keep_sum_waves(logits, [3]), only, "the logit, of frequency 3 alone", "a b c")


def the_mean_stays(keep_sum_waves):
    """without any frequency, only the mean over all pairs is left, for each c"""
    logits = random(5, 5, 5).double()
    want = logits.mean((0, 1)).expand(5, 5, 5)
    expect_close(keep_sum_waves(logits, []), want, "the logit without frequencies", "a b c",
                 ask="the constant, row 0, belongs to what is kept")


def it_depends_on_the_sum_alone(keep_sum_waves):
    """with all frequencies it is the mean over the pairs of each sum"""
    logits = random(5, 5, 5).double()
    got = keep_sum_waves(logits, [1, 2])
    for a, b in ((0, 3), (4, 4)):
        same_sum = torch.stack([logits[i, (a + b - i) % 5] for i in range(5)]).mean(0)
        expect_close(got[a, b], same_sum, f"the logits of ({a}, {b})", "c")


# delay_of


def the_ratio_of_two_steps(delay_of):
    """trained pairs known at step 100, the others at 700: 7 times later"""
    got = delay_of([50, 100, 400, 700], [0.2, 0.99, 1, 1], [0, 0.1, 0.5, 1.0], 0.95)
    expect_close(got, 7.0, "the delay")


def never_is_infinite(delay_of):
    """if the others are never known, it is infinite"""
    got = delay_of([50, 100], [0.2, 0.99], [0, 0.1], 0.95)
    expect(got == math.inf, f"it is {got}, and should be infinity")


# distance_to_bigrams

TABLE = torch.tensor([[0.75, 0.25, 0], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).clamp(min=1e-6).log()


def a_model_that_is_the_table_is_not_away(distance_to_bigrams):
    """logits that are the table's, with any constant added, are 0 nats away"""
    tokens = torch.tensor([[0, 1, 2, 1]])
    for constant in (0.0, 3.0):
        got = distance_to_bigrams(TABLE[tokens] + constant, tokens, TABLE)
        expect_close(got, 0.0, f"the distance of the table itself (plus {constant:g})",
                     ask="log-softmax the logits; the row of the table is the token that was read")


def it_is_kl_from_the_table(distance_to_bigrams):
    """a uniform guess after 0 is ln 3 minus the entropy of 3/4 and 1/4 away"""
    got = distance_to_bigrams(torch.zeros(1, 1, 3), torch.tensor([[0]]), TABLE)
    want = math.log(3) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    expect_close(got, want, "the distance of a uniform guess after token 0",
                 ask="the expectation is over the table's probabilities")


def it_is_the_mean_over_all_positions(distance_to_bigrams):
    """two texts of three tokens: the mean of six divergences"""
    tokens = torch.tensor([[0, 2, 1], [1, 1, 0]])
    logits = random(2, 3, 3)
    each = [F.kl_div(logits[i, j].log_softmax(0), TABLE[tokens[i, j]], log_target=True,
                     reduction="sum") for i in range(2) for j in range(3)]
    expect_close(distance_to_bigrams(logits, tokens, TABLE), sum(each) / 6, "the distance")


# ability_step

STEPS = [0, 10, 20, 40]


def the_first_step_below_half(ability_step):
    """trigrams pay 2 nats: it has come at the first step below 1"""
    cases = (([4.5, 2.5, 0.9, 0.1], 20), ([5.0, 1.0, 1.0, 0.5], 40),
             ([0.5, 0.4, 0.3, 0.2], 0), ([3.0, 0.8, 1.2, 0.1], 10))
    found = [ability_step(STEPS, above, 2.0) for above, _ in cases]
    for (above, want), got in zip(cases, found, strict=True):
        expect(got == want, f"above its floor by {above} at steps {STEPS}, and trigrams by 2: the "
               f"step is {got}, and should be {want}")


def what_never_comes_is_infinite(ability_step):
    """if it never falls below half, it is infinity"""
    got = ability_step(STEPS, [4.0, 2.0, 1.9, 1.5], 2.0)
    expect(got == math.inf, f"it is {got}, and should be infinity")


EXERCISES = [
    Exercise(
        name="addition_table", source=None, minutes=5, difficulty=1, needed_for="everything here",
        task="Make the data set: all pairs.", checks=(every_pair_once, sums_wrap_round),
        hints=("a changes slowly, b fast.", "repeat_interleave and repeat.", "(a + b) % p."),
        mistakes=(
            Mistake("without the modulus", "(a + b) % p", "a + b"),
            Mistake("when b changes slowly, and a fast", "torch.stack([a, b], 1)",
                    "torch.stack([b, a], 1)"),
        )),
    Exercise(
        name="fourier_basis", source=None, minutes=15, difficulty=2,
        needed_for="frequency_shares, keep_sum_waves", task="p waves of length p.",
        checks=(it_is_orthonormal, the_rows_are_cos_and_sin_in_turn),
        hints=("The angle of frequency k at n is 2 pi k n / p.",
               "The mean of cos squared is 1/2: its length is sqrt(p / 2).",
               "sqrt(2 / p) cos, sqrt(2 / p) sin, and 1 / sqrt(p) for the constant."),
        mistakes=(
            Mistake("when the waves do not have length 1", "math.sqrt(2 / p) * angle.cos()",
                    "angle.cos()", also=(("math.sqrt(2 / p) * angle.sin()", "angle.sin()"),)),
            Mistake("without the 2 of 2 pi", "2 * math.pi * k", "math.pi * k"),
            Mistake("when the constant does not have length 1", "torch.ones(p).double() / "
                                                                "math.sqrt(p)",
                    "torch.ones(p).double() / p"),
            Mistake("with sin before cos", "        rows.append(math.sqrt(2 / p) * angle.cos())\n",
                    "", also=(("        rows.append(math.sqrt(2 / p) * angle.sin())\n",
                               "        rows.append(math.sqrt(2 / p) * angle.sin())\n"
                               "        rows.append(math.sqrt(2 / p) * angle.cos())\n"),)),
        )),
    Exercise(
        name="clock_logits", source=None, minutes=10, difficulty=2,
        needed_for="knowing what to look for", task="Write the algorithm itself.",
        checks=(the_answer_is_the_largest, each_frequency_adds_one_at_the_answer),
        hints=("cos is largest where its angle is 0, modulo 2 pi.",
               "a + b - c is a multiple of p at the answer.",
               "numbers[:, None, None] + numbers[:, None] - numbers is [a, b, c]."),
        mistakes=(
            Mistake("when c is added", "+ numbers[:, None] - numbers",
                    "+ numbers[:, None] + numbers"),
            Mistake("without the 2 of 2 pi", "2 * math.pi * k", "math.pi * k"),
            Mistake("with sin instead of cos", ".cos()", ".sin()"),
            Mistake("of the mean over frequencies", "return sum(",
                    "return 1 / len(frequencies) * sum("),
        )),
    Exercise(
        name="frequency_shares", source=None, minutes=10, difficulty=2,
        needed_for="seeing that a trained embedding is sparse",
        task="Call fourier_basis; the check uses our version of it.",
        checks=(a_pure_wave_is_all_at_its_frequency, the_constant_does_not_count,
                squares_of_cos_and_sin_add_up),
        hints=("basis @ values gives the amount of each wave.",
               "Row 0 is the constant: leave it out. Rows 2k - 1 and 2k belong together.",
               "energy[0::2] + energy[1::2], over its sum."),
        mistakes=(
            Mistake("when the constant counts as a frequency's cos", "waves[1:]", "waves[:-1]"),
            Mistake("when amplitudes are added, not squares", ".pow(2).sum(1)", ".abs().sum(1)"),
            Mistake("with the cos alone", "energy[0::2] + energy[1::2]", "energy[0::2]"),
            Mistake("when they are not shares", "by_frequency / by_frequency.sum()",
                    "by_frequency"),
        )),
    Exercise(
        name="keep_sum_waves", source=None, minutes=25, difficulty=3,
        needed_for="the restricted loss", task="Keep only the waves of a + b.",
        checks=(it_depends_on_the_sum_alone, the_mean_stays, the_clock_stays),
        hints=("First the mean over the p pairs of each sum: [s, c].",
               "A projection onto orthonormal rows is waves.T @ (waves @ values).",
               "Put it back by kept[sums]; the constant, row 0, is kept too."),
        mistakes=(
            Mistake("without the constant: the mean is lost", "rows = [0] + ", "rows = "),
            Mistake("with the cosines alone", "for row in (2 * k - 1, 2 * k)]",
                    "for row in (2 * k - 1,)]"),
            Mistake("with the sum over the pairs of a sum, not their mean",
                    "by_sum = by_sum / p", "by_sum = by_sum / 1"),
            Mistake("when the waves are of a, not of a + b", "kept[sums].view(p, p, -1)",
                    "kept[pairs[:, 0]].view(p, p, -1)"),
            Mistake("with the excluded logits instead of the restricted ones",
                    "return kept[sums].view(p, p, -1)",
                    "return logits - kept[sums].view(p, p, -1)"),
        )),
    Exercise(
        name="delay_of", source=None, minutes=5, difficulty=1, needed_for="saying how late it is",
        task="Compare two first times.", checks=(the_ratio_of_two_steps, never_is_infinite),
        hints=("The first step at which a list reaches the level.",
               "Divide one by the other.", "math.inf where there is none."),
        mistakes=(
            Mistake("of the difference instead of the ratio", "step / train_step",
                    "step - train_step"),
            Mistake("the other way round", "step / train_step", "train_step / step"),
            Mistake("with the last step if it is never reached", "return math.inf",
                    "return step / train_step"),
        )),
    Exercise(
        name="distance_to_bigrams", source=None, minutes=15, difficulty=2,
        needed_for="seeing what a model resembles (second half)",
        task="Measure how far a model is from a table.",
        checks=(a_model_that_is_the_table_is_not_away, it_is_kl_from_the_table,
                it_is_the_mean_over_all_positions),
        hints=("table[tokens] is what the table predicts after each token.",
               "KL(p || q) is the sum of p (log p - log q), over the last axis.",
               "Sum over the vocabulary, then the mean over batch and pos."),
        mistakes=(
            Mistake("of the divergence the other way round, KL(model || table)",
                    "(wanted.exp() * (wanted - log_probs))",
                    "(log_probs.exp() * (log_probs - wanted))"),
            Mistake("when logits are taken for log-probabilities", "logits.log_softmax(-1)",
                    "logits"),
            Mistake("when the table is read by columns", "table[tokens]", "table.T[tokens]"),
            Mistake("with the mean over the vocabulary", ".sum(-1)", ".mean(-1)"),
            Mistake("with the sum over positions", "divergence.mean()", "divergence.sum()"),
            Mistake("without the table's entropy: the cross-entropy", "(wanted - log_probs)",
                    "-log_probs"),
        )),
    Exercise(
        name="ability_step", source=None, minutes=5, difficulty=1,
        needed_for="saying what comes first (second half)", task="Find when an ability has come.",
        checks=(the_first_step_below_half, what_never_comes_is_infinite),
        hints=("Go through steps and nats together.", "Compare with half of what trigrams pay.",
               "math.inf where the loop ends without an answer."),
        mistakes=(
            Mistake("when it only has to be below trigrams", "by_trigrams / 2", "by_trigrams"),
            Mistake("when exactly half is enough", "nats < by_trigrams / 2",
                    "nats <= by_trigrams / 2"),
            Mistake("with the half of its own first value", "by_trigrams / 2", "above[0] / 2"),
            Mistake("with the last step if it never comes", "return math.inf", "return step"),
            Mistake("with its place instead of the step", "return step", "return "
                    "list(steps).index(step)"),
        )),
]


def steps_ratio():
    """The step of the other pairs over that of the trained ones, in the chapter's block."""
    trained, = page.find_numbers(15, "trained on: 99 % are right from step about {}")
    others, = page.find_numbers(15, "others: 99 % are right from step about {}")
    return others / trained


PREDICTIONS = [
    Prediction("The model of the block knows the trained pairs at some step. How many times as "
               "many steps does it take until it knows the others?",
               steps_ratio, "the chapter's block: 304 / 55"),
    Prediction("How many of the 29 frequencies does it use?",
               stated(15, "{} key frequencies of 29 have about"), "the chapter's block"),
    Prediction("At the step where it just knows the trained pairs, it has a loss of 12 nats on "
               "the others. What loss do its key waves alone have on them, if a guess costs 4.08?",
               stated(15, "55: about … … {} … …"), "the chapter's block"),
    Prediction("A model of words is trained for 400 steps, from a uniform guess. At which step is "
               "it nearest to a table of bigrams?",
               stated(15, "to bigrams at step {} (0.18)"), "the block of the second half"),
    Prediction("How many nats per token is it away from the table then?",
               stated(15, "40: about … … {} …; …; … …"), "the block of the second half"),
    Prediction("And at step 400?",
               stated(15, "400: about … … {} …; …; … …"), "the block of the second half"),
]
