"""Measure copy suppression in a published model, above all in GPT-2 small's head L10H7.

Two questions of McDougall et al. can be asked on any text. Does the head's OV circuit lower the
token that it attends to? And how much of the head's effect is copy suppression (CSPA)? The texts
are stories of corpus.py, which need no download; the paper used OpenWebText.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: experiments/copy_suppression.py
Next: experiments/indirect_object/model.py
Source: McDougall et al. 2023
"""

import torch

import corpus
import plotting
from activation_cache import head_label
from experiments.common import claim
from experiments.suppression.cspa import cspa_score, extreme_tokens, written_by_weights
from experiments.suppression.measure import own_ranks
from metrics import duplicate_token_score
from utils import UserError, seeded_generator

ASKED = 300  # tokens whose own logit is ranked
LONGEST = 64  # tokens in a text
ROWS = 16
PAPER_HEAD = (10, 7)
PAPER_TOKENS = 5  # tokens that CSPA keeps for each source
PAPER_PAIRS = 10  # pairs of a source and such a token that it keeps at each destination
GPT2_SMALL_SHAPE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_vocab": 50257}


def report_published(model, tokenizer):
    """The experiment's result for a published model: {"found", "claims", "published"}."""
    found = measure_published(model, tokenizer)
    return {"found": describe_published(found), "claims": published_claims(model.cfg, found),
            "published": found}


def draw_stories(model, tokenizer):
    """[ROWS, pos]: the beginning of stories, in the model's tokens. Raises UserError for a model
    without heads, or with a context of less than 8 tokens."""
    cfg = model.cfg
    n_pos = min(cfg.n_ctx, LONGEST)
    if not cfg.n_layers or n_pos < 8:
        raise UserError(f"n_layers={cfg.n_layers}, n_ctx={cfg.n_ctx}: no head can be measured on a "
                        "text; choose a model with layers and 8 positions or more")
    ids = tokenizer.encode(corpus.text(10 * ROWS * n_pos))
    n_rows = min(ROWS, len(ids) // n_pos)
    return torch.as_tensor(ids[:n_rows * n_pos]).view(n_rows, n_pos)


def measure_published(model, tokenizer):
    """Measure every head, and the suppressive one in detail; returns plain values.

    diagonal: [layer][head], the mean rank of a token among all tokens that attention to it lowers,
    from 0 (lowered most) to 1, over ASKED tokens. lowest ten: [layer][head], the share of tokens
    whose rank is below ten. label: the suppressive head: the paper's if the model has GPT-2
    small's shape, and the head with the lowest mean rank in other models. again: its attention to
    earlier occurrences of the current token. cspa: {which tokens: score}.
    """
    tokens = draw_stories(model, tokenizer)
    cfg = model.cfg
    asked = torch.randperm(cfg.d_vocab, generator=seeded_generator(0))[:ASKED]
    ranks = torch.stack([torch.stack([ranks_by_weights(model, (layer, head), asked)
                                      for head in range(cfg.n_heads)])
                         for layer in range(cfg.n_layers)])  # [layer, head, source]
    diagonal = ranks.mean(-1) / (cfg.d_vocab - 1)
    lowest_ten = (ranks < 10).float().mean(-1)

    head = divmod(diagonal.argmin().item(), cfg.n_heads)
    if has_paper_shape(cfg):
        head = PAPER_HEAD
    layer, index = head
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, f"blocks.{layer}.attn.hook_pattern")
    again = duplicate_token_score(cache["pattern", layer], tokens)[:, index].mean().item()

    sources, place = tokens.unique(return_inverse=True)
    written = written_by_weights(model, head, sources)
    scores = {}
    for which in ("lowest", "random"):
        partners = extreme_tokens(written, PAPER_TOKENS, which)[place]
        scores[which] = cspa_score(model, tokens, head, partners, PAPER_PAIRS)
    return {"label": head_label(*head), "head": list(head), "diagonal": diagonal.tolist(),
            "lowest ten": lowest_ten.tolist(), "again": again, "cspa": scores,
            "tokens": tokens.numel(), "d_vocab": cfg.d_vocab}


def ranks_by_weights(model, head, asked):
    """`own_ranks` of one head for the tokens `asked` [n], by its OV circuit: [n], as floats."""
    parts = [own_ranks(written_by_weights(model, head, part), part) for part in asked.split(250)]
    return torch.cat(parts).float()


def has_paper_shape(cfg):
    """Whether a ModelConfig has the shape of the paper's model."""
    return all(getattr(cfg, name) == value for name, value in GPT2_SMALL_SHAPE.items())


def published_claims(cfg, found):
    """[Claim]: the numbers beside the published ones; not judged, because the texts differ."""
    layer, head = found["head"]
    is_paper = has_paper_shape(cfg)
    label = found["label"]
    best = max(map(max, found["lowest ten"]))
    return [
        claim(f"{label}: share of tokens among the ten that attention to them lowers most",
              found["lowest ten"][layer][head], reported="84.7 %" if is_paper else "",
              control=f"by chance {10 / found['d_vocab']:.2g}; highest of all heads {best:.2g}"),
        claim(f"{label}: mean rank of the own token, 0 is the lowest",
              found["diagonal"][layer][head], control="by chance 0.5"),
        claim(f"{label}: share of its effect that copy suppression keeps (CSPA, on stories)",
              found["cspa"]["lowest"], reported="76.9 % (OpenWebText)" if is_paper else "",
              control=f"keeping random tokens {found['cspa']['random']:.2g}"),
    ]


def describe_published(found):
    """Two sentences that say what was found."""
    layer, head = found["head"]
    lowest_ten = 100 * found["lowest ten"][layer][head]
    kept = 100 * found["cspa"]["lowest"]
    return (f"For {lowest_ten:.0f} % of tokens, attention of {found['label']} to the token puts it "
            "among the ten tokens that are lowered most. If only copy suppression is left of what "
            f"the head writes, {kept:.0f} % of its effect on the predictions stays (all heads: "
            "diagonal.png).")


def published_figures(found):
    """{name: Figure}: the diagonal of every head."""
    return {"diagonal": plotting.head_grid(
        torch.tensor(found["diagonal"]) - 0.5, unit="mean rank of the own token, less 0.5",
        title=f"{found['label']}'s own token stands at rank "
              f"{found['diagonal'][found['head'][0]][found['head'][1]]:.2f} of 1")}
