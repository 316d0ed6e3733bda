"""The MLP as a sum of neurons, and GELU with its derivatives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_model, tiny_tokens

from mlp import ACTIVATIONS, gelu, gelu_by_definition
from utils import seeded_generator


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=seeded_generator(seed))


def wide_range():
    return torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)


def test_gelu_equals_its_definition_and_torchs_tanh_form():
    x = wide_range()
    torch.testing.assert_close(gelu(x), gelu_by_definition(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(gelu(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-13)
    assert gelu(torch.tensor(1.0)).item() == pytest.approx(0.8411920, abs=1e-6)  # by hand


def test_gelus_derivatives_equal_torchs():
    x = wide_range()
    ours, = torch.autograd.grad(gelu(x).sum(), x)
    theirs, = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gelus_first_and_second_derivatives_pass_finite_differences():
    x = torch.linspace(-4, 4, 25, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradgradcheck(gelu, x)


def test_the_exact_gelu_and_its_first_and_second_derivatives_are_those_of_its_definition():
    x = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    ours, theirs = ACTIVATIONS["gelu_exact"](x), exact_gelu(x)
    for order in range(3):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12, msg=f"derivative {order}")
        ours, theirs = (torch.autograd.grad(y.sum(), x, create_graph=True)[0]
                        for y in (ours, theirs))
    assert (ACTIVATIONS["gelu_exact"](x) - gelu(x)).abs().max() > 1e-4  # another function


def test_gelu_does_not_change_its_input_or_the_incoming_gradient():
    x, incoming = noise(50).requires_grad_(), noise(50).flip(0)
    before = x.detach().clone(), incoming.clone()
    gelu(x).backward(incoming)
    assert torch.equal(x, before[0]) and torch.equal(incoming, before[1])


def test_gelu_s_first_and_second_derivatives_are_those_of_its_definition():
    x = noise(40).double().requires_grad_()
    incoming, outgoing = noise(40, seed=4).double(), noise(40, seed=5).double()

    def derivatives(function):
        first, = torch.autograd.grad(function(x), x, incoming, create_graph=True)
        return first, torch.autograd.grad(first, x, outgoing)[0]

    torch.testing.assert_close(derivatives(gelu), derivatives(gelu_by_definition))


def test_gelu_of_extreme_inputs_is_the_input_or_zero_and_so_is_its_slope():
    x = torch.tensor([-1e9, -1e4, -50.0, 0.0, 50.0, 1e4, 1e9], requires_grad=True)
    y = gelu(x)
    y.sum().backward()
    assert torch.equal(y, x.clamp(min=0))
    assert x.grad.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


def test_the_neurons_writes_and_b_out_sum_to_mlp_out():
    model = tiny_model(d_mlp=7)
    _, cache = model.run_with_cache(tiny_tokens())
    for layer, block in enumerate(model.blocks):
        total = block.mlp.b_out.expand_as(cache["mlp_out", layer])
        for neuron in range(7):
            total = total + cache["post", layer][..., neuron, None] * block.mlp.W_out[neuron]
        torch.testing.assert_close(total, cache["mlp_out", layer], rtol=0, atol=1e-5)


def exact_gelu(x):
    return x * torch.special.ndtr(x)


@pytest.mark.parametrize("activation, function", [
    ("gelu", gelu_by_definition), ("gelu_exact", exact_gelu), ("relu", F.relu)])
def test_each_neuron_reads_its_direction_and_applies_the_nonlinearity(activation, function):
    model = tiny_model(activation=activation)
    _, cache = model.run_with_cache(tiny_tokens())
    for layer, block in enumerate(model.blocks):
        reads = block.ln2.fused(cache["mlp_in", layer])
        pre = reads @ model.W_in[layer] + model.b_in[layer]
        torch.testing.assert_close(cache["pre", layer], pre, rtol=0, atol=1e-5)
        torch.testing.assert_close(cache["post", layer], function(pre), rtol=0, atol=1e-5)


def test_the_mlp_works_at_each_position_alone():
    mlp, resid = tiny_model().blocks[0].mlp, noise(2, 7, 12)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(mlp(resid[:, order]), mlp(resid)[:, order], rtol=0, atol=1e-6)


@torch.no_grad()
def test_an_edit_of_one_neuron_changes_the_output_by_its_write():
    mlp, resid = tiny_model(activation="relu").blocks[0].mlp, noise(2, 7, 12)
    post = F.relu(resid @ mlp.W_in + mlp.b_in)
    expected = mlp(resid) + (3 - post[..., 5, None]) * mlp.W_out[5]
    for point in (mlp.hook_pre, mlp.hook_post):
        remove = point.add(lambda t, hook: t.where(torch.arange(48) != 5, 3.0))
        torch.testing.assert_close(mlp(resid), expected, rtol=0, atol=1e-5)
        remove()
