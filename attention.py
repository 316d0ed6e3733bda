"""Causal self-attention: the only place where information moves between positions.

Each head does two independent things. The QK circuit decides where it looks: the query says what
this position searches for, a key says what each position offers, and a match draws attention. The
OV circuit decides what it moves: the values say what is carried from the positions that it looks
at, and W_O says along which directions that is written into the stream.

    scores  = q @ k.T / sqrt(d_head)                 # how well each key matches each query
    pattern = softmax(scores, future masked out)     # rows sum to one
    z       = pattern @ v                            # a weighted mean of the values
    output  = sum over heads of z @ W_O, + b_O

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: embeddings.py
Next: experiments/attention_page/measure.py
Source: Vaswani et al. 2017, section 3.2; Elhage et al. 2021 (QK and OV)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from hooks import HookPoint
from utils import UserError


class Attention(nn.Module):
    """All attention heads of one block.

    W_Q, W_K and W_V lie side by side in a single W_QKV [d_model, 3 * n_heads * d_head], because one
    large matrix product is faster than three. W_Q, W_K, W_V and W_O are views of the weights by
    head, so writing into them changes the model.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.d_head = cfg.d_head
        self.dropout = cfg.dropout
        d_model = cfg.d_model
        d_heads = cfg.n_heads * cfg.d_head  # all heads side by side; often, but not always, d_model
        self.W_QKV = nn.Parameter(torch.empty(d_model, 3 * d_heads))
        self.W_heads_out = nn.Parameter(torch.empty(d_heads, d_model))
        self.b_QKV = nn.Parameter(torch.empty(3 * d_heads)) if cfg.attn_bias else None
        self.b_heads_out = nn.Parameter(torch.empty(d_model)) if cfg.attn_bias else None
        self.hook_q = HookPoint("batch pos head d_head")
        self.hook_k = HookPoint("batch pos head d_head")
        self.hook_v = HookPoint("batch pos head d_head")
        self.hook_attn_scores = HookPoint("batch head query_pos key_pos")
        self.hook_pattern = HookPoint("batch head query_pos key_pos")
        self.hook_z = HookPoint("batch pos head d_head")
        self.hook_result = HookPoint("batch pos head d_model")

    def forward(self, q_input, k_input, v_input, past=None, key_mask=None):
        """What q, k and v read (usually the same) -> what the heads write, [batch, pos, d_model].

        Each input: [batch, pos, d_model], or [batch, pos, head, d_model] if each head has its own.
        past: None, or earlier keys and values to attend to as well, such as a GrowingPast, which
        brings its own key mask. key_mask: [batch, pos]; False hides a key (padding).
        """
        q, k, v = self.project(q_input, k_input, v_input)  # [batch, pos, head, d_head]
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if past is not None:
            k, v, key_mask = past.extend(k, v)
        z = self.hook_z(self.attend(q, k, v, key_mask))  # [batch, pos, head, d_head]
        if self.hook_result.listeners:
            result = self.hook_result(torch.einsum("bphd,hdm->bphm", z, self.W_O))
            return result.sum(2) + self.b_O
        return self.write(z)  # the same sum

    def write(self, z):
        """What all heads write, summed: z [batch, pos, head, d_head] -> [batch, pos, d_model]."""
        out = z.flatten(2) @ self.W_heads_out
        return out if self.b_heads_out is None else out.add_(self.b_heads_out)

    def project(self, q_input, k_input, v_input):
        """Queries, keys and values: each [batch, pos, head, d_head]."""
        if q_input is k_input is v_input:
            qkv = q_input @ self.W_QKV  # [batch, pos, 3 n_heads d_head]
            if self.b_QKV is not None:
                qkv = qkv.add_(self.b_QKV)  # in place: cheaper on a CPU than F.linear
            return qkv.unflatten(-1, (3, self.n_heads, self.d_head)).unbind(2)

        projected = []
        for resid, W, b in ((q_input, self.W_Q, self.b_Q), (k_input, self.W_K, self.b_K),
                            (v_input, self.W_V, self.b_V)):
            if resid.ndim == 3:  # one stream for all heads
                resid = resid.unsqueeze(2).expand(-1, -1, self.n_heads, -1)
            projected.append(torch.einsum("bphm,hmd->bphd", resid, W) + b)
        return projected

    def attend(self, q, k, v, key_mask=None):
        """The mean of the values weighted by the pattern, [batch, pos, head, d_head].

        If a hook listens to the scores or the pattern, they are computed explicitly. If none does,
        one fused kernel gives the same numbers without building the pattern. Second derivatives
        need torch's plain kernel: sdpa_kernel(SDPBackend.MATH), from torch.nn.attention.
        """
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # [batch, head, pos, d_head]
        n_queries = q.shape[2]
        n_keys = k.shape[2]

        if self.hook_attn_scores.listeners or self.hook_pattern.listeners:
            visible = causal_mask(n_queries, n_keys, key_mask, q.device)
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.d_head)
            scores = self.hook_attn_scores(scores.masked_fill(~visible, -math.inf))
            pattern = self.hook_pattern(scores.softmax(-1))  # [batch, head, query_pos, key_pos]
            z = F.dropout(pattern, self.dropout, self.training) @ v
        else:
            # The kernel has its own causal mask when there are as many queries as keys. A single
            # query, which is the last position during decoding, sees all keys.
            is_causal = n_queries == n_keys and key_mask is None
            needs_no_mask = is_causal or (n_queries == 1 and key_mask is None)
            visible = None if needs_no_mask else causal_mask(n_queries, n_keys, key_mask, q.device)
            dropout = self.dropout if self.training else 0.0
            z = F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=is_causal)
        return z.transpose(1, 2)

    def by_head(self, which):
        """W_QKV split by head, [head, d_model, d_head]; which: 0 for q, 1 for k, 2 for v."""
        return self.W_QKV.unflatten(1, (3, self.n_heads, self.d_head))[:, which].transpose(0, 1)

    def bias_by_head(self, which):
        """b_QKV split by head, [head, d_head]; zeros if the model has no such bias."""
        if self.b_QKV is None:
            return self.W_QKV.new_zeros(self.n_heads, self.d_head)
        return self.b_QKV.unflatten(0, (3, self.n_heads, self.d_head))[which]

    W_Q = property(lambda self: self.by_head(0), doc="[head, d_model, d_head], a view")
    W_K = property(lambda self: self.by_head(1), doc="[head, d_model, d_head], a view")
    W_V = property(lambda self: self.by_head(2), doc="[head, d_model, d_head], a view")
    b_Q = property(lambda self: self.bias_by_head(0), doc="[head, d_head], a view")
    b_K = property(lambda self: self.bias_by_head(1), doc="[head, d_head], a view")
    b_V = property(lambda self: self.bias_by_head(2), doc="[head, d_head], a view")

    @property
    def W_O(self):
        """[head, d_head, d_model], a view."""
        return self.W_heads_out.unflatten(0, (self.n_heads, self.d_head))

    @property
    def b_O(self):
        """[d_model]; zeros if the model has no such bias."""
        if self.b_heads_out is None:
            return self.W_heads_out.new_zeros(self.W_heads_out.shape[1])
        return self.b_heads_out


def causal_mask(n_queries, n_keys, key_mask=None, device=None):
    """True where a query may look: at its own position and earlier ones. [query_pos, key_pos], or
    [batch, 1, query_pos, key_pos] with a key mask.

    The queries are the last n_queries of the n_keys positions. key_mask: [batch, key_pos]; False
    hides a key (padding). A position always sees itself, so no softmax is taken over nothing.
    """
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    key = torch.arange(n_keys, device=device)
    if key_mask is None:
        return key <= query
    return (key <= query) & (key_mask[:, None, None, :] | (key == query))


class GrowingPast:
    """A key-value cache for decoding: the keys and values of all positions so far in one layer.

    n_ctx: the most positions it can hold; the memory is allocated at the first step. Use it under
    `torch.no_grad()`.
    key_mask: [batch, n_ctx] or None; False hides a key permanently (left padding of a batch).
    """

    def __init__(self, n_ctx, key_mask=None):
        self.n_ctx = n_ctx
        self.key_mask = key_mask
        self.length = 0
        self.k = None  # [batch, n_ctx, head, d_head], of which the first `length` are filled
        self.v = None

    def extend(self, k, v):
        """Appends k, v [batch, pos, head, d_head] of the new positions; returns the keys and values
        of all positions and their mask ([batch, key_pos] or None). UserError if it is full."""
        end = self.length + k.shape[1]
        if end > self.n_ctx:
            raise UserError(f"{end} positions do not fit into n_ctx={self.n_ctx}; shorten the text")
        if self.k is None:
            shape = (k.shape[0], self.n_ctx, *k.shape[2:])
            self.k = k.new_empty(shape)
            self.v = v.new_empty(shape)

        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end
        mask = None if self.key_mask is None else self.key_mask[:, :end]
        return self.k[:, :end], self.v[:, :end], mask
