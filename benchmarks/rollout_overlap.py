"""Show how much of the generation of responses happens during the update, with `rl_config.blocking` true and false.

    python benchmarks/rollout_overlap.py --tokenizer data/tokenizer

One training rank and one rollout engine with a core each train minimind2_small on random prompts. The program prints
when each step is generated and trained, in seconds since the first generation, and the medians of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo import prepare, workload_parser

from minimind_mcore.models.presets import get_preset
from minimind_mcore.rl.models import model_section

WARM_UP = 1  # number of steps that are not measured


def generate(trajectories: Any, engines: Any, sampling: Any) -> None:
    """A rollout function that writes down when it began and ended."""
    began = time.time()
    engines.generate(trajectories, sampling)
    with open(os.environ["GENERATED"], "a", encoding="utf-8") as file:
        file.write(f"{json.dumps([began, time.time()])}\n")


def reward(response: str, label: str, **context: Any) -> float:
    """A reward that takes no time and differs between responses."""
    return len(set(response)) / (1 + len(response))


def run(args: argparse.Namespace, folder: Path, blocking: bool) -> None:
    """Train, and write the intervals of the updates and the seconds of the steps to a file."""
    from minimind_mcore.rl.config.load import resolve
    from minimind_mcore.rl.runtime.trainer import Trainer, train

    length = 2 * args.prompt_length + args.tokens
    tree = {
        "model": {args.model: model_section(get_preset(args.model))},
        "megatron_training": {
            "model": args.model, "global_batch_size": args.prompts, "seq_length": length, "train_iters": args.steps,
            "tokenizer_name_or_path": str(folder / "model"), "tokenizer_type": "PretrainedFromHF",
            "data_path": str(folder / "prompts"),
        },
        "actor_config": {
            "model": args.model, "micro_batch_size": 8, "lr": 1e-6, "lr_decay_style": "constant",
            "load": str(folder / "model"),
        },
        "rl_config": {
            "actor_resource": {"num_npus": 1}, "n_samples_per_prompt": args.responses, "init_kl_coef": 0.0,
            "mini_batch_size": args.prompts, "max_prompt_length": length, "num_cpus_for_placement_group": 1,
            "verifier_function": ["rollout_overlap:reward"], "verifier_weight": [1.0], "blocking": blocking,
        },
        "generate_config": {
            "infer_tensor_parallel_size": 1, "max_num_seqs": 64, "dtype": "float32",
            "sampling_config": {"temperature": 1.0, "max_tokens": args.tokens, "top_k": -1, "top_p": 1.0},
        },
        "minimind": {
            "precision": "fp32", "output_dir": str(folder / "run"), "sample_interval": 0,
            "rollout_resource": {"num_npus": 1}, "rollout_function": "rollout_overlap:generate",
        },
    }  # fmt: skip
    updates: list[tuple[float, float]] = []

    class Timed(Trainer):
        def update(self, scored: Any) -> Any:
            began = time.time()
            found = super().update(scored)
            updates.append((began, time.time()))
            return found

    os.environ.setdefault("RAY_ADDRESS", "local")
    trainer = Timed(resolve(tree))
    try:
        train(trainer)
    finally:
        trainer.groups.close()
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["timing/all"] for row in map(json.loads, lines) if "timing/all" in row]
    (folder / "found.json").write_text(json.dumps({"updates": updates, "steps": steps}), encoding="utf-8")


def measured(blocking: bool) -> None:
    """Run in a process of its own, and print the intervals."""
    with tempfile.TemporaryDirectory() as name:
        folder, here = Path(name), str(Path(__file__).parent)
        times = folder / "generated.jsonl"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]), "GENERATED": str(times),
        }  # fmt: skip
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", name, "--blocking", str(int(blocking))]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        generated = [json.loads(line) for line in times.read_text(encoding="utf-8").splitlines()]
    start, total = generated[0][0], 0.0
    print(f"\nblocking {str(blocking).lower()}:")
    for step, (own, update) in enumerate(zip(generated, found["updates"], strict=True), start=1):
        inside = sum(max(0.0, min(own[1], end) - max(own[0], begin)) for begin, end in found["updates"])
        total += inside
        spans = [f"{begin - start:6.2f} to {end - start:6.2f}" for begin, end in (own, update)]
        print(f"  step {step}: generated {spans[0]}, trained {spans[1]}; generated during an update: {inside:.2f} s")
    share = total / sum(end - begin for begin, end in generated[1:])
    median = statistics.median(found["steps"][WARM_UP:])
    print(f"  {share:.0%} of the generation from step 2 on is during an update; median of a step: {median:.2f} s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = workload_parser(__doc__)
    parser.add_argument("--model", default="minimind2_small", help="a preset (default: %(default)s)")
    parser.add_argument("--blocking", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.folder:
        prepare(args, args.model, args.folder)
        run(args, args.folder, bool(args.blocking))
        return
    for blocking in (True, False):
        measured(blocking)


if __name__ == "__main__":
    main()
