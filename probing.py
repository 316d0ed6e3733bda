"""Linear probes: what can be decoded from an activation, and whether the model uses it.

    probe = fit_probe(X, y, groups)              # held-out accuracy: no group is on both sides
    selectivity(X, y, tokens)                    # and on labels that mean nothing?
    untrained_accuracy(model, tokens, y, at=at)  # and without any training of the model?
    concept_erasure(model, tokens, metric, probe, at=at, types=tokens)    # is it needed?

A high accuracy alone says that a probe could find it, not that the model looks for it.

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

    accuracies: on each fold, of a probe that was fitted without it. classes: what the columns of W
    [d, class] stand for; W, b, mean and scale are fitted on all of the data, (X, y, groups).
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
        """The mean over the folds: a share of examples that the probe had not seen."""
        return self.accuracies.mean().item()

    def logits(self, X):
        """X [n, d] -> [n, class]. Raises UserError for another width."""
        check_tensor("X", X, "... d", is_float=True)
        if X.shape[-1] != len(self.mean):
            raise UserError(f"X is {list(X.shape)}; this probe reads {len(self.mean)} numbers of "
                            "each example")
        return (X - self.mean) / self.scale @ self.W + self.b

    def predict(self, X):
        """X [n, d] -> labels [n]."""
        return self.classes[self.logits(X).argmax(-1)]


def fit_probe(X, y, groups=None, l2=1e-3, *, n_folds=5, seed=0):
    """A multinomial logistic regression of y on X, judged on what it has not seen: a Probe.

    X: [n, d]. y: [n], integer labels, or texts, which stand for their places in alphabetical order
    (`classes` and `predict` have these). groups: [n]; examples of one group (of one text, say) are
    never on both sides. l2: the penalty l2 / 2 |W|^2 beside the mean loss in nats. Features are
    standardised, by the training side's mean and scale. The folds are drawn by the seed.
    Raises UserError for one class only, labels that are no integers, more folds than groups, a
    negative l2, values that are not finite.
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
    """Labels as a tensor on the CPU; texts become their places in alphabetical order."""
    if isinstance(y, torch.Tensor):
        return y.cpu()
    try:
        labels = np.asarray(y)
    except ValueError:  # lists of several lengths
        labels = np.asarray(None)
    if labels.dtype.kind == "U" and labels.ndim:  # texts
        labels = np.unique(labels, return_inverse=True)[1]
    if labels.dtype.kind not in "biuf":
        raise UserError(f"labels are of numpy's kind {labels.dtype}; pass whole numbers, or texts")
    return torch.as_tensor(labels)


def check_examples(X, y):
    """X as float64 and y as ids, on the CPU; raises UserError where a probe makes no sense of them.
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
        raise UserError("y has one class only; a probe needs two or more")
    return X, y


def assign_folds(groups, n, n_folds, seed):
    """The fold of each example, [n]; those of one group share theirs."""
    names, index = index_groups(groups, n)
    n_folds = check_count("n_folds", n_folds, 2, len(names))
    order = torch.randperm(len(names), generator=seeded_generator(seed))
    return (order % n_folds)[index]


def index_groups(groups, n):
    """(the groups' names, each example's index among them [n]); None: each is a group by itself."""
    groups = torch.arange(n) if groups is None else label_ids(groups)
    if groups.shape != (n,):
        raise UserError(f"groups is {list(groups.shape)} for {n} examples; pass one for each")
    return groups.unique(return_inverse=True)


def fit_logistic(X, y, l2):
    """(classes, mean, scale, W, b) of the penalised maximum likelihood, by L-BFGS from zero.

    Raises UserError for a penalty below 0 or without end, under which there is no maximum.
    """
    check_number("l2", l2, lambda penalty: 0 <= penalty < math.inf, "0 or more, and finite")
    classes, target = y.unique(return_inverse=True)
    mean, scale = X.mean(0), X.std(0, correction=0)
    scale = torch.where(scale > 1e-12, scale, torch.ones_like(scale))  # a constant says nothing
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
    """A random label for each token type, the same wherever it stands: labels of tokens' shape.

    y: the labels of the task, any shape. The types, in random order and each as long as it is
    frequent, are laid along the sorted labels, and each takes one of those beside it: the classes
    keep their shares, as nearly as the types allow. Such labels can be learned by heart from the
    types alone; nothing in the model can be about them.
    Raises UserError where there is one type, or one class, only.
    """
    check_tensor("tokens", tokens, "...")
    types, index, counts = tokens.cpu().unique(return_inverse=True, return_counts=True)
    y = label_ids(y).flatten().sort().values
    if len(types) < 2 or y[0] == y[-1]:
        raise UserError(f"{len(types)} types, {len(y.unique())} classes; a control task needs two "
                        "or more of both")

    generator = seeded_generator(seed)
    labels = y[:1]
    while len(labels.unique()) < 2:  # one class only is no task
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
        """task - control: what the probe did not just learn by heart. It is 0 where y is itself a
        function of the type, however well the model knows it."""
        return self.task - self.control


def selectivity(X, y, tokens, groups=None, *, l2=1e-3, n_folds=5, seed=0):
    """The Selectivity of a probe: its accuracy on y less that on `control_task_labels`.

    tokens: [n], the type of each example; the rest as in `fit_probe`. Types that stand in one fold
    alone can't be learned by heart: with many rare ones the control is low, whatever the probe.
    """
    control = control_task_labels(label_ids(tokens), y, seed=seed)
    how = {"l2": l2, "n_folds": n_folds, "seed": seed}
    task = fit_probe(X, y, groups, **how).accuracy
    return Selectivity(task, fit_probe(X, control, groups, **how).accuracy)


@dataclass(frozen=True)
class DescriptionLength:
    """Bits to send the labels with the help of X; without it, were all classes as likely; and
    without it, knowing the classes' shares (the labels' entropy)."""

    bits: float
    uniform_bits: float
    entropy_bits: float

    @property
    def compression(self):
        """How many times shorter than the uniform code (Voita & Titov's number): of labels with a
        rare class it is above 1 where X says nothing."""
        return self.uniform_bits / self.bits

    @property
    def entropy_compression(self):
        """How many times shorter than the labels' entropy: about 1 where X says nothing, or less,
        since the classes' shares have to be learned too."""
        return self.entropy_bits / self.bits


def mdl_online(X, y, groups=None, *, blocks=BLOCKS, l2=1e-3, seed=0):
    """The online code length of y given X (Voita & Titov 2020): a DescriptionLength.

    The examples, shuffled, are sent in blocks that end at the given shares of them: the first as it
    is, each other with a probe that was fitted on all before it. Easily decoded labels are cheap
    early, which an accuracy at the end does not show. groups: [n]; whole groups are shuffled and
    sent (a block ends where one does), so that none is known before it comes. A probe's guess is
    mixed with a uniform one, of the weight n_classes / (n_before + n_classes).
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

    # the first block as it is, each other one by a probe that has seen all before it
    bits = ends[0] * math.log2(n_classes)
    for start, end in itertools.pairwise(ends):
        probe = Probe(*fit_logistic(X[:start], target[:start], l2))
        log_probs = torch.full((end - start, n_classes), -math.inf, dtype=X.dtype)
        log_probs[:, probe.classes] = probe.logits(X[start:end]).log_softmax(-1)
        share = n_classes / (start + n_classes)  # of a uniform guess: classes not seen yet
        mixed = torch.logaddexp(log_probs + math.log1p(-share),
                                torch.full_like(log_probs, math.log(share / n_classes)))
        bits -= mixed.gather(1, target[start:end, None]).sum().item() / math.log(2)

    entropy = torch.special.entr(target.bincount() / n).sum().item() / math.log(2)
    return DescriptionLength(bits, n * math.log2(n_classes), n * entropy)


def layer_sweep(cache, y, *, name="resid_post", l2=1e-3, n_folds=5, seed=0):
    """The Probe of each layer: {"0_resid_post": Probe, …}.

    cache: with `name` of every layer, [batch, pos, d]. y: [batch, pos]. The texts of the batch are
    the groups, so that what two positions of one text share can't help.
    """
    check_cache(cache)
    how = {"l2": l2, "n_folds": n_folds, "seed": seed}
    return {f"{layer}_{name}": fit_on_texts(cache[name, layer], y, **how)
            for layer in range(cache.n_layers)}


def fit_on_texts(X, y, **how):
    """`fit_probe` on X [batch, pos, d] and y [batch, pos], with a group for each text."""
    y = torch.as_tensor(y)
    if y.shape != X.shape[:2]:
        raise UserError(f"y is {list(y.shape)} for positions {list(X.shape[:2])}; pass as many")
    groups = torch.arange(len(y))[:, None].expand_as(y).flatten()
    return fit_probe(X.flatten(0, 1), y.flatten(), groups, **how)


def untrained_accuracy(model, tokens, y, *, at, l2=1e-3, n_folds=5, seed=0):
    """The held-out accuracy of the same probe on the same model before training: the baseline.

    tokens, y: [batch, pos]; at: the name of an activation [batch, pos, d]. Texts are the groups.
    """
    fresh = GPT(model.cfg, seed).to(model.W_E).eval()
    with torch.no_grad():
        _, cache = fresh.run_with_cache(tokens, at)
    return fit_on_texts(cache[at], y, l2=l2, n_folds=n_folds, seed=seed).accuracy


def erasing(X, y):
    """A hook that takes out of an activation [..., d] all that a linear probe could find of y.

    X: [n, d], examples of the activation; y: [n]. It is r(x) = x - (x - mean) @ read @ write, which
    gives every class of X the same mean and changes X by the least possible mean square. Where the
    means are equal no linear probe has a smaller loss than a constant one. As `erasure_of`.
    """
    mean, read, write = erasure_of(X, y)

    def erase(activation, hook):
        if activation.shape[-1] != len(mean):
            raise UserError(f"the activation has width {activation.shape[-1]} and the labels' "
                            f"examples {len(mean)}; pass the name that they were taken at")
        found = (activation.cpu().double() - mean) @ read  # float64: read is large where X is flat
        return activation - (found @ write).to(activation)

    return erase


def erasure_of(X, y):
    """(mean [d], read [d, rank], write [rank, d]) of LEACE (Belrose et al. 2023b), float64.

    With W, which makes X white, and U, an orthonormal basis of its class means there: read = W^T U,
    write = U^T W^+. The probe's own W would not do: it is not where the classes differ.
    """
    X, y = check_examples(X, y)
    mean = X.mean(0)
    belongs = F.one_hot(y.unique(return_inverse=True)[1]).double()  # [n, class]
    variance, basis = torch.linalg.eigh((X - mean).T @ (X - mean) / len(X))
    varies = variance > 1e-12 * variance[-1]  # where nothing varies there is nothing to find
    scale = variance[varies].sqrt()
    basis = basis[:, varies]
    white = (X - mean) @ basis / scale  # [n, d]
    U, S, _ = torch.linalg.svd(white.T @ belongs / len(X), full_matrices=False)
    U = U[:, S > 1e-8]  # [d, rank]; the class means, times their shares, sum to zero
    return mean, basis / scale @ U, (basis * scale @ U).T


@dataclass(frozen=True)
class Erasure:
    """A metric as it is, with the labels erased, and with random labels erased instead [draw].

    accuracy: held-out, of a fresh probe after the erasure; majority: the share of the largest
    class, which it should not pass (below it is no wonder: the folds' means are not equal).
    """

    clean: float
    erased: float
    random: torch.Tensor
    accuracy: float
    majority: float


@torch.no_grad()
def concept_erasure(model, tokens, metric, probe, *, at, types=None, n_random=20, seed=0):
    """What a metric loses when a probe's labels are erased from an activation: an Erasure.

    metric(logits) -> a number. at: the hook name that the probe was fitted at. The control erases
    random labels of the same kind, n_random times: `control_task_labels` of types. types: what the
    labels are a function of, one for each of the probe's examples, in their order (the token, the
    position, the text); without them each example's label is its own.
    A probe can read what no later layer does; then the metric does not move by more than by chance.
    """
    if not isinstance(probe, Probe) or probe.data is None:
        raise UserError(f"probe is a {type(probe).__name__}; pass one that fit_probe returned")
    check_function("the metric", metric)
    n_random = check_count("n_random", n_random)
    X, y, groups = probe.data
    # in float64: rounding to the model's precision would give the labels away
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
