"""Ablation: it removes the named parts and nothing else, and each effect equals a naive loop."""

import copy
import itertools

import pytest
import torch
from helpers import WIDE, tiny_model, tiny_tokens
from torch.testing import assert_close

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
from metrics import Metric
from utils import UserError, seeded_generator

SHAPES = [{}, {"tie_embeddings": True}, {"attn_only": True}, {"attn_bias": False},
          {"norm": "none", "unembed_bias": True}, {"positions": "sinusoidal", "n_layers": 3},
          WIDE]
CASES = [*(({}, mode) for mode in MODES), ({"attn_only": True}, "mean"),
         ({"attn_bias": False}, "resample"), ({"norm": "none", "unembed_bias": True}, "mean_pos"),
         ({"positions": "sinusoidal", "n_layers": 3}, "mean"),
         (WIDE, "mean")]  # every mode, and every shape
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
    """The value that a mode replaces an activation by, in full: [batch, pos, unit, ...]."""
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


def assert_nothing_is_left_on(model):
    assert not any(point.listeners for point in model.hook_points().values()), "a hook is open"
    assert all(weight.grad is None for weight in model.parameters()), "a weight has a gradient"


# Removing


def test_zero_ablation_of_a_head_equals_a_zero_output_matrix():
    for changes in SHAPES:
        model, tokens = in_double(**changes)
        without = copy.deepcopy(model)
        with torch.no_grad():
            for layer, head in HEADS:
                without.blocks[layer].attn.W_O[head] = 0
        with ablate_heads(model, HEADS):
            found = logits_of(model, tokens)
        assert_close({str(changes): found}, {str(changes): logits_of(without, tokens)})


def test_without_all_heads_attention_writes_its_bias():
    for changes in SHAPES:
        model, tokens = in_double(**changes)
        every = list(itertools.product(range(model.cfg.n_layers), range(3)))
        with ablate_heads(model, every):
            written = cache_of(model, tokens).stack("attn_out")
        bias = model.b_O.detach()[:, None, None].expand_as(written)
        assert_close({str(changes): written}, {str(changes): bias})


def test_no_heads_neurons_or_layers_change_nothing():
    model, tokens = tiny_model(), tiny_tokens()
    logits = logits_of(model, tokens)
    for mode in MODES:
        how = how_to(model, mode)
        for nothing in (ablate_heads(model, [], **how), ablate_neurons(model, [], **how),
                        ablate_layers(model, [], "mlp", **how)):
            with nothing:
                assert torch.equal(logits_of(model, tokens), logits), mode


def test_resampling_from_the_same_row_changes_nothing():
    model, tokens = tiny_model(), tiny_tokens()
    cache, every = cache_of(model, tokens), list(itertools.product(range(2), range(3)))
    with ablate_heads(model, every, "resample", reference=cache, source=range(2)):
        inside = logits_of(model, tokens)
    assert_close(inside, logits_of(model, tokens), atol=1e-5, rtol=0)
    with ablate_heads(model, every, "resample", reference=cache, source=[1, 0]):
        assert not torch.allclose(logits_of(model, tokens), inside)


@pytest.mark.parametrize("changes, mode", CASES, ids=str)
def test_heads_get_the_value_of_the_mode_where_they_are_removed_and_no_other_does(changes, mode):
    model, tokens = in_double(**changes)
    for pos in (None, [-1], [2, 4]):
        how = how_to(model, mode, pos)
        with ablate_heads(model, HEADS, **how):
            assert_close(logits_of(model, tokens), naive(model, tokens, HEADS, how))


def test_a_position_may_be_one_a_slice_or_counted_from_the_end():
    model, tokens = in_double()
    intact = logits_of(model, tokens)
    with ablate_heads(model, HEADS):
        everywhere = logits_of(model, tokens)
    for pos, same in ((3, [3]), (slice(2, None), [2, 3, 4, 5, 6]), (-2, [5])):
        with ablate_heads(model, HEADS, pos=same):
            expected = logits_of(model, tokens)
        with ablate_heads(model, HEADS, pos=pos):
            logits = logits_of(model, tokens)
        assert torch.equal(logits, expected), pos
        assert torch.equal(logits[:, : same[0]], intact[:, : same[0]]), pos
        assert not torch.allclose(logits, everywhere), pos


def test_neurons_get_the_value_of_the_mode():
    model, tokens = in_double()
    neurons = [(0, 7), (1, 0), (1, 47)]
    found, expected = {}, {}
    for mode, layer in itertools.product(MODES, range(2)):
        how = how_to(model, mode)
        with ablate_neurons(model, neurons, **how):
            cache = cache_of(model, tokens)
        post = model.blocks[layer].mlp.activation(cache["pre", layer]).detach()
        gone = [neuron for at, neuron in neurons if at == layer]
        post[..., gone] = value_of(how, get_act_name("post", layer))[..., gone]
        found[mode, layer] = cache["mlp_out", layer]
        expected[mode, layer] = post @ model.W_out[layer].detach() + model.b_out[layer].detach()
    assert_close(found, expected)


def test_a_layer_writes_the_value_of_the_mode_alone():
    model, tokens = in_double()
    intact = cache_of(model, tokens)
    found, expected = {}, {}
    for mode, part in itertools.product(MODES, ["attn", "mlp"]):
        how = how_to(model, mode)
        with ablate_layers(model, [1], part, **how):
            cache = cache_of(model, tokens)
        before = cache["resid_pre", 1] if part == "attn" else cache["resid_mid", 1]
        after = cache["resid_mid", 1] if part == "attn" else cache["resid_post", 1]
        found[mode, part] = after - before
        expected[mode, part] = value_of(how, get_act_name(f"{part}_out", 1))
        assert torch.equal(cache["resid_post", 0], intact["resid_post", 0]), (mode, part)
    assert_close(found, expected)


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


def test_the_model_is_restored_after_an_exception_in_the_body():
    model, tokens = tiny_model(), tiny_tokens()
    before, logits = copy.deepcopy(model.state_dict()), logits_of(model, tokens)
    with pytest.raises(ZeroDivisionError), ablate_heads(model, HEADS), ablate_neurons(
            model, [(0, 3)]), ablate_layers(model, [1]):
        assert not torch.allclose(logits_of(model, tokens), logits)
        1 / 0  # noqa: B018
    assert_nothing_is_left_on(model)
    assert torch.equal(logits_of(model, tokens), logits)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_ablated_model_can_be_trained_and_the_removed_head_gets_no_gradient():
    model, tokens = tiny_model(), tiny_tokens()
    with ablate_heads(model, [(1, 2)], "mean", reference=cache_of(model, tokens)):
        next_token_loss(model(tokens), tokens).backward()
    attn = model.blocks[1].attn
    gradient = attn.W_QKV.grad.unflatten(1, (3, 3, 4)).abs().sum((0, 1, 3))  # [head]
    assert gradient[2] == 0 and gradient[:2].min() > 0


def test_a_derangement_has_no_fixed_point_and_every_row_once():
    for n in (2, 3, 4, 7, 30, 501):
        generator = seeded_generator(n)
        for _ in range(20):
            order = derangement(n, generator)
            assert not (order == torch.arange(n)).any(), f"of {n} rows one takes from itself"
            assert torch.equal(order.sort().values, torch.arange(n)), f"of {n} rows one is missing"


def test_every_derangement_is_drawn_equally_often():
    generator = seeded_generator(0)
    drawn = [tuple(derangement(4, generator).tolist()) for _ in range(4500)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 9  # of the 24 orders of four
    assert max(abs(count - 500) for count in counts) < 4 * (4500 * 1 / 9 * 8 / 9) ** 0.5


# Measuring


@pytest.mark.parametrize("changes, mode", CASES, ids=str)
def test_the_importance_of_each_head_is_that_of_the_naive_loop(changes, mode):
    model, tokens = in_double(**changes)
    how = how_to(model, mode)
    without = {(layer, head): naive(model, tokens, [(layer, head)], how)
               for layer in range(model.cfg.n_layers) for head in range(3)}
    for metric in (None, DIFF):
        measure = metric or loss_of(tokens)
        intact = measure(logits_of(model, tokens))
        effects = head_importance(model, tokens, metric, **how)
        assert effects.values.shape == (model.cfg.n_layers, 3, 2)
        assert_close({head: effects.values[head] for head in without},
                     {head: measure(logits) - intact for head, logits in without.items()})


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


def slope_of_each_head(model, tokens):
    """[layer, head, row], the slope of each row's loss as z shrinks: a backward pass a row."""
    slopes = torch.zeros(model.cfg.n_layers, 3, len(tokens), dtype=torch.float64)
    for layer, row in itertools.product(range(model.cfg.n_layers), range(len(tokens))):
        alive = []

        def keep(z, hook, alive=alive):
            alive.append(z.detach().requires_grad_())
            return alive[0]

        text = tokens[row : row + 1]
        loss = next_token_loss(
            model.run_with_hooks(text, [(get_act_name("z", layer), keep)]), text)
        slope = torch.autograd.grad(loss, alive)[0]
        slopes[layer, :, row] = -(alive[0] * slope).sum((0, 1, 3)).detach()
    return slopes


def test_the_gradient_importance_is_that_of_a_derivative_taken_row_by_row():
    for changes in SHAPES:
        model, tokens = in_double(**changes)
        slopes = slope_of_each_head(model, tokens)
        size = slopes.abs().mean(-1)
        found = {
            "slopes": head_slopes(model, tokens).values,
            "importance": head_importance_gradient(model, tokens),
            "normalised": head_importance_gradient(model, tokens, normalised=True)}
        expected = {"slopes": slopes, "importance": size,
                    "normalised": size / size.pow(2).sum(1, keepdim=True).sqrt()}
        assert_close({str(changes): found}, {str(changes): expected})
        assert_nothing_is_left_on(model)


def test_where_the_metric_is_linear_the_gradient_is_the_effect_of_the_ablation():
    model, tokens = in_double(**LINEAR)
    gradient = head_importance_gradient(model, tokens, DIFF)
    effects = head_importance(model, tokens, DIFF).values
    assert_close(gradient[-1], effects[-1].abs().mean(-1))
    assert_close(head_slopes(model, tokens, DIFF).values[-1], effects[-1])
    assert effects[-1].prod(-1).min() < 0  # the absolute value of the mean would not do
    assert not torch.allclose(gradient[0], effects[0].abs().mean(-1), rtol=0.05)


def test_the_interaction_of_two_heads_equals_three_naive_ablations():
    model, tokens = in_double()
    heads = [(1, 2), (0, 1), (1, 0), (0, 0)]  # in no order
    measure = loss_of(tokens)
    intact = measure(logits_of(model, tokens))
    for mode in MODES:
        how = how_to(model, mode)
        interaction = pairwise_interaction(model, tokens, heads, **how).values
        alone = [measure(naive(model, tokens, [head], how)) - intact for head in heads]
        found, expected = {}, {}
        for i, j in itertools.combinations_with_replacement(range(4), 2):
            both = measure(naive(model, tokens, [heads[i], heads[j]], how)) - intact
            found[mode, heads[i], heads[j]] = interaction[i, j]
            expected[mode, heads[i], heads[j]] = both - alone[i] - alone[j]
        assert_close(found, expected)
        assert torch.equal(interaction, interaction.transpose(0, 1)), "not symmetric"


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


@pytest.mark.parametrize("changes, mode", CASES, ids=str)
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


def test_the_direct_effect_is_the_loss_in_the_row_of_the_head_in_the_attribution():
    for changes in SHAPES:
        model, tokens = in_double(**changes)
        attr, labels = direct_logit_attribution(
            model, cache_of(model, tokens), torch.tensor([3, 4]), torch.tensor([5, 0]), unit="head")
        direct = {head: self_repair(model, tokens, head, DIFF).direct for head in HEADS}
        rows = {(layer, head): -attr[labels.index(f"L{layer}H{head}")] for layer, head in HEADS}
        assert_close({str(changes): direct}, {str(changes): rows})


def test_only_the_final_layer_norm_repairs_the_last_write():
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
        assert_nothing_is_left_on(model)


# What is refused


def refusal(model, ablation):
    """The message of the UserError for an impossible request, at once or in the first forward."""
    with pytest.raises(UserError) as found, ablation():
        logits_of(model, tiny_tokens())
    assert_nothing_is_left_on(model)
    return str(found.value)


def test_missing_heads_and_modes_without_their_arguments_are_refused():
    model = tiny_model()
    for heads, how, told in (
            ([(2, 0)], {}, "head (2, 0)"), ([(0, 3)], {}, "head (0, 3)"),
            ([(-1, 0)], {}, "head (-1, 0)"), ([(0, -1)], {}, "head (0, -1)"),
            ((0, 1), {}, "[0, 1]"), ([(0, 1, 2)], {}, "[(0, 1, 2)]"),
            (["L0H1"], {}, "['L0H1']"), ([(0.5, 1)], {}, "[(0.5, 1)]"),
            ([], {"mode": "median"}, "mode='median'"), ([], {"mode": "mean"}, "a reference"),
            ([], {"mode": "resample"}, "a reference")):
        assert told in refusal(model, lambda on=heads, how=how: ablate_heads(model, on, **how))


def test_a_reference_that_does_not_fit_is_refused_with_its_shape():
    model = tiny_model()
    for mode, of, source, told in (
            ("resample", {}, None, ("needs source",)),
            ("resample", {}, [0, 2], ("0 to 2", "0 to 1")),
            ("resample", {}, [-1, 0], ("-1 to 0",)),
            ("resample", {}, [1], ("[1, 7, 3, 4]", "[2, 7, 3, 4]")),
            ("resample", {"pos": 6}, [1, 0], ("[2, 6, 3, 4]", "[2, 7, 3, 4]")),
            ("mean_pos", {"pos": 6}, None, ("[1, 6, 3, 4]", "[1, 7, 3, 4]")),
            ("mean_pos", {"pos": 1}, None, ("[1, 1, 3, 4]", "[1, 7, 3, 4]"))):
        how = {"mode": mode, "reference": cache_of(model, tiny_tokens(**of)), "source": source}
        found = refusal(model, lambda how=how: ablate_heads(model, HEADS, **how))
        assert all(part in found for part in told), found


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
    with pytest.raises(UserError, match="hook_z was not cached; add it"):
        ablate_heads(model, HEADS, "mean", reference=kept)


def test_missing_neurons_layers_and_positions_are_refused():
    model = tiny_model()
    for ablation, told in (
            (lambda: ablate_neurons(model, [(0, 48)]), "neuron (0, 48)"),
            (lambda: ablate_layers(model, [2], "mlp"), "mlp (2, 0)"),
            (lambda: ablate_layers(model, [0], "head"), "part='head'"),
            (lambda: ablate_heads(model, HEADS, pos=7), "pos=7"),
            (lambda: ablate_heads(model, HEADS, pos=[True] + [False] * 6), "nonzero"),
            (lambda: ablate_heads(model, HEADS, pos=[[1], [2]]), "pos is [2, 1]")):
        assert told in refusal(model, ablation)


def test_a_model_without_mlps_has_no_neurons_to_remove():
    model = tiny_model(attn_only=True)
    assert "no neurons" in refusal(model, lambda: ablate_neurons(model, [(0, 0)]))
    assert "part='mlp'" in refusal(model, lambda: ablate_layers(model, [0], "mlp"))


def test_impossible_measurements_are_refused():
    model, tokens = tiny_model(), tiny_tokens()
    flat, random = tiny_model(n_layers=0), tiny_model(dropout=0.1).train()
    for measure, told in (
            (lambda: pairwise_interaction(model, tokens, []), "no heads"),
            (lambda: ablation_effects(model, tokens, []), "no heads"),
            (lambda: head_importance(flat, tokens), "n_layers=0"),
            (lambda: head_importance_gradient(flat, tokens), "n_layers=0"),
            (lambda: head_importance(model, tokens[:, :1]), "one token"),
            (lambda: head_importance(model, tiny_tokens(3), DIFF), "3 rows"),
            (lambda: head_importance(random, tokens), "eval()"),
            (lambda: head_importance_gradient(
                model, tokens, lambda logits: logits[:, -1].argmax(-1).double()), "no gradient"),
            (lambda: derangement(0, seeded_generator(0)), "n=0"),
            (lambda: derangement(1, seeded_generator(0)), "n=1")):
        with pytest.raises(UserError) as found:
            measure()
        assert told in str(found.value)


def test_hooks_at_the_last_layer_norm_have_all_positions_whatever_the_metric_looks_at():
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens()
    metric = Metric(lambda chosen: chosen[..., 0, 1] - chosen[..., 1, 2], [2, 5])
    edit = ("ln_final.hook_normalized", lambda t, hook: t * (1 + torch.arange(7)[:, None]))
    with torch.no_grad(), model.hooks([edit]):
        rise = ablation_effects(model, tokens, [[(0, 0)]], metric).values[0]
        intact = metric(model(tokens))
        with ablate_heads(model, [(0, 0)]):
            assert_close(rise, metric(model(tokens)) - intact)
