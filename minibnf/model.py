"""The Transformer by hand: RMSNorm, rotary positions, grouped-query attention, gated MLP, tied embeddings, KV cache.

Shapes: B sequences, S positions a sequence, D width, H query heads, K key/value heads, d head width, V vocabulary.
Module names are the checkpoint's tensor names (`model.layers.0.self_attn.q_proj.weight`), so loading is a strict
state-dict load. Parameters are kept in their own dtype (float32 masters in training) and cast where they are used, so
that computing in bfloat16 leaves float32 gradients behind.

Who sees whom is decided in attention.py from a forward's `layout`: None for sequences, groups of prompt and responses for
packed tokens, a Cache for new tokens after those it holds.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minibnf.attention import Group, additive, attend, attention_dtype, masks
from minibnf.files.config import Config, Rope, read_config
from minibnf.files.disk import replacing, write_json
from minibnf.files.safetensors import FLOATS, Stored, headers, tensors_of, write_sharded
from minibnf.kernels import gated, linear, rotate


class Linear(nn.Module):
    """y = x W^T + b, W (out, in) and b (out,), where there is one, cast to x's dtype."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def cast(self, dtype):
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x):
        return linear(x, *self.cast(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, the statistics in float32 or wider; Gemma multiplies by 1 + weight, there too."""

    def __init__(self, n: int, c: Config):
        super().__init__()
        self.weight, self.eps, self.gemma = nn.Parameter(torch.ones(n)), c.rms_norm_eps, c.gemma

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.gemma:
            return (normed * (1 + self.weight.to(wide.dtype))).to(x.dtype)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


def rotary(positions: Tensor, d: int, rope: Rope, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (..., d) of positions (...): the angle of the pair (i, i + d/2) is position * theta^(-2i/d). The first
    half of sin has a minus, for rotate()."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # as transformers writes it, so that float32 rounds alike: SmolLM2's logits are then equal bit for bit
    frequency = 1.0 / rope.theta ** (
        torch.arange(0, d, 2, device=positions.device, dtype=wide) / d
    )  # (d/2,)
    if rope.llama3 is not None:
        # Llama 3: waves longer than context/low are slowed by factor, those shorter than context/high kept, the rest mixed
        factor, low, high, context = rope.llama3
        mix = ((context / (2 * math.pi / frequency) - low) / (high - low)).clamp(0, 1)
        frequency = (1 - mix) * frequency / factor + mix * frequency
    angle = positions[..., None].to(wide) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Cache:
    """Keys and values of what was read so far: per layer (B, K, capacity, d), filled to `length` (B,) tokens a row.

    `longest` is length's maximum as a plain number, so that a step need not wait for the device to know it.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: Tensor, longest: int):
        self.keys, self.values, self.length, self.longest = keys, values, length, longest

    def begin(self, S: int):
        """S new tokens a row are about to be appended, layer by layer."""
        count = lambda n: torch.arange(n, device=self.length.device)
        self.places = (
            count(len(self.length))[:, None],
            slice(None),
            self.length[:, None] + count(S),
        )  # (B, 1), all heads, (B, S)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put S new tokens a row, k and v (B, K, S, d), at each row's end; return all keys and values."""
        self.keys[layer][self.places] = k.transpose(1, 2)
        self.values[layer][self.places] = v.transpose(1, 2)
        end = self.longest + k.shape[2]
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, S: int):
        """The S tokens that every layer appended now belong to what was read."""
        self.length, self.longest = self.length + S, self.longest + S

    def keep(self, rows: list[int]) -> list[int]:
        """Go on with these rows alone, in the order returned: the last ones move into the places that became free, for to copy
        them all, each time that one ends, would cost more than their products."""
        n, device = len(rows), self.length.device
        free, moved = sorted(set(range(n)) - set(rows)), sorted(set(rows) - set(range(n)))
        order = list(range(n))
        for place, row in zip(free, moved, strict=True):
            order[place] = row
        to, of = (torch.tensor(x, dtype=torch.int64, device=device) for x in (free, moved))
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                if free:
                    store[to] = store[of]
                stores[layer] = store[:n]
        self.length = self.length[torch.tensor(order, dtype=torch.int64, device=device)]
        self.longest = int(self.length.max())
        return order


class Attention(nn.Module):
    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)

    def forward(self, x, turn, mask, cache, keep, number=None):
        heads = lambda y: y.unflatten(-1, (-1, self.c.head_dim)).transpose(
            1, 2
        )  # (B, S, n d) -> (B, n, S, d)
        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if keep is not None:
            keep.append((k, v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attend(*(z.to(number or x.dtype) for z in (q, k, v)), mask, self.c).to(x.dtype)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), act SiLU or (Gemma) GELU by tanh."""

    def __init__(self, c: Config):
        super().__init__()
        self.gelu = c.gelu
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        return gated(self.gate_proj(x), self.up_proj(x), *self.down_proj.cast(x.dtype), self.gelu)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream; Gemma also norms what is added."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.gemma = c.gemma
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(c.hidden_size, c),
            RMSNorm(c.hidden_size, c),
        )
        if c.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c)
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c)

    def forward(self, x, *attention):
        y = self.self_attn(self.input_layernorm(x), *attention)
        if self.gemma:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


def layer_kinds(c: Config) -> set:
    """The distinct (window, rope) of the layers: one mask and one rotation each."""
    return {(layer.window, layer.rope) for layer in c.layers}


class Transformer(nn.Module):
    """A decoder of one of config.py's families. `raw` is the config.json it came from, kept for saving. With `recompute`, a
    backward pass keeps each layer's input alone and runs the layer again for its gradient: a third more work, far less memory.
    """

    def __init__(self, config: Config, raw: dict):
        super().__init__()
        self.config, self.raw, self.recompute = config, raw, False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        self.model.embed_tokens.weight = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size)
        )
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def unembed(self) -> Tensor:
        """(V, D): the matrix that turns hidden states into logits; the embedding itself where they are tied."""
        return (
            self.model.embed_tokens.weight
            if self.config.tie_word_embeddings
            else self.lm_head.weight
        )

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
        if c.gemma:
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype)
        turns = {
            rope: rotary(positions[:, None], c.head_dim, rope, x.dtype)
            for _, rope in layer_kinds(c)
            if rope
        }  # (B,1,S,d)
        seen = {window: masks(layout, x.shape[1], window, x.device) for window, _ in layer_kinds(c)}
        cache = layout if isinstance(layout, Cache) else None
        if cache is not None:
            cache.begin(x.shape[1])
        number = attention_dtype(x, training=isinstance(layout, list) and keep is None)
        if c.attention_softcap is None:
            seen = {window: additive(mask, number) for window, mask in seen.items()}
        for layer, block in zip(c.layers, self.model.layers, strict=True):
            inputs = x, turns.get(layer.rope), seen[layer.window], cache, keep, number
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        x = self.model.norm(x)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.logits(x, self.unembed) if head is None else head(x, self.unembed)

    def logits(self, x: Tensor, unembed: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V), with Gemma-2's soft cap."""
        z, cap = linear(x, unembed.to(x.dtype)), self.config.final_softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Transformer":
        """Fresh weights: normal with deviation 0.02, the residual outputs' smaller by sqrt(2 layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:  # biases 0, norms neutral
                p.fill_(0.0 if name.endswith(".bias") or self.config.gemma else 1.0)
                continue
            shrink = (
                math.sqrt(2 * self.config.num_hidden_layers)
                if name.endswith(("o_proj.weight", "down_proj.weight"))
                else 1
            )
            p.copy_(torch.empty(p.shape).normal_(0, 0.02 / shrink, generator=generator))
        return self


# ---------------------------------------------------------------------- checkpoints


def load(
    directory: str | os.PathLike, dtype: torch.dtype | None = None, device=None
) -> Transformer:
    """A Transformer from a checkpoint directory; dtype by default as stored.

    Raises ValueError for a tensor that is missing, unexpected or of another shape than config.json says.
    """
    config, raw = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config, raw)
    state = {
        name: tensor.to(device=device, dtype=dtype)
        for name, tensor in tensors_of(tensors_stored(directory, model))
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model


def tensors_stored(directory: str | os.PathLike, model: Transformer) -> dict[str, Stored]:
    """{name: Stored} of exactly the model's parameters, from the headers of the directory's files.

    No weights are read, but for an unembedding that config.json ties and the files hold
    nevertheless. Rotary frequencies, which old files hold, are passed over: config.json decides
    them. Raises as load does.
    """
    wanted, found = {name: tuple(p.shape) for name, p in model.named_parameters()}, {}
    for name, header in headers(Path(directory)).items():
        if not name.endswith(".rotary_emb.inv_freq"):
            found[name] = header
    if model.config.tie_word_embeddings and (twin := found.pop("lm_head.weight", None)) is not None:
        pair = {"lm_head.weight": twin} | {
            k: v for k, v in found.items() if k == "model.embed_tokens.weight"
        }
        if len(values := list(tensors_of(pair))) < 2 or not torch.equal(values[0][1], values[1][1]):
            raise ValueError(
                f"{directory}: config.json ties the embeddings, but lm_head.weight differs from embed_tokens"
            )
    if missing := sorted(set(wanted) - set(found)):
        raise ValueError(
            f"{directory}: tensor '{missing[0]}' is missing ({len(missing)} of {len(wanted)} are)"
        )
    if unexpected := sorted(set(found) - set(wanted)):
        raise ValueError(
            f"{directory}: tensor '{unexpected[0]}' is in the files but not in the model that config.json names"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name]:
            raise ValueError(
                f"{directory}: tensor '{name}' is {tensor.shape}, but config.json says {wanted[name]}"
            )
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{directory}: tensor '{name}' is {tensor.dtype}; quantised checkpoints are not supported"
            )
    return found


def fresh(
    directory: str | os.PathLike, seed: int, dtype: torch.dtype = torch.float32, device=None
) -> Transformer:
    """A Transformer with the directory's config.json and random weights."""
    config, raw = read_config(directory)
    return Transformer(config, raw).init_weights(seed).to(device=device, dtype=dtype)


def save(
    model: Transformer, directory: str | os.PathLike, dtype: torch.dtype | None = None
) -> None:
    """Write config.json and model.safetensors (sharded past 5 GB) into a directory; its other files stay.

    dtype: what to store, by default the parameters' own. All files are written elsewhere first and moved at the end, so
    that an interruption while writing leaves what was there.
    """
    directory = Path(directory)
    state = {
        name: p.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, p in model.named_parameters()
    }
    stored = next(iter(state.values())).dtype
    with replacing(directory / ".saving") as temporary:
        write_sharded(temporary, state)
        raw = {k: v for k, v in model.raw.items() if k != "torch_dtype"} | {
            "dtype": str(stored).removeprefix("torch.")
        }
        write_json(temporary / "config.json", raw)
    new = {
        file.name: file.replace(directory / file.name) for file in (directory / ".saving").iterdir()
    }
    (directory / ".saving").rmdir()
    for stale in set(directory.glob("model*.safetensors*")) - set(new.values()):
        stale.unlink()
