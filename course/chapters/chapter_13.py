"""Chapter 13, decodable is not used: an honest probe, its control, and erasure."""


import torch
import torch.nn.functional as F

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, random
from course.engine.page import stated

IMPORTS = ["import torch"]


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two tensors should be returned, as in `return train, test`")
    return result


# assign_folds

GROUPS = torch.tensor([7, 7, 3, 3, 3, 9, 1, 1, 5, 5, 5, 5])


def folds_of(assign_folds, seed=0):
    folds = assign_folds(GROUPS, 2, torch.Generator().manual_seed(seed))
    expect(getattr(folds, "shape", None) == (12,), "12 examples should have 12 folds")
    return folds


def no_group_is_on_both_sides(assign_folds):
    """examples of one text have one fold"""
    for seed in range(20):
        folds = folds_of(assign_folds, seed)
        for group in GROUPS.unique():
            found = folds[GROUPS == group].unique().tolist()
            expect(len(found) == 1, f"text {int(group)} is in folds {found}: what its positions "
                   "share would help the probe on the held-out side")


def folds_are_about_as_large(assign_folds):
    """5 texts in 2 folds are 3 and 2"""
    for seed in range(20):
        folds = folds_of(assign_folds, seed)
        sizes = sorted(len(GROUPS[folds == fold].unique()) for fold in (0, 1))
        expect(sizes == [2, 3], f"the 2 folds have {sizes} of the 5 texts, and should have 2 and 3")


def folds_are_drawn(assign_folds):
    """the same seed gives the same folds, another seed gives others"""
    draws = {tuple(folds_of(assign_folds, seed).tolist()) for seed in range(20)}
    expect(len(draws) > 5, f"20 seeds gave {len(draws)} different assignments")
    expect(torch.equal(folds_of(assign_folds, 3), folds_of(assign_folds, 3)),
           "the same generator gave two assignments")


# standardise


def the_training_side_is_standard(standardise):
    """the training side has mean 0 and mean square 1"""
    train, _ = pair_of(standardise(3 * random(20, 4) + 5, random(7, 4, seed=1)))
    expect_close(train.mean(0), torch.zeros(4), "the mean", "feature", tolerance=1e-3)
    expect_close(train.pow(2).mean(0), torch.ones(4), "the mean square", "feature", tolerance=1e-3)


def the_test_side_is_moved_alike(standardise):
    """the test side is shifted and scaled by the numbers of the training side, not its own"""
    train, test = 3 * random(20, 4) + 5, random(7, 4, seed=1) - 2
    got = pair_of(standardise(train, test))[1]
    want = (test - train.mean(0)) / train.std(0, correction=0)
    expect_close(got, want, "the test side", "example feature", ask="no number may come from the "
                                                                    "test side")


def a_constant_gives_no_nan(standardise):
    """a feature that is constant in training becomes 0, and not NaN"""
    train, _ = pair_of(standardise(torch.ones(5, 1), torch.ones(2, 1)))
    expect_close(train, torch.zeros(5, 1), "the constant", "example feature")


# logistic_gradient


def probe_inputs():
    return random(20, 4), torch.arange(20) % 3, random(4, 3, seed=1), random(3, seed=2)


def it_equals_autograd(logistic_gradient):
    """without a penalty it equals autograd's"""
    X, y, W, b = probe_inputs()
    W, b = W.requires_grad_(), b.requires_grad_()
    want = torch.autograd.grad(F.cross_entropy(X @ W + b, y), (W, b))
    got = pair_of(logistic_gradient(X, y, W.detach(), b.detach(), 0.0))
    expect_close(got[0], want[0], "the gradient of W", "feature class")
    expect_close(got[1], want[1], "the gradient of b", "class")


def the_penalty_is_of_W_alone(logistic_gradient):
    """the penalty adds l2 W to W's gradient, and nothing to b's"""
    X, y, W, b = probe_inputs()
    without, with_it = (pair_of(logistic_gradient(X, y, W, b, l2)) for l2 in (0.0, 0.5))
    expect_close(with_it[0] - without[0], 0.5 * W, "what l2=0.5 adds to W's gradient",
                 "feature class")
    expect_close(with_it[1] - without[1], torch.zeros(3), "what it adds to b's", "class")


# control_labels


def one_type_one_label(control_labels):
    """the same token has the same label at every position"""
    tokens = torch.arange(200) % 9
    labels = control_labels(tokens, 4, torch.Generator().manual_seed(0))
    expect(getattr(labels, "shape", None) == (200,), "200 tokens should have 200 labels")
    for token in range(9):
        found = labels[tokens == token].unique().tolist()
        expect(len(found) == 1, f"token {token} has the labels {found}: a probe could not learn "
               "them even by heart, and the control would be too easy to beat")


def labels_are_drawn_by_type(control_labels):
    """labels are random classes, all of which come up"""
    tokens = torch.arange(300)
    labels = control_labels(tokens, 3, torch.Generator().manual_seed(0))
    counts = [int((labels == c).sum()) for c in range(3)]
    expect(sum(counts) == 300 and min(counts) > 60, f"of 300 types the 3 classes have {counts}")
    again = control_labels(tokens, 3, torch.Generator().manual_seed(0))
    expect(torch.equal(labels, again), "the same generator gave other labels")
    expect(not torch.equal(labels, tokens % 3), "the labels follow the ids: a model may know those")


# erase_direction


def two_classes():
    y = torch.arange(40) % 2
    X = random(40, 5)
    X[:, 0] += 3.0 * y
    X[:, 1] -= 2.0 * y
    return X, y


def the_means_are_the_same(erase_direction):
    """afterwards both classes have the same mean"""
    X, y = two_classes()
    erased = erase_direction(X, y)
    difference = erased[y == 1].mean(0) - erased[y == 0].mean(0)
    expect_close(difference, torch.zeros(5), "the difference of the means", "feature",
                 tolerance=1e-3)


def the_rest_stays(erase_direction):
    """parts orthogonal to the direction do not change"""
    X, y = two_classes()
    d = X[y == 1].mean(0) - X[y == 0].mean(0)
    across = random(5, seed=3)
    across = across - (across @ d) / (d @ d) * d
    expect_close(erase_direction(X, y) @ across, X @ across, "a reading orthogonal to the "
                                                             "direction",
                 "example", ask="only the part along the difference is removed")


def erasing_twice_is_erasing_once(erase_direction):
    """the rest has nothing along the direction"""
    X, y = two_classes()
    d = X[y == 1].mean(0) - X[y == 0].mean(0)
    along = erase_direction(X, y) @ (d / d.norm())
    expect_close(along, torch.zeros(40), "the rest along the direction", "example",
                 tolerance=1e-3)


# code_length


def a_certain_label_is_free(code_length):
    """a label predicted with certainty costs 0 bits, a fair coin costs 1"""
    expect_close(code_length(torch.tensor([[1.0, 0]]), torch.tensor([0])), 0.0, "the bits")
    expect_close(code_length(torch.full((3, 2), 0.5), torch.tensor([0, 1, 1])), 3.0,
                 "the bits of three coins", ask="bits, and their sum")


def each_label_pays_for_itself(code_length):
    """labels with probabilities 1/4 and 1/8 cost 2 and 3 bits"""
    probs = torch.tensor([[0.25, 0.75], [0.875, 0.125]])
    expect_close(code_length(probs, torch.tensor([0, 1])), 5.0, "the bits")


EXERCISES = [
    Exercise(
        name="assign_folds", source=None, minutes=15, difficulty=2,
        needed_for="every held-out accuracy", task="Put whole texts into folds, in random order.",
        checks=(no_group_is_on_both_sides, folds_are_about_as_large, folds_are_drawn),
        hints=("First a fold for each group, then for each example that of its group.",
               "groups.unique(return_inverse=True) gives the names, and each example's place among "
               "them.", "(torch.randperm(len(names), generator=generator) % n_folds)[index]."),
        mistakes=(
            Mistake("when examples are drawn instead of groups: a leak",
                    "order = torch.randperm(len(names), generator=generator)",
                    "order = torch.randperm(len(groups), generator=generator)",
                    also=(("(order % n_folds)[index]", "order % n_folds"),)),
            Mistake("when each group draws its fold by itself",
                    "torch.randperm(len(names), generator=generator)",
                    "torch.randint(n_folds, (len(names),), generator=generator)"),
            Mistake("when nothing is drawn", "torch.randperm(len(names), generator=generator)",
                    "torch.arange(len(names))"),
        )),
    Exercise(
        name="standardise", source=None, minutes=10, difficulty=1, needed_for="fitting a probe",
        task="Use no statistic of the test side.",
        checks=(the_training_side_is_standard, the_test_side_is_moved_alike,
                a_constant_gives_no_nan),
        hints=("Mean and deviation are those of train.", "Shift and scale both sides by them.",
               "Where the deviation is 0, divide by 1."),
        mistakes=(
            Mistake("when the test side is standardised by itself", "(test - mean) / std",
                    "(test - test.mean(0)) / test.std(0, correction=0)"),
            Mistake("when mean and deviation are of both sides together: a leak",
                    "mean = train.mean(0)", "mean = torch.cat([train, test]).mean(0)"),
            Mistake("when a constant is divided by 0",
                    "    std = torch.where(std > 1e-12, std, torch.ones_like(std))\n", ""),
            Mistake("with one number for all features", "train.mean(0)", "train.mean()",
                    also=((".pow(2).mean(0)", ".pow(2).mean()"),)),
        )),
    Exercise(
        name="logistic_gradient", source=None, minutes=15, difficulty=2,
        needed_for="fitting a probe", task="Chapter 1's gradient, one layer further.",
        checks=(it_equals_autograd, the_penalty_is_of_W_alone),
        hints=("By the logits it is (softmax - one_hot) / n.",
               "logits = X @ W + b: by W it is X.T @ that, by b its sum.",
               "The penalty adds l2 * W."),
        mistakes=(
            Mistake("without the mean over examples", "    error = error / len(y)\n", ""),
            Mistake("with 2 l2 W: the half is forgotten", "+ l2 * W", "+ 2 * l2 * W"),
            Mistake("when b is penalised too", "error.sum(0)", "error.sum(0) + l2 * b"),
            Mistake("with the opposite sign", "X.T @ error + l2 * W, error.sum(0)",
                    "-(X.T @ error) + l2 * W, -error.sum(0)"),
        )),
    Exercise(
        name="control_labels", source=None, minutes=10, difficulty=1, needed_for="selectivity",
        task="Labels that a probe can only learn by heart.",
        checks=(one_type_one_label, labels_are_drawn_by_type),
        hints=("Draw a class for each type, not for each token.",
               "tokens.unique(return_inverse=True).", "torch.randint(n_classes, …)[index]."),
        mistakes=(
            Mistake("when every token draws a label of its own: shuffled labels", "(len(types),)",
                    "(len(tokens),)", also=(("classes[index]", "classes"),)),
            Mistake("when the labels follow the ids", "classes[index]", "types[index] % n_classes"),
        )),
    Exercise(
        name="erase_direction", source=None, minutes=10, difficulty=1,
        needed_for="asking whether it is used", task="A projection.",
        checks=(the_means_are_the_same, the_rest_stays, erasing_twice_is_erasing_once),
        hints=("The direction: one class's mean less the other's.",
               "The part along a unit vector u is (X @ u) u.",
               "X - (X @ unit)[:, None] * unit."),
        mistakes=(
            Mistake("when the direction is not of length 1", "difference / difference.norm()",
                    "difference"),
            Mistake("when the part is subtracted twice: a mirror image", "X - (X @ unit)",
                    "X - 2 * (X @ unit)"),
            Mistake("when only the part along the direction is kept", "return X - (X @ unit)",
                    "return (X @ unit)"),
            Mistake("when the difference itself is subtracted from all",
                    "(X @ unit)[:, None] * unit",
                    "difference"),
        )),
    Exercise(
        name="code_length", source=None, minutes=5, difficulty=1,
        needed_for="online description length", task="Surprise, in bits.",
        checks=(a_certain_label_is_free, each_label_pays_for_itself),
        hints=("The label that came had some probability.", "-log2 of it, summed.",
               "-probs[torch.arange(len(y)), y].log2().sum()."),
        mistakes=(
            Mistake("in nats", ".log2()", ".log()"),
            Mistake("with the mean instead of the sum", ".sum()", ".mean()"),
            Mistake("with the entropy of the predictions instead of what came",
                    "-given.log2().sum()", "torch.special.entr(probs).sum() / 0.6931471805599453"),
        )),
]

PREDICTIONS = [
    Prediction("Take a model of the little language, and the stream between its two layers. A "
               "probe is asked whether a word stands in the last quarter of its window; guessing "
               "is right in 0.75 of cases. In which share is the probe right?",
               stated(13, "in the last quarter: accuracy about {}, control"),
               "the chapter's block"),
    Prediction("By how many nats does the loss rise if this label is erased?",
               stated(13, "a fresh probe about 0.75, the loss about +{} nats"),
               "the chapter's block"),
    Prediction("And if it is erased whether a word is a name?",
               stated(13, "a fresh probe about 0.85, the loss about +{} nats"),
               "the chapter's block"),
    Prediction("And whether it is a syllable?",
               stated(13, "a fresh probe about 0.77, the loss about +{} nats"),
               "the chapter's block"),
]
