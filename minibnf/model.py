"""The Transformer by hand: RMSNorm, rotary positions, grouped-query attention, gated MLP.

Shapes: B sequences, S positions per sequence, D width, H query heads, K key/value heads, d head
width, V vocabulary. Module names are the checkpoint's tensor names
(`model.layers.0.self_attn.q_proj.weight`), so loading is a strict state-dict load. Parameters are
kept in their own dtype (float32 masters in training) and cast where they are used, so that
computing in bfloat16 leaves float32 gradients behind.

Who sees whom is decided in attention.py: B sequences by themselves; packed `groups` of a prompt and
its responses; or new tokens after those that a `cache` holds.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minibnf.attention import BLOCK, sights, softcap
from minibnf.files.config import Config, Rope, read_config
from minibnf.files.disk import flush, replacing, write_json
from minibnf.files.safetensors import FLOATS, Stored, headers, tensors_of, write_sharded
from minibnf.kernels import compiling, fused, gated, linear, rotate

TIED = {"model.embed_tokens.weight", "lm_head.weight"}  # one tensor in many a checkpoint


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
    """x / sqrt(mean(x²) + eps) * weight, the statistics in float32 or wider.

    Gemma multiplies by 1 + weight instead, in float32 too.
    """

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
    """cos and sin (..., d) of positions (...), for kernels.rotate.

    The pair (i, i + d/2) turns by position * theta^(-2i/d). The first half of sin is negated.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # written as in transformers, so that float32 rounds alike: SmolLM2's logits are its very bits
    exponent = torch.arange(0, d, 2, device=positions.device, dtype=wide) / d  # (d/2,)
    frequency = 1.0 / rope.theta**exponent
    if rope.llama3 is not None:
        # Llama 3 slows waves longer than context/low by factor, keeps those shorter than
        # context/high, and mixes the two in between
        factor, low, high, context = rope.llama3
        mix = ((context / (2 * math.pi / frequency) - low) / (high - low)).clamp(0, 1)
        frequency = (1 - mix) * frequency / factor + mix * frequency
    angle = positions[..., None].to(wide) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, of which H/K share a key and a value head."""

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c), RMSNorm(c.head_dim, c)

    def heads(self, y):
        """(B, S, n d) -> (B, n, S, d)"""
        return y.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)

    def forward(self, x, rotation, sight, cache, kept):
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if kept is not None:
            kept.append((k, v))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = sight.attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), act SiLU or (Gemma) GELU by tanh."""

    def __init__(self, c: Config):
        super().__init__()
        self.gelu = c.gemma
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x):
        return gated(self.gate_proj(x), self.up_proj(x), *self.down_proj.cast(x.dtype), self.gelu)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream.

    Gemma also norms what is added.
    """

    def __init__(self, c: Config, layer: int):
        super().__init__()
        self.gemma = c.gemma
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c)
        if c.gemma:
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c)
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c)

    @fused
    def forward(self, x, *attention):
        y = self.self_attn(self.input_layernorm(x), *attention)
        if self.gemma:
            x = x + self.post_attention_layernorm(y)
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder of one of config.py's families; `raw` is its config.json, kept for saving.

    With `recompute`, the forward keeps only each layer's input, and the backward pass runs the
    layer again: a third more work, far less memory.
    """

    def __init__(self, config: Config, raw: dict):
        super().__init__()
        self.config, self.raw, self.recompute = config, raw, False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Module()
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.model.embed_tokens.weight = nn.Parameter(embedding)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)

    @property
    def unembed(self) -> Tensor:
        """(V, D): turns hidden states into logits; the embedding itself where they are tied."""
        return getattr(self, "lm_head", self.model.embed_tokens).weight

    def forward(
        self, tokens, positions=None, groups=None, cache=None, *, dtype=None, kept=None, head=None
    ) -> Tensor:
        """tokens (B, S) -> logits (B, S, V), or head(hidden (B, S, D), unembed (V, D)).

        positions (B, S): by default 0..S-1. groups: the tokens are packed so, B = 1. cache: one
        token per row continues what it holds. dtype: what to compute in, by default the
        parameters' own. kept: a list that gets each layer's (keys, values), for Cache.fill. head
        runs inside this forward, so that a sharded unembedding is gathered when it is used.
        """
        c, embedding = self.config, self.model.embed_tokens.weight
        x = F.embedding(tokens, embedding).to(dtype or embedding.dtype)  # (B, S, D)
        if c.gemma:
            x = x * torch.tensor(c.hidden_size**0.5, dtype=x.dtype)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if groups is not None and compiling():
            # To whole blocks, by one more group; at least to two, since a compiler makes a graph of
            # its own for one.
            pad = max(-tokens.shape[1] % BLOCK, 2 * BLOCK - tokens.shape[1])
            x, positions = F.pad(x, (0, 0, 0, pad)), F.pad(positions, (0, pad))
            groups = [*groups, (pad, [])]
        rotations = {None: None}
        for rope in {layer.rope for layer in c.layers if layer.rope}:
            rotations[rope] = rotary(positions[:, None], c.head_dim, rope, x.dtype)  # (B, 1, S, d)
        # Training attends in float32 on a CPU, where the backward pass of bfloat16 takes up to
        # twice as long. The reference, which has no backward pass, does so too and rounds alike.
        wide = torch.promote_types(x.dtype, torch.float32) if kept is None else x.dtype
        sight_of = sights(c, x, groups, cache, wide)
        again = self.recompute and torch.is_grad_enabled()
        for layer, block in zip(c.layers, self.model.layers, strict=True):
            inputs = x, rotations[layer.rope], sight_of[layer.window], cache, kept
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        x = self.model.norm(x[:, : tokens.shape[1]])
        if cache is not None:
            cache.advance()
        return self.logits(x, self.unembed) if head is None else head(x, self.unembed)

    def logits(self, x: Tensor, unembed: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V), with Gemma-2's soft cap."""
        return softcap(linear(x, unembed.to(x.dtype)), self.config.final_softcap)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Transformer":
        """Fresh weights as GPT-2's: normal with deviation 0.02, biases 0, norms neutral.

        The two matrices that write to the stream get 0.02 / sqrt(2 layers).
        """
        generator = torch.Generator().manual_seed(seed)
        narrow = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith(".bias") or self.config.gemma else 1.0)
            else:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                p.normal_(0, narrow if writes else 0.02, generator=generator)
        return self


# ------------------------------------------------------------------------------------ checkpoints


def load(directory, dtype: torch.dtype | None = None, device=None) -> Transformer:
    """A Transformer from a checkpoint directory; dtype by default as stored.

    Raises ValueError for a tensor that is missing, unexpected or not of config.json's shape, and
    FloatingPointError for one with a number that is not finite.
    """
    with torch.device("meta"):
        model = Transformer(*read_config(directory))
    stored = tensors_of(tensors_stored(directory, model))
    state = {name: tensor.to(device=device, dtype=dtype) for name, tensor in stored}
    model.load_state_dict(state, strict=True, assign=True)
    return model


def tensors_stored(directory, model: Transformer) -> dict[str, Stored]:
    """{name: Stored} of exactly the model's parameters, from the headers of the directory's files.

    No weights are read, but for an unembedding that config.json ties and the files hold
    nevertheless. Rotary frequencies, which old files hold, are passed over: config.json decides
    them. Raises as load does.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = headers(Path(directory))
    found = {k: v for k, v in found.items() if not k.endswith(".rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and TIED <= found.keys():
        embedding, head = (tensor for _, tensor in tensors_of({k: found[k] for k in TIED}))
        if not torch.equal(embedding, head):
            raise ValueError(
                f"{directory}: config.json ties the embeddings, but lm_head.weight differs from "
                "embed_tokens"
            )
        del found["lm_head.weight"]
    missing = wanted.keys() - found.keys()
    for name in [*sorted(missing), *sorted(found)]:
        if name in missing:
            problem = f"is missing ({len(missing)} of {len(wanted)} are)"
        elif name not in wanted:
            problem = "is in the files but not in the model that config.json names"
        elif found[name].shape != wanted[name]:
            problem = f"is {found[name].shape}, but config.json says {wanted[name]}"
        elif found[name].dtype not in FLOATS:
            problem = f"is {found[name].dtype}; quantised checkpoints are not supported"
        else:
            continue
        raise ValueError(f"{directory}: tensor '{name}' {problem}")
    return found


def fresh(directory, seed: int) -> Transformer:
    """A Transformer with the directory's config.json and random weights, in float32."""
    return Transformer(*read_config(directory)).init_weights(seed)


def save(model: Transformer, directory, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors (sharded past 5 GB); other files stay.

    dtype: what to store, by default the parameters' own. All files are written elsewhere first and
    moved at the end, so that an interruption while writing leaves what was there.
    """
    directory = Path(directory)
    state = {
        name: p.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, p in model.named_parameters()
    }
    raw = {k: v for k, v in model.raw.items() if k != "torch_dtype"}
    raw["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    saving = directory / ".saving"
    with replacing(saving) as temporary:
        write_sharded(temporary, state)
        write_json(temporary / "config.json", raw)
    new = {file.replace(directory / file.name) for file in saving.iterdir()}
    saving.rmdir()
    flush(directory)
    for stale in set(directory.glob("model*.safetensors*")) - new:
        stale.unlink()
