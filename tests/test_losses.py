"""Cross-entropy and the KL divergence, against torch, loops and calculus."""

import math

import torch
from helpers import refusal
from torch.testing import assert_close

from losses import IGNORED, cross_entropy, kl_divergence, next_token_loss, per_token_loss
from utils import seeded_generator

BATCH, POS, D_VOCAB = 3, 5, 7


def random_logits(seed=0, dtype=torch.float64):
    return 3 * torch.randn(BATCH, POS, D_VOCAB, generator=seeded_generator(seed), dtype=dtype)


def random_tokens(seed=0):
    return torch.randint(D_VOCAB, (BATCH, POS), generator=seeded_generator(seed))


def test_cross_entropy_equals_torchs():
    logits, targets = random_logits(), random_tokens()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_close(cross_entropy(logits, targets), wanted)


def test_the_loss_of_a_token_is_minus_the_log_of_its_probability():
    logits, targets = random_logits(), random_tokens()
    losses = per_token_loss(logits, targets)
    for b in range(BATCH):
        for i in range(POS):
            p = logits[b, i].exp()[targets[b, i]] / logits[b, i].exp().sum()
            assert_close(losses[b, i], -p.log())


def test_targets_that_are_not_ids_are_refused_and_ignored_ones_are_not():
    logits = random_logits()
    targets = torch.zeros(BATCH, POS, dtype=torch.long)
    for wrong in (targets + D_VOCAB, targets - 1, targets.float()):
        assert "pass ids below 7" in refusal(lambda wrong=wrong: cross_entropy(logits, wrong))
    assert cross_entropy(logits, targets + IGNORED) == 0
    for key_mask in (targets, targets[:, 1:].bool()):
        assert "key_mask is" in refusal(
            lambda mask=key_mask: next_token_loss(logits, targets, key_mask=mask))


def test_a_uniform_guess_costs_the_log_of_the_vocabulary():
    uniform = torch.full((BATCH, POS, D_VOCAB), 4.2, dtype=torch.float64)
    assert_close(cross_entropy(uniform, random_tokens()).item(), math.log(D_VOCAB))


def test_the_next_token_loss_scores_each_position_on_the_token_after_it():
    logits, tokens = random_logits(), random_tokens()
    by_text = torch.zeros(BATCH, dtype=torch.float64)
    for b in range(BATCH):
        for i in range(POS - 1):
            by_text[b] -= logits[b, i].log_softmax(-1)[tokens[b, i + 1]] / (POS - 1)
    assert_close(next_token_loss(logits, tokens, reduction="none"), by_text)
    assert_close(next_token_loss(logits, tokens), by_text.mean())


def test_the_gradient_of_cross_entropy_is_the_softmax_minus_the_truth():
    logits, targets = random_logits().requires_grad_(), random_tokens()
    cross_entropy(logits, targets).backward()
    truth = torch.eye(D_VOCAB, dtype=torch.float64)[targets]
    assert_close(logits.grad, (logits.detach().softmax(-1) - truth) / (BATCH * POS))


def test_kl_is_the_sum_over_the_vocabulary():
    p_logits, q_logits = random_logits(0), random_logits(1)
    kl, p, q = kl_divergence(p_logits, q_logits), p_logits.softmax(-1), q_logits.softmax(-1)
    for b in range(BATCH):
        for i in range(POS):
            wanted = sum(x * math.log(x / y) for x, y in zip(p[b, i], q[b, i], strict=True))
            assert_close(kl[b, i], wanted)


def test_kl_at_some_positions_reads_both_distributions_there():
    p_logits, q_logits = random_logits(0), random_logits(1)
    everywhere = kl_divergence(p_logits, q_logits)
    for pos in (1, -2, [0, 3], slice(2, None)):
        assert_close(kl_divergence(p_logits, q_logits, pos=pos), everywhere[:, pos],
                     msg=lambda told, pos=pos: f"pos={pos}: {told}")
    assert_close(kl_divergence(p_logits, q_logits, reduction="mean"), everywhere.mean())
    # the end of one is not that of both
    told = refusal(lambda: kl_divergence(p_logits[:, :-1], q_logits, pos=-1))
    assert str(list(p_logits[:, :-1].shape)) in told and str(list(q_logits.shape)) in told


def test_kl_of_a_distribution_from_itself_is_zero_whatever_is_added_to_its_logits():
    p_logits, q_logits = random_logits(0), random_logits(1)
    assert torch.equal(kl_divergence(p_logits, p_logits), torch.zeros(BATCH, POS).double())
    assert kl_divergence(p_logits, p_logits + 2).abs().max() < 1e-14
    assert kl_divergence(p_logits, q_logits).min() > 0.01


def test_kl_has_the_leading_axes_of_both_distributions():
    p_logits, q_logits = random_logits(0), random_logits(1)
    stacked = kl_divergence(torch.stack([p_logits, q_logits]), q_logits)
    assert_close(stacked[0], kl_divergence(p_logits, q_logits))
    assert stacked.shape == (2, BATCH, POS) and not stacked[1].any()


def test_extreme_logits_give_finite_losses_and_gradients():
    for size in (1e3, 1e5):
        logits = (size * random_logits(dtype=torch.float32)).requires_grad_()
        loss = cross_entropy(logits, random_tokens())
        loss = loss + kl_divergence(logits, size * random_logits(1, torch.float32)).mean()
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all(), f"logits of size {size}"


def test_a_certain_and_right_prediction_costs_nothing_and_a_wrong_one_its_logit():
    logits = torch.tensor([[1000.0, 0.0]])
    assert per_token_loss(logits, torch.tensor([0])).item() == 0
    assert per_token_loss(logits, torch.tensor([1])).item() == 1000


def test_a_token_that_is_impossible_under_p_costs_nothing():
    p = torch.tensor([1.0, 2.0, -math.inf])
    assert kl_divergence(p, p) == 0
    q = torch.tensor([0.5, 0.1, 0.3])
    assert_close(kl_divergence(p, q), (p.softmax(-1)[:2] * (p[:2].log_softmax(-1)
                                                            - q.log_softmax(-1)[:2])).sum())


def test_one_prompt_is_compared_with_many_at_the_position_of_each():
    generator = seeded_generator(0)
    many = torch.randn(3, 5, 11, generator=generator)
    one = torch.randn(1, 5, 11, generator=generator)
    pos = torch.tensor([1, 4, 0])
    rows = range(3)
    assert_close(kl_divergence(many, one, pos=pos),
                 torch.stack([kl_divergence(many[n, pos[n]], one[0, pos[n]]) for n in rows]))
    assert_close(kl_divergence(one, many, pos=pos),
                 torch.stack([kl_divergence(one[0, pos[n]], many[n, pos[n]]) for n in rows]))
