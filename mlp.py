"""The MLP: at each position alone, d_mlp neurons read a direction of the stream and write another.

    pre  = resid @ W_in + b_in
    post = gelu(pre)
    out  = post @ W_out + b_out                      # the sum of what each neuron writes

Chapter: COURSE_ROADMAP.md, 5 (the whole model); GELU's backward pass: chapter 1
Prerequisites: losses.py, attention.py
Next: transformer_block.py
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
    """GPT-2's GELU with its derivative by hand.

    Since (1 + tanh u) / 2 = sigmoid(2u), it is x * s with s = sigmoid(2u). Hence
        d/dx (x s) = s + x s (1 - s) (2u)',    x (2u)' = x (a + 3 c x^2)    if 2u = x (a + c x^2).
    The time goes into moving memory, not into arithmetic: both are computed while x is at hand, in
    the two buffers that are kept anyway, and the backward pass is left with one product.
    """

    @staticmethod
    def forward(ctx, x):
        """x [...] -> gelu(x) [...]."""
        a = x.new_full((), TWO_SQRT_2_OVER_PI)
        c = TWO_SQRT_2_OVER_PI * CUBIC
        buffer = torch.addcmul(a, x, x, value=c).mul_(x)  # 2u
        s = torch.sigmoid(buffer)
        if ctx.needs_input_grad[0]:
            torch.addcmul(a, x, x, value=3 * c, out=buffer).mul_(x)  # x (2u)'
            slope = buffer.addcmul_(buffer, s, value=-1).add_(1).mul_(s)
            ctx.save_for_backward(x, slope)
        return s.mul_(x)

    @staticmethod
    def backward(ctx, grad):
        """grad * d gelu / dx, shape of x."""
        x, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody differentiates the derivative. The saved slope is a constant to autograd, and
            # using it would give second derivatives that are wrong without a word.
            s = gate(x)
            slope = s + x * s * (1 - s) * TWO_SQRT_2_OVER_PI * (1 + 3 * CUBIC * x * x)
        return grad * slope


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
        # The biases are added in place, which on a CPU is cheaper than F.linear's way.
        pre = self.hook_pre((resid @ self.W_in).add_(self.b_in))  # [batch, pos, d_mlp]
        post = self.hook_post(self.activation(pre))  # [batch, pos, d_mlp]
        return (post @ self.W_out).add_(self.b_out)
