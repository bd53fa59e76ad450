"""The device is found, and the CPU answers to the names that Megatron gives an accelerator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minimind_mcore.platform import device

PROGRAM = """
import json, os, torch, torch.distributed as dist
from minimind_mcore.platform import device

found = {"kind": device.setup().kind}
device.setup()  # twice is once
found["devices"] = sorted({
    str(t.device)
    for t in (
        torch.empty(1, device="cuda"), torch.zeros(1, device=0), torch.ones(1, device=torch.device("cuda:1")),
        torch.tensor([1.0], device="cuda:0"), torch.zeros(1).to("cuda"), torch.zeros(1).to(device="cuda"),
        torch.zeros(1).to(0), torch.zeros(1).cuda(), torch.zeros(1).new_zeros(1, device="cuda"),
    )
})
found["dtype"] = str(torch.zeros(1).to(torch.bfloat16).dtype)
found["type"] = torch.zeros(1).type()
found["cast"] = str(torch.zeros(1).type(torch.float64).dtype)
found["rank device"] = torch.cuda.current_device()

torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3, device="cuda")
torch.cuda.set_rng_state(state)
found["rng"] = torch.equal(first, torch.rand(3))

start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
start.record()
end.record(torch.cuda.current_stream())
found["event"] = start.elapsed_time(end) >= 0
with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
    torch.cuda.synchronize()

dist.init_process_group("gloo")
rank, other = dist.get_rank(), 1 - dist.get_rank()
group = dist.new_group([0, 1], backend="nccl")
found["backend"] = dist.get_backend(group)
# What is sent is what was there when the send was asked for.
for size in (4, 1 << 20):
    sent, received = torch.full((size,), float(rank)), torch.empty(size)
    requests = [dist.isend(sent, other)]
    sent.fill_(7.0)
    dist.recv(received, other)
    [request.wait() for request in requests]
    found[f"received {size}"] = received.unique().tolist() == [float(other)]
sizes = torch.tensor([1, 2])
output = torch.empty(2 * (rank + 1))
dist.all_to_all_single(output, torch.arange(3.0) + 10 * rank, torch.tensor([rank + 1, rank + 1]), sizes, group=group)
found["exchanged"] = output.tolist()
parts = [torch.empty(1), torch.empty(2)]
dist.all_gather(parts, torch.arange(rank + 1.0) + 10 * rank, group=group)
found["gathered"] = [part.tolist() for part in parts]
share = torch.empty(rank + 1)
dist.reduce_scatter(share, [torch.ones(1), torch.full((2,), 2.0 + rank)], group=group)
found["reduced"] = share.tolist()
with torch.device("meta"):
    found["on meta"] = [str(torch.empty(1).device), str(torch.arange(2).device)]
if rank == 1:
    print(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_a_rank_touches_its_own_device_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    api = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 8,
        set_device=lambda n: calls.append(("set_device", n)),
        get_device_name=lambda n=0: calls.append(("get_device_name", n)) or "910B2",
        get_device_properties=lambda n: calls.append(("properties", n)) or SimpleNamespace(total_memory=64 << 30),
    )
    monkeypatch.setattr(torch, kind, api, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", SimpleNamespace(__spec__=SimpleNamespace()))
    monkeypatch.setenv("DEVICE", kind)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device.current.cache_clear()
    try:
        found = device.current()
    finally:
        device.current.cache_clear()
    assert (found.kind, found.name, found.count, found.memory) == (kind, "910B2", 8, 64 << 30)
    assert calls[0] == ("set_device", 3) and {number for _, number in calls} == {3}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a rank sees; the redirection is for good, so it happens in processes of its own."""
    port = str(29000 + os.getpid() % 1000)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "DEVICE": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM)],
            env=os.environ | rendezvous | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    result: dict[str, Any] = json.loads(outputs[1].splitlines()[-1])
    return result


def test_names_of_accelerators_mean_the_cpu(found: dict[str, Any]) -> None:
    assert found["kind"] == "cpu" and found["devices"] == ["cpu"] and found["rank device"] == 0
    assert found["dtype"] == "torch.bfloat16" and found["cast"] == "torch.float64"


def test_tensor_types_have_the_names_that_optimizers_sort_by(found: dict[str, Any]) -> None:
    assert found["type"].endswith(".FloatTensor") and found["type"] != "torch.FloatTensor"


def test_streams_events_and_random_states_work(found: dict[str, Any]) -> None:
    assert found["rng"] and found["event"]


def test_send_owns_a_copy_of_what_it_sends(found: dict[str, Any]) -> None:
    assert found["received 4"] and found["received 1048576"]


def test_all_to_all_takes_sizes_as_tensors(found: dict[str, Any]) -> None:
    assert found["backend"] == "gloo"
    assert found["exchanged"] == [1.0, 2.0, 11.0, 12.0]


def test_unequal_shares_are_gathered_and_reduced(found: dict[str, Any]) -> None:
    assert found["gathered"] == [[0.0], [10.0, 11.0]]
    assert found["reduced"] == [5.0, 5.0]


def test_a_device_context_steers_the_factories(found: dict[str, Any]) -> None:
    assert found["on meta"] == ["meta", "meta"]


def current(asked: str, work: Path) -> subprocess.CompletedProcess[str]:
    """The device in use under DEVICE=asked, in a process without accelerators."""
    imports = "from minimind_mcore import errors\nfrom minimind_mcore.platform import device\n"
    program = f"{imports}errors.run(lambda: print(device.current().kind))"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DEVICE": asked}
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | hidden, capture_output=True, text=True, cwd=work, timeout=60
    )


def test_environment_overrides_the_device(tmp_path: Path) -> None:
    assert current("cpu", tmp_path).stdout == "cpu\n"


@pytest.mark.parametrize(("asked", "message"), [("tpu", "DEVICE='tpu' is not a device"), ("npu", "sees no npu device")])
def test_device_that_is_not_there_is_an_error(tmp_path: Path, asked: str, message: str) -> None:
    done = current(asked, tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
