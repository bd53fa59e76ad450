"""Under --calculate-per-token-loss SFT equals TRL's trainer, which averages over all tokens of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import Corpus, Server
from helpers.posttrain_oracle import (
    BATCH,
    DYNAMIC,
    FLAGS,
    HYPER,
    LAYOUTS,
    MICRO_BATCH,
    MODEL,
    STEPS,
    compare,
    samples_in_order,
)  # fmt: skip
from helpers.twin import initial_weights, load_twin

from minimind_mcore.models.presets import PRESETS


@pytest.mark.parametrize("place", ["one", "DP2"])
def test_per_token_loss_equals_trl(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, place: str) -> None:
    pytest.importorskip("trl")
    processes, parallel = LAYOUTS[place]
    flags = FLAGS | DYNAMIC | parallel | {"calculate_per_token_loss": True, "weight_decay": 0.0}
    argv = dialogues.flags(PRESETS[MODEL], **flags, is_instruction_dataset=True)
    found = server.run(argv, tmp_path / "run", processes, posttrain=True)
    compare(found, train_with_trl(dialogues, start, tmp_path / "trl"))


def train_with_trl(
    dialogues: Corpus,
    start: Path,
    folder: Path,
    known: list[Any] = [],  # noqa: B006
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of trl.SFTTrainer, with accumulation over two micro-batches."""
    if known:
        return known[0]  # type: ignore[no-any-return]
    import transformers
    import trl
    from datasets import Dataset

    class InOrder(trl.SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]

    config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
    twin = load_twin(config, initial_weights(start, config))
    samples = samples_in_order(dialogues.prefix, "input_ids", "labels")[: STEPS * BATCH]
    rows = [
        {"input_ids": s["input_ids"].tolist(), "completion_mask": (s["labels"] != -100).long().tolist()}
        for s in samples
    ]
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1.0, betas=HYPER.betas, eps=1e-8, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, HYPER.lr)
    options = trl.SFTConfig(  # pyright: ignore[reportPrivateImportUsage]
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH, max_grad_norm=1.0, logging_steps=1, use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", report_to="none", completion_only_loss=True, max_length=None,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(dialogues.tokenizer / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    trainer = InOrder(
        model=twin, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    known.append(([row["loss"] for row in logged], [row["grad_norm"] for row in logged]))
    return known[0]  # type: ignore[no-any-return]
