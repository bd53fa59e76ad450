"""Forecasts of memory and time, compared with real models, hand-computed values and docs/benchmarks.md."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers.engine import ROOT

from minimind_mcore import arguments
from minimind_mcore.cli import dispatch
from minimind_mcore.errors import UserError
from minimind_mcore.forecast import layouts, machines, main, memory, speed
from minimind_mcore.forecast.memory import GIB, Workload
from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import PRESETS, get_preset
from minimind_mcore.platform.device import Device
from minimind_mcore.rl.config.lint import fit
from minimind_mcore.rl.config.load import compose, plain
from minimind_mcore.rl.runtime import dry_run
from minimind_mcore.training import summary
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.metrics import EndForecast
from minimind_mcore.validation import validate

H100, CPU = machines.machine("H100"), machines.machine("cpu")
FULL = [name for name in PRESETS if not name.endswith("_tiny")]


def flags_of(model: ModelConfig, more: str = "", seq: int = 256, batch: int = 2, world: int = 1) -> list[str]:
    """The flags of a training."""
    run = f"--seq-length {seq} --micro-batch-size {batch} --global-batch-size {8 * batch * world} --lr 1e-3"
    return [*model.megatron_flags(), *run.split(), "--train-iters", "2", *more.split()]


def work_of(
    model: ModelConfig | str, more: str = "", world: int = 1, sequences: int = 1, seq: int = 256, batch: int = 2
) -> Workload:
    """The workload of a training."""
    model = get_preset(model) if isinstance(model, str) else model
    args = arguments.parse(flags_of(model, more, seq, batch, world), posttrain=True)
    layout = validate(args, world)
    return Workload.from_flags(vars(args), layout, model, sequences)


TP, PP = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
EP, VPP = "--expert-model-parallel-size 2", f"{PP} --num-layers-per-virtual-pipeline-stage 1"
# Preset, flags, world size, sequence length: real models of each are built.
REAL = [
    ("minimind3_tiny", "", 1, 256),
    ("minimind3_tiny", "", 1, 1024),
    ("minimind2_moe_tiny", "", 1, 256),
    ("minimind3_tiny", TP, 2, 256),
    ("minimind3_tiny", VPP, 2, 256),
    ("minimind3_moe_tiny", EP, 2, 256),
    ("minimind2_moe_tiny", PP, 2, 256),
]


@pytest.fixture(scope="module")
def real() -> list[list[tuple[int, int]]]:
    """Parameters and kept bytes of the ranks of each row of REAL."""
    jobs = [(world, flags_of(get_preset(name), more, seq)) for name, more, world, seq in REAL]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DEVICE": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.model_ranks"], input=json.dumps(jobs), capture_output=True, text=True,
        env=environment | {"OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[list[tuple[int, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("row", range(len(REAL)))
def test_weights_are_those_of_the_largest_rank(row: int, real: list[list[tuple[int, int]]]) -> None:
    name, more, world, seq = REAL[row]
    found = memory.of_training(work_of(name, more, world, seq=seq), CPU)
    assert found["weights"] == 4 * max(parameters for parameters, _ in real[row])


@pytest.mark.parametrize("row", range(3))
def test_activations_are_what_autograd_keeps(row: int, real: list[list[tuple[int, int]]]) -> None:
    name, more, world, seq = REAL[row]
    found = memory.of_training(work_of(name, more, world, seq=seq), CPU)
    assert found["activations"] + found["logits"] == pytest.approx(real[row][0][1], rel=0.04)


def test_bytes_of_each_precision_and_optimizer() -> None:
    size = get_preset("minimind3_tiny").num_parameters()
    cases = {
        "": (4, 4, 0, 8),
        "--bf16": (2, 4, 4, 8),  # gradients are summed in fp32
        "--fp16": (2, 2, 4, 8),
        "--optimizer sgd --sgd-momentum 0.9": (4, 4, 0, 4),
        "--optimizer sgd --sgd-momentum 0": (4, 4, 0, 0),
    }
    for more, widths in cases.items():
        found = memory.of_training(work_of("minimind3_tiny", more), CPU)
        names = ("weights", "gradients", "master weights", "moments")
        assert [found[name] for name in names] == [width * size for width in widths], more
    shared = memory.of_training(work_of("minimind3_tiny", "--bf16 --use-distributed-optimizer", world=4), CPU)
    assert (shared["gradients"], shared["master weights"], shared["moments"]) == (4 * size, size, 2 * size)


def test_gloo_copies_what_it_gathers_over_several_ranks() -> None:
    size = get_preset("minimind3_tiny").num_parameters()
    two = memory.of_training(work_of("minimind3_tiny", "--use-distributed-optimizer", world=2), CPU)
    assert two["collectives"] == 4 * size * 1.5  # the shard of one rank, and the whole
    assert memory.of_training(work_of("minimind3_tiny", world=2), CPU)["collectives"] == 4 * size
    assert "collectives" not in memory.of_training(work_of("minimind3_tiny", "--use-distributed-optimizer"), CPU)


def test_a_mixture_shards_its_experts_over_fewer_ranks() -> None:
    model = get_preset("minimind3_moe_tiny")
    assert model.moe
    experts = 3 * model.hidden_size * model.moe.ffn_hidden_size * model.num_layers * 4 // 2
    dense = model.num_parameters() - 2 * experts
    found = memory.of_training(work_of(model, f"{EP} --use-distributed-optimizer", world=4), CPU)
    assert found["weights"] == 4 * (dense + experts) and found["moments"] == 8 * (dense / 4 + experts / 2)


def test_activations_and_logits_by_hand() -> None:
    model = get_preset("minimind3")  # hidden 768, 8 heads and 4 key-value heads of 96, MLP 2432, vocabulary 6400
    tokens = 32 * 340
    compiled = memory.of_training(work_of(model, "--bf16", seq=340, batch=32), H100)
    assert compiled["activations"] == 2 * 8 * tokens * (2 * 768 + 3 * (768 + 384) + 3 * 2432)
    assert compiled["logits"] == 12 * tokens * 6400
    assert memory.of_training(work_of(model, "--bf16", seq=340, batch=32), CPU)["logits"] == 4 * tokens * 6400
    half = memory.of_training(work_of(model, f"--bf16 {TP}", world=2, seq=340, batch=32), H100)
    assert half["activations"] == 2 * 8 * tokens * (10 * 768 + 3 * (768 + 384) + 3 * 2432) / 2
    assert half["logits"] == 12 * tokens * 3200
    again = "--recompute-granularity full --recompute-method uniform --bf16"
    layer = 10 * 768 + 3 * (768 + 384) + 3 * 2432
    recomputed = memory.of_training(work_of(model, again, seq=340, batch=32), H100)
    assert recomputed["activations"] == 2 * tokens * (8 * 768 + layer)
    # The first of two stages keeps two micro-batches of four layers, the last one of them and the logits.
    first = memory.of_training(work_of(model, f"--bf16 {PP}", world=2, seq=340, batch=32), H100)
    assert first["activations"] + first["logits"] == max(
        compiled["activations"], compiled["activations"] / 2 + compiled["logits"]
    )


def test_reference_and_rollouts_by_hand() -> None:
    model = get_preset("minimind3_tiny")
    alive = memory.of_training(work_of(model, f"--reference-live {TP}", world=2, sequences=2), CPU)
    assert alive["reference"] == 4 * (model.num_parameters() // 2)
    assert "reference" not in memory.of_training(work_of(model, sequences=2), CPU)
    rollouts = memory.Rollouts(responses=64, prompt_length=100, response_length=200, at_once=16)
    found = memory.of_rl(work_of(model), CPU, rollouts)
    assert found["KV cache"] == 16 * 300 * 2 * 4 * 2 * 32 * 4  # rows, positions, K and V, layers, heads, size, fp32
    assert found["reference"] == found["rollout engine"] == found["weights"] == 4 * model.num_parameters()


def test_bubble() -> None:
    found = [speed.bubble(1, 8), speed.bubble(4, 8), speed.bubble(4, 8, virtual=2)]
    assert found == pytest.approx([0, 3 / 11, 3 / 19])


def test_the_bubble_is_that_share_of_a_pipeline_s_time() -> None:
    seconds = speed.of_training(work_of("minimind3", f"--bf16 {PP}", world=2, batch=32), H100)
    pipeline = sum(seconds.values()) - seconds["DP"] - seconds["update"]
    assert seconds["bubble"] / pipeline == pytest.approx(1 / 17)  # 16 micro-batches


def test_volume_by_hand() -> None:
    model, hidden = get_preset("minimind3"), 2 * 2 * 256 * 768  # bf16, samples, tokens, hidden size
    assert speed.volume(work_of(model, f"--bf16 {TP}", world=2))["TP"] == 16 * (4 * 8 + 2) * hidden
    assert speed.volume(work_of(model, f"--bf16 {PP}", world=2))["PP"] == 16 * hidden
    size = model.num_parameters()
    assert speed.volume(work_of(model, "--bf16", world=4))["DP"] == 2 * 3 / 4 * 4 * size
    assert speed.volume(work_of(model, "--bf16 --use-distributed-optimizer", world=4))["DP"] == 3 / 4 * 6 * size
    assert speed.volume(work_of("minimind3_moe", f"--bf16 {EP}", world=2))["EP"] == 8 * 4 * 8 / 2 * hidden


@pytest.mark.parametrize(("stages", "per_chunk"), [(2, 4), (2, 2), (2, 1), (4, 2), (4, 1)])
def test_the_busiest_rank_of_a_pipeline(stages: int, per_chunk: int) -> None:
    """Count the transfers at each boundary between chunks: activations forward, gradients backward."""
    model, chunks = get_preset("minimind3"), 8 // per_chunk
    sends = [0] * stages
    for chunk in range(chunks - 1):
        sends[chunk % stages] += 1
        sends[(chunk + 1) % stages] += 1
    more = f"--bf16 --pipeline-model-parallel-size {stages}"
    if chunks > stages:
        more += f" --num-layers-per-virtual-pipeline-stage {per_chunk}"
    work = work_of(model, more, world=stages)
    hidden = 2 * 2 * 256 * 768
    assert speed.volume(work)["PP"] == work.num_microbatches * max(sends) * hidden
    # A rank waits for the transfers of both directions.
    seconds = speed.of_training(work, H100)["PP"]
    bandwidth, latency = speed.link(H100, 2, 1)
    waits = work.num_microbatches * 2 * (chunks // stages)
    assert seconds == pytest.approx(waits * (hidden / bandwidth + latency))


def test_more_is_never_less() -> None:
    base, longer = (work_of("minimind3", "--bf16", seq=seq, batch=32) for seq in (256, 512))
    assert sum(memory.of_training(longer, H100).values()) > sum(memory.of_training(base, H100).values())
    assert sum(speed.of_training(longer, H100).values()) > sum(speed.of_training(base, H100).values())
    batches = [work_of("minimind3", "--bf16", batch=batch) for batch in (1, 2, 4, 8)]
    sizes = [sum(memory.of_training(work, H100).values()) for work in batches]
    assert sizes == sorted(set(sizes))
    bandwidths = [speed.link(H100, ranks, 1)[0] for ranks in (2, 8, 16, 64)]
    assert bandwidths == [450e9, 450e9, 400e9, 400e9] and speed.link(H100, 2, 8)[0] == 50e9
    latencies = [speed.link(H100, ranks, 1)[1] for ranks in (2, 8, 16, 64, 1024)]
    assert latencies == sorted(set(latencies))


# Rows of docs/benchmarks.md: device, cores, preset, samples, tokens each, flags, tokens/s, tolerance.
MEASURED = [
    ("H100", 1, "minimind3", 96, 340, "--bf16", 904_665, 0.1),
    ("H100", 1, "minimind3", 16, 2048, "--bf16", 740_177, 0.1),
    ("H100", 1, "minimind3_moe", 96, 340, "--bf16", 139_642, 0.25),
    ("H100", 1, "minimind3_moe", 16, 2048, "--bf16", 197_613, 0.25),
    ("cpu", 2, "minimind2_small", 4, 340, "", 1_424, 0.1),
    ("cpu", 2, "minimind3", 4, 340, "", 631, 0.1),
]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0]} {row[2]} {row[3]} x {row[4]}")
def test_time_of_the_measured_trainings(row: tuple[str, int, str, int, int, str, float, float]) -> None:
    name, cores, preset, batch, seq, flags, measured, tolerance = row
    device = machines.machine(name).with_cores(cores)
    work = work_of(preset, flags, seq=seq, batch=batch)
    rate = speed.step_tokens(work) / sum(speed.of_training(work, device).values())
    assert rate == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(("batch", "seq"), [(96, 340), (16, 2048)])
def test_memory_of_the_measured_trainings(batch: int, seq: int) -> None:
    found = memory.of_training(work_of("minimind3", "--bf16", seq=seq, batch=batch), H100)
    assert sum(found.values()) == pytest.approx(9.8e9, rel=0.15)


def test_every_number_has_a_source() -> None:
    for name, row in machines.table().items():
        numbers = {field: value for field, value in row.items() if field not in ("kind", "names")}
        assert numbers.keys() == {field for field in vars(machines.machine(name)) if field not in ("name", "kind")}
        for field, (value, source) in numbers.items():
            assert value >= 0 and len(source) > 6, f"{name}: {field}"
            begins = ("benchmarks", "https://", "assumed", "tests/", "resident", "the memory")
            assert source.startswith(begins), f"{name}: {field}: {source}"


def test_devices_are_recognized_by_the_maker_s_name() -> None:
    assert machines.recognize("cuda", "NVIDIA H200") == H100
    assert machines.recognize("cuda", "NVIDIA A100-SXM4-80GB") is None
    ascend = machines.recognize("npu", "Ascend910B3")
    assert ascend and ascend.name == "910B"
    cores = machines.recognize("cpu", "any", 4)
    assert cores and cores.matmul_flops == 4 * CPU.matmul_flops


@pytest.mark.parametrize(
    ("preset", "device"), [*((name, "910B") for name in PRESETS), ("minimind3", "H100"), ("minimind3", "cpu")]
)
def test_plan_of_every_preset(preset: str, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", preset, "--devices", "8", "--device", device, "--memory", "32GiB"]) == 0
    printed = capsys.readouterr().out
    for stage in layouts.STAGES:
        assert f"\n{stage}: " in printed
    for field, (_, source) in list(machines.table()[device].items())[2:]:
        assert f"{field} " in printed and source in printed


@pytest.mark.parametrize("words", ["minimind3", "minimind3_moe --stage grpo"])
def test_the_plan_of_two_processes_has_a_column_for_every_part_of_any_layout(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only layouts with data parallelism have copies of collectives. No forecast is faster than the machine."""
    main.main([*words.split(), "--devices", "2", "--device", "cpu", "--memory", "64GiB"])
    printed = capsys.readouterr().out
    assert "collectives" in printed
    shares = [float(share) for share in re.findall(r"([\d.]+)%$", printed, re.M)]
    assert shares and max(shares) < 100


def test_layouts_are_those_that_validation_accepts_the_fastest_first() -> None:
    model = get_preset("minimind3_moe")
    found = layouts.propose("minimind3_moe", model, "pretrain", 16, H100, 40 * GIB)
    sizes = [(one.work.layout.tp, one.work.layout.pp, one.work.layout.ep) for one in found]
    assert [one.step for one in found] == sorted(one.step for one in found)
    # TP divides 4 key-value heads, PP 8 layers, EP 4 experts and the data-parallel ranks.
    expected = {(t, p, e) for t in (1, 2, 4) for p in (1, 2, 4, 8) for e in (1, 2, 4) if 16 % (t * p * e) == 0}
    assert set(sizes) == expected and len(sizes) == len(expected)
    assert all(one.bytes <= 40 * GIB for one in found)


def test_a_small_memory_takes_small_micro_batches_and_more_ranks() -> None:
    model = get_preset("minimind3")
    found = layouts.propose("minimind3", model, "pretrain", 8, H100, 2 * GIB)[0]
    assert found.bytes <= 2 * GIB and found.work.micro_batch_size < 32
    with pytest.raises(UserError, match=r"does not fit on 8 devices of 1 GiB: the smallest layout, TP=.* needs 1\.\d+"):
        layouts.propose("minimind3", model, "pretrain", 8, H100, GIB)


@pytest.mark.parametrize("text", ["0GiB", "-4GiB", "64", "lots", "64 parsecs", "1e999GiB", "..GiB", ""])
def test_impossible_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--memory: found .* expected a size above zero"):
        main.size(text)


def test_sizes() -> None:
    assert main.size("64GiB") == 64 * GIB and main.size("1.5 GB") == 1.5e9


@pytest.mark.parametrize("preset", FULL)
def test_scaling_says_where_it_stops_and_why(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows, why = layouts.scale(preset, get_preset(preset), machines.machine("910B"), 64 * GIB)
    main.print_scaling(preset, rows, why)
    printed = capsys.readouterr().out
    assert "10,000" in printed and f"{preset} stops scaling after" in printed
    assert all(row.best.work.layout.world_size <= row.devices for row in rows)
    good = [row.devices for row in rows if row.efficiency >= 0.5]
    for page in ("plan.md", "plan_zh.md"):
        assert f"| {preset} | 910B | {good[-1]:,} |" in (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert f"after {good[-1]:,} devices" in why and any(cause in why for cause in [*layouts.REASONS.values(), "idle"])


def test_plan_has_the_table_of_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", "minimind3_tiny", "--device", "H100", "--scaling"]) == 0
    printed = capsys.readouterr().out
    assert "TP PP EP DP" in printed and re.search(r"^ 10,000 ", printed, re.M) and "matmul_flops" in printed


def test_the_sizes_of_grpo_are_those_of_the_configuration() -> None:
    tree = yaml.safe_load((ROOT / "configs/rlxf/grpo_minimind3.yaml").read_text(encoding="utf-8"))
    rl, generate, train = tree["rl_config"], tree["generate_config"], tree["megatron_training"]
    responses = train["global_batch_size"] * rl["n_samples_per_prompt"] // rl["actor_resource"]["num_npus"]
    found = layouts.GRPO
    assert found.responses == responses and found.prompt_length == rl["max_prompt_length"]
    assert found.response_length == generate["sampling_config"]["max_tokens"]
    assert found.at_once == generate["max_num_seqs"]
    flags = f"--seq-length {train['seq_length']} --micro-batch-size {tree['actor_config']['micro_batch_size']}"
    assert layouts.GRPO_FLAGS.startswith(flags)


def test_the_end_is_announced_once_from_the_median() -> None:
    end = EndForecast()
    end.add(60.0, 10)  # warm-up
    assert end.announcement(80) == ""
    for seconds in (2.0, 2.0, 9.0):
        end.add(seconds, 10)
    assert end.remaining(70) == 140.0
    before = datetime.datetime.now() + datetime.timedelta(seconds=140)
    said = end.announcement(70)
    assert f"{before:%Y-%m-%d %H}" in said and "in 0:02:20" in said and "2 s per iteration" in said
    assert end.announcement(70) == ""


def test_a_dry_run_prints_the_forecast() -> None:
    args = arguments.parse(flags_of(get_preset("minimind3")))
    config = TrainConfig.from_args(args, validate(args, 1))
    lines = summary.forecast(config, 1)
    expected = sum(memory.of_training(work_of("minimind3"), CPU).values())
    assert lines["memory"].startswith(f"about {expected / GIB:.2f} GiB per rank (weights 0.24, ")
    assert re.match(r"about [\d.]+ s per iteration \(compute \d+%", lines["time"])
    assert lines["time"].partition("), ")[2].partition(";")[0].endswith(" for all")


def test_a_dry_run_without_data_does_not_claim_a_number_of_iterations() -> None:
    args = arguments.parse(flags_of(get_preset("minimind3")))
    args.train_iters = 1  # as a dry run sets it, without which no schedule can be checked
    config = TrainConfig.from_args(args, validate(args, 1))
    assert "; 1 iterations\n" in summary.describe(config) and " for all" in summary.describe(config)
    text = summary.describe(config, has_length=False)
    assert " for all" not in text and "as many iterations as the data has" in text


def test_a_dry_run_of_rl_has_policy_reference_cache_and_rollouts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fit(plain(compose("grpo_minimind_tiny", [], None, "cpu")), "grpo_minimind_tiny")
    dry_run.print_plan(config, pending=True)
    printed = capsys.readouterr().out
    for part in ("weights", "gradients", "moments", "reference", "rollout engine", "KV cache", "rollouts"):
        assert re.search(rf"^memory .*\b{part} \d", printed, re.M), part
    assert re.search(r"^time .* s per step \(rollout", printed, re.M)
    small = Device("cpu", "a CPU", 2, 2**26)
    monkeypatch.setattr(dry_run.device, "current", lambda: small)
    with pytest.raises(UserError, match=r"optimizer states need .* GiB per process, but it has 0.0 GiB"):
        dry_run.print_plan(config, pending=True)


def test_a_dry_run_of_rl_has_engines_apart_and_the_weights_of_steps_ahead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines with devices of their own take no memory of a device that trains."""

    def printed(*words: str) -> dict[str, str]:
        config = fit(plain(compose("grpo_minimind_tiny", list(words), None, "cpu")), "grpo_minimind_tiny")
        dry_run.print_plan(config, pending=True)
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line)

    apart = printed("minimind.rollout_resource.num_npus=3")
    assert "rollout engine" not in apart["memory"] and "KV cache" not in apart["memory"]
    assert re.match(r"3 on devices of their own, at most about .*\(rollout engine .*, KV cache ", apart["engines"])
    # Weights, gradients, two moments and the reference fit, and the engine's weights do not.
    size = int(5.5 * 4 * get_preset("minimind3_tiny").num_parameters())
    monkeypatch.setattr(dry_run.device, "current", lambda: Device("cpu", "a CPU", 1, size))
    printed("minimind.rollout_resource.num_npus=3")
    with pytest.raises(UserError, match="optimizer states need"):
        printed()
    with pytest.raises(UserError, match="optimizer states need"):  # copies of the weights of three steps
        printed("minimind.rollout_resource.num_npus=3", "rl_config.blocking=false", "minimind.staleness=3")
    rollouts = memory.Rollouts(responses=64, prompt_length=100, response_length=200, at_once=16, apart=True, copies=4)
    found = memory.of_rl(work_of("minimind3_tiny"), CPU, rollouts)
    assert found["copies of weights"] == 4 * found["weights"]


def test_the_table_of_many_hosts_is_that_of_the_program(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import rollout_scale

    assert rollout_scale.main([]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 6
    for page in ("docs/rl_cluster.md", "docs/rl_cluster_zh.md"):
        assert "\n".join(lines) in (ROOT / page).read_text(encoding="utf-8"), page
