"""Generation that is not noise: a small model is trained on a passage until it knows it by heart, then goes on from its
beginning. A key in the wrong place or a wrong position shows as text."""

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ds_ring.cli.seeded_checkpoint import VOCABULARY, byte_tokenizer
from tests.helpers.mocked_world import serve

PASSAGE = (
    "A sequence is cut over the ranks of a ring. Every rank keeps its queries, while the keys and values of the others "
    "come by, block after block."
)
PROMPT = 60
STEPS = 300

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 192, "max_position_embeddings": 1024,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "mistral_window": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=40),
    "gpt_neox": GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}


def passage() -> Tensor:
    return torch.tensor([byte_tokenizer()(PASSAGE)["input_ids"]])


@cache
def trained(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = passage()
    for _ in range(STEPS):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "layout",
    [{"ring_degree": 4}, {"ulysses_degree": 2, "ring_degree": 2}, {"tp_size": 2, "pp_size": 2}],
    ids=["ring4", "ulysses2_ring2", "tp2_pp2"],
)
def test_a_passage_is_recited_from_its_beginning(name, layout):
    ids = passage()
    new = ids.shape[1] - PROMPT
    for found in serve(trained(name), lambda engine: engine.generate(ids[:, :PROMPT], max_new_tokens=new), **layout):
        assert byte_tokenizer().decode(found[0]) == PASSAGE


def test_rows_of_unequal_length_recite_it_each_from_its_own_place():
    """Left-padded prompts, one of them cut off at another place of the same passage."""
    ids, pad = passage(), VOCABULARY - 1
    shorter = torch.full((1, PROMPT), pad)
    shorter[0, 25:] = ids[0, : PROMPT - 25]
    sequences, mask = torch.cat((ids[:, :PROMPT], shorter)), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :25] = 0
    (found, *_) = serve(
        trained("llama"),
        lambda engine: engine.generate(sequences, mask, max_new_tokens=80, pad_token_id=pad),
        ring_degree=3,
    )
    for sequence, start in ((0, 0), (1, 25)):
        assert PASSAGE.startswith(byte_tokenizer().decode(found[sequence, start:]))
