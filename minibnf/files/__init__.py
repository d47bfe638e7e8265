"""What other people's files look like: configs, tensors, tokenizers, templates, rows.

Nothing here knows a model.
"""

from minibnf.files.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
