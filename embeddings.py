"""Embedding and unembedding: where the residual stream begins (tokens) and ends (logits).

    resid  = W_E[tokens] + W_pos[positions]        # [batch, pos, d_model]
    logits = resid @ W_U + b_U                     # [batch, pos, d_vocab]

Each is a linear map from one-hot vectors, so a token's embedding is just a row of W_E. A model that
has only these two maps is a table of bigrams.

Chapter: COURSE_ROADMAP.md, 3 (the stream as a sum)
Prerequisites: tokenizer.py
Next: positions.py
Source: Vaswani et al. 2017, section 3.5; Elhage et al. 2021 (the zero-layer transformer)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import UserError


def check_tokens(tokens, d_vocab):
    """Raises UserError unless tokens is [batch, pos] with ids from 0 to d_vocab - 1.

    torch itself reports only that an index is out of range; on a GPU, its error also makes all
    tensors there unusable.
    """
    if not isinstance(tokens, torch.Tensor):
        raise UserError(f"tokens is a {type(tokens).__name__}; pass ids as a tensor [batch, pos], "
                        "such as torch.tensor([tokenizer.encode(text)])")
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise UserError(f"tokens is {list(tokens.shape)} of {tokens.dtype}; "
                        "pass integer ids as [batch, pos]")
    if tokens.numel() == 0:
        raise UserError(f"tokens is empty, {list(tokens.shape)}; pass at least one")
    if torch.compiler.is_compiling():
        return  # reading a value would split the compiled graph
    try:
        lowest, highest = (extreme.item() for extreme in tokens.aminmax())
    except RuntimeError:  # under torch.func.vmap, values cannot be read
        return
    if lowest < 0 or highest >= d_vocab:
        raise UserError(f"tokens run from {lowest} to {highest}; "
                        f"this model knows 0 to {d_vocab - 1}")


class TokenEmbedding(nn.Module):
    """Token embedding: one row of W_E for each token, one_hot(token) @ W_E."""

    def __init__(self, cfg):
        super().__init__()
        self.W_E = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))

    def forward(self, tokens):
        """tokens [batch, pos] -> [batch, pos, d_model]; UserError for unknown ids."""
        check_tokens(tokens, self.W_E.shape[0])
        return F.embedding(tokens, self.W_E)


class PositionEmbedding(nn.Module):
    """Position embedding: one row of W_pos for each position, learned or sinusoidal."""

    def __init__(self, cfg):
        super().__init__()
        if cfg.positions == "learned":
            self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx, cfg.d_model))
        else:
            waves = sinusoidal_positions(cfg.n_ctx, cfg.d_model)
            # Scaled to the size of a newly initialised learned table, so as not to swamp the tokens
            self.register_buffer("W_pos", cfg.init_scale * math.sqrt(2) * waves, persistent=False)

    def forward(self, positions):
        """positions [pos] or [batch, pos] -> [..., pos, d_model]."""
        return F.embedding(positions, self.W_pos)  # a slice would be a live view of the weights


def sinusoidal_positions(n_ctx, d_model):
    """Sines and cosines of each position, at wavelengths from 2 pi to 10,000 * 2 pi.

    Returns [n_ctx, d_model]. A shift by k positions is the same rotation everywhere (Vaswani et al.
    2017).
    """
    pair = torch.arange(0, d_model, 2)
    angle = torch.arange(n_ctx)[:, None] / 10_000 ** (pair / d_model)  # [pos, d_model / 2]
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :d_model]


class Unembedding(nn.Module):
    """The unembedding: each token's logit is the stream's dot product with its column of W_U.

    With `tie_embeddings`, W_U is W_E transposed, as in GPT-2. Without it, W_U is a separate matrix,
    and the direct path from a token to the next (W_E W_U) need not be symmetric.
    """

    def __init__(self, cfg):
        super().__init__()
        tied = cfg.tie_embeddings
        self.W_U = None if tied else nn.Parameter(torch.empty(cfg.d_model, cfg.d_vocab_out))
        self.b_U = nn.Parameter(torch.empty(cfg.d_vocab_out)) if cfg.unembed_bias else None

    def weight(self, W_E):
        """W_U [d_model, d_vocab_out]. W_E [d_vocab, d_model] is used if the two are tied."""
        return W_E.T if self.W_U is None else self.W_U

    def forward(self, resid, W_E, tokens=None):
        """resid [..., d_model] -> logits [..., d_vocab_out], or `tokens` only (GPT.unembed)."""
        rows = self.weight(W_E).T  # [d_vocab_out, d_model]
        if tokens is None:
            return self.all_logits(resid, rows)
        tokens = torch.as_tensor(tokens, device=resid.device)
        logits = resid @ F.embedding(tokens, rows).mT  # [..., pos, n]
        if self.b_U is None:
            return logits
        bias = self.b_U[tokens]
        return logits + (bias if bias.ndim == 1 else bias[:, None])

    def all_logits(self, resid, rows):
        """resid @ W_U + b_U: resid [..., d_model], rows [d_vocab_out, d_model], W_U transposed.

        A CPU computes GPT-2's 50,257 logits faster by products of other shapes. Many positions take
        a part of the vocabulary at a time: 16 to 512 need two thirds to three quarters of the time.
        Gradients gain as well. One to four positions, as in decoding, take tied rows as two halves,
        in half of the time.
        """
        part_size = 1024 * torch.get_num_threads()
        is_large = resid.device.type == "cpu" and len(rows) > part_size
        n_positions = resid[..., 0].numel()

        if is_large and n_positions > 4:
            logits = torch.cat([F.linear(resid, part) for part in rows.split(part_size)], -1)
        elif is_large and rows.is_contiguous():
            logits = by_halves(resid, rows)
        else:
            return F.linear(resid, rows, self.b_U)
        return logits if self.b_U is None else logits.add_(self.b_U)


def by_halves(resid, rows):
    """resid @ rows.T for few positions: resid [..., d_model], rows [n, d_model] -> [..., n].

    Both halves are one batched product, because torch's kernel for it reads memory twice as fast as
    the one for a matrix and a vector (27 and 13 GB a second on one thread). rows: contiguous.
    """
    columns = resid.reshape(-1, resid.shape[-1]).T  # [d_model, n_positions]
    half = len(rows) // 2
    halves = rows[: 2 * half].unflatten(0, (2, half))
    products = torch.bmm(halves, columns.expand(2, -1, -1)).flatten(end_dim=1)
    last = rows[2 * half :] @ columns  # one row if their number is odd, or none
    return torch.cat([products, last]).T.reshape(*resid.shape[:-1], len(rows))
