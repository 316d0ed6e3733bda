"""Other right solutions of the exercises of chapter 10."""

import numpy as np
import torch


def linear_estimate_as_einsum(own, source, gradient):
    return torch.einsum("bpd,bpd->bp", gradient, source) - torch.einsum(
        "bpd,bpd->bp", gradient, own)


def estimate_patches_as_hooks(model, corrupted_tokens, clean_cache, metric, name):
    seen = []
    with model.hooks([(name, lambda tensor, hook: seen.append(tensor))]):
        value = metric(model(corrupted_tokens)).sum()
    slope = torch.autograd.grad(value, seen[0])[0]
    return (slope * (clean_cache[name] - seen[0].detach())).sum(dim=2)


def quadrature_as_numpy(rule, steps):
    points = np.linspace(0, 1, steps + 1)
    weights = np.full(steps + 1, 1 / steps)
    if rule == "trapezoid":
        weights[[0, -1]] /= 2
        return points.tolist(), weights.tolist()
    chosen = slice(0, -1) if rule == "left" else slice(1, None)
    return points[chosen].tolist(), weights[chosen].tolist()


def integrate_gradients_as_backward(metric, start, end, steps=32):
    move = (end - start).detach()
    grads = []
    for share in torch.linspace(0.5 / steps, 1 - 0.5 / steps, steps).tolist():
        point = torch.lerp(start.detach(), end.detach(), share).requires_grad_(True)
        metric(point).backward()
        grads.append(point.grad)
    return move * torch.stack(grads).mean(0)


def score_edges_as_loops(clean_writes, corrupted_writes, gradients):
    rows = []
    for clean, corrupted in zip(clean_writes, corrupted_writes, strict=True):
        rows.append(torch.stack([((corrupted - clean) * g).sum((1, 2)) for g in gradients]))
    return torch.stack(rows)


def kept_share_as_sums(circuit, empty, full):
    return 1 - (full.sum() - circuit.sum()) / (full.sum() - empty.sum())


def prune_edges_as_while(edges, damage, threshold):
    kept = edges[:]
    for edge in edges:
        before = damage(kept)
        kept.remove(edge)
        if damage(kept) - before >= threshold:
            kept.insert(sum(edges.index(other) < edges.index(edge) for other in kept), edge)
    return kept


def mean_ranks_as_sorted(values):
    ordered = values.sort().values.tolist()
    ranks = [[place for place, other in enumerate(ordered) if other == value]
             for value in values.tolist()]
    return torch.tensor([sum(places) / len(places) for places in ranks])


def spearman_as_corrcoef(one, other):
    ranks = torch.stack([mean_ranks_as_sorted(one), mean_ranks_as_sorted(other)])
    return torch.corrcoef(ranks)[0, 1]
