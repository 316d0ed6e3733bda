"""Circuits: which connections between the parts of a model carry a behaviour.

A stream is a sum of writes, so what a part reads can be split by who wrote it. An *edge* is one
writer's share in one reader's input. Writers: the embedding with its positions, "embed"; a head,
"0.1"; an MLP, "0.mlp". Readers: a head's inputs, "2.3.q", "2.3.k", "2.3.v"; an MLP's, "2.mlp"; and
"logits". A *circuit* is a set of edges. In its run absent edges carry what another run writes:

    input(v) = the stream before v + sum over absent edges (u, v) of (other_u - write_u)

Everywhere `clean` is the run whose behaviour counts, and `corrupt` is where absent edges are taken
from: with all edges the run is the clean one, with none the corrupt one.

    scores = eap(model, clean, corrupt, metric)      # estimates of all edges, by the metric's slope
    circuit = scores.circuit(20)                     # or acdc(...), which tries each
    faithfulness(circuit, model, clean, corrupt, metric=metric).mean

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: attribution.py, patching.py, head_ablation.py
Next: probing.py
Source: Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG, faithfulness); Conmy et al. 2023 (ACDC);
Wang et al. 2022 (completeness, minimality); Shi et al. 2024 (what a circuit must stand)
"""

from dataclasses import dataclass, replace

import torch

from metrics import as_metric, differentiable_metric, spearman
from rerun import measured
from utils import UserError, seeded_generator, suggest_closest

ABLATIONS = ("corrupt", "mean", "zero")


def run_order(cfg):
    """(hook name, the nodes there, whether they read) in the order of the run."""
    yield "hook_embed", ["embed"], False
    for layer in range(cfg.n_layers):
        block, heads = f"blocks.{layer}.", [f"{layer}.{head}" for head in range(cfg.n_heads)]
        for letter in "qkv":
            yield f"{block}hook_{letter}_input", [f"{head}.{letter}" for head in heads], True
        yield f"{block}attn.hook_result", heads, False
        if not cfg.attn_only:
            yield f"{block}hook_mlp_in", [f"{layer}.mlp"], True
            yield f"{block}hook_mlp_out", [f"{layer}.mlp"], False
    yield f"{block}hook_resid_post" if cfg.n_layers else "hook_embed", ["logits"], True


def node_of_input(reader):
    """The node that an input belongs to: "2.3" for "2.3.k"."""
    return ".".join(reader.split(".")[:2])


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of edges of a model.

    writers, readers: the names of all nodes, in the order of the run. write_points, read_points:
    {hook name: the slice of the nodes there}. [writer, reader]: exists, True where the writer comes
    before the reader; mask, True for the edges of the circuit.
    """

    writers: list
    readers: list
    write_points: dict
    read_points: dict
    exists: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, model, parts=None):
        """The circuit of some parts, as in `touching`: of none for [], of all for None."""
        writers, readers, writes, reads, written = [], [], {}, {}, []
        for hook, nodes, do_read in run_order(model.cfg):
            names, points = (readers, reads) if do_read else (writers, writes)
            points[hook] = slice(len(names), len(names) + len(nodes))
            names += nodes
            written += [len(writers)] * len(nodes) if do_read else []  # whom each reader reads
        exists = torch.arange(len(writers))[:, None] < torch.tensor(written)
        full = cls(writers, readers, writes, reads, exists, exists)
        return full if parts is None else full.only(parts)

    def __len__(self):
        return int(self.mask.sum())

    def edges(self):
        """[(writer, reader)], reader by reader."""
        return [(self.writers[row], self.readers[column])
                for column, row in self.mask.T.nonzero().tolist()]

    def nodes(self):
        """The writers that somebody in the circuit reads."""
        return [name for name, row in zip(self.writers, self.mask, strict=True) if row.any()]

    def only(self, parts):
        """What the circuit has of some parts, as in `touching`."""
        return replace(self, mask=self.mask & self.touching(parts))

    def without(self, parts):
        """The circuit less some parts, as in `touching`."""
        return replace(self, mask=self.mask & ~self.touching(parts))

    def touching(self, parts):
        """[writer, reader], True for the model's edges that are one of the parts, (writer, reader),
        or lead from or to one, a node. As a reader, "0.1" is all three inputs of that head. Raises
        UserError for a part that the model lacks."""
        mask, names = torch.zeros_like(self.exists), [*self.writers, *self.readers]
        for part in [parts] if isinstance(parts, str) else parts:
            ends = (part,) if isinstance(part, str) else part[:2]
            rows = torch.tensor([name == ends[0] for name in self.writers])[:, None]
            columns = torch.tensor([ends[-1] in (name, node_of_input(name))
                                    for name in self.readers])
            found = self.exists & (rows | columns if len(ends) == 1 else rows & columns)
            if not found.any():
                near = "".join(suggest_closest(name, names) for name in ends if name not in names)
                raise UserError(f"{part!r} has no edge in this model{near}")
            mask |= found
        return mask


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """How much the metric rises with each edge's corrupt write in place of its clean one.

    full: the circuit of all edges. per_prompt: [edge, batch], negative for what the metric needs.
    """

    full: Circuit
    per_prompt: torch.Tensor

    @property
    def mean(self):
        """Averaged over prompts, [edge]."""
        return self.per_prompt.mean(-1)

    def edges(self):
        """[(writer, reader)] of all edges, reader by reader."""
        return self.full.edges()

    def top(self, n):
        """[(writer, reader, mean)] of the n largest means, whatever their sign, largest first."""
        edges, mean, order = self.edges(), self.mean, self.mean.abs().argsort(descending=True)
        return [(*edges[i], mean[i].item()) for i in order[: max(n, 0)].tolist()]

    def circuit(self, n):
        """The circuit of these n edges."""
        return self.full.only(self.top(n))


def eap(model, clean_tokens, corrupt_tokens, metric, *, ig_steps=1):
    """First-order estimates of all edges, by two runs and `ig_steps` gradients: EdgeScores.

        score(u, v) = (corrupt write of u - clean write of u) . dm/d(input of v)

    summed over positions and d_model. EAP takes the gradient in the clean run; with more steps,
    EAP-IG takes the mean over runs whose embeddings are k / ig_steps of the way from clean to
    corrupt, k = 0, …, ig_steps - 1. A write is part of every later input, so dm/d(write of u) is
    the sum of dm/d(input of v) over its readers: u's scores sum to the node's. As `CircuitRun`.
    """
    if ig_steps < 1:
        raise UserError(f"ig_steps={ig_steps} leaves no gradient; choose 1 or more")
    run, gradients = CircuitRun(model, clean_tokens, corrupt_tokens, metric), 0
    full, difference = run.full, run.other - run.writes
    for step in range(ig_steps):
        towards = step / ig_steps * difference[0]
        with model.hooks([("hook_embed", lambda embed, hook, towards=towards: embed + towards)]):
            grads = model.gradient_cache(
                clean_tokens, differentiable_metric(metric), list(full.read_points))[2]
        gradients = gradients + torch.cat([by_node(grads[name]) for name in full.read_points])
    scores = torch.einsum("wbpm,rbpm->rwb", difference, gradients / ig_steps)
    return EdgeScores(full, scores[full.mask.T.to(scores.device)])


def by_node(tensor):
    """[batch, pos, head, d_model], or without heads -> [node, batch, pos, d_model]."""
    return tensor.movedim(2, 0) if tensor.ndim == 4 else tensor[None]


class CircuitRun:
    """Runs circuits on some prompts, exactly.

    clean, corrupt: [batch, pos]. metric: a Metric, or logits [..., batch, pos, d_vocab] -> [...,
    batch]. ablation: what absent edges carry: "corrupt", the prompt's corrupt write; "mean", at
    each position the mean over the corrupt prompts, however many; "zero", nothing (corrupt may be
    None). An MLP's bias is part of its write; the attention's is nobody's, and stays. Raises
    UserError for prompts of two shapes, or twice the same, and in training with dropout.
    """

    def __init__(self, model, clean, corrupt, metric, *, ablation="corrupt"):
        if ablation not in ABLATIONS:
            raise UserError(f"ablation={ablation!r} is unknown; choose from {', '.join(ABLATIONS)}")
        model.need_no_dropout()
        axes = slice(ablation == "mean", None)  # a mean may be over other prompts
        shape = None if corrupt is None else corrupt.shape
        if ablation != "zero" and (shape is None or clean.shape[axes] != shape[axes]):
            raise UserError(f"clean is {list(clean.shape)}, corrupt is {shape and list(shape)}; "
                            "make them match position by position")
        if ablation == "corrupt" and torch.equal(clean, corrupt):
            raise UserError("clean and corrupt are the same, so no edge has an effect; change one")
        self.model, self.metric, self.full = model, as_metric(metric), Circuit.of(model)
        self.writes, self.streams = self.run_and_keep(clean)
        self.other = 0 * self.writes if ablation == "zero" else self.run_and_keep(corrupt)[0]
        if ablation == "mean":
            self.other = self.other.mean(1, keepdim=True)

    @torch.no_grad()
    def run_and_keep(self, tokens):
        """What each writer writes, [writer, batch, pos, d_model]; the streams before each block and
        at the end, a list of [batch, pos, d_model]."""
        streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(self.model.cfg.n_layers)]
        with self.model.caching([*self.full.write_points, *streams]) as cache:
            embed = self.model.embed(tokens)  # with the positions, which hook_embed lacks
            last = self.model.run_blocks(embed)
        writes = [by_node(cache[name]) for name in self.full.write_points]
        return torch.cat([embed[None], *writes[1:]]), [*(cache[name] for name in streams), last]

    @torch.no_grad()
    def value(self, circuit):
        """The metric for each prompt, [batch]."""
        return measured(self.metric, self.model, self.stream(circuit))

    @torch.no_grad()
    def stream(self, circuit):
        """What the unembedding reads, [batch, pos, d_model]; `model.unembed` gives the logits.
        Raises UserError for a circuit of another model."""
        writes, reads = self.full.write_points, self.full.read_points
        if circuit.write_points != writes or circuit.read_points != reads:
            raise UserError(f"the circuit is of another model, of {len(circuit.writers)} writers, "
                            f"not of {len(self.full.writers)}; make one of this model")
        absent = (self.full.mask & ~circuit.mask).to(self.writes)
        change = self.other - self.writes  # of the clean run, until this one has written

        def listen(tensor, hook):
            if hook.name in reads:
                return replaced(tensor, reads[hook.name])
            rows = writes[hook.name]
            change[rows] = self.other[rows] - by_node(tensor)

        def replaced(tensor, columns):
            extra = torch.einsum("wr,wbpm->bprm", absent[:, columns], change)
            return tensor + extra.reshape(tensor.shape)

        *inputs, (_, last) = reads.items()
        hooks = [name for name, columns in inputs if absent[:, columns].any()]
        # Nothing changes before the first block that loses an edge: the run is taken up there.
        start = min((int(name.split(".")[1]) for name in hooks), default=len(self.streams) - 1)
        hooks += [name for name, rows in writes.items() if absent[rows].any()]
        with self.model.hooks([(hooks, listen)] if hooks else []):
            stream = self.model.run_blocks(self.streams[start], start)
        return replaced(stream, last) if absent[:, last].any() else stream


def acdc(model, clean, corrupt, metric, *, threshold, ablation="corrupt"):
    """The circuit that is left when each edge that can be spared has been removed, one at a time.

    From the last reader to the first, for each from the last writer to the first, an edge stays if
    without it the distance |m(circuit) - m(model)|, averaged over prompts, rises by more than the
    threshold (in float32, below 1e-6 is rounding). Of KL(clean || circuit), m(model) is 0, and the
    distance is the KL. Else as `CircuitRun`.
    """
    if not threshold >= 0:
        raise UserError(f"threshold={threshold} is below 0; choose 0 or more")
    run = CircuitRun(model, clean, corrupt, metric, ablation=ablation)
    circuit, whole, distance = run.full, run.value(run.full), 0.0
    for edge in reversed(circuit.edges()):
        smaller, further = circuit.without([edge]), distance
        if node_of_input(edge[1]) in ("logits", *circuit.nodes()):  # else nobody reads the reader
            further = (run.value(smaller) - whole).abs().mean().item()
        if further - distance <= threshold:
            circuit, distance = smaller, further
    return circuit


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """per_prompt: [batch], wild where all edges do little. mean: the ratio of the means over
    prompts. interval: of that ratio, 95 % when prompts are drawn again; None for one."""

    per_prompt: torch.Tensor
    mean: float
    interval: tuple | None


def faithfulness(circuit, model, clean, corrupt, *, metric, ablation="corrupt", seed=0):
    """How much of a behaviour a circuit C keeps, (m(C) - m(0)) / (m(M) - m(0)): a Faithfulness.

    0 for no edges, 1 for all; outside of that where one of two parts that work against each other
    is left out. Else as `CircuitRun`; UserError also where m(M) is m(0).
    """
    run = CircuitRun(model, clean, corrupt, metric, ablation=ablation)
    empty, whole = run.value(run.full.only([])), run.value(run.full)
    kept, gap, interval = run.value(circuit) - empty, whole - empty, None
    if gap.mean().abs() <= 1e-6 * whole.abs().mean():
        raise UserError(f"the metric is {whole.mean().item():.4g} with all edges and with none, so "
                        "there is nothing to keep; take prompts that it tells apart")
    if len(gap) > 1:
        draws = torch.randint(len(gap), (2000, len(gap)), generator=seeded_generator(seed))
        ratios = kept.cpu().double()[draws].mean(1) / gap.cpu().double()[draws].mean(1)
        interval = tuple(ratios.quantile(ratios.new_tensor([0.025, 0.975])).tolist())
    return Faithfulness(kept / gap, (kept.mean() / gap.mean()).item(), interval)


def completeness(circuit, model, clean, corrupt, *, metric, subsets, ablation="corrupt"):
    """|F(C without K) - F(M without K)| for each subset K, a list of parts: [subset]. F is the mean
    metric; where this is small, the circuit breaks as the model does, and no stand-in was left out.
    Else as `CircuitRun`."""
    run = CircuitRun(model, clean, corrupt, metric, ablation=ablation)
    gaps = [run.value(circuit.without(subset)) - run.value(run.full.without(subset))
            for subset in subsets]
    return torch.stack(gaps).mean(1).abs() if gaps else torch.zeros(0)


def minimality(circuit, model, clean, corrupt, *, metric, parts=None, removed=(),
               ablation="corrupt"):
    """m(C without K and v) - m(C without K) for each part v: ([part, batch], parts).

    A part that never changes anything has no place there. For `Circuit.of(model)` these are the
    exact effects, which `eap` estimates. parts, removed (K): as in `Circuit.touching`; parts=None
    for all nodes. Else as `CircuitRun`; UserError also where there is no part.
    """
    parts = circuit.nodes() if parts is None else list(parts)
    if not parts:
        raise UserError("the circuit has no edges, so no part of it can be removed; add some")
    run = CircuitRun(model, clean, corrupt, metric, ablation=ablation)
    rest = circuit.without(removed)
    values = torch.stack([run.value(rest.without([part])) for part in parts])
    return values - run.value(rest), parts


@dataclass(frozen=True)
class ApproximationReport:
    """spearman: the correlation of the ranks. sign_agreement: the share with the right sign, of
    those with an exact effect. misses: [(label, estimate, exact)], the furthest off first."""

    spearman: float
    sign_agreement: float
    misses: list


def approximation_report(estimate, exact, labels, *, n_misses=5):
    """How near the estimates for nodes or edges come to the exact effects: an ApproximationReport.

    estimate, exact: [n], such as `eap(...).mean` and the mean over prompts of `minimality`; n
    labels. Raises UserError for other shapes and for n < 2.
    """
    if not estimate.shape == exact.shape == (len(labels),) or len(labels) < 2:
        raise UserError(f"{list(estimate.shape)} estimates, {list(exact.shape)} effects and "
                        f"{len(labels)} labels do not match; give two or more of each")
    agree = (estimate.sign() == exact.sign())[exact != 0].double().mean().item()
    worst = (estimate - exact).abs().argsort(descending=True)[:n_misses]
    misses = [(labels[i], estimate[i].item(), exact[i].item()) for i in worst]
    return ApproximationReport(spearman(estimate, exact).item(), agree, misses)
