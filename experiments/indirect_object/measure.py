"""What is measured of a model that names indirect objects: its heads, their roles, its edges.

Noising throughout: the clean run is disturbed, and a change of the logit difference below 0 says
that what was disturbed was needed. Differences and losses are in nats.

Chapter: COURSE_ROADMAP.md, 12 (indirect objects)
Prerequisites: patching.py, head_ablation.py, circuits.py, experiments/indirect_object/model.py
Next: experiments/indirect_object/report.py
Source: Wang et al. 2022 (path patching, copying scores, backups); Syed et al. 2023 (edges)
"""

import itertools

import torch

from activation_cache import get_act_name, head_label
from circuits import Circuit, completeness, eap, faithfulness, minimality
from head_ablation import ablation_effects, self_repair
from metrics import permutation_pvalue, spearman
from patching import path_patch, replace_with
from utils import UserError, seeded_generator
from weight_circuits import ov_circuits, read_through

MODES = ("zero", "mean", "resample")
# Chosen on seeds 0 to 2, as are the thresholds of report.py
LOOKS = 0.3  # the least attention of a head that looks at the names, or at a syllable
COPIES = 0.5  # the least share of tokens that a copying head's OV circuit raises above all others
RAISES = 1.0  # nats: the least that its words raise the right ones
KEPT = 0.2  # the share of all edges that make the circuit, chosen on seeds 0 to 2
RANDOM = 20  # random circuits and sets of heads to compare with


@torch.no_grad()
def measure_gifts(model, gifts, songs):
    """All that is measured of a model, a dict of plain values. gifts: Gifts; songs: Songs."""
    logits, cache = model.run_with_cache(gifts.clean_tokens)
    diff = gifts.metric(logits)
    log_probs = logits[:, -1].log_softmax(-1)
    nats = -log_probs.gather(1, gifts.receiver[:, None])

    result = {"loss": nats.mean().item(), "diff": diff.mean().item(),
              "right": (diff > 0).float().mean().item(),
              "corrupted_diff": gifts.metric(model(gifts.corrupted_tokens)).mean().item()}
    heads = describe_heads(model, gifts, cache)
    result["heads"] = heads
    result["roles"] = find_roles(heads)
    result |= measure_roles(model, gifts, result)
    result["repair"] = measure_repair(model, gifts, result["roles"])
    result["songs"] = measure_songs(model, songs)
    return result | {"edges": measure_edges(model, gifts)}


def all_heads(model):
    """All (layer, head), in order."""
    return list(itertools.product(range(model.cfg.n_layers), range(model.cfg.n_heads)))


# One head at a time


def describe_heads(model, gifts, cache):
    """A dict for each head: where it looks, what it says straight to the logits, and whether it
    copies. cache: of the clean run."""
    rows = torch.arange(len(gifts.receiver))
    copying = copying_shares(model, gifts.names)
    is_named = (gifts.names == gifts.receiver[:, None]) | (gifts.names == gifts.giver[:, None])
    raises = raised_tokens(model, cache, gifts.names, is_named.float())
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
            "copies": copying["most"][layer, head].item(),
            "suppresses": copying["least"][layer, head].item()})
    return found


def copying_shares(model, tokens):
    """Of some tokens, the share that a head's OV circuit raises above all others of them ("most"),
    and the share that it raises least ("least"): a dict of [layer, head].

    The circuit is that of the weights, from the token's embedding to the logits. Chance is 1 over
    the number of tokens.
    """
    W_E = model.W_E[tokens]
    W_U = read_through(model.ln_final, model.W_U)[:, tokens]
    own = torch.arange(len(tokens))
    shares = {"most": [], "least": []}
    for layer in range(model.cfg.n_layers):
        circuits = ov_circuits(model, layer)
        raised = W_E @ circuits.A @ circuits.B @ W_U  # [head, token, token]
        raised = raised - raised.mean(1, keepdim=True)  # what it raises whatever it reads
        shares["most"].append((raised.argmax(-1) == own).float().mean(-1))
        shares["least"].append((raised.argmin(-1) == own).float().mean(-1))
    return {kind: torch.stack(each) for kind, each in shares.items()}


def raised_tokens(model, cache, tokens, is_raised):
    """By how much each head's words at the end raise some tokens above the others, [layer, head].

    In nats, at the scale of the final LayerNorm. tokens: ids [n]; is_raised: [batch, n], 1 for
    those that are asked for in a prompt, else 0.
    """
    W_U = read_through(model.ln_final, model.W_U)[:, tokens]
    with model.caching("ln_final.hook_scale") as kept:
        model.ln_final(cache["resid_post", -1])
    scale = kept["ln_final.hook_scale"][:, -1, None]  # [batch, 1, 1]

    raised = []
    for layer, block in enumerate(model.blocks):
        written = torch.einsum("bhd,hdm->bhm", cache["z", layer][:, -1], block.attn.W_O)
        logits = (written - written.mean(-1, keepdim=True)) @ W_U / scale  # [batch, head, token]
        asked = is_raised[:, None]
        mean_asked = (logits * asked).sum(-1) / asked.sum(-1)
        mean_others = (logits * (1 - asked)).sum(-1) / (1 - asked).sum(-1)
        raised.append((mean_asked - mean_others).mean(0))
    return torch.stack(raised)


# Roles


def find_roles(heads):
    """Heads by role, {role: [(layer, head)]}, from `describe_heads`.

    answer: the head whose words the answer loses most by, straight at the logits. suppressors: they
    look at who gives, and their OV circuit suppresses names. copiers: their OV
    circuit copies names, and their words raise the two who were named, wherever they look: a word
    after a name can have it from an earlier layer. lookers: they look at the two names, and do not
    copy.
    """
    return {"answer": [min(heads, key=lambda one: one["direct"])["head"]],
            "suppressors": [one["head"] for one in heads if one["END to S2"] >= LOOKS
                            and one["suppresses"] >= COPIES],
            "copiers": [one["head"] for one in heads if is_copier(one)],
            "lookers": [one["head"] for one in heads if not is_copier(one)
                        and one["END to IO"] + one["END to S1"] >= LOOKS]}


def is_copier(one):
    """Whether a head copies, by its OV circuit and by what its words raise; one: its dict."""
    return one["copies"] >= COPIES and one["raises"] >= RAISES


def measure_roles(model, gifts, result):
    """What each role must show: a dict."""
    [answer] = result["roles"]["answer"]
    copiers = result["roles"]["copiers"]
    name = get_act_name("pattern", answer[0])
    rows = torch.arange(len(gifts.receiver))

    # where the answering head looks when the giver is a third person, named once
    looks = {}
    for kind, tokens in (("twice", gifts.clean_tokens), ("once", gifts.tokens_without)):
        pattern = model.run_with_cache(tokens, name)[1][name][:, answer[1]]
        looks[kind] = pattern[rows, gifts.at["END"], gifts.at["S2"]].mean().item()

    # what the inputs of all heads above layer 0 must carry
    later = [head for head in all_heads(model) if head[0] > 0]
    return {"looks": looks,
            "later_inputs": {letter: patched_inputs(model, gifts, later, letter)
                             for letter in "qkv"},
            "copier_inputs": {letter: patched_inputs(model, gifts, copiers, letter)
                              for letter in "qkv"},
            "to_copier_queries": query_senders(model, gifts, copiers),
            "named": measure_copying(model, gifts, result["roles"])}


def patched_inputs(model, gifts, heads, letter):
    """The change of the logit difference when the queries, keys or values ("q", "k", "v") of these
    heads are those of the corrupted run, in nats."""
    corrupted = model.run_with_cache(gifts.corrupted_tokens)[1]
    edits = []
    for layer, head in heads:
        hook = get_act_name(letter, layer)
        edits.append((hook, replace_with(corrupted[hook], [head])))
    patched = gifts.metric(model.run_with_hooks(gifts.clean_tokens, edits))
    return (patched - gifts.metric(model(gifts.clean_tokens))).mean().item()


def query_senders(model, gifts, copiers):
    """{label: change of the logit difference} when the copiers' queries alone see a head as it is
    in the corrupted run: in GPT-2 the S-inhibition heads stand out."""
    found = {}
    for layer, head in all_heads(model):
        receivers = [(f"blocks.{later}.hook_q_input", which) for later, which in copiers
                     if later > layer]
        if receivers:
            found[head_label(layer, head)] = path_patch(
                model, gifts.clean_tokens, gifts.corrupted_tokens,
                [(get_act_name("z", layer), head)], receivers, gifts.metric).mean.item()
    return found


def measure_copying(model, gifts, roles):
    """What the log-odds of the two names lose without the copiers, and without other heads: a dict.

    Heads write their mean over the corrupted prompts. others: the same for all sets of as many
    heads that are neither copiers nor suppressors, at most RANDOM of them.
    """
    reference = model.run_with_cache(gifts.corrupted_tokens)[1]
    return lost_without(model, gifts.clean_tokens, gifts.named_metric, roles["copiers"],
                        roles["lookers"], keep=roles["suppressors"], reference=reference)


def lost_without(model, tokens, metric, copiers, lookers, *, keep, reference):
    """What a metric loses without the copiers, the lookers, and random sets of as many other heads:
    {"copiers", "lookers": number, "others": list}, in nats.

    keep: heads that no random set has. reference: a cache whose means heads write in their place.
    """
    rest = [head for head in all_heads(model) if head not in copiers + keep]
    sets = list(itertools.combinations(rest, len(copiers)))
    order = torch.randperm(len(sets), generator=seeded_generator(0))[:RANDOM].tolist()
    lost = -ablation_effects(model, tokens, [copiers, lookers, *(sets[i] for i in order)], metric,
                             mode="mean_pos", reference=reference).mean
    return {"copiers": lost[0].item(), "lookers": lost[1].item(), "others": lost[2:].tolist()}


def measure_repair(model, gifts, roles):
    """What the others do where the answering head, or the copier that counts most, is removed: for
    each role and mode a dict of `SelfRepair`'s means, in nats."""
    reference = model.run_with_cache(gifts.corrupted_tokens)[1]
    source = list(range(len(gifts.receiver)))
    found = {}
    for role, metric in (("answer", gifts.metric), ("copiers", gifts.named_metric)):
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
    """Which heads copy the syllables of a song, against those that merely look there: a dict.

    heads: for each head where it looks, how many syllables its OV circuit copies, what its words
    raise the right one by above the others (nats). copiers, lookers, lost: as for names.
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

    copiers = [one["head"] for one in heads if is_copier(one)]
    lookers = [one["head"] for one in heads if one["looks"] >= LOOKS and not is_copier(one)]
    lost = lost_without(model, songs.tokens, songs.metric, copiers, lookers, keep=[],
                        reference=cache)
    return {"loss": -songs.metric(logits).mean().item(), "heads": heads, "copiers": copiers,
            "lookers": lookers, "lost": lost}


# Edges


def measure_edges(model, gifts):
    """Edge attribution against exact edges, and how good the circuit of the best exact edges is."""
    clean, corrupted, metric = gifts.clean_tokens, gifts.corrupted_tokens, gifts.metric
    with torch.enable_grad():
        estimate = eap(model, clean, corrupted, metric)
    edges = estimate.edges()
    exact = minimality(Circuit.of(model), model, clean, corrupted, metric=metric, parts=edges).mean
    rho = spearman(estimate.mean, exact)

    generator = seeded_generator(0)
    null = torch.stack([spearman(estimate.mean, exact[torch.randperm(len(exact),
                        generator=generator)]) for _ in range(200)])
    order = exact.abs().argsort(descending=True)[: max(1, round(KEPT * len(edges)))].tolist()
    circuit = Circuit.of(model, [edges[i] for i in order])
    return {"n_edges": len(edges), "kept": len(circuit), "rho": rho.item(),
            "p": permutation_pvalue(rho, null).item(), "null_high": null.quantile(0.95).item(),
            "top": [(*edges[i], exact[i].item()) for i in order[:10]],
            "circuit": evaluate_circuit(circuit, edges, model, gifts)}


def evaluate_circuit(circuit, edges, model, gifts):
    """How good a circuit is: a dict. The one place that says how circuits are judged.

    random: the faithfulness of circuits of as many random edges.
    """
    prompts = (model, gifts.clean_tokens, gifts.corrupted_tokens)

    def score(some):
        try:
            return faithfulness(some, *prompts, metric=gifts.metric).mean.item()
        except UserError:
            return 0.0  # the model tells nothing apart, so there is nothing to keep

    generator = seeded_generator(1)
    random = [score(Circuit.of(model, [edges[i] for i in torch.randperm(
        len(edges), generator=generator)[: len(circuit)].tolist()])) for _ in range(RANDOM)]
    nodes = [node for node in circuit.nodes() if node != "embed"]
    subsets = [[node] for node in nodes]
    gaps = completeness(circuit, *prompts, metric=gifts.metric, subsets=subsets)
    parts = minimality(circuit, *prompts, metric=gifts.metric)
    return {"faithfulness": score(circuit), "random": random,
            "incompleteness": gaps.max().item() if len(gaps) else 0.0,
            "least_part": parts.mean.abs().min().item()}
