"""Split what a model gains by its heads into single heads and virtual heads, with frozen patterns.

    python experiments/claim_card.py check virtual_heads

The claim, its null and its threshold are on the card: card.md in this folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import functools

import torch

import corpus
from activation_cache import get_act_name
from experiments.cards.measure import kept_models, perform_study
from experiments.indirect_object.model import (
    GiftRecipe,
    draw_gifts,
    gift_text,
    trained_gift_model,
)
from losses import per_token_loss
from utils import run_program

WINDOWS = 128  # of unseen text, each as long as the context
PROMPTS = 200  # gifts, for the null


@functools.cache
def training_text():
    """(tokens [n], tokenizer) of the text that all models are trained on."""
    return gift_text(GiftRecipe())


@functools.cache
def model_of_seed(seed):
    """The model of indirect objects of a seed: three layers of four heads, without MLPs."""
    home = kept_models("indirect_object_identification")
    return trained_gift_model(home, seed, GiftRecipe(), training_text())


@torch.no_grad()
def losses_by_order(model, tokens, loss):
    """The loss if the answer may pass through at most 0, 1, 2, … heads: a list of numbers.

    loss: a function of the logits. Patterns, and the scales of all LayerNorms, are frozen at those
    of the whole model, so that everything else is linear. In round n each layer reads a stream that
    holds what the layers before it wrote in round n - 1; in round 0 it holds the embedding alone.
    """
    frozen = [name for name in model.hook_points() if name.endswith(("pattern", "scale"))]
    _, intact = model.run_with_cache(tokens, frozen)
    hold = [(name, lambda value, hook: intact[hook.name]) for name in frozen]
    outputs = [get_act_name("attn_out", layer) for layer in range(model.cfg.n_layers)]

    losses = []
    written = dict.fromkeys(outputs, torch.zeros(()))
    for _ in range(model.cfg.n_layers + 1):
        new = {}

        def swap(attn_out, hook, new=new, written=written):
            new[hook.name] = attn_out.clone()
            return written[hook.name].expand_as(attn_out).clone()

        logits = model.run_with_hooks(tokens, hold + [(name, swap) for name in outputs])
        losses.append(loss(logits).item())
        written = new
    return losses


def text_losses(seed):
    """`losses_by_order` on unseen text."""
    _, tokenizer = training_text()
    n_ctx = GiftRecipe().n_ctx
    ids = tokenizer.encode(corpus.text(16 * WINDOWS * n_ctx, seed=1000 + seed))
    tokens = torch.tensor(ids[: WINDOWS * n_ctx]).view(WINDOWS, n_ctx)
    return losses_by_order(
        model_of_seed(seed), tokens,
        lambda logits: per_token_loss(logits[:, :-1], tokens[:, 1:]).mean())


def answer_losses(seed):
    """`losses_by_order` on the answers of gifts: who is given something."""
    gifts = draw_gifts(training_text()[1], PROMPTS, seed=1000 + seed)
    return losses_by_order(
        model_of_seed(seed), gifts.clean_tokens,
        lambda logits: per_token_loss(logits[:, -1], gifts.receiver).mean())


def losses_of_kinds(seed, kinds):
    """{kind: `losses_by_order` on the words of this kind}, such as "syntax", in unseen stories."""
    _, tokenizer = training_text()
    n_ctx = GiftRecipe().n_ctx
    sample = corpus.sample(1000, seed=3000 + seed)
    n = len(sample.words) // n_ctx * n_ctx
    tokens = torch.tensor([tokenizer.ids[word] for word in sample.words[:n]]).view(-1, n_ctx)

    found = {}
    for kind in kinds:
        asked = torch.tensor([other == kind for other in sample.categories[:n]]).view(-1, n_ctx)
        found[kind] = losses_by_order(
            model_of_seed(seed), tokens,
            lambda logits, asked=asked: per_token_loss(logits[:, :-1], tokens[:, 1:])[
                asked[:, 1:]].mean())
    return found


def virtual_share(losses):
    """The share of the heads' whole gain that needs two heads or more in a row."""
    return (losses[1] - losses[-1]) / (losses[0] - losses[-1])


def measure(seed):
    """The share on unseen text."""
    return virtual_share(text_losses(seed))


def null(seed):
    """The share on the answers of gifts, which need several heads in a row."""
    return virtual_share(answer_losses(seed))


def more(seed):
    """The losses themselves, in nats, and the share for two kinds of words."""
    without, single, two, whole = text_losses(seed)
    of_kinds = losses_of_kinds(seed, ("syntax", "copying"))
    return {"loss without heads": without, "with single heads": single,
            "with two in a row": two, "of the whole model": whole} | {
        f"share for {kind}": virtual_share(losses) for kind, losses in of_kinds.items()}


def main(argv=None):
    """Run the program: measure every seed, print the table, write the results."""
    perform_study(__file__, __doc__, measure, null, more=more, argv=argv)


if __name__ == "__main__":
    run_program(main)
