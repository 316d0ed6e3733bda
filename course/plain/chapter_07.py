"""Chapter 7 as a learner would write it: listening, keeping, editing, and a gradient."""

import contextlib

import torch


def hook_point_call(self, tensor):
    """Call every listener with an activation, and return the activation after all of them.

    tensor: the activation. self.listeners: functions of a tensor, in the order in which they were
    added; each returns the tensor that replaces it from then on, or None to change nothing.
    """
    for listener in self.listeners:
        changed = listener(tensor)
        if changed is not None:
            tensor = changed
    return tensor


@contextlib.contextmanager
def listening(listeners, fn):
    """A context in which fn is in the list of listeners; afterwards it is removed.

    listeners: a list, to which fn is added at the end. When the block ends, also by an error, this
    one is removed, and all others stay.
    """
    entry = [fn]  # two listeners may be the same function, but not the same entry

    def listener(tensor):
        return entry[0](tensor)

    listeners.append(listener)
    try:
        yield
    finally:
        listeners[:] = [other for other in listeners if other is not listener]


def act_name(name, layer=None):
    """The full hook name of a short one: ("z", 0) gives "blocks.0.attn.hook_z".

    Attention has q, k, v, z, attn_scores and pattern. The MLP has pre and post:
    "blocks.0.mlp.hook_pre". Any other name with a layer belongs to the block itself:
    "blocks.0.hook_resid_pre". Without a layer it is outside the blocks: "hook_embed".
    """
    if layer is None:
        return f"hook_{name}"
    if name in ("q", "k", "v", "z", "attn_scores", "pattern"):
        return f"blocks.{layer}.attn.hook_{name}"
    if name in ("pre", "post"):
        return f"blocks.{layer}.mlp.hook_{name}"
    return f"blocks.{layer}.hook_{name}"


@torch.no_grad()
def keep_activations(model, tokens, names):
    """Run the model and keep some activations: (logits, {name: tensor}).

    tokens: [batch, pos]. names: full hook names. model.hooks([(name, fn), …]) is a context manager;
    fn(tensor, hook) is called with hook.name. Returns (logits, {name: tensor}).
    """
    kept = {}

    def keep(tensor, hook):
        kept[hook.name] = tensor.clone()

    with model.hooks([(name, keep) for name in names]):
        logits = model(tokens)
    return logits, kept


def count_bytes(tensors):
    """How many bytes a cache holds; storage that several tensors share counts once.

    tensors: {name: tensor}. A tensor's storage is tensor.untyped_storage(). It has data_ptr(), the
    same for all views, and nbytes(). Returns an int.
    """
    storages = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def zero_head(z, head):
    """z with one head set to 0, as a hook at hook_z returns it to switch the head off. z: [batch,
    pos, head, d_head], which must not be edited in place. Returns a new tensor in which that head
    is 0.
    """
    z = z.clone()
    z[:, :, head] = 0.0
    return z


@torch.no_grad()
def steering_direction(model, towards, away, name):
    """The stream at the last token of one text minus that of another, [d_model].

    towards, away: tokens, [1, pos], whose lengths may differ. name: the hook to read, of shape
    [batch, pos, d_model]. model.run_with_cache(tokens) gives (logits, cache), and cache[name] the
    activation.
    """
    ends = []
    for tokens in (towards, away):
        _, cache = model.run_with_cache(tokens)
        ends.append(cache[name][0, -1])
    return ends[0] - ends[1]


def activation_gradient(model, tokens, metric, name):
    """The gradient of a metric by one activation, and the activation itself.

    tokens: [batch, pos]; metric(logits): a scalar; name: a full hook name. Returns (activation,
    gradient), of one shape. No weight's `.grad` may change: torch.autograd.grad(value, tensor)
    gives a gradient without that.
    """
    seen = []

    def see(tensor, hook):
        seen.append(tensor)

    with model.hooks([(name, see)]):
        value = metric(model(tokens))
    gradient = torch.autograd.grad(value, seen[0])[0]
    return seen[0].detach(), gradient
