"""A run that stopped and went on is the run that never stopped; in another layout, nearly so."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import ROOT, TRACKER, Corpus, Server, as_flags, facts, layout, load, same, worst_difference

from minimind_mcore.models.presets import PRESETS

DIST: dict[str, Any] = {"ckpt_format": "torch_dist"}
TORCH: dict[str, Any] = {"ckpt_format": "torch"}
DROPOUT: dict[str, Any] = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
EVALUATION: dict[str, Any] = {"split": "80,20,0", "eval_iters": 2, "eval_interval": 4}
SHARDED: dict[str, Any] = {"use_distributed_optimizer": True}
MINIMIND: dict[str, Any] = {"lr_at_iteration_end": True, "decay_all": True}

# name: processes, model, flags
SAME: dict[str, tuple[int, str, dict[str, Any]]] = {
    "torch TP2 SP, dropout": (
        2,
        "minimind3_tiny",
        layout(tp=2, sequence_parallel=True, **TORCH, **DROPOUT, **MINIMIND),
    ),
    "torch DP2 distributed optimizer bf16": (2, "minimind3_tiny", layout(**SHARDED, bf16=True, **TORCH)),
    "torch DP2 distributed optimizer fp32": (2, "minimind2_tiny", layout(**SHARDED, **TORCH, **EVALUATION)),
    "torch PP2 VPP2 fp16": (
        2,
        "minimind3_tiny",
        layout(pp=2, per_virtual_stage=1, fp16=True, initial_loss_scale=1024, loss_scale_window=4, **TORCH),
    ),
    "torch EP2": (2, "minimind3_moe_tiny", layout(ep=2, **TORCH)),
    "torch EP2 distributed optimizer": (2, "minimind2_moe_tiny", layout(ep=2, **SHARDED, **TORCH)),
    "torch_dist TP2, dropout": (2, "minimind3_tiny", layout(tp=2, **DIST, **DROPOUT, **EVALUATION, **MINIMIND)),
    "torch_dist DP2 distributed optimizer bf16": (2, "minimind3_tiny", layout(**SHARDED, bf16=True, **DIST)),
}
OLD_CORE = ("torch TP2 SP, dropout", "torch DP2 distributed optimizer bf16", "torch EP2 distributed optimizer")


def check_resumed(server: Server, corpus: Corpus, folder: Path, name: str) -> None:
    """Train straight, saving half-way and at the end; go on from half-way elsewhere; compare all of it."""
    processes, model, flags = SAME[name]
    steps = 20 if "dropout" in name else 12
    argv = corpus.flags(PRESETS[model], **{"train_iters": steps, **flags})
    straight = server.run(
        [*argv, *as_flags({"save": folder / "a", "save_interval": steps // 2})], folder / "one", processes
    )
    (folder / "a" / TRACKER).write_text(str(steps // 2))
    resumed = server.run([*argv, *as_flags({"load": folder / "a", "save": folder / "b"})], folder / "two", processes)
    second_half = [row for row in facts(straight) if row["iteration"] > steps // 2]
    assert len(second_half) >= steps // 2 and facts(resumed) == second_half
    last = f"iter_{steps:07d}"
    files = sorted(p.relative_to(folder / "a" / last) for p in (folder / "a" / last).rglob("*.pt"))
    assert files
    for file in files:
        assert same(load(folder / "a" / last / file), load(folder / "b" / last / file)), file


@pytest.mark.parametrize("name", SAME)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    server: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    check_resumed(server, corpus, tmp_path, name)


@pytest.mark.parametrize("name", OLD_CORE)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit_on_core_012(
    server_012: Server, corpus: Corpus, tmp_path: Path, name: str
) -> None:
    check_resumed(server_012, corpus, tmp_path, name)


OTHER: dict[str, tuple[str, dict[str, Any], list[tuple[int, dict[str, Any]]]]] = {
    "from TP2": (
        "minimind3_tiny",
        layout(tp=2),
        [(2, layout(pp=2)), (1, layout()), (2, layout(pp=2, per_virtual_stage=1))],
    ),
    "from DP2 distributed optimizer": (
        "minimind3_tiny",
        layout(**SHARDED),
        [(2, layout(tp=2, sequence_parallel=True, **SHARDED)), (1, layout(**SHARDED))],
    ),
    "from EP2": ("minimind3_moe_tiny", layout(ep=2), [(1, layout()), (2, layout(pp=2))]),
    "from PP2 experts bf16": ("minimind3_moe_tiny", layout(pp=2, bf16=True), [(2, layout(ep=2, bf16=True))]),
    "from EP2 distributed optimizer": (
        "minimind2_moe_tiny",
        layout(ep=2, **SHARDED),
        [(1, layout(**SHARDED)), (2, layout(tp=2, sequence_parallel=True, **SHARDED))],
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_torch_dist_goes_on_in_another_layout(server: Server, corpus: Corpus, tmp_path: Path, name: str) -> None:
    model, saved_in, others = OTHER[name]
    argv = corpus.flags(PRESETS[model], train_iters=16, **DIST, save=tmp_path / "saved", save_interval=8)
    straight = server.run([*argv, *as_flags(saved_in)], tmp_path / "straight", 2)
    (tmp_path / "saved" / TRACKER).write_text("8")
    argv = corpus.flags(PRESETS[model], train_iters=16, **DIST, load=tmp_path / "saved")
    for processes, flags in others:
        folder = tmp_path / f"resumed{len(list(tmp_path.iterdir()))}"
        resumed = server.run([*argv, *as_flags(flags)], folder, processes)
        assert [row["iteration"] for row in resumed.rows] == list(range(9, 17))
        difference = worst_difference(resumed.column(), straight.column()[8:])
        print("largest relative difference of losses:", difference)
        assert difference <= (1e-3 if saved_in.get("bf16") else 1e-5)


def test_torch_files_are_those_of_mindspeed_llm(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    argv = corpus.flags(PRESETS["minimind3_tiny"], train_iters=2, **TORCH, save=tmp_path / "tp")
    server.run([*argv, *as_flags(layout(tp=2, bf16=True))], tmp_path / "run", 2)
    assert (tmp_path / "tp" / "latest_checkpointed_iteration.txt").read_text() == "2"
    folder = tmp_path / "tp" / "iter_0000002"
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "mp_rank_00", "mp_rank_01"]
    assert [p.name for p in (folder / "mp_rank_01").iterdir()] == ["model_optim_rng.pt"]
    state = load(folder / "mp_rank_01" / "model_optim_rng.pt")
    assert isinstance(state["args"], argparse.Namespace)
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 2)
    assert state["args"].tensor_model_parallel_size == 2 and state["args"].consumed_train_samples == 16
    assert {"model", "optimizer", "opt_param_scheduler", "rng_state"} <= state.keys()
    weights = {name: tensor for name, tensor in state["model"].items() if tensor is not None}
    assert weights["embedding.word_embeddings.weight"].shape == (256, 128)
    assert weights["decoder.layers.3.self_attention.linear_qkv.weight"].shape == (128, 128)
    assert weights["decoder.layers.0.mlp.linear_fc1.weight"].shape == (448, 128)
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    optimizer = state["optimizer"]
    assert optimizer.keys() == {"optimizer", "fp32_from_fp16_params"}
    assert all(group["step"] == 2 for group in optimizer["optimizer"]["param_groups"])
    assert all(entry.keys() == {"exp_avg", "exp_avg_sq"} for entry in optimizer["optimizer"]["state"].values())
    assert [entry.keys() for entry in state["rng_state"]] == [
        {"random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state", "rng_tracker_states"}
    ]


@pytest.mark.parametrize("form", [TORCH, DIST], ids=["torch", "torch_dist"])
def test_every_file_of_a_checkpoint_is_on_the_page_of_files(
    server: Server, corpus: Corpus, tmp_path: Path, form: dict[str, Any]
) -> None:
    argv = corpus.flags(PRESETS["minimind3_tiny"], train_iters=1, **SHARDED, **form, save=tmp_path / "saved")
    server.run(argv, tmp_path / "run")
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    names = {re.sub(r"^__\d+_\d+\.", "__0_0.", path.name) for path in files}
    assert names > ({"distrib_optim.pt"} if form is TORCH else {"common.pt", ".metadata"})
    for page in ("files.md", "files_zh.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert names <= set(re.findall(r"`(?:[\w/]+/)?([\w.]+)`", text)), page


def test_torch_files_of_stages_and_experts(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    argv = corpus.flags(PRESETS["minimind3_moe_tiny"], train_iters=1, **TORCH, save=tmp_path / "c")
    server.run([*argv, *as_flags(layout(pp=2, ep=2, **SHARDED))], tmp_path / "run", 4)
    folder = tmp_path / "c" / "iter_0000001"
    names = ["mp_rank_00_000_000", "mp_rank_00_000_001", "mp_rank_00_001_000", "mp_rank_00_001_001"]
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == names
    for name in names:
        assert (folder / name / "model_optim_rng.pt").is_file()
    assert (folder / names[0] / "distrib_optim.pt").is_file()
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(listed) == {str(p.relative_to(folder)) for p in folder.rglob("*.pt")}


def test_what_does_not_fit_a_checkpoint_is_refused_by_name(server: Server, corpus: Corpus, tmp_path: Path) -> None:
    config, other = PRESETS["minimind3_tiny"], tmp_path / "other_tokenizer"
    words = (corpus.tokenizer / "tokenizer.json").read_text(encoding="utf-8")
    other.mkdir()
    swapped = words.replace('"!": 36', '"!": X').replace('"\\"": 37', '"\\"": 36').replace('"!": X', '"!": 37')
    assert swapped != words
    (other / "tokenizer.json").write_text(swapped, encoding="utf-8")
    (other / "tokenizer_config.json").write_bytes((corpus.tokenizer / "tokenizer_config.json").read_bytes())
    for form in ("torch", "torch_dist"):
        saved = tmp_path / form
        server.run(corpus.flags(config, train_iters=1, ckpt_format=form, save=saved), tmp_path / "run")
        cases: list[tuple[int, Any, dict[str, Any], list[str]]] = [
            (1, config.replace(ffn_hidden_size=384), {}, ["ffn_hidden_size is 448 there and 384"]),
            (1, config, {"tokenizer_name_or_path": other}, ["trained with another tokenizer"]),
        ]
        if form == "torch":
            cases.append((2, config, layout(tp=2), ["no mp_rank_01", "--ckpt-format torch_dist"]))
            cases.append((2, config, layout(pp=2), ["no mp_rank_00_000", "it has mp_rank_00"]))
        else:
            cases.append((1, config, SHARDED, ["saved without --use-distributed-optimizer"]))
        for processes, model, changes, messages in cases:
            argv = corpus.flags(model, **{"train_iters": 2, "load": saved, **changes})
            run = server.run(argv, tmp_path / "refused", processes, check=False)
            assert 0 not in run.codes and "Traceback" not in run.output, run.output
            for message in messages:
                assert message in run.output, run.output


@pytest.mark.parametrize("form", [TORCH, DIST], ids=["torch", "torch_dist"])
def test_a_dry_run_compares_the_checkpoint_with_the_command_line(
    server: Server, corpus: Corpus, tmp_path: Path, form: dict[str, Any]
) -> None:
    def flags(model: str = "minimind3_tiny", **changes: Any) -> list[str]:
        return corpus.flags(PRESETS[model], **{"train_iters": 2, **form, **changes})

    server.run(flags(save=tmp_path / "saved", save_interval=2), tmp_path / "one")
    dry = {"load": tmp_path / "saved", "dry_run": True}

    def show(*argv: str, processes: int = 1) -> tuple[int, str]:
        run = server.run(argv, tmp_path / "dry", processes, check=False)
        return run.codes[0], run.output

    code, output = show(*flags(**dry))
    assert code == 0 and f"load:       {tmp_path}/saved/iter_0000002" in output
    code, output = show(*flags("minimind2_tiny", **dry))
    assert code == 1 and "num_attention_heads is 4 there and 8 on the command line" in output
    code, output = show(*flags(**dry, **layout(tp=2)), processes=2)
    if form is TORCH:
        assert code == 1 and "the layout TP=1 PP=1 EP=1, and the run has TP=2 PP=1 EP=1; give --reshard" in output
        code, output = show(*flags(**dry, **layout(tp=2), reshard=True), processes=2)
    assert code == 0
