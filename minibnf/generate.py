"""Batched sampling with a KV cache: no padding; what prompts share is read once.

    python -m minibnf.generate --model DIR --data prompts.jsonl --out answers.jsonl --chat

A row of --data is an object with a "prompt": a text, continued as it stands (--chat: asked as a
user's message), or messages, rendered by the model's chat template, which "system", "tools" and
"chat_template_kwargs" reach too (see rows.py). --out gets one row per completion, in the order of
the input: "line" (of the input, from 1), "sample" (from 0), those fields, "completion" and
"finish": "stop" at the end of a turn or text, "length" at --max-new-tokens. It is written batch by
batch; what was interrupted goes on with --resume.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.attention import Cache
from minibnf.data import encode_prompt
from minibnf.files.config import announce_ignored
from minibnf.files.disk import check_output, locked, read_json, seal, write_json, writing
from minibnf.files.rows import OPTIONS, Notes, Place, each_row, parse_prompt, scan_rows
from minibnf.files.safetensors import fingerprint
from minibnf.files.terminal import ArgumentParser, in_one_line, positive, show
from minibnf.files.tokenizer import load_tokenizer
from minibnf.machine import memory_advice, resolve_device_and_dtype, to_device
from minibnf.model import Transformer, load
from minibnf.sampling import MAX_NEW_TOKENS, Sampling, add_sampling, settings_of

CACHE_BYTES = 2**30  # of keys and values held at once; more rows than fit are sampled in turns
PREFILL_TOKENS = 4096  # prompt tokens read in one forward pass


@torch.no_grad()
def generate(
    model: Transformer, prompts: list[list[int]], *, first_row: int = 0, **settings
) -> list[list[int]]:
    """max_new_tokens new ids for each prompt, or fewer, the last of them one of stop_ids.

    settings: max_new_tokens, temperature, top_p, top_k, seed, stop_ids, vocab_size; see Sampling.
    Row i's randomness depends on seed and first_row + i, not on what it is batched with. Raises
    ValueError for an empty prompt or an impossible setting.
    """
    how = Sampling(**settings)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; there must be a token to start from")
    draws = how.uniforms(range(first_row, first_row + len(prompts)))
    outputs: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while waiting:
        # The longest ones first, with those at least half as long: a row attends over as many
        # places of the cache as the longest one has.
        capacity = len(prompts[waiting[-1]]) + how.max_new_tokens
        rows = sum(2 * (len(prompts[i]) + how.max_new_tokens) >= capacity for i in waiting)
        rows = min(rows, _rows_that_fit(model, capacity))
        waiting, together = waiting[:-rows], waiting[-rows:]
        together.sort(key=lambda i: tuple(prompts[i]))  # equal beginnings side by side
        texts = [tuple(prompts[i]) for i in together]
        for i, token in _generate(model, texts, draws[together], how):
            outputs[together[i]].append(token)
    return outputs


def _rows_that_fit(model: Transformer, capacity: int) -> int:
    c = model.config
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * capacity
    return max(1, CACHE_BYTES // (numbers * model.unembed.element_size()))


@torch.no_grad()
def _generate(model, prompts: list[tuple], draws: Tensor, how: Sampling) -> Iterator:
    """Yields (which of the sorted prompts, its next token); draws (B, most new tokens), one each.

    Each step waits for the device once, to see which texts ended.
    """
    device, room, stop_ids = model.unembed.device, how.max_new_tokens, set(how.stop_ids)
    cache, logits = _prefill(model, prompts, room)
    draws = to_device(draws, device)
    alive = list(range(len(prompts)))  # the prompt that each row of the cache continues
    for step in range(room):
        new = how.choose(logits, draws[:, step])
        going = []
        for row, (i, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            if token < 0:
                raise FloatingPointError(
                    f"the model's logits are not finite at new token {step + 1} of a text: its "
                    "weights are too large; sample from an earlier checkpoint"
                )
            yield i, token
            if token not in stop_ids:
                going.append(row)
        if not going or step + 1 == room:
            return
        if len(going) < len(alive):
            order = cache.keep(going)
            alive = [alive[row] for row in order]
            rows = to_device(torch.tensor(order), device)
            new, draws = new[rows], draws[rows]
        logits = model(new[:, None], cache.length[:, None], cache=cache)[:, 0]


def _prefill(model: Transformer, prompts: list[tuple], room: int) -> tuple[Cache, Tensor]:
    """Read the sorted prompts -> a cache with room for more, and next-token logits (B, V).

    Each distinct prompt is read once, with as many others as PREFILL_TOKENS allow.
    """
    lengths, copies = [len(p) for p in prompts], Counter(prompts)
    cache = Cache(model.config, len(prompts), max(lengths) + room, model.unembed)
    packs: list[list[tuple]] = [[]]
    for prompt in copies:
        if packs[-1] and sum(map(len, packs[-1])) + len(prompt) > PREFILL_TOKENS:
            packs.append([])
        packs[-1].append(prompt)
    logits, row = [], 0
    for pack in packs:
        which = torch.repeat_interleave(torch.tensor([copies[prompt] for prompt in pack]))
        logits.append(_read(model, cache, row, pack, which))
        row += len(which)
    cache.set_lengths(lengths)
    return cache, torch.cat(logits)


def _read(model: Transformer, cache: Cache, row: int, prompts: list[tuple], which) -> Tensor:
    """Read prompts into the cache's rows from `row` on: row + i gets prompts[which[i]].

    Returns the rows' next-token logits. What all the prompts begin with (a chat template's first
    words, say) is read once.
    """
    sizes = [len(p) for p in prompts]
    windows = any(layer.window for layer in model.config.layers)  # then a group is one large mask
    # They are sorted: what the first and the last begin with, all begin with. But each keeps a last
    # token of its own, whose logits are wanted.
    unlike = (k for k in range(min(sizes) - 1) if prompts[0][k] != prompts[-1][k])
    shared = 0 if windows else next(unlike, min(sizes) - 1)
    rests = [n - shared for n in sizes]
    tokens = [*prompts[0][:shared], *chain.from_iterable(p[shared:] for p in prompts)]
    positions = [*range(shared), *chain.from_iterable(range(shared, n) for n in sizes)]
    end = torch.tensor(rests).cumsum(0) + shared  # of each prompt's rest, in the packed tokens
    column = torch.arange(max(sizes))
    own = (end - torch.tensor(sizes))[which, None] + column  # the places of a row's own tokens
    places = torch.where(column < shared, column, own).clamp(max=len(tokens) - 1)
    packed = torch.tensor([tokens, positions])
    packed, last, which, places = (
        to_device(x, model.unembed.device) for x in (packed, end - 1, which, places)
    )
    kept: list = []
    logits = model(
        *packed.split(1),
        groups=[(shared, rests)] if shared else [(n, []) for n in sizes],
        kept=kept,
        head=lambda x, unembed: model.logits(x[0, last], unembed),
    )
    cache.fill(row, places, kept)
    return logits[which]


def stream(model: Transformer, prompt: list[int], *, row: int = 0, **settings) -> Iterator[int]:
    """Yields new ids one by one: what generate() returns for a prompt that is its row `row`."""
    how = Sampling(**settings)
    for _, token in _generate(model, [tuple(prompt)], how.uniforms([row]), how):
        yield token


# ------------------------------------------------------------------------------------ the command


def read_prompts(path, tokenizer, chat: bool, notes: Notes) -> list[tuple[Place, dict, list[int]]]:
    """(place, what was given, token ids) of every row; notes gathers what a person should know.

    What was given: "prompt", and "system", "tools", "chat_template_kwargs" where the row has them.
    ValueError lists the bad rows, each with its place and field.
    """

    def read(row: dict, place: Place) -> tuple[Place, dict, list[int]]:
        record = parse_prompt(row, place, chat)
        notes.add(record, place, tokenizer)
        ids = encode_prompt(tokenizer, record.prompt, place, record.variables)
        return place, {k: row[k] for k in ("prompt", *OPTIONS) if k in row}, ids

    return each_row(scan_rows(path), read)


def room_for(wanted: int | None, prompts: list[tuple], context: int) -> int:
    """How many new tokens are made at most. ValueError where the longest prompt leaves no room."""
    place, _, longest = max(prompts, key=lambda prompt: len(prompt[2]))
    if len(longest) + (wanted or 1) > context:
        raise ValueError(
            f"{place}: the prompt has {len(longest)} tokens; with {wanted or 1} new ones, more "
            f"than the {context} that the model reads: shorten it or lower --max-new-tokens"
        )
    return wanted or min(MAX_NEW_TOKENS, context - len(longest))


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = ArgumentParser("minibnf generate", allow_abbrev=False)
    p.description = "Answer every prompt of a file."
    a = p.add_argument
    # fmt: off
    a("--model", required=True, metavar="DIR", help="the model, in Hugging Face layout")
    a("--data", required=True, metavar="FILE",
      help='rows, each with a "prompt", a text or messages: JSON Lines, a JSON array, '
           "Parquet")
    a("--out", required=True, metavar="FILE", help=".jsonl file to write, one row per completion")
    a("--chat", action="store_true",
      help="ask a text prompt as a user's message instead of continuing it as it stands")
    a("--samples", type=positive, default=1, metavar="N",
      help="completions per prompt; default 1")
    a("--batch-size", type=positive, default=64, metavar="N",
      help="completions made together and then written; default 64")
    add_sampling(a, None)
    group = p.add_argument_group("an --out that already exists")
    a = group.add_mutually_exclusive_group().add_argument
    a("--resume", action="store_true", help="go on where an interrupted run stopped")
    a("--overwrite", action="store_true", help="delete it and start anew")
    # fmt: on
    args = p.parse_args(argv)
    if args.samples > 1 and args.temperature == 0:
        p.error(f"--temperature 0 would write the same answer {args.samples} times")
    return args


def load_on(directory, device: str, dtype: str) -> Transformer:
    """The model in a folder, to be read; device and dtype as resolve_device_and_dtype says."""
    model = load(directory)
    announce_ignored(directory, model.raw)
    parameters = sum(p.numel() for p in model.parameters())
    device, dtype = resolve_device_and_dtype(device, dtype, parameters)
    return model.to(device=device, dtype=dtype)


def dtype_name(model: Transformer) -> str:
    return str(model.unembed.dtype).removeprefix("torch.")


def run(args: argparse.Namespace) -> None:
    Sampling(**settings_of(args) | {"max_new_tokens": 1})  # raises for an impossible setting
    out, settings_file = Path(args.out), Path(f"{args.out}.settings.json")
    for file in (out, settings_file):
        check_output(file, [Path(args.data), Path(args.model)])
    if out.exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{out} exists already; --resume goes on with it, --overwrite starts anew")
    begun = settings_file.exists() or (out.exists() and out.stat().st_size)
    before = read_json(settings_file) if args.resume and out.exists() and begun else None
    tokenizer, model = load_tokenizer(args.model), load_on(args.model, args.device, args.dtype)
    if before:  # a template may have put the date of the first run into the prompts
        tokenizer.now = datetime.fromisoformat(before["now"])
    notes = Notes()
    prompts = read_prompts(args.data, tokenizer, args.chat, notes)
    for note in notes.lines():
        show(note)
    context = model.config.max_position_embeddings
    args.max_new_tokens = room_for(args.max_new_tokens, prompts, context)
    settings = all_settings(args, model, tokenizer, prompts)
    if not before:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")  # first: rows of other settings must not be taken for rows of these
        write_json(settings_file, settings)
        before = settings
    for name, now in settings.items():
        if (was := before.get(name)) != now:
            changed = f"{name} was {was!r} and is {now!r} now"
            raise ValueError(f"{out}: cannot go on, {changed}; --overwrite starts anew")
    done = keep_batches(out, args.batch_size)
    wanted = [(*p, k) for p in prompts for k in range(args.samples)]
    write_completions(args, model, tokenizer, wanted, done)
    said = f" and {done} from before" if done else ""
    show(f"{out}: {len(wanted) - done} completions{said}")


def all_settings(args, model, tokenizer, prompts) -> dict:
    """All that the completions depend on."""
    places = ("model", "data", "out", "resume", "overwrite", "device")
    return {name: value for name, value in vars(args).items() if name not in places} | {
        "model_sha256": fingerprint(model.named_parameters()),
        "dtype": dtype_name(model),
        "prompts_sha256": seal([ids for _, _, ids in prompts]),
        "now": tokenizer.now.isoformat(),
    }


def keep_batches(out: Path, size: int) -> int:
    """How many rows of out are kept: those of whole batches, so that the rest comes as it would."""
    ends = [place + 1 for place, byte in enumerate(out.read_bytes()) if byte == 10]
    done = len(ends) // size * size
    os.truncate(out, ends[done - 1] if done else 0)
    return done


def text_of(tokenizer, new: list[int]) -> str:
    """The text of generated ids without the end of their turn; a stray control token shows."""
    ended = new[-1] in tokenizer.end_ids
    return tokenizer.decode(new[:-1] if ended else new, skip_special=False)


def write_completions(args, model, tokenizer, wanted: list[tuple], done: int) -> None:
    """Append the rows from `done` on of wanted, (place, given, ids, sample), batch by batch."""
    how = settings_of(args)
    how |= {"stop_ids": tokenizer.end_ids, "vocab_size": tokenizer.vocab_size}
    with (
        writing(Path(args.out)),
        open(args.out, "a", encoding="utf-8") as lines,
        tqdm(total=len(wanted), initial=done, unit="row", disable=None) as bar,
    ):
        for at in range(done, len(wanted), args.batch_size):
            batch = wanted[at : at + args.batch_size]
            drawn = generate(model, [ids for _, _, ids, _ in batch], first_row=at, **how)
            for (place, given, _, k), new in zip(batch, drawn, strict=True):
                answer = text_of(tokenizer, new)
                if not isinstance(given["prompt"], str):
                    answer = [{"role": "assistant", "content": answer}]
                finish = "stop" if new[-1] in tokenizer.end_ids else "length"
                row = {"line": place.number, "sample": k, **given}
                row |= {"completion": answer, "finish": finish}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            bar.update(len(batch))


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        out = Path(args.out)
        advice = memory_advice(f"lower --batch-size (now {args.batch_size})")
        with advice, locked(out.with_name(f".{out.name}.lock")):
            run(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what {args.out} holds is whole; --resume goes on") from None


if __name__ == "__main__":
    sys.exit(main())
