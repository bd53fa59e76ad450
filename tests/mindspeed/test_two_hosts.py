"""Two hosts, each with a network of its own, train one model through MindSpeed-LLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import engine, rehearsal, rl_hosts
from helpers.engine import TRACKER, worst_difference
from helpers.rehearsal import Inputs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TP = 2  # within a host; the data-parallel group spans both hosts
FLOAT32 = 4  # bytes


def test_losses_are_those_of_a_single_process(inputs: Inputs, server: engine.Server, tmp_path: Path) -> None:
    if reason := rl_hosts.why_no_namespaces():
        pytest.skip(reason)
    model = inputs.model("minimind3")
    settings = rehearsal.SETTINGS | inputs.environment | {"TP": str(TP), "NPUS_PER_NODE": str(TP), "MBS": "1"}
    settings |= {"MODEL": str(model), "DATA_PATH": str(inputs.folder / "text.jsonl"), "SAVE_INTERVAL": "10"}
    weights = {1: tmp_path / "weights-1", TP: tmp_path / "weights-2"}
    for tp, folder in weights.items():
        where = {"LOAD_DIR": str(model), "SAVE_DIR": str(folder), "TP": str(tp), "PRECISION": "fp32"}
        rehearsal.run_script("ckpt_convert_minimind_hf2mcore.sh", rehearse=False, **where)

    with rl_hosts.Pair(tmp_path, namespaces=True) as pair:
        hostfile = tmp_path / "hosts"
        hostfile.write_text(f"{pair.head.address}\n{pair.worker.address}\n")
        settings |= {"REHEARSE": "1", "NPU_EMULATION_STRICT": "raise", "HOSTFILE": str(hostfile)}
        settings |= {"HCCL_SOCKET_IFNAME": "=link0", "CKPT_LOAD_DIR": str(weights[TP])}
        settings |= {"OUTPUT_DIR": str(tmp_path / "theirs")}
        for host in (pair.head, pair.worker):
            host.run(str(rehearsal.SCRIPTS / "pretrain_minimind_ptd.sh"), **settings)
        codes = [host.wait(rehearsal.TIMEOUT) for host in (pair.head, pair.worker)]
        said = [host.said() for host in (pair.head, pair.worker)]
        crossed = pair.crossed()
    assert codes == [0, 0], "\n".join(text[-4000:] for text in said)

    # Megatron prints the losses on its last rank, which is on the second host.
    first, last = (rehearsal.Result(code, text, 0.0) for code, text in zip(codes, said, strict=True))
    assert first.iterations == [] and last.iterations == list(range(1, 11))
    assert "strict:" not in "".join(said)
    assert (tmp_path / "theirs/checkpoints" / TRACKER).read_text() == "10"
    # Ten updates reduce the gradients over the link; those of the embedding alone are this long.
    assert crossed > 10 * rehearsal.VOCABULARY * rehearsal.MODELS["minimind3"].hidden_size * FLOAT32

    flags = rehearsal.drop(
        rehearsal.program_flags(last), "--load", "--save", "--tensor-model-parallel-size", "--sequence-parallel"
    )
    flags += ["--load", str(weights[1]), "--save", str(tmp_path / "checkpoints")]
    ours = server.run(flags, tmp_path / "run", 1)
    assert worst_difference(ours.column(), last.losses) < 1e-5
