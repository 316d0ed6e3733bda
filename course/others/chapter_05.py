"""Other right solutions of the exercises of chapter 5."""

import math

import torch
import torch.nn.functional as F


def mlp_forward_as_linear(self, resid):
    hidden = F.gelu(F.linear(resid, self.W_in.T, self.b_in), approximate="tanh")
    return F.linear(hidden, self.W_out.T, self.b_out)


def mlp_forward_as_neurons(self, resid):
    out = self.b_out
    for n in range(self.W_in.shape[1]):
        pre = (resid * self.W_in[:, n]).sum(-1, keepdim=True) + self.b_in[n]
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3))
        out = out + 0.5 * pre * (1 + tanh) * self.W_out[n]
    return out


def layer_norm_as_torch(self, resid):
    return F.layer_norm(resid, resid.shape[-1:], self.w, self.b)


def layer_norm_as_var(self, resid):
    variance = resid.var(-1, keepdim=True, unbiased=False)
    centred = resid - resid.mean(-1, keepdim=True)
    return centred * torch.rsqrt(variance + self.epsilon) * self.w + self.b


def block_forward_as_steps(self, resid):
    attn_in = self.ln1(resid)
    attn_out = self.attn(attn_in, attn_in, attn_in)
    resid_mid = resid + attn_out
    mlp_out = self.mlp(self.ln2(resid_mid))
    resid_post = resid_mid + mlp_out
    return resid_post


def run_blocks_as_range(self, resid, start=0, stop=None):
    stop = len(self.blocks) if stop is None else stop
    for layer in range(start, stop):
        resid = self.blocks[layer](resid)
    return resid


def gpt_forward_as_one_line(self, tokens):
    return self.unembed(self.run_blocks(self.embed(tokens)))


def count_parameters_as_list(n_layers, d_model, d_mlp, d_vocab, n_ctx):
    shapes = [(d_vocab, d_model), (n_ctx, d_model), (d_model,), (d_model,)]
    for _ in range(n_layers):
        shapes += [(d_model,)] * 4
        shapes += [(d_model, 3 * d_model), (3 * d_model,), (d_model, d_model), (d_model,)]
        shapes += [(d_model, d_mlp), (d_mlp,), (d_mlp, d_model), (d_model,)]
    return sum(math.prod(shape) for shape in shapes)


def fold_norm_weights_as_diag(w, b, W, bias):
    return torch.diag(w) @ W, bias + (b[:, None] * W).sum(0)


def fold_value_bias_as_einsum(b_V, W_O, b_O):
    return torch.einsum("hd,hdm->m", b_V, W_O) + b_O


def fold_value_bias_as_flat(b_V, W_O, b_O):
    return b_O + b_V.flatten() @ W_O.flatten(0, 1)
