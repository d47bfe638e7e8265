"""What the paper's claims are tested with: the small world, its exam, comparisons, verdicts.

Each room imports only those before it: language (questions and their judge), smallworld (files),
exam (what models score), plan (what is run), trials (one run), tables, frontiers,
lengths, verdicts, figures, compare.
"""
