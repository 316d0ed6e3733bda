"""Find a circuit: the connections between a model's parts that carry a behaviour.

The residual stream is a sum of writes, so each part's input can be split by who wrote it. An *edge*
is one writer's share in one reader's input. Writers are the embedding with its positions, "embed";
a head, "L0H1"; an MLP, "L0.mlp". Readers are a head's inputs, "L2H3.q", "L2H3.k", "L2H3.v"; an
MLP's, "L2.mlp"; and "logits". A *circuit* is a set of edges. To run it, every absent edge carries
another value of its write:

    input(v) = the stream before v + sum over absent edges (u, v) of (other_u - write_u)

The mode says what `other` is, in the same words as in head_ablation.py:

    resample  what u writes on the corrupted prompt that is paired with this one
    mean      its mean over the corrupted prompts and positions
    mean_pos  its mean over the corrupted prompts at each position (a column, if they are padded)
    zero      nothing

The clean run always shows the behaviour in question. A circuit with all edges gives the clean run;
a circuit with none (and "resample") gives the corrupted run.

    scores = eap(model, clean_tokens, corrupted_tokens, metric)     # estimates for all edges
    circuit = scores.circuit(20)                     # or acdc(...), which tests each edge
    faithfulness(circuit, model, clean_tokens, corrupted_tokens, metric=metric).mean

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: attribution.py, patching.py, head_ablation.py
Next: circuit_evaluation.py
Source: Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG, faithfulness); Conmy et al. 2023 (ACDC);
Wang et al. 2022 (completeness, minimality); Shi et al. 2024 (tests that a circuit must pass)
"""

import math
from dataclasses import dataclass, replace

import torch

from activation_cache import head_label
from attribution import quadrature
from head_ablation import MODES, mean_of_real
from metrics import (
    Effects,
    as_metric,
    as_numbers,
    bootstrap_draws,
    differentiable_metric,
    spearman,
)
from utils import (
    UserError,
    as_list,
    at_least_float32,
    check_choice,
    check_count,
    check_number,
    check_tensor,
    suggest_closest,
)

EAP_RULES = ("left", "right", "gauss")


def run_order(cfg):
    """(hook name, its nodes, whether they read), in the order of computation."""
    yield "hook_embed", ["embed"], False
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}."
        heads = [head_label(layer, head) for head in range(cfg.n_heads)]
        for letter in "qkv":
            yield f"{block}hook_{letter}_input", [f"{head}.{letter}" for head in heads], True
        yield f"{block}attn.hook_result", heads, False
        if not cfg.attn_only:
            yield f"{block}hook_mlp_in", [f"L{layer}.mlp"], True
            yield f"{block}hook_mlp_out", [f"L{layer}.mlp"], False
    last_stream = f"blocks.{cfg.n_layers - 1}.hook_resid_post" if cfg.n_layers else "hook_embed"
    yield last_stream, ["logits"], True


def is_edge(part):
    """Whether a part is an edge: a tuple that begins with two names, (writer, reader, …)."""
    return isinstance(part, (tuple, list)) and len(part) > 1 \
        and all(isinstance(name, str) for name in part[:2])


def check_circuit(circuit):
    """Raises UserError if this is not a Circuit."""
    if not isinstance(circuit, Circuit):
        raise UserError(f"the circuit is a {type(circuit).__name__}; pass a Circuit, such as "
                        "eap(...).circuit(20), before the model")


def node_of_input(reader):
    """The node that an input belongs to: "L2H3" for "L2H3.k"; an MLP or the logits is its own."""
    return reader[:-2] if reader.endswith((".q", ".k", ".v")) else reader


@dataclass(frozen=True, eq=False)
class Circuit:
    """A circuit: a set of edges between a model's parts.

    writers: names of nodes. readers: names of inputs ("L2H3.q", "L2.mlp") and "logits". Both are in
    the order of computation. write_points, read_points: {hook name: the slice of writers, or
    readers, at that hook}. exists, mask: [writer, reader], bool. exists is True if the writer comes
    before the reader; mask is True for the edges of the circuit.
    """

    writers: list
    readers: list
    write_points: dict
    read_points: dict
    exists: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, model, parts=None):
        """The circuit of some parts, as in `touching`: [] gives no edges, None gives all."""
        writers = []
        readers = []
        write_points = {}
        read_points = {}
        n_written = []  # [reader]: the number of writers before it
        for hook, nodes, do_read in run_order(model.cfg):
            if do_read:
                read_points[hook] = slice(len(readers), len(readers) + len(nodes))
                readers += nodes
                n_written += [len(writers)] * len(nodes)
            else:
                write_points[hook] = slice(len(writers), len(writers) + len(nodes))
                writers += nodes

        exists = torch.arange(len(writers))[:, None] < torch.tensor(n_written)
        full = cls(writers, readers, write_points, read_points, exists, exists)
        return full if parts is None else full.only(parts)

    def __len__(self):
        return int(self.mask.sum())

    def edges(self):
        """[(writer, reader)], reader by reader."""
        return [(self.writers[row], self.readers[column])
                for column, row in self.mask.T.nonzero().tolist()]

    def nodes(self):
        """The writers that at least one reader in the circuit reads."""
        return [name for name, row in zip(self.writers, self.mask, strict=True) if row.any()]

    def only(self, parts):
        """The circuit's edges that belong to some parts, as in `touching`."""
        return replace(self, mask=self.mask & self.touching(parts))

    def without(self, parts):
        """The circuit without some parts, as in `touching`."""
        return replace(self, mask=self.mask & ~self.touching(parts))

    def touching(self, parts):
        """The model's edges that belong to some parts: [writer, reader], bool.

        A part is an edge, (writer, reader, …), or the name of a node, which means all edges from it
        and to it; as a reader, "L0H1" means all three inputs of that head.
        Raises UserError for a part that the model lacks.
        """
        names = [*self.writers, *self.readers]
        mask = torch.zeros_like(self.exists)
        wanted = "edges (writer, reader), or names of nodes"
        for part in [parts] if isinstance(parts, str) else as_list("parts", parts, wanted):
            if not isinstance(part, str) and not is_edge(part):
                raise UserError(f"{part!r} is not a part of a circuit; pass {wanted}")
            ends = [part] if isinstance(part, str) else part[:2]
            if len(ends) == 1:  # a node
                found = self.exists & (self.writes_as(ends[0]) | self.reads_as(ends[0]))
            else:  # an edge
                found = self.exists & self.writes_as(ends[0]) & self.reads_as(ends[1])

            if not found.any():
                unknown = [name for name in ends if name not in names]
                closest = "".join(suggest_closest(name, names) for name in unknown)
                raise UserError(f"{part!r} has no edge in this model{closest}")
            mask |= found
        return mask

    def writes_as(self, name):
        """True for the writer of that name: [writer, 1], bool."""
        return torch.tensor([writer == name for writer in self.writers])[:, None]

    def reads_as(self, name):
        """True for the readers of that name, or the inputs of that node: [reader], bool."""
        return torch.tensor([name in (reader, node_of_input(reader)) for reader in self.readers])


def check_order_of(scores):
    """Raises UserError for scores that cannot be ranked because they are NaN or infinite."""
    n_wrong = int((~scores.isfinite()).sum())
    if n_wrong:
        raise UserError(f"{n_wrong} scores are not finite and cannot be ranked; use a metric that "
                        "is a number for each prompt")


@dataclass(frozen=True, eq=False)
class EdgeScores(Effects):
    """How much the metric rises when an edge carries the corrupted write instead of the clean one.

    values: [edge, batch], negative for edges that the metric needs. full: the circuit of all edges.
    """

    full: Circuit = None

    def edges(self):
        """[(writer, reader)] of all edges, ordered by reader."""
        return self.full.edges()

    def top(self, n):
        """[(writer, reader, mean)] of the n means of largest absolute value, largest first."""
        n = check_count("n", n, least=0)
        edges = self.edges()
        mean = self.mean
        check_order_of(mean)
        order = mean.abs().argsort(descending=True)
        return [(*edges[i], mean[i].item()) for i in order[:n].tolist()]

    def circuit(self, n):
        """The circuit of the n edges of top(n)."""
        return self.full.only(self.top(n))


def eap(model, clean_tokens, corrupted_tokens, metric, *, ig_steps=1, rule="left", key_mask=None):
    """Edge attribution patching: first-order estimates for all edges, as EdgeScores.

        score(u, v) = (corrupted write of u - clean write of u) . dm/d(input of v)

    summed over positions and d_model. It takes two runs and `ig_steps` gradients. EAP takes the
    gradient in the clean run. With more steps, EAP-IG averages gradients of runs whose embeddings
    are a given share of the way from clean to corrupted. rule chooses the shares:

        left   k / ig_steps for k = 0, …, ig_steps - 1: includes the clean end, not the corrupted
               one. This is the sum in the paper.
        right  k / ig_steps for k = 1, …, ig_steps: the reverse, as in the authors' code.
        gauss  Gauss-Legendre points, neither end: the closest to the integral for its steps.

    With 5 steps, left and right differ by up to 0.3 of the largest score; with 200, by 0.01.
    A write is part of every later input, so dm/d(write of u) is the sum of dm/d(input of v) over
    its readers. Hence u's edge scores sum to its node score.
    Arguments and errors as in `CircuitRun`; also raises UserError for an unknown rule.
    """
    check_choice("rule", rule, EAP_RULES)
    ig_steps = check_count("ig_steps", ig_steps)
    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric, key_mask=key_mask)
    shares, weights = quadrature(rule, ig_steps)
    readers = list(run.full.read_points)
    difference = run.other - run.writes  # [writer, batch, pos, d_model]

    # the gradients at each reader's input, [reader, batch, pos, d_model], weighted relative to the
    # first weight: equal weights then add up without rounding
    gradients = 0
    total = 0
    for share, weight in zip(shares, weights, strict=True):
        towards = share * difference[0]
        times = weight / weights[0]
        with model.hooks([("hook_embed", lambda embed, hook, towards=towards: embed + towards)]):
            _, _, grads = model.gradient_cache(
                clean_tokens, differentiable_metric(metric), readers, key_mask=key_mask)
        gradients = gradients + times * torch.cat([split_nodes(grads[name]) for name in readers])
        total += times

    scores = torch.einsum("wbpm,rbpm->rwb", difference, gradients / total)
    exists = run.full.mask.T.to(scores.device)  # [reader, writer]
    return EdgeScores(scores[exists], ("edge",), run.full)


def split_nodes(tensor):
    """[batch, pos, head, d_model], or the same without heads -> [node, batch, pos, d_model]."""
    return tensor.movedim(2, 0) if tensor.ndim == 4 else tensor[None]


class CircuitRun:
    """Runs circuits on some prompts, exactly.

    clean_tokens, corrupted_tokens: [batch, pos]. metric: a Metric, or a function of logits [batch,
    pos, d_vocab] -> [batch]. mode: what absent edges carry: "resample", "mean", "mean_pos" or
    "zero" (see the module's docstring). Means may be over any number of corrupted prompts, and for
    "zero" corrupted_tokens may be None. An MLP's bias is part of its write; attention's bias
    belongs to no head, and stays. key_mask: [batch, pos], True for real tokens, if clean and
    corrupted prompts are padded on the left at the same positions; both must then be equally many.
    Raises UserError for clean and corrupted prompts of different shapes, or identical ones, and in
    training mode with dropout.
    """

    def __init__(self, model, clean_tokens, corrupted_tokens, metric, *, mode="resample",
                 key_mask=None):
        check_choice("mode", mode, MODES)
        model.check_no_dropout()
        check_prompts(clean_tokens, corrupted_tokens, mode)
        self.model = model
        self.metric = as_metric(metric)
        self.full = Circuit.of(model)
        self.key_mask = key_mask

        if mode == "resample":  # one batch: a CPU multiplies few rows slowly
            both, streams = self.run_and_keep(torch.cat([clean_tokens, corrupted_tokens]))
            self.writes, self.other = both.chunk(2, 1)  # [writer, batch, pos, d_model]
            self.streams = [stream.chunk(2)[0] for stream in streams]
            return
        self.writes, self.streams = self.run_and_keep(clean_tokens)
        if mode == "zero":
            self.other = torch.zeros_like(self.writes)
        else:
            axes = (0, 1) if mode == "mean" else (0,)
            by_writer, _ = self.run_and_keep(corrupted_tokens)
            by_text = by_writer.movedim(0, 2)  # [batch, pos, writer, d_model]
            self.other = mean_of_real(by_text, key_mask, axes).movedim(2, 0)

    @torch.no_grad()
    def run_and_keep(self, tokens):
        """Each writer's write, [writer, batch, pos, d_model], and the streams before each block and
        at the end, a list of [batch, pos, d_model].

        tokens: [n * batch, pos], n texts for each row of the key mask.
        """
        key_mask = self.key_mask
        if key_mask is not None:
            key_mask = key_mask.repeat(len(tokens) // len(key_mask), 1)
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.model.cfg.n_layers)]
        with self.model.caching([*self.full.write_points, *streams]) as cache:
            # includes the position embedding, which hook_embed lacks
            embed = self.model.embed_prompts(tokens, key_mask)
            last = self.model.run_blocks(embed, key_mask=key_mask)
        writes = [split_nodes(cache[name]) for name in self.full.write_points]
        writes[0] = embed[None]
        return torch.cat(writes), [*(cache[name] for name in streams), last]

    @torch.no_grad()
    def value(self, circuit):
        """The metric for each prompt, [batch]."""
        return self.metric.of_stream(self.model, self.stream(circuit))

    @torch.no_grad()
    def stream(self, circuit):
        """The final stream, [batch, pos, d_model], from which `model.unembed` gives the logits.
        Raises UserError for a circuit of another model."""
        check_circuit(circuit)
        writes = self.full.write_points
        reads = self.full.read_points
        if circuit.write_points != writes or circuit.read_points != reads:
            raise UserError(f"the circuit is of another model, with {len(circuit.writers)} writers "
                            f"instead of {len(self.full.writers)}; make one of this model")
        absent = (self.full.mask & ~circuit.mask).to(self.writes)  # [writer, reader], 0 or 1
        change = self.other - self.writes  # of the clean run, until this run has its own writes

        def note_write(tensor, hook):
            rows = writes[hook.name]
            change[rows] = self.other[rows] - split_nodes(tensor)

        def swap_absent(tensor, columns):
            extra = torch.einsum("wr,wbpm->bprm", absent[:, columns], change)
            return tensor + extra.reshape(tensor.shape)

        def edit_input(tensor, hook):
            return swap_absent(tensor, reads[hook.name])

        # the hooks at which an edge is absent; the logits' input is edited after the run
        read_names = list(reads)
        to_logits = reads[read_names[-1]]
        edited = [name for name in read_names[:-1] if absent[:, reads[name]].any()]
        noted = [name for name, rows in writes.items() if absent[rows].any()]
        hooks = []
        if edited:
            hooks.append((edited, edit_input))
        if noted:
            hooks.append((noted, note_write))

        # before the first block that loses an edge nothing changes, so the run starts there
        layers = [int(name.split(".")[1]) for name in edited]
        start = min(layers) if layers else len(self.streams) - 1
        with self.model.hooks(hooks):
            stream = self.model.run_blocks(self.streams[start], start, key_mask=self.key_mask)
        return swap_absent(stream, to_logits) if absent[:, to_logits].any() else stream


def check_prompts(clean_tokens, corrupted_tokens, mode):
    """Raises UserError for corrupted prompts that do not fit the clean ones in this mode."""
    check_tensor("clean_tokens", clean_tokens, "batch pos")
    if mode == "zero":
        return
    if corrupted_tokens is not None:
        check_tensor("corrupted_tokens", corrupted_tokens, "batch pos")
    clean = list(clean_tokens.shape)
    corrupted = None if corrupted_tokens is None else list(corrupted_tokens.shape)
    as_many = mode == "resample"  # a mean may be over other prompts
    if corrupted is None or corrupted[-1] != clean[-1] or (as_many and corrupted != clean):
        raise UserError(f"clean_tokens is {clean}, corrupted_tokens is {corrupted}; make them "
                        "match position by position")
    if as_many and torch.equal(clean_tokens, corrupted_tokens):
        raise UserError("clean_tokens and corrupted_tokens are the same, so no edge has an effect; "
                        "change one")


def acdc(model, clean_tokens, corrupted_tokens, metric, *, threshold, order=None, mode="resample",
         key_mask=None):
    """ACDC: removes edges one at a time, as long as the metric stays close to the model's.

    Edges are tried from the last reader to the first and, for each reader, from the last writer to
    the first. An edge stays if removing it raises the distance |m(circuit) - m(model)|, averaged
    over prompts, by more than the threshold (in float32, below 1e-6 is rounding). If m is
    KL(clean || circuit), m(model) is 0 and the distance is the KL. order: another order, as in
    `removal_order`; of two edges that can replace each other, the one tried first is removed.
    Returns the Circuit that remains. Other arguments and errors as in `CircuitRun`; also raises
    UserError where `removal_order` does.
    """
    check_threshold(threshold)
    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric, mode=mode,
                     key_mask=key_mask)
    return prune(run, threshold=threshold, order=order)


def check_threshold(threshold):
    """Raises UserError for an `acdc` threshold below 0, or NaN."""
    check_number("threshold", threshold, lambda least: least >= 0, "0 or more")


def prune(run, *, threshold, order=None):
    """`acdc` with an existing CircuitRun: a Circuit."""
    check_threshold(threshold)
    circuit = run.full
    whole = run.value(run.full)
    distance = 0.0
    for edge in removal_order(run.full, order):
        smaller = circuit.without([edge])
        somebody_reads_the_reader = node_of_input(edge[1]) in ("logits", *circuit.nodes())
        distance_without = distance
        if somebody_reads_the_reader:
            distance_without = (run.value(smaller) - whole).abs().mean().item()
        if not math.isfinite(distance_without):
            raise UserError(f"without {edge[0]} -> {edge[1]} the metric is {distance_without}, "
                            "which no threshold can judge; use one that is a number for each "
                            "prompt")
        if distance_without - distance <= threshold:
            circuit = smaller
            distance = distance_without
    return circuit


def removal_order(full, order=None):
    """The order in which ACDC tries to remove edges: [(writer, reader)], every edge once.

    full: the circuit of all edges. order: None means from the last reader to the first and, for
    each, from the last writer to the first. A torch.Generator means a random order among those that
    the algorithm allows: later layers come before earlier ones, but the inputs of one layer's
    heads, and the writers of one input, may come in any order. A list must hold every edge once, or
    every reader, whose edges then go from the last writer to the first.
    Raises UserError for a list in which edges are missing, repeated, or not the model's.
    """
    if order is None:
        return full.edges()[::-1]
    if isinstance(order, torch.Generator):
        return shuffled_removals(full, order)

    edges = []
    wanted = "a torch.Generator, or a list of all edges or all readers"
    for part in as_list("order", order, wanted):
        if not isinstance(part, str) and not is_edge(part):
            raise UserError(f"{part!r} is not an edge; order is {wanted}")
        if isinstance(part, str):
            edges += [edge for edge in full.edges()[::-1] if edge[1] == part]
        else:
            edges.append(tuple(part[:2]))
    check_each_edge_once(full, edges, "order")
    return edges


def shuffled_removals(full, generator):
    """A random order for `removal_order`."""
    of_reader = {}
    for writer, reader in full.edges():
        of_reader.setdefault(reader, []).append((writer, reader))

    # readers computed in parallel: a layer's queries, keys and values; an MLP; the logits
    stages = {}
    for reader in full.readers:
        layer = reader.split("H")[0] if "H" in reader else reader
        stages.setdefault(layer, []).append(reader)

    edges = []
    for readers in reversed(stages.values()):
        for i in torch.randperm(len(readers), generator=generator).tolist():
            own = of_reader[readers[i]]
            edges += [own[k] for k in torch.randperm(len(own), generator=generator).tolist()]
    return edges


def check_each_edge_once(full, edges, what):
    """Raises UserError unless a list holds each of the model's edges once; `what` names the list.
    """
    wanted = set(full.edges())
    unknown = [edge for edge in edges if edge not in wanted]
    if unknown:
        raise UserError(f"{what} holds {unknown[0]}, which is not an edge of this model; pass "
                        "edges of Circuit.of(model).edges()")
    if len(edges) != len(wanted) or len(set(edges)) != len(wanted):
        raise UserError(f"{what} holds {len(edges)} edges, {len(set(edges))} different ones, of "
                        f"the model's {len(wanted)}; pass each once")


@dataclass(frozen=True, eq=False)
class Faithfulness(Effects):
    """The share of a behaviour that a circuit keeps: an Effects; for one circuit, without cells.

    kept: [*cells, batch], m(C) - m(0). gap: [batch], m(M) - m(0). values: [*cells, batch],
    kept / gap, which varies wildly for a prompt with a small gap. So `mean` is not their mean but
    the ratio of the means, in which each prompt counts by its gap, and `ci` is an interval of that
    ratio.
    """

    kept: torch.Tensor = None
    gap: torch.Tensor = None

    @property
    def mean(self):
        """mean(kept) / mean(gap), a tensor [*cells]."""
        return at_least_float32(self.kept).mean(-1) / at_least_float32(self.gap).mean()

    def drawn_means(self, n_draws=2000, *, level=0.95, seed=0):
        """Bootstrap draws of `mean`, each from equally many prompts: [*cells, draw].
        Raises UserError for a single prompt."""
        draws = bootstrap_draws(len(self.gap), n_draws, level=level, seed=seed)
        times = torch.zeros(draws.shape, dtype=torch.float64)  # how often each prompt is drawn
        times.scatter_add_(1, draws, torch.ones_like(times))
        return self.kept.cpu().double() @ times.T / (times @ self.gap.cpu().double())

    def ci(self, level=0.95, seed=0):
        """(low, high), each [*cells]: a bootstrap interval of the ratio, over prompts. With few
        prompts it is too narrow, like that of `bootstrap_ci`. Raises UserError for a single prompt.
        """
        ratios = self.drawn_means(level=level, seed=seed)
        ends = ratios.new_tensor([0.5 - level / 2, 0.5 + level / 2])
        low, high = ratios.quantile(ends, dim=-1)
        return low, high


def faithfulness(circuit, model, clean_tokens, corrupted_tokens, *, metric, mode="resample",
                 key_mask=None):
    """How much of a behaviour a circuit C keeps, (m(C) - m(0)) / (m(M) - m(0)): a Faithfulness.

    m(0) is the metric with no edges, m(M) with all. Faithfulness is 0 for no edges and 1 for all;
    it leaves this range if one of two parts that oppose each other is left out. Other arguments and
    errors as in `CircuitRun`; also raises UserError if m(M) equals m(0).
    """
    check_circuit(circuit)
    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric, mode=mode,
                     key_mask=key_mask)
    found = faithfulness_of_each(run, [circuit])
    return Faithfulness(found.values[0], (), found.kept[0], found.gap)


def faithfulness_of_each(run, circuits):
    """`faithfulness` of several circuits with one CircuitRun: a Faithfulness [circuit].
    Raises UserError where it does."""
    empty = run.value(run.full.only([]))
    whole = run.value(run.full)
    gap = whole - empty
    if not gap.mean().abs() > 1e-6 * whole.abs().mean():  # a NaN too
        raise UserError(f"the metric is {whole.mean().item():.4g} with all edges and with none, so "
                        "there is nothing to keep; use prompts on which they differ")
    kept = [run.value(circuit) - empty for circuit in circuits]
    kept = torch.stack(kept) if kept else gap.new_zeros(0, len(gap))
    return Faithfulness(kept / gap, ("circuit",), kept, gap)


def completeness(circuit, model, clean_tokens, corrupted_tokens, *, metric, subsets,
                 mode="resample", key_mask=None):
    """|F(C without K) - F(M without K)| for each subset K, a list of parts: [subset].

    F is the mean metric. If this is small, the circuit breaks in the same way as the model, and no
    backup was left out of it. Other arguments and errors as in `CircuitRun`.
    """
    check_circuit(circuit)
    subsets = as_list("subsets", subsets, "a list of lists of parts")
    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric, mode=mode,
                     key_mask=key_mask)
    gaps = [run.value(circuit.without(subset)) - run.value(run.full.without(subset))
            for subset in subsets]
    return torch.stack(gaps).mean(1).abs() if gaps else torch.zeros(0)


@dataclass(frozen=True, eq=False)
class PartEffects(Effects):
    """How much the metric changes when each part of a circuit is removed: values [part, batch].

    parts: the nodes or edges, in the order of the values.
    """

    parts: list = None


def minimality(circuit, model, clean_tokens, corrupted_tokens, *, metric, parts=None, removed=(),
               mode="resample", key_mask=None):
    """m(C without K and v) - m(C without K) for each part v: PartEffects.

    A part whose removal never changes anything does not belong in the circuit. For
    `Circuit.of(model)` these are the exact effects, which `eap` estimates. parts, removed (K): as
    in `Circuit.touching`; parts=None means all nodes. Other arguments and errors as in
    `CircuitRun`; also raises UserError if there is no part.
    """
    check_circuit(circuit)
    parts = circuit.nodes() if parts is None else as_list("parts", parts, "a list of them")
    if not parts:
        raise UserError("the circuit has no edges, so no part of it can be removed; add some")
    run = CircuitRun(model, clean_tokens, corrupted_tokens, metric, mode=mode,
                     key_mask=key_mask)
    rest = circuit.without(removed)
    values = torch.stack([run.value(rest.without([part])) for part in parts])
    return PartEffects(values - run.value(rest), ("part",), parts)


def exact_edge_scores(run):
    """m(all edges but one) - m(all edges), exactly, for each edge: EdgeScores.

    run: a CircuitRun. `eap` estimates these; they are `minimality` of all edges, one at a time.
    """
    edges = run.full.edges()
    values = torch.stack([run.value(run.full.without([edge])) for edge in edges])
    return EdgeScores(values - run.value(run.full), ("edge",), run.full)


@dataclass(frozen=True)
class ApproximationReport:
    """spearman: the rank correlation. sign_agreement: the share of nonzero effects whose estimate
    has the right sign. misses: [(label, estimate, exact)], the largest errors first."""

    spearman: float
    sign_agreement: float
    misses: list


def approximation_report(estimate, exact, labels, *, n_misses=5):
    """Compares estimates for nodes or edges with the exact effects: an ApproximationReport.

    estimate, exact: [n], such as `eap(...).mean` and `minimality(...).mean`; n labels.
    Raises UserError for other shapes and for n < 2.
    """
    estimate = as_numbers(estimate, "estimate")
    exact = as_numbers(exact, "exact")
    labels = as_list("labels", labels, "one for each estimate")
    n_misses = check_count("n_misses", n_misses, least=0)
    if not estimate.shape == exact.shape == (len(labels),) or len(labels) < 2:
        raise UserError(f"{list(estimate.shape)} estimates, {list(exact.shape)} effects and "
                        f"{len(labels)} labels do not match; give two or more of each")
    agree = (estimate.sign() == exact.sign())[exact != 0].double().mean().item()
    worst = (estimate - exact).abs().argsort(descending=True)[:n_misses]
    misses = [(labels[i], estimate[i].item(), exact[i].item()) for i in worst]
    return ApproximationReport(spearman(estimate, exact).item(), agree, misses)
