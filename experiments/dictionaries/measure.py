"""Measure how well a dictionary copies its input, and whether it found the true features.

These are two questions. The first needs no truth: how close is the dictionary's output to what it
has to write, and how few latents does it use? The second asks whether its features are the true
ones.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: experiments/dictionaries/model.py, experiments/dictionaries/features.py
Next: experiments/dictionaries/trained/model.py
Source: Gao et al. 2024 (explained variance, L0, dead latents); Sharkey et al. 2022 (mean max
cosine); Chanin et al. 2024 (absorption)
"""

import torch

from experiments.dictionaries.features import WORLDS, known_features
from experiments.dictionaries.model import ReluL1, seed_for, unit_rows
from utils import seeded_generator

RECOVERED = 0.9  # a feature is recovered if some latent has at least this cosine with it
FOUND = 0.7  # ... and found if some latent has this one, though mixed with other features
N_HELD_OUT = 16_384  # texts that no dictionary was trained on


# Without the truth


def explained_variance(target, written):
    """1 - |target - written|^2 / |target - mean|^2, over all texts.

    1 for a perfect copy, 0 for the mean alone. target, written: [n, d].
    """
    error = (target - written).square().sum()
    return (1 - error / (target - target.mean(0)).square().sum()).item()


def active_per_text(z):
    """L0: the number of active latents, mean over texts. z: [n, latent]."""
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

    It is -1 for a latent that is never active in z [n, latent]: such a latent finds nothing.
    directions: [feature, d], of length 1.
    """
    cosines = unit_rows(dictionary.W_dec.detach()) @ directions.T
    return torch.where(is_alive(z)[:, None], cosines, -1.0)


def describe_recovery(cosines):
    """{"recovered", "features' best", "latents' best"} from cosines [latent, feature].

    recovered: the share of true features with which some latent has a cosine of RECOVERED or more.
    features' best: for each feature the largest cosine with any latent, mean over features.
    latents' best: for each live latent the largest cosine with any feature, mean over latents. It
    is low if latents are none of the true features.
    """
    best_latent = cosines.amax(0)
    best_feature = cosines.amax(1)
    is_live = best_feature > -1
    return {"recovered": (best_latent >= RECOVERED).double().mean().item(),
            "features' best": best_latent.mean().item(),
            "latents' best": best_feature[is_live].mean().item() if is_live.any() else 0.0}


def mean_slope(cosines, z, values):
    """How large z is, as a share of the true feature's value, mean over recovered features.

    For each feature this is the slope of z on the value, through 0, over the texts in which both
    are above 0. It is 1 if the latent gives the whole value, and nan if nothing is recovered.
    cosines [latent, feature]; z [n, latent] and values [n, feature], of the same texts.
    """
    best, of_feature = cosines.max(0)
    is_recovered = best >= RECOVERED
    z_best = z[:, of_feature]  # [n, feature]
    true = values * (z_best > 0)
    slopes = (z_best * true).sum(0) / true.square().sum(0)
    return slopes[is_recovered].double().nanmean().item()


def recovered_by_frequency(cosines, chances, n_groups=4):
    """The share of features that are recovered, in groups from the most frequent to the rarest.

    cosines: [latent, feature]; chances: [feature]. Returns a list of n_groups numbers.
    """
    is_recovered = (cosines.amax(0) >= RECOVERED).double()
    order = chances.argsort(descending=True, stable=True)
    return [is_recovered[group].mean().item() for group in order.chunk(n_groups)]


def describe_absorption(dictionary, features, cosines, z, values):
    """How a dictionary represents parents and their children: a dict of means over either.

    The parent's latent is the one with the largest cosine with the parent's direction. A child's
    latent is the one with the largest cosine among all others, so the two are never the same.

    parents, children: the share of each that is recovered.
    found: the share of children whose latent has a cosine of FOUND or more with them.
    leaning: how much of the parent a found child's latent contains: its cosine with the parent,
    less the cosine of the child's true direction with the parent. 0 if the latent is the child
    alone; nan if no child is found.
    absorbed: among texts with a child (and so its parent), the share in which the parent's latent
    is silent and the child's is active.
    silent alone: among texts with the parent and no child, the share in which the parent's latent
    is silent.

    features: SparseFeatures of the world "hierarchy"; cosines [latent, feature]; z [n, latent] and
    values [n, feature], of the same texts.
    """
    found = {name: [] for name in ("parents", "children", "found", "leaning", "absorbed",
                                   "silent alone")}
    is_recovered = (cosines.amax(0) >= RECOVERED).double()
    is_there = values > 0
    is_active = z > 0
    for parent, *children in features.families.tolist():
        # the parent
        of_parent = cosines[:, parent].argmax()
        alone = is_there[:, parent] & ~is_there[:, children].any(-1)
        found["silent alone"].append((~is_active[alone, of_parent]).double().mean())
        found["parents"].append(is_recovered[parent])

        # its children
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
            absorbed = ~is_active[:, of_parent] & is_active[:, of_child]
            found["absorbed"].append(absorbed[is_there[:, child]].double().mean())
    return {name: torch.stack(each).nanmean().item() for name, each in found.items()}


# All dictionaries of a seed


def principal_components(x):
    """A dictionary of the principal components of x [n, d], each in both directions.

    They are a complete basis, so this dictionary copies everything exactly.
    """
    _, directions = torch.linalg.eigh(x.T.cov())
    both = torch.cat([directions.T, -directions.T])  # [2 d, d]
    dictionary = ReluL1(x.shape[1], x.shape[1], len(both), 0.0, seeded_generator(0), W_dec=both)
    with torch.no_grad():
        dictionary.b_dec.copy_(x.mean(0))
        dictionary.b_enc.copy_(-x.mean(0) @ both.T)
    return dictionary


@torch.no_grad()
def measure_known(jobs, dictionaries, seed):
    """Measure all dictionaries of a seed on held-out texts, and the principal components.

    jobs: {name: DictionaryJob}; dictionaries: {name: Dictionary}. Returns {name: a dict of plain
    values}, with the principal components as "components".
    """
    found = {}
    for world in WORLDS:
        features = known_features(world, seed)
        x, values = features.draw(N_HELD_OUT, seeded_generator(seed_for("held-out texts", seed)))
        own = {name: dictionaries[name] for name, job in jobs.items() if job.world == world}
        if world == "uniform":
            own["components"] = principal_components(x)
        for name, dictionary in own.items():
            z = dictionary.encode(x)
            cosines = feature_cosines(dictionary, z, features.directions)
            found[name] = describe_fit(dictionary, x) | describe_recovery(cosines)
            if world == "uniform":
                found[name]["slope"] = mean_slope(cosines, z, values)
            if world == "zipf":
                found[name]["by frequency"] = recovered_by_frequency(cosines, features.chances)
            if world == "hierarchy":
                found[name] |= describe_absorption(dictionary, features, cosines, z, values)
    return found
