"""Train transcoders (an MLP's output as a sum of features), and split an answer among features.

A transcoder is a dictionary that reads an MLP's input and writes the MLP's output:

    mlp_out = z W_dec + b_dec + error        z = activate(reading W_enc + b_enc), mostly 0

Freeze a prompt's attention patterns and LayerNorm scales. Between two MLPs the model then only adds
and multiplies by constants. So any number that is read from the stream, such as the answer or a
feature's input, is a sum over everything that was written earlier:

    answer = tokens + positions + features + errors + biases

Each term is a write times the answer's slope by it. One backward pass gives all slopes. The *error
nodes* are what the transcoders miss; they are in the sum, so that it is exact, but they are not
explained. The terms are direct contributions: attention may carry a write on, MLPs do not.
`total_effects` also counts what a write changes in the features of later MLPs.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: attribution.py, experiments/dictionaries/measure.py
Next: experiments/sparse_autoencoder.py
Source: Dunefsky et al. 2024 (transcoders); Marks et al. 2024 (error nodes); Ameisen et al. 2025
(attribution graphs: frozen patterns and scales, active features kept)
"""

from dataclasses import dataclass

import torch
from torch.func import functional_call

from activation_cache import get_act_name
from experiments.dictionaries.measure import describe_fit
from experiments.dictionaries.model import fit_dictionary
from head_ablation import ablate_layers
from losses import next_token_loss
from metrics import as_metric
from patching import replace_with
from utils import UserError, check_choice, check_count, check_tensor

# What is kept from the clean run: hook points, by the ends of their names, and a part of each MLP.
KEPT = {
    "writes": (("hook_pattern", "hook_scale"), "writes"),  # linear: MLPs write the same again
    "features": (("hook_pattern", "hook_scale"), "features"),  # linear: the same ones are active
    "patterns and scales": (("hook_pattern", "hook_scale"), None),  # here and below, MLPs run
    "scales": (("hook_scale",), None),
    "patterns": (("hook_pattern",), None),
    "nothing": ((), None),
}


# One MLP


def reading_point(model, layer):
    """The hook name of the input of this layer's transcoder, [batch, pos, d_model].

    It is the stream after ln2 has centred and scaled it. ln2's gain and bias come after this point;
    they are part of the map that a transcoder learns. Raises UserError for a layer without an MLP.
    """
    if model.cfg.attn_only:
        raise UserError("attn_only=True: this model has no MLP to transcode; take one with MLPs")
    layer = check_count("layer", layer, 0, model.cfg.n_layers - 1)
    if model.cfg.norm == "none":
        return get_act_name("mlp_in", layer)
    return get_act_name("normalized", layer, "ln2")


@torch.no_grad()
def read_and_written(model, tokens, layer):
    """An MLP's input and output, each [batch, pos, d_model]. tokens: [batch, pos]."""
    model.check_no_dropout()
    names = [reading_point(model, layer), get_act_name("mlp_out", layer)]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens), stop=layer + 1)
    return cache[names[0]], cache[names[1]]


def fit_transcoder(model, tokens, layer, recipe, seed, progress=None):
    """Train the Dictionary that computes a layer's MLP: from the MLP's input, its output.

    tokens: [batch, pos], texts to learn from. recipe: a DictionaryRecipe. progress: as in
    `fit_dictionary`. Raises UserError for a layer without an MLP.
    """
    reading, written = read_and_written(model, tokens, layer)
    return fit_dictionary(recipe, reading.flatten(0, 1), seed, target=written.flatten(0, 1),
                          progress=progress)


@torch.no_grad()
def transcoder_quality(model, transcoders, tokens):
    """How well transcoders replace their MLPs, on held-out tokens [batch, pos]: a dict.

    fit: {layer: as `describe_fit`}. loss, in nats a token: of the model ("intact"), with the output
    of all these MLPs replaced by that of their transcoders ("transcoder"), by its mean over texts
    and positions ("mean"), by 0 ("zero"). recovered: {"mean", "zero"}: the share of the loss added
    by such an ablation that the transcoders recover; 1 is all of it. Raises UserError for a layer
    without an MLP.
    """
    # each transcoder by itself
    fit = {}
    for layer, transcoder in transcoders.items():
        reading, written = read_and_written(model, tokens, layer)
        fit[layer] = describe_fit(transcoder, reading.flatten(0, 1), written.flatten(0, 1))

    # the model with these MLPs replaced
    logits, cache = model.run_with_cache(tokens, lambda name: name.endswith("mlp_out"))
    loss = {"intact": next_token_loss(logits, tokens).item()}
    with model.hooks(transcoder_hooks(model, transcoders)):
        loss["transcoder"] = next_token_loss(model(tokens), tokens).item()
    for mode in ("mean", "zero"):
        with ablate_layers(model, list(transcoders), "mlp", mode, reference=cache):
            loss[mode] = next_token_loss(model(tokens), tokens).item()

    recovered = {mode: (loss[mode] - loss["transcoder"]) / (loss[mode] - loss["intact"])
                 for mode in ("mean", "zero")}
    return {"fit": fit, "loss": loss, "recovered": recovered}


def transcoder_hooks(model, transcoders):
    """Hooks that replace each MLP's output by that of its transcoder."""
    readings = {}

    def keep(reading, hook):
        readings[hook.name] = reading

    def rewrite(transcoder, name):
        return lambda written, hook: transcoder.decode(transcoder.encode(readings[name]))

    hooks = []
    for layer, transcoder in transcoders.items():
        name = reading_point(model, layer)
        hooks += [(name, keep), (get_act_name("mlp_out", layer), rewrite(transcoder, name))]
    return hooks


# One answer


@dataclass(frozen=True)
class Contributions:
    """What each node adds to one number that is read from the stream; their sum is that number.

    value: the number itself. tokens, positions: [pos], from the embeddings. features: {layer: [pos,
    latent]}. errors: {layer: [pos]}, from the part of an MLP's output that its transcoder misses,
    or from all of it in a layer without a transcoder. biases: {name: a number}, those with an
    effect.
    """

    value: float
    tokens: torch.Tensor
    positions: torch.Tensor
    features: dict
    errors: dict
    biases: dict

    def sum(self):
        """The sum over all nodes."""
        nodes = [self.tokens, self.positions, *self.features.values(), *self.errors.values()]
        return sum(node.sum().item() for node in nodes) + sum(self.biases.values())

    @property
    def error_share(self):
        """The share of the error nodes in what MLPs add, by sizes without signs: 0 to 1.

        All features of a layer and position count as one node, as the error does. Otherwise many
        features that cancel would make the error look small.
        """
        errors = sum(error.abs().sum().item() for error in self.errors.values())
        features = sum(each.sum(-1).abs().sum().item() for each in self.features.values())
        return errors / (errors + features)


class FrozenRun:
    """The run of one prompt, in which patterns, LayerNorm scales and active features can be frozen.

    model: a GPT with MLPs. transcoders: {layer: Dictionary}, of some layers or all. tokens:
    [1, pos], the prompt. metric: the answer, linear in the logits, such as Metric.logit_diff.

    cache: the clean run. value: the answer there, a number. features: {layer: z [pos, latent]}.
    errors: {layer: [pos, d_model]}, mlp_out less the transcoder's output, or all of mlp_out in a
    layer without a transcoder.
    Raises UserError for other shapes of tokens, missing layers, and a model without MLPs.
    """

    @torch.no_grad()
    def __init__(self, model, transcoders, tokens, metric):
        check_tensor("tokens", tokens, "batch pos")
        if len(tokens) != 1:
            raise UserError(f"tokens is {list(tokens.shape)}; pass one prompt, [1, pos]")
        model.check_no_dropout()
        self.model = model
        self.transcoders = transcoders
        self.tokens = tokens
        self.metric = as_metric(metric)
        self.layers = range(model.cfg.n_layers)
        # a layer of `transcoders` that the model does not have fails here
        self.reading_points = {layer: reading_point(model, layer) for layer in
                               (*self.layers, *transcoders)}

        logits, self.cache = model.run_with_cache(tokens)
        self.value = self.metric(logits).item()
        self.features = {}
        self.errors = {}
        for layer in self.layers:
            self.errors[layer] = self.cache["mlp_out", layer][0]
            if layer in transcoders:
                z = transcoders[layer].encode(self.reading(layer))
                self.features[layer] = z
                self.errors[layer] = self.errors[layer] - transcoders[layer].decode(z)

    def reading(self, layer):
        """The input of a layer's MLP in the clean run, [pos, d_model]."""
        return self.cache[self.reading_points[layer]][0]

    # The frozen model

    def frozen_hooks(self, keep, n_copies=1):
        """Hooks that keep a part of the clean run, as in KEPT: [(name, fn)].

        With "features", an MLP writes its clean output plus the change of the features that were
        active; an MLP without a transcoder writes its clean output. n_copies: how many copies of
        the prompt run at once.
        """
        check_choice("keep", keep, KEPT)
        endings, of_mlps = KEPT[keep]
        hooks = [(name, replace_with(self.copies(clean, n_copies)))
                 for name, clean in self.cache.items() if name.endswith(endings)]

        for layer in self.layers if of_mlps else ():
            written = self.copies(self.cache["mlp_out", layer], n_copies)
            if of_mlps == "features" and layer in self.transcoders:
                hooks += self.active_features_hooks(layer, written)
            else:
                hooks.append((get_act_name("mlp_out", layer), replace_with(written)))
        return hooks

    def copies(self, clean, n_copies):
        """n_copies copies of a clean activation: [1, ...] -> [copy, ...]."""
        return clean.expand(n_copies, *clean.shape[1:])

    def active_features_hooks(self, layer, written):
        """Hooks that let only the features that were active respond to a change. written: [copy,
        pos, d_model], the clean output of the layer's MLP."""
        transcoder = self.transcoders[layer]
        W_enc = transcoder.W_enc.detach()
        W_dec = transcoder.W_dec.detach()
        is_active = self.features[layer] > 0  # [pos, latent]
        seen = {}

        def look(reading, hook):
            seen["change"] = reading - self.reading(layer)  # [copy, pos, d_model]

        def write(_, hook):
            return written + (seen["change"] @ W_enc * is_active) @ W_dec

        return [(self.reading_points[layer], look), (get_act_name("mlp_out", layer), write)]

    def slopes(self, number, keep):
        """A number's slope by each write: (value, {write: [pos, d_model]}, {bias: what it adds}).

        number(logits, readings) -> a scalar; readings: {layer: its MLP's input, [pos, d_model]}.
        keep: as in KEPT.
        """
        writes = {}
        readings = {}

        def capture(write, hook):
            # a frozen write is a constant, so it is made a leaf
            if not write.requires_grad:
                write = write.detach().requires_grad_()
            writes[hook.name] = write
            return write

        def look(reading, hook):
            readings[hook.name] = reading[0]

        # forward; the biases are leaves too
        places = [name for name in self.model.hook_points()
                  if name.endswith(("embed", "hook_mlp_out"))]
        biases = {name: bias.detach().clone().requires_grad_()
                  for name, bias in self.model.named_parameters()
                  if bias.ndim == 1 and not name.endswith(".w")}
        hooks = [*self.frozen_hooks(keep), (places, capture),
                 (list(set(self.reading_points.values())), look)]
        with torch.enable_grad(), self.model.hooks(hooks):
            logits = functional_call(self.model, biases, (self.tokens,))
            value = number(logits, {layer: readings[self.reading_points[layer]]
                                    for layer in self.layers})

        # backward
        leaves = [*writes.values(), *biases.values()]
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        of_writes = {name: gradient[0] for name, gradient in zip(writes, gradients, strict=False)}
        of_biases = {
            name: (bias * gradient).sum().item()
            for (name, bias), gradient in zip(biases.items(), gradients[len(writes):], strict=True)
            if gradient.any()
        }
        return value.item(), of_writes, of_biases

    # Contributions

    def contributions(self):
        """What each node adds to the answer directly: Contributions."""
        return self.take_apart(lambda logits, readings: self.metric(logits).sum())

    def incoming(self, layer, pos, latent):
        """What each earlier node adds to a feature's input: Contributions, with b_enc among the
        biases. Raises UserError for a feature that does not exist."""
        transcoder = self.transcoder_of(layer)
        check_count("pos", pos, 0, self.tokens.shape[1] - 1)
        check_count("latent", latent, 0, transcoder.W_enc.shape[1] - 1)
        direction = transcoder.W_enc[:, latent].detach()
        bias = transcoder.b_enc[latent].item()
        return self.take_apart(lambda logits, readings: readings[layer][pos] @ direction,
                               {f"{layer}.b_enc": bias})

    def take_apart(self, number, more_biases=None):
        """The Contributions to number(logits, readings), as in `slopes`.

        more_biases: {name: value}, added to the number from outside the model.
        """
        value, slopes, biases = self.slopes(number, "writes")
        more_biases = more_biases or {}

        def along(write, name):
            return (write * slopes[name]).sum(-1)  # [pos]

        # embeddings
        tokens = along(self.cache["embed"][0], "hook_embed")
        positions = torch.zeros_like(tokens)
        if self.model.position_embedding is not None:
            positions = along(self.cache["pos_embed"][0], "hook_pos_embed")

        # MLPs: features, errors, and the transcoder's own bias
        features = {}
        errors = {}
        for layer in self.layers:
            name = get_act_name("mlp_out", layer)
            errors[layer] = along(self.errors[layer], name)
            if layer in self.transcoders:
                features[layer] = self.along_features(layer, slopes[name])
                b_dec = self.transcoders[layer].b_dec.detach()
                biases[f"{layer}.b_dec"] = along(b_dec, name).sum().item()
        return Contributions(value + sum(more_biases.values()), tokens, positions, features, errors,
                             biases | more_biases)

    def along_features(self, layer, slope):
        """What each feature's write adds, [pos, latent]. slope: [pos, d_model], at mlp_out."""
        return self.features[layer] * (slope @ self.transcoders[layer].W_dec.detach().T)

    def transcoder_of(self, layer):
        """The transcoder of a layer. Raises UserError if it has none."""
        if layer not in self.transcoders:
            raise UserError(f"layer {layer} has no transcoder; choose from: "
                            f"{', '.join(map(str, self.transcoders))}")
        return self.transcoders[layer]

    # Effects, predicted and measured

    def direct_effects(self):
        """What each feature adds to the answer directly, {layer: [pos, latent]}."""
        return self.contributions().features

    def total_effects(self):
        """What each feature adds to the answer, also by later features: {layer: [pos, latent]}.

        The same features stay active, and every error stays as it was.
        """
        _, slopes, _ = self.slopes(lambda logits, readings: self.metric(logits).sum(), "features")
        return {layer: self.along_features(layer, slopes[get_act_name("mlp_out", layer)])
                for layer in self.transcoders}

    @torch.no_grad()
    def removal_effects(self, places, keep="nothing"):
        """By how much the answer falls if one feature's write at one position is removed: [n].

        places: [n, 3], (layer, pos, latent). keep: what is kept from the clean run, as in KEPT.
        """
        n = len(places)
        if n == 0:
            return places.new_zeros(0, dtype=self.cache["embed"].dtype)
        n_pos, d_model = self.cache["embed"].shape[1:]
        removed = {layer: self.cache["embed"].new_zeros(n, n_pos, d_model)
                   for layer in self.transcoders}
        for copy, (layer, pos, latent) in enumerate(places.tolist()):
            size = self.features[layer][pos, latent]
            removed[layer][copy, pos] = size * self.transcoders[layer].W_dec[latent]

        def without(layer):
            return lambda written, hook: written - removed[layer]

        hooks = self.frozen_hooks(keep, n)
        hooks += [(get_act_name("mlp_out", layer), without(layer)) for layer in removed]
        logits = self.model.run_with_hooks(self.copies(self.tokens, n), hooks)
        return self.value - self.metric(logits)

    def active_places(self, layer):
        """The active features of a layer that can reach the answer: [n, 3], (layer, pos, latent).

        After the last attention, only those at the position that is read can.
        """
        reaches = self.total_effects()[layer] != 0
        where = reaches.nonzero()
        return torch.cat([torch.full_like(where[:, :1], layer), where], 1)
