"""Chapter 12 as a learner would write it: heads that suppress, and tests of a circuit."""

import itertools

import torch


def full_ov_table(W_E, W_OV, W_U):
    """The logits that a head writes for each token that it looks at.

    W_E: [d_vocab, d_model]; W_OV: [d_model, d_model]; W_U: [d_model, d_vocab]. Returns [token seen,
    token predicted]: the logits that are written if all attention is on one token.
    """
    return W_E @ W_OV @ W_U


def own_rank(table):
    """The rank of each token's own logit in its row: whether it raises or lowers itself.

    table: [token seen, token predicted]. Returns [token], how many tokens have a lower logit in
    that row than the token itself: 0 if it suppresses itself more than any other.
    """
    own = table.diagonal()[:, None]  # [token, 1]
    return (table < own).sum(1)


def project_out(resid, direction):
    """A stream without its part along a direction.

    resid: [..., d_model]; direction: [d_model], of any length, such as a token's column of W_U.
    Returns [..., d_model], whose product with the direction is 0.
    """
    unit = direction / direction.norm()
    return resid - (resid @ unit)[..., None] * unit


def minimal_circuits(parts, works):
    """All minimal circuits: those that work, and of which no part can be left out.

    parts: a list. works(circuit) -> a bool, for a set of parts. Returns a list of sets, the small
    ones first: each works, and none of its own proper subsets does.
    """
    found = []
    for size in range(len(parts) + 1):
        for chosen in itertools.combinations(parts, size):
            circuit = set(chosen)
            if works(circuit) and not any(works(set(smaller)) for n in range(size)
                                          for smaller in itertools.combinations(chosen, n)):
                found.append(circuit)
    return found


def draw_circuit(edges, n, generator):
    """A random circuit, for a null: n of the edges, without repetition.

    edges: a list; generator: a torch.Generator, the only source of randomness. Every choice of n is
    equally likely. Returns a list of n edges, in the order of `edges`.
    """
    chosen = torch.randperm(len(edges), generator=generator)[:n].sort().values
    return [edges[i] for i in chosen.tolist()]


def distance_over_sizes(shares, faithfulness):
    """How far circuits of all sizes are from the whole model: the area between their faithfulness
    and 1.

    shares: [n], the shares of edges that are kept, rising from 0 to 1; faithfulness: [n], of the
    circuit of each size. Returns a scalar: the integral of |1 - faithfulness| over the share, by
    trapezoids.
    """
    gaps = (1 - faithfulness).abs()
    widths = shares[1:] - shares[:-1]
    return ((gaps[1:] + gaps[:-1]) / 2 * widths).sum()
