"""The Transformer by hand: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embeddings, KV cache.

Shapes: B sequences, S positions a sequence, D width, H query heads, K key/value heads, d head width, V vocabulary.
Module names are the checkpoint's tensor names (`model.layers.0.self_attn.q_proj.weight`), so loading is a strict
state-dict load. Parameters are kept in their own dtype (float32 masters in training) and cast where they are used, so
that computing in bfloat16 leaves float32 gradients behind.

Three ways of attending, told apart by `layout`:
    None            causal over each of the B sequences
    list of groups  B = 1: packed groups (prompt length, [response lengths]); a token sees its group's prompt and its own
                    response up to itself, nothing else
    Cache           one new token a sequence, after what the cache holds
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Group = tuple[int, list[int]]  # (prompt length, response lengths)


@dataclass(frozen=True)
class Config:
    """The fields of config.json that decide what is computed, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


class Linear(nn.Module):
    """y = x W^T, W (out, in) cast to x's dtype."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, the statistics in float32 or wider."""

    def __init__(self, n: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions: Tensor, d: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., d) of positions (...): the angle of the pair (i, i + d/2) is position * theta^(-2i/d)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # as transformers writes it, so that float32 rounds alike: SmolLM2's logits are then equal bit for bit
    frequency = 1.0 / theta ** (torch.arange(0, d, 2, device=positions.device, dtype=wide) / d)  # (d/2,)
    angle = positions[..., None].to(wide) * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) of x (B, heads, S, d) by its position's angle; cos, sin (B, 1, S, d)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Cache:
    """Keys and values of what was read so far: per layer (B, K, capacity, d), filled to `length` (B,) tokens a row.

    `longest` is length's maximum as a plain number, so that knowing it does not wait for the device.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: Tensor, longest: int):
        self.keys, self.values, self.length, self.longest = keys, values, length, longest

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put one new token a row, k and v (B, K, 1, d), at each row's end; return all keys, values and (B,1,1,S) mask."""
        rows, S = torch.arange(len(k), device=k.device), self.longest + 1
        self.keys[layer][rows, :, self.length] = k[:, :, 0]
        self.values[layer][rows, :, self.length] = v[:, :, 0]
        seen = torch.arange(S, device=k.device) <= self.length[:, None]
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S], seen[:, None, None]

    def advance(self):
        """The tokens that every layer appended now belong to what was read."""
        self.length, self.longest = self.length + 1, self.longest + 1

    def keep(self, rows: Tensor) -> "Cache":
        """The cache of these rows only (indices)."""
        return Cache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.length[rows], self.longest)


def attend(q: Tensor, k: Tensor, v: Tensor, layout, layer: int) -> Tensor:
    """q (B, H, S, d), k and v (B, K, S, d) -> (B, H, S, d)."""
    gqa = q.shape[1] != k.shape[1]
    if layout is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if isinstance(layout, Cache):
        k, v, mask = layout.append(layer, k, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    sizes = [size for size, _ in layout]
    parts = []
    for (_, mask), q_, k_, v_ in zip(layout, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2), strict=True):
        parts.append(F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa))
    return torch.cat(parts, 2)


def _size_and_mask(group: Group, device) -> tuple[int, Tensor | None]:
    """S and (S, S) bool, True where row i may look at column j: j not after i, and j in the prompt or in i's own response.

    None where that is plain causality. Made once a forward, for all layers.
    """
    prompt, responses = group
    size = prompt + sum(responses)
    if len(responses) < 2:
        return size, None
    part = torch.repeat_interleave(torch.tensor([prompt, *responses]))  # 0 for the prompt, then 1, 2, ...
    return size, ((part[:, None] == part) | (part == 0)).tril().to(device)


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.d, self.layer = c.head_dim, layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x, cos, sin, layout, keep):
        heads = lambda y: y.unflatten(-1, (-1, self.d)).transpose(1, 2)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if keep is not None:
            keep.append((k, v))
        return self.o_proj(attend(q, k, v, layout, self.layer).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, layout, keep):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout, keep)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder of the Llama family. `raw` is the config.json it came from, kept for saving."""

    def __init__(self, config: Config, raw: dict):
        super().__init__()
        self.config, self.raw = config, raw
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.embed_tokens.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def unembed(self) -> Tensor:
        """(V, D): the matrix that turns hidden states into logits; the embedding itself where they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        layout: "list[Group] | Cache | None" = None,
        *,
        dtype: torch.dtype | None = None,
        keep: list | None = None,
        head: Callable | None = None,
    ):
        """tokens (B, S) -> logits (B, S, V), or whatever head(hidden (B, S, D), unembed (V, D)) returns.

        positions (B, S): by default 0..S-1.  layout: who sees whom, see above.  dtype: what to compute in, by default
        the parameters' own.  keep: a list to which each layer's (keys, values) are appended, for a Cache.
        head runs inside this forward, so that a sharded unembedding is gathered when it is used.
        """
        c, embedding = self.config, self.model.embed_tokens.weight
        x = F.embedding(tokens, embedding).to(dtype or embedding.dtype)  # (B, S, D)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        attention = [_size_and_mask(group, tokens.device) for group in layout] if isinstance(layout, list) else layout
        cos, sin = rotary(positions[:, None], c.head_dim, c.rope_theta, x.dtype)  # (B, 1, S, d)
        for block in self.model.layers:
            x = block(x, cos, sin, attention, keep)
        x = self.model.norm(x)
        if isinstance(layout, Cache):
            layout.advance()
        if head is None:
            return F.linear(x, self.unembed.to(x.dtype))
        return head(x, self.unembed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Transformer":
        """Fresh weights: normal with deviation 0.02, the residual outputs' smaller by sqrt(2 layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
                continue
            shrink = math.sqrt(2 * self.config.num_hidden_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            p.copy_(torch.empty(p.shape).normal_(0, 0.02 / shrink, generator=generator))
        return self
