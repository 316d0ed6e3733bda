"""Chapter 10, approximate: slopes instead of runs, and how far to trust them."""

import torch

from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import (
    Wrong,
    expect,
    expect_close,
    expect_equal,
    expect_shape,
    random,
    random_ids,
)
from course.engine.models import answer, busy_model, cache_of
from course.engine.page import stated

IMPORTS = ["import torch"]
CLEAN = random_ids(9, 3, 5)
CORRUPTED = random_ids(9, 3, 5, seed=1)
STREAM = "blocks.1.hook_resid_pre"


def tiny_model(**changes):
    """A `busy_model` in float64."""
    return busy_model(**changes).double()


# linear_estimate


def a_linear_metric_is_met_exactly(linear_estimate):
    """if the metric is linear, the estimate is the exact change"""
    own, source, slope = random(2, 3, 4), random(2, 3, 4, seed=1), random(2, 3, 4, seed=3)
    want = (source * slope).sum(-1) - (own * slope).sum(-1)
    expect_close(linear_estimate(own, source, slope), want, "the estimate", "batch pos",
                 ask="how far from the run's own activation to the other run's, times the slope, "
                     "summed over d")


def no_difference_no_effect(linear_estimate):
    """an activation that is the same in both runs has no effect"""
    own = random(2, 3, 4)
    expect_close(linear_estimate(own, own, random(2, 3, 4, seed=2)), torch.zeros(2, 3),
                 "the estimate", "batch pos")


# estimate_patches


def the_same_text_has_no_effect(estimate_patches):
    """from a run into itself all estimates are 0"""
    model = tiny_model()
    got = estimate_patches(model, CLEAN, cache_of(model, CLEAN), answer, STREAM)
    expect_close(got, torch.zeros(3, 5), "the estimate", "batch pos")


def it_is_the_slope_of_the_corrupted_run(estimate_patches):
    """it is how the metric begins to move on the way to the clean activation"""
    model = tiny_model()
    clean = cache_of(model, CLEAN)[STREAM]
    got = estimate_patches(model, CORRUPTED, cache_of(model, CLEAN), answer, STREAM)
    expect_shape(got, (3, 5), "the result")
    corrupted = cache_of(model, CORRUPTED)[STREAM]
    for pos in (2, 4):
        move = torch.zeros_like(clean)
        move[:, pos] = 1e-5 * (clean - corrupted)[:, pos]
        ends = [answer(model.unembed(model.run_blocks(corrupted + sign * move, start=1)))
                for sign in (1, -1)]
        expect_close(got[:, pos], (ends[0] - ends[1]) / 2e-5, f"the estimate at position {pos}",
                     "batch", tolerance=1e-3, ask="the slope is that of the corrupted run, and "
                                                  "the step leads to the clean one")


def in_a_linear_model_it_is_patching(estimate_patches):
    """with no layers after it and no LayerNorm, it equals exact patching"""
    model = tiny_model(norm="none")
    name = "blocks.1.hook_resid_post"
    clean, corrupted = cache_of(model, CLEAN)[name], cache_of(model, CORRUPTED)[name]
    got = estimate_patches(model, CORRUPTED, cache_of(model, CLEAN), answer, name)
    patched = corrupted.clone()
    patched[:, 4] = clean[:, 4]
    want = answer(model.unembed(patched)) - answer(model.unembed(corrupted))
    expect_close(got[:, 4], want, "the estimate at the last position", "batch")


# quadrature


def rule_of(quadrature, rule, steps):
    result = quadrature(rule, steps)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two lists should be returned, (points, weights)")
    points, weights = (torch.as_tensor(each, dtype=torch.float64) for each in result)
    expect_close(weights.sum(), 1.0, f"the sum of the weights of {rule!r}")
    return points, weights


def the_points_of_each_rule(quadrature):
    """with 2 steps: left 0, 1/2; right 1/2, 1; trapezoid 0, 1/2, 1"""
    for rule, want in (("left", [0, 0.5]), ("right", [0.5, 1]), ("trapezoid", [0, 0.5, 1])):
        points, _ = rule_of(quadrature, rule, 2)
        expect(len(points) == len(want), f"with 2 steps {rule!r} has {len(want)} points, not "
               f"{len(points)}")
        expect_close(points, torch.tensor(want), f"the point of {rule!r}", "number")


def the_trapezoid_halves_its_ends(quadrature):
    """the trapezoid has half the weight at its ends, and is exact for a straight line"""
    points, weights = rule_of(quadrature, "trapezoid", 4)
    expect_close(weights, torch.tensor([1, 2, 2, 2, 1]) / 8, "the weight", "number")
    expect_close((weights * (3 * points + 1)).sum(), 2.5, "the mean of 3 x + 1")


# integrate_gradients


def curved(x):
    return (x**3).sum() + (x[0] * x[1]).sum()


def it_sums_to_the_whole_change(integrate_gradients):
    """it sums to metric(end) - metric(start)"""
    start, end = random(3, 4), random(3, 4, seed=1)
    got = integrate_gradients(curved, start, end, steps=64)
    expect_shape(got, (3, 4), "the result")
    expect_close(got.sum(), curved(end) - curved(start), "the sum", tolerance=1e-2,
                 ask="average the gradient along the path, then multiply by end - start")


def one_step_is_the_slope_in_the_middle(integrate_gradients):
    """with one step it is the gradient halfway, times end - start"""
    got = integrate_gradients(lambda x: (x**2).sum(), torch.zeros(2), torch.tensor([2.0, -4]),
                              steps=1)
    expect_close(got, torch.tensor([4.0, 16]), "the share", "number",
                 ask="the middle of the one piece is halfway")


def what_does_not_change_has_no_share(integrate_gradients):
    """a number that is the same at both ends gets 0"""
    got = integrate_gradients(lambda x: x[0] * x[1], torch.tensor([1.0, 3]), torch.tensor([2.0, 3]))
    expect_close(got, torch.tensor([3.0, 0]), "the share", "number", tolerance=1e-3)


# score_edges

WRITES = random(3, 2, 4, 6), random(3, 2, 4, 6, seed=1)
SLOPES = random(5, 2, 4, 6, seed=2)


def each_edge_is_a_product(score_edges):
    """an edge is (corrupted - clean) times its reader's gradient, summed over pos and d_model"""
    scores = score_edges(*WRITES, SLOPES)
    expect(list(scores.shape) == [3, 5, 2], f"of 3 writers, 5 readers and 2 texts it is "
           f"{list(scores.shape)}, and should be [writer, reader, batch], [3, 5, 2]")
    want = ((WRITES[1][1] - WRITES[0][1]) * SLOPES[3]).sum((1, 2))
    expect_close(scores[1, 3], want, "the score of the edge from 1 to 3", "batch")


def a_writer_s_edges_sum_to_its_own(score_edges):
    """a writer's edges sum to what its node would change"""
    want = ((WRITES[1] - WRITES[0]) * SLOPES.sum(0)).sum((2, 3))
    expect_close(score_edges(*WRITES, SLOPES).sum(1), want, "the sum over readers", "writer batch")


# kept_share


def nothing_and_everything(kept_share):
    """no edges keep 0, all keep 1"""
    empty, full = torch.tensor([0.0, 1]), torch.tensor([4.0, 3])
    expect_close(kept_share(empty, empty, full), 0.0, "the share of no edges")
    expect_close(kept_share(full, empty, full), 1.0, "the share of all edges")


def it_may_be_above_one(kept_share):
    """a circuit that does more than the model has more than 1"""
    empty, full = torch.tensor([0.0, 1]), torch.tensor([4.0, 3])
    expect_close(kept_share(2 * full, empty, full), 13 / 6, "the share of a circuit with twice the "
                 "model's metric", ask="it is not cut off")


def a_prompt_without_a_gap_does_not_make_it_wild(kept_share):
    """gaps of 4 and 0.01, of which 2 and 0.5 are kept: 2.5 / 4.01"""
    got = kept_share(torch.tensor([2.0, 0.5]), torch.zeros(2), torch.tensor([4.0, 0.01]))
    expect_close(got, 2.5 / 4.01, "the share", ask="the ratio of the means, not the mean of the "
                 "ratios")


# prune_edges


def what_is_not_missed_is_dropped(prune_edges):
    """of three edges, only b does damage if it is missing"""
    got = prune_edges(["a", "b", "c"], lambda kept: 0.0 if "b" in kept else 1.0, 0.1)
    expect_equal(got, ["b"], "what stays")


def small_damages_are_not_forgotten(prune_edges):
    """ten edges of damage 0.06 each: each is judged by what it adds, and all go at 0.1"""
    edges = list(range(10))
    got = prune_edges(edges, lambda kept: 0.06 * (10 - len(kept)), 0.1)
    expect(edges == list(range(10)), "the list of edges that was handed in has changed: work on a "
           "copy, list(edges)")
    expect_equal(got, [], "what stays", ask="compare with the damage of what is kept now")
    got = prune_edges(edges, lambda kept: 0.06 * (10 - len(kept)), 0.05)
    expect_equal(got, edges, "what stays at threshold 0.05")


def of_two_that_stand_in_for_each_other_one_stays(prune_edges):
    """a or b is enough: the first one tried is dropped, the other one stays"""
    got = prune_edges(["a", "b"], lambda kept: float(not kept), 0.5)
    expect_equal(got, ["b"], "what stays", ask="what was dropped stays dropped while the next one "
                 "is tried")


def what_helps_when_it_goes_is_dropped(prune_edges):
    """an edge whose loss brings the run closer to the model is dropped"""
    got = prune_edges(["a", "b"], lambda kept: float("a" in kept) + float("b" not in kept), 0.5)
    expect_equal(got, ["b"], "what stays", ask="the damage falls if a goes; a fall is no rise")


def each_edge_is_tried_once(prune_edges):
    """a is needed while b is there; b goes later, and a is not tried again"""
    got = prune_edges(["a", "b"], lambda kept: float(kept == ["b"]), 0.5)
    expect_equal(got, ["a"], "what stays", ask="each edge is tried once, in the order of the list")


# mean_ranks, spearman


def ranks_begin_at_zero(mean_ranks):
    """in (30, 10, 20) the ranks are 2, 0, 1"""
    expect_close(mean_ranks(torch.tensor([30.0, 10, 20])), torch.tensor([2.0, 0, 1]), "the rank",
                 "number")


def equal_values_share(mean_ranks):
    """in (5, 5, 1, 7, 5) the ranks are 2, 2, 0, 4, 2, and in (5, 1, 5) they are 1.5, 0, 1.5"""
    expect_close(mean_ranks(torch.tensor([5.0, 5, 1, 7, 5])), torch.tensor([2.0, 2, 0, 4, 2]),
                 "the rank", "number", ask="three values of 5 share the mean of 1, 2 and 3")
    expect_close(mean_ranks(torch.tensor([5.0, 1, 5])), torch.tensor([1.5, 0, 1.5]), "the rank",
                 "number", ask="two values share the mean of 1 and 2")


def the_same_order_is_one(spearman):
    """the same order is 1, whatever the sizes; the opposite one -1"""
    one = torch.tensor([1.0, 2, 3, 4])
    expect_close(spearman(one, one.exp()), 1.0, "the correlation of one order",
                 ask="ranks, not sizes")
    expect_close(spearman(one, -one), -1.0, "that of the opposite order")


def ties_count_by_their_mean_rank(spearman):
    """of (2, 9, 1, 2) and (3, 4, 1, 2) it is about 0.949"""
    got = spearman(torch.tensor([2.0, 9, 1, 2]), torch.tensor([3.0, 4, 1, 2]))
    expect_close(got, 0.9486833, "the correlation", ask="equal values share a rank, as in "
                 "mean_ranks, and Pearson's formula holds for such ranks too")


EXERCISES = [
    Exercise(
        name="linear_estimate", source=None, minutes=5, difficulty=1,
        needed_for="estimate_patches", task="A first-order Taylor step.",
        checks=(a_linear_metric_is_met_exactly, no_difference_no_effect),
        hints=("How far it would move, times the slope.", "Summed over what is patched together.",
               "((source - own) * gradient).sum(-1)."),
        mistakes=(
            Mistake("with the opposite sign: from the source to the run's own activation",
                    "(source - own)", "(own - source)"),
            Mistake("of activation times gradient, without subtracting the run's own activation",
                    "(source - own)", "source"),
            Mistake("summed over positions too", ".sum(-1)",
                    ".sum((1, 2))[:, None].expand(-1, own.shape[1])"),
            Mistake("of absolute numbers", "((source - own) * gradient)",
                    "((source - own) * gradient).abs()"),
            Mistake("without its sign", ".sum(-1)", ".sum(-1).abs()"),
            Mistake("with the mean over d instead of the sum", ".sum(-1)", ".mean(-1)"),
        )),
    Exercise(
        name="estimate_patches", source=None, minutes=15, difficulty=2,
        needed_for="ranking thousands of places", task="Which run has the gradient?",
        checks=(the_same_text_has_no_effect, it_is_the_slope_of_the_corrupted_run,
                in_a_linear_model_it_is_patching),
        hints=("Denoising patches the corrupted run: its gradient counts.",
               "acts[name] is the corrupted activation, clean_cache[name] the clean one.",
               "linear_estimate(acts[name], clean_cache[name], grads[name])."),
        mistakes=(
            Mistake("with the opposite sign", "acts[name], clean_cache[name]",
                    "clean_cache[name], acts[name]"),
            Mistake("of the clean activation alone", "linear_estimate(acts[name],",
                    "linear_estimate(torch.zeros_like(acts[name]),"),
            Mistake("of the run's own activation times gradient (zero ablation's slope)",
                    "acts[name], clean_cache[name]", "torch.zeros_like(acts[name]), acts[name]"),
            Mistake("divided by the batch size: the metric's sum has each text's own slope",
                    "grads[name])", "grads[name] / len(corrupted_tokens))"),
            Mistake("times the batch size", "grads[name])", "len(corrupted_tokens) * grads[name])"),
        )),
    Exercise(
        name="quadrature", source="attribution.quadrature", minutes=10, difficulty=1,
        needed_for="integrated gradients, EAP-IG",
        task="Three rules for a mean; the library's fourth, gauss, is left out.",
        checks=(the_points_of_each_rule, the_trapezoid_halves_its_ends),
        hints=("k / steps for k = 0, …, steps are the borders of the pieces.",
               "left drops the last border, right the first.",
               "trapezoid: weights 0.5 / steps at both ends, 1 / steps between."),
        mistakes=(
            Mistake("with left and right exchanged", 'rule == "left"', 'rule == "r"',
                    also=(('rule == "right"', 'rule == "left"'),
                          ("    return points, [0.5", '    if rule == "right":\n        return '
                           "points[:-1], [1 / steps] * steps\n    return points, [0.5"))),
            Mistake("when the trapezoid's ends count in full",
                    "[0.5 / steps] + [1 / steps] * (steps - 1) + [0.5 / steps]",
                    "[1 / (steps + 1)] * (steps + 1)"),
            Mistake("when the weights sum to the number of steps",
                    "return points[:-1], [1 / steps]",
                    "return points[:-1], [1.0]"),
            Mistake("when the points of left run up to 1",
                    "return points[:-1], [1 / steps]",
                    "return [k / max(steps - 1, 1) for k in range(steps)], [1 / steps]"),
        )),
    Exercise(
        name="integrate_gradients", source=None, minutes=20, difficulty=2,
        needed_for="attributions that add up", task="Average the slope along the path.",
        checks=(one_step_is_the_slope_in_the_middle, it_sums_to_the_whole_change,
                what_does_not_change_has_no_share),
        hints=("A point of the path: start + share * (end - start).",
               "Make it a leaf: .detach().requires_grad_(); then torch.autograd.grad.",
               "Shares (k + 0.5) / steps; the mean gradient times (end - start)."),
        mistakes=(
            Mistake("with the gradient at the start alone", "share = (k + 0.5) / steps",
                    "share = 0.0"),
            Mistake("with the left ends of the pieces", "(k + 0.5) / steps", "k / steps"),
            Mistake("with the sum of the gradients instead of their mean", "* total / steps",
                    "* total"),
            Mistake("without end - start: the mean gradient itself",
                    "(end - start) * total / steps", "total / steps"),
            Mistake("times the end, and not end - start", "(end - start) * total", "end * total"),
            Mistake("with the right ends of the pieces", "(k + 0.5) / steps", "(k + 1) / steps"),
            Mistake("times start - end: the sign is turned", "(end - start) * total",
                    "(start - end) * total"),
            Mistake("with one gradient, halfway, whatever the steps", "(k + 0.5) / steps", "0.5"),
            Mistake("on the way from 0 instead of from start", "(start + share * (end - start))",
                    "(share * end)"),
        )),
    Exercise(
        name="score_edges", source=None, minutes=10, difficulty=2, needed_for="circuits by EAP",
        task="All edges by one product.",
        checks=(each_edge_is_a_product, a_writer_s_edges_sum_to_its_own),
        hints=("One edge: ((corrupted - clean) * gradient).sum over pos and d_model.",
               "An einsum with w for writers and r for readers.",
               'torch.einsum("wbpm,rbpm->wrb", corrupted_writes - clean_writes, gradients).'),
        mistakes=(
            Mistake("of clean less corrupted", "corrupted_writes - clean_writes",
                    "clean_writes - corrupted_writes"),
            Mistake("with readers before writers", "->wrb", "->rwb"),
            Mistake("of the corrupted writes alone", "corrupted_writes - clean_writes",
                    "corrupted_writes"),
            Mistake("with the mean over positions instead of the sum",
                    "clean_writes, gradients)", "clean_writes, gradients) / gradients.shape[2]"),
            Mistake("of the last position alone", "corrupted_writes - clean_writes, gradients",
                    "(corrupted_writes - clean_writes)[:, :, -1:], gradients[:, :, -1:]"),
            Mistake("without its sign", "clean_writes, gradients)",
                    "clean_writes, gradients).abs()"),
        )),
    Exercise(
        name="kept_share", source=None, minutes=5, difficulty=1, needed_for="judging a circuit",
        task="Faithfulness.",
        checks=(nothing_and_everything, a_prompt_without_a_gap_does_not_make_it_wild,
                it_may_be_above_one),
        hints=("Both are counted from the empty circuit.", "Means first, then the ratio.",
               "(circuit - empty).mean() / (full - empty).mean()."),
        mistakes=(
            Mistake("with the mean of the ratios",
                    "(circuit - empty).mean() / (full - empty).mean()",
                    "((circuit - empty) / (full - empty)).mean()"),
            Mistake("as a share of the full metric", "(circuit - empty).mean() / (full - empty)",
                    "circuit.mean() / full"),
            Mistake("of what is lost", "(circuit - empty)", "(full - circuit)"),
            Mistake("when only the full metric divides, not its gain over the empty circuit",
                    "/ (full - empty).mean()", "/ full.mean()"),
            Mistake("cut off at 0 and 1", "/ (full - empty).mean()",
                    "/ (full - empty).mean()).clamp(0, 1)",
                    also=(("return (circuit", "return ((circuit"),)),
        )),
    Exercise(
        name="prune_edges", source=None, minutes=20, difficulty=2, needed_for="ACDC",
        task="Go through the edges in order, and drop each that does little damage.",
        checks=(what_is_not_missed_is_dropped, small_damages_are_not_forgotten,
                of_two_that_stand_in_for_each_other_one_stays, what_helps_when_it_goes_is_dropped,
                each_edge_is_tried_once),
        hints=("Keep a list, and its present damage.",
               "Try without an edge; if the damage rises by less than the threshold, go on without "
               "it.", "After a drop, the new damage is what the next edge is compared with."),
        mistakes=(
            Mistake("when each edge is judged alone, with all others there",
                    "[other for other in kept if other != edge]",
                    "[other for other in edges if other != edge]",
                    also=(("            kept = without\n            now = then\n",
                           "            kept = [other for other in kept if other != edge]\n"),)),
            Mistake("when the damage is compared with the whole model's, not with what is kept",
                    "            now = then\n", ""),
            Mistake("when the edges that are needed are dropped", "then - now < threshold",
                    "then - now >= threshold"),
            Mistake("when the damage may not fall either", "then - now < threshold",
                    "abs(then - now) < threshold"),
            Mistake("when the last edge is tried first", "for edge in edges:",
                    "for edge in reversed(edges):"),
            Mistake("when an edge is compared with the last attempt, even a rejected one",
                    "            now = then\n", "        now = then\n"),
            Mistake("when edges are taken out of the list that the loop goes through: it skips the "
                    "next one", "    kept = list(edges)\n", "    kept = edges\n",
                    also=(("            kept = without\n", "            kept.remove(edge)\n"),)),
        )),
    Exercise(
        name="mean_ranks", source=None, minutes=10, difficulty=1, needed_for="spearman",
        task="Ties share.", checks=(ranks_begin_at_zero, equal_values_share),
        hints=("A value's rank is how many lie below it.",
               "Of m equal values the ranks are below, …, below + m - 1.",
               "below + (equal - 1) / 2, where equal counts the value itself."),
        mistakes=(
            Mistake("counted from 1", "(equal - 1) / 2", "(equal + 1) / 2"),
            Mistake("when equal values share the lowest of their ranks", " + (equal - 1) / 2", ""),
            Mistake("from the largest down", "values[None, :] < values[:, None]",
                    "values[None, :] > values[:, None]"),
            Mistake("of argsort: which value comes at each place",
                    "return below + (equal - 1) / 2", "return values.argsort()"),
            Mistake("when equal values get ranks one after another, in the order of the list",
                    "return below + (equal - 1) / 2",
                    "return values.argsort(stable=True).argsort()"),
            Mistake("when equal values count as one: the next value has the next rank",
                    "return below + (equal - 1) / 2",
                    "return values.unique(return_inverse=True)[1]"),
            Mistake("when equal values share the highest of their ranks", "(equal - 1) / 2",
                    "(equal - 1)"),
            Mistake("when the mean rank is rounded down", "(equal - 1) / 2", "(equal - 1) // 2"),
        )),
    Exercise(
        name="spearman", source=None, minutes=10, difficulty=1,
        needed_for="saying how good an approximation is", task="Pearson's correlation of ranks.",
        checks=(the_same_order_is_one, ties_count_by_their_mean_rank),
        hints=("Ranks first.", "Subtract the mean from both, then take the cosine.",
               "(a * b).sum() / (a.norm() * b.norm())."),
        mistakes=(
            Mistake("of the values instead of the ranks",
                    "mean_ranks(one) - mean_ranks(one).mean()",
                    "one - one.mean()",
                    also=(("mean_ranks(other) - mean_ranks(other).mean()",
                           "other - other.mean()"),)),
            Mistake("when the means are not subtracted", "mean_ranks(one) - mean_ranks(one).mean()",
                    "mean_ranks(one)", also=(("mean_ranks(other) - mean_ranks(other).mean()",
                                              "mean_ranks(other)"),)),
            Mistake("as a covariance, not divided by the lengths", " / (a.norm() * b.norm())",
                    " / len(a)"),
            Mistake("of 1 - 6 Σd² / (n (n² - 1)), which is right only without equal values",
                    "(a * b).sum() / (a.norm() * b.norm())",
                    "1 - 6 * ((a - b) ** 2).sum() / (len(a) * (len(a) ** 2 - 1))"),
            Mistake("when the covariance is divided by n, and the standard deviations by n - 1",
                    "(a * b).sum() / (a.norm() * b.norm())",
                    "(a * b).mean() / (a.std() * b.std())"),
            Mistake("when equal values do not share a rank",
                    "mean_ranks(one) - mean_ranks(one).mean()",
                    "one.argsort(stable=True).argsort() - (len(one) - 1) / 2",
                    also=(("mean_ranks(other) - mean_ranks(other).mean()",
                           "other.argsort(stable=True).argsort() - (len(other) - 1) / 2"),)),
            Mistake("of argsort instead of ranks", "mean_ranks(one) - mean_ranks(one).mean()",
                    "one.argsort() - one.argsort().double().mean()",
                    also=(("mean_ranks(other) - mean_ranks(other).mean()",
                           "other.argsort() - other.argsort().double().mean()"),)),
        )),
]

PREDICTIONS = [
    Prediction("Chapter 9's head carries all of the answer: the lead falls by 13.8 nats if its "
               "corrupted value is put in. By how many does one gradient say that it falls?",
               lambda: -page.find_number(10, "in this run estimated {}, exactly …"),
               "the chapter's block"),
    Prediction("How many of the model's 110 edges are needed?",
               stated(10, "leaves in this run {} edges"), "the chapter's block"),
]
