"""Writes text with a trained model, one token at a time.

    python generate.py                                    # the newest run
    python generate.py --run_name mine --prompt "ROMEO:" --temperature 0.7 --top_k 20 --seed 1

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Read before: model.py, checkpoint.py; after: train.py
Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, "nucleus")
"""

import sys

import torch

from checkpoint import load_model
from config import GenerateConfig, config_from_dict, flag_parser
from utils import pick_device, run_program, seeded_generator


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that the next token is drawn from, [batch, d_vocab].

    logits: [batch, d_vocab]. temperature divides them. top_k keeps the k likeliest tokens; top_p
    then keeps the fewest likeliest whose probability adds up to p or more, at least one. What is
    left is scaled to sum to one.
    """
    logits = logits.float()
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # at most 0: no overflow
    if top_k is not None and top_k < logits.shape[-1]:
        last_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < last_kept, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        descending, order = probs.sort(descending=True, stable=True)
        likelier = descending.cumsum(-1) - descending  # the probability of all before it
        kept = descending.masked_fill(likelier >= top_p, 0.0)
        kept = torch.zeros_like(probs).scatter(-1, order, kept)
        probs = kept / kept.sum(-1, keepdim=True)
    return probs


@torch.no_grad()
def generate(model, tokens, max_new_tokens, *, generator, temperature=1.0, top_k=None, top_p=None):
    """Yields the tokens that the model adds to each row, one [batch, 1] at a time.

    tokens: [batch, pos], at least one position. generator: a CPU torch.Generator. Each token is
    drawn given the last n_ctx before it; what lies further back is forgotten.
    """
    for _ in range(max_new_tokens):
        visible = tokens[:, -model.cfg.n_ctx :]
        resid = model.run_blocks(model.embed(visible))
        logits = model.unembed(resid[:, -1:])[:, 0]  # [batch, d_vocab], of the last position alone
        probs = token_probs(logits, temperature, top_k, top_p)
        new = torch.multinomial(probs.cpu(), 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, new], 1)
        yield new


def generate_text(model, tokenizer, cfg):
    """Yields the continuation of cfg.prompt piece by piece, as a GenerateConfig asks for it."""
    tokens = torch.tensor([tokenizer.encode(cfg.prompt)], device=model.W_E.device)
    for new in generate(
        model, tokens, cfg.max_new_tokens, generator=seeded_generator(cfg.seed),
        temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
    ):
        yield tokenizer.decode(new[0])


def main(argv=None):
    """The program: prints the prompt and what follows, as it comes."""
    parser = flag_parser(GenerateConfig, "Write text with a trained model.")
    cfg = config_from_dict(GenerateConfig, vars(parser.parse_args(argv)))
    model, tokenizer = load_model(cfg.run_name, cfg.out_dir, pick_device(cfg.device))
    pieces = generate_text(model, tokenizer, cfg)
    sys.stdout.write(cfg.prompt.lstrip("\n"))
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    run_program(main)
