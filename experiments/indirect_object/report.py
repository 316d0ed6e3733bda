"""What is claimed of the models that name indirect objects, their figures, and a summary.

Thresholds were chosen on seeds 0 to 2, before any other seed was looked at.

Chapter: COURSE_ROADMAP.md, 12 (indirect objects)
Prerequisites: experiments/indirect_object/measure.py
Next: experiments/indirect_object_identification.py
Source: Wang et al. 2022 (what is reported of GPT-2 small)
"""

from statistics import fmean

import numpy as np
from matplotlib.figure import Figure

from activation_cache import head_label
from experiments.common import claim
from experiments.indirect_object.measure import MODES
from experiments.indirect_object.published import GPT2_ROLES, REPORTED
from experiments.induction.report import add_control
from plotting import COLOURS, bare_axes, colour_scale, head_grid, write_cells

LEARNED = 0.1  # nats: the most that the receiver may cost; the corpus leaves no choice there


def gift_claims(models, controls, judged=True):
    """[Claim] on what `measure_gifts` gave of each model.

    controls: the same of an untrained model of each seed. judged: False leaves all lines open.
    What is said of how a model does it counts only where it does it: an untrained model has no way
    to be right about.
    """
    learned = all(one["loss"] < LEARNED for one in models)
    return [*task_claims(models, controls, judged), *suppressor_claims(models, learned, judged),
            *copying_claims(models, judged), *edge_claims(models, learned, judged),
            *backup_claims(models, learned, judged)]


def task_claims(models, controls, judged):
    """Is the receiver named?"""
    def untrained(key):
        return fmean(one[key] for one in controls)

    return [
        add_control(claim("the receiver's loss above the floor, which is 0 (nats)",
                          [one["loss"] for one in models], below=LEARNED, judged=judged),
                    f"untrained {untrained('loss'):.2f}"),
        add_control(claim("share of gifts with the receiver above the giver",
                          [one["right"] for one in models], above=0.98, judged=judged,
                          reported=REPORTED["right"]), f"untrained {untrained('right'):.2f}"),
        claim("the receiver's logit above the giver's (nats)", [one["diff"] for one in models],
              reported=REPORTED["diff"],
              control=f"untrained {untrained('diff'):.2f}; three unrelated names "
                      f"{fmean(one['corrupted_diff'] for one in models):.2f}"),
    ]


def direct_share(one, role):
    """Of the logit difference, what the heads of a role are worth straight at the logits."""
    heads = [list(head) for head in one["roles"][role]]
    lost = sum(-each["direct"] for each in one["heads"] if list(each["head"]) in heads)
    return lost / one["diff"]


def suppressor_claims(models, learned, judged):
    """The answer is both names, less the one who gives."""
    copiers = fmean(direct_share(one, "copiers") for one in models)
    values = fmean(one["later_inputs"]["v"] / one["diff"] for one in models)
    twice = fmean(one["looks"]["twice"] for one in models)
    return [
        add_control(
            claim("heads that look at the giver and suppress what they see: of the difference, "
                  "worth straight at the logits",
                  [direct_share(one, "suppressors") for one in models],
                  above=0.7, judged=judged, reported="GPT-2: name movers that copy IO"),
            f"the copiers {copiers:.2f}"),
        add_control(
            claim("… their strongest: attention to a giver who is named once, a third person",
                  [one["looks"]["once"] for one in models], above=0.5, judged=judged),
            f"named twice {twice:.2f}; uniform 0.07"),
        add_control(
            claim("… the difference that is lost with the queries of all heads above layer 0 "
                  "(share)", [-one["later_inputs"]["q"] / one["diff"] for one in models], below=0.3,
                  holds=learned, judged=judged,
                  reported="GPT-2: queries of the movers carry it"),
            f"with their values {-values:.2f}"),
    ]


def copying_claims(models, judged):
    """Heads that copy, by their OV circuit, by what they raise, by what is lost without them."""
    claims = []
    for text, lost, least in (
            ("names: log-odds of the two who were named, lost without the heads that copy them "
             "and raise them (nats)", [one["named"] for one in models], 2),
            ("songs: log-probability of the right syllable, lost without the heads that copy it "
             "and raise it (nats)", [one["songs"]["lost"] for one in models], 0.1)):
        beaten = all(one["copiers"] > max(one["others"]) for one in lost)
        others = max(max(one["others"]) for one in lost)
        lookers = fmean(one["lookers"] for one in lost)
        claims.append(add_control(
            claim(text, [one["copiers"] for one in lost], above=least, holds=beaten,
                  judged=judged),
            f"as many others: at most {others:.2f}; who look and don't copy {lookers:.2f}"))
    shared = [len(both_copy(one)) / max(1, len(one["roles"]["copiers"])) for one in models]
    return [*claims, claim("… of the heads that copy names, those that copy songs (share)", shared)]


def both_copy(one):
    """The heads that copy names and songs."""
    songs = [tuple(head) for head in one["songs"]["copiers"]]
    return [head for head in map(tuple, one["roles"]["copiers"]) if head in songs]


def edge_claims(models, learned, judged):
    """Edges: their estimates against the exact ones, and the circuit of the best."""
    edges = [one["edges"] for one in models]
    null = max(each["null_high"] for each in edges)
    sure = learned and max(each["p"] for each in edges) < 0.05
    random = max(max(each["circuit"]["random"]) for each in edges)
    return [
        add_control(claim(f"edge attribution against {edges[0]['n_edges']} exact edges (Spearman)",
                          [each["rho"] for each in edges], above=0.4, holds=sure, judged=judged),
                    f"95 % of shuffled below {null:.2f}"),
        *evaluation_claims(edges, learned, random, judged),
    ]


def evaluation_claims(edges, learned, random, judged):
    """What is claimed of the circuit; the one place that prints how good it is."""
    scores = [each["circuit"] for each in edges]
    return [
        add_control(claim(f"faithfulness of the circuit of the best {edges[0]['kept']} edges",
                          [each["faithfulness"] for each in scores], between=(0.8, 1.2),
                          holds=learned, judged=judged, reported="0.87 (Wang et al.)"),
                    f"random circuits at most {random:.2f}"),
        claim("… incompleteness: the most that it breaks otherwise than the model (nats)",
              [each["incompleteness"] for each in scores]),
        claim("… minimality: the least that a node of it moves (nats)",
              [each["least_part"] for each in scores]),
    ]


def backup_claims(models, learned, judged):
    """What the others do where the first head is removed."""
    def kept(one, mode):
        part = one["repair"]["answer"][mode]
        return 1 - part["total"] / part["direct"] if part["direct"] else 0.0

    worst = [max((kept(one, mode) for mode in MODES), key=abs) for one in models]
    lines = [claim("the strongest head removed: of its own words, what others make up for (share, "
                   "the worst of zero, mean and resample)", worst, between=(-0.25, 0.25),
                   holds=learned, judged=judged, reported="GPT-2: backups make up for nearly all")]
    of_copiers = [one["repair"]["copiers"] for one in models if "copiers" in one["repair"]]
    for mode in MODES:
        if of_copiers:
            shares = [1 - each[mode]["total"] / each[mode]["direct"] for each in of_copiers]
            lines.append(claim(f"… the first copier, by {mode} (share)", shares))
    return lines


# The summary


def describe_findings(models):
    """Three plain sentences on what was found, whatever it was."""
    share = fmean(direct_share(one, "suppressors") for one in models)
    queries = fmean(-one["later_inputs"]["q"] / one["diff"] for one in models)
    n_learned = sum(one["loss"] < LEARNED for one in models)
    return (f"{n_learned} of {len(models)} models name the receiver within {LEARNED} nats of the "
            "floor. They don't do it as GPT-2 does: some heads raise both names that were said, "
            f"and heads that look at the giver take that name away, {share:.2f} of the difference "
            f"straight at the logits; queries carry {queries:.2f} of it (heads.png).")


# Figures


def heads_figure(one):
    """Where each head looks and what it says: of one model, from `measure_gifts`."""
    columns = ("END to IO", "END to S1", "END to S2", "S2 to S1", "copies", "suppresses")
    labels = [each["label"] for each in one["heads"]]
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    looks, scale = colour_scale([[each[column] for column in columns] for each in one["heads"]])
    bare_axes(left, f"{name_heads(one, 'suppressors')} look at the giver and suppress;\n"
              f"{name_heads(one, 'copiers')} copy and raise both names",
              "attention, or share of names", "head")
    image = left.imshow(looks, **scale, aspect="auto")
    write_cells(left, looks, [[f"{value:.2f}" for value in row] for row in looks.filled()], scale)
    left.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    left.set_yticks(range(len(labels)), labels, fontsize=8)
    figure.colorbar(image, ax=left, label="0 to 1")

    values = np.array([-each["direct"] for each in one["heads"]])
    bare_axes(right, f"{direct_share(one, 'suppressors'):.0%} of the difference of\n"
              f"{one['diff']:.1f} nats is the suppressors'", "worth straight at the logits (nats)",
              "head")
    right.barh(range(len(values)), values, color=np.where(values > 0, COLOURS[0], COLOURS[1]))
    right.axvline(0, color="0.5", linewidth=0.8)
    right.set_yticks(range(len(labels)), labels, fontsize=8)
    right.invert_yaxis()
    return figure


def name_heads(one, role):
    """ "L2H0 and L2H1" for the heads of a role, or "no heads"."""
    return " and ".join(head_label(*head) for head in one["roles"][role]) or "no heads"


def published_figure(found):
    """What each head of another model is worth to the answer, straight at the logits."""
    values = np.array(list(found["direct"].values())).reshape(found["n_layers"], -1)
    first = min(found["direct"], key=found["direct"].get)
    is_small = values.shape == (12, 12)
    named = " (a name mover)" if is_small and first in [
        head_label(*head) for head in GPT2_ROLES["name movers"]] else ""
    return head_grid(values, title=f"The answer loses most without {first}{named}",
                     unit="change of the logit difference (nats)")
