"""Chapter 6 as a learner would write it: one tensor at a time, without options."""

import math

import torch

from losses import cross_entropy
from optim import POLAR_EXPRESS_ROUNDS


def schedule(step, max_steps, warmup_steps=0, *, shape="linear", final_fraction=0.0):
    """The share of the full learning rate at step 0, 1, …, max_steps - 1.

    Over the first warmup_steps it rises linearly: 1/warmup_steps at step 0, 1 at the last of them.
    Then it falls from 1 at step warmup_steps towards final_fraction, which it would have at step
    max_steps: linearly ("linear") or by half a cosine ("cosine").
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps

    progress = (step - warmup_steps) / (max_steps - warmup_steps)  # 0 to 1
    remaining = 1 - progress
    if shape == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return final_fraction + (1 - final_fraction) * remaining


@torch.no_grad()
def clip_gradients_(parameters, most):
    """Scales all gradients down together, so that their joint norm is at most `most`. parameters:
    tensors, whose `.grad` may be None. Gradients with a smaller joint norm do not change. Returns
    the norm before that, a scalar tensor.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = sum(grad.pow(2).sum() for grad in grads).sqrt()
    if norm > most:
        for grad in grads:
            grad.mul_(most / norm)
    return norm


@torch.no_grad()
def adamw_step(self, share=1.0):
    """Makes one step of AdamW for every parameter; share: multiplies the learning rate, for the
    decay too.

    self.parameters: the tensors, each with a `.grad`; self.m, self.v: a tensor for each, of zeros
    at first; self.step_count: 0 at first, raised once a step. These four are changed in place.
    self.lr, self.betas (beta1, beta2), self.eps, self.weight_decay: numbers. Only matrices decay
    (ndim >= 2).
    """
    lr = share * self.lr
    beta1, beta2 = self.betas
    self.step_count += 1
    for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
        # The two averages
        m.mul_(beta1).add_((1 - beta1) * p.grad)
        v.mul_(beta2).add_((1 - beta2) * p.grad**2)

        # The decay
        if p.ndim >= 2:
            p.mul_(1 - lr * self.weight_decay)

        # The move: both averages began at zero, and are corrected for that
        m_corrected = m / (1 - beta1**self.step_count)
        v_corrected = v / (1 - beta2**self.step_count)
        p.sub_(lr * m_corrected / (v_corrected.sqrt() + self.eps))


def orthogonalise(matrix):
    """Approximately U V^T for a matrix U S V^T, [rows, cols]: the nearest orthogonal matrix.

    The matrix is divided by its norm (the root of the sum of its squares), so that no singular
    value is above 1. Then each of the POLAR_EXPRESS_ROUNDS (a, b, c) makes X into
    a X + b (X X^T) X + c (X X^T)^2 X, which moves every singular value towards 1. A tall matrix is
    transposed first, and at the end again: X X^T is then the smaller square.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    X = matrix.T if is_tall else matrix
    X = X / (X.norm() + 1e-7)
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        square = X @ X.T
        X = a * X + b * square @ X + c * square @ square @ X
    return X.T if is_tall else X


def train_step(model, optimizer, inputs, targets):
    """One step of training: forward, loss, backward, step.

    model(inputs) -> logits; inputs, targets: [batch, pos]; optimizer.step() moves the model's
    parameters along their `.grad`. The gradients of the step before must be cleared first:
    model.zero_grad(). Returns the loss before the step, a float.
    """
    model.zero_grad()
    loss = cross_entropy(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that the next token is drawn from, [batch, d_vocab].

    logits: [batch, d_vocab]. temperature divides them. top_k keeps the k likeliest tokens. top_p
    then keeps the fewest likeliest tokens whose probabilities add up to p or more, at least one.
    The remaining probabilities are scaled to sum to one.
    """
    probs = (logits / temperature).softmax(-1)
    sorted_probs, order = probs.sort(descending=True, stable=True)
    if top_k is not None:
        sorted_probs[:, top_k:] = 0
        sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)
    if top_p is not None:
        likelier = sorted_probs.cumsum(-1) - sorted_probs  # the probability of all before it
        sorted_probs = sorted_probs.masked_fill(likelier >= top_p - 1e-6, 0.0)
        sorted_probs = sorted_probs / sorted_probs.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, order, sorted_probs)


def penalise_repetition(logits, tokens, penalty):
    """Logits in which tokens that occurred before are less likely, for a penalty above 1. Their
    logits are divided by the penalty, or multiplied by it if negative; only once, however often the
    token occurred. logits: [batch, d_vocab]; tokens: [batch, pos]. Returns [batch, d_vocab]; the
    logits that are passed in do not change.
    """
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, tokens, True)  # [batch, d_vocab]
    punished = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, punished, logits)


def pad_left(prompts):
    """Pad prompts on the left, so that all end together: (tokens, key_mask), each [batch, pos].
    prompts: a list of lists of ids. The padding before a shorter one is 0 in tokens and False in
    key_mask; key_mask is True for real tokens.
    """
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    key_mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        key_mask[row, longest - len(prompt) :] = True
    return tokens, key_mask


def extend(self, k, v):
    """Appends the keys and values of new positions to those of all positions before.

    k, v: [batch, pos, head, d_head], of the new positions. self.k, self.v: those kept so far, None
    at first; self.key_mask: [batch, n_ctx] or None. Keep the new ones in self.k and self.v, by
    torch.cat (the library fills a tensor of n_ctx positions instead). Returns (keys, values, mask):
    those of all positions so far, and self.key_mask for these positions, [batch, key_pos], or None.
    """
    self.k = k if self.k is None else torch.cat([self.k, k], 1)
    self.v = v if self.v is None else torch.cat([self.v, v], 1)
    n_keys = self.k.shape[1]
    mask = None if self.key_mask is None else self.key_mask[:, :n_keys]
    return self.k, self.v, mask


@torch.no_grad()
def continue_greedily(model, tokens, n_new):
    """A text and the n_new tokens with which a model continues it, always the likeliest.

    model(tokens) -> logits, [batch, pos, d_vocab], for at most model.cfg.n_ctx positions. It reads
    the last n_ctx tokens of a longer text. tokens: [batch, pos]. Returns [batch, pos + n_new].
    """
    for _ in range(n_new):
        window = tokens[:, -model.cfg.n_ctx :]
        logits = model(window)[:, -1]  # [batch, d_vocab]
        likeliest = logits.argmax(-1, keepdim=True)  # [batch, 1]
        tokens = torch.cat([tokens, likeliest], 1)
    return tokens
