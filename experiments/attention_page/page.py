"""Write the HTML page that shows every attention pattern beside the head's effect.

Chapter: COURSE_ROADMAP.md, 4 (QK and OV)
Prerequisites: experiments/attention_page/measure.py
Next: experiments/attention_page/report.py
Source: Elhage et al. 2021 (patterns token by token)
"""

import base64
from pathlib import Path

import numpy as np
import torch

from experiments import common
from experiments.attention_page.measure import describe_heads

TEMPLATE = Path(__file__).with_name("page.html")


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


def make_page(view, mode):
    """The plain values that the page draws of a SubjectView. mode: "mean" or "zero" ablation."""
    subject = view.subject
    n_rows, length = subject.held_out.shape
    replacement = "its own mean over these texts" if mode == "mean" else "zero"
    stream_norm = view.record.stream_norm[:, 0]  # [layer, query_pos]
    return {
        "title": "Where each head looks, and what it does",
        "about": f"{subject.name}: {subject.model.cfg.n_layers} layers of "
                 f"{subject.model.cfg.n_heads} heads. Under each pattern: what the loss rises by "
                 "when the head is taken away. A pretty pattern over an empty bar does nothing.",
        "reading": f"Effects are measured on {n_rows} held-out texts of {length} tokens, the head "
                   f"replaced by {replacement}; intervals of 95 %. ● needed: the interval lies "
                   "above 0; ○ idle: it includes 0; ▼ harmful: it lies below. Patterns are those "
                   "of the text below, kept to 1/255. Weighed, a cell is what the head writes from "
                   "there, ‖v W_O‖ by attention, as a share of the stream that it is added to.",
        "tokens": [subject.tokenizer.decode([token]) for token in subject.tokens[0].tolist()],
        "patterns": pack_patterns(view.record.pattern[:, 0]),
        "stream": [[float(f"{x:.4g}") for x in row] for row in stream_norm.tolist()],
        "heads": describe_heads(view),
    }


def write_page(path, page):
    """Write the page: the template beside this file, with the values of `make_page` in it."""
    common.write_page(path, TEMPLATE, page)
