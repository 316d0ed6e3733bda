"""How good a dictionary is: how well it writes, and whether it found the true features.

Two different questions. The first needs no truth: how near is the dictionary's output to what it
has to write, and how few latents does that take? The second asks whether its features are the true
ones.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/model.py
Next: experiments/dictionaries/known.py
Source: Gao et al. 2024 (explained variance, L0, dead latents); Sharkey et al. 2022 (mean max
cosine); Chanin et al. 2024 (absorption)
"""

import torch

from experiments.dictionaries.features import unit_rows

RECOVERED = 0.9  # a feature is recovered where a latent has at least this cosine with it
FOUND = 0.7  # ... and found where it has this one, though mixed with others


# Without a truth


def explained_variance(target, written):
    """1 - |target - written|^2 / |target - mean|^2, over all texts: 1 is a perfect copy, and the
    mean alone is 0. target, written: [n, d]."""
    error = (target - written).square().sum()
    return (1 - error / (target - target.mean(0)).square().sum()).item()


def active_per_text(z):
    """L0: how many latents are active, the mean over texts. z: [n, latent]."""
    return (z > 0).sum(-1).double().mean().item()


def is_alive(z):
    """[latent], bool: whether each latent is active in any text. z: [n, latent]."""
    return (z > 0).any(0)


def describe_fit(dictionary, x, target=None):
    """{"explained", "L0", "dead"} of a dictionary on texts that it was not trained on.

    x: [n, d_in]; target: [n, d_out] (None: x). dead: the share of latents that are never active.
    """
    z = dictionary.encode(x)
    return {"explained": explained_variance(x if target is None else target, dictionary.decode(z)),
            "L0": active_per_text(z),
            "dead": 1 - is_alive(z).double().mean().item()}


# With the truth


def feature_cosines(dictionary, z, directions):
    """The cosine of each latent's feature with each true direction, [latent, feature].

    -1 for a latent that is never active in z [n, latent]: what is never said finds nothing.
    directions: [feature, d], of length 1.
    """
    cosines = unit_rows(dictionary.W_dec.detach()) @ directions.T
    return torch.where(is_alive(z)[:, None], cosines, -1.0)


def describe_recovery(cosines):
    """{"recovered", "features' best", "latents' best"} from cosines [latent, feature].

    recovered: the share of true features that some latent has a cosine of RECOVERED or more with.
    The mean of the largest cosine is taken both ways: of each feature with any latent, and of each
    live latent with any feature (low where a latent is none of the true ones).
    """
    best_latent = cosines.amax(0)
    best_feature = cosines.amax(1)
    is_live = best_feature > -1
    return {"recovered": (best_latent >= RECOVERED).double().mean().item(),
            "features' best": best_latent.mean().item(),
            "latents' best": best_feature[is_live].mean().item() if is_live.any() else 0.0}


def mean_slope(cosines, z, values):
    """How much of a true feature's value its latent says, the mean over recovered features: the
    slope of z on the value through 0, where both are there. 1 says all of it.

    cosines [latent, feature]; z [n, latent] and values [n, feature], of the same texts. nan where
    nothing is recovered.
    """
    best, of_feature = cosines.max(0)
    is_recovered = best >= RECOVERED
    said = z[:, of_feature]  # [n, feature]
    true = values * (said > 0)
    slopes = (said * true).sum(0) / true.square().sum(0)
    return slopes[is_recovered].double().nanmean().item()


def recovered_by_frequency(cosines, chances, n_groups=4):
    """The share of features that are recovered, in groups from the most frequent to the rarest: a
    list. cosines: [latent, feature]; chances: [feature]."""
    is_recovered = (cosines.amax(0) >= RECOVERED).double()
    order = chances.argsort(descending=True, stable=True)
    return [is_recovered[group].mean().item() for group in order.chunk(n_groups)]


def describe_absorption(dictionary, features, cosines, z, values):
    """What becomes of parents whose children are often there: a dict of means over children, or
    over parents.

    The parent's latent is the one with the largest cosine with the parent's direction; a child's
    latent is the one with the largest cosine among the others, so that they are never the same.
    parents, children: the share of each that is recovered. found: the share of children whose
    latent has a cosine of FOUND or more with them.
    leaning: how much of the parent such a latent holds: its cosine with the parent, less that of
    the child's true direction. 0 where each says its own; nan where no child is found.
    absorbed: of the texts with a child (and so its parent), the share in which the parent's latent
    is silent and the child's is active. silent alone: of the texts with the parent alone, the share
    in which its latent is silent.

    features: SparseFeatures of the world "hierarchy"; cosines [latent, feature]; z [n, latent] and
    values [n, feature], of the same texts.
    """
    found = {name: [] for name in ("parents", "children", "found", "leaning", "absorbed",
                                   "silent alone")}
    is_recovered = (cosines.amax(0) >= RECOVERED).double()
    is_there = values > 0
    speaks = z > 0
    for parent, *children in features.families.tolist():
        of_parent = cosines[:, parent].argmax()
        alone = is_there[:, parent] & ~is_there[:, children].any(-1)
        found["silent alone"].append((~speaks[alone, of_parent]).double().mean())
        found["parents"].append(is_recovered[parent])

        others = cosines.clone()
        others[of_parent] = -1
        for child in children:
            of_child = others[:, child].argmax()
            found["children"].append(is_recovered[child])
            is_found = cosines[of_child, child] >= FOUND
            found["found"].append(is_found.double())
            true_cosine = features.directions[parent] @ features.directions[child]
            lean = cosines[of_child, parent] - true_cosine
            found["leaning"].append(torch.where(is_found, lean, torch.nan))
            swallowed = ~speaks[:, of_parent] & speaks[:, of_child]
            found["absorbed"].append(swallowed[is_there[:, child]].double().mean())
    return {name: torch.stack(each).nanmean().item() for name, each in found.items()}
