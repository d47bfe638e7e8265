"""What the paper's claims are tested with: the small world, its exam, comparisons, verdicts, figures."""
