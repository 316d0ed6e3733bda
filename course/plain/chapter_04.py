"""Chapter 4 as a learner would write it: attention without hooks, kernels and padding."""

import math

import torch

from attention import causal_mask


def attention_pattern(q, k):
    """Where one head looks: for each query, how its attention of 1 is shared among the keys.

    q, k: [pos, d_head]. Returns [query_pos, key_pos]: softmax over the keys of q . k /
    sqrt(d_head), 0 for keys that come later than the query.
    """
    n_pos, d_head = q.shape
    scores = q @ k.T / math.sqrt(d_head)  # [query_pos, key_pos]
    later = torch.ones(n_pos, n_pos).triu(1).bool()
    scores = scores.masked_fill(later, -math.inf)
    return scores.softmax(-1)


def attend(self, q, k, v, key_mask=None):
    """The weighted mean of the values that each query sees, for all heads at once.

    q, k, v: [batch, pos, head, d_head]. key_mask: [batch, pos], False hides a key (padding).
    self.d_head: the width of a head. Returns z, [batch, pos, head, d_head].
    """
    q = q.transpose(1, 2)  # [batch, head, query_pos, d_head]
    k = k.transpose(1, 2)  # [batch, head, key_pos, d_head]
    v = v.transpose(1, 2)  # [batch, head, key_pos, d_head]
    visible = causal_mask(q.shape[2], k.shape[2], key_mask)

    scores = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)  # [batch, head, query_pos, key_pos]
    scores = scores.masked_fill(~visible, -math.inf)
    pattern = scores.softmax(-1)  # [batch, head, query_pos, key_pos]
    z = pattern @ v  # [batch, head, query_pos, d_head]
    return z.transpose(1, 2)


def project(self, q_input, k_input, v_input):
    """The three linear readings of the stream, by each head.

    q_input, k_input, v_input: [batch, pos, d_model], usually all the same. self.W_Q, self.W_K,
    self.W_V: [head, d_model, d_head]; self.b_Q, self.b_K, self.b_V: [head, d_head].
    Returns (q, k, v), each [batch, pos, head, d_head].
    """
    q = torch.einsum("bpm,hmd->bphd", q_input, self.W_Q) + self.b_Q
    k = torch.einsum("bpm,hmd->bphd", k_input, self.W_K) + self.b_K
    v = torch.einsum("bpm,hmd->bphd", v_input, self.W_V) + self.b_V
    return q, k, v


def write(self, z):
    """The output of all heads together, which is added to the stream.

    z: [batch, pos, head, d_head]. self.W_O: [head, d_head, d_model]; self.b_O: [d_model].
    Returns [batch, pos, d_model]: the sum over heads of z @ W_O, plus b_O once.
    """
    result = torch.einsum("bphd,hdm->bphm", z, self.W_O)  # [batch, pos, head, d_model]
    return result.sum(2) + self.b_O


def qk_matrix(W_Q, W_K):
    """Each head's QK matrix, which decides where it looks.

    W_Q, W_K: [head, d_model, d_head]. Returns [head, d_model, d_model], M with
    score(query, key) = query_resid @ M @ key_resid, before the division by sqrt(d_head).
    """
    return W_Q @ W_K.transpose(-1, -2)


def ov_matrix(W_V, W_O):
    """Each head's OV matrix: what it moves from the stream at the key to that at the query.

    W_V: [head, d_model, d_head]; W_O: [head, d_head, d_model]. Returns [head, d_model, d_model], M
    with result = resid @ M: what is written if all attention is on one position.
    """
    return W_V @ W_O


def previous_token_weights(n_ctx, sharpness=20.0):
    """The weights of a head that looks at the position before its own, wired by hand.

    The stream at position i is the i-th unit vector of n_ctx, so that row i of a weight is what
    position i reads. Returns (W_Q, W_K), each [n_ctx, n_ctx], such that q_i . k_j is `sharpness` if
    j = i - 1, and 0 otherwise.
    """
    W_Q = torch.eye(n_ctx)  # the query names its own position
    W_K = sharpness * torch.eye(n_ctx).roll(1, dims=1)  # the key names the position after its own
    W_K[-1] = 0.0
    return W_Q, W_K


def prev_token_score(pattern):
    """The mean attention that each position, from the second on, pays to the one before it.

    pattern: [..., query_pos, key_pos], rows summing to one. Returns [...]: 1 for a perfect
    previous-token head.
    """
    to_previous = pattern.diagonal(offset=-1, dim1=-2, dim2=-1)  # [..., query_pos - 1]
    return to_previous.mean(-1)


def attention_entropy(pattern):
    """How spread out attention is: the mean over queries of the entropy of their rows, in nats.

    pattern: [..., query_pos, key_pos], rows summing to one; 0 log 0 is 0. Returns [...]: 0 for a
    head that looks at one key alone.
    """
    logs = pattern.clamp(min=1e-30).log()
    entropies = -(pattern * logs).sum(-1)  # [..., query_pos]
    return entropies.mean(-1)
