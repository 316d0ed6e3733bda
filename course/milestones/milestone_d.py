"""Milestone D: the learner's toy model keeps five features in a plane, if they are rare.

The learner's loss trains toys here: rare features must end as a pentagon, and dense ones, the
control, must not. The learner's dimensionality must say so.
"""

import math
from dataclasses import dataclass

import torch

from course.engine.expect import expect, expect_close, random
from course.engine.milestones import Milestone, Together
from utils import seeded_generator

WANTED = {14: ("toy_forward", "expected_feature_loss", "dimensionality")}
FEATURES = 5
IMPORTANCE = 0.9 ** torch.arange(FEATURES)
RARE = 0.05  # the share of examples in which a feature is present
DENSE = 1.0
STARTS = 3
STEPS = 800
MOST_DEGREES_OFF = 8
MOST_OFF = 0.05  # of a dimensionality


@dataclass
class Work:
    """The learner's functions, and {density: toy} once it is trained; a toy is its W [2, feature]
    and b [feature]."""

    together: Together
    toys: dict


def gather(folder, given):
    """The Work; toys are trained when a check asks for them."""
    return Work(Together(folder, WANTED, {}), {})


def draw(density, n, generator):
    """[n, feature]: each feature is there with probability `density`, and then uniform."""
    there = torch.rand(n, FEATURES, generator=generator) < density
    return there * torch.rand(n, FEATURES, generator=generator)


def trained_toy(work, density):
    """(W, b): the best of a few starts by the learner's loss on fresh examples; trained once.

    Where ours stand in place of some functions, it is the same toy: the first check has held the
    loss's gradient to ours.
    """
    if density in work.toys:
        return work.toys[density]

    loss_of = work.together.function("expected_feature_loss")
    found = []
    with work.together.in_place():
        held_out = draw(density, 20_000, seeded_generator(1))
        for start in range(STARTS):
            W, b = train(loss_of, density, start)
            found.append((loss_of(W, b, IMPORTANCE, held_out).item(), W, b))
    _, W, b = min(found, key=lambda each: each[0])
    work.toys[density] = (W, b)
    return W, b


def train(loss_of, density, seed):
    """(W, b) of one toy after STEPS of Adam on the learner's loss."""
    generator = seeded_generator(seed)
    W = (0.5 * torch.randn(2, FEATURES, generator=generator)).requires_grad_()
    b = torch.zeros(FEATURES, requires_grad=True)
    optimizer = torch.optim.Adam([W, b])
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / STEPS)
        loss = loss_of(W, b, IMPORTANCE, draw(density, 256, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return W.detach(), b.detach()


def angles_between(W):
    """The angles from each feature to the next one around the plane, in degrees, [feature]."""
    around = torch.atan2(W[1], W[0]).sort().values * 180 / math.pi
    return (around.roll(-1) - around) % 360


# Checks


def every_weight_learns(work):
    """your loss has a gradient by W and by b"""
    W = random(2, FEATURES).requires_grad_()
    b = random(FEATURES, seed=1).requires_grad_()
    x = draw(0.5, 64, seeded_generator(0))
    loss_of = work.together.function("expected_feature_loss")
    with work.together.in_place():
        loss = loss_of(W, b, IMPORTANCE, x)
    expect(isinstance(loss, torch.Tensor) and loss.requires_grad, "no gradient leads from your "
           "loss to W and b: is there an .item(), a detach or a no_grad on the way?")
    found = torch.autograd.grad(loss, (W, b), allow_unused=True)
    ours = ((x @ W.T @ W + b).relu() - x).pow(2) @ IMPORTANCE
    for name, grad, want in zip("Wb", found, torch.autograd.grad(ours.mean(), (W, b)), strict=True):
        expect(grad is not None, f"no gradient leads from your loss to {name}")
        expect_close(grad, want, f"the gradient by {name}", tolerance=1e-3)


def rare_features_form_a_pentagon(work):
    """trained by your loss on rare features, all five are kept, 72 degrees from one to the next"""
    W, _ = trained_toy(work, RARE)
    lengths = W.norm(dim=0)
    expect(lengths.min() > 0.5, f"feature {lengths.argmin().item()} has length "
           f"{lengths.min():.2f}: it is not kept")
    off = (angles_between(W) - 72).abs().max()
    expect(off < MOST_DEGREES_OFF, f"one gap is {off:.0f} degrees from 72: this is no pentagon")


def each_has_two_fifths_of_a_dimension(work):
    """your dimensionality gives each of them 2/5"""
    W, _ = trained_toy(work, RARE)
    D = work.together.function("dimensionality")(W)
    expect_close(D, torch.full((FEATURES,), 2 / FEATURES), "the dimensionality", "feature",
                 tolerance=MOST_OFF)


def dense_features_do_not_share(work):
    """the control: where all features are always there, two have a dimension each and three none"""
    W, _ = trained_toy(work, DENSE)
    D = work.together.function("dimensionality")(W).sort(descending=True).values
    want = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])
    lengths = W.norm(dim=0).sort(descending=True).values
    expect(lengths[2] < 0.3, f"three features are kept, the third with length {lengths[2]:.2f}: "
           "the same code finds superposition where there is none")
    expect_close(D, want, "the dimensionality, the largest first", "feature",
                 tolerance=2 * MOST_OFF)


def blame(work, check):
    """Which of the functions is at fault."""
    return work.together.blame(check, work)


MILESTONE = Milestone(
    letter="D", title="superposition", chapter=14,
    hand_in="toy_forward, expected_feature_loss and dimensionality of chapter 14",
    gather=gather,
    checks=(every_weight_learns, rare_features_form_a_pentagon, each_has_two_fifths_of_a_dimension,
            dense_features_do_not_share),
    blame=blame)
