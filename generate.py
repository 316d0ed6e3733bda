"""Generate text with a trained model, one token at a time.

    python generate.py                                    # the newest run
    python generate.py --run_name mine --prompt "ROMEO:" --temperature 0.7 --top_k 20 --sliding
    python generate.py --model gpt2 --prompt "The house of the painter" --stop "."
    python generate.py --model gpt2 --prompt "I think dogs are" --steer " I love them" \
        --steer_away " I hate them" --steer_at blocks.6.hook_resid_post

The keys and values of earlier tokens are cached, so each step computes only one new position.
Hooks that are open during generation act at every step. Steering is nothing more than that.

Chapter: COURSE_ROADMAP.md, 6 (learn and sample)
Prerequisites: model.py, checkpoint.py
Next: train.py
Source: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, "nucleus"); Keskar et al. 2019
    (repetition penalty); Turner et al. 2023 (steering by a difference of activations)
"""

import codecs
import sys

import torch

from attention import GrowingPast
from checkpoint import load_model, load_pretrained
from config import GenerateConfig, SamplingConfig, config_from_dict, flag_parser
from embeddings import check_tokens
from positions import as_integers, pad_left
from tokenizer import ENDOFTEXT, length_of_overlap
from utils import (
    UserError,
    as_list,
    check_count,
    check_tensor,
    pick_device,
    run_program,
    seeded_generator,
)

DEFAULT_NEW_TOKENS = 500


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """The probabilities from which the next token is drawn, [batch, d_vocab], in float64.

    logits: [batch, d_vocab], divided by temperature. top_k keeps the k most likely tokens. top_p
    then keeps the smallest set of most likely tokens whose probabilities add up to at least p, and
    at least one token. Among equally likely tokens, both keep those with the lowest ids. The
    remaining probabilities are rescaled to sum to one.
    """
    check_tensor("logits", logits, "batch d_vocab", is_float=True)
    if top_k is not None:
        top_k = check_count("top_k", top_k)
    logits = logits.double()
    logits = (logits - logits.max(-1, keepdim=True).values) / temperature  # at most 0: no overflow
    if top_k is None and (top_p is None or top_p == 1):
        return logits.softmax(-1)

    descending, order = logits.sort(descending=True, stable=True)
    probs = descending[:, :top_k].softmax(-1)  # [batch, the k most likely]
    if top_p is not None and top_p < 1:
        likelier = probs.cumsum(-1) - probs  # the total probability of all more likely tokens
        probs = probs.masked_fill(likelier >= top_p - 1e-12, 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(-1, order[:, :top_k], probs)


def penalise_repetition(logits, tokens, known, penalty):
    """Repetition penalty: with a penalty above 1, tokens that already occurred become less likely.

    Positive logits of such tokens are divided by the penalty, negative ones multiplied by it.
    logits: [batch, d_vocab]. tokens, known: [batch, pos]; known is False at padding.
    """
    if penalty == 1:
        return logits
    times_seen = torch.zeros_like(logits).scatter_add(1, tokens, known.to(logits.dtype))
    punished = torch.where(logits > 0, logits / penalty, logits * penalty)
    bounds = torch.finfo(logits.dtype)
    punished = punished.clamp(bounds.min, bounds.max)  # the product may overflow
    return torch.where(times_seen > 0, punished, logits)


def n_new_tokens(cfg, n_prompt, n_ctx):
    """The number of tokens to add to a prompt of n_prompt tokens, as a SamplingConfig asks.

    Raises UserError if they do not fit into the context and the window may not slide.
    """
    room = n_ctx - n_prompt
    wanted = cfg.max_new_tokens
    if wanted is None:
        wanted = DEFAULT_NEW_TOKENS if cfg.sliding else max(0, min(DEFAULT_NEW_TOKENS, room))

    if wanted > room and not cfg.sliding:
        remedy = f"ask for at most {room}" if room > 0 else "shorten the prompt"
        raise UserError(f"{n_prompt} tokens of prompt and {wanted} new ones do not fit into "
                        f"n_ctx={n_ctx}; {remedy}, or use --sliding")
    return wanted


@torch.no_grad()
def generate(model, prompts, cfg, *, stop_ids=(), cached=None, hooks_see_chunks=False,
             n_ids=None):
    """Yields the tokens that the model adds to each row, one [batch, 1] at a time.

    prompts: [batch, pos] of ids, or a list of lists of ids whose lengths may differ; each row is
    continued as if it were alone. cfg: a SamplingConfig; if it is sliding, each token is drawn
    given the last n_ctx tokens before it. stop_ids: generation ends when every row has produced one
    of these; until then, a row that has stopped repeats its stop id. n_ids: propose only ids below
    it (None: all ids that the model has).
    cached: reuse keys and values, so that a step computes only the new position; False reads all
    tokens again at each step, with the same result. With the cache a hook sees each new position as
    position 0, so None uses it only if no hooks are open, and True refuses open hooks.
    hooks_see_chunks: use the cache anyway, for hooks that do the same at every position.
    Raises UserError for an empty prompt, if the text does not fit into the context, for stop_ids
    that are not ids, for a model whose logits are not those of its tokens, and if they are not
    finite.
    """
    model.check_predicts_tokens("only a model of text can generate")
    if not isinstance(cfg, SamplingConfig):
        raise UserError(f"cfg is a {type(cfg).__name__}; pass a SamplingConfig")
    if n_ids is not None:
        n_ids = check_count("n_ids", n_ids, most=model.cfg.d_vocab)
    tokens, known = pad_left(prompts, model.W_E.device)  # each [batch, pos]
    check_tokens(tokens, model.cfg.d_vocab)
    points = model.hook_points().values()
    n_ctx = model.cfg.n_ctx
    n_new = n_new_tokens(cfg, tokens.shape[1], n_ctx)
    room = min(tokens.shape[1] + n_new, n_ctx)
    generator = seeded_generator(cfg.seed)
    stops = torch.tensor([], dtype=tokens.dtype, device=tokens.device)
    stop_ids = as_list("stop_ids", stop_ids, "a list of ids; [] for none")
    if stop_ids:
        stops = as_integers(stop_ids, "stop_ids").to(tokens)
        check_tokens(stops[None], model.cfg.d_vocab)

    done = torch.zeros_like(known[:, :1])  # [batch, 1]: whether a row has produced a stop id
    past = None
    for _ in range(n_new):
        # What the model has to read: the last token, or the whole window. Once the text is longer
        # than the context, all positions shift at each step, and so all keys and values change.
        window = tokens[:, -n_ctx:]
        window_known = known[:, -n_ctx:]
        by_position = not hooks_see_chunks and any(point.listeners for point in points)
        if by_position and cached:
            raise UserError("hooks are open, and with cached=True they would see each new position "
                            "as position 0; pass cached=False, or None")
        rereads = cached is False or by_position
        if past is None or rereads or tokens.shape[1] > n_ctx:
            past = empty_past(model, window_known, room)
            unread = window
        else:
            unread = window[:, -1:]

        # The logits of the last position; a row's positions count from its first real token.
        positions = (window_known.cumsum(1) - 1).clamp(min=0)[:, -unread.shape[1] :]
        resid = model.run_blocks(model.embed(unread, positions), past=past)
        logits = model.unembed(resid[:, -1:])[:, 0]  # [batch, d_vocab]
        check_choosable(logits[:, :n_ids])
        if rereads:
            past = None  # what hooks changed must not stay in the keys and values
        logits = penalise_repetition(logits, tokens, known, cfg.repetition_penalty)
        logits = logits[:, :n_ids]

        # The next token
        new = torch.where(done, tokens[:, -1:], choose_token(logits, cfg, generator))
        done = done | torch.isin(new, stops)
        tokens = torch.cat([tokens, new], 1)
        known = torch.cat([known, torch.ones_like(done)], 1)
        yield new
        if done.all():
            return


def empty_past(model, known, room):
    """An empty key-value cache for each layer, with room for `room` positions.

    known: [batch, pos], False at padding, which no position may look at.
    """
    mask = None
    if not known.all():
        new_tokens = known.new_ones(len(known), room - known.shape[1])
        mask = torch.cat([known, new_tokens], 1)
    return [GrowingPast(room, mask) for _ in model.blocks]


def check_choosable(logits):
    """Raises UserError if logits are NaN or infinite: no token can be chosen."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are NaN or infinite; load weights whose training did "
                        "not diverge, or a precision that holds them")


def choose_token(logits, cfg, generator):
    """The next token of each row, [batch, 1]: sampled or most likely. logits: [batch, d_vocab]."""
    if cfg.greedy:
        return logits.argmax(-1, keepdim=True)
    probs = token_probs(logits, cfg.temperature, cfg.top_k, cfg.top_p)
    return torch.multinomial(probs.cpu(), 1, generator=generator).to(logits.device)


def steering_vector(model, tokenizer, towards, away, *, at):
    """A steering vector: the stream at one text's last token minus that at another's, [d_model].

    towards, away: the two texts, each at least two tokens long, because GPT-2's stream at the first
    position is unlike all others. at: the hook to read, of shape [batch, pos, d_model]. Raises
    UserError for another hook.
    """

    def resid_at_end(text):
        tokens = torch.tensor([tokenizer.encode_document(text)], device=model.W_E.device)
        _, cache = model.run_with_cache(tokens, at, pos_slice=-1)
        if cache.axes[at] != "batch pos d_model":
            raise UserError(f"{at} holds [{cache.axes[at].replace(' ', ', ')}], not the stream; "
                            "steer at a hook_resid_pre, _mid or _post")
        return cache[at][0, 0]

    with torch.no_grad():
        return resid_at_end(towards) - resid_at_end(away)


def steering_hooks(model, tokenizer, cfg):
    """The hooks that add a GenerateConfig's steering vector at every position; [] without one.

    Raises UserError if the config has only a part of what steering needs.
    """
    if (cfg.steer is None) != (cfg.steer_away is None):
        raise UserError("steer and steer_away go together: a direction is the difference between "
                        "two texts; give both")
    if cfg.steer is None:
        default = GenerateConfig()
        if (cfg.steer_at, cfg.steer_scale) != (default.steer_at, default.steer_scale):
            raise UserError("steer_at and steer_scale do nothing without steer; give --steer and "
                            "--steer_away, or leave them out")
        return []

    if not model.cfg.n_layers and cfg.steer_at is None:
        raise UserError("this model has no blocks to steer at; name a hook with --steer_at")
    at = cfg.steer_at or f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    push = cfg.steer_scale * steering_vector(model, tokenizer, cfg.steer, cfg.steer_away, at=at)
    return [(at, lambda resid, hook: resid + push)]


def stop_tokens(tokenizer, text):
    """The ids of a stop text, one or several; [] if there is none."""
    if text is None:
        return []
    return tokenizer.encode_document(text)


def generate_text(model, tokenizer, cfg):
    """Yields the continuation of cfg.prompt piece by piece, as a GenerateConfig asks.

    A character that takes several tokens is yielded once it is complete. A word is yielded with the
    space that its tokenizer puts between it and the previous word. The text ends before cfg.stop,
    whatever tokens spell it; a piece that may be its beginning is held back until that is clear.
    `<|endoftext|>` in the prompt, or as the stop, is one token, if the tokenizer has it.
    """
    prompt = tokenizer.encode_document(cfg.prompt)
    stop_ids = stop_tokens(tokenizer, cfg.stop)  # raises if the tokenizer cannot write the text
    if len(stop_ids) != 1 or cfg.stop != ENDOFTEXT:
        stop_ids = []  # a text that other tokens can spell as well
    hooks = steering_hooks(model, tokenizer, cfg)
    others_listen = bool(model.open_hooks())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    last = prompt[-1:]  # the last token, as a list; empty if there is none
    held_back = ""
    steps = generate(model, [prompt], cfg, stop_ids=stop_ids, n_ids=tokenizer.d_vocab,
                     hooks_see_chunks=bool(hooks) and not others_listen)
    while True:
        with model.hooks(hooks):  # closed while the caller handles a piece
            new = next(steps, None)
        if new is None or new.item() in stop_ids:
            break

        # The text that the new token adds to the bytes of the previous one
        n_bytes_before = len(tokenizer.to_bytes(last))
        added = tokenizer.to_bytes([*last, new.item()])[n_bytes_before:]
        last = [new.item()]
        piece = held_back + decoder.decode(added)

        # The text before the stop text, or before what may become it
        if cfg.stop is not None and not stop_ids:
            before, found, _ = piece.partition(cfg.stop)
            if found:
                yield before
                return
            n_held = length_of_overlap(piece, cfg.stop)
            piece, held_back = piece[: len(piece) - n_held], piece[len(piece) - n_held :]
        yield piece
    rest = held_back + decoder.decode(b"", final=True)
    yield rest if cfg.stop is None else rest.partition(cfg.stop)[0]


def main(argv=None):
    """The program: prints the prompt and its continuation as it is generated."""
    parser = flag_parser(GenerateConfig, "Write text with a trained model.")
    cfg = config_from_dict(GenerateConfig, vars(parser.parse_args(argv)))

    device = pick_device(cfg.device)
    if cfg.model is not None:
        model, tokenizer = load_pretrained(cfg.model, device, cache_dir=cfg.cache_dir)
    else:
        model, tokenizer = load_model(cfg.run_name, cfg.out_dir, device)

    pieces = generate_text(model, tokenizer, cfg)
    first = next(pieces, "")  # errors are raised here, before anything is printed
    sys.stdout.write(cfg.prompt.lstrip("\n") + first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


if __name__ == "__main__":
    run_program(main)
