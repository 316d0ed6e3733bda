"""Other right solutions of the exercises of chapter 12."""

import itertools

import torch


def full_ov_table_as_einsum(W_E, W_OV, W_U):
    return torch.einsum("vm,mn,nw->vw", W_E, W_OV, W_U)


def own_rank_as_argsort(table):
    order = table.argsort(1)
    return (order == torch.arange(len(table))[:, None]).int().argmax(1)


def project_out_as_fraction(resid, direction):
    return resid - torch.outer(resid.reshape(-1, len(direction)) @ direction,
                               direction).view(resid.shape) / (direction @ direction)


def minimal_circuits_as_growing(parts, works):
    # by size: whatever holds a circuit that was found before is not minimal
    found = []
    for size in range(len(parts) + 1):
        for chosen in map(set, itertools.combinations(parts, size)):
            if works(chosen) and not any(smaller < chosen for smaller in found):
                found.append(chosen)
    return found


def draw_circuit_as_keys(edges, n, generator):
    keys = torch.rand(len(edges), generator=generator)
    least = keys.topk(n).indices.tolist()
    return [edge for i, edge in enumerate(edges) if i in least]


def distance_over_sizes_as_trapezoid(shares, faithfulness):
    return torch.trapezoid((faithfulness - 1).abs(), shares)
