"""Bidirectional Negative Feedback alignment of language models, from scratch (arXiv 2410.04834)."""
