"""Other right solutions of the exercises of chapter 4."""

import math

import torch
import torch.nn.functional as F


def causal_mask_as_tril(n_queries, n_keys, key_mask=None, device=None):
    past = n_keys - n_queries
    visible = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(past)
    if key_mask is None:
        return visible
    own = torch.eye(n_keys, dtype=torch.bool, device=device)[past:]
    return (visible & key_mask[:, None, :] | own)[:, None]


def causal_mask_as_loops(n_queries, n_keys, key_mask=None, device=None):
    n_rows = 1 if key_mask is None else len(key_mask)
    mask = torch.zeros(n_rows, 1, n_queries, n_keys, dtype=torch.bool, device=device)
    for row in range(n_rows):
        for i in range(n_queries):
            own = n_keys - n_queries + i
            for j in range(own + 1):
                mask[row, 0, i, j] = key_mask is None or j == own or key_mask[row, j]
    return mask[0, 0] if key_mask is None else mask


def attention_pattern_as_loops(q, k):
    pattern = torch.zeros(len(q), len(k))
    for i in range(len(q)):
        exponentials = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in range(i + 1)]
        for j, exponential in enumerate(exponentials):
            pattern[i, j] = exponential / sum(exponentials)
    return pattern


def attention_pattern_as_exponentials(q, k):
    weights = torch.exp(q @ k.T / q.shape[-1] ** 0.5).tril()
    return weights / weights.sum(-1, keepdim=True)


def attention_pattern_as_large_negative(q, k):
    # a mask that is added, as many textbooks do
    scores = (q @ k.T) * q.shape[-1] ** -0.5
    return F.softmax(scores + torch.full_like(scores, -1e9).triu(diagonal=1), dim=-1)


def attend_as_einsum(self, q, k, v, key_mask=None):
    n_pos = q.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.d_head**0.5
    hidden = torch.triu(torch.ones(n_pos, n_pos, dtype=torch.bool), 1)
    if key_mask is not None:
        own = torch.eye(n_pos, dtype=torch.bool)
        hidden = hidden | ~(key_mask[:, None, None, :] | own)
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, dim=3), v)


def attend_as_loops(self, q, k, v, key_mask=None):
    z = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            for i in range(q.shape[1]):
                seen = [j for j in range(i + 1) if j == i or key_mask is None or key_mask[b, j]]
                scores = k[b, seen, h] @ q[b, i, h] / math.sqrt(self.d_head)
                z[b, i, h] = scores.softmax(0) @ v[b, seen, h]
    return z


def attend_as_kernel(self, q, k, v, key_mask=None):
    visible = causal_mask_as_tril(q.shape[1], k.shape[1], key_mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2)


def project_as_matmul(self, q_input, k_input, v_input):
    readings = []
    for resid, W, b in ((q_input, self.W_Q, self.b_Q), (k_input, self.W_K, self.b_K),
                        (v_input, self.W_V, self.b_V)):
        readings.append((resid[:, None] @ W + b[:, None]).permute(0, 2, 1, 3))
    return readings


def project_as_one_product(self, q_input, k_input, v_input):
    if q_input is k_input is v_input:
        qkv = q_input @ self.W_QKV + self.b_QKV
        parts = qkv.split(qkv.shape[-1] // 3, dim=-1)
    else:
        width = self.W_QKV.shape[1] // 3
        parts = [resid @ self.W_QKV[:, i * width : (i + 1) * width]
                 + self.b_QKV[i * width : (i + 1) * width]
                 for i, resid in enumerate((q_input, k_input, v_input))]
    return tuple(part.view(*part.shape[:2], self.n_heads, self.d_head) for part in parts)


def write_as_concatenated(self, z):
    return z.reshape(*z.shape[:2], -1) @ self.W_O.reshape(-1, self.W_O.shape[-1]) + self.b_O


def write_as_sum_of_heads(self, z):
    out = self.b_O
    for head in range(self.n_heads):
        out = out + z[:, :, head] @ self.W_O[head]
    return out


def qk_matrix_as_einsum(W_Q, W_K):
    return torch.einsum("hmd,hnd->hmn", W_Q, W_K)


def ov_matrix_as_loop(W_V, W_O):
    return torch.stack([W_V[head] @ W_O[head] for head in range(len(W_V))])


def previous_token_weights_as_query_shifted(n_ctx, sharpness=20.0):
    W_Q = torch.diag(torch.full((n_ctx - 1,), sharpness), -1)
    return W_Q, torch.eye(n_ctx)


def previous_token_weights_as_loop(n_ctx, sharpness=20.0):
    W_Q = torch.zeros(n_ctx, n_ctx)
    W_K = torch.zeros(n_ctx, n_ctx)
    for i in range(1, n_ctx):
        W_Q[i, i] = math.sqrt(sharpness)
        W_K[i - 1, i] = math.sqrt(sharpness)
    return W_Q, W_K


def prev_token_score_as_index(pattern):
    queries = torch.arange(1, pattern.shape[-1])
    return pattern[..., queries, queries - 1].mean(dim=-1)


def attention_entropy_as_xlogy(pattern):
    return -torch.xlogy(pattern, pattern).sum(-1).mean(-1)


def attention_entropy_as_where(pattern):
    terms = torch.where(pattern > 0, -pattern * pattern.log(), torch.zeros_like(pattern))
    return terms.sum(-1).mean(-1)
