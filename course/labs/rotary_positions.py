"""Four kinds of positions, one of them rotary, in texts longer than the model was trained on.

    python course/labs/rotary_positions.py            # 2 minutes, one thread
    python course/labs/rotary_positions.py --quick    # seconds: one seed, few steps

The library adds a vector for each position to the stream. Rotary positions add nothing: each query
and key is turned by an angle that grows with its position, so their product depends on the distance
alone. All models are trained on windows of 32 words of the built-in corpus and then read 128 words
from the beginning of a story. What they lose is counted above the best possible prediction.

Claim: beyond the trained length, the loss rises at once with learned positions, and later and less
with rotary ones. What fails is not the same. Rotary positions have no trouble with late positions,
only with distances that were never trained: if every query sees its last 32 words only, the rotary
model reads on as before. Learned positions then still fail.
Control: with learned positions and training on windows of 128 words, the loss hardly rises. So the
later words are not harder, and the model is large enough for them.
Expected: every line passes. A seed takes 20 s (CPU, one core).

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: embeddings.py, attention.py, train.py
Next: activation_cache.py
Source: Su et al. 2021, RoFormer (rotary positions); Press et al. 2022, Train short, test long;
Kazemnejad et al. 2023 (no positions at all)
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from attention import Attention
from config import DataConfig, ModelConfig, TrainConfig, option
from data import load_dataset, random_batch
from experiments.common import (
    LabConfig,
    Trainings,
    fit_with_progress,
    mean_text,
    perform,
    seed_claim,
)
from losses import per_token_loss
from model import GPT
from plotting import PlainFigure, bare_axes, draw_lines
from utils import run_program, seeded_generator

TRAINED = 32  # the words of a window in training
READ = 128  # the words that are read afterwards
KINDS = ("learned", "sinusoidal", "rotary", "none")
LONG = f"learned, {READ} words"  # the control: trained on windows as long as what is read


# What takes the place of the library's part


def rotate(vectors, positions):
    """Turn each pair of neighbouring numbers of a vector by an angle, position * frequency.

        [x, y] -> [x cos(angle) - y sin(angle), x sin(angle) + y cos(angle)]

    vectors: [batch, pos, head, d_head]; positions: [pos]. The pairs' frequencies fall from 1 to
    nearly 1 / 10,000 radians a position, as those of sinusoidal positions do. For two vectors,
    rotate(q, i) · rotate(k, j) depends on i - j only: turning both by one more angle changes no
    product (Su et al. 2021, section 3.2).
    """
    d_head = vectors.shape[-1]
    frequency = 10_000 ** (-torch.arange(0, d_head, 2) / d_head)  # [pair]
    angle = (positions[:, None] * frequency)[:, None]  # [pos, 1, pair]
    x = vectors[..., 0::2]  # [batch, pos, head, pair]
    y = vectors[..., 1::2]
    turned = [x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()]
    return torch.stack(turned, -1).flatten(-2)


class RotaryAttention(Attention):
    """Attention whose scores depend on the distance between query and key."""

    def attend(self, q, k, v, key_mask=None):
        """As the library's, with q and k turned; the queries are the last of the keys' positions,
        so decoding with a key-value cache works as well."""
        positions = torch.arange(k.shape[1])
        return super().attend(rotate(q, positions[-q.shape[1] :]), rotate(k, positions), v,
                              key_mask)


def build_model(kind, cfg, seed):
    """A GPT with the initial weights of a seed and positions of one of the KINDS."""
    if kind != "rotary":
        return GPT(replace(cfg, positions=kind), seed)
    model = GPT(replace(cfg, positions="none"), seed=None)
    for block in model.blocks:
        block.attn = RotaryAttention(model.cfg)
    model.init_weights_(seeded_generator(seed))
    return model


# What is measured


@dataclass(frozen=True)
class PositionsConfig(LabConfig):
    """Settings of the lab."""

    steps: int = option(250, "steps of training for each model")


def hide_far_keys(scores, hook):
    """A hook on the attention scores: a query sees the nearest TRAINED keys and no others."""
    pos = torch.arange(scores.shape[-1])
    distance = pos[:, None] - pos  # [query_pos, key_pos]
    return scores.masked_fill(distance >= TRAINED, -math.inf)


def unseen_windows(dataset):
    """(tokens, log_probs), each [window, READ + 1]: from the beginnings of stories, every fourth.
    log_probs: of the best possible prediction."""
    starts = torch.tensor(dataset.floor.starts)
    starts = starts[starts < len(dataset.val) - READ][::4]
    places = starts[:, None] + torch.arange(READ + 1)
    return dataset.val[places], dataset.floor.log_probs[places]


@torch.no_grad()
def excess_by_position(model, tokens, log_probs, fwd_hooks=()):
    """The mean loss at each position above the best possible, [READ], in nats per word."""
    logits = model.run_with_hooks(tokens[:, :-1], fwd_hooks)
    return (per_token_loss(logits, tokens[:, 1:]) + log_probs[:, 1:]).mean(0)


def measure_model(kind, n_trained, how, seed, dataset, trainings):
    """A model's excess loss at each position, where queries see all keys and where they see only
    near ones: {"all": [READ], "near": [READ]}. n_trained: the words of a window in training."""
    shape = ModelConfig(n_layers=2, d_model=48, n_ctx=READ, d_vocab=dataset.tokenizer.d_vocab)
    model = build_model(kind, shape, seed)
    n_windows = how.batch_size * TRAINED // n_trained  # as many words in each batch
    generator = seeded_generator(seed)
    fit_with_progress(
        model, lambda: random_batch(dataset.train, n_windows, n_trained, generator), how,
        f"{kind}, {n_trained} words, seed {seed}", trainings=trainings)
    trainings.count()

    windows = unseen_windows(dataset)
    near = [(f"blocks.{layer}.attn.hook_attn_scores", hide_far_keys)
            for layer in range(shape.n_layers)]
    return {"all": excess_by_position(model.eval(), *windows).tolist(),
            "near": excess_by_position(model, *windows, near).tolist()}


def run(cfg, folder):
    """{"found": a summary, "claims": [Claim], "seeds": {name: excess losses} of each seed}."""
    seeds = cfg.seeds[:1] if cfg.quick else cfg.seeds
    how = TrainConfig(max_steps=4 if cfg.quick else cfg.steps, batch_size=24)
    dataset = load_dataset(DataConfig(dataset="builtin", tokenizer="word"), READ)
    subjects = {kind: (kind, TRAINED) for kind in KINDS} | {LONG: ("learned", READ)}
    trainings = Trainings([how.max_steps] * len(seeds) * len(subjects))

    measured = [{name: measure_model(*subject, how, seed, dataset, trainings)
                 for name, subject in subjects.items()} for seed in seeds]
    return {"found": describe(measured), "claims": claims_of(measured, judged=not cfg.quick),
            "seeds": measured}


# What it shows


def within(excess):
    """The mean excess loss over the second half of the trained length."""
    return sum(excess[TRAINED // 2 : TRAINED]) / (TRAINED - TRAINED // 2)


def rise(excess):
    """How much larger the mean excess loss is beyond the trained length."""
    return sum(excess[TRAINED:]) / (READ - TRAINED) - within(excess)


def claims_of(seeds, judged=True):
    """[Claim]. The thresholds were chosen on seeds 0 to 2 and judged on seeds 10 to 12."""

    def rise_of(name, keys="all"):
        return lambda seed: rise(seed[name][keys])

    def line(text, value, **threshold):
        return seed_claim(text, seeds, value, judged=judged, **threshold)

    return [
        line(f"loss beyond {TRAINED} words − within, learned (nats/word)", rise_of("learned"),
             above=0.6),
        line("… sinusoidal", rise_of("sinusoidal")),
        line("… rotary", rise_of("rotary"), above=0.1),
        line("… none", rise_of("none")),
        line("… rotary / learned",
             lambda seed: rise(seed["rotary"]["all"]) / rise(seed["learned"]["all"]), below=0.6),
        line(f"… rotary, if a query sees {TRAINED} words", rise_of("rotary", "near"), below=0.1),
        line(f"… learned, if a query sees {TRAINED} words", rise_of("learned", "near"), above=0.4),
        line(f"… the control: learned, trained on {READ} words", rise_of(LONG), below=0.1),
        line(f"loss within {TRAINED} words, none − rotary",
             lambda seed: within(seed["none"]["all"]) - within(seed["rotary"]["all"]), above=0.02),
    ]


def describe(seeds):
    """The summary of all seeds' measures."""

    def of(name, keys="all"):
        first = mean_text(seeds, lambda seed: within(seed[name][keys]))
        then = mean_text(seeds, lambda seed: within(seed[name][keys]) + rise(seed[name][keys]))
        return f"{name} {first} and {then}"

    all_kinds = "; ".join(of(kind) for kind in KINDS)
    near = "; ".join(of(kind, "near") for kind in KINDS)
    return (f"Nats per word above the best possible, within the {TRAINED} trained words and beyond "
            f"them: {all_kinds}. If a query sees {TRAINED} words only: {near}. Trained on {READ} "
            f"words: {of(LONG)}.")


def figures(result):
    """{name: Figure}: the excess loss by position, with all keys and with near ones only."""
    figure = PlainFigure(figsize=(10, 4), layout="constrained")
    panels = {"all": "All words visible: some fail at once, some slowly",
              "near": f"Only the last {TRAINED} words visible: rotary reads on"}
    for axes, (keys, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        lines = {}
        for name in (*KINDS, LONG) if keys == "all" else KINDS:
            excess = torch.tensor([seed[name][keys] for seed in result["seeds"]]).mean(0)
            means = excess.unflatten(0, (-1, 8)).mean(1)  # of eight positions each
            lines[name] = (range(4, READ, 8), means.tolist())
        draw_lines(bare_axes(axes, title, "position", "loss above the best possible (nats/word)"),
                   lines, {})
        axes.axvline(TRAINED, color="0.55", linewidth=1, linestyle="--")
        axes.annotate("trained up to here", (TRAINED + 1, 0), color="0.35", fontsize=9)
        axes.set_ylim(top=2.2)  # room for the legend
    return {"rotary_positions": figure}


def main(argv=None):
    """Run the program: train, measure, print the table, write the figure."""
    perform(PositionsConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)

# Extend it:
# - Position interpolation (Chen et al. 2023): divide the positions in RotaryAttention by 4, only
#   while 128 words are read. No distance is new then. Does it help at once, or after 20 more steps?
# - Another base: 100 or 1,000,000 in place of 10,000. Which pairs turn fully within 32 words, and
#   are they those that fail beyond?
# - ALiBi (Press et al. 2022): a hook on the scores of the model without positions that subtracts
#   slope * distance, one slope a head, in training and after. Does it need hide_far_keys?
