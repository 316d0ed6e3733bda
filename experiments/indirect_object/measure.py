"""Measure a model that predicts indirect objects: its heads, their roles, its edges.

All patching is noising: the clean run is corrupted, and a change of the logit difference below 0
means that the corrupted part was needed. Differences and losses are in nats.

Chapter: COURSE_ROADMAP.md, 12 (copying, suppression, indirect objects)
Prerequisites: patching.py, head_ablation.py, circuits.py, experiments/indirect_object/model.py
Next: probing.py
Source: Wang et al. 2022 (path patching, copying scores, backups); Syed et al. 2023 (edges)
"""

import itertools

import torch

from activation_cache import get_act_name, head_label
from circuit_evaluation import (
    evaluate_circuit,
    faithfulness_curve,
    random_ranking,
    ranked_edges,
    take_edges,
)
from circuits import Circuit, CircuitRun, eap, minimality
from head_ablation import ablation_effects, self_repair
from metrics import permutation_pvalue, spearman
from patching import path_patch, replace_with
from utils import seeded_generator
from weight_circuits import ov_circuits, read_through

MODES = ("zero", "mean", "resample")
# Chosen on seeds 0 to 2 and 10 to 14, as are the thresholds of report.py; but LOWERS was chosen
# there for another share, and LOWERS_BY on paper, to leave out heads that do next to nothing.
LOWERS = 0.5  # the share of prompts in which a suppressor lowers the giver's name the most
LOWERS_BY = 0.1  # nats: how far it must lower this name below the others
RAISES = 1.0  # nats: how far a raising head must raise the right tokens
KEPT = 0.2  # the share of all edges in the circuit that is tested
RANDOM = 20  # sets of heads to compare with
RANKINGS = 100  # random orders of all edges, and random circuits


@torch.no_grad()
def measure_gifts(model, gifts, songs, *, n_random=RANKINGS):
    """All measurements of a model, a dict of plain values. gifts: Gifts; songs: Songs; n_random:
    the number of random edge orders and of random circuits to compare with, 20 or more."""
    result = measure_task(model, gifts)
    _, cache = model.run_with_cache(gifts.clean_tokens)
    _, once = model.run_with_cache(gifts.tokens_without)
    heads = describe_heads(model, gifts, cache, once)
    roles = find_roles(heads)
    result |= {"heads": heads, "roles": roles}
    result["strongest"] = measure_strongest(model, gifts, roles["answer"][0], cache, once)
    result["patterns"] = {
        kind: changed_inputs(model, gifts, all_heads(model), "qk", tokens)
        for kind, tokens in (("unrelated", gifts.corrupted_tokens), ("other giver",
                                                                     gifts.tokens_swapped))}
    result["named"] = measure_raising(model, gifts, roles)
    result["repair"] = measure_repair(model, gifts, roles)
    result["songs"] = measure_songs(model, songs)
    return result | {"edges": measure_edges(model, gifts, n_random)}


@torch.no_grad()
def measure_task(model, gifts):
    """How well the model predicts the receiver: a dict. Differences: the logit of IO minus S's."""
    logits = model(gifts.clean_tokens)
    diff = gifts.metric(logits)
    nats = -logits[:, -1].log_softmax(-1).gather(1, gifts.receiver[:, None])
    return {"loss": nats.mean().item(), "diff": diff.mean().item(),
            "right": (diff > 0).float().mean().item(),
            "corrupted_diff": gifts.metric(model(gifts.corrupted_tokens)).mean().item(),
            "swapped_diff": gifts.metric(model(gifts.tokens_swapped)).mean().item()}


def all_heads(model):
    """All (layer, head), in order."""
    return list(itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads)))


# One head at a time


def describe_heads(model, gifts, cache, once):
    """A dict for each head: its attention, its direct effect on the logits, and what it does to
    names.

    cache: of the clean run; once: of the run in which a third person gives, who is named once.
    direct, total: the change of the logit difference if the head's output is corrupted for the
    logits alone, and for all that reads it. raises: how far it raises the two who were named, in
    nats. lowers, once: the share of prompts in which it lowers the giver's name the most
    (`lowered_most`), and how far it raises this name, in nats (`raised_giver`), if the giver was
    named once. copies, suppresses: the shares of names that its OV circuit alone raises or lowers
    most (`copying_shares`).
    """
    rows = torch.arange(len(gifts.receiver))
    copying = copying_shares(model, gifts.names)
    lowers = lowered_most(model, once, gifts.names, gifts.third)
    by = raised_giver(model, once, gifts, gifts.third)
    raises = raised_tokens(model, cache, gifts.names, the_two_named(gifts).float())
    found = []
    for layer, head in all_heads(model):
        pattern = cache["pattern", layer][:, head]  # [batch, query_pos, key_pos]

        def attention(query, key, pattern=pattern):
            return pattern[rows, gifts.at[query], gifts.at[key]].mean().item()

        direct, through_heads = (
            path_patch(model, gifts.clean_tokens, gifts.corrupted_tokens,
                       [(get_act_name("z", layer), head)], ["logits"], gifts.metric, freeze=freeze)
            for freeze in ("all", None))
        found.append({
            "head": (layer, head), "label": head_label(layer, head),
            "END to IO": attention("END", "IO"), "END to S1": attention("END", "S1"),
            "END to S2": attention("END", "S2"), "S2 to S1": attention("S2", "S1"),
            "S2 to IO": attention("S2", "IO"), "direct": direct.mean.item(),
            "total": through_heads.mean.item(), "raises": raises[layer, head].item(),
            "lowers": lowers[layer, head].item(), "once": by[layer, head].item(),
            "copies": copying["most"][layer, head].item(),
            "suppresses": copying["least"][layer, head].item()})
    return found


def copying_shares(model, tokens):
    """How often a head's OV circuit raises a token most, or least, when it reads it: {"most",
    "least": [layer, head]}, shares of `tokens`, compared among these tokens.

    The circuit is computed from the weights, from a token's embedding to the logits. Chance is 1
    over the number of tokens.
    """
    W_E = model.W_E[tokens]
    W_U = read_through(model.ln_final, model.W_U)[:, tokens]
    own = torch.arange(len(tokens))
    shares = {"most": [], "least": []}
    for layer in range(model.cfg.n_layers):
        circuits = ov_circuits(model, layer)
        raised = W_E @ circuits.A @ circuits.B @ W_U  # [head, token, token]
        raised = raised - raised.mean(1, keepdim=True)  # without what it raises at every token
        shares["most"].append((raised.argmax(-1) == own).float().mean(-1))
        shares["least"].append((raised.argmin(-1) == own).float().mean(-1))
    return {kind: torch.stack(each) for kind, each in shares.items()}


def written_logits(model, cache, tokens):
    """What each head's write at the end adds to the logits of some tokens, in nats, at the scale of
    the final LayerNorm: [layer, batch, head, token]. tokens: ids [n]."""
    W_U = read_through(model.ln_final, model.W_U)[:, tokens]
    scale = cache["scale", None][:, -1, None]  # [batch, 1, 1]

    logits = []
    for layer, block in enumerate(model.blocks):
        written = torch.einsum("bhd,hdm->bhm", cache["z", layer][:, -1], block.attn.W_O)
        logits.append((written - written.mean(-1, keepdim=True)) @ W_U / scale)
    return torch.stack(logits)


def raised_tokens(model, cache, tokens, is_raised, is_other=None):
    """How far each head's write at the end raises some tokens above others, [layer, head], in nats.

    tokens: ids [n]; is_raised, is_other: [batch, n], 1 for the tokens in question of each prompt,
    and for those that they are compared with (None: all that are not in question).
    """
    logits = written_logits(model, cache, tokens)  # [layer, batch, head, token]
    asked = is_raised[:, None]
    other = 1 - asked if is_other is None else is_other[:, None]
    mean_asked = (logits * asked).sum(-1) / asked.sum(-1)
    mean_others = (logits * other).sum(-1) / other.sum(-1)
    return (mean_asked - mean_others).mean(1)


def the_two_named(gifts):
    """Whether each name is one of the two that begin the prompt, [batch, name]."""
    return (gifts.names == gifts.receiver[:, None]) | (gifts.names == gifts.giver[:, None])


def raised_giver(model, cache, gifts, giver):
    """How far each head's write at the end raises the giver's name above the other people in the
    prompt, or above those who are not in it, whichever is more: [layer, head], in nats.

    So what is below 0 is lowered below both. A head that lowers all who are named, or that raises
    the others, lowers nobody by this measure. giver: ids [batch].
    """
    is_giver = gifts.names == giver[:, None]
    is_named = the_two_named(gifts)
    beside = is_named & ~is_giver
    absent = ~(is_named | is_giver)
    return torch.maximum(*(
        raised_tokens(model, cache, gifts.names, is_giver.float(), others.float())
        for others in (beside, absent)))


def lowered_most(model, cache, tokens, lowered):
    """The share of prompts in which each head's write at the end lowers one token more than any
    other of `tokens`, [layer, head].

    What a head writes to a token is compared with what it writes to this token on average over the
    prompts, so a head that lowers the same token everywhere reaches only chance, 1 over the number
    of tokens. tokens: ids [n]; lowered: the token
    in question of each prompt, ids [batch].
    """
    logits = written_logits(model, cache, tokens)
    lowest = (logits - logits.mean(1, keepdim=True)).argmin(-1)  # [layer, batch, head]
    return (tokens[lowest] == lowered[:, None]).float().mean(1)


# Roles


def find_roles(heads):
    """The heads of each role, {role: [(layer, head)]}, from `describe_heads`.

    Roles depend on what a head does, not on where it looks nor on its weights alone: a word after a
    name can carry the name from an earlier layer, in a form that the head's OV circuit reads, while
    it does nothing to the name's own embedding. answer: the head with the largest direct effect on
    the answer. suppressors: heads that lower the giver's name the most in LOWERS of the prompts or
    more, and by LOWERS_BY. raisers: heads that raise the two people who were named, by RAISES.
    """
    return {"answer": [min(heads, key=lambda one: one["direct"])["head"]],
            "suppressors": [one["head"] for one in heads
                            if one["lowers"] >= LOWERS and one["once"] <= -LOWERS_BY],
            "raisers": [one["head"] for one in heads if one["raises"] >= RAISES]}


def measure_strongest(model, gifts, answer, cache, once):
    """What the strongest head reads and writes: a dict. cache, once: as in `describe_heads`.

    after: its attention from END to the giver (S2) and to the words after it; giver: to S2 alone.
    words: how far it raises the giver's name (`raised_giver`), in nats, if S was named before
    (twice), and if a third person gives (once). inputs: the change of the logit difference when its
    queries, keys or values come from prompts in which a third person gives. senders: {label: the
    change, in nats, when an earlier head's output is corrupted for the values of this head, and for
    nothing else}. others: the means of `after` and `once` over the other heads.
    """
    layer, head = answer
    rows = torch.arange(len(gifts.receiver))
    after = attention_after(cache, gifts)
    words = {}
    for kind, run, giver in (("twice", cache, gifts.giver), ("once", once, gifts.third)):
        words[kind] = raised_giver(model, run, gifts, giver)  # [layer, head]
    others = {"after": mean_of_others(after, answer), "once": mean_of_others(words["once"], answer)}

    senders = {}
    for earlier in all_heads(model):
        if earlier[0] < layer:
            sender = (get_act_name("z", earlier[0]), earlier[1])
            senders[head_label(*earlier)] = path_patch(
                model, gifts.clean_tokens, gifts.corrupted_tokens, [sender],
                [(f"blocks.{layer}.hook_v_input", head)], gifts.metric).mean.item()
    to_giver = cache["pattern", layer][rows, head, -1, gifts.at["S2"]]
    return {"head": answer, "after": after[layer, head].item(), "giver": to_giver.mean().item(),
            "words": {kind: raised[layer, head].item() for kind, raised in words.items()},
            "inputs": {letter: changed_inputs(model, gifts, [answer], letter,
                                              gifts.tokens_without) for letter in "qkv"},
            "senders": senders, "others": others}


def attention_after(cache, gifts):
    """Each head's attention from END to the giver (S2) and the words after it, [layer, head]."""
    n_keys = gifts.clean_tokens.shape[1]
    is_after = torch.arange(n_keys) >= gifts.at["S2"][:, None]  # [batch, key_pos]
    from_end = cache.stack("pattern")[..., -1, :]  # [layer, batch, head, key_pos]
    return (from_end * is_after[:, None]).sum(-1).mean(1)


def mean_of_others(values, head):
    """The mean of values [layer, head] over all heads except one, a (layer, head)."""
    return ((values.sum() - values[head]) / (values.numel() - 1)).item()


def changed_inputs(model, gifts, heads, letters, tokens):
    """The change of the logit difference, in nats, when the queries, keys or values of these heads
    come from a run on other prompts.

    letters: some of "q", "k" and "v"; "qk" of all heads gives the patterns of the other run.
    tokens: [batch, pos], the other prompts.
    """
    other = model.run_with_cache(tokens)[1]
    edits = []
    for layer, head in heads:
        for letter in letters:
            hook = get_act_name(letter, layer)
            edits.append((hook, replace_with(other[hook], [head])))
    changed = gifts.metric(model.run_with_hooks(gifts.clean_tokens, edits))
    return (changed - gifts.metric(model(gifts.clean_tokens))).mean().item()


def measure_raising(model, gifts, roles):
    """The fall of the two names' log-odds without the raisers, and without other heads: a dict.

    Removed heads write their mean over the corrupted prompts. others: the same for at most RANDOM
    sets of as many heads that are neither raisers nor the strongest head.
    """
    reference = model.run_with_cache(gifts.corrupted_tokens)[1]
    return lost_without(model, gifts.clean_tokens, gifts.named_metric, roles["raisers"],
                        keep=roles["answer"], reference=reference)


def lost_without(model, tokens, metric, raisers, *, keep, reference):
    """The fall of a metric without the raisers, and without random sets of as many other heads:
    {"raisers": number, "others": list}, in nats.

    keep: heads that are in no random set. If too few heads are left for such a set, all heads may
    be in it. reference: a cache whose means replace removed heads.
    """
    rest = [head for head in all_heads(model) if head not in raisers + keep]
    if len(rest) < len(raisers):
        rest = all_heads(model)
    sets = list(itertools.combinations(rest, len(raisers)))
    order = torch.randperm(len(sets), generator=seeded_generator(0))[:RANDOM].tolist()
    lost = -ablation_effects(model, tokens, [raisers, *(sets[i] for i in order)], metric,
                             mode="mean_pos", reference=reference).mean
    return {"raisers": lost[0].item(), "others": lost[1:].tolist()}


def measure_repair(model, gifts, roles):
    """How other heads compensate when the strongest head, or the most important raiser, is removed:
    for each role and mode a dict of `SelfRepair`'s means, in nats."""
    reference = model.run_with_cache(gifts.corrupted_tokens)[1]
    source = list(range(len(gifts.receiver)))
    found = {}
    for role, metric in (("answer", gifts.metric), ("raisers", gifts.named_metric)):
        if not roles[role]:
            continue
        heads = roles[role]
        lost = ablation_effects(model, gifts.clean_tokens, [[head] for head in heads], metric)
        head = heads[lost.mean.argmin().item()]
        found[role] = {"head": head}
        for mode in MODES:
            one = self_repair(model, gifts.clean_tokens, head, metric, mode=mode,
                              reference=reference, source=source)
            found[role][mode] = {"total": one.total.mean().item(),
                                 "direct": one.direct.mean().item(),
                                 "repair": one.repair.mean().item()}
    return found


# Songs


def measure_songs(model, songs):
    """Which heads raise the right syllable of a song, and what is lost without them: a dict.

    heads: for each head its attention to the right syllable, the share of syllables that its OV
    circuit copies, and how far it raises the right one above the others (nats). raisers: the heads
    that raise it by RAISES or more. lost: as from `lost_without`.
    """
    logits, cache = model.run_with_cache(songs.tokens)
    rows = torch.arange(len(songs.target))
    is_target = (songs.syllables == songs.target[:, None]).float()
    raises = raised_tokens(model, cache, songs.syllables, is_target)
    copies = copying_shares(model, songs.syllables)["most"]
    heads = []
    for layer, head in all_heads(model):
        looks = cache["pattern", layer][rows, head, -1, songs.source].mean().item()
        heads.append({"head": (layer, head), "looks": looks,
                      "copies": copies[layer, head].item(), "raises": raises[layer, head].item()})

    raisers = [one["head"] for one in heads if one["raises"] >= RAISES]
    lost = lost_without(model, songs.tokens, songs.metric, raisers, keep=[], reference=cache)
    return {"loss": -songs.metric(logits).mean().item(), "heads": heads, "raisers": raisers,
            "lost": lost}


# Edges


def measure_edges(model, gifts, n_random):
    """Compare edge attribution (5 steps of integrated gradients) with exact edges, and measure the
    circuits of its best edges, of all sizes and of one: a dict."""
    clean, corrupted, metric = gifts.clean_tokens, gifts.corrupted_tokens, gifts.metric
    run = CircuitRun(model, clean, corrupted, metric)
    with torch.enable_grad():
        estimate = eap(model, clean, corrupted, metric, ig_steps=5)
    edges = estimate.edges()
    exact = minimality(Circuit.of(model), model, clean, corrupted, metric=metric, parts=edges)
    rho = spearman(estimate.mean, exact.mean)

    # the same with the exact effects shuffled
    generator = seeded_generator(0)
    null = torch.stack([spearman(estimate.mean, exact.mean[torch.randperm(
        len(edges), generator=generator)]) for _ in range(200)])

    # over all sizes, against random orders
    ranking = ranked_edges(estimate)
    curve = faithfulness_curve(run, ranking)
    random = [faithfulness_curve(run, random_ranking(run.full, generator)).cpr
              for _ in range(n_random)]

    # one size, with all tests
    number_of = {edge: number for number, edge in enumerate(run.full.edges())}
    n_kept = max(1, round(KEPT * len(edges)))
    report = evaluate_circuit(
        run, take_edges(run.full, [number_of[tuple(edge)] for edge in ranking[:n_kept]]),
        n_random=n_random, n_draws=n_random)
    strongest = exact.mean.abs().argsort(descending=True)[:10].tolist()
    return {"n_edges": len(edges), "rho": rho.item(), "p": permutation_pvalue(rho, null).item(),
            "null_high": null.quantile(0.95).item(),
            "top": [(*edges[i], exact.mean[i].item()) for i in strongest],
            "cpr": curve.cpr, "cmd": curve.cmd, "random_cpr": random,
            "exact_cpr": faithfulness_curve(run, ranked_edges(exact)).cpr,
            "kept": n_kept, "faithfulness": report.faithfulness.mean.item(),
            "random": report.random.mean.tolist(),
            "tests": {name: test.holds for name, test in report.tests.items()}}
