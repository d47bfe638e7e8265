"""Who sees whom, and attention by it.

Shapes: B sequences, S positions per sequence, T packed tokens, H query heads, K key/value heads,
d head width.

Each of these classes is made once per forward and window, and attends in all layers of that window:
    Causal  B sequences; a token sees what stands before it in its sequence, and itself
    Packed  groups (prompt length, [response lengths]) one after another in one sequence; a token
            sees its group's prompt and its own response up to itself, nothing else
    Blocks  the same where attention is compiled: one call of flex_attention, which skips blocks of
            tokens that no token sees
    Cached  one new token per sequence, after those whose keys and values a Cache holds
In layers with a window, a token sees only the last `window` positions, its own among them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minibnf.files.config import Config
from minibnf.kernels import compiling
from minibnf.machine import to_device

Group = tuple[int, list[int]]  # (prompt length, response lengths)
# From this many tokens in a group it pays that its prompt and each response attend by themselves:
# most of what one mask would hide is then not computed.
LONG = 256
BLOCK = 128  # tokens: flex_attention's own


class Cache:
    """Keys and values of what was read: for each layer (B, K, capacity, d), and `length` (B,).

    Row b holds length[b] tokens. `lengths` are the same numbers on the host, so that a step need
    not wait for the device to know them.
    """

    def __init__(self, c: Config, rows: int, capacity: int, like: Tensor):
        """An empty cache of like's dtype, on its device."""
        shape = (rows, c.num_key_value_heads, capacity, c.head_dim)
        self.keys = [like.new_zeros(shape) for _ in c.layers]
        self.values = [like.new_zeros(shape) for _ in c.layers]
        self.set_lengths([0] * rows)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def set_lengths(self, lengths: list[int]) -> None:
        """Row b holds the first lengths[b] tokens of what was written, and nothing after them."""
        self.lengths = lengths
        self.length = to_device(torch.tensor(lengths), self.keys[0].device)

    def fill(self, row: int, places: Tensor, packed) -> None:
        """Write into n rows, from `row` on, what stands at places (n, L) of a packed text.

        packed: for each layer (keys, values), both (1, K, T, d).
        """
        n, L = places.shape
        for keys, values, (k, v) in zip(self.keys, self.values, packed, strict=True):
            keys[row : row + n, :, :L] = k[0][:, places].transpose(0, 1)
            values[row : row + n, :, :L] = v[0][:, places].transpose(0, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, K, 1, d) at each row's end; return all keys and values of the layer."""
        end = torch.arange(len(self.length), device=self.length.device), slice(None), self.length
        self.keys[layer][end], self.values[layer][end] = k[:, :, 0], v[:, :, 0]
        used = self.longest + 1
        return self.keys[layer][:, :, :used], self.values[layer][:, :, :used]

    def advance(self) -> None:
        """The token per row that every layer appended now counts as read."""
        self.length, self.lengths = self.length + 1, [n + 1 for n in self.lengths]

    def keep(self, rows: list[int]) -> list[int]:
        """Drop all rows but these; return them in their new order.

        The last rows move into the places of dropped ones. Copying all rows whenever one ends
        would cost more than the matrix products saved.
        """
        n = len(rows)
        free = sorted(set(range(n)) - set(rows))
        beyond = sorted(row for row in rows if row >= n)
        order = list(range(n))
        for place, row in zip(free, beyond, strict=True):
            order[place] = row
        moves = torch.tensor([free, beyond], dtype=torch.int64)
        target, source = to_device(moves, self.length.device)
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                store[target] = store[source]
                stores[layer] = store[:n]
        self.set_lengths([self.lengths[row] for row in order])
        return order


# ------------------------------------------------------------------------------------------ sights


def sights(c: Config, x: Tensor, groups: list[Group] | None, cache: Cache | None, dtype) -> dict:
    """{window: who sees whom} for each window of the layers, in a forward of x (B, S, D).

    dtype: what packed groups attend in, on a CPU.
    """

    def sight(window: int | None):
        if cache is not None:
            return Cached(c, cache, window, x.dtype)
        if groups is None:
            return Causal(c, x.shape[1], window, x.dtype, x.device)
        if compiling():
            return Blocks(c, groups, window, x.device)
        return Packed(c, groups, window, dtype if x.device.type == "cpu" else x.dtype, x.device)

    return {window: sight(window) for window in {layer.window for layer in c.layers}}


class Causal:
    """Attention within each of B sequences of S positions."""

    def __init__(self, c: Config, S: int, window: int | None, dtype: torch.dtype, device):
        self.c, self.mask = c, _group_mask(c, (S, []), window, dtype, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask, self.c)


class Cached:
    """Attention of one new token per sequence over what a cache holds of it, and itself."""

    def __init__(self, c: Config, cache: Cache, window: int | None, dtype: torch.dtype):
        place = torch.arange(cache.longest + 1, device=cache.length.device)
        row = cache.length[:, None, None]  # (B, 1, 1)
        self.c, self.mask = c, additive(_within(row, place, window)[:, None], dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.mask, self.c)


class Packed:
    """Attention within packed groups, piece by piece, computed in `dtype`.

    A piece is (rows, prompt, mask): rows that attend to themselves and to those of the prompt, the
    index of another piece or None. A short group is one piece; of a long one, the prompt and each
    response are.
    """

    def __init__(self, c: Config, groups: list[Group], window: int | None, dtype, device="cpu"):
        self.c, self.dtype, self.pieces = c, dtype, []
        for prompt, responses in groups:
            rows, first = prompt + sum(responses), len(self.pieces)
            if len(responses) < 2 or rows < LONG or (window is not None and rows > window):
                mask = _group_mask(c, (prompt, responses), window, dtype, device)
                self.pieces.append((rows, None, mask))
                continue
            self.pieces.append((prompt, None, _group_mask(c, (prompt, []), window, dtype, device)))
            for n in filter(None, responses):  # a response of one token is predicted and not read
                seen = torch.ones(n, prompt + n, dtype=torch.bool, device=device).tril(prompt)
                self.pieces.append((n, first, additive(seen, dtype)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [n for n, _, _ in self.pieces]
        queries, keys, values = (x.to(self.dtype).split(rows, 2) for x in (q, k, v))
        outs = []
        for i, (_, prompt, mask) in enumerate(self.pieces):
            k_seen, v_seen = keys[i], values[i]
            if prompt is not None:
                k_seen = torch.cat([keys[prompt], k_seen], 2)
                v_seen = torch.cat([values[prompt], v_seen], 2)
            outs.append(attention(queries[i], k_seen, v_seen, mask, self.c))
        return torch.cat(outs, 2).to(q.dtype)


class Blocks:
    """Attention within packed groups by flex_attention, which is to be compiled.

    The lengths of the groups must add up to a multiple of BLOCK.
    """

    def __init__(self, c: Config, groups: list[Group], window: int | None, device):
        self.c, self.mask = c, block_mask(groups, window, device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def capped(score, *_place):
            return softcap(score, self.c.attention_softcap)

        change = None if self.c.attention_softcap is None else capped
        shared = q.shape[1] != k.shape[1]
        return flex_attention(q, k, v, change, self.mask, self.c.query_scale, shared)


def block_mask(groups: list[Group], window: int | None, device) -> BlockMask:
    """Which blocks of BLOCK tokens look at which: at none, at some tokens by _rule, or at all.

    It is made from the lengths. PyTorch's create_block_mask would ask _rule for each pair of
    tokens. A token is looked at by those from itself on to the end of its group (of its response,
    if it stands in one): so the block k is seen by a later block q if the last of its tokens' ends
    lies behind q's start, and seen whole if the first of them lies at or behind q's end.
    """
    _, _, position, end = _places(groups)
    T = len(end)
    ends, positions = end.view(-1, BLOCK), position.view(-1, BLOCK)
    q = torch.arange(0, T, BLOCK)[:, None]  # where each block starts
    seen = (q.T <= q) & (ends.amax(1) > q)
    whole = (q.T < q) & (ends.amin(1) >= q + BLOCK)
    if window is not None:
        seen &= positions.amin(1)[:, None] - positions.amax(1) < window
        whole &= positions.amax(1)[:, None] - positions.amin(1) < window
    chosen = torch.stack([seen & ~whole, whole])  # (2, blocks, blocks)
    indices = chosen.int().argsort(dim=2, descending=True, stable=True).int()
    counts = to_device(chosen.sum(2, dtype=torch.int32), device)[:, None, None]
    indices = to_device(indices, device)[:, None, None]
    named = (x.clone() for x in (counts[0], indices[0], counts[1], indices[1]))  # as in _rule
    return BlockMask.from_kv_blocks(*named, BLOCK, _rule(groups, window, device), (T, T))


# --------------------------------------------------------------------------------- what they share


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, c: Config) -> Tensor:
    """q (B, H, T, d), k and v (B, K, S, d) -> (B, H, T, d).

    mask: 0 where a row may look at a column and -inf elsewhere, broadcast to (B, H, T, S); None
    for plain causality, T = S, where there is no soft cap.
    """
    shared = q.shape[1] != k.shape[1]
    if shared and q.shape[2] == 1 and mask is not None:
        # the queries that share a key head as its rows: in bfloat16 five times faster on a CPU
        rows = q.view(len(q), k.shape[1], -1, q.shape[3])
        return attention(rows, k, v, mask, c).reshape(q.shape)
    if c.attention_softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=c.query_scale, enable_gqa=shared
        )
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = softcap(q @ k.transpose(2, 3) * c.query_scale, c.attention_softcap) + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(q.dtype) @ v


def softcap(z: Tensor, cap: float | None) -> Tensor:
    """cap tanh(z / cap), Gemma-2's bound of scores and of logits; z itself without a cap."""
    return z if cap is None else cap * torch.tanh(z / cap)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen is True and -inf elsewhere: made once, not anew in every layer."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _within(row: Tensor, column: Tensor, window: int | None) -> Tensor:
    """True where the column is not after the row, and among its last `window` ones."""
    seen = column <= row
    return seen if window is None else seen & (column > row - window)


def _group_mask(c: Config, group: Group, window: int | None, dtype, device="cpu") -> Tensor | None:
    """(rows, rows): who sees whom in one group; None for plain causality without a soft cap."""
    prompt, responses = group
    rows = prompt + sum(responses)
    causal = len(responses) < 2 and (window is None or rows <= window)
    if causal and c.attention_softcap is None:
        return None
    place, sees = torch.arange(rows, device=device), _rule([group], window, device)
    return additive(sees(None, None, place[:, None], place), dtype)


def _rule(groups: list[Group], window: int | None, device):
    """sees(batch, head, i, j): may packed token i look at packed token j?"""
    # Each a tensor of its own: of views, a compiler would note what they are views of.
    group, part, position = (x.clone() for x in to_device(_places(groups)[:3], device))

    def sees(_batch, _head, i, j):
        own = (group[i] == group[j]) & ((part[j] == 0) | (part[i] == part[j])) & (i >= j)
        return own if window is None else own & (position[i] - position[j] < window)

    return sees


def _places(groups: list[Group]) -> Tensor:
    """(4, T): of each packed token its group, its part, its position, and where its sight ends.

    Part 0 is the prompt. Its tokens are seen up to the end of the group, a response's up to the end
    of the response.
    """
    parts, T = [], 0
    for g, (prompt, responses) in enumerate(groups):
        group_end = T + prompt + sum(responses)
        for part, n in enumerate([prompt, *responses]):
            start = prompt if part else 0  # its first position
            parts.append((n, g, part, start - T, T + n if part else group_end))
            T += n
    n, group, part, shift, end = torch.tensor(parts).T
    places = torch.stack([group, part, shift, end]).repeat_interleave(n, dim=1)
    places[2] += torch.arange(T)
    return places
