"""Report the benchmark and the race: their summaries and figures, and the claims of the race.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: plotting.py, experiments/speed/measure.py, experiments/speed/contestants.py
Next: circuits.py
Source: none
"""

import statistics

import torch

import plotting
from experiments.common import claim
from experiments.speed.contestants import NANOGPT, OUR_DEFAULT

LABELS = {  # of contestants whose names alone do not say in whose time
    "a third of it": "a third of nanoGPT's time",
    "twice": "twice nanoGPT's time",
    "five times": "five times nanoGPT's time",
}


def summarize_benchmark(claims):
    """Three sentences that say what was found, from the claims."""
    measured = {line.claim: line.measured for line in claims}

    def measured_of(words):
        return next(number for text, number in measured.items() if words in text)

    judged = [line for line in claims if line.holds is not None]
    if judged:
        n_met = sum(line.holds for line in judged)
        verdicts = f"{n_met} of {len(judged)} thresholds are met (benchmark.png)"
    else:
        verdicts = "These shapes are tiny: they show that the benchmark runs, not how fast"
    return (
        f"A training step reaches {measured_of('share of the matmul rate'):.2f} of the rate at "
        "which the machine multiplies large matrices. "
        "Without listeners, the hook points take "
        f"{measured_of('1 x 64: what hook points do'):.2%} of a forward pass of 64 tokens; a pass "
        f"that caches everything takes {measured_of('1 x 64: time of caching over forward'):.2f} "
        "times as long as one that caches nothing. "
        f"{verdicts}."
    )


def benchmark_figure(claims):
    """The Figure of the judged claims, each as a multiple of its threshold; None if no claim is
    judged."""
    judged = [line for line in claims if line.holds is not None]
    if not judged:
        return None
    rows = {}
    for line in judged:
        sign = -1 if line.control.startswith("below") else 1
        values = (line.measured, line.low, line.high)
        rows[f"{line.claim} ({line.control})"] = [
            min(30.0, (max(value, 1e-9) / line.mark) ** sign) for value in values]
    n_met = sum(line.holds for line in judged)
    missed = " (orange: missed)" if n_met < len(judged) else ""
    return plotting.dot_rows(
        rows, title=f"{n_met} of {len(judged)} thresholds are met{missed}",
        xlabel="times as good as its threshold, at most 30 (dot: median; bar: all rounds)")


def race_claims(contestants, races, *, judged=True):
    """[Claim]: each contestant's time and loss. Means over seeds are judged, except nanoGPT's own.

    contestants: {name: Contestant}. races: what `run_race` returned for each seed.
    """
    nanogpt_ends = [curves[NANOGPT][-1] for curves in races]
    nanogpt_loss = statistics.mean(loss for _, loss in nanogpt_ends)
    claims = []
    for name, each in contestants.items():
        ends = [curves[name][-1] for curves in races]
        times = [seconds / nanogpt_seconds for (seconds, _), (nanogpt_seconds, _)
                 in zip(ends, nanogpt_ends, strict=True)]
        losses = [loss for _, loss in ends]
        text = (f"{name} ({each.model.n_layers} layers of {each.model.d_model}, context "
                f"{each.model.n_ctx}, {each.train.max_steps:,} steps)")
        most_loss = nanogpt_loss if each.loss is None else each.loss
        for what, values, most in (("time, in nanoGPT's", times, each.time),
                                   ("validation loss", losses, most_loss)):
            verdict = {}
            if name != NANOGPT:
                verdict = {"between": (0.0, most), "control": f"at most {most:.4g}"}
            claims.append(claim(f"{text}: {what}", statistics.fmean(values), judged=judged,
                                interval=(min(values), max(values)), **verdict))
    return claims


def mean_curves(races):
    """{name: (times as multiples of nanoGPT's, losses)} of each contestant, means over the seeds.
    """
    lines = {}
    for name in races[0]:
        points = torch.tensor([[(seconds / curves[NANOGPT][-1][0], loss)
                                for seconds, loss in curves[name]] for curves in races]).mean(0)
        lines[name] = points.T.tolist()  # [2, evaluation]
    return lines


def summarize_race(claims, races, *, quick=False):
    """Three sentences that say what was found, from the claims and the curves of each seed."""
    lines = mean_curves(races)
    times, losses = lines[OUR_DEFAULT]
    judged = [line for line in claims if line.holds is not None]
    if quick:
        verdicts = "These shapes are tiny: they show that the race runs, not who wins"
    else:
        verdicts = f"{sum(line.holds for line in judged)} of {len(judged)} thresholds are met"
    seeds = "one seed" if len(races) == 1 else f"means of {len(races)} seeds"
    return (
        f"In {times[-1]:.2f} of the time of nanoGPT's recipe, the recipe of train.py reaches "
        f"{losses[-1]:.3f} nats per character on unseen text; nanoGPT's recipe ends at "
        f"{lines[NANOGPT][1][-1]:.3f} ({seeds}). "
        f"In {lines['five times'][0][-1]:.2f} times the time of nanoGPT's recipe, a larger model "
        f"reaches {lines['five times'][1][-1]:.3f}. "
        f"{verdicts} (race.png)."
    )


def race_figure(contestants, races):
    """The Figure of each contestant's mean loss over its time, as a multiple of nanoGPT's, and of
    the threshold that its last point must meet.

    contestants: {name: Contestant as a dict}. races: as `race_claims` takes them.
    """
    lines = mean_curves(races)
    times, losses = lines[OUR_DEFAULT]
    nanogpt_loss = lines[NANOGPT][1][-1]
    figure = plotting.curve(
        {LABELS.get(name, name): line for name, line in lines.items()},
        xlabel="time on the same core (1: that of nanoGPT's recipe)",
        ylabel="loss on the validation split (nats/character)",
        title=(f"train.py reaches {losses[-1]:.2f} nats/character in {times[-1]:.2f} of the time\n"
               f"in which nanoGPT's recipe reaches {nanogpt_loss:.2f}"),
    )

    # the thresholds, each in its contestant's colour; nanoGPT's recipe has none
    axes = figure.axes[0]
    for line, (name, each) in zip(list(axes.lines), contestants.items(), strict=True):
        if name != NANOGPT:
            most_loss = nanogpt_loss if each["loss"] is None else each["loss"]
            axes.plot(each["time"], most_loss, "x", markersize=8, color=line.get_color())
    axes.plot([], [], "x", markersize=8, color="0.35",
              label="threshold: the last dot may lie neither right of it nor above")
    axes.legend(frameon=False, fontsize=9)
    return figure
