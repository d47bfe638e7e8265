"""What other people's files look like: configs, tensors, tokenizers, templates, rows. It knows no model."""

from minibnf.files.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
