"""Probes: certain if the label is there, at chance if it is not, and no use of held-out data."""

import math

import pytest
import torch
from helpers import refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

import probing
from probing import (
    assign_folds,
    concept_erasure,
    control_task_labels,
    erasing,
    fit_probe,
    layer_sweep,
    mdl_online,
    selectivity,
    untrained_accuracy,
)
from utils import seeded_generator


def clusters(n=300, n_classes=3, d=5, apart=20.0, seed=0):
    """X [n, d] around a corner for each class, and y [n]."""
    generator = seeded_generator(seed)
    y = torch.randint(n_classes, (n,), generator=generator)
    corners = apart * torch.eye(d)[:n_classes]
    return corners[y] + torch.randn(n, d, generator=generator), y


def test_separable_classes_are_always_found():
    for labels in ([0, 1], [7, 3, 11]):
        X, y = clusters(n_classes=len(labels))
        y = torch.tensor(labels)[y]
        probe = fit_probe(X, y)
        assert probe.accuracies.tolist() == [1.0] * 5
        assert torch.equal(probe.predict(X.double()), y), f"labels {labels} are read as others"


def test_the_accuracy_is_the_mean_over_the_folds():
    X, y = clusters(n=100, apart=1.0)
    probe = fit_probe(X, y, n_folds=3)
    assert probe.accuracies.min() < probe.accuracy < probe.accuracies.max()
    assert probe.accuracy == pytest.approx(sum(probe.accuracies.tolist()) / 3)


def test_shuffled_labels_are_at_chance():
    X, y = clusters(n=900)
    shuffled = y[torch.randperm(900, generator=seeded_generator(1))]
    most = 3 * math.sqrt(1 / 3 * 2 / 3 / 900)  # three standard errors of a binomial
    assert abs(fit_probe(X, shuffled).accuracy - 1 / 3) < most


def test_the_fit_is_where_the_gradient_of_the_objective_vanishes():
    X, y = clusters(apart=1.0)
    probe = fit_probe(X, y, l2=0.1)
    inputs = (X.double() - probe.mean) / probe.scale
    error = (inputs @ probe.W + probe.b).softmax(-1) - torch.nn.functional.one_hot(y, 3)
    assert_close(inputs.T @ error / len(y) + 0.1 * probe.W, torch.zeros(5, 3).double(), atol=1e-5,
                 rtol=0)
    assert_close(error.mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)


def test_no_group_is_on_both_sides(monkeypatch):
    X, groups = torch.randn(120, 4, generator=seeded_generator(0)), torch.arange(120) // 6
    seen = []
    fit = probing.fit_logistic

    def watched(X, y, l2):
        seen.append({tuple(row) for row in X.tolist()})
        return fit(X, y, l2)

    monkeypatch.setattr(probing, "fit_logistic", watched)
    fit_probe(X, torch.arange(120) % 2, groups)
    rows = [tuple(row) for row in X.double().tolist()]
    for training in seen[:5]:
        sides = {(int(group), row in training) for group, row in zip(groups, rows, strict=True)}
        assert len(sides) == 20 and len({group for group, inside in sides if not inside}) == 4


def test_a_label_that_depends_on_the_group_is_not_found_in_other_groups():
    generator = seeded_generator(0)
    groups = torch.arange(300) // 5
    signature = torch.randn(60, 40, generator=generator)[groups]
    y = torch.randint(2, (60,), generator=generator)[groups]
    X = signature + 0.1 * torch.randn(300, 40, generator=generator)
    assert fit_probe(X, y, l2=0.1).accuracy > 0.9  # the same group is on both sides
    assert fit_probe(X, y, groups, l2=0.1).accuracy < 0.7


def test_features_are_standardised_only_by_the_training_side(monkeypatch):
    X, y = clusters(n=100)
    seen = []
    fit = probing.fit_logistic
    monkeypatch.setattr(probing, "fit_logistic", lambda *parts: seen.append((parts[0], fit(*parts)))
                        or seen[-1][1])
    fit_probe(X, y)
    for training, (_, mean, scale, _, _) in seen:
        assert_close(mean, training.mean(0))
        assert_close(scale, training.std(0, correction=0))


def test_control_labels_are_a_function_of_the_type():
    tokens = torch.randint(30, (40, 9), generator=seeded_generator(0))
    y = torch.randint(4, (50,), generator=seeded_generator(1))
    labels = control_task_labels(tokens, y)
    assert labels.shape == tokens.shape and set(labels.flatten().tolist()) == {0, 1, 2, 3}
    assert all(len(labels[tokens == token].unique()) == 1 for token in tokens.unique())
    assert torch.equal(labels, control_task_labels(tokens, y))
    assert not torch.equal(labels, control_task_labels(tokens, y, seed=1))


def test_the_classes_of_a_control_task_are_as_large_as_the_task_s():
    drawn = torch.rand(5000, generator=seeded_generator(0))
    tokens = (200 * drawn.pow(3)).long()  # frequent ones and rare ones, as words are
    y = torch.arange(100) // 90 + 3  # a tenth of them are 4
    shares = [(control_task_labels(tokens, y, seed=seed) == 4).float().mean() for seed in range(20)]
    near = [abs(share - 0.1) < 0.01 for share in shares]  # but where a frequent type is divided
    assert sum(near) > 12 and abs(sum(shares) / 20 - 0.1) < 0.03
    alone = control_task_labels(torch.arange(100), y)
    assert torch.equal(alone.sort().values, y) and not torch.equal(alone, y)


def test_a_control_task_has_two_classes_however_rare_one_is_or_is_refused():
    rare = torch.arange(100) // 99
    for seed in range(20):
        assert len(control_task_labels(torch.arange(8) % 2, rare, seed=seed).unique()) == 2
    for told, tokens, y in (("1 types", torch.zeros(8), rare),
                            ("1 classes", torch.arange(8), torch.ones(8))):
        assert told in refusal(lambda tokens=tokens, y=y: control_task_labels(tokens, y), told)


def test_a_probe_on_types_learns_any_labels_of_types_and_is_not_selective():
    tokens = torch.randint(12, (600,), generator=seeded_generator(0))
    one_hot = torch.eye(12)[tokens]
    found = selectivity(one_hot, tokens % 2, tokens)
    assert found.task == 1.0 and found.control == 1.0 and found.selectivity == 0.0


def test_a_probe_on_more_than_the_type_is_selective():
    X, y = clusters(n=600, n_classes=2)
    tokens = torch.randint(100, (600,), generator=seeded_generator(5))
    found = selectivity(X, y, tokens)
    assert found.task == 1.0 and found.selectivity > 0.3


def test_labels_that_are_easily_decoded_take_few_bits_and_random_ones_all():
    X, y = clusters(n=2000, n_classes=2)
    easy = mdl_online(X, y)
    assert easy.uniform_bits == 2000 and easy.compression > 15
    random = torch.randint(2, (2000,), generator=seeded_generator(2))
    assert 0.9 < mdl_online(X, random).compression <= 1.01


def test_the_description_length_is_the_sum_over_the_blocks():
    X, y = clusters(n=40, n_classes=2, apart=1.0)
    order = torch.randperm(40, generator=seeded_generator(0))
    X, y = X[order].double(), y[order]
    bits = 10.0
    _, mean, scale, W, b = probing.fit_logistic(X[:10], y[:10], 1e-3)
    probs = ((X[10:] - mean) / scale @ W + b).softmax(-1) * 10 / 12 + 1 / 12
    bits -= probs[torch.arange(30), y[10:]].log2().sum().item()
    X, y = clusters(n=40, n_classes=2, apart=1.0)
    assert mdl_online(X, y, blocks=(0.25, 1.0)).bits == pytest.approx(bits)


def test_rare_classes_are_cheap_without_any_x_and_only_the_entropy_says_so():
    X, y = torch.randn(2000, 3, generator=seeded_generator(0)), torch.arange(2000) % 20 == 0
    found = mdl_online(X, y.long())
    assert found.entropy_bits == pytest.approx(2000 * (0.05 * math.log2(20)
                                                       + 0.95 * math.log2(20 / 19)))
    assert found.compression > 2.5 and 0.85 < found.entropy_compression < 1


def test_a_label_that_depends_on_the_group_is_not_cheap_if_whole_groups_are_sent(monkeypatch):
    generator = seeded_generator(0)
    groups = (torch.arange(600) // 10)[torch.randperm(600, generator=generator)]
    signature = torch.randn(60, 40, generator=generator)[groups]
    y = torch.randint(2, (60,), generator=generator)[groups]
    X = signature + 0.1 * torch.randn(600, 40, generator=generator)
    assert mdl_online(X, y).compression > 2.2
    group_of = {tuple(row): int(group) for row, group in zip(X.double().tolist(), groups,
                                                             strict=True)}
    sizes = []
    fit = probing.fit_logistic

    def watched(X, y, l2):
        sent = [group_of[tuple(row)] for row in X.tolist()]
        assert all(sent.count(group) == 10 for group in sent)  # whole ones
        sizes.append(len(sent))
        return fit(X, y, l2)

    monkeypatch.setattr(probing, "fit_logistic", watched)
    assert mdl_online(X, y, groups).compression < 1
    assert sizes == [10, 20, 40, 80, 150, 300]


def test_a_planted_bit_is_found_in_the_layers_that_have_it():
    model, tokens = tiny_model(), tiny_tokens(batch=60, pos=8)
    bit = torch.randint(2, tokens.shape, generator=seeded_generator(3))
    plant = torch.randn(12, generator=seeded_generator(4))

    def add(resid, hook):
        return resid + 30 * bit[..., None] * plant

    with torch.no_grad(), model.hooks([("blocks.1.hook_resid_post", add)]):
        _, cache = model.run_with_cache(tokens)
    probes = layer_sweep(cache, bit)
    assert list(probes) == ["0_resid_post", "1_resid_post"]
    assert probes["0_resid_post"].accuracy < 0.65 and probes["1_resid_post"].accuracy > 0.99


def test_the_untrained_baseline_probes_the_same_shape_with_fresh_weights():
    model, tokens = tiny_model(), tiny_tokens(batch=60, pos=8)
    how = {"at": "blocks.0.hook_resid_pre", "n_folds": 2, "l2": 0.01}
    bit = torch.randint(2, tokens.shape, generator=seeded_generator(3))
    assert untrained_accuracy(model, tokens, bit, **how) < 0.65
    with torch.no_grad():
        model.W_E.zero_()  # the model's own weights have no part in it
    # a token's embedding says which it is
    assert untrained_accuracy(model, tokens, tokens % 2, **how) > 0.9


def test_the_layers_are_probed_with_a_group_for_each_text_and_folds_drawn_by_the_seed():
    model, tokens = tiny_model(n_layers=1), tiny_tokens(batch=20, pos=8)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    y = torch.randint(2, (20, 1), generator=seeded_generator(3)).expand(20, 8)  # the text's
    groups = torch.arange(20).repeat_interleave(8)
    for seed in (0, 1):
        how = {"seed": seed, "l2": 0.1, "n_folds": 3}
        probe = layer_sweep(cache, y, **how)["0_resid_post"]
        X = cache["resid_post", 0].flatten(0, 1)
        expected = fit_probe(X, y.flatten(), groups, **how)
        assert torch.equal(probe.accuracies, expected.accuracies)
        assert not torch.equal(probe.accuracies, fit_probe(X, y.flatten(), **how).accuracies)
    folds = [assign_folds(None, 50, 5, seed) for seed in (0, 1)]
    assert not torch.equal(*folds) and not torch.equal(folds[0], torch.arange(50) % 5)


def correlated(n_classes, n=600, seed=0):
    """X [n, 7] whose classes differ along one axis and whose noise is large along another one that
    leans on it, with a column that is constant and one that says nothing new; y [n]."""
    X, y = clusters(n, n_classes, d=5, apart=3.0, seed=seed)
    mix = torch.randn(5, 5, generator=seeded_generator(seed + 1)).double()
    X = X.double() @ (mix + torch.diag(torch.tensor([9.0, 3, 1, 1, 0.3]).double()))
    return torch.cat([X, X[:, :1] - X[:, 1:2], torch.full((n, 1), 2.0)], 1), y


def test_after_erasure_no_linear_probe_does_better_than_the_largest_class():
    for n_classes in (2, 4):
        X, y = correlated(n_classes)
        assert fit_probe(X, y, n_folds=2).accuracy > 0.8
        erased = erasing(X, y)(X, None)
        for label in y.unique():
            assert_close(erased[y == label].mean(0), X.mean(0), atol=1e-9, rtol=0)
        _, _, _, W, _ = probing.fit_logistic(erased, y, 1e-9)
        assert W.abs().max() < 1e-6, f"the best probe of {n_classes} erased classes still looks"
        most = y.bincount().max().item() / len(y)
        assert fit_probe(erased, y, n_folds=2).accuracy < most + 0.02


def test_erasure_is_the_one_in_whitened_space_and_changes_as_little_as_any():
    X, y = clusters(n_classes=3, apart=2.0)
    X, Z = X.double(), torch.eye(3).double()[y]
    centred = X - X.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(X))
    W = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    M = W @ centred.T @ (Z - Z.mean(0)) / len(X)
    expected = X - centred @ W.T @ (M @ torch.linalg.pinv(M)).T @ torch.linalg.inv(W).T
    erased = erasing(X, y)(X, None)
    assert_close(erased, expected)
    basis = torch.linalg.qr((centred.T @ (Z - Z.mean(0)))[:, :2])[0]
    straight = X - centred @ basis @ basis.T  # erases too, at a higher price
    assert (erased - X).pow(2).sum() < 0.999 * (straight - X).pow(2).sum()
    assert_close(erasing(X, y)(X.float(), None), erased.float())  # in the activation's precision


def test_erasing_is_measured_as_by_a_hook_beside_random_labels_of_the_same_kind():
    model, tokens = tiny_model(n_layers=0), tiny_tokens(batch=60, pos=8)
    y = tokens % 2
    at = "hook_embed"
    with torch.no_grad():
        embed = model.run_with_cache(tokens, at)[1]["embed"]
    probe = fit_probe(embed.flatten(0, 1), y.flatten())
    found = concept_erasure(model, tokens, lambda logits: logits.var(), probe, at=at, types=tokens,
                            n_random=8, seed=5)

    def without(labels):
        hook = erasing(embed.flatten(0, 1), labels.flatten())
        return model.run_with_hooks(tokens, [(at, hook)]).var().item()

    with torch.no_grad():
        assert found.clean == pytest.approx(model(tokens).var().item())
        assert found.erased == pytest.approx(without(y))
        controls = [without(control_task_labels(tokens, y, seed=5 + draw)) for draw in range(8)]
    assert_close(found.random, torch.tensor(controls))
    assert len(found.random.unique()) == 8
    assert found.majority == pytest.approx(max((y == 0).float().mean(), (y == 1).float().mean()))
    assert probe.accuracy > 0.99 and found.accuracy < found.majority + 0.05


def test_of_two_planted_bits_both_are_decoded_and_only_the_one_that_is_read_matters():
    model, tokens, generator = tiny_model(n_layers=0), tiny_tokens(60, 8), seeded_generator(0)
    bits = torch.randint(2, (2, *tokens.shape), generator=generator).float()
    with torch.no_grad():
        model.unembedding.W_U[:2] = torch.tensor([[2.0], [0.0]])  # the logits' mean reads the first
        model.ln_final = torch.nn.Identity()
        model.ln_final.fused = model.ln_final.forward

    def plant(resid, hook):
        resid = resid.clone()
        resid[..., :2] = bits.movedim(0, -1)
        return resid

    at = "hook_embed"
    with torch.no_grad(), model.hooks([(at, plant)]):
        X = model.run_with_cache(tokens, at)[1][at].flatten(0, 1)
        lost = []
        for bit in bits:
            probe = fit_probe(X, bit.flatten().long())
            found = concept_erasure(model, tokens, lambda logits: logits.mean(-1).var(), probe,
                                    at=at, n_random=10)
            assert probe.accuracy == 1.0 and found.accuracy < found.majority + 0.05
            lost.append((abs(found.erased - found.clean), (found.random - found.clean).abs()))
    assert lost[0][0] > 3 * lost[0][1].max() and lost[1][0] < lost[1][1].max()


def test_arguments_that_make_no_probe_are_refused():
    X, y = torch.eye(6), torch.arange(6) % 2
    for told, case in {
        "one class": {"y": torch.zeros(6).long()},
        "float32": {"y": torch.tensor([0, 1, 0, 1, 0, math.nan])},
        "l2=-1.0": {"l2": -1.0},
        "36 values": {"X": torch.full((6, 6), math.nan)},
        "[5]": {"y": torch.arange(5)},
        "n_folds=5": {"groups": torch.arange(6) // 2},
        "groups is [5]": {"groups": torch.arange(5)},
    }.items():
        message = refusal(lambda case=case: fit_probe(**{"X": X, "y": y} | case), case)
        assert told in message, f"{case} is refused as {message}"
    cache = tiny_model().run_with_cache(tiny_tokens())[1]
    assert "[2, 6]" in refusal(lambda: layer_sweep(cache, torch.ones(2, 6)), "labels of fewer")
