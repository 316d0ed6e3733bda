"""What no ranking of heads shows in the circuits of wired_circuits.py; and all claims about them.

A fact is a number that follows from the wiring, beside the one that was measured.

Chapter: COURSE_ROADMAP.md, 9 (intervene) and 13 (decodable is not used)
Read before: experiments/wired_scoring.py; after: nothing
Source: Hewitt & Liang 2019 (a probe finds what is not used); Kramár et al. 2024 (saturation);
McDougall et al. 2023 and Rushing & Nanda 2024 (self-repair)
"""

import statistics

import torch

import circuits
import plotting
from attribution import attribution_patching
from experiments.common import Claim, over_seeds
from experiments.wired_board import GAIN, random_texts, rotated
from experiments.wired_scoring import TOOLS, by_head, denoising, slope
from head_ablation import pairwise_interaction, self_repair
from logit_lens import logit_lens
from metrics import prev_token_score
from patching import get_act_patch_attn_head_q_all_pos
from probing import concept_erasure, fit_probe
from utils import seeded_generator
from weight_circuits import ov_eigenvalue_score

PROBED = "blocks.0.hook_resid_post"


def near(measured, wired, within=0.01):
    """A fact: what was measured, what was wired, and how far they may lie apart."""
    return float(measured), float(wired), within


def accuracy(wired, texts):
    """The share of positions at which the model says the answer, of those that have one."""
    with torch.no_grad():
        said = wired.model(texts).argmax(-1).tolist()
    right = [token == answer for text, tokens in zip(texts.tolist(), said, strict=True)
             for end, token in enumerate(tokens, 1)
             if (answer := wired.answer(text[:end])) is not None]
    return statistics.mean(right)


@torch.no_grad()
def of_all(case):
    """Is the task done, in another basis too, and by the wired edges alone?"""
    wired, (model, clean, corrupt, metric) = case.wired, case.tokens
    texts, turned = random_texts(100, seeded_generator(0)), rotated(wired, 0).model
    edges = circuits.Circuit.of(model, list(wired.truth.edges))
    kept = circuits.faithfulness(edges, model, clean, corrupt, metric=metric).mean
    return {"share of right answers to random texts": near(accuracy(wired, texts), 1, 0.0),
            "largest change of a logit in a rotated basis":
                near((turned(texts) - model(texts)).abs().max(), 0, 1e-4),
            "faithfulness of the wired edges alone": near(kept, 1)}


def of_two_heads(case):
    """What removing both heads costs beyond removing each. And OV's eigenvalues, whose score has no
    size: those of a head that says nothing are rounding, and score as a perfect copy."""
    name, heads = case.wired.name, sorted(case.wired.truth.circuit)
    beyond = -pairwise_interaction(*case.ablate, heads, case.pairs.metric).mean[0, 1] / GAIN
    copies = ov_eigenvalue_score(case.wired.model)
    return {f"{name}: cost of removing both heads, beyond that of each":
                near(beyond, {"OR": 2, "AND": -2}[name]),
            f"{name}: |OV eigenvalue score| of heads that say nothing":
                near(min(abs(copies[head].item()) for head in heads), 1)}


def of_suppression(case):
    """The predicting head speaks for the wrong answer itself, and for the right one by way of the
    head that it sets off: the gradient and the lens see the first alone."""
    early = min(case.wired.truth.circuit)
    lens = case.pairs.metric(logit_lens(case.wired.model, case.clean).logits).mean(-1) / GAIN
    gone = self_repair(*case.ablate, early, case.pairs.metric)
    return {f"copy suppression: {what}": near(*numbers) for what, numbers in {
        "share restored by the predictor": (denoising(case)[early], 1),
        "the same by its gradient, whose sign is wrong": (slope(case)[early], -1),
        "lead of the answer in the lens, before": (lens[1], -0.5),
        "lead of the answer in the lens, after": (lens[-1], 0.5),
        "predictor removed, effect of its write": (gone.direct.mean() / GAIN, 0.5),
        "predictor removed, effect of where others look": (gone.by_patterns.mean() / GAIN, -1),
    }.items()}


def of_saturation(case):
    """A query that decides where to look: patched, by its gradient, and by the gradient after the
    softmax."""
    late = max(case.wired.truth.circuit)
    exact = get_act_patch_attn_head_q_all_pos(*case.denoise).normalized()[late]
    flat, mended = (attribution_patching(*case.denoise, names="q", fixes=fixes)["q"].mean[late]
                    / case.gap for fixes in ((), ("qk",)))
    return {f"saturated softmax: share restored by the query{how}": near(*numbers)
            for how, numbers in {", patched": (exact, 1), ", by its gradient": (flat, 0, 1e-3),
                                 ", by the gradient after the softmax": (mended, 1)}.items()}


def of_dead_heads(case):
    """Pretty patterns, and no effect."""
    restored, circuit = by_head(denoising(case)), case.wired.truth.circuit
    dead = [head for head in restored if head not in circuit]
    pattern = prev_token_score(case.clean["pattern", 0]).mean(0)
    return {"dead heads: their least previous-token score":
                near(min(pattern[head] for _, head in dead), 1, 1e-3),
            "dead heads: the largest share that one restores":
                near(max(abs(restored[head]) for head in dead), 0, 1e-3)}


def of_bits(case):
    """What a probe reads, and what is lost once no probe can read it any more. What the two bits
    share by chance in these texts goes with either."""
    model, facts = case.wired.model, {}
    pairs = case.wired.pairs(256, seeded_generator(0))
    with torch.no_grad():
        last = model.run_with_cache(pairs.clean, PROBED)[1][PROBED][:, -1]
    for name, bit in case.wired.bits.items():
        probe = fit_probe(last, torch.tensor([int(bit(text)) for text in pairs.clean.tolist()]))
        erasure = concept_erasure(model, pairs.clean, lambda logits: pairs.metric(logits).mean(),
                                  probe, at=PROBED, n_random=1)
        lost, used = 1 - erasure.erased / erasure.clean, name == "used"
        facts[f"unused bit: a probe's accuracy on the {name} bit"] = near(probe.accuracy, 1, 0.0)
        facts[f"unused bit: share of the lead lost with the {name} bit"] = near(lost, used, 0.05)
    return facts


FACTS = {"OR": of_two_heads, "AND": of_two_heads, "copy suppression": of_suppression,
         "saturated softmax": of_saturation, "dead heads": of_dead_heads, "unused bit": of_bits}


def facts(case):
    """{what: (measured, wired, within)} of a case."""
    return of_all(case) | FACTS.get(case.wired.name, lambda case: {})(case)


# Claims


def claims_of(rows, found):
    """[Claim] from the Rows of all circuits and a list of the facts of each."""
    claims = [of_fact(what, [each[what] for each in found if what in each])
              for what in dict.fromkeys(what for each in found for what in each)]
    for tool in TOOLS:
        own = [row for row in rows if row.tool == tool.name]
        for sees in (True, False):
            claims += of_ranking(tool, [row for row in own if (row.wired == 1.0) == sees])
        if own and tool.within:
            errors = [row.error for row in own]
            claims.append(Claim(f"{tool.name}: largest error of a size", max(errors), min(errors),
                                max(errors), max(errors) <= tool.within,
                                control=f"at most {tool.within}"))
    return claims


def of_fact(what, cases):
    """A Claim that a fact holds in all cases, [(measured, wired, within)]."""
    values, (_, wired, within) = [value for value, *_ in cases], cases[0]
    holds = all(abs(value - wired) <= within for value in values)
    return over_seeds(what, values, holds, control=f"wired: {wired:g}")


def of_ranking(tool, rows):
    """[Claim] that a tool ranks as wired on all circuits of these rows; none for none."""
    if not rows:
        return []
    names, wired = list(dict.fromkeys(row.circuit for row in rows)), {row.wired for row in rows}
    where = "what it must miss: " + ", ".join(names) if wired != {1.0} else (
        f"{len(names)} circuits" if len(names) > 1 else names[0])
    values = [row.auroc for row in rows]
    holds = all(abs(row.auroc - row.wired) < 1e-9 for row in rows)
    low, high = f"{min(wired):.2g}", f"{max(wired):.2g}"
    return [over_seeds(f"{tool.name}: AUROC, {where}", values, holds,
                       control=f"wired: {low}" + f" to {high}" * (low != high))]


def grid(rows):
    """(AUROC, wired), each {(tool, circuit): number}, the mean over seeds and bases."""
    cells = dict.fromkeys((row.tool, row.circuit) for row in rows)
    of_cell = {cell: [row for row in rows if (row.tool, row.circuit) == cell] for cell in cells}
    return ({cell: statistics.mean(row.auroc for row in own) for cell, own in of_cell.items()},
            {cell: own[0].wired for cell, own in of_cell.items()})


def figure(rows):
    """The Figure of each tool on each circuit: its AUROC, and a frame where it must fail."""
    measured, wired = grid(rows)
    names = list(dict.fromkeys(row.circuit for row in rows))
    tools = [tool.name for tool in TOOLS if any(tool.name == row.tool for row in rows)]
    cells = [[(tool, name) for name in names] for tool in tools]
    values = [[measured.get(cell, float("nan")) for cell in row] for row in cells]
    as_wired = sum(abs(measured[cell] - wired[cell]) < 1e-9 for cell in wired)
    result = plotting.heatmap(
        values, row_labels=tools, column_labels=names, ylabel="",
        xlabel="circuit, wired by hand (blank: the tool is about something else)",
        title=f"{as_wired} of {len(wired)} verdicts are as wired: a tool finds what it can see\n"
              f"and misses, in {sum(auroc < 1 for auroc in wired.values())} cells (framed), what "
              "is redundant, saturated, indirect, or pretty but dead")
    result.set_size_inches(10.5, 7)
    axes, bar = result.axes
    masked, scale = plotting.colour_scale(values)
    plotting.write_cells(axes, masked, [["" if value != value else f"{value:.2f}".rstrip("0")
                                         .rstrip(".") for value in row] for row in values], scale)
    for y, x in ((y, x) for y, row in enumerate(cells) for x, cell in enumerate(row)
                 if wired.get(cell, 1.0) < 1.0):
        axes.plot([x - .45, x + .45, x + .45, x - .45, x - .45],
                  [y - .45, y - .45, y + .45, y + .45, y - .45], color=plotting.COLOURS[1])
    axes.set_aspect("auto")
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="right", rotation_mode="anchor")
    bar.set_ylabel("AUROC: what matters ranks above what does not (0.5: chance)", fontsize=9)
    return result
