"""LoRA trains as plain torch would, in every layout; nothing but adapters changes; merged, it is the same model."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import TRACKER, Corpus, Run, Server, facts, load, same
from helpers.posttrain_oracle import (
    DYNAMIC,
    FLAGS,
    HYPER,
    LAYOUTS,
    MODEL,
    PACKED,
    compare,
    in_steps,
    samples_in_order,
    sft_loss,
)  # fmt: skip
from helpers.twin import load_twin, train
from safetensors.torch import load_file
from torch import Tensor

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.converters.conversion import Conversion
from minimind_mcore.converters.main import main_v2
from minimind_mcore.inference import loading
from minimind_mcore.models import weights
from minimind_mcore.models.init import initial_tensor
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.posttrain import lora

RANK, ALPHA = 4, 24
TARGETS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
LORA = {"lora_r": RANK, "lora_alpha": ALPHA, "ckpt_format": "torch"}
TARGET_FLAGS = ["--lora-target-modules", *(target.split(".")[1] for target in TARGETS)]


def run_lora(server: Server, dialogues: Corpus, start: Path, folder: Path, place: str = "one", **flags: Any) -> Run:
    """A run on the weights of `start` with adapters on every target."""
    processes, parallel = LAYOUTS[place]
    how = {name: flags.pop(name) for name in ("hook", "environment", "check") if name in flags}
    data = dialogues.prefix.with_name(flags.pop("data", "chat"))
    options = FLAGS | parallel | LORA | {"stage": "sft", "pretrained_checkpoint": start, "data_path": data} | flags
    argv = [*dialogues.flags(PRESETS[MODEL], **options), *TARGET_FLAGS]
    return server.run(argv, folder, processes, posttrain=True, **how)


def whole(checkpoint: Path, config: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint of any TP, whole: B is cut as the rows of the weight, A as its columns."""
    ranks = [
        torch.load(file, weights_only=False)["model"]
        for file in sorted(checkpoint.glob("mp_rank_*/model_optim_rng.pt"))
    ]
    found = {}
    for name in (name for name, tensor in ranks[0].items() if isinstance(tensor, Tensor)):
        parts, target = [rank[name] for rank in ranks], name.split(".lora_")[0]
        cut = ".lora_" not in name or (".lora_B." in name) == target.endswith(("linear_qkv", "linear_fc1"))
        rule = f"{target}.weight" if ".lora_" in name else name
        found[name] = weights.unshard(rule, parts) if cut else parts[0]
        assert cut or all(torch.equal(parts[0], part) for part in parts), name
    return found


def merged(base: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + alpha / r B A."""
    changed = dict(base)
    for name in (name for name in adapters if ".lora_A." in name):
        weight = name.replace(".lora_A.default", "")
        changed[weight] = base[weight] + ALPHA / RANK * adapters[name.replace("lora_A", "lora_B")] @ adapters[name]
    return changed


class LiveTwin:
    """The transformers model, whose weights are merged anew in every forward pass."""

    def __init__(self, config: Any, base: dict[str, Tensor], adapters: dict[str, Tensor]) -> None:
        self.config, self.base, self.adapters = config, base, adapters
        self.twin = load_twin(config, weights.mcore_to_hf(base, config, "hf_fused"))

    def __call__(self, tokens: Tensor, use_cache: bool) -> Any:
        state = weights.mcore_to_hf(merged(self.base, self.adapters), self.config, "hf_fused")
        return torch.func.functional_call(self.twin, state, (tokens,), {"use_cache": use_cache})


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "one": ("chat", "one", {"recompute_granularity": "full", "recompute_method": "uniform"}),
    "TP2": ("chat", "TP2", DYNAMIC),
    "TP2 SP packed": ("packed", "TP2 SP", PACKED),
    "PP2": ("chat", "PP2", DYNAMIC),
    "DP2": ("chat", "DP2", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_lora_equals_plain_torch(server: Server, dialogues: Corpus, start: Path, tmp_path: Path, name: str) -> None:
    data, place, flags = CASES[name]
    found = run_lora(server, dialogues, start, tmp_path / "run", place, data=data, **flags)
    compare(found, expected(dialogues, start, data))


def expected(
    dialogues: Corpus,
    start: Path,
    data: str,
    known: dict[str, Any] = {},  # noqa: B006
) -> tuple[list[float], list[float]]:
    """Losses and norms of plain torch."""
    if data not in known:
        config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
        base, adapters = whole(start / "iter_0000001", config), {}
        for layer, target in itertools.product(range(config.num_layers), TARGETS):
            name = f"decoder.layers.{layer}.{target}"
            rows, columns = base[f"{name}.weight"].shape
            a = f"{name}.lora_A.default.weight"
            adapters[a] = initial_tensor(a, (RANK, columns), config, scheme="torch", seed=FLAGS["seed"])
            adapters[f"{name}.lora_B.default.weight"] = torch.zeros(rows, RANK)
        for tensor in adapters.values():
            tensor.requires_grad_()
        twin = LiveTwin(config, base, adapters)
        samples = samples_in_order(dialogues.prefix.with_name(data), "input_ids", "attention_mask", "labels")
        steps = in_steps(samples)
        known[data] = train(twin, config, steps, lambda m: sft_loss(twin, m), HYPER, list(adapters.values()))
    return known[data]  # type: ignore[no-any-return]


def dump_logits() -> None:
    """In every rank: the first micro-batch's tokens and this rank's shard of the logits go to $DUMP."""
    import os

    from minimind_mcore.posttrain import base, sft

    forward_step = sft.SFT.forward_step

    def dumping(self: Any, batch: Any, model: Any) -> Any:
        with torch.no_grad():
            logits = base.run_model(model, batch)
        torch.save((batch["tokens"], logits), Path(os.environ["DUMP"]) / f"{os.environ['RANK']}.pt")
        return forward_step(self, batch, model)

    sft.SFT.forward_step = dumping  # type: ignore[method-assign]


def test_adapters_alone_are_saved_resume_exactly_and_merge_to_the_same_model(
    server: Server, dialogues: Corpus, start: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    straight = run_lora(server, dialogues, start, tmp_path / "straight", "TP2 SP", save=one, save_interval=5)
    (one / TRACKER).write_text("5")
    resumed = run_lora(server, dialogues, start, tmp_path / "resumed", "TP2 SP", load=one, save=two)
    assert facts(resumed) == facts(straight)[5:] and len(facts(resumed)) == 5
    last = "iter_0000010"
    for file in ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"):
        assert same(load(one / last / file), load(two / last / file))
        assert all(".lora_" in name for name in load(one / last / file)["model"])

    config = PRESETS[MODEL].replace(vocab_size=dialogues.vocab_size)
    base, adapters = whole(start / "iter_0000001", config), whole(one / last, config)
    assert len(adapters) == 2 * len(TARGETS) * config.num_layers
    digest = lora.digest_of({(name, 0): lora.content_sum(tensor) for name, tensor in base.items()})
    assert load(one / last / "mp_rank_00/model_optim_rng.pt")["args"].lora_base == digest  # of TP2: of any layout
    sizes = [sum(t.numel() for t in load(two / last / f"mp_rank_0{rank}/model_optim_rng.pt")["model"].values())
             for rank in range(2)]  # fmt: skip
    assert sizes == [config.num_adapter_parameters(RANK, TARGET_FLAGS[1:], tp=2)] * 2
    assert sum(t.numel() for t in adapters.values()) == config.num_adapter_parameters(RANK, TARGET_FLAGS[1:])
    assert all(tensor.abs().max() > 0 for tensor in adapters.values())
    again = FLAGS | {"train_iters": 1, "lr": 0.0, "min_lr": 0.0, "finetune": True, "micro_batch_size": 4}
    hook, where = f"{__file__}:dump_logits", {"DUMP": str(tmp_path)}
    run_lora(server, dialogues, start, tmp_path / "live", "TP2", **again, load=two, hook=hook, environment=where)
    dumped = [load(tmp_path / f"{rank}.pt") for rank in range(2)]
    live = torch.cat([logits for _, logits in dumped], dim=-1)
    # The base is that of before the training: had it changed, the two would differ.
    twin = load_twin(config, weights.mcore_to_hf(merged(base, adapters), config, "hf_fused"))
    with torch.no_grad():
        difference = (twin(dumped[0][0], use_cache=False).logits - live).abs().max().item()
        unadapted = load_twin(config, weights.mcore_to_hf(base, config, "hf_fused"))(dumped[0][0]).logits
    print("largest difference of logits:", difference)
    assert difference <= 1e-5 < (unadapted - live).abs().max()

    # Inference from the two directories of checkpoints.
    conversion = Conversion(
        load_dir=start, save_dir=Path(), save_type="hf", layout=ParallelLayout(), dtype="fp32", lora_load=two
    )
    loaded = loading.load(*loading.open_both(conversion, str(dialogues.tokenizer)))
    with torch.no_grad():
        assert (loaded.model(dumped[0][0], use_cache=False).logits - live).abs().max() <= 1e-5

    main_v2([*"--load-model-type mg --save-model-type hf".split(), "--load-dir", str(start), "--lora-load", str(two),
             "--save-dir", str(tmp_path / "hf")])  # fmt: skip
    by_hand = weights.mcore_to_hf(merged(base, adapters), config, "hf")
    converted = load_file(tmp_path / "hf" / "model.safetensors")
    assert max((by_hand[name] - tensor).abs().max() for name, tensor in converted.items()) <= 1e-7


def test_lora_on_core_012(server_012: Server, dialogues: Corpus, start: Path, tmp_path: Path) -> None:
    compare(run_lora(server_012, dialogues, start, tmp_path / "run", "PP2"), expected(dialogues, start, "chat"))


def test_what_lora_cannot_load_is_said(server: Server, dialogues: Corpus, start: Path, tmp_path: Path) -> None:
    run_lora(server, dialogues, start, tmp_path / "run", train_iters=1, save=tmp_path / "adapters")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"load": tmp_path / "adapters", "lora_r": 8}, "lora_r is 4 there and 8 on the command line"),
        ({"load": start}, "found no LoRA adapters"),
        ({"pretrained_checkpoint": tmp_path / "adapters"}, "holds LoRA adapters: merge them"),
        ({"pretrained_checkpoint": tmp_path / "nothing"}, "does not exist; expected the initial weights"),
        ({"ckpt_format": "torch_dist"}, "adapters are saved with --ckpt-format torch"),
    ]
    for flags, message in cases:
        run = run_lora(server, dialogues, start, tmp_path / "refused", check=False, train_iters=2, **flags)
        assert run.codes == [1] and message in run.output and "Traceback" not in run.output, run.output


def edit(checkpoints: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change what a checkpoint of one rank holds; no manifest tells."""
    [file] = checkpoints.glob("iter_*/mp_rank_00/model_optim_rng.pt")
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    (file.parents[1] / "manifest.json").unlink()
    return checkpoints


def test_adapters_go_on_upon_their_own_base(server: Server, dialogues: Corpus, start: Path, tmp_path: Path) -> None:
    """Weights that differ in one number are others; a checkpoint without a record is believed."""
    adapters = tmp_path / "adapters"
    run_lora(server, dialogues, start, tmp_path / "run", train_iters=2, exit_interval=1, save=adapters)
    other = edit(
        Path(shutil.copytree(start, tmp_path / "other")),
        lambda state: state["model"]["decoder.layers.1.mlp.linear_fc2.weight"][3, 4].add_(0.1),
    )
    flags = {"load": adapters, "pretrained_checkpoint": other, "train_iters": 2}
    run = run_lora(server, dialogues, start, tmp_path / "refused", check=False, **flags)
    assert run.codes == [1] and "Traceback" not in run.output, run.output
    message = rf"trained on other weights \(digest \w+, of {start} as it was then\) than {other} has"
    assert re.search(message, run.output), run.output
    run = run_lora(server, dialogues, start, tmp_path / "anew", finetune=True, **flags)
    assert len(run.rows) == 2
    edit(adapters, lambda state: delattr(state["args"], "lora_base"))
    assert len(run_lora(server, dialogues, start, tmp_path / "older", **flags).rows) == 1
