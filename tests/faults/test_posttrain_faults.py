"""What is wrong with data or flags of post-training is said before anything is trained, by name, with what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.engine import Corpus, Server
from helpers.posttrain_oracle import DYNAMIC, FLAGS, MODEL

from minimind_mcore.models.presets import PRESETS
from minimind_mcore.posttrain.data import INSTRUCTION, check_labels
from minimind_mcore.preprocess.indexed import IndexedWriter


@pytest.fixture
def copied(dialogues: Corpus, tmp_path: Path) -> Path:
    """The folder of conversations, to be damaged."""
    shutil.copytree(dialogues.prefix.parent, tmp_path / "data")
    return tmp_path / "data"


def rewrite(folder: Path, name: str, rows: list[list[int]]) -> None:
    """One pair of files anew."""
    with IndexedWriter(folder / f"{name}_document") as writer:
        writer.add(np.array([number for row in rows for number in row]), np.array([len(row) for row in rows]))


def refused(
    server: Server, dialogues: Corpus, folder: Path, processes: int = 1, posttrain: bool = True, **flags: Any
) -> str:
    """What a run says that must end at once with an error, without a traceback."""
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS | DYNAMIC | flags if posttrain else FLAGS | flags)
    run = server.run(argv, folder / "run", processes, check=False, posttrain=posttrain)
    assert 0 not in run.codes and "Traceback" not in run.output, run.output
    return run.output


def test_missing_files_are_named(server: Server, dialogues: Corpus, copied: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        (copied / f"chat_packed_labels_document{suffix}").unlink()
    out = refused(server, dialogues, tmp_path, 2, stage="sft", data_path=copied / "chat")
    assert "chat_packed_labels_document.idx: no such file; convert the data again" in out
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=copied / "chat_packed_input_ids_document")
    assert f"--data-path takes the bare prefix, {copied / 'chat'}" in out
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=copied / "talk.jsonl")
    assert "run preprocess_data.py first" in out


def test_data_of_another_kind_is_named(server: Server, dialogues: Corpus, corpus: Corpus, tmp_path: Path) -> None:
    pairs = dialogues.prefix.with_name("pairs")
    assert "is pairwise data, for --stage dpo" in refused(server, dialogues, tmp_path, stage="sft", data_path=pairs)
    out = refused(server, dialogues, tmp_path, is_pairwise_dataset=True)
    assert "is instruction data, for --stage sft, reason or distill" in out
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=corpus.prefix.with_name("data"))
    assert "is pretraining data, for pretrain_gpt.py" in out
    out = refused(server, dialogues, tmp_path, stage="dpo", is_instruction_dataset=True)
    assert "--stage dpo with --is-instruction-dataset: this stage reads --is-pairwise-dataset data" in out
    assert "--stage is missing: expected one of sft, dpo, reason, distill" in refused(server, dialogues, tmp_path)
    out = refused(server, dialogues, tmp_path, posttrain=False, stage="sft")
    assert "--stage: for posttrain_gpt.py, not for pretraining" in out


def test_samples_that_train_nothing_are_counted(
    server: Server, dialogues: Corpus, copied: Path, tmp_path: Path
) -> None:
    lengths = [8, 9, 10, 11]
    rows = [list(range(40, 40 + n)) for n in lengths]
    rewrite(copied, "bad_packed_input_ids", rows)
    rewrite(copied, "bad_packed_attention_mask", [[1] * n for n in lengths])
    # The first position's label is never predicted; that of the third lies behind --seq-length 9.
    labels = [[-100] * 7 + [47], [40] + [-100] * 8, [-100] * 9 + [49], [-100] * 5 + [45] * 6]
    rewrite(copied, "bad_packed_labels", labels)
    out = refused(server, dialogues, tmp_path, 2, stage="sft", data_path=copied / "bad", seq_length=9)
    assert "2 of 4 samples have no token with loss in the first 9 tokens (--seq-length)" in out
    assert "the first of them sample 1" in out


def test_numbers_that_are_no_tokens_are_named(server: Server, dialogues: Corpus, copied: Path, tmp_path: Path) -> None:
    rewrite(copied, "bad_packed_attention_mask", [[1] * 8] * 2)
    for name in ("input_ids", "labels"):
        rewrite(copied, f"bad_packed_{name}", [[50] * 8, [50] * 4 + [999] * 4])
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=copied / "bad")
    assert "token 12 is 999, outside of the tokenizer's vocabulary" in out
    rewrite(copied, "bad_packed_input_ids", [[50] * 8, [50] * 8])
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=copied / "bad")
    assert "sample 1 has a label that is neither -100 nor a token of the vocabulary" in out
    rewrite(copied, "bad_packed_labels", [[50] * 8, [50] * 7])
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=copied / "bad")
    assert "its samples have other lengths than the samples of" in out


def test_packing_that_would_leak_is_refused(server: Server, dialogues: Corpus, tmp_path: Path) -> None:
    packed = dialogues.prefix.with_name("packed")
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=packed)
    assert "is packed" in out and "give --reset-attention-mask --neat-pack" in out
    out = refused(server, dialogues, tmp_path, stage="sft", data_path=packed, reset_attention_mask=True)
    assert "--neat-pack and --reset-attention-mask must be used together" in out


def test_what_is_cut_is_counted_and_packing_that_is_none_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.array([4, 9, 5, 8])
    for name in INSTRUCTION:
        with IndexedWriter(f"{tmp_path}/x_packed_{name}_document") as writer:
            writer.add(np.ones(lengths.sum(), np.int32), lengths)
    check_labels(f"{tmp_path}/x", INSTRUCTION, seq_length=8, vocab_size=10, packed=False)
    cut = "1 of 4 samples are cut to 8 tokens (--seq-length)"
    assert capsys.readouterr().out == f"{tmp_path}/x_packed_labels_document: {cut}\n"
    check_labels(f"{tmp_path}/x", INSTRUCTION, seq_length=9, vocab_size=10, packed=True)
    assert "attention_mask_document: the samples are not packed" in capsys.readouterr().out


def test_a_teacher_that_does_not_fit_is_refused(server: Server, dialogues: Corpus, start: Path, tmp_path: Path) -> None:
    assert "--teacher-model is missing" in refused(server, dialogues, tmp_path, stage="distill")
    out = refused(server, dialogues, tmp_path, stage="distill", teacher_model=tmp_path / "nothing")
    assert "nothing: does not exist; expected a model" in out
    other = tmp_path / "hf"
    other.mkdir()
    PRESETS[MODEL].hf_config().save_pretrained(other)
    out = refused(server, dialogues, tmp_path, stage="distill", teacher_model=other)
    assert str(other) in out and "safetensors" in out


def test_a_reference_that_is_not_known_is_asked_for(
    server: Server, dialogues: Corpus, start: Path, tmp_path: Path
) -> None:
    pairs = {"stage": "dpo", "data_path": dialogues.prefix.with_name("pairs")}
    out = refused(server, dialogues, tmp_path, **pairs, load=start, ckpt_format="torch")
    assert "resumes a run: give --ref-model (or --pretrained-checkpoint)" in out
    assert "--reference-live needs --ref-model" in refused(server, dialogues, tmp_path, **pairs, reference_live=True)


def test_a_dry_run_checks_the_data(server: Server, dialogues: Corpus, tmp_path: Path) -> None:
    argv = dialogues.flags(PRESETS[MODEL], **FLAGS, is_instruction_dataset=True, dry_run=True)
    run = server.run(argv, tmp_path, posttrain=True)
    assert "everything is valid" in run.output and not (tmp_path / "metrics.jsonl").exists()
    assert json.dumps(str(dialogues.prefix))[1:-1] in run.output
