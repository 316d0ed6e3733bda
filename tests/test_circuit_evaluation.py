"""Tests of circuits: areas against loops and closed forms, tests against their nulls."""

import itertools
import math
import statistics

import pytest
import torch
from helpers import one_number_model, refusal, tiny_model, tiny_tokens
from torch.testing import assert_close

from circuit_evaluation import (
    CircuitTest,
    FaithfulnessCurve,
    acdc_over_orders,
    acdc_ranking,
    all_subsets,
    bootstrap_stability,
    circuit_stability,
    curve_sizes,
    equivalence_test,
    evaluate_circuit,
    faithfulness_curve,
    hsic_test,
    independence_test,
    jaccard,
    layer_of,
    minimality_test,
    necessity_test,
    random_circuits,
    random_edge_changes,
    random_jaccard,
    random_path,
    random_ranking,
    ranked_edges,
    share_pvalue,
    sufficiency_test,
    take_edges,
)
from circuits import Circuit, CircuitRun, acdc, eap, faithfulness, minimality, prune, removal_order
from experiments.wired.model import logic_gate
from head_ablation import MODES
from metrics import Metric, bootstrap_draws, permutation_pvalue
from positions import pad_left
from utils import seeded_generator

CLEAN = tiny_tokens(batch=4)
CORRUPT = (CLEAN + 1 + tiny_tokens(batch=4, seed=9, d_vocab=10)) % 11  # another token everywhere
DIFF = Metric.logit_diff(3, 5)


def tiny(**changes):
    return tiny_model(dtype=torch.float64, **changes)


def tiny_run(mode="resample", **changes):
    return CircuitRun(tiny(**changes), CLEAN, CORRUPT, DIFF, mode=mode)


def gate(name, n_prompts=6, seed=0):
    """(the wired circuit, a run of it): an OR or an AND of two heads."""
    low, high = (0.25, 0.75) if name == "OR" else (1.25, 1.75)
    wired = logic_gate(seed, name, low, high)
    pairs = wired.draw_pairs(n_prompts, seeded_generator(1))
    return wired, CircuitRun(wired.model, pairs.clean_tokens, pairs.corrupted_tokens, pairs.metric)


# Curves


def test_a_curve_begins_with_no_edges_and_ends_with_all_in_every_mode():
    for mode in MODES:
        run = tiny_run(mode)
        curve = faithfulness_curve(run, random_ranking(run.full, seeded_generator(0)))
        assert curve.sizes[0] == 0 and curve.sizes[-1] == curve.n_edges == len(run.full)
        assert_close(curve.mean[[0, -1]], torch.tensor([0.0, 1.0]).double(), msg=mode)


def test_each_size_of_a_curve_is_the_circuit_of_the_best_edges():
    run = tiny_run("mean")
    scores = eap(run.model, CLEAN, CORRUPT, DIFF)
    curve = faithfulness_curve(run, ranked_edges(scores), sizes=[3, 0.25])
    assert curve.sizes == (0, 3, len(run.full) // 4, len(run.full))
    for size, mean in zip(curve.sizes, curve.mean, strict=True):
        wanted = faithfulness(scores.circuit(size), run.model, CLEAN, CORRUPT, metric=DIFF,
                              mode="mean")
        assert_close(mean, wanted.mean)


def test_the_areas_are_those_of_a_loop_over_trapezoids():
    run = tiny_run()
    curve = faithfulness_curve(run, random_ranking(run.full, seeded_generator(3)))
    mean = curve.mean.tolist()
    cpr = cmd = 0
    for i in range(1, len(mean)):
        width = (curve.sizes[i] - curve.sizes[i - 1]) / len(run.full)
        cpr += width * (mean[i - 1] + mean[i]) / 2
        cmd += width * (abs(mean[i - 1] - 1) + abs(mean[i] - 1)) / 2
    assert (curve.cpr, curve.cmd) == pytest.approx((cpr, cmd))


def test_the_areas_are_those_computed_by_hand():
    # Of 10 edges, the first keeps 1.5 of all, the first five 0.5: by shares 0, .1, .5, 1.
    kept = torch.tensor([[0.0, 0], [4, 2], [1, 1], [2, 2]])
    curve = FaithfulnessCurve(kept / 2, ("size",), kept, torch.tensor([2.0, 2]), (0, 1, 5, 10), 10)
    assert curve.cpr == pytest.approx(0.1 * 0.75 + 0.4 * 1 + 0.5 * 0.75)
    assert curve.cmd == pytest.approx(0.1 * 0.75 + 0.4 * 0.5 + 0.5 * 0.25)


def test_the_sizes_are_the_benchmark_s_shares_each_number_of_edges_once():
    assert curve_sizes(110) == (0, 1, 2, 5, 11, 22, 55, 110)
    assert curve_sizes(32_491) == (0, 32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491)
    assert curve_sizes(1) == (0, 1)
    assert curve_sizes(100, [0.29, 0.07]) == (0, 7, 29, 100)
    assert curve_sizes(4, "all") == (0, 1, 2, 3, 4)
    assert curve_sizes(7, [1.0, 1]) == (0, 1, 7), "1 is an edge, 1.0 is all of them"


def test_the_intervals_are_quantiles_over_the_same_draws_of_a_loop():
    run = tiny_run()
    curve = faithfulness_curve(run, random_ranking(run.full, seeded_generator(3)))
    shares = [size / curve.n_edges for size in curve.sizes]
    cprs = []
    cmds = []
    for draw in bootstrap_draws(4, 2000, seed=5):
        mean = curve.kept[:, draw].mean(1) / curve.gap[draw].mean()
        cprs.append(torch.trapezoid(mean, torch.tensor(shares).double()))
        cmds.append(torch.trapezoid((mean - 1).abs(), torch.tensor(shares).double()))
    ends = torch.tensor([0.05, 0.95]).double()
    assert curve.cpr_ci(0.9, seed=5) == pytest.approx(torch.stack(cprs).quantile(ends).tolist())
    assert curve.cmd_ci(0.9, seed=5) == pytest.approx(torch.stack(cmds).quantile(ends).tolist())


def linear_run():
    """A model of five edges, linear in its writes: the embedding t + 1 reaches the logits once
    directly and twice along the head; its q and k do nothing at one position."""
    return CircuitRun(one_number_model(), torch.tensor([[2], [3]]), torch.tensor([[0], [1]]),
                      lambda logits: logits[..., 0, 0])


def test_over_all_rankings_of_a_linear_model_the_mean_curve_is_its_closed_form():
    # The direct edge, a third of all, is there with probability k/5; the way along the head, two
    # thirds, needs two edges: k/5 (k - 1)/4.
    run = linear_run()
    curves = [faithfulness_curve(run, ranking, sizes="all")
              for ranking in itertools.permutations(run.full.edges())]
    found = torch.stack([curve.mean for curve in curves]).mean(0)
    expected = torch.tensor([k / 15 + k * (k - 1) / 30 for k in range(6)]).double()
    assert_close(found, expected)
    area = torch.trapezoid(expected, dx=0.2).item()
    assert statistics.mean(curve.cpr for curve in curves) == pytest.approx(area)
    assert statistics.mean(curve.cmd for curve in curves) == pytest.approx(1 - area)


def test_prompts_of_unequal_length_give_what_each_gives_alone():
    model = tiny()
    rows = [CLEAN[0].tolist(), CLEAN[1, :4].tolist(), CLEAN[2, :5].tolist()]
    other = [CORRUPT[0].tolist(), CORRUPT[1, :4].tolist(), CORRUPT[2, :5].tolist()]
    tokens, key_mask = pad_left(rows)
    run = CircuitRun(model, tokens, pad_left(other)[0], Metric.logit_diff([3, 4, 1], [5, 0, 2]),
                     key_mask=key_mask)
    ranking = random_ranking(run.full, seeded_generator(0))
    curve = faithfulness_curve(run, ranking)
    for i, (right, wrong) in enumerate(((3, 5), (4, 0), (1, 2))):
        alone = CircuitRun(model, torch.tensor([rows[i]]), torch.tensor([other[i]]),
                           Metric.logit_diff(right, wrong))
        assert_close(curve.values[:, i:i + 1], faithfulness_curve(alone, ranking).values)


# Rankings


def test_rankings_are_by_size_or_by_the_need_of_the_metric():
    run = tiny_run()
    scores = eap(run.model, CLEAN, CORRUPT, DIFF)
    mean = dict(zip(scores.edges(), scores.mean.tolist(), strict=True))
    by_size = [mean[edge] for edge in ranked_edges(scores)]
    by_sign = [mean[edge] for edge in ranked_edges(scores, by="sign")]
    assert by_size == sorted(by_size, key=lambda score: -abs(score))
    assert by_sign == sorted(by_sign) and by_sign[0] < 0 < by_sign[-1]
    exact = minimality(run.full, run.model, CLEAN, CORRUPT, metric=DIFF, parts=scores.edges())
    effects = dict(zip(exact.parts, exact.mean.tolist(), strict=True))
    sizes = [abs(effects[edge]) for edge in ranked_edges(exact)]
    assert sizes == sorted(sizes, reverse=True)


def test_acdc_ranks_first_the_edges_that_its_highest_threshold_leaves():
    run = tiny_run(n_layers=1, n_heads=2)
    ranking = acdc_ranking(run, [0.1, 0.5, 1.0, 2.0])
    assert sorted(ranking) == sorted(run.full.edges())
    outlived = dict.fromkeys(ranking, 0)
    for threshold in (0.1, 0.5, 1.0, 2.0):
        for edge in acdc(run.model, CLEAN, CORRUPT, DIFF, threshold=threshold).edges():
            outlived[edge] += 1
    counts = [outlived[edge] for edge in ranking]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 2


# Random circuits


def test_random_circuits_have_as_many_edges_between_the_same_layers():
    full = Circuit.of(tiny())
    circuit = take_edges(full, range(0, len(full), 3))

    def between_layers(circuit):
        pairs = [(layer_of(writer), layer_of(reader)) for writer, reader in circuit.edges()]
        return sorted(pairs)

    drawn = random_circuits(circuit, 20)
    assert {len(other) for other in drawn} == {len(circuit)}
    assert all(between_layers(other) == between_layers(circuit) for other in drawn)
    assert len({tuple(other.edges()) for other in drawn}) == 20
    other_layers = random_circuits(circuit, 20, match="size")
    assert {len(other) for other in other_layers} == {len(circuit)}
    assert any(between_layers(other) != between_layers(circuit) for other in other_layers)


def test_every_edge_is_as_likely_in_a_random_circuit_as_its_layers_say():
    full = Circuit.of(tiny(n_layers=1, n_heads=2))
    circuit = full.only([("embed", "L0H0.q"), ("embed", "L0H1.k"), ("L0.mlp", "logits")])
    drawn = random_circuits(circuit, 2000)
    share = circuit_stability(drawn).included
    for edge, found in zip(full.edges(), share.tolist(), strict=True):
        layers = (layer_of(edge[0]), layer_of(edge[1]))
        # 2 of the embedding's 7 edges to the layer, 1 of the layer's 3 to the logits
        expected = {("embed", "L0"): 2 / 7, ("L0", "logits"): 1 / 3}.get(layers, 0)
        assert found == pytest.approx(expected, abs=0.045), edge


# Hypothesis tests at their nominal rates, and what they must catch


def test_coins_at_the_edge_of_the_range_are_rejected_at_the_nominal_rate():
    generator = seeded_generator(0)
    heads = (torch.rand(200, 60, generator=generator) < 0.6).double().mean(1)
    rejected = sum(share_pvalue(share, 60, 0.1) < 0.05 for share in heads.tolist())
    assert rejected <= 19, f"{rejected} of 200"  # 10 expected at most, 3 deviations
    assert rejected >= 2, f"{rejected} of 200"
    assert share_pvalue(0.8, 60, 0.1) < 0.01 and share_pvalue(0.2, 60, 0.1) < 0.01
    # of three coins at .6: all or none, .6^3 + .4^3
    assert share_pvalue(1.0, 3, 0.1) == pytest.approx(0.216 + 0.064)
    assert share_pvalue(0.5, 3, 0.1) == pytest.approx(1)


def test_independent_values_are_rejected_at_the_nominal_rate():
    generator = seeded_generator(1)
    rejected = 0
    for seed in range(200):
        one, other = torch.randn(2, 16, generator=generator)
        rejected += hsic_test(one, other, n_draws=99, seed=seed)[1] <= 0.05
    assert 2 <= rejected <= 19, f"{rejected} of 200"


def test_hsic_finds_a_dependence_that_a_correlation_misses():
    one = torch.linspace(-1, 1, 41)
    assert abs(torch.corrcoef(torch.stack([one, one**2]))[0, 1]) < 1e-5
    assert hsic_test(one, one**2, n_draws=199)[1] < 0.05
    assert hsic_test(one, torch.full((41,), 2.0)) == (0, 1), "a constant tells nothing"


def test_hsic_is_the_trace_in_its_paper():
    one, other = torch.randn(2, 9, generator=seeded_generator(2)).double()

    def kernel(values):
        distances = (values[:, None] - values).abs()
        width = statistics.median_low(d for d in distances.flatten().tolist() if d > 0)
        return (-(distances**2) / (2 * width**2)).exp()

    centre = torch.eye(9).double() - 1 / 9
    expected = (kernel(one) @ centre @ kernel(other) @ centre).trace() / 81
    assert hsic_test(one, other)[0] == pytest.approx(expected.item())


@pytest.mark.slow
def test_random_edges_are_called_needed_at_the_nominal_rate():
    run = tiny_run(n_layers=1, n_heads=2)
    circuit = take_edges(run.full, [0, 5, 9])
    changes = random_edge_changes(run, circuit, 600)
    p_values = torch.stack([permutation_pvalue(change, changes[200:]) for change in changes[:200]])
    rejected = int((p_values < 0.05).sum())
    assert rejected <= 22, f"{rejected} of 200"  # 10 expected, 3 deviations; the 400 are a sample


@pytest.mark.slow
def test_a_random_circuit_is_called_sufficient_and_necessary_at_the_nominal_rate():
    run = tiny_run(n_layers=1, n_heads=2)
    start = take_edges(run.full, range(0, len(run.full), 2))
    rejected = [0, 0]
    for seed in range(100):
        circuit, *others = random_circuits(start, 21, seed=seed, match="size")
        rejected[0] += sufficiency_test(run, circuit, others=others).holds
        rejected[1] += necessity_test(run, circuit, others=others).holds
    assert max(rejected) <= 12, f"{rejected} of 100"


def test_the_whole_model_is_equivalent_to_itself_and_leaves_no_rest():
    run = tiny_run()
    same = equivalence_test(run, run.full)
    assert (same.statistic, same.p_value, same.holds) == (0.5, pytest.approx(1), True)
    zeroed = CircuitRun(run.model, CLEAN, None, DIFF, mode="zero")
    rest = independence_test(zeroed, run.full)  # the same biases for every prompt
    assert (rest.statistic, rest.p_value, rest.holds) == (0, 1, True)


def test_a_circuit_that_is_always_behind_is_not_equivalent():
    _, run = gate("AND", n_prompts=20)
    behind = equivalence_test(run, run.full.only([]))
    assert behind.statistic == 0 and not behind.holds
    assert behind.p_value == pytest.approx(share_pvalue(0, 20, 0.1))
    assert equivalence_test(run, run.full.without([("embed", "L0H0.q")])).statistic == 0.5


def test_an_edge_that_does_nothing_is_named_by_minimality():
    wired, run = gate("AND")
    truth = run.full.only(wired.truth.edges)
    found = minimality_test(run, truth, n_draws=40)
    assert found.holds and found.p_value == pytest.approx(1 / 41)
    idle = next(edge for edge in run.full.edges()
                if edge[1].endswith(".q") and edge not in wired.truth.edges)
    found = minimality_test(run, run.full.only([*wired.truth.edges, idle]), n_draws=40)
    assert not found.holds
    assert found.parts[found.p_values.argmax()] == idle and found.statistic < 1e-9


def test_the_true_circuit_beats_random_ones_and_a_random_one_does_not():
    wired, run = gate("AND")
    truth = run.full.only(wired.truth.edges)
    others = random_circuits(truth, 30)
    assert sufficiency_test(run, truth, others=others).holds
    other = random_circuits(truth, 1, seed=5)[0]
    assert not sufficiency_test(run, other, others=others).holds
    away = random_circuits(truth, 30, match="size")
    assert necessity_test(run, truth, others=away).statistic == pytest.approx(1, abs=0.01)
    assert not necessity_test(run, run.full.only([("embed", "L0H0.q")]), others=away).holds


def test_a_random_path_goes_from_the_embedding_to_the_logits():
    full = Circuit.of(tiny())
    generator = seeded_generator(0)
    for _ in range(20):
        path = random_path(full, generator)
        assert path[0][0] == "embed" and path[-1][1] == "logits" and set(path) <= set(full.edges())
        for (_, reader), (writer, _) in itertools.pairwise(path):
            assert reader.rpartition(".")[0] == writer or reader == writer


# Is it the only one?


def test_jaccard_is_the_share_of_common_edges():
    full = Circuit.of(tiny())
    assert jaccard(take_edges(full, [0, 1, 2]), take_edges(full, [2, 3])) == 0.25
    assert jaccard(full, full) == jaccard(full.only([]), full.only([])) == 1
    assert jaccard(take_edges(full, [0]), full.only([])) == 0


def test_the_chance_of_sharing_edges_is_the_mean_over_all_sets():
    for n, m in ((2, 3), (3, 3), (1, 5), (0, 2), (0, 0)):
        overlaps = [len(set(a) & set(b)) / len(set(a) | set(b)) if n + m else 1.0
                    for a in itertools.combinations(range(5), n)
                    for b in itertools.combinations(range(5), m)]
        assert random_jaccard(n, m, 5) == pytest.approx(statistics.mean(overlaps)), (n, m)


def test_stability_equals_loops_over_pairs():
    full = Circuit.of(tiny())
    circuits = [take_edges(full, numbers) for numbers in ([0, 1, 2], [1, 2, 3, 4], [2], [])]
    found = circuit_stability(circuits)
    pairs = list(itertools.combinations(circuits, 2))
    assert sorted(found.pairwise.tolist()) == pytest.approx(sorted(jaccard(*p) for p in pairs))
    chances = [random_jaccard(len(a), len(b), len(full)) for a, b in pairs]
    assert found.chance == pytest.approx(statistics.mean(chances))
    assert found.sizes.tolist() == [3, 4, 1, 0] and found.included[2] == 0.75
    assert circuit_stability(circuits[:3]).always() == [full.edges()[2]]


def test_bootstrapped_circuits_are_those_of_drawn_prompts():
    run = tiny_run()
    scores = eap(run.model, CLEAN, CORRUPT, DIFF)
    found = bootstrap_stability(scores, 5, n_draws=6, seed=3)
    circuits = []
    for draw in bootstrap_draws(4, 6, seed=3):
        best = scores.values[:, draw].mean(1).abs().topk(5).indices
        circuits.append(take_edges(run.full, best))
    expected = circuit_stability(circuits)
    assert_close(found.included, expected.included)
    assert_close(found.pairwise, expected.pairwise)
    assert 0 < found.mean < 1


def test_acdc_in_random_orders_finds_both_ways_through_an_or_and_the_one_through_an_and():
    wired, run = gate("OR", n_prompts=3)
    circuits = acdc_over_orders(run, 0.1, n_orders=6)
    ways = {frozenset(circuit.edges()) for circuit in circuits}
    heads = [f"L{layer}H{head}" for layer, head in wired.truth.heads]
    assert ways == {frozenset({("embed", f"{head}.v"), (head, "L0.mlp"), ("L0.mlp", "logits")})
                    for head in heads}
    wired, run = gate("AND", n_prompts=3)
    circuits = acdc_over_orders(run, 0.1, n_orders=3)
    assert circuit_stability(circuits).mean == 1
    assert set(circuits[0].edges()) == set(wired.truth.edges)


def test_an_or_has_two_minimal_circuits_and_an_and_one():
    for name in ("OR", "AND"):
        wired, run = gate(name, n_prompts=3)
        heads = {f"L{layer}H{head}" for layer, head in wired.truth.heads}
        nodes = [node for node in run.full.writers if node != "embed"]
        found = {frozenset(parts) for parts in all_subsets(run, nodes).minimal(0.9)}
        ways = [{head, "L0.mlp"} for head in heads] if name == "OR" else [{*heads, "L0.mlp"}]
        assert found == set(map(frozenset, ways)), name

        edges = all_subsets(run, wired.truth.edges).minimal(0.9)
        assert sorted(map(len, edges)) == ([3, 3] if name == "OR" else [5]), name


def test_the_best_circuit_of_each_size_is_the_best_of_all_combinations():
    run = tiny_run()
    parts = run.full.edges()[::9][:5]
    found = all_subsets(run, parts)
    for aim, worth in (("match", lambda f: -abs(f - 1)), ("perform", lambda f: f)):
        for size, (members, value) in found.best(aim).items():
            each = []
            for chosen in itertools.combinations(parts, size):
                circuit = run.full.without([part for part in parts if part not in chosen])
                each.append(faithfulness(circuit, run.model, CLEAN, CORRUPT, metric=DIFF).mean
                            .item())
            assert len(members) == size and value == pytest.approx(max(each, key=worth)), aim


def test_a_set_is_minimal_if_no_subset_reaches_the_threshold_at_all():
    found = all_subsets(tiny_run(), ["L0H0", "L0H1", "L1H2", "L1.mlp"])
    threshold = found.mean.median().item()
    reaching = {frozenset(found.named(i)) for i in range(16) if found.mean[i] >= threshold}
    expected = {one for one in reaching if not any(other < one for other in reaching)}
    assert {frozenset(parts) for parts in found.minimal(threshold)} == expected


# The order of ACDC


def test_the_default_order_is_the_same_written_out():
    run = tiny_run(n_layers=1, n_heads=2)
    plain = prune(run, threshold=0.05)
    assert set(plain.edges()) == set(acdc(run.model, CLEAN, CORRUPT, DIFF, threshold=0.05).edges())
    for order in (run.full.edges()[::-1], run.full.readers[::-1]):
        assert torch.equal(prune(run, threshold=0.05, order=order).mask, plain.mask)


def test_a_random_order_has_later_layers_first_and_every_edge_once():
    full = Circuit.of(tiny())
    orders = [removal_order(full, seeded_generator(seed)) for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    rank = {"L0": 0, "L0.mlp": 1, "L1": 2, "L1.mlp": 3, "logits": 4}
    for order in orders:
        assert sorted(order) == sorted(full.edges())
        stages = [rank[reader.split("H")[0]] for _, reader in order]
        assert stages == sorted(stages, reverse=True)


# All of it


def test_a_report_has_the_results_of_each_test_alone():
    wired, run = gate("AND")
    pairs = wired.draw_pairs(6, seeded_generator(1))
    scores = eap(wired.model, pairs.clean_tokens, pairs.corrupted_tokens, pairs.metric)
    truth = run.full.only(wired.truth.edges)
    report = evaluate_circuit(run, truth, scores=scores, n_random=25, n_draws=25)
    others = random_circuits(truth, 25)
    single = [equivalence_test(run, truth), independence_test(run, truth),
              minimality_test(run, truth, n_draws=25), sufficiency_test(run, truth, others=others),
              necessity_test(run, truth, others=others)]
    for test in single:
        own = report.tests[test.name]
        assert isinstance(own, CircuitTest)
        assert (own.statistic, own.p_value, own.holds) == (
            test.statistic, test.p_value, test.holds), test.name
    assert report.holds == all(test.holds for test in single)
    text = str(report)
    assert "5 of 23 edges keep 1.00" in text and all(test.name in text for test in single)
    assert not [name for name, point in run.model.hook_points().items() if point.listeners]


def test_bad_input_is_refused_with_its_value():
    run = tiny_run()
    full = run.full
    edges = full.edges()
    scores = eap(run.model, CLEAN, CORRUPT, DIFF)
    small = Circuit.of(tiny(n_layers=1))
    two = take_edges(full, [0, 1])
    few = CircuitRun(run.model, CLEAN[:3], CORRUPT[:3], Metric.logit_diff(1, 2))
    for call, *told in (
            (lambda: faithfulness_curve(run, edges[1:]), str(len(edges) - 1), str(len(edges))),
            (lambda: faithfulness_curve(run, [*edges[1:], edges[1]]), "different"),
            (lambda: faithfulness_curve(run, [*edges[1:], ("a", "b")]), "('a', 'b')"),
            (lambda: curve_sizes(10, [11]), "size 11", "10"),
            (lambda: curve_sizes(10, [1.5]), "size 1.5"),
            (lambda: curve_sizes(10, [math.nan]), "nan"),
            (lambda: curve_sizes(10, [True]), "True"),
            (lambda: curve_sizes(10, "some"), "'some'"),
            (lambda: ranked_edges(scores, by="name"), "'name'"),
            (lambda: acdc_ranking(run, []), "empty"),
            (lambda: acdc_ranking(run, [0.1, -1]), "threshold=-1"),
            (lambda: random_circuits(two, 0), "n=0"),
            (lambda: random_circuits(two, 2.5), "n=2.5"),
            (lambda: random_circuits(two, match="depth"), "'depth'"),
            (lambda: equivalence_test(run, two, epsilon=0.5), "epsilon=0.5"),
            (lambda: equivalence_test(run, two, alpha=0), "alpha=0"),
            (lambda: equivalence_test(run, small), "5 writers"),
            (lambda: independence_test(few, two), "3 prompts"),
            (lambda: independence_test(run, two, n_draws=0), "n_draws=0"),
            (lambda: minimality_test(run, two, n_draws=5), "n_draws=5", "alpha=0.05"),
            (lambda: minimality_test(run, full.only([])), "no edges"),
            (lambda: minimality_test(run, full), "all"),
            (lambda: sufficiency_test(run, two, others=[two]), "1 other"),
            (lambda: jaccard(full, small), "5 writers", "9"),
            (lambda: circuit_stability([full]), "1 circuits"),
            (lambda: bootstrap_stability(scores, 0), "n=0"),
            (lambda: bootstrap_stability(scores, 999), "n=999"),
            (lambda: bootstrap_stability(scores, 5, n_draws=1), "n_draws=1"),
            (lambda: acdc_over_orders(run, 0.1, n_orders=0), "n_orders=0"),
            (lambda: acdc_over_orders(run, -0.1), "threshold=-0.1"),
            (lambda: prune(run, threshold=0.1, order=edges[:4]), "4 edges"),
            (lambda: prune(run, threshold=0.1, order=["logits"]), "each once"),
            (lambda: all_subsets(run, edges[:17]), "17 parts"),
            (lambda: all_subsets(run, []), "0 parts"),
            (lambda: all_subsets(run, ["L0H0", "L0H0"]), "twice"),
            (lambda: all_subsets(run, ["L0H9"]), "L0H9"),
            (lambda: all_subsets(run, ["L0H0"]).minimal(0), "threshold=0"),
            (lambda: all_subsets(run, ["L0H0"]).best("win"), "'win'"),
            (lambda: evaluate_circuit(run, full), str(len(full))),
            (lambda: evaluate_circuit(run, full.only([])), "0 of")):
        text = refusal(call, told)
        assert all(part in text for part in told), text
