"""What the tensors of a `.pth` file do not determine is printed, and a config or flags replace it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.weights_on_disk import SMALL, state_dict, write_hf

from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.converters.main import main_v2
from minimind_mcore.errors import UserError
from minimind_mcore.inference import flags
from minimind_mcore.inference.loading import opened
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.hf_config import to_native_config

ASSUMED = {
    "minimind3": {
        "norm_eps": "1e-06",
        "rope_theta": "1000000",
        "max_position_embeddings": "32768",
        "inference_rope_scaling": "False",
    },
    "minimind2": {
        "num_heads": "8",
        "norm_eps": "1e-05",
        "rope_theta": "1000000",
        "max_position_embeddings": "32768",
        "inference_rope_scaling": "False",
    },
}
ASSUMED["minimind3_moe"] = ASSUMED["minimind3"] | {
    "topk": "1", "norm_topk_prob": "True", "load_balancing": "aux_loss", "aux_loss_coeff": "0.0005"
}  # fmt: skip
ASSUMED["minimind2_moe"] = ASSUMED["minimind2"] | {
    "topk": "2", "norm_topk_prob": "True", "load_balancing": "seq_aux_loss", "aux_loss_coeff": "0.01"
}  # fmt: skip


def pth(folder: Path, config: ModelConfig) -> Path:
    file = folder / "full_sft_32.pth"
    torch.save(state_dict(config, "native"), file)
    return file


def config_dir(folder: Path, config: ModelConfig) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_native_config(config)), encoding="utf-8")
    return folder


def convert(load: Path, save: Path, *words: str, to: str = "hf") -> ModelConfig:
    main_v2(["--load-dir", str(load), "--save-dir", str(save), "--save-model-type", to, *words])
    return open_source(save).config


def printed(out: str) -> dict[str, str]:
    """The assumptions that a program named, by field."""
    lines = [line.removeprefix("note").split() for line in out.splitlines() if " = " in line and "replace it" in line]
    return {words[0]: words[2] for words in lines}


@pytest.mark.parametrize("name", ASSUMED)
def test_every_value_that_the_tensors_do_not_determine_is_printed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(pth(tmp_path, SMALL[name]), tmp_path / "hf")
    assert printed(capsys.readouterr().out).items() >= ASSUMED[name].items()
    convert(tmp_path / "hf", tmp_path / "mg", to="mg")  # a directory says them all
    assert "assumed" not in capsys.readouterr().out


def test_generation_prints_them_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], published_tokenizer: Path
) -> None:
    config = SMALL["minimind2"].replace(vocab_size=6400)
    words = ["--load", str(pth(tmp_path, config)), "--tokenizer-name-or-path", str(published_tokenizer)]
    args = flags.parse([*words, "--norm-epsilon", "1e-6"], "inference.py", frozenset())
    source, _ = opened(args)
    assert source.config.norm_eps == 1e-6
    found = printed(capsys.readouterr().err)
    assert found["num_heads"] == "8" and "norm_eps" not in found


def test_a_flag_that_replaces_an_assumption_is_not_called_without_effect(tmp_path: Path) -> None:
    words = "--norm-topk-prob --max-position-embeddings 64 --tensor-model-parallel-size 2".split()
    config = SMALL["minimind3_moe"]
    for load, ignored in ((pth(tmp_path, config), words[-2:-1]), (tmp_path, [words[0], words[1], words[3]])):
        args = flags.parse(["--load", str(load), *words], "inference.py", frozenset())
        assert args.no_effect == ignored


def test_flags_replace_what_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = SMALL["minimind2_moe"].moe
    assert moe is not None
    config = SMALL["minimind2_moe"].replace(
        num_heads=4, num_kv_heads=1, head_dim=8, norm_eps=1e-6, rope_theta=10_000, max_position_embeddings=4096,
        inference_rope_scaling=True,
        moe=dataclasses.replace(moe, topk=1, aux_loss_coeff=0.1, router_weight="normalized"),
    )  # fmt: skip
    words = "--num-attention-heads 4 --norm-epsilon 1e-6 --rotary-base 10000 --max-position-embeddings 4096".split()
    words += "--inference-rope-scaling --moe-router-topk 1 --moe-aux-loss-coeff 0.1".split()
    found = convert(pth(tmp_path, config), tmp_path / "native", *words, "--format", "minimind")
    assert found == config
    left = printed(capsys.readouterr().out)
    assert {"norm_topk_prob", "load_balancing"} <= left.keys()
    assert not left.keys() & {"num_heads", "norm_eps", "rope_theta", "topk", "aux_loss_coeff", "inference_rope_scaling"}


def test_a_config_replaces_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = SMALL["minimind2"].replace(num_heads=4, num_kv_heads=1, head_dim=8, rope_theta=500_000, norm_eps=2e-5)
    file = pth(tmp_path, config)
    assert convert(file, tmp_path / "hf", "--hf-cfg-dir", str(config_dir(tmp_path / "cfg", config))) == config
    assert "assumed" not in capsys.readouterr().out


CONTRADICTIONS = {
    "layers": ("minimind3", {"num_layers": 3}, "num_layers is 4 in the tensors and 3 in the config"),
    "head size": ("minimind3", {"head_dim": 4, "num_heads": 16, "num_kv_heads": 4}, "head_dim .* is 8 .* and 4 in the"),
    "heads": ("minimind2", {"num_heads": 4}, "num_heads x head_dim is 32 in the tensors and 16 in the config"),
    "norms": ("minimind2", {"qk_layernorm": True}, "norms of queries and keys is None in the tensors"),
    "experts": ("minimind3_moe", {"moe": None}, "num_experts is 4 in the tensors and 0 in the config"),
    "tied": ("minimind3", {"tie_embeddings": True}, "tie_embeddings|tied is False in the tensors and True"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_config_of_another_model_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, says = CONTRADICTIONS[case]
    config = SMALL[name].replace(tie_embeddings=case != "tied")
    given = config_dir(tmp_path / "cfg", config.replace(**changes))
    with pytest.raises(UserError, match=f"contradicts the given config.*({says})"):
        convert(pth(tmp_path, config), tmp_path / "hf", "--hf-cfg-dir", str(given))
    assert not (tmp_path / "hf").exists()


def test_a_config_and_a_flag_that_differ_are_refused(tmp_path: Path) -> None:
    config = SMALL["minimind2"]
    given = config_dir(tmp_path / "cfg", config)
    with pytest.raises(UserError, match=r"--norm-epsilon 0\.001: the model has 1e-05"):
        convert(pth(tmp_path, config), tmp_path / "hf", "--hf-cfg-dir", str(given), "--norm-epsilon", "1e-3")
    with pytest.raises(UserError, match="--moe-router-topk 2: the model has None"):
        convert(pth(tmp_path, config), tmp_path / "hf", "--moe-router-topk", "2")


def test_directories_and_checkpoints_are_compared_with_configs_and_flags(tmp_path: Path) -> None:
    config = SMALL["minimind3"]
    hf = write_hf(tmp_path / "hf", config, state_dict(config, "hf"))
    mg = tmp_path / "mg"
    main_v2(["--load-dir", str(hf), "--save-dir", str(mg), "--save-model-type", "mg"])
    other = config_dir(tmp_path / "other", config.replace(norm_eps=1e-5, inference_rope_scaling=True))
    for load in (hf, mg):
        with pytest.raises(UserError, match="--rotary-base 10000: the model has 1000000"):
            convert(load, tmp_path / "out", "--rotary-base", "10000")
    with pytest.raises(
        UserError, match=r"norm_eps is 1e-06 there and 1e-05 in --hf-cfg-dir; .*inference_rope_scaling is"
    ):
        convert(hf, tmp_path / "out", "--hf-cfg-dir", str(other), to="mg")
    with pytest.raises(UserError, match="norm_epsilon is 1e-06 in the checkpoint and 1e-05 in the given config"):
        convert(mg, tmp_path / "out", "--hf-cfg-dir", str(other))
    assert not (tmp_path / "out").exists()
