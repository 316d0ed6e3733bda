"""Report the induction experiment: its claims, its summary and its figure.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Prerequisites: experiments/induction/measure.py
Next: experiments/induction_head_detection.py
Source: Elhage et al. 2021; Olsson et al. 2022
"""

import itertools
import math
from statistics import fmean

from matplotlib.figure import Figure

from activation_cache import head_label
from experiments.common import add_control, mean_text, seed_claim
from experiments.induction.measure import DRAWS, TEXTS
from experiments.induction.model import WORDS
from plotting import COLOURS, bare_axes

UNIFORM = math.log(len(WORDS))  # nats: the loss of a uniform guess
SHORT = "segments of 2 to 5"
UNSEEN = list(TEXTS)[1:]  # the kinds of text that no model was trained on
LEAST_SCORES = {"induction": 0.9, "previous-token": 0.85}  # of the circuit's two heads


# The numbers of the table


def score_of(row, kind, head):
    """The score of a head, (layer, head), in a row of a history."""
    layer, index = head
    return row[kind][layer][index]


def best_score(row, kind):
    """The highest score of any head in a row of a history."""
    return max(max(heads) for heads in row[kind])


def final_score(result, kind):
    """The score of the circuit's head of a kind, in the trained model."""
    part = {"induction": "induction", "previous-token": "previous"}[kind]
    return score_of(result["measured"], kind, result["heads"][part])


def steps_of_fall(result):
    """The share of all steps in which the loss on repeats falls from 90 % to 10 %, or nan."""
    phase = result["phase"]
    if None in (phase["loss at 90 %"], phase["loss at 10 %"]):
        return math.nan
    return (phase["loss at 10 %"] - phase["loss at 90 %"]) / result["history"][-1]["step"]


def steps_from_half_loss(result):
    """Steps from half the loss on repeats to an induction score of 0.5, or nan."""
    phase = result["phase"]
    if None in (phase["induction"], phase["loss at 50 %"]):
        return math.nan
    return phase["induction"] - phase["loss at 50 %"]


def strongest_other_head(result):
    """The largest K-composition (z) of the layer's other heads with the induction head."""
    return max(result["composition"]["other K"], default=math.nan)


def composition_lead(result):
    """How far (in z) the circuit's K-composition lies above that by Q, by V and of other heads."""
    z = result["composition"]
    return z["K"] - max(z["Q"], z["V"], *z["other K"])


def ablation_rise(result, removed):
    """The rise of the loss on repeats (nats) without what is removed."""
    without = result["ablation"]
    return without[removed]["repeats"] - without["nothing"]["repeats"]


def largest_other_rise(result):
    """The largest rise (nats) when one of the other heads of the first layer is removed."""
    others = [name for name in result["ablation"] if name.startswith("other head")]
    return max((ablation_rise(result, name) for name in others), default=math.nan)


def path_share(result, path):
    """The share of the previous-token head's whole effect on the loss that a path carries."""
    return result["paths"][path] / result["paths"]["previous-token head by all ways"]


def largest_control_share(result):
    """The largest share, by size, of the paths that should carry nothing."""
    controls = [path for path in result["paths"]
                if path[-1] in "QV" or path.startswith("other head")]
    return max(abs(path_share(result, path)) for path in controls)


# The claims


def induction_claims(seeds, judged=True):
    """[Claim] about the trained models.

    seeds: what `measure_seed` returns for each seed. judged: False leaves every claim open.
    """
    return [*loss_and_score_claims(seeds, judged), *phase_claims(seeds, judged),
            *composition_claims(seeds, judged), *ablation_claims(seeds, judged),
            *path_claims(seeds, judged), *transfer_claims(seeds, judged),
            *counterexample_claims(seeds, judged)]


def loss_and_score_claims(seeds, judged):
    """The circuit exists: the losses, and the scores of its two heads."""
    def untrained(kind):
        return mean_text(seeds, lambda result: best_score(result["history"][0], kind))

    loss_before = mean_text(seeds, lambda result: result["history"][0]["repeats"])
    return [
        add_control(
            seed_claim("loss on repeats (nats)", seeds,
                       lambda result: result["measured"]["repeats"], below=0.1, judged=judged),
            f"before training {loss_before}"),
        seed_claim("loss on first occurrences (nats)", seeds,
                   lambda result: result["measured"]["first"],
                   control=f"uniform guess {UNIFORM:.3g}"),
        add_control(
            seed_claim("induction score", seeds, lambda result: final_score(result, "induction"),
                       above=LEAST_SCORES["induction"], judged=judged),
            f"untrained, best head {untrained('induction')}"),
        seed_claim("the same head, scored one key off", seeds, lambda result: result["shifted"],
                   control="at most 1 minus the induction score"),
        add_control(
            seed_claim("previous-token score", seeds,
                       lambda result: final_score(result, "previous-token"),
                       above=LEAST_SCORES["previous-token"], judged=judged),
            f"untrained, best head {untrained('previous-token')}"),
    ]


def phase_claims(seeds, judged):
    """The loss falls and both heads form in one short phase."""
    return [
        seed_claim("share of the steps in which the loss on repeats falls from 90 % to 10 %", seeds,
                   steps_of_fall, below=0.2, judged=judged, reported="a phase change"),
        seed_claim("steps from half the loss to an induction score of 0.5", seeds,
                   steps_from_half_loss, between=(-50, 50), judged=judged),
        add_control(
            seed_claim("in-context score (nats): loss on late tokens minus loss on early ones",
                       seeds,
                       lambda result: result["measured"]["in_context"], below=-3, judged=judged,
                       reported="below 0"),
            "before training 0"),
    ]


def composition_claims(seeds, judged):
    """The weights of the two heads fit together."""
    by_q = mean_text(seeds, lambda result: result["composition"]["Q"])
    by_v = mean_text(seeds, lambda result: result["composition"]["V"])
    other = mean_text(seeds, strongest_other_head)
    return [
        seed_claim("previous-token to induction head, K-composition "
                   f"(z of {DRAWS} random draws)", seeds,
                   lambda result: result["composition"]["K"], above=5, judged=judged,
                   reported="stands out"),
        add_control(
            seed_claim("its lead over Q, V and the layer's other head into K (z)", seeds,
                       composition_lead, above=5, median=True, judged=judged),
            f"Q {by_q}, V {by_v}, other head {other}"),
        seed_claim("other head to the induction head's values, V-composition (z)", seeds,
                   lambda result: max(result["composition"]["other V"], default=math.nan),
                   control="ablating that head raises the loss by "
                           f"{mean_text(seeds, largest_other_rise)}"),
    ]


def ablation_claims(seeds, judged):
    """How much the loss rises when the heads are removed."""
    intact = mean_text(seeds, lambda result: result["ablation"]["nothing"]["induction"])
    best_alone = mean_text(seeds, lambda result: ablation_rise(result, "induction head"))

    return [
        add_control(
            seed_claim("previous-token head removed: rise of the loss on repeats (nats)", seeds,
                       lambda result: ablation_rise(result, "previous-token head"), above=3,
                       median=True, judged=judged),
            f"the layer's other head removed {mean_text(seeds, largest_other_rise)}"),
        add_control(
            seed_claim("previous-token head removed: induction score", seeds,
                       lambda result: result["ablation"]["previous-token head"]["induction"],
                       below=0.1, median=True, judged=judged),
            f"with all heads {intact}"),
        seed_claim("the layer's other head removed: rise of the loss (nats)", seeds,
                   largest_other_rise, below=0.1, judged=judged),
        add_control(
            seed_claim("all heads with an induction score above 0.5 removed: rise (nats)", seeds,
                       lambda result: ablation_rise(result, "all induction heads"), above=3,
                       judged=judged),
            f"the best one alone removed {best_alone}"),
    ]


def path_claims(seeds, judged):
    """One path carries the whole effect of the previous-token head."""
    return [
        add_control(
            seed_claim("share of the previous-token head's effect that passes through the "
                       "induction heads' keys", seeds,
                       lambda result: path_share(result, "previous-token head to K"),
                       above=0.8, judged=judged),
            "through queries or values, or from another head: "
            f"{mean_text(seeds, largest_control_share)}"),
        seed_claim("the largest of those controls", seeds, largest_control_share, below=0.1,
                   judged=judged),
    ]


def transfer_claims(seeds, judged):
    """The model has not memorised places or pairs: it works on unseen kinds of text too."""
    def lowest_score(result):
        return min(result["transfer"][kind]["induction"] for kind in UNSEEN)

    losses = [seed_claim(f"loss on repeats, {text} (nats)", seeds,
                         lambda result, text=text: result["transfer"][text]["repeats"],
                         below=0.2, judged=judged) for text in UNSEEN]
    return [*losses, seed_claim("lowest induction score on these", seeds, lowest_score,
                                above=LEAST_SCORES["induction"], judged=judged)]


def counterexample_claims(seeds, judged):
    """Two models that must not have the circuit: one layer, and one trained with circles."""
    with_heads = mean_text(seeds, lambda result: result["transfer"][SHORT]["repeats"])
    return [
        seed_claim("one layer, same training: loss on repeats (nats)", seeds,
                   lambda result: result["one_layer"][-1]["repeats"], above=2, judged=judged,
                   reported="no induction"),
        seed_claim("one layer: best induction score", seeds,
                   lambda result: best_score(result["one_layer"][-1], "induction"), below=0.2,
                   judged=judged),

        # Their loss is low without the heads, which is why a low loss alone is no proof.
        add_control(
            seed_claim("trained with circles: loss on repeats (nats)", seeds,
                       lambda result: result["circles"][-1]["repeats"], below=1, judged=judged),
            "a low loss"),
        add_control(
            seed_claim("trained with circles: best induction score", seeds,
                       lambda result: best_score(result["circles"][-1], "induction"), below=0.2,
                       judged=judged),
            "no induction head"),
        add_control(
            seed_claim(f"trained with circles: loss on {SHORT} (nats)", seeds,
                       lambda result: result["circles_transfer"][SHORT]["repeats"], above=1,
                       judged=judged),
            f"with the heads {with_heads}"),
    ]


# The summary


def describe_findings(seeds):
    """Three sentences that say what was found. seeds: as in `induction_claims`."""
    formed = [all(final_score(result, kind) > least for kind, least in LEAST_SCORES.items())
              for result in seeds]
    induction = mean_text(seeds, lambda result: final_score(result, "induction"))
    previous = mean_text(seeds, lambda result: final_score(result, "previous-token"))
    loss_before = mean_text(seeds, lambda result: result["history"][0]["repeats"])
    loss_after = mean_text(seeds, lambda result: result["measured"]["repeats"])
    rise = mean_text(seeds, lambda result: ablation_rise(result, "previous-token head"))
    carried = fmean(path_share(result, "previous-token head to K") for result in seeds)
    one_layer = mean_text(seeds, lambda result: result["one_layer"][-1]["repeats"])
    if any(formed):
        circuits = ", ".join(name_circuit(result) for result, is_formed
                             in zip(seeds, formed, strict=True) if is_formed)
        heads = (f"An induction circuit of two heads forms in {sum(formed)} of {len(seeds)} seeds: "
                 f"{circuits}.")
    else:
        heads = f"No induction circuit forms in any of {len(seeds)} seeds."

    return (f"{heads} On average the best previous-token head pays {previous} of its attention to "
            f"the token before, and the best induction head pays {induction} to the token after "
            "the last occurrence of the current one. Training takes the loss on repeats from "
            f"{loss_before} to {loss_after} nats (with one layer: to {one_layer}); removing the "
            f"previous-token head raises it by {rise}, and {100 * carried:.0f} % of that head's "
            "effect passes through the induction heads' keys (induction.png).")


def name_circuit(result):
    """The circuit of one seed, such as "L0H1 → L1H0 (seed 0)"."""
    previous, induction = (head_label(*result["heads"][kind]) for kind in ("previous", "induction"))
    return f"{previous} → {induction} (seed {result['seed']})"


# The figure


def induction_figure(seeds):
    """Losses and scores over training, and what interventions do to the trained model."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (losses, scores), (context, interventions) = figure.subplots(2, 2)

    # The phase in which the loss falls, in grey.
    began = step_of_event(seeds, "loss at 90 %", min)
    ended = step_of_event(seeds, "loss at 10 %", max)
    if None not in (began, ended):
        for axes in (losses, scores, context):
            axes.axvspan(began, ended, color="0.93", zorder=0,
                         label="the loss on repeats falls" if axes is losses else None)

    draw_losses(losses, seeds)
    draw_scores(scores, seeds)
    draw_in_context(context, seeds)
    draw_interventions(interventions, seeds)
    return figure


def heads_of_seeds(seeds, role):
    """The labels of the circuit's heads of a role, such as "L1H3", or "L1H3, L1H1, L1H3" by seed.
    """
    labels = [head_label(*result["heads"][role]) for result in seeds]
    return labels[0] if len(set(labels)) == 1 else ", ".join(labels)


def step_of_event(seeds, event, choose):
    """The first (choose=min) or last (max) step of an event over the seeds; None if one seed lacks
    it."""
    steps = [result["phase"][event] for result in seeds]
    return None if None in steps else choose(steps)


def draw_over_steps(axes, seeds, values, history="history", **style):
    """Draw a line for each seed and each {name: value(result, row)}, over a history's steps."""
    n_drawn = len(axes.lines) // len(seeds)
    for colour, (name, value) in zip(COLOURS[n_drawn:], values.items(), strict=False):
        for number, result in enumerate(seeds):
            rows = result[history]
            axes.plot([row["step"] for row in rows], [value(result, row) for row in rows],
                      color=colour, linewidth=1, label=None if number else name, **style)


def draw_losses(axes, seeds):
    """Draw the losses of the model, and of the two models that have no induction heads."""
    def repeats(result, row):
        return row["repeats"]

    def first(result, row):
        return row["first"]

    draw_over_steps(axes, seeds, {"on repeats": repeats, "on first occurrences": first})
    draw_over_steps(axes, seeds, {"on repeats, one layer": repeats}, "one_layer", linestyle="--")
    draw_over_steps(axes, seeds, {"on repeats, trained on cyclic texts": repeats}, "circles",
                    linestyle="--")
    axes.axhline(UNIFORM, color="0.6", linewidth=0.8, linestyle=":", label="a uniform guess")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc=(0.45, 0.14))

    began = step_of_event(seeds, "loss at 90 %", min)
    ended = step_of_event(seeds, "loss at 10 %", max)
    if None in (began, ended):
        title = "The loss on repeats does not fall to 10 % with each seed"
    else:
        title = f"The loss on repeats falls from 90 % to 10 % in steps {began} to {ended}"
    bare_axes(axes, title, "step", "loss (nats/token)")


def draw_scores(axes, seeds):
    """Draw the scores of the two heads, and the best of the models without induction heads."""
    def induction(result, row):
        return score_of(row, "induction", result["heads"]["induction"])

    def previous(result, row):
        return score_of(row, "previous-token", result["heads"]["previous"])

    def best(result, row):
        return best_score(row, "induction")

    draw_over_steps(axes, seeds, {
        f"induction head: {heads_of_seeds(seeds, 'induction')}": induction,
        f"previous-token head: {heads_of_seeds(seeds, 'previous')}": previous})
    draw_over_steps(axes, seeds, {"best induction head of one layer": best}, "one_layer",
                    linestyle="--")
    draw_over_steps(axes, seeds, {"best one, trained on cyclic texts": best}, "circles",
                    linestyle="--")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, fontsize=8, loc=(0.42, 0.3))

    def describe_step(kind):
        step = step_of_event(seeds, kind, max)
        return "not with each seed" if step is None else f"by step {step}"

    bare_axes(axes, f"Induction passes 0.5 {describe_step('induction')},\n"
              f"the previous-token score {describe_step('previous-token')}",
              "step", "score (share of attention)")


def draw_in_context(axes, seeds):
    """Draw the in-context score over training."""
    draw_over_steps(axes, seeds, {"": lambda result, row: row["in_context"]})
    end = fmean(result["history"][-1]["in_context"] for result in seeds)
    bare_axes(axes, f"Late tokens cost {-end:.1f} nats less than early ones in the end", "step",
              "in-context score:\nlate minus early tokens (nats)")


def draw_interventions(axes, seeds):
    """Draw a row for each intervention, with a dot for each seed."""
    def removed(name):
        return lambda result: ablation_rise(result, name)

    def along(path):
        return lambda result: result["paths"][path]

    rows = {"removed:": None,
            "previous-token head": removed("previous-token head"),
            "other head of its layer": largest_other_rise,
            "best induction head": removed("induction head"),
            "all induction heads": removed("all induction heads"),
            "previous-token head of\nanother text, read by": None,
            "keys only": along("previous-token head to K"),
            "queries only": along("previous-token head to Q"),
            "values only": along("previous-token head to V")}

    # a row for each, under its heading, and a marker for each seed
    axes.axvline(0, color="0.2", linewidth=0.8)
    for result, colour, marker in zip(seeds, itertools.cycle(COLOURS), itertools.cycle("os^Dv"),
                                      strict=False):
        drawn = [(value(result), y) for y, value in enumerate(rows.values()) if value is not None]
        axes.plot(*zip(*drawn, strict=True), marker, color=colour, alpha=0.7,
                  label=name_circuit(result))
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.5, -0.8)

    carried = fmean(path_share(result, "previous-token head to K") for result in seeds)
    bare_axes(axes, f"{100 * carried:.0f} % of the previous-token head's effect is in the keys",
              "rise of the loss on repeats (nats/token)", "")
