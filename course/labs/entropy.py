"""Watch the heads become sharp during training, and ask whether a sharp head is an important one.

    python course/labs/entropy.py             # two minutes, one thread
    python course/labs/entropy.py --quick     # seconds: that it runs, not what comes out

A head's sharpness is 1 - entropy of its pattern / entropy of even attention. It is 0 for a head
that spreads its attention evenly over all it may see, and 1 for one that looks at a single
position. A head's effect is how much the loss rises when its z is replaced by the mean.

Claim: the loss falls first and the heads become sharp later. After four fifths of the fall, less
than a tenth of the sharpening is done. And sharpness is not importance. A head that is still nearly
even can have an effect, while an untrained one has none.
Control: the same words in random order. There is nothing to look at, but heads become sharp there
too, a little later, and none of them ever has an effect.
Expected: every line with a verdict passes. A seed takes 30 s (CPU, one core).

Chapter: COURSE_ROADMAP.md, 4 (QK and OV); how a model is trained: chapter 6; ablation: chapter 9
Prerequisites: attention.py, experiments/attention_page/measure.py
Next: mlp.py
Source: Jain & Wallace 2019 (attention is not explanation)
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

import corpus
from config import ModelConfig, TrainConfig, check_field, option
from data import random_batch
from experiments.common import (
    LabConfig,
    Trainings,
    claim,
    encode_start,
    mean_text,
    perform,
    seed_claim,
)
from head_ablation import head_importance
from losses import next_token_loss
from metrics import attention_entropy, spearman
from model import GPT
from plotting import COLOURS, PlainFigure, bare_axes
from tokenizer import WordTokenizer
from train import fit
from utils import run_program, seeded_generator

SHAPE = {"n_layers": 2, "n_heads": 4, "d_model": 64, "n_ctx": 48}
CHARACTERS = 400_000  # of the built-in corpus, to train on
UNSEEN_SEED = 1  # of the corpus, for the texts that heads are measured on
BATCH = 16
NEARLY_EVEN = 0.05  # a head of lower sharpness counts as nearly even
KINDS = ("text", "random order")  # of the words


@dataclass(frozen=True)
class EntropyConfig(LabConfig):
    """Settings of the lab."""

    steps: int = option(500, "steps of each training")
    looks: int = option(20, "how often to look at the heads, at steps a constant factor apart")
    windows: int = option(32, "unseen texts to measure the heads on")

    def __post_init__(self):
        super().__post_init__()
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        check_field(self, "looks", lambda n: n >= 2, "2 or more")
        check_field(self, "windows", lambda n: n >= 2, "2 or more")


# What is measured


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": [{kind of text: its looks}]}.

    cfg: an EntropyConfig. A look is what `look_at_heads` returns, and the step.
    """
    if cfg.quick:
        cfg = replace(cfg, steps=20, looks=5, windows=4, seeds=cfg.seeds[:1])

    texts = make_texts(cfg.windows)
    trainings = Trainings([cfg.steps] * len(KINDS) * len(cfg.seeds))
    seeds = [{kind: watch_training(*texts[kind], seed, cfg, trainings) for kind in KINDS}
             for seed in cfg.seeds]
    return {"found": describe(seeds),
            "claims": claims_of(seeds, judged=not cfg.quick), "seeds": seeds}


def make_texts(n_windows):
    """{kind: (ids to train on [n], unseen ids [batch, pos], size of the vocabulary)}.

    The control has the same words in random order, so there is nothing to learn but how frequent
    each word is.
    """
    text = corpus.text(CHARACTERS)
    tokenizer = WordTokenizer().fit(text)
    tokens = torch.tensor(tokenizer.encode(text))
    n_unseen = n_windows * SHAPE["n_ctx"]
    unseen = torch.tensor(encode_start(None, tokenizer, n_unseen, UNSEEN_SEED)[:n_unseen])

    in_order = (tokens, unseen)
    shuffled = [part[torch.randperm(len(part), generator=seeded_generator(0))] for part in in_order]
    return {kind: (train, held.view(n_windows, -1), tokenizer.d_vocab)
            for kind, (train, held) in zip(KINDS, (in_order, shuffled), strict=True)}


def watch_training(tokens, held, d_vocab, seed, cfg, trainings):
    """Train a GPT on tokens [n] and look at its heads on held [batch, pos]: a list of looks, the
    first of them before training."""
    model = GPT(ModelConfig(**SHAPE, d_vocab=d_vocab), seed)
    generator = seeded_generator(seed)
    last = cfg.looks - 1
    steps = {round(cfg.steps ** (number / last)) for number in range(cfg.looks)}  # 1 to cfg.steps

    def next_batch():
        return random_batch(tokens, BATCH, model.cfg.n_ctx, generator)

    looks = [look_at_heads(model, held) | {"step": 0}]
    trainings.begin(f"seed {seed}")
    for step in fit(model, next_batch, TrainConfig(max_steps=cfg.steps)):
        trainings.show(step.number, f"loss {step.loss:.2f}")
        if step.number in steps:
            looks.append(look_at_heads(model, held) | {"step": step.number})
    trainings.close()
    trainings.count()
    return looks


@torch.no_grad()
def look_at_heads(model, tokens):
    """{"loss": of tokens [batch, pos], in nats; "sharpness", "effect": lists of one number a head,
    layer by layer}."""
    logits, cache = model.run_with_cache(tokens, lambda name: name.endswith(("pattern", "hook_z")))
    entropy = attention_entropy(cache.stack("pattern")).mean(1)  # [layer, head]
    even = torch.arange(1, tokens.shape[1] + 1).log().mean()  # position i has i + 1 keys
    effect = head_importance(model, tokens, mode="mean", reference=cache).mean
    return {"loss": next_token_loss(logits, tokens).item(),
            "sharpness": (1 - entropy / even).flatten().tolist(),
            "effect": effect.flatten().tolist()}


# What it shows


def claims_of(seeds, judged=True):
    """[Claim] about the looks of each seed, {kind: [look]}. The thresholds were chosen on seeds 0
    to 2 and judged on seeds 10 to 12."""
    text, control = KINDS
    before = max(max(one[text][0]["sharpness"]) for one in seeds)
    return [
        seed_claim("share of the sharpening done after four fifths of the loss's fall", seeds,
                   lambda one: sharpening_done(one[text], 0.8), below=0.1, judged=judged,
                   beside="of the fall: 0.8"),
        seed_claim("largest effect of a head that is nearly even (nats per token)", seeds,
                   lambda one: largest_effect(one[text], NEARLY_EVEN), above=0.03, judged=judged,
                   beside=f"before training {max_effect(seeds, text, 0):.2g}"),
        seed_claim("words in random order: sharpness of the sharpest head after training", seeds,
                   lambda one: max(one[control][-1]["sharpness"]), above=0.1, judged=judged,
                   beside=f"text {mean_text(seeds, lambda one: max(one[text][-1]['sharpness']))}; "
                   f"before training {before:.2g}"),
        seed_claim("… largest effect of any of its heads, at any step", seeds,
                   lambda one: largest_effect(one[control]), below=0.01, judged=judged,
                   beside=f"text, after training {max_effect(seeds, text, -1):.2g}"),
        claim("text: rank correlation of sharpness and effect, after training",
              [rank_correlation(one[text][-1]) for one in seeds], control="0 for unrelated ranks"),
        claim(f"… at the first look with a mean sharpness of {NEARLY_EVEN:g} or more",
              [rank_correlation(first_sharp(one[text])) for one in seeds]),
    ]


def sharpening_done(looks, share):
    """The share of the mean head's final sharpness that is there at the first look at which the
    loss has done `share` of its fall."""
    fall = looks[0]["loss"] - looks[-1]["loss"]
    fallen = [look for look in looks if looks[0]["loss"] - look["loss"] >= share * fall]
    return sum(fallen[0]["sharpness"]) / sum(looks[-1]["sharpness"])


def largest_effect(looks, sharpness=1.0):
    """The largest effect, of either sign, of a head at a look at which it is less sharp than
    `sharpness`; 0 if there is none."""
    return max((abs(effect) for look in looks
                for sharp, effect in zip(look["sharpness"], look["effect"], strict=True)
                if sharp < sharpness), default=0.0)


def max_effect(seeds, kind, number):
    """The largest effect of a head at the look of that number, over all seeds."""
    return max(largest_effect([one[kind][number]]) for one in seeds)


def rank_correlation(look):
    """Spearman's correlation of sharpness and effect over the heads of a look."""
    return spearman(look["sharpness"], look["effect"]).item()


def first_sharp(looks):
    """The first look with a mean sharpness of NEARLY_EVEN or more; the last if there is none."""
    return next((look for look in looks
                 if sum(look["sharpness"]) >= NEARLY_EVEN * len(look["sharpness"])), looks[-1])


def describe(seeds):
    """Sentences that say what was found, for the seeds of `claims_of`."""
    text, control = KINDS
    done = mean_text(seeds, lambda one: sharpening_done(one[text], 0.8))
    early = mean_text(seeds, lambda one: largest_effect(one[text], NEARLY_EVEN))
    sharp = mean_text(seeds, lambda one: max(one[control][-1]["sharpness"]))
    most = max(largest_effect(one[control]) for one in seeds)
    return (f"After four fifths of the loss's fall, {done} of the sharpening is done. A head can "
            f"matter before it is sharp: while nearly even, one costs {early} nats. And it can be "
            f"sharp without mattering: on words in random order the sharpest head has sharpness "
            f"{sharp}, and no head ever costs more than {most:.2g} nats (entropy.png).")


# The figure


def figures(result):
    """{name: Figure} from what `run` returned: the loss, and every head's sharpness and effect."""
    figure = PlainFigure(figsize=(9.5, 7.2), layout="constrained")
    grid = figure.subplots(3, len(KINDS), sharex=True, sharey="row")
    for kind, column in zip(KINDS, grid.T, strict=True):
        draw_looks(column, result["seeds"][0][kind], kind)
    grid[1, 0].legend(frameon=False, fontsize=9)
    return {"entropy": figure}


def draw_looks(column, looks, kind):
    """Draw the loss, the sharpness and the effects over the steps, in a column of three axes."""
    loss, sharpness, effect = column
    steps = [look["step"] for look in looks]
    bare_axes(loss, f"{kind}: the loss ends at {looks[-1]['loss']:.2f}", "", "loss (nats/token)")
    bare_axes(sharpness, f"the sharpest head ends at {max(looks[-1]['sharpness']):.2f}", "",
              "sharpness")
    bare_axes(effect, f"the largest effect ends at {largest_effect(looks[-1:]):.3f}", "step",
              "rise of the loss\nwithout the head (nats)")
    loss.plot(steps, [look["loss"] for look in looks], color="0.3", marker="o", markersize=3)

    n_heads = SHAPE["n_heads"]
    for axes, name in ((sharpness, "sharpness"), (effect, "effect")):
        axes.set_xscale("symlog", linthresh=1)
        for head, values in enumerate(zip(*(look[name] for look in looks), strict=True)):
            layer, is_later = divmod(head, n_heads)
            axes.plot(steps, values, color=COLOURS[layer], linewidth=1.2,
                      label=None if is_later else f"heads of layer {layer}")


def main(argv=None):
    """Run the program: train, look, print the table, write outputs/entropy."""
    perform(EntropyConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)

# Extend it:
# - Train with optimizer="adamw" in the TrainConfig. Muon moves every direction of a matrix by the
#   same amount, even where the gradient is noise. Do heads on words in random order still sharpen?
# - Train and measure on random words that repeat: `repeated_batch` (data.py) in place of
#   `random_batch`, and for the unseen texts. Which heads sharpen now, and when does the loss fall?
# - Does a longer write tell more than a sharper pattern? Add ‖v W_O‖ to a look (`score_heads` in
#   experiments/attention_page/measure.py has it as "written"), and rank the heads by it.
