"""Evaluate a circuit: faithfulness over sizes, hypothesis tests, and stability.

That a circuit keeps 0.9 of a behaviour says little by itself. Would another ranking of the edges
keep as much with fewer edges? Would random edges? Does the rest of the model also know the answer?
Is each edge needed? Does another sample of prompts, or another search order, give the same circuit?
Everything here works on one `CircuitRun`, which holds the prompts, the metric, what absent edges
carry (mode), and which tokens are padding (key_mask):

    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric)
    scores = eap(model, clean_tokens, corrupted_tokens, metric, ig_steps=5)
    curve = faithfulness_curve(run, ranked_edges(scores))
    curve.cpr, curve.cmd, curve.cpr_ci()
    print(evaluate_circuit(run, scores.circuit(7), scores=scores))

The tests have two kinds of null hypothesis, and their p-values read in opposite ways.
`equivalence_test` and `independence_test` assume that the circuit is good: it passes if p is *not*
small, and with few prompts almost anything passes. `minimality_test`, `sufficiency_test` and
`necessity_test` assume that it is no better than chance: it passes if p *is* small. The field
`holds` of each result says whether the circuit passed.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: metrics.py, circuits.py
Next: experiments/induction/model.py
Source: Mueller et al. 2025 (MIB: CPR, CMD); Shi et al. 2024 (hypothesis tests of circuits); Méloux
et al. 2025 (circuits of resampled prompts); Conmy et al. 2023 (ACDC depends on the order)
"""

import math
from dataclasses import dataclass, replace

import torch

from circuits import (
    Circuit,
    EdgeScores,
    Faithfulness,
    PartEffects,
    check_circuit,
    check_each_edge_once,
    check_order_of,
    check_threshold,
    faithfulness_of_each,
    node_of_input,
    prune,
)
from metrics import bootstrap_draws, permutation_pvalue
from utils import (
    UserError,
    as_index,
    as_list,
    at_least_float32,
    check_choice,
    check_count,
    check_number,
    seeded_generator,
)

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all, as in MIB
MOST_PARTS = 16  # with 16 parts, all subsets are 65,536 runs
SAME = 1e-6  # relative to the metric's size: values that differ by less count as equal

# Faithfulness over sizes


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Faithfulness):
    """Faithfulness over circuit size: each circuit contains all edges of the previous one.

    values, kept: [size, batch]; gap: [batch]; mean: [size]. sizes: the number of edges of each
    circuit, from 0 to all. n_edges: the number of edges of the model.

        CPR = integral of f(share) from 0 to 1        how well circuits perform: higher is better
        CMD = integral of |f(share) - 1| from 0 to 1  how far from the model: lower is better

    f is `mean`, integrated by trapezoids between neighbouring sizes. Each size is placed at the
    share of edges that it really has, so a requested share that rounds to the previous size adds
    nothing: of 110 edges, every share below 1 % is the size 0. (The benchmark's code places the
    rounded size at the requested share, and omits the piece below the smallest. In GPT-2, with
    32,491 edges, that changes CPR by less than 0.001 if faithfulness is below 1 there.) For CMD the
    distance is taken at each size first, as in the benchmark, and then integrated.
    """

    sizes: tuple = ()
    n_edges: int = 0

    @property
    def shares(self):
        """The sizes as shares of all edges, [size], float64."""
        return torch.tensor(self.sizes).double() / self.n_edges

    @property
    def cpr(self):
        """The area under the curve: 1 if all sizes are faithful, 0.5 for a straight line."""
        return torch.trapezoid(self.mean.cpu().double(), self.shares).item()

    @property
    def cmd(self):
        """The area between the curve and 1: 0 if all sizes are faithful."""
        return torch.trapezoid((self.mean.cpu().double() - 1).abs(), self.shares).item()

    def cpr_ci(self, level=0.95, seed=0):
        """(low, high), a bootstrap interval of CPR over prompts, for a fixed ranking.

        With few prompts the interval is too narrow, as in `bootstrap_ci`. At level 0.95 it contains
        the truth in about 0.84 of all cases with 5 prompts, 0.90 with 10, and 0.93 with 40.
        Raises UserError for a single prompt.
        """
        return self.area_ci(lambda drawn: drawn, level, seed)

    def cmd_ci(self, level=0.95, seed=0):
        """(low, high), an interval of CMD, as in `cpr_ci`. CMD is a sum of distances, so near 0
        noise raises it, and the interval with it."""
        return self.area_ci(lambda drawn: (drawn - 1).abs(), level, seed)

    def area_ci(self, height, level, seed):
        """The central interval, at `level`, of the area under height(curve) over the draws."""
        drawn = self.drawn_means(level=level, seed=seed)  # [size, draw]
        areas = torch.trapezoid(height(drawn), self.shares, dim=0)
        ends = areas.quantile(areas.new_tensor([0.5 - level / 2, 0.5 + level / 2]))
        return ends[0].item(), ends[1].item()


def curve_sizes(n_edges, sizes=None):
    """The sizes of a curve, ascending and unique, from 0 to all edges: a tuple.

    sizes: None for the benchmark's shares, rounded down; "all" for every size; or a list of counts
    (ints) and shares (floats from 0 to 1). 0 and n_edges are added.
    Raises UserError for impossible counts and shares.
    """
    if isinstance(sizes, str):
        check_choice("sizes", sizes, ("all",))
        return tuple(range(n_edges + 1))
    counts = {0, n_edges}
    for size in SHARES if sizes is None else sizes:
        count = as_index(size)
        if count is None and isinstance(size, float) and 0 <= size <= 1:
            count = int(size * n_edges + SAME)  # 0.07 of 100 is 7.000000000000001, and 0.29 28.99…
        if count is None or not 0 <= count <= n_edges:
            raise UserError(f"size {size!r} is not possible; pass counts from 0 to {n_edges} as "
                            "ints, or shares from 0.0 to 1.0 as floats")
        counts.add(count)
    return tuple(sorted(counts))


def take_edges(full, numbers):
    """The circuit of some edges, given their indices in full.edges()."""
    reader, writer = full.exists.T.nonzero()[torch.as_tensor(numbers, dtype=torch.long)].T
    mask = torch.zeros_like(full.exists)
    mask[writer, reader] = True
    return replace(full, mask=mask)


def faithfulness_curve(run, ranking, *, sizes=None):
    """Faithfulness of a ranking's best edges, over sizes: a FaithfulnessCurve.

    run: a CircuitRun. ranking: [(writer, reader)] with every edge of the model once, best first, as
    from `ranked_edges`, `acdc_ranking` or `random_ranking`. sizes: as in `curve_sizes`. It takes
    one model run for each size. Edges that lead nowhere are kept.
    Raises UserError for a ranking in which edges are missing or repeated, for impossible sizes, and
    where `faithfulness` does.
    """
    edges = [tuple(edge[:2]) for edge in ranking]
    check_each_edge_once(run.full, edges, "ranking")
    number_of = {edge: number for number, edge in enumerate(run.full.edges())}
    numbers = [number_of[edge] for edge in edges]

    counts = curve_sizes(len(numbers), sizes)
    found = faithfulness_of_each(run, [take_edges(run.full, numbers[:n]) for n in counts])
    return FaithfulnessCurve(found.values, ("size",), found.kept, found.gap, counts, len(numbers))


# Rankings


def ranked_edges(scores, *, by="size"):
    """All edges, best first: [(writer, reader)].

    scores: EdgeScores, or the exact effects of all edges (`minimality` with parts=edges). by:
    "size" ranks by absolute value, for circuits that act like the model (CMD); "sign" puts the
    edges that the metric needs first and those that oppose it last, for circuits that perform well
    (CPR). Raises UserError for scores that are not finite.
    """
    check_choice("by", by, ("size", "sign"))
    if not isinstance(scores, (EdgeScores, PartEffects)):
        raise UserError(f"scores is a {type(scores).__name__}; pass what eap or minimality returns")
    edges = scores.edges() if isinstance(scores, EdgeScores) else scores.parts
    mean = scores.mean
    check_order_of(mean)
    worth = mean.abs() if by == "size" else -mean
    return [edges[i] for i in worth.argsort(descending=True, stable=True).tolist()]


def acdc_ranking(run, thresholds, *, order=None):
    """All edges by the number of ACDC thresholds they survive, best first: [(writer, reader)].

    Edges with equal counts are in the order of `Circuit.edges`, from the first reader on. order: as
    in `acdc`. Raises UserError for an empty list of thresholds, or one below 0.
    """
    counts = thresholds_outlived(run, thresholds, order=order)
    edges = run.full.edges()
    return [edges[i] for i in counts.argsort(descending=True, stable=True).tolist()]


def thresholds_outlived(run, thresholds, *, order=None):
    """The number of ACDC thresholds that each edge survives: [edge], int64. As `acdc_ranking`."""
    thresholds = as_list("thresholds", thresholds, "a list of numbers, 0 or more")
    if not thresholds:
        raise UserError("thresholds is empty, so the edges cannot be ranked; give some")
    for threshold in thresholds:
        check_threshold(threshold)
    outlived = sum(prune(run, threshold=threshold, order=order).mask.long()
                   for threshold in thresholds)
    return outlived.T[run.full.exists.T]


def random_ranking(full, generator):
    """All edges in a random order: [(writer, reader)]."""
    edges = full.edges()
    return [edges[i] for i in torch.randperm(len(edges), generator=generator).tolist()]


# Random circuits


def random_circuits(circuit, n=100, *, seed=0, match="layers"):
    """Random circuits of the same size as a given one, for comparison: [Circuit].

    match: "layers" draws equally many edges between the same two layers (from the embedding, or
    layer 0, …; to layer 0, …, or the logits), so that random circuits are as deep; "size" draws
    equally many edges anywhere. If the circuit has all edges between two layers, so do they.
    Raises UserError for fewer than one.
    """
    check_choice("match", match, ("layers", "size"))
    check_count("n", n)
    edges = list(zip(*circuit.exists.T.nonzero().T.tolist(), strict=True))  # (reader, writer)
    in_circuit = circuit.mask.T[circuit.exists.T]  # [edge]
    groups = {}
    for number, (reader, writer) in enumerate(edges):
        ends = layer_of(circuit.writers[writer]), layer_of(circuit.readers[reader])
        groups.setdefault(ends if match == "layers" else None, []).append(number)

    generator = seeded_generator(seed)
    drawn = []
    for _ in range(n):
        chosen = []
        for numbers in groups.values():
            n_here = int(in_circuit[numbers].sum())
            order = torch.randperm(len(numbers), generator=generator)[:n_here]
            chosen += [numbers[i] for i in order.tolist()]
        drawn.append(take_edges(circuit, chosen))
    return drawn


def layer_of(node):
    """The layer of a node or an input, as "L0"; "embed" and "logits" are layers of their own."""
    return node.split("H")[0].split(".")[0]


# Hypothesis tests


@dataclass(frozen=True, eq=False)
class CircuitTest:
    """The result of a hypothesis test of a circuit.

    name: the test. statistic: the measured value. p_value: the probability of such a value under
    the null hypothesis. Both are floats; for minimality, those of the edge with the largest
    p-value. alpha: the significance level. holds: whether the circuit passes. parts, p_values: for
    minimality, the edges and their p-values [edge].
    """

    name: str
    statistic: float
    p_value: float
    alpha: float
    holds: bool
    parts: list | None = None
    p_values: torch.Tensor | None = None


def check_alpha(alpha):
    """Raises UserError unless a significance level is between 0 and 1."""
    check_number("alpha", alpha, lambda level: 0 < level < 1, "between 0 and 1")


def equivalence_test(run, circuit, *, epsilon=0.1, alpha=0.05):
    """Equivalence: does the circuit beat the model about as often as the reverse? A CircuitTest.

    Null hypothesis: among all prompts, the share with m(C) > m(M) is within 1/2 ± epsilon. The
    statistic is that share among these prompts; ties count half. p is the exact binomial
    probability, at the edge of that range, of a share as far from 1/2. The circuit passes unless
    p < alpha; with few prompts almost every circuit does. The test only sees signs: a circuit that
    is slightly behind on every prompt fails. Raises UserError for an epsilon outside 0 to 1/2.
    """
    check_alpha(alpha)
    check_number("epsilon", epsilon, lambda width: 0 <= width < 0.5, "0 or more, below 0.5")
    whole = at_least_float32(run.value(run.full))
    ahead = at_least_float32(run.value(circuit)) - whole
    ties = ahead.abs() <= SAME * whole.abs().mean()
    wins = torch.where(ties, 0.5, (ahead > 0).double())
    share = wins.mean().item()
    p = share_pvalue(share, len(wins), epsilon)
    return CircuitTest("equivalence", share, p, alpha, p >= alpha)


def share_pvalue(share, n, epsilon):
    """The probability that n coins, each heads with probability 1/2 + epsilon, give a share of
    heads at least as far from 1/2 as `share`."""
    heads = torch.arange(n + 1).double()
    log_ways = math.lgamma(n + 1) - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
    log_chance = (log_ways + heads * math.log(0.5 + epsilon)
                  + (n - heads) * math.log(0.5 - epsilon))
    as_far = (heads / n - 0.5).abs() >= abs(share - 0.5) - 1e-9
    return min(1.0, log_chance.exp()[as_far].sum().item())


def independence_test(run, circuit, *, alpha=0.05, n_draws=1000, seed=0):
    """Independence: is the rest of the model uninformative about its answer? A CircuitTest.

    Null hypothesis: over prompts, the metric of the model without the circuit's edges is
    independent of the model's metric. The statistic is their HSIC (`hsic_test`), and p comes from
    permuting prompts. The circuit passes unless p < alpha. Raises UserError for fewer than four
    prompts, which have too few permutations, or fewer than one draw.
    """
    check_alpha(alpha)
    check_count("n_draws", n_draws)
    whole = run.value(run.full)
    rest = run.value(run.full.without(circuit.edges()))
    statistic, p = hsic_test(rest, whole, n_draws=n_draws, seed=seed)
    return CircuitTest("independence", statistic, p, alpha, p >= alpha)


def hsic_test(one, other, *, n_draws=1000, seed=0):
    """(HSIC, p-value) of two values for each prompt, [batch] each; HSIC is 0 under independence.

    The Hilbert-Schmidt independence criterion is the mean, over pairs of prompts, of the product of
    two centred kernels. Each kernel is Gaussian in the distance of the values, and its width is
    their median distance (Gretton et al. 2005). HSIC detects more than correlation. p: how often it
    is as large when the prompts of one are permuted. Raises UserError for fewer than four prompts.
    """
    n = len(one)
    if n < 4:
        raise UserError(f"{n} prompts have too few permutations for a test of independence; give "
                        "four or more")
    kernel = centred_kernel(one)
    other_kernel = centred_kernel(other)
    observed = (kernel * other_kernel).mean().item()

    generator = seeded_generator(seed)
    null = []
    for _ in range(n_draws):
        order = torch.randperm(n, generator=generator)
        null.append((kernel * other_kernel[order][:, order]).mean())
    # a sum in another order may be slightly smaller
    p = permutation_pvalue(observed - 1e-12, torch.stack(null))
    return observed, p.item()


def centred_kernel(values):
    """A centred Gaussian kernel of values [batch]; its width is their median distance, and its rows
    and columns sum to 0: [batch, batch], float64. All 0 if all values are the same."""
    values = values.detach().cpu().double()
    distances = (values[:, None] - values).abs()
    apart = distances[distances > SAME * values.abs().mean()]
    if not len(apart):
        return torch.zeros_like(distances)
    kernel = (-0.5 * (distances / apart.median()) ** 2).exp()
    kernel = kernel - kernel.mean(0, keepdim=True)
    return kernel - kernel.mean(1, keepdim=True)


def minimality_test(run, circuit, *, alpha=0.05, n_draws=100, seed=0):
    """Minimality: does removing each edge change more than removing a random edge? A CircuitTest.

    The random edge is one that was just added: the circuit is inflated by a random path of edges
    from the embedding to the logits, at least one of which is new, and one of the new edges is
    removed again (`random_edge_changes`). A change is the mean absolute change of the metric over
    prompts. Null hypothesis for each edge: its change is one of the random ones.

    The circuit passes if p < alpha for every edge. All nulls have to be rejected, so no correction
    for their number is needed. statistic and p_value are those of the worst edge. No p is below
    1 / (1 + n_draws). Raises UserError for a circuit with no edges or all of them, and for so few
    draws that no edge could pass.
    """
    check_alpha(alpha)
    check_count("n_draws", n_draws)
    if 1 / (1 + n_draws) >= alpha:
        raise UserError(f"n_draws={n_draws} has no p-value below alpha={alpha}; draw more than "
                        f"{int(1 / alpha)}")
    edges = circuit.edges()
    if not edges:
        raise UserError("the circuit has no edges, so none can be removed; add some")
    null = random_edge_changes(run, circuit, n_draws, seed=seed)

    whole = run.value(circuit)
    changes = torch.stack([mean_change(run.value(circuit.without([edge])), whole)
                           for edge in edges])
    p_values = torch.stack([permutation_pvalue(change, null) for change in changes])
    worst = p_values.argmax().item()
    return CircuitTest("minimality", changes[worst].item(), p_values[worst].item(), alpha,
                       bool((p_values < alpha).all()), edges, p_values)


def random_edge_changes(run, circuit, n_draws=100, *, seed=0):
    """The changes from removing a random edge of an inflated circuit, for `minimality_test`:
    [draw]. Raises UserError if the circuit has all edges."""
    if len(circuit) == len(run.full):
        raise UserError(f"the circuit has all {len(circuit)} edges of the model and cannot be "
                        "inflated; use a smaller one")
    generator = seeded_generator(seed)
    present = set(circuit.edges())
    changes = []
    while len(changes) < n_draws:
        path = random_path(run.full, generator)
        added = [edge for edge in path if edge not in present]
        if not added:
            continue
        inflated = replace(circuit, mask=circuit.mask | circuit.touching(added))
        edge = added[torch.randint(len(added), (), generator=generator)]
        changes.append(mean_change(run.value(inflated.without([edge])), run.value(inflated)))
    return torch.stack(changes)


def random_path(full, generator):
    """A random path from the embedding to the logits: [(writer, reader)]. Each step takes one of
    the writer's edges, all equally likely."""
    readers_of = {}
    for writer, reader in full.edges():
        readers_of.setdefault(writer, []).append(reader)
    path = []
    node = "embed"
    while node != "logits":
        reader = readers_of[node][torch.randint(len(readers_of[node]), (), generator=generator)]
        path.append((node, reader))
        node = node_of_input(reader)
    return path


def mean_change(value, before):
    """The mean absolute change of a metric [batch] over prompts: [], float64."""
    return (at_least_float32(value) - at_least_float32(before)).abs().mean().cpu().double()


def sufficiency_test(run, circuit, *, others, alpha=0.05):
    """Sufficiency: is the circuit closer to the model than random circuits are? A CircuitTest.

    others: [Circuit], as from `random_circuits`. Null hypothesis: the circuit is one of them. The
    statistic is |faithfulness - 1|, and p the share of circuits that are as close. The circuit
    passes if p < alpha. Raises UserError for so few others that it never could.
    """
    return compare_nearness(faithfulness_of_each(run, [circuit, *others]), alpha)


def compare_nearness(found, alpha):
    """`sufficiency_test`, given the Faithfulness of [circuit, *others]."""
    far = (found.mean - 1).abs()
    return compare_with_others("sufficiency", -far, alpha, sign=-1)


def necessity_test(run, circuit, *, others, alpha=0.05):
    """Necessity: does the model lose more without the circuit than without random circuits?

    Returns a CircuitTest. This is "partial" necessity: a model with backups may lose little. Null
    hypothesis: the circuit is one of the others. The statistic is the lost share of the behaviour,
    |1 - faithfulness of the model without the circuit|, and p the share of circuits whose removal
    loses as much. Random circuits of the same layers can, if they contain the same bottleneck.
    Otherwise as in `sufficiency_test`.
    """
    rests = [run.full.without(each.edges()) for each in (circuit, *others)]
    lost = (faithfulness_of_each(run, rests).mean - 1).abs()
    return compare_with_others("necessity", lost, alpha)


def compare_with_others(name, values, alpha, sign=1):
    """A CircuitTest: is the first of some values larger than the others, [1 + others]?"""
    check_alpha(alpha)
    if 1 / len(values) >= alpha:
        raise UserError(f"{len(values) - 1} other circuits have no p-value below alpha={alpha}; "
                        f"draw more than {int(1 / alpha)}")
    p = permutation_pvalue(values[0] - SAME, values[1:]).item()
    return CircuitTest(name, sign * values[0].item(), p, alpha, p < alpha)


# Stability


def jaccard(circuit, other):
    """The Jaccard index: edges in both circuits, divided by edges in either. 1 for equal circuits
    (also if both are empty), 0 for disjoint ones. Raises UserError for different models."""
    check_same_graph([circuit, other])
    either = int((circuit.mask | other.mask).sum())
    return int((circuit.mask & other.mask).sum()) / either if either else 1.0


def check_same_graph(circuits):
    """Raises UserError for circuits of models with different nodes."""
    for circuit in circuits[1:]:
        first = circuits[0]
        if (circuit.writers, circuit.readers) != (first.writers, first.readers):
            raise UserError(f"a circuit is of a model of {len(circuit.writers)} writers, another "
                            f"of {len(first.writers)}; compare circuits of one model")


@dataclass(frozen=True, eq=False)
class CircuitStability:
    """How much several circuits of one model agree.

    included: [edge], float64, the share of circuits that contain each edge, in the order of
    full.edges(). sizes: [circuit], the number of edges of each. pairwise: [pair], the Jaccard index
    of each pair. mean: the mean over pairs. chance: the expected mean if each circuit were a random
    set of equally many edges. full: the circuit of all edges.
    """

    included: torch.Tensor
    sizes: torch.Tensor
    pairwise: torch.Tensor
    chance: float
    full: Circuit

    @property
    def mean(self):
        """The mean Jaccard index of two of the circuits, a float."""
        return self.pairwise.mean().item()

    def always(self):
        """The edges in all of the circuits: [(writer, reader)]."""
        return [edge for edge, share in zip(self.full.edges(), self.included.tolist(), strict=True)
                if share == 1]


def circuit_stability(circuits):
    """How much two or more circuits of one model agree: a CircuitStability.
    Raises UserError for fewer than two, and for circuits of different models."""
    circuits = as_list("circuits", circuits, "a list of Circuits")
    if len(circuits) < 2:
        raise UserError(f"{len(circuits)} circuits cannot agree; give two or more")
    check_same_graph(circuits)
    exists = circuits[0].exists
    has = torch.stack([circuit.mask.T[exists.T] for circuit in circuits])  # [circuit, edge]
    return stability_of_sets(has, replace(circuits[0], mask=exists))


def stability_of_sets(has, full):
    """The CircuitStability of sets of edges, given as [circuit, edge], bool."""
    has = has.double()
    sizes = has.sum(1)
    shared = has @ has.T
    either = sizes[:, None] + sizes - shared
    overlap = torch.where(either > 0, shared / either.clamp(min=1), 1.0)
    one, other = torch.triu_indices(len(has), len(has), offset=1)

    # pairs of the same two sizes have the same chance
    kinds, counts = (each.tolist() for each in sizes.long().unique(return_counts=True))
    total = 0.0
    for i, (n, count) in enumerate(zip(kinds, counts, strict=True)):
        total += count * (count - 1) / 2 * random_jaccard(n, n, has.shape[1])
        for n_other, count_other in zip(kinds[:i], counts[:i], strict=True):
            total += count * count_other * random_jaccard(n, n_other, has.shape[1])
    chance = total / len(one)
    return CircuitStability(has.mean(0), sizes.long(), overlap[one, other], chance, full)


def random_jaccard(n, n_other, n_edges):
    """The expected Jaccard index of two random sets of n and n_other out of n_edges edges
    (hypergeometric)."""
    if n == n_other == 0:
        return 1.0
    total = 0.0
    for shared in range(max(0, n + n_other - n_edges), min(n, n_other) + 1):
        ways = math.comb(n, shared) * math.comb(n_edges - n, n_other - shared)
        total += ways / math.comb(n_edges, n_other) * shared / (n + n_other - shared)
    return total


def bootstrap_stability(scores, n, *, n_draws=200, seed=0):
    """How much circuits of the n largest scores agree over bootstrap draws: a CircuitStability.

    scores: EdgeScores [edge, batch]; prompts are redrawn from its columns, so the model does not
    run. Two draws share many prompts, so they agree more than two independent samples would.
    Raises UserError for a single prompt, and for n below 1 or above the number of edges.
    """
    n_edges = len(scores.full)
    n = check_count("n", n, most=n_edges)
    n_draws = check_count("n_draws", n_draws, least=2)  # one draw gives no pair of circuits
    ranked_edges(scores)  # raises for scores that are not finite
    values = at_least_float32(scores.values).cpu()
    draws = bootstrap_draws(values.shape[1], n_draws, seed=seed)
    has = torch.zeros(n_draws, n_edges, dtype=torch.bool)
    for i, draw in enumerate(draws):
        best = values[:, draw].mean(1).abs().argsort(descending=True, stable=True)[:n]
        has[i, best] = True
    return stability_of_sets(has, scores.full)


def acdc_over_orders(run, threshold, *, n_orders=10, seed=0):
    """ACDC's circuits for several random search orders, as in `removal_order`: [Circuit].

    `circuit_stability` measures how much they agree. Raises UserError for fewer than one order.
    """
    check_count("n_orders", n_orders)
    generator = seeded_generator(seed)
    return [prune(run, threshold=threshold, order=generator) for _ in range(n_orders)]


# All circuits of a small model


@dataclass(frozen=True, eq=False)
class AllSubsets(Faithfulness):
    """The faithfulness of every circuit that lacks some of a few parts.

    values, kept: [subset, batch]; gap: [batch]; mean: [subset]. parts: nodes or edges, as in
    `Circuit.touching`. members: [subset, part], bool: which parts each circuit contains; everything
    else in the model is always present.
    """

    parts: list = None
    members: torch.Tensor = None

    def named(self, subset):
        """The parts of a subset, given its number: a list."""
        return [part for part, there in zip(self.parts, self.members[subset].tolist(), strict=True)
                if there]

    def best(self, aim="match"):
        """The best circuit of each size, among all: {size: (parts, faithfulness)}.

        aim: "match", closest to 1; "perform", highest. Of equals, the first.
        """
        check_choice("aim", aim, ("match", "perform"))
        mean = self.mean.cpu()
        worth = mean if aim == "perform" else -(mean - 1).abs()
        sizes = self.members.sum(1)
        found = {}
        for size in range(len(self.parts) + 1):
            subset = worth.masked_fill(sizes != size, -math.inf).argmax().item()
            found[size] = (self.named(subset), mean[subset].item())
        return found

    def minimal(self, threshold=0.9):
        """All minimal circuits: sets of parts that reach the threshold, while none of their proper
        subsets does: [parts], smallest first.

        Faithfulness can fall when a part is added, so a set above the threshold may have subsets
        both above and below it. Raises UserError for NaN and for a threshold of 0 or less, which
        the empty circuit reaches.
        """
        if not threshold > 0:
            raise UserError(f"threshold={threshold} is reached by the empty circuit; choose one "
                            "above 0")
        reach = (self.mean.cpu() >= threshold).nonzero().flatten()
        reach = reach[self.members[reach].sum(1).argsort(stable=True)]
        found = []
        for subset in reach.tolist():
            members = self.members[subset]
            if not any((self.members[smaller] <= members).all() for smaller in found):
                found.append(subset)
        return [self.named(subset) for subset in found]


def all_subsets(run, parts):
    """Runs every circuit that lacks some of a few parts: AllSubsets.

    parts: at most 16 nodes or edges, as in `Circuit.touching`. A circuit that lacks a node lacks
    all of its edges, including those with other nodes. It takes 2^parts runs. For a model with more
    than 16 edges, pass only those that matter, such as the edges found by `eap` and `acdc`, or pass
    nodes.
    Raises UserError for no parts, for more than 16, and for repeated or unknown ones.
    """
    parts = as_list("parts", parts, "a list of edges, or names of nodes")
    if not 0 < len(parts) <= MOST_PARTS:
        raise UserError(f"{len(parts)} parts have {2 ** min(len(parts), 64):,} subsets or more; "
                        f"give 1 to {MOST_PARTS}")
    removes = [run.full.touching([part]) for part in parts]
    if len({str(part) for part in parts}) < len(parts):
        raise UserError(f"one of the {len(parts)} parts occurs twice; pass each once")

    numbers = torch.arange(2 ** len(parts))
    members = (numbers[:, None] >> torch.arange(len(parts)) & 1).bool()  # [subset, part]
    circuits = []
    for row in members.tolist():
        mask = run.full.mask.clone()
        for removed, there in zip(removes, row, strict=True):
            if not there:
                mask &= ~removed
        circuits.append(replace(run.full, mask=mask))
    found = faithfulness_of_each(run, circuits)
    return AllSubsets(found.values, ("subset",), found.kept, found.gap, parts, members)


# The full report on one circuit


@dataclass(frozen=True, eq=False)
class CircuitReport:
    """The full report on one circuit, for `print`.

    n_edges, n_edges_of_model: the sizes. faithfulness: a Faithfulness. random: the Faithfulness of
    random circuits of the same size and layers, [circuit]. tests: {name: CircuitTest}. stability: a
    CircuitStability of circuits of this size over draws of prompts; None without scores.
    """

    n_edges: int
    n_edges_of_model: int
    faithfulness: Faithfulness
    random: Faithfulness
    tests: dict
    stability: CircuitStability | None = None

    @property
    def holds(self):
        """Whether the circuit passes all of the tests."""
        return all(test.holds for test in self.tests.values())

    def lines(self):
        """The report as lines of text."""
        low, high = (float(end) for end in self.faithfulness.ci())
        chance = self.random.mean.cpu().double()
        ends = chance.quantile(chance.new_tensor([0.025, 0.5, 0.975])).tolist()
        lines = [f"{self.n_edges} of {self.n_edges_of_model} edges keep "
                 f"{self.faithfulness.mean.item():.2f} ({low:.2f} to {high:.2f})",
                 f"{len(chance)} random circuits of the same layers keep {ends[1]:.2f} "
                 f"({ends[0]:.2f} to {ends[2]:.2f})"]
        for name, test in self.tests.items():
            verdict = "passes" if test.holds else "fails"
            lines.append(f"{name:<13} {verdict:<6}  {test.statistic:8.3g}  p = {test.p_value:.3f}")
        if self.stability is not None:
            lines.append(f"circuits from other draws of prompts share {self.stability.mean:.2f} of "
                         f"their edges (chance: {self.stability.chance:.2f})")
        return lines

    def __str__(self):
        return "\n".join(self.lines())


def evaluate_circuit(run, circuit, *, scores=None, n_random=100, n_draws=100, epsilon=0.1,
                     alpha=0.05, seed=0):
    """Runs every test of a circuit with one CircuitRun: a CircuitReport.

    run: a CircuitRun; its mode and key_mask are used throughout. circuit: a Circuit of its model.
    scores: EdgeScores, to measure how stable circuits of this size are over prompts. n_random: the
    number of random circuits of the same size and layers. n_draws: draws for minimality's null.
    epsilon, alpha: as in the tests. It takes about 2 * n_random + 2 * n_draws runs, plus one for
    each edge of the circuit.
    Raises UserError for a circuit with no edges or all of them, which cannot be compared with
    anything, for fewer than four prompts, and where the tests do.
    """
    check_circuit(circuit)
    if not 0 < len(circuit) < len(run.full):
        raise UserError(f"the circuit has {len(circuit)} of {len(run.full)} edges, so no other of "
                        "its size exists; use one that has some edges and lacks some")
    others = random_circuits(circuit, n_random, seed=seed)
    found = faithfulness_of_each(run, [circuit, *others])
    alone = Faithfulness(found.values[0], (), found.kept[0], found.gap)
    chance = Faithfulness(found.values[1:], ("circuit",), found.kept[1:], found.gap)

    tests = [
        equivalence_test(run, circuit, epsilon=epsilon, alpha=alpha),
        independence_test(run, circuit, alpha=alpha, seed=seed),
        minimality_test(run, circuit, alpha=alpha, n_draws=n_draws, seed=seed),
        compare_nearness(found, alpha),
        necessity_test(run, circuit, others=others, alpha=alpha),
    ]
    stability = None
    if scores is not None:
        stability = bootstrap_stability(scores, len(circuit), seed=seed)
    return CircuitReport(len(circuit), len(run.full), alone, chance,
                         {test.name: test for test in tests}, stability)
