"""One token from logits: greedy, by temperature, of the top k, of the nucleus; the options."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minibnf.files.terminal import positive
from minibnf.machine import add_machine

MAX_NEW_TOKENS = 256  # by default
# top_p looks among this many of the most probable tokens first: on a CPU, sorting a whole
# vocabulary takes 20 times longer
NUCLEUS = 256


def add_sampling(
    a, max_new_tokens: int | None, temperature: float = 1.0, top_p: float = 1.0
) -> None:
    """The options of sampling, and their defaults; a: an ArgumentParser's add_argument."""
    share = "draw from the most probable tokens that together reach probability P (1: all)"
    default = max_new_tokens or f"{MAX_NEW_TOKENS}, less where the longest prompt leaves less room"
    # fmt: off
    a("--max-new-tokens", type=positive, default=max_new_tokens, metavar="N",
      help=f"at most so many new tokens; default {default}")
    a("--temperature", type=float, default=temperature, metavar="T",
      help=f"0: always the most probable token; default {temperature:g}")
    a("--top-p", type=float, default=top_p, metavar="P", help=f"{share}; default {top_p:g}")
    a("--top-k", type=int, default=0, metavar="K",
      help="draw from the K most probable tokens; default 0: all")
    a("--seed", type=int, default=0, help="of the draws; default 0")
    add_machine(a)
    # fmt: on


def settings_of(args) -> dict:
    """What add_sampling's options said of the drawing, as generate() and stream() take it."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    return {name: getattr(args, name) for name in names}


@dataclass
class Sampling:
    """How new tokens are drawn. Raises ValueError for an impossible setting.

    max_new_tokens: at most so many for each prompt, the last of them one of stop_ids if fewer.
    temperature 0 is greedy; top_k keeps the k most probable tokens (0: all), then top_p the most
    probable that together reach this share. vocab_size: choose among the ids below it alone (None:
    all), for a model that has more rows than its tokenizer has ids.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self):
        must_be = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "seed": (self.seed >= 0, "0 or more"),
        }
        for name, (possible, wanted) in must_be.items():
            if not possible:
                raise ValueError(f"{name} = {getattr(self, name)}: it must be {wanted}")

    def uniforms(self, rows) -> Tensor:
        """(rows, max_new_tokens) float64 in [0, 1): a row's draws, the same however many follow."""
        n = self.max_new_tokens
        draws = [np.random.default_rng((self.seed, row)).random(n) for row in rows]
        return torch.from_numpy(np.array(draws).reshape(-1, n))

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """(B,): one token for each row of logits (B, V), by its draw u (B,).

        It is -1 where the logits hold NaN or infinity; nothing waits for the device to say so.
        """
        logits = logits[:, : self.vocab_size]
        broken = ~logits.amax(-1).isfinite()
        sound = logits.masked_fill(broken[:, None], 0)
        chosen = sample(sound, u, self.temperature, self.top_p, self.top_k)
        return chosen.masked_fill(broken, -1)


def sample(
    logits: Tensor,
    u: Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    look: int | None = None,
) -> Tensor:
    """One token for each row of logits (B, V): its cumulative distribution inverted at u (B,).

    u is in [0, 1). look: among how many tokens the nucleus is looked for before the row's whole
    vocabulary is sorted; by default NUCLEUS on a CPU, and all elsewhere, where whether they were
    enough would have to be waited for.
    """
    if temperature == 0:
        return logits.argmax(-1)
    z, V = logits.float(), logits.shape[-1]
    look = look or (NUCLEUS if z.device.type == "cpu" else V)
    z = z - z.amax(-1, keepdim=True)  # first, so that no temperature makes an infinity of it
    p = (z / temperature).softmax(-1)
    if top_p == 1 and not top_k:
        return _invert(p, u)
    likely, tokens = _most_probable(p, min(top_k or look, V))
    cumulative = likely.cumsum(-1, dtype=torch.float64)
    share = top_p * cumulative[:, -1:] if top_k else top_p
    # the nucleus: tokens before which less than this share has been gathered
    nucleus = likely.masked_fill(cumulative - likely >= share, 0)
    chosen = tokens.gather(-1, _invert(nucleus, u)[:, None])[:, 0]
    wider = cumulative[:, -1] < top_p
    if not top_k and look < V and wider.any():
        # row by row, so that none depends on what it is batched with
        chosen[wider] = sample(logits[wider], u[wider], temperature, top_p, look=V)
    return chosen


def _most_probable(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of p (B, V), falling, and their tokens; among equals the lower."""
    order = p.topk(k).indices.sort(-1).values
    largest, place = p.gather(-1, order).sort(stable=True, dim=-1, descending=True)
    return largest, order.gather(-1, place)


def _invert(p: Tensor, u: Tensor) -> Tensor:
    """(B,): where the running sum of p (B, V) first exceeds u times the whole; never where p is 0.

    In float64, so that u < 1 stays below the whole.
    """
    cumulative = p.cumsum(-1, dtype=torch.float64)
    at = u[:, None].double() * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True)[:, 0]
