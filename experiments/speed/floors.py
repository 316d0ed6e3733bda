"""Count what no program can avoid: the multiplications of a computation, and the weights it reads.

A multiplication counts with its addition. Of the matrix products, everything is counted that the
result depends on and nothing else: attention only looks back; a metric at one position needs one
position of the last block, besides its keys and values; a patch changes nothing before it. Norms,
GELU, softmax and optimisers are not counted.

Chapter: COURSE_ROADMAP.md, 10 (approximate)
Prerequisites: model.py, rerun.py, circuits.py
Next: experiments/speed/peers.py
Source: counted by hand; the tests compare with torch's count, and with the rows that really change
"""

import re
from dataclasses import dataclass

from circuits import node_of_input


@dataclass(frozen=True)
class Work:
    """What a computation can't avoid.

    n_products: multiplications, each with its addition. n_read: numbers that it must read from
    memory; only worth counting if they don't fit into the processor's own memory.
    """

    n_products: int
    n_read: int = 0

    def seconds(self, products_per_second, reads_per_second):
        """The least time: arithmetic and reading may overlap, so the longer of the two counts."""
        return max(self.n_products / products_per_second, self.n_read / reads_per_second)


def head_weights(cfg):
    """The number of weights in one of W_Q, W_K, W_V and W_O of a block, all heads together."""
    return cfg.d_model * cfg.n_heads * cfg.d_head


def mlp_weights(cfg):
    """The number of weights in one MLP's two matrices."""
    return 0 if cfg.attn_only else 2 * cfg.d_model * cfg.d_mlp


def block_weights(cfg):
    """The number of weights in one block's matrices."""
    return 4 * head_weights(cfg) + mlp_weights(cfg)


def pair_products(cfg):
    """The multiplications of one query and one key in all heads: their score, and the value."""
    return 2 * cfg.n_heads * cfg.d_head


def forward_work(cfg, batch, pos):
    """A forward pass: each weight once for each token, and each pair of positions once."""
    weights = cfg.n_layers * block_weights(cfg) + cfg.d_model * cfg.d_vocab_out
    pairs = pos * (pos + 1) // 2
    attention = cfg.n_layers * pairs * pair_products(cfg)
    return Work(batch * (pos * weights + attention), weights)


def training_work(cfg, batch, n_steps):
    """Training steps at full context: one product forward, two backward."""
    return Work(3 * n_steps * forward_work(cfg, batch, cfg.n_ctx).n_products)


def dictionary_work(batch, d_model, n_latents):
    """A step of a dictionary: two products forward, and three backward, because the gradient of its
    input is not needed."""
    return Work(5 * batch * d_model * n_latents)


def decoding_work(cfg, n_new):
    """Decoding: each new token reads all weights that its logits depend on."""
    weights = cfg.n_layers * block_weights(cfg) + cfg.d_model * cfg.d_vocab_out
    return Work(n_new * weights, n_new * weights)


# Re-runs from the point of an edit. `changed` says, for each position, whether the stream has
# changed there. The metric reads the last position.


def read_positions(cfg, layer, n_pos):
    """The positions after a block that anything later reads."""
    return range(n_pos) if layer + 1 < cfg.n_layers else range(n_pos - 1, n_pos)


def rerun_products(cfg, layer, changed):
    """The multiplications of the blocks layer, …, for an edited stream before block `layer`."""
    total = 0
    for block in range(layer, cfg.n_layers):
        n_pos = len(changed)
        wanted = read_positions(cfg, block, n_pos)

        # keys and values where the stream has changed; queries where they are also read
        n_queries = sum(changed[pos] for pos in wanted)
        total += head_weights(cfg) * (2 * sum(changed) + n_queries)

        # pairs of a query and a key of which one has changed
        pairs = sum(changed[query] or changed[key] for query in wanted for key in range(query + 1))
        total += pair_products(cfg) * pairs

        # attention passes a change on to all later positions
        changed = [any(changed[: pos + 1]) for pos in range(n_pos)]
        n_rows = sum(changed[pos] for pos in wanted)
        total += n_rows * (head_weights(cfg) + mlp_weights(cfg))
    return total


def head_products(cfg, layer, changed):
    """The multiplications after one head's z in block `layer` is edited: what this head writes, the
    MLP, and the later blocks."""
    n_rows = sum(changed[pos] for pos in read_positions(cfg, layer, len(changed)))
    own = n_rows * (cfg.d_head * cfg.d_model + mlp_weights(cfg))
    return own + rerun_products(cfg, layer + 1, changed)


def sweep_work(cfg, n_pos, *, of_heads, by_pos):
    """A sweep of one prompt over the layers, and over the heads or the positions, or both.

    of_heads: z of each head is patched; otherwise the stream before each block.
    """
    everywhere = [True] * n_pos
    cells = [everywhere]
    if by_pos:
        cells = [[pos == here for pos in range(n_pos)] for here in range(n_pos)]
    one = head_products if of_heads else rerun_products
    products = sum(one(cfg, layer, changed) for layer in range(cfg.n_layers) for changed in cells)
    times = cfg.n_heads if of_heads else 1
    return Work(times * products, cfg.n_layers * block_weights(cfg))


def edge_products(cfg, n_pos, reader):
    """The multiplications after one input of a node, such as "L1H3.q", has another value."""
    if reader == "logits":
        return 0
    everywhere = [True] * n_pos
    layer = int(re.match(r"L(\d+)", reader)[1])
    wanted = read_positions(cfg, layer, n_pos)
    later = rerun_products(cfg, layer + 1, everywhere)
    if reader.endswith(".mlp"):
        return len(wanted) * mlp_weights(cfg) + later

    # one head's projection, its scores (not for a value) and its means, what follows from its z
    n_inputs = len(wanted) if reader.endswith(".q") else n_pos
    pairs = sum(query + 1 for query in wanted)
    n_factors = 1 if reader.endswith(".v") else 2
    own = n_inputs * cfg.d_model * cfg.d_head + n_factors * pairs * cfg.d_head
    return own + head_products(cfg, layer, everywhere)


def path_matrix_work(cfg, n_pos):
    """Path patching from every head to every later head's values, with the other heads frozen.

    For each sender, the MLPs from its block on and the values of all later blocks; for each pair of
    heads, the receiver's mean of its values, and everything after it.
    """
    total = 0
    for layer in range(cfg.n_layers - 1):
        n_mlps = cfg.n_layers - 1 - layer  # from its own block to the one before the last
        sender = n_pos * (cfg.d_head * cfg.d_model + n_mlps * mlp_weights(cfg))
        for later in range(layer + 1, cfg.n_layers):
            sender += sum(edge_products(cfg, n_pos, f"L{later}H{head}.v")
                          for head in range(cfg.n_heads))
        total += cfg.n_heads * sender
    return Work(total, cfg.n_layers * block_weights(cfg))


def gradient_work(cfg, n_pos, n_runs=1):
    """n_runs runs of one prompt up to a metric at the last position, and one gradient at all
    activations (not at the weights): each pass reads all weights of the blocks."""
    run = rerun_products(cfg, 0, [True] * n_pos)
    pairs = (cfg.n_layers - 1) * n_pos * (n_pos + 1) // 2 + n_pos
    backward = run + pairs * pair_products(cfg)  # both factors of a pair have a gradient
    return Work(n_runs * run + backward, (n_runs + 1) * cfg.n_layers * block_weights(cfg))


def acdc_work(cfg, batch, n_pos, circuit):
    """ACDC that ended with a Circuit: every edge into a node that is still read was tested."""
    still_read = {"logits", *circuit.nodes()}
    total = 0
    for reader, n_writers in zip(circuit.readers, circuit.exists.sum(0).tolist(), strict=True):
        if node_of_input(reader) in still_read:
            total += n_writers * edge_products(cfg, n_pos, reader)
    return Work(batch * total)
