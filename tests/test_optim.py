"""AdamW and clipping against torch, Muon against the singular value decomposition."""

import copy
import itertools
import math

import torch
from torch.testing import assert_close

from optim import POLAR_EXPRESS_ROUNDS, AdamW, Muon, clip_gradients_, orthogonalise, schedule
from utils import seeded_generator

SHAPES = [(6, 4), (4, 12), (5,), (2, 3, 4), (1,)]


def random_tensors(shapes=SHAPES, seed=0, dtype=torch.float64):
    generator = seeded_generator(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def random_parameters(shapes=SHAPES, seed=0, dtype=torch.float64):
    return [torch.nn.Parameter(t) for t in random_tensors(shapes, seed, dtype)]


def train(parameters, optimizer, steps, first=0, **step):
    """Steps along gradients that depend on the number of the step and on the weights."""
    for number in range(first, first + steps):
        noise = random_tensors([p.shape for p in parameters], 100 + number, parameters[0].dtype)
        for p, n in zip(parameters, noise, strict=True):
            p.grad = p.detach() + n
        optimizer.step(**step)


def newton_schulz(s):
    """The polynomials of `orthogonalise`, applied to numbers."""
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        s = a * s + b * s**3 + c * s**5
    return s


def by_svd(matrix):
    """`orthogonalise` by the singular value decomposition of one matrix."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ torch.diag(newton_schulz(S / (S.norm() + 1e-7))) @ Vh


# AdamW


def test_adamw_equals_torchs_with_decay_on_the_matrices():
    settings = {"betas": (0.8, 0.95), "eps": 1e-6}
    for dtype in (torch.float32, torch.float64):
        ours = random_parameters(dtype=dtype)
        train(ours, AdamW(ours, 0.05, weight_decay=0.3, **settings), 20)

        theirs = random_parameters(dtype=dtype)
        groups = [{"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.3},
                  {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0}]
        train(theirs, torch.optim.AdamW(groups, 0.05, **settings), 20)
        assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_default_settings_of_adamw_are_torchs():
    ours = random_parameters([(3, 4)])
    theirs = random_parameters([(3, 4)])
    train(ours, AdamW(ours, 1e-3), 5)
    train(theirs, torch.optim.AdamW(theirs, 1e-3), 5)
    assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_half_a_share_is_half_the_learning_rate():
    for make in (lambda p, lr: AdamW(p, lr, weight_decay=0.1),
                 lambda p, lr: Muon(p, lr, weight_decay=0.1)):
        halved = random_parameters([(4, 3)])
        half = random_parameters([(4, 3)])
        train(halved, make(halved, 0.02), 4, share=0.5)
        train(half, make(half, 0.01), 4)
        assert_close(halved, half, atol=1e-12, rtol=0)


def test_without_a_gradient_only_matrices_shrink():
    parameters = random_parameters()
    before = random_tensors()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    AdamW(parameters, 0.1, weight_decay=0.5).step()
    for p, old in zip(parameters, before, strict=True):
        assert_close(p.data, old * (0.95 if p.ndim >= 2 else 1))


def test_the_first_step_moves_each_weight_by_the_learning_rate():
    parameters = random_parameters()
    before = random_tensors()
    train(parameters, AdamW(parameters, 0.01, weight_decay=0.0), 1)
    for p, old in zip(parameters, before, strict=True):
        assert_close(p.data, old - 0.01 * p.grad.sign(), atol=1e-6, rtol=0)


def test_frozen_parameters_do_not_change():
    parameters = random_parameters()
    parameters[0].requires_grad_(False)
    train(parameters, AdamW(parameters, 0.1), 2)
    assert torch.equal(parameters[0], random_tensors()[0])
    assert not torch.equal(parameters[1], random_tensors()[1])


def test_a_resumed_optimiser_gives_the_same_bits():
    shapes = [(6, 4), (4, 6)]
    for kind in (AdamW, Muon):
        straight = random_parameters(shapes)
        train(straight, kind(straight, 0.05), 6)

        resumed = random_parameters(shapes)
        stopped = kind(resumed, 0.05)
        train(resumed, stopped, 3)
        saved = copy.deepcopy(stopped.state_dict())
        fresh = kind(resumed, 0.05)
        fresh.load_state_dict(saved)
        train(resumed, fresh, 3, first=3)
        assert all(map(torch.equal, straight, resumed)), f"{kind.__name__} went on otherwise"


def test_a_loaded_state_is_a_copy():
    for kind in (AdamW, Muon):
        parameters = random_parameters([(4, 4)])
        first = kind(parameters, 0.05)
        second = kind(parameters, 0.05)
        train(parameters, first, 1)
        second.load_state_dict(first.state_dict())
        before = second.m[0].clone()
        train(parameters, first, 1)
        assert torch.equal(second.m[0], before), f"two of {kind.__name__} share their state"


# Muon


def test_orthogonalising_brings_every_singular_value_near_one_and_keeps_the_vectors():
    shapes = [(16, 16), (32, 8), (8, 32), (3, 12, 12), (2, 3, 20, 5)]
    for shape, seed in itertools.product(shapes, range(3)):
        [matrices] = random_tensors([shape], seed, torch.float32)
        result = orthogonalise(matrices)
        S = torch.linalg.svdvals(result)
        assert S.min() > 0.6 and S.max() < 1.21, f"{shape}, seed {seed}: {S.min()} to {S.max()}"
        U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
        nearest = (U @ Vh).flatten(-2)
        cosine = torch.cosine_similarity(result.flatten(-2), nearest, dim=-1).min()
        assert cosine > 0.95, f"{shape}, seed {seed}: the vectors have turned to {cosine}"


def test_each_round_is_the_best_polynomial_for_the_singular_values_left_by_the_last():
    low = 0.003
    high = 1.0
    for a, b, c in POLAR_EXPRESS_ROUNDS:
        s = torch.linspace(low, high, 200_001, dtype=torch.float64)
        off = a * s + b * s**3 + c * s**5 - 1
        most = off.abs().max()
        # Chebyshev: of three coefficients the best ones err most, and alike, four times in turn.
        signs = off.sign()[off.abs() > 0.999 * most]
        assert 1 + (signs[1:] != signs[:-1]).sum() == 4
        low = (1 - most).item()
        high = (1 + most).item()
    assert 0.8 < low < high < 1.2


def test_orthogonalising_is_a_polynomial_of_the_singular_values():
    shapes = [(5, 5), (7, 4), (4, 7), (3, 11), (9, 2)]
    for shape, size in itertools.product(shapes, (1e-3, 1.0, 1e4)):
        matrix = size * random_tensors([shape])[0]
        off = (orthogonalise(matrix) - by_svd(matrix)).abs().max()
        assert off < 1e-10, f"a matrix {shape} of size {size} is off by {off}"


def test_the_size_of_a_matrix_does_not_matter():
    [matrix] = random_tensors([(5, 4)])
    assert_close(orthogonalise(1e5 * matrix), orthogonalise(matrix), atol=1e-6, rtol=0)


def test_orthogonalising_commutes_with_rotations_and_leaves_zero_alone():
    matrix, left, right = random_tensors([(6, 4), (6, 6), (4, 4)])
    Q = torch.linalg.qr(left).Q
    R = torch.linalg.qr(right).Q
    assert_close(orthogonalise(Q @ matrix @ R), Q @ orthogonalise(matrix) @ R)
    assert_close(orthogonalise(matrix.mT), orthogonalise(matrix).mT)
    assert torch.equal(orthogonalise(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_each_matrix_of_a_batch_is_orthogonalised_alone():
    [batch] = random_tensors([(3, 6, 4)])
    assert_close(orthogonalise(batch), torch.stack([orthogonalise(one) for one in batch]))


def test_muon_equals_its_formula_step_by_step():
    shapes = [(6, 4), (4, 12), (4, 6), (6, 4)]
    lr = 0.02
    beta = 0.9
    decay = 0.1
    parameters = random_parameters(shapes)
    train(parameters, Muon(parameters, lr, momentum=beta, weight_decay=decay), 5)

    weights = random_tensors(shapes)
    momenta = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for number in range(5):
        for i, noise in enumerate(random_tensors(shapes, 100 + number)):
            d_in, d_out = shapes[i]
            grad = weights[i] + noise
            momenta[i] = beta * momenta[i] + grad
            step = math.sqrt(max(1, d_out / d_in)) * by_svd(grad + beta * momenta[i])
            weights[i] = weights[i] - lr * decay * weights[i] - lr * step
    for p, wanted in zip(parameters, weights, strict=True):
        assert_close(p.data, wanted, atol=1e-6, rtol=0)


def test_a_step_of_muon_is_orthogonal_times_the_root_of_how_much_wider_it_makes():
    for shape, scale in (((4, 4), 1), ((4, 16), 2), ((16, 4), 1)):
        [weight] = random_parameters([shape])
        weight.grad = random_tensors([shape], 1)[0]
        Muon([weight], 0.1).step()
        moved = (random_tensors([shape])[0] - weight.data) / 0.1
        assert_close(moved, scale * by_svd(weight.grad), atol=1e-6, rtol=0,
                     msg=f"the step of a matrix {shape} is not {scale} times orthogonal")


def test_queries_keys_and_values_are_orthogonalised_separately():
    fused, other = random_parameters([(4, 12), (4, 4)])
    apart = [torch.nn.Parameter(part.clone()) for part in fused.data.chunk(3, dim=1)]
    together = Muon([fused, other], 0.1, parts=[3, 1], weight_decay=0.2)
    separate = Muon(apart, 0.1, weight_decay=0.2)
    for number in range(3):
        fused.grad, other.grad = random_tensors([(4, 12), (4, 4)], number)
        for p, grad in zip(apart, fused.grad.chunk(3, dim=1), strict=True):
            p.grad = grad.clone()
        together.step()
        separate.step()
    assert_close(fused.data, torch.cat([p.data for p in apart], dim=1))


def test_matrices_of_the_same_shape_do_not_affect_each_other():
    shapes = [(4, 4), (4, 8), (4, 4)]
    parameters = random_parameters(shapes)
    train(parameters, Muon(parameters, 0.1), 2)
    for i, p in enumerate(parameters):
        alone = random_parameters(shapes)
        others = [torch.zeros_like(q).requires_grad_() if j != i else q
                  for j, q in enumerate(alone)]
        train(others, Muon(others, 0.1), 2)
        assert_close(others[i].data, p.data)


# The schedule


def test_the_rate_rises_linearly_to_its_peak_and_falls_to_its_end():
    for shape, final in itertools.product(("linear", "cosine", "trapezoid"), (0.0, 0.1)):
        how = {"shape": shape, "final_fraction": final}
        shares = [schedule(i, 100, 20, **how) for i in range(101)]
        assert shares[:20] == [(i + 1) / 20 for i in range(20)] and shares[20] == 1, how
        assert all(a >= b for a, b in itertools.pairwise(shares[20:])), f"{how} rises again"
        assert max(shares) == 1 and min(shares[20:]) >= final, how
        assert math.isclose(shares[100], final, abs_tol=1e-12), f"{how} ends at {shares[100]}"
        assert shares[99] - final < 0.07, how
        assert schedule(150, 100, 20, **how) == shares[100], f"{how} does not stay at its end"


def test_each_shape_falls_as_computed_by_hand():
    rows = [("linear", 30, 0.75), ("linear", 50, 0.25), ("linear", 59, 0.025),
            ("cosine", 30, (1 + math.sqrt(0.5)) / 2), ("cosine", 40, 0.5),
            ("cosine", 50, 0.14644661), ("trapezoid", 30, 1.0), ("trapezoid", 52, 1.0),
            ("trapezoid", 56, 0.5), ("trapezoid", 59, 0.125)]
    for shape, step, share in rows:
        found = schedule(step, 60, 20, shape=shape)
        assert math.isclose(found, share, rel_tol=1e-6), f"{shape} at {step} is {found}"
        scaled = schedule(step, 60, 20, shape=shape, final_fraction=0.2)
        assert math.isclose(scaled, 0.2 + 0.8 * share, rel_tol=1e-6), f"{shape} at {step}"


def test_the_rate_is_never_above_its_peak_nor_zero_while_steps_remain():
    for max_steps, warmup in ((1, 0), (1, 1), (5, 5), (3, 10), (2, 1)):
        shares = [schedule(i, max_steps, warmup) for i in range(max_steps)]
        assert all(0 < share <= 1 for share in shares), f"{max_steps} steps, {warmup} of warm-up"


def test_without_a_warm_up_the_first_step_is_at_the_peak():
    assert schedule(0, 10) == 1


# Clipping


def with_gradients(size):
    parameters = random_parameters()
    for p, grad in zip(parameters, random_tensors(seed=1), strict=True):
        p.grad = size * grad
    return parameters


def test_clipping_equals_torchs():
    for size in (0.01, 1.0, 1e4):
        ours = with_gradients(size)
        theirs = with_gradients(size)
        norm = clip_gradients_(ours, 1.5)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.5))
        assert_close([p.grad for p in ours], [p.grad for p in theirs])


def test_clipping_bounds_the_joint_norm_and_keeps_the_direction():
    parameters = with_gradients(10.0)
    before = with_gradients(10.0)
    returned = clip_gradients_(parameters, 2.0)
    after, old = (torch.cat([p.grad.flatten() for p in ps]) for ps in (parameters, before))
    assert_close(returned, old.norm())
    assert_close(after.norm().item(), 2.0, atol=1e-5, rtol=0)
    assert_close(after / after.norm(), old / old.norm())


def test_no_limit_and_a_large_one_leave_the_gradients_alone():
    before = [p.grad for p in with_gradients(100.0)]
    for most in (0, 1e9):
        parameters = with_gradients(100.0)
        norm = clip_gradients_(parameters, most)
        after = [p.grad for p in parameters]
        assert all(map(torch.equal, after, before)), f"a limit of {most} has clipped"
        assert_close(norm, torch.cat([grad.flatten() for grad in before]).norm())


def test_parameters_without_a_gradient_are_skipped():
    parameters = [*with_gradients(1.0), torch.nn.Parameter(torch.ones(3))]
    assert_close(clip_gradients_(iter(parameters), 1.0), clip_gradients_(with_gradients(1.0), 1.0))
    assert parameters[-1].grad is None


def test_zero_gradients_stay_zero():
    parameters = with_gradients(0.0)
    assert clip_gradients_(parameters, 1.0).item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)


def test_parameters_that_the_loss_does_not_reach_have_a_zero_gradient():
    for kind in (AdamW, Muon):
        reached = torch.full((4, 4), 1.0, requires_grad=True)
        left = torch.full((4, 4), 2.0, requires_grad=True)
        reached.grad = torch.eye(4)
        kind([reached, left], lr=0.1, weight_decay=0.0).step()
        assert torch.equal(left, torch.full((4, 4), 2.0)), f"{kind.__name__} moves without a slope"
        assert not torch.equal(reached, torch.ones(4, 4))
