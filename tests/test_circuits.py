"""Circuits: each run against a plain loop over the weights, each score against exact effects."""

import math

import pytest
import torch
from helpers import TINY, WIDE, one_number_model, tiny_model, tiny_tokens
from torch.testing import assert_close

from circuits import (
    Circuit,
    CircuitRun,
    acdc,
    approximation_report,
    completeness,
    eap,
    exact_edge_scores,
    faithfulness,
    minimality,
)
from config import ModelConfig
from head_ablation import MODES, ablate_heads
from losses import kl_divergence
from metrics import Metric
from model import GPT
from utils import UserError, seeded_generator

SHAPES = [{}, {"tie_embeddings": True, "unembed_bias": True}, {"attn_only": True},
          {"norm": "none", "positions": "sinusoidal"}, {"n_layers": 0},
          {"positions": "none", "attn_bias": False, "n_layers": 1, "activation": "relu"},
          {"attn_only": True, "norm": "none", "positions": "none", "n_layers": 3},
          {**WIDE, "d_vocab_out": 13}]
CASES = [*(({}, mode) for mode in MODES), *zip(SHAPES[1:], 2 * MODES, strict=False)]
CLEAN = tiny_tokens(batch=3)
CORRUPT = (CLEAN + 1 + tiny_tokens(batch=3, seed=9, d_vocab=10)) % 11  # another token everywhere
DIFF = Metric.logit_diff([3, 4, 1], [5, 0, 2])
each_shape = pytest.mark.parametrize("changes", SHAPES, ids=str)


def tiny(**changes):
    return tiny_model(dtype=torch.float64, **changes)


def random_circuit(model, share=0.5, seed=4):
    edges = Circuit.of(model).edges()
    kept = torch.rand(len(edges), generator=seeded_generator(seed)) < share
    return Circuit.of(model, [edge for edge, keep in zip(edges, kept, strict=True) if keep])


# The oracle: the model as a loop over its weights, each reader adding up what it is given


@torch.no_grad()
def naive_writes(model, tokens, edges=None, other=None):
    """{node: what it writes} and the logits, when each reader reads the writes of this run along
    `edges`, and those in `other`, {node: write}, along all others."""
    cfg = model.cfg
    writes = {}
    biases = 0
    embed = model.W_E[tokens]
    if cfg.positions != "none":
        embed = embed + model.W_pos[: tokens.shape[1]]
    writes["embed"] = embed

    def read(reader, n_written):
        total = 0
        for node in list(writes)[:n_written]:
            present = edges is None or (node, reader) in edges
            total = total + (writes[node] if present else other[node])
        return total + biases

    def normalise(norm, resid):
        if cfg.norm == "none":
            return resid
        centred = resid - resid.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + cfg.norm_epsilon).sqrt() * norm.w + norm.b

    for layer, block in enumerate(model.blocks):
        attn, n_written = block.attn, len(writes)
        for head in range(cfg.n_heads):
            q, k, v = (normalise(block.ln1, read(f"L{layer}H{head}.{letter}", n_written)) for letter
                       in "qkv")
            q, k, v = (q @ attn.W_Q[head] + attn.b_Q[head], k @ attn.W_K[head] + attn.b_K[head],
                       v @ attn.W_V[head] + attn.b_V[head])
            odds = (q @ k.mT / math.sqrt(cfg.d_head)).exp().tril()
            writes[f"L{layer}H{head}"] = odds / odds.sum(-1, keepdim=True) @ v @ attn.W_O[head]
        biases = biases + attn.b_O
        if not cfg.attn_only:
            mlp = block.mlp
            resid = normalise(block.ln2, read(f"L{layer}.mlp", len(writes)))
            post = mlp.activation(resid @ mlp.W_in + mlp.b_in)
            writes[f"L{layer}.mlp"] = post @ mlp.W_out + mlp.b_out
    final = normalise(model.ln_final, read("logits", len(writes)))
    return writes, final @ model.W_U + model.b_U


def naive_other(model, mode):
    writes, _ = naive_writes(model, CORRUPT)
    change = {"mean_pos": lambda write: write.mean(0, keepdim=True).expand_as(write),
              "mean": lambda write: write.mean((0, 1), keepdim=True).expand_as(write),
              "zero": torch.zeros_like, "resample": torch.clone}[mode]
    return {node: change(write) for node, write in writes.items()}


def naive_value(model, edges, mode="resample"):
    return DIFF(naive_writes(model, CLEAN, set(edges), naive_other(model, mode))[1])


# The graph


def test_the_edges_of_a_small_model_are_those_counted_by_hand():
    circuit = Circuit.of(tiny_model(n_layers=1, n_heads=1))
    assert set(circuit.edges()) == {
        ("embed", "L0H0.q"), ("embed", "L0H0.k"), ("embed", "L0H0.v"), ("embed", "L0.mlp"),
        ("L0H0", "L0.mlp"), ("embed", "logits"), ("L0H0", "logits"), ("L0.mlp", "logits")}
    assert circuit.nodes() == circuit.writers == ["embed", "L0H0", "L0.mlp"]
    assert circuit.readers == ["L0H0.q", "L0H0.k", "L0H0.v", "L0.mlp", "logits"]


def test_gpt2_small_has_the_number_of_edges_in_papers():
    cfg = ModelConfig(n_layers=12, n_heads=12, d_model=12, d_vocab=3, n_ctx=2)
    assert len(Circuit.of(GPT(cfg))) == 32_491


def test_a_circuit_without_parts_lacks_only_their_edges():
    full = Circuit.of(tiny_model())
    assert set(full.edges()) - set(full.without([("embed", "L1H0.k")]).edges()) == {
        ("embed", "L1H0.k")}
    gone = set(full.edges()) - set(full.without(["L0H1"]).edges())
    assert gone == {edge for edge in full.edges() if edge[0] == "L0H1" or edge[1][:5] == "L0H1."}
    gone = set(full.edges()) - set(full.without(["L1H2.v", "L0.mlp"]).edges())
    assert gone == {edge for edge in full.edges() if edge[1] == "L1H2.v" or "L0.mlp" in edge}
    without = full.without(["L1H0"])
    assert full.without(["L1H0", "L1H0"]).without(["L1H0"]).edges() == without.edges()
    assert len(full.without([])) == len(full) and not len(full.only([]))
    assert full.without(["L1H0"]).only(["L0H1"]).edges() == [
        edge for edge in full.edges()
        if "L0H1" in (edge[0], edge[1][:4]) and edge[1][:4] != "L1H0"]


def test_a_head_as_a_reader_is_its_three_inputs():
    circuit = Circuit.of(tiny_model(), [("L0H1", "L1H2"), ("embed", "L0.mlp")])
    assert set(circuit.edges()) == {("L0H1", "L1H2.q"), ("L0H1", "L1H2.k"), ("L0H1", "L1H2.v"),
                                    ("embed", "L0.mlp")}
    assert circuit.nodes() == ["embed", "L0H1"]


# Running a circuit


@pytest.mark.parametrize("changes, mode", CASES, ids=str)
def test_the_run_of_a_circuit_is_that_of_a_loop_over_the_weights(changes, mode):
    model = tiny(**changes)
    run = CircuitRun(model, CLEAN, CORRUPT, DIFF, mode=mode)
    other = naive_other(model, mode)
    for share in (0.3, 0.9):
        circuit = random_circuit(model, share)
        expected = naive_writes(model, CLEAN, set(circuit.edges()), other)[1]
        with torch.no_grad():
            assert_close(model.unembed(run.stream(circuit)), expected)
        assert_close(run.value(circuit), DIFF(expected))


def test_one_edge_alone_is_cut_or_kept_exactly():
    for changes in SHAPES:
        model = tiny(**changes)
        run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
        edges = run.full.edges()
        found, expected = {}, {}
        for edge in edges[:: max(1, len(edges) // 4)]:
            for how, circuit in (("without", run.full.without([edge])), ("alone", run.full.only([
                    edge]))):
                found[how, edge, str(changes)] = run.value(circuit)
                expected[how, edge, str(changes)] = naive_value(model, circuit.edges())
        assert_close(found, expected)


def test_all_edges_are_the_clean_run_and_none_the_corrupt_one():
    for changes in SHAPES:
        model = tiny(**changes)
        run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
        found = {"all": run.value(run.full), "none": run.value(run.full.only([]))}
        with torch.no_grad():
            expected = {"all": DIFF(model(CLEAN)), "none": DIFF(model(CORRUPT))}
        assert_close({str(changes): found}, {str(changes): expected})


def test_parts_without_a_cut_edge_stay_the_same_bit_for_bit():
    model = tiny_model()
    run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
    with torch.no_grad():  # fused arithmetic would differ by rounding
        logits, _ = model.run_with_cache(CLEAN, list(run.full.write_points))
        assert torch.equal(model.unembed(run.stream(run.full)), logits)
    before = run.writes.clone(), run.other.clone()
    run.value(random_circuit(model))
    assert torch.equal(before[0], run.writes) and torch.equal(before[1], run.other)


def test_the_mean_may_be_over_other_prompts_than_the_clean_ones():
    model = tiny()
    circuit = random_circuit(model)
    many = torch.cat([CORRUPT, tiny_tokens(batch=4, seed=6)])
    writes, _ = naive_writes(model, many)
    for mode, axes in (("mean_pos", (0,)), ("mean", (0, 1))):
        means = {node: write.mean(axes, keepdim=True).expand(1, 7, -1)
                 for node, write in writes.items()}
        expected = DIFF(naive_writes(model, CLEAN, set(circuit.edges()), means)[1])
        found = CircuitRun(model, CLEAN, many, DIFF, mode=mode).value(circuit)
        assert_close({mode: found}, {mode: expected})


def test_a_mode_of_a_circuit_is_the_ablation_of_that_name():
    """All edges of a head carry what `ablate_heads` puts in its place."""
    model = tiny(n_layers=3)
    with torch.no_grad():
        reference = model.run_with_cache(CORRUPT)[1]
    for mode in MODES:
        how = {"reference": reference, "source": [0, 1, 2]}
        with torch.no_grad(), ablate_heads(model, [(1, 2)], mode, **how):
            expected = DIFF(model(CLEAN))
        run = CircuitRun(model, CLEAN, CORRUPT, DIFF, mode=mode)
        assert_close({mode: run.value(run.full.without(["L1H2"]))}, {mode: expected})


def test_zero_needs_no_corrupt_prompts():
    model = tiny()
    circuit = random_circuit(model)
    assert_close(CircuitRun(model, CLEAN, None, DIFF, mode="zero").value(circuit),
                 naive_value(model, circuit.edges(), "zero"))


# Estimates


def sums_by_writer(scores):
    totals = dict.fromkeys(scores.full.writers, 0)
    for (writer, _), row in zip(scores.edges(), scores.values, strict=True):
        totals[writer] = totals[writer] + row
    return totals


@each_shape
def test_a_writer_s_edges_sum_to_the_first_order_effect_of_its_write(changes):
    # input(v) = sum of the writes before v, so dm/d(write of u) = sum over v of dm/d(input of v).
    model = tiny(**changes)
    totals = sums_by_writer(eap(model, CLEAN, CORRUPT, DIFF))
    clean, corrupt = (naive_writes(model, tokens)[0] for tokens in (CLEAN, CORRUPT))
    points = [name for name in model.hook_points()
              if name.endswith(("hook_result", "hook_mlp_out", "hook_embed"))]
    grads = model.gradient_cache(CLEAN, DIFF, points)[2]
    for node, total in totals.items():
        if node == "embed":
            slope = grads["hook_embed"]
        elif node.endswith("mlp"):
            slope = grads[f"blocks.{node[1]}.hook_mlp_out"]
        else:
            slope = grads[f"blocks.{node[1]}.attn.hook_result"][:, :, int(node[3:])]
        assert_close(total, ((corrupt[node] - clean[node]) * slope).sum((1, 2)))


def test_a_score_is_the_slope_along_its_edge():
    # The edge's write is moved a little towards the corrupt one, both ways, in the naive loop.
    for changes in SHAPES:
        model = tiny(**changes)
        scores = eap(model, CLEAN, CORRUPT, DIFF)
        clean, corrupt = (naive_writes(model, tokens)[0] for tokens in (CLEAN, CORRUPT))
        edges = scores.edges()
        found, expected = {}, {}
        for at in range(0, len(edges), max(1, len(edges) // 6)):
            present = set(edges) - {edges[at]}
            ends = []
            for step in (1e-4, -1e-4):
                moved = {node: clean[node] + step * (corrupt[node] - clean[node]) for node in clean}
                ends.append(DIFF(naive_writes(model, CLEAN, present, moved)[1]))
            found[edges[at], str(changes)] = scores.values[at]
            expected[edges[at], str(changes)] = (ends[0] - ends[1]) / 2e-4
        assert_close(found, expected, atol=1e-6, rtol=1e-5)


def last_layer_edges(model):
    """Where the logits depend linearly on the input: without LayerNorms, all that is read by the
    unembedding, and by the values of the last attention if no MLP comes after it."""
    last = model.cfg.n_layers - 1
    values = [f"L{last}H{head}.v" for head in range(3)] if model.cfg.attn_only else []
    return [edge for edge in Circuit.of(model).edges() if edge[1] in ("logits", *values)]


def test_a_score_is_exact_if_the_model_is_linear():
    for changes, n_edges in (({}, 9), ({"attn_only": True}, 7 + 3 * 4), ({"n_layers": 0}, 1)):
        model = tiny(norm="none", **changes)
        scores, edges = eap(model, CLEAN, CORRUPT, DIFF), last_layer_edges(model)
        exact = minimality(Circuit.of(model), model, CLEAN, CORRUPT, metric=DIFF,
                           parts=edges).values
        at = [scores.edges().index(edge) for edge in edges]
        assert_close({str(changes): scores.values[at]}, {str(changes): exact})
        assert len(edges) == n_edges and exact.abs().min() > 1e-4


def test_in_a_nonlinear_model_an_estimate_is_wrong():
    model = tiny()
    scores = eap(model, CLEAN, CORRUPT, DIFF)
    exact = minimality(Circuit.of(model), model, CLEAN, CORRUPT, metric=DIFF,
                       parts=scores.edges())
    assert (scores.values - exact.values).abs().max() > 0.1


def gradients_by_input(model, embed_edit):
    """{reader: [batch, pos, d_model]}, dm/d(its input) with an edited embedding."""
    full = Circuit.of(model)
    with model.hooks([("hook_embed", lambda embed, hook: embed + embed_edit)]):
        grads = model.gradient_cache(CLEAN, DIFF, list(full.read_points))[2]
    slopes = {}
    for name, where in full.read_points.items():
        for i, reader in enumerate(full.readers[where]):
            slopes[reader] = grads[name][:, :, i] if grads[name].ndim == 4 else grads[name]
    return slopes


def test_integrated_gradients_are_the_mean_over_the_path_from_the_clean_embedding():
    # One step: the gradient there alone. Two: its mean with that half way to the corrupt one.
    for changes in ({}, {"attn_only": True, "positions": "none"}, {"n_layers": 0}):
        model = tiny(**changes)
        with torch.no_grad():
            half = (model.W_E[CORRUPT] - model.W_E[CLEAN]) / 2
        at_clean, half_way = (gradients_by_input(model, edit) for edit in (0 * half, half))
        run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
        change = dict(zip(run.full.writers, run.other - run.writes, strict=True))
        one, two = (eap(model, CLEAN, CORRUPT, DIFF, ig_steps=steps) for steps in (1, 2))
        found, expected = {}, {}
        for i, (writer, reader) in enumerate(one.edges()):
            slopes = at_clean[reader], (at_clean[reader] + half_way[reader]) / 2
            for steps, scores, slope in zip((1, 2), (one, two), slopes, strict=True):
                found[steps, writer, reader] = scores.values[i]
                expected[steps, writer, reader] = (change[writer] * slope).sum((1, 2))
        assert_close(found, expected)
        assert torch.equal(one.values, eap(model, CLEAN, CORRUPT, DIFF).values)


def test_with_more_steps_the_embedding_s_edges_sum_to_the_whole_difference():
    model = tiny(n_layers=1)
    with torch.no_grad():
        difference = DIFF(model(CORRUPT)) - DIFF(model(CLEAN))
    gaps = [(sums_by_writer(eap(model, CLEAN, CORRUPT, DIFF, ig_steps=steps))["embed"]
             - difference).abs().max().item() for steps in (1, 10, 100)]
    assert gaps[0] > 0.1 and gaps[2] < 0.1 and gaps[2] < gaps[1] / 5 < gaps[0] / 5


def test_right_ends_are_the_left_ends_of_the_reversed_path():
    model = tiny()
    there = eap(model, CLEAN, CORRUPT, DIFF, ig_steps=3, rule="right")
    back = eap(model, CORRUPT, CLEAN, DIFF, ig_steps=3, rule="left")
    assert_close(there.values, -back.values)
    assert (there.values - eap(model, CLEAN, CORRUPT, DIFF, ig_steps=3).values).abs().max() > 0.1


def test_gauss_points_leave_no_gap_where_left_ends_leave_one():
    model = tiny(n_layers=1)
    with torch.no_grad():
        difference = DIFF(model(CORRUPT)) - DIFF(model(CLEAN))
    sums = {rule: sums_by_writer(eap(model, CLEAN, CORRUPT, DIFF, ig_steps=24, rule=rule))["embed"]
            for rule in ("left", "gauss")}
    gaps = {rule: (total - difference).abs().max().item() for rule, total in sums.items()}
    assert gaps["gauss"] < 0.01 < gaps["left"]


def test_scores_are_ranked_by_size_and_give_a_circuit():
    scores = eap(tiny(), CLEAN, CORRUPT, DIFF)
    top, by_edge = scores.top(5), dict(zip(scores.edges(), scores.mean.tolist(), strict=True))
    ranked = sorted(by_edge, key=lambda edge: -abs(by_edge[edge]))
    assert [(*edge, by_edge[edge]) for edge in ranked[:5]] == top
    assert {edge[2] < 0 for edge in top} == {True, False}
    assert set(scores.circuit(5).edges()) == set(ranked[:5])
    assert len(scores.top(0)) == 0 and len(scores.circuit(len(by_edge))) == len(by_edge)
    assert_close(scores.mean, scores.values.mean(1))


def test_prompts_do_not_affect_each_other():
    model = tiny()
    scores = eap(model, CLEAN, CORRUPT, DIFF, ig_steps=3)
    alone = eap(model, CLEAN[1:2], CORRUPT[1:2], Metric.logit_diff(4, 0), ig_steps=3)
    assert_close(scores.values[:, 1:2], alone.values)


def test_a_plain_function_of_the_logits_is_a_metric_too():
    model = tiny()

    def plain(logits):
        return logits[..., 2, 3] - logits[..., 2, 5]

    third = Metric.logit_diff(3, 5, pos=2)
    assert_close(eap(model, CLEAN, CORRUPT, plain).values,
                 eap(model, CLEAN, CORRUPT, third).values)
    circuit = random_circuit(model)
    values = [CircuitRun(model, CLEAN, CORRUPT, metric).value(circuit) for metric in (plain, third)]
    assert_close(*values)
    expected = naive_writes(model, CLEAN, set(circuit.edges()), naive_other(model, "resample"))[1]
    assert_close(values[0], plain(expected))


# Judging a circuit


@pytest.mark.parametrize("changes, mode", CASES, ids=str)
def test_faithfulness_is_1_for_all_edges_and_0_for_none(changes, mode):
    model = tiny(**changes)
    for parts, value in ((None, 1.0), ([], 0.0)):
        result = faithfulness(Circuit.of(model, parts), model, CLEAN, CORRUPT, metric=DIFF,
                              mode=mode)
        assert_close(result.values, torch.full((3,), value).double())
        assert [float(each) for each in (result.mean, *result.ci())] == pytest.approx([value] * 3)


def test_faithfulness_of_a_part_is_the_ratio_of_the_naive_loops():
    model = tiny()
    circuit, full = random_circuit(model, 0.7), Circuit.of(model)
    for mode in MODES:
        result = faithfulness(circuit, model, CLEAN, CORRUPT, metric=DIFF, mode=mode)
        empty, kept, whole = (naive_value(model, edges, mode)
                              for edges in ([], circuit.edges(), full.edges()))
        assert_close({mode: (result.values, result.mean)},
                     {mode: ((kept - empty) / (whole - empty),
                             (kept - empty).mean() / (whole - empty).mean())})


def test_faithfulness_is_the_number_computed_by_hand():
    model, clean, corrupt = one_number_model(), torch.tensor([[2], [3]]), torch.tensor([[0], [1]])
    circuit = Circuit.of(model, [("embed", "L0H0.v"), ("L0H0", "logits")])
    for mode, mean, values in (
            # clean 3 -> 3 + 6 = 9, 4 -> 12. Kept are the edges along the head: other + 2 * clean.
            # corrupt 1 and 2 -> 3 and 6: (1 + 6 - 3) / (9 - 3), (2 + 8 - 6) / (12 - 6)
            ("resample", 8 / 12, [4 / 6, 4 / 6]),
            # their mean 1.5, and 3 from the head: (1.5 + 6 - 4.5) / (9 - 4.5), and so on
            ("mean_pos", 8 / 12, [3 / 4.5, 5 / 7.5]),
            ("mean", 8 / 12, [3 / 4.5, 5 / 7.5]),  # there is one position
            ("zero", 14 / 21, [6 / 9, 8 / 12])):
        result = faithfulness(circuit, model, clean, corrupt, mode=mode,
                              metric=lambda logits: logits[..., 0, 0])
        assert result.mean.item() == pytest.approx(mean), mode
        assert result.values.tolist() == pytest.approx(values), mode


def squared(logits):
    return logits[..., 0, 0] ** 2


def test_the_mean_is_the_ratio_of_means():
    # The embeddings 2, 3, 4 give 36, 81, 144; the corrupt one, 1, gives 9. What is kept is the
    # embedding beside the corrupt head's 2: 16, 25, 36.
    model, clean = one_number_model(), torch.tensor([[1], [2], [3]])
    circuit = Circuit.of(model, [("embed", "logits")])
    result = faithfulness(circuit, model, clean, 0 * clean, metric=squared)
    assert_close(result.values, torch.tensor([7 / 27, 16 / 72, 27 / 135]).double())
    assert result.mean.item() == pytest.approx((7 + 16 + 27) / (27 + 72 + 135))
    alone = faithfulness(circuit, model, clean[:1], 0 * clean[:1], metric=squared)
    assert alone.mean.item() == pytest.approx(7 / 27)
    with pytest.raises(UserError, match="1 values"):
        alone.ci()


def test_the_interval_is_that_of_the_ratio_of_means_over_all_draws():
    model, clean = one_number_model(), torch.tensor([[1], [2], [3], [3], [2], [1]])
    circuit = Circuit.of(model, [("embed", "logits")])
    first, again = (faithfulness(circuit, model, clean, 0 * clean, metric=squared)
                    for _ in range(2))
    assert first.ci() == again.ci()
    kept, gap = torch.tensor([[7.0, 27], [16, 72], [27, 135]])[clean[:, 0] - 1].T
    draws = torch.cartesian_prod(*[torch.arange(6)] * 6)  # every one that there is
    ratios = kept[draws].mean(1) / gap[draws].mean(1)
    expected = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert [float(end) for end in first.ci()] == pytest.approx(expected, abs=0.001)
    low, high = first.ci(level=0.5)
    assert first.ci()[0] < low < first.mean < high < first.ci()[1]


def test_completeness_is_the_difference_of_two_naive_loops():
    model = tiny()
    circuit, full = random_circuit(model, 0.8), Circuit.of(model)
    subsets = [[], ["L0H1"], ["L1H0.k", ("embed", "logits"), "L0.mlp"], circuit.nodes()]
    for mode in MODES:
        found = completeness(circuit, model, CLEAN, CORRUPT, metric=DIFF, subsets=subsets,
                             mode=mode)
        gaps = [naive_value(model, circuit.without(some).edges(), mode)
                - naive_value(model, full.without(some).edges(), mode) for some in subsets]
        assert_close({mode: found}, {mode: torch.stack(gaps).mean(1).abs()})
        assert found[:3].min() > 1e-3


def test_minimality_is_the_change_by_each_part_in_a_naive_loop():
    model = tiny()
    circuit = random_circuit(model, 0.8)
    removed = ["L0H2", ("L0H1", "logits")]
    rest = circuit.without(removed)
    for mode in MODES:
        found = minimality(circuit, model, CLEAN, CORRUPT, metric=DIFF, removed=removed, mode=mode)
        before = naive_value(model, rest.edges(), mode)
        changes = [naive_value(model, rest.without([part]).edges(), mode) - before
                   for part in circuit.nodes()]
        assert found.parts == circuit.nodes()
        assert_close({mode: found.values}, {mode: torch.stack(changes)})
        assert (found.values[found.parts.index("L0H2")] == 0).all(), "it is removed already"


def test_exact_edge_scores_are_minimality_of_one_edge_at_a_time():
    model = tiny()
    run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
    scores = exact_edge_scores(run)
    found = minimality(run.full, model, CLEAN, CORRUPT, metric=DIFF, parts=run.full.edges())
    assert torch.equal(scores.values, found.values) and scores.edges() == found.parts
    assert scores.axes == ("edge",) and (scores.values != 0).any()


def test_the_model_is_complete_and_removing_all_is_the_same_everywhere():
    model = tiny()
    full, circuit = Circuit.of(model), random_circuit(model)
    subsets = [[], ["L0H0"], ["embed", "L1.mlp"]]
    found = completeness(full, model, CLEAN, CORRUPT, metric=DIFF, subsets=subsets)
    assert (found == 0).all()
    found = completeness(circuit, model, CLEAN, CORRUPT, metric=DIFF, subsets=[full.writers])
    assert_close(found, torch.zeros(1).double())


# A planted circuit


PLANTED = {("embed", "L0H1.q"), ("embed", "L0H1.k"), ("embed", "L0H1.v"), ("L0H1", "L1H2.k"),
           ("embed", "L1H2.q"), ("embed", "L1H2.v"), ("L1H2", "logits")}


def planted():
    """Head 0.1 copies the first third of the stream to the second, where 1.2 looks for its keys and
    nobody else does; 1.2 writes to the last third, which alone is read out."""
    model = tiny(n_layers=2, attn_only=True, norm="none")
    first, second, last = slice(0, 4), slice(4, 8), slice(8, 12)
    with torch.no_grad():
        for table in (model.W_E, model.W_pos):
            table[:, 4:] = 0
        model.unembedding.W_U[:8] = 0
        for block in model.blocks:
            for W in (block.attn.W_Q, block.attn.W_K, block.attn.W_V):
                W[:, 4:] = 0
        writers = {(0, 1): second, (1, 2): last}
        for layer, block in enumerate(model.blocks):
            for head in range(3):
                outside = torch.ones(12, dtype=torch.bool)
                outside[writers.get((layer, head), first)] = False
                block.attn.W_O[head][:, outside] = 0
                if (layer, head) not in writers:
                    block.attn.W_O[head] = 0
        keys = model.blocks[1].attn.W_K[2]
        keys[second] = keys[first].clone()
        keys[first] = 0
    return model


def test_acdc_finds_a_planted_circuit_and_nothing_else():
    model = planted()
    found = acdc(model, CLEAN, CORRUPT, DIFF, threshold=1e-9)
    assert set(found.edges()) == PLANTED
    result = faithfulness(found, model, CLEAN, CORRUPT, metric=DIFF)
    assert result.mean.item() == pytest.approx(1)
    change = minimality(found, model, CLEAN, CORRUPT, metric=DIFF, parts=found.edges())
    assert change.values.abs().mean(1).min() > 1e-9


def test_acdc_finds_it_by_kl_and_with_other_modes_too():
    model = planted()
    with torch.no_grad():
        reference = model(CLEAN)

    def kl(logits):
        return kl_divergence(reference, logits, pos=-1)

    for mode in MODES:
        found = acdc(model, CLEAN, CORRUPT, kl, threshold=1e-12, mode=mode)
        assert set(found.edges()) == PLANTED


def test_the_estimates_of_a_planted_circuit_are_0_outside_of_it():
    model = planted()
    scores = eap(model, CLEAN, CORRUPT, DIFF)
    for edge, row in zip(scores.edges(), scores.values, strict=True):
        assert (row.abs().max() > 1e-9) == (edge in PLANTED), edge
    assert set(scores.circuit(len(PLANTED)).edges()) == PLANTED


def naive_acdc(model, threshold):
    kept = set(Circuit.of(model).edges())
    distance = 0
    full = naive_value(model, kept)
    order = {name: i for i, name in enumerate(Circuit.of(model).writers)}
    for reader in reversed(Circuit.of(model).readers):
        for writer in sorted({w for w, r in kept if r == reader}, key=order.get, reverse=True):
            further = (naive_value(model, kept - {(writer, reader)}) - full).abs().mean()
            if further - distance <= threshold:
                kept, distance = kept - {(writer, reader)}, further
    return kept


def test_acdc_equals_the_loop_of_its_definition():
    model = tiny(n_layers=2, n_heads=2)
    for threshold in (0.02, 0.1):
        expected = naive_acdc(model, threshold)
        found = acdc(model, CLEAN, CORRUPT, DIFF, threshold=threshold)
        assert set(found.edges()) == expected, f"threshold {threshold}"
        assert 4 < len(expected) < len(Circuit.of(model)) - 4


def test_acdc_removes_every_edge_at_an_infinite_threshold():
    model = tiny()
    assert not len(acdc(model, CLEAN, CORRUPT, DIFF, threshold=math.inf))


# Estimates beside exact effects


def test_a_report_of_the_same_numbers_is_perfect_and_of_their_negatives_the_reverse():
    exact = torch.tensor([0.5, -2.0, 0.25, 0.0])
    labels = ["a", "b", "c", "d"]
    same = approximation_report(exact, exact, labels)
    assert same.spearman == pytest.approx(1) and same.sign_agreement == 1
    assert [miss[1] - miss[2] for miss in same.misses] == [0] * 4
    reverse = approximation_report(-exact, exact, labels, n_misses=2)
    assert reverse.spearman == pytest.approx(-1) and reverse.sign_agreement == 0
    assert reverse.misses == [("b", 2.0, -2.0), ("a", -0.5, 0.5)]


def test_a_report_is_that_computed_by_hand():
    estimate, exact = torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 0.0])
    report = approximation_report(estimate, exact, list("abcd"), n_misses=2)
    # ranks 1 2 0 3 beside 1 2 3 0: 1 - 6 * (0 + 0 + 9 + 9) / (4 * 15)
    assert report.spearman == pytest.approx(1 - 6 * 18 / 60)
    assert report.sign_agreement == pytest.approx(2 / 3)
    assert report.misses == [("c", -3.0, 3.0), ("d", 4.0, 0.0)]


def test_a_report_takes_edges_and_nodes():
    model = tiny()
    scores, full = eap(model, CLEAN, CORRUPT, DIFF), Circuit.of(model)
    exact = minimality(full, model, CLEAN, CORRUPT, metric=DIFF, parts=scores.edges())
    report = approximation_report(scores.mean, exact.mean, exact.parts)
    assert 0 < report.spearman < 1 and 0.5 < report.sign_agreement <= 1 and len(report.misses) == 5
    exact = minimality(full, model, CLEAN, CORRUPT, metric=DIFF)
    totals = sums_by_writer(scores)
    report = approximation_report(torch.stack([totals[node].mean() for node in exact.parts]),
                                  exact.mean, exact.parts)
    assert -1 < report.spearman <= 1


# Bad input, and nothing left behind


def no_metric(logits):
    """0 for all logits, which still has a gradient."""
    return logits[..., 0, 0] * 0


def test_bad_input_is_refused_with_its_value():
    m = tiny()
    full, no_edges, small = Circuit.of(m), Circuit.of(m, []), Circuit.of(tiny(n_layers=1))
    run, ones = CircuitRun(m, CLEAN, CORRUPT, DIFF), torch.ones(3)
    for call, *told in (
            (lambda: eap(m, CLEAN, CORRUPT[:, :5], DIFF), "[3, 7]", "[3, 5]"),
            (lambda: eap(m, CLEAN, CORRUPT[:2], DIFF), "[2, 7]"),
            (lambda: CircuitRun(m, CLEAN, CORRUPT[:, :5], DIFF, mode="mean"), "[3, 5]"),
            (lambda: CircuitRun(m, CLEAN, None, DIFF, mode="mean"), "None"),
            (lambda: eap(m, CLEAN, CLEAN.clone(), DIFF), "the same"),
            (lambda: eap(m, CLEAN, CORRUPT, DIFF, ig_steps=0), "ig_steps=0"),
            (lambda: eap(m, CLEAN, CORRUPT, DIFF, rule="trapezoid"), "'trapezoid'", "gauss"),
            (lambda: eap(m, CLEAN, CORRUPT, lambda logits: logits.sum()), "[] for logits"),
            (lambda: eap(m, CLEAN, CORRUPT, lambda logits: logits[:, -1].argmax(-1).double()),
             "no gradient"),
            (lambda: acdc(m, CLEAN, CORRUPT, DIFF, threshold=-0.1), "threshold=-0.1"),
            (lambda: acdc(m, CLEAN, CORRUPT, DIFF, threshold=math.nan), "threshold=nan"),
            (lambda: CircuitRun(m, CLEAN, CORRUPT, DIFF, mode="man"), "'man'"),
            (lambda: Circuit.of(m, [("L0H1", "L1H7.k")]), "L1H7.k", "L1H1.k"),
            (lambda: Circuit.of(m, [("L0.mpl", "logits")]), "L0.mpl", "L0.mlp"),
            (lambda: full.without(["logit"]), "'logit'", "logits"),
            (lambda: Circuit.of(m, [("L1H0", "L0H1.k")]), "('L1H0', 'L0H1.k')"),
            (lambda: Circuit.of(m, [("L0H0", "L0H1.k")]), "('L0H0', 'L0H1.k')"),
            (lambda: minimality(no_edges, m, CLEAN, CORRUPT, metric=DIFF), "no edges"),
            (lambda: faithfulness(full, m, CLEAN, CORRUPT, metric=no_metric), "nothing to keep"),
            (lambda: faithfulness(full, m, CLEAN, CORRUPT,
                                  metric=lambda logits: no_metric(logits) + math.nan), "is nan"),
            (lambda: approximation_report(ones, ones, ["a"]), "[3]", "1 labels"),
            (lambda: approximation_report(ones[:1], ones[:1], ["a"]), "1 labels"),
            (lambda: run.value(small), "5 writers", "of 9")):
        with pytest.raises(UserError) as found:
            call()
        assert all(part in str(found.value) for part in told), found.value


def test_a_model_that_drops_activations_is_refused():
    model = tiny(dropout=0.1).train()
    with pytest.raises(UserError, match=r"model\.eval\(\)"):
        eap(model, CLEAN, CORRUPT, DIFF)
    eap(model.eval(), CLEAN, CORRUPT, DIFF)
    eap(tiny().train(), CLEAN, CORRUPT, DIFF)


def test_nothing_is_left_behind_even_after_an_exception():
    model = tiny().train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    circuit = random_circuit(model)

    def fail_late(logits):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("on purpose")
        return DIFF(logits)

    for call in (lambda: eap(model, CLEAN, CORRUPT, fail_late, ig_steps=5),
                 lambda: acdc(model, CLEAN, CORRUPT, fail_late, threshold=0.1),
                 lambda: faithfulness(circuit, model, CLEAN, CORRUPT, metric=fail_late)):
        calls = []
        with pytest.raises(RuntimeError, match="on purpose"):
            call()
    eap(model, CLEAN, CORRUPT, DIFF, ig_steps=2)
    faithfulness(circuit, model, CLEAN, CORRUPT, metric=DIFF)
    assert not [name for name, point in model.hook_points().items() if point.listeners]
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def test_hooks_that_are_open_act_in_circuits_too():
    model, ablated = tiny(), tiny()
    with torch.no_grad():
        ablated.blocks[0].attn.W_O[1] = 0

    def without_head(z, hook):
        z = z.clone()
        z[:, :, 1] = 0
        return z

    circuit = random_circuit(model)
    with model.hooks([("blocks.0.attn.hook_z", without_head)]):
        here = CircuitRun(model, CLEAN, CORRUPT, DIFF).value(circuit)
        scores = eap(model, CLEAN, CORRUPT, DIFF)
    assert_close(here, CircuitRun(ablated, CLEAN, CORRUPT, DIFF).value(circuit))
    assert_close(scores.values, eap(ablated, CLEAN, CORRUPT, DIFF).values)


def test_float32_holds_to_its_rounding():
    model = tiny_model()
    run = CircuitRun(model, CLEAN, CORRUPT, DIFF)
    circuit = random_circuit(model)
    assert_close(run.value(circuit), naive_value(model, circuit.edges()), atol=1e-5, rtol=1e-5)
    assert TINY["n_layers"] == 2 and run.value(circuit).dtype == torch.float32
