"""The activations of a run, by the names of their hook points; and how these names are made.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Prerequisites: attention.py, model.py
Next: hooks.py
Source: names and shapes are those of TransformerLens (Nanda & Bloom 2022)
"""

import re
from collections.abc import Mapping

import torch

from utils import UserError, suggest_closest

IN_ATTENTION = {"q", "k", "v", "z", "attn_scores", "pattern", "result"}
IN_MLP = {"pre", "post"}
IN_LAYERNORM = {"scale", "normalized"}
OUTSIDE_BLOCKS = {"embed", "pos_embed"}


class UnknownName(UserError, KeyError):
    """A hook name that is not there; also a KeyError, as a mapping's missing key must be."""

    __str__ = ValueError.__str__  # KeyError's would put the message in quotes


def get_act_name(name, layer=None, module=None):
    """The full hook name of a short one: `("z", 0)` gives `"blocks.0.attn.hook_z"`.

    name: a short name ("resid_post", "q", "pre", "scale", "embed", …) or already a full one.
    layer: the block, where the activation lies in one. module: "ln1" or "ln2" for "scale" and
    "normalized" in a block; without a layer these are the final LayerNorm's.
    Raises UserError where a layer or a module is missing, or is given to a name that has none.
    """
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
    where: axis = an int, a slice or a list; `pos` means `query_pos` on scores and patterns; axes
    that the tensor lacks are passed over. Raises UserError for an int that lies outside.
    """
    for dim, axis in enumerate(axes.replace("query_pos", "pos").split()):
        size = tensor.shape[dim]
        choice = where.get(axis)
        if isinstance(choice, int):
            if not -size <= choice < size:
                raise UserError(f"{axis}={choice} is outside of the {size} that there are")
            choice = slice(choice, choice + 1 or None)
        if choice is not None:
            tensor = tensor[(slice(None),) * dim + (choice,)]
    return tensor.clone()


def check_same_shape(name, own, source):
    """Raises UserError where an activation of one run can't stand in for that of another."""
    if own.shape != source.shape:
        raise UserError(f"{name} is {list(source.shape)} in the source, {list(own.shape)} in the "
                        "run; take prompts of one length, as many of both, and their whole cache")


class ActivationCache(Mapping):
    """The activations of a run by hook name, read as `cache["blocks.0.attn.hook_z"]`,
    `cache["z", 0]`, `cache["resid_post", -1]` or `cache["scale", 0, "ln1"]`.

    tensors: {hook name: activation}, detached and read-only by contract; some may share storage.
    axes: {hook name: "batch pos d_model"} for every hook point of the model, kept or not, so that
    a missing name can be told from a misspelt one.
    """

    def __init__(self, tensors, axes):
        self.tensors = tensors
        self.axes = axes
        found = [re.match(r"blocks\.(\d+)\.", name) for name in axes]
        self.n_layers = max((int(each[1]) for each in found if each), default=-1) + 1

    def full_name(self, key):
        """The hook name of a key: a name, or (name, layer[, module]); layer -1 is the last."""
        if isinstance(key, str):
            return get_act_name(key)
        name, layer, *module = key
        if layer is not None and not -self.n_layers <= layer < self.n_layers:
            raise UnknownName(f"layer {layer} of {name!r} is not there; this model has "
                              f"{self.n_layers} layers")
        if layer is not None:
            layer = layer % self.n_layers
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
        return ActivationCache(sliced, self.axes)

    def to(self, device):
        """A new cache on another device."""
        return ActivationCache({name: t.to(device) for name, t in self.tensors.items()}, self.axes)
