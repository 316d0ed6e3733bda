"""Test whether a head does copy suppression: where it looks, and what it writes.

    the head looks          at tokens of the text that are predicted now, wherever the prediction
                            was computed
    and lowers              the logit of the token that it looks at (a negative OV diagonal)

A head can do one without the other. One that lowers everything that was seen does only the second.
So its attention is compared with that to tokens that were seen and are not predicted, and the
prediction is replaced by another one, to see whether the attention follows it. Finally everything
but copy suppression is removed from what the head writes (CSPA), to see how much of its effect is
left.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: experiments/suppression/model.py, experiments/suppression/cspa.py
Next: experiments/suppression/circuit.py
Source: McDougall et al. 2023, sections 2 and 3
"""

from dataclasses import dataclass

import torch

from activation_cache import head_label
from experiments.suppression.cspa import cspa_score, extreme_tokens
from head_ablation import ablate_heads, derangement
from utils import seeded_generator
from weight_circuits import read_through

MEASURED_ON = 999  # the seed of the texts for measurements; no model is trained on them
ROWS = 256
CSPA_ROWS = 64
CSPA_PAIRS = 4  # pairs of a source and a token that are kept at each position
PATCH = 0.5  # the length of a patch, as a share of the length of the stream
WAYS = ("ignore what was seen", "suppress all that was seen",
        "suppress what was seen and predicted")


def draw_measured_texts(walks, n_rows=ROWS, seed=MEASURED_ON):
    """(inputs [batch, pos], chances [batch, pos, d_vocab] of the token after each input)."""
    tokens, chances = walks.draw(n_rows, seeded_generator(seed))
    return tokens[:, :-1], chances[:, 1:]


def is_counted(walks, tokens):
    """[pos], bool: the positions with all sources, at which something is predicted."""
    return torch.arange(tokens.shape[1]) >= max(walks.lags) - 1


# Losses


def nats_above_floor(logits, chances):
    """KL(chances || softmax(logits)), [...], in nats: the loss of a prediction above the floor.

    logits, chances: [..., d_vocab].
    """
    log_q = logits.double().log_softmax(-1)
    expected = torch.where(chances > 0, chances * log_q, 0.0)  # 0 too where log_q is -inf
    return (torch.special.xlogy(chances, chances) - expected).sum(-1)


def loss_floor(chances):
    """The mean entropy of the chances, in nats per token: the lowest possible loss."""
    return torch.special.entr(chances).sum(-1).mean().item()


def null_losses(walks, n_rows=512):
    """{way: nats above the floor} of the best predictor for each of WAYS.

    A predictor knows the table and adds a number to the logits of each kind of token. The kinds
    are: tokens that are not successors; and, depending on the way, nothing more, all seen tokens,
    or seen tokens that are predicted and those that are not. The numbers are fitted to the exact
    chances, at each position separately.
    """
    tokens, chances = draw_measured_texts(walks, n_rows)
    counted = is_counted(walks, tokens)
    chances = chances[:, counted]
    seen, predicted = (state[:, counted].double() for state in walks.states(tokens))

    odds = walks.predicted_odds(tokens)[:, counted].clamp(min=1).log()  # 0 for no successor
    other = 1 - predicted
    kinds = {WAYS[0]: [other], WAYS[1]: [other, seen],
             WAYS[2]: [other, seen * predicted, seen * other]}
    return {way: best_of_kind(odds, torch.stack(features, -1), chances)
            for way, features in kinds.items()}


def best_of_kind(base, features, chances, n_steps=60):
    """The lowest mean nats above the floor that logits base + features @ numbers reach.

    numbers [pos, feature] are fitted. base, chances: [batch, pos, d_vocab]; features: [batch, pos,
    d_vocab, feature].
    """
    numbers = torch.zeros(features.shape[1], features.shape[-1], dtype=torch.float64,
                          requires_grad=True)
    optimizer = torch.optim.LBFGS([numbers], max_iter=n_steps, line_search_fn="strong_wolfe")

    def cost():
        logits = base + torch.einsum("bpvf,pf->bpv", features, numbers)
        return nats_above_floor(logits, chances).mean()

    def closure():
        optimizer.zero_grad()
        loss = cost()
        loss.backward()
        return loss

    optimizer.step(closure)
    return cost().item()


# Heads


@torch.no_grad()
def direct_effects(model, cache, layer):
    """What each head of a layer adds directly to the logits, [batch, pos, head, d_vocab], in nats;
    at the final LayerNorm's scale, and centred over the vocabulary."""
    W_U = read_through(model.ln_final, model.W_U)
    written = cache["result", layer]
    if model.cfg.norm != "none":
        written = written / cache["ln_final.hook_scale"][:, :, None]
    logits = written @ W_U
    return logits - logits.mean(-1, keepdim=True)


def mean_where(values, mask):
    """The mean of values [batch, pos, head, token] over mask [batch, pos, token], as [head]."""
    weight = mask.to(values)
    return torch.einsum("bpht,bpt->h", values, weight) / weight.sum()


def key_states(states, tokens, shift=0):
    """Turn a property of tokens at each query, [batch, query_pos, d_vocab], into one of its keys,
    [batch, query_pos, key_pos]. Keys after the query are False.

    shift: 0 if a key stands for its own token; 1 if it stands for the token before, so that the key
    at position 0 stands for none.
    """
    n_pos = tokens.shape[1]
    of_token = states.gather(2, tokens[:, None].expand(-1, n_pos, -1))
    keys = torch.zeros_like(of_token)
    keys[..., shift:] = of_token[..., :n_pos - shift]
    return keys & torch.ones(n_pos, n_pos, dtype=torch.bool).tril()


@torch.no_grad()
def measure_heads(model, walks, tokens):
    """Measure where each head looks and what it writes: {(layer, head): a dict of numbers}.

    to predicted, to others: its attention to a key whose token is predicted, and to a key whose
    token is not; 1 is an even share. shift: whether keys stand for their own token (0) or for the
    token before (1), if an earlier head has written it there; the one with the larger `to
    predicted`.
    ungated: the direct effect on seen tokens minus that on unseen tokens, for tokens that are not
    predicted, in nats. gated: the same for tokens that are predicted, minus `ungated` (below 0:
    suppression of predicted tokens).
    """
    names = ("hook_pattern", "hook_result", "ln_final.hook_scale")
    _, cache = model.run_with_cache(tokens, lambda name: name.endswith(names))
    seen, predicted = walks.states(tokens)
    is_known = is_counted(walks, tokens)[None, :, None]

    found = {}
    for layer in range(model.cfg.n_layers):
        shares = [even_shares(cache["pattern", layer], tokens, seen, predicted, shift)
                  for shift in (0, 1)]
        effect = direct_effects(model, cache, layer)
        cell = {(was_seen, is_predicted):
                mean_where(effect, (seen == was_seen) & (predicted == is_predicted) & is_known)
                for was_seen in (True, False) for is_predicted in (True, False)}
        ungated = cell[True, False] - cell[False, False]
        gated = cell[True, True] - cell[False, True] - ungated

        for head in range(model.cfg.n_heads):
            shift = max((0, 1), key=lambda shift: shares[shift][0][head])
            to_predicted, to_others = shares[shift]
            found[layer, head] = {
                "to predicted": to_predicted[head].item(), "to others": to_others[head].item(),
                "shift": shift, "gated": gated[head].item(), "ungated": ungated[head].item()}
    return found


def keys_standing_for(states, tokens, shifts=(0, 1)):
    """`key_states` for keys that may stand for several tokens: by default for their own token and
    for the token before. A key that stands for two counts once."""
    return torch.stack([key_states(states, tokens, shift) for shift in shifts]).any(0)


def even_shares(pattern, tokens, seen, predicted, shift):
    """(to predicted, to others), each [head], as in `measure_heads`. pattern: [batch, head,
    query_pos, key_pos]. Only queries that see keys of both kinds count."""
    n_keys = torch.arange(1, tokens.shape[1] + 1)[:, None]
    share = pattern.transpose(1, 2) * n_keys[:, None]  # 1: an even share
    on_predicted = key_states(predicted & seen, tokens, shift)
    on_others = key_states(seen & ~predicted, tokens, shift)
    both = (on_predicted.any(-1) & on_others.any(-1))[..., None]
    return mean_where(share, on_predicted & both), mean_where(share, on_others & both)


def tokens_of_keys(tokens, shift):
    """[batch, key_pos]: the token that each key stands for; the first key stands for its own."""
    return torch.cat([tokens[:, :shift], tokens[:, :tokens.shape[1] - shift]], 1)


@torch.no_grad()
def written_by_source(model, tokens, head, shift):
    """[d_vocab, d_vocab]: what attention to a key that stands for a token (row) adds to each logit
    (column), on average over these texts, in nats at the final LayerNorm's mean scale.

    The means over rows (which all keys share) and over columns (which softmax ignores) are removed.
    """
    moved, scale = moved_by_keys(model, tokens, head)

    # the mean write of the keys that stand for each token
    sources = torch.nn.functional.one_hot(tokens_of_keys(tokens, shift), model.cfg.d_vocab)
    sources = sources.flatten(0, 1).to(moved)  # [key, d_vocab]
    writes = sources.T @ moved.flatten(0, 1) / sources.sum(0)[:, None].clamp(min=1)
    return centred_logits(model, writes / scale)


@torch.no_grad()
def written_by_presence(model, tokens, head):
    """[2, d_vocab, d_vocab]: what attention to a key adds to each logit (column) because a token
    (row) stands at that key, and because it stands at the key before, in nats at the final
    LayerNorm's mean scale.

    A token's successors often stand at the key after it, and have writes of their own. So both
    parts are found together: the write of every key is fitted by least squares as a sum of one
    vector for its own token and one for the token before. The means over rows and columns are
    removed, as in `written_by_source`.
    """
    moved, scale = moved_by_keys(model, tokens, head)
    tokens_at_keys = torch.cat([one_hot_keys(tokens, shift, model.cfg.d_vocab)
                                for shift in (0, 1)], -1).flatten(0, 1).double()  # [key, 2 d_vocab]
    gram = tokens_at_keys.T @ tokens_at_keys
    both = tokens_at_keys.T @ moved.flatten(0, 1).double()
    writes = torch.linalg.pinv(gram, hermitian=True) @ both
    writes = writes.to(moved).view(2, model.cfg.d_vocab, -1)
    return centred_logits(model, writes / scale)


def one_hot_keys(tokens, shift, d_vocab):
    """[batch, key_pos, d_vocab], bool: the token that each key stands for; with shift 1 the key at
    position 0 stands for none."""
    one_hot = torch.nn.functional.one_hot(tokens, d_vocab).bool()
    keys = torch.zeros_like(one_hot)
    keys[:, shift:] = one_hot[:, :tokens.shape[1] - shift]
    return keys


def moved_by_keys(model, tokens, head):
    """(a head's write from each key [batch, key_pos, d_model], the final LayerNorm's mean scale).
    """
    layer, index = head
    names = (f"blocks.{layer}.attn.hook_v", "ln_final.hook_scale")
    _, cache = model.run_with_cache(tokens, lambda name: name in names)
    moved = cache["v", layer][:, :, index] @ model.blocks[layer].attn.W_O[index]
    scale = 1.0 if model.cfg.norm == "none" else cache["ln_final.hook_scale"].mean()
    return moved, scale


def centred_logits(model, writes):
    """What writes [..., source, d_model] add to each logit, [..., source, d_vocab].

    The means over logits (which softmax ignores) and over sources (which all keys share) are
    removed.
    """
    logits = writes @ read_through(model.ln_final, model.W_U)
    logits = logits - logits.mean(-1, keepdim=True)
    return logits - logits.mean(-2, keepdim=True)


@torch.no_grad()
def attention_when_predicted(model, walks, tokens, head):
    """[2, d_vocab]: the mean attention of a head to the keys that hold a token, and to the keys
    after those, over the queries where the token was seen and is predicted.

    If a token follows itself, its key counts as the first kind. 0 for a token without such a query.
    """
    layer, index = head
    _, cache = model.run_with_cache(tokens, f"blocks.{layer}.attn.hook_pattern")
    pattern = cache["pattern", layer][:, index]  # [batch, query_pos, key_pos]
    seen, predicted = walks.states(tokens)
    asked = (seen & predicted & is_counted(walks, tokens)[:, None]).to(pattern)
    own = one_hot_keys(tokens, 0, walks.d_vocab)
    after = one_hot_keys(tokens, 1, walks.d_vocab) & ~own
    paid = torch.stack([pattern @ keys.to(pattern) for keys in (own, after)])  # [2, batch, pos, v]
    return (paid * asked).sum((1, 2)) / asked.sum((0, 1)).clamp(min=1)


def written_when_predicted(model, walks, tokens, others, heads):
    """[d_vocab, d_vocab]: what some heads together add to each logit (column) because a token (row)
    is in the text, where that token is predicted, in nats.

    A head can find a token at its own key or, if an earlier head has copied it there, at the key
    after. The head's writes from the two keys are weighted by its attention to them and summed.
    tokens: [batch, pos], for the attention; others: other texts, for the writes. heads: a list of
    (layer, head).
    """
    return sum((attention_when_predicted(model, walks, tokens, head)[..., None]
                * written_by_presence(model, others, head)).sum(0) for head in heads)


def own_ranks(written, own):
    """[source]: how many tokens are lowered more than the source's own token by attention to it; a
    tie counts as half. written: [source, d_vocab]; own: [source], its token."""
    value = written.gather(1, own[:, None])
    as_low = (written <= value).sum(-1) - 1  # others: a tie is no proof
    return ((written < value).sum(-1) + as_low) / 2


def find_suppressor(heads):
    """The head (layer, head) with the most negative `gated`. heads: from `measure_heads`."""
    return min(heads, key=lambda head: heads[head]["gated"])


def find_team(heads):
    """The heads that share the suppression, a list of (layer, head): the most suppressive head, and
    those of its layer that are at least half as suppressive."""
    best = find_suppressor(heads)
    return [head for head, facts in heads.items()
            if head[0] == best[0] and facts["gated"] <= heads[best]["gated"] / 2]


def share_lowest(written):
    """The share of tokens for which attention to the token lowers the token itself most. written:
    [d_vocab, d_vocab]."""
    return (own_ranks(written, torch.arange(len(written))) < 0.5).double().mean().item()


# Interventions


@torch.no_grad()
def ablation_rises(model, walks, tokens, chances, heads):
    """The rise of the loss without some heads, in nats: {"naive copy", "free", "all"}.

    naive copy: where the likeliest successor has been seen, so that copying from the table predicts
    it wrongly. free: where no successor has been seen. Each head's z is replaced by its mean over
    texts at each position. heads: a list of (layer, head).
    """
    _, reference = model.run_with_cache(tokens, lambda name: name.endswith("hook_z"))
    before = nats_above_floor(model(tokens), chances)
    with ablate_heads(model, heads, "mean_pos", reference=reference):
        after = nats_above_floor(model(tokens), chances)
    rise = after - before

    places = naive_copy_places(walks, tokens)
    return {"naive copy": rise[places["naive copy"]].mean().item(),
            "free": rise[places["free"]].mean().item(),
            "all": rise[:, is_counted(walks, tokens)].mean().item()}


def naive_copy_places(walks, tokens):
    """{"naive copy", "free"}: [batch, pos], bool, as in `ablation_rises`."""
    seen, predicted = walks.states(tokens)
    is_known = is_counted(walks, tokens)
    likeliest = walks.predicted_odds(tokens).argmax(-1)
    return {"naive copy": seen.gather(2, likeliest[..., None])[..., 0] & is_known,
            "free": ~(seen & predicted).any(-1) & is_known}


@dataclass
class AddToQuery:
    """A hook that adds `delta` [batch, pos, d_model] to the input of one head's queries."""

    head: int
    delta: torch.Tensor

    def __call__(self, q_input, hook):
        """q_input [batch, pos, head, d_model], with the change."""
        changed = q_input.clone()
        changed[:, :, self.head] += self.delta
        return changed


@torch.no_grad()
def pattern_with(model, tokens, heads, delta):
    """The summed pattern of some heads of one layer, [batch, query_pos, key_pos], after `delta` is
    added to the input of their queries."""
    layer = heads[0][0]
    indices = [index for _, index in heads]
    hooks = [(f"blocks.{layer}.hook_q_input", AddToQuery(index, delta)) for index in indices]
    with model.hooks(hooks):
        _, cache = model.run_with_cache(tokens, f"blocks.{layer}.attn.hook_pattern")
    return cache["pattern", layer][:, indices].sum(1)


def random_of_length(like, generator):
    """Random directions that are as long as `like`, [..., d_model]."""
    drawn = torch.randn(like.shape, generator=generator)
    return drawn / drawn.norm(dim=-1, keepdim=True) * like.norm(dim=-1, keepdim=True)


@torch.no_grad()
def patch_direction(model, walks, tokens, heads, *, shifts=(0, 1), seed=MEASURED_ON):
    """Attention to a token before and after the stream is patched to predict it: {"before",
    "after", "random"}, mean shares, summed over some heads of one layer.

    At each query one seen token that is not predicted is drawn. Its unembedding direction, PATCH
    times as long as the stream, is added to the input of the heads' queries and nowhere else.
    random: the same with a random direction of that length. shifts: which keys stand for a token,
    as in `keys_standing_for`. The sum over heads is taken, not the mean, because their writes add
    up: if two heads share the vocabulary, one of them turns to each token.
    """
    generator = seeded_generator(seed)
    layer = heads[0][0]
    seen, predicted = walks.states(tokens)
    possible = seen & ~predicted
    weight = possible.double() + 1e-12  # queries without such a token are left out below
    chosen = torch.multinomial(weight.flatten(0, 1), 1, generator=generator).view(tokens.shape)

    # the patch
    _, cache = model.run_with_cache(tokens, f"blocks.{layer}.hook_resid_pre")
    resid = cache["resid_pre", layer]
    length = PATCH * (resid - resid.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
    W_U = read_through(model.ln_final, model.W_U)
    direction = torch.nn.functional.normalize(W_U.T[chosen] - W_U.mean(1), dim=-1)
    delta = length * direction

    is_chosen = torch.zeros_like(seen).scatter(2, chosen[..., None], True) & possible
    keys = keys_standing_for(is_chosen, tokens, shifts)
    rows = is_counted(walks, tokens)
    return compare_patches(model, tokens, heads, delta, keys, rows, generator)


def compare_patches(model, tokens, heads, delta, keys, rows, generator):
    """{"before", "after", "random"}: the mean attention to `keys` [batch, query_pos, key_pos], over
    the queries `rows` that have such a key, summed over the heads."""
    patches = {"before": torch.zeros_like(delta), "after": delta,
               "random": random_of_length(delta, generator)}
    has_key = keys.any(-1) & rows
    shares = {}
    for name, patch in patches.items():
        paid = (pattern_with(model, tokens, heads, patch) * keys).sum(-1)
        shares[name] = paid[has_key].mean().item()
    return shares


@torch.no_grad()
def patch_prediction(model, walks, tokens, heads, *, shifts=(0, 1), seed=MEASURED_ON):
    """Attention before and after the prediction of another text is swapped in: {"new": {"before",
    "after", "random"}, "own": the same}, mean shares, summed over the heads.

    In the heads' queries alone, what the layers below wrote at a position is replaced by what they
    wrote at that position of another text; the token's embedding stays. new: keys whose tokens only
    the other text predicts; own: keys whose tokens only this text predicts. heads, shifts: as in
    `patch_direction`. None for heads of the first layer, which has no layers below.
    """
    layer = heads[0][0]
    if layer == 0:
        return None
    generator = seeded_generator(seed)
    other = derangement(len(tokens), generator)
    names = [f"blocks.{layer}.hook_resid_pre", "blocks.0.hook_resid_pre"]
    _, cache = model.run_with_cache(tokens, names)
    computed = cache["resid_pre", layer] - cache["resid_pre", 0]
    delta = computed[other] - computed

    seen, predicted = walks.states(tokens)
    rows = is_counted(walks, tokens)
    wanted = {"new": predicted[other] & ~predicted, "own": predicted & ~predicted[other]}
    keys = {name: keys_standing_for(seen & kind, tokens, shifts) for name, kind in wanted.items()}
    return {name: compare_patches(model, tokens, heads, delta, keys[name], rows, generator)
            for name in wanted}


# All measurements


def measure_suppressor(model, walks):
    """All measurements of a trained model, its most suppressive head and that head's team.

    Returns a dict of plain values. walks: the Walks that the model was trained on, such as its
    SuppressionRecipe.

    The heads are chosen, and their writes from each token found, on other texts than those on which
    they are measured.
    """
    chosen_on, _ = draw_measured_texts(walks, seed=MEASURED_ON + 1)
    chosen = measure_heads(model, walks, chosen_on)
    head = find_suppressor(chosen)
    shift = chosen[head]["shift"]
    team = find_team(chosen)
    by_head = {each: written_by_source(model, chosen_on, each, shift) for each in team}
    written = by_head[head]
    together = sum(by_head.values())

    tokens, chances = draw_measured_texts(walks)
    counted = is_counted(walks, tokens)
    heads = measure_heads(model, walks, tokens)
    by_presence = written_when_predicted(model, walks, tokens, chosen_on, team)
    with torch.no_grad():
        above = nats_above_floor(model(tokens), chances)[:, counted].mean().item()

    few = tokens[:CSPA_ROWS]
    scores = {}
    for which in ("lowest", "highest", "random"):
        partners = extreme_tokens(written, 1, which)[tokens_of_keys(few, shift)]
        scores[which] = cspa_score(model, few, head, partners, CSPA_PAIRS, counted)
    return {
        "seed": walks.seed, "head": list(head), "label": head_label(*head), "shift": shift,
        "floor": loss_floor(chances[:, counted]), "above": above,
        "heads": {head_label(*each): facts for each, facts in heads.items()},
        "suppressor": heads[head],
        "team": [head_label(*each) for each in team],
        "lowest": {"presence": share_lowest(by_presence), "team": share_lowest(together),
                   "head": share_lowest(written)},
        "ablation": {"head": ablation_rises(model, walks, tokens, chances, [head]),
                     "team": ablation_rises(model, walks, tokens, chances, team)},
        "direction": {"team": patch_direction(model, walks, tokens, team),
                      "head": patch_direction(model, walks, tokens, [head], shifts=(shift,))},
        "prediction": {"team": patch_prediction(model, walks, tokens, team),
                       "head": patch_prediction(model, walks, tokens, [head], shifts=(shift,))},
        "cspa": scores,
        "written": {head_label(*each): values.tolist() for each, values in by_head.items()},
    }
