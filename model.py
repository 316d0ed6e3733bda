"""The whole model: embed, run the blocks, unembed; and every weight by the field's name for it.

    resid  = model.embed(tokens)                 # [batch, pos, d_model]
    resid  = model.run_blocks(resid)             # or a part of the way: start=, stop=
    logits = model.unembed(resid)                # [batch, pos, d_vocab]
    logits = model(tokens)                       # the three in a row

The three can be called apart, so a run can be restarted in the middle from a stream that was cached
or edited: that is what sweeps, lenses and decoding are made of.

Chapter: COURSE_ROADMAP.md, 5 (the whole model)
Prerequisites: config.py, embeddings.py, transformer_block.py
Next: pretrained.py
Source: Radford et al. 2019; Elhage et al. 2021 (the stream as the thing that the parts share)
"""

import math

import torch
from torch import nn

import pretrained
from embeddings import PositionEmbedding, TokenEmbedding, Unembedding, check_tokens
from hooks import HookedModule, HookPoint, elsewhere
from positions import as_integers, at_positions, check_key_mask, positions_in_prompt
from transformer_block import Block, make_norm
from utils import UserError, as_list, check_count, check_tensor, seeded_generator


def stacked(part, name, axes):
    """A property: the weight `name` of every block's `part`, stacked [layer, ...]."""

    def of_all_blocks(self):
        return self.stack_weights(part, name)

    return property(of_all_blocks, doc=f"[layer, {axes}], a differentiable copy")


class GPT(HookedModule):
    """A decoder-only transformer in GPT-2's form.

    cfg: a ModelConfig with d_vocab set. seed: of the initial weights, drawn on the CPU; None leaves
    the memory as it was, for a caller who loads weights next. Raises UserError where d_vocab is
    missing.
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
        """A published GPT-2, on the CPU in float32 and in evaluation mode, dropout 0.

        name_or_folder: gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 (downloaded once, to
        cache_dir), or a folder with config.json and the weights in Hugging Face's layout.
        Raises UserError for another name or architecture and broken files, NoNetwork where a
        download can't be finished.
        """
        folder = pretrained.pretrained_folder(name_or_folder, cache_dir)
        cfg, tensors = pretrained.read_pretrained(folder)
        model = cls(cfg, seed=None)
        model.load_weights_(tensors, folder)
        return model.eval()

    def load_weights_(self, weights, origin):
        """Copies {name: tensor} into the model, all of its weights and no others.

        origin: where they come from, for the UserError that names what is missing, unknown, or of
        another shape; then nothing has been copied.
        """
        own = self.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in weights]
        wrong += [f"{name} is unknown" for name in weights if name not in own]
        wrong += [f"{name} is {list(weights[name].shape)} in place of {list(own[name].shape)}"
                  for name in own if name in weights and weights[name].shape != own[name].shape]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{origin} is from another architecture: {'; '.join(wrong[:3])}{more}")
        self.load_state_dict(weights)

    def to_hf_state_dict(self):
        """{Hugging Face's name: tensor}, as its GPT2LMHeadModel loads it.

        Raises UserError for a model that GPT-2's format can't hold (attn_only, no norm, b_U).
        """
        tensors = self.state_dict()
        if self.position_embedding is not None:
            tensors["position_embedding.W_pos"] = self.W_pos  # a fixed table is no parameter
        return pretrained.to_hugging_face(self.cfg, tensors)

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors into a folder, as Hugging Face reads them."""
        pretrained.write_pretrained(folder, self.cfg, self.to_hf_state_dict())

    def forward(self, tokens, key_mask=None):
        """tokens [batch, pos] -> logits [batch, pos, d_vocab].

        key_mask: [batch, pos], True for real tokens of prompts that are padded on the left
        (`positions.pad_left`): each row's logits are then what it gives alone. Raises UserError for
        a mask of another shape.
        """
        return self.unembed(self.run_blocks(self.embed_prompts(tokens, key_mask),
                                            key_mask=key_mask))

    def embed_prompts(self, tokens, key_mask=None):
        """`embed`, with positions that count from each row's first real token; key_mask [batch,
        pos] or None."""
        if key_mask is None:
            return self.embed(tokens)
        check_tokens(tokens, self.cfg.d_vocab)
        check_key_mask(key_mask, tokens)
        return self.embed(tokens, positions_in_prompt(key_mask))

    @elsewhere(W_E="model.W_E")
    def embed(self, tokens, positions=None):
        """The stream before the first block, [batch, pos, d_model].

        tokens: [batch, pos], integer ids. positions: [pos] or [batch, pos]; 0, 1, … unless given.
        Raises UserError for ids outside the vocabulary and positions outside the context.
        """
        resid = self.hook_embed(self.token_embedding(tokens))
        positions = resolve_position_ids(tokens, positions, self.cfg.n_ctx)
        if self.position_embedding is not None:
            where = self.position_embedding(positions).expand_as(resid)
            resid = resid + self.hook_pos_embed(where)
        return self.dropout(resid)

    def run_blocks(self, resid, start=0, stop=None, past=None, *, key_mask=None):
        """The stream after the blocks start, …, stop - 1; all of them by default.

        resid: [batch, pos, d_model], the stream before block `start`.
        past: one object a layer with extend(k, v) (GrowingPast), by absolute layer.
        key_mask: [batch, pos], False hides a position from all others (padding).
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
        """resid [..., pos, d_model] after the last block -> logits [..., pos, d_vocab].

        tokens: ids whose logits alone are computed, [n], or [batch, n] with each row's own; then
        resid [..., batch, pos, d_model] -> [..., batch, pos, n]. positions: [n] or [batch, n], from
        0, those alone; the last LayerNorm, and who listens there, has them all.
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
        except IndexError:  # only then looked at: a device is not to be waited for
            raise UserError(f"tokens or positions are outside of the {self.cfg.d_vocab} ids and "
                            f"{resid.shape[-2]} positions; choose from 0 on") from None

    def check_resid(self, resid):
        """Raises UserError for what is no stream of this model, such as its logits."""
        check_tensor("resid", resid, "... pos d_model", is_float=True)
        if resid.shape[-1] != self.cfg.d_model:
            raise UserError(f"resid is {list(resid.shape)}; pass the stream, [batch, pos, "
                            f"{self.cfg.d_model}]")

    @torch.no_grad()
    def init_weights_(self, generator):
        """GPT-2's start: normal weights, zero biases, unit LayerNorms; what writes into the stream
        is smaller by sqrt(2 * n_layers), so that the sum of all blocks starts at one size."""
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
        """Raises UserError where dropout is on: its noise would drown what is measured."""
        if self.training and self.cfg.dropout:
            raise UserError("the model drops activations at random; call model.eval() first")

    @property
    def n_parameters(self):
        """How many numbers are learned; tied ones count once."""
        return sum(weight.numel() for weight in self.parameters())

    @property
    def W_E(self):
        """[d_vocab, d_model]: the weight itself."""
        return self.token_embedding.W_E

    @property
    def W_pos(self):
        """[n_ctx, d_model]: the weight itself, or the fixed table."""
        if self.position_embedding is None:
            raise UserError("positions='none': this model has no W_pos")
        return self.position_embedding.W_pos

    @property
    def W_U(self):
        """[d_model, d_vocab]: the weight itself (W_E transposed where they are tied)."""
        return self.unembedding.weight(self.W_E)

    @property
    def b_U(self):
        """[d_vocab]: the weight itself; zeros where the model has none."""
        bias = self.unembedding.b_U
        return self.W_E.new_zeros(self.cfg.d_vocab) if bias is None else bias

    def stack_weights(self, part, name):
        """[layer, ...]: one weight of all blocks, stacked into a new tensor at each call."""
        if part == "mlp" and self.cfg.attn_only:
            raise UserError(f"attn_only=True: this model has no MLP and so no {name}")
        # Without layers a block that is thrown away gives the shape.
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
    """The positions of tokens [batch, pos], as [pos] or [batch, pos]; 0, 1, … if none are given.

    Raises UserError for a text longer than the context, and for positions outside of it or of a
    shape that is not that of the tokens.
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
