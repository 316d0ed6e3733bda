"""Copy-suppression-preserving ablation (CSPA): all but copy suppression is removed from a head.

    o_s      what the head writes of source s, less what it writes of the average source
    kept     the pairs (s, t) of a source and a token that the head's OV circuit suppresses most
             where it sees s; of these, at each destination, the pairs whose t is predicted most by
             the stream that the head reads (logit lens)
    written  mean write + sum over s of attention(s) * (o_s projected on the unembeddings of its t)

Without the projections that is what the head writes, exactly. If copy suppression is all that it
does, predictions stay as they were. The score compares the change with that
of taking away all but the mean: 1 is no change at all.

Chapter: COURSE_ROADMAP.md, 12 (copying and suppression)
Prerequisites: weight_circuits.py, experiments/suppression/model.py
Next: experiments/suppression/measure.py
Source: McDougall et al. 2023, section 3.3
"""

import torch

from losses import kl_divergence
from utils import at_least_float32, seeded_generator
from weight_circuits import ov_circuit, read_through


@torch.no_grad()
def effective_embedding(model):
    """[d_vocab, d_model], in float32 at least: W_E and, where there are MLPs, what the first one
    makes of it, which is how later layers see a token."""
    W_E = at_least_float32(model.W_E)
    if model.cfg.attn_only or not model.cfg.n_layers:
        return W_E
    block = model.blocks[0]
    return W_E + torch.cat([block.mlp(block.ln2(part)) for part in W_E.split(4096)])


@torch.no_grad()
def cspa_score(model, tokens, head, partners, n_pairs, rows=slice(None)):
    """1 - KL(clean || CSPA) / KL(clean || mean-ablated), each the mean over texts and positions.

    tokens: [batch, pos]. head: (layer, head). partners: [batch, key_pos, n], the tokens t of each
    source, as `extreme_tokens` gives them; n_pairs: as in `kept_write`. rows: which positions
    count.
    """
    layer, index = head
    names = [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_pattern",
             f"blocks.{layer}.attn.hook_v"]
    with model.caching(names) as cache:
        clean = model.unembed(model.run_blocks(model.embed(tokens)))

    pattern = at_least_float32(cache["pattern", layer][:, index])  # [batch, query_pos, key_pos]
    moved = cache["v", layer][:, :, index] @ model.blocks[layer].attn.W_O[index]
    write = pattern @ moved  # [batch, pos, d_model]
    kept = kept_write(model, cache["resid_pre", layer], pattern, moved, partners, n_pairs)

    def changed(new):
        """The mean KL from the intact run where the head writes `new` instead."""
        attn_out = f"blocks.{layer}.hook_attn_out"
        with model.hooks([(attn_out, lambda out, hook: out + (new - write).to(out))]):
            resid = model.run_blocks(cache["resid_pre", layer], start=layer)
        return kl_divergence(clean, model.unembed(resid))[:, rows].mean().item()

    return 1 - changed(kept) / changed(write.mean(0).expand_as(write))


def extreme_tokens(written, n, which="lowest"):
    """[source, n]: the tokens whose logits attention to each source changes most.

    written: [source, d_vocab], what it adds to each logit. which: "lowest" for those lowered most,
    "highest" for those raised most, "random" for some that are drawn.
    """
    if which == "random":
        return torch.rand(written.shape, generator=seeded_generator(0)).argsort(-1)[:, :n]
    return written.topk(n, largest=which == "highest").indices


@torch.no_grad()
def written_by_weights(model, head, sources):
    """[source, d_vocab]: what attention to each source adds to each logit, by the head's OV circuit
    and up to LayerNorm's scale. sources: [n], tokens."""
    moved = ov_circuit(model, *head)
    W_E = effective_embedding(model)[sources]
    return (W_E @ moved.A) @ moved.B @ read_through(model.ln_final, model.W_U)


@torch.no_grad()
def kept_write(model, resid, pattern, moved, partners, n_pairs):
    """What is left of the head's write, [batch, pos, d_model].

    resid: [batch, pos, d_model], the stream that the head reads. pattern: [batch, query_pos,
    key_pos]. moved: [batch, key_pos, d_model], what is written of each source. partners: [batch,
    key_pos, n]; n_pairs: how many pairs of a source and its partner are kept at each destination,
    those whose partner has the highest logit in the lens.
    """
    W_U = read_through(model.ln_final, model.W_U)
    average = moved.mean((0, 1))
    deviation = moved - average
    n_pos = pattern.shape[-1]
    future = ~torch.ones(n_pos, n_pos, dtype=torch.bool).tril()[..., None]

    kept = torch.zeros_like(resid)
    for row, to in enumerate(partners):
        lens = model.unembed(resid[row:row + 1])[0]  # [query_pos, d_vocab]
        predicted = lens[:, to].masked_fill(future, -torch.inf)  # [query_pos, key_pos, n]
        ranked = predicted.flatten(1)
        least = ranked.topk(min(n_pairs, ranked.shape[1])).values[:, -1, None, None]
        pairs = (predicted >= least) & ~future

        projected = project_on_chosen(deviation[row], W_U.T[to], pairs)
        kept[row] = average + (pattern[row][..., None] * projected).sum(1)
    return kept


def project_on_chosen(vectors, directions, chosen):
    """Each vector's projection on the span of those of its directions that are chosen.

    vectors: [key_pos, d_model]; directions: [key_pos, n, d_model]; chosen: [query_pos, key_pos, n],
    bool. Returns [query_pos, key_pos, d_model].
    """
    along = (directions @ vectors[..., None])[..., 0]  # [key_pos, n]
    gram = directions @ directions.mT  # [key_pos, n, n]
    some = chosen.to(gram)
    gram = gram * some[..., :, None] * some[..., None, :]  # [query_pos, key_pos, n, n]
    shares = torch.linalg.pinv(gram, hermitian=True) @ (along * some)[..., None]
    return torch.einsum("qkn,knm->qkm", shares[..., 0], directions)
