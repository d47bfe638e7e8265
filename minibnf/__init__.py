"""minibnf: Bidirectional Negative Feedback alignment, written from scratch to be read, trusted and used."""
