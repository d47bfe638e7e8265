"""Who sees whom, and attention by it.

Shapes: B sequences, S positions a sequence, T packed tokens, H query heads, K key/value heads, d head width.

Three ways of attending, told apart by `layout`:
    None            causal over each of the B sequences
    list of groups  B = 1: packed groups (prompt length, [response lengths]); a token sees its group's prompt and its own
                    response up to itself, nothing else
    Cache           S new tokens a sequence, after what the cache (model.py) holds of it

On a CPU packed groups attend one after another, each with as little masked as may be. On CUDA all of them are one call of
flex_attention, whose block mask skips what no token sees.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from minibnf.files.config import Config
from minibnf.machine import to_device

Group = tuple[int, list[int]]  # (prompt length, response lengths)
LONG = 256  # tokens of a group from which attention by parts pays: most of what a mask would hide is then not computed


class Part(NamedTuple):
    """A packed group. Either all its rows attend at once, by a mask of (rows, rows), or None for plain causality; or, where it
    is long, its prompt does and then each response, to prompt and itself, by a mask of (its rows, prompt + its rows)."""

    sizes: list[int]  # rows in all; or of the prompt and of each response
    masks: list[Tensor | None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | list[Part] | BlockMask | None", c: Config
) -> Tensor:
    """q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d). mask: as masks() makes it."""
    if isinstance(mask, BlockMask):
        return attend_flex(q, k, v, mask, c)
    if isinstance(mask, list):
        outs, sizes = [], [sum(part.sizes) for part in mask]
        for part, *group in zip(
            mask, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True
        ):
            queries, keys, values = (x.split(part.sizes, 2) for x in group)
            for i, (q_, k_, v_, seen) in enumerate(
                zip(queries, keys, values, part.masks, strict=True)
            ):
                if i:  # a response, which sees the prompt too
                    k_, v_ = torch.cat([keys[0], k_], 2), torch.cat([values[0], v_], 2)
                outs.append(attend(q_, k_, v_, seen, c))
        return torch.cat(outs, 2)
    gqa = q.shape[1] != k.shape[1]
    if (
        gqa and q.shape[2] == 1 and mask is not None
    ):  # a head's queries as its rows: in bfloat16 five times faster on a CPU
        return attend(q.view(len(q), k.shape[1], -1, q.shape[3]), k, v, mask, c).reshape(q.shape)
    if c.attention_softcap is None:
        causal = mask is None
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=c.query_scale, enable_gqa=gqa
        )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = c.attention_softcap * torch.tanh(
        q @ k.transpose(2, 3) * c.query_scale / c.attention_softcap
    )
    mask = (
        torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        if mask is None
        else mask
    )
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=wide).to(q.dtype) @ v


def attention_dtype(x: Tensor, training: bool) -> torch.dtype:
    """float32 for what training reads in bfloat16 on a CPU, where the backward pass of bfloat16 takes
    up to twice as long; else x's own. Without gradients too: the reference rounds as the policy does.
    """
    slow = training and x.device.type == "cpu" and x.dtype == torch.bfloat16
    return torch.float32 if slow else x.dtype


def masks(layout, S: int, window: int | None, device) -> "Tensor | list[Part] | BlockMask | None":
    """Who sees whom in layers of this window, made once a forward: True where a row may look at a column, None where that is
    plain causality; (S, S) for sequences, (B, 1, S, all columns) with a Cache; for packed groups parts, or a block mask."""
    if isinstance(layout, list):
        on_cpu = torch.device(device).type == "cpu"
        return (
            [_part(group, window, device) for group in layout]
            if on_cpu
            else block_mask(layout, window, device)
        )
    if layout is None:
        position = torch.arange(S, device=device)
        if window is None or S <= window:
            return None
        return (position <= position[:, None]) & (position > position[:, None] - window)
    position = torch.arange(layout.longest + S, device=device)
    row = (layout.length[:, None] + position[:S])[:, :, None]  # (B, S, 1)
    seen = position <= row if window is None else (position <= row) & (position > row - window)
    return seen[:, None]


def _part(group: Group, window: int | None, device) -> Part:
    prompt, responses = group
    size = prompt + sum(responses)
    if len(responses) < 2 or size < LONG or (window is not None and size > window):
        return Part([size], [_group_mask(prompt, responses, window, device)])
    read = [n for n in responses if n]  # a response of one token is predicted and not read
    causal = [torch.ones(n, prompt + n, dtype=torch.bool, device=device).tril(prompt) for n in read]
    return Part([prompt, *read], [None, *causal])


def _group_mask(prompt: int, responses: list[int], window: int | None, device) -> Tensor | None:
    """(S, S): row i sees column j if j is not after i, in the prompt or in i's own response, and within the window."""
    size = prompt + sum(responses)
    if len(responses) < 2 and (window is None or size <= window):
        return None
    part = torch.repeat_interleave(
        torch.tensor([prompt, *responses])
    )  # 0 for the prompt, then 1, 2, ...
    mask = ((part[:, None] == part) | (part == 0)).tril()
    if window is not None:
        position = torch.cat(
            [torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in responses)]
        )
        mask &= position > position[:, None] - window
    return mask.to(device)


def additive(mask, dtype: torch.dtype):
    """0 where a mask of masks() is True and -inf elsewhere, as scaled_dot_product_attention would make it in every layer."""
    if isinstance(mask, list):
        return [part._replace(masks=[additive(m, dtype) for m in part.masks]) for part in mask]
    return (
        torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        if isinstance(mask, Tensor)
        else mask
    )


def block_mask(layout: list[Group], window: int | None, device) -> BlockMask:
    """Who sees whom among packed groups, for flex_attention: a rule of two places, and the blocks where it holds at all."""
    lengths = [
        (g, part, n)
        for g, (prompt, ns) in enumerate(layout)
        for part, n in enumerate([prompt, *ns])
    ]
    sizes = torch.tensor([n for *_, n in lengths])
    starts = [0 if p == 0 else layout[g][0] for g, p, _ in lengths]
    position = torch.cat(
        [torch.arange(at, at + n) for at, (*_, n) in zip(starts, lengths, strict=True)]
    )
    spread = lambda values: torch.tensor(values).repeat_interleave(sizes)
    places = torch.stack(
        [spread([g for g, *_ in lengths]), spread([p for _, p, _ in lengths]), position]
    )
    group, part, position = to_device(places, device)

    def sees(_b, _h, i, j):
        own = (group[i] == group[j]) & ((part[j] == 0) | (part[i] == part[j])) & (i >= j)
        return own if window is None else own & (position[i] - position[j] < window)

    return create_block_mask(sees, None, None, len(group), len(group), device=device)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, c: Config) -> Tensor:
    """attend's result by flex_attention, compiled where there is a GPU; without one it runs eagerly, forward alone (tests)."""
    cap = c.attention_softcap
    capped = None if cap is None else lambda score, *_: cap * torch.tanh(score / cap)
    return _flex(q.is_cuda)(q, k, v, capped, mask, c.query_scale, q.shape[1] != k.shape[1])


@cache
def _flex(compiled: bool):
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention
