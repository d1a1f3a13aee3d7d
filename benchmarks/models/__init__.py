"""Which of transformers' architectures work: checked in small, and written to a page."""
