"""Find the previous-token, duplicate-token and induction heads of any model.

Every head is scored on texts of random tokens that hold a segment twice. The scores are its
attention to the token before (previous-token), to an earlier occurrence of the current token
(duplicate-token), and to the token after that occurrence (induction). The segment's start, its
length and the gap differ from text to text, so no head scores by looking back a fixed distance.

The null hypothesis is a random pattern: the same attention, paid to keys drawn at random among
those that each query can see. One of many heads always scores best by chance, so a head is compared
with the best of all heads in each draw.

Chapter: COURSE_ROADMAP.md, 11 (induction)
Prerequisites: experiments/induction_head_detection.py
Next: experiments/suppression/model.py
Source: Olsson et al. 2022 (prefix matching); Wang et al. 2022 (GPT-2's heads)
"""

import itertools

import torch

import plotting
from activation_cache import head_label
from experiments.common import claim
from experiments.induction.model import (
    MEASURED_ON,
    Repeats,
    head_scores,
    repeat_losses,
    repeats_metric,
)
from head_ablation import ablation_effects
from metrics import bootstrap_ci, earlier_occurrences, permutation_pvalue
from utils import Progress, UserError, seeded_generator

ROWS = 32  # texts
DRAWS = 300  # of random keys
SHOWN = 3  # heads of a kind in the table, at most, besides those that were published
SHORTEST, LONGEST = 16, 48  # tokens in a text
GPT2_SMALL_SHAPE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_vocab": 50257}
GPT2_SMALL_HEADS = {"induction": ((5, 1), (5, 5), (6, 9), (7, 2), (7, 10)),
                    "previous-token": ((4, 11), (2, 2)),
                    "duplicate-token": ((0, 1), (0, 10), (3, 0))}
KINDS = tuple(GPT2_SMALL_HEADS)
CLEAR = 0.3  # the least score for a head to count as one of a kind


def report_scan(model):
    """The experiment's result for a model that it did not train: {"found", "claims", "scan",
    "removed"}. Raises UserError for a model whose logits are not those of its tokens."""
    model.check_predicts_tokens("this scan needs a model of text")
    scan = scan_heads(model)
    removed = scan_ablation(model, rank_heads(scan, "induction")[0])
    return {"found": describe_scan(scan, removed), "claims": scan_claims(model.cfg, scan, removed),
            "scan": scan, "removed": removed}


# What is measured


def draw_scan_texts(cfg):
    """(tokens, known), each [ROWS, pos], for a ModelConfig. Raises UserError if the model has no
    heads, or if its context or vocabulary is too small for the texts."""
    if not cfg.n_layers:
        raise UserError("n_layers=0: this model has no heads to look at; choose one with layers")
    n_pos = min(cfg.n_ctx, cfg.d_vocab, LONGEST)
    if n_pos < SHORTEST:
        raise UserError(f"n_ctx={cfg.n_ctx}, d_vocab={cfg.d_vocab}: texts with a repeated segment "
                        f"need {SHORTEST} positions and as many tokens; choose a larger model")
    texts = Repeats(n_pos, cfg.d_vocab, (n_pos // 6 + 1, n_pos // 3), (0, n_pos // 6))
    return texts.draw(ROWS, seeded_generator(MEASURED_ON))


def random_pattern_scores(pattern, queries, generator):
    """The scores that attention to random keys would get, [layer, head].

    For each query that counts, one of the keys that it can see is drawn, the same for all heads.
    As in the scores themselves, the mean is over a text's queries, then over texts.
    pattern: [layer, batch, head, query_pos, key_pos]; queries: [batch, query_pos], True where the
    query counts.
    """
    n_rows, n_pos = queries.shape
    n_seen = torch.arange(n_pos) + 1
    keys = (n_seen * torch.rand(n_rows, n_pos, generator=generator)).long()
    keys = keys[None, :, None, :, None].expand(*pattern.shape[:-1], 1)
    paid = pattern.gather(-1, keys).squeeze(-1) * queries[:, None]  # [layer, batch, head, query]
    return (paid.sum(-1) / queries.sum(-1)[:, None]).mean(1)


@torch.no_grad()
def scan_heads(model):
    """Every head's scores and their null distribution, as a dict of plain values.

    scores, low, high, p: {kind: [layer][head]}. low and high: a confidence interval over texts.
    p: the share of draws in which the best of all heads scores at least as much on random keys.
    null: {kind: the 95 % quantile of that best score}. repeats and first: losses in nats per token.
    tokens: the number of tokens in a text.
    """
    tokens, known = draw_scan_texts(model.cfg)
    progress = Progress(len(KINDS), " scores of every head")
    scores = head_scores(model, tokens)
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith("hook_pattern"))
    pattern = cache.stack("pattern")
    generator = seeded_generator(MEASURED_ON)

    # The queries over which each score is averaged.
    occurred = earlier_occurrences(tokens).any(-1)
    queries = dict.fromkeys(scores, occurred)
    queries["previous-token"] = (torch.arange(tokens.shape[1]) > 0).expand_as(occurred)

    repeats, first = repeat_losses(model, tokens, known)
    result = {"scores": {}, "low": {}, "high": {}, "p": {}, "null": {},
              "repeats": repeats, "first": first, "tokens": tokens.shape[1]}
    for done, (kind, each) in enumerate(scores.items(), 1):
        null = torch.stack([random_pattern_scores(pattern, queries[kind], generator)
                            for _ in range(DRAWS)])
        low, high = bootstrap_ci(each.transpose(0, 1))
        result["scores"][kind] = each.mean(1).tolist()
        result["low"][kind] = low.tolist()
        result["high"][kind] = high.tolist()
        result["p"][kind] = permutation_pvalue(each.mean(1), null).tolist()
        result["null"][kind] = null.flatten(1).max(1).values.quantile(0.95).item()
        progress.show(done, kind)
    progress.close()
    return result


def scan_ablation(model, head):
    """The rise of the loss on repeats without a head, (layer, head): {"rise", "low", "high",
    "others"}.

    The head's z is replaced by its mean at each position. rise, low, high: in nats per token, with
    an interval over texts. others: the rises without up to five other heads of its layer, one at a
    time.
    """
    tokens, known = draw_scan_texts(model.cfg)
    _, reference = model.run_with_cache(tokens[:, :-1], lambda name: name.endswith("hook_z"))

    layer, index = head
    others = [(layer, other) for other in range(model.cfg.n_heads) if other != index]
    order = torch.randperm(len(others), generator=seeded_generator(MEASURED_ON))[:5]
    sets = [[head], *([others[i]] for i in order)]

    progress = Progress(len(sets), " heads ablated")
    done = itertools.count(1)
    effects = ablation_effects(model, tokens[:, :-1], sets, repeats_metric(tokens, known),
                               mode="mean_pos", reference=reference,
                               progress=lambda: progress.show(next(done)))
    progress.close()
    low, high = effects.ci()
    return {"rise": effects.mean[0].item(), "low": low[0].item(), "high": high[0].item(),
            "others": effects.mean[1:].tolist()}


def rank_heads(scan, kind):
    """All heads, (layer, head), the highest score first."""
    scores = torch.tensor(scan["scores"][kind])
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(i, scores.shape[1]) for i in order]


def look_up(scan, name, kind, head):
    """One number of a head, (layer, head): its score, low, high or p."""
    layer, index = head
    return scan[name][kind][layer][index]


def is_clear(scan, kind, head):
    """Whether a head, (layer, head), scores above CLEAR and above chance."""
    return (look_up(scan, "scores", kind, head) > CLEAR
            and look_up(scan, "p", kind, head) < 0.05)


# Claims


def scan_claims(cfg, scan, removed):
    """[Claim] about a model. If it has GPT-2 small's shape, its published heads are judged. For
    information: its best heads of each kind, and the cost of removing the best induction head."""
    claims = []
    if all(getattr(cfg, name) == value for name, value in GPT2_SMALL_SHAPE.items()):
        claims += [head_claim(scan, kind, head, reported=True)
                   for kind, heads in GPT2_SMALL_HEADS.items() for head in heads]
    for kind in KINDS:
        best, *next_best = rank_heads(scan, kind)[:SHOWN]
        shown = [best, *(head for head in next_best if is_clear(scan, kind, head))]
        claims += [head_claim(scan, kind, head) for head in shown]

    best = rank_heads(scan, "induction")[0]
    rises = removed["others"]
    control = f"other heads: {min(rises):.2g} to {max(rises):.2g}" if rises else ""
    claims.append(claim(f"head {head_label(*best)} removed: rise of the loss on repeats (nats)",
                        removed["rise"], interval=(removed["low"], removed["high"]),
                        control=control))
    claims.append(claim("loss on repeats (nats)", scan["repeats"],
                        control=f"on first occurrences: {scan['first']:.3g}"))
    if cfg.n_layers == 1:
        claims.append(claim("one layer allows no induction head by composition; best score",
                            look_up(scan, "scores", "induction", best),
                            control="no head reads what another one wrote"))
    return claims


def head_claim(scan, kind, head, reported=False):
    """A Claim about one head's score. reported: the head was published, so the claim is judged."""
    score, low, high, p = (look_up(scan, name, kind, head)
                           for name in ("scores", "low", "high", "p"))
    text = f"{kind} head {head_label(*head)}: share of its attention"
    control = f"random keys, best head: {scan['null'][kind]:.2g}; p = {p:.2g}"
    if not reported:
        return claim(text, score, interval=(low, high), control=control)
    return claim(text, score, interval=(low, high), above=CLEAR, p=p, reported="listed",
                 control=f"above {CLEAR:g}; {control}")


# The summary, and the figures


def describe_scan(scan, removed):
    """Two sentences that say what was found."""
    parts = []
    for kind in KINDS:
        best = rank_heads(scan, kind)[0]
        score = look_up(scan, "scores", kind, best)
        parts.append(f"{head_label(*best)} for {kind}, {score:.2f} "
                     f"(chance: up to {scan['null'][kind]:.2f})")
    best = head_label(*rank_heads(scan, "induction")[0])
    return (f"The heads with the highest scores (shares of their attention) are "
            f"{'; '.join(parts)}. The loss on repeats is {scan['repeats']:.2f} nats per token, and "
            f"removing {best} raises it by {removed['rise']:.2f}. induction.png and the figures "
            "beside it show every head.")


def scan_figures(scan):
    """{kind: Figure} of every head's score."""
    figures = {}
    for kind, scores in scan["scores"].items():
        best = rank_heads(scan, kind)[0]
        score = look_up(scan, "scores", kind, best)
        figures[kind] = plotting.head_grid(
            torch.tensor(scores).numpy(), unit="share of attention",
            title=f"{kind}: most in {head_label(*best)}, {score:.2f}\n"
                  f"(random keys: {scan['null'][kind]:.2f})")
    return figures
