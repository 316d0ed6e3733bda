"""Other right solutions of the exercises of chapter 13."""

import math

import torch
import torch.nn.functional as F


def assign_folds_as_dictionary(groups, n_folds, generator):
    names = sorted(set(groups.tolist()))
    order = torch.randperm(len(names), generator=generator).tolist()
    fold = {names[thing]: place % n_folds for place, thing in enumerate(order)}
    return torch.tensor([fold[group] for group in groups.tolist()])


def standardise_as_torch(train, test):
    std = train.std(0, correction=0)
    std[std < 1e-12] = 1.0
    return (train - train.mean(0)) / std, (test - train.mean(0)) / std


def logistic_gradient_as_autograd(X, y, W, b, l2):
    W, b = W.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    loss = F.cross_entropy(X @ W + b, y) + l2 / 2 * W.pow(2).sum()
    return torch.autograd.grad(loss, (W, b))


def logistic_gradient_as_one_hot(X, y, W, b, l2):
    p = torch.softmax(X @ W + b, dim=1)
    error = p - F.one_hot(y, W.shape[1])
    return torch.einsum("nd,nc->dc", X, error) / len(X) + l2 * W, error.mean(0)


def control_labels_as_dictionary(tokens, n_classes, generator):
    of_type = {}
    for token in tokens.tolist():
        if token not in of_type:
            of_type[token] = int(torch.randint(n_classes, (1,), generator=generator))
    return torch.tensor([of_type[token] for token in tokens.tolist()])


def erase_direction_as_projector(X, y):
    d = X[y.bool()].mean(0) - X[~y.bool()].mean(0)
    P = torch.eye(len(d)) - torch.outer(d, d) / (d @ d)
    return X @ P


def code_length_as_nats(probs, y):
    return F.nll_loss(probs.log(), y, reduction="sum") / math.log(2)
