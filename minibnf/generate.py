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
import hashlib
import json
import os
import sys
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
from minibnf.files.disk import check_output, read_json, write_json
from minibnf.files.rows import OPTIONS, Notes, Place, each_row, parse_prompt, scan_rows
from minibnf.files.terminal import in_one_line
from minibnf.files.tokenizer import load_tokenizer
from minibnf.machine import memory_advice, resolve_device_and_dtype, to_device
from minibnf.model import Transformer, load
from minibnf.sampling import MAX_NEW_TOKENS, add_sampling, check_settings, sample, uniforms
from minibnf.step import fingerprint

CACHE_BYTES = 2**30  # of keys and values held at once; more rows than fit are sampled in turns
PREFILL_TOKENS = 4096  # prompt tokens read in one forward pass
EMPTY = "is empty; generation needs at least one token to start from"


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids=(),
    first_row: int = 0,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """max_new_tokens new ids for each prompt, or fewer, the last of them one of stop_ids.

    temperature 0 is greedy; top_k keeps the k most probable tokens (0: all), then top_p the most
    probable that together reach this share. vocab_size: choose among the ids below it alone (None:
    all), for a model that has more rows than its tokenizer has ids. Row i's randomness depends on
    seed and first_row + i, not on what it is batched with. Raises ValueError for an empty prompt or
    an impossible setting.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, seed)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} {EMPTY}")

    def choose(logits: Tensor, u: Tensor) -> Tensor:
        return sample(logits[:, :vocab_size], u, temperature, top_p, top_k)

    draws = uniforms(seed, range(first_row, first_row + len(prompts)), max_new_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    while waiting:
        # The longest ones first, with those at least half as long: a row attends over as many
        # places of the cache as the longest one has.
        capacity = len(prompts[waiting[-1]]) + max_new_tokens
        rows = sum(2 * (len(prompts[i]) + max_new_tokens) >= capacity for i in waiting)
        rows = min(rows, _rows_that_fit(model, capacity))
        waiting, together = waiting[:-rows], waiting[-rows:]
        together.sort(key=lambda i: tuple(prompts[i]))  # equal beginnings side by side
        texts = [tuple(prompts[i]) for i in together]
        drawn = _generate(model, texts, draws[together], choose, set(stop_ids))
        for i, new in zip(together, drawn, strict=True):
            outputs[i] = new
    return outputs


def _rows_that_fit(model: Transformer, capacity: int) -> int:
    c = model.config
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * capacity
    return max(1, CACHE_BYTES // (numbers * model.unembed.element_size()))


def _generate(model, prompts: list[tuple], draws: Tensor, choose, stop_ids: set) -> list[list[int]]:
    """The new tokens of each of the sorted prompts; draws (B, most new tokens), one per token.

    Each step waits for the device once, to see which texts ended.
    """
    device, room = model.unembed.device, draws.shape[1]
    cache, logits = _prefill(model, prompts, room)
    draws, outputs = to_device(draws, device), [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the prompt that each row of the cache continues
    for step in range(room):
        new = choose(logits, draws[:, step])
        going = []
        for row, (i, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            outputs[i].append(token)
            if token not in stop_ids:
                going.append(row)
        if not going or step + 1 == room:
            break
        if len(going) < len(alive):
            order = cache.keep(going)
            alive = [alive[row] for row in order]
            rows = to_device(torch.tensor(order), device)
            new, draws = new[rows], draws[rows]
        logits = model(new[:, None], cache.length[:, None], cache=cache)[:, 0]
    return outputs


def _prefill(model: Transformer, prompts: list[tuple], room: int) -> tuple[Cache, Tensor]:
    """Read the sorted prompts -> a cache with room for more, and next-token logits (B, V)."""
    lengths = [len(p) for p in prompts]
    cache = Cache(model.config, len(prompts), max(lengths) + room, model.unembed)
    logits = [_read(model, cache, row, pack) for row, pack in _packs(prompts)]
    cache.set_lengths(lengths)
    return cache, torch.cat(logits)


def _packs(prompts: list[tuple]) -> Iterator[tuple[int, list[tuple]]]:
    """(index of its first prompt, prompts): as many as PREFILL_TOKENS allow, or one.

    A prompt that follows its equal costs nothing.
    """
    start, size = 0, 0
    for i, prompt in enumerate(prompts):
        cost = 0 if i > start and prompt == prompts[i - 1] else len(prompt)
        if cost and i > start and size + cost > PREFILL_TOKENS:
            yield start, prompts[start:i]
            start, size = i, 0
        size += cost
    yield start, prompts[start:]


def _read(model: Transformer, cache: Cache, row: int, prompts: list[tuple]) -> Tensor:
    """Read sorted prompts into the cache's rows from `row` on -> next-token logits (prompts, V).

    Each distinct prompt is read once, packed with the others, and so is what all of them begin
    with: a chat template's first words, say.
    """
    distinct = list(dict.fromkeys(prompts))
    sizes, number = [len(p) for p in distinct], {p: i for i, p in enumerate(distinct)}
    windows = any(layer.window for layer in model.config.layers)  # then a group is one large mask
    # They are sorted: what the first and the last begin with, all begin with. But each keeps a last
    # token of its own, whose logits are wanted.
    unlike = (k for k in range(min(sizes) - 1) if distinct[0][k] != distinct[-1][k])
    shared = 0 if windows else next(unlike, min(sizes) - 1)
    rests = [n - shared for n in sizes]
    tokens = [*distinct[0][:shared], *chain.from_iterable(p[shared:] for p in distinct)]
    positions = [*range(shared), *chain.from_iterable(range(shared, n) for n in sizes)]
    end = torch.tensor(rests).cumsum(0) + shared  # of each prompt's rest, in the packed tokens
    which = torch.tensor([number[p] for p in prompts])
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


class Reader:
    """One growing text read through a cache: `logits` reads only what is new in it. For chat."""

    def __init__(self, model: Transformer):
        self.model, self.ids = model, []
        self.cache = Cache(model.config, 1, 0, model.unembed)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(1, V): of the token after ids, which may also go back on what was read before."""
        if not ids:
            raise ValueError(f"the prompt {EMPTY}")
        model, device = self.model, self.model.unembed.device
        limit = min(len(self.ids), len(ids) - 1)
        n = next((k for k in range(limit) if self.ids[k] != ids[k]), limit)  # to keep
        if self.cache.capacity < len(ids):
            longer = Cache(model.config, 1, 2 * len(ids), model.unembed)
            read = zip(self.cache.keys, self.cache.values, strict=True)
            longer.fill(0, torch.arange(n, device=device)[None], read)
            self.cache = longer
        self.cache.set_lengths([n])
        self.ids = ids[:n]  # what holds if this is interrupted
        logits = model(
            torch.tensor([ids[n:]], device=device),
            torch.arange(n, len(ids), device=device)[None],
            cache=self.cache,
            head=lambda x, unembed: model.logits(x[:, -1], unembed),
        )
        self.ids = list(ids)
        return logits


def stream(
    reader: Reader, prompt: list[int], *, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0,
    seed=0, row=0, stop_ids=(), vocab_size=None,
):  # fmt: skip
    """Yields new ids one by one: what generate() returns for a prompt that is its row `row`."""
    check_settings(max_new_tokens, temperature, top_p, top_k, seed)
    ids = list(prompt)
    for u in uniforms(seed, [row], max_new_tokens)[0]:
        logits = reader.logits(ids)[:, :vocab_size]
        token = int(sample(logits, u[None].to(logits.device), temperature, top_p, top_k))
        yield token
        if token in stop_ids:
            return
        ids.append(token)


# ------------------------------------------------------------------------------------ the command


def read_prompts(
    path, tokenizer, chat: bool, context: int, max_new_tokens: int, notes: Notes
) -> list[tuple[int, dict, list[int]]]:
    """(line, what was given, token ids) of every row; notes gathers what a person should know.

    What was given: "prompt", and "system", "tools", "chat_template_kwargs" where the row has them.
    ValueError lists the bad rows, each with its place and field.
    """

    def read(row: dict, place: Place) -> tuple[int, dict, list[int]]:
        record = parse_prompt(row, place, chat)
        notes.add(record, place, tokenizer)
        ids = encode_prompt(tokenizer, record.prompt, place, record.variables)
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"{place}: the prompt has {len(ids)} tokens; with {max_new_tokens} new ones, more "
                f"than the {context} that the model reads: shorten it or lower --max-new-tokens"
            )
        return place.number, {k: row[k] for k in ("prompt", *OPTIONS) if k in row}, ids

    return each_row(scan_rows(path), read)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "minibnf generate", description="Completions of the prompts in a file.", allow_abbrev=False
    )
    a = p.add_argument
    a("--model", required=True, metavar="DIR", help="checkpoint in Hugging Face layout")
    a("--data", required=True, metavar="FILE",
      help='rows, each with a "prompt", a text or messages: JSON Lines, a JSON array, '
           "Parquet")  # fmt: skip
    a("--out", required=True, metavar="FILE", help=".jsonl to write, one row a completion")
    a("--chat", action="store_true",
      help="a prompt that is a text is asked as a user's message, not continued as it "
           "stands")  # fmt: skip
    a("--samples", type=int, default=1, metavar="N", help="completions of each prompt; default 1")
    a("--batch-size", type=int, default=64, metavar="N",
      help="completions made together and then written; default 64")  # fmt: skip
    add_sampling(a, None)
    a = p.add_argument_group("an --out that exists").add_argument
    a("--resume", action="store_true", help="go on where an interrupted run stopped")
    a("--overwrite", action="store_true", help="start anew")
    args = p.parse_args(argv)
    if args.samples < 1 or args.batch_size < 1:
        p.error("--samples and --batch-size must be 1 or more")
    if args.samples > 1 and args.temperature == 0:
        p.error(f"--temperature 0 would write the same answer {args.samples} times")
    if args.resume and args.overwrite:
        p.error("--resume and --overwrite exclude each other")
    return args


def load_for_sampling(directory, device: str, dtype: str):
    """-> (model, tokenizer); device and dtype as resolve_device_and_dtype says."""
    tokenizer, model = load_tokenizer(directory), load(directory)
    announce_ignored(directory, model.raw)
    device, dtype = resolve_device_and_dtype(
        device, dtype, sum(p.numel() for p in model.parameters())
    )
    return model.to(device=device, dtype=dtype), tokenizer


def run(args: argparse.Namespace) -> None:
    least = 1 if args.max_new_tokens is None else args.max_new_tokens
    check_settings(least, args.temperature, args.top_p, args.top_k, args.seed)
    out, settings_file = Path(args.out), Path(f"{args.out}.settings.json")
    inputs = [Path(args.data), Path(args.model)]
    check_output(out, inputs)
    check_output(settings_file, inputs)
    if out.exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{out} exists already; --resume goes on with it, --overwrite starts anew")
    model, tokenizer = load_for_sampling(args.model, args.device, args.dtype)
    resumed = args.resume and out.exists()
    before = read_json(settings_file) if resumed else {}
    if "now" in before:  # a template may have put the date of the first run into the prompts
        tokenizer.now = datetime.fromisoformat(before["now"])
    context = model.config.max_position_embeddings
    notes = Notes()
    prompts = read_prompts(args.data, tokenizer, args.chat, context, least, notes)
    if args.max_new_tokens is None:
        longest = max(len(ids) for _, _, ids in prompts)
        args.max_new_tokens = min(MAX_NEW_TOKENS, context - longest)
    for note in notes.lines():
        print(note)
    settings = settings_of(args, model, prompts)
    wanted = [(*p, k) for p in prompts for k in range(args.samples)]
    if resumed:
        done = rows_to_keep(out, before, settings, len(wanted))
    else:
        done = 0
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")  # first: rows of other settings must not be taken for rows of these
        write_json(settings_file, settings | {"now": tokenizer.now.isoformat()})
    write_completions(args, model, tokenizer, wanted, done)
    said = f" and {done} from before" if done else ""
    print(f"{out}: {max(len(wanted) - done, 0)} completions{said}")


SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")


def settings_of(args, model, prompts) -> dict:
    """All that the completions depend on."""
    names = (*SAMPLING, "chat", "samples", "batch_size")
    ids = json.dumps([ids for _, _, ids in prompts])
    return {name: getattr(args, name) for name in names} | {
        "model_sha256": fingerprint(model),
        "dtype": str(model.unembed.dtype).removeprefix("torch."),
        "prompts_sha256": hashlib.sha256(ids.encode()).hexdigest(),
    }


def rows_to_keep(out: Path, before: dict, settings: dict, wanted: int) -> int:
    """How many rows of an interrupted out hold; what follows them is cut off.

    Only whole batches hold, so that the rest comes out as it would have.
    """
    for name, now in settings.items():
        if before.get(name) != now:
            was = before.get(name)
            raise ValueError(f"{out}: cannot go on, {name} was {was!r} and is {now!r} now")
    ends = [place + 1 for place, byte in enumerate(out.read_bytes()) if byte == 10]
    size = settings["batch_size"]
    done = len(ends) // size * size if len(ends) < wanted else len(ends)
    os.truncate(out, ends[done - 1] if done else 0)
    return done


def write_completions(args, model, tokenizer, wanted: list[tuple], done: int) -> None:
    """Append the rows from `done` on of wanted, (line, given, ids, sample), batch by batch."""
    how = {name: getattr(args, name) for name in SAMPLING}
    how |= {"stop_ids": tokenizer.end_ids, "vocab_size": tokenizer.vocab_size}
    with (
        open(args.out, "a", encoding="utf-8") as lines,
        tqdm(total=len(wanted), initial=done, unit="row", disable=None) as bar,
    ):
        for at in range(done, len(wanted), args.batch_size):
            batch = wanted[at : at + args.batch_size]
            drawn = generate(model, [ids for _, _, ids, _ in batch], first_row=at, **how)
            for (line, given, _, k), new in zip(batch, drawn, strict=True):
                ended = new[-1] in tokenizer.end_ids
                # a stray control token shows
                text = tokenizer.decode(new[:-1] if ended else new, skip_special=False)
                said = [{"role": "assistant", "content": text}]
                answer = text if isinstance(given["prompt"], str) else said
                finish = "stop" if ended else "length"
                row = {"line": line, "sample": k, **given, "completion": answer, "finish": finish}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            bar.update(len(batch))


@in_one_line
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        with memory_advice(f"lower --batch-size (now {args.batch_size})"):
            run(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what {args.out} holds is whole; --resume goes on") from None


if __name__ == "__main__":
    sys.exit(main())
