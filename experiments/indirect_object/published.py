"""Measure GPT-2, or any model in its layout, on prompts of the published form.

The templates have the paper's form in our own words: two people are somewhere, and one of them
gives something to the other. In ABBA prompts the giver was named second, in BABA prompts first.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: experiments/indirect_object/model.py
Next: experiments/indirect_object/report.py
Source: Wang et al. 2022, sections 2 and 3, and figure 2 for the heads by name
"""

import random

import torch

from activation_cache import get_act_name, head_label
from experiments.common import claim
from experiments.indirect_object.model import Gifts, places_of
from patching import path_patch
from utils import Progress, UserError

TEMPLATES = (
    "After lunch,{A} and{B} walked over to the{PLACE}.{S} handed a{THING} to",
    "When{A} and{B} met near the{PLACE},{S} passed a{THING} to",
    "Then{A} and{B} sat down inside the{PLACE}, and{S} offered a{THING} to",
    "While{A} and{B} were working at the{PLACE},{S} brought a{THING} to",
)
NAMES = (" Mary", " John", " Tom", " James", " Dan", " Sarah", " Anna", " Paul", " Mark", " Lisa",
         " David", " Emma", " Peter", " Laura", " Kevin", " Alice")
PLACES = (" store", " garden", " office", " school", " station", " house")
THINGS = (" book", " ring", " bag", " drink", " letter", " key")

# GPT-2 small's heads by role, as the paper names them
GPT2_ROLES = {
    "name movers": ((9, 9), (10, 0), (9, 6)),
    "backup name movers": ((10, 10), (10, 6), (10, 2), (10, 1), (11, 2), (9, 7), (9, 0), (11, 9)),
    "negative name movers": ((10, 7), (11, 10)),
    "S-inhibition": ((7, 3), (7, 9), (8, 6), (8, 10)),
    "induction": ((5, 5), (5, 8), (5, 9), (6, 9)),
    "duplicate token": ((0, 1), (0, 10), (3, 0)),
    "previous token": ((2, 2), (4, 11)),
}
REPORTED = {"diff": "3.56 (Wang et al.)", "right": "0.993 (Wang et al.)",
            "movers": "0.59 (Wang et al.)", "inhibition": "0.51 (Wang et al.)"}


def published_gifts(tokenizer, template, n_prompts, seed=0):
    """Gifts of one template, with names of one token each. Raises UserError if the tokenizer has
    fewer than five such names."""
    def single(words, least):
        found = [word for word in words if len(tokenizer.encode(word)) == 1]
        if len(found) < least:
            raise UserError(f"{len(found)} of {len(words)} names, places or things are one token "
                            f"of this tokenizer, but {least} are needed; use GPT-2's own "
                            "vocab.json and merges.txt")
        return found

    names, places, things = single(NAMES, 5), single(PLACES, 1), single(THINGS, 1)
    draw = random.Random(seed)
    rows = {"clean": [], "corrupted": [], "without": []}
    receivers = []
    for i in range(n_prompts):
        a, b, *strangers = draw.sample(names, 5)
        giver = (b, a)[i % 2]  # ABBA, BABA
        blanks = {"PLACE": draw.choice(places), "THING": draw.choice(things)}
        strangers = (*strangers[:2], strangers[2])
        for kind, (one, two, gives) in (("clean", (a, b, giver)), ("corrupted", strangers),
                                        ("without", (a, b, strangers[2]))):
            text = template.format(A=one, B=two, S=gives, **blanks)
            rows[kind].append(tokenizer.encode(text))
        receivers.append(tokenizer.encode((a, b)[i % 2])[0])

    clean, corrupted, without = (torch.tensor(rows[kind]) for kind in rows)
    receiver = torch.tensor(receivers)
    second = (clean != without).float().argmax(1)  # only the giver differs
    giver = clean.gather(1, second[:, None])[:, 0]
    ids = torch.tensor([tokenizer.encode(name)[0] for name in names])
    return Gifts(clean, corrupted, without, receiver, giver,
                 places_of(clean, receiver, second), ids)


@torch.no_grad()
def measure_published(model, tokenizer, n_prompts):
    """Measure a model on the published prompts: a dict of plain values, means over templates.

    direct: {label: the head's direct effect in nats}, the change of the logit difference when its
    output comes from the corrupted prompts and reaches the logits alone. attention: {label: {"END
    to IO", "END to S2"}}.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    labels = [head_label(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    direct = torch.zeros(len(labels))
    looks = torch.zeros(2, len(labels))
    diffs = []
    progress = Progress(len(TEMPLATES) * len(labels), " heads")
    for number, template in enumerate(TEMPLATES):
        gifts = published_gifts(tokenizer, template, n_prompts, seed=number)
        if gifts.clean_tokens.shape[1] > model.cfg.n_ctx:
            raise UserError(f"a prompt has {gifts.clean_tokens.shape[1]} tokens, but the model "
                            f"reads {model.cfg.n_ctx}; choose a model with a larger n_ctx")
        logits, cache = model.run_with_cache(gifts.clean_tokens)
        diffs.append(gifts.metric(logits))

        rows = torch.arange(n_prompts)
        for i, label in enumerate(labels):
            layer, head = divmod(i, n_heads)
            pattern = cache["pattern", layer][rows, head, gifts.at["END"]]  # [batch, key_pos]
            looks[0, i] += pattern[rows, gifts.at["IO"]].mean()
            looks[1, i] += pattern[rows, gifts.at["S2"]].mean()
            direct[i] += path_patch(model, gifts.clean_tokens, gifts.corrupted_tokens,
                                    [(get_act_name("z", layer), head)], ["logits"], gifts.metric,
                                    freeze="all").mean
            progress.show(number * len(labels) + i + 1, label)
    progress.close()

    diffs = torch.cat(diffs)
    looks, direct = looks / len(TEMPLATES), direct / len(TEMPLATES)
    return {"diff": diffs.tolist(), "right": (diffs > 0).float().mean().item(),
            "n_layers": n_layers, "n_heads": n_heads,
            "direct": dict(zip(labels, direct.tolist(), strict=True)),
            "attention": {label: {"END to IO": io, "END to S2": s2}
                          for label, io, s2 in zip(labels, *looks.tolist(), strict=True)}}


def is_gpt2_small(found):
    """Whether a model has GPT-2 small's layers and heads, to which the paper's names apply."""
    return (found["n_layers"], found["n_heads"]) == (12, 12)


def published_claims(found):
    """[Claim]: measured beside published numbers. None is judged, because the prompts differ."""
    diff = torch.tensor(found["diff"])
    claims = [claim("IO above S: the difference of their logits (nats)", diff.mean(),
                    interval=interval_of(diff), reported=REPORTED["diff"]),
              claim("share of prompts with IO above S", found["right"],
                    reported=REPORTED["right"])]
    if not is_gpt2_small(found):
        return claims

    for role, key, where in (("name movers", "movers", "END to IO"),
                             ("S-inhibition", "inhibition", "END to S2")):
        looks = [found["attention"][head_label(*head)][where] for head in GPT2_ROLES[role]]
        claims.append(claim(f"{role}: attention from {where}", looks, reported=REPORTED[key]))
    ranked = sorted(found["direct"], key=found["direct"].get)
    for role, heads in GPT2_ROLES.items():
        ranks = [1 + ranked.index(head_label(*head)) for head in heads]
        said = {"name movers": "the first three", "negative name movers": "the last two"}
        claims.append(claim(f"{role}: rank of their direct effects among 144 heads", ranks,
                            reported=said.get(role, "")))
    return claims


def interval_of(values):
    """(low, high): the mean minus and plus twice its standard error."""
    error = 2 * values.std().item() / len(values) ** 0.5
    return values.mean().item() - error, values.mean().item() + error


def describe_published(found):
    """Two sentences that say what was found."""
    ranked = sorted(found["direct"], key=found["direct"].get)
    return (f"The receiver is likelier than the giver in {found['right']:.0%} of the prompts. By "
            f"direct effect, {', '.join(ranked[:3])} support the answer most, and "
            f"{', '.join(ranked[:-3:-1])} oppose it most (heads.png).")
