"""Re-run the model from the point of an edit: this is what makes patching sweeps fast.

    rerun = Rerun(model, tokens, metric)
    # edited [cell, batch, …] -> values [cell, batch]
    [values] = rerun.patched([("blocks.1.attn.hook_z", edited)])

An edit changes nothing before its block, so the model is run again only from there. Attention is
causal, so an edit also changes nothing before its position. The rest is computed against the keys
and values of the original run, for all cells together, so that each weight is read only once. Four
words are used for this:

    edit    one activation, given by its hook name, and its value in each of several cells
    cell    one edited run of the whole batch, for example with one head patched at one position
    job     one prompt of one cell: two cells and a batch of three make six jobs; a job in which
            nothing changes is dropped
    row     one position of a job, from the first change on: all rows of all jobs form one list

The last block and the unembedding compute only what the metric reads. Unchanged values are not
computed again, so a cell that changes nothing has an effect of exactly 0. For activations from
which no block can start, such as `mlp.hook_post`, there is no such short cut: a hook edits them
while the blocks run as usual.

Chapter: COURSE_ROADMAP.md, 9 (intervene)
Prerequisites: model.py, metrics.py, residual_stream_analysis.py
Next: patching.py
Source: causality of attention (Vaswani et al. 2017); the same numbers as the loop over hooks
"""

import re
from dataclasses import dataclass, replace

import torch

from metrics import as_metric
from residual_stream_analysis import last_stream, stream_before
from utils import UserError

MEMORY = 1 << 30  # the most bytes that cells run at once may take
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:attn\.)?hook_(\w+)")
ATTENTION = ("q", "k", "v", "pattern")
SHORT_CUTS = ("resid_pre", *ATTENTION, "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Rerun:
    """One run of `tokens`, with everything that edited runs need to start in the middle.

    tokens: [batch, pos]. metric: a Metric, or a function of logits [..., batch, pos, d_vocab] ->
    [..., batch]. names: hook names to keep in `cache` besides those for the short cuts. key_mask:
    [batch, pos], True for real tokens, if prompts are padded on the left.
    baseline: [batch], the metric of the unedited run.
    Raises UserError for open hooks, which it would bypass, and in training mode with dropout.
    """

    @torch.no_grad()
    def __init__(self, model, tokens, metric, names=(), key_mask=None):
        check_no_hooks(model)
        model.check_no_dropout()
        self.model = model
        self.tokens = tokens
        self.key_mask = key_mask
        self.metric = as_metric(metric)
        _, self.cache = model.run_with_cache(
            tokens, lambda name: name in names or is_needed(name), key_mask=key_mask)

        positions = self.metric.positions(tokens.shape[1], len(tokens))
        self.positions = positions.expand(len(tokens), -1).to(tokens.device)  # [batch, n]
        self.looked_at = torch.zeros_like(tokens, dtype=torch.bool)  # [batch, pos]
        self.looked_at.scatter_(1, self.positions, True)
        if self.metric.pos is not None and key_mask is not None \
                and (self.looked_at & ~key_mask).any():
            raise UserError(f"the metric's pos={self.metric.pos} is padding in some prompts; "
                            "choose real tokens")
        self.ids = self.metric.ids(len(tokens), model.cfg.d_vocab_out, tokens.device)

        self.logits = self.metric.needed_logits(model, last_stream(model, self.cache))
        self.baseline = self.metric.of_needed(self.logits)

    def metric_of(self, cache):
        """The metric of another run, [batch]; None if its cache lacks the last stream."""
        resid = last_stream(self.model, cache)
        return None if resid is None else self.metric.of_stream(self.model, resid)

    def cells_at_once(self, n_edits=1):
        """The number of cells of each of n_edits activations that fit into MEMORY bytes, if every
        position changes."""
        cfg = self.model.cfg
        n_prompts, n_pos = self.tokens.shape
        # Numbers in memory, roughly
        per_token = 8 * cfg.d_model + 3 * cfg.d_mlp + cfg.n_heads * (4 * cfg.d_head + n_pos)
        per_prompt = n_pos * per_token + 3 * self.logits[0].numel()
        n_bytes = self.logits.element_size() * n_prompts * per_prompt
        return max(1, MEMORY // (n_bytes * n_edits))

    @torch.no_grad()
    def patched(self, edits):
        """The metric of each edit, as a list of [cell, batch].

        edits: (hook name, edited) pairs, one for each activation; edited [cell, batch, ...] is the
        activation's value in each cell. A generator saves memory: of each edit only the rows that
        change are kept.
        """
        values = {}  # by the number of the edit
        n_cells = {}
        entering = {}  # {block: the Rows that enter there}
        for number, (name, edited) in enumerate(edits):
            found = IN_BLOCK.fullmatch(name)
            if not found or found[2] not in SHORT_CUTS:
                values[number] = self.run_with_hook(name, edited)
                continue
            start, rows = self.enter(int(found[1]), found[2], edited)
            rows.cell += sum(n_cells.values())  # cells of earlier edits come first
            n_cells[number] = len(edited)
            entering.setdefault(start, []).append(rows)

        if entering:
            rows = self.run_blocks(entering)
            counts = list(n_cells.values())
            all_values = self.metric_of_rows(rows, sum(counts))  # [cell of any edit, batch]
            for number, its_values in zip(n_cells, all_values.split(counts), strict=True):
                values[number] = its_values
        return [values[number] for number in sorted(values)]

    def run_with_hook(self, name, edited):
        """The metric of an edit without a short cut, [cell, batch]: the blocks run as usual."""
        model = self.model
        n_cells = len(edited)
        key_mask = None if self.key_mask is None else self.key_mask.repeat(n_cells, 1)
        in_block = re.match(r"blocks\.(\d+)", name)
        with model.hooks([(name, lambda own, hook: edited.flatten(0, 1))]):
            if in_block or name.startswith("ln_final"):
                start = int(in_block[1]) if in_block else model.cfg.n_layers
                resid = stream_before(model, self.cache, start).repeat(n_cells, 1, 1)
            else:
                start = 0
                resid = model.embed_prompts(self.tokens.repeat(n_cells, 1), key_mask)
            logits = model.unembed(model.run_blocks(resid, start, key_mask=key_mask))
        return self.metric(logits.unflatten(0, (n_cells, -1)))

    def enter(self, layer, site, edited):
        """Where an edit enters the re-run: (block, the Rows of the stream before that block).

        The block is `layer` for an edit of resid_pre, which the block has not read yet. For all
        other sites it is the next block, because this method finishes block `layer` itself:

        1. Turn an edit of q, k, v or the pattern into an edit of z.
        2. Find the positions where the edited activation differs: dirty, [cell, batch, pos].
        3. Number the jobs, and gather the edited activation at the dirty positions only.
        4. Compute from its site to the end of the block. This mixes no positions, because attention
           comes before z.
        5. Put the result into a copy of the stream, and list the rows to run: from the first dirty
           position on, because attention passes a change on to all later positions.
        """
        n_layers = self.model.cfg.n_layers

        # 1. from q, k, v or pattern to z
        if site in ATTENTION:
            edited = self.z_of(layer, site, edited)
            site = "z"

        # 2. what changes
        start = layer if site == "resid_pre" else layer + 1
        dirty = (edited != self.cache[site, layer]).flatten(3).any(-1)  # [cell, batch, pos]
        if start == n_layers:
            dirty &= self.looked_at  # other positions of the last stream are never read

        # 3. the jobs, and the edited values in them
        cell, prompt = dirty.any(-1).nonzero(as_tuple=True)  # each [job]
        dirty = dirty[cell, prompt]  # [job, pos]
        dirty_job, dirty_pos = dirty.nonzero(as_tuple=True)  # each [row]
        value = edited[cell[dirty_job], prompt[dirty_job], dirty_pos][None]  # [1, row, ...]

        # 4. the rest of the block
        here = prompt[dirty_job], dirty_pos
        resid = self.finish_block(layer, site, value, here)  # [1, row, d_model]

        # 5. the stream before block `start`, and the rows to run
        stream = stream_before(self.model, self.cache, start)[prompt]  # [job, pos, d_model], a copy
        stream[dirty_job, dirty_pos] = resid[0]
        changed = dirty if start == n_layers else dirty.cumsum(-1) > 0
        job, pos = changed.nonzero(as_tuple=True)
        return start, Rows(stream[job, pos][None], job, pos, dirty[job, pos], cell, prompt)

    def finish_block(self, layer, site, value, here):
        """The stream after block `layer` (before it for resid_pre), [1, row, d_model].

        value: [1, row, ...], the edited activation at `site`; here: (prompt, pos) of the rows.
        Everything written before the site is taken from the original run.
        """
        block = self.model.blocks[layer]
        cache = self.cache
        if site in ("resid_pre", "resid_post"):  # the stream itself
            return value
        if site == "mlp_out":
            return cache["resid_mid", layer][here] + value

        # from z to attention's write, to the stream after it, to the end of the block
        attn_out = block.attn.write(value) if site == "z" else value
        resid_mid = value if site == "resid_mid" else cache["resid_pre", layer][here] + attn_out
        return block.after_attention(resid_mid)

    def z_of(self, layer, site, edited):
        """z [cell, batch, pos, head, d_head] of a block whose q, k, v or pattern is edited.

        Heads and positions that the edit does not touch keep their z exactly, to the last bit.
        """
        attn = self.model.blocks[layer].attn
        own = self.cache[site, layer]
        touched = (edited != own).any(-1)  # [cell, batch, pos, head]; of a pattern [.., head, pos]
        if site == "pattern":
            touched = touched.transpose(2, 3)
            z = (edited @ self.cache["v", layer].transpose(1, 2)).transpose(2, 3)
        else:
            if site != "q":  # a key or value affects all positions from its own on
                touched = touched.cumsum(2) > 0
            qkv = {part: self.cache[part, layer].expand_as(edited) for part in ("q", "k", "v")}
            qkv[site] = edited
            q, k, v = (part.flatten(0, 1) for part in qkv.values())  # each cell's rows in one batch
            key_mask = None if self.key_mask is None else self.key_mask.repeat(len(edited), 1)
            z = attn.attend(q, k, v, key_mask).unflatten(0, edited.shape[:2])
        return torch.where(touched[..., None], z, self.cache["z", layer])

    def run_blocks(self, entering):
        """The Rows of the last stream. entering: {block: list of the Rows that enter there}."""
        n_layers = self.model.cfg.n_layers
        waiting = []
        for layer in range(n_layers):
            waiting += entering.get(layer, [])
            if waiting:
                waiting = [self.run_block(layer, join_rows(waiting))]
        return join_rows(waiting + entering.get(n_layers, []))

    def run_block(self, layer, rows):
        """The Rows after a block; after the last block, only those that the metric reads."""
        block = self.model.blocks[layer]

        # new queries, keys and values where the stream has changed; the rest from the original run
        job = rows.job[rows.dirty]
        pos = rows.pos[rows.dirty]
        new_qkv = block.attn.project(*block.attention_inputs(rows.resid[:, rows.dirty]))
        qkv = [self.cache[part, layer][rows.prompt] for part in ("q", "k", "v")]  # copies
        for part, new in zip(qkv, new_qkv, strict=True):
            part[job, pos] = new[0]  # [job, pos, head, d_head]

        if layer + 1 == self.model.cfg.n_layers:
            rows = rows.select(self.looked_at[rows.prompt[rows.job], rows.pos])
        key_mask = None if self.key_mask is None else self.key_mask[rows.prompt]
        z = block.attn.attend(*qkv, key_mask)[rows.job, rows.pos]  # [row, head, d_head]
        resid = block.after_attention(rows.resid + block.attn.write(z[None]))
        return replace(rows, resid=resid, dirty=torch.ones_like(rows.dirty))

    def metric_of_rows(self, rows, n_cells):
        """The metric of all cells, [cell, batch], from the changed Rows of the last stream."""
        # [cell, batch, pos, token]
        logits = self.logits.expand(n_cells, *self.logits.shape).clone()
        looked_at = self.positions[rows.prompt[rows.job]]  # [row, n]
        seen, place = (rows.pos[:, None] == looked_at).nonzero(as_tuple=True)
        job = rows.job[seen]
        cell = rows.cell[job]
        prompt = rows.prompt[job]

        each_has_its_own = self.ids is not None and self.ids.ndim == 2
        ids = self.ids[prompt] if each_has_its_own else self.ids
        # each row as a batch of one position
        resid = rows.resid[0, seen, None]  # [row, 1, d_model]
        logits[cell, prompt, place] = self.model.unembed(resid, ids)[:, 0]
        return self.metric.of_needed(logits)


@dataclass
class Rows:
    """The positions of edited runs that may have changed, all in one list.

    resid: [1, row, d_model], the stream there. job, pos: [row], the job and the position of each
    row. dirty: [row], whether the stream has already changed there. cell, prompt: [job], the cell
    and the prompt of each job.
    """

    resid: torch.Tensor
    job: torch.Tensor
    pos: torch.Tensor
    dirty: torch.Tensor
    cell: torch.Tensor
    prompt: torch.Tensor

    def select(self, chosen):
        """A selection of the rows; chosen: [row], bool."""
        return replace(self, resid=self.resid[:, chosen], job=self.job[chosen],
                       pos=self.pos[chosen], dirty=self.dirty[chosen])


def join_rows(parts):
    """Several Rows joined into one, with their jobs numbered consecutively."""
    if len(parts) == 1:
        return parts[0]

    jobs = []
    n_jobs = 0
    for part in parts:
        jobs.append(part.job + n_jobs)
        n_jobs += len(part.cell)

    return Rows(
        resid=torch.cat([part.resid for part in parts], 1),
        job=torch.cat(jobs),
        pos=torch.cat([part.pos for part in parts]),
        dirty=torch.cat([part.dirty for part in parts]),
        cell=torch.cat([part.cell for part in parts]),
        prompt=torch.cat([part.prompt for part in parts]),
    )


def is_needed(name):
    """Whether the short cuts need the activation of that name.

    Patterns are kept only on request, because keeping them rules out the fused kernel.
    """
    found = IN_BLOCK.fullmatch(name)
    has_short_cut = found is not None and found[2] in SHORT_CUTS and found[2] != "pattern"
    return has_short_cut or name.startswith("hook_")


def check_no_hooks(model):
    """Raises UserError if hooks are open on the model."""
    open_at = model.open_hooks()
    if open_at:
        raise UserError(f"hooks are open at {', '.join(open_at[:3])}, which this would bypass; "
                        "close them first, or write their edit into a copy of the weights")
