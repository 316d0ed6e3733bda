"""Chapter 7, instrument: hooks that listen, keep and edit, and are removed afterwards."""

from types import SimpleNamespace

import torch

from config import ModelConfig
from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import (
    Wrong,
    describe,
    expect,
    expect_close,
    expect_equal,
    expect_shape,
    random,
    random_ids,
)
from model import GPT

IMPORTS = ["import contextlib", "import torch"]


def tiny_model():
    """A GPT of two layers with large random weights."""
    return GPT(ModelConfig(n_layers=2, n_heads=2, d_model=6, n_ctx=8, d_vocab=9, init_scale=0.5))


TOKENS = random_ids(9, 2, 5)


# hook_point_call


def nobody_listens(hook_point_call):
    """without listeners it returns the same tensor object"""
    tensor = random(2, 3)
    expect(hook_point_call(SimpleNamespace(listeners=[]), tensor) is tensor,
           "without listeners the tensor itself should come back")


def none_leaves_it(hook_point_call):
    """a listener that returns None leaves the activation"""
    seen = []

    def listener(*args):
        expect(len(args) == 1, f"a listener was called with {len(args)} arguments, and takes the "
               "tensor alone: HookPoint.add has wrapped fn(tensor, hook) before")
        seen.append(args[0])

    point = SimpleNamespace(listeners=[listener])
    expect_close(hook_point_call(point, torch.ones(2)), torch.ones(2), "the activation", "number",
                 ask="None means: change nothing")
    expect_equal(len(seen), 1, "how often the listener was called")


def each_sees_what_the_one_before_made(hook_point_call):
    """two listeners: 1 + 1, then times 10, is 20"""
    point = SimpleNamespace(listeners=[lambda t: t + 1, lambda t: 10 * t])
    expect_close(hook_point_call(point, torch.ones(2)), torch.full((2,), 20.0), "the activation",
                 "number", ask="in the order in which they were added, each on the result of the "
                               "one before")


# listening


def it_is_there_inside_and_gone_after(listening):
    """inside the block fn is called; after the block the list is as before"""
    seen, listeners = [], [len]
    with listening(listeners, seen.append):
        expect_equal(len(listeners), 2, "the number of listeners inside",
                     ask="is fn added to this list, and not to a new one?")
        expect(listeners[0] is len, "fn should be added at the end, after those that were there")
        listeners[-1](7)
    expect_equal(seen, [7], "the tensors that fn has seen")
    expect(listeners == [len], f"after the block the list has {len(listeners)} listeners, and "
           "should have the 1 that was there before")


def it_is_gone_after_an_error(listening):
    """an error inside the block leaves no listener behind, and is not swallowed"""
    listeners = []
    try:
        with listening(listeners, len):
            raise KeyError("inside")
    except KeyError:
        expect_equal(len(listeners), 0, "the number of listeners after an error",
                     ask="try … finally")
        return
    raise Wrong("the error inside the block was swallowed")


def each_takes_out_its_own(listening):
    """the same function twice, one block inside the other: each block removes its own listener"""
    listeners = []
    with listening(listeners, len):
        outer = listeners[0]
        with listening(listeners, len):
            expect_equal(len(listeners), 2, "the number of listeners inside")
        expect_equal(len(listeners), 1, "the number of listeners after the inner block",
                     ask="one listener for each `with`")
        expect(listeners[0] is outer, "the inner block removed the outer one's listener")
        listeners.append(max)
    expect(listeners == [max], "a listener that was added later was removed, too")


# act_name


def the_names_of_a_block(act_name):
    """the names for ("z", 0), ("pre", 1) and ("resid_pre", 1)"""
    for name, layer, full in (("z", 0, "blocks.0.attn.hook_z"), ("pre", 1, "blocks.1.mlp.hook_pre"),
                              ("resid_pre", 1, "blocks.1.hook_resid_pre"),
                              ("attn_out", 0, "blocks.0.hook_attn_out")):
        expect_equal(act_name(name, layer), full, f"the name of ({name!r}, {layer})")


def the_names_outside(act_name):
    """("embed") is "hook_embed", and layer 0 is a layer"""
    expect_equal(act_name("embed"), "hook_embed", "the name of 'embed'")
    expect_equal(act_name("resid_post", 0), "blocks.0.hook_resid_post",
                 "the name of ('resid_post', 0)", ask="0 is not None")


def every_name_is_a_hook_of_the_model(act_name):
    """they are hooks of a real model"""
    points = tiny_model().hook_points()
    for name in ("q", "k", "v", "z", "attn_scores", "pattern", "pre", "post", "resid_mid",
                 "mlp_out"):
        expect(act_name(name, 1) in points, f"{act_name(name, 1)} is no hook of the model")


# keep_activations


def pair_of(result):
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise Wrong("two things should be returned, as in `return logits, kept`")
    return result


NAMES = ["blocks.0.hook_attn_out", "blocks.1.hook_resid_post"]


def it_gives_what_the_library_keeps(keep_activations):
    """logits and activations are those of run_with_cache"""
    model = tiny_model()
    logits, kept = pair_of(keep_activations(model, TOKENS, NAMES))
    want, cache = model.run_with_cache(TOKENS)
    expect_close(logits, want, "the logits", "batch pos d_vocab",
                 ask="did a hook return something?")
    expect(hasattr(kept, "keys"), f"what was kept is {describe(kept)}, and should be a dictionary "
           "{name: tensor}")
    expect(all(isinstance(name, str) for name in kept), "the keys of the dictionary should be "
           "names: in a hook, hook.name")
    missing = [name for name in NAMES if name not in kept]
    expect(not missing, f"{', '.join(missing)} was not kept: does the model run inside the `with`, "
           "and each hook keep its own?")
    expect(len(kept) == len(NAMES), f"{len(kept)} activations were kept, and should be the "
           f"{len(NAMES)} that were named")
    for name in NAMES:
        expect_close(kept[name], cache[name], name, "batch pos d_model")


def no_hook_is_left(keep_activations):
    """afterwards no hook is left"""
    model = tiny_model()
    keep_activations(model, TOKENS, NAMES)
    expect(not model.open_hooks(), f"{model.open_hooks()} still have hooks, which would fire in "
                                   "the next run")


def a_later_run_does_not_change_it(keep_activations):
    """another run does not change what was kept, and no graph is kept"""
    model = tiny_model()
    _, kept = pair_of(keep_activations(model, TOKENS, NAMES))
    before = {name: kept[name].clone() for name in NAMES}
    model((TOKENS + 1) % 9)
    for name in NAMES:
        expect_close(kept[name], before[name], f"{name} after another run", "batch pos d_model")
        expect(not kept[name].requires_grad, f"{name} keeps the whole graph of its run alive")


# count_bytes


def a_tensor_has_four_bytes_a_number(count_bytes):
    """10 numbers in float32 are 40 bytes, two such tensors 80"""
    expect_equal(count_bytes({"a": torch.zeros(10)}), 40, "the bytes of 10 numbers")
    expect_equal(count_bytes({"a": torch.zeros(10), "b": torch.zeros(2, 5)}), 80,
                 "the bytes of two tensors of 10 numbers")


def views_share_their_memory(count_bytes):
    """q, k and v, views of one product, are counted once"""
    qkv = torch.zeros(4, 30)
    q, k, v = qkv.split(10, dim=1)
    expect_equal(count_bytes({"q": q, "k": k, "v": v}), 480,
                 "the bytes of three views of 480 bytes")


def a_small_view_holds_all_of_its_memory(count_bytes):
    """one row of a large tensor keeps the large tensor alive"""
    expect_equal(count_bytes({"row": torch.zeros(100, 10)[0]}), 4000, "the bytes that a view of "
                 "one row of 100 holds")


# zero_head


def one_head_is_zero(zero_head):
    """head 1 is 0, the others stay"""
    z = random(2, 5, 3, 4)
    want = z.clone()
    want[:, :, 1] = 0
    expect_close(zero_head(z, 1), want, "z", "batch pos head d_head")


def the_activation_is_not_edited(zero_head):
    """the tensor that it was given stays as it is"""
    z = random(2, 5, 3, 4)
    zero_head(z, 1)
    expect(torch.equal(z, random(2, 5, 3, 4)), "z was edited in place, but caches and autograd "
                                               "may still need it")


def as_a_hook_it_switches_the_head_off(zero_head):
    """as a hook it does what zeros in W_O do"""
    model, other = tiny_model(), tiny_model()
    other.blocks[1].attn.W_O.data[0] = 0
    hook = ("blocks.1.attn.hook_z", lambda z, hook: zero_head(z, 0))
    expect_close(model.run_with_hooks(TOKENS, [hook]), other(TOKENS), "the logits",
                 "batch pos d_vocab")


# steering_direction

STREAM = "blocks.0.hook_resid_post"


def it_is_a_difference_at_the_ends(steering_direction):
    """the last position of one text minus the last of the other"""
    model = tiny_model()
    towards, away = TOKENS[:1], TOKENS[1:, :3]
    one = model.run_with_cache(towards)[1][STREAM][0, -1]
    other = model.run_with_cache(away)[1][STREAM][0, -1]
    expect_close(steering_direction(model, towards, away, STREAM), one - other, "the direction",
                 "d_model", ask="towards minus away, each at its own last position")


def a_text_has_no_direction_from_itself(steering_direction):
    """of one text, twice, it is 0"""
    direction = steering_direction(tiny_model(), TOKENS[:1], TOKENS[:1], STREAM)
    expect_close(direction, torch.zeros(6), "the direction", "d_model")


# activation_gradient


def logit_of(logits):
    return logits[:, -1, 3].sum()


def the_last_stream_s_gradient_is_finite_difference(activation_gradient):
    """a small push along one number moves the metric by the gradient"""
    name = "blocks.0.hook_resid_post"
    model = tiny_model().double()
    activation, gradient = pair_of(activation_gradient(model, TOKENS, logit_of, name))
    want = model.run_with_cache(TOKENS)[1][name]
    expect_close(activation, want, "the activation", "batch pos d_model")
    expect_shape(gradient, want.shape, "the gradient")
    for place in ((0, 4, 0), (1, 2, 3)):
        push = torch.zeros_like(want)
        push[place] = 1e-4
        moved = [logit_of(model.run_with_hooks(TOKENS, [(name, lambda t, hook, by=by: t + by)]))
                 for by in (push, -push)]
        expect_close(gradient[place], (moved[0] - moved[1]) / 2e-4,
                     f"the gradient at batch, pos, d_model {place}", tolerance=1e-3)


def weights_are_left_alone(activation_gradient):
    """no weight's .grad changes, and no hook is left"""
    model = tiny_model()
    activation_gradient(model, TOKENS, logit_of, STREAM)
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    expect(not touched, f"{len(touched)} weights have a .grad now: backward() fills them, and "
           "torch.autograd.grad does not")
    expect(not model.open_hooks(), f"{model.open_hooks()} still have hooks, which would fire in "
                                   "the next run")


EXERCISES = [
    Exercise(
        name="hook_point_call", source="hooks.HookPoint.__call__", minutes=10, difficulty=1,
        needed_for="everything that looks inside", task="Do what a hook point does. Listeners take "
        "the tensor alone; HookPoint.add has wrapped fn(tensor, hook) into one.",
        checks=(nobody_listens, none_leaves_it, each_sees_what_the_one_before_made),
        hints=("A loop over self.listeners.", "Each listener sees what the one before it returned.",
               "changed = listener(tensor); if changed is not None: tensor = changed."),
        mistakes=(
            Mistake("when every listener sees the first tensor", "changed = listener(tensor)",
                    "changed = listener(first)",
                    also=(("    for listener in", "    first = tensor\n    for listener in"),)),
            Mistake("when the first tensor that a listener returns ends the loop",
                    "            tensor = changed\n", "            return changed\n"),
            Mistake("when None replaces the activation",
                    "        if changed is not None:\n            tensor = changed\n",
                    "        tensor = changed\n"),
            Mistake("when the returned tensors are ignored", "            tensor = changed\n",
                    "            pass\n"),
            Mistake("in the opposite order", "in self.listeners:", "in reversed(self.listeners):"),
        )),
    Exercise(
        name="listening", source=None, minutes=15, difficulty=2, needed_for="hooks that never leak",
        task="A context manager (@contextlib.contextmanager stands above it): before the yield, "
             "and after it.",
        checks=(it_is_there_inside_and_gone_after, it_is_gone_after_an_error,
                each_takes_out_its_own),
        hints=("Append before the yield, remove after it.",
               "What must also happen after an error belongs into finally.",
               "list.remove removes the first equal item: wrap fn in a new function, which equals "
               "no other."),
        mistakes=(
            Mistake("when an error inside leaves the listener behind",
                    "    try:\n        yield\n    finally:\n        listeners[:]",
                    "    yield\n    listeners[:]"),
            Mistake("when all other listeners are removed, too",
                    "listeners[:] = [other for other in listeners if other is not listener]",
                    "listeners.clear()"),
            Mistake("when always the last listener is removed",
                    "listeners[:] = [other for other in listeners if other is not listener]",
                    "listeners.pop()"),
            Mistake("when nothing is removed",
                    "listeners[:] = [other for other in listeners if other is not listener]",
                    "pass"),
        )),
    Exercise(
        name="act_name", source=None, minutes=5, difficulty=1, needed_for="reading caches",
        task="TransformerLens's names, without the LayerNorms'.",
        checks=(the_names_of_a_block, the_names_outside, every_name_is_a_hook_of_the_model),
        hints=("Four cases: no layer, attention, MLP, the block itself.",
               "layer 0 is a layer: ask `is None`.", 'f"blocks.{layer}.attn.hook_{name}".'),
        mistakes=(
            Mistake("when layer 0 counts as no layer", "if layer is None:", "if not layer:"),
            Mistake("when attn_scores is forgotten among attention's names", '"attn_scores", ', ""),
            Mistake("when resid_pre and resid_post are taken for the MLP's pre and post",
                    'name in ("pre", "post")', '"pre" in name or "post" in name'),
            Mistake("when the MLP's hooks get the block's names",
                    '    if name in ("pre", "post"):\n        return f"blocks.{layer}.mlp.hook_'
                    '{name}"\n', ""),
        )),
    Exercise(
        name="keep_activations", source=None, minutes=15, difficulty=1,
        needed_for="caches", task="Use a hook that returns nothing, and a dictionary.",
        checks=(it_gives_what_the_library_keeps, no_hook_is_left, a_later_run_does_not_change_it),
        hints=("The hook writes into a dictionary outside of it, at hook.name.",
               "It returns None: nothing is changed.",
               "with model.hooks([(name, keep) for name in names]): logits = model(tokens)."),
        mistakes=(
            Mistake("when the hooks are left open",
                    "    with model.hooks([(name, keep) for name in names]):\n"
                    "        logits = model(tokens)\n",
                    "    for name in names:\n        model.hook_points()[name].add(keep)\n"
                    "    logits = model(tokens)\n"),
            Mistake("when the model runs after the `with` block has ended",
                    "        logits = model(tokens)\n", "        pass\n"
                    "    logits = model(tokens)\n"),
            Mistake("when only the last name's activation is kept", "kept[hook.name] = ",
                    "kept[names[-1]] = "),
            Mistake("when the tensors keep their graph", "        logits = model(tokens)\n",
                    "        with torch.enable_grad():\n            logits = model(tokens)\n"),
        )),
    Exercise(
        name="count_bytes", source=None, minutes=10, difficulty=1,
        needed_for="knowing what a cache costs", task="Count memory, not numbers.",
        checks=(a_tensor_has_four_bytes_a_number, views_share_their_memory,
                a_small_view_holds_all_of_its_memory),
        hints=("Three views of one product share one memory.",
               "Gather memories in a dictionary by data_ptr().",
               "storage = tensor.untyped_storage(); storages[storage.data_ptr()] = "
               "storage.nbytes()."),
        mistakes=(
            Mistake("when every view is counted", "sum(storages.values())",
                    "sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())"),
            Mistake("when the numbers are added up, whatever memory they lie in",
                    "sum(storages.values())",
                    "sum(each.numel() * each.element_size() for each in tensors.values())"),
            Mistake("when only a view's own numbers count", "= storage.nbytes()",
                    "= tensor.numel() * tensor.element_size()"),
            Mistake("of numbers instead of bytes", "= storage.nbytes()",
                    "= storage.nbytes() // tensor.element_size()"),
        )),
    Exercise(
        name="zero_head", source=None, minutes=5, difficulty=1, needed_for="ablation (chapter 9)",
        task="Write the edit itself; it is called with z.",
        checks=(one_head_is_zero, the_activation_is_not_edited,
                as_a_hook_it_switches_the_head_off),
        hints=("The heads are axis 2.", "Edit a copy: z.clone().", "z[:, :, head] = 0.0."),
        mistakes=(
            Mistake("when z is edited in place", "    z = z.clone()\n", ""),
            Mistake("when a position is zeroed instead of a head", "z[:, :, head]", "z[:, head]"),
            Mistake("when a text of the batch is zeroed instead of a head", "z[:, :, head]",
                    "z[head]"),
            Mistake("when a dimension of all heads is zeroed", "z[:, :, head]", "z[..., head]"),
            Mistake("when all other heads are zeroed", "    z[:, :, head] = 0.0\n    return z\n",
                    "    kept = torch.zeros_like(z)\n    kept[:, :, head] = z[:, :, head]\n"
                    "    return kept\n"),
        )),
    Exercise(
        name="steering_direction", source=None, minutes=10, difficulty=1,
        needed_for="steering", task="Subtract the activations of two runs.",
        checks=(it_is_a_difference_at_the_ends, a_text_has_no_direction_from_itself),
        hints=("cache[name] is [1, pos, d_model].", "[0, -1] is the last token's stream.",
               "The first text's minus the second's."),
        mistakes=(
            Mistake("of away minus towards", "ends[0] - ends[1]", "ends[1] - ends[0]"),
            Mistake("at the first token", "[0, -1]", "[0, 0]"),
            Mistake("of length 1: the difference should keep its length", "ends[0] - ends[1]",
                    "(ends[0] - ends[1]) / (ends[0] - ends[1]).norm()"),
            Mistake("of the means over all tokens", "[0, -1]", "[0].mean(0)"),
        )),
    Exercise(
        name="activation_gradient", source=None, minutes=20, difficulty=3,
        needed_for="attribution patching (chapter 10)",
        task="Keep the activation in a hook, and differentiate the metric by it.",
        checks=(the_last_stream_s_gradient_is_finite_difference, weights_are_left_alone),
        hints=("A hook can keep the tensor itself, graph and all: no clone, no detach.",
               "torch.autograd.grad(value, tensor) returns a tuple of one gradient.",
               "Inside model.hooks: value = metric(model(tokens)); then autograd.grad(value, "
               "seen[0])[0]."),
        mistakes=(
            Mistake("when backward() fills the weights' .grad",
                    "gradient = torch.autograd.grad(value, seen[0])[0]",
                    "seen[0].retain_grad()\n    value.backward()\n    gradient = seen[0].grad"),
            Mistake("with activation times gradient", "return seen[0].detach(), gradient",
                    "return seen[0].detach(), seen[0].detach() * gradient"),
            Mistake("with the absolute gradient", "return seen[0].detach(), gradient",
                    "return seen[0].detach(), gradient.abs()"),
            Mistake("when activation and gradient are exchanged",
                    "return seen[0].detach(), gradient", "return gradient, seen[0].detach()"),
        )),
]


def cache_megabytes():
    """What the cache of the default model holds for 2 texts of 20 tokens."""
    tokens = random_ids(65, 2, 20)
    with torch.no_grad():
        return GPT(ModelConfig(d_vocab=65)).run_with_cache(tokens)[1].nbytes / 1e6


PREDICTIONS = [
    Prediction("The default model has 3 layers and d_model 80. Its cache keeps every activation "
               "for 2 texts of 20 tokens, except those that are kept only when named. How many "
               "megabytes is that?",
               cache_megabytes, "cache.nbytes, counted now",
               printed="58 activations, {} MB)"),
]
