"""Other right solutions of the exercises of chapter 3."""

import torch
import torch.nn.functional as F


def one_hot_as_torch(tokens, d_vocab):
    return F.one_hot(tokens, d_vocab).float()


def one_hot_as_identity(tokens, d_vocab):
    return torch.eye(d_vocab)[tokens]


def embed_tokens_as_product(self, tokens):
    return F.one_hot(tokens, self.W_E.shape[0]).to(self.W_E.dtype) @ self.W_E


def embed_tokens_as_embedding(self, tokens):
    return F.embedding(tokens, self.W_E)


def embed_text_as_indexed(tokens, W_E, W_pos):
    positions = torch.arange(tokens.shape[-1]).expand(tokens.shape)
    return F.embedding(tokens, W_E) + F.embedding(positions, W_pos)


def unembed_stream_as_linear(resid, W_U, b_U):
    return F.linear(resid, W_U.T, b_U)


def unembed_stream_as_einsum(resid, W_U, b_U):
    return torch.einsum("bpm,mv->bpv", resid, W_U) + b_U


def direct_path_as_logsumexp(W_E, W_U):
    logits = torch.einsum("tm,mn->tn", W_E, W_U)
    return logits - logits.logsumexp(dim=1, keepdim=True)


def bigram_table_as_bincount(tokens, d_vocab, alpha=1.0):
    pairs = tokens[:-1] * d_vocab + tokens[1:]
    counts = torch.bincount(pairs, minlength=d_vocab**2).view(d_vocab, d_vocab) + alpha
    return counts / counts.sum(-1, keepdim=True)


def bigram_table_as_index_put(tokens, d_vocab, alpha=1.0):
    counts = torch.full((d_vocab, d_vocab), float(alpha))
    counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(1), accumulate=True)
    return counts / counts.sum(1)[:, None]


def sinusoidal_positions_as_stack(n_ctx, d_model):
    pair = torch.arange(0, d_model, 2)
    angle = torch.arange(n_ctx)[:, None] / 10_000 ** (pair / d_model)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def shift_rotation_as_blocks(d_model, shift):
    blocks = []
    for i in range(0, d_model, 2):
        s = torch.tensor(shift / 10_000 ** (i / d_model))
        blocks.append(torch.stack([torch.stack([s.cos(), -s.sin()]),
                                   torch.stack([s.sin(), s.cos()])]))
    return torch.block_diag(*blocks)
