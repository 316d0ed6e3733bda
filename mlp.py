"""The MLP: at each position alone, d_mlp neurons read a direction of the stream and write another.

    pre  = resid @ W_in + b_in
    post = gelu(pre)
    out  = post @ W_out + b_out                      # the sum of what each neuron writes

Chapter: COURSE_ROADMAP.md, 5 (the whole model); GELU's backward pass: chapter 1
Read before: attention.py; after: transformer_block.py
Source: Radford et al. 2019; Hendrycks & Gimpel 2016 (GELU)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from hooks import HookPoint

TWO_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def gelu_by_definition(x):
    """GPT-2's GELU as its paper gives it; slow, and what `gelu` is checked against."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + CUBIC * x**3)))


def gate(x):
    """sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3): the share of x that GELU lets through."""
    return torch.sigmoid(TWO_SQRT_2_OVER_PI * x * (1 + CUBIC * x * x))


class GELU(torch.autograd.Function):
    """GPT-2's GELU with its derivative by hand: by CPU, from half to 1.3 times torch's own time.

    Since (1 + tanh u) / 2 = sigmoid(2u), it is x * s with s = sigmoid(2u). Hence
        d/dx (x s) = s + x s (1 - s) (2u)',    (2u)' = 2 sqrt(2/pi) (1 + 3 * 0.044715 x^2).
    The steps work in place on fresh buffers: the time goes into moving memory, not into arithmetic.
    """

    @staticmethod
    def forward(ctx, x):
        """x [...] -> gelu(x) [...]."""
        s = (x * x).mul_(CUBIC).add_(1).mul_(x).mul_(TWO_SQRT_2_OVER_PI).sigmoid_()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx, grad):
        """grad * d gelu / dx, shape of x."""
        x, s = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody differentiates the derivative. The saved s is a constant to autograd, and
            # using it would give second derivatives that are wrong without a word.
            s = gate(x)
            slope = TWO_SQRT_2_OVER_PI * (1 + 3 * CUBIC * x * x)
            return grad * (s + x * s * (1 - s) * slope)
        slope = (x * x).mul_(3 * CUBIC).add_(1).mul_(TWO_SQRT_2_OVER_PI).mul_(x)  # x (2u)'
        return slope.addcmul_(slope, s, value=-1).add_(1).mul_(s).mul_(grad)


def gelu(x):
    """GPT-2's GELU, x [...] -> [...]."""
    return GELU.apply(x)


ACTIVATIONS = {"gelu": gelu, "relu": F.relu}


class MLP(nn.Module):
    """The two linear maps and the nonlinearity between them."""

    def __init__(self, cfg):
        super().__init__()
        self.W_in = nn.Parameter(torch.empty(cfg.d_model, cfg.d_mlp))
        self.b_in = nn.Parameter(torch.empty(cfg.d_mlp))
        self.W_out = nn.Parameter(torch.empty(cfg.d_mlp, cfg.d_model))
        self.b_out = nn.Parameter(torch.empty(cfg.d_model))
        self.activation = ACTIVATIONS[cfg.activation]
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")

    def forward(self, resid):
        """[batch, pos, d_model] -> [batch, pos, d_model]."""
        pre = self.hook_pre(F.linear(resid, self.W_in.T, self.b_in))  # resid @ W_in + b_in
        post = self.hook_post(self.activation(pre))  # [batch, pos, d_mlp]
        return F.linear(post, self.W_out.T, self.b_out)
