"""Hook points: named places in the forward pass where code can read or replace an activation.

In the model, only `z = self.hook_z(pattern @ v)` is visible. With no hook attached, the call
returns its argument after one truth test: hook points cost nothing, and the mathematics stays
readable.

    def halve(z, hook):                      # gets the activation and the point (hook.name)
        return z / 2                         # returns the new value; None keeps the old one

    logits = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", halve)])
    logits, cache = model.run_with_cache(tokens)

Hooks belong to the model, not to a thread: they act in every thread that runs the model. So a
second thread cannot open hooks while a first one has some open; give it a copy of the model.

Chapter: COURSE_ROADMAP.md, 7 (instrument)
Prerequisites: model.py, activation_cache.py
Next: metrics.py
Source: the interface of TransformerLens (Nanda & Bloom 2022)
"""

import contextlib
import inspect
import threading

import torch
from torch import nn

from activation_cache import ActivationCache, UnknownName, slice_axes
from utils import UserError, as_list, check_function, printable, suggest_closest


class HookPoint:
    """A named place in the forward pass.

    It is a plain object, not an `nn.Module`, for three reasons: a call costs a tenth as much; the
    state_dict does not list it; and a hook added to a compiled model still acts, because the
    compiler guards the empty list of listeners.

    axes: the names of the activation's axes, such as "batch pos head d_head".
    """

    def __init__(self, axes):
        self.axes = axes
        self.name = ""  # set by HookedModule.hook_points, which knows the full path
        self.listeners = []
        self.thread = None  # the thread that attached the newest listener

    def __call__(self, tensor):
        if self.listeners:
            if 0 in tensor.stride():
                tensor = tensor.clone()  # an expanded view: all rows share one memory
            for listener in tuple(self.listeners):
                tensor = self.call_listener(listener, tensor)
        return tensor

    def __deepcopy__(self, memo):
        return HookPoint(self.axes)  # a copy of a model has no listeners

    def __repr__(self):
        return f"HookPoint({self.name or '?'}: {self.axes})"

    @property
    def is_large(self):
        """Whether the activation holds a full stream vector for each head."""
        return {"head", "d_model"} <= set(self.axes.split())

    def add(self, fn):
        """Attaches `fn(tensor, hook) -> tensor | None`; returns a function that removes it."""

        def listener(tensor):  # a new closure each time, so removal is exact
            return fn(tensor, self)

        def remove():
            self.listeners[:] = [other for other in self.listeners if other is not listener]

        self.listeners.append(listener)
        self.thread = threading.get_ident()
        return remove

    def call_listener(self, listener, tensor):
        """The tensor that the listener returns; if it returns None, the tensor it was given.

        Raises UserError if the listener edited its tensor in place, or returned anything but a
        tensor of the same shape and dtype.
        """
        if tensor.is_inference():
            raise UserError(f"{self.name}: hooks need torch.no_grad() instead of inference_mode()")

        # torch counts in-place edits of a tensor's memory, through any view of it
        version = tensor._version
        changed = listener(tensor)
        if tensor._version != version:
            raise UserError(f"a hook at {self.name} edited its tensor in place; edit a copy: "
                            "t = t.clone(), change it, return t")

        if changed is None:
            return tensor
        if not isinstance(changed, torch.Tensor):
            raise UserError(f"a hook at {self.name} returned a {type(changed).__name__}; "
                            "return a tensor, or None to leave it")
        if changed.shape != tensor.shape or changed.dtype != tensor.dtype:
            raise UserError(
                f"a hook at {self.name} returned {list(changed.shape)} {changed.dtype}; "
                f"it must keep {list(tensor.shape)} {tensor.dtype}"
            )
        return changed


# Names that people know from TransformerLens, and what to use here
ELSEWHERE = {
    "add_hook": "with model.hooks([(name, fn)]): ...",
    "add_perma_hook": "with model.hooks([(name, fn)]): ...",
    "add_caching_hooks": "with model.caching(names_filter) as cache: ...",
    "reset_hooks": "nothing: hooks end with their `with` block",
    "remove_all_hook_fns": "nothing: hooks end with their `with` block",
    "hook_dict": "model.hook_points()",
    "mod_dict": "dict(model.named_modules())",
    "to_tokens": "torch.tensor([tokenizer.encode(text)])",
    "to_str_tokens": "tokenizer.to_str_tokens(text)",
    "to_single_token": "metrics.token_ids(text, 1, model.cfg.d_vocab, tokenizer=tokenizer)",
    "to_string": "tokenizer.decode(ids)",
    "OV": "weight_circuits.ov_circuit(model, layer, head)",
    "QK": "weight_circuits.qk_circuit(model, layer, head)",
    "return_type": "the logits always; a loss is losses.next_token_loss(logits, tokens)",
    "loss_per_token": "losses.next_token_loss(logits, tokens, reduction='none')",
    "prepend_bos": "tokens as they are; add the token in front yourself",
    "stop_at_layer": "model.run_blocks(model.embed(tokens), stop=layer)",
    "start_at_layer": "model.run_blocks(resid, start=layer)",
    "bwd_hooks": "model.gradient_cache(tokens, metric_fn, names_filter)",
    "incl_bwd": "model.gradient_cache(tokens, metric_fn, names_filter)",
    "remove_batch_dim": "cache.slice(batch=0), which keeps the axis",
}
FORWARD_ARGUMENTS = ("key_mask",)


class NotHere(UserError, AttributeError):
    """A TransformerLens name that is called something else here. It is also an AttributeError, so
    `hasattr` returns False."""


class elsewhere:
    """Decorator for a method that shares its name with a TransformerLens module: `model.embed.W_E`
    then says where that weight is here. hints: {attribute: what to use}."""

    def __init__(self, **hints):
        self.hints = hints

    def __call__(self, method):
        self.method = method
        self.__doc__ = method.__doc__
        return self

    def __get__(self, model, owner=None):
        return self.method if model is None else BoundMethod(self.method, model, self.hints)


class BoundMethod:
    """A bound method whose unknown attributes raise an error that says what to use instead."""

    def __init__(self, method, model, hints):
        self.method = method
        self.model = model
        self.hints = hints
        self.__doc__ = method.__doc__

    def __call__(self, *args, **how):
        return self.method(self.model, *args, **how)

    def __getattr__(self, name):
        hints = vars(self).get("hints", {})  # not there yet while a copy is made
        if name in hints:
            raise NotHere(f"there is no {name} here; use {hints[name]}")
        raise AttributeError(f"a method has no {name}")


class HookedModule(nn.Module):
    """A module whose activations can be read, cached, edited and differentiated by hook name."""

    def __getattr__(self, name):
        if name in ELSEWHERE:
            raise NotHere(f"there is no {name} here; use {ELSEWHERE[name]}")
        return super().__getattr__(name)

    def open_hooks(self):
        """The names of the hook points that have a listener now."""
        return [name for name, point in self.hook_points().items() if point.listeners]

    def hook_points(self):
        """{name: HookPoint} of this module and its submodules, e.g. `blocks.0.attn.hook_z`."""
        points = {}
        for path, module in self.named_modules():
            for attribute, value in vars(module).items():
                if isinstance(value, HookPoint):
                    value.name = f"{path}.{attribute}" if path else attribute
                    points[value.name] = value
        return points

    @contextlib.contextmanager
    def hooks(self, fwd_hooks):
        """A context in which each `(names_filter, fn)` listens; on exit, always, they are removed.

        fwd_hooks: names_filter is a name, a list of names or a callable on names;
        `fn(tensor, hook)` returns the new activation, or None. They run in the order given.
        Raises UserError for an unknown name, for a filter that matches nothing, and if another
        thread has hooks open.
        """
        points = self.hook_points()
        check_thread(points)
        wanted = [(select_names(points, names_filter), fn)
                  for names_filter, fn in check_pairs(fwd_hooks)]
        with contextlib.ExitStack() as stack:
            for names, fn in wanted:
                for name in names:
                    stack.callback(points[name].add(fn))
            yield self

    @contextlib.contextmanager
    def caching(self, names_filter=None, pos_slice=None):
        """A context that yields an ActivationCache; each forward pass inside it refills the cache.

        names_filter: a name, a list, or a callable on names. None keeps all but the points of
        shape [batch, pos, head, d_model], which are kept only when named.
        pos_slice: int, slice or list: keep a copy of these positions only (of the queries, on
        scores and patterns); the axis stays. The cache also keeps the forward pass's key_mask.
        """
        points = self.hook_points()
        tensors = {}
        cache = ActivationCache(tensors, {name: point.axes for name, point in points.items()})

        def keep_mask(module, inputs, how):
            key_mask = how.get("key_mask", inputs[1] if len(inputs) > 1 else None)
            if key_mask is not None and pos_slice is not None:
                key_mask = slice_axes(key_mask, "batch pos", pos=pos_slice)
            cache.key_mask = key_mask

        def keep(tensor, hook):
            tensor = tensor.detach()
            sliced = tensor if pos_slice is None else slice_axes(tensor, hook.axes, pos=pos_slice)
            tensors[hook.name] = sliced

        with contextlib.ExitStack() as stack:
            stack.enter_context(self.hooks([(select_names(points, names_filter), keep)]))
            stack.callback(self.register_forward_pre_hook(keep_mask, with_kwargs=True).remove)
            yield cache

    def run_with_hooks(self, tokens, fwd_hooks, **how):
        """`self(tokens)` while `fwd_hooks` listen, as in `hooks`. how: further arguments of the
        forward pass, such as key_mask."""
        check_arguments(how)
        with self.hooks(fwd_hooks):
            return self(tokens, **how)

    def run_with_cache(self, tokens, names_filter=None, pos_slice=None, **how):
        """`(self(tokens), cache)`; the filters are those of `caching`. how: further arguments of
        the forward pass, such as key_mask."""
        check_arguments(how)
        with self.caching(names_filter, pos_slice) as cache:
            logits = self(tokens, **how)
        return logits, cache

    def gradient_cache(self, tokens, metric_fn, names_filter=None, **how):
        """The metric, the activations, and the metric's gradient with respect to each of them.

        tokens: [batch, pos]. metric_fn(logits): a scalar or [batch], whose sum is differentiated;
        other runs inside it, even of this model, are not captured. For a Metric, only the logits
        that it needs are computed. how: further arguments of the forward pass, such as key_mask.
        Returns (value, acts, grads): value is detached; acts and grads are ActivationCaches with
        the same names, with zeros where the metric does not depend on an activation. The weights'
        `.grad` is not touched.
        """
        check_arguments(how)
        check_function("metric_fn", metric_fn)
        points = self.hook_points()
        live = {}

        def capture(tensor, hook):
            # A separate view for each point: two points may hold the same tensor, and each needs
            # the gradient of what is computed from there on.
            live[hook.name] = (
                tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
            )
            return live[hook.name]

        with torch.enable_grad():
            # forward
            needed_logits = getattr(metric_fn, "needed_logits", None)  # a Metric has it
            with self.hooks([(select_names(points, names_filter), capture)]):
                if needed_logits is None:
                    logits = self(tokens, **how)
                else:
                    logits = needed_logits(self, self.last_stream(tokens, **how))
            value = metric_fn(logits) if needed_logits is None else metric_fn.of_needed(logits)
            check_value(value)

            # backward
            gradients = [torch.zeros_like(tensor) for tensor in live.values()]
            if value.requires_grad:  # a constant metric has no graph
                gradients = torch.autograd.grad(
                    value.sum(), live.values(), allow_unused=True, materialize_grads=True
                )

        axes = {name: point.axes for name, point in points.items()}
        acts = ActivationCache({name: tensor.detach() for name, tensor in live.items()}, axes,
                               how.get("key_mask"))
        grads = ActivationCache(dict(zip(live, gradients, strict=True)), axes, acts.key_mask)
        return value.detach(), acts, grads


def check_thread(points):
    """Raises UserError if another thread has hooks open: its hooks would act in this thread's runs,
    and this thread's hooks in its runs."""
    here = threading.get_ident()
    others = [name for name, point in points.items() if point.listeners and point.thread != here]
    if others:
        raise UserError(f"another thread has hooks open at {others[0]}; give each thread its own "
                        "model, copy.deepcopy(model)")


def check_value(value):
    """Raises UserError if no gradient can be taken of the value."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim > 1:
        raise UserError(f"the metric returned {printable(repr(value))}; return a tensor of floats, "
                        "a single one or [batch]")


def check_pairs(fwd_hooks):
    """The (names_filter, fn) pairs as a list. Raises UserError for anything else, such as a single
    pair without a list, and for a function that does not take (tensor, hook)."""
    wanted = "a list of pairs, [(name, fn)]"
    pairs = as_list("fwd_hooks", fwd_hooks, wanted)
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not callable(pair[1]):
            raise UserError(f"{printable(repr(pair))} is not a hook; pass {wanted}")
        if not takes_two(pair[1]):
            raise UserError(f"the hook at {printable(repr(pair[0]))} does not take two arguments; "
                            "write fn(tensor, hook)")
    return pairs


def takes_two(fn):
    """Whether a function can be called with two arguments; True for one written in C, which has no
    signature."""
    try:
        inspect.signature(fn).bind(None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def check_arguments(how):
    """Raises UserError for an argument that the forward pass does not have; for one known from
    TransformerLens, the message says what to use."""
    for name in how:
        if name not in FORWARD_ARGUMENTS:
            hint = ELSEWHERE.get(name, f"one of: {', '.join(FORWARD_ARGUMENTS)}")
            raise UserError(f"there is no argument {name} here; use {hint}")


def select_names(points, names_filter):
    """The names that a filter selects, in the order of `points`.

    names_filter: None (all but the large ones), a name, a list of names, or a callable on names.
    Raises UnknownName for an unknown name, UserError if nothing matches.
    """
    if names_filter is None:
        return [name for name, point in points.items() if not point.is_large]
    if callable(names_filter):
        chosen = [name for name in points if names_filter(name)]
    else:
        names = [names_filter]
        if not isinstance(names_filter, str):
            names = as_list("names_filter", names_filter, "a name, a list of names or a function")
        for name in names:
            if name not in points:
                raise UnknownName(f"{name} is not a hook of this model"
                                  f"{suggest_closest(name, points)}")
        chosen = [name for name in points if name in set(names)]
    if not chosen:
        raise UserError(f"names_filter matches none of the {len(points)} hook points; "
                        "hook_table(model) lists them")
    return chosen


def hook_table(model):
    """A text table of every hook point of a HookedModule and its axes. Only block 0 is listed,
    because the other blocks repeat it."""
    points = {name: point for name, point in model.hook_points().items()
              if not name.startswith("blocks.") or name.startswith("blocks.0.")}
    width = max(map(len, points))

    lines = []
    for name, point in points.items():
        axes = point.axes.replace(" ", ", ")
        note = "  (cached only when named)" if point.is_large else ""
        lines.append(f"{name:<{width}}  [{axes}]{note}")
    return "\n".join(lines)
