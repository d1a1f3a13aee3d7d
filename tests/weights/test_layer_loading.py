"""A checkpoint that is read layer by layer gives the model that it gives as a whole, and is never whole on a rank."""

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_ring.config import RunConfig
from ds_ring.engine.engine import Engine
from ds_ring.engine.sequence_parallel import SequenceParallelRunner
from ds_ring.errors import CheckpointError
from ds_ring.hf.dims import model_dims
from ds_ring.hf.layer_loading import LayerLoader
from ds_ring.utils.model_config import read_config
from tests.helpers.mocked_world import one_process
from tests.helpers.tiny_models import build, gemma, gpt2, gpt_neox, gpt_oss, llama_gqa, mixtral, qwen2, tokens
from tests.helpers.worlds import in_mesh

CPU = torch.device("cpu")
alone = threading.Lock()
MODELS = {
    "llama": llama_gqa,
    "tied": lambda: qwen2(tie_word_embeddings=True),
    "gemma": gemma,
    "neox": gpt_neox,
    "gpt2": gpt2,
    "experts of their own names": mixtral,
    "gpt_oss": gpt_oss,
}


def saved(tmp_path, config):
    build(config).save_pretrained(tmp_path)
    return tmp_path


def on_ranks(path, work, **options):
    """``work(engine)`` on every rank, each of which reads the checkpoint at ``path``."""
    run = RunConfig.load({"dtype": "fp32"}, **options)
    dims = model_dims(read_config(path))

    def on_rank(mesh):
        with alone:  # what builds and loads without weights changes PyTorch for the whole process
            loader = LayerLoader(path, torch.float32, CPU)

        def fill(number):
            with alone:
                loader.fill(number)

        runner = SequenceParallelRunner(loader.model, run, mesh, dims, CPU, fill)
        assert not [name for name, parameter in loader.model.named_parameters() if parameter.is_meta]
        return work(Engine(runner))

    with one_process():
        return in_mesh(run.topology, on_rank)


@pytest.mark.parametrize("name", MODELS)
def test_a_rank_reads_its_part_of_every_layer(name, tmp_path):
    path, ids = saved(tmp_path, MODELS[name]()), tokens(2, 21)
    want = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    for logits in on_ranks(path, lambda engine: engine(ids).logits, ring_degree=2, weights="sharded", batch_size=2):
        assert (logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_one_rank_streams_generates_what_transformers_does(tmp_path):
    path, ids = saved(tmp_path, llama_gqa()), tokens(2, 21)
    options = {"max_new_tokens": 20, "do_sample": False}
    (got,) = on_ranks(path, lambda engine: engine.generate(ids, **options), weights="streamed")
    assert torch.equal(got, AutoModelForCausalLM.from_pretrained(path).generate(ids, **options))


def test_a_checkpoint_that_lacks_a_layers_weight_is_refused_by_name(tmp_path):
    path = saved(tmp_path, llama_gqa())
    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    loader = LayerLoader(path, torch.float32, CPU)
    loader.fill(0)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        loader.fill(1)
