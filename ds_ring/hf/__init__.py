"""Everything that touches transformers: loading, the parts of a decoder, injection of our attention."""
