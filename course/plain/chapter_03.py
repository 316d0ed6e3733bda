"""Chapter 3 as a learner would write it: tables, and products of tables."""

import math

import torch


def one_hot(tokens, d_vocab):
    """A vector for each token: 1 at its id, 0 elsewhere.

    tokens: [...], ids. Returns [..., d_vocab], float.
    """
    return (tokens.unsqueeze(-1) == torch.arange(d_vocab)).float()


def embed_tokens(self, tokens):
    """Each token's row of the table, which is one_hot(token) @ W_E.

    tokens: [batch, pos], ids. self.W_E: [d_vocab, d_model]. Returns [batch, pos, d_model].
    """
    return self.W_E[tokens]


def embed_text(tokens, W_E, W_pos):
    """The stream before the first block: each token's embedding plus its position's.

    tokens: [batch, pos], ids; W_E: [d_vocab, d_model]; W_pos: [n_ctx, d_model], of which a text of
    fewer positions uses the first rows. Returns resid, [batch, pos, d_model].
    """
    n_pos = tokens.shape[1]
    return W_E[tokens] + W_pos[:n_pos]


def unembed_stream(resid, W_U, b_U):
    """One logit a token: the stream's dot product with the token's column of W_U.

    resid: [batch, pos, d_model]; W_U: [d_model, d_vocab]; b_U: [d_vocab].
    Returns logits, [batch, pos, d_vocab].
    """
    return resid @ W_U + b_U


def direct_path(W_E, W_U):
    """The predictions of a model without layers and positions: a table of next tokens.

    W_E: [d_vocab, d_model]; W_U: [d_model, d_vocab]. Returns [token, next_token]: the log
    probability of each next token, rows that are distributions.
    """
    logits = W_E @ W_U  # [token, next_token]
    return logits.log_softmax(-1)


def bigram_table(tokens, d_vocab, alpha=1.0):
    """The chance of each next token after each token, counted in a text.

    tokens: [n], ids. Each pair (token, next token) is counted; alpha is added to every count, so
    that unseen pairs are unlikely, not impossible. Returns [token, next_token], rows that sum to 1.
    """
    counts = torch.full((d_vocab, d_vocab), alpha)
    for token, following in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        counts[token, following] += 1
    return counts / counts.sum(1, keepdim=True)


def sinusoidal_positions(n_ctx, d_model):
    """sin and cos of each position, at wavelengths that grow from 2 pi to nearly 10,000 * 2 pi.

    Dimensions 2i and 2i + 1 are sin and cos of pos / 10,000^(2i / d_model); d_model is even.
    Returns [n_ctx, d_model].
    """
    waves = torch.zeros(n_ctx, d_model)
    pos = torch.arange(n_ctx)
    for i in range(0, d_model, 2):
        angle = pos / 10_000 ** (i / d_model)
        waves[:, i] = angle.sin()
        waves[:, i + 1] = angle.cos()
    return waves


def shift_rotation(d_model, shift):
    """The matrix that shifts every position by `shift`: waves[pos] @ R is waves[pos + shift].

    waves are sinusoidal_positions, where dimensions 2i and 2i + 1 are sin and cos of an angle that
    grows by 10,000^(-2i / d_model) a position. Returns R, [d_model, d_model]: a rotation in each
    pair of dimensions.
    """
    R = torch.zeros(d_model, d_model)
    for i in range(0, d_model, 2):
        angle = shift / 10_000 ** (i / d_model)
        cos = math.cos(angle)
        sin = math.sin(angle)
        # sin(a + s) = sin a cos s + cos a sin s; cos(a + s) = cos a cos s - sin a sin s
        R[i, i] = cos
        R[i + 1, i] = sin
        R[i, i + 1] = -sin
        R[i + 1, i + 1] = cos
    return R
