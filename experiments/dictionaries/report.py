"""Report dictionaries of known features: their claims, their summary and their figures.

Thresholds were chosen on seeds 0 to 2. On seeds 10 to 14 every line held for each seed, with an
earlier draw of all random numbers and again with this one. Between the two, two lines were made
stricter. A Matryoshka must have found children before it can pass by mixing them less. And its
price is measured at each kind's best sparsity.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: plotting.py, experiments/dictionaries/measure.py
Next: experiments/dictionaries/trained/variables.py
Source: Gao et al. 2024; Chanin et al. 2024; Bussmann et al. 2025; arXiv 2602.14111
"""

import statistics

from matplotlib.figure import Figure

from experiments.common import mean_text, seed_claim
from experiments.dictionaries.features import CHOSEN, DENSITY, N_FEATURES, SWEEPS
from experiments.dictionaries.model import KINDS
from plotting import COLOURS, bare_axes

LEAST_FOUND = 0.2  # the share of children that must be found; a child not found cannot lean
WELL_EXPLAINED = 0.95  # above this, a dictionary "explains nearly everything"
FLAT_KINDS = tuple(kind for kind in KINDS if kind != "Matryoshka")  # without nested prefixes
COLOUR_OF = dict(zip(KINDS, COLOURS, strict=False))


def job_name(world, kind):
    """The name of the job of a kind in a world, at its chosen sparsity."""
    return f"{world}, {kind}, {CHOSEN[kind]}"


def sweep_rows(known, kind):
    """The measures of a kind at each sparsity, from dense to sparse: a list of dicts."""
    return [known[f"uniform, {kind}, {sparsity}"] for sparsity in SWEEPS[kind]]


def best_of_sweep(known, kind):
    """The row of a kind's sweep with the most features recovered."""
    return max(sweep_rows(known, kind), key=lambda row: row["recovered"])


def known_claims(found, judged=True):
    """[Claim] on known features.

    found: for each seed, what `measure_known` returned. judged: False leaves all verdicts open.
    """
    return [*sweep_claims(found, judged), *control_claims(found, judged),
            *world_claims(found, judged)]


def fact(name, key):
    """A function of a seed's measures that gives the number `key` of the dictionary `name`."""
    return lambda known: known[name][key]


def sweep_claims(found, judged):
    """The claims that explained variance does not measure recovery, and that sparsity decides."""
    def best_that_explains(known):
        rows = [row for kind in KINDS for row in sweep_rows(known, kind)]
        return max((row["recovered"] for row in rows if row["explained"] > WELL_EXPLAINED),
                   default=float("nan"))

    def worst_best(known):
        return min(best_of_sweep(known, kind)["recovered"] for kind in FLAT_KINDS)

    def explained_at_best(known):
        return max(best_of_sweep(known, kind)["explained"] for kind in FLAT_KINDS)

    l1, top_k = job_name("uniform", "ReLU + L1"), job_name("uniform", "TopK")
    return [
        seed_claim(f"share of features recovered where over {WELL_EXPLAINED} is explained, at most",
                   found, best_that_explains, below=0.1, judged=judged,
                   reported="9 % at 0.71 explained",
                   beside="principal components, which explain all: "
                          f"{mean_text(found, fact('components', 'recovered'))}"),
        seed_claim("each kind at its best sparsity recovers at least (Matryoshka left out)", found,
                   worst_best, above=0.8, judged=judged,
                   beside=f"frozen features {mean_text(found, fact('frozen', 'recovered'))}"),
        seed_claim("and explains at most", found, explained_at_best, below=0.9, judged=judged,
                   beside="the true features, the encoder trained: "
                          f"{mean_text(found, fact('true', 'explained'))}"),
        seed_claim("latent over the feature's true value (slope), TopK less ReLU + L1", found,
                   lambda known: known[top_k]["slope"] - known[l1]["slope"], above=0.1,
                   judged=judged,
                   beside=f"TopK {mean_text(found, fact(top_k, 'slope'))}, ReLU + L1 "
                          f"{mean_text(found, fact(l1, 'slope'))}"),
    ]


def control_claims(found, judged):
    """The claims on controls: dictionaries that lack one thing each."""
    top_k = job_name("uniform", "TopK")
    return [
        seed_claim("explained with the true features (encoder trained), less with TopK's", found,
                   lambda known: known["true"]["explained"] - known[top_k]["explained"],
                   between=(-0.01, 0.05), judged=judged,
                   beside=f"frozen {mean_text(found, fact('frozen', 'explained'))}, untrained "
                          f"{mean_text(found, fact('uniform, untrained', 'explained'))}"),
        seed_claim("recovered with random features and a trained encoder", found,
                   fact("frozen", "recovered"), below=0.02, judged=judged,
                   beside=f"TopK {mean_text(found, fact(top_k, 'recovered'))}"),
        seed_claim("recovered from noise of the same covariance", found,
                   fact("noise", "recovered"), below=0.02, judged=judged,
                   beside="explained of the texts with features: "
                          f"{mean_text(found, fact('noise', 'explained'))}"),
    ]


def world_claims(found, judged):
    """The claims on what makes features hard to find: rarity, pairs, parents."""
    def mean_over_kinds(value):
        return lambda known: statistics.fmean(value(known, kind) for kind in KINDS)

    def rare_loss(known, kind):
        frequent, *_, rare = known[job_name("zipf", kind)]["by frequency"]
        return frequent - rare

    def pair_loss(known, kind):
        return (known[job_name("uniform", kind)]["recovered"]
                - known[job_name("pairs", kind)]["recovered"])

    def best_share(known, kind):
        return best_of_sweep(known, kind)["recovered"]

    def nested_price(known):
        return best_share(known, "BatchTopK") - best_share(known, "Matryoshka")

    def mean(name, key):
        return mean_text(found, fact(name, key))

    top_k = job_name("hierarchy", "TopK")
    batch = job_name("hierarchy", "BatchTopK")
    nested = job_name("hierarchy", "Matryoshka")
    untrained = "hierarchy, untrained"
    return [
        seed_claim("Zipf: share recovered of the most frequent quarter, less that of the rarest",
                   found, mean_over_kinds(rare_loss), above=0.1, judged=judged,
                   beside="mean of the kinds"),
        seed_claim("share recovered of features that occur alone, less that of those in pairs",
                   found, mean_over_kinds(pair_loss), above=0.2, judged=judged,
                   beside="mean of the kinds"),
        seed_claim("how much of its parent a child's latent contains, BatchTopK", found,
                   fact(batch, "leaning"), above=0.15, judged=judged,
                   beside=f"TopK {mean(top_k, 'leaning')}; children found {mean(batch, 'found')}, "
                          f"{mean(top_k, 'found')}, untrained {mean(untrained, 'found')}"),
        seed_claim("… Matryoshka less than that, by", found,
                   lambda known: known[batch]["leaning"] - known[nested]["leaning"], above=0.1,
                   median=True, holds=all(known[nested]["found"] > LEAST_FOUND for known in found),
                   judged=judged,
                   beside=f"and above {LEAST_FOUND} of children found: {mean(nested, 'found')}; "
                          f"recovered {mean(nested, 'children')}, BatchTopK "
                          f"{mean(batch, 'children')}"),
        seed_claim("… and its price: where no feature has a parent, it recovers less than "
                   "BatchTopK, each at its best sparsity, by", found, nested_price,
                   between=(0.02, 0.3), judged=judged,
                   beside="BatchTopK "
                          f"{mean_text(found, lambda known: best_share(known, 'BatchTopK'))}"),
        seed_claim("texts with a child in which its parent's latent is silent, TopK", found,
                   fact(top_k, "absorbed"),
                   beside=f"BatchTopK {mean(batch, 'absorbed')}, Matryoshka "
                          f"{mean(nested, 'absorbed')}, untrained {mean(untrained, 'absorbed')}"),
    ]


def known_summary(found):
    """The findings on known features, in two sentences."""
    best = statistics.fmean(max(best_of_sweep(known, kind)["recovered"] for kind in FLAT_KINDS)
                            for known in found)
    dense = statistics.fmean(sweep_rows(known, "ReLU + L1")[0]["explained"] for known in found)
    missed = statistics.fmean(sweep_rows(known, "ReLU + L1")[0]["recovered"] for known in found)
    return ("Where the features are known, a dense ReLU + L1 dictionary explains "
            f"{dense:.2f} of its input's variance and finds {missed:.0%} of them; the best "
            f"dictionary finds {best:.0%} (recovery.png). Features that are rare, that occur in "
            "pairs, or that have a parent are found less often (worlds.png).")


# Figures


def recovery_figure(found):
    """Features recovered against explained variance, and against the number of active latents.

    One line for each kind; each point is a mean over seeds.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle("The dictionaries that explain most find none of the true features; "
                    "how sparse one is decides", x=0.01, ha="left", fontsize=12)
    by_fit, by_count = figure.subplots(1, 2, sharey=True)
    bare_axes(by_fit, "against how much is explained", "explained variance",
              f"share of {N_FEATURES} features recovered")
    bare_axes(by_count, "against how many latents are active", "active latents a text (log scale)",
              "")
    for kind in KINDS:
        rows = [sweep_rows(known, kind) for known in found]

        def means(key, rows=rows):
            return [statistics.fmean(each) for each in zip(
                *([row[key] for row in seed] for seed in rows), strict=True)]

        for axes, key in ((by_fit, "explained"), (by_count, "L0")):
            axes.plot(means(key), means("recovered"), "o-", color=COLOUR_OF[kind], markersize=4,
                      linewidth=1.2, label=kind)

    controls = {"true": ("*", "true features, encoder trained"),
                "frozen": ("x", "random features that stay"),
                "components": ("P", "principal components")}
    for name, (marker, label) in controls.items():
        for axes, key in ((by_fit, "explained"), (by_count, "L0")):
            axes.plot(statistics.fmean(known[name][key] for known in found),
                      statistics.fmean(known[name]["recovered"] for known in found), marker,
                      color="0.2", markersize=9, label=label)
    # which end of a line is which
    sparsest, densest = (statistics.fmean(sweep_rows(known, "TopK")[end]["explained"]
                                          for known in found) for end in (-1, 0))
    by_fit.text(sparsest, 1.01, "1 latent", fontsize=8, color=COLOUR_OF["TopK"], ha="center")
    by_fit.text(densest - 0.01, 0.03, "20 latents", fontsize=8, color=COLOUR_OF["TopK"], ha="right")
    by_count.set_xscale("log")
    by_count.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    by_count.minorticks_off()
    there = N_FEATURES * DENSITY
    by_count.axvline(there, color="0.6", linewidth=1, linestyle=":")
    by_count.text(there * 1.05, 0.03, f"{there:.1f} features\nare there", fontsize=8, color="0.4")
    handles, labels = by_fit.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def worlds_figure(found):
    """Features recovered in each world and by frequency, and how much of parents children hold."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle("What hides a feature: company, rarity, and a parent", x=0.01, ha="left",
                    fontsize=12)
    by_world, by_frequency, absorbed = figure.subplots(1, 3, width_ratios=(1.25, 1, 0.8))

    def mean(name, key):
        return statistics.fmean(known[name][key] for known in found)

    worlds = {"uniform": "alone", "zipf": "rare ones too", "pairs": "in pairs",
              "hierarchy": "with a parent"}
    bare_axes(by_world, "recovered, by how features come", "", "share recovered")
    bare_axes(by_frequency, "recovered, by how often", "", "share recovered")
    bare_axes(absorbed, "how much of its parent\na child's latent holds",
              "cosine beyond the true one", "")
    for offset, kind in enumerate(KINDS):
        shares = [mean(job_name(world, kind), "recovered") for world in worlds]
        places = [place + 0.16 * (offset - 2) for place in range(len(worlds))]
        by_world.bar(places, shares, width=0.15, color=COLOUR_OF[kind], label=kind)

        quarters = zip(*(known[job_name("zipf", kind)]["by frequency"] for known in found),
                       strict=True)
        by_frequency.plot(range(4), [statistics.fmean(each) for each in quarters], "o-",
                          color=COLOUR_OF[kind], markersize=4, linewidth=1.2)
        absorbed.barh(kind, mean(job_name("hierarchy", kind), "leaning"), color=COLOUR_OF[kind])
    by_world.set_xticks(range(len(worlds)), worlds.values())
    by_frequency.set_xticks(range(4), ["most\nfrequent", "2nd\nquarter", "3rd\nquarter", "rarest"])
    by_frequency.set_ylim(0, 1.05)
    absorbed.invert_yaxis()
    handles, labels = by_world.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
