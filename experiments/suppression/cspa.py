"""Copy-suppression-preserving ablation (CSPA): remove everything but copy suppression from a head.

    o_s      the head's write from source s minus its average write
    kept     the pairs (s, t) of a source and a token such that the head's OV circuit suppresses t
             most when it attends to s; of these, at each destination, the pairs whose t has the
             highest logit in the stream that the head reads (logit lens)
    written  mean write + sum over s of attention(s) * (o_s projected on the unembeddings of its t)

Without the projections, this is exactly what the head writes. If copy suppression is all that the
head does, predictions stay the same. The score compares the change of the predictions with that of
mean ablation: 1 is no change at all.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
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
    """[d_vocab, d_model], in float32 or more: W_E plus, if there are MLPs, the first MLP's output
    for it, because later layers see a token like this."""
    W_E = at_least_float32(model.W_E)
    if model.cfg.attn_only or not model.cfg.n_layers:
        return W_E
    block = model.blocks[0]
    return W_E + torch.cat([block.mlp(block.ln2(part)) for part in W_E.split(4096)])


@torch.no_grad()
def cspa_score(model, tokens, head, partners, n_pairs, rows=slice(None)):
    """1 - KL(clean || CSPA) / KL(clean || mean-ablated), each the mean over texts and positions.

    tokens: [batch, pos]. head: (layer, head). partners: [batch, key_pos, n], the tokens t of each
    source, from `extreme_tokens`; n_pairs: as in `kept_write`. rows: the positions that count.
    """
    layer, index = head
    names = [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.attn.hook_pattern",
             f"blocks.{layer}.attn.hook_v"]
    with model.caching(names) as cache:
        clean = model(tokens)

    pattern = at_least_float32(cache["pattern", layer][:, index])  # [batch, query_pos, key_pos]
    moved = cache["v", layer][:, :, index] @ model.blocks[layer].attn.W_O[index]
    write = pattern @ moved  # [batch, pos, d_model]
    kept = kept_write(model, cache["resid_pre", layer], pattern, moved, partners, n_pairs)

    def changed(new):
        """The mean KL to the intact run if the head writes `new` instead."""
        attn_out = f"blocks.{layer}.hook_attn_out"
        with model.hooks([(attn_out, lambda out, hook: out + (new - write).to(out))]):
            resid = model.run_blocks(cache["resid_pre", layer], start=layer)
        return kl_divergence(clean, model.unembed(resid))[:, rows].mean().item()

    return 1 - changed(kept) / changed(write.mean(0).expand_as(write))


def extreme_tokens(written, n, which="lowest"):
    """[source, n]: the tokens whose logits attention to each source changes most.

    written: [source, d_vocab], the change of each logit. which: "lowest" for the tokens lowered
    most, "highest" for those raised most, "random" for random tokens.
    """
    if which == "random":
        return torch.rand(written.shape, generator=seeded_generator(0)).argsort(-1)[:, :n]
    return written.topk(n, largest=which == "highest").indices


@torch.no_grad()
def written_by_weights(model, head, sources):
    """[source, d_vocab]: what full attention to each source adds to each logit, by the head's OV
    circuit and up to LayerNorm's scale. sources: [n], tokens."""
    moved = ov_circuit(model, *head)
    W_E = effective_embedding(model)[sources]
    return (W_E @ moved.A) @ moved.B @ read_through(model.ln_final, model.W_U)


@torch.no_grad()
def kept_write(model, resid, pattern, moved, partners, n_pairs):
    """The part of the head's write that CSPA keeps, [batch, pos, d_model].

    resid: [batch, pos, d_model], the stream that the head reads. pattern: [batch, query_pos,
    key_pos]. moved: [batch, key_pos, d_model], the write from each source. partners: [batch,
    key_pos, n]; n_pairs: the number of pairs of a source and a partner that are kept at each
    destination, those whose partner has the highest logit in the lens.
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
    """Project each vector on the span of its chosen directions.

    vectors: [key_pos, d_model]; directions: [key_pos, n, d_model]; chosen: [query_pos, key_pos, n],
    bool. Returns [query_pos, key_pos, d_model].
    """
    along = (directions @ vectors[..., None])[..., 0]  # [key_pos, n]
    gram = directions @ directions.mT  # [key_pos, n, n]
    some = chosen.to(gram)
    gram = gram * some[..., :, None] * some[..., None, :]  # [query_pos, key_pos, n, n]
    shares = torch.linalg.pinv(gram, hermitian=True) @ (along * some)[..., None]
    return torch.einsum("qkn,knm->qkm", shares[..., 0], directions)
