"""Other right solutions of the exercises of chapter 1."""

import math

import torch
import torch.nn.functional as F


def log_probabilities_as_logsumexp(logits):
    return logits - torch.logsumexp(logits, -1, keepdim=True)


def log_probabilities_as_log_softmax(logits):
    return F.log_softmax(logits, dim=-1)


def entropy_as_logsumexp(logits):
    # H = logsumexp(logits) - sum p logits
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def per_token_loss_as_torch(logits, targets):
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1),
                           reduction="none", ignore_index=-100)
    return flat.view(targets.shape)


def per_token_loss_as_one_hot(logits, targets):
    hot = F.one_hot(targets.clamp(min=0), logits.shape[-1])
    return -(logits.log_softmax(-1) * hot).sum(-1) * (targets >= 0)


def cross_entropy_as_torch(logits, targets):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def cross_entropy_as_selection(logits, targets):
    keep = targets != -100
    logs = logits[keep].log_softmax(-1)
    return -logs[torch.arange(len(logs)), targets[keep]].mean()


def next_token_loss_as_loop(logits, tokens):
    losses = []
    for row in range(tokens.shape[0]):
        for pos in range(tokens.shape[1] - 1):
            losses.append(-logits[row, pos].log_softmax(-1)[tokens[row, pos + 1]])
    return torch.stack(losses).mean()


def next_token_loss_as_torch(logits, tokens):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:])


def kl_divergence_as_torch(p_logits, q_logits):
    return F.kl_div(q_logits.log_softmax(-1), p_logits.log_softmax(-1), reduction="none",
                    log_target=True).sum(-1)


def kl_divergence_as_two_entropies(p_logits, q_logits):
    p = p_logits.softmax(-1)
    return -(p * q_logits.log_softmax(-1)).sum(-1) + (p * p_logits.log_softmax(-1)).sum(-1)


def cross_entropy_gradient_as_one_hot(logits, targets):
    return (logits.softmax(-1) - F.one_hot(targets, logits.shape[-1])) / logits.shape[0]


def gelu_gradient_as_sigmoid(x):
    a = 2 * math.sqrt(2 / math.pi)
    s = torch.sigmoid(a * (x + 0.044715 * x**3))
    return s + x * s * (1 - s) * a * (1 + 3 * 0.044715 * x**2)
