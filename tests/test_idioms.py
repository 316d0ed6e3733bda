"""The README's table of idioms: each is run, and its value is computed by hand."""

import ast
import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from torch.nn import functional
from torch.testing import assert_close

import patching
from config import Config, config_from_dict, flag_parser, nest_flags
from metrics import Metric
from tokenizer import BPETokenizer, CharTokenizer
from utils import seeded_generator
from weight_circuits import fold_layer_norm, ov_circuit

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Coming from")[1].split("\n## ")[0]
IDIOMS = re.findall(r"^\| `.* \| `(.+?)`[^`]* \|$", SECTION, flags=re.MULTILINE)
LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"


class World:
    """The values of the names in the table: a tiny model, its tokens and its runs."""

    def __init__(self):
        draw = seeded_generator(3)
        self.model = tiny_model(n_layers=3, n_heads=2, n_ctx=12, d_vocab=len(LETTERS))
        self.tokenizer = CharTokenizer().fit(LETTERS)
        self.text = "hook it"
        self.tokens, self.corrupted, self.targets = (
            torch.randint(len(LETTERS), (2, 7), generator=draw) for _ in range(3))
        self.idx = self.tokens
        self.ids = torch.randint(len(LETTERS), (50,), generator=draw)
        self.batch_size = 4
        self.n_ctx = 6
        self.generator = seeded_generator(5)
        self.name = "blocks.1.hook_resid_post"
        self.right = 3
        self.wrong = 8
        self.metric = Metric.logit_diff(self.right, self.wrong)
        with torch.no_grad():
            _, self.cache = self.model.run_with_cache(self.tokens)
        self.resid = self.cache["resid_post", 0]

    def fn(self, resid, hook):
        """A hook that changes the stream along more than its mean and scale."""
        return resid + torch.linspace(-1, 1, resid.shape[-1])

    def unembed(self, resid):
        """The logits of the last stream, written out."""
        norm = self.model.ln_final
        normalized = functional.layer_norm(resid, resid.shape[-1:], norm.w, norm.b)
        return normalized @ self.model.W_U + self.model.b_U

    def after_block_1(self, resid):
        """The logits, from the stream after block 1 on."""
        return self.unembed(self.model.blocks[2](resid))

    def patched_one_by_one(self, act_name, cells):
        """The metric of the corrupted run where a part of an activation is that of the tokens' run,
        one run of the whole model each. cells: [(layer, index into the activation)]."""
        values = []
        for layer, part in cells:
            def put(own, hook, part=part):
                new = own.clone()
                new[part] = self.cache[hook.name][part]
                return new

            name = self.name_of(act_name, layer)
            logits = self.model.run_with_hooks(self.corrupted, [(name, put)])
            values.append((logits[:, -1, self.right] - logits[:, -1, self.wrong]).mean())
        return values

    def name_of(self, act_name, layer):
        """A hook name, written out."""
        where = {"resid_pre": "hook_resid_pre", "pattern": "attn.hook_pattern"}[act_name]
        return f"blocks.{layer}.{where}"


def run_idiom(here, world, folder):
    """The value of an expression, what an assignment assigns, or the `logits` of a `with` block.

    The line is written into a file as a function of the world's attributes that it names; all
    other names are modules.
    """
    statement = ast.parse(here).body[0]
    body = f"{here}\n    return logits"
    if isinstance(statement, ast.Expr):
        body = f"return {here}"
    elif isinstance(statement, ast.Assign):
        body = f"{here}\n    return {ast.unparse(statement.targets[0])}"

    read = {node.id for node in ast.walk(statement)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    given = {name: getattr(world, name) for name in sorted(read) if hasattr(world, name)}
    modules = sorted(read - set(given) - {"SamplingConfig", "logits"})
    imports = [f"import {name}" for name in modules] + ["from config import SamplingConfig"]

    path = folder / "idiom.py"
    path.write_text("\n".join(imports) + f"\n\n\ndef run({', '.join(given)}):\n    {body}\n")
    spec = importlib.util.spec_from_file_location("idiom", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run(**given)


# What each line must give: [(found, expected)]


def check_load(world, found):
    model, tokenizer = found
    assert tokenizer.decode(tokenizer.encode("I think")) == "I think"
    ids = torch.tensor([tokenizer.encode("I")])
    saved = tiny_model(d_vocab=256, tie_embeddings=True)
    return [(model(ids), saved(ids))]


def check_encode(world, found):
    letters = sorted(LETTERS)
    return [(found, torch.tensor([[letters.index(letter) for letter in world.text]]))]


def check_loss(world, found):
    logits = world.model(world.tokens)[:, :-1]
    return [(found, functional.cross_entropy(logits.flatten(0, 1), world.tokens[:, 1:].flatten()))]


def check_cache(world, found):
    logits, cache = found
    assert list(cache) == [world.name]
    resid = world.model.blocks[1](world.model.blocks[0](world.model.embed(world.tokens)))
    return [(logits, world.after_block_1(resid)), (cache[world.name], resid)]


def check_stack(world, found):
    return [(found, torch.stack([world.cache[f"blocks.{layer}.attn.hook_z"]
                                 for layer in range(3)]))]


def check_stop(world, found):
    return [(found, world.model.blocks[0](world.model.embed(world.tokens)))]


def check_start(world, found):
    return [(found, world.after_block_1(world.model.blocks[1](world.resid)))]


def check_hooks(world, found):
    assert not world.model.open_hooks(), "hooks outlive their block"
    return [(found, world.after_block_1(world.fn(world.cache["resid_post", 1], None)))]


def check_gradients(world, found):
    value, acts, grads = found
    resid = world.cache[world.name].clone().requires_grad_()
    logits = world.after_block_1(resid)[:, -1]
    wanted = logits[:, world.right] - logits[:, world.wrong]
    [slope] = torch.autograd.grad(wanted.sum(), resid)
    return [(value, wanted), (acts[world.name], resid), (grads[world.name], slope)]


def check_decomposition(world, found):
    stack, labels = found
    parts = {"embed": world.cache["hook_embed"], "pos_embed": world.cache["hook_pos_embed"]}
    for layer in range(3):
        parts[f"{layer}_attn_out"] = world.cache[f"blocks.{layer}.hook_attn_out"]
        parts[f"{layer}_mlp_out"] = world.cache[f"blocks.{layer}.hook_mlp_out"]
    assert labels == list(parts)
    return [(stack, torch.stack(list(parts.values())))]


def check_heads(world, found):
    stack, labels = found
    assert labels == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H0", "L2H1"]
    writes = [world.cache["z", layer][:, :, head] @ world.model.W_O[layer, head]
              for layer in range(3) for head in range(2)]
    return [(stack, torch.stack(writes))]


def check_attribution(world, found):
    attr, labels = found
    logits = world.model(world.tokens)[:, -1]
    write = world.cache["mlp_out", 1][:, -1]
    in_logits = (write - write.mean(-1, keepdim=True)) / world.cache["scale", None][:, -1]
    in_logits = (in_logits * world.model.ln_final.w) @ world.model.W_U
    return [(attr.sum(0), logits[:, world.right] - logits[:, world.wrong]),
            (attr[labels.index("1_mlp_out")],
             in_logits[:, world.right] - in_logits[:, world.wrong])]


def check_lens(world, found):
    streams = [world.cache["resid_pre", layer] for layer in range(3)]
    streams.append(world.cache["resid_post", 2])
    return [(found, torch.stack([world.unembed(stream) for stream in streams]))]


def check_patching(world, found):
    cells = [(layer, (slice(None), pos)) for layer in range(3) for pos in range(7)]
    return [(found, torch.stack(world.patched_one_by_one("resid_pre", cells)).view(3, 7))]


def check_ov(world, found):
    normalized = world.cache["normalized", 0, "ln1"]
    W_V, W_O = world.model.W_V[0, 1], world.model.W_O[0, 1]
    return [(normalized @ found.AB, normalized * world.model.blocks[0].ln1.w @ W_V @ W_O)]


def check_cross_entropy(world, found):
    logits = world.model(world.tokens)
    return [(found, functional.cross_entropy(logits.flatten(0, 1), world.targets.flatten()))]


def check_batch(world, found):
    inputs, targets = found
    starts = torch.randint(44, (4, 1), generator=seeded_generator(5)).flatten().tolist()
    return [(inputs, torch.stack([world.ids[start : start + 6] for start in starts])),
            (targets, torch.stack([world.ids[start + 1 : start + 7] for start in starts]))]


def check_evaluation(world, found):
    losses = []
    for start in range(0, 49, 12):  # windows of the model's n_ctx
        window = world.ids[start : start + 13]
        losses += functional.cross_entropy(world.model(window[None, :-1])[0], window[1:],
                                           reduction="none").tolist()
    assert len(losses) == 49
    return [(torch.tensor(found), torch.tensor(losses).mean())]


def check_generation(world, found):
    text = world.tokens
    for _ in range(4):
        text = torch.cat([text, world.model(text)[:, -1:].argmax(-1)], 1)
    return [(torch.cat(list(found), 1), text[:, 7:])]


CHECKS = {
    'model, tokenizer = checkpoint.load_model("gpt2")': check_load,
    "torch.tensor([tokenizer.encode(text)])": check_encode,
    "losses.next_token_loss(model(tokens), tokens)": check_loss,
    "logits, cache = model.run_with_cache(tokens, names_filter=name)": check_cache,
    'cache.stack("z")': check_stack,
    "model.run_blocks(model.embed(tokens), stop=1)": check_stop,
    "model.unembed(model.run_blocks(resid, start=1))": check_start,
    "with model.hooks([(name, fn)]): logits = model(tokens)": check_hooks,
    "value, acts, grads = model.gradient_cache(tokens, metric)": check_gradients,
    "residual_stream_analysis.decompose_resid(model, cache)": check_decomposition,
    "residual_stream_analysis.stack_head_results(model, cache)": check_heads,
    "attribution.direct_logit_attribution(model, cache, right, wrong)": check_attribution,
    "logit_lens.logit_lens(model, cache).logits": check_lens,
    "patching.get_act_patch_resid_pre(model, corrupted, cache, metric).patched.mean(-1)":
        check_patching,
    "weight_circuits.ov_circuit(model, 0, 1)": check_ov,
    "losses.cross_entropy(model(idx), targets)": check_cross_entropy,
    "inputs, targets = data.random_batch(ids, batch_size, n_ctx, generator)": check_batch,
    "train.evaluate(model, ids)": check_evaluation,
    "generate.generate(model, idx, SamplingConfig(max_new_tokens=4, top_k=1))": check_generation,
}
COMMAND = "python train.py --train.max_steps 500 --model.n_ctx 64"


def test_the_table_has_twenty_idioms_and_each_is_checked():
    assert len(IDIOMS) == 20 and IDIOMS == [*CHECKS, COMMAND]


@pytest.mark.parametrize("here", CHECKS, ids=[check.__name__[6:] for check in CHECKS.values()])
def test_each_idiom_gives_the_value_in_the_table(here, tmp_path, monkeypatch):
    world = World()
    code = here
    if "gpt2" in here:  # its format is at hand; its weights are not
        monkeypatch.chdir(tmp_path)
        tiny_model(d_vocab=256, tie_embeddings=True).save_pretrained("as_gpt2")
        tokens = BPETokenizer().state_dict()["tokens"]
        ids = json.dumps({token: i for i, token in enumerate(tokens)})
        Path("as_gpt2", "vocab.json").write_text(ids)
        Path("as_gpt2", "merges.txt").write_text("#version: 0.2\n")
        code = here.replace("gpt2", "as_gpt2")
    found = run_idiom(code, world, tmp_path)
    for value, expected in CHECKS[here](world, found):
        assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=lambda why: f"{here}: {why}")


def test_the_command_of_the_table_sets_the_steps_and_the_context():
    program, script, *flags = shlex.split(COMMAND)
    given = vars(flag_parser(Config, "").parse_args(flags))
    default = Config()
    assert (program, script) == ("python", "train.py")
    assert config_from_dict(Config, nest_flags(given)) == replace(
        default, train=replace(default.train, max_steps=500),
        model=replace(default.model, n_ctx=64))


# What differs under one name


def test_hook_normalized_is_before_w_and_b():
    world = World()
    norm = world.model.blocks[1].ln2
    resid = world.cache["resid_mid", 1]
    plain = functional.layer_norm(resid, resid.shape[-1:])
    normalized = world.cache["normalized", 1, "ln2"]
    assert_close(normalized, plain, rtol=1e-5, atol=1e-5)
    assert (normalized - (plain * norm.w + norm.b)).abs().max() > 0.1, "w and b would not show"


def test_a_sweep_of_patterns_by_position_is_layer_pos_head():
    world = World()
    found = patching.get_act_patch_attn_head_pattern_by_pos(
        world.model, world.corrupted, world.cache, world.metric)
    cells = [(layer, (slice(None), head, pos))
             for layer in range(3) for pos in range(7) for head in range(2)]
    one_by_one = torch.stack(world.patched_one_by_one("pattern", cells)).view(3, 7, 2)
    assert found.axes == ("layer", "pos", "head")
    assert_close(found.patched.mean(-1), one_by_one, rtol=1e-5, atol=1e-5)
    assert_close(found.mean, one_by_one - found.baseline.mean(), rtol=1e-5, atol=1e-5)


def test_a_circuit_reads_as_a_folded_copy_does_and_the_model_stays_as_it_was():
    world = World()
    before = world.model(world.tokens)
    folded = fold_layer_norm(world.model)[0]
    assert_close(folded(world.tokens), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(world.model(world.tokens), before), "folding changed the model itself"
    assert_close(ov_circuit(world.model, 0, 1).AB, folded.W_V[0, 1] @ folded.W_O[0, 1],
                 rtol=1e-5, atol=1e-5)
