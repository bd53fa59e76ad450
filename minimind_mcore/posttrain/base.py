"""Base class of the post-training stages: data, packing, LoRA, and the forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from minimind_mcore.errors import UserError, require
from minimind_mcore.models.wrappers import output_only_at, unwrap
from minimind_mcore.platform import ranks
from minimind_mcore.posttrain import data, lora
from minimind_mcore.preprocess.check import idx_digest
from minimind_mcore.training import data as training_data
from minimind_mcore.training import sample_order
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.data import MapDataset
from minimind_mcore.training.job import Job, MicroBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import MegatronModule


class PostTraining(Job):
    """Base class of the stages that read preprocessed conversations or pairs, each of which is one sample.

    Attributes:
        columns: names of the columns that the stage reads.
    """

    columns: tuple[str, ...] = data.INSTRUCTION

    @classmethod
    @override
    def check(cls, config: TrainConfig) -> TrainConfig:
        flags = config.data
        require(
            not flags.variable_seq_lengths or not flags.neat_pack,
            "--variable-seq-lengths with --neat-pack: packed samples have one length; leave one of the flags out",
        )
        require(
            flags.reset_attention_mask == flags.neat_pack,
            "--neat-pack and --reset-attention-mask must be used together. --neat-pack alone would let packed samples "
            "see each other. --reset-attention-mask alone would separate questions from their answers",
        )
        unpadded = flags.no_pad_to_seq_lengths or flags.variable_seq_lengths
        # The lengths of unpadded and packed micro-batches differ. `variable_seq_lengths` makes a pipeline stage send
        # the shape of each tensor first.
        config = config.changed(no_pad_to_seq_lengths=unpadded, variable_seq_lengths=unpadded or flags.neat_pack)
        if config.model.lora_target_modules:
            config = lora.check(config)
        begin = config.checkpoint.pretrained_checkpoint
        require(
            begin is None or config.checkpoint.weights_pending or Path(begin).exists(),
            f"--pretrained-checkpoint {begin} does not exist; expected the initial weights",
        )
        return config

    def prepare_model(self, chunks: list[GPTModel]) -> None:
        if self.config.model.lora_target_modules:
            lora.begin(self.config, chunks)

    def check_data(self, tokenizer: training_data.DatasetTokenizer) -> None:
        config, prefix = self.config, data.data_prefix(self.config.data)
        data.check_files(prefix, self.columns, tokenizer, config.data.verify_data)
        # This check reads all the data, so only one rank runs it.
        ranks.check_on_main(
            lambda: data.check_labels(
                prefix, self.columns, config.data.seq_length, tokenizer.vocab_size, config.data.neat_pack
            )
        )

    def build_datasets(self) -> list[MapDataset | None]:
        config, prefix = self.config, data.data_prefix(self.config.data)
        tokenizer = training_data.open_tokenizer(config)
        self.check_data(tokenizer)
        tokenizer.unique_identifiers["indices"] = self.data_digests()
        training_data.require_same_everywhere(config, tokenizer)
        digests = [sample_order.data_digest(data.file_prefix(prefix, name)) for name in self.columns]
        config.record.sample_order = sample_order.record(config.schedule, digests)
        first = data.open_column(prefix, self.columns[0])
        ranges = data.split_ranges(config.data.split, len(first))
        if not ranges[0]:
            raise UserError(
                f"--split {config.data.split}: the training part of the {len(first)} samples of {prefix} is empty; "
                "give it a larger share"
            )
        return [
            data.PostTrainingDataset(
                prefix,
                self.columns,
                data.sample_order(part, samples, config.data.seed, not config.data.no_shuffle),
                config.data.seq_length,
            )
            if part and samples
            else None
            for part, samples in zip(ranges, training_data.samples_needed(config), strict=True)
        ]

    def data_digests(self) -> list[str]:
        """Return the digests of the index files of all columns."""
        prefix = data.data_prefix(self.config.data)
        return [idx_digest(data.file_prefix(prefix, name)) for name in self.columns]

    def collate(self, samples: list[dict[str, Any]]) -> MicroBatch:
        """Collate samples. Packed samples become one row, with `cu_seqlens` [samples + 1] and `longest`."""
        tokens, labels = [s["input_ids"] for s in samples], [s["labels"] for s in samples]
        length = data.padded_length(max(map(len, tokens)), self.config)
        batch = data.batch_of(tokens, labels, length)
        if self.config.data.neat_pack:
            batch = data.flatten_packed(batch, data.pad([s["attention_mask"] for s in samples], length, 0))
        return {**batch, "index": [s["index"] for s in samples]}


def run_model(model: MegatronModule, batch: MicroBatch, labels: Tensor | None = None) -> Tensor:
    """Run one chunk of the model on a micro-batch. The last chunk returns the losses [rows, length] of the labels.

    The loss of a label is its negative log-probability over all tensor-parallel shards of the vocabulary. A CPU
    computes it only where the mask is 1, and returns 0 elsewhere.
    Without labels the last chunk returns this rank's shard of the logits [rows, length, vocabulary / TP].
    """
    packed = None
    if "cu_seqlens" in batch:
        from megatron.core.packed_seq_params import PackedSeqParams

        ends, longest = batch["cu_seqlens"], batch["longest"]
        packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)

    def run(labels: Tensor | None) -> Tensor:
        output: Tensor = model(batch["tokens"], batch["position_ids"], None, labels=labels, packed_seq_params=packed)
        return output

    chunk, mask = unwrap(model), batch["loss_mask"].t()  # megatron-core's order of positions is [length, rows]
    # In a sample with a short answer most tokens have no loss. A small model would spend half of a step on the
    # logits of these tokens. Other devices compute all positions: to select some, the host would have to wait for
    # the device to count them.
    selects = chunk.post_process and mask.device.type == "cpu" and not chunk.config.sequence_parallel
    if labels is None or not selects:
        return run(labels)
    places = mask.flatten().nonzero().squeeze(1)
    with output_only_at(places, chunk):
        losses = run(labels.t().flatten()[places].unsqueeze(0))
    return losses.new_zeros(mask.numel()).index_copy(0, places, losses.flatten()).view(mask.shape).t()
