"""A run taken up again where one activation of it was edited: what makes patching fast.

    run = Rerun(model, tokens, metric)
    values, = run.patched([("blocks.1.attn.hook_z", edited)])     # [cell, batch], one of many edits

An edit changes nothing before its block, so the run is taken up there. Attention is causal, so it
changes nothing before its position either. What may have changed is computed, against the keys and
values of the run as it was, and of all edits together, so that each weight is read once. Of two
edits (*cells*) in a batch of three texts (*prompts*) there are six *jobs*; those in which nothing
changes drop out, and of the others each position from the first change on is a *row*. The last
block and the unembedding compute what the metric looks at. What stays as it was is not computed, so
an edit that edits nothing has an effect of exactly 0. (Names off this way, such as `mlp.hook_post`,
run through the model's own blocks, by a hook.)

The lines of `through` are those of Block.forward, on rows in place of whole texts.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: model.py, metrics.py, residual_stream_analysis.py
Next: patching.py
Source: causality of attention (Vaswani et al. 2017); the same numbers as the loop over hooks
"""

import re
from dataclasses import dataclass, replace

import torch

from metrics import as_metric
from residual_stream_analysis import stream_before
from utils import UserError

MEMORY = 1 << 30  # bytes that the cells of one batch may take
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
ATTENTION = ("q", "k", "v", "pattern")
ON_THE_WAY = ("resid_pre", *ATTENTION, "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Rerun:
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
        _, self.cache = model.run_with_cache(tokens, lambda name: name in names or is_needed(name))
        self.positions = self.metric.positions(tokens.shape[1]).to(tokens.device)
        self.looked_at = torch.zeros_like(tokens[0], dtype=torch.bool)
        self.looked_at[self.positions] = True
        self.ids = self.metric.ids(len(tokens), model.cfg.d_vocab, tokens.device)
        last = stream_before(model, self.cache, model.cfg.n_layers)
        self.logits = logits_for(self.metric, model, last)
        self.baseline = self.metric.of(self.logits)

    def metric_of(self, cache):
        """The metric of another run, [batch]; None where its cache lacks the last stream."""
        n_layers = self.model.cfg.n_layers
        last = f"blocks.{n_layers - 1}.hook_resid_post" if n_layers else "hook_embed"
        if last not in cache:
            return None
        return measured(self.metric, self.model, stream_before(self.model, cache, n_layers))

    def cells_at_once(self, n_edits=1):
        """How many cells of each of n_edits take MEMORY bytes, if they change all positions."""
        cfg, (n_prompts, n_pos) = self.model.cfg, self.tokens.shape
        per_token = 12 * cfg.d_model + 3 * cfg.d_mlp + cfg.n_heads * n_pos  # about what is alive
        numbers = n_prompts * (n_pos * per_token + 3 * self.logits[0].numel())
        return max(1, MEMORY // (self.logits.element_size() * numbers * n_edits))

    @torch.no_grad()
    def patched(self, edits):
        """The metric of each edit, as a list of [cell, batch].

        edits: (hook name, edited) pairs of one activation each; edited [cell, batch, ...]. They may
        come one by one: nothing of them is kept but the rows that change.
        """
        values, sizes, entering = {}, {}, {}  # by the edit's number
        for number, (name, edited) in enumerate(edits):
            found = IN_BLOCK.fullmatch(name)
            if not found or found[2] not in ON_THE_WAY:
                values[number] = self.run_with(name, edited)
                continue
            start, rows = self.entry(int(found[1]), found[2], edited)
            rows.cell += sum(sizes.values())  # the cells of the edits before this one come first
            sizes[number] = len(edited)
            entering.setdefault(start, []).append(rows)
        if entering:
            found = self.metric_of_rows(self.onward(entering), sum(sizes.values()))
            values |= zip(sizes, found.split(list(sizes.values())), strict=True)
        return [values[number] for number in sorted(values)]

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

    def entry(self, layer, site, edited):
        """The block that an edit enters, and the Rows that it has there: block `layer` for an edit
        of what it reads; the one after it for all others, whose way through this one is run here.
        """
        block, cache = self.model.blocks[layer], self.cache
        if site in ATTENTION:
            site, edited = "z", self.z_of(layer, site, edited)
        start = layer + (site != "resid_pre")
        dirty = (edited != cache[site, layer]).flatten(3).any(-1)  # [cell, batch, pos]
        if start == self.model.cfg.n_layers:
            dirty[..., ~self.looked_at] = False  # nobody reads the last stream elsewhere
        cell, prompt = dirty.any(-1).nonzero(as_tuple=True)  # a job is a prompt that a cell changes
        dirty = dirty[cell, prompt]
        job, pos = dirty.nonzero(as_tuple=True)
        value = edited[cell[job], prompt[job], pos][None]  # [1, row, ...]
        here = prompt[job], pos
        if site == "z":
            site, value = "attn_out", block.attn.write(value)
        if site == "attn_out":
            site, value = "resid_mid", cache["resid_pre", layer][here] + value
        if site == "mlp_out":
            value = cache["resid_mid", layer][here] + value
        if site == "resid_mid" and not block.attn_only:
            value = value + block.mlp(block.ln2.fused(value))
        stream = stream_before(self.model, cache, start)[prompt]  # [job, pos, d_model], a copy
        stream[job, pos] = value[0]
        if start < self.model.cfg.n_layers:  # attention may change all that comes later
            job, pos = (dirty.cumsum(-1) > 0).nonzero(as_tuple=True)
        return start, Rows(stream[job, pos][None], job, pos, dirty[job, pos], cell, prompt)

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

    def onward(self, entering):
        """The Rows of the last stream. entering: {block: list of the Rows that enter there}."""
        rows = []
        for layer in range(self.model.cfg.n_layers):
            rows += entering.get(layer, [])
            if rows:
                rows = [self.through(layer, join_rows(rows))]
        return join_rows(rows + entering.get(self.model.cfg.n_layers, []))

    def through(self, layer, rows):
        """Rows through one block; of the last block, those that the metric looks at."""
        block = self.model.blocks[layer]
        job, pos = rows.job[rows.moved], rows.pos[rows.moved]
        normalized = block.ln1.fused(rows.resid[:, rows.moved])
        everywhere = [self.cache[part, layer][rows.prompt] for part in ("q", "k", "v")]
        changed = block.attn.project(normalized, normalized, normalized)
        for whole, new in zip(everywhere, changed, strict=True):
            whole[job, pos] = new[0]  # [job, pos, head, d_head]
        if layer + 1 == self.model.cfg.n_layers:
            rows = rows.at(self.looked_at[rows.pos])
        z = block.attn.attend(*everywhere)[rows.job, rows.pos]
        resid = rows.resid + block.attn.write(z[None])
        if not block.attn_only:
            resid = resid + block.mlp(block.ln2.fused(resid))
        return replace(rows, resid=resid, moved=torch.ones_like(rows.moved))

    def metric_of_rows(self, rows, n_cells):
        """The metric of all cells, [cell, batch], from the Rows of the last stream that changed."""
        logits = self.logits.expand(n_cells, *self.logits.shape).clone()
        seen, place = (rows.pos[:, None] == self.positions).nonzero(as_tuple=True)
        job = rows.job[seen]
        cell, prompt = rows.cell[job], rows.prompt[job]
        own = self.ids is not None and self.ids.ndim == 2  # each prompt's own tokens
        ids = self.ids[prompt] if own else self.ids
        logits[cell, prompt, place] = self.model.unembed(rows.resid[0, seen, None], ids)[:, 0]
        return self.metric.of(logits)


def logits_for(metric, model, last):
    """Of a last stream [batch, pos, d_model], the logits that a Metric needs, [batch, pos, token].
    """
    at = metric.positions(last.shape[1]).to(last.device)
    return model.unembed(last, metric.ids(len(last), model.cfg.d_vocab, last.device), at)


def measured(metric, model, last):
    """A Metric of a last stream [batch, pos, d_model], from the logits that it needs: [batch]."""
    return metric.of(logits_for(metric, model, last))


@dataclass
class Rows:
    """The positions of edited runs that may have changed, those of all of them one after another.

    resid: [1, row, d_model], the stream there. job, pos: [row], whose they are, and where. moved:
    [row], whether the stream has changed there yet. cell, prompt: [job], the edit and the row of
    tokens that each job is.
    """

    resid: torch.Tensor
    job: torch.Tensor
    pos: torch.Tensor
    moved: torch.Tensor
    cell: torch.Tensor
    prompt: torch.Tensor

    def at(self, chosen):
        """Some of the rows, chosen [row]."""
        return replace(self, resid=self.resid[:, chosen], job=self.job[chosen],
                       pos=self.pos[chosen], moved=self.moved[chosen])


def join_rows(parts):
    """Several Rows as one."""
    if len(parts) == 1:
        return parts[0]
    before = torch.tensor([0, *(len(part.cell) for part in parts)]).cumsum(0)
    jobs = [part.job + int(n) for part, n in zip(parts, before, strict=False)]
    resid = torch.cat([part.resid for part in parts], 1)
    pos, moved, cell, prompt = (torch.cat([getattr(part, name) for part in parts])
                                for name in ("pos", "moved", "cell", "prompt"))
    return Rows(resid, torch.cat(jobs), pos, moved, cell, prompt)


def is_needed(name):
    """Whether the short cut needs the activation of that name: not patterns, which cost the fused
    kernel, unless they are asked for."""
    found = IN_BLOCK.fullmatch(name)
    wanted = found and found[2] in set(ON_THE_WAY) - {"pattern"}
    return name.startswith("hook_") or bool(wanted)
