"""Chapter 14, superposition and dictionaries: how features share dimensions, and are found."""

import math

import torch

from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, random
from course.engine.page import stated

IMPORTS = ["import torch"]


def polygon(n):
    """n directions of length 1, evenly around a circle: [2, n]."""
    angle = 2 * math.pi * torch.arange(n) / n
    return torch.stack([angle.cos(), angle.sin()])


# toy_forward


def with_room_for_all_nothing_is_lost(toy_forward):
    """with as many dimensions as features, positive features come back"""
    x = random(3, 4).abs()
    expect_close(toy_forward(torch.eye(4), torch.zeros(4), x), x, "the output", "batch feature")


def two_in_one_dimension(toy_forward):
    """two opposite features in one dimension: each comes back, if the other one is off"""
    x = torch.tensor([[0.7, 0], [0, 0.4], [0.7, 0.4]])
    want = torch.tensor([[0.7, 0], [0, 0.4], [0.3, 0]])
    got = toy_forward(torch.tensor([[1.0, -1.0]]), torch.zeros(2), x)
    expect_close(got, want, "the output", "batch feature", ask="the ReLU cuts off what the other "
                 "feature leaves below 0")


def the_bias_comes_before_the_relu(toy_forward):
    """a bias of -0.5 lowers the output, but never below 0"""
    x = torch.tensor([[1.0, 0.2]])
    got = toy_forward(torch.eye(2), torch.full((2,), -0.5), x)
    expect_close(got, torch.tensor([[0.5, 0]]), "the output", "batch feature")


# dimensionality


def a_dimension_of_its_own_is_one(dimensionality):
    """features with a dimension each have 1, however long they are"""
    got = dimensionality(torch.diag(torch.tensor([1.0, 3, 0.5])))
    expect_close(got, torch.ones(3), "the dimensionality", "feature")


def polygons_share_evenly(dimensionality):
    """5 features of a pentagon in 2 dimensions have 2/5 each, an opposite pair in one 1/2"""
    expect_close(dimensionality(polygon(5)), torch.full((5,), 0.4), "that of a pentagon's features",
                 "feature")
    expect_close(dimensionality(torch.tensor([[1.0, -1.0]])), torch.full((2,), 0.5),
                 "that of an opposite pair", "feature")


def who_is_not_there_has_none(dimensionality):
    """a feature of length 0 has 0, and no NaN"""
    got = dimensionality(torch.tensor([[1.0, 0], [0, 0]]))
    expect_close(got, torch.tensor([1.0, 0]), "the dimensionality", "feature")


def lengths_count(dimensionality):
    """two features share a dimension, one twice as long: 4/5 for the long one, 1/5 for the short"""
    got = dimensionality(torch.tensor([[1.0, 2.0]]))
    expect_close(got, torch.tensor([0.2, 0.8]), "the dimensionality", "feature",
                 ask="|W_i|^2 over the sum of squares of the projections of all W_j on W_i's "
                 "direction")


def it_equals_a_loop(dimensionality):
    """it equals a loop over all pairs of features"""
    W = random(2, 5)
    want = [W[:, i].norm() ** 2 / sum((W[:, i] @ W[:, j] / W[:, i].norm()) ** 2 for j in range(5))
            for i in range(5)]
    expect_close(dimensionality(W), torch.stack(want), "the dimensionality of random features",
                 "feature")


# expected_feature_loss


def nothing_lost_costs_nothing(expected_feature_loss):
    """a model that loses nothing costs 0"""
    x = random(5, 3).abs()
    expect_close(expected_feature_loss(torch.eye(3), torch.zeros(3), torch.ones(3), x), 0.0,
                 "the loss")


def the_mean_of_the_weighted_sums(expected_feature_loss):
    """errors of 1 and 2, of importance 1 and 0.5, cost 1 + 2 = 3 an example"""
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    got = expected_feature_loss(torch.zeros(1, 2), torch.zeros(2), torch.tensor([1.0, 0.5]), x)
    expect_close(got, 3.0, "the loss", ask="sum over features, mean over the batch; importance "
                 "multiplies the square")


# topk_latents


def the_k_largest_stay(topk_latents):
    """of 3, 1, 2, 0.5 the two largest stay, in their places"""
    got = topk_latents(torch.tensor([[3.0, 1, 2, 0.5]]), 2)
    expect_close(got, torch.tensor([[3.0, 0, 2, 0]]), "the latent", "batch latent")


def nothing_below_zero(topk_latents):
    """of 3, -1, -2 with k=2, only 3 stays"""
    got = topk_latents(torch.tensor([[3.0, -1, -2]]), 2)
    expect_close(got, torch.tensor([[3.0, 0, 0]]), "the latent", "batch latent")


def by_value_not_by_size(topk_latents):
    """each row has its own k; a large negative one is not among them"""
    got = topk_latents(torch.tensor([[-9.0, 1, 2, 3], [5.0, 4, 0.1, 0.2]]), 2)
    expect_close(got, torch.tensor([[0.0, 0, 2, 3], [5, 4, 0, 0]]), "the latent", "batch latent")


def gradients_go_through_those_that_stay(topk_latents):
    """the gradient reaches the k that stay, and no others"""
    pre = torch.tensor([[3.0, 1, 2, 0.5]], requires_grad=True)
    out = topk_latents(pre, 2)
    expect(out.requires_grad, "no gradient goes through: was the result copied by hand?")
    out.sum().backward()
    expect_close(pre.grad, torch.tensor([[1.0, 0, 1, 0]]), "the gradient", "batch latent")


# dictionary_forward


def dictionary_parts():
    return random(5, 4), random(4, 7, seed=1), random(7, seed=2), random(7, 4, seed=3), \
        random(4, seed=4)


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two tensors should be returned, (latents, reconstruction)")
    return result


def it_is_encoder_topk_decoder(dictionary_forward):
    """latents are TopK of (x - b_dec) @ W_enc + b_enc, and come back through W_dec"""
    x, W_enc, b_enc, W_dec, b_dec = dictionary_parts()
    pre = (x - b_dec) @ W_enc + b_enc
    least = pre.sort(-1, descending=True).values[:, 2:3]
    want = torch.where(pre >= least, pre, torch.zeros(())).relu()
    latents, back = pair_of(dictionary_forward(x, W_enc, b_enc, W_dec, b_dec, 3))
    expect_close(latents, want, "the latents", "batch latent", ask="b_dec is subtracted first")
    expect_close(back, want @ W_dec + b_dec, "the reconstruction", "batch d")


def of_nothing_it_says_the_bias(dictionary_forward):
    """if no latent is on, the reconstruction is b_dec"""
    x, W_enc, _, W_dec, b_dec = dictionary_parts()
    _, back = pair_of(dictionary_forward(x, W_enc, torch.full((7,), -1e3), W_dec, b_dec, 3))
    expect_close(back, b_dec.expand(5, 4), "the reconstruction", "batch d")


# explained_variance


def all_and_nothing(explained_variance):
    """x itself explains 1, its mean 0"""
    x = random(20, 4) + 3
    expect_close(explained_variance(x, x), 1.0, "the share of x itself")
    expect_close(explained_variance(x, x.mean(0).expand_as(x)), 0.0, "the share of the mean",
                 ask="the mean over the batch, of each dimension")


def large_dimensions_count_more(explained_variance):
    """errors and spread are summed over dimensions before they are divided"""
    x = random(20, 4) * torch.tensor([10.0, 1, 1, 1]) + 3
    back = x.clone()
    back[:, 0] = x[:, 0].mean()
    want = 1 - (x[:, 0] - x[:, 0].mean()).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    expect_close(explained_variance(x, back), want, "the share")


# recovered_share


def found_whatever_its_length(recovered_share):
    """a latent of another length along a feature has found it; the opposite one has not"""
    features = torch.eye(4)
    decoder = torch.cat([5 * torch.eye(4)[:2], -torch.eye(4)[2:3]])
    expect_close(recovered_share(features, decoder), 0.5, "the share", ask="cosines, with their "
                 "sign")


def near_is_not_enough(recovered_share):
    """a latent halfway between two features has found neither"""
    features = torch.eye(2)
    expect_close(recovered_share(features, torch.tensor([[1.0, 1.0]])), 0.0, "the share")
    expect_close(recovered_share(features, torch.tensor([[1.0, 1.0]]), least=0.7), 1.0,
                 "the share with least=0.7", ask="the cosine is 0.707")


def features_are_counted_not_latents(recovered_share):
    """ten latents along one of two features have found one half"""
    features = torch.eye(2)
    decoder = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    expect_close(recovered_share(features, decoder), 0.5, "the share", ask="of the features, not "
                 "of the latents")


EXERCISES = [
    Exercise(
        name="toy_forward", source=None, minutes=5, difficulty=1, needed_for="superposition",
        task="Compress, and expand again with the same weights.",
        checks=(with_room_for_all_nothing_is_lost, two_in_one_dimension,
                the_bias_comes_before_the_relu),
        hints=("hidden = W x; with examples as rows, x @ W.T.", "The way back is W^T: hidden @ W.",
               "(x @ W.T @ W + b).relu()."),
        mistakes=(
            Mistake("without the ReLU", ".relu()", ""),
            Mistake("with the bias after the ReLU", "(hidden @ W + b).relu()",
                    "(hidden @ W).relu() + b"),
            Mistake("with a ReLU on the hidden dimensions too", "hidden = x @ W.T",
                    "hidden = (x @ W.T).relu()"),
        )),
    Exercise(
        name="dimensionality", source=None, minutes=15, difficulty=2,
        needed_for="seeing polygons", task="Measure how much of a dimension a feature has.",
        checks=(a_dimension_of_its_own_is_one, polygons_share_evenly, who_is_not_there_has_none,
                lengths_count, it_equals_a_loop),
        hints=("unit.T @ W holds the projection of every W_j on every direction w_i.",
               "Square, and sum over j: row i.", "length**2 / shared, with clamps against 0 / 0."),
        mistakes=(
            Mistake("with the sum over i instead of j: the others' lengths drop out", ".sum(1)",
                    ".sum(0)"),
            Mistake("with the length instead of its square", "return length**2",
                    "return length"),
            Mistake("when 0 is divided by 0", "shared.clamp(min=1e-12)", "shared"),
        )),
    Exercise(
        name="expected_feature_loss", source=None, minutes=5, difficulty=1,
        needed_for="training toys", task="Weight errors by importance.",
        checks=(nothing_lost_costs_nothing, the_mean_of_the_weighted_sums),
        hints=("The squared error of each feature, times its importance.",
               "Sum over features, mean over examples.",
               "(importance * error.pow(2)).sum(1).mean()."),
        mistakes=(
            Mistake("with the mean over features", ".sum(1).mean()", ".mean()"),
            Mistake("when importance is squared too", "(importance * error.pow(2))",
                    "(importance * error).pow(2)"),
            Mistake("without importance", "(importance * error.pow(2))", "error.pow(2)"),
        )),
    Exercise(
        name="topk_latents", source=None, minutes=10, difficulty=1,
        needed_for="dictionary_forward", task="Keep the k largest, and none below 0.",
        checks=(the_k_largest_stay, nothing_below_zero, by_value_not_by_size,
                gradients_go_through_those_that_stay),
        hints=("torch.topk gives values and places.", "scatter puts them back.",
               "torch.zeros_like(pre).scatter(-1, places, values.relu())."),
        mistakes=(
            Mistake("without the ReLU: negative ones stay", "values.relu()", "values"),
            Mistake("when the k largest in size stay", "pre.topk(k, dim=-1)",
                    "pre.abs().topk(k, dim=-1)",
                    also=(("values.relu()", "pre.gather(-1, places)"),)),
            Mistake("when they are left sorted, not in their places",
                    "torch.zeros_like(pre).scatter(-1, places, values.relu())",
                    "torch.cat([values.relu(), torch.zeros_like(pre)[:, k:]], -1)"),
            Mistake("when the rest is kept and the k largest are dropped",
                    "torch.zeros_like(pre).scatter(-1, places, values.relu())",
                    "pre.relu().scatter(-1, places, 0.0)"),
        )),
    Exercise(
        name="dictionary_forward", source=None, minutes=10, difficulty=2,
        needed_for="dictionaries", task="Call topk_latents; the check uses our version of it.",
        checks=(of_nothing_it_says_the_bias, it_is_encoder_topk_decoder),
        hints=("b_dec holds what is the same in all x: subtract it first.",
               "latents = topk_latents((x - b_dec) @ W_enc + b_enc, k).",
               "latents @ W_dec + b_dec."),
        mistakes=(
            Mistake("when b_dec is not taken off before the encoder", "(x - b_dec) @ W_enc",
                    "x @ W_enc"),
            Mistake("when b_dec is not added after the decoder", "latents @ W_dec + b_dec",
                    "latents @ W_dec"),
            Mistake("without the encoder's bias", "@ W_enc + b_enc", "@ W_enc"),
            Mistake("with the encoder's weights in the decoder", "latents @ W_dec",
                    "latents @ W_enc.T"),
        )),
    Exercise(
        name="explained_variance", source=None, minutes=5, difficulty=1,
        needed_for="judging a fit, and mistrusting it", task="One minus a ratio.",
        checks=(all_and_nothing, large_dimensions_count_more),
        hints=("Always predicting the mean should score 0.",
               "Squared error, over squared distance from the mean.",
               "1 - (x - r).pow(2).sum() / (x - x.mean(0)).pow(2).sum()."),
        mistakes=(
            Mistake("when the mean is not subtracted: 0 is the baseline", "(x - x.mean(0))", "x"),
            Mistake("with one mean over all dimensions", "x.mean(0)", "x.mean()"),
            Mistake("of what is not explained", "1 - error / spread", "error / spread"),
            Mistake("with the mean of each dimension's share",
                    "    error = (x - reconstruction).pow(2).sum()\n"
                    "    spread = (x - x.mean(0)).pow(2).sum()\n    return 1 - error / spread\n",
                    "    error = (x - reconstruction).pow(2).sum(0)\n"
                    "    spread = (x - x.mean(0)).pow(2).sum(0)\n"
                    "    return (1 - error / spread).mean()\n"),
        )),
    Exercise(
        name="recovered_share", source=None, minutes=10, difficulty=1,
        needed_for="judging a dictionary of known features",
        task="For each feature, its best latent.",
        checks=(found_whatever_its_length, near_is_not_enough, features_are_counted_not_latents),
        hints=("Rows of length 1 on both sides: their products are cosines.",
               "The largest over latents, for each feature.",
               "((features @ decoder.T).max(1).values >= least).float().mean()."),
        mistakes=(
            Mistake("when latents are counted, and not features", ".max(1).values",
                    ".max(0).values"),
            Mistake("when the lengths stay in",
                    "    decoder = decoder / decoder.norm(dim=1, keepdim=True)\n", ""),
            Mistake("when the opposite direction counts too", "(features @ decoder.T).max",
                    "(features @ decoder.T).abs().max"),
            Mistake("with the mean of the best cosines", "(best >= least).float().mean()",
                    "best.mean()"),
        )),
]

def count_kept(which):
    """How many of five features a toy of the chapter's block keeps: those with a dimensionality
    that is not nearly 0."""
    found = page.find_numbers(14, f"{which}: D {{}} {{}} {{}} {{}} {{}}, together")
    return sum(share > 0.1 for share in found)



PREDICTIONS = [
    Prediction("Take five features of importance 0.9^i in two dimensions. How many are kept at "
               "density 1?",
               lambda: count_kept("with the ReLU, density 1.00"), "the chapter's block"),
    Prediction("How many at density 0.26?",
               lambda: count_kept("with the ReLU, density 0.26"), "the chapter's block"),
    Prediction("How many at density 0.05?",
               lambda: count_kept("with the ReLU, density 0.05"), "the chapter's block"),
    Prediction("And how many at density 0.05 without the ReLU?",
               lambda: count_kept("without it, density 0.05"), "the chapter's block"),
    Prediction("At density 0.3, two features have one dimension. Below which importance is the "
               "second one left out?",
               stated(14, "below $r = 0.6/2.5 = {}$"), "Expected"),
    Prediction("There are 128 features in 32 dimensions, 2.6 of them at a time. A dictionary "
               "explains 1.00 of the variance: which share of the features has it found?",
               stated(14, "L1, hardly any: about … active, explains 1.00, recovers {}"),
               "the block on dictionaries"),
    Prediction("And one that explains 0.92?",
               stated(14, "TopK, 20: about … active, explains 0.92, recovers {}"),
               "the block on dictionaries"),
    Prediction("And one that explains 0.83?",
               stated(14, "TopK, 3: about … active, explains 0.83, recovers {}"),
               "the block on dictionaries"),
]
