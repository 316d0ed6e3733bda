"""A run taken up again where one activation of it was edited: what patching and ablation rest on.

    run = Run(model, tokens, metric)
    values = run.patched("blocks.1.attn.hook_z", edited)     # [cell, batch], for many edits at once

An edit changes nothing before its block, so the run is taken up there. Attention is causal, so it
changes nothing before its position either: of each edit, a *cell*, only the *rows* (the positions
that may have changed) are computed, against the keys and values of the run as it was, and the rows
of all cells form one list, so that each weight is read once for all. The last block and the
unembedding compute what the metric looks at, and no more. What stays as it was is not computed: the
effect of an edit that edits nothing is exactly 0.

The lines of `onward` are those of Block.forward, on rows in place of whole texts.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Read before: model.py, residual_stream_analysis.py; after: patching.py, head_ablation.py
Source: causality of attention (Vaswani et al. 2017); the same numbers as the loop over hooks
"""

import re

import torch

from metrics import as_metric
from residual_stream_analysis import stream_before
from utils import UserError

MEMORY = 1 << 30  # bytes that the cells of one batch may take
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
ATTENTION = ("q", "k", "v", "pattern")
ON_THE_WAY = ("resid_pre", *ATTENTION, "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Run:
    """A run of `tokens`, as it is: what is kept of it is all that is needed to edit it.

    tokens: [batch, pos]. metric: a Metric, or a function of logits [..., batch, pos, d_vocab] ->
    [..., batch]. names: hook names to keep in `cache` beside those of the short cut.
    Raises UserError while hooks are open, which it would run past, and in training with dropout.
    """

    @torch.no_grad()
    def __init__(self, model, tokens, metric, names=()):
        heard = [name for name, point in model.hook_points().items() if point.listeners]
        if heard:
            raise UserError(f"hooks are open at {', '.join(heard[:3])}, which this would run past; "
                            "close them first, or write their edit into a copy of the weights")
        model.need_no_dropout()
        self.model, self.tokens, self.metric = model, tokens, as_metric(metric)
        _, self.cache = model.run_with_cache(tokens, lambda name: name in names or kept(name))
        self.positions = self.metric.positions(tokens.shape[1]).to(tokens.device)
        self.looked_at = torch.zeros_like(tokens[0], dtype=torch.bool)
        self.looked_at[self.positions] = True
        self.ids = self.metric.ids(len(tokens), tokens.device)
        self.logits = self.unembed(stream_before(model, self.cache, model.cfg.n_layers))
        self.baseline = self.metric.of(self.logits)

    def unembed(self, stream):
        """Of a last stream [..., pos, d_model], the logits that the metric looks at."""
        return self.model.unembed(stream[..., self.positions, :], self.ids)

    def metric_of(self, cache):
        """The metric of another run, [batch]; None where its cache lacks the last stream."""
        n_layers = self.model.cfg.n_layers
        last = f"blocks.{n_layers - 1}.hook_resid_post" if n_layers else "hook_embed"
        if last not in cache:
            return None
        return self.metric.of(self.unembed(stream_before(self.model, cache, n_layers)))

    def cells_at_once(self):
        """How many cells take MEMORY bytes, if each changes all positions."""
        cfg, (n_rows, n_pos) = self.model.cfg, self.tokens.shape
        per_token = 12 * cfg.d_model + 3 * cfg.d_mlp + cfg.n_heads * n_pos
        numbers = n_rows * (n_pos * per_token + 3 * self.logits[0].numel())
        return max(1, MEMORY // (self.logits.element_size() * numbers))

    @torch.no_grad()
    def patched(self, name, edited):
        """The metric with one activation replaced: edited [cell, batch, ...] -> [cell, batch]."""
        found = IN_BLOCK.fullmatch(name)
        if found and found[2] in ON_THE_WAY:
            return self.rerun(int(found[1]), found[2], edited)
        return self.run_with(name, edited)

    def run_with(self, name, edited):
        """The same through the model itself, by a hook: for what has no short cut."""
        model, n_cells = self.model, len(edited)
        found = re.match(r"blocks\.(\d+)", name)
        with model.hooks([(name, lambda own, hook: edited.flatten(0, 1))]):
            if found or name.startswith("ln_final"):
                start = int(found[1]) if found else model.cfg.n_layers
                resid = stream_before(model, self.cache, start).repeat(n_cells, 1, 1)
            else:
                start, resid = 0, model.embed(self.tokens.repeat(n_cells, 1))
            logits = model.unembed(model.run_blocks(resid, start))
        return self.metric(logits.unflatten(0, (n_cells, -1)))

    def rerun(self, layer, site, edited):
        """The same by the rows that change, from the place where the block was edited."""
        block, cache = self.model.blocks[layer], self.cache
        if site in ATTENTION:
            site, edited = "z", self.z_of(layer, site, edited)
        dirty = (edited != cache[site, layer]).flatten(3).any(-1)  # [cell, batch, pos]
        if layer + 1 == self.model.cfg.n_layers and site != "resid_pre":
            dirty[..., ~self.looked_at] = False  # nobody reads the last stream elsewhere
        cell, row = dirty.any(-1).nonzero(as_tuple=True)  # a job is a prompt of a cell that changes
        dirty = dirty[cell, row]
        job, pos = dirty.nonzero(as_tuple=True)
        value, prompt = edited[cell[job], row[job], pos][None], row[job]  # [1, changed row, ...]
        if site == "z":
            site, value = "attn_out", block.attn.write(value)
        if site == "attn_out":
            site, value = "resid_mid", cache["resid_pre", layer][prompt, pos] + value
        if site == "mlp_out":
            value = cache["resid_mid", layer][prompt, pos] + value
        if site == "resid_mid" and not block.attn_only:
            value = value + block.mlp(block.ln2.fused(value))
        start = layer + (site != "resid_pre")
        stream = stream_before(self.model, cache, start)[row]
        stream[job, pos] = value[0]
        job, pos, last = self.onward(start, stream, dirty, row)
        logits = self.logits.expand(len(edited), *self.logits.shape).clone()
        seen, place = (pos[:, None] == self.positions).nonzero(as_tuple=True)
        logits[cell[job[seen]], row[job[seen]], place] = self.logits_of(last, row[job])[seen]
        return self.metric.of(logits)

    def z_of(self, layer, site, edited):
        """z [cell, batch, pos, head, d_head] with q, k, v or the pattern edited; of heads and rows
        that none of it touches, as it was."""
        attn, own = self.model.blocks[layer].attn, self.cache[site, layer]
        touched = (edited != own).any(-1)  # [cell, batch, pos, head], of a pattern [.., head, pos]
        if site == "pattern":
            touched = touched.transpose(2, 3)
            z = (edited @ self.cache["v", layer].transpose(1, 2)).transpose(2, 3)
        else:
            if site != "q":  # a key or a value is seen from its position on
                touched = touched.cumsum(2) > 0
            parts = [edited if part == site else self.cache[part, layer].expand_as(edited)
                     for part in ("q", "k", "v")]
            z = attn.attend(*(part.flatten(0, 1) for part in parts)).unflatten(0, edited.shape[:2])
        return torch.where(touched[..., None], z, self.cache["z", layer])

    def onward(self, start, stream, dirty, row):
        """Through the blocks from `start` on: (job, pos, resid) of the changed rows of the last
        stream that the metric looks at.

        stream: [job, pos, d_model] before block `start`, dirty [job, pos] where it changed; row:
        [job], the prompt of each. From the first changed position on, attention may change all.
        """
        blocks = self.model.blocks[start:]
        if len(blocks):
            dirty = dirty.cumsum(-1) > 0
        job, pos = dirty.nonzero(as_tuple=True)
        looked_at = self.looked_at[pos]
        resid = stream[job, pos][None]  # [1, row, d_model]: the rows of all jobs, one after another
        if not len(blocks):
            return job[looked_at], pos[looked_at], resid[0, looked_at]
        for layer, block in enumerate(blocks, start):
            normalized = block.ln1.fused(resid)
            q, k, v = block.attn.project(normalized, normalized, normalized)
            everywhere = [self.cache[part, layer][row] for part in ("q", "k", "v")]
            for whole, changed in zip(everywhere, (q, k, v), strict=True):
                whole[job, pos] = changed[0]  # [job, pos, head, d_head]
            if layer == start + len(blocks) - 1:
                job, pos, resid = job[looked_at], pos[looked_at], resid[:, looked_at]
            z = block.attn.attend(*everywhere)[job, pos]
            resid = resid + block.attn.write(z[None])
            if not block.attn_only:
                resid = resid + block.mlp(block.ln2.fused(resid))
        return job, pos, resid[0]

    def logits_of(self, resid, row):
        """Of rows [row, d_model] of the last stream, from the prompts `row`, the logits that the
        metric wants: [row, token]."""
        own = self.ids is not None and self.ids.ndim == 2
        return self.model.unembed(resid[:, None], self.ids[row] if own else self.ids)[:, 0]


def kept(name):
    """Whether the short cut needs the activation of that name: not patterns, which cost the fused
    kernel, unless they are asked for."""
    found = IN_BLOCK.fullmatch(name)
    wanted = found and found[2] in set(ON_THE_WAY) - {"pattern"}
    return name.startswith("hook_") or bool(wanted)
