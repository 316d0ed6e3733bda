"""Linear probes: what can be decoded from an activation, and whether the model uses it.

    probe = fit_probe(X, y, groups)              # held-out accuracy; a group is never split
    selectivity(X, y, tokens)                    # compared with meaningless labels
    untrained_accuracy(model, tokens, y, at=at)  # compared with an untrained model
    concept_erasure(model, tokens, metric, probe, at=at, types=tokens)    # does the model need it?

High accuracy alone shows that a probe can find the information, not that the model uses it.

Chapter: COURSE_ROADMAP.md, 13 (decodable is not used)
Prerequisites: model.py, metrics.py, head_ablation.py
Next: experiments/superposition/model.py
Source: Hewitt & Liang 2019 (control tasks); Voita & Titov 2020 (description length); Belrose et al.
2023b (LEACE: least-squares concept erasure)
"""

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from activation_cache import check_cache
from metrics import as_numbers
from model import GPT
from utils import (
    UserError,
    as_list,
    check_count,
    check_function,
    check_number,
    check_tensor,
    seeded_generator,
)

BLOCKS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Probe:
    """A linear classifier: logits = (x - mean) / scale @ W + b.

    accuracies: on each fold, of a probe fitted on the other folds. classes: the labels of the
    columns of W [d, class]. W, b, mean and scale are fitted on all of the data, (X, y, groups).
    """

    classes: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    W: torch.Tensor
    b: torch.Tensor
    accuracies: torch.Tensor | None = None
    data: tuple | None = field(default=None, repr=False)

    @property
    def accuracy(self):
        """The mean accuracy over folds, on examples that the probe was not fitted on."""
        return self.accuracies.mean().item()

    def logits(self, X):
        """X [n, d] -> [n, class]. Raises UserError for another width."""
        check_tensor("X", X, "... d", is_float=True)
        if X.shape[-1] != len(self.mean):
            raise UserError(f"X is {list(X.shape)}; this probe reads {len(self.mean)} numbers for "
                            "each example")
        return (X - self.mean) / self.scale @ self.W + self.b

    def predict(self, X):
        """X [n, d] -> labels [n]."""
        return self.classes[self.logits(X).argmax(-1)]


def fit_probe(X, y, groups=None, l2=1e-3, *, n_folds=5, seed=0):
    """Fits a linear probe: logistic regression of y on X, with cross-validated accuracy.

    X: [n, d]. y: [n], integer labels, or texts, which are numbered in alphabetical order
    (`classes` and `predict` use the numbers). groups: [n]; examples of one group (such as one text)
    are always on the same side of a split. l2: adds the penalty l2 / 2 |W|^2 to the mean loss in
    nats. Features are standardised with the training side's mean and scale. seed: draws the folds.
    Returns a Probe. Raises UserError for a single class, labels that are not integers, more folds
    than groups, a negative l2, and values that are not finite.
    """
    given = X
    X, y = check_examples(X, y)
    folds = assign_folds(groups, len(y), n_folds, seed)

    accuracies = []
    for fold in range(n_folds):
        held_out = folds == fold
        probe = Probe(*fit_logistic(X[~held_out], y[~held_out], l2))
        accuracies.append((probe.predict(X[held_out]) == y[held_out]).float().mean())
    return Probe(*fit_logistic(X, y, l2), accuracies=torch.stack(accuracies),
                 data=(given, y, groups))


def label_ids(y):
    """Labels as a tensor on the CPU; texts are replaced by their rank in alphabetical order."""
    if isinstance(y, torch.Tensor):
        return y.cpu()
    try:
        labels = np.asarray(y)
    except ValueError:  # lists of several lengths
        labels = np.asarray(None)
    if labels.dtype.kind == "U" and labels.ndim:  # texts
        labels = np.unique(labels, return_inverse=True)[1]
    if labels.dtype.kind not in "biuf":
        raise UserError(f"labels have numpy's dtype {labels.dtype}; pass whole numbers, or texts")
    return torch.as_tensor(labels)


def check_examples(X, y):
    """X as float64 and y as ids, on the CPU; raises UserError if no probe can be fitted to them.
    """
    X = as_numbers(X, "X").detach().cpu()
    y = label_ids(y)
    if X.ndim != 2 or y.shape != X.shape[:1]:
        raise UserError(f"X is {list(X.shape)} and y {list(y.shape)}; pass [n, d] and [n]")
    if y.is_floating_point() or y.is_complex():
        raise UserError(f"y is {y.dtype}; pass integer labels, such as y.long()")
    if not X.isfinite().all():
        raise UserError(f"X has {int((~X.isfinite()).sum())} values that are not finite; mask them")
    if len(y.unique()) < 2:
        raise UserError("y has only one class; a probe needs two or more")
    return X, y


def assign_folds(groups, n, n_folds, seed):
    """The fold of each example, [n]; examples of one group share a fold."""
    names, index = index_groups(groups, n)
    n_folds = check_count("n_folds", n_folds, 2, len(names))
    order = torch.randperm(len(names), generator=seeded_generator(seed))
    return (order % n_folds)[index]


def index_groups(groups, n):
    """(the groups' names, each example's group index [n]). None: each example is its own group."""
    groups = torch.arange(n) if groups is None else label_ids(groups)
    if groups.shape != (n,):
        raise UserError(f"groups is {list(groups.shape)} for {n} examples; pass one for each")
    return groups.unique(return_inverse=True)


def fit_logistic(X, y, l2):
    """(classes, mean, scale, W, b) of penalised maximum likelihood, by L-BFGS from zero.

    Raises UserError for a penalty below 0 or infinite, for which no maximum exists.
    """
    check_number("l2", l2, lambda penalty: 0 <= penalty < math.inf, "0 or more, and finite")
    classes, target = y.unique(return_inverse=True)
    mean, scale = X.mean(0), X.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # for constant features
    inputs = (X - mean) / scale
    W = torch.zeros(X.shape[1], len(classes), dtype=X.dtype, requires_grad=True)
    b = torch.zeros(len(classes), dtype=X.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=200, tolerance_grad=1e-6,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ W + b, target) + l2 / 2 * W.pow(2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return classes, mean, scale, W.detach(), b.detach()


def control_task_labels(tokens, y, *, seed=0):
    """A control task: a random label for each token type, the same at every occurrence.

    y: the labels of the real task, any shape. Token types are placed in random order along the
    sorted labels, each over a length proportional to its frequency. Each type takes one of the
    labels beside it, so the classes keep their shares as nearly as the types allow. Such labels can
    be memorised from the types, but nothing in the model can represent them. Returns labels of
    tokens' shape. Raises UserError for a single type or class.
    """
    check_tensor("tokens", tokens, "...")
    types, index, counts = tokens.cpu().unique(return_inverse=True, return_counts=True)
    y = label_ids(y).flatten().sort().values
    if len(types) < 2 or y[0] == y[-1]:
        raise UserError(f"{len(types)} types, {len(y.unique())} classes; a control task needs two "
                        "or more of both")

    generator = seeded_generator(seed)
    labels = y[:1]
    while len(labels.unique()) < 2:  # a single class is not a task
        order = torch.randperm(len(types), generator=generator)
        within = torch.rand(len(types), generator=generator, dtype=torch.float64)
        place = (counts[order].cumsum(0) - within * counts[order]) / counts.sum()  # from 0 to 1
        labels = y[(place * len(y)).long().clamp(max=len(y) - 1)][order.argsort()]
    return labels[index].to(tokens.device)


@dataclass(frozen=True)
class Selectivity:
    """Held-out accuracies on the task and on a control task, and their difference."""

    task: float
    control: float

    @property
    def selectivity(self):
        """task - control: the accuracy that memorising the types cannot explain. It is 0 if y is
        itself a function of the type, however well the model knows it."""
        return self.task - self.control


def selectivity(X, y, tokens, groups=None, *, l2=1e-3, n_folds=5, seed=0):
    """Selectivity: a probe's accuracy on y minus its accuracy on `control_task_labels`.

    tokens: [n], the type of each example; the rest as in `fit_probe`. Types that occur in only one
    fold cannot be memorised: with many rare types, the control is low for any probe.
    """
    control = control_task_labels(label_ids(tokens), y, seed=seed)
    how = {"l2": l2, "n_folds": n_folds, "seed": seed}
    task = fit_probe(X, y, groups, **how).accuracy
    return Selectivity(task, fit_probe(X, control, groups, **how).accuracy)


@dataclass(frozen=True)
class DescriptionLength:
    """Description length: the bits needed to send the labels given X (bits), if all classes were
    equally likely (uniform_bits), and given only the classes' shares (entropy_bits)."""

    bits: float
    uniform_bits: float
    entropy_bits: float

    @property
    def compression(self):
        """How many times shorter than the uniform code (as in Voita & Titov). If one class is rare,
        it is above 1 even if X is useless."""
        return self.uniform_bits / self.bits

    @property
    def entropy_compression(self):
        """How many times shorter than the labels' entropy. If X is useless, it is about 1 or below,
        because the classes' shares must be learned too."""
        return self.entropy_bits / self.bits


def mdl_online(X, y, groups=None, *, blocks=BLOCKS, l2=1e-3, seed=0):
    """Online (prequential) code length of y given X (Voita & Titov 2020): a DescriptionLength.

    The shuffled examples are sent in blocks, which end at the given shares of the data. The first
    block is sent with a uniform code, each later one with a probe fitted on all earlier blocks.
    Labels that are easy to decode become cheap early, which a final accuracy does not show. groups:
    [n]; groups are shuffled and sent whole (blocks end between groups), so nothing about a group is
    known before it comes. A probe's prediction is mixed with a uniform one, whose weight is
    n_classes / (n_before + n_classes).
    """
    X, y = check_examples(X, y)
    blocks = as_list("blocks", blocks, "shares of the examples, such as (0.1, 0.5)")
    for share in blocks:
        check_number("a block's end", share, lambda end: 0 < end <= 1, "a share, above 0 to 1")

    # whole groups in random order
    names, index = index_groups(groups, len(y))
    generator = seeded_generator(seed)
    turn = torch.randperm(len(names), generator=generator).argsort()[index]  # of its group
    order = turn.argsort(stable=True)
    X = X[order]
    classes, target = y[order].unique(return_inverse=True)
    n, n_classes = len(y), len(classes)

    # where the blocks end
    ends = torch.tensor([min(n, max(n_classes, math.ceil(share * n))) for share in (*blocks, 1)])
    group_ends = turn.bincount().cumsum(0)
    ends = group_ends[torch.searchsorted(group_ends, ends)].unique().tolist()

    # the first block with a uniform code, each other one with a probe fitted on all earlier ones
    bits = ends[0] * math.log2(n_classes)
    for start, end in itertools.pairwise(ends):
        probe = Probe(*fit_logistic(X[:start], target[:start], l2))
        log_probs = torch.full((end - start, n_classes), -math.inf, dtype=X.dtype)
        log_probs[:, probe.classes] = probe.logits(X[start:end]).log_softmax(-1)
        share = n_classes / (start + n_classes)  # of the uniform part, for classes not seen yet
        mixed = torch.logaddexp(log_probs + math.log1p(-share),
                                torch.full_like(log_probs, math.log(share / n_classes)))
        bits -= mixed.gather(1, target[start:end, None]).sum().item() / math.log(2)

    entropy = torch.special.entr(target.bincount() / n).sum().item() / math.log(2)
    return DescriptionLength(bits, n * math.log2(n_classes), n * entropy)


def layer_sweep(cache, y, *, name="resid_post", l2=1e-3, n_folds=5, seed=0):
    """One probe for each layer: {"0_resid_post": Probe, …}.

    cache: with `name` from every layer, [batch, pos, d]. y: [batch, pos]. Each text of the batch is
    one group, so that what positions of one text share cannot help.
    """
    check_cache(cache)
    how = {"l2": l2, "n_folds": n_folds, "seed": seed}
    return {f"{layer}_{name}": fit_on_texts(cache[name, layer], y, **how)
            for layer in range(cache.n_layers)}


def fit_on_texts(X, y, **how):
    """`fit_probe` on X [batch, pos, d] and y [batch, pos], with one group for each text."""
    y = torch.as_tensor(y)
    if y.shape != X.shape[:2]:
        raise UserError(f"y is {list(y.shape)} for positions {list(X.shape[:2])}; pass one label "
                        "for each")
    groups = torch.arange(len(y))[:, None].expand_as(y).flatten()
    return fit_probe(X.flatten(0, 1), y.flatten(), groups, **how)


def untrained_accuracy(model, tokens, y, *, at, l2=1e-3, n_folds=5, seed=0):
    """The held-out accuracy of the same probe on an untrained copy of the model: a baseline.

    tokens, y: [batch, pos]; at: the name of an activation [batch, pos, d]. Each text is one group.
    """
    fresh = GPT(model.cfg, seed).to(model.W_E).eval()
    with torch.no_grad():
        _, cache = fresh.run_with_cache(tokens, at)
    return fit_on_texts(cache[at], y, l2=l2, n_folds=n_folds, seed=seed).accuracy


def erasing(X, y):
    """A hook that erases a label from an activation [..., d], so that no linear probe finds it.

    X: [n, d], examples of the activation; y: [n]. The hook computes
    r(x) = x - (x - mean) @ read @ write. It gives all classes of X the same mean, with the smallest
    mean squared change of X. If the class means are equal, no linear probe has a smaller loss than
    a constant one. Arguments as in `erasure_of`.
    """
    mean, read, write = erasure_of(X, y)

    def erase(activation, hook):
        if activation.shape[-1] != len(mean):
            raise UserError(f"the activation has width {activation.shape[-1]} and the labels' "
                            f"examples {len(mean)}; use the hook that they came from")
        found = (activation.cpu().double() - mean) @ read  # float64: read is large if X is flat
        return activation - (found @ write).to(activation)

    return erase


def erasure_of(X, y):
    """LEACE (Belrose et al. 2023b): (mean [d], read [d, rank], write [rank, d]), float64.

    W whitens X, and U is an orthonormal basis of the whitened class means. Then read = W^T U and
    write = U^T W^+. The probe's own weights would not work: they do not span the differences
    between the class means.
    """
    X, y = check_examples(X, y)
    mean = X.mean(0)
    belongs = F.one_hot(y.unique(return_inverse=True)[1]).double()  # [n, class]
    variance, basis = torch.linalg.eigh((X - mean).T @ (X - mean) / len(X))
    varies = variance > 1e-12 * variance[-1]  # directions without variance hold no information
    scale = variance[varies].sqrt()
    basis = basis[:, varies]
    white = (X - mean) @ basis / scale  # [n, d]
    U, S, _ = torch.linalg.svd(white.T @ belongs / len(X), full_matrices=False)
    U = U[:, S > 1e-8]  # [d, rank]; class means weighted by their shares sum to zero
    return mean, basis / scale @ U, (basis * scale @ U).T


@dataclass(frozen=True)
class Erasure:
    """A metric of the clean run, with the labels erased, and with random labels erased [draw].

    accuracy: held-out accuracy of a new probe after the erasure. majority: the share of the largest
    class, which the accuracy should not exceed. (It can be below, because the folds' means differ.)
    """

    clean: float
    erased: float
    random: torch.Tensor
    accuracy: float
    majority: float


@torch.no_grad()
def concept_erasure(model, tokens, metric, probe, *, at, types=None, n_random=20, seed=0):
    """Erases a probe's labels from an activation, and measures what a metric loses: an Erasure.

    metric(logits) -> a number. at: the hook name at which the probe was fitted. The control erases
    random labels of the same kind, n_random times: `control_task_labels` of types. types: what the
    labels depend on, one for each of the probe's examples, in their order (token, position or
    text); without them, every example gets its own label.
    A probe can decode information that no later layer reads. The metric then changes no more than
    in the control.
    """
    if not isinstance(probe, Probe) or probe.data is None:
        raise UserError(f"probe is a {type(probe).__name__}; pass one that fit_probe returned")
    check_function("the metric", metric)
    n_random = check_count("n_random", n_random)
    X, y, groups = probe.data
    # in float64: rounding to the model's precision would reveal the labels
    X, _ = check_examples(X, y)
    types = torch.arange(len(y)) if types is None else torch.as_tensor(types).flatten().cpu()

    def metric_without(labels):
        return float(metric(model.run_with_hooks(tokens, [(at, erasing(X, labels))])))

    random = [metric_without(control_task_labels(types, y, seed=seed + draw))
              for draw in range(n_random)]
    after = fit_probe(erasing(X, y)(X, None), y, groups)
    majority = y.unique(return_counts=True)[1].max().item() / len(y)
    return Erasure(clean=float(metric(model(tokens))), erased=metric_without(y),
                   random=torch.tensor(random), accuracy=after.accuracy, majority=majority)
