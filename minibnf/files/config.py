"""config.json -> the few numbers that decide what one Transformer computes.

The families: Llama 2 and 3 (and SmolLM2, which is one), Mistral, Qwen2 and 2.5, Qwen3, SmolLM3,
Gemma-2, Gemma-3 (text). A field that would change the result and is not supported is an error that
names it. A field that transformers does not read for the family is ignored, and the commands name
it (announce_ignored). tests/parity holds the lists below against transformers' config classes.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from minibnf.files.disk import read_json


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
    """The first ten fields bear their Hugging Face names."""

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
    gelu: bool  # the gate's activation: tanh-approximated GELU, else SiLU
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each query's and key's head
    gemma: bool  # norms multiply by 1 + weight, embeddings by sqrt(hidden_size), 4 norms per layer
    query_scale: float
    attention_softcap: float | None
    final_softcap: float | None


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
SHAPE = set(
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    " num_key_value_heads head_dim rms_norm_eps tie_word_embeddings max_position_embeddings"
    " rope_theta rope_scaling rope_parameters".split()
)
_WINDOWS = {"sliding_window", "layer_types"}
_QWEN = _WINDOWS | {"use_sliding_window", "max_window_layers"}
_GEMMA = _WINDOWS | {"query_pre_attn_scalar", "attention_bias", "final_logit_softcapping"}
READS = {  # family: the fields it reads besides SHAPE
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"attention_bias"},
    "smollm3": _QWEN | {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval"},
    "gemma2": _GEMMA | {"attn_logit_softcapping"},
    "gemma3_text": _GEMMA
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
}
# Fields in which null is a value of its own; elsewhere it stands for the default.
OFF = {"sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_GEMMA_DEFAULTS = {
    "head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
    "sliding_window": 4096, "num_key_value_heads": 4,
}  # fmt: skip
DEFAULTS = {  # where transformers' own default is not that of Llama
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "gemma2": _GEMMA_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": _GEMMA_DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1e6},
    "smollm3": {
        "tie_word_embeddings": True, "num_key_value_heads": 4,
        "rope_theta": 2e6, "no_rope_layer_interval": 4,
    },
    "qwen3": {"head_dim": 128},
}  # fmt: skip
KINDS = ("full_attention", "sliding_attention")  # of layers, as layer_types names them
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


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
    if family not in READS:
        raise ValueError(
            f"{path}: field 'model_type' = {family!r} is not supported, only {', '.join(READS)}"
        )
    for field, allowed in _only(family).items():
        if field in raw and raw[field] not in allowed:
            raise ValueError(
                f"{path}: field '{field}' = {raw[field]!r} is not supported for {family}, "
                f"only {' or '.join(map(repr, allowed))}"
            )
    read = SHAPE | READS[family]
    given = DEFAULTS.get(family, {}) | {
        field: value
        for field, value in raw.items()
        if field in read and (value is not None or field in OFF)
    }

    number = partial(_number, given, path)
    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head_dim, gemma = number("head_dim", hidden // heads), family.startswith("gemma")
    bias = bool(given.get("attention_bias"))
    config = Config(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_hidden_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=number("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
        max_position_embeddings=number("max_position_embeddings", 2048),
        layers=_layers(given, family, number, path),
        family=family,
        gelu=gemma,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(given.get("mlp_bias")),
        qk_norm=family in ("qwen3", "gemma3_text"),
        gemma=gemma,
        query_scale=(number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        attention_softcap=given.get("attn_logit_softcapping"),
        final_softcap=given.get("final_logit_softcapping"),
    )
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"{path}: num_attention_heads must be a multiple of num_key_value_heads, "
            "and head_dim even"
        )
    return config


def _number(given: dict, path, name: str, default=None):
    """The value of a field that must be a number above 0."""
    value = given.get(name, default)
    real = name in ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar")
    right = isinstance(value, (int, float) if real else int) and not isinstance(value, bool)
    if not right or value <= 0:
        kind = "number" if real else "whole number"
        raise ValueError(f"{path}: field '{name}' must be a {kind} above 0, not {value!r}")
    return value


def _only(family: str) -> dict[str, tuple]:
    """{field: supported values} of the fields that this family does not read."""
    only = ONLY | (ONLY_GEMMA if family.startswith("gemma") else {"hidden_act": ("silu",)})
    return {field: values for field, values in only.items() if field not in READS[family]}


def ignored_fields(raw: dict) -> list[str]:
    """The fields of a config.json that parse_config accepted which transformers does not read."""
    family = raw["model_type"]
    read = HARMLESS | SHAPE | READS[family] | _only(family).keys()
    return [field for field in raw if field not in read]


def announce_ignored(directory, raw: dict) -> None:
    """One line on standard error that names the ignored fields, where there are any."""
    if ignored := ignored_fields(raw):
        names = ", ".join(map(repr, ignored))
        what = f"fields that a model of {raw['model_type']} does not read are ignored: {names}"
        print(f"{Path(directory) / 'config.json'}: {what}", file=sys.stderr)


def _layers(given: dict, family: str, number, path) -> tuple[Layer, ...]:
    """Each layer's window and rotary positions."""
    n, types = number("num_hidden_layers"), given.get("layer_types")
    if types is None:  # as transformers 4 wrote no such field
        if family == "smollm3" and given.get("use_sliding_window"):
            raise ValueError(
                f"{path}: field 'use_sliding_window' needs the field 'layer_types' beside it"
            )
        sliding = (_is_sliding(i, given, family, number) for i in range(n))
        types = ["sliding_attention" if s else "full_attention" for s in sliding]
    if len(types) != n or not set(types).issubset(KINDS):
        raise ValueError(
            f"{path}: field 'layer_types' must name {n} times sliding_attention or "
            f"full_attention, not {types}"
        )
    window = number("sliding_window") if "sliding_attention" in types else None
    kept = given.get("no_rope_layers")
    if family == "smollm3" and kept is None:
        kept = [int((i + 1) % number("no_rope_layer_interval") != 0) for i in range(n)]
    ropes = _ropes(given, number, path)
    return tuple(
        Layer(
            window if kind == "sliding_attention" else None,
            ropes[kind] if kept is None or kept[i] else None,
        )
        for i, kind in enumerate(types)
    )


def _is_sliding(i: int, given: dict, family: str, number) -> bool:
    """Whether layer i has a sliding window in a config that does not name its layers' types."""
    if family == "mistral":
        return given["sliding_window"] is not None
    if family == "gemma2":
        return i % 2 == 0
    if family == "gemma3_text":
        return (i + 1) % number("sliding_window_pattern") != 0
    if family in ("qwen2", "qwen3"):
        return bool(given.get("use_sliding_window")) and i >= given.get("max_window_layers", 28)
    return False


def _ropes(given: dict, number, path) -> dict[str, Rope]:
    """The Rope of each of KINDS, from rope_theta and rope_scaling or from rope_parameters."""
    raw = given.get("rope_parameters") or given.get("rope_scaling") or {}
    apart, gemma3 = not set(KINDS).isdisjoint(raw), given.get("model_type") == "gemma3_text"
    if gemma3 and not apart and given.get("rope_parameters"):
        raise ValueError(
            f"{path}: field 'rope_parameters' must hold full_attention and sliding_attention "
            "for gemma3_text"
        )
    ropes = {}
    for kind in KINDS:
        parameters = (raw.get(kind) or {}) if apart else raw
        local = gemma3 and kind == "sliding_attention"  # such layers have a base of their own
        if local and not apart:  # a scaling of transformers 4 is the global layers' alone
            parameters = {}
        theta = parameters.get("rope_theta")
        if not theta:
            theta = given.get("rope_local_base_freq", 1e4) if local else number("rope_theta", 1e4)
        ropes[kind] = _rope(parameters, theta, path)
    return ropes


def _rope(parameters: dict, theta: float, path) -> Rope:
    """The Rope of one set of parameters, which are refused unless they are followed here."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    others = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    whole_head = parameters.get("partial_rotary_factor", 1.0) == 1.0
    if kind == "default" and whole_head and not others:
        return Rope(theta)
    if kind != "llama3" or not whole_head or len(others) != len(LLAMA3):
        raise ValueError(
            f"{path}: rotary positions {parameters} are not supported; only rope_type default "
            "and llama3 are"
        )
    if missing := [name for name in LLAMA3 if name not in parameters]:
        raise ValueError(f"{path}: rotary scaling llama3 lacks the field '{missing[0]}'")
    return Rope(theta, tuple(float(parameters[name]) for name in LLAMA3))
