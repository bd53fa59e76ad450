"""One rank of a model that is trained, or only asked: the actor, the reference, the critic.

It knows megatron-core and nothing of Ray: `workers/train.py` makes an actor of it, tests a plain process. Methods
are collective: every rank of the model calls them with the same arguments.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.checkpoint.files import directory_of, iterations_in, saved_args
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, ranks
from minimind_mcore.rl.algorithms.batches import mini_batches, token_batches
from minimind_mcore.rl.algorithms.losses import denominator
from minimind_mcore.rl.config.load import megatron_flags, require_weights
from minimind_mcore.rl.config.objective import objective
from minimind_mcore.rl.config.schema import Config, Section
from minimind_mcore.rl.runtime import weight_sync
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.jobs import Actor, Critic, LogProbs, ResponseJob, Values, micro_batch
from minimind_mcore.rl.runtime.metrics import MOST_DIFFERENT, SAME_WEIGHTS
from minimind_mcore.training import checkpoint_weights, checkpointing, data, distributed, step
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import MicroBatch
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.model import build_chunks, build_model, weights_gathered
from minimind_mcore.training.optimizer import build_optimizer, learning_rate
from minimind_mcore.validation import validate

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)

Role = Literal["actor", "reference", "critic"]


@dataclass(frozen=True)
class Share:
    """What one rank computed: columns of some rows.

    Attributes:
        rows: their numbers in the batch.
        columns: by name, [rows, T].
    """

    rows: list[int]
    columns: dict[str, Tensor]


def command_line(config: Config, role: Role) -> argparse.Namespace:
    """The role's section as the training package's arguments.

    The learning-rate schedule counts responses: a step of the run is `updates` of `mini_batch_size` each.

    Raises:
        UserError: a key that the native engine does not have.
    """
    args = arguments.parse(megatron_flags(section_of(config, role)))
    if role == "reference":  # it does not learn
        args.lr, args.min_lr, args.lr_warmup_iters, args.lr_warmup_fraction = 0.0, 0.0, 0, None
        args.micro_batch_size, args.save = args.micro_batch_size or 1, None
    args.variable_seq_lengths, args.save_interval = True, None
    if role == "reference":
        args.global_batch_size = None  # `validate` takes one micro-batch per rank
        return args
    args.global_batch_size = config.rl.mini_batch_size
    rows = config.actor.global_batch_size * config.rl.n_samples_per_prompt
    args.updates_per_iteration = rows // config.rl.mini_batch_size * config.rl.epochs
    args.train_iters *= args.updates_per_iteration
    args.keep_last = config.minimind.keep_last
    if role == "critic" and args.keep_last:
        # It is saved before the actor: if a kill comes between, the actor's last still has its pair.
        args.keep_last += 1
    args.override_opt_param_scheduler = config.minimind.resume_schedule == "override"
    args.use_checkpoint_opt_param_scheduler = config.minimind.resume_schedule == "checkpoint"
    args.ckpt_format = "torch"  # as MindSpeed-RL writes it, and this kit's scripts
    if role == "critic":
        args.untie_embeddings_and_output_weights = True
        if config.actor.save and args.save in (None, config.actor.save):  # it has no directory of its own
            args.save = str(Path(config.actor.save) / "critic")
    return args


def section_of(config: Config, role: Role) -> Section:
    """The section of the YAML that describes a role."""
    if role == "critic":
        return config.critic or config.actor
    return config.ref if role == "reference" else config.actor


class Rank:
    """This process's part of a model; call `distributed`'s environment variables (RANK, ...) must be set.

    Args:
        config: of the run.
        role: what the model is for.
        reference: also hold the reference's weights, for `log_probs(reference=True)`.
    """

    def __init__(self, config: Config, role: Role, reference: bool = False) -> None:
        self.config, self.role = config, role
        args = command_line(config, role)
        self.layout = validate(args, distributed.world_size())
        device.setup()
        self.training = TrainConfig.from_args(args, self.layout)
        distributed.initialize(self.training)
        data.open_tokenizer(self.training)
        self.algorithm = objective(config)
        self.job: Any  # trains the model; `ask` measures it
        self.ask: ResponseJob
        if role == "critic":
            self.job, self.ask = Critic(self.training, config.rl.cliprange_value), Values(self.training)
        else:
            self.job = Actor(self.training, config, self.algorithm)
            self.ask = LogProbs(self.training, self.job.temperature)
        self.model: list[MegatronModule] = []
        self.frozen: step.Engine  # the reference
        self.engine: step.Engine
        self.progress = Progress()
        self.wants_reference = reference
        # `rl_config.blocking: false`: the weights before the last update, with which the engines wrote the next batch.
        self.earlier: list[Tensor] = []

    # ------------------------------------------------------------------------------------------ weights

    def load(self, at: int | None = None) -> dict[str, Any]:
        """Build the model and read its weights.

        Args:
            at: iteration of the checkpoint to go on from, 0 for none (default: the newest).

        A run goes on from the newest checkpoint of `save`; where there is none it begins with the weights of
        `load`, or with random ones.

        Returns:
            `iteration` and `state` of the checkpoint; 0 and None at the beginning.

        Raises:
            UserError: there is no checkpoint of iteration `at`, or none that can be read.
        """
        if self.role == "reference":
            self.frozen = self._frozen()
            return {"iteration": 0, "state": None}
        save = self.training.checkpoint.save
        saved = iterations_in(Path(save)) if save else []
        if at and at not in saved:
            raise UserError(
                f"{save}: found no checkpoint of iteration {at}, from which the actor goes on (there is "
                f"{', '.join(map(str, saved)) or 'none'}); put it back, or remove the actor's that have no pair here"
            )
        resumed = at != 0 and bool(saved)
        begin = {"load": save, "ckpt_step": at} if resumed else {"ckpt_step": None}
        self.training, _ = checkpointing.settle_router_weight(self.training, pretrained_checkpoint=None, **begin)
        self.job.config = self.ask.config = self.training
        self.model = build_model(self.training, self.job)
        self.engine = step.Engine(self.training, self.model, *build_optimizer(self.training, self.model))
        if save:
            checkpointing.require_shared_directory(Path(save))
        state = None
        if resumed:
            state = self._resume(at)
        else:
            self._begin()
        if self.wants_reference:
            self.frozen = self._frozen()
        return {"iteration": self.progress.iteration, "state": state}

    def _resume(self, at: int | None) -> dict[str, Any] | None:
        # finetune, no_load_optim and no_load_rng of the YAML are about the weights that a run begins with.
        everything = {"finetune": False, "no_load_optim": False, "no_load_rng": False}
        changes = {"load": self.training.checkpoint.save, "pretrained_checkpoint": None, "ckpt_step": at, **everything}
        self.progress = checkpointing.load(self.training.changed(**changes), self.engine, self.job.title)
        chosen = directory_of(self.training.checkpoint.directory, self.progress.iteration)
        saved = ranks.from_main(lambda: getattr(saved_args(chosen), "rl_state", None))
        return saved

    def _begin(self) -> None:
        self.progress = Progress()
        if not (begin := self.training.checkpoint.load):
            return
        if self.role == "critic":
            self._load_trunk(Path(begin))
        else:
            self._load_weights(Path(begin), self.model, self.job.title)
        self.engine.take_weights()

    def _load_weights(self, path: Path, model: list[MegatronModule], role: str) -> None:
        require_weights(path)
        checkpointing.load_weights(self.training, path, model, role)

    def _load_trunk(self, path: Path) -> None:
        """A critic begins as the policy, with a head of its own."""
        from minimind_mcore.models.loading import load_into, whole_model_parameters
        from minimind_mcore.models.weights import OUTPUT

        found = open_source(path, stated={"num_heads": self.training.architecture.num_heads}).config
        # The policy's output layer, tied or not, is replaced by the critic's.
        untied = self.training.changed(untie_embeddings_and_output_weights=not found.tie_embeddings)
        source = checkpoint_weights.open_model(untied, path)
        own = {name: p.detach().clone() for name, p in whole_model_parameters(self.model) if name == OUTPUT}
        load_into(self.model, lambda name: own[name] if name in own else checkpoint_weights.read_tensor(source, name))
        logger.info(f"{self.job.title}: loaded weights of {path}, with a value head in place of the output layer")

    def _frozen(self) -> step.Engine:
        """The reference model, in this layout; it takes no part in the training."""
        chunks = build_chunks(self.training, self.ask)
        path = self._reference_path()
        if path is not None:
            self._load_weights(path, chunks, "reference")
        for chunk in chunks:
            chunk.requires_grad_(False)
        return step.Engine(self.training, chunks)

    def _reference_path(self) -> Path | None:
        """Whose weights are the reference: what the run began with."""
        mode, files = self.config.rl.integrated_mode_config or {}, self.training.checkpoint
        path = (mode.get("ref_model_load_path") if self.role != "reference" else None) or files.load
        if path and self.progress.iteration and files.save and Path(path).resolve() == Path(files.save).resolve():
            raise UserError(
                f"load and save are both {path}: the weights that the run began with, which are the reference, are not "
                "known; give rl_config.integrated_mode_config.ref_model_load_path"
            )
        return Path(path) if path else None

    def shards(self) -> list[weight_sync.WeightShard]:
        """This rank's part of the weights."""
        with weights_gathered(self.training, self.model):
            return weight_sync.shards(self.model)

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        """Write a checkpoint that `load` goes on from; `state` is the driver's."""
        self.progress = Progress(iteration, consumed, self.progress.skipped)
        self.training.record.rl_state = state
        checkpointing.save(self.training, self.progress, self.engine)

    # ------------------------------------------------------------------------------------------ computing

    def measure(self, batch: Batch, reference: bool = False) -> Share | None:
        """Log-probabilities and entropies of the responses, or a critic's values, of this rank's share of the rows.

        Rows of a similar length go together, so that little padding is computed.

        Returns:
            `logp` and `entropy`, or `values`; None on the ranks that another one answers for.
        """
        frozen = reference or self.role == "reference"
        if self.config.rl.use_dynamic_bsz:
            parts = self._by_tokens(batch, "ref" if frozen else "actor")
        else:
            rows, size = self._order(batch), self.forward_size
            parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        rows = [row for part in parts for row in part]
        engine = self.frozen if frozen else self.engine
        micro = [batch.select(torch.tensor(part).clamp(min=0)) for part in parts]
        [result] = engine.measure(self.ask, self._stream(micro, engine.model), len(micro))
        if not result.losses or self._is_copy():
            return None
        found = [part.unsqueeze(0) if self.role == "critic" else part for part in result.losses]
        width = batch.width
        columns = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in found], dim=1).cpu()
        keep = [i for i, row in enumerate(rows) if row >= 0]
        names = ["values"] if self.role == "critic" else ["logp", "entropy"]
        return Share([rows[i] for i in keep], {n: c[keep] for n, c in zip(names, columns, strict=True)})

    @property
    def forward_size(self) -> int:
        """Rows of a micro-batch that is not trained on."""
        rl = self.config.rl
        wanted = rl.ref_forward_micro_batch_size if self.role == "reference" else rl.actor_forward_micro_batch_size
        return int(wanted or self.training.schedule.micro_batch_size)

    def _order(self, batch: Batch) -> list[int]:
        """This rank's rows, sorted by length; -1 (a copy of row 0) fills up what the ranks must have in common."""
        from megatron.core import parallel_state

        rank, dp = parallel_state.get_data_parallel_rank(), self.layout.dp
        ordered = sorted(range(len(batch)), key=lambda row: int(batch.lengths[row]))
        unit = self.forward_size * self._together
        ordered = [-1] * (-len(ordered) % unit) + ordered
        return ordered[rank::dp]

    def _stream(self, micro: list[Batch], model: list[MegatronModule]) -> step.Batches:
        """An iterator over the micro-batches for each chunk of a model."""
        place = device.current().torch_device

        def stream() -> Iterator[MicroBatch]:
            for rows in micro:
                # The ids of the prompts are read on the CPU: asking the device for them would stop the step.
                yield micro_batch(rows.to(place), self.unit) | {"index": rows.prompt_ids.tolist()}

        return [stream() for _ in model]

    @property
    def unit(self) -> int:
        """What lengths are a multiple of."""
        return self.layout.tp if self.training.parallel.sequence_parallel else 1

    def _is_copy(self) -> bool:
        from megatron.core import parallel_state

        return int(parallel_state.get_tensor_model_parallel_rank()) != 0

    def update(self, batch: Batch, iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        """Train on a batch: `epochs` passes, one optimizer step for each mini-batch.

        Args:
            batch: with advantages and, where there are several updates, `old_logp`.
            iteration: number of the step, for messages and the order of mini-batches.
            kl_coef: of the reference's term, where it changes.

        Returns:
            Metrics, means over the updates; the same on every rank.

        Raises:
            UserError: a loss or the gradient norm is not finite.
        """
        rl = self.config.rl
        if kl_coef is not None and isinstance(self.job, Actor):
            self.job.kl_coef = kl_coef
        apart = self._same_weights(batch) if self.role == "actor" and not rl.blocking else {}
        n, seed = rl.n_samples_per_prompt, self.training.data.seed + iteration
        orders = mini_batches(len(batch) // n, n, rl.mini_batch_size // n, rl.epochs, rl.shuffle_mini_batch, seed)
        lr = learning_rate(self.engine.optimizer)
        rows = [self._update_once(batch.select(order), iteration) for order in orders]
        self.progress.skipped += sum(row.pop("skipped") for row in rows) > 0
        role = "critic" if self.role == "critic" else "actor"
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {**means, **apart, f"{role}/lr": lr}

    def _same_weights(self, batch: Batch) -> dict[str, float]:
        """Mean difference from the engine's log-probabilities, with the weights that wrote the batch. Collective.

        With `rl_config.blocking: false` these are the weights before the last update. An engine that was replaced
        meanwhile has written its responses again, with the present weights: each response counts with the weights
        that are nearer. Call it before an update: the present weights are kept for the next batch.
        """
        if batch.rollout_logp is None or self.config.minimind.replay_rollouts:
            return {}
        with weights_gathered(self.training, self.model):
            parameters = [parameter for chunk in self.model for parameter in chunk.parameters()]
            present = [parameter.detach().clone() for parameter in parameters]
        tokens = batch.mask.sum()
        if self.earlier:
            self._put(parameters, self.earlier)
            found = self._row_differences(batch)
            self._put(parameters, present)
            if not found.sum() / tokens <= MOST_DIFFERENT[self.config.minimind.precision]:
                found = torch.minimum(found, self._row_differences(batch))
        else:
            found = self._row_differences(batch)
        self.earlier = present
        return {SAME_WEIGHTS: float(found.sum() / tokens)}

    @torch.no_grad()
    def _put(self, parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
        with weights_gathered(self.training, self.model):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    def _row_differences(self, batch: Batch) -> Tensor:
        """Sums over each response's tokens of the difference from the engine [rows], the same on every rank."""
        assert batch.rollout_logp is not None
        found = torch.zeros(len(batch), device=device.current().torch_device)
        if share := self.measure(batch):
            apart = (share.columns["logp"] - batch.rollout_logp[share.rows]).abs() * batch.mask[share.rows]
            found[share.rows] = apart.sum(1).to(found.device)
        torch.distributed.all_reduce(found)
        return found.cpu()

    def _update_once(self, mini: Batch, iteration: int) -> dict[str, float]:
        micro = [mini.select(torch.tensor(part)) for part in self._parts(mini)]
        self.job.total = denominator(mini.mask, self.algorithm.aggregation if self.role == "actor" else "token-mean")
        if isinstance(self.job, Actor):
            self.job.tokens = mini.mask.sum()
        self.job.micro_batches = len(micro)
        batches = self._stream(micro, self.model)
        result = self.engine.step(self.job, batches, len(micro), len(mini), iteration)
        (_, *metrics), _ = step.averages(self.training, self.job, [result])
        role = "critic" if self.role == "critic" else "actor"
        named = dict(zip(self.job.metrics, metrics, strict=True))
        return {**named, f"{role}/grad_norm": result.grad_norm, "skipped": float(not result.updated)}

    def _parts(self, mini: Batch) -> list[list[int]]:
        """This rank's micro-batches of a mini-batch: rows of a similar length together."""
        from megatron.core import parallel_state

        if self.config.rl.use_dynamic_bsz:
            if len(mini) % self._together:
                raise UserError(
                    f"rl_config.use_dynamic_bsz: found {len(mini)} responses of a mini-batch, expected a multiple of "
                    f"{self._together}: data-parallel ranks, with virtual stages times pipeline_model_parallel_size"
                )
            return self._by_tokens(mini, "update")
        rank, dp = parallel_state.get_data_parallel_rank(), self.layout.dp
        size = self.training.schedule.micro_batch_size
        ordered = sorted(range(len(mini)), key=lambda row: int(mini.lengths[row]))
        parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        return parts[rank::dp]

    def _by_tokens(self, batch: Batch, phase: Literal["update", "actor", "ref"]) -> list[list[int]]:
        """This rank's micro-batches under `use_dynamic_bsz`; -1 (a copy of row 0) as in `_order`."""
        from megatron.core import parallel_state

        rl, rank = self.config.rl, parallel_state.get_data_parallel_rank()
        budget, most = (getattr(rl, f"{phase}_{key}") for key in ("max_packing_token_size", "dynamic_max_batch_size"))
        ordered = sorted(range(len(batch)), key=lambda row: int(batch.lengths[row]))
        ordered = [-1] * (-len(ordered) % self._together) + ordered
        lengths = [int(batch.lengths[max(row, 0)]) for row in ordered]
        parts = token_batches(lengths, budget, most, self._together)
        return [[ordered[place] for place in part] for part in parts][rank :: self.layout.dp]

    @property
    def _together(self) -> int:
        """What the number of micro-batches is a multiple of.

        Data-parallel ranks run in step, as experts are exchanged between them; virtual stages take groups of PP.
        """
        return self.layout.dp * (self.layout.pp if self.layout.vpp else 1)
