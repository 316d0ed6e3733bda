"""What shows that two heads are an induction circuit: weights, ablation, one path, other texts.

    previous-token head   at j + 1: "before me came the token t_j"
    induction head        at i, whose token is t_j again: looks for a key that says so, finds j + 1,
                          and says t_(j + 1)

The claim is about the way between them: what the first writes is read in the *keys* of the second
(K-composition), and this path alone carries the answer. Each test has its control: the same for
another head of the same layer, another input of the same head, random matrices.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: experiments/induction_model.py; after: experiments/induction_head_detection.py
Source: Elhage et al. 2021 (K-composition); Olsson et al. 2022 (ablation); Wang et al. 2022 (paths)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from experiments.induction_model import (
    MEASURED_ON,
    Repeats,
    circuit,
    head_scores,
    losses,
    measured,
    repeats_metric,
)
from head_ablation import ablate_heads
from patching import path_patch
from utils import seeded_generator
from weight_circuits import composition_scores

ROWS, DRAWS = 64, 300
TEXTS = {  # what the model was not trained on, beside fresh texts of the kind that it was
    "as trained": {},
    "segments of 2 to 5": {"lengths": (2, 5)},
    "segments of 17 to 20": {"lengths": (17, 20), "gaps": (0, 0)},
    "gaps of 9 to 24": {"lengths": (4, 8), "gaps": (9, 24)},
    "ids that count upwards": {"counting": True},
}


def texts_of(model, **kind):
    """(tokens, known) of fresh texts of a kind of Repeats, each [ROWS, n_ctx + 1]."""
    return Repeats(model.cfg.n_ctx + 1, **kind).draw(ROWS, seeded_generator(MEASURED_ON + 1))


def composition(model, found):
    """How well the weights of two heads fit: by how many standard deviations more than DRAWS draws
    of random matrices do. {"K", "Q", "V": z of the previous-token head with that input of the
    induction head; "other K", "other V": [z] of the other heads below it}."""
    z = {kind: composition_scores(model, kind, n_draws=DRAWS).z for kind in "KQV"}
    own = {kind: z[kind][(*found.previous, *found.induction)].item() for kind in "KQV"}
    others = {f"other {kind}": [z[kind][(*head, *found.induction)].item() for head in found.others]
              for kind in "KV"}
    return own | others


@torch.no_grad()
def ablation(model, found):
    """{what is removed: {"repeats": loss on repeats in nats, "induction": the induction head's
    score}}; each head's z is replaced by its mean over texts at each position."""
    tokens, known = texts_of(model)
    _, reference = model.run_with_cache(tokens[:, :-1], lambda name: name.endswith("hook_z"))
    removed = {"nothing": [], "previous-token head": [found.previous],
               "induction head": [found.induction], "all induction heads": found.all_induction}
    removed |= {f"other head {layer}.{head}": [(layer, head)] for layer, head in found.others}
    result = {}
    for name, heads in removed.items():
        with ablate_heads(model, heads, "mean_pos", reference=reference):
            score = head_scores(model, tokens[:, :-1])["induction"].mean(1)[found.induction]
            result[name] = {"repeats": losses(model, tokens, known)[0], "induction": score.item()}
    return result


def paths(model, found):
    """{way: rise of the loss on repeats in nats}, where the head at its beginning has its value in
    other texts (of the same form, with other tokens) for the receiver alone.

    "all" is the head's effect by whatever way: to the logits, nothing frozen.
    """
    (tokens, known), n_layers = texts_of(model), model.cfg.n_layers
    clean, other = tokens[:, :-1], (tokens[:, :-1] + model.cfg.d_vocab // 2) % model.cfg.d_vocab
    metric = repeats_metric(tokens, known)

    def rise(sender, receivers, freeze="heads"):
        layer, head = sender
        result = path_patch(model, clean, other, [(f"blocks.{layer}.attn.hook_z", head)],
                            receivers, metric, freeze)
        return result.effect.item()

    def inputs(letter, layer=n_layers - 1):
        return [(f"blocks.{layer}.hook_{letter}_input", head) for _, head in found.all_induction]

    ways = {f"previous-token head to {letter}": rise(found.previous, inputs(letter.lower()))
            for letter in "KQV"}
    ways |= {f"other head {layer}.{head} to K": rise((layer, head), inputs("k"))
             for layer, head in found.others}
    return ways | {"previous-token head by all ways": rise(found.previous, ["logits"], None)}


@torch.no_grad()
def transfer(model, found):
    """{texts: {"repeats": nats, "first": nats, "induction": score}} on each of TEXTS."""
    result = {}
    for name, kind in TEXTS.items():
        tokens, known = texts_of(model, **kind)
        repeats, first = losses(model, tokens, known)
        score = head_scores(model, tokens[:, :-1])["induction"].mean(1)[found.induction]
        result[name] = {"repeats": repeats, "first": first, "induction": score.item()}
    return result


@torch.no_grad()
def shifted_score(model, found):
    """The induction head's score if it looked one key further back, which is where its token was:
    what an error by one in the measure, or a head that finds and does not move on, would have."""
    tokens, _ = texts_of(model)
    return head_scores(model, tokens[:, :-1])["duplicate-token"].mean(1)[found.induction].item()


def crossing(history, value, level):
    """The first step of a history at which value(row) has reached the level, from whichever side it
    began; None where it never does."""
    begins_above = value(history[0]) > level
    return next((row["step"] for row in history if (value(row) > level) != begins_above), None)


def phase_change(history, found):
    """When things happen, in steps. "loss at 90 %" (50, 10): of the loss on repeats at the start;
    "induction", "previous-token": when the head's score passes one half."""
    def loss_reaches(share):
        return crossing(history, lambda row: row["repeats"], share * history[0]["repeats"])

    steps = {f"loss at {share} %": loss_reaches(share / 100) for share in (90, 50, 10)}
    for kind, at in (("induction", found.induction), ("previous-token", found.previous)):
        steps[kind] = crossing(history, lambda row, k=kind, at=at: row[k][at[0]][at[1]], 0.5)
    return steps


def proof(model, history):
    """All of it, of one model: a dict of plain values."""
    found = circuit(model)
    return {"heads": {"previous": list(found.previous), "induction": list(found.induction),
                      "all_induction": [list(head) for head in found.all_induction],
                      "others": [list(head) for head in found.others]},
            "history": history, "composition": composition(model, found),
            "ablation": ablation(model, found), "paths": paths(model, found),
            "transfer": transfer(model, found), "shifted": shifted_score(model, found),
            "phase": phase_change(history, found), "measured": measured(model)}
