"""All that depends on transformers: loading, a decoder's parts, and our attention in its layers."""
