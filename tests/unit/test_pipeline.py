"""The pipeline's order of stages, its records, and its dry run on an empty machine; no stage trains here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import minimind_mcore
from minimind_mcore.cli import dispatch
from minimind_mcore.cli.settings import CLI
from minimind_mcore.errors import UserError
from minimind_mcore.models.recipes import RECIPES
from minimind_mcore.paths import CHECKOUT
from minimind_mcore.pipeline import docker, download, main, report, serving, stages
from minimind_mcore.pipeline.job import Command, Job, Records, digest
from minimind_mcore.pipeline.stages import STAGES, TRAININGS, Run, expand
from minimind_mcore.platform import device
from minimind_mcore.storage import set_aside


def settings(*words: str) -> argparse.Namespace:
    return main.parse(words)


@pytest.fixture(autouse=True)
def _paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "out"))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("TOKENIZER_PATH", raising=False)
    monkeypatch.setenv("DEVICE", "cpu")


PRESETS = {
    "core": "download build pretrain full_sft eval",
    "all": "download build pretrain full_sft dpo reason eval",
    "rl": "ppo grpo spo",
    "serve": "convert vllm web",
    "zero": "download tokenizer pretrain full_sft eval",
}


@pytest.mark.parametrize(("preset", "stages"), PRESETS.items())
def test_presets_expand_to_minimind_ascends_stages(preset: str, stages: str) -> None:
    assert expand([preset]) == stages.split()


def test_stages_of_several_words_are_run_once() -> None:
    assert expand(["core", "all", "serve"]) == (
        "download build pretrain full_sft eval dpo reason convert vllm web".split()
    )


@pytest.mark.parametrize(
    ("words", "stages"),
    [
        (["all", "--from", "dpo"], "dpo reason eval"),
        (["all", "--from", "full_sft", "--until", "dpo"], "full_sft dpo"),
        (["--only", "lora"], "lora"),
        (["all", "serve", "--only", "eval"], "eval"),
        (["--sample", "pretrain"], "download pretrain"),
    ],
)
def test_from_until_and_only_choose_stages(words: list[str], stages: str) -> None:
    assert main.chosen(settings(*words)) == stages.split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no stage was given"),
        (["pretrian"], "did you mean pretrain"),
        (["core", "--from", "dpo"], "--from dpo: this stage is not among"),
        (["all", "--from", "eval", "--until", "pretrain"], "nothing is left"),
    ],
)
def test_wrong_stages_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main.chosen(settings(*words))


def run_of(*words: str) -> Run:
    return main.make_run(settings(*words))


def test_old_file_names_work_where_the_files_exist(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("pretrain_hq", "sft_mini_512", "r1_mix_1024", "rlaif-mini"):
        (data / f"{name}.jsonl").write_text("{}\n")
    run = run_of("all", "--data", f"rl={data}/rlaif-mini.jsonl")
    files = {stage: run.data_file(stage).stem for stage in ("pretrain", "full_sft", "reason", "grpo", "tokenizer")}
    assert files == {
        "pretrain": "pretrain_hq", "full_sft": "sft_mini_512", "reason": "r1_mix_1024", "grpo": "rlaif-mini",
        "tokenizer": "pretrain_hq",
    }  # fmt: skip
    (data / "pretrain_t2t_mini.jsonl").write_text("{}\n")
    assert run.data_file("pretrain").stem == "pretrain_t2t_mini"


def test_a_withdrawn_file_names_its_replacement(tmp_path: Path) -> None:
    run = run_of("pretrain", "--data", f"pretrain={tmp_path}/pretrain_hq.jsonl")
    with pytest.raises(
        UserError, match="does not exist: upstream withdrew pretrain_hq; its replacement is pretrain_t2t"
    ):
        run.data_file("pretrain")


def test_minimind3_has_no_reasoning_stage_of_its_own(tmp_path: Path) -> None:
    without = "download build pretrain full_sft dpo eval".split()
    assert list(run_of("all").stages) == without
    assert "reason" in run_of("--model", "minimind2", "all").stages
    assert "reason" in run_of("--sample", "all").stages
    assert "reason" in run_of("all", "reason").stages and run_of("all", "--only", "reason").stages == ("reason",)
    (tmp_path / "thoughts.jsonl").write_text("{}")
    assert "reason" in run_of("all", "--data", f"reason={tmp_path}/thoughts.jsonl").stages


def rl_words(run: Run, stage: str) -> tuple[dict[str, str], list[str]]:
    """The settings and the overrides of the last command of a stage."""
    command = STAGES[stage](run)[-1].commands[-1]
    return dict(command.settings), list(command.words)


def test_training_settings_reach_reinforcement_learning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"LR": "8e-8", "MBS": "2", "GBS": "16", "TP": "2", "SEED": "7", "BACKEND": "native", "EPOCHS": "3"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings_of, words = rl_words(run_of("full_sft", "ppo", "--reward-model", "rewards"), "ppo")
    assert settings_of["BACKEND"] == "embedded"
    expected = [
        "actor_config.lr=8e-08", "actor_config.min_lr=8e-09", "megatron_training.global_batch_size=16",
        "megatron_training.seed=7",
        *(f"{role}_config.{key}=2" for role in ("actor", "critic")
          for key in ("micro_batch_size", "tensor_model_parallel_size")),
    ]  # fmt: skip
    assert set(expected) < set(words)
    monkeypatch.setattr(main, "wait_for", lambda *words: 0)
    main.main(["--sample", "pretrain", "full_sft", "grpo", "--dry-run"])
    assert "ignored by grpo: EPOCHS; set values in configs/rlxf" in caplog.text
    monkeypatch.setenv("LR", "fast")
    with pytest.raises(UserError, match="LR=fast: expected a number"):
        rl_words(run_of("full_sft", "grpo", "--reward-model", "rewards"), "grpo")


def test_sample_reinforcement_learning_begins_with_the_model_of_the_run(tmp_path: Path) -> None:
    run = replace(
        run_of("--sample", "pretrain", "full_sft", "grpo", "ppo"), output=tmp_path / "out", data=tmp_path / "data"
    )
    tuning, learning = STAGES["ppo"](run)
    assert tuning == STAGES["grpo"](run)[0] and tuning.begins == learning.begins == ("full_sft",)
    assert tuning.commands[1].settings["CKPT_LOAD_DIR"] == str(tmp_path / "out/full_sft/checkpoints")
    _, words = rl_words(run, "ppo")
    assert {f"{role}_config.load={tmp_path}/out/math_sft/checkpoints" for role in ("actor", "critic")} < set(words)
    [alone] = STAGES["grpo"](replace(run, stages=("grpo",)))
    assert not alone.begins and not any("config.load=" in word for word in alone.commands[0].words)
    places = [word.partition("=")[2] for word in words if "=/" in word]
    assert len(places) >= 6 and all(place.startswith(str(tmp_path)) for place in places)


@pytest.mark.parametrize("preset", ["zero", "core", "all"])
def test_presets_with_a_download_are_valid_on_an_empty_machine(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "wait_for", lambda *words: 0)  # the dry runs of the commands have tests of their own
    monkeypatch.setattr(download, "choose", lambda hub: "hf")
    assert dispatch(["run", "--dry-run", preset]) == 0


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The directory of the data files, with data for pretraining and a tokenizer that nobody has published."""
    data = tmp_path / "data"
    (data / "tokenizer").mkdir(parents=True)
    for name in ("pretrain_t2t_mini.jsonl", "tokenizer/tokenizer.json"):
        (data / name).write_text("{}")
    return data


@pytest.mark.parametrize("given", ["", "mindspeed-llm"])
def test_trainings_are_native_on_every_device_unless_the_user_chooses_another_backend(
    given: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ascend = device.Device("npu", "Ascend910B", 8, 64 << 30)
    monkeypatch.setattr(device, "current", lambda: ascend)
    monkeypatch.setenv("BACKEND", given)
    (files / "sft_t2t_mini.jsonl").write_text("{}")
    (files / "r1_mix_1024.jsonl").write_text("{}")
    asked: list[tuple[str, str]] = []

    def wait_for(command: list[str], settings: dict[str, str]) -> int:
        asked.append((command[3], settings["BACKEND"]))
        return 0

    monkeypatch.setattr(main, "wait_for", wait_for)
    assert dispatch(["run", "--dry-run", "--model", "minimind2", "pretrain", "full_sft", "reason"]) == 0
    assert asked == [(name, given or "native") for name in ("pretrain", "sft", "reason")]


def test_records_without_a_backend_are_those_of_native_trainings(files: Path) -> None:
    run = run_of("pretrain")
    [job] = STAGES["pretrain"](run)
    record = run.records.expected(job)
    assert "BACKEND=native " in record["commands"][0]
    older = record | {"commands": [text.replace("BACKEND=native ", "") for text in record["commands"]]}
    run.records.write("pretrain", older)  # type: ignore[arg-type]
    assert run.records.agrees(job, record)


@pytest.mark.parametrize(
    ("there", "model", "expected", "words"),
    [
        ("v3", "minimind2", "tokenizer-minimind2", ("minimind2", "--output")),
        ("v2", "minimind3", "tokenizer-minimind-3", ("minimind-3", "--output")),
        ("v3", "minimind3", "tokenizer", ()),
        ("v2", "minimind2", "tokenizer", ()),
        ("", "minimind2", "tokenizer", ("minimind2",)),
        ("own", "minimind2", "tokenizer", ()),
        ("own", "minimind3", "tokenizer", ()),
    ],
)
def test_the_published_tokenizer_of_another_generation_is_not_used(
    there: str, model: str, expected: str, words: tuple[str, ...], files: Path
) -> None:
    file = files / "tokenizer/tokenizer.json"
    file.unlink()
    if there == "own":
        file.write_text("{}")
    elif there:
        folder = os.environ.get("MINIMIND_TOKENIZER_DIR") or pytest.skip("MINIMIND_TOKENIZER_DIR is not set")
        shutil.copy(Path(folder, there, "tokenizer.json"), file)
    run = run_of("--model", model, "download", "pretrain")
    assert run.tokenizer_dir() == files / expected
    [training] = STAGES["pretrain"](run)
    assert training.commands[0].settings["TOKENIZER_PATH"] == str(files / expected)
    jobs = STAGES["download"](run)
    found = [command.words for job in jobs for command in job.commands if command.words[1] == "tokenizer"]
    place = (str(files / expected),) if words[1:] else ()
    assert found == ([("download", "tokenizer", *words, *place)] if words else [])


@pytest.mark.parametrize("content", ["", "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"])
@pytest.mark.parametrize(
    ("file", "advice"),
    [("pretrain_t2t_mini.jsonl", "--data pretrain=FILE"), ("tokenizer/tokenizer.json", "TOKENIZER_PATH")],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_file_without_its_content_is_refused(
    dry: list[str], file: str, advice: str, content: str, files: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (files / file).write_text(content)
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    assert dispatch(["run", *dry, "download", "pretrain"]) == 1
    error = capfd.readouterr().err
    assert ("Git LFS pointer" if content else "an empty file") in error
    assert str(files / file) in error and "Delete the file" in error and advice in error


def test_a_given_file_without_its_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("")
    run = run_of("pretrain", "--data", f"pretrain={tmp_path}/x.jsonl")
    with pytest.raises(UserError, match=r"x\.jsonl: found an empty file"):
        run.data_file("pretrain")


def test_zero_uses_the_mini_files(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (files / "pretrain_t2t_mini.jsonl").rename(files / "pretrain_t2t.jsonl")
    (files / "sft_t2t.jsonl").write_text("{}")

    def read(*words: str) -> list[str]:
        run = run_of(*words)
        return [run.data_file(stage).stem for stage in ("tokenizer", "pretrain", "full_sft")]

    mini = ["pretrain_t2t_mini", "pretrain_t2t_mini", "sft_t2t_mini"]
    assert read("zero") == read("zero", "--from", "pretrain") == mini
    assert read("core") == ["pretrain_t2t", "pretrain_t2t", "sft_t2t"]
    assert read("zero", "--data", f"pretrain={files}/pretrain_t2t.jsonl") == ["pretrain_t2t", "pretrain_t2t", mini[2]]
    args = settings("zero")
    again = main.repeat_command(main.make_run(args), args, "pretrain")
    assert read(*again.split("run_all.sh ")[1].split()) == mini


def test_the_chosen_data_file_is_logged(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "wait_for", lambda *words: 0)
    assert dispatch(["run", "--dry-run", "pretrain"]) == 0
    assert f"data: {files}/pretrain_t2t_mini.jsonl" in capfd.readouterr().out


def test_data_that_cannot_be_downloaded_names_the_flag(capfd: pytest.CaptureFixture[str]) -> None:
    for stage, hint in {"reason": "its replacement is sft_t2t_mini", "toolcall": "minimind-mcore tool-data"}.items():
        assert dispatch(["run", "--dry-run", "--model", "minimind2", "download", stage]) == 1
        error = capfd.readouterr().err
        assert hint in error and f"--data {stage}=FILE" in error


def test_a_download_whose_files_are_gone_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got = []

    def download(command: list[str], settings: dict[str, str]) -> int:
        kind, name = command[-2:]
        got.append(name)
        files = [f"{name}.jsonl"] if kind == "data" else ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
        for file in files:
            (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / file).write_text(name)
        return 0

    monkeypatch.setattr(main, "wait_for", download)
    for _ in range(2):
        assert dispatch(["run", "download"]) == 0
        assert (tmp_path / "data/pretrain_t2t_mini.jsonl").exists()
        shutil.rmtree(tmp_path / "data")
    assert got == ["pretrain_t2t_mini", "sft_t2t_mini", "minimind-3"] * 2


def test_reasoning_begins_with_dpo_if_there_is_one() -> None:
    assert run_of("all").begin(("dpo", "full_sft")) == ("dpo",)
    assert run_of("full_sft", "reason").begin(("dpo", "full_sft")) == ("full_sft",)


def job_of(folder: Path, text: Path, *words: str) -> Job:
    return Job(
        name="stage", commands=(Command(words),), inputs={"text": text}, folder=folder, outputs=(folder / "made",)
    )


def test_a_record_agrees_by_content_and_not_by_time(tmp_path: Path) -> None:
    text, folder = tmp_path / "text", tmp_path / "folder"
    text.write_text("a")
    folder.mkdir()
    (folder / "made").write_text("result")
    records = Records(tmp_path / "records", {"$OUTPUT": tmp_path})
    job = job_of(folder, text, "corpus")
    assert not records.is_done(job, records.expected(job))
    records.finish(job, records.expected(job))
    assert records.is_done(job, records.expected(job))
    text.write_text("a")  # another time, the same content
    digest.cache_clear()
    assert records.is_done(job, records.expected(job))
    other = job_of(folder, text, "corpus", "--seed", "7")
    assert not records.is_done(other, records.expected(other))
    (folder / "made").write_text("damaged")
    digest.cache_clear()
    assert not records.is_done(job, records.expected(job))
    (folder / "made").write_text("result")
    text.write_text("b")
    digest.cache_clear()
    assert not records.is_done(job, records.expected(job))


def test_a_moved_run_is_the_same_run(tmp_path: Path) -> None:
    before, after = (Records(tmp_path, {"$OUTPUT": tmp_path / name}) for name in ("a", "b"))
    jobs = [Job(name="x", commands=(Command(("convert", f"{tmp_path}/{name}/hf")),)) for name in ("a", "b")]
    assert before.expected(jobs[0]) == after.expected(jobs[1])


def test_folders_of_other_inputs_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    for number in (1, 2):
        folder.mkdir()
        (folder / "weights").write_text(str(number))
        assert set_aside(folder) == tmp_path / f"pretrain.{number}"
    assert (tmp_path / "pretrain.1/weights").read_text() == "1"


def test_a_stage_without_its_weights_says_what_to_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    for name in ("preferences.jsonl", "tokenizer/tokenizer.json"):
        (tmp_path / "data" / name).write_text("{}")
    run = run_of("--sample", "dpo")
    assert main.run_stage(run, "dpo", settings("--sample", "dpo")) == 1
    assert (
        "dpo begins with the weights of full_sft, which has not finished: run full_sft first" in capfd.readouterr().err
    )


def test_weights_that_a_finished_job_has_read_may_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    (tmp_path / "data/tokenizer/tokenizer.json").write_text("{}")
    run = run_of("eval")
    for name in ("pretrain", "eval-pretrain"):
        run.records.write(name, {"finished": True})
    [job] = STAGES["eval"](run)
    main.require_inputs(run, "eval", job)
    run.records.write("eval-pretrain", {"finished": False})
    with pytest.raises(UserError, match="eval-pretrain begins with the weights of pretrain"):
        main.require_inputs(run, "eval", job)


def test_the_first_failure_stops_and_names_the_command(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_ITERS", "3")
    (tmp_path / "data").mkdir()
    for name in ("pretrain_t2t_mini", "sft_t2t_mini"):
        (tmp_path / "data" / f"{name}.jsonl").write_text("not json\n")
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path / "no tokenizer"))
    assert dispatch(["run", "--model", "minimind3_tiny", "pretrain", "full_sft"]) == 1
    captured = capfd.readouterr()
    # No stage has run, so the command has all of them.
    assert "/run_all.sh pretrain full_sft --model minimind3_tiny" in captured.err and "TRAIN_ITERS=3" in captured.err
    assert "== pretrain" not in captured.out
    monkeypatch.setenv("TOKENIZER_PATH", "")
    (tmp_path / "data/tokenizer").mkdir()
    (tmp_path / "data/tokenizer/tokenizer.json").write_text("{}")
    monkeypatch.setattr(main, "wait_for", lambda *words: 1)
    assert dispatch(["run", "--model", "minimind3_tiny", "pretrain", "full_sft"]) == 1
    captured = capfd.readouterr()
    assert "/run_all.sh --only pretrain --model minimind3_tiny" in captured.err
    assert "== full_sft" not in captured.out
    assert dispatch(["run", "--dry-run", "--model", "minimind3_tiny", "pretrain", "full_sft"]) == 1
    assert "/run_all.sh pretrain full_sft --dry-run --model minimind3_tiny" in capfd.readouterr().err


def test_the_command_that_repeats_a_stage_works_in_any_directory_and_with_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the interpreter that shows what it gets."""
    python, home, there = tmp_path / "a python", tmp_path / "a home", tmp_path / "there"
    names = "OUTPUT_DIR TASK FORMAT HF_ENDPOINT"
    python.write_text(f'#!/bin/bash\nfor n in {names}; do echo "$n=${{!n}}"; done\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    home.mkdir()
    there.mkdir()
    monkeypatch.chdir(home)
    settings = {"OUTPUT_DIR": "out put", "TASK": "ceval cmmlu", "FORMAT": "hf", "HF_ENDPOINT": "http://a?b=1&c=2"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "wait_for", lambda *words: 7)
    (tmp_path / "data.jsonl").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path))
    assert dispatch(["run", "pretrain", "--data", f"pretrain={tmp_path}/data.jsonl"]) == 7
    command = capfd.readouterr().err.splitlines()[-1].replace(sys.executable, f"'{python}'")
    done = subprocess.run(["bash", "-c", command], cwd=there, capture_output=True, text=True, check=True)
    shown = done.stdout.splitlines()
    assert shown[:4] == [f"OUTPUT_DIR={home}/out put", *(f"{n}={settings[n]}" for n in names.split()[1:])]
    assert shown[4:9] == ["-m", "minimind_mcore.cli", "run", "--only", "pretrain"]
    assert f"pretrain={tmp_path}/data.jsonl" in shown


def test_the_command_that_repeats_a_stage_has_the_hosts_the_task_files_and_the_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "NODE_RANK": "1", "MASTER_ADDR": "192.168.1.10", "HOSTFILE": "hosts", "TASK": "ceval toolcall",
        "TASK_DATA_PATH": "exam minimind",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    args = settings("eval", "--dry-run")
    command = main.repeat_command(main.make_run(args), args, "eval").split()
    assert {"NODE_RANK=1", "MASTER_ADDR=192.168.1.10", f"HOSTFILE={tmp_path}/hosts", "--dry-run"} < set(command)
    assert f"TASK_DATA_PATH='{tmp_path}/exam minimind'" in " ".join(command)
    args = settings("eval")
    assert "--dry-run" not in main.repeat_command(main.make_run(args), args, "eval")
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    assert "TASK_DATA_PATH='exam minimind' " in main.repeat_command(main.make_run(args), args, "eval")


def test_built_in_cases_of_tool_calling_are_no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK", "toolcall perplexity")
    monkeypatch.setenv("TASK_DATA_PATH", "minimind held_out.jsonl")
    run = run_of("eval")
    assert run.task_data == ("minimind", os.path.abspath("held_out.jsonl"))
    job = STAGES["eval"](run)[0]
    assert [str(path) for name, path in job.inputs.items() if name.startswith("task data")] == [run.task_data[1]]
    with pytest.raises(UserError, match=r"TASK_DATA_PATH: .*held_out.jsonl does not exist"):
        docker.mounted(run)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "full_sft"], "sft_t2t_mini.jsonl, which does not exist and which no earlier stage"),
        (["pretrain", "dpo"], "dpo begins with the weights of full_sft, which has not finished"),
        (["pretrain", "vllm"], "run the stage convert first"),
        (["pretrain", "eval", "serve"], "convert begins with the weights of full_sft, which has not finished"),
        (["download", "pretrain", "full_sft", "distillation"], "--teacher is missing"),
        (["download", "pretrain", "full_sft", "rl"], "--reward-model is missing"),
        (["download", "pretrain", "--model", "minimind33"], "no model preset is called 'minimind33'"),
        (["download", "pretrain", "--model", "./config.json"], "config.json"),
    ],
)
def test_a_run_that_must_fail_starts_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    for name in ("pretrain_t2t_mini.jsonl", "tokenizer/tokenizer.json", "../config.json"):
        (tmp_path / "data" / name).write_text("{}")
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    try:
        status, problem = dispatch(["run", *words]), capfd.readouterr().err
    except UserError as error:
        status, problem = 1, str(error)
    assert status == 1 and message in problem


def test_options_may_stand_between_stages() -> None:
    args = settings("all", "--weight", "dpo", "serve", "--only", "vllm")
    assert args.stages == ["all", "serve"] and args.weight == "dpo" and args.only == "vllm"


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["vllm", "--port", "70000"], {}, "found '70000'"),
        (["vllm"], {"PORT": "web"}, "found 'web'"),
        (["--sample", "eval"], {"LEAST": "80%"}, "LEAST=80%: expected a number from 0 to 1"),
        (["pretrain", "--data", "pretrain="], {}, "expected KIND=FILE"),
        (["--sample", "all", "--model", "minimind2"], {}, "leave out --model"),
        (["--sample", "all", "--data", "dpo=x"], {}, "leave out --data"),
        (["pretrain"], {"OUTPUT_DIR": "file"}, "file: cannot be written"),
        (["download"], {"DATA_DIR": "file"}, "file: cannot be written"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_wrong_options_are_named_at_once(
    words: list[str], variables: dict[str, str], message: str, dry: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    try:
        status, problem = dispatch(["run", *dry, *words]), ""
    except UserError as error:
        status, problem = 1, str(error)
    except SystemExit as end:
        status, problem = int(end.code or 0), ""
    assert status in (1, 2) and message in problem + capfd.readouterr().err


@pytest.mark.parametrize(
    ("stages", "variables", "message"),
    [
        ("convert", {"FORMAT": "bogus"}, "FORMAT=bogus: expected hf or minimind"),
        ("convert", {"PAD_HEAD_DIM": "-3"}, "PAD_HEAD_DIM=-3: expected a whole number of 1 or more"),
        ("convert", {"PAD_HEAD_DIM": "32"}, "--pad-head-dim 32: the model's heads have size 96"),
        ("convert", {"PAD_HEAD_DIM": "128", "FORMAT": "minimind"}, "only FORMAT=hf can have padded heads"),
        ("convert vllm", {"ENGINE": "nonsense"}, "ENGINE=nonsense: expected auto, embedded or vllm"),
        ("convert vllm", {"ENGINE": "vllm"}, "ENGINE=vllm: vLLM is not installed"),
        ("convert vllm --weight lora", {"MERGE": "0"}, "MERGE=0 writes an adapter, which the stage vllm cannot serve"),
        ("convert --weight lora", {"MERGE": "no"}, "MERGE=no: expected 0 or 1"),
        ("eval", {"TASK": "cevall", "TASK_DATA_PATH": "."}, "TASK, TASK_DATA_PATH: --task cevall: expected ceval"),
        ("eval", {"TASK": "perplexity"}, "--task has 1 names, --task-data-path 0 paths"),
        ("eval", {"HARNESS": "hellaswag"}, "lm-evaluation-harness is not installed"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_wrong_settings_of_a_later_stage_are_refused_before_the_first_stage(
    stages: str, variables: dict[str, str], message: str, dry: list[str], files: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = importlib.util.find_spec
    missing = ("vllm", "lm_eval")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in missing else real(name, *more))
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    for name in ("sft_t2t_mini", "lora_identity"):
        (files / f"{name}.jsonl").write_text("{}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dispatch(["run", *dry, "pretrain", "full_sft", "lora", *stages.split()]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_run_that_downloads_needs_the_client_of_a_hub(
    dry: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(download, "CLIENTS", {"modelscope": "no_such_client", "hf": "no_such_client_either"})
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    assert dispatch(["run", *dry, "download", "pretrain"]) == 1
    assert "--hub auto: modelscope is not installed: pip install" in capfd.readouterr().err


def test_minimind3_reasons_with_the_recipe_of_minimind2(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_of("reason", "--recipe", "minimind3").recipe_of("reason") == "minimind2_reason"
    assert run_of("reason", "--recipe", "tiny").recipe_of("reason") == "tiny_reason"
    for recipe in ("minimind2", "minimind3", "tiny"):
        run = run_of("reason", "--recipe", recipe)
        assert {run.recipe_of(command) for command, _ in TRAININGS.values()} <= RECIPES.keys()


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_missing_recipe_is_reported_before_the_first_stage(
    dry: list[str], files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "recipe_of", lambda model, generation, command: f"{generation}_{command}")
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("a command was started"))
    (files / "r1_mix_1024.jsonl").write_text("{}")
    (files / "sft_t2t_mini.jsonl").write_text("{}")
    assert dispatch(["run", *dry, "--recipe", "minimind3", "pretrain", "full_sft", "reason"]) == 1
    assert "minimind3_reason" in capfd.readouterr().err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_all_downloads_of_a_run_must_fit_on_the_disk_together(
    dry: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * 10**9}))
    monkeypatch.setattr(main, "wait_for", lambda *words: pytest.fail("the download began"))
    assert dispatch(["run", *dry, "download", "pretrain", "full_sft"]) == 1
    assert "pretrain_t2t_mini, sft_t2t_mini, minimind-3: 3.1 GB are needed" in capfd.readouterr().err


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_the_checkpoints_of_all_trainings_must_fit_on_the_disk_together(
    dry: list[str], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("sft_t2t_mini", "lora_identity", "dpo"):
        (files / f"{name}.jsonl").write_text("{}")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2 * 10**9}))
    asked: list[str] = []
    monkeypatch.setattr(main, "wait_for", lambda command, settings: asked.append(command[3]) or 3)
    words = ["run", *dry, "pretrain", "full_sft", "lora", "dpo"]
    assert dispatch(words) == 1 and not asked
    error = capfd.readouterr().err
    assert f"{tmp_path}/out: the checkpoints of pretrain, full_sft, dpo need at least 2.1 GiB, 1.9 GiB are" in error
    # What has been saved takes no more space.
    (tmp_path / "out/pretrain/checkpoints").mkdir(parents=True)
    (tmp_path / "out/pretrain/checkpoints/x").write_text("")
    assert dispatch(words) == 3 and asked == ["pretrain"]


def test_the_form_of_converted_adapters_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = {weight: STAGES["convert"](run_of("convert", "--weight", weight))[0].settings for weight in ("lora", "dpo")}
    assert "MERGE" in merge["lora"] and "MERGE" not in merge["dpo"]


def test_replies_of_a_chat_model_have_a_template_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAW", "1")
    run = run_of("pretrain", "full_sft", "eval")
    answers = {job.name: job.commands[1].settings["RAW"] for job in STAGES["eval"](run)}
    assert answers == {"eval-pretrain": "1", "eval-full_sft": ""}


def test_settings_repeat_only_the_jobs_that_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    for name in ("pretrain_t2t_mini.jsonl", "tokenizer/tokenizer.json"):
        (tmp_path / "data" / name).write_text("{}")
    run = run_of("pretrain", "eval", "convert", "--weight", "pretrain")
    jobs = {stage: STAGES[stage](run)[0] for stage in ("pretrain", "eval", "convert")}
    monkeypatch.setenv("NPUS_PER_NODE", "2")
    monkeypatch.setenv("MAX_NEW_TOKENS", "64")
    for job in jobs.values():
        before = run.records.read("pretrain") | {"finished": True, "weights": "abc"}
        run.records.write("pretrain", before)  # type: ignore[arg-type]
        run.records.write(job.name, run.records.expected(job))

    def repeated() -> list[str]:
        run.records.write("pretrain", run.records.read("pretrain") | {"finished": True, "weights": "abc"})  # type: ignore[arg-type]
        return [stage for stage, job in jobs.items() if not run.records.agrees(job, run.records.expected(job))]

    assert repeated() == []
    monkeypatch.setenv("MAX_NEW_TOKENS", "32")
    assert repeated() == ["eval"]
    monkeypatch.setenv("EPOCHS", "2")
    assert repeated() == ["pretrain", "eval"]
    monkeypatch.delenv("EPOCHS")
    monkeypatch.setenv("MAX_NEW_TOKENS", "64")
    monkeypatch.setenv("PRECISION", "bf16")
    assert repeated() == ["pretrain", "eval", "convert"]
    monkeypatch.delenv("PRECISION")
    old = run.records.read("pretrain")
    old["settings"]["TASK"] = "ceval"  # as older versions recorded for every job
    run.records.write("pretrain", old)
    assert repeated() == []


def test_a_setting_that_the_stage_gives_itself_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample run of reinforcement learning asks for the quickstart's model with BACKEND=native."""
    run = replace(run_of("--sample", "pretrain", "full_sft"), output=tmp_path / "out", data=tmp_path / "data")
    (tmp_path / "data/tokenizer").mkdir(parents=True)
    for name in ("drills.jsonl", "dialogues.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        (tmp_path / "data" / name).write_text("{}")
    run.records.write("pretrain", {"finished": True, "weights": "abc"})
    jobs = [*STAGES["pretrain"](run), *STAGES["full_sft"](run)]
    before = [run.records.expected(job) for job in jobs]
    for name, value in {"BACKEND": "native", "SEQ_LENGTH": "1024"}.items():
        monkeypatch.setenv(name, value)
    assert [run.records.expected(job) for job in jobs] == before
    monkeypatch.setenv("PRECISION", "bf16")
    for job, old in zip(jobs, before, strict=True):
        assert run.records.expected(job)["settings"] == {**old["settings"], "PRECISION": "bf16"}


def test_dry_run_checks_a_fresh_clone(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dispatch(["run", "--sample", "pretrain", "full_sft", "eval", "serve", "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert out.count("dry run: everything is valid") == 2 and out.count("memory:") == 2 and out.count("GiB free") == 2
    assert "to be trained first" in out and "minimind-mcore convert mcore2hf" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample", "pretrain", "dpo"], "dpo begins with the weights of full_sft, which has not finished"),
        (["--sample", "full_sft", "pretrain"], "full_sft begins with the weights of pretrain, which has not finished"),
        (["serve"], "convert begins with the weights of full_sft, which has not finished"),
        (["rl", "--reward-model", "."], "ppo begins with the weights of full_sft, which has not finished"),
        (["eval"], "eval-full_sft begins with the weights of full_sft, which has not finished"),
        (["pretrain"], "pretrain_t2t_mini.jsonl, which does not exist and which no earlier stage of this run makes"),
        (["core", "distillation", "--teacher", "nowhere"], "nowhere, which does not exist and"),
        (["vllm"], "run the stage convert first"),
        (["web", "--port", "1"], "run the stage vllm first"),
    ],
)
def test_a_dry_run_refuses_what_must_fail(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "wait_for", lambda *words: 0)
    assert dispatch(["run", "--dry-run", *words]) == 1
    assert message in capfd.readouterr().err


def test_a_dry_run_checks_the_evaluation_of_a_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, tokenizer = (tmp_path / name for name in ("out/full_sft/checkpoints", "data/tokenizer"))
    for folder, file in ((weights, "x"), (tokenizer, "tokenizer.json")):
        folder.mkdir(parents=True)
        (folder / file).write_text("{}")
    run_of("eval").records.write("full_sft", {"finished": True, "weights": "abc"})
    asked: list[list[str]] = []
    monkeypatch.setattr(main, "wait_for", lambda command, settings: asked.append([command[3], command[-1]]) or 7)
    assert dispatch(["run", "--dry-run", "eval"]) == 7
    assert asked == [["evaluate", "--dry-run"]]


def test_the_task_of_an_evaluation_does_not_reach_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK", "ceval")
    monkeypatch.setenv("TASK_DATA_PATH", "ceval-exam")
    score, answer = STAGES["eval"](run_of("eval"))[0].commands
    assert (answer.words[0], answer.settings["TASK"]) == ("generate", "")
    assert score.words[:4] == ("evaluate", "--task", "quality", "ceval")
    assert score.words[-1] == os.path.abspath("ceval-exam")


def test_every_file_that_a_stage_reads_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["text.jsonl", "model/config.json", "tokenizer.json", "tokenizer_config.json", "exam/a.csv"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    monkeypatch.setenv("TOKENIZER_PATH", str(tmp_path))
    monkeypatch.setenv("TASK", "ceval")
    monkeypatch.setenv("TASK_DATA_PATH", str(tmp_path / "exam"))
    run = run_of("pretrain", "eval", "--model", f"{tmp_path}/model", "--data", f"pretrain={tmp_path}/text.jsonl")
    run.records.write("pretrain", {"finished": True, "weights": "abc"})

    def changed(name: str, stage: str) -> bool:
        job = STAGES[stage](run)[0]
        before = run.records.expected(job)
        (tmp_path / name).write_text("after")
        digest.cache_clear()
        after = run.records.expected(job)
        (tmp_path / name).write_text("before")
        digest.cache_clear()
        return before != after

    assert [name for name in names if changed(name, "pretrain")] == names[:4]
    assert [name for name in names if changed(name, "eval")] == names[2:]


def test_another_version_of_the_kit_repeats_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("a")
    run, job = run_of("pretrain"), Job(name="x", commands=(Command(("corpus",)),), inputs={"text": tmp_path / "text"})
    calls: list[str] = []
    monkeypatch.setattr(main, "wait_for", lambda *words: calls.append("ran") or 0)
    for version in ("1.0", "2.0"):
        monkeypatch.setattr(minimind_mcore, "__version__", version)
        assert main.run_job(run, job) == 0
    assert calls == ["ran"] and run.records.read("x")["version"] == "1.0"


def test_docker_gets_the_model_and_every_file_of_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / name for name in ("x.jsonl", "words", "teacher", "exam")}
    files["words"].mkdir()
    for file in (*files.values(), files["words"] / "tokenizer.json"):
        if not file.exists():
            file.write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", "minimind2")
    monkeypatch.setenv("TASK", "perplexity")
    monkeypatch.setenv("TOKENIZER_PATH", "words")
    monkeypatch.setenv("TASK_DATA_PATH", "exam")
    words = ["run", "--docker", "--dry-run", "core", "--data", "pretrain=x.jsonl", "--teacher", "teacher"]
    assert dispatch(words) == 0
    inside = next(line for line in capfd.readouterr().out.splitlines() if " run --rm " in line)
    assert "--model minimind2" in inside and f"--data pretrain={files['x.jsonl']}" in inside
    assert f"-e TOKENIZER_PATH={files['words']}" in inside and f"-e TASK_DATA_PATH={files['exam']}" in inside
    assert all(f"-v {file}:{file}:ro" in inside for file in files.values())
    with pytest.raises(UserError, match=r"--teacher: .*nowhere does not exist"):
        dispatch([*words[:-1], "nowhere"])


def test_docker_gets_every_setting_that_a_stage_reads(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "FORMAT": "minimind", "BATCH": "4", "SAVE_INTERVAL": "7", "LOG_INTERVAL": "8", "EVAL_INTERVAL": "9",
        "EVAL_ITERS": "2", "EPOCHS": "3",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert dispatch(["run", "--docker", "--dry-run", "zero", "convert"]) == 0
    inside = next(line for line in capfd.readouterr().out.splitlines() if " run --rm " in line)
    assert all(f"-e {name}={value}" in inside for name, value in settings.items())
    assert "--mini" in inside.split()
    monkeypatch.setenv("PAD_HEAD_DIM", "128")
    assert dispatch(["run", "--docker", "--dry-run", "zero", "convert"]) == 1
    assert "only FORMAT=hf can have padded heads" in capfd.readouterr().err
    monkeypatch.setenv("FORMAT", "hf")
    assert dispatch(["run", "--docker", "--dry-run", "zero", "convert"]) == 0
    assert "-e PAD_HEAD_DIM=128" in capfd.readouterr().out


def test_docker_failures_name_the_command_with_docker(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "kind_of_host", lambda dry: "cpu")
    monkeypatch.setattr(docker, "build", lambda kind, dry: 5)
    assert dispatch(["run", "--docker", "--sample", "pretrain", "full_sft", "convert"]) == 5
    error = capfd.readouterr().err
    assert f"-m {CLI[-1]} run download pretrain full_sft convert --docker --sample --model minimind3_tiny" in error
    assert f"PYTHONPATH={CHECKOUT} " in error


@pytest.mark.parametrize("kind", ["npu", "cuda"])
def test_docker_needs_no_torch_for_the_device_of_the_host(
    kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEVICE", kind)
    monkeypatch.setattr(device, "current", lambda: pytest.fail("torch was asked"))
    for words in (["core", "serve"], ["--sample", "all", "serve"]):
        assert dispatch(["run", "--docker", "--dry-run", *words]) == 0
        assert f"Dockerfile.{device.IMAGES.get(kind, kind)} " in capfd.readouterr().out


def test_docker_runs_the_stages_in_the_image(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert dispatch(["run", "--docker", "--dry-run", "core", "serve"]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("+")]
    build, inside, server = (
        next(line for line in lines if word in line) for word in ("docker build", " run --rm ", " up ")
    )
    assert "Dockerfile.cpu" in build and "minimind-mcore:cpu" in build
    assert "-e DATA_DIR=/data" in inside and inside.endswith("pretrain full_sft eval convert")
    assert f"OUTPUTS={tmp_path}" in inside and f"OUTPUT_DIR={docker.OUTPUTS}/out" in inside
    assert f"MODELS={tmp_path}/out" in server


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain"], "pretrain_t2t_mini.jsonl, which does not exist and which no earlier stage of this run makes"),
        (["eval"], "eval-full_sft begins with the weights of full_sft, which has not finished"),
        (["core", "dpo", "--only", "dpo"], "dpo begins with the weights of full_sft, which has not finished"),
    ],
)
def test_docker_refuses_what_must_fail_in_the_container(
    words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "build", lambda kind, dry: pytest.fail("the image was built"))
    assert dispatch(["run", "--docker", "--dry-run", *words]) == 1
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "driver", "program", "image"),
    [
        ("", True, False, "ascend"),
        ("", False, True, "cuda"),
        ("", False, False, "cpu"),
        ("npu", False, False, "ascend"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_the_image_is_that_of_the_hosts_driver(
    given: str, driver: bool, program: bool, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch of this host need not know the device: the image has its own."""
    monkeypatch.setenv("DEVICE", given)
    monkeypatch.setattr(device, "DAVINCI", tmp_path / "davinci_manager")
    monkeypatch.setenv("PATH", str(tmp_path))
    if driver:
        (tmp_path / "davinci_manager").write_text("")
    if program:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert docker.kind_of_host(True) == image
    monkeypatch.setenv("DEVICE", "tpu")
    with pytest.raises(UserError, match="DEVICE='tpu' is not a device"):
        docker.kind_of_host(True)


def test_a_server_needs_a_converted_model() -> None:
    with pytest.raises(UserError, match="run the stage convert first"):
        serving.serve(run_of("vllm"), "", False)


DOCKER = """#!/bin/sh
echo "$*" >> docker.log
case "$*" in
*" up "*) touch running ;;
*" ps "*) ! [ -e running ] || echo 0123abc ;;
*" rm "*) rm -f running ;;
esac
"""


def test_a_server_of_docker_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for docker."""
    (tmp_path / "out/hf").mkdir(parents=True)
    (tmp_path / "out/hf/config.json").write_text("{}")
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "health", lambda url, seconds: 200 if Path("running").exists() else None)
    monkeypatch.setattr(serving, "_wait", lambda url, process, *_: process.wait())
    monkeypatch.setattr(serving, "_ask", lambda url: "42")

    def asked() -> list[str]:
        return [re.findall(r"\b(?:up|rm|ps)\b", line)[-1] for line in Path("docker.log").read_text().splitlines()]

    run = run_of("vllm")
    serving.serve(run, "cuda", False)
    serving.serve(run, "cuda", False)
    assert asked() == ["up", "ps"]
    run.records.write("convert", {"outputs": {"hf": "other weights"}})
    serving.serve(run, "cuda", False)
    assert asked() == ["up", "ps", "rm", "up"]
    monkeypatch.setenv("TEMPERATURE", "0.5")
    serving.serve(run, "cuda", False)
    serving.serve(run, "cuda", False)
    assert asked() == ["up", "ps", "rm", "up", "rm", "up", "ps"]
    assert all(line.endswith(" serve-vllm-cuda") for line in Path("docker.log").read_text().splitlines())


def test_a_server_of_a_former_run_is_ended_by_its_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**os.environ, "MINIMIND_PIPELINE_SERVER": "a"}
    server = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environ)
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: 1.0)  # the system's clock was set
    try:
        serving.stop({"pid": server.pid, "mark": "b"})  # another process has got the number
        assert server.poll() is None
        serving.stop({"pid": server.pid, "mark": "a"})
        assert server.poll() is not None
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    ("kind", "model", "service"),
    [
        ("cpu", "minimind3", "serve"),
        ("cuda", "minimind3", "serve-vllm-cuda"),
        ("ascend", "minimind3", "serve-vllm-ascend"),
        ("cuda", "minimind2", "serve"),  # vLLM's services have flags that only minimind-3 has tokens for
    ],
)
def test_docker_serves_on_the_device_of_the_host(
    kind: str, model: str, service: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docker, "kind_of_host", lambda dry: kind)
    assert dispatch(["run", "--docker", "--dry-run", "--model", model, "core", "serve"]) == 0
    out = capfd.readouterr().out
    assert next(line for line in out.splitlines() if " up " in line).endswith(f" {service}")
    assert ("PAD_HEAD_DIM=128" in out) == (service == "serve-vllm-ascend")


def test_the_form_of_converted_weights_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("convert")
    before = STAGES["convert"](run)
    monkeypatch.setenv("PAD_HEAD_DIM", "128")
    assert STAGES["convert"](run) != before


def test_a_dry_run_tries_the_server_on_a_model_that_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out/hf").mkdir(parents=True)
    (tmp_path / "out/hf/config.json").write_text("{}")
    assert dispatch(["run", "--dry-run", "vllm"]) == 1
    assert "cannot be served" in capfd.readouterr().err


def test_the_report_has_every_stage_and_needs_no_network(tmp_path: Path) -> None:
    run = run_of("--sample", "pretrain", "full_sft")
    for number, name in enumerate(("pretrain", "full_sft")):
        folder = run.folder(name)
        folder.mkdir(parents=True)
        rows = [
            {"iteration": i, "lm_loss": 9.0 - number - i, "seconds_per_iteration": 1.0, "tokens_per_second": 50.0}
            for i in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = {"job": name, "finished": True, "seconds": 1800.0, "processes": 2, "weights": f"abc{number}",
                  "commands": ["sft --x"], "inputs": {"data": "d" * 64}, "settings": {"EPOCHS": "2"}}  # fmt: skip
        run.records.write(name, record)  # type: ignore[arg-type]
        evaluation = run.output / "eval" / name
        evaluation.mkdir(parents=True)
        subjects = {"addition": {"accuracy": 0.25 + number / 2, "questions": 200}}
        (evaluation / "scores.json").write_text(json.dumps({"accuracy": {"exact_match": {"subjects": subjects}}}))
        reply = {"messages": [{"role": "user", "content": "1+1=?"}], "completion": f"<{number}>"}
        (evaluation / "replies.jsonl").write_text(json.dumps(reply) + "\n")
    report.write(run)
    text = (run.output / "report.md").read_text()
    assert "| pretrain | 1,800 | 100 | 1.000 | 7.0000 | abc0 |" in text
    assert "| all | 3,600 |  | 2.000 |  |  |" in text
    assert "| pretrain | exact_match: addition | 25.0% of 200 |" in text
    assert "| full_sft | exact_match: addition | 75.0% of 200 |" in text
    assert "| 1+1=? | full_sft | <1> |" in text and "d" * 64 in text
    assert "| full_sft | EPOCHS | 2 |" in text
    page = (run.output / "report.html").read_text()
    assert "&lt;1&gt;" in page and page.count("<svg") == 1
    assert not re.search(r"""(src|href)=["']?http|@import|url\(http""", page)
    assert (run.output / "loss.png").stat().st_size > 1000


def rl_rows(run: Run, **changes: object) -> None:
    """Write the metrics and the record of a finished reinforcement learning run."""
    folder = run.folder("grpo")
    folder.mkdir(parents=True)
    row = {"grpo/score/mean": 0.5, "e2e_tps": 100.0, "tokens/p/s": 100.0, "timing/all": 2.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"iteration": i, **row}) + "\n" for i in (1, 2, 3)))
    record = {"job": "grpo", "finished": True, "seconds": 3600.0, "processes": 4, **changes}
    run.records.write("grpo", record)  # type: ignore[arg-type]


def test_a_run_of_reinforcement_learning_has_a_report_with_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rl_rows(run_of("grpo"))
    monkeypatch.setattr(main, "run_stage", lambda *words: 0)
    monkeypatch.setattr(main, "first_impossible", lambda run, in_container: "")
    assert dispatch(["run", "grpo"]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "| grpo | 3,600 | 2,400 | 4.000 | 0.5000 |  |" in text  # 3 steps x 2 s x 100 tokens per second x 4 devices


def test_the_report_has_the_training_from_which_sample_reinforcement_learning_begins() -> None:
    run = run_of("--sample", "full_sft", "grpo")
    rl_rows(run)
    run.folder("math_sft").mkdir()
    (run.folder("math_sft") / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "lm_loss": 2.0}) + "\n")
    run.records.write("math_sft", {"job": "math_sft", "finished": True, "seconds": 1800.0, "processes": 2})
    report.write(run)
    text = (run.output / "report.md").read_text()
    assert "| math_sft | 1,800 |  | 1.000 | 2.0000 |  |" in text and "| all | 5,400 |  | 5.000 |  |  |" in text


def test_unknown_tokens_are_left_empty() -> None:
    run = run_of("grpo")
    rl_rows(run)
    (run.folder("grpo") / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "grpo/score/mean": 0.5}))
    report.write(run)
    assert "| grpo | 3,600 |  | 4.000 | 0.5000 |  |" in (run.output / "report.md").read_text()


def test_the_devices_of_all_hosts_are_counted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NNODES": "3", "NPUS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "wait_for", lambda *words: 1)
    run = run_of("pretrain")
    [job] = STAGES["pretrain"](run)
    assert main.run_job(run, job) == 1
    assert run.records.read("pretrain")["processes"] == 6


def test_the_seconds_of_a_killed_training_are_counted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("pretrain")
    [job] = STAGES["pretrain"](run)

    def killed(*words: object) -> int:
        run.folder("pretrain").mkdir(parents=True, exist_ok=True)
        metrics = run.folder("pretrain") / "metrics.jsonl"
        metrics.write_text("{}")
        os.utime(metrics, (time.time() + 100, time.time() + 100))
        raise ZeroDivisionError  # stands for SIGKILL: the pipeline writes nothing afterwards

    monkeypatch.setattr(main, "wait_for", killed)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            main.run_job(run, job)
    monkeypatch.setattr(main, "wait_for", lambda *words: 1)
    assert main.run_job(run, job) == 1
    record = run.records.read("pretrain")
    assert 198 < record["seconds"] < 210 and "began" not in record
    assert main.run_job(run, job) == 1
    assert run.records.read("pretrain")["seconds"] < 210  # counted once
