"""Chapter 9, intervene: ablation, patching, paths, and whether a score finds the right heads."""

from itertools import permutations

import torch

from course.engine.catalogue import Exercise, Mistake, Prediction
from course.engine.expect import Wrong, expect, expect_close, random, random_ids
from course.engine.models import answer, busy_model, cache_of
from course.engine.page import stated

IMPORTS = ["import torch"]
CLEAN = random_ids(9, 3, 5)
CORRUPTED = random_ids(9, 3, 5, seed=1)


# derangement


def none_stays(derangement):
    """nothing stays in its place, in 50 draws of 4 things"""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        order = derangement(4, generator)
        expect_close(order.sort().values, torch.arange(4), "the order, sorted,", "place",
                     ask="each thing exactly once")
        stays = (order == torch.arange(4)).nonzero().flatten().tolist()
        expect(not stays, f"in {order.tolist()} thing {stays[:1]} stays in its place: its own "
               "value would be put back, and nothing removed")


def all_of_them_are_drawn(derangement):
    """of 4 things all 9 such orders come up, about equally often"""
    generator = torch.Generator().manual_seed(0)
    counts = {}
    for _ in range(900):
        order = tuple(derangement(4, generator).tolist())
        counts[order] = counts.get(order, 0) + 1
    missing = next((order for order in permutations(range(4)) if order not in counts
                    and all(thing != place for place, thing in enumerate(order))), None)
    expect(missing is None, f"of the 9 orders of 4 things only {len(counts)} came up in 900 draws; "
           f"{list(missing or ())} never did, in which nothing stays either")
    expect(min(counts.values()) > 60, f"of 900 draws, one of the 9 orders came up "
           f"{min(counts.values())} times, and should about 100 times")


def the_generator_decides(derangement):
    """the same generator gives the same order"""
    first, second = (derangement(8, torch.Generator().manual_seed(5)) for _ in range(2))
    expect(torch.equal(first, second), "the same generator gave two different orders")


# replacement_value

Z = random(4, 5, 2, 3)


def as_z(value, mode):
    """A value of replacement_value, broadcast to z."""
    try:
        return torch.broadcast_to(value, Z.shape)
    except RuntimeError:
        raise Wrong(f"the value of mode {mode} is {list(value.shape)}, which does not broadcast to "
                    f"z, [batch, pos, head, d_head] {list(Z.shape)}: an axis over which a mean was "
                    "taken may stay, with length 1 (keepdim=True)") from None


def zero_is_zero(replacement_value):
    """"zero" is 0"""
    expect_close(as_z(replacement_value(Z, "zero"), "zero"), torch.zeros_like(Z), "the value",
                 "batch pos head d_head")


def mean_is_over_texts_and_positions(replacement_value):
    """"mean" is one vector a head, the same for all texts and positions"""
    want = Z.mean((0, 1)).expand_as(Z)
    expect_close(as_z(replacement_value(Z, "mean"), "mean"), want, "the value of mode mean",
                 "batch pos head d_head", ask="over texts and positions, and not over heads")


def mean_pos_keeps_the_positions(replacement_value):
    """"mean_pos" is a mean over texts, at each position its own"""
    expect_close(as_z(replacement_value(Z, "mean_pos"), "mean_pos"), Z.mean(0).expand_as(Z),
                 "the value of mode mean_pos", "batch pos head d_head")


def resample_takes_another_text(replacement_value):
    """"resample" is what text source[i] has, for text i"""
    source = torch.tensor([2, 3, 1, 0])
    want = torch.stack([Z[2], Z[3], Z[1], Z[0]])
    expect_close(replacement_value(Z, "resample", source), want, "the value of mode resample",
                 "batch pos head d_head", ask="row i gets row source[i]")


# ablated_logits


def its_own_value_changes_nothing(ablated_logits):
    """a head's own z in its place changes nothing"""
    model = busy_model()
    z = cache_of(model, CLEAN)["z", 1]
    expect_close(ablated_logits(model, CLEAN, 1, 0, z), model(CLEAN), "the logits",
                 "batch pos d_vocab")


def zero_is_zero_in_W_O(ablated_logits):
    """zero z of one head does what zeros in its W_O do"""
    model, other = busy_model(), busy_model()
    other.blocks[0].attn.W_O.data[1] = 0
    zero = torch.zeros(1, 1, 2, 3)
    expect_close(ablated_logits(model, CLEAN, 0, 1, zero), other(CLEAN), "the logits",
                 "batch pos d_vocab", ask="one head, in one layer, at all positions")


def a_mean_is_broadcast(ablated_logits):
    """a mean over texts and positions, [head, d_head], is the value at each of them"""
    model = busy_model()
    mean = random(2, 3)
    with torch.no_grad():
        z = cache_of(model, CLEAN)["z", 1].clone()
        change = (mean[0] - z[:, :, 0]) @ model.blocks[1].attn.W_O[0]
        _, cache = model.run_with_cache(CLEAN)
        mid = cache["resid_mid", 1] + change
        want = model.unembed(mid + model.blocks[1].mlp(model.blocks[1].ln2(mid)))
    expect_close(ablated_logits(model, CLEAN, 1, 0, mean), want, "the logits",
                 "batch pos d_vocab", ask="a value that broadcasts to z is first expanded to it")


def the_model_is_as_before(ablated_logits):
    """afterwards the model is what it was"""
    model = busy_model()
    before = model(CLEAN)
    ablated_logits(model, CLEAN, 0, 1, torch.zeros(1, 1, 2, 3))
    expect_close(model(CLEAN), before, "the logits of the next run", "batch pos d_vocab",
                 ask="was a weight edited, or a hook not removed?")


# patch_position

STREAM = "blocks.1.hook_resid_pre"


def clean_into_clean_is_nothing(patch_position):
    """a run's own activation changes nothing"""
    model = busy_model()
    expect_close(patch_position(model, CLEAN, cache_of(model, CLEAN), STREAM, 2), model(CLEAN),
                 "the logits", "batch pos d_vocab")


def before_the_position_nothing_moves(patch_position):
    """a patch at position 2 leaves the logits of 0 and 1, and changes those of 2"""
    model = busy_model()
    logits = patch_position(model, CORRUPTED, cache_of(model, CLEAN), STREAM, 2)
    moved = (logits - model(CORRUPTED)).abs().amax((0, 2))
    expect(bool((moved[:2] < 1e-5).all()), f"a patch at position 2 moves the logits of an earlier "
           f"one by {moved[:2].max():.3g}: which run is patched, and where?")
    expect(bool(moved[2] > 1e-3), "a patch at position 2 does not move its own logits: does the "
           "hook return the new activation, and is it the other run's?")


def it_is_the_naive_edit(patch_position):
    """it equals going on from the stream in which that position was exchanged"""
    model = busy_model()
    resid = model.run_blocks(model.embed(CORRUPTED), stop=1).detach()
    resid[:, 2] = model.run_blocks(model.embed(CLEAN), stop=1)[:, 2].detach()
    want = model.unembed(model.run_blocks(resid, start=1))
    got = patch_position(model, CORRUPTED, cache_of(model, CLEAN), STREAM, 2)
    expect_close(got, want, "the logits", "batch pos d_vocab")


def the_cache_is_left_alone(patch_position):
    """what was cached stays as it was"""
    model = busy_model()
    cache = cache_of(model, CLEAN)
    before = cache[STREAM].clone()
    patch_position(model, CORRUPTED, cache, STREAM, 2)
    expect(torch.equal(cache[STREAM], before), "the cache was written into: edit a "
           "copy, .clone()")


# denoise_stream


def it_has_a_number_for_each_place(denoise_stream):
    """it is [layer, pos]"""
    values = denoise_stream(busy_model(), CLEAN, CORRUPTED, answer)
    expect(getattr(values, "shape", None) == (2, 5), f"for 2 layers and 5 positions it should be "
           f"[2, 5], not {list(getattr(values, 'shape', []))}")


def with_the_same_text_it_is_the_metric(denoise_stream):
    """clean into clean is the clean metric, everywhere"""
    model = busy_model()
    want = answer(model(CLEAN)).mean().expand(2, 5)
    expect_close(denoise_stream(model, CLEAN, CLEAN, answer), want, "the metric", "layer pos",
                 ask="the patched run's metric itself, its mean over the batch")


def the_corrupted_run_is_patched_from_the_clean_one(denoise_stream):
    """each cell equals the edit of the corrupted run by hand"""
    model = busy_model()
    values = denoise_stream(model, CLEAN, CORRUPTED, answer)
    for layer, pos in ((0, 4), (1, 4), (0, 1)):
        resid = model.run_blocks(model.embed(CORRUPTED), stop=layer).detach()
        resid[:, pos] = model.run_blocks(model.embed(CLEAN), stop=layer)[:, pos].detach()
        want = answer(model.unembed(model.run_blocks(resid, start=layer))).mean()
        expect_close(values[layer, pos], want, f"the metric at layer {layer}, position {pos}",
                     ask="denoising: the corrupted run runs, and gets clean parts")


# normalise_effect


def nothing_is_zero_and_all_is_one(normalise_effect):
    """a metric of the corrupted run is 0, of the clean run 1, halfway a half"""
    got = normalise_effect(torch.tensor([-1.0, 3.0, 1.0]), torch.tensor(-1.0), torch.tensor(3.0))
    expect_close(got, torch.tensor([0, 1, 0.5]), "the share", "cell",
                 ask="0 is the corrupted run, and 1 is the clean run")


def it_may_be_above_one(normalise_effect):
    """beyond the clean run it is above 1, and not cut off"""
    got = normalise_effect(torch.tensor([5.0, -2.0]), torch.tensor(0.0), torch.tensor(4.0))
    expect_close(got, torch.tensor([1.25, -0.5]), "the share", "cell")


# direct_effect


def from_the_same_text_nothing_moves(direct_effect):
    """with the same text twice the logits are the clean ones"""
    model = busy_model()
    expect_close(direct_effect(model, CLEAN, CLEAN, 0, 1), model(CLEAN), "the logits",
                 "batch pos d_vocab", ask="the whole last stream is read, LayerNorm included")


def a_head_of_the_last_layer_has_no_other_way_but_the_mlp(direct_effect):
    """only the head's write is exchanged, in the last stream"""
    model = busy_model()
    clean, corrupted = cache_of(model, CLEAN), cache_of(model, CORRUPTED)
    for layer, head in ((1, 0), (0, 1)):
        change = (corrupted["z", layer] - clean["z", layer])[:, :, head]
        write = change @ model.blocks[layer].attn.W_O[head]
        want = model.unembed(clean["resid_post", 1] + write)
        expect_close(direct_effect(model, CLEAN, CORRUPTED, layer, head), want,
                     f"the logits for head {head} of layer {layer}", "batch pos d_vocab",
                     ask="corrupted less clean, of one head, in the clean stream; later layers do "
                         "not see the change")


# auroc


def all_on_top_is_one(auroc):
    """all true ones on top is 1, all at the bottom 0"""
    truth = torch.tensor([True, True, False, False])
    expect_close(auroc(torch.tensor([4.0, 3, 2, 1]), truth), 1.0, "the area")
    expect_close(auroc(torch.tensor([1.0, 2, 3, 4]), truth), 0.0, "the area of the worst order")


def of_four_pairs_three(auroc):
    """true ones 4 and 2, others 3 and 1: three of four pairs are right"""
    got = auroc(torch.tensor([4.0, 2, 3, 1]), torch.tensor([True, True, False, False]))
    expect_close(got, 0.75, "the area", ask="4 beats 3 and 1, 2 beats 1")


def a_tie_counts_half(auroc):
    """scores that are all equal have 1/2"""
    got = auroc(torch.ones(5), torch.tensor([True, False, True, False, False]))
    expect_close(got, 0.5, "the area", ask="a tie counts half")


EXERCISES = [
    Exercise(
        name="derangement", source="head_ablation.derangement", minutes=10, difficulty=1,
        needed_for="resample ablation", task="Draw until nothing stays in its place; it takes 2.7 "
                                             "draws on average.",
        checks=(none_stays, all_of_them_are_drawn, the_generator_decides),
        hints=("torch.randperm(n, generator=generator) is a random order.",
               "Compare it with torch.arange(n).", "while True: draw; return it if none is equal."),
        mistakes=(
            Mistake("when some may stay in their place",
                    "        if (order != torch.arange(n)).all():\n            return order\n",
                    "        return order\n"),
            Mistake("when it is enough that one thing moves", ".all()", ".any()"),
            Mistake("with a shift by one only",
                    "torch.randperm(n, generator=generator)",
                    "torch.arange(n).roll(1)"),
            Mistake("when the generator is not used", "torch.randperm(n, generator=generator)",
                    "torch.randperm(n)"),
        )),
    Exercise(
        name="replacement_value", source=None, minutes=10, difficulty=1, needed_for="ablation",
        task="Four ways of taking something away; they are not the same question.",
        checks=(zero_is_zero, mean_is_over_texts_and_positions, mean_pos_keeps_the_positions,
                resample_takes_another_text),
        hints=("Axes: batch 0, pos 1, head 2, d_head 3.", "keepdim=True lets the mean broadcast.",
               "z[source] picks whole texts."),
        mistakes=(
            Mistake("with zero where the mean is meant", "z.mean((0, 1), keepdim=True)",
                    "torch.zeros_like(z)"),
            Mistake("with the mean over heads too", "z.mean((0, 1), keepdim=True)",
                    "z.mean((0, 1, 2), keepdim=True)"),
            Mistake("when the mean is over texts only, and each position keeps its own",
                    "z.mean((0, 1), keepdim=True)", "z.mean((0,), keepdim=True)"),
            Mistake("when the order is not used: each text gets the one before it",
                    "return z[source]", "return z.roll(1, 0)"),
            Mistake("when mean_pos is over positions instead of texts", "z.mean(0, keepdim=True)",
                    "z.mean(1, keepdim=True)"),
            Mistake("when every text gets its own value back", "return z[source]", "return z"),
            Mistake("when the order is used the other way round", "z[source]",
                    "z[source.argsort()]"),
        )),
    Exercise(
        name="ablated_logits", source=None, minutes=15, difficulty=2, needed_for="head importance",
        task="Edit one head with one hook.",
        checks=(its_own_value_changes_nothing, zero_is_zero_in_W_O, a_mean_is_broadcast,
                the_model_is_as_before),
        hints=("hook_z lies in blocks.{layer}.attn.", "Clone z, and write that head's part.",
               "z[:, :, head] = value.expand_as(z)[:, :, head]."),
        mistakes=(
            Mistake("when all heads of the layer are replaced",
                    "z[:, :, head] = value.expand_as(z)[:, :, head]",
                    "z[:] = value.expand_as(z)"),
            Mistake("when a position is replaced instead of a head",
                    "z[:, :, head] = value.expand_as(z)[:, :, head]",
                    "z[:, head] = value.expand_as(z)[:, head]"),
            Mistake("when the hook returns nothing", "        return z\n", "        return None\n"),
            Mistake("when the value is added", "z[:, :, head] = value", "z[:, :, head] += value"),
            Mistake("of the first layer, whatever the layer", "blocks.{layer}", "blocks.0"),
        )),
    Exercise(
        name="patch_position", source=None, minutes=10, difficulty=1, needed_for="denoise_stream",
        task="Patch one position from another run.",
        checks=(clean_into_clean_is_nothing, before_the_position_nothing_moves,
                it_is_the_naive_edit, the_cache_is_left_alone),
        hints=("The hook gets the activation of the present run.",
               "Only [:, pos] comes from the cache.",
               "tensor = tensor.clone(); tensor[:, pos] = source_cache[name][:, pos]."),
        mistakes=(
            Mistake("when all positions are patched", "tensor[:, pos] = source_cache[name][:, pos]",
                    "tensor[:] = source_cache[name]"),
            Mistake("when all positions but this one are patched",
                    "        tensor = tensor.clone()\n"
                    "        tensor[:, pos] = source_cache[name][:, pos]\n",
                    "        own = tensor\n        tensor = source_cache[name].clone()\n"
                    "        tensor[:, pos] = own[:, pos]\n"),
            Mistake("when the cache's activation is added", "tensor[:, pos] = source",
                    "tensor[:, pos] += source"),
            Mistake("with all positions from this one on",
                    "tensor[:, pos] = source_cache[name][:, pos]",
                    "tensor[:, pos:] = source_cache[name][:, pos:]"),
            Mistake("when a text is patched instead of a position: axis 0 is the batch",
                    "tensor[:, pos] = source_cache[name][:, pos]",
                    "tensor[pos] = source_cache[name][pos]"),
            Mistake("when the hook returns nothing", "        return tensor\n",
                    "        return None\n"),
        )),
    Exercise(
        name="denoise_stream", source=None, minutes=15, difficulty=2,
        needed_for="finding where an answer is carried",
        task="The sweep: one patched run for each layer and position.",
        checks=(it_has_a_number_for_each_place, with_the_same_text_it_is_the_metric,
                the_corrupted_run_is_patched_from_the_clean_one),
        hints=("The cache is that of the clean run, and the run that goes on is the corrupted one.",
               "Two loops: layers, positions.",
               "metric(patch_position(model, corrupted_tokens, clean_cache, name, pos)).mean()."),
        mistakes=(
            Mistake("with clean and corrupted exchanged: that is noising",
                    "model.run_with_cache(clean_tokens)", "model.run_with_cache(corrupted_tokens)",
                    also=(("patch_position(model, corrupted_tokens,",
                           "patch_position(model, clean_tokens,"),)),
            Mistake("when the run is patched from itself", "model.run_with_cache(clean_tokens)",
                    "model.run_with_cache(corrupted_tokens)"),
            Mistake("with the stream after the block", "hook_resid_pre\"", "hook_resid_post\""),
            Mistake("with axes exchanged: [pos, layer]", "return torch.stack(rows)",
                    "return torch.stack(rows, 1)"),
            Mistake("when the clean run is patched from itself",
                    "patch_position(model, corrupted_tokens,",
                    "patch_position(model, clean_tokens,"),
            Mistake("less the corrupted run's metric: the change, not the metric",
                    "return torch.stack(rows)",
                    "return torch.stack(rows) - metric(model(corrupted_tokens)).mean()"),
            Mistake("with the sum over the batch instead of the mean", "pos)).mean()",
                    "pos)).sum()"),
        )),
    Exercise(
        name="normalise_effect", source=None, minutes=5, difficulty=1,
        needed_for="comparing effects", task="A scale with 0 and 1 marked; values may lie outside.",
        checks=(nothing_is_zero_and_all_is_one, it_may_be_above_one),
        hints=("Divide the gain by the largest possible gain.", "Both are counted from the "
                                                                "corrupted "
               "run.", "(patched - corrupted) / (clean - corrupted)."),
        mistakes=(
            Mistake("of noising: 0 for the clean run, 1 for the corrupted one",
                    "(patched - corrupted) / (clean - corrupted)",
                    "(patched - clean) / (corrupted - clean)"),
            Mistake("as a share of the clean metric", "(patched - corrupted) / (clean - corrupted)",
                    "patched / clean"),
            Mistake("cut off at 0 and 1", "(patched - corrupted) / (clean - corrupted)",
                    "((patched - corrupted) / (clean - corrupted)).clamp(0, 1)"),
            Mistake("when only the clean metric divides", "/ (clean - corrupted)", "/ clean"),
            Mistake("without brackets: the division comes before the subtraction",
                    "(patched - corrupted) / (clean - corrupted)",
                    "patched - corrupted / clean - corrupted"),
            Mistake("with the sign turned", "(clean - corrupted)", "(corrupted - clean)"),
        )),
    Exercise(
        name="direct_effect", source=None, minutes=20, difficulty=3, needed_for="circuits",
        task="One edge of the graph: what this head writes, read by the unembedding alone.",
        checks=(from_the_same_text_nothing_moves,
                a_head_of_the_last_layer_has_no_other_way_but_the_mlp),
        hints=("The last stream is a sum; one of its terms is z[:, :, head] @ W_O[head].",
               "Take the clean one out, put the corrupted one in, and unembed.",
               "model.unembed(clean_last + (corrupted_z - clean_z)[:, :, head] @ W_O[head])."),
        mistakes=(
            Mistake("when later parts see the change too: the total effect",
                    "    return model.unembed(clean_cache[last] + written)\n",
                    "    return model.run_with_hooks(clean_tokens, [(\n"
                    '        f"blocks.{layer}.hook_attn_out",\n'
                    "        lambda out, hook: out + written)])\n"),
            Mistake("with clean and corrupted exchanged",
                    "model.unembed(clean_cache[last] + written)",
                    "model.unembed(corrupted_cache[last] - written)"),
            Mistake("when the clean write stays in, and the corrupted one is added",
                    " - clean_cache[name][:, :, head]", ""),
            Mistake("when the write is taken out only", "corrupted_cache[name][:, :, head] - clean",
                    "-clean"),
            Mistake("when the clean write goes in and the corrupted one out",
                    "clean_cache[last] + written", "clean_cache[last] - written"),
            Mistake("without the last LayerNorm", "model.unembed(clean_cache[last] + written)",
                    "(clean_cache[last] + written) @ model.W_U"),
            Mistake("of the corrupted run's stream", "model.unembed(clean_cache[last] + written)",
                    "model.unembed(corrupted_cache[last] + written)"),
            Mistake("when the stream is that after the head's own layer",
                    "blocks.{model.cfg.n_layers - 1}", "blocks.{layer}"),
            Mistake("of all heads of the layer",
                    "corrupted_cache[name][:, :, head] - clean_cache[name][:, :, head]",
                    "(corrupted_cache[name] - clean_cache[name]).flatten(2)",
                    also=(("attn.W_O[head]", "attn.W_O.flatten(0, 1)"),)),
        )),
    Exercise(
        name="auroc", source="metrics.auroc", minutes=15, difficulty=2,
        needed_for="judging a ranking of heads", task="All pairs.",
        checks=(all_on_top_is_one, of_four_pairs_three, a_tie_counts_half),
        hints=("A column of the true ones' scores against a row of the others'.",
               "Booleans: above counts 1, equal counts 1/2.",
               "((true > others).double() + 0.5 * (true == others).double()).mean().item()."),
        mistakes=(
            Mistake("when a tie counts nothing", " + 0.5 * (true == others).double()", ""),
            Mistake("when a tie counts whole", "0.5 * (true == others)", "(true == others)"),
            Mistake("with the order reversed", "(true > others)", "(true < others)"),
            Mistake("over all pairs, also of two true ones", "scores[~truth]", "scores"),
        )),
]

PREDICTIONS = [
    Prediction("The model of chapter 8 has two layers, and a prompt has 15 tokens. That makes 30 "
               "places (2 layers × 15 positions) before a block. By denoising, in how many of "
               "them does the answer lie?",
               stated(9, "It lies nowhere else: {} of 30 places"), "Expected"),
    Prediction("What share of the effect of the head that carries the answer goes straight to the "
               "logits?",
               stated(9, "to the logits, frozen all: about {}"), "the chapter's block"),
    Prediction("Hardly any of the answer passes through the other heads. By how many nats can it "
               "move the lead to set one of them to zero or to its mean?",
               stated(9, "they move the lead by up to {} nats when they are set to zero"),
               "the paragraph on ablation importance"),
]
