"""Where every head looks, and what the loss rises by without it: a pattern is not importance.

    python experiments/attention_visualization.py                     # trains three models first
    python experiments/attention_visualization.py --run_name mine     # of train.py, in outputs/
    python experiments/attention_visualization.py --model gpt2 --text "Two people, and one of them"

Writes outputs/attention_visualization/attention.html, a page without network: choose a token and
see where each head looks and, beside the pattern, what the loss rises by without the head.
The three trainings take 20 s of CPU each, one thread, and are kept; all else 6 s. GPT-2 small's
shape takes 3 minutes of CPU with --windows 8.

Claim: previous-token heads form, and the more a head looks at the token before, the more the loss
rises by without it, than chance would have it; yet how sharp a pattern is does not say how much a
head is needed, as ablation on other texts does. Where the truth is known by wiring, the needed head
has the least sharp pattern of four that look alike; what is written tells the head that writes
nothing, and not those that nobody reads; ablation tells them all.
Expected: every line with a verdict passes. Without one: what is written ranked the heads better
than sharpness by .23 (-.26 to .67) in seeds 0 to 2.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Read before: attention.py, head_ablation.py; after: experiments/attention_evidence.py
Source: Elhage et al. 2021 (QK and OV); Jain & Wallace 2019 (attention is not explanation);
Kobayashi et al. 2020 (the norm of what is written); Xiao et al. 2024 (attention sinks)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import base64
import itertools
import json
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

import corpus
import plotting
from checkpoint import (
    config_of,
    dataset_again,
    find_run,
    load_checkpoint,
    load_model,
    load_pretrained,
)
from config import ModelConfig, TrainConfig, check_choices, check_field, option
from data import place_to_cut, random_batch, repeated_batch
from experiments.attention_evidence import (
    RANKERS,
    Subject,
    claims_of,
    head_facts,
    rank_correlation,
    view_of,
)
from experiments.common import ExperimentConfig, as_run, load_or_make, perform
from model import GPT
from tokenizer import WordTokenizer
from train import fit
from utils import Progress, UserError, atomic_write, read_text, run_program, seeded_generator

PAGE = Path(__file__).with_suffix(".html")
STORY = ("\nWhen Ola and Leo went to the park, Leo gave a kite to Ola. Ivo sings ri sa do mu, "
         "again ri sa do mu. What has Ola? A kite.")
SHAPE = {"n_layers": 3, "n_heads": 4, "d_model": 64, "n_ctx": 40, "attn_only": True}
REPEATS, BATCH = 0.5, 16  # half of the windows repeat random words, so that looking back pays
CHARACTERS = 400_000  # of the built-in corpus, to train on


@dataclass(frozen=True)
class AttentionConfig(ExperimentConfig):
    """What is looked at; without a run or a model, one that is trained here for each seed."""

    run_name: str | None = option(None, "a run of train.py to look at, in out_dir")
    model: str | None = option(None, "a pretrained model to look at: gpt2, …, or its folder")
    text: str | None = option(None, "the text to look at (none: a story, or the start of the "
                              "run's validation text)")
    held_out: str | None = option(None, "a file of text to ablate on (none: the run's validation "
                                  "text, or unseen text of the built-in corpus)")
    windows: int = option(64, "so many pieces of it")
    length: int = option(40, "of so many tokens, or as many as the model reads")
    ablation: Literal["mean", "zero"] = option("mean", "what takes a head's place: its mean, or 0")
    steps: int = option(1600, "of training, where there is nothing to look at")

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        for name in ("windows", "length"):
            check_field(self, name, lambda n: n >= 2, "2 or more")
        check_field(self, "steps", lambda n: n >= 1, "1 or more")
        if self.text is not None and not self.text.strip():
            raise UserError(f"text={self.text!r} is empty; give two tokens or more")


# What is looked at


def subjects(cfg, folder):
    """[Subject]: the run or pretrained model that was named, or one trained here for each seed.
    All that can be wrong with what was asked for is raised as UserError before a training."""
    if cfg.run_name is None and cfg.model is None:
        return trained(cfg, folder)
    if cfg.model is not None:
        name, (model, tokenizer) = cfg.model, load_pretrained(cfg.model)
        story, unseen = tokenizer.encode(STORY), None
    else:
        place = find_run(cfg.run_name, cfg.out_dir)
        name, (model, tokenizer) = place.name, load_model(place)
        unseen = story = None if cfg.held_out and cfg.text else validation_text(place)
    return [subject_of(cfg, name, model, tokenizer, story=story, unseen=unseen)]


def validation_text(place):
    """What a run was validated on, [n]."""
    state, otherwise = load_checkpoint(place / "checkpoint.pt"), "give both --text and --held_out"
    if "data_sha256" not in state:
        raise UserError(f"{place} does not say what it was trained on; {otherwise}")
    try:
        return dataset_again(place, state, config_of(state, place)).val
    except UserError as error:
        raise UserError(f"{error}; or {otherwise}") from None


def subject_of(cfg, name, model, tokenizer, *, story, unseen=None):
    """A Subject whose texts are those that were asked for, or else the beginning of `story` and
    windows of `unseen`, ids [n]; None: of the built-in corpus."""
    if not model.cfg.n_layers:
        raise UserError(f"{name} has n_layers=0, and so no heads to look at; choose another")
    n_ctx = model.cfg.n_ctx
    tokens = tokenizer.encode(cfg.text) if cfg.text else story[: min(n_ctx, 40)]
    if not 2 <= len(tokens) <= n_ctx:
        raise UserError(f"the text has {len(tokens)} tokens, and {name} reads 2 to n_ctx={n_ctx}; "
                        "change --text")
    length = min(cfg.length, n_ctx)
    if cfg.held_out is not None or unseen is None:
        unseen = encoded_start(cfg, tokenizer, cfg.windows * length)
    rows = min(cfg.windows, len(unseen) // length)
    if rows < 2:
        raise UserError(f"{len(unseen)} held-out tokens are not two windows of {length}; give more "
                        "with --held_out, or a smaller --length")
    held_out = torch.as_tensor(unseen[: rows * length]).view(rows, length)
    return Subject(name, model, tokenizer, torch.as_tensor(tokens)[None], held_out)


def encoded_start(cfg, tokenizer, n_tokens):
    """The ids of the beginning of the held-out file or, without one, of unseen stories; n_tokens of
    them, if there are as many."""
    n_characters = 16 * n_tokens  # words and marks of the corpus have 4, pieces of others less
    if cfg.held_out is None:
        return tokenizer.encode(corpus.text(n_characters, seed=1))
    text = read_text(Path(cfg.held_out))
    return tokenizer.encode(text[: place_to_cut(text, n_characters, tokenizer.kind)])


def trained(cfg, folder):
    """[Subject], a model for each seed, trained on the built-in corpus or kept from before."""
    text = corpus.text(CHARACTERS)
    tokenizer = WordTokenizer().fit(text)
    tokens = torch.tensor(tokenizer.encode(text))
    shape = ModelConfig(**SHAPE, d_vocab=tokenizer.d_vocab)
    how = {"steps": 40 if cfg.quick else cfg.steps, "batch": BATCH, "repeats": REPEATS,
           "characters": CHARACTERS, "shape": asdict(shape)}
    found = [subject_of(cfg, f"seed {seed}", GPT(shape, seed), tokenizer,
                        story=tokenizer.encode(STORY)) for seed in cfg.seeds]
    for seed, each in zip(cfg.seeds, found, strict=True):
        state = load_or_make(folder / f"seed_{seed}" / "checkpoint.pt", how | {"seed": seed},
                     lambda seed=seed, each=each: learn(each, tokens, seed, how["steps"]),
                     cfg.retrain)
        each.model.load_weights_(state["model"], folder)
        each.model.eval()
    return found


def learn(subject, tokens, seed, steps):
    """Trains a Subject's model in place on tokens [n]; the dict of its checkpoint."""
    model, generator, n_repeats = subject.model, seeded_generator(seed), round(REPEATS * BATCH)

    def next_batch():
        parts = (random_batch(tokens, BATCH - n_repeats, model.cfg.n_ctx, generator),
                 repeated_batch(model.cfg.d_vocab, n_repeats, model.cfg.n_ctx, generator))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    progress = Progress(steps, " steps")
    for step in fit(model, next_batch, TrainConfig(max_steps=steps, lr=8e-3, muon_lr=0.02)):
        progress.show(step.number, f"training, {subject.name}")
    progress.close()
    return as_run(model, subject.tokenizer)


# The page


def packed(pattern):
    """Patterns [layer, head, pos, pos] as base64: a byte for each visible cell, 255 for 1, row
    after row of the lower triangle, head after head."""
    rows, columns = torch.tril_indices(*pattern.shape[-2:])
    return base64.b64encode((255 * pattern[..., rows, columns]).round().byte().numpy()).decode()


def page_of(view, cfg):
    """What the page draws, plain values."""
    subject, (n_rows, length) = view.subject, view.subject.held_out.shape
    place = "its own mean over these texts" if cfg.ablation == "mean" else "zero"
    return {
        "title": "Where each head looks, and what it does",
        "about": f"{subject.name}: {subject.model.cfg.n_layers} layers of "
                 f"{subject.model.cfg.n_heads} heads. Under each pattern: what the loss rises by "
                 "when the head is taken away. A pretty pattern over an empty bar does nothing.",
        "reading": f"Effects are measured on {n_rows} held-out texts of {length} tokens, the head "
                   f"replaced by {place}; intervals of 95 %. ● needed: the interval lies above 0; "
                   "○ idle: it includes 0; ▼ harmful: it lies below. Patterns are those of the "
                   "text below, kept to 1/255. Weighed, a cell is what the head writes from there, "
                   "‖v W_O‖ by attention, as a share of the stream that it is added to.",
        "tokens": [subject.tokenizer.decode([token]) for token in subject.tokens[0].tolist()],
        "patterns": packed(view.looks.pattern[:, 0]),
        "stream": [[float(f"{x:.4g}") for x in row] for row in view.looks.stream[:, 0].tolist()],
        "heads": head_facts(view),
    }


def write_page(path, page):
    """Writes the page: the template beside this file, with what it draws inside of it."""
    # Nothing that a token holds may end the script or begin a tag.
    values = json.dumps(page, allow_nan=False).replace("<", "\\u003c")
    before, after = PAGE.read_text(encoding="utf-8").split("{}</script>")
    with atomic_write(path, "w") as file:
        file.write(f"{before}{values}</script>{after}")


# The figures


def patterns_of(page):
    """The patterns of a page, [head, pos, pos], numpy, 0 where a query can't look."""
    n_pos, n_heads = len(page["tokens"]), len(page["heads"])
    values = np.frombuffer(base64.b64decode(page["patterns"]), np.uint8).reshape(n_heads, -1)
    patterns = np.zeros((n_heads, n_pos, n_pos))
    patterns[(slice(None), *np.tril_indices(n_pos))] = values / 255
    return patterns


def figures(result):
    """{name: Figure}: every pattern with its effect; the same weighed by what is written; and the
    effect against both over all heads."""
    return {"attention": pattern_figure(result["page"]),
            "written": pattern_figure(result["page"], weighed=True),
            "importance": importance_figure(result["models"])}


def pattern_figure(page, weighed=False):
    """All patterns, a layer a row; above each, what the loss rises by without the head. weighed: of
    what is written, as a share of the stream."""
    heads, patterns = page["heads"], patterns_of(page)
    unit, scale = "attention", {"cmap": "Blues", "vmin": 0, "vmax": 1}
    if weighed:
        written = np.array([head["written"] for head in heads])  # [head, key]
        stream = np.array(page["stream"])[[head["layer"] for head in heads]]  # [head, query]
        patterns = patterns * written[:, None] / stream[:, :, None]
        unit, scale = RANKERS["written"], plotting.colour_scale(patterns)[1]
    n_layers, n_heads = (1 + max(head[key] for head in heads) for key in ("layer", "head"))
    side = max(1.2, min(1.9, 15 / n_heads))  # inches a pattern
    figure = Figure(figsize=(1.2 + side * n_heads, 1.3 + (side + 0.2) * n_layers),
                    layout="constrained")
    grid = figure.subplots(n_layers, n_heads, squeeze=False)
    future = np.triu(np.ones(patterns.shape[1:], dtype=bool), 1)
    most = max(abs(head["effect"]) for head in heads) or 1.0
    for axes, head, cells in zip(grid.flat, heads, patterns, strict=True):
        image = axes.imshow(np.ma.masked_array(cells, future), **scale)
        axes.set_title(f"{head['name']}   {head['effect']:+.3f}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xticks=[], yticks=[])
        # A bar above the picture, as long as the effect is large.
        axes.plot([0, abs(head["effect"]) / most], [1.02, 1.02], linewidth=4, clip_on=False,
                  color=plotting.COLOURS[1 if head["effect"] > 0 else 3],
                  transform=axes.transAxes, solid_capstyle="butt")
    figure.suptitle(sharp_and_needed(heads, "written" if weighed else "sharpness"), x=0.01,
                    ha="left", fontsize=11)
    figure.supxlabel("key (what is looked at); above each: layer.head and what the loss rises by "
                     "without it, nats a token", fontsize=8)
    figure.supylabel("query (who looks)", fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.5, label=unit)
    return figure


def sharp_and_needed(heads, score):
    """A sentence: which head comes first by a score, and which by its effect."""
    first = max(heads, key=lambda head: head["scores"][score][1])
    needed = max(heads, key=lambda head: head["effect"])
    what = "has the sharpest pattern" if score == "sharpness" else "writes most"
    if first is needed:
        return f"Head {first['name']} {what} and is needed most: {first['effect']:.3f} nats a token"
    return (f"Head {first['name']} {what} and costs {first['effect']:.3f} nats a token; head "
            f"{needed['name']} is needed most: {needed['effect']:.3f}")


def importance_figure(models):
    """What the loss rises by without a head against two things that its pattern shows."""
    heads = [head for facts in models.values() for head in facts]
    figure = Figure(figsize=(9, 4), layout="constrained")
    effect = torch.tensor([[head["effect"] for head in facts] for facts in models.values()])
    for axes, name in zip(figure.subplots(1, 2, sharey=True), RANKERS, strict=True):
        score = torch.tensor([[head["scores"][name][1] for head in facts]
                              for facts in models.values()])
        plotting.bare_axes(axes, f"rank correlation {rank_correlation(score, effect)[0]:.2f}"
                           + f", the mean of {len(models)} models" * (len(models) > 1),
                           RANKERS[name], "")
        for layer in sorted({head["layer"] for head in heads}):
            own = [head for head in heads if head["layer"] == layer]
            x, y = [head["scores"][name][1] for head in own], [head["effect"] for head in own]
            ends = [[head["effect"] - head["low"] for head in own],
                    [head["high"] - head["effect"] for head in own]]
            axes.errorbar(x, y, yerr=ends, fmt="os^Dv<>p*hXd"[layer % 12], markersize=5,
                          linewidth=1, color=plotting.COLOURS[layer % 6], label=f"layer {layer}")
        axes.axhline(0, color="0.2", linewidth=0.8)
    figure.axes[0].set_ylabel("loss without it (nats a token)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"What is seen of {len(heads)} heads, and what the loss rises by without them",
                    x=0.01, ha="left", fontsize=11)
    return figure


# The program


def run(cfg, folder):
    """{"claims": [Claim], "models": the heads of each, "page": of the first}; writes the page."""
    found = subjects(cfg, folder)
    n_heads = sum(each.model.cfg.n_layers * each.model.cfg.n_heads for each in found)
    progress = Progress(2 * n_heads, " heads taken away")
    done = itertools.count(1)
    views = [view_of(each, cfg.ablation, lambda: progress.show(next(done))) for each in found]
    page = page_of(views[0], cfg)
    write_page(folder / "attention.html", page)
    own = cfg.run_name is None and cfg.model is None
    return {"claims": claims_of(views, tested=own and not cfg.quick),
            "models": {each.subject.name: head_facts(each) for each in views}, "page": page}


def main(argv=None):
    """The program: looks, takes heads away, prints the table, writes the page and the figures."""
    perform(AttentionConfig, run, figures, __doc__, argv=argv)


if __name__ == "__main__":
    run_program(main)
