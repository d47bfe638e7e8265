"""config.json -> the few numbers that decide what one Transformer computes.

The families: Llama 2 and 3 (and SmolLM2, which is one), Mistral, Qwen2 and 2.5, Qwen3, SmolLM3,
Gemma-2, Gemma-3 (text). A field that would change the result and is not supported is an error that
names it. A field that transformers does not read for the family is ignored, and the commands name
it (announce_ignored). tests/parity holds the lists below against transformers' config classes.
"""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from minibnf.files.disk import check_fields, read_json
from minibnf.files.terminal import show


@dataclass(frozen=True)
class Rope:
    """Rotary positions. theta: their base. llama3: the values of LLAMA3's fields, or None."""

    theta: float
    llama3: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Layer:
    """What differs between layers."""

    window: int | None  # a token sees so many tokens up to itself; None: all
    rope: Rope | None  # None: no positions at all


@dataclass(frozen=True)
class Config:
    """The first ten fields and the last bear their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    layers: tuple[Layer, ...]
    family: str
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool  # RMSNorm over each query's and key's head
    # Gemma: norms multiply by 1 + weight, embeddings by sqrt(hidden_size), 4 norms per layer, and
    # the gate's activation is GELU by tanh, not SiLU
    gemma: bool
    query_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    mlp_bias: bool = False


# Fields that people's files hold and that the forward pass does not read.
HARMLESS = set(
    "_name_or_path architectures attention_dropout bos_token_id dtype eos_token_id id2label"
    " initializer_range label2id output_attentions output_hidden_states pad_token_id pretraining_tp"
    " problem_type return_dict torch_dtype transformers_version use_cache".split()
)
# Fields that the code which transformers' families share looks up in every config, whether or not
# the family's class has them, with the values that are supported where the family does not read
# them (READS). Llama's cache, for one, forgets what is older than a sliding_window, though its
# attention knows no window.
ONLY = {
    "attention_chunk_size": (None,),
    "chunk_size_feed_forward": (0,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "original_max_position_embeddings": (None,),
    "partial_rotary_factor": (None, 1.0),
    "per_layer_config": (None,),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
ONLY_GEMMA = {  # fields of one kind of class
    "attn_logit_softcapping": (None,),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "use_bidirectional_attention": (None, False),
}
# What every family reads: {field: transformers' default, or None where it has none}.
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    " num_key_value_heads head_dim".split()
)
SHAPE = dict.fromkeys([*SIZES, "model_type", "rope_scaling", "rope_parameters"]) | {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
_WINDOWS = {"sliding_window": None, "layer_types": None}
_QWEN = _WINDOWS | {"use_sliding_window": False, "max_window_layers": 28}
_GEMMA = (
    _WINDOWS
    | {"sliding_window": 4096, "num_key_value_heads": 4, "head_dim": 256, "attention_bias": False}
    | {"query_pre_attn_scalar": 256, "tie_word_embeddings": True, "final_logit_softcapping": None}
)
READS = {  # family: what it reads besides SHAPE, or with another default
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN | {"sliding_window": 4096},
    "qwen3": _QWEN | {"sliding_window": 4096, "attention_bias": False, "head_dim": 128},
    "smollm3": _QWEN
    | {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": 4, "rope_theta": 2e6}
    | {"tie_word_embeddings": True, "no_rope_layers": None, "no_rope_layer_interval": 4},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA
    | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    | {"sliding_window_pattern": 6, "_sliding_window_pattern": None},
}
SOFTCAPS = {"attn_logit_softcapping", "final_logit_softcapping"}
# Fields in which null is a value of its own; elsewhere it stands for the default.
OFF = {"num_key_value_heads", "head_dim", "sliding_window", *SOFTCAPS}
KINDS = ("full_attention", "sliding_attention")  # of layers, as layer_types names them
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
REAL = {"rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar"}
COUNTS = "max_position_embeddings sliding_window sliding_window_pattern no_rope_layer_interval"
FLAGS = "attention_bias mlp_bias tie_word_embeddings use_sliding_window"
# What a field must be, its types, and the most that a number above 0 may be. No published model
# comes near, and what is far beyond would cost all memory before any file of weights could
# contradict it.
MUST = (
    dict.fromkeys([*REAL, *SOFTCAPS, *LLAMA3], ("a number", (int, float), 2**53))
    | dict.fromkeys(SIZES, ("a whole number", (int,), 2**20))
    | {"num_hidden_layers": ("a whole number", (int,), 1000)}
    | dict.fromkeys(COUNTS.split(), ("a whole number", (int,), 2**31))
    | dict.fromkeys(FLAGS.split(), ("true or false", (bool,)))
    | {"max_window_layers": ("a whole number", (int,))}
    | dict.fromkeys(["layer_types", "no_rope_layers"], ("a list", (list,)))
    | dict.fromkeys(["rope_scaling", "rope_parameters"], ("an object", (dict,)))
)


def read_config(directory) -> tuple[Config, dict]:
    """The Config that config.json gives, and the whole of the file.

    Raises FileNotFoundError, or ValueError that names the field.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise no_model(directory, "no config.json")
    raw = read_json(path)
    return parse_config(raw, path), raw


def no_model(directory, lacks: str) -> FileNotFoundError:
    """The error for a folder that lacks files of a model: what it is, and what to name instead."""
    snapshots = sorted(Path(directory).glob("snapshots/*/"))
    if snapshots:
        what = f"is the top folder of a hub's cache; name the model's own: {snapshots[-1]}"
    elif Path(directory).is_dir():
        what = f"holds {lacks}"
    else:
        what = (
            "is no folder; a model on a hub is downloaded first: hf download NAME --local-dir DIR"
        )
    return FileNotFoundError(f"{directory} {what}")


def parse_config(raw: dict, path) -> Config:
    """The Config of what a config.json holds. Raises ValueError that names the field."""
    family = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(family, str) or family not in READS:
        raise ValueError(
            f"{path}: field 'model_type' = {family!r} is not supported, only {', '.join(READS)}"
        )
    for field, allowed in _only(family).items():
        if field in raw and raw[field] not in allowed:
            raise ValueError(
                f"{path}: field '{field}' = {raw[field]!r} is not supported for {family}, "
                f"only {' or '.join(map(repr, allowed))}"
            )
    given = SHAPE | READS[family]
    given |= {k: v for k, v in raw.items() if k in given and (v is not None or k in OFF)}
    check_fields(path, given, MUST, required={*SIZES} - OFF)
    heads, gemma = given["num_attention_heads"], family.startswith("gemma")
    given["head_dim"] = given["head_dim"] or given["hidden_size"] // heads
    given["num_key_value_heads"] = given["num_key_value_heads"] or heads
    if heads % given["num_key_value_heads"] or given["head_dim"] % 2 or not given["head_dim"]:
        raise ValueError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads, "
            "and head_dim even"
        )
    bias = bool(given.get("attention_bias"))
    return Config(
        **{field.name: given[field.name] for field in fields(Config) if field.name in given},
        layers=_layers(given, path),
        family=family,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        qk_norm=family in ("qwen3", "gemma3_text"),
        gemma=gemma,
        query_scale=given.get("query_pre_attn_scalar", given["head_dim"]) ** -0.5,
        attention_softcap=given.get("attn_logit_softcapping"),
        final_softcap=given.get("final_logit_softcapping"),
    )


def _only(family: str) -> dict[str, tuple]:
    """{field: supported values} of the fields that this family does not read."""
    only = ONLY | (ONLY_GEMMA if family.startswith("gemma") else {"hidden_act": ("silu",)})
    return {field: values for field, values in only.items() if field not in READS[family]}


def ignored_fields(raw: dict) -> list[str]:
    """The fields of a config.json that parse_config accepted which transformers does not read."""
    family = raw["model_type"]
    read = {*HARMLESS, *SHAPE, *READS[family], *_only(family)}
    return [field for field in raw if field not in read]


def announce_ignored(directory, raw: dict) -> None:
    """One line on standard error that names the ignored fields, where there are any."""
    if ignored := ignored_fields(raw):
        names = ", ".join(map(repr, ignored))
        what = f"fields that a model of {raw['model_type']} does not read are ignored: {names}"
        show(f"{Path(directory) / 'config.json'}: {what}", file=sys.stderr)


def _layers(given: dict, path) -> tuple[Layer, ...]:
    """Each layer's window and rotary positions."""
    n, window = given["num_hidden_layers"], given.get("sliding_window")
    kinds = given.get("layer_types")
    roped = given.get("no_rope_layers")
    if roped is None:  # SmolLM3 leaves out every fourth, the others none
        interval = given.get("no_rope_layer_interval", n + 1)
        roped = [(i + 1) % interval != 0 for i in range(n)]
    if len(roped) != n:
        raise ValueError(f"{path}: field 'no_rope_layers' must have {n} items, not {len(roped)}")
    if kinds is None:  # as transformers 4 wrote no such field
        sliding = (_is_sliding(i, given, roped) for i in range(n))
        kinds = ["sliding_attention" if s else "full_attention" for s in sliding]
    lacking = window is None and "sliding_attention" in kinds
    if len(kinds) != n or not all(kind in KINDS for kind in kinds) or lacking:
        raise ValueError(
            f"{path}: field 'layer_types' must name {n} times full_attention or sliding_attention, "
            f"which needs a sliding_window, not {kinds}"
        )
    ropes = _ropes(given, path)
    return tuple(
        Layer(window if kind == "sliding_attention" else None, ropes[kind] if has_rope else None)
        for kind, has_rope in zip(kinds, roped, strict=True)
    )


def _is_sliding(i: int, given: dict, roped: list) -> bool:
    """Whether layer i has a sliding window in a config that does not name its layers' types."""
    family = given["model_type"]
    if family == "gemma2":
        return i % 2 == 0
    if family == "gemma3_text":
        return (i + 1) % given["sliding_window_pattern"] != 0
    if given.get("sliding_window") is None or not given.get("use_sliding_window", True):
        return False
    if family == "smollm3":
        return not roped[i]
    return i >= given.get("max_window_layers", 0)  # Mistral has no such field


def _ropes(given: dict, path) -> dict[str, Rope]:
    """The Rope of each of KINDS, from rope_theta and rope_scaling or from rope_parameters."""
    raw = given["rope_parameters"] or given["rope_scaling"] or {}
    apart, theta = not set(KINDS).isdisjoint(raw), given["rope_theta"]
    local = given.get(
        "rope_local_base_freq", theta
    )  # Gemma-3's layers with a window have their own
    if not apart and given["model_type"] == "gemma3_text":
        if given["rope_parameters"]:
            raise ValueError(
                f"{path}: field 'rope_parameters' must hold {' and '.join(KINDS)} for gemma3_text"
            )
        apart, raw = True, {KINDS[0]: raw}  # transformers 4 scaled the global layers alone
    sets = [raw.get(kind) or {} for kind in KINDS] if apart else [raw, raw]
    return {
        kind: _rope(parameters, base, path)
        for kind, parameters, base in zip(KINDS, sets, (theta, local), strict=True)
    }


def _rope(parameters: dict, base: float, path) -> Rope:
    """The Rope of one set of parameters, which are refused unless they are followed here.

    base: theta, unless the parameters hold another.
    """
    parameters = parameters if isinstance(parameters, dict) else {"rope_type": parameters}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta") or base
    whole_head = parameters.get("partial_rotary_factor", 1.0) == 1.0
    others = parameters.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    check_fields(path, parameters, MUST, required=others)
    if whole_head and kind == "default" and not others:
        return Rope(theta)
    if whole_head and kind == "llama3" and others == set(LLAMA3):
        return Rope(theta, tuple(float(parameters[name]) for name in LLAMA3))
    raise ValueError(
        f"{path}: rotary positions {parameters} are not supported; only rope_type default is, and "
        f"llama3 with the fields {', '.join(LLAMA3)}"
    )
