"""The copy engine itself: ranks as processes, several on one GPU where there is only one, against fp64 attention.

Ranks take turns on a shared GPU, so that this says what is right, not what is fast.
"""

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from ds_ring.attention.hybrid import sequence_parallel_attention
from ds_ring.cli.seeded_checkpoint import byte_tokenizer
from ds_ring.parallel.layout import SequenceLayout
from ds_ring.parallel.topology import Topology
from ds_ring.process.launcher import reserved_port
from ds_ring.testing.host_staged import HostStagedTransport
from ds_ring.transport.mesh import Mesh
from ds_ring.transport.select import SHARE_GPU, Location, select_transports
from tests.helpers.attention_problems import Problem, cut, put_together
from tests.helpers.marks import ON_A_GPU

pytestmark = ON_A_GPU

ROOT = Path(__file__).resolve().parents[2]
HALF = 1e-3
LIMIT_S = 300
VARIANTS = ("gather_kv", "pass_kv", "local_first")


def on_ranks(topology: Topology, work, *arguments) -> list:
    """``work(mesh, device, *arguments)`` in a process a rank; results in rank order. ``work`` is a function of this
    file."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with reserved_port() as port:
        given = port, topology, results, work, arguments
        processes = [context.Process(target=_rank, args=(r, *given)) for r in range(topology.world_size)]
        for process in processes:
            process.start()
        try:
            found: dict[int, object] = {}
            while len(found) < topology.world_size:
                rank, ok, value = results.get(timeout=LIMIT_S)
                assert ok, f"rank {rank}:\n{value}"
                found[rank] = value
        finally:
            for process in processes:
                process.join(10)
                if process.is_alive():
                    process.kill()
    return [found[rank] for rank in sorted(found)]


def _rank(rank: int, port: int, topology: Topology, results, work, arguments) -> None:
    try:
        shared = torch.cuda.device_count() < topology.world_size
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
        if shared:
            os.environ |= {SHARE_GPU: "1", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(topology.world_size)}
        import deepspeed

        # A peer that fails must end the test, not hold it.
        limit = timedelta(seconds=LIMIT_S // 2)
        dist.init_process_group("gloo" if shared else "nccl", timeout=limit)
        deepspeed.init_distributed(verbose=False)
        locations: list[Location] = [None] * topology.world_size
        dist.all_gather_object(locations, Location.of(device))
        choice = select_transports("copy_engine", topology, locations, sharing=shared)
        messages = HostStagedTransport if shared else None
        mesh = Mesh.from_process_groups(topology, choice.pulled, device, messages=messages)
        with torch.inference_mode():
            value = work(mesh, device, *arguments)
        torch.cuda.synchronize()
        mesh["world"].barrier()
        results.put((rank, True, value))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def _shared_rounds(mesh: Mesh, device: torch.device, count: int, contiguous: bool) -> float:
    transport = mesh["ring"]
    rank, size = transport.rank, transport.size
    worst = torch.zeros((), device=device)
    for number in range(count):
        length = 1 + 37 * number % 1000
        rows = (slice(None), slice(0, -(-length // 2)))
        with transport.share((3, length, 64), torch.empty(0, device=device, dtype=torch.float16)) as shared:
            # Some ranks are late with their writing, others with their reading.
            if number % size == rank:
                torch.cuda._sleep(2_000_000)
            shared.own.fill_(number % 1000 + rank)
            after, before = ([(rank + sign * hop) % size for hop in range(1, size)] for sign in (1, -1))
            shared.publish([(p, rows) if not contiguous or p > rank else None for p in after])
            arriving = [(p, *shared.pull((p, rows) if not contiguous or p < rank else None)) for p in before]
            for peer, pending, part in arriving:
                pending.wait()
                if part.numel():
                    worst = torch.maximum(worst, (part.float() - number % 1000 - peer).abs().max())
    return float(worst)


def _all_to_alls(mesh: Mesh, device: torch.device, count: int) -> float:
    transport = mesh["ring"]
    rank, size = transport.rank, transport.size
    worst = torch.zeros((), device=device)
    for number in range(count):
        like = torch.empty(0, device=device, dtype=torch.bfloat16)
        send = transport.send_buffer((size, 5 + number % 7, 130), like)
        send.copy_((torch.arange(size, device=device) + 10 * rank + number % 50)[:, None, None].expand(send.shape))
        got = transport.all_to_all(send)
        want = torch.arange(size, device=device) * 10 + rank + number % 50
        worst = torch.maximum(worst, (got.float() - want[:, None, None]).abs().max())
    return float(worst)


def _exchanges(mesh: Mesh, device: torch.device) -> float:
    transport = mesh["ring"]
    rank, size = transport.rank, transport.size
    received = torch.empty(1000, device=device)
    sent = torch.full((1000,), float(rank), device=device)
    transport.exchange([((rank + 1) % size, sent)], [((rank - 1) % size, received)]).wait()
    gathered = transport.all_gather(sent[:2])
    return float((received - (rank - 1) % size).abs().max() + (gathered[:, 0].cpu() - torch.arange(size)).abs().max())


def _movements(mesh: Mesh, device: torch.device) -> dict[str, float]:
    return {
        "everyone reads everyone": _shared_rounds(mesh, device, 200, contiguous=False),
        "later ranks read earlier ones": _shared_rounds(mesh, device, 200, contiguous=True),
        "all to all": _all_to_alls(mesh, device, 100),
        "messages": _exchanges(mesh, device),
    }


def _attention(mesh: Mesh, device: torch.device, problems: list[Problem]) -> list[list[np.ndarray]]:
    t = mesh.topology
    outs = []
    for problem in problems:
        layout = SequenceLayout(problem.length, t.ring, t.ulysses)
        location = mesh.coordinate("ring"), mesh.coordinate("ulysses")
        q, k, v = (cut(x, layout, *location).to(device) for x in problem.tensors())
        outs.append(
            [
                sequence_parallel_attention(
                    q, k, v, layout=layout, spec=problem.spec, ring=mesh["ring"], ulysses=mesh["ulysses"], variant=name
                )
                .cpu()
                .numpy()  # a tensor would share memory of a process that is gone when it is read
                for name in VARIANTS
            ]
        )
    return outs


@pytest.mark.parametrize("size", [2, 3])
def test_every_kind_of_movement_is_exact_in_changing_shapes(size):
    for errors in on_ranks(Topology(ring=size), _movements):
        assert not any(errors.values()), errors


@pytest.mark.parametrize(
    "topology",
    [Topology(ring=2), Topology(ring=3), Topology(ulysses=2), Topology(ring=2, ulysses=2)],
    ids=Topology.label,
)
def test_attention_over_many_layers_of_changing_lengths(topology):
    dice = torch.Generator().manual_seed(torch.seed() % 2**31)
    lengths = [*torch.randint(1, 1500, (8,), generator=dice).tolist(), 1001, 1, 257]
    problems = [
        Problem(length, heads=4, kv_heads=2, head_dim=head_dim, batch=2, seed=i, dtype=torch.float16)
        for i, length in enumerate(lengths)
        for head_dim in (64, 512)
    ]
    outs = on_ranks(topology, _attention, problems)
    for i, problem in enumerate(problems):
        layout = SequenceLayout(problem.length, topology.ring, topology.ulysses)
        for j, variant in enumerate(VARIANTS):
            whole = put_together([torch.from_numpy(rank_outs[i][j]) for rank_outs in outs], layout)
            assert problem.error(whole) < HALF, (variant, problem)


def _python(*command: object) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, SHARE_GPU: "1", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize(
    ("ranks", "layout", "transport"),
    [
        (2, ["--ring-degree", 2], "ring: copy engine"),
        (2, ["--ulysses-degree", 2], "ulysses: copy engine"),
        (3, ["--ring-degree", 3, "--interleave", "off"], "ring: copy engine"),
        (2, ["--ring-degree", 2, "--block-tokens", 300], "ring: copy engine"),
        (2, ["--pp-size", 2], "pp: copy engine"),
    ],
    ids=["ring2", "ulysses2", "ring3_one_at_a_time", "ring2_in_blocks", "pp2"],
)
def test_the_engine_on_a_shared_gpu_agrees_with_the_unsharded_model(ranks, layout, transport, tmp_path):
    config = GPTNeoXConfig(
        hidden_size=1024, num_attention_heads=4, intermediate_size=2048, num_hidden_layers=4, vocab_size=300,
        use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", max_position_embeddings=4096,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    model, reference = ["--model", checkpoint, "--dtype", "fp16"], tmp_path / "reference.safetensors"
    _python("-m", "benchmarks.layouts.parity", *model, "--rows", 4, "--length", 2001, "--output", reference)
    workload = ["--batch-size", 4, "--max-length", 2001, "--references", reference, "--trace", tmp_path / "trace.json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    out = _python(*launcher, "launch/bench.py", *model, *layout, *workload)
    (row,) = json.loads(out.strip().splitlines()[-1])["rows"]
    assert row["transport"] == transport
    assert (row["in_flight"] > 1) == (not {"off", "--pp-size"} & set(layout))
    assert row["max_rel_error"] < 1e-2
    assert row["bytes_sent_per_rank"] == row["bytes_formula"]
    assert row["trace_transfer_ms"] > 0
