"""Chapter 1 as a learner would write it: without checks of arguments and half precision."""

import math

import torch

from losses import IGNORED


def log_probabilities(logits):
    """The logarithm of softmax over the last axis, also for very large logits.

    logits: [..., d_vocab], unnormalised. Returns [..., d_vocab]; its exp sums to 1.
    """
    logits = logits - logits.max(-1, keepdim=True).values  # the largest is 0: exp can't overflow
    return logits - logits.exp().sum(-1, keepdim=True).log()


def entropy(logits):
    """The entropy of a distribution, how uncertain it is: -sum p log p, in nats.

    logits: [..., d_vocab], unnormalised. Returns [...]: ln d_vocab if all are equally likely.
    """
    logs = log_probabilities(logits)
    return -(logs.exp() * logs).sum(-1)


def per_token_loss(logits, targets):
    """The surprise at each token, -log p(target), in nats.

    logits: [..., d_vocab], unnormalised; targets: [...], ids, or IGNORED (-100) if there is nothing
    to predict. Returns [...], with 0 for ignored targets.
    """
    counts = targets != IGNORED
    ids = targets.masked_fill(~counts, 0)
    chosen = log_probabilities(logits).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return -chosen * counts


def cross_entropy(logits, targets):
    """The mean surprise over the targets that count, in nats a token: the loss that training
    minimises.

    logits: [..., d_vocab]; targets: [...], ids, or IGNORED (-100). Returns a scalar.
    """
    losses = per_token_loss(logits, targets)
    return losses.sum() / (targets != IGNORED).sum()


def next_token_loss(logits, tokens):
    """The mean surprise at the next token of a text, in nats: position i is scored on token i + 1.

    logits: [batch, pos, d_vocab]; tokens: [batch, pos], those that gave the logits. The last
    position has no next token, and is left out. Returns a scalar.
    """
    losses = per_token_loss(logits[:, :-1], tokens[:, 1:])  # [batch, pos - 1]
    return losses.mean()


def kl_divergence(p_logits, q_logits):
    """KL(p || q) = sum p (log p - log q): the nats lost by coding p with q's distribution.

    p_logits, q_logits: [..., d_vocab], unnormalised. Returns [...], 0 if p and q are equal.
    """
    p_log = log_probabilities(p_logits)
    q_log = log_probabilities(q_logits)
    return (p_log.exp() * (p_log - q_log)).sum(-1)


def cross_entropy_gradient(logits, targets):
    """The gradient of the mean cross-entropy by the logits, by hand and without autograd.

    logits: [n, d_vocab]; targets: [n], ids. Returns [n, d_vocab].
    """
    gradient = logits.softmax(-1)
    gradient[torch.arange(len(targets)), targets] -= 1  # p - one_hot(target)
    return gradient / len(targets)


def gelu_gradient(x):
    """The derivative of GPT-2's GELU, by hand: x [...] -> [...].

    gelu(x) = x/2 (1 + tanh u) with u = sqrt(2/pi) (x + 0.044715 x^3).
    """
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (x + 0.044715 * x**3))
    slope = root * (1 + 3 * 0.044715 * x**2)  # du/dx
    return 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope
