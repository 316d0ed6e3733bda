"""One transformer block: attention, then the MLP; each reads the normalised stream and adds to it.

    resid = resid + attention(ln1(resid))
    resid = resid + mlp(ln2(resid))

Nothing is ever overwritten: the stream is a sum, so each part's contribution can be separated.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: attention.py, mlp.py
Next: model.py
Source: Radford et al. 2019 (pre-LayerNorm); Xiong et al. 2020 (why)
"""

import torch
import torch.nn.functional as F
from torch import nn

from attention import Attention
from hooks import HookPoint
from mlp import MLP
from utils import at_least_float32


class LayerNorm(nn.Module):
    """LayerNorm: centre each position's vector, scale it to unit variance, then apply w and b."""

    def __init__(self, d_model, epsilon):
        super().__init__()
        self.epsilon = epsilon
        self.w = nn.Parameter(torch.empty(d_model))
        self.b = nn.Parameter(torch.empty(d_model))
        self.hook_scale = HookPoint("batch pos 1")
        self.hook_normalized = HookPoint("batch pos d_model")

    def forward(self, resid):
        """[batch, pos, d_model] -> the same shape; computed step by step if a hook listens."""
        if not (self.hook_scale.listeners or self.hook_normalized.listeners):
            return self.fused(resid)
        exact = at_least_float32(resid)  # as the kernel does; the scale keeps this dtype
        centred = exact - exact.mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.epsilon).sqrt())
        normalized = self.hook_normalized((centred / scale).to(resid.dtype))
        return normalized * self.w + self.b

    def fused(self, resid):
        """The same numbers from one kernel, skipping the hooks; [..., d_model]."""
        return F.layer_norm(resid, self.w.shape, self.w, self.b, self.epsilon)


class NoNorm(nn.Module):
    """Stands in for LayerNorm with `norm="none"`: returns the stream unchanged."""

    def forward(self, resid):
        """[..., d_model], unchanged."""
        return resid

    fused = forward


def make_norm(cfg):
    """The normalisation that the config asks for."""
    return LayerNorm(cfg.d_model, cfg.norm_epsilon) if cfg.norm == "layernorm" else NoNorm()


class Block(nn.Module):
    """Attention and MLP on the residual stream; with `attn_only`, attention only."""

    def __init__(self, cfg):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.attn_only = cfg.attn_only
        self.ln1 = make_norm(cfg)
        self.attn = Attention(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.hook_resid_pre = HookPoint("batch pos d_model")
        self.hook_q_input = HookPoint("batch pos head d_model")
        self.hook_k_input = HookPoint("batch pos head d_model")
        self.hook_v_input = HookPoint("batch pos head d_model")
        self.hook_attn_out = HookPoint("batch pos d_model")
        if not cfg.attn_only:
            self.ln2 = make_norm(cfg)
            self.mlp = MLP(cfg)
            self.hook_resid_mid = HookPoint("batch pos d_model")
            self.hook_mlp_in = HookPoint("batch pos d_model")
            self.hook_mlp_out = HookPoint("batch pos d_model")
        self.hook_resid_post = HookPoint("batch pos d_model")

    def forward(self, resid, past=None, key_mask=None):
        """resid [batch, pos, d_model] -> the stream after this block; past, key_mask as in
        Attention."""
        resid = self.hook_resid_pre(resid)
        attn_out = self.attn(*self.attention_inputs(resid), past, key_mask)
        return self.after_attention(resid + self.hook_attn_out(self.dropout(attn_out)))

    def after_attention(self, resid):
        """The stream after this block, given the stream with attention's output already added.

        resid: [batch, pos, d_model]. Positions do not interact from here on, so resid may hold any
        subset of positions.
        """
        if not self.attn_only:
            resid = self.hook_resid_mid(resid)
            mlp_out = self.mlp(self.ln2(self.hook_mlp_in(resid)))
            resid = resid + self.hook_mlp_out(self.dropout(mlp_out))
        return self.hook_resid_post(resid)

    def attention_inputs(self, resid):
        """The inputs of q, k and v, a list of three.

        Usually all three are the same tensor, ln1(resid), [batch, pos, d_model]. If a hook listens
        to hook_q_input (or k, v), that input becomes [batch, pos, head, d_model]: the hook sees one
        copy of resid for each head, and the change that an edit of the copy makes in ln1's output
        is added to ln1(resid). This way ln1's own hooks stay on the one shared stream, where edits
        and gradients still act; normalising the copies separately would bypass them.
        """
        shared = self.ln1(resid)
        return [
            self.split_input(point, resid, shared) if point.listeners else shared
            for point in (self.hook_q_input, self.hook_k_input, self.hook_v_input)
        ]

    def split_input(self, point, resid, shared):
        """A separate input for each head, [batch, pos, head, d_model]."""
        per_head = point(resid.unsqueeze(2).expand(-1, -1, self.n_heads, -1))
        return shared.unsqueeze(2) + (self.ln1.fused(per_head) - self.ln1.fused(resid).unsqueeze(2))
