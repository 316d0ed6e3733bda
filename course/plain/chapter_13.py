"""Chapter 13 as a learner would write it: an honest probe, and the erasure of what it finds."""

import torch


def assign_folds(groups, n_folds, generator):
    """The fold of each example, such that no group is on both sides.

    groups: [n], the group (the text, say) of each example, whole numbers. n_folds: how many folds,
    at most as many as groups. generator: a torch.Generator, the only source of randomness. Returns
    [n], numbers from 0 to n_folds - 1: examples of one group have one fold, and the numbers of
    groups in two folds differ by at most one.
    """
    names, index = groups.unique(return_inverse=True)
    order = torch.randperm(len(names), generator=generator)
    return (order % n_folds)[index]


def standardise(train, test):
    """Features with mean 0 and standard deviation 1 on the training side.

    train: [n, d]; test: [m, d]. Returns (train, test): both less the mean of train and divided by
    its standard deviation (with division by n); no number of test is used. A feature that is
    constant in train is only centred.
    """
    mean = train.mean(0)
    std = (train - mean).pow(2).mean(0).sqrt()
    std = torch.where(std > 1e-12, std, torch.ones_like(std))
    return (train - mean) / std, (test - mean) / std


def logistic_gradient(X, y, W, b, l2):
    """The gradient of a probe's loss, by hand.

    X: [n, d]; y: [n], classes; W: [d, class]; b: [class]. The loss is the mean cross-entropy of the
    logits X @ W + b, plus l2 / 2 times the sum of the squares of W (b is not penalised). Returns
    (gradient of W, gradient of b).
    """
    error = (X @ W + b).softmax(-1)  # [n, class]
    error[torch.arange(len(y)), y] -= 1
    error = error / len(y)
    return X.T @ error + l2 * W, error.sum(0)


def control_labels(tokens, n_classes, generator):
    """Labels of a control task: a random class for each token type.

    tokens: [n], ids. generator: a torch.Generator. Returns [n], classes from 0 to n_classes - 1. A
    probe can learn them only by heart, type by type: nothing in the model represents them.
    """
    types, index = tokens.unique(return_inverse=True)
    classes = torch.randint(n_classes, (len(types),), generator=generator)
    return classes[index]


def erase_direction(X, y):
    """Features without the direction that separates the means of two classes.

    X: [n, d]; y: [n], 0 or 1. Returns [n, d]: X without its part along the difference of the two
    classes' means. Both classes then have the same mean.
    """
    difference = X[y == 1].mean(0) - X[y == 0].mean(0)
    unit = difference / difference.norm()
    return X - (X @ unit)[:, None] * unit


def code_length(probs, y):
    """How many bits it takes to send labels to somebody with the same predictions.

    probs: [n, class], the prediction for each label before it comes; y: [n]. Returns a scalar: the
    sum of -log2 of the probability of each label.
    """
    given = probs[torch.arange(len(y)), y]
    return -given.log2().sum()
