"""Write the HTML page that shows every attention pattern beside the head's effect.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: experiments/attention_page/measure.py
Next: experiments/attention_page/report.py
Source: Elhage et al. 2021 (patterns token by token)
"""

import base64
import dataclasses
import shlex
from pathlib import Path

import numpy as np
import torch

from experiments import common
from experiments.attention_page.measure import describe_heads

TEMPLATE = Path(__file__).with_name("page.html")
CLIPPED = 99  # percentile of what is written from which on cells are equally dark
MEANINGS = {  # of the scores, on the page
    "previous token": "attention paid to the token before",
    "duplicate token": "attention of repeated tokens to their earlier copies",
    "induction": "attention of repeated tokens to what followed their earlier copies",
    "first token": "attention paid to the first token of the text",
    "entropy": "how widely the attention is spread, in nats",
    "sharpness": "1: all on one token; 0: the same on every token",
    "written": "at most what it adds, as a share of the stream's length",
    "loss without it": "how much the loss rises without the head, in nats a token",
}


def pack_patterns(pattern):
    """Patterns [layer, head, pos, pos] as a base64 text.

    Each visible cell is a byte, from 0 for 0 to 255 for 1; the order is head by head, and row by
    row of the lower triangle.
    """
    rows, columns = torch.tril_indices(*pattern.shape[-2:])
    visible = pattern[..., rows, columns]  # [layer, head, cell]
    return base64.b64encode((255 * visible).round().byte().numpy()).decode()


def unpack_patterns(page):
    """The patterns of a page, a numpy array [head, pos, pos]; 0 where a query can't look."""
    n_pos = len(page["tokens"])
    n_heads = len(page["heads"])
    packed = np.frombuffer(base64.b64decode(page["patterns"]), np.uint8)
    visible = packed.reshape(n_heads, -1) / 255  # [head, cell]

    patterns = np.zeros((n_heads, n_pos, n_pos))
    rows, columns = np.tril_indices(n_pos)
    patterns[:, rows, columns] = visible
    return patterns


def written_shares(page):
    """What each head of a page writes from each key, as a share of the stream at the query: a numpy
    array [head, query_pos, key_pos]."""
    heads = page["heads"]
    written = np.array([head["written"] for head in heads])  # [head, key_pos]
    stream = np.array(page["stream"])[[head["layer"] for head in heads]]  # [head, query_pos]
    return unpack_patterns(page) * written[:, None] / stream[:, :, None]


def written_scale(shares):
    """{"full": the share from which on a cell is darkest, "most": the largest} of written shares.

    A few cells are far larger than the others, which would all look white. So the colours end at
    the percentile CLIPPED of all cells that are not 0.
    """
    if not shares.any():
        return {"full": 1.0, "most": 0.0}
    return {"full": float(np.percentile(shares[shares > 0], CLIPPED)), "most": float(shares.max())}


def first_heads(heads):
    """(the number of the head that is needed most, that of the sharpest, a text that names both).

    heads: as `describe_heads` returns them. The page opens at the first.
    """
    needed = max(range(len(heads)), key=lambda number: heads[number]["effect"])
    sharpest = max(range(len(heads)), key=lambda number: heads[number]["scores"]["sharpness"][1])

    name, effect = heads[needed]["name"], heads[needed]["effect"]
    if effect > 0:
        text = (f"The page opens at {name}: without it the loss rises most, by {effect:.3f} nats a "
                "token.")
    else:
        text = (f"No head is needed here. The page opens at {name}: without it the loss falls "
                f"least, by {-effect:.3f} nats a token.")

    if sharpest == needed:
        return needed, sharpest, f"{text} Its pattern is also the sharpest of all."
    name, effect = heads[sharpest]["name"], heads[sharpest]["effect"]
    return needed, sharpest, (f"{text} Then compare {name}: no pattern is sharper, and without it "
                              f"the loss changes by {effect:+.3f}.")


def own_text_command(cfg):
    """The command that makes the page for a text of one's own, with the flags that this run had.

    cfg: the AttentionConfig of the run.
    """
    words = ["python experiments/attention_visualization.py"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,)  # such as seeds
        if field.default in (value, values) or field.name in ("text", "retrain"):
            continue
        words += [f"--{field.name}", *(shlex.quote(str(each)) for each in values)]
    return " ".join([*words, '--text "your words"'])


def readable_texts(subject):
    """A sentence that says which texts the model of an AttentionSubject can read."""
    limit = f"The model reads 2 to {subject.model.cfg.n_ctx} tokens"
    if subject.tokenizer.kind == "bpe":
        return f"{limit} of any text."
    known = {"char": "characters", "word": "words"}[subject.tokenizer.kind]
    return f"{limit}, and knows only the {known} of the text it was trained on."


def make_page(view, cfg):
    """The plain values that the page draws of a SubjectView. cfg: the run's AttentionConfig."""
    subject = view.subject
    n_rows, length = subject.held_out.shape
    replacement = "its own mean over these texts" if cfg.ablation == "mean" else "zero"
    stream_norm = view.record.stream_norm[:, 0]  # [layer, query_pos]
    heads = describe_heads(view)
    start, sharpest, first = first_heads(heads)

    page = {
        "first": first, "start": start, "sharpest": sharpest,
        "command": own_text_command(cfg), "readable": readable_texts(subject),
        "about": f"The model is {subject.name}, with {subject.model.cfg.n_layers} layers of "
                 f"{subject.model.cfg.n_heads} heads. Its patterns are those of the text below, "
                 "kept to 1/255.",
        "reading": f"The effect of a head is measured on {n_rows} other texts of {length} tokens: "
                   "what the loss rises by, in nats a token, when what the head computes is "
                   f"replaced by {replacement}. A rise by 0.69 nats halves the probability that "
                   "the right token gets. Intervals are of 95 %. ● needed: the interval lies above "
                   "0; ○ idle: it includes 0; ▼ harmful: it lies below.",
        "tokens": [subject.tokenizer.decode([token]) for token in subject.tokens[0].tolist()],
        "patterns": pack_patterns(view.record.pattern[:, 0]),
        "stream": [[float(f"{x:.4g}") for x in row] for row in stream_norm.tolist()],
        "heads": heads, "meanings": MEANINGS,
    }
    return page | {"written": written_scale(written_shares(page))}


def write_page(path, page):
    """Write the page: the template beside this file, with the values of `make_page` in it."""
    common.write_page(path, TEMPLATE, page)
