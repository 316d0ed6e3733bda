"""Training that begins with an existing model, frozen weights, and runs that get more steps."""

import json
import math
import shutil

import pytest
import torch
from helpers import TINY, refusal, scramble_, tiny_model, tiny_tokens
from test_train import (
    argv,
    curve,
    final,
    named,
    on_batch,
    quietly,
    run_of,
    same,
    stopped_at,
    together,
)

import checkpoint
import corpus
import train
from checkpoint import export_pretrained, load_checkpoint, load_model
from config import ModelConfig, TrainConfig
from data import PrepareConfig, prepare, random_batch
from model import GPT
from optim import freeze_, make_optimizers, schedule
from tokenizer import BPETokenizer
from train import TrainingRun, fit, main
from utils import read_json, seeded_generator

SHAPE_FLAGS = 4 * 2  # words at the beginning of FLAGS, which give the shape of the model
N_PADDING = 4


def tuned(folder, origin, *flags):
    """The flags of a short run that begins with a model; later flags win."""
    return argv(folder, "--train.init_from", str(origin), *flags)[SHAPE_FLAGS:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run, `source`, and a model in GPT-2's format whose vocabulary is padded."""
    folder = tmp_path_factory.mktemp("tuning")
    with pytest.MonkeyPatch.context() as patched:
        quietly(patched)
        main(argv(folder, *named("source"), "--model.dropout", "0.1"))

    tokenizer = BPETokenizer()
    cfg = ModelConfig(n_layers=1, n_heads=2, d_model=8, n_ctx=8, tie_embeddings=True,
                      d_vocab=tokenizer.d_vocab + N_PADDING)
    export_pretrained(folder / "gpt2_like", scramble_(GPT(cfg)), tokenizer)
    return folder


def only_begin(monkeypatch):
    """Ends every run before its first step."""
    monkeypatch.setattr(TrainingRun, "train", lambda run: False)


def logits_of(run, folder, n_tokens=5):
    """(logits, tokenizer) of a model for the same few ids."""
    model, tokenizer = load_model(run, folder / "outputs")
    return model(tiny_tokens(2, n_tokens)), tokenizer


# Beginning with a model


def test_before_the_first_step_a_run_gives_the_logits_of_its_source(home, tmp_path, monkeypatch):
    only_begin(monkeypatch)
    for name, origin in (("a", run_of(home, "source")), ("b", home / "gpt2_like")):
        for flags in ([], ["--model.n_ctx", "5"]):
            main(tuned(tmp_path, origin, *named(name, "--overwrite"), *flags))
            found, tokenizer = logits_of(name, tmp_path)
            wanted, its_tokenizer = logits_of(origin, tmp_path)
            off = (found - wanted).abs().max()
            assert torch.equal(found, wanted), f"{origin} {flags}: logits differ by {off:.2g}"
            assert tokenizer.state_dict() == its_tokenizer.state_dict()


def test_a_smaller_context_keeps_the_first_positions(home, tmp_path, monkeypatch):
    only_begin(monkeypatch)
    main(tuned(tmp_path, run_of(home, "source"), *named("short"), "--model.n_ctx", "3"))
    source, short = (load_model(run_of(*place))[0] for place in ((home, "source"),
                                                                  (tmp_path, "short")))
    assert short.cfg.n_ctx == 3 and torch.equal(short.W_pos, source.W_pos[:3])


def test_a_context_may_grow_only_if_positions_are_not_learned(tmp_path, monkeypatch):
    quietly(monkeypatch)
    for positions in ("sinusoidal", "none", "learned"):
        main(argv(tmp_path, *named(positions), "--model.positions", positions))
        flags = tuned(tmp_path, positions, *named(f"longer-{positions}"), "--model.n_ctx", "12")
        if positions == "learned":
            assert "n_ctx is 8, not 12" in refusal(lambda flags=flags: main(flags))
        else:
            main(flags)
            assert load_model(f"longer-{positions}", tmp_path / "outputs")[0].cfg.n_ctx == 12


def test_tuning_a_folder_in_gpt2_s_format_lowers_its_loss(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.plotting, "save", lambda figure, path: None)
    main(tuned(tmp_path, home / "gpt2_like", *named("mine"), "--train.max_steps", "60",
               "--train.lr", "1e-2", "--train.optimizer", "adamw", "--train.warmup_steps", "5"))
    losses = [loss for _, loss in curve(tmp_path, "mine", "val_loss") if loss is not None]
    assert losses[-1] < 0.8 * losses[0], f"the loss went from {losses[0]} to {losses[-1]}"
    assert f"(before: {losses[0]:.4f}, " in capsys.readouterr().out
    model, tokenizer = load_model("mine", tmp_path / "outputs")
    assert model.cfg.tie_embeddings and tokenizer.kind == "bpe"
    assert model.cfg.d_vocab == tokenizer.d_vocab + N_PADDING


def test_learning_rates_for_a_new_model_are_warned_of(capsys):
    rows = [(TrainConfig(), ["--train.lr 0.0005", "--train.muon_lr 0.0016"]),
            (TrainConfig(lr=5e-4), ["--train.muon_lr 0.0016"]),
            (TrainConfig(lr=0.01, muon_lr=1e-3), ["--train.lr 0.0005"]),
            (TrainConfig(optimizer="adamw"), ["--train.lr 0.0005"]),
            (TrainConfig(optimizer="adamw", lr=5e-4), []),
            (TrainConfig(lr=5e-4, muon_lr=1.6e-3), [])]
    for cfg, told in rows:
        train.print_source(cfg)
        said = capsys.readouterr().out
        assert ("forgets" in said) == bool(told), f"{cfg}: {said}"
        assert all(part in said for part in told), f"{cfg}: {said}"


def test_config_json_has_the_shape_and_the_tokenizer_of_the_source(home, tmp_path, monkeypatch):
    only_begin(monkeypatch)
    main(tuned(tmp_path, home / "gpt2_like", *named("mine"), "--model.dropout", "0.3"))
    config = read_json(run_of(tmp_path, "mine") / "config.json")
    cfg = load_model(home / "gpt2_like")[0].cfg
    assert config["model"] == vars(cfg) | {"dropout": 0.3}
    assert config["data"]["tokenizer"] == "bpe" and config["data"]["vocab_size"] == 256


def test_a_tuning_is_resumed_to_the_same_bits_without_its_source(home, tmp_path, monkeypatch):
    quietly(monkeypatch)
    for origin in (run_of(home, "source"), home / "gpt2_like"):
        copy = tmp_path / "copy"
        shutil.copytree(origin, copy)
        flags = [*named("whole", "--overwrite"), "--train.freeze", "*.ln1.*", "blocks.0.mlp.*"]
        main(tuned(tmp_path, copy, *flags))
        with pytest.MonkeyPatch.context() as patched:
            on_batch(patched, 4, lambda: train.signal.raise_signal(train.signal.SIGTERM))
            main(tuned(tmp_path, copy, *flags, *named("halves")))
        assert final(tmp_path, "halves")["step"] == 4

        shutil.rmtree(copy)
        main([*named("halves"), "--logging.out_dir", str(tmp_path / "outputs"), "--resume",
              "--train.device", "cpu", "--train.freeze", "*.ln1.*", "blocks.0.mlp.*"])
        assert same(final(tmp_path, "halves"), final(tmp_path, "whole")), f"{origin}: another end"


def test_a_tuning_may_get_worse_than_its_source_but_not_than_a_uniform_guess(
    home, tmp_path, monkeypatch
):
    quietly(monkeypatch)
    monkeypatch.setattr(train, "PATIENCE", 2)
    main(tuned(tmp_path, run_of(home, "source"), *named("mine"), "--train.max_steps", "1"))
    d_vocab = load_model("mine", tmp_path / "outputs")[0].cfg.d_vocab
    state = final(tmp_path, "mine")
    assert state["best_loss"] < math.log(d_vocab) == state["untrained"]


def test_ids_that_are_only_padding_are_never_drawn(home, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(TrainingRun, "train", lambda run: drawn.extend(
        run.next_batch()[0].max().item() for _ in range(50)))
    main(tuned(tmp_path, home / "gpt2_like", *named("mine"), "--data.repeats", "0.9"))
    assert 250 < max(drawn) < BPETokenizer().d_vocab


def test_a_text_or_flag_that_does_not_fit_the_model_is_refused(home, tmp_path):
    strange = tmp_path / "strange.txt"
    strange.write_text("«Ça» " + corpus.text(1500), encoding="utf-8")
    prepare([strange], PrepareConfig(tokenizer="char", out=str(tmp_path / "ids")))
    rows = [
        ("source", f"--data.path {strange}", ["strange.txt", "'«' '»' 'Ç'"]),
        ("source", f"--data.path {tmp_path / 'ids'}", ["another tokenizer"]),
        ("source", "--model.n_layers 2 --model.d_model 16 --model.dropout 0.2",
         ["n_layers is 1, not 2; model.d_model is 8, not 16;"]),
        ("source", "--model.n_ctx 9", ["n_ctx is 8, not 9"]),
        ("source", "--model.tie_embeddings", ["tie_embeddings is False, not True"]),
        ("source", "--model.preset gpt2", ["n_layers is 1, not 12"]),
        ("source", "--data.tokenizer word", ["tokenizer is char, not word"]),
        ("gpt2_like", "--data.tokenizer bpe --data.vocab_size 300", ["vocab_size is 256, not 300"]),
        ("source", "--train.freeze block.0.*", ["'block.0.*'", "blocks.0.*"]),
        ("source", "--train.freeze *", ["freeze"]),
        ("sauce", "", ["'sauce'", "source"]),
    ]
    shutil.copytree(run_of(home, "source"), run_of(tmp_path, "source"))
    before = sorted(tmp_path.rglob("*"))
    for origin, flags, told in rows:
        origin = home / origin if origin == "gpt2_like" else origin
        line = refusal(lambda origin=origin, flags=flags: main(
            tuned(tmp_path, origin, *named("mine"), *flags.split())), flags)
        for part in told:
            assert part in line, f"{flags} is refused with: {line}"
        left = [path for path in tmp_path.rglob("*") if path not in before]
        assert left in ([], [tmp_path / "text.txt"]), f"{flags} is refused and leaves {left}"


def test_a_run_does_not_replace_the_model_that_it_begins_with(home, tmp_path):
    shutil.copytree(run_of(home, "source"), run_of(tmp_path, "source"))
    for origin in ("source", tmp_path / "outputs/../outputs/source"):
        flags = tuned(tmp_path, origin, *named("source", "--overwrite"))
        assert "source" in refusal(lambda flags=flags: main(flags))
    assert same(final(tmp_path, "source"), final(home, "source"))


def test_a_model_without_a_tokenizer_or_of_other_logits_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (tiny_model(), None))
    assert "no tokenizer" in refusal(lambda: main(tuned(tmp_path, "toy")))

    classifier = tiny_model(d_vocab_out=3)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (classifier, BPETokenizer()))
    assert "3 logits for 11 tokens" in refusal(lambda: main(tuned(tmp_path, "toy")))


# Frozen weights


def trained_with(patterns, optimizer, tie_embeddings=False):
    """(weights before, the model after five steps with strong decay, its optimisers)."""
    model = tiny_model(tie_embeddings=tie_embeddings).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    cfg = TrainConfig(max_steps=5, warmup_steps=0, weight_decay=0.5, optimizer=optimizer,
                      freeze=patterns)
    freeze_(model, patterns)
    optimizers = make_optimizers(model, cfg)
    tokens = tiny_tokens(20, TINY["n_ctx"] + 1).flatten()
    generator = seeded_generator(0)
    for _ in fit(model, lambda: random_batch(tokens, 4, TINY["n_ctx"], generator), cfg,
                 optimizers=optimizers):
        pass
    return before, model, optimizers


def test_frozen_weights_keep_their_bits_and_all_others_move():
    rows = [((), ()), (("blocks.0.*",), ("blocks.0.",)),
            (("*.attn.*", "ln_final.w"), (".attn.", "ln_final.w")),
            (("token_embedding.W_E", "blocks.?.mlp.W_*"), ("W_E", ".mlp.W_")),
            (("blocks.*",), ("blocks.",)),  # nothing is left for Muon,
            (("*embedding*", "ln_final.*", "*.ln?.*", "*.b_*"),  # and nothing for AdamW
             ("embedding", "ln_final", ".ln1.", ".ln2.", ".b_"))]
    for optimizer in ("muon", "adamw"):
        for patterns, parts in rows:
            before, model, optimizers = trained_with(patterns, optimizer)
            for name, p in model.named_parameters():
                is_frozen = any(part in name for part in parts)
                assert torch.equal(p, before[name]) == is_frozen, f"{optimizer} {patterns}: {name}"
                assert (p.grad is None) == is_frozen, f"{optimizer} {patterns}: {name}'s gradient"

            # No memory of the optimisers is spent on them.
            learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
            kept = sum(m.numel() for each in optimizers for m in each.state_dict()["m"])
            assert kept == learning, f"{optimizer} {patterns}: {kept} numbers for {learning}"


def test_freezing_a_tied_embedding_freezes_the_unembedding():
    before, model, _ = trained_with(("token_embedding.*",), "muon", tie_embeddings=True)
    assert torch.equal(model.W_U, before["token_embedding.W_E"].T)


def test_the_loop_alone_freezes_what_its_settings_say():
    model = tiny_model()
    cfg = TrainConfig(max_steps=1, warmup_steps=0, freeze=("blocks.1.*",))
    tokens = tiny_tokens(4, TINY["n_ctx"] + 1)
    before = model.blocks[1].attn.W_QKV.detach().clone()
    [step] = fit(model, lambda: (tokens[:, :-1], tokens[:, 1:]), cfg)
    assert torch.equal(model.blocks[1].attn.W_QKV, before) and step.grad_norm > 0


# More steps


def longer(folder, name, steps, *flags):
    """Resumes a run with another number of steps."""
    main([*named(name, "--logging.out_dir", str(folder / "outputs"), "--resume"),
          "--train.device", "cpu", "--train.max_steps", str(steps), *flags])


def test_a_finished_run_with_more_steps_ends_as_one_that_had_them_from_the_start(
    tmp_path, monkeypatch
):
    # While the rates rise, they do not depend on max_steps, so the two runs are the same.
    quietly(monkeypatch)
    rising = ["--train.warmup_steps", "40", "--model.dropout", "0.2"]
    main(argv(tmp_path, *named("whole"), *rising, "--train.max_steps", "12"))
    main(argv(tmp_path, *named("mine"), *rising))
    longer(tmp_path, "mine", 12)
    mine = final(tmp_path, "mine")
    assert mine.pop("earlier_max_steps") == [(6, 6)]
    assert same(mine | {"earlier_max_steps": []}, final(tmp_path, "whole"))
    assert curve(tmp_path, "mine", "train_loss", "val_loss", "lr") \
        == curve(tmp_path, "whole", "train_loss", "val_loss", "lr")


def test_an_unfinished_run_takes_more_steps_too(tmp_path, monkeypatch):
    quietly(monkeypatch)  # before a trapezoid falls, it does not depend on max_steps
    flat = ["--train.schedule", "trapezoid", "--train.warmup_steps", "2"]
    main(argv(tmp_path, *named("whole"), *flat, "--train.max_steps", "16"))
    stopped_at(5, tmp_path, *named("mine"), *flat, "--train.max_steps", "10")
    longer(tmp_path, "mine", 16)
    assert same(final(tmp_path, "mine")["model"], final(tmp_path, "whole")["model"])


def test_with_more_steps_the_rates_are_those_of_the_longer_schedule(
    tmp_path, monkeypatch, capsys
):
    quietly(monkeypatch)
    flags = ["--train.warmup_steps", "2", "--train.lr", "0.004", "--train.log_interval", "1"]
    for stop, name in ((6, "finished"), (5, "unfinished")):
        if stop == 6:
            main(argv(tmp_path, *named(name), *flags))
        else:
            stopped_at(5, tmp_path, *named(name), *flags)
        capsys.readouterr()
        longer(tmp_path, name, 10)
        rates = dict(curve(tmp_path, name, "lr")[1:])
        for step, rate in rates.items():
            planned = 6 if step <= stop else 10
            assert rate == pytest.approx(0.004 * schedule(step - 1, planned, 2)), f"step {step}"
        assert list(rates) == list(range(1, 11))
        said = capsys.readouterr().out
        assert "max_steps is 10 instead of 6" in said
        assert f"from {rates[stop]:.3g} to {rates[stop + 1]:.3g}\n" in said
        assert rates[stop + 1] > rates[stop]


def test_a_resumed_run_may_get_fewer_steps_but_not_fewer_than_it_took(tmp_path, monkeypatch):
    quietly(monkeypatch)
    stopped_at(4, tmp_path, *named("mine"), "--train.max_steps", "9")
    before = {path: path.read_bytes() for path in run_of(tmp_path, "mine").iterdir()}
    assert "step 4" in refusal(lambda: longer(tmp_path, "mine", 3))
    assert before == {path: path.read_bytes() for path in run_of(tmp_path, "mine").iterdir()}
    longer(tmp_path, "mine", 4)  # it ends where it is, and is evaluated there
    assert curve(tmp_path, "mine", "val_loss")[-1][0] == 4
    assert curve(tmp_path, "mine", "val_loss")[-1][1] is not None
    longer(tmp_path, "mine", 5)
    assert final(tmp_path, "mine")["step"] == 5


def test_config_json_says_which_numbers_of_steps_were_planned(tmp_path, monkeypatch):
    quietly(monkeypatch)
    main(argv(tmp_path, *named("mine")))
    path = run_of(tmp_path, "mine") / "config.json"
    before = read_json(path)
    longer(tmp_path, "mine", 8)
    longer(tmp_path, "mine", 9)
    after = read_json(path)
    assert after.pop("earlier_max_steps") == [{"until_step": 6, "max_steps": 6},
                                              {"until_step": 8, "max_steps": 8}]
    before["train"]["max_steps"] = 9
    assert after == before


def test_wherever_it_is_killed_a_run_that_gets_more_steps_goes_on(tmp_path, monkeypatch):
    quietly(monkeypatch)
    config = run_of(tmp_path, "mine") / "config.json"

    def killed(*_, **more):
        raise KeyboardInterrupt

    # Before the checkpoint is written, the old number holds; afterwards, the new one.
    for place, planned in (("save_checkpoint", 6), ("record_max_steps", 8), ("fit", 8)):
        main(argv(tmp_path, *named("mine", "--overwrite")))
        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(train, place, killed)
            longer(tmp_path, "mine", 8)
        main([*named("mine", "--logging.out_dir", str(tmp_path / "outputs"), "--resume")])
        assert final(tmp_path, "mine")["step"] == planned, f"killed in {place}"
        found = json.loads(config.read_text())
        saved = load_checkpoint(run_of(tmp_path, "mine") / "checkpoint.pt")
        assert found["train"]["max_steps"] == saved["config"]["train"]["max_steps"] == planned
        assert ("earlier_max_steps" in found) == (planned == 8), f"killed in {place}"


@pytest.mark.slow
def test_two_ranks_tune_as_one_process_does(home, tmp_path, monkeypatch):
    quietly(monkeypatch)
    flags = ["--train.init_from", str(home / "gpt2_like"), "--train.freeze", "blocks.0.mlp.*",
             "--model.n_layers", "1", "--model.n_heads", "2", "--model.d_model", "8",
             "--model.n_ctx", "8"]
    short = ["--train.max_steps", "20", "--train.log_interval", "1", "--train.threads", "1"]
    main(argv(tmp_path, *named("one"), *flags, *short))
    code, _, ran = together(tmp_path, "two", *flags, *short)
    assert code == 0, ran.stderr
    for (step, one), (_, two) in zip(curve(tmp_path, "one", "train_loss"),
                                     curve(tmp_path, "two", "train_loss"), strict=True):
        assert step == 0 or abs(one - two) < 1e-4, f"step {step}: {one} and {two}"
    before = GPT.from_pretrained(home / "gpt2_like").blocks[0].mlp.W_in
    assert torch.equal(load_model("two", tmp_path / "outputs")[0].blocks[0].mlp.W_in, before)

    # More steps, on two ranks
    code, _, ran = together(tmp_path, "two", "--train.max_steps", "24", "--resume")
    assert code == 0 and "max_steps is 24 instead of 20" in ran.stdout, ran.stderr
    assert final(tmp_path, "two")["step"] == 24
