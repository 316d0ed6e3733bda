"""Transcoders: an MLP written as features, and an answer taken apart into them, exactly.

A transcoder is a dictionary that reads what an MLP reads and writes what it writes:

    mlp_out = z W_dec + b_dec + error        z = activate(reading W_enc + b_enc), mostly 0

Keep a prompt's attention patterns and LayerNorm scales as they are. What is left of the model
between two MLPs only adds and multiplies by constants. So whatever the stream is read for (the
answer, or what a feature sees before it is active) is a sum over all that was written earlier:

    answer = tokens + positions + features + errors + biases

Each term is a write times the slope of the answer by it, and one backward pass gives all of them.
The *error nodes* are what the transcoders miss: counted, so that nothing is left over, but not
explained. The sum is of direct contributions (attention may carry them, MLPs do not). What a later
MLP's features make of a write is added by `total_effects`.

Chapter: COURSE_ROADMAP.md, 14 (superposition and dictionaries)
Prerequisites: attribution.py, experiments/dictionaries/trained.py
Next: experiments/dictionaries/report_transcoder.py
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

# What stays as in the clean run: hook points, by the ends of their names, and a part of each MLP.
KEPT = {
    "writes": (("hook_pattern", "hook_scale"), "writes"),  # linear: MLPs write what they wrote
    "features": (("hook_pattern", "hook_scale"), "features"),  # linear: the same ones are active
    "patterns and scales": (("hook_pattern", "hook_scale"), None),  # MLPs run, from here on
    "scales": (("hook_scale",), None),
    "patterns": (("hook_pattern",), None),
    "nothing": ((), None),
}


# One MLP


def reading_point(model, layer):
    """The hook name of what a transcoder of this layer's MLP reads, [batch, pos, d_model].

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
    """What an MLP reads and what it writes, each [batch, pos, d_model]. tokens: [batch, pos]."""
    model.check_no_dropout()
    names = [reading_point(model, layer), get_act_name("mlp_out", layer)]
    with model.caching(names) as cache:
        model.run_blocks(model.embed(tokens), stop=layer + 1)
    return cache[names[0]], cache[names[1]]


def fit_transcoder(model, tokens, layer, recipe, seed, progress=None):
    """The Dictionary that writes what the MLP of a layer writes, from what it reads.

    tokens: [batch, pos], of the texts that it learns from. recipe: a DictionaryRecipe. progress: is
    told how many steps are done. Raises UserError for a layer without an MLP.
    """
    reading, written = read_and_written(model, tokens, layer)
    return fit_dictionary(recipe, reading.flatten(0, 1), seed, target=written.flatten(0, 1),
                          progress=progress)


@torch.no_grad()
def transcoder_quality(model, transcoders, tokens):
    """How well transcoders stand in for their MLPs, on held-out tokens [batch, pos]: a dict.

    fit: {layer: what `describe_fit` says of it}. loss, in nats a token: of the model ("intact"),
    with all of these MLPs replaced by what their transcoders write ("transcoder"), by the mean of
    mlp_out over texts and positions ("mean"), by 0 ("zero"). recovered: {"mean", "zero"}: the share
    that the transcoders give back of the loss that such an ablation costs; 1 is all. Raises
    UserError for a layer without an MLP.
    """
    # each by itself
    fit = {}
    for layer, transcoder in transcoders.items():
        reading, written = read_and_written(model, tokens, layer)
        fit[layer] = describe_fit(transcoder, reading.flatten(0, 1), written.flatten(0, 1))

    # the model without these MLPs
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
    """Hooks that put what each transcoder writes in place of its MLP's output."""
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

    value: the number itself. tokens, positions: [pos], of the embeddings. features: {layer: [pos,
    latent]}. errors: {layer: [pos]}, of what an MLP wrote beyond its transcoder, or of all that it
    wrote where it has none. biases: {name: a number}, those with an effect.
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
        """The error nodes' part of what MLPs add, sizes without signs: 0 to 1.

        Within a layer and a position all features count as one node, as the error does: many
        features that cancel would else make the error look small.
        """
        errors = sum(error.abs().sum().item() for error in self.errors.values())
        features = sum(each.sum(-1).abs().sum().item() for each in self.features.values())
        return errors / (errors + features)


class FrozenRun:
    """One prompt's run, whose patterns, LayerNorm scales and active features can be kept.

    model: a GPT with MLPs. transcoders: {layer: Dictionary}, of some layers or all. tokens:
    [1, pos], the prompt. metric: the answer, linear in the logits, such as Metric.logit_diff.

    cache: the clean run. value: the answer there, a number. features: {layer: z [pos, latent]}.
    errors: {layer: [pos, d_model]}, mlp_out less what the transcoder writes; all of it in layers
    without one.
    Raises UserError for another shape of tokens, layers that are not there, a model without MLPs.
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
        # a layer of `transcoders` that is not there is refused here
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
        """What the MLP of a layer reads in the clean run, [pos, d_model]."""
        return self.cache[self.reading_points[layer]][0]

    # The frozen model

    def frozen_hooks(self, keep, n_copies=1):
        """Hooks that keep some of the clean run, as in KEPT: [(name, fn)].

        With "features" an MLP writes what it wrote, and what the features that were active add
        where they now see something else; one without a transcoder writes what it wrote. n_copies:
        how many copies of the prompt are run at once.
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
        """[1, ...] -> [copy, ...]."""
        return clean.expand(n_copies, *clean.shape[1:])

    def active_features_hooks(self, layer, written):
        """Hooks that let the active features of a layer see what has changed, and no others."""
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
        """(the number, {write: its slope [pos, d_model]}, {bias: what it adds}).

        number(logits, readings) -> a scalar; readings: {layer: what its MLP reads, [pos, d_model]}.
        """
        writes = {}
        readings = {}

        def capture(write, hook):
            # a write that is kept is a constant, and becomes a leaf
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
        """What each node adds to the answer by itself: Contributions."""
        return self.take_apart(lambda logits, readings: self.metric(logits).sum())

    def incoming(self, layer, pos, latent):
        """What each earlier node adds to what a feature sees before it is active: Contributions,
        b_enc among the biases. Raises UserError for a feature that is not there."""
        transcoder = self.transcoder_of(layer)
        check_count("pos", pos, 0, self.tokens.shape[1] - 1)
        check_count("latent", latent, 0, transcoder.W_enc.shape[1] - 1)
        direction = transcoder.W_enc[:, latent].detach()
        bias = transcoder.b_enc[latent].item()
        return self.take_apart(lambda logits, readings: readings[layer][pos] @ direction,
                               {f"{layer}.b_enc": bias})

    def take_apart(self, number, more_biases=None):
        """Contributions to number(logits, readings), as in `slopes`, and to what is added to it
        from outside of the model, {bias: its value}."""
        value, slopes, biases = self.slopes(number, "writes")
        more_biases = more_biases or {}

        def along(write, name):
            return (write * slopes[name]).sum(-1)  # [pos]

        # embeddings
        tokens = along(self.cache["embed"][0], "hook_embed")
        positions = torch.zeros_like(tokens)
        if self.model.position_embedding is not None:
            positions = along(self.cache["pos_embed"][0], "hook_pos_embed")

        # MLPs: features, what they miss, and the transcoder's own bias
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
        """What each feature's write adds, [pos, latent], by the slope [pos, d_model] there."""
        return self.features[layer] * (slope @ self.transcoders[layer].W_dec.detach().T)

    def transcoder_of(self, layer):
        """Raises UserError for a layer that has no transcoder."""
        if layer not in self.transcoders:
            raise UserError(f"layer {layer} has no transcoder; choose from: "
                            f"{', '.join(map(str, self.transcoders))}")
        return self.transcoders[layer]

    # Effects, predicted and measured

    def direct_effects(self):
        """What each feature adds to the answer by itself, {layer: [pos, latent]}."""
        return self.contributions().features

    def total_effects(self):
        """What each feature adds to the answer, also through later features: {layer: [pos,
        latent]}. Which of these are active is kept, and so is every error."""
        _, slopes, _ = self.slopes(lambda logits, readings: self.metric(logits).sum(), "features")
        return {layer: self.along_features(layer, slopes[get_act_name("mlp_out", layer)])
                for layer in self.transcoders}

    @torch.no_grad()
    def removal_effects(self, places, keep="nothing"):
        """By how much the answer falls when one feature's write at one position is removed: [n].

        places: [n, 3], (layer, pos, latent). keep: what stays as in the clean run, of KEPT.
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

        After the last attention none can, but at the position that is read.
        """
        reaches = self.total_effects()[layer] != 0
        where = reaches.nonzero()
        return torch.cat([torch.full_like(where[:, :1], layer), where], 1)
