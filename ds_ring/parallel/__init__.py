"""Ranks, groups and who holds which tokens: pure arithmetic, checked by hand."""
