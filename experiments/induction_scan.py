"""Which heads of any model look at the previous token, at an earlier occurrence, or after one?

Every head is scored on texts of random tokens in which a segment comes twice: its attention to the
token before (previous-token), to the earlier occurrence of its token (duplicate-token), and to what
followed it then (induction). Where the segment begins, how long it is and how far apart the two are
differ from text to text, so that no head scores by looking a fixed distance back.

The null is a random pattern: the same attention paid to keys that were drawn at random among those
that each query sees. Of many heads one is always the best, so a head is held against the best of
all heads in each draw.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Read before: experiments/induction_model.py; after: experiments/induction_head_detection.py
Source: Olsson et al. 2022 (prefix matching); Wang et al. 2022 (GPT-2's heads)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import itertools

import torch

import plotting
from experiments.common import Claim
from experiments.induction_model import (
    MEASURED_ON,
    Repeats,
    head_scores,
    losses,
    repeats_metric,
)
from head_ablation import ablation_effects
from metrics import bootstrap_ci, earlier_occurrences, permutation_pvalue
from utils import Progress, UserError, seeded_generator

ROWS, DRAWS, SHOWN = 32, 300, 3
SHORTEST, LONGEST = 16, 48  # the texts' tokens
GPT2_SMALL = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_vocab": 50257}
REPORTED = {"induction": ((5, 1), (5, 5), (6, 9), (7, 2), (7, 10)),
            "previous-token": ((4, 11), (2, 2)),
            "duplicate-token": ((0, 1), (0, 10), (3, 0))}
CLEAR = 0.3  # of its attention, at the least, for a head to be one of these by its score


def texts_for(cfg):
    """(tokens, known), each [ROWS, pos], for a model's ModelConfig. Raises UserError for a model
    without heads, and for a context or a vocabulary that they do not fit into."""
    if not cfg.n_layers:
        raise UserError("n_layers=0: this model has no heads to look at; take one with layers")
    n_pos = min(cfg.n_ctx, cfg.d_vocab, LONGEST)
    if n_pos < SHORTEST:
        raise UserError(f"n_ctx={cfg.n_ctx}, d_vocab={cfg.d_vocab}: a segment that comes twice "
                        f"needs {SHORTEST} positions and as many tokens; take a larger model")
    texts = Repeats(n_pos, cfg.d_vocab, (n_pos // 6 + 1, n_pos // 3), (0, n_pos // 6))
    return texts.draw(ROWS, seeded_generator(MEASURED_ON))


def random_pattern_scores(pattern, queries, generator):
    """What attention to random keys would score, [layer, head]: for each query that counts one key
    is drawn among those that it sees, the same for all heads.

    pattern: [layer, batch, head, query_pos, key_pos]; queries: [batch, query_pos], True where one
    counts. The mean over a text's queries, then over texts, as in the scores themselves.
    """
    n_rows, n_pos = queries.shape
    seen = torch.arange(n_pos) + 1
    keys = (seen * torch.rand(n_rows, n_pos, generator=generator)).long()
    keys = keys[None, :, None, :, None].expand(*pattern.shape[:-1], 1)
    paid = pattern.gather(-1, keys).squeeze(-1) * queries[:, None]  # [layer, batch, head, query]
    return (paid.sum(-1) / queries.sum(-1)[:, None]).mean(1)


@torch.no_grad()
def scan(model):
    """{"scores", "low", "high", "p": {kind: [layer][head]}, "null": {kind: what the best head of a
    random pattern reaches in one draw of twenty}, "repeats" and "first": losses in nats a token}.

    p: the share of draws in which the best of all heads scores as much on random keys.
    """
    tokens, known = texts_for(model.cfg)
    progress = Progress(len(REPORTED), " scores of every head")
    scores = head_scores(model, tokens)
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    pattern, generator = cache.stack("pattern"), seeded_generator(MEASURED_ON)
    twice = earlier_occurrences(tokens).any(-1)
    queries = dict.fromkeys(scores, twice)
    queries["previous-token"] = (torch.arange(tokens.shape[1]) > 0).expand_as(twice)
    repeats, first = losses(model, tokens, known)
    result = {"scores": {}, "low": {}, "high": {}, "p": {}, "null": {},
              "repeats": repeats, "first": first, "tokens": tokens.shape[1]}
    for done, (kind, each) in enumerate(scores.items(), 1):
        null = torch.stack([random_pattern_scores(pattern, queries[kind], generator)
                            for _ in range(DRAWS)])
        low, high = bootstrap_ci(each.transpose(0, 1))
        found = {"scores": each.mean(1), "low": low, "high": high,
                 "p": permutation_pvalue(each.mean(1), null)}
        for name, values in found.items():
            result[name][kind] = values.tolist()
        result["null"][kind] = null.flatten(1).max(1).values.quantile(0.95).item()
        progress.show(done, kind)
    progress.close()
    return result


def scan_ablation(model, head):
    """{"rise", "low", "high": of the loss on repeats (nats a token) without a head's z, but for its
    mean at each position, "others": the rises without up to five other heads of its layer}."""
    tokens, known = texts_for(model.cfg)
    _, reference = model.run_with_cache(tokens[:, :-1], lambda name: name.endswith("hook_z"))
    others = [(head[0], other) for other in range(model.cfg.n_heads) if other != head[1]]
    order = torch.randperm(len(others), generator=seeded_generator(MEASURED_ON))[:5]
    sets, done = [[head], *[[others[i]] for i in order]], itertools.count(1)
    progress = Progress(len(sets), " heads taken away")
    effects = ablation_effects(model, tokens[:, :-1], sets, repeats_metric(tokens, known),
                               mode="mean_pos", reference=reference,
                               progress=lambda: progress.show(next(done)))
    progress.close()
    low, high = effects.ci()
    return {"rise": effects.mean[0].item(), "low": low[0].item(), "high": high[0].item(),
            "others": effects.mean[1:].tolist()}


# Claims


def scan_claims(cfg, found, removed):
    """The claims on a model: those reported of GPT-2 small where it has that shape; for information
    the best heads of each kind, and what removing the best induction head costs."""
    claims = []
    if all(getattr(cfg, name) == value for name, value in GPT2_SMALL.items()):
        claims += [head_claim(found, kind, head, reported=True)
                   for kind, heads in REPORTED.items() for head in heads]
    for kind in REPORTED:
        best, *more = best_heads(found, kind)[:SHOWN]
        claims += [head_claim(found, kind, head)
                   for head in [best, *(head for head in more if clear(found, kind, head))]]
    layer, head = best_heads(found, "induction")[0]
    rises = removed["others"]
    control = f"without another: {min(rises):.2g} to {max(rises):.2g}" if rises else ""
    claims.append(Claim(f"loss on repeats rises without head {layer}.{head} (nats)",
                        removed["rise"], removed["low"], removed["high"], control=control))
    claims.append(Claim("loss on repeats (nats)", found["repeats"], found["repeats"],
                        found["repeats"], control=f"on first occurrences: {found['first']:.3g}"))
    if cfg.n_layers == 1:
        best = found["scores"]["induction"][layer][head]
        claims.append(Claim("one layer can have no induction head by composition; best score",
                            best, best, best, control="no head reads what another wrote"))
    return claims


def head_claim(found, kind, head, reported=False):
    """A Claim on one head's score, tested where it is reported, else for information."""
    score, low, high, p = (found[name][kind][head[0]][head[1]]
                           for name in ("scores", "low", "high", "p"))
    return Claim(f"{kind} head {head[0]}.{head[1]}: share of its attention", score, low, high,
                 holds=clear(found, kind, head) if reported else None,
                 reported="listed" if reported else "", mark=CLEAR if reported else None,
                 control=f"random keys, best head: {found['null'][kind]:.2g}; p = {p:.2g}"
                         + f"; mark {CLEAR}" * reported)


def clear(found, kind, head):
    """Whether a head, (layer, head), is one of a kind by its score, and not by chance."""
    score, p = (found[name][kind][head[0]][head[1]] for name in ("scores", "p"))
    return score > CLEAR and p < 0.05


def best_heads(found, kind):
    """All heads, (layer, head), the highest score first."""
    scores = torch.tensor(found["scores"][kind])
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(i, scores.shape[1]) for i in order]


def scan_figures(found):
    """{name: Figure}: every head's score of each kind."""
    figures = {}
    for kind, scores in found["scores"].items():
        layer, head = best_heads(found, kind)[0]
        figures[kind] = plotting.head_grid(
            torch.tensor(scores).numpy(), unit="share of attention",
            title=f"{kind}: most in head {layer}.{head}, {scores[layer][head]:.2f} "
                  f"(random keys: {found['null'][kind]:.2f})")
    return figures
