"""Remove the heads that zero ablation calls important, in four ways, and count what is lost.

    python experiments/claim_card.py check needed_heads

The claim, its null and its threshold are on the card: card.md in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import functools

import torch

from experiments.cards.measure import kept_models, perform_study
from experiments.indirect_object.model import (
    GiftRecipe,
    draw_gifts,
    gift_text,
    trained_gift_model,
)
from head_ablation import derangement, head_importance
from utils import run_program, seeded_generator

IMPORTANT = 2.0  # nats: what a head must cost by zero ablation, on other prompts
PROMPTS = 200  # gifts to choose heads on, and as many to judge them on


@functools.cache
def training_text():
    """(tokens [n], tokenizer) of the text that all models are trained on."""
    return gift_text(GiftRecipe())


@functools.cache
def losses_of_lead(seed, mode, prompt_seed):
    """How much of the lead of the right name over the wrong one is lost without each head, in nats:
    [head], the mean over prompts."""
    text = training_text()
    home = kept_models("indirect_object_identification")
    model = trained_gift_model(home, seed, GiftRecipe(), text)
    gifts = draw_gifts(text[1], PROMPTS, prompt_seed)

    with torch.no_grad():
        _, reference = model.run_with_cache(gifts.clean_tokens, lambda name: name.endswith("z"))
    source = derangement(PROMPTS, seeded_generator(prompt_seed))
    rises = head_importance(model, gifts.clean_tokens, gifts.metric, mode=mode,
                            reference=reference, source=source)
    return -rises.mean.flatten()


def important_heads(seed):
    """[head], bool: those that zero ablation calls important, on prompts that are not judged."""
    return losses_of_lead(seed, "zero", 1000 + seed) >= IMPORTANT


def least_lost(seed, mode):
    """What is lost without the important head that matters least if `mode` removes it, in nats."""
    lost = losses_of_lead(seed, mode, 2000 + seed)
    return lost[important_heads(seed)].min()


def measure(seed):
    """By zero ablation."""
    return least_lost(seed, "zero")


def null(seed):
    """By zero ablation, of the head that costs least on the other prompts."""
    least = losses_of_lead(seed, "zero", 1000 + seed).abs().argmin()
    return losses_of_lead(seed, "zero", 2000 + seed)[least]


def more(seed):
    """How many heads are important, and how many of them still are if they are resampled."""
    chosen = important_heads(seed)
    lost = losses_of_lead(seed, "resample", 2000 + seed)
    return {"important heads": int(chosen.sum()),
            "of these, above 1 nat if resampled": int((lost[chosen] > 1).sum())}


def main(argv=None):
    """Run the program: measure every seed, print the table, write the results."""
    ways = {"mean": "mean", "mean at each position": "mean_pos", "resampled": "resample"}
    perform_study(__file__, __doc__, measure, null, more=more, argv=argv, ways={
        name: functools.partial(least_lost, mode=mode) for name, mode in ways.items()})


if __name__ == "__main__":
    run_program(main)
