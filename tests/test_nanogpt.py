"""nanoGPT's checkpoints and characters, written as nanoGPT writes them, with its arithmetic."""

import math
import pickle
import random
import resource
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import refusal
from test_checkpoint import Attack
from torch import nn

import checkpoint
import generate
from checkpoint import load_model
from formats import read_meta
from model import GPT
from tokenizer import BPETokenizer, CharTokenizer
from utils import seeded_generator

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 9, "vocab_size": 11}
TOKENS = torch.randint(11, (2, 7), generator=seeded_generator(0))
CHARACTERS = "\n !abcdé中😀z"


# nanoGPT's model, checkpoint and characters


class TheirNorm(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class TheirAttention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.c_attn = nn.Linear(args["n_embd"], 3 * args["n_embd"], bias=args["bias"])
        self.c_proj = nn.Linear(args["n_embd"], args["n_embd"], bias=args["bias"])
        self.n_head = args["n_head"]

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for part in self.c_attn(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(later, -math.inf).softmax(-1)
        return self.c_proj((pattern @ v).transpose(1, 2).flatten(-2))


class TheirMLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.c_fc = nn.Linear(args["n_embd"], 4 * args["n_embd"], bias=args["bias"])
        self.c_proj = nn.Linear(4 * args["n_embd"], args["n_embd"], bias=args["bias"])
        self.gelu = partial(F.gelu, approximate=args["approximate"])

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class TheirBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.ln_1 = TheirNorm(args["n_embd"], args["bias"])
        self.attn = TheirAttention(args)
        self.ln_2 = TheirNorm(args["n_embd"], args["bias"])
        self.mlp = TheirMLP(args)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TheirGPT(nn.Module):
    """approximate: "none" for the exact GELU, "tanh" for that of GPT-2."""

    def __init__(self, bias=True, approximate="none", **changes):
        super().__init__()
        args = SIZES | changes | {"bias": bias, "approximate": approximate}
        self.args = {name: args[name] for name in SIZES} | {"bias": bias, "dropout": 0.2}
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(args["vocab_size"], args["n_embd"]),
            "wpe": nn.Embedding(args["block_size"], args["n_embd"]),
            "h": nn.ModuleList(TheirBlock(args) for _ in range(args["n_layer"])),
            "ln_f": TheirNorm(args["n_embd"], bias)})
        self.lm_head = nn.Linear(args["n_embd"], args["vocab_size"], bias=False)
        self.transformer.wte.weight = self.lm_head.weight

        # Every weight of ordinary size: fresh LayerNorms and biases do nothing
        generator = seeded_generator(1)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                is_gain = ".ln_" in name and name.endswith("weight")
                weight.copy_(1 + 0.3 * noise if is_gain else 0.4 * noise)

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe.weight[: tokens.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def exact_logits(self, tokens=TOKENS):
        """Their logits in float64; the model stays in float32."""
        with torch.no_grad():
            logits = self.double()(tokens)
        self.float()
        return logits


def ckpt(model, prefix="", masks=False, **changes):
    """What nanoGPT saves after a step of training, as a dict."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(TOKENS % model.args["vocab_size"]).sum().backward()
    optimizer.step()
    weights = {prefix + name: weight for name, weight in model.state_dict().items()}
    if masks:  # as without flash attention
        n_ctx = model.args["block_size"]
        weights |= {f"{prefix}transformer.h.{n}.attn.bias": torch.ones(1, 1, n_ctx, n_ctx).tril()
                    for n in range(model.args["n_layer"])}
    return {
        "model": weights, "optimizer": optimizer.state_dict(), "model_args": model.args,
        "iter_num": 250, "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "dataset": "letters", "learning_rate": 1e-3, "compile": True,
                   "init_from": "scratch", "wandb_log": False, "dtype": "float16"},
    } | changes


def save(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / "ckpt.pt")
    return folder


def meta_of(characters=CHARACTERS):
    return {"vocab_size": len(characters), "itos": dict(enumerate(characters)),
            "stoi": {c: i for i, c in enumerate(characters)}}


def write_meta(folder, meta=None, protocol=None):
    folder.mkdir(parents=True, exist_ok=True)
    content = pickle.dumps(meta_of() if meta is None else meta, protocol=protocol)
    (folder / "meta.pkl").write_bytes(content)
    return folder / "meta.pkl"


def close(ours, theirs):
    return (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


# What is read


def test_logits_are_nanogpt_s_with_and_without_biases_and_under_every_prefix(tmp_path):
    for bias in (True, False):
        their = TheirGPT(bias)
        for number, prefix in enumerate(("", "_orig_mod.", "module.", "module._orig_mod.")):
            folder = save(tmp_path / f"{bias}{number}", ckpt(their, prefix, masks=number % 2 == 0))
            for path in (folder, str(folder / "ckpt.pt")):
                model, tokenizer = load_model(path)
                case = f"{bias=}, {prefix=}, {path}"
                assert close(model(TOKENS), their.exact_logits()), case
                assert tokenizer is None and not model.training and model.cfg.dropout == 0, case
                assert {w.dtype for w in model.parameters()} == {torch.float32}, case
    assert model.cfg.tie_embeddings and not model.cfg.attn_bias and model.cfg.d_mlp == 48


def test_shapes_other_than_the_usual_are_read(tmp_path):
    for changes in ({"n_layer": 0}, {"n_head": 1, "n_embd": 5}, {"vocab_size": 64},
                    {"block_size": 7, "n_layer": 1}):
        their = TheirGPT(**changes)
        model, _ = load_model(save(tmp_path, ckpt(their)))
        assert close(model(TOKENS), their.exact_logits()), changes


def test_half_and_double_weights_give_a_float32_model(tmp_path):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        their = TheirGPT()
        content = ckpt(their)
        content["model"] = {name: w.to(dtype) for name, w in content["model"].items()}
        their.load_state_dict(content["model"])
        model, _ = load_model(save(tmp_path, content))
        assert model.W_E.dtype == torch.float32, dtype
        assert close(model(TOKENS), their.exact_logits()), dtype


def test_a_head_that_was_untied_is_kept(tmp_path):
    their = TheirGPT()
    their.lm_head.weight = nn.Parameter(their.lm_head.weight + 0.3)
    model, _ = load_model(save(tmp_path, ckpt(their)))
    assert not model.cfg.tie_embeddings
    assert close(model(TOKENS), their.exact_logits())


def test_the_gelu_of_before_june_2023_is_told_or_known_by_the_lack_of_a_field(tmp_path):
    their = TheirGPT(approximate="tanh")
    content = ckpt(their)
    expected = their.exact_logits()
    save(tmp_path, content)
    assert close(load_model(tmp_path, activation="gelu")[0](TOKENS), expected)
    assert not close(load_model(tmp_path)[0](TOKENS), expected)
    content["model_args"] = SIZES
    save(tmp_path, content)
    assert close(load_model(tmp_path)[0](TOKENS), expected)
    assert "'silu'" in refusal(lambda: load_model(tmp_path, activation="silu"))


def test_the_optimiser_s_numbers_are_left_in_the_file(tmp_path):
    content = ckpt(TheirGPT())
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1 << 24)  # 64 MB
    save(tmp_path, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_model(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KB
    assert grown < 1 << 15, f"loading takes {grown >> 10} MB more than before"


# Characters


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_characters_are_read_from_beside_the_checkpoint_or_from_nanogpt_s_folder(
        tmp_path, protocol, capsys):
    their = TheirGPT()
    folder = save(tmp_path / "out", ckpt(their))
    assert load_model(folder)[1] is None
    assert "meta.pkl" in capsys.readouterr().err
    for place in (tmp_path / "data/letters", folder):
        path = write_meta(place, protocol=protocol)
        _, tokenizer = load_model(folder)
        assert isinstance(tokenizer, CharTokenizer) and tokenizer.d_vocab == 11
        assert tokenizer.encode("a中\n") == [3, 8, 0] and tokenizer.decode([9, 7]) == "😀é"
        assert "nanoGPT" in (said := capsys.readouterr().err) and str(path) in said
    generate.main(["--model", str(folder), "--prompt", "ab", "--max_new_tokens", "2"])
    assert capsys.readouterr().out.startswith("ab")


def test_a_dataset_s_name_never_leads_out_of_the_data_folder(tmp_path):
    write_meta(tmp_path / "elsewhere")
    write_meta(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("../elsewhere", str(tmp_path / "elsewhere"), "", "..", "a\x00b", 3, None):
        content = ckpt(TheirGPT())
        content["config"]["dataset"] = name
        assert load_model(save(tmp_path / "out", content))[1] is None, name
    assert load_model(save(tmp_path / "out", ckpt(TheirGPT(), config=None)))[1] is None


def test_many_characters_are_read(tmp_path):
    characters = [chr(code) for code in range(0x10000, 0x10000 + 70_000)]
    path = write_meta(tmp_path, meta_of(characters))
    assert read_meta(path, 70_000)["symbols"] == characters


def test_a_vocabulary_of_gpt_2_s_size_gets_its_tokenizer(tmp_path, monkeypatch, capsys):
    their = TheirGPT(vocab_size=304)  # padded, as nanoGPT pads 50,257 to 50,304
    vocabulary = BPETokenizer().train("abab", 257)
    checkpoint.export_pretrained(tmp_path / "bpe", GPT(load_model(
        save(tmp_path / "out", ckpt(their)))[0].cfg), vocabulary)
    monkeypatch.setattr(checkpoint, "GPT2_BPE", tmp_path / "bpe")
    assert load_model(tmp_path / "out")[1] is None
    monkeypatch.setattr(checkpoint, "GPT2_TOKENS_PADDED", 304)
    model, tokenizer = load_model(tmp_path / "out")
    assert model.cfg.d_vocab == 304 and tokenizer.encode("ab") == [256]
    assert "using GPT-2's" in capsys.readouterr().err


# What is refused


def test_a_checkpoint_that_asks_to_run_code_is_refused_before_it_runs(tmp_path):
    victim = tmp_path / "victim"
    for field in ("model_args", "config", "optimizer", "best_val_loss"):
        save(tmp_path, ckpt(TheirGPT(), **{field: {"n_layer": Attack(victim)}}))
        assert "ckpt.pt" in refusal(lambda: load_model(tmp_path), field)
        assert not victim.exists(), f"{field} is run"
    pickle.loads(pickle.dumps(Attack(victim))).close()
    assert victim.exists()  # the attack works where it is let


def test_characters_that_ask_to_run_code_are_refused_before_it_runs(tmp_path):
    victim = tmp_path / "victim"
    by_hand = f"cos\nsystem\n(S'touch {victim}'\ntR.".encode()
    attacks = [pickle.dumps(meta_of() | {"more": Attack(victim)}, protocol)
               for protocol in range(6)]
    attacks += [pickle.dumps(Attack(victim), protocol) for protocol in range(6)]
    for attack in [*attacks, by_hand]:
        (tmp_path / "meta.pkl").write_bytes(attack)
        message = refusal(lambda: read_meta(tmp_path / "meta.pkl", 11), attack[:40])
        assert "the instruction" in message and "meta.pkl" in message and "\n" not in message
        assert not victim.exists(), attack[:40]
    pickle.loads(by_hand)
    assert victim.exists()  # the attack works where it is let


def test_other_characters_than_nanogpt_s_are_refused(tmp_path):
    good = meta_of("ab")
    knot = {}
    knot["itos"] = knot
    for meta, told in [
        ({}, "itos"), ("text", "itos"), (3, "itos"), (good | {"itos": 3}, "itos"), (knot, "itos"),
        (good | {"itos": {0: "a", 2: "b"}}, "itos"), (good | {"itos": {0: "a", 1: 2}}, "2"),
        (good | {"itos": {0: "a", 1: "bc"}}, "'bc'"), (good | {"itos": {0: "a", 1: ""}}, "''"),
        (good | {"itos": {0: "a", 1: "a"}}, "stoi"), (good | {"stoi": {"a": 1, "b": 0}}, "stoi"),
        ({"itos": good["itos"]}, "stoi"), (meta_of("abcdefghijkl"), "12 characters"),
        (good | {"stoi": knot}, "stoi"),
        ([good], "EMPTY_LIST"), (good | {"more": 1.5}, "BINFLOAT"), (good | {"a": None}, "NONE"),
        (good | {"a": b"x"}, "SHORT_BINBYTES"), ({(1, 2): 3}, "TUPLE2"),
    ]:
        path = write_meta(tmp_path, meta)
        message = refusal(partial(read_meta, path, 11), meta)
        assert told in message and str(path) in message and "\n" not in message, message


def test_a_damaged_file_of_characters_is_refused_in_one_line_or_gives_characters(tmp_path):
    path = tmp_path / "meta.pkl"
    for protocol in (2, 4):
        whole = pickle.dumps(meta_of(), protocol)
        for length in range(0, len(whole), 3):
            path.write_bytes(whole[:length])
            assert "\n" not in refusal(lambda: read_meta(path, 11), f"{length} bytes")
        draw = random.Random(0)
        for _ in range(100):
            raw = bytearray(whole)
            raw[draw.randrange(len(whole))] = draw.randrange(256)
            path.write_bytes(raw)
            try:
                symbols = read_meta(path, 11)["symbols"]
            except ValueError as error:
                assert type(error).__name__ == "UserError" and "\n" not in str(error)
            else:
                assert len(symbols) == 11 and all(len(symbol) == 1 for symbol in symbols)


def test_a_file_of_characters_takes_little_time_whatever_is_in_it(tmp_path):
    path = tmp_path / "meta.pkl"
    for content in (b"\x80\x04" + b"}\x94" * 1_000_000, b"\x80\x02}" + b"h\x00" * 500_000,
                    b"(" * 1_000_000, b"\x8d" + b"\xff" * 8, b"\x8a\xff" * 1000,
                    b"L" + b"9" * 4_000_000 + b"L\n.", b"X\xff\xff\xff\x7fa"):
        path.write_bytes(content)
        start = time.perf_counter()
        refusal(lambda: read_meta(path, 11), content[:20])
        assert time.perf_counter() - start < 10, content[:20]


def test_model_args_of_another_model_are_refused(tmp_path):
    for changes, *told in [
        ({"n_layer": None}, "n_layer", "None"), ({"n_head": 0}, "n_head", "0"),
        ({"n_embd": "12"}, "n_embd", "'12'"), ({"block_size": 9.5}, "block_size", "9.5"),
        ({"vocab_size": True}, "vocab_size"), ({"n_layer": -1}, "n_layer"),
        ({"n_head": 5}, "n_heads=5", "d_model=12"), ({"bias": 1}, "bias=1"),
        ({"n_kv_head": 1}, "n_kv_head=1"), ({"use_rmsnorm": True}, "use_rmsnorm=True"),
        ({"rope": torch.ones(2)}, "rope"), ({"bias": False}, "h.0.attn.c_attn.bias"),
        ({"n_layer": 1}, "h.1."), ({"n_layer": 3}, "h.2."), ({"vocab_size": 12}, "[11, 12]"),
        ({"block_size": 10}, "[9, 12]"), ({"n_embd": 15}, "[11, 12]"),
    ]:
        their = TheirGPT()
        save(tmp_path, ckpt(their, model_args=their.args | changes))
        message = refusal(lambda: load_model(tmp_path), changes)
        assert "ckpt.pt" in message and "\n" not in message, message
        assert all(part in message for part in told), f"{changes}: {message}"
    for model_args in (None, [], "text"):
        save(tmp_path, ckpt(TheirGPT(), model_args=model_args))
        assert "model_args" in refusal(lambda: load_model(tmp_path))


def test_model_args_that_are_off_do_not_matter(tmp_path):
    their = TheirGPT()
    save(tmp_path, ckpt(their, model_args=their.args | {"use_rmsnorm": False, "rope": None}))
    assert close(load_model(tmp_path)[0](TOKENS), their.exact_logits())


def test_tensors_that_are_missing_unknown_or_of_another_kind_are_named(tmp_path):
    whole = ckpt(TheirGPT())
    for changes, told in [
        ({"transformer.h.1.mlp.c_fc.bias": None}, "h.1.mlp.c_fc.bias"),
        ({"transformer.wpe.weight": None}, "wpe.weight"),
        ({"transformer.h.0.attn.rotary": torch.ones(2)}, "h.0.attn.rotary"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.ones(12, 48)}, "[48, 12]"),
        ({"transformer.h.0.attn.c_attn.weight": torch.ones(12, 36)}, "[36, 12]"),
        ({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 3, 4)}, "[2, 3, 4]"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.tensor(1.0)}, "[]"),
        ({"transformer.wpe.weight": torch.ones(9, 12).long()}, "int64"),
        ({"transformer.wpe.weight": "text"}, "str"),
        ({"module.transformer.wpe.weight": torch.ones(9, 12)}, "twice"),
    ]:
        weights = whole["model"] | changes
        weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
        save(tmp_path, whole | {"model": weights})
        message = refusal(lambda: load_model(tmp_path), told)
        assert told in message and "\n" not in message, f"{told}: {message}"


def test_impossible_sizes_take_neither_time_nor_memory(tmp_path):
    their = TheirGPT()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, before[1]))
    try:
        for name in SIZES:
            for size in (10**5, 10**6, 10**9, 10**12, 10**30):
                save(tmp_path, ckpt(their, model_args=their.args | {name: size}))
                start = time.perf_counter()
                assert len(refusal(lambda: load_model(tmp_path), f"{name}={size}")) < 2000
                assert time.perf_counter() - start < 2, f"{name}={size} takes long to refuse"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_truncated_checkpoint_and_one_with_a_flipped_bit_are_refused(tmp_path):
    their = TheirGPT()
    path = save(tmp_path, ckpt(their)) / "ckpt.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    place = whole.find(their.transformer.wpe.weight.detach().numpy().tobytes())
    flipped[place + 3] ^= 0x40
    for content in (flipped, *(whole[: int(share * len(whole))] for share in (0, 0.01, 0.5, 0.99))):
        path.write_bytes(content)
        assert str(path) in refusal(lambda: load_model(tmp_path), f"{len(content)} bytes")
