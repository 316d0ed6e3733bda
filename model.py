"""The GPT-2 model: embed, run the blocks, unembed; and every weight under its usual name.

    resid  = model.embed(tokens)                 # [batch, pos, d_model]
    resid  = model.run_blocks(resid)             # all blocks, or some of them: start=, stop=
    logits = model.unembed(resid)                # [batch, pos, d_vocab_out], usually d_vocab
    logits = model(tokens)                       # the three in a row

The three steps can be called separately, so a run can restart in the middle, from a residual stream
that was cached or edited. Activation patching, the logit lens and decoding all build on this.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: config.py, embeddings.py, transformer_block.py
Next: pretrained.py
Source: Radford et al. 2019; Elhage et al. 2021 (the residual stream as a shared channel)
"""

import math

import torch
from torch import nn

import formats
import pretrained
from embeddings import PositionEmbedding, TokenEmbedding, Unembedding, check_tokens
from hooks import HookedModule, HookPoint, elsewhere
from positions import as_integers, at_positions, check_key_mask, positions_in_prompt
from transformer_block import Block, make_norm
from utils import UserError, as_list, check_count, check_tensor, seeded_generator


def stacked(part, name, axes):
    """A property that stacks the weight `name` of every block's `part`: [layer, ...]."""

    def of_all_blocks(self):
        return self.stack_weights(part, name)

    return property(of_all_blocks, doc=f"[layer, {axes}], a differentiable copy")


class GPT(HookedModule):
    """A decoder-only transformer in GPT-2's form.

    cfg: a ModelConfig with d_vocab set. seed: for the initial weights, which are drawn on the CPU;
    None leaves the weights uninitialised, for a caller who loads them next. Raises UserError if
    d_vocab is missing.
    """

    def __init__(self, cfg, seed=0):
        super().__init__()
        if cfg.d_vocab is None:
            raise UserError("d_vocab is not set; give it the tokenizer's size, tokenizer.d_vocab")
        self.cfg = cfg
        self.token_embedding = TokenEmbedding(cfg)
        self.hook_embed = HookPoint("batch pos d_model")
        self.position_embedding = None
        if cfg.positions != "none":
            self.position_embedding = PositionEmbedding(cfg)
            self.hook_pos_embed = HookPoint("batch pos d_model")
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.ln_final = make_norm(cfg)
        self.unembedding = Unembedding(cfg)
        if seed is not None:
            self.init_weights_(seeded_generator(seed))

    @classmethod
    def from_pretrained(cls, name_or_folder, cache_dir=None):
        """Loads a published GPT-2, on the CPU, in float32 and evaluation mode, with dropout 0.

        name_or_folder: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, or owner/name of any
        GPT-2 on the hub (downloaded once, to cache_dir), or a folder with config.json and the
        weights in Hugging Face's layout.
        Raises UserError for another name or architecture and for broken files, NoNetwork if a
        download cannot be finished.
        """
        folder = pretrained.pretrained_folder(name_or_folder, cache_dir)
        cfg, tensors = pretrained.read_pretrained(folder)
        model = cls(cfg, seed=None)
        model.load_weights_(tensors, folder)
        return model.eval()

    def load_weights_(self, weights, origin):
        """Copies {name: tensor} into the model; the names must be exactly the model's own.

        origin: where the weights come from, for the UserError that lists names that are missing,
        unknown, or of another shape. When it is raised, nothing has been copied.
        """
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in weights]
        wrong += [f"{name} is unknown" for name in weights if name not in own]
        wrong += [f"{name} is {list(weights[name].shape)} instead of {list(own[name].shape)}"
                  for name in own if name in weights and weights[name].shape != own[name].shape]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{origin} is from another architecture: {'; '.join(wrong[:3])}{more}")
        self.load_state_dict(weights)

    def to_hf_state_dict(self):
        """The weights as {Hugging Face's name: tensor}, ready for its GPT2LMHeadModel.

        Raises UserError for a model that GPT-2's format cannot hold (attn_only, no norm, b_U, a
        d_head or d_vocab_out of its own).
        """
        tensors = self.state_dict()
        if self.position_embedding is not None:
            tensors["position_embedding.W_pos"] = self.W_pos  # a fixed table is not a parameter
        return pretrained.to_hugging_face(self.cfg, tensors)

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors into a folder, in Hugging Face's format."""
        pretrained.write_pretrained(folder, self.cfg, self.to_hf_state_dict())

    def to_transformer_lens_state_dict(self):
        """The weights as {TransformerLens's name: tensor}, ready for a HookedTransformer's
        `load_state_dict`; what the model lacks there (biases, positions) is zero."""
        tensors = self.state_dict()
        if self.position_embedding is not None:
            tensors["position_embedding.W_pos"] = self.W_pos  # a fixed table is not a parameter
        return formats.to_transformer_lens(self.cfg, tensors)

    def save_transformer_lens(self, folder):
        """Writes config.json, the fields of a HookedTransformerConfig, and model.safetensors into a
        folder."""
        formats.write_transformer_lens(folder, self.cfg, self.to_transformer_lens_state_dict())

    def forward(self, tokens, key_mask=None):
        """tokens [batch, pos] -> logits [batch, pos, d_vocab_out].

        key_mask: [batch, pos], True for real tokens, for prompts that are padded on the left
        (`positions.pad_left`). Each row then gets the same logits as when it runs alone. Raises
        UserError for a mask of another shape.
        """
        return self.unembed(self.last_stream(tokens, key_mask))

    def last_stream(self, tokens, key_mask=None):
        """The residual stream after the last block, [batch, pos, d_model], of which `unembed` makes
        the logits. Arguments as in `forward`."""
        return self.run_blocks(self.embed_prompts(tokens, key_mask), key_mask=key_mask)

    def embed_prompts(self, tokens, key_mask=None):
        """`embed`, with positions counted from each row's first real token. key_mask: [batch, pos]
        or None."""
        if key_mask is None:
            return self.embed(tokens)
        check_tokens(tokens, self.cfg.d_vocab)
        check_key_mask(key_mask, tokens)
        return self.embed(tokens, positions_in_prompt(key_mask))

    @elsewhere(W_E="model.W_E")
    def embed(self, tokens, positions=None):
        """The residual stream before the first block, [batch, pos, d_model].

        tokens: [batch, pos], integer ids. positions: [pos] or [batch, pos]; 0, 1, … by default.
        Raises UserError for ids outside the vocabulary and positions outside the context.
        """
        resid = self.hook_embed(self.token_embedding(tokens))
        positions = resolve_position_ids(tokens, positions, self.cfg.n_ctx)
        if self.position_embedding is not None:
            where = self.position_embedding(positions).expand_as(resid)
            resid = resid + self.hook_pos_embed(where)
        return self.dropout(resid)

    def run_blocks(self, resid, start=0, stop=None, past=None, *, key_mask=None):
        """Runs the blocks start, …, stop - 1 (default: all) and returns the stream after them.

        resid: [batch, pos, d_model], the stream before block `start`.
        past: one object for each layer, with extend(k, v) (GrowingPast), indexed from layer 0.
        key_mask: [batch, pos]; False hides a position from all others (padding).
        """
        start = check_count("start", start, 0, self.cfg.n_layers)
        if stop is None:
            stop = self.cfg.n_layers
        stop = check_count("stop", stop, start, self.cfg.n_layers)
        self.check_resid(resid)
        if key_mask is not None:
            check_key_mask(key_mask, resid[..., 0])
        if past is not None and len(as_list("past", past, "one for each layer")) < stop:
            raise UserError(f"past has {len(past)} layers of {stop}; pass one for each")
        for layer in range(start, stop):
            layer_past = None if past is None else past[layer]
            resid = self.blocks[layer](resid, layer_past, key_mask)
        return resid

    @elsewhere(W_U="model.W_U", b_U="model.b_U")
    def unembed(self, resid, tokens=None, positions=None):
        """resid [..., pos, d_model] after the last block -> logits [..., pos, d_vocab_out].

        tokens: compute the logits of these ids only, [n], or [batch, n] for ids that differ by row;
        with them, resid [..., batch, pos, d_model] -> [..., batch, pos, n]. positions: compute the
        logits at these positions only, [n] or [batch, n], counted from 0. The final LayerNorm, and
        any hook on it, still sees every position.
        """
        self.check_resid(resid)
        normalized = self.ln_final(resid)
        try:
            if positions is not None:
                check_tensor("positions", positions, "... n")
                normalized = at_positions(normalized, positions)
            if tokens is not None and not isinstance(tokens, torch.Tensor):
                tokens = as_integers(tokens, "tokens")
            return self.unembedding(normalized, self.W_E, tokens)
        except IndexError:  # checked only on failure: reading ids would wait for the GPU
            raise UserError(f"tokens or positions are outside the {self.cfg.d_vocab_out} ids and "
                            f"{resid.shape[-2]} positions; count from 0") from None

    def check_resid(self, resid):
        """Raises UserError if resid is not a stream of this model (its logits, for example)."""
        check_tensor("resid", resid, "... pos d_model", is_float=True)
        if resid.shape[-1] != self.cfg.d_model:
            raise UserError(f"resid is {list(resid.shape)}; pass the stream, [batch, pos, "
                            f"{self.cfg.d_model}]")

    @torch.no_grad()
    def init_weights_(self, generator):
        """GPT-2's initialisation: normal weights, zero biases, LayerNorm weights of one. Weights
        that write into the stream are divided by sqrt(2 * n_layers), so that the sum over all
        blocks starts at the same size at any depth."""
        std = self.cfg.init_scale
        for name, weight in self.named_parameters():
            leaf = name.rpartition(".")[2]
            if weight.ndim == 1:
                weight.fill_(1.0 if leaf == "w" else 0.0)
                continue
            writes = leaf in ("W_heads_out", "W_out")
            scale = std / math.sqrt(2 * self.cfg.n_layers) if writes else std
            weight.copy_(torch.empty(weight.shape).normal_(0.0, scale, generator=generator))

    def check_no_dropout(self):
        """Raises UserError if dropout is on: its noise would swamp the measurement."""
        if self.training and self.cfg.dropout:
            raise UserError("dropout is on, so activations are random; call model.eval() first")

    def check_predicts_tokens(self, remedy):
        """Raises UserError, ending with the remedy, if the logits are not one for each token."""
        if self.cfg.d_vocab_out != self.cfg.d_vocab:
            raise UserError(f"d_vocab_out={self.cfg.d_vocab_out} is not d_vocab="
                            f"{self.cfg.d_vocab}, so the logits are not those of tokens; {remedy}")

    @property
    def n_parameters(self):
        """The number of learned parameters; tied weights count once."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def W_E(self):
        """[d_vocab, d_model]: the weight itself, not a copy."""
        return self.token_embedding.W_E

    @property
    def W_pos(self):
        """[n_ctx, d_model]: the weight itself, or the fixed table of sines and cosines."""
        if self.position_embedding is None:
            raise UserError("positions='none': this model has no W_pos")
        return self.position_embedding.W_pos

    @property
    def W_U(self):
        """[d_model, d_vocab_out]: the weight itself (with tied embeddings, W_E transposed)."""
        return self.unembedding.weight(self.W_E)

    @property
    def b_U(self):
        """[d_vocab_out]: the weight itself; zeros if the model has no such bias."""
        bias = self.unembedding.b_U
        return self.W_E.new_zeros(self.cfg.d_vocab_out) if bias is None else bias

    def stack_weights(self, part, name):
        """[layer, ...]: the same weight of every block, stacked into a new tensor at each call."""
        if part == "mlp" and self.cfg.attn_only:
            raise UserError(f"attn_only=True: this model has no MLP and so no {name}")
        # With zero layers, a temporary block supplies the shape.
        blocks = self.blocks if len(self.blocks) else [Block(self.cfg).to(self.W_E)]
        weights = [getattr(getattr(block, part), name) for block in blocks]
        return torch.stack(weights)[: len(self.blocks)]

    W_Q = stacked("attn", "W_Q", "head, d_model, d_head")
    W_K = stacked("attn", "W_K", "head, d_model, d_head")
    W_V = stacked("attn", "W_V", "head, d_model, d_head")
    W_O = stacked("attn", "W_O", "head, d_head, d_model")
    b_Q = stacked("attn", "b_Q", "head, d_head")
    b_K = stacked("attn", "b_K", "head, d_head")
    b_V = stacked("attn", "b_V", "head, d_head")
    b_O = stacked("attn", "b_O", "d_model")
    W_in = stacked("mlp", "W_in", "d_model, d_mlp")
    b_in = stacked("mlp", "b_in", "d_mlp")
    W_out = stacked("mlp", "W_out", "d_mlp, d_model")
    b_out = stacked("mlp", "b_out", "d_model")


def resolve_position_ids(tokens, positions, n_ctx):
    """The position ids of tokens [batch, pos], as [pos] or [batch, pos]; 0, 1, … by default.

    Raises UserError for a text longer than the context, for positions outside it, and for positions
    whose shape does not match the tokens.
    """
    n_tokens = tokens.shape[1]
    if positions is None:
        if n_tokens > n_ctx:
            raise UserError(f"{n_tokens} tokens do not fit into n_ctx={n_ctx}; shorten the text, "
                            "or train with a larger n_ctx")
        return torch.arange(n_tokens, device=tokens.device)
    check_tensor("positions", positions, "... pos")
    is_ids = positions.dtype in (torch.int64, torch.int32)
    if not is_ids or positions.shape not in (tokens.shape, tokens.shape[1:]):
        raise UserError(f"positions is {list(positions.shape)} {positions.dtype} for tokens "
                        f"{list(tokens.shape)}; pass integers, [{n_tokens}] or "
                        f"{list(tokens.shape)}")
    if positions.min() < 0 or positions.max() >= n_ctx:
        raise UserError(f"positions run from {int(positions.min())} to {int(positions.max())}; "
                        f"this model has 0 to {n_ctx - 1}")
    return positions
