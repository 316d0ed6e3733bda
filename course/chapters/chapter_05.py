"""Chapter 5, the whole model: the MLP, LayerNorm, the block, and every parameter counted."""


import torch
import torch.nn.functional as F

from config import ModelConfig
from course.engine import page
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import (
    expect,
    expect_close,
    expect_equal,
    expect_shape,
    random,
    random_ids,
)
from course.engine.page import stated
from mlp import MLP
from model import GPT
from transformer_block import Block, LayerNorm

IMPORTS = ["import math", "import torch", "from mlp import gelu"]
CFG = ModelConfig(n_layers=3, n_heads=2, d_model=6, d_mlp=10, n_ctx=8, d_vocab=11)


def disturbed(module):
    """A module whose weights, biases and LayerNorms are all random: defaults hide mistakes."""
    with torch.no_grad():
        for seed, weight in enumerate(module.parameters()):
            weight.copy_(0.5 * random(*weight.shape, seed=seed) + (weight.ndim == 1))
    return module


# mlp_forward


def without_weights_only_the_bias_is_written(mlp_forward):
    """if W_out is 0, b_out is written at every position"""
    mlp = disturbed(MLP(CFG))
    mlp.W_out.data.zero_()
    out = mlp_forward(mlp, random(2, 5, 6))
    expect_close(out, mlp.b_out.expand(2, 5, 6), "the output", "batch pos d_model")


def each_neuron_reads_and_writes(mlp_forward):
    """it is gelu(resid @ W_in + b_in) @ W_out + b_out"""
    mlp, resid = disturbed(MLP(CFG)), random(2, 5, 6)
    pre = resid @ mlp.W_in + mlp.b_in
    want = F.gelu(pre, approximate="tanh") @ mlp.W_out + mlp.b_out
    expect_close(mlp_forward(mlp, resid), want, "the output", "batch pos d_model", tolerance=1e-5)


# layer_norm


def plain_norm():
    """A LayerNorm with weight 1 and shift 0."""
    norm = LayerNorm(6, epsilon=1e-5)
    with torch.no_grad():
        norm.w.fill_(1)
        norm.b.zero_()
    return norm


def a_constant_is_taken_off(layer_norm):
    """10 added to every dimension changes nothing"""
    norm, resid = plain_norm(), random(2, 5, 6)
    moved = (layer_norm(norm, resid + 10) - layer_norm(norm, resid)).abs().max()
    expect(moved < 1e-4, f"with 10 added to every dimension the output moves by {moved:.3g}: is "
                         "the mean over d_model subtracted?")


def each_position_has_variance_one(layer_norm):
    """each position's vector has mean 0 and mean square 1"""
    norm = plain_norm()
    out = layer_norm(norm, 3 * random(2, 5, 6) + 1)
    expect_close(out.mean(-1), torch.zeros(2, 5), "the mean", "batch pos", tolerance=1e-3,
                 ask="over d_model, for each position alone")
    expect_close(out.pow(2).mean(-1), torch.ones(2, 5), "the mean square", "batch pos",
                 tolerance=1e-3, ask="the variance is a mean over all d_model (not d_model - 1)")


def a_tiny_vector_stays_finite(layer_norm):
    """a vector of zeros gives b, not NaN; a tiny one is not scaled up to variance 1"""
    norm = disturbed(LayerNorm(6, epsilon=1e-5))
    zeros = layer_norm(norm, torch.zeros(1, 1, 6))
    is_nan = isinstance(zeros, torch.Tensor) and bool(zeros.isnan().any())
    expect_close(zeros, norm.b.expand(1, 1, 6), "the output for zeros", "batch pos d_model",
                 ask="is self.epsilon there?" if is_nan else "is b added at the end?")
    resid = 1e-3 * random(2, 5, 6)
    want = F.layer_norm(resid, (6,), norm.w, norm.b, 1e-5)
    expect_close(layer_norm(norm, resid), want, "the output for numbers near 0.001",
                 "batch pos d_model", ask="self.epsilon is added to the variance, under the root")


def weight_and_shift_come_last(layer_norm):
    """the normalised vector is multiplied by w, then b is added"""
    norm, resid = disturbed(LayerNorm(6, epsilon=1e-5)), random(2, 5, 6)
    want = F.layer_norm(resid, (6,), norm.w, norm.b, 1e-5)
    expect_close(layer_norm(norm, resid), want, "the output", "batch pos d_model")


def the_stream_is_left_as_it_was(layer_norm):
    """the stream that it reads does not change: the block still needs it"""
    resid = random(2, 5, 6)
    layer_norm(plain_norm(), resid)
    expect_close(resid, random(2, 5, 6), "the stream that went in", "batch pos d_model",
                 ask="is there a -= or /= on it?")


# block_forward


def block_with(*silent):
    """A block in which some parts write nothing."""
    block = disturbed(Block(CFG))
    for part in silent:
        for name, weight in getattr(block, part).named_parameters():
            if name in ("W_heads_out", "b_heads_out", "W_out", "b_out"):
                weight.data.zero_()
    return block


def silent_parts_leave_the_stream(block_forward):
    """if attention and MLP write nothing, the stream does not change"""
    block = block_with("attn", "mlp")
    resid = random(2, 5, 6)
    expect_close(block_forward(block, resid), resid, "the stream", "batch pos d_model",
                 ask="parts add to the stream, they do not replace it")


def attention_reads_the_normalised_stream(block_forward):
    """without the MLP it is resid + attention(ln1(resid))"""
    block, resid = block_with("mlp"), random(2, 5, 6)
    read = block.ln1(resid)
    expect_close(block_forward(block, resid), resid + block.attn(read, read, read), "the stream",
                 "batch pos d_model", ask="what does attention read, and what is added to what?")


def the_mlp_sees_what_attention_wrote(block_forward):
    """the MLP reads the stream to which attention has been added, through ln2"""
    block, resid = disturbed(Block(CFG)), random(2, 5, 6)
    read = block.ln1(resid)
    mid = resid + block.attn(read, read, read)
    expect_close(block_forward(block, resid), mid + block.mlp(block.ln2(mid)), "the stream",
                 "batch pos d_model", ask="one after the other, each with its own LayerNorm")


# run_blocks, gpt_forward


def all_blocks_in_order(run_blocks):
    """by default all blocks, from the first to the last"""
    model, resid = disturbed(GPT(CFG)), random(2, 5, 6)
    want = resid
    for block in model.blocks:
        want = block(want)
    expect_close(run_blocks(model, resid), want, "the stream", "batch pos d_model")


def stop_is_left_out(run_blocks):
    """start=1, stop=2 runs block 1 alone; stop=0 runs none"""
    model, resid = disturbed(GPT(CFG)), random(2, 5, 6)
    expect_close(run_blocks(model, resid, start=1, stop=2), model.blocks[1](resid),
                 "the stream of start=1, stop=2", "batch pos d_model")
    expect_close(run_blocks(model, resid, stop=0), resid, "the stream of stop=0",
                 "batch pos d_model", ask="0 is not None")


def a_run_can_be_cut_in_two(run_blocks):
    """stop=1, then start=1, runs all blocks"""
    model, resid = disturbed(GPT(CFG)), random(2, 5, 6)
    halfway = run_blocks(model, resid, stop=1)
    expect_close(run_blocks(model, halfway, start=1), run_blocks(model, resid),
                 "the stream after stop=1 and then start=1", "batch pos d_model")


def it_equals_the_three_parts(gpt_forward):
    """embed, all blocks, unembed"""
    model, tokens = disturbed(GPT(CFG)), random_ids(11, 2, 5)
    want = model.unembed(model.run_blocks(model.embed(tokens)))
    expect_close(gpt_forward(model, tokens), want, "the logits", "batch pos d_vocab")


def the_past_does_not_see_the_future(gpt_forward):
    """another last token does not change the logits before it"""
    model, tokens = disturbed(GPT(CFG)), random_ids(11, 2, 5)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 11
    moved = (gpt_forward(model, other) - gpt_forward(model, tokens)).abs().amax((0, 2))
    expect(bool((moved[:4] < 1e-5).all()), "another last token changes the logits of earlier ones "
                                           "by "
           f"{moved[:4].max():.3g}")
    expect(bool(moved[4] > 1e-5), "another last token does not change its own logits")


# count_parameters


def the_model_of_one_layer(count_parameters):
    """0, 1 and 3 layers, d_model 6, d_mlp 10, 11 tokens, context 8: as the library's models"""
    for n_layers in (0, 1, 3):
        cfg = ModelConfig(n_layers=n_layers, n_heads=2, d_model=6, d_mlp=10, n_ctx=8, d_vocab=11,
                          tie_embeddings=True)
        expect_equal(count_parameters(n_layers, 6, 10, 11, 8), GPT(cfg, seed=None).n_parameters,
                     f"the number of parameters with n_layers={n_layers}",
                     ask="the biases, and two numbers a dimension for each LayerNorm?")


def gpt2_small(count_parameters):
    """GPT-2 small has 124,439,808"""
    expect_equal(count_parameters(12, 768, 3072, 50257, 1024), 124_439_808,
                 "the number of GPT-2 small's parameters")


# fold_norm_weights, fold_value_bias


def the_folded_map_does_the_same(fold_norm_weights):
    """normalized @ folded_W + folded_bias equals the two steps"""
    w, b, W, bias = random(6), random(6, seed=1), random(6, 4, seed=2), random(4, seed=3)
    normalized = random(2, 5, 6, seed=4)
    folded = fold_norm_weights(w, b, W, bias)
    expect(isinstance(folded, (tuple, list)) and len(folded) == 2,
           "two tensors should be returned, (folded_W, folded_bias)")
    expect_shape(folded[0], (6, 4), "folded_W")
    expect_close(torch.zeros(6) @ folded[0] + folded[1], b @ W + bias, "the output for zeros",
                 "d_out", ask="LayerNorm's shift b goes through W, too")
    expect_close(normalized @ folded[0] + folded[1], (normalized * w + b) @ W + bias,
                 "the output", "batch pos d_out")


def what_is_folded_is_not_changed(fold_norm_weights):
    """the weights that are passed in do not change"""
    W, bias = random(6, 4, seed=2), random(4, seed=3)
    fold_norm_weights(random(6), random(6, seed=1), W, bias)
    expect(torch.equal(W, random(6, 4, seed=2)) and torch.equal(bias, random(4, seed=3)),
           "W or bias was written into; return new ones")


def a_bias_of_values_comes_through(fold_value_bias):
    """it is b_O plus what each head writes because of its b_V"""
    b_V, W_O, b_O = random(2, 3), random(2, 3, 6, seed=1), random(6, seed=2)
    expect_close(fold_value_bias(b_V, W_O, b_O), b_V[0] @ W_O[0] + b_V[1] @ W_O[1] + b_O,
                 "the folded bias", "d_model")


def attention_does_the_same(fold_value_bias):
    """attention with b_V = 0 and the folded b_O gives the same output as before"""
    block, resid = disturbed(Block(CFG)), random(2, 5, 6)
    attn = block.attn
    want = attn(resid, resid, resid).detach()
    with torch.no_grad():
        folded = fold_value_bias(attn.b_V.clone(), attn.W_O.clone(), attn.b_O.clone())
        expect(getattr(folded, "shape", None) == (6,), "the folded bias should be [d_model 6]")
        attn.b_V.zero_()
        attn.b_heads_out.copy_(folded)
    expect_close(attn(resid, resid, resid), want, "the output", "batch pos d_model")


EXERCISES = [
    Exercise(
        name="mlp_forward", source="mlp.MLP.forward", minutes=10, difficulty=1,
        needed_for="the block", task="Read, apply gelu, write. The library's gelu is imported.",
        checks=(without_weights_only_the_bias_is_written, each_neuron_reads_and_writes),
        hints=("A neuron reads one direction, a column of W_in, and writes one, a row of W_out.",
               "pre = resid @ W_in + b_in, post = gelu(pre).", "post @ self.W_out + self.b_out."),
        mistakes=(
            Mistake("without the nonlinearity", "gelu(pre)", "pre"),
            Mistake("without b_in", " + self.b_in", ""),
            Mistake("without b_out", " + self.b_out", ""),
            Mistake("when the stream is added here too", "+ self.b_out", "+ self.b_out + resid"),
            Mistake("with ReLU instead of GELU", "gelu(pre)", "pre.relu()"),
            Mistake("with the exact GELU instead of GPT-2's", "gelu(pre)",
                    "0.5 * pre * (1 + (pre / 2**0.5).erf())"),
        )),
    Exercise(
        name="layer_norm", source="transformer_block.LayerNorm.forward", minutes=15, difficulty=2,
        needed_for="the block", task="By hand, without F.layer_norm.",
        checks=(a_constant_is_taken_off, each_position_has_variance_one,
                a_tiny_vector_stays_finite, weight_and_shift_come_last,
                the_stream_is_left_as_it_was),
        hints=("Everything is over d_model, the last axis, with keepdim=True.",
               "The variance is the mean square of the centred vector.",
               "centred / (variance + self.epsilon).sqrt() * self.w + self.b."),
        mistakes=(
            Mistake("with the unbiased variance, divided by d_model - 1",
                    "centred.pow(2).mean(-1, keepdim=True)",
                    "centred.pow(2).sum(-1, keepdim=True) / (resid.shape[-1] - 1)"),
            Mistake("when the vector is not centred (RMSNorm)",
                    "resid - resid.mean(-1, keepdim=True)", "resid"),
            Mistake("without the root", "(variance + self.epsilon).sqrt()",
                    "(variance + self.epsilon)"),
            Mistake("when epsilon is added after the root", "(variance + self.epsilon).sqrt()",
                    "(variance.sqrt() + self.epsilon)"),
            Mistake("without epsilon", "(variance + self.epsilon).sqrt()", "variance.sqrt()"),
            Mistake("over positions instead of d_model", "resid.mean(-1,", "resid.mean(1,",
                    also=(("centred.pow(2).mean(-1,", "centred.pow(2).mean(1,"),)),
            Mistake("without w and b", "return normalized * self.w + self.b", "return normalized"),
            Mistake("with one mean and one variance for all positions",
                    "resid.mean(-1, keepdim=True)", "resid.mean()",
                    also=(("centred.pow(2).mean(-1, keepdim=True)", "centred.pow(2).mean()"),)),
            Mistake("when b is added before w multiplies", "normalized * self.w + self.b",
                    "(normalized + self.b) * self.w"),
        )),
    Exercise(
        name="block_forward", source="transformer_block.Block.forward", minutes=10, difficulty=1,
        needed_for="the model", task="Two lines of sums; the parts are the library's.",
        checks=(silent_parts_leave_the_stream, attention_reads_the_normalised_stream,
                the_mlp_sees_what_attention_wrote),
        hints=("Each part reads a normalised copy of the stream, and adds to the stream itself.",
               "x = self.ln1(resid), then resid = resid + self.attn(x, x, x).",
               "…and return resid + self.mlp(self.ln2(resid))."),
        mistakes=(
            Mistake("without the stream: attention replaces it", "resid = resid + self.attn(",
                    "resid = self.attn("),
            Mistake("when the MLP replaces the stream", "return resid + self.mlp(",
                    "return self.mlp("),
            Mistake("when attention and MLP read the same stream, in parallel",
                    "    resid = resid + self.attn(normalized, normalized, normalized)\n"
                    "    return resid + self.mlp(self.ln2(resid))\n",
                    "    return (resid + self.attn(normalized, normalized, normalized)\n"
                    "            + self.mlp(self.ln2(resid)))\n"),
            Mistake("when ln1 is used twice", "self.ln2(resid)", "self.ln1(resid)"),
            Mistake("when attention reads the stream without LayerNorm",
                    "normalized = self.ln1(resid)", "normalized = resid"),
            Mistake("with LayerNorm after the sum (post-LN, the original transformer)",
                    "    normalized = self.ln1(resid)\n"
                    "    resid = resid + self.attn(normalized, normalized, normalized)\n"
                    "    return resid + self.mlp(self.ln2(resid))\n",
                    "    resid = self.ln1(resid + self.attn(resid, resid, resid))\n"
                    "    return self.ln2(resid + self.mlp(resid))\n"),
            Mistake("when attention is added to the normalised stream",
                    "resid = resid + self.attn(", "resid = normalized + self.attn("),
            Mistake("when each part is added to the normalised copy, and not to the stream",
                    "resid = resid + self.attn(", "resid = normalized + self.attn(",
                    also=(("    return resid + self.mlp(self.ln2(resid))\n",
                           "    resid = self.ln2(resid)\n    return resid + self.mlp(resid)\n"),)),
            Mistake("when what attention wrote is lost: the MLP's output is added to the old "
                    "stream",
                    "    resid = resid + self.attn(normalized, normalized, normalized)\n"
                    "    return resid + self.mlp(self.ln2(resid))\n",
                    "    mid = resid + self.attn(normalized, normalized, normalized)\n"
                    "    return resid + self.mlp(self.ln2(mid))\n"),
        )),
    Exercise(
        name="run_blocks", source="model.GPT.run_blocks", minutes=10, difficulty=1,
        needed_for="restarting a run in the middle (chapters 8 to 10)",
        task="Write a loop that can begin and end at any block.",
        checks=(all_blocks_in_order, stop_is_left_out, a_run_can_be_cut_in_two),
        hints=("self.blocks can be sliced.", "self.blocks[start:None] goes to the end.",
               "for block in self.blocks[start:stop]: resid = block(resid)."),
        mistakes=(
            Mistake("when start is ignored", "self.blocks[start:stop]", "self.blocks[:stop]"),
            Mistake("when stop=0 counts as None", "self.blocks[start:stop]",
                    "self.blocks[start : stop or len(self.blocks)]"),
            Mistake("when block `stop` runs too", "self.blocks[start:stop]",
                    "self.blocks[start : None if stop is None else stop + 1]"),
            Mistake("without the last block", "self.blocks[start:stop]",
                    "self.blocks[start : -1 if stop is None else stop]"),
            Mistake("when every block reads the first stream, and not what the block before made",
                    "resid = block(resid)", "after = block(resid)",
                    also=(("return resid", "return after"),)),
            Mistake("when a block's result is added to the stream, which it already contains",
                    "resid = block(resid)", "resid = resid + block(resid)"),
            Mistake("from the last block to the first", "self.blocks[start:stop]",
                    "reversed(self.blocks[start:stop])"),
        )),
    Exercise(
        name="gpt_forward", source="model.GPT.forward", minutes=5, difficulty=1,
        needed_for="everything after it", task="Three calls in a row.",
        checks=(it_equals_the_three_parts, the_past_does_not_see_the_future),
        hints=("Embed the tokens, run the blocks, and unembed.",
               "self.embed(tokens) is the first.",
               "self.unembed(self.run_blocks(self.embed(tokens)))."),
        mistakes=(
            Mistake("without the blocks", "self.run_blocks(resid)", "resid"),
            Mistake("with probabilities instead of logits", "return self.unembed(resid)",
                    "return self.unembed(resid).softmax(-1)"),
            Mistake("without the last block", "self.run_blocks(resid)",
                    "self.run_blocks(resid, stop=len(self.blocks) - 1)"),
        )),
    Exercise(
        name="count_parameters", source=None, minutes=15, difficulty=2,
        needed_for="knowing what a model is made of", task="Count them on paper first, biases "
                                                           "included.",
        checks=(the_model_of_one_layer, gpt2_small),
        hints=("A LayerNorm has w and b: 2 d_model. There are two in a block and one at the end.",
               "q, k, v and the output are d_model x d_model with a bias of d_model each, "
               "whatever the number of heads.",
               "The MLP: d_model x d_mlp twice, and biases d_mlp and d_model."),
        mistakes=(
            Mistake("without the biases of attention", " + 4 * d_model\n", "\n"),
            Mistake("without any biases in the blocks", " + 4 * d_model\n", "\n",
                    also=((" + d_mlp + d_model", ""),)),
            Mistake("with three matrices for attention: the output has one, too",
                    "4 * d_model * d_model + 4 * d_model", "3 * d_model * d_model + 3 * d_model"),
            Mistake("when d_mlp counts as 4 d_model, which is GPT-2's habit and no law",
                    "2 * d_model * d_mlp + d_mlp + d_model", "8 * d_model**2 + 5 * d_model"),
            Mistake("when both biases of the MLP count as d_mlp: the second has d_model",
                    " + d_mlp + d_model", " + 2 * d_mlp"),
            Mistake("with one vector for each LayerNorm: it has two, w and b", "norm = 2 * d_model",
                    "norm = d_model"),
            Mistake("with a bias at the unembedding, which GPT-2 does not have",
                    "n_layers * block + norm", "n_layers * block + norm + d_vocab"),
            Mistake("without the last LayerNorm", "n_layers * block + norm", "n_layers * block"),
            Mistake("with one LayerNorm a block", "2 * norm + attention", "norm + attention"),
            Mistake("without the MLP's biases", " + d_mlp + d_model", ""),
            Mistake("when the unembedding is counted too", "(d_vocab + n_ctx)",
                    "(2 * d_vocab + n_ctx)"),
            Mistake("without positions", "(d_vocab + n_ctx)", "d_vocab"),
        )),
    Exercise(
        name="fold_norm_weights", source=None, minutes=15, difficulty=2,
        needed_for="reading weights (chapter 8)",
        task="Write (normalized * w + b) @ W + bias as one linear map of normalized.",
        checks=(the_folded_map_does_the_same, what_is_folded_is_not_changed),
        hints=("Multiply out: (normalized * w) @ W, and b @ W.",
               "normalized[i] * w[i] is multiplied by row i of W: scale the rows.",
               "w[:, None] * W, and b @ W + bias."),
        mistakes=(
            Mistake("when the shift b is dropped", "b @ W + bias", "bias"),
            Mistake("when b goes through the folded matrix: w counts twice", "b @ W + bias",
                    "b @ folded_W + bias"),
            Mistake("when the map's own bias is dropped", "b @ W + bias", "b @ W"),
            Mistake("when W is changed in place", "folded_W = w[:, None] * W",
                    "folded_W = W.mul_(w[:, None])",
                    also=(("    folded_bias = b @ W + bias\n", ""),
                          ("    folded_W = ", "    folded_bias = b @ W + bias\n    folded_W = "))),
        )),
    Exercise(
        name="fold_value_bias", source=None, minutes=10, difficulty=2,
        needed_for="reading OV circuits (chapters 8 and 12)",
        task="Why does it not depend on the pattern?",
        checks=(a_bias_of_values_comes_through, attention_does_the_same),
        hints=("A mean, weighted by attention, of a constant is the constant.",
               "Head h always adds b_V[h] to its z: it writes b_V[h] @ W_O[h].",
               'torch.einsum("hd,hdm->m", b_V, W_O) + b_O.'),
        mistakes=(
            Mistake("without b_O itself", " + b_O", ""),
            Mistake("with the mean over heads instead of the sum", "written.sum((0, 1))",
                    "written.mean((0, 1))"),
            Mistake("when every head's b_V goes through every head's W_O: b_V @ W_O pairs all",
                    "b_V[:, None, :] @ W_O", "b_V @ W_O"),
            Mistake("when each head adds b_O", "written.sum((0, 1)) + b_O",
                    "(written + b_O).sum((0, 1))"),
            Mistake("of the first head alone", "written.sum((0, 1))", "written[0, 0]"),
        )),
]

PREDICTIONS = [
    Prediction("GPT-2 small has 12 layers, d_model 768, d_mlp 3072, a vocabulary of 50,257 and a "
               "context of 1024, and its unembedding is tied to the embedding. How many million "
               "parameters are that, biases and LayerNorms included?",
               lambda: page.find_number(5, "GPT-2 small: {} parameters") / 1e6,
               "the chapter's block"),
    Prediction("What is the loss of a fresh model of 65 tokens on random text, in nats?",
               stated(5, "untrained: {} nats on noise"), "the chapter's block"),
]
