"""Transcoders and answers split into features: sums, naive loops, and false claims."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

from experiments.dictionaries.model import KINDS, DictionaryRecipe
from experiments.dictionaries.transcoders.measure import (
    GiftSubject,
    explained_by_linear_map,
    load_gift_subject,
    measure_transcoders,
    shuffled_r,
    slope_through_0,
)
from experiments.dictionaries.transcoders.model import (
    FrozenRun,
    fit_transcoder,
    read_and_written,
    reading_point,
    transcoder_quality,
)
from experiments.dictionaries.transcoders.report import transcoder_claims, transcoder_figure
from experiments.wired.model import Pairs
from losses import next_token_loss
from metrics import Metric
from utils import seeded_generator

LATENTS = 20
ANSWER = Metric.logit_diff(3, 5)


def random_transcoder(kind="TopK", seed=0, dtype=torch.float32, d_model=12):
    """A transcoder with random values in every tensor; about half of its latents are active."""
    generator = seeded_generator(seed)
    recipe = DictionaryRecipe(kind, LATENTS // 2, LATENTS)
    transcoder = recipe.fresh(d_model, d_model, generator)
    for name, tensor in transcoder.tensors().items():
        value = 0.5 * torch.randn(tensor.shape, generator=generator)
        if "threshold" in name:
            value = torch.full_like(tensor, 0.05 if name == "threshold" else -3.0)
        setattr(transcoder, name, value.to(dtype).requires_grad_())
    return transcoder


def frozen_run(layers=(0, 1), kind="TopK", dtype=torch.float32, **changes):
    """The run of a tiny random model on a prompt of 7 tokens, with random transcoders."""
    transcoders = {layer: random_transcoder(kind, layer, dtype) for layer in layers}
    return FrozenRun(tiny_model(dtype=dtype, **changes), transcoders, tiny_tokens(1), ANSWER)


VARIANTS = {
    "as it is": {},
    "one transcoder": {"layers": (0,)},
    "the last MLP's": {"layers": (1,)},
    "no LayerNorm": {"norm": "none"},
    "no positions": {"positions": "none"},
    "tied": {"tie_embeddings": True, "unembed_bias": True},
    "no attention biases": {"attn_bias": False},
    "three layers": {"n_layers": 3, "layers": (0, 1, 2)},
} | {kind: {"kind": kind} for kind in KINDS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_nodes_sum_to_the_answer(variant):
    for dtype, within in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        run = frozen_run(dtype=dtype, **VARIANTS[variant])
        answer = ANSWER(run.model(run.tokens)).item()
        parts = run.contributions()
        assert parts.value == pytest.approx(answer, abs=within)
        assert parts.sum() == pytest.approx(answer, abs=within), f"{variant}, {dtype}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_incoming_edges_and_biases_sum_to_a_features_pre_activation(variant):
    for dtype, within in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        run = frozen_run(dtype=dtype, **VARIANTS[variant])
        layer = max(run.transcoders)
        pre = run.transcoders[layer].pre(run.reading(layer))  # [pos, latent]
        for pos, latent in ((0, 3), (4, 7), (6, 19)):
            parts = run.incoming(layer, pos, latent)
            assert parts.sum() == pytest.approx(pre[pos, latent].item(), abs=within), variant


def test_nothing_later_has_an_edge_into_a_feature():
    parts = frozen_run(n_layers=3, layers=(0, 1, 2)).incoming(1, 4, 7)
    assert parts.features[0][:5].any() and not parts.features[0][5:].any()
    assert not parts.features[1].any() and not parts.features[2].any()
    assert not parts.errors[1].any() and not parts.tokens[5:].any()
    assert not any(name.startswith(("blocks.2", "ln_final")) for name in parts.biases)


@pytest.mark.parametrize("keep", ["writes", "features"])
def test_predicted_effects_equal_those_of_removing_features_from_the_frozen_model(keep):
    run = frozen_run(dtype=torch.float64, n_layers=3, layers=(0, 1, 2))
    predicted = run.direct_effects() if keep == "writes" else run.total_effects()
    for layer in range(3):
        places = run.active_places(layer)
        expected = predicted[layer][places[:, 1], places[:, 2]]
        assert_close(run.removal_effects(places, keep), expected, atol=1e-10, rtol=0)


def test_keeping_active_features_replaces_each_mlp_by_its_transcoder_plus_its_error():
    # by hand, hook by hook: z = reading W_enc + b_enc where it was active, and 0 elsewhere
    run = frozen_run(dtype=torch.float64)
    place = run.active_places(0)[:1]
    [(_, pos, latent)] = place.tolist()
    first, second = run.transcoders[0], run.transcoders[1]
    hooks = [(name, lambda tensor, hook: run.cache[hook.name]) for name in run.cache
             if name.endswith(("hook_pattern", "hook_scale"))]
    seen = []

    def without_the_feature(written, hook):
        z = run.features[0].clone()
        z[pos, latent] = 0
        return (first.decode(z) + run.errors[0])[None]

    def rewritten(written, hook):
        z = (seen[0] @ second.W_enc + second.b_enc) * (run.features[1] > 0)
        return second.decode(z) + run.errors[1]

    hooks += [("blocks.0.hook_mlp_out", without_the_feature),
              ("blocks.1.ln2.hook_normalized", lambda reading, hook: seen.append(reading)),
              ("blocks.1.hook_mlp_out", rewritten)]
    with torch.no_grad():
        left = ANSWER(run.model.run_with_hooks(run.tokens, hooks)).item()
    effect = run.removal_effects(place, "features").item()
    assert effect == pytest.approx(run.value - left, abs=1e-10)
    assert effect != pytest.approx(run.removal_effects(place, "writes").item(), abs=1e-3)


def test_removing_a_feature_from_the_model_itself_equals_a_naive_loop():
    run = frozen_run()
    for layer in (0, 1):
        places = run.active_places(layer)[:4]
        naive = []
        for _, pos, latent in places.tolist():
            def without(written, hook, pos=pos, latent=latent, layer=layer):
                written = written.clone()
                written[0, pos] -= (run.features[layer][pos, latent]
                                    * run.transcoders[layer].W_dec[latent])
                return written

            logits = run.model.run_with_hooks(run.tokens,
                                              [(f"blocks.{layer}.hook_mlp_out", without)])
            naive.append(run.value - ANSWER(logits).item())
        assert_close(run.removal_effects(places), torch.tensor(naive), atol=1e-5, rtol=1e-4)


def test_in_a_model_without_nonlinearities_the_predictions_are_exact():
    # one layer, no LayerNorm: an MLP's feature goes straight to the logits
    run = frozen_run(layers=(0,), n_layers=1, norm="none", dtype=torch.float64)
    places = run.active_places(0)
    assert places[:, 1].unique().tolist() == [6], "only the last position reaches the answer"
    expected = run.direct_effects()[0][6, places[:, 2]]
    assert_close(run.removal_effects(places), expected, atol=1e-10, rtol=0)


def test_the_error_share_is_zero_for_an_exact_transcoder_and_one_for_a_silent_one():
    run = frozen_run(layers=(0,))
    mlp = run.contributions().errors[1]  # has no transcoder
    assert_close(mlp, (run.cache["mlp_out", 1][0] * run.slopes(
        lambda logits, readings: ANSWER(logits).sum(), "writes")[1]["blocks.1.hook_mlp_out"]
        ).sum(-1))
    for layer in (0, 1):
        assert exact_relu_run(layer).contributions().error_share < 1e-5
    silent = random_transcoder()
    silent.b_enc = silent.b_enc - 100
    empty = FrozenRun(run.model, {0: silent, 1: silent}, run.tokens, ANSWER).contributions()
    assert empty.error_share == 1


def exact_relu_run(layer):
    """The run of a model with `layer` + 1 layers, whose ReLU neurons are the latents."""
    model = tiny_model(n_layers=layer + 1, activation="relu")
    transcoders = {}
    for index, block in enumerate(model.blocks):
        mlp = block.mlp
        transcoder = DictionaryRecipe("ReLU + L1", 0.0, model.cfg.d_mlp).fresh(
            12, 12, seeded_generator(0))
        transcoder.W_enc = block.ln2.w[:, None] * mlp.W_in
        transcoder.b_enc = block.ln2.b @ mlp.W_in + mlp.b_in
        transcoder.W_dec, transcoder.b_dec = mlp.W_out, mlp.b_out
        transcoders[index] = transcoder
    return FrozenRun(model, transcoders, tiny_tokens(1), ANSWER)


# Fitting, and how well


def test_a_transcoder_learns_an_mlp_and_an_untrained_one_does_not():
    model = tiny_model(norm="none", n_layers=1)
    tokens = tiny_tokens(64)
    recipe = DictionaryRecipe("TopK", 6, 48, steps=400, batch=64)
    trained = fit_transcoder(model, tokens, 0, recipe, seed=0)
    untrained = fit_transcoder(model, tokens, 0, replace(recipe, steps=0), seed=0)
    good, bad = (transcoder_quality(model, {0: transcoder}, tokens)
                 for transcoder in (trained, untrained))
    assert good["fit"][0]["explained"] > 0.8 > 0.2 > bad["fit"][0]["explained"]
    assert good["fit"][0]["L0"] <= 6


def test_losses_of_quality_equal_a_naive_replacement():
    model = tiny_model()
    tokens = tiny_tokens(5)
    transcoders = {layer: random_transcoder("BatchTopK", layer) for layer in (0, 1)}
    quality = transcoder_quality(model, transcoders, tokens)

    # block by block, by the equations
    def loss_with(write):
        with torch.no_grad():
            resid = model.embed(tokens)
            for layer, block in enumerate(model.blocks):
                normalized = block.ln1(resid)
                resid = resid + block.attn(normalized, normalized, normalized)
                read = resid - resid.mean(-1, keepdim=True)
                read = read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                resid = resid + write(layer, read)
            return next_token_loss(model.unembed(resid), tokens).item()

    mean = {layer: read_and_written(model, tokens, layer)[1].mean((0, 1)) for layer in (0, 1)}
    replaced = {
        "transcoder": lambda layer, read: transcoders[layer].decode(
            transcoders[layer].encode(read)),
        "mean": lambda layer, read: mean[layer],
        "zero": lambda layer, read: 0,
    }
    for name, write in replaced.items():
        assert quality["loss"][name] == pytest.approx(loss_with(write), abs=1e-5), name
    loss = quality["loss"]
    assert loss["intact"] == pytest.approx(next_token_loss(model(tokens), tokens).item(), abs=1e-5)
    for mode in ("mean", "zero"):
        lost = loss[mode] - loss["intact"]
        given_back = loss[mode] - loss["transcoder"]
        assert quality["recovered"][mode] == pytest.approx(given_back / lost, rel=1e-5), mode


def test_a_transcoder_reads_what_its_mlp_reads():
    for norm in ("layernorm", "none"):
        model = tiny_model(norm=norm)
        reading, written = read_and_written(model, tiny_tokens(), 1)
        block = model.blocks[1]
        if norm == "layernorm":
            reading = reading * block.ln2.w + block.ln2.b
        assert_close(block.mlp(reading), written)


def test_wrong_arguments_are_refused_in_a_line_that_names_them():
    model = tiny_model()
    run = frozen_run(layers=(0,))
    bad = {
        "attn_only": lambda: reading_point(tiny_model(attn_only=True), 0),
        "layer": lambda: reading_point(model, 2),
        "layer=-1": lambda: fit_transcoder(model, tiny_tokens(), -1, None, 0),
        "layer=7": lambda: FrozenRun(model, {7: random_transcoder()}, tiny_tokens(1), ANSWER),
        "[2, 7]": lambda: FrozenRun(model, {}, tiny_tokens(2), ANSWER),
        "layer 1": lambda: run.incoming(1, 0, 0),
        "pos=7": lambda: run.incoming(0, 7, 0),
        "latent=20": lambda: run.incoming(0, 0, 20),
        "keep": lambda: run.removal_effects(run.active_places(0), "all of it"),
    }
    for named, call in bad.items():
        message = refusal(call, named)
        assert named in message and "\n" not in message, message


def test_each_way_keeps_its_own_parts_of_the_clean_run_and_nothing_else():
    run = frozen_run(n_layers=3, layers=(0, 1))
    place = run.active_places(0)[:1]
    [(_, pos, latent)] = place.tolist()
    kept = {"scales": ["hook_scale"], "patterns": ["hook_pattern"], "nothing": [],
            "patterns and scales": ["hook_scale", "hook_pattern"],
            "writes": ["hook_scale", "hook_pattern", "hook_mlp_out"]}

    def without(written, hook):
        gone = torch.zeros_like(written)
        gone[0, pos] = run.features[0][pos, latent] * run.transcoders[0].W_dec[latent]
        return written - gone

    effects = {}
    for keep, endings in kept.items():
        names = [name for name in run.cache if name.endswith(tuple(endings))]
        hooks = [(name, lambda tensor, hook: run.cache[hook.name]) for name in names]
        with torch.no_grad():
            logits = run.model.run_with_hooks(run.tokens, [*hooks, ("blocks.0.hook_mlp_out",
                                                                    without)])
        effects[keep] = run.removal_effects(place, keep).item()
        assert effects[keep] == pytest.approx(run.value - ANSWER(logits).item(), abs=1e-5), keep
    assert len({round(effect, 4) for effect in effects.values()}) == len(kept), effects


# Claims


RECIPE = DictionaryRecipe("TopK", 4, LATENTS, steps=20, batch=64)


@pytest.fixture(scope="module")
def measured():
    """The measures of a tiny model of random weights, with transcoders that learned little."""
    pairs = Pairs(tiny_tokens(3), tiny_tokens(3), torch.arange(3), torch.arange(3) + 1)
    subject = GiftSubject(tiny_model(), tiny_tokens(40), tiny_tokens(20, seed=3), pairs)
    return measure_transcoders(subject, 0, RECIPE)


def as_trained(measured):
    """A copy with the numbers of transcoders for which all claims hold."""
    good = copy.deepcopy(measured)
    for layer in (0, 1):
        good["quality"]["fit"][layer]["explained"] = 0.95
    good["quality"]["recovered"] = {"mean": 0.99, "zero": 0.99}
    good["gifts"]["error_share"] = 0.05
    good["gifts"]["r"]["patterns and scales"][0] = 0.95
    good["gifts"]["slope"]["patterns and scales"][0] = 0.97
    good["gifts"]["slope"]["nothing"][0] = 0.6
    return good


def failed(*results, judged=True):
    return [each.claim for each in transcoder_claims(results, judged) if each.holds is False]


def test_for_badly_trained_transcoders_sums_hold_and_claims_on_learning_fail(measured):
    for layer in (0, 1):
        trained, untrained = (one["quality"]["fit"][layer]["explained"]
                              for one in (measured, measured["untrained"]))
        assert untrained < trained < 0.9
    wrong = failed(measured)
    assert not any("largest" in claim for claim in wrong), "sums are exact for any transcoder"
    for words in ("variance", "error nodes"):
        assert any(words in claim for claim in wrong), words
    assert failed(measured, judged=False) == []


def test_each_claim_fails_where_its_number_is_wrong_in_one_seed_or_in_most(measured):
    good = as_trained(measured)
    assert failed(good, good) == []
    breaks = {
        "nodes' sum": lambda one: one["gifts"]["gaps"].update(answer=2e-4),
        "incoming": lambda one: one["gifts"]["gaps"].update(incoming=2e-5),
        "linear model": lambda one: one["gifts"]["gaps"].update(total=2e-4),
        "variance": lambda one: one["quality"]["fit"][1].update(explained=0.5),
        "loss recovered": lambda one: one["quality"]["recovered"].update(mean=0.9),
        "error nodes": lambda one: one["gifts"].update(error_share=0.3),
        "patterns and scales kept: r": lambda one: one["gifts"]["r"]["patterns and scales"].update(
            {0: 0.85}),
    }
    for words, break_ in breaks.items():
        bad = as_trained(measured)
        break_(bad)
        assert [words in claim for claim in failed(good, bad, bad)] == [True], words
        of_median = words.startswith(("error", "patterns"))
        assert [words in claim for claim in failed(good, good, bad)] == [True] * (not of_median)


def test_a_correlation_below_that_of_shuffled_features_fails(measured):
    good = as_trained(measured)
    good["gifts"]["null"][0] = 0.96
    assert ["r" in claim for claim in failed(good)] == [True]


def test_shuffling_is_within_each_gift_and_destroys_the_correlation_there():
    generator = seeded_generator(0)
    predicted = [torch.randn(50, generator=generator) for _ in range(8)]
    measured = torch.cat(predicted)
    assert abs(shuffled_r(predicted, measured, 0)) < 0.2
    # gifts that differ in their mean alone: shuffling within them changes nothing
    between = [torch.full((5,), float(mean)) for mean in range(3)]
    assert shuffled_r(between, torch.cat(between), 0) == pytest.approx(1)


def test_effects_twice_as_large_as_predicted_have_slope_2():
    predicted = torch.tensor([1.0, 1.0, -1.0])
    assert slope_through_0(predicted, torch.tensor([1.0, 3.0, -2.0])) == pytest.approx(2)
    assert slope_through_0(predicted, predicted + 5) == pytest.approx(1 + 5 / 3), "no intercept"


def test_the_shares_of_an_answer_sum_to_one(measured):
    assert sum(measured["gifts"]["shares"].values()) == pytest.approx(1, abs=1e-4)


def test_the_linear_map_explains_a_linear_mlp_and_not_a_nonlinear_one():
    model = tiny_model(activation="relu", n_layers=1, norm="none")
    subject = GiftSubject(model, tiny_tokens(60), tiny_tokens(20, seed=3), None)
    bent = explained_by_linear_map(subject, 0)
    with torch.no_grad():
        model.blocks[0].mlp.b_in.add_(1000)  # every neuron is always on
    assert bent < 0.95 < 0.999 < explained_by_linear_map(subject, 0)


@pytest.mark.slow
def test_in_a_quick_run_only_the_sums_have_a_verdict(tmp_path):
    cfg = SimpleNamespace(quick=True, prompts=3, out_dir=str(tmp_path), retrain=False)
    subject, again = (load_gift_subject(cfg, tmp_path, 0) for _ in range(2))
    assert torch.equal(subject.model.W_in, again.model.W_in), "the second one is read, not trained"
    held_out = {tuple(row.tolist()) for row in subject.held_out}
    assert not held_out & {tuple(row.tolist()) for row in subject.tokens}

    one = measure_transcoders(subject, 0, RECIPE)
    verdicts = {each.claim: each.holds for each in transcoder_claims([one], judged=False)}
    assert sorted(verdicts.values(), key=str) == [None] * (len(verdicts) - 3) + [True] * 3
    for axes, way in zip(transcoder_figure(one).axes, ("patterns and scales", "nothing"),
                         strict=True):
        drawn = [len(points.get_offsets()) for points in axes.collections]
        assert drawn == [len(effects[way]) for effects in one["gifts"]["effects"].values()]
