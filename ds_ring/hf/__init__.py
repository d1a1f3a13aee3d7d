"""Everything that touches transformers: loading, anatomy of a model, injection of our attention."""
