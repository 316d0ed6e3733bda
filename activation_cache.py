"""The activations of a run, by the names of their hook points; and how these names are made.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Prerequisites: attention.py, model.py
Next: hooks.py
Source: names and shapes are those of TransformerLens (Nanda & Bloom 2022)
"""

import re
from collections.abc import Mapping

import torch

from positions import choose_numbers, choose_positions, take_positions
from utils import UserError, as_index, suggest_closest

IN_ATTENTION = {"q", "k", "v", "z", "attn_scores", "pattern", "result"}
IN_MLP = {"pre", "post"}
IN_LAYERNORM = {"scale", "normalized"}
OUTSIDE_BLOCKS = {"embed", "pos_embed"}


class UnknownName(UserError, KeyError):
    """A hook name that is not there; also a KeyError, as a mapping's missing key must be."""

    __str__ = ValueError.__str__  # KeyError's would put the message in quotes


class UnknownMethod(UserError, AttributeError):
    """A method of TransformerLens's cache that is a function here; also an AttributeError, so that
    `hasattr` says no."""


def check_name(name):
    """Raises UserError for what is no text."""
    if not isinstance(name, str):
        raise UnknownName(f"{name!r} is no name of an activation; pass one such as 'resid_pre'")


def get_act_name(name, layer=None, module=None):
    """The full hook name of a short one: `("z", 0)` gives `"blocks.0.attn.hook_z"`.

    name: a short name ("resid_post", "q", "pre", "scale", "embed", …) or already a full one.
    layer: the block, where the activation lies in one. module: "ln1" or "ln2" for "scale" and
    "normalized" in a block; without a layer these are the final LayerNorm's.
    Raises UserError where a layer or a module is missing, or is given to a name that has none.
    """
    check_name(name)
    if layer is not None and (as_index(layer) is None or layer < 0):
        raise UnknownName(f"layer={layer!r} of {name!r} is no number of a layer, counted from 0")
    if "hook_" in name or name in OUTSIDE_BLOCKS:
        if layer is not None:
            raise UserError(f"{name!r} is one place and takes no layer; leave {layer} out")
        return name if "hook_" in name else f"hook_{name}"
    if name in IN_LAYERNORM and layer is None:
        return f"ln_final.hook_{name}"
    if layer is None:
        raise UserError(f"{name!r} lies in a block; say which, as in ({name!r}, 0)")
    if name in IN_LAYERNORM and module not in ("ln1", "ln2"):
        raise UserError(f"{name!r} is in ln1 and in ln2; say which: ({name!r}, {layer}, 'ln1')")

    if name in IN_LAYERNORM:
        return f"blocks.{layer}.{module}.hook_{name}"
    if name in IN_ATTENTION:
        return f"blocks.{layer}.attn.hook_{name}"
    if name in IN_MLP:
        return f"blocks.{layer}.mlp.hook_{name}"
    return f"blocks.{layer}.hook_{name}"


def head_label(layer, head):
    """How a head is written in labels and texts: "L0H1" for head 1 of layer 0. A call takes the
    pair (layer, head)."""
    return f"L{layer}H{head}"


def slice_axes(tensor, axes, **where):
    """A copy of part of a tensor, chosen along named axes, each of which stays.

    axes: the tensor's axis names, as in "batch pos head d_head".
    where: axis = an int, a slice or a list; `pos` may also be a tensor [batch] with each row's own,
    and means `query_pos` on scores and patterns; axes that the tensor lacks are passed over. Raises
    UserError for what lies outside.
    """
    names = axes.replace("query_pos", "pos").split()
    if where.get("pos") is not None and "pos" in names:
        dim = names.index("pos")
        positions = choose_positions(where["pos"], tensor.shape[dim], tensor.shape[0])
        tensor = take_positions(tensor, positions, dim)

    for dim, axis in enumerate(names):
        choice = None if axis == "pos" else where.get(axis)
        if choice is not None:
            chosen = choose_numbers(axis, choice, tensor.shape[dim])
            tensor = tensor.index_select(dim, chosen.to(tensor.device))
    return tensor.clone()


def check_cache(cache):
    """Raises UserError for anything but an ActivationCache."""
    if not isinstance(cache, ActivationCache):
        raise UserError(f"the cache is a {type(cache).__name__}; pass the second result of "
                        "model.run_with_cache(tokens)")


def check_same_model(axes, source):
    """Raises UserError for a source that is no ActivationCache, and for one of a model with other
    hook points. axes: {hook name: axes} of the model, or a cache of it."""
    axes = getattr(axes, "axes", axes)
    check_cache(source)
    if source.axes.keys() != axes.keys():
        other = sorted(source.axes.keys() ^ axes.keys())[0]
        raise UserError(f"the cache is of another model: only one of the two has {other}; take it "
                        "from this model")


def have_same_padding(key_mask, other):
    """Whether two masks [batch, pos] hide the same places; None hides none."""
    masks = [torch.ones(1, 1, dtype=torch.bool) if mask is None else mask.cpu()
             for mask in (key_mask, other)]
    shapes = {mask.shape for mask in masks if mask.numel() > 1}
    return len(shapes) <= 1 and not (masks[0] != masks[1]).any()


def check_same_mask(own, source):
    """Raises UserError for two caches whose runs had their padding at other places."""
    if not have_same_padding(own.key_mask, source.key_mask):
        raise UserError("the run and the source have their padding at other places, or one has no "
                        "key_mask; take prompts of the same lengths, and give both their key_mask")


def check_same_shape(name, own, source):
    """Raises UserError where an activation of one run can't stand in for that of another."""
    if own.shape != source.shape:
        raise UserError(f"{name} is {list(source.shape)} in the source, {list(own.shape)} in the "
                        "run; take prompts of one length, as many of both, and their whole cache")


# What people know from TransformerLens as a method of the cache, and what stands in its place here
FUNCTIONS = {
    "decompose_resid": "residual_stream_analysis.decompose_resid(model, cache)",
    "accumulated_resid": "residual_stream_analysis.accumulated_resid(model, cache)",
    "get_full_resid_decomposition": "residual_stream_analysis.full_decomposition(model, cache)",
    "stack_head_results": "residual_stream_analysis.stack_head_results(model, cache)",
    "stack_neuron_results": "residual_stream_analysis.stack_neuron_results(model, cache)",
    "stack_activation": "cache.stack(name)",
    "apply_ln_to_stack": "residual_stream_analysis.apply_ln_to_stack(model, cache, stack, labels)",
    "logit_attrs": "attribution.direct_logit_attribution(model, cache, correct, wrong)",
    "remove_batch_dim": "cache.slice(batch=0), which keeps the axis",
    "cfg": "model.cfg, and pass the model before the cache",
    "cache_dict": "the cache itself, which is a mapping",
}


class ActivationCache(Mapping):
    """The activations of a run by hook name, read as `cache["blocks.0.attn.hook_z"]`,
    `cache["z", 0]`, `cache["resid_post", -1]` or `cache["scale", 0, "ln1"]`.

    tensors: {hook name: activation}, detached and read-only by contract; some may share storage.
    axes: {hook name: "batch pos d_model"} for every hook point of the model, kept or not, so that
    a missing name can be told from a misspelt one. key_mask: [batch, pos], True for real tokens,
    where the prompts were padded; else None.
    """

    def __init__(self, tensors, axes, key_mask=None):
        self.tensors = tensors
        self.axes = axes
        self.key_mask = key_mask
        found = [re.match(r"blocks\.(\d+)\.", name) for name in axes]
        self.n_layers = max((int(each[1]) for each in found if each), default=-1) + 1

    def __getattr__(self, name):
        if name in FUNCTIONS:
            raise UnknownMethod(f"a cache holds no model, and has no {name}; use {FUNCTIONS[name]}")
        raise AttributeError(f"a cache has no {name}; read it as cache[{name!r}, layer]")

    def full_name(self, key):
        """The hook name of a key: a name, or (name, layer[, module]); layer -1 is the last."""
        if isinstance(key, str):
            return get_act_name(key)
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise UnknownName(f"{key!r} is no key; read cache['z', 0], or cache['scale', 0, 'ln1']")
        name, layer, *module = key
        if layer is not None:
            index = as_index(layer)
            if index is None or not -self.n_layers <= index < self.n_layers:
                raise UnknownName(f"layer {layer!r} of {name!r} is not there; this model has "
                                  f"{self.n_layers} layers")
            layer = index % self.n_layers
        return get_act_name(name, layer, *module)

    def __getitem__(self, key):
        name = self.full_name(key)
        if name in self.tensors:
            return self.tensors[name]
        if name in self.axes:
            raise UnknownName(f"{name} was not kept; name it in names_filter and run again")
        raise UnknownName(f"{name} is not a hook of this model{suggest_closest(name, self.axes)}")

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __repr__(self):
        return f"ActivationCache({len(self)} activations, {self.nbytes / 1e6:.1f} MB)"

    @property
    def nbytes(self):
        """Bytes held, each storage counted once however many activations are views of it."""
        storages = {}
        for tensor in self.tensors.values():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def stack(self, name, module=None):
        """One activation of every layer: [layer, ...], in the order of the layers.

        name: a short name, such as "pattern". Raises UnknownName where a layer was not kept, or
        there is none.
        """
        if not self.n_layers:
            raise UnknownName(f"this model has no layers, and so no {name!r} to stack")
        return torch.stack([self[name, layer, module] for layer in range(self.n_layers)])

    def slice(self, batch=None, pos=None, head=None):
        """A new cache with part of each activation, copied; every axis stays.

        batch, pos, head: an int, a slice or a list; activations without that axis stay whole.
        `pos` means the query on scores and patterns.
        """
        where = {"batch": batch, "pos": pos, "head": head}
        sliced = {name: slice_axes(tensor, self.axes[name], **where)
                  for name, tensor in self.tensors.items()}
        key_mask = self.key_mask
        if key_mask is not None:
            key_mask = slice_axes(key_mask, "batch pos", **where)
        return ActivationCache(sliced, self.axes, key_mask)

    def to(self, device):
        """A new cache on another device."""
        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        return ActivationCache({name: t.to(device) for name, t in self.tensors.items()}, self.axes,
                               key_mask)
