"""A converted checkpoint is the same model: run by the native engine in its layout, it has transformers' logits.

Each run builds the model as training does, loads the checkpoint as training does, and passes tokens through its
pipeline; rank files, names and shapes are thus also those that training itself expects.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import ROOT, Corpus, Server, as_flags, layout
from helpers.weights_on_disk import SMALL, read_hf, state_dict, write_hf

from minimind_mcore.converters.main import main_v2
from minimind_mcore.models.config import ModelConfig

HOOK = f"{Path(__file__).resolve()}:save_logits"
RESULT = "LOGITS_FOLDER"
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "minimind3 TP2 PP2": ("minimind3", 4, {"tp": 2, "pp": 2}),
    "minimind3 PP2 VPP2": ("minimind3", 2, {"pp": 2, "per_virtual_stage": 1}),
    "minimind2 TP2": ("minimind2", 2, {"tp": 2}),
    "minimind2 PP4 untied": ("minimind2", 4, {"pp": 4}),
    "minimind3_moe EP2": ("minimind3_moe", 2, {"ep": 2}),
    "minimind3_moe PP2 EP2": ("minimind3_moe", 4, {"pp": 2, "ep": 2}),
    "minimind2_moe EP4": ("minimind2_moe", 4, {"ep": 4}),
    "minimind2_moe TP2 PP2": ("minimind2_moe", 4, {"tp": 2, "pp": 2}),
}


def save_logits() -> None:
    """In a rank, before its run: after loading, pass the validation tokens through and stop."""
    from minimind_mcore.training import checkpointing

    load = checkpointing.load

    def load_and_run(args: Any, engine: Any) -> Any:
        progress = load(args, engine)
        folder = Path(os.environ[RESULT])
        logits = _forward(args, engine.model, torch.load(folder / "ids.pt"))
        if logits is not None:
            torch.save(logits, folder / "logits.pt")
        if not os.environ.get("TRAIN"):
            _leave()
        return progress

    checkpointing.load = load_and_run


def _leave() -> None:
    import torch.distributed as dist

    dist.barrier()
    os._exit(0)


def _forward(args: Any, model: list[Any], ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of the whole vocabulary, on one rank of the last stage."""
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    positions = torch.arange(ids.shape[1]).expand(*ids.shape)
    outputs: list[torch.Tensor] = []

    def step(_: Any, chunk: Any) -> Any:
        output = chunk(ids, positions, None)

        def collect(tensor: torch.Tensor, non_loss_data: bool = False) -> torch.Tensor:
            outputs.append(tensor.detach())
            return tensor

        return output, collect

    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(())] * len(model),
            model=model,
            num_microbatches=ps.get_pipeline_model_parallel_world_size(),
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk in model:
        chunk.train()
    if not outputs:
        return None
    parts = [torch.empty_like(outputs[0]) for _ in range(ps.get_tensor_model_parallel_world_size())]
    dist.all_gather(parts, outputs[0].contiguous(), group=ps.get_tensor_model_parallel_group())
    first = ps.get_tensor_model_parallel_rank() == 0 and ps.get_data_parallel_rank() == 0
    return torch.cat(parts, dim=-1) if first else None


@pytest.fixture(scope="module")
def ids() -> Iterator[torch.Tensor]:
    yield torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(9))


def expected_logits(hf: Path, ids: torch.Tensor) -> torch.Tensor:
    import transformers

    with torch.no_grad():
        logits: torch.Tensor = transformers.AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    return logits


def model_of(name: str, corpus: Corpus, tied: bool = True) -> ModelConfig:
    return SMALL[name].replace(vocab_size=corpus.vocab_size, tie_embeddings=tied)


def check(
    server: Server,
    corpus: Corpus,
    config: ModelConfig,
    hf: Path,
    ids: torch.Tensor,
    folder: Path,
    processes: int,
    **flags: Any,
) -> str:
    """Run with these flags, and compare; returns what was printed."""
    folder.mkdir()
    torch.save(ids, folder / "ids.pt")
    argv = [*corpus.flags(config, micro_batch_size=2, global_batch_size=8, seq_length=16), *as_flags(flags)]
    environment = {RESULT: str(folder), "TRAIN": "1" if flags.get("train_iters") else ""}
    run = server.run(argv, folder, processes, HOOK, environment)
    found = torch.load(folder / "logits.pt")
    expected = expected_logits(hf, ids)
    assert expected.std() > 0.1, "logits of nearly nothing prove nothing"
    assert (found - expected).abs().max() <= 1e-4, run.output
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    return run.output


def convert(load: Path, save: Path, *flags: str, to: str = "mg") -> Path:
    main_v2(["--load-dir", str(load), "--save-dir", str(save), "--save-model-type", to, *flags])
    return save


def target_flags(tp: int = 1, pp: int = 1, ep: int = 1, per_virtual_stage: int | None = None) -> list[str]:
    return as_flags(
        {
            "target_tensor_parallel_size": tp,
            "target_pipeline_parallel_size": pp,
            "target_expert_parallel_size": ep,
            "num_layers_per_virtual_pipeline_stage": per_virtual_stage,
        }
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(
    case: str, server: Server, corpus: Corpus, ids: torch.Tensor, tmp_path: Path
) -> None:
    name, processes, sizes = CASES[case]
    config = model_of(name, corpus, tied="untied" not in case)
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    mcore = convert(hf, tmp_path / "mcore", *target_flags(**sizes))
    check(
        server, corpus, config, hf, ids, tmp_path / "run", processes,
        load=mcore, finetune=True, **layout(**sizes), sequence_parallel=sizes.get("tp", 1) > 1,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["minimind3", "minimind2_moe"])
def test_torch_dist_is_what_megatron_core_loads(
    name: str, server: Server, corpus: Corpus, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = model_of(name, corpus, tied=name == "minimind3")
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    work = tmp_path / "mcore"
    flags = ["--load-dir", hf, "--save-dir", work, "--save-model-type", "mg", "--ckpt-format", "torch_dist"]
    # in a process of its own: megatron-core's groups are global
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, ROOT / "convert_ckpt_v2.py", *flags], check=True, env=environment)
    check(
        server, corpus, config, hf, ids, tmp_path / "run", 2,
        load=work, finetune=True, ckpt_format="torch_dist", **layout(pp=2),
    )  # fmt: skip


def test_training_starts_from_hugging_face_weights(
    server: Server, corpus: Corpus, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = model_of("minimind3", corpus)
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    printed = check(
        server, corpus, config, hf, ids, tmp_path / "run", 2, load=hf, train_iters=2, **layout(tp=2), bf16=False
    )
    assert "loaded weights of" in printed and "finished at iteration 2 of 2" in printed
    wrong = corpus.flags(config.replace(ffn_hidden_size=96), load=hf)
    run = server.run(wrong, tmp_path / "wrong", check=False)
    assert run.codes == [1] and "ffn_hidden_size is 48 there and 96 on the command line" in run.output


def test_a_checkpoint_of_another_layout_is_resharded_on_request(
    server: Server, corpus: Corpus, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = model_of("minimind3_moe", corpus)
    trained, flags = tmp_path / "trained", {"save": tmp_path / "trained", "save_interval": 3, "ckpt_format": "torch"}
    server.run(
        corpus.flags(config, train_iters=5, exit_interval=3, seq_length=16, **flags, **layout(ep=2)),
        tmp_path / "first",
        2,
    )
    hf = convert(trained, tmp_path / "hf", "--load-model-type", "mg", to="hf")
    assert read_hf(hf).keys() == state_dict(config, "hf").keys()

    argv = corpus.flags(config, load=trained, sequence_parallel=True, **layout(tp=2))
    refused = server.run(argv, tmp_path / "refused", 2, check=False)
    assert set(refused.codes) != {0} and "give --reshard to load its weights into this" in refused.output
    printed = check(
        server, corpus, config, hf, ids, tmp_path / "resharded", 4,
        load=trained, reshard=True, train_iters=5, **layout(tp=2, pp=2), sequence_parallel=True,
    )  # fmt: skip
    assert "the optimizer starts from zero" in printed and "finished at iteration 5 of 5" in printed
    rows = [json.loads(line) for line in (tmp_path / "resharded" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "lm_loss" in row] == [4, 5]
