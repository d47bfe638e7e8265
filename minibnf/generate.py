"""Batched sampling with a KV cache: prompts of different lengths without padding, a repeated prompt read only once."""

import torch
from torch import Tensor

from minibnf.model import Cache, Transformer

CACHE_BYTES = 2**30  # of keys and values held at once; more rows than fit are sampled in turns
PREFILL_TOKENS = 4096  # prompt tokens read in one forward pass


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids=(),
) -> list[list[int]]:
    """New token ids for each prompt, at most max_new_tokens, ended early by (and including) one of stop_ids.

    temperature 0 is greedy; top_p keeps the most probable tokens that together reach it. Row i's randomness
    depends on seed, i and max_new_tokens, not on what it is batched with. Raises ValueError for an empty prompt or an
    impossible setting.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ValueError(
            f"temperature={temperature}, top_p={top_p}, max_new_tokens={max_new_tokens}: temperature must be 0 or more, "
            "top_p above 0 and at most 1, max_new_tokens 1 or more"
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; generation needs at least one token to start from")
    device = model.unembed.device
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed)).to(device)
    outputs: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), tuple(prompts[i])))
    while by_length:
        rows = _rows_that_fit(model, len(prompts[by_length[-1]]) + max_new_tokens)
        turn, by_length = by_length[-rows:], by_length[:-rows]
        _generate_turn(model, prompts, turn, draws, outputs, max_new_tokens, temperature, top_p, set(stop_ids))
    return outputs


def _rows_that_fit(model, capacity: int) -> int:
    c = model.config
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * capacity * model.unembed.element_size()
    return max(1, CACHE_BYTES // row)


def _generate_turn(model, prompts, turn, draws, outputs, max_new_tokens, temperature, top_p, stop_ids):
    device = model.unembed.device
    cache, logits = _prefill(model, [prompts[i] for i in turn], max_new_tokens)
    alive = list(turn)  # the prompt that each row of the cache continues
    for step in range(max_new_tokens):
        new = sample(logits, draws[torch.tensor(alive, device=device), step], temperature, top_p)
        going = []
        for row, (i, token) in enumerate(zip(alive, new.tolist(), strict=True)):
            outputs[i].append(token)
            if token not in stop_ids:
                going.append(row)
        if not going or step + 1 == max_new_tokens:
            return
        if len(going) < len(alive):
            rows = torch.tensor(going, device=device)
            cache, new, alive = cache.keep(rows), new[rows], [alive[row] for row in going]
        logits = model(new[:, None], cache.length[:, None], cache)[:, 0]


def _prefill(model: Transformer, prompts: list, room: int) -> tuple[Cache, Tensor]:
    """Read the prompts, each distinct one once, packed without padding -> a cache with room, and next-token logits."""
    c, device, dtype = model.config, model.unembed.device, model.unembed.dtype
    distinct = list(dict.fromkeys(tuple(p) for p in prompts))
    longest = max(map(len, distinct))
    shape = (len(distinct), c.num_key_value_heads, longest + room, c.head_dim)
    keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
    values = [torch.zeros_like(k) for k in keys]
    logits, start = [], 0
    while start < len(distinct):
        end, size = start, 0
        while end < len(distinct) and (end == start or size + len(distinct[end]) <= PREFILL_TOKENS):
            size, end = size + len(distinct[end]), end + 1
        lengths = [len(p) for p in distinct[start:end]]
        tokens = torch.tensor([[t for p in distinct[start:end] for t in p]], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        kept: list = []
        head = lambda x, unembed, last=last: model.logits(x[0, last], unembed)
        logits.append(model(tokens, positions, [(n, []) for n in lengths], keep=kept, head=head))
        for layer, (k, v) in enumerate(kept):
            for row, (k_, v_) in enumerate(zip(k[0].split(lengths, 1), v[0].split(lengths, 1), strict=True), start):
                keys[layer][row, :, : k_.shape[1]] = k_
                values[layer][row, :, : v_.shape[1]] = v_
        start = end
    row_of = {p: row for row, p in enumerate(distinct)}
    rows = torch.tensor([row_of[tuple(p)] for p in prompts], device=device)
    cache = Cache(keys, values, torch.tensor([len(p) for p in distinct], device=device), longest)
    logits = torch.cat(logits)
    return (cache, logits) if len(distinct) == len(prompts) else (cache.keep(rows), logits[rows])


def sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token a row of logits (B, V) by inverting its cumulative distribution at u (B,) in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    cumulative = probabilities.cumsum(-1)
    # the nucleus: tokens before which less than top_p has been gathered; u runs over the mass it holds
    size = (cumulative - probabilities < top_p).sum(-1, keepdim=True)
    mass = cumulative.gather(-1, size - 1)
    place = torch.searchsorted(cumulative, u[:, None] * mass, right=True).minimum(size - 1)
    return order.gather(-1, place)[:, 0]
