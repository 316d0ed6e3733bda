"""The MLP: at each position separately, d_mlp neurons each read one direction and write another.

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
    """GPT-2's GELU as defined in its paper; slow, and the reference for testing `gelu`."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + CUBIC * x**3)))


def gate(x):
    """sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3): the share of x that GELU lets through."""
    return torch.sigmoid(TWO_SQRT_2_OVER_PI * x * (1 + CUBIC * x * x))


class GELU(torch.autograd.Function):
    """GPT-2's GELU with a hand-written derivative.

    Since (1 + tanh u) / 2 = sigmoid(2u), GELU is x * s with s = sigmoid(2u). Hence
        d/dx (x s) = s + x s (1 - s) (2u)',    x (2u)' = x (a + 3 c x^2)    if 2u = x (a + c x^2).
    Moving memory takes the time here, not arithmetic. So the slope is computed in the forward pass,
    where x is read anyway, and the backward pass is a single product.

    It also works under torch.func (`vmap`, `grad`, `jacrev`, `jvp`): forward uses no context.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        """x [...] -> (gelu(x), d gelu / dx), each [...]."""
        a = x.new_full((), TWO_SQRT_2_OVER_PI)
        c = TWO_SQRT_2_OVER_PI * CUBIC
        s = torch.addcmul(a, x, x, value=c).mul_(x).sigmoid_()  # sigmoid(2u)
        slope = torch.addcmul(a, x, x, value=3 * c).mul_(x)  # x (2u)'
        slope = slope.addcmul_(slope, s, value=-1).add_(1).mul_(s)
        return s.mul_(x), slope

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Saves what the derivative needs; the slope itself is not a differentiable output."""
        _, slope = output
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)  # do not allocate zeros for the slope's gradient
        ctx.save_for_backward(*inputs, slope)
        ctx.save_for_forward(*inputs, slope)

    @staticmethod
    def backward(ctx, grad, _):
        """grad * d gelu / dx, shape of x."""
        return None if grad is None else grad * differentiable_slope(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx, tangent):
        """tangent * d gelu / dx, shape of x; None for the slope."""
        return tangent * differentiable_slope(*ctx.saved_tensors), None


def differentiable_slope(x, slope):
    """d gelu / dx: the saved slope, or a new one if it may be differentiated again.

    Autograd treats the saved slope as a constant. Using it would make second derivatives wrong
    without any error.
    """
    if not torch.is_grad_enabled():
        return slope
    s = gate(x)
    return s + x * s * (1 - s) * TWO_SQRT_2_OVER_PI * (1 + 3 * CUBIC * x * x)


def gelu(x):
    """GPT-2's GELU, x [...] -> [...]."""
    if torch.is_grad_enabled() and x.requires_grad:
        return GELU.apply(x)[0]
    a = x.new_full((), TWO_SQRT_2_OVER_PI)
    c = TWO_SQRT_2_OVER_PI * CUBIC
    return torch.addcmul(a, x, x, value=c).mul_(x).sigmoid_().mul_(x)


ACTIVATIONS = {"gelu": gelu, "gelu_exact": F.gelu, "relu": F.relu}


class MLP(nn.Module):
    """Two linear maps with a nonlinearity between them."""

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
        # The biases are added in place, which is cheaper on a CPU than F.linear.
        pre = self.hook_pre((resid @ self.W_in).add_(self.b_in))  # [batch, pos, d_mlp]
        post = self.hook_post(self.activation(pre))  # [batch, pos, d_mlp]
        return (post @ self.W_out).add_(self.b_out)
