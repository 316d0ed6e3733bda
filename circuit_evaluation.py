"""Test what a circuit is worth: over all sizes, against chance, and against other circuits.

That a circuit keeps 0.9 of a behaviour says little by itself. Would another ranking of the edges
have kept as much with fewer? Would random edges? Does the rest of the model know the answer too? Is
each edge needed? And does another sample of prompts, or another order of the search, give the same
circuit? Everything here is asked of one `CircuitRun`, which says the prompts, the metric, what
absent edges carry (mode), and which tokens are padding (key_mask):

    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric)
    scores = eap(model, clean_tokens, corrupted_tokens, metric, ig_steps=5)
    curve = faithfulness_curve(run, ranked_edges(scores))
    curve.cpr, curve.cmd, curve.cpr_ci()
    print(evaluate_circuit(run, scores.circuit(7), scores=scores))

The tests have two kinds of null hypotheses, and the two kinds of p-values read in opposite ways.
`equivalence_test` and `independence_test` suppose that the circuit is good, so it stands where p is
*not* small; few prompts let anything stand. `minimality_test`, `sufficiency_test` and
`necessity_test` suppose that it is no better than chance, so it stands where p *is* small. `holds`
of their results says which it is.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: circuits.py, metrics.py
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
MOST_PARTS = 16  # whose subsets are all run: 65,536 runs
SAME = 1e-6  # of the metric's size: values that differ by less are one

# Faithfulness over sizes


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve(Faithfulness):
    """The faithfulness of circuits of several sizes, each with all edges of the one before.

    values, kept: [size, batch]; gap: [batch]; mean: [size]. sizes: how many edges each has, from 0
    to all. n_edges: how many there are.

        CPR = integral of f(share) from 0 to 1        how well circuits perform: higher is better
        CMD = integral of |f(share) - 1| from 0 to 1  how far from the model: lower is better

    f is `mean`, by trapezoids between neighbouring sizes, each at the share of edges that it truly
    has. So a share that holds no more edges than the one before adds nothing: of 110 edges, all
    below 1 % are the size 0. (The benchmark's code puts the rounded size at the share that was
    asked for, and leaves out the piece below the smallest; in GPT-2, of 32,491 edges, that is less
    than 0.001 of CPR, where faithfulness is below 1 there.) CMD takes the distance at each size
    first, as the benchmark does, and the trapezoid then.
    """

    sizes: tuple = ()
    n_edges: int = 0

    @property
    def shares(self):
        """The sizes as shares of all edges, [size], float64."""
        return torch.tensor(self.sizes).double() / self.n_edges

    @property
    def cpr(self):
        """The area below the curve: 1 where all sizes are faithful, 0.5 for a straight line."""
        return torch.trapezoid(self.mean.cpu().double(), self.shares).item()

    @property
    def cmd(self):
        """The area between the curve and 1: 0 where all sizes are faithful."""
        return torch.trapezoid((self.mean.cpu().double() - 1).abs(), self.shares).item()

    def cpr_ci(self, level=0.95, seed=0):
        """(low, high), an interval of CPR for this ranking, by drawing prompts again and again.

        The ranking stays. Few prompts vary too little, as in `bootstrap_ci`: at level 0.95 the
        truth lies inside in about 0.84 of all cases with 5 prompts, 0.90 with 10, 0.93 with 40.
        Raises UserError for a single prompt.
        """
        return self.area_ci(lambda drawn: drawn, level, seed)

    def cmd_ci(self, level=0.95, seed=0):
        """(low, high), an interval of CMD, as in `cpr_ci`. CMD is a sum of distances, so where it
        is near 0 noise raises it, and the interval with it."""
        return self.area_ci(lambda drawn: (drawn - 1).abs(), level, seed)

    def area_ci(self, height, level, seed):
        """The middle `level` of the areas below height(the curve of the drawn prompts)."""
        drawn = self.drawn_means(level=level, seed=seed)  # [size, draw]
        areas = torch.trapezoid(height(drawn), self.shares, dim=0)
        ends = areas.quantile(areas.new_tensor([0.5 - level / 2, 0.5 + level / 2]))
        return ends[0].item(), ends[1].item()


def curve_sizes(n_edges, sizes=None):
    """The numbers of edges of a curve, each once, rising, from 0 to all: a tuple.

    sizes: None for the benchmark's shares, rounded down; "all" for every number; or a list of
    counts (ints) and shares (floats from 0 to 1). 0 and n_edges are added.
    Raises UserError for counts and shares that are not there.
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
    """The circuit of some edges, by their numbers in full.edges()."""
    reader, writer = full.exists.T.nonzero()[torch.as_tensor(numbers, dtype=torch.long)].T
    mask = torch.zeros_like(full.exists)
    mask[writer, reader] = True
    return replace(full, mask=mask)


def faithfulness_curve(run, ranking, *, sizes=None):
    """The faithfulness of the best edges of a ranking, over sizes: a FaithfulnessCurve.

    run: a CircuitRun. ranking: [(writer, reader)] with every edge of the model once, the best
    first, such as `ranked_edges`, `acdc_ranking` and `random_ranking` give. sizes: as in
    `curve_sizes`. A model run for each size. No edge is left out because it leads nowhere.
    Raises UserError for a ranking in which edges lack or come twice, for sizes that are not there,
    and where `faithfulness` does.
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
    """All edges, the best first: [(writer, reader)].

    scores: EdgeScores, or the exact effects of all edges (`minimality` with parts=edges). by:
    "size", whatever the sign, for circuits that do what the model does (CMD); "sign", the edges
    that the metric needs first and those that work against it last, for circuits that perform
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
    """All edges by how many of ACDC's thresholds they outlive, the best first: [(writer, reader)].

    Edges that outlive as many stand in the order of `Circuit.edges`, from the first reader on.
    order: as in `acdc`. Raises UserError for no thresholds or ones below 0.
    """
    counts = thresholds_outlived(run, thresholds, order=order)
    edges = run.full.edges()
    return [edges[i] for i in counts.argsort(descending=True, stable=True).tolist()]


def thresholds_outlived(run, thresholds, *, order=None):
    """How many of ACDC's thresholds each edge outlives: [edge], int64. As `acdc_ranking`."""
    thresholds = as_list("thresholds", thresholds, "a list of numbers, 0 or more")
    if not thresholds:
        raise UserError("thresholds is empty, so no edge is better than another; give some")
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
    """Random circuits of the size of one, to hold it against: [Circuit].

    match: "layers", as many edges between the same two layers (from the embedding, or layer 0, …;
    to layer 0, …, or the logits), so that chance has the depth of the circuit; "size", as many
    edges anywhere. Where the circuit has all edges between two layers, so have they.
    Raises UserError for less than one.
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
    """The layer of a node or an input, as "L0"; "embed" and "logits" are their own."""
    return node.split("H")[0].split(".")[0]


# Hypothesis tests


@dataclass(frozen=True, eq=False)
class CircuitTest:
    """A hypothesis test of a circuit.

    name: of the test. statistic: what was measured; p_value: how often chance does as much, both
    floats (for minimality those of the edge that comes off worst). alpha: the level. holds: whether
    the circuit stands. parts, p_values: for minimality, each edge and its own p-value [edge].
    """

    name: str
    statistic: float
    p_value: float
    alpha: float
    holds: bool
    parts: list | None = None
    p_values: torch.Tensor | None = None


def check_alpha(alpha):
    """Raises UserError unless a level of a test is between 0 and 1."""
    check_number("alpha", alpha, lambda level: 0 < level < 1, "between 0 and 1")


def equivalence_test(run, circuit, *, epsilon=0.1, alpha=0.05):
    """Whether the circuit beats the model about as often as the model beats it: a CircuitTest.

    Null hypothesis: of all prompts, the share on which m(C) > m(M) is within 1/2 ± epsilon. The
    statistic is that share of these prompts, ties counting half. p: how often a share at the edge
    of that range lies as far from 1/2 (exact, binomial). The circuit stands unless p < alpha; with
    few prompts nearly everything does. The test sees signs alone: a circuit that is behind by a
    hair on every prompt falls. Raises UserError for an epsilon outside of 0 to 1/2.
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
    """How often a share of n coins, each heads with probability 1/2 + epsilon, lies as far from 1/2
    as this one, or further."""
    heads = torch.arange(n + 1).double()
    log_ways = math.lgamma(n + 1) - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
    log_chance = (log_ways + heads * math.log(0.5 + epsilon)
                  + (n - heads) * math.log(0.5 - epsilon))
    as_far = (heads / n - 0.5).abs() >= abs(share - 0.5) - 1e-9
    return min(1.0, log_chance.exp()[as_far].sum().item())


def independence_test(run, circuit, *, alpha=0.05, n_draws=1000, seed=0):
    """Whether what is left without the circuit knows nothing of the model's answer: a CircuitTest.

    Null hypothesis: over prompts, the metric of the model without the circuit's edges is
    independent of the model's metric. The statistic is their `hsic`, p by permuting prompts. The
    circuit stands unless p < alpha. Raises UserError for less than four prompts, which have too few
    orders, or less than one draw.
    """
    check_alpha(alpha)
    check_count("n_draws", n_draws)
    whole = run.value(run.full)
    rest = run.value(run.full.without(circuit.edges()))
    statistic, p = hsic_test(rest, whole, n_draws=n_draws, seed=seed)
    return CircuitTest("independence", statistic, p, alpha, p >= alpha)


def hsic_test(one, other, *, n_draws=1000, seed=0):
    """(HSIC, p-value) of two values for each prompt, [batch] each: 0 where they are independent.

    HSIC is the mean over pairs of prompts of the product of two centred kernels, each Gaussian in
    the distance of the values and as wide as the median distance (Gretton et al. 2005). It sees
    more than a correlation. p: how often it is as large with the prompts of one in random order.
    Raises UserError for less than four prompts.
    """
    n = len(one)
    if n < 4:
        raise UserError(f"{n} prompts have too few orders for a test of independence; give four or "
                        "more")
    kernel = centred_kernel(one)
    other_kernel = centred_kernel(other)
    observed = (kernel * other_kernel).mean().item()

    generator = seeded_generator(seed)
    null = []
    for _ in range(n_draws):
        order = torch.randperm(n, generator=generator)
        null.append((kernel * other_kernel[order][:, order]).mean())
    # the same numbers in another order may sum to a little less
    p = permutation_pvalue(observed - 1e-12, torch.stack(null))
    return observed, p.item()


def centred_kernel(values):
    """Gaussian kernel of [batch] values, as wide as their median distance, its rows and columns
    summing to 0: [batch, batch], float64. All 0 where the values are all the same."""
    values = values.detach().cpu().double()
    distances = (values[:, None] - values).abs()
    apart = distances[distances > SAME * values.abs().mean()]
    if not len(apart):
        return torch.zeros_like(distances)
    kernel = (-0.5 * (distances / apart.median()) ** 2).exp()
    kernel = kernel - kernel.mean(0, keepdim=True)
    return kernel - kernel.mean(1, keepdim=True)


def minimality_test(run, circuit, *, alpha=0.05, n_draws=100, seed=0):
    """Whether removing each edge changes more than removing a random edge would: a CircuitTest.

    The random edge is one that was just added: the circuit is inflated by a random path of edges
    from the embedding to the logits, of which at least one is new, and one of the new ones is
    removed again (`random_edge_changes`). A change is the mean over prompts of the size of the
    change in the metric. Null hypothesis of each edge: its change is one of the random ones.

    The circuit stands where p < alpha for every edge, so all of the nulls must be rejected, and no
    correction for their number is needed; statistic and p_value are those of the worst edge. No p
    is below 1 / (1 + n_draws). Raises UserError for a circuit of no edges or of all, and for so few
    draws that no edge could stand.
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
    """What removing a random edge of an inflated circuit changes, for `minimality_test`: [draw].
    Raises UserError where the circuit has all edges."""
    if len(circuit) == len(run.full):
        raise UserError(f"the circuit has all {len(circuit)} edges of the model, so it can't be "
                        "inflated; take a smaller one")
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
    """A random path from the embedding to the logits: [(writer, reader)], from each writer on along
    any of its edges, each as likely."""
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
    """The mean size over prompts of the change of a metric [batch]: [], float64."""
    return (at_least_float32(value) - at_least_float32(before)).abs().mean().cpu().double()


def sufficiency_test(run, circuit, *, others, alpha=0.05):
    """Whether the circuit is nearer to the model than random circuits: a CircuitTest.

    others: [Circuit], such as `random_circuits` gives. Null hypothesis: it is one of them. The
    statistic is |faithfulness - 1|; p: how many of the others are as near. The circuit stands where
    p < alpha. Raises UserError for so few others that it never could.
    """
    return compare_nearness(faithfulness_of_each(run, [circuit, *others]), alpha)


def compare_nearness(found, alpha):
    """`sufficiency_test`, by the Faithfulness of [circuit, *others]."""
    far = (found.mean - 1).abs()
    return compare_with_others("sufficiency", -far, alpha, sign=-1)


def necessity_test(run, circuit, *, others, alpha=0.05):
    """Whether the model loses more without the circuit than without random ones: a CircuitTest.

    "Partial" necessity: a model with backups may lose little. Null hypothesis: the circuit is one
    of the others. The statistic is the share of the behaviour that is gone, |1 - faithfulness of
    the model without the circuit|; p: how many of the others take as much: of circuits of the same
    layers, those that hold the same bottleneck do. Else as in `sufficiency_test`.
    """
    rests = [run.full.without(each.edges()) for each in (circuit, *others)]
    lost = (faithfulness_of_each(run, rests).mean - 1).abs()
    return compare_with_others("necessity", lost, alpha)


def compare_with_others(name, values, alpha, sign=1):
    """The CircuitTest whether the first of some values is above the others, [1 + others]."""
    check_alpha(alpha)
    if 1 / len(values) >= alpha:
        raise UserError(f"{len(values) - 1} other circuits have no p-value below alpha={alpha}; "
                        f"draw more than {int(1 / alpha)}")
    p = permutation_pvalue(values[0] - SAME, values[1:]).item()
    return CircuitTest(name, sign * values[0].item(), p, alpha, p < alpha)


# Is it the only one?


def jaccard(circuit, other):
    """The edges that two circuits share, of those that either has: 1 for the same, 0 for none; 1
    where neither has any. Raises UserError for circuits of different models."""
    check_same_graph([circuit, other])
    either = int((circuit.mask | other.mask).sum())
    return int((circuit.mask & other.mask).sum()) / either if either else 1.0


def check_same_graph(circuits):
    """Raises UserError for circuits of models with other nodes."""
    for circuit in circuits[1:]:
        first = circuits[0]
        if (circuit.writers, circuit.readers) != (first.writers, first.readers):
            raise UserError(f"a circuit is of a model of {len(circuit.writers)} writers, another "
                            f"of {len(first.writers)}; compare circuits of one model")


@dataclass(frozen=True, eq=False)
class CircuitStability:
    """How much several circuits of one model agree.

    included: [edge], float64, the share of the circuits that has each edge, in the order of
    full.edges(). sizes: [circuit], how many edges each has. pairwise: [pair], the Jaccard of each
    two. mean: of these pairs. chance: what the mean would be if each circuit were a random set of
    as many edges. full: the circuit of all edges.
    """

    included: torch.Tensor
    sizes: torch.Tensor
    pairwise: torch.Tensor
    chance: float
    full: Circuit

    @property
    def mean(self):
        """The mean Jaccard of two of the circuits, a float."""
        return self.pairwise.mean().item()

    def always(self):
        """The edges that all of the circuits have: [(writer, reader)]."""
        return [edge for edge, share in zip(self.full.edges(), self.included.tolist(), strict=True)
                if share == 1]


def circuit_stability(circuits):
    """How much two or more circuits of one model agree: a CircuitStability.
    Raises UserError for less than two, and for circuits of different models."""
    circuits = as_list("circuits", circuits, "a list of Circuits")
    if len(circuits) < 2:
        raise UserError(f"{len(circuits)} circuits can not agree; give two or more")
    check_same_graph(circuits)
    exists = circuits[0].exists
    has = torch.stack([circuit.mask.T[exists.T] for circuit in circuits])  # [circuit, edge]
    return stability_of_sets(has, replace(circuits[0], mask=exists))


def stability_of_sets(has, full):
    """The CircuitStability of sets of edges, [circuit, edge], bool."""
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
    """The expected Jaccard of two random sets of n and n_other of n_edges edges (hypergeometric).
    """
    if n == n_other == 0:
        return 1.0
    total = 0.0
    for shared in range(max(0, n + n_other - n_edges), min(n, n_other) + 1):
        ways = math.comb(n, shared) * math.comb(n_edges - n, n_other - shared)
        total += ways / math.comb(n_edges, n_other) * shared / (n + n_other - shared)
    return total


def bootstrap_stability(scores, n, *, n_draws=200, seed=0):
    """How much the circuits of the n largest scores agree over draws of prompts: CircuitStability.

    scores: EdgeScores [edge, batch]; prompts are drawn again from its columns, so the model does
    not run. Two draws share many prompts, and are more alike than two fresh samples.
    Raises UserError for a single prompt, and for more edges than there are, or none.
    """
    n_edges = len(scores.full)
    n = check_count("n", n, most=n_edges)
    n_draws = check_count("n_draws", n_draws, least=2)  # one leaves no pair of circuits
    ranked_edges(scores)  # refuses what is not finite
    values = at_least_float32(scores.values).cpu()
    draws = bootstrap_draws(values.shape[1], n_draws, seed=seed)
    has = torch.zeros(n_draws, n_edges, dtype=torch.bool)
    for i, draw in enumerate(draws):
        best = values[:, draw].mean(1).abs().argsort(descending=True, stable=True)[:n]
        has[i, best] = True
    return stability_of_sets(has, scores.full)


def acdc_over_orders(run, threshold, *, n_orders=10, seed=0):
    """What ACDC finds in several random orders, as in `removal_order`: [Circuit].

    `circuit_stability` says how much they agree. Raises UserError for less than one order.
    """
    check_count("n_orders", n_orders)
    generator = seeded_generator(seed)
    return [prune(run, threshold=threshold, order=generator) for _ in range(n_orders)]


# All circuits of a small model


@dataclass(frozen=True, eq=False)
class AllSubsets(Faithfulness):
    """The faithfulness of every circuit that lacks some of a few parts.

    values, kept: [subset, batch]; gap: [batch]; mean: [subset]. parts: nodes or edges, as in
    `Circuit.touching`. members: [subset, part], bool, which of them each circuit has; it has all of
    the model besides.
    """

    parts: list = None
    members: torch.Tensor = None

    def named(self, subset):
        """The parts of a subset, by its number: a list."""
        return [part for part, there in zip(self.parts, self.members[subset].tolist(), strict=True)
                if there]

    def best(self, aim="match"):
        """The best circuit of each size, by trying all: {size: (parts, faithfulness)}.

        aim: "match", the nearest to 1; "perform", the highest. Of equals, the first.
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
        """All minimal circuits: sets of parts whose faithfulness reaches the threshold, while that
        of no proper subset does: [parts], the smallest first.

        Faithfulness may fall when a part is added, so a set above the threshold can have subsets
        above and below it. Raises UserError for a threshold of 0 or less, which the empty circuit
        reaches, and NaN.
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
    all of its edges, those with other nodes too. It takes 2^parts runs, so of a model with more
    edges than 16 pass those that do anything, such as the edges that `eap` and `acdc` name, or its
    nodes.
    Raises UserError for no parts, more than 16, or ones that come twice or are not there.
    """
    parts = as_list("parts", parts, "a list of edges, or names of nodes")
    if not 0 < len(parts) <= MOST_PARTS:
        raise UserError(f"{len(parts)} parts have {2 ** min(len(parts), 64):,} subsets or more; "
                        f"give 1 to {MOST_PARTS}")
    removes = [run.full.touching([part]) for part in parts]
    if len({str(part) for part in parts}) < len(parts):
        raise UserError(f"of the {len(parts)} parts one comes twice; pass each once")

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


# All of it for one circuit


@dataclass(frozen=True, eq=False)
class CircuitReport:
    """What one circuit stands: `print` it.

    n_edges, n_edges_of_model: the sizes. faithfulness: a Faithfulness. random: that of random
    circuits of its size and layers, [circuit]. tests: {name: CircuitTest}. stability: a
    CircuitStability of circuits of as many edges over draws of prompts; None without scores.
    """

    n_edges: int
    n_edges_of_model: int
    faithfulness: Faithfulness
    random: Faithfulness
    tests: dict
    stability: CircuitStability | None = None

    @property
    def holds(self):
        """Whether the circuit stands in all of the tests."""
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
            verdict = "stands" if test.holds else "falls"
            lines.append(f"{name:<13} {verdict:<6}  {test.statistic:8.3g}  p = {test.p_value:.3f}")
        if self.stability is not None:
            lines.append(f"circuits of other draws of prompts share {self.stability.mean:.2f} of "
                         f"their edges, chance {self.stability.chance:.2f}")
        return lines

    def __str__(self):
        return "\n".join(self.lines())


def evaluate_circuit(run, circuit, *, scores=None, n_random=100, n_draws=100, epsilon=0.1,
                     alpha=0.05, seed=0):
    """Everything that a circuit must stand, by one CircuitRun: a CircuitReport.

    run: a CircuitRun, whose mode and key_mask all of it uses. circuit: a Circuit of its model.
    scores: EdgeScores, for how stable circuits of as many edges are over prompts. n_random: random
    circuits, of the same size and layers. n_draws: of the null of minimality. epsilon, alpha: as in
    the tests. It takes about 2 * n_random + 2 * n_draws runs, and one for each edge of the circuit.
    Raises UserError for a circuit of no edges or of all, which there is nothing to hold against,
    for fewer than four prompts, and where the tests do.
    """
    check_circuit(circuit)
    if not 0 < len(circuit) < len(run.full):
        raise UserError(f"the circuit has {len(circuit)} of {len(run.full)} edges, and nothing to "
                        "be held against; take one that has some and lacks some")
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
