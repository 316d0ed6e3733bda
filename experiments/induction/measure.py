"""Test whether two heads form an induction circuit: by weights, ablation, paths and unseen texts.

    previous-token head   at j + 1, writes: "the token before me is t_j"
    induction head        at i, whose token is t_j again: looks for a key with that message, finds
                          j + 1, and predicts t_(j + 1)

The claim is about the path between the two. What the first head writes is read by the *keys* of the
second (K-composition), and this path alone carries the answer. Each test has a control: another
head of the same layer, another input of the same head, or random matrices.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Prerequisites: experiments/induction/model.py
Next: experiments/suppression/model.py
Source: Elhage et al. 2021 (K-composition); Olsson et al. 2022 (ablation); Wang et al. 2022 (paths)
"""

from dataclasses import replace

import torch

from activation_cache import head_label
from experiments.induction.model import (
    MEASURED_ON,
    Repeats,
    find_circuit,
    head_scores,
    measure_heads,
    repeat_losses,
    repeats_metric,
    trained_induction_model,
)
from head_ablation import ablate_heads
from patching import path_patch
from utils import seeded_generator
from weight_circuits import composition_scores

ROWS = 64  # texts that a trained model is measured on
DRAWS = 300  # of random matrices
TEXTS = {  # unseen texts of the kind that the model was trained on, and of four other kinds
    "as trained": {},
    "segments of 2 to 5": {"lengths": (2, 5)},
    "segments of 17 to 20": {"lengths": (17, 20), "gaps": (0, 0)},
    "gaps of 9 to 24": {"lengths": (4, 8), "gaps": (9, 24)},
    "ids that count upwards": {"counting": True},
}


def measure_seed(folder, seed, recipe, *, retrain=False, trainings=None):
    """Train and measure the three models of a seed; returns a dict of plain values.

    It holds what `measure_circuit` returns for the main model, and what two models without the
    circuit do: one with a single layer ("one_layer"), one trained with circles instead of maps
    ("circles"). folder, retrain, trainings: as in `trained_induction_model`; recipe: an
    InductionRecipe.
    """
    how = {"retrain": retrain, "trainings": trainings}
    model, history = trained_induction_model(folder, seed, recipe, **how)
    result = measure_circuit(model, history) | {"seed": seed}

    one_layer = replace(recipe, n_layers=1, every=50)
    _, result["one_layer"] = trained_induction_model(folder, seed, one_layer, **how)

    circles = replace(recipe, circles=True, every=50)
    model, result["circles"] = trained_induction_model(folder, seed, circles, **how)
    result["circles_transfer"] = measure_transfer(model, find_circuit(model))
    return result


def measure_circuit(model, history):
    """All measurements of the circuit in one trained model, a dict of plain values.

    history: what `trained_induction_model` returns with the model.
    """
    circuit = find_circuit(model)
    heads = {
        "previous": list(circuit.previous),
        "induction": list(circuit.induction),
        "all_induction": [list(head) for head in circuit.all_induction],
        "others": [list(head) for head in circuit.others],
    }
    return {
        "heads": heads,
        "history": history,
        "composition": measure_composition(model, circuit),
        "ablation": measure_ablation(model, circuit),
        "paths": measure_paths(model, circuit),
        "transfer": measure_transfer(model, circuit),
        "shifted": score_one_key_off(model, circuit),
        "phase": find_phase_change(history, circuit),
        "measured": measure_heads(model),
    }


def draw_texts(model, **kind):
    """(tokens, known) of unseen texts, each [ROWS, n_ctx + 1]; kind: settings of `Repeats`."""
    return Repeats(model.cfg.n_ctx + 1, **kind).draw(ROWS, seeded_generator(MEASURED_ON + 1))


def measure_composition(model, circuit):
    """Composition scores of head pairs, as z-scores against random matrices.

    Returns {"K", "Q", "V": z of the previous-token head with that input of the induction head;
    "other K", "other V": [z] of the other heads below it}. z: how many standard deviations the
    score lies above the mean of DRAWS random draws.
    """
    z_scores = {kind: composition_scores(model, kind, n_draws=DRAWS).z for kind in "KQV"}

    def z_score(kind, head):
        """Of the path from a head into an input of the induction head."""
        writer_layer, writer = head
        reader_layer, reader = circuit.induction
        return z_scores[kind][writer_layer, writer, reader_layer, reader].item()

    own = {kind: z_score(kind, circuit.previous) for kind in "KQV"}
    others = {f"other {kind}": [z_score(kind, head) for head in circuit.others] for kind in "KV"}
    return own | others


@torch.no_grad()
def measure_ablation(model, circuit):
    """Ablate each head of the circuit: {what is removed: {"repeats", "induction"}}.

    repeats: the loss on repeats, in nats per token; induction: the induction head's score. The z of
    a removed head is replaced by its mean over texts at each position.
    """
    tokens, known = draw_texts(model)
    _, reference = model.run_with_cache(tokens[:, :-1], lambda name: name.endswith("hook_z"))

    removed = {"nothing": [], "previous-token head": [circuit.previous],
               "induction head": [circuit.induction],
               "all induction heads": circuit.all_induction}
    removed |= {f"other head {head_label(*head)}": [head] for head in circuit.others}

    result = {}
    for name, heads in removed.items():
        with ablate_heads(model, heads, "mean_pos", reference=reference):
            score = head_scores(model, tokens[:, :-1])["induction"].mean(1)[circuit.induction]
            repeats, _ = repeat_losses(model, tokens, known)
        result[name] = {"repeats": repeats, "induction": score.item()}
    return result


def measure_paths(model, circuit):
    """Corrupt one path at a time: {path: rise of the loss on repeats, in nats per token}.

    The sender takes its value from corrupted texts (the same form, other tokens), and only the
    receivers at the end of the path see the change. The last entry is the previous-token head's
    effect through all paths: the receivers are the logits, and nothing is frozen.
    """
    tokens, known = draw_texts(model)
    n_layers, d_vocab = model.cfg.n_layers, model.cfg.d_vocab
    clean_tokens = tokens[:, :-1]
    corrupted_tokens = (clean_tokens + d_vocab // 2) % d_vocab
    metric = repeats_metric(tokens, known)

    def rise(sender, receivers, freeze="heads"):
        layer, head = sender
        result = path_patch(model, clean_tokens, corrupted_tokens,
                            [(f"blocks.{layer}.attn.hook_z", head)], receivers, metric, freeze)
        return result.mean.item()

    def induction_inputs(letter):
        return [(f"blocks.{n_layers - 1}.hook_{letter}_input", head)
                for _, head in circuit.all_induction]

    rises = {f"previous-token head to {letter}":
             rise(circuit.previous, induction_inputs(letter.lower())) for letter in "KQV"}
    for head in circuit.others:
        rises[f"other head {head_label(*head)} to K"] = rise(head, induction_inputs("k"))
    rises["previous-token head by all ways"] = rise(circuit.previous, ["logits"], freeze=None)
    return rises


@torch.no_grad()
def measure_transfer(model, circuit):
    """{texts: {"repeats": nats, "first": nats, "induction": score}} for each kind in TEXTS."""
    result = {}
    for name, kind in TEXTS.items():
        tokens, known = draw_texts(model, **kind)
        repeats, first = repeat_losses(model, tokens, known)
        score = head_scores(model, tokens[:, :-1])["induction"].mean(1)[circuit.induction]
        result[name] = {"repeats": repeats, "first": first, "induction": score.item()}
    return result


@torch.no_grad()
def score_one_key_off(model, circuit):
    """The induction head's attention to the earlier occurrence itself, one key too far back.

    It is high if the induction score is off by one, or if the head finds the earlier occurrence but
    does not look at the token after it.
    """
    tokens, _ = draw_texts(model)
    return head_scores(model, tokens[:, :-1])["duplicate-token"].mean(1)[circuit.induction].item()


def first_crossing(history, value, level):
    """The first step of a history at which value(row) crosses the level, from above or from below;
    None if it never does."""
    begins_above = value(history[0]) > level
    crossed = (row["step"] for row in history if (value(row) > level) != begins_above)
    return next(crossed, None)


def find_phase_change(history, circuit):
    """When the circuit forms: {event: step, or None if it never comes}.

    "loss at 90 %" (50 %, 10 %): the loss on repeats has fallen to that share of its first value.
    "induction", "previous-token": the head's score passes 0.5.
    """
    def repeats(row):
        return row["repeats"]

    def score_of(kind, head):
        layer, index = head
        return lambda row: row[kind][layer][index]

    at_start = repeats(history[0])
    steps = {f"loss at {percent} %": first_crossing(history, repeats, percent / 100 * at_start)
             for percent in (90, 50, 10)}
    steps["induction"] = first_crossing(history, score_of("induction", circuit.induction), 0.5)
    steps["previous-token"] = first_crossing(
        history, score_of("previous-token", circuit.previous), 0.5)
    return steps
