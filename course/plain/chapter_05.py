"""Chapter 5 as a learner would write it: the block and the model without hooks and padding."""

from mlp import gelu


def mlp_forward(self, resid):
    """The output of the MLP: each position alone, through d_mlp neurons.

    resid: [batch, pos, d_model], normalised. self.W_in: [d_model, d_mlp]; self.b_in: [d_mlp];
    self.W_out: [d_mlp, d_model]; self.b_out: [d_model]. Returns [batch, pos, d_model].
    """
    pre = resid @ self.W_in + self.b_in  # [batch, pos, d_mlp]
    post = gelu(pre)  # [batch, pos, d_mlp]
    return post @ self.W_out + self.b_out


def layer_norm(self, resid):
    """Each position's vector, centred, scaled to unit variance, then weighted and shifted.

    resid: [batch, pos, d_model]. self.w, self.b: [d_model]. self.epsilon, a small number, is added
    to the variance under the root. Returns the same shape.
    """
    centred = resid - resid.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)  # [batch, pos, 1]
    normalized = centred / (variance + self.epsilon).sqrt()
    return normalized * self.w + self.b


def block_forward(self, resid):
    """The stream after a block: attention adds to it, then the MLP, each from the normalised
    stream.

    resid: [batch, pos, d_model]. self.ln1, self.ln2 and self.mlp are called with a stream;
    self.attn with three, what q, k and v read: self.attn(x, x, x). Returns [batch, pos, d_model].
    """
    normalized = self.ln1(resid)
    resid = resid + self.attn(normalized, normalized, normalized)
    return resid + self.mlp(self.ln2(resid))


def run_blocks(self, resid, start=0, stop=None):
    """The stream after the blocks start, …, stop - 1; all of them by default.

    resid: [batch, pos, d_model], the stream before block `start`. self.blocks: a list of blocks,
    each called with a stream. Returns [batch, pos, d_model].
    """
    for block in self.blocks[start:stop]:
        resid = block(resid)
    return resid


def gpt_forward(self, tokens):
    """The whole model: tokens [batch, pos] -> logits [batch, pos, d_vocab].

    self.embed, self.run_blocks and self.unembed are its three parts.
    """
    resid = self.embed(tokens)  # [batch, pos, d_model]
    resid = self.run_blocks(resid)  # [batch, pos, d_model]
    return self.unembed(resid)


def count_parameters(n_layers, d_model, d_mlp, d_vocab, n_ctx):
    """The number of parameters of GPT-2, whose unembedding is the embedding, transposed.

    W_E and W_pos; in each block two LayerNorms, the weights and biases of q, k, v and the output,
    and the MLP's two matrices and biases; a last LayerNorm. Returns an int.
    """
    norm = 2 * d_model
    attention = 4 * d_model * d_model + 4 * d_model
    mlp = 2 * d_model * d_mlp + d_mlp + d_model
    block = 2 * norm + attention + mlp
    return (d_vocab + n_ctx) * d_model + n_layers * block + norm


def fold_norm_weights(w, b, W, bias):
    """Fold LayerNorm's weight and shift into the linear map that reads its output.

    w, b: [d_model], LayerNorm's weight and shift. W: [d_model, d_out], bias: [d_out], of the map
    after it. Returns (folded_W, folded_bias), of the same shapes, such that
    normalized @ folded_W + folded_bias == (normalized * w + b) @ W + bias.
    """
    folded_W = w[:, None] * W
    folded_bias = b @ W + bias
    return folded_W, folded_bias


def fold_value_bias(b_V, W_O, b_O):
    """Fold the value biases of an attention layer into its output bias.

    b_V: [head, d_head]; W_O: [head, d_head, d_model]; b_O: [d_model]. Since the attention of a
    query sums to 1, a constant in all values reaches z unchanged. Returns [d_model].
    """
    written = b_V[:, None, :] @ W_O  # [head, 1, d_model]
    return written.sum((0, 1)) + b_O
