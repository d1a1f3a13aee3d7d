"""Two tiny models for tests of how a layer makes q, k and v."""

from functools import partial

from tests.helpers.tiny_models import gpt_neox, llama_gqa

LENGTH = 61
FUSED = partial(gpt_neox, heads=4, num_hidden_layers=2)
"""One projection for q, k and v."""
APART = partial(llama_gqa, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
"""A projection for each of q, k and v."""
