"""Checkpoints that several tests of launched runs take."""

import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from tests.helpers.launching import save


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Nine query heads, three key/value heads."""
    config = LlamaConfig(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=96,
        num_hidden_layers=2, vocab_size=300, max_position_embeddings=4096, initializer_range=0.3,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("llama"), config)


@pytest.fixture(scope="session")
def neox(tmp_path_factory):
    config = GPTNeoXConfig(
        hidden_size=64, num_attention_heads=8, intermediate_size=128, num_hidden_layers=4, vocab_size=300,
        use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", max_position_embeddings=4096,
        initializer_range=0.3,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("neox"), config)
