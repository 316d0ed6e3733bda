"""Small bugs planted in the library, each of which the tests of its module must catch.

    python tests/mutants.py                    # all of them, one after another
    python tests/mutants.py metrics rerun      # those of some modules
    python tests/mutants.py --jobs 2           # several at once

A mutant is a module, a piece of its text, what stands there instead, and the bug that this makes: a
wrong sign, another axis, an off-by-one, a missing square root, a stale cache, swapped arguments. It
is applied to a copy of the tree, and the fast tests of the module run there until the first one
fails. A mutant that no test catches is listed, and the program exits with 1: a test is missing, or
the edit changes nothing that anyone could see. Run it before and after tests are cut.

Source: DeMillo, Lipton & Sayward 1978 (mutation testing)
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 300  # the most that the tests of one mutant may take; a bug that hangs is a bug found


@dataclass(frozen=True)
class Mutant:
    """One planted bug. tests: the names of the test files, without "test_"; the module's unless
    given."""

    module: str
    old: str
    new: str
    bug: str
    tests: tuple = ()

    def apply(self, root):
        """Edits the module in a copy of the tree. Raises ValueError where the text is not there
        exactly once: the code has changed, and the mutant must follow it."""
        path = root / f"{self.module}.py"
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.module}: {self.old!r} is there {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")

    def test_files(self):
        """The paths of the tests that must catch it."""
        return [f"tests/test_{name}.py" for name in self.tests or (self.module,)]


MUTANTS = [
    # hooks
    Mutant("hooks", "[other for other in self.listeners if other is not listener]", "[]",
           "the end of one listener ends all of them"),
    Mutant("hooks", "if 0 in tensor.stride():", "if False:",
           "an expanded view is handed out: all rows are one memory"),
    Mutant("hooks", "return HookPoint(self.axes)  # a copy of a model has no listeners",
           "return self", "a copy of a model shares the points, and the listeners, of the model"),
    Mutant("hooks", "for listener in tuple(self.listeners):", "for listener in self.listeners:",
           "a hook that ends another one acts on the forward that is under way"),
    Mutant("hooks", "if tensor.is_inference():", "if False:",
           "inference mode is not refused"),
    Mutant("hooks", "if tensor._version != version:", "if False:",
           "an edit in place passes unseen"),
    Mutant("hooks", " or changed.dtype != tensor.dtype:", ":",
           "a hook may return another dtype"),
    Mutant("hooks", "if changed.shape != tensor.shape or", "if",
           "a hook may return another shape"),
    Mutant("hooks", "stack.callback(points[name].add(fn))", "points[name].add(fn)",
           "hooks stay after their context"),
    Mutant("hooks", "            tensor = tensor.detach()\n", "",
           "what is cached drags its graph along", ("activation_cache",)),
    Mutant("hooks", "pos=pos_slice)", "batch=pos_slice)",
           "pos_slice cuts the batch", ("activation_cache",)),
    Mutant("hooks", "tensor.view_as(tensor) if tensor.requires_grad",
           "tensor if tensor.requires_grad",
           "two points that hold one tensor are given one another's gradient"),
    Mutant("hooks", "with torch.enable_grad():", "with contextlib.nullcontext():",
           "gradient_cache finds nothing under no_grad"),
    Mutant("hooks", "            value = metric_fn(logits)\n",
           "                value = metric_fn(logits)\n",
           "what the metric runs besides is captured too"),
    Mutant("hooks", "value.sum(), live.values()", "value.mean(), live.values()",
           "a metric a row is differentiated as its mean"),
    Mutant("hooks", "if value.requires_grad:", "if True:",
           "a metric that is a constant breaks gradient_cache"),
    Mutant("hooks", "allow_unused=True, materialize_grads=True", "allow_unused=True",
           "points that the metric does not reach have None for a gradient"),
    Mutant("hooks", "for name, point in points.items() if not point.is_large]",
           "for name, point in points.items()]",
           "the large points are kept without being named"),
    Mutant("hooks", "chosen = [name for name in points if name in set(names)]", "chosen = names",
           "a name that is given twice is told twice"),
    Mutant("hooks", 'or name.startswith("blocks.0.")}', 'or name.startswith("blocks.")}',
           "the table repeats every block"),

    # activation_cache
    Mutant("activation_cache", "    __str__ = ValueError.__str__", "    pass",
           "the message about a missing name stands in quotes"),
    Mutant("activation_cache", "if layer is not None:\n            raise UserError(",
           "if layer:\n            raise UserError(",
           "a name that is one place takes layer 0"),
    Mutant("activation_cache", 'module not in ("ln1", "ln2"):',
           'module not in ("ln1", "ln2", None):',
           "a scale without its LayerNorm is looked up as if there were one called None"),
    Mutant("activation_cache", 'IN_MLP = {"pre", "post"}', 'IN_MLP = {"pre"}',
           "the neurons' activations are looked for in the block instead of in its MLP"),
    Mutant("activation_cache", 'return f"L{layer}H{head}"', 'return f"L{head}H{layer}"',
           "a head's label has layer and head swapped", ("residual_stream_analysis",)),
    Mutant("activation_cache", 'axes.replace("query_pos", "pos")', 'axes.replace("key_pos", "pos")',
           "a choice of positions cuts the keys of a pattern instead of its queries"),
    Mutant("activation_cache", "if not -size <= choice < size:", "if not -size <= choice <= size:",
           "the position past the end is an empty slice instead of an error"),
    Mutant("activation_cache", "choice + 1 or None)", "choice + 1)",
           "the last position, as -1, is an empty slice"),
    Mutant("activation_cache", "return tensor.clone()", "return tensor",
           "a part is a view that keeps the whole alive and follows its edits"),
    Mutant("activation_cache", "default=-1) + 1", "default=-1)",
           "a cache knows one layer too few"),
    Mutant("activation_cache", "layer < self.n_layers:", "layer <= self.n_layers:",
           "the layer past the end wraps around to the first"),
    Mutant("activation_cache", "storages[storage.data_ptr()]", "storages[id(tensor)]",
           "storage that two activations share is counted twice"),
    Mutant("activation_cache", "for layer in range(self.n_layers)])",
           "for layer in reversed(range(self.n_layers))])",
           "a stack begins with the last layer"),
    Mutant("activation_cache", '"batch": batch, "pos": pos, "head": head}',
           '"batch": head, "pos": pos, "head": batch}',
           "a slice chooses heads by the batch and rows by the head"),
    Mutant("activation_cache", "{name: t.to(device) for", "{name: t for",
           "to() moves nothing"),

    # attention
    Mutant("attention", "/ math.sqrt(self.d_head)", "/ self.d_head",
           "scores are divided by d_head, not by its root"),
    Mutant("attention", "self.hook_attn_scores(scores.masked_fill(~visible, -math.inf))",
           "self.hook_attn_scores(scores)",
           "the explicit lines look ahead"),
    Mutant("attention", "scores.softmax(-1)", "scores.softmax(-2)",
           "the softmax runs over queries"),
    Mutant("attention", "return key <= query", "return key <= query + 1",
           "the causal mask lies one position too far"),
    Mutant("attention", "return (key <= query) &", "return (key <= query + 1) &",
           "with a key mask, the causal mask lies one position too far"),
    Mutant("attention", " | (key == query))", ")",
           "a hidden position sees nothing, not even itself"),
    Mutant("attention", "torch.arange(n_keys - n_queries, n_keys, ", "torch.arange(n_queries, ",
           "the queries are taken for the first positions"),
    Mutant("attention", "is_causal = n_queries == n_keys and key_mask is None",
           "is_causal = n_queries == n_keys",
           "the fused kernel forgets the padding of a whole text"),
    Mutant("attention", "(n_queries == 1 and key_mask is None)", "(n_queries == 1)",
           "the fused kernel forgets the padding while decoding"),
    Mutant("attention", "F.dropout(pattern, self.dropout, self.training)",
           "F.dropout(pattern, self.dropout)",
           "whoever looks at a pattern of a model in eval() sees dropout act"),
    Mutant("attention", "dropout = self.dropout if self.training else 0.0",
           "dropout = self.dropout", "dropout acts in eval()"),
    Mutant("attention", "return result.sum(2) + self.b_O", "return result.sum(2)",
           "b_O is forgotten while somebody listens to hook_result"),
    Mutant("attention", "out if self.b_heads_out is None else out.add_(self.b_heads_out)", "out",
           "b_O is forgotten"),
    Mutant("attention", "self.hook_q(q), self.hook_k(k), self.hook_v(v)",
           "self.hook_k(q), self.hook_q(k), self.hook_v(v)",
           "hook_q sees the keys and hook_k the queries"),
    Mutant("attention", "(k_input, self.W_K, self.b_K)", "(q_input, self.W_K, self.b_K)",
           "keys are read from the queries' input where inputs are apart"),
    Mutant("attention", "return self.W_QKV.unflatten(1, (3, self.n_heads, self.d_head))[:, which]",
           "return self.W_QKV.unflatten(1, (self.n_heads, 3, self.d_head))[:, :, which]",
           "W_Q, W_K and W_V are taken from each other's columns"),
    Mutant("attention", "b_K = property(lambda self: self.bias_by_head(1)",
           "b_K = property(lambda self: self.bias_by_head(0)",
           "b_K is b_Q"),
    Mutant("attention", "if end > self.n_ctx:", "if end >= self.n_ctx:",
           "a past is full one position too early"),
    Mutant("attention", "self.length = end\n", "self.length += 1\n",
           "a past of several tokens is overwritten by the next"),
    Mutant("attention", "return self.k[:, :end], self.v[:, :end], mask",
           "return self.k[:, :end], self.k[:, :end], mask",
           "a past gives its keys for its values"),

    # mlp
    Mutant("mlp", "CUBIC = 0.044715", "CUBIC = 0.04715", "a digit of GELU's constant is missing"),
    Mutant("mlp", "TWO_SQRT_2_OVER_PI = 2 * math", "TWO_SQRT_2_OVER_PI = math",
           "sigmoid(u) stands for sigmoid(2u)"),
    Mutant("mlp", "value=3 * c, out=buffer", "value=c, out=buffer",
           "GELU's derivative lacks the 3 of the cubic term"),
    Mutant("mlp", "if torch.is_grad_enabled():", "if False:",
           "GELU's second derivatives take the slope for a constant"),
    Mutant("mlp", "return s.mul_(x)", "return x.mul_(s)", "GELU overwrites its input"),
    Mutant("mlp", '{"gelu": gelu,', '{"gelu": F.gelu,', "the other form of GELU is used"),
    Mutant("mlp", "(resid @ self.W_in).add_(self.b_in)", "resid @ self.W_in",
           "b_in is forgotten"),
    Mutant("mlp", "return (post @ self.W_out).add_(self.b_out)", "return post @ self.W_out",
           "b_out is forgotten"),
    Mutant("mlp", "self.hook_post(self.activation(pre))", "self.activation(self.hook_post(pre))",
           "hook_post sees what is before the nonlinearity"),

    # transformer_block
    Mutant("transformer_block", "EPSILON = 1e-5", "EPSILON = 1e-6", "epsilon is not GPT-2's"),
    Mutant("transformer_block", "(centred.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt()",
           "centred.pow(2).mean(-1, keepdim=True).sqrt() + EPSILON",
           "epsilon is added to the root"),
    Mutant("transformer_block", "centred = resid - resid.mean(-1, keepdim=True)",
           "centred = resid - resid.mean(1, keepdim=True)",
           "LayerNorm takes the mean over positions"),
    Mutant("transformer_block",
           "self.hook_normalized(centred / self.hook_scale(scale)) * self.w + self.b",
           "self.hook_normalized(centred / self.hook_scale(scale) * self.w) + self.b",
           "hook_normalized sees the stream after the gain"),
    Mutant("transformer_block", "self.mlp(self.ln2(", "self.mlp(self.ln1(",
           "the MLP reads through ln1"),
    Mutant("transformer_block", "            mlp_out = self.mlp(self.ln2(self.hook_mlp_in(resid)))",
           "            resid = self.hook_mlp_in(resid)\n"
           "            mlp_out = self.mlp(self.ln2(resid))",
           "an edit of what the MLP reads stays in the stream"),
    Mutant("transformer_block", "resid = self.hook_resid_mid(resid)", "self.hook_resid_mid(resid)",
           "edits of resid_mid are lost"),
    Mutant("transformer_block", "resid = resid + self.hook_mlp_out(", "resid = self.hook_mlp_out(",
           "the MLP overwrites the stream"),
    Mutant("transformer_block", "self.hook_attn_out(self.dropout(attn_out))",
           "self.hook_attn_out(attn_out)",
           "dropout is forgotten on attention's output", ("model",)),
    Mutant("transformer_block", "self.hook_mlp_out(self.dropout(mlp_out))",
           "self.hook_mlp_out(mlp_out)",
           "dropout is forgotten on the MLP's output", ("model",)),
    Mutant("transformer_block", "return shared.unsqueeze(2) + (self.ln1.fused(per_head) "
           "- self.ln1.fused(resid).unsqueeze(2))", "return self.ln1.fused(per_head)",
           "edits at ln1 die while somebody listens to a split input"),
    Mutant("transformer_block", "self.ln1.fused(per_head) -", "per_head -",
           "a split input is not normalised"),
    Mutant("transformer_block", "(self.hook_q_input, self.hook_k_input,",
           "(self.hook_k_input, self.hook_q_input,",
           "hook_q_input is what the keys read"),

    # model
    Mutant("model", "for layer in range(start, stop):", "for layer in range(stop):",
           "a restart runs the blocks before it again"),
    Mutant("model", "if not 0 <= start <= stop <=", "if not 0 <= start <=",
           "a way from layer 2 to layer 1 passes, and runs nothing"),
    Mutant("model", "None if past is None else past[layer])",
           "None if past is None else past[layer - start])",
           "a restart counts the pasts from where it starts"),
    Mutant("model", "return self.dropout(resid)", "return resid",
           "dropout is forgotten on the embedding"),
    Mutant("model", "normalized = self.ln_final(resid)", "normalized = resid",
           "the final LayerNorm is forgotten"),
    Mutant("model", "normalized = normalized[..., positions, :]",
           "normalized = normalized[:, positions]",
           "logits at some positions are those of some rows, where there are leading axes"),
    Mutant("model", "std / math.sqrt(2 * self.cfg.n_layers)", "std / math.sqrt(self.cfg.n_layers)",
           "what writes into the stream starts too large by sqrt(2)"),
    Mutant("model", 'leaf in ("W_heads_out", "W_out")', 'leaf in ("W_heads_out",)',
           "the MLPs write as if they were alone"),
    Mutant("model", 'weight.fill_(1.0 if leaf == "w" else 0.0)', "weight.fill_(0.0)",
           "LayerNorms start with a gain of zero"),
    Mutant("model", "normal_(0.0, scale, generator=generator)", "normal_(0.0, scale)",
           "initial weights come from the global generator"),
    Mutant("model", "self.W_E.new_zeros(self.cfg.d_vocab) if bias is None else bias",
           "self.W_E.new_zeros(self.cfg.d_vocab)", "b_U reads as zeros"),
    Mutant("model", "torch.stack(weights)[: len(self.blocks)]", "torch.stack(weights)",
           "a model without layers has the weights of one"),
    Mutant("model", 'b_V = stacked("attn", "b_V"', 'b_V = stacked("attn", "b_K"',
           "the stacked b_V is b_K"),
    Mutant("model", "torch.stack(weights)[", "torch.stack(weights).detach()[",
           "stacked weights pass no gradient on"),
    Mutant("model", "if n_tokens > n_ctx:", "if n_tokens >= n_ctx:",
           "the longest text that fits is refused"),
    Mutant("model", "positions.max() >= n_ctx:", "positions.max() > n_ctx:",
           "the position past the context is looked up"),

    # embeddings
    Mutant("embeddings", "highest >= d_vocab:", "highest > d_vocab:",
           "the id past the vocabulary is looked up"),
    Mutant("embeddings", "if lowest < 0 or highest", "if highest",
           "a negative id counts from the end", ("model",)),
    Mutant("embeddings", "cfg.init_scale * math.sqrt(2) * waves", "cfg.init_scale * waves",
           "fixed positions start smaller than learned ones by sqrt(2)"),
    Mutant("embeddings", "10_000 ** (pair / d_model)", "10_000 ** (2 * pair / d_model)",
           "the wavelengths grow twice as fast"),
    Mutant("embeddings", "[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]",
           "sine and cosine are swapped"),
    Mutant("embeddings", "persistent=False", "persistent=True",
           "the fixed table lies in every checkpoint"),
    Mutant("embeddings", "return F.embedding(positions, self.W_pos)",
           "return self.W_pos[: positions.shape[-1]]",
           "positions that are given are ignored", ("model",)),
    Mutant("embeddings", "F.linear(resid, rows, self.b_U)", "F.linear(resid, rows)",
           "b_U is forgotten"),
    Mutant("embeddings", "return W_E.T if", "return W_E.T.detach() if",
           "a tied table gets no gradient from its use as W_U"),
    Mutant("embeddings", "bias = self.b_U[tokens]", "bias = self.b_U[tokens] * 0",
           "b_U is forgotten where some logits alone are asked for", ("model",)),

    # residual_stream_analysis
    Mutant("residual_stream_analysis", "model.blocks[: layer + mlp_input]", "model.blocks[:layer]",
           "what an MLP reads lacks the attention of its own block"),
    Mutant("residual_stream_analysis", "model.cfg.attn_only or index == layer:",
           "model.cfg.attn_only:",
           "what an MLP reads has its own output in it"),
    Mutant("residual_stream_analysis", "biases = biases + block.attn.b_O.detach()",
           "biases = biases.clone()", "b_O is no part of the biases"),
    Mutant("residual_stream_analysis", "biases = biases + block.mlp.b_out.detach()",
           "biases = biases.clone()", "b_out is no part of the biases"),
    Mutant("residual_stream_analysis", "(z * reads).sum(-1)", "(z * reads.abs()).sum(-1)",
           "what heads write along a direction loses its sign"),
    Mutant("residual_stream_analysis", 'cache.get(("resid_pre", layer))',
           'cache.get(("resid_post", layer))', "writes are compared with the stream a block later"),
    Mutant("residual_stream_analysis", "if (error > most * size).any():",
           "if (error > most * size).all():",
           "writes that miss the stream at one position alone pass"),
    Mutant("residual_stream_analysis",
           "size = size + stream.to(exact).norm(dim=-1) * direction.norm(dim=-1)",
           "size = size + 0", "rounding along a direction that nothing has is taken for an edit"),
    Mutant("residual_stream_analysis", 'rows.append(cache["resid_mid", index])',
           'rows.append(cache["resid_post", index])',
           "the stream inside a block is that after it"),
    Mutant("residual_stream_analysis", "norm_before(model, layer).fused(stack)",
           "norm_before(model, 0).fused(stack)",
           "rows are read through the first LayerNorm"),
    Mutant("residual_stream_analysis", "stack = (stack - stack.mean(-1, keepdim=True)) / scale",
           "stack = stack / scale", "the mean of a write is not taken away"),
    Mutant("residual_stream_analysis", 'cache["scale", layer, "ln2" if mlp_input else "ln1"]',
           'cache["scale", layer, "ln1"]', "what an MLP reads is divided by ln1's scale"),
    Mutant("residual_stream_analysis", "model.blocks[layer].ln2 if mlp_input else",
           "model.blocks[layer].ln1 if mlp_input else", "an MLP reads with ln1's gain"),
    Mutant("residual_stream_analysis", "norm.b.detach().expand_as", "norm.w.detach().expand_as",
           "the row of LayerNorm's bias is its gain"),
    Mutant("residual_stream_analysis", "centred = weighted - weighted.mean(-1, keepdim=True)",
           "centred = weighted", "a direction before LayerNorm reads the mean of the stream"),
    Mutant("residual_stream_analysis", "return shares / resid.pow(2).sum(-1), labels",
           "return shares / resid.norm(dim=-1), labels",
           "the norm budget is divided by the length, not by its square"),
    Mutant("residual_stream_analysis", "/ unit[0, ..., 0].numel()", "/ len(unit)",
           "the cosine is averaged over the number of rows"),
    Mutant("residual_stream_analysis", "torch.special.entr(shares).sum(-1).exp()",
           "torch.special.entr(shares).sum(-1)", "the effective rank is an entropy"),
    Mutant("residual_stream_analysis", "power = torch.linalg.svdvals(matrix).pow(2)",
           "power = torch.linalg.svdvals(matrix)",
           "the participation ratio is that of the singular values, unsquared"),
    Mutant("residual_stream_analysis", 'else embed + cache["pos_embed"]', "else embed",
           "without layers the stream has no positions"),
    Mutant("residual_stream_analysis", "layer = n_layers if layer == -1 else layer",
           "layer = n_layers - 1 if layer == -1 else layer",
           "the last stream is that before the last block"),

    # logit_lens
    Mutant("logit_lens", "kl_divergence(logits[-1:], logits)}",
           "kl_divergence(logits, logits[-1:])}",
           "the lens's KL runs the other way round"),
    Mutant("logit_lens", "torch.special.entr(probs).sum(-1)", "torch.special.entr(probs).mean(-1)",
           "the entropy is a mean over the vocabulary"),
    Mutant("logit_lens", "(~(logits <= own)).sum(-1)", "(logits >= own).sum(-1)",
           "the likeliest token has rank 1"),
    Mutant("logit_lens", "(~(logits <= own)).sum(-1)", "(logits > own).sum(-1)",
           "a target whose logit is NaN is the likeliest"),
    Mutant("logit_lens", "= probs.topk(top_k)", "= logits.topk(top_k)",
           "top_probs are logits"),
    Mutant("logit_lens", "targets[:, choose_positions(pos, n_all)]", "targets[:, : shape[1]]",
           "targets at some positions are the first ones"),
    Mutant("logit_lens", "return resid + resid @ self.A[row] + self.b[row]",
           "return resid @ self.A[row] + self.b[row]",
           "a fresh tuned lens is not the logit lens"),
    Mutant("logit_lens", "resid @ self.A[row] +", "resid @ self.A[row].T +",
           "the tuned lens's map is transposed"),
    Mutant("logit_lens", "row = self.labels.index(label)", "row = 0",
           "every row of a tuned lens uses the first map"),
    Mutant("logit_lens", "    model.eval()\n", "", "a lens is fitted under dropout"),
    Mutant("logit_lens", "model.train(was_training)", "model.train()",
           "fitting a lens leaves the model in training mode"),
    Mutant("logit_lens", "zip(stack[:-1], labels[:-1]", "zip(stack[1:], labels[:-1]",
           "each row of a lens is fitted to the stream after it"),
    Mutant("logit_lens", "loss = kl_divergence(logits, said)", "loss = kl_divergence(said, logits)",
           "a lens is fitted to the other KL"),
    Mutant("logit_lens", "loss.backward(inputs=list(lens.parameters()))", "loss.backward()",
           "fitting a lens leaves gradients in the model"),
    Mutant("logit_lens", "weight_decay=0.0", "weight_decay=0.1", "the lens's weights decay"),

    # weight_circuits
    Mutant("weight_circuits", "    b += layer_norm.b @ W\n", "", "folding loses LayerNorm's bias"),
    Mutant("weight_circuits", "    W *= layer_norm.w[:, None]\n", "",
           "folding loses LayerNorm's gain"),
    Mutant("weight_circuits", "W -= W.mean(0)", "W -= W.mean(1, keepdim=True)",
           "folding centres the readers along their outputs"),
    Mutant("weight_circuits", "fold_(block.ln2, block.mlp", "fold_(block.ln1, block.mlp",
           "folding moves ln1 into the MLP"),
    Mutant("weight_circuits", '"W_out", "b_out")', '"W_out")', "b_out is not centred"),
    Mutant("weight_circuits", "in writers:\n            weight -= weight.mean(-1, keepdim=True)",
           "in writers:\n            weight -= weight.mean(0, keepdim=True)",
           "writers are centred along what they read"),
    Mutant("weight_circuits",
           "new.unembedding.parameters():\n            weight -= weight.mean(-1, keepdim=True)",
           "new.unembedding.parameters():\n            weight -= weight.mean(0, keepdim=True)",
           "W_U is centred along d_model"),
    Mutant("weight_circuits", '"hd,hdm->m", attn.b_V', '"hd,hdm->m", attn.b_K',
           "the keys' biases are moved into b_O"),
    Mutant("weight_circuits", "attn.b_V.zero_()", "pass",
           "the values' biases count twice"),
    Mutant("weight_circuits", "return new.train(model.training)", "return new",
           "a new model is in training mode"),
    Mutant("weight_circuits", "min(old.cfg.n_ctx, 64)", "min(old.cfg.n_ctx, 8)",
           "drift looks at the first 8 positions alone"),
    Mutant("weight_circuits", "logits.append(model.eval()(", "logits.append(model(",
           "dropout is measured as drift"),
    Mutant("weight_circuits", "(before - after).abs().max().item()",
           "(before - after).abs().mean().item()", "the drift of logits is a mean"),
    Mutant("weight_circuits", "after.log_softmax(-1)).abs().max()", "after.log_softmax(-1)).max()",
           "a drift downwards is not seen"),
    Mutant("weight_circuits", "FactoredMatrix(self.B.mT, self.A.mT)",
           "FactoredMatrix(self.A.mT, self.B.mT)", "the transpose keeps the order of the factors"),
    Mutant("weight_circuits", "self.core()[1].norm(dim=(-2, -1))", "self.core()[1].norm()",
           "the norm of a batch of products is one number"),
    Mutant("weight_circuits", "Q_B @ Vh.mT", "Q_B @ Vh", "V of the factored SVD is transposed"),
    Mutant("weight_circuits", "eigvals(self.B @ self.A)", "eigvals(self.A @ self.B)",
           "eigenvalues are those of the whole product, zeros and their rounding too"),
    Mutant("weight_circuits", "return weighted - weighted.mean(-2, keepdim=True)",
           "return weighted", "a circuit reads the mean of the stream"),
    Mutant("weight_circuits", "read_through(block.ln1, block.attn.W_K).mT",
           "read_through(block.ln1, block.attn.W_Q).mT", "the QK circuit has W_Q for W_K"),
    Mutant("weight_circuits", "read_through(block.ln1, block.attn.W_V)", "block.attn.W_V",
           "the OV circuit reads without LayerNorm's gain"),
    Mutant("weight_circuits", "    W_U = read_through(model.ln_final, model.W_U)",
           "    W_U = model.W_U", "copying is judged without the final LayerNorm's gain"),
    Mutant("weight_circuits", 'reads.T if kind == "K"', 'reads.T if kind == "Q"',
           "Q- and K-composition are swapped"),
    Mutant("weight_circuits", "for layer in range(later):", "for layer in range(later + 1):",
           "heads of one layer compose"),
    Mutant("weight_circuits", "- null.mean()) / null.std()", "- null.mean()) / null.var()",
           "z is divided by the variance"),
    Mutant("weight_circuits", '(n_draws, cfg.d_model - (cfg.norm != "none"), cfg.d_head)',
           "(n_draws, cfg.d_model, cfg.d_head)",
           "the null forgets that LayerNorm takes a dimension"),
    Mutant("weight_circuits", "circuits.B - circuits.B.mean(-1, keepdim=True)", "circuits.B",
           "composition counts a mean that nobody reads"),
    Mutant("weight_circuits", "(one.norm() * other.norm())", "(one.norm() + other.norm())",
           "composition is divided by a sum of norms"),
    Mutant("weight_circuits", "written[i].abs().argmax()", "written[i].argmax()",
           "the sign of a direction is that of its highest logit"),

    # probing
    Mutant("probing", "fit_logistic(X[~held_out], y[~held_out], l2)", "fit_logistic(X, y, l2)",
           "a probe is judged on what it was fitted to"),
    Mutant("probing", "names, index = index_groups(groups, n)",
           "names, index = index_groups(None, n)",
           "groups stand on both sides"),
    Mutant("probing", "    folds = assign_folds(groups, len(y), n_folds, seed)\n",
           "    folds = assign_folds(groups, len(y), n_folds, seed)\n"
           "    X = (X - X.mean(0)) / X.std(0)\n",
           "features are standardised with the test side"),
    Mutant("probing", "X.mean(0), X.std(0, correction=0)", "X.mean(0), X.std(0, correction=1) * 2",
           "features are scaled to a half"),
    Mutant("probing", "torch.where(scale > 1e-12, scale, torch.ones_like(scale))",
           "scale", "a constant feature makes a probe NaN"),
    Mutant("probing", "l2 / 2 * W.pow(2)", "l2 * W.pow(2)", "the penalty is twice as large"),
    Mutant("probing", "return self.accuracies.mean().item()", "return self.accuracies.max().item()",
           "the accuracy is that of the luckiest fold"),
    Mutant("probing", "return self.classes[self.logits(X).argmax(-1)]",
           "return self.logits(X).argmax(-1)", "a probe predicts columns, not labels"),
    Mutant("probing", "[order.argsort()]", "[order]",
           "control labels are those of other types, so classes lose their shares"),
    Mutant("probing", "counts[order].cumsum(0) - within * counts[order]", "order + within",
           "control labels forget how frequent a type is"),
    Mutant("probing", "while len(labels.unique()) < 2:", "for _ in range(1):",
           "a control task may have one class only"),
    Mutant("probing", "return self.task - self.control", "return self.control - self.task",
           "selectivity has the wrong sign"),
    Mutant("probing", "bits = ends[0] * math.log2(n_classes)", "bits = 0.0",
           "the first block is sent for nothing"),
    Mutant("probing", "X[:start], target[:start]", "X[:end], target[:end]",
           "the code of a block has seen it"),
    Mutant("probing", "target[start:end, None]).sum().item() / math.log(2)",
           "target[start:end, None]).sum().item()", "a description length is in nats"),
    Mutant("probing", "share = n_classes / (start + n_classes)",
           "share = n_classes / (end + n_classes)",
           "the uniform guess knows how long its block is"),
    Mutant("probing", "names, index = index_groups(groups, len(y))",
           "names, index = index_groups(None, len(y))",
           "half a group is sent before the other half"),
    Mutant("probing", "return self.entropy_bits / self.bits",
           "return self.uniform_bits / self.bits",
           "the compression of the entropy is that of the uniform code"),
    Mutant("probing", "torch.arange(len(y))[:, None]", "torch.arange(y.shape[1])[None]",
           "the groups of a sweep are the positions, not the texts"),
    Mutant("probing", "fresh = GPT(model.cfg, seed).to(model.W_E).eval()", "fresh = model",
           "the untrained baseline is the trained model"),
    Mutant("probing", "return activation - (found", "return activation + (found",
           "erasing doubles what it should take away"),
    Mutant("probing", "@ basis / scale  # [n, d]", "@ basis  # [n, d]",
           "erasure forgets to whiten"),
    Mutant("probing", "(basis * scale @ U).T", "(basis / scale @ U).T",
           "erasure writes in the whitened basis"),
    Mutant("probing", "varies = variance > 1e-12 * variance[-1]", "varies = variance > -1",
           "erasure divides by a variance of zero"),
    Mutant("probing", "control_task_labels(types, y, seed=seed + draw)",
           "control_task_labels(types, y, seed=seed)", "all random erasures are one"),
    Mutant("probing", "after = fit_probe(erasing(X, y)(X, None), y, groups)",
           "after = fit_probe(X, y, groups)", "the accuracy after an erasure is that before it"),
]


def is_caught(mutant):
    """Whether a test fails in a copy of the tree that has this bug."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        leave_out = shutil.ignore_patterns(".git", ".venv", "outputs", "data", "__pycache__")
        shutil.copytree(ROOT, root, ignore=leave_out)
        mutant.apply(root)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   *mutant.test_files()]
        try:
            ran = subprocess.run(command, cwd=root, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return True
    if ran.returncode not in (0, 1, 2):  # 2: the module can't even be imported
        raise RuntimeError(f"pytest itself failed for {mutant.bug}: {ran.stdout[-500:]!r}")
    return ran.returncode != 0


def main():
    """Plants the mutants, prints a line for each, and exits with 1 where one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="whose mutants to plant (none: all)")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once (default: 1)")
    args = parser.parse_args()
    chosen = [each for each in MUTANTS if not args.modules or each.module in args.modules]

    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, caught in zip(chosen, pool.map(is_caught, chosen), strict=True):
            print(f"{'caught' if caught else 'ALIVE '}  {mutant.module}: {mutant.bug}", flush=True)
            if not caught:
                survivors.append(mutant)

    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants are caught")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
