"""Ablation: what is removed is gone, nothing else is, and each effect is the naive loop's."""

import copy
import itertools

import pytest
import torch
from helpers import tiny_model, tiny_tokens
from torch.testing import assert_close

import losses
from activation_cache import get_act_name
from attribution import direct_logit_attribution
from head_ablation import (
    MODES,
    ablate_heads,
    ablate_layers,
    ablate_neurons,
    ablation_effects,
    derangement,
    head_importance,
    head_importance_gradient,
    head_slopes,
    pairwise_interaction,
    self_repair,
)
from losses import next_token_loss
from metrics import Metric, bootstrap_ci
from utils import UserError, seeded_generator

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"attn_bias": False},
          {"norm": "none", "unembed_bias": True}, {"positions": "sinusoidal", "n_layers": 3}]
LINEAR = {"norm": "none", "attn_only": True}
DIFF = Metric.logit_diff([3, 4], [5, 0])
HEADS = [(0, 1), (1, 0), (1, 2)]


def in_double(**changes):
    return tiny_model(dtype=torch.float64, **changes), tiny_tokens()


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens)


@torch.no_grad()
def cache_of(model, tokens):
    return model.run_with_cache(tokens)[1]


def how_to(model, mode, pos=None):
    """The arguments of a mode, with a reference of five other texts."""
    return {"mode": mode, "reference": cache_of(model, tiny_tokens(batch=5, seed=8)),
            "source": [4, 1], "pos": pos}


def value_of(how, name):
    """[batch, pos, unit, ...]: what a mode puts in the place of an activation, told in full."""
    kept = how["reference"][name]
    means = {"zero": torch.zeros_like(kept[:1]), "mean": kept.mean((0, 1), keepdim=True),
             "mean_pos": kept.mean(0, keepdim=True), "resample": kept[[4, 1]]}
    return means[how["mode"]].expand(2, *kept.shape[1:])


@torch.no_grad()
def naive(model, tokens, heads, how, more_hooks=()):
    """The logits without some heads: one hook that writes each head, one whole run."""
    def write(z, hook):
        z, value = z.clone(), value_of(how, hook.name)
        for layer, head in heads:
            if hook.name == get_act_name("z", layer):
                for pos in [*range(z.shape[1])] if how["pos"] is None else how["pos"]:
                    z[:, pos, head] = value[:, pos, head]
        return z

    hooks = [(lambda name: name.endswith("hook_z"), write), *more_hooks]
    return model.run_with_hooks(tokens, hooks)


def loss_of(tokens):
    return lambda logits: next_token_loss(logits, tokens, reduction="none")


# Removing


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_a_head_at_zero_is_a_head_whose_output_matrix_is_zero(changes):
    model, tokens = in_double(**changes)
    without = copy.deepcopy(model)
    with torch.no_grad():
        for layer, head in HEADS:
            without.blocks[layer].attn.W_O[head] = 0
    with ablate_heads(model, HEADS):
        assert_close(logits_of(model, tokens), logits_of(without, tokens))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_without_all_heads_attention_writes_its_bias(changes):
    model, tokens = in_double(**changes)
    every = list(itertools.product(range(model.cfg.n_layers), range(3)))
    with ablate_heads(model, every):
        written = cache_of(model, tokens).stack("attn_out")
    assert_close(written, model.b_O.detach()[:, None, None].expand_as(written))


@pytest.mark.parametrize("mode", MODES)
def test_no_heads_neurons_or_layers_change_nothing(mode):
    model, tokens = tiny_model(), tiny_tokens()
    logits, how = logits_of(model, tokens), how_to(model, mode)
    for nothing in (ablate_heads(model, [], **how), ablate_neurons(model, [], **how),
                    ablate_layers(model, [], "mlp", **how)):
        with nothing:
            assert torch.equal(logits_of(model, tokens), logits)


def test_each_row_in_its_own_place_changes_nothing():
    model, tokens = tiny_model(), tiny_tokens()
    cache, every = cache_of(model, tokens), list(itertools.product(range(2), range(3)))
    with ablate_heads(model, every, "resample", reference=cache, source=range(2)):
        inside = logits_of(model, tokens)
    assert_close(inside, logits_of(model, tokens), atol=1e-5, rtol=0)
    with ablate_heads(model, every, "resample", reference=cache, source=[1, 0]):
        assert not torch.allclose(logits_of(model, tokens), inside)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_heads_get_the_value_of_the_mode_where_they_are_removed_and_no_other_does(changes, mode):
    model, tokens = in_double(**changes)
    for pos in (None, [-1], [2, 4]):
        how = how_to(model, mode, pos)
        with ablate_heads(model, HEADS, **how):
            assert_close(logits_of(model, tokens), naive(model, tokens, HEADS, how))


@pytest.mark.parametrize("pos, same", [(3, [3]), (slice(2, None), [2, 3, 4, 5, 6]), (-2, [5])])
def test_a_position_may_be_one_a_slice_or_counted_from_the_end(pos, same):
    model, tokens = in_double()
    with ablate_heads(model, HEADS, pos=same):
        expected = logits_of(model, tokens)
    with ablate_heads(model, HEADS, pos=pos):
        logits = logits_of(model, tokens)
    assert torch.equal(logits, expected)
    assert torch.equal(logits[:, : same[0]], logits_of(model, tokens)[:, : same[0]])
    with ablate_heads(model, HEADS):
        assert not torch.allclose(logits_of(model, tokens), logits)


@pytest.mark.parametrize("mode", MODES)
def test_neurons_get_the_value_of_the_mode(mode):
    model, tokens = in_double()
    how, neurons = how_to(model, mode), [(0, 7), (1, 0), (1, 47)]
    with ablate_neurons(model, neurons, **how):
        cache = cache_of(model, tokens)
    for layer in range(2):
        intact = model.blocks[layer].mlp.activation(cache["pre", layer]).detach()
        gone = [neuron for at, neuron in neurons if at == layer]
        intact[..., gone] = value_of(how, get_act_name("post", layer))[..., gone]
        written = intact @ model.W_out[layer].detach() + model.b_out[layer].detach()
        assert_close(cache["mlp_out", layer], written)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_layer_writes_the_value_of_the_mode_alone(part, mode):
    model, tokens = in_double()
    how = how_to(model, mode)
    with ablate_layers(model, [1], part, **how):
        cache = cache_of(model, tokens)
    before = cache["resid_pre", 1] if part == "attn" else cache["resid_mid", 1]
    after = cache["resid_mid", 1] if part == "attn" else cache["resid_post", 1]
    assert_close(after - before, value_of(how, get_act_name(f"{part}_out", 1)))
    assert torch.equal(cache["resid_post", 0], cache_of(model, tokens)["resid_post", 0])


@pytest.mark.parametrize("mode", ["mean", "mean_pos"])
def test_the_mean_of_a_constant_is_that_constant(mode):
    model, tokens = tiny_model(), tiny_tokens()
    cache = cache_of(model, tokens)
    cache.tensors["blocks.0.attn.hook_z"] = torch.full((2, 7, 3, 4), 0.5)
    with ablate_heads(model, [(0, 1)], mode, reference=cache):
        z = cache_of(model, tokens)["z", 0]
    assert torch.equal(z[:, :, 1], torch.full((2, 7, 4), 0.5))
    assert torch.equal(z[:, :, ::2], cache_of(model, tokens)["z", 0][:, :, ::2])


def test_nested_ablations_remove_both_and_end_one_by_one():
    model, tokens = in_double()
    with ablate_heads(model, HEADS[:1]):
        one = logits_of(model, tokens)
        with ablate_heads(model, HEADS[1:]), ablate_layers(model, [0], "mlp"):
            with ablate_layers(model, [0], "mlp"), ablate_heads(model, HEADS):
                both = logits_of(model, tokens)
            assert torch.equal(logits_of(model, tokens), both)
        assert torch.equal(logits_of(model, tokens), one)
    assert not torch.allclose(one, logits_of(model, tokens))


def test_everything_is_back_after_an_exception_in_the_body():
    model, tokens = tiny_model(), tiny_tokens()
    before, logits = copy.deepcopy(model.state_dict()), logits_of(model, tokens)
    with pytest.raises(ZeroDivisionError), ablate_heads(model, HEADS), ablate_neurons(
            model, [(0, 3)]), ablate_layers(model, [1]):
        assert not torch.allclose(logits_of(model, tokens), logits)
        1 / 0  # noqa: B018
    assert not any(point.listeners for point in model.hook_points().values())
    assert torch.equal(logits_of(model, tokens), logits)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_ablated_model_can_be_trained_and_the_removed_head_gets_no_gradient():
    model, tokens = tiny_model(), tiny_tokens()
    with ablate_heads(model, [(1, 2)], "mean", reference=cache_of(model, tokens)):
        losses.next_token_loss(model(tokens), tokens).backward()
    attn = model.blocks[1].attn
    gradient = attn.W_QKV.grad.unflatten(1, (3, 3, 4)).abs().sum((0, 1, 3))  # [head]
    assert gradient[2] == 0 and gradient[:2].min() > 0


@pytest.mark.parametrize("n", [2, 3, 4, 7, 30, 501])
def test_a_derangement_has_no_fixed_point_and_every_row_once(n):
    generator = seeded_generator(n)
    for _ in range(50):
        order = derangement(n, generator)
        assert not (order == torch.arange(n)).any()
        assert torch.equal(order.sort().values, torch.arange(n))


def test_every_derangement_is_drawn_equally_often():
    generator = seeded_generator(0)
    drawn = [tuple(derangement(4, generator).tolist()) for _ in range(4500)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 9  # of the 24 orders of four
    assert max(abs(count - 500) for count in counts) < 4 * (4500 * 1 / 9 * 8 / 9) ** 0.5


# Measuring


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
@pytest.mark.parametrize("metric", [None, DIFF], ids=["loss", "diff"])
def test_the_importance_of_each_head_is_that_of_the_naive_loop(changes, mode, metric):
    model, tokens = in_double(**changes)
    how, measure = how_to(model, mode), metric or loss_of(tokens)
    effects = head_importance(model, tokens, metric, **how)
    assert effects.values.shape == (model.cfg.n_layers, 3, 2)
    intact = measure(logits_of(model, tokens))
    for layer, head in itertools.product(range(model.cfg.n_layers), range(3)):
        rise = measure(naive(model, tokens, [(layer, head)], how)) - intact
        assert_close(effects.values[layer, head], rise)


def test_sets_of_heads_are_measured_together_and_an_empty_one_costs_nothing():
    model, tokens = in_double(n_layers=3)
    sets = [[], [(2, 0)], [(0, 1), (2, 2)], HEADS, [(1, 1), (1, 0)], [(0, 0)], [(0, 2), (1, 2)],
            [(0, 0), (0, 1), (0, 2)]]
    how = how_to(model, "mean_pos", pos=[1, 6])
    calls = []
    effects = ablation_effects(model, tokens, sets, progress=lambda: calls.append(1), **how)
    assert len(calls) == len(sets)
    measure = loss_of(tokens)
    intact = measure(logits_of(model, tokens))
    for heads, values in zip(sets, effects.values, strict=True):
        assert_close(values, measure(naive(model, tokens, heads, how)) - intact)
    assert effects.values[0].tolist() == [0, 0] and not effects.values.requires_grad


def test_hooks_that_are_open_act_once_in_both_runs():
    model, tokens = in_double()
    ramp = torch.arange(12).double()

    def push(resid, hook):
        return resid + ramp

    how = how_to(model, "zero")
    pushed = [("blocks.1.hook_resid_pre", push)]
    with model.hooks(pushed):
        effects = head_importance(model, tokens, DIFF, **how)
    intact = DIFF(naive(model, tokens, [], how, pushed))
    for layer, head in itertools.product(range(2), range(3)):
        rise = DIFF(naive(model, tokens, [(layer, head)], how, pushed)) - intact
        assert_close(effects.values[layer, head], rise)


def test_intervals_are_those_of_the_rows():
    model, tokens = tiny_model(), tiny_tokens(batch=6)
    effects = head_importance(model, tokens)
    assert_close(effects.mean, effects.values.mean(-1))
    low, high = effects.ci(level=0.8, seed=3)
    expected = bootstrap_ci(effects.values[1, 2], level=0.8, seed=3)
    assert low.shape == (2, 3) and (low <= high).all()
    assert_close(torch.stack([low[1, 2], high[1, 2]]), torch.stack(expected))


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_gradient_importance_is_that_of_a_derivative_taken_row_by_row(changes):
    model, tokens = in_double(**changes)
    importance = head_importance_gradient(model, tokens)
    expected = torch.zeros(model.cfg.n_layers, 3, dtype=torch.float64)
    for layer, row in itertools.product(range(model.cfg.n_layers), range(2)):
        alive = []

        def keep(z, hook, alive=alive):
            alive.append(z.detach().requires_grad_())
            return alive[0]

        text = tokens[row : row + 1]
        loss = losses.next_token_loss(
            model.run_with_hooks(text, [(get_act_name("z", layer), keep)]), text)
        slope = torch.autograd.grad(loss, alive)[0]
        for head in range(3):
            product = (alive[0] * slope)[:, :, head].sum()
            expected[layer, head] += product.abs().item() / 2
    assert_close(importance, expected)
    normalised = head_importance_gradient(model, tokens, normalised=True)
    assert_close(normalised, expected / expected.pow(2).sum(1, keepdim=True).sqrt())
    assert all(weight.grad is None for weight in model.parameters())


def test_where_the_metric_is_linear_the_gradient_is_the_effect_of_the_ablation():
    model, tokens = in_double(**LINEAR)
    gradient = head_importance_gradient(model, tokens, DIFF)
    effects = head_importance(model, tokens, DIFF).values
    assert_close(gradient[-1], effects[-1].abs().mean(-1))
    assert_close(head_slopes(model, tokens, DIFF).values[-1], effects[-1])
    assert effects[-1].prod(-1).min() < 0  # the absolute value of the mean would not do
    assert not torch.allclose(gradient[0], effects[0].abs().mean(-1), rtol=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_the_interaction_of_two_heads_is_what_three_naive_ablations_say(mode):
    model, tokens = in_double()
    how, heads = how_to(model, mode), [(1, 2), (0, 1), (1, 0), (0, 0)]  # in no order
    interaction = pairwise_interaction(model, tokens, heads, **how).values
    measure = loss_of(tokens)

    def effect(*gone):
        return measure(naive(model, tokens, gone, how)) - measure(logits_of(model, tokens))

    for (i, one), (j, other) in itertools.product(enumerate(heads), repeat=2):
        expected = effect(one, other) - effect(one) - effect(other)
        assert_close(interaction[i, j], expected)
    assert torch.equal(interaction, interaction.transpose(0, 1))


def test_heads_of_one_layer_do_not_interact_in_a_linear_model_and_those_of_two_do():
    model, tokens = in_double(**LINEAR)
    heads = list(itertools.product(range(2), range(3)))
    interaction = pairwise_interaction(model, tokens, heads, DIFF).values
    last = interaction[3:, 3:]
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    assert_close(last[off_diagonal], torch.zeros_like(last[off_diagonal]))
    assert interaction[:3, 3:].abs().min() > 1e-3


# Self-repair


def held(model, tokens, layer):
    """Hooks that hold the final scale, later patterns, and all that later parts write."""
    cache = cache_of(model, tokens)
    n_layers, attn_only = model.cfg.n_layers, model.cfg.attn_only

    def hold(short, layers):
        return [(get_act_name(short, at), lambda t, hook: cache[hook.name]) for at in layers]

    scale = hold("scale", [None]) if model.cfg.norm == "layernorm" else []
    patterns = hold("pattern", range(layer + 1, n_layers))
    writes = hold("attn_out", range(layer + 1, n_layers))
    writes += [] if attn_only else hold("mlp_out", range(layer, n_layers))
    return scale, scale + patterns, scale + writes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_sources_of_self_repair_are_those_of_naive_runs_and_add_up(changes, mode):
    model, tokens = in_double(**changes)
    how = how_to(model, mode)
    for head, metric in itertools.product([(0, 1), (1, 2)], [DIFF, loss_of(tokens)]):
        repair = self_repair(model, tokens, head, metric, **how)
        intact = metric(logits_of(model, tokens))
        total, scale, patterns, direct = (
            metric(naive(model, tokens, [head], how, hooks)) - intact
            for hooks in ([], *held(model, tokens, head[0])))
        assert_close(repair.total, total)
        assert_close(repair.direct, direct)
        assert_close(repair.by_scale, total - scale)
        assert_close(repair.by_patterns, scale - patterns)
        assert_close(repair.by_rest, patterns - direct)
        assert_close(repair.by_scale + repair.by_patterns + repair.by_rest, repair.repair)
        assert_close(repair.total - repair.direct, repair.repair)
        assert not repair.total.requires_grad


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_direct_effect_is_what_the_head_s_row_of_the_attribution_loses(changes):
    model, tokens = in_double(**changes)
    attr, labels = direct_logit_attribution(
        model, cache_of(model, tokens), torch.tensor([3, 4]), torch.tensor([5, 0]), unit="head")
    for layer, head in HEADS:
        repair = self_repair(model, tokens, (layer, head), DIFF)
        assert_close(repair.direct, -attr[labels.index(f"L{layer}H{head}")])


def test_nothing_repairs_what_is_written_last_but_the_final_layer_norm():
    for norm in ("layernorm", "none"):
        model, tokens = in_double(attn_only=True, norm=norm)
        repair = self_repair(model, tokens, (1, 1), DIFF)
        assert_close(repair.by_patterns, torch.zeros(2).double())
        assert_close(repair.by_rest, torch.zeros(2).double())
        assert (repair.repair.abs() > 1e-3).all() == (norm == "layernorm")
        assert_close(repair.total, head_importance(model, tokens, DIFF).values[1, 1])


def test_measuring_leaves_no_hook_and_no_gradient_even_when_the_metric_fails():
    model, tokens = tiny_model(), tiny_tokens()
    seen = []

    def fails_later(logits):
        seen.append(logits)
        return 1 / (3 - len(seen)) + logits[..., 0, 0]

    for measure in (head_importance, head_importance_gradient,
                    lambda *given: pairwise_interaction(*given[:2], HEADS, given[2]),
                    lambda *given: self_repair(*given[:2], (0, 0), given[2])):
        seen[:] = [None] * 2 if measure is head_importance_gradient else []
        with pytest.raises(ZeroDivisionError):
            measure(model, tokens, fails_later)
        assert not any(point.listeners for point in model.hook_points().values())
        assert all(weight.grad is None for weight in model.parameters())


# What is refused


@pytest.mark.parametrize("heads, more, problem", [
    ([(2, 0)], {}, r"head \(2, 0\) is not there; this model has 2 layers with 3 each"),
    ([(0, 3)], {}, r"head \(0, 3\) is not there"), ([(-1, 0)], {}, r"head \(-1, 0\)"),
    ([(0, -1)], {}, r"head \(0, -1\)"), ((0, 1), {}, r"\[0, 1\] are no pairs \(layer, head\)"),
    (["L0H1"], {}, "no integers"),
    ([(0.5, 1)], {}, "no integers"), ([(0, 1, 2)], {}, "are no pairs"),
    ([], {"mode": "median"}, "mode='median' is unknown; choose from: zero, mean, mean_pos"),
    ([], {"mode": "mean"}, "mode='mean' needs a reference"),
    ([], {"mode": "resample"}, "mode='resample' needs a reference"),
])
def test_heads_that_are_not_there_and_modes_without_what_they_need_are_refused(
        heads, more, problem):
    with pytest.raises(UserError, match=problem), ablate_heads(tiny_model(), heads, **more):
        pass


@pytest.mark.parametrize("mode, of, source, problem", [
    ("resample", {}, None, "needs source, .* pass derangement"),
    ("resample", {}, [0, 2], "source runs from 0 to 2; the reference has rows 0 to 1"),
    ("resample", {}, [-1, 0], "source runs from -1 to 0"),
    ("resample", {}, [1], r"has \[1, 7, 3, 4\] from the reference for \[2, 7, 3, 4\]"),
    ("resample", {"pos": 6}, [1, 0], r"has \[2, 6, 3, 4\] from the reference for \[2, 7, 3, 4\]"),
    ("mean_pos", {"pos": 6}, None, r"has \[1, 6, 3, 4\] from the reference for \[1, 7, 3, 4\]"),
    ("mean_pos", {"pos": 1}, None, r"has \[1, 1, 3, 4\] from the reference"),
])
def test_a_reference_that_does_not_fit_is_refused_with_its_shape(mode, of, source, problem):
    model, tokens = tiny_model(), tiny_tokens()
    cache = cache_of(model, tiny_tokens(**of))
    with pytest.raises(UserError, match=problem), ablate_heads(
            model, HEADS, mode, reference=cache, source=source):
        logits_of(model, tokens)
    assert not any(point.listeners for point in model.hook_points().values())


def test_a_mean_may_come_from_texts_of_another_length_but_not_from_another_model():
    model, tokens = tiny_model(), tiny_tokens()
    with ablate_heads(model, HEADS, "mean", reference=cache_of(model, tiny_tokens(5, 3))):
        logits_of(model, tokens)
    other = cache_of(tiny_model(n_heads=4), tokens)
    with pytest.raises(UserError, match="take it from this model"), ablate_heads(
            model, HEADS, "mean", reference=other):
        logits_of(model, tokens)
    with torch.no_grad():
        kept = model.run_with_cache(tokens, "hook_embed")[1]
    with pytest.raises(UserError, match="hook_z was not kept; name it"):
        ablate_heads(model, HEADS, "mean", reference=kept)


@pytest.mark.parametrize("broken, problem", [
    (lambda model: ablate_neurons(model, [(0, 48)]), r"neuron \(0, 48\) .* layers with 48 each"),
    (lambda model: ablate_layers(model, [2], "mlp"), r"mlp \(2, 0\) is not there"),
    (lambda model: ablate_layers(model, [0], "head"), "part='head' is not in this model"),
    (lambda model: ablate_heads(model, HEADS, pos=7), "pos=7 is outside of the 7 positions"),
])
def test_what_else_is_not_there_is_refused(broken, problem):
    model = tiny_model()
    with pytest.raises(UserError, match=problem), broken(model):
        logits_of(model, tiny_tokens())


def test_a_model_without_mlps_has_no_neurons_to_remove():
    model = tiny_model(attn_only=True)
    for ablate, units, message in ((ablate_neurons, [(0, 0)], "has no neurons"),
                                   (ablate_layers, [0], "part='mlp' is not in this model")):
        with pytest.raises(UserError, match=message):
            ablate(model, units, *["mlp"] * (ablate is ablate_layers))


def test_what_can_not_be_measured_is_refused():
    model, tokens = tiny_model(), tiny_tokens()
    for measure in (lambda: pairwise_interaction(model, tokens, []),
                    lambda: ablation_effects(model, tokens, [])):
        with pytest.raises(UserError, match="there are no heads to measure; give some"):
            measure()
    for measure in (head_importance, head_importance_gradient):
        with pytest.raises(UserError, match="n_layers=0: this model has no heads to measure"):
            measure(tiny_model(n_layers=0), tokens)
    with pytest.raises(UserError, match="a text of one token predicts nothing"):
        head_importance(model, tokens[:, :1])
    with pytest.raises(UserError, match=r"tokens \[2, 2\], the run 3 rows"):
        head_importance(model, tiny_tokens(3), DIFF)
    with pytest.raises(UserError, match="at random; call model"):
        head_importance(tiny_model(dropout=0.1).train(), tokens)
    for n in (0, 1):
        with pytest.raises(UserError, match=f"n={n}: there is no other row"):
            derangement(n, seeded_generator(0))


def test_a_mask_and_a_position_a_row_are_no_positions():
    for pos, message in (([True] + [False] * 6, "nonzero"), ([[1], [2]], r"pos is \[2, 1\]")):
        model = tiny_model()
        with pytest.raises(UserError, match=message), ablate_heads(model, HEADS, pos=pos):
            model(tiny_tokens())


def test_hooks_at_the_last_layer_norm_have_all_positions_whatever_the_metric_looks_at():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    metric = Metric(lambda chosen: chosen[..., 0, 1] - chosen[..., 1, 2], [2, 5])
    edit = ("ln_final.hook_normalized", lambda t, hook: t * (1 + torch.arange(7)[:, None]))
    with torch.no_grad(), model.hooks([edit]):
        rise = ablation_effects(model, tokens, [[(0, 0)]], metric).values[0]
        intact = metric(model(tokens))
        with ablate_heads(model, [(0, 0)]):
            assert_close(rise, metric(model(tokens)) - intact)


def test_importance_by_the_gradient_of_what_has_none_is_refused():
    with pytest.raises(UserError, match="no gradient"):
        head_importance_gradient(tiny_model(), tiny_tokens(),
                                 lambda logits: logits[:, -1].argmax(-1).double())
