"""The cache: the activations of a run by hook name, and the functions that build these names.

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
    """A hook name that does not exist. It is also a KeyError, as for any mapping's missing key."""

    __str__ = ValueError.__str__  # KeyError's would put the message in quotes


class UnknownMethod(UserError, AttributeError):
    """A method of TransformerLens's cache that is a function here. It is also an AttributeError, so
    `hasattr` returns False."""


def check_name(name):
    """Raises UserError if the name is not a string."""
    if not isinstance(name, str):
        raise UnknownName(f"{name!r} is not an activation's name; pass one such as 'resid_pre'")


def get_act_name(name, layer=None, module=None):
    """The full hook name for a short one: `("z", 0)` gives `"blocks.0.attn.hook_z"`.

    name: a short name ("resid_post", "q", "pre", "scale", "embed", …) or already a full one.
    layer: the block, for activations inside one. module: "ln1" or "ln2", for "scale" and
    "normalized" in a block; without a layer these names mean the final LayerNorm's.
    Raises UserError if a layer or module is missing, or is given to a name that has none.
    """
    check_name(name)
    if layer is not None and (as_index(layer) is None or layer < 0):
        raise UnknownName(f"layer={layer!r} of {name!r} is not a layer number, counted from 0")
    if "hook_" in name or name in OUTSIDE_BLOCKS:
        if layer is not None:
            raise UserError(f"{name!r} exists only once and takes no layer; leave {layer} out")
        return name if "hook_" in name else f"hook_{name}"
    if name in IN_LAYERNORM and layer is None:
        return f"ln_final.hook_{name}"
    if layer is None:
        raise UserError(f"{name!r} is in every block; say which block, as in ({name!r}, 0)")
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
    """A head's name in labels and text: "L0H1" is head 1 of layer 0. Function arguments use the
    pair (layer, head)."""
    return f"L{layer}H{head}"


def slice_axes(tensor, axes, **where):
    """A copy of part of a tensor, selected along named axes; every axis stays.

    axes: the tensor's axis names, as in "batch pos head d_head".
    where: axis = an int, a slice or a list. `pos` may also be a tensor [batch], one position for
    each row; on scores and patterns it means `query_pos`. Axes that the tensor lacks are ignored.
    Raises UserError for an index out of range.
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
    """Raises UserError if this is not an ActivationCache."""
    if not isinstance(cache, ActivationCache):
        raise UserError(f"the cache is a {type(cache).__name__}; pass the second result of "
                        "model.run_with_cache(tokens)")


def check_same_model(axes, source):
    """Raises UserError if `source` is not an ActivationCache, or comes from a model with other hook
    points. axes: {hook name: axes} of the model, or a cache of it."""
    axes = getattr(axes, "axes", axes)
    check_cache(source)
    if source.axes.keys() != axes.keys():
        other = sorted(source.axes.keys() ^ axes.keys())[0]
        raise UserError(f"the cache is of another model: only one of the two has {other}; take a "
                        "cache of this model")


def have_same_padding(key_mask, other):
    """Whether two masks [batch, pos] hide the same positions; None hides none."""
    masks = [torch.ones(1, 1, dtype=torch.bool) if mask is None else mask.cpu()
             for mask in (key_mask, other)]
    shapes = {mask.shape for mask in masks if mask.numel() > 1}
    return len(shapes) <= 1 and not (masks[0] != masks[1]).any()


def check_same_mask(own, source):
    """Raises UserError if two caches come from runs that are padded at different positions."""
    if not have_same_padding(own.key_mask, source.key_mask):
        raise UserError("the run and the source are padded at different positions, or one has no "
                        "key_mask; use prompts of the same lengths, and pass both their key_mask")


def check_same_shape(name, own, source):
    """Raises UserError if an activation of one run cannot replace the one of another."""
    if own.shape != source.shape:
        raise UserError(f"{name} is {list(source.shape)} in the source, {list(own.shape)} in the "
                        "run; use the same number of prompts, of one length, and the whole cache")


# Methods of TransformerLens's cache, and what to use here
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
    axes: {hook name: "batch pos d_model"} for every hook point of the model, cached or not, so that
    the error for a name that was not cached differs from the one for a misspelt name. key_mask:
    [batch, pos], True for real tokens, if the prompts were padded; else None.
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
            raise UnknownName(f"{key!r} is not a key; use cache['z', 0], cache['scale', 0, 'ln1']")
        name, layer, *module = key
        if layer is not None:
            index = as_index(layer)
            if index is None or not -self.n_layers <= index < self.n_layers:
                raise UnknownName(f"layer {layer!r} of {name!r} does not exist; this model has "
                                  f"{self.n_layers} layers")
            layer = index % self.n_layers
        return get_act_name(name, layer, *module)

    def __getitem__(self, key):
        name = self.full_name(key)
        if name in self.tensors:
            return self.tensors[name]
        if name in self.axes:
            raise UnknownName(f"{name} was not cached; add it to names_filter and run again")
        raise UnknownName(f"{name} is not a hook of this model{suggest_closest(name, self.axes)}")

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __repr__(self):
        return f"ActivationCache({len(self)} activations, {self.nbytes / 1e6:.1f} MB)"

    @property
    def nbytes(self):
        """The bytes held; storage that several activations share is counted once."""
        storages = {}
        for tensor in self.tensors.values():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def stack(self, name, module=None):
        """One activation from every layer, stacked in the order of the layers: [layer, ...].

        name: a short name, such as "pattern". Raises UnknownName if a layer was not cached, or the
        model has none.
        """
        if not self.n_layers:
            raise UnknownName(f"this model has no layers, and so no {name!r} to stack")
        return torch.stack([self[name, layer, module] for layer in range(self.n_layers)])

    def slice(self, batch=None, pos=None, head=None):
        """A new cache with a copy of part of each activation; every axis stays.

        batch, pos, head: an int, a slice or a list; activations without that axis are kept whole.
        On scores and patterns, `pos` means the query position.
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
