"""Chapter 10 as a learner would write it: slopes instead of runs, and circuits of edges."""

import torch


def linear_estimate(own, source, gradient):
    """The change by patching, estimated as if the metric were linear.

    own: [batch, pos, d], an activation of the run that would be patched; source: that of the other
    run; gradient: the metric's gradient by it, in the run that would be patched. Returns [batch,
    pos]: the estimated change of the metric if this position were patched.
    """
    return ((source - own) * gradient).sum(-1)


def estimate_patches(model, corrupted_tokens, clean_cache, metric, name):
    """Attribution patching: all positions of an activation by one run and one gradient.

    metric(logits) -> [batch]. clean_cache[name]: [batch, pos, d_model].
    model.gradient_cache(tokens, metric, name) returns (value, acts, grads), where acts[name] and
    grads[name] are the activation and the gradient of the metric's sum. linear_estimate may be
    called. Returns [batch, pos], by denoising: the change if the clean activation were patched into
    the corrupted run.
    """
    _, acts, grads = model.gradient_cache(corrupted_tokens, metric, name)
    return linear_estimate(acts[name], clean_cache[name], grads[name])


def quadrature(rule, steps):
    """Points of [0, 1] and weights that sum to 1, for a mean over the interval.

    rule: "left" (0, 1/steps, …, without 1), "right" (the same without 0 and with 1), or "trapezoid"
    (both ends, with half the weight of the points between: steps + 1 points). Returns (points,
    weights), lists of floats.
    """
    points = [k / steps for k in range(steps + 1)]
    if rule == "left":
        return points[:-1], [1 / steps] * steps
    if rule == "right":
        return points[1:], [1 / steps] * steps
    return points, [0.5 / steps] + [1 / steps] * (steps - 1) + [0.5 / steps]


def integrate_gradients(metric, start, end, steps=32):
    """Integrated gradients: a metric's change from start to end, split among the numbers.

    metric: a function of a tensor of start's shape -> a scalar. The gradient is averaged over the
    middles of `steps` equal pieces of the straight path, and multiplied by end - start. Returns
    start's shape; it sums, nearly, to metric(end) - metric(start).
    """
    total = torch.zeros_like(start)
    for k in range(steps):
        share = (k + 0.5) / steps
        point = (start + share * (end - start)).detach().requires_grad_()
        total += torch.autograd.grad(metric(point), point)[0]
    return (end - start) * total / steps


def score_edges(clean_writes, corrupted_writes, gradients):
    """EAP: the estimated change by each edge, if it carried the corrupted write.

    clean_writes, corrupted_writes: [writer, batch, pos, d_model]; gradients: [reader, batch, pos,
    d_model], of the metric by what each reader reads, in the clean run. Returns [writer, reader,
    batch]: (corrupted - clean) times the gradient, summed over positions and d_model.
    """
    return torch.einsum("wbpm,rbpm->wrb", corrupted_writes - clean_writes, gradients)


def kept_share(circuit, empty, full):
    """How much of a behaviour a circuit keeps: 0 for no edges, 1 for all.

    circuit, empty, full: [batch], the metric with the circuit's edges, with none, with all. Returns
    a scalar, the mean of what is kept over the mean of the whole, because a ratio for each prompt
    would be huge if all edges together do little.
    """
    return (circuit - empty).mean() / (full - empty).mean()


def prune_edges(edges, damage, threshold):
    """ACDC: go through the edges and drop each one whose loss does little damage.

    edges: a list, in the order in which they are tried. damage(kept) -> a float: how far the run
    with the list of edges `kept` is from the whole model's. An edge is dropped for good if that
    raises the damage by less than the threshold, compared with what is kept at that moment. Returns
    the edges that stay, in their order.
    """
    kept = list(edges)
    now = damage(kept)
    for edge in edges:
        without = [other for other in kept if other != edge]
        then = damage(without)
        if then - now < threshold:
            kept = without
            now = then
    return kept


def mean_ranks(values):
    """The rank of each value, from 0; equal values share the mean of theirs.

    values: [n]. Returns [n], floats: in (5, 1, 5) the ranks are 1.5, 0, 1.5.
    """
    below = (values[None, :] < values[:, None]).sum(1)
    equal = (values[None, :] == values[:, None]).sum(1)  # itself included
    return below + (equal - 1) / 2


def spearman(one, other):
    """Spearman's correlation: the correlation of the ranks of two lists, from -1 to 1.

    one, other: [n], such as estimated and exact effects of the same n heads. mean_ranks may be
    called. Returns a scalar.
    """
    a = mean_ranks(one) - mean_ranks(one).mean()
    b = mean_ranks(other) - mean_ranks(other).mean()
    return (a * b).sum() / (a.norm() * b.norm())
