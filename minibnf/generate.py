"""Batched sampling with a KV cache: no padding; equal prompts, and beginnings that are much of them, are read once.

    python -m minibnf.generate --model DIR --data prompts.jsonl --out answers.jsonl --chat --temperature 0

A row of --data is an object with a "prompt": a text, continued as it stands (--chat: asked as a
user's message), or messages, rendered by the model's chat template, which "system", "tools" and
"chat_template_kwargs" reach too (see rows.py). --out gets one row a completion, in the order of the
input: "line" (of the input, from 1), "sample" (from 0), those fields, "completion" and "finish":
"stop" at the end of a turn or text, "length" at --max-new-tokens. It is written batch by batch;
what was interrupted goes on with --resume.
"""

import argparse
import hashlib
import json
import os
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minibnf.data import encode_prompt
from minibnf.files.config import announce_ignored
from minibnf.files.disk import check_output, read_json, write_json
from minibnf.files.rows import OPTIONS, Notes, Place, each_row, parse_prompt, scan_rows
from minibnf.files.tokenizer import load_tokenizer
from minibnf.machine import DTYPES, memory_advice, resolve_device_and_dtype
from minibnf.model import Cache, Transformer, load
from minibnf.step import fingerprint

CACHE_BYTES = 2**30  # of keys and values held at once; more rows than fit are sampled in turns
PREFILL_TOKENS = 4096  # prompt tokens read in one forward pass
GROUP_TOKENS = 192  # prompts that share their beginning are read as one packed group of about this size (measured: 128 to 256)
NUCLEUS = 256  # the most probable tokens, in which top_p is looked for first: sorting a whole vocabulary takes 20 times longer


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
    """New token ids for each prompt, at most max_new_tokens, ended early by (and including) one of stop_ids.

    temperature 0 is greedy; top_k keeps the k most probable tokens (0: all), then top_p the most
    probable that together reach this share. vocab_size: choose among the ids below it alone (None:
    all), for a model that has more rows than its tokenizer has ids. Row i's randomness depends on
    seed and first_row + i, not on what it is batched with. Raises ValueError for an empty prompt or
    an impossible setting.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, seed)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(
                f"prompt {i} is empty; generation needs at least one token to start from"
            )
    draws = torch.stack(
        [uniform(seed, first_row + i, max_new_tokens) for i in range(len(prompts))]
        or [torch.empty(0)]
    )
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    while by_length:  # the longest ones first, with those at least half as long: attention looks over the longest's places
        size = len(prompts[by_length[-1]]) + max_new_tokens
        rows = sum(2 * (len(prompts[i]) + max_new_tokens) >= size for i in by_length)
        rows = min(rows, _rows_that_fit(model, size))
        turn, by_length = by_length[-rows:], by_length[:-rows]
        choose = lambda logits, u: sample(logits[:, :vocab_size], u, temperature, top_p, top_k)
        _generate_turn(
            model,
            prompts,
            turn,
            draws.to(model.unembed.device),
            outputs,
            max_new_tokens,
            choose,
            set(stop_ids),
        )
    return outputs


def check_settings(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int
) -> None:
    for name, value, fits, wanted in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
        ("seed", seed, seed >= 0, "0 or more"),
    ):
        if not fits:
            raise ValueError(f"{name} = {value}: it must be {wanted}")


def uniform(seed: int, row: int, n: int) -> Tensor:
    """(n,) float64 in [0, 1): the draws of one row, the same whatever n is."""
    return torch.from_numpy(np.random.default_rng((seed, row)).random(n))


def _rows_that_fit(model, capacity: int) -> int:
    c = model.config
    row = (
        2
        * c.num_hidden_layers
        * c.num_key_value_heads
        * c.head_dim
        * capacity
        * model.unembed.element_size()
    )
    return max(1, CACHE_BYTES // row)


def _generate_turn(model, prompts, turn, draws, outputs, max_new_tokens, choose, stop_ids):
    device = model.unembed.device
    cache, logits = _prefill(model, [prompts[i] for i in turn], max_new_tokens)
    alive = list(turn)  # the prompt that each row of the cache continues
    for step in range(max_new_tokens):
        new = choose(logits, draws[torch.tensor(alive, device=device), step])
        going = []
        for row, (i, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            outputs[i].append(token)
            if token not in stop_ids:
                going.append(row)
        if not going or step + 1 == max_new_tokens:
            return
        if len(going) < len(alive):
            order = cache.keep(going)
            new, alive = new[torch.tensor(order, device=device)], [alive[row] for row in order]
        logits = model(new[:, None], cache.length[:, None], cache)[:, 0]


def _groups(prompts: list[tuple]) -> list[tuple[int, list[tuple]]]:
    """Sorted distinct prompts -> [(length of the beginning they share, prompts)]: groups whose beginning is read once.

    Neighbours join a group while they share a quarter of their tokens and the rest is no longer than the beginning or
    GROUP_TOKENS: longer groups would spend on attention what they save. The beginning leaves each prompt its last token.
    """
    groups: list[tuple[int, list[tuple]]] = []
    for prompt in prompts:
        if groups:
            shared, members = groups[-1]
            limit = min(shared, len(prompt) - 1)
            joint = next((k for k in range(limit) if members[0][k] != prompt[k]), limit)
            rests = sum(len(p) - joint for p in (*members, prompt))
            if 4 * joint >= len(prompt) and rests <= max(GROUP_TOKENS - joint, joint):
                groups[-1] = joint, [*members, prompt]
                continue
        groups.append((len(prompt) - 1, [prompt]))
    return groups


def _prefill(model: Transformer, prompts: list, room: int) -> tuple[Cache, Tensor]:
    """Read the prompts, each distinct one once, packed without padding -> a cache with room, and next-token logits."""
    c, device, dtype = model.config, model.unembed.device, model.unembed.dtype
    rows_of: dict[tuple, list[int]] = {}
    for row, p in enumerate(prompts):
        rows_of.setdefault(tuple(p), []).append(row)
    lengths = [len(p) for p in prompts]
    shape = (len(prompts), c.num_key_value_heads, max(lengths) + room, c.head_dim)
    keys, values = (
        [torch.zeros(shape, dtype=dtype, device=device) for _ in c.layers] for _ in range(2)
    )
    groups, logits = _groups(sorted(rows_of)), [None] * len(prompts)
    while groups:
        size = sum(len(p) for p in groups[0][1])
        turn = [groups.pop(0)]
        while groups and (size := size + sum(map(len, groups[0][1]))) <= PREFILL_TOKENS:
            turn.append(groups.pop(0))
        tokens, positions, last = [], [], []
        for shared, members in turn:
            tokens += members[0][:shared]
            positions += range(shared)
            for p in members:
                tokens += p[shared:]
                positions += range(shared, len(p))
                last.append(len(tokens) - 1)
        kept: list = []
        head = lambda x, unembed, last=last: model.logits(x[0, last], unembed)
        layout = [(shared, [len(p) - shared for p in members]) for shared, members in turn]
        found = iter(
            model(
                *(torch.tensor([x], device=device) for x in (tokens, positions)),
                layout,
                keep=kept,
                head=head,
            )
        )
        stores = [
            (store, new[0])
            for store, new in zip(
                keys + values, [k for k, _ in kept] + [v for _, v in kept], strict=True
            )
        ]
        at = 0  # in the packed tokens
        for shared, members in turn:
            everyone, beginning = (
                [row for p in members for row in rows_of[p]],
                slice(at, at + shared),
            )
            for store, new in stores:
                store[everyone, :, :shared] = new[:, beginning]
            at += shared
            for p in members:
                rest = slice(at, at + len(p) - shared)
                for store, new in stores:
                    store[rows_of[p], :, shared : len(p)] = new[:, rest]
                at, z = rest.stop, next(found)
                for row in rows_of[p]:
                    logits[row] = z
    return Cache(keys, values, torch.tensor(lengths, device=device), max(lengths)), torch.stack(
        logits
    )


def sample(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    look: int = NUCLEUS,
) -> Tensor:
    """One token a row of logits (B, V) by inverting its cumulative distribution at u (B,) in [0, 1).

    look: among how many tokens the nucleus is looked for before the row's whole vocabulary is sorted.
    """
    if temperature == 0:
        return logits.argmax(-1)
    z, V = logits.float(), logits.shape[-1]
    p = ((z - z.amax(-1, keepdim=True)) / temperature).softmax(
        -1
    )  # so that no temperature makes an infinity of it
    if top_p == 1 and not top_k:
        return _invert(p, u)
    kept, order = _most_probable(p, min(top_k or look, V))
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    share = top_p * cumulative[:, -1:] if top_k else top_p
    # the nucleus: tokens before which less than this share has been gathered
    chosen = order.gather(-1, _invert(kept.masked_fill(cumulative - kept >= share, 0), u)[:, None])[
        :, 0
    ]
    wider = cumulative[:, -1] < top_p
    if (
        not top_k and look < V and wider.any()
    ):  # row by row, so that none depends on what it is batched with
        chosen[wider] = sample(logits[wider], u[wider], temperature, top_p, look=V)
    return chosen


def _most_probable(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of p (B, V) a row, in falling order, and their tokens; the lower token first among equals."""
    order = p.topk(k).indices.sort(-1).values
    kept, place = p.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    return kept, order.gather(-1, place)


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """(B,): where the running sum of p (B, V) first exceeds u times the whole; never where p is 0. In float64, so that
    u < 1 stays below the whole."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, u[:, None].double() * cumulative[:, -1:], right=True)[
        :, 0
    ]


class Reader:
    """One growing text read through a cache: `logits(ids)` reads only what it has not read yet. For chat."""

    def __init__(self, model: Transformer):
        self.model, self.ids, self.cache = model, [], None

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(1, V): of the token after ids, which may also go back on what was read before."""
        if not ids:
            raise ValueError(
                "the prompt is empty; generation needs at least one token to start from"
            )
        model, c = self.model, self.model.config
        device, dtype = model.unembed.device, model.unembed.dtype
        limit = min(len(self.ids), len(ids) - 1)
        n = next((k for k in range(limit) if self.ids[k] != ids[k]), limit)
        if self.cache is None or self.cache.keys[0].shape[2] < len(
            ids
        ):  # twice as long, with what is kept copied over
            shape = (1, c.num_key_value_heads, 2 * len(ids), c.head_dim)
            keys, values = (
                [torch.zeros(shape, dtype=dtype, device=device) for _ in c.layers] for _ in range(2)
            )
            if n:
                for new, old in ((keys, self.cache.keys), (values, self.cache.values)):
                    for new_layer, old_layer in zip(new, old, strict=True):
                        new_layer[:, :, :n] = old_layer[:, :, :n]
            self.cache = Cache(keys, values, torch.tensor([n], device=device), n)
        self.cache.length, self.cache.longest = torch.tensor([n], device=device), n
        tokens = torch.tensor([ids[n:]], device=device)
        positions = torch.arange(n, len(ids), device=device)[None]
        self.ids = ids[:n]  # what holds if this is interrupted
        logits = model(
            tokens, positions, self.cache, head=lambda x, unembed: model.logits(x[:, -1], unembed)
        )
        self.ids = list(ids)
        return logits


def stream(
    reader: Reader, prompt: list[int], *, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0,
    seed=0, row=0, stop_ids=(), vocab_size=None,
):  # fmt: skip
    """Yields new ids one by one, the same that generate() returns for a prompt that is its row `row`."""
    check_settings(max_new_tokens, temperature, top_p, top_k, seed)
    ids = list(prompt)
    for u in uniform(seed, row, max_new_tokens):
        logits = reader.logits(ids)[:, :vocab_size]
        token = int(sample(logits, u[None].to(logits.device), temperature, top_p, top_k))
        yield token
        if token in stop_ids:
            return
        ids.append(token)


# ------------------------------------------------------------------------------------------------------- the command


def read_prompts(
    path, tokenizer, chat: bool, context: int, max_new_tokens: int, notes: Notes
) -> list[tuple[int, dict, list[int]]]:
    """(line, what was given, token ids) of every row; given: "prompt", and "system", "tools",
    "chat_template_kwargs" where the row has them. ValueError lists the bad rows, each with its
    place and field. notes gathers what a person should know of the rows.
    """

    def read(row: dict, place: Place) -> tuple[int, dict, list[int]]:
        record = parse_prompt(row, place, chat)
        notes.add(record, place, tokenizer)
        ids = encode_prompt(tokenizer, record.prompt, place, record.variables)
        if len(ids) + max_new_tokens > context:
            raise ValueError(
                f"{place}: the prompt has {len(ids)} tokens, which with {max_new_tokens} new ones "
                f"is more than the {context} that the model reads; shorten it or lower "
                "--max-new-tokens"
            )
        return place.number, {k: row[k] for k in ("prompt", *OPTIONS) if k in row}, ids

    return each_row(scan_rows(path), read)


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "minibnf generate", description="Completions of the prompts in a file.", allow_abbrev=False
    )
    a = p.add_argument
    a("--model", required=True, metavar="DIR", help="checkpoint in Hugging Face layout")
    a(
        "--data",
        required=True,
        metavar="FILE",
        help='rows, each with a "prompt", a text or messages: JSON Lines, a JSON array, Parquet',
    )
    a("--out", required=True, metavar="FILE", help=".jsonl to write, one row a completion")
    a(
        "--chat",
        action="store_true",
        help="a prompt that is a text is asked as a user's message, not continued as it stands",
    )
    a("--samples", type=int, default=1, metavar="N", help="completions of each prompt; default 1")
    a(
        "--batch-size",
        type=int,
        default=64,
        metavar="N",
        help="completions made together and then written; default 64",
    )
    add_sampling(a, 256)
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


def add_sampling(a, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0) -> None:
    a(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"at most; default {max_new_tokens}",
    )
    a("--temperature", type=float, default=temperature, metavar="T",
      help=f"0: always the most probable token; default {temperature:g}")  # fmt: skip
    a("--top-p", type=float, default=top_p, metavar="P",
      help=f"of the most probable tokens that together reach P (1: all); default {top_p:g}")  # fmt: skip
    a(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="of the K most probable tokens; default 0: all",
    )
    a("--seed", type=int, default=0, help="default 0")
    a("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA when present")
    a("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 where the device has matrix units for it and "
      "the model over 20 M parameters")  # fmt: skip


def load_for_sampling(directory, device: str, dtype: str):
    """-> (model, tokenizer); device and dtype as resolve_device_and_dtype says."""
    tokenizer, model = load_tokenizer(directory), load(directory)
    announce_ignored(directory, model.raw)
    device, dtype = resolve_device_and_dtype(
        device, dtype, sum(p.numel() for p in model.parameters())
    )
    return model.to(device=device, dtype=dtype), tokenizer


def run(args: argparse.Namespace) -> None:
    check_settings(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    out, settings_file = Path(args.out), Path(f"{args.out}.settings.json")
    inputs = [Path(args.data), Path(args.model)]
    check_output(out, inputs)
    check_output(settings_file, inputs)
    if out.exists() and not args.resume and not args.overwrite:
        raise ValueError(f"{out} exists already; --resume goes on with it, --overwrite starts anew")
    model, tokenizer = load_for_sampling(args.model, args.device, args.dtype)
    before = read_json(settings_file) if args.resume and out.exists() else {}
    if "now" in before:  # a template may have put the date of the first run into the prompts
        tokenizer.now = datetime.fromisoformat(before["now"])
    context = model.config.max_position_embeddings
    notes = Notes()
    prompts = read_prompts(args.data, tokenizer, args.chat, context, args.max_new_tokens, notes)
    for note in notes.lines():
        print(note)
    how = {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
    settings = how | {k: getattr(args, k) for k in ("chat", "samples", "batch_size")}
    how |= {"stop_ids": tokenizer.end_ids, "vocab_size": tokenizer.vocab_size}
    settings |= {
        "model_sha256": fingerprint(model),
        "dtype": str(model.unembed.dtype).removeprefix("torch."),
    }
    settings["prompts_sha256"] = hashlib.sha256(
        json.dumps([p for _, _, p in prompts]).encode()
    ).hexdigest()
    done = 0
    if args.resume and out.exists():
        if changed := [k for k in settings if before.get(k) != settings[k]]:
            was, now = before.get(changed[0]), settings[changed[0]]
            raise ValueError(f"{out}: cannot go on, {changed[0]} was {was!r} and is {now!r} now")
        whole = [place + 1 for place, byte in enumerate(out.read_bytes()) if byte == 10]
        done = (
            len(whole) // args.batch_size * args.batch_size
            if len(whole) < len(prompts) * args.samples
            else len(whole)
        )
        os.truncate(
            out, whole[done - 1] if done else 0
        )  # whole batches only, so that the rest comes out as it would have
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("")  # first: rows of other settings must not be taken for rows of these
        write_json(settings_file, settings | {"now": tokenizer.now.isoformat()})
    wanted = [(*p, k) for p in prompts for k in range(args.samples)]
    stops, written = tokenizer.end_ids, 0
    with (
        open(out, "a", encoding="utf-8") as lines,
        tqdm(total=len(wanted), initial=done, unit="row", disable=None) as bar,
    ):
        for at in range(done, len(wanted), args.batch_size):
            batch = wanted[at : at + args.batch_size]
            drawn = generate(model, [ids for _, _, ids, _ in batch], first_row=at, **how)
            for (line, given, _, k), new in zip(batch, drawn, strict=True):
                ended = new[-1] in stops
                text = tokenizer.decode(
                    new[:-1] if ended else new, skip_special=False
                )  # a stray control token shows
                said = [{"role": "assistant", "content": text}]
                answer = text if isinstance(given["prompt"], str) else said
                finish = "stop" if ended else "length"
                row = {"line": line, "sample": k, **given, "completion": answer, "finish": finish}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
            lines.flush()
            written += len(batch)
            bar.update(len(batch))
    print(f"{out}: {written} completions" + (f" and {done} from before" if done else ""))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with memory_advice(f"lower --batch-size (now {args.batch_size})"):
            run(args)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: what {args.out} holds is whole; --resume goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
