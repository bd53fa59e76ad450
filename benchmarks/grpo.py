"""Compare a GRPO step of the Ray trainer with a step of TRL's GRPOTrainer.

    python benchmarks/grpo.py --tokenizer data/tokenizer                    # minimind3_tiny and minimind2_small, fp32
    python benchmarks/grpo.py --tokenizer data/tokenizer --model minimind3_tiny --steps 8
    python benchmarks/grpo.py --tokenizer data/tokenizer --vllm PYTHON      # also with vLLM: see requirements/vllm.sh

Both sides get the same random weights, prompts, numbers of responses and of tokens, and a reference model. Both
generate with the transformers model (TRL with its `generate`) on all cores. Each side runs in a process of its own, and
the sides alternate. The program prints the medians of a step and its phases, the ratio of the steps, and the share of a
step that is neither rollout nor update nor the reference's forward pass.
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
from pathlib import Path
from typing import Any

import numpy as np

from minimind_mcore.models.presets import get_preset
from minimind_mcore.preprocess.indexed import IndexedWriter
from minimind_mcore.rl.models import model_section

SIDES = ("ours", "vllm", "trl")
WARM_UP = 1  # number of steps that are not measured


def reward(response: str, label: str, **context: Any) -> float:
    """A reward that takes no time and differs between responses."""
    return len(set(response)) / (1 + len(response))


def prepare(args: argparse.Namespace, model: str, folder: Path) -> None:
    """Write weights in Hugging Face format, and prompts for both sides."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(get_preset(model).hf_config()).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.save_pretrained(folder / "model")
    numbers = np.random.default_rng(0)
    prompts = []
    while len(prompts) < args.prompts * args.steps:
        ids = numbers.integers(300, tokenizer.vocab_size, size=args.prompt_length).tolist()
        text = tokenizer.decode(ids)
        prompts.append((text, tokenizer(text, add_special_tokens=False)["input_ids"]))
    (folder / "prompts.json").write_text(json.dumps([text for text, _ in prompts]), encoding="utf-8")
    for name, rows in (("input_ids", [ids for _, ids in prompts]), ("labels", [[400]] * len(prompts))):
        with IndexedWriter(folder / f"prompts_packed_{name}_document") as writer:
            writer.add(np.concatenate(rows), np.array([len(row) for row in rows]))


def vllm(args: argparse.Namespace, model: str, folder: Path) -> list[dict[str, float]]:
    """Run steps of this kit's trainer with vLLM as its rollout engine."""
    return ours(args, model, folder, "vllm")


def ours(args: argparse.Namespace, model: str, folder: Path, engine: str = "transformers") -> list[dict[str, float]]:
    """Run steps of this kit's trainer."""
    from minimind_mcore.rl.config.load import resolve
    from minimind_mcore.rl.runtime.trainer import run

    rows = args.prompts * args.responses
    length = 2 * args.prompt_length + args.tokens
    tree = {
        "model": {model: model_section(get_preset(model))},
        "megatron_training": {
            "model": model, "global_batch_size": args.prompts, "seq_length": length, "train_iters": args.steps,
            "tokenizer_name_or_path": str(folder / "model"), "tokenizer_type": "PretrainedFromHF",
            "data_path": str(folder / "prompts"),
        },
        "actor_config": {
            "model": model, "micro_batch_size": args.micro, "lr": 1e-6, "lr_decay_style": "constant",
            "load": str(folder / "model"),
        },
        "rl_config": {
            "actor_resource": {"num_npus": args.processes}, "n_samples_per_prompt": args.responses,
            "mini_batch_size": args.prompts, "init_kl_coef": 0.04, "max_prompt_length": length,
            "num_cpus_for_placement_group": 1, "verifier_function": ["grpo:reward"], "verifier_weight": [1.0],
        },
        "generate_config": {
            "infer_tensor_parallel_size": 1, "max_num_seqs": rows, "dtype": "float32", "enforce_eager": True,
            "max_model_len": length, "max_num_batched_tokens": rows * length,
            "sampling_config": {"temperature": 1.0, "max_tokens": args.tokens, "top_k": -1, "top_p": 1.0},
        },
        "minimind": {
            "precision": "fp32", "rollout_engine": engine, "output_dir": str(folder / engine), "sample_interval": 0,
        },
    }  # fmt: skip
    os.environ.setdefault("RAY_ADDRESS", "local")
    run(resolve(tree))
    lines = (folder / engine / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.startswith("timing/")} for line in lines]


def trl(args: argparse.Namespace, model: str, folder: Path) -> list[dict[str, float]]:
    """Run steps of TRL's trainer."""
    import datasets
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    torch.set_num_threads(os.cpu_count() or 1)
    steps: list[dict[str, float]] = []

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate(self, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate(*arguments, **more)
            self.rollout = time.perf_counter() - began
            return found

        def _generate_and_score_completions(self, *arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            found = super()._generate_and_score_completions(*arguments, **more)
            self.before = time.perf_counter() - began
            return found

    class Clock(TrainerCallback):  # type: ignore[misc]
        trainer: Any = None

        def on_step_begin(self, *arguments: Any, **more: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            seconds, trainer = time.perf_counter() - self.began, self.trainer
            row = {"timing/all": seconds, "timing/rollout": trainer.rollout, "timing/update": seconds - trainer.before}
            steps.append(row)

    rows = args.prompts * args.responses
    config = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=rows // args.micro, num_generations=args.responses, max_steps=args.steps,
        max_completion_length=args.tokens, beta=0.04, temperature=1.0, learning_rate=1e-6, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1000, disable_tqdm=True,
        dataloader_num_workers=0, lr_scheduler_type="constant", shuffle_dataset=False,
    )  # fmt: skip
    texts = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    clock = Clock()
    trainer = Timed(
        model=str(folder / "model"),
        reward_funcs=lambda completions, **columns: [reward(text, "") for text in completions],
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in texts]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    return steps


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    counted = [step for step in steps[WARM_UP:] if "timing/all" in step]
    return {name: statistics.median(step.get(name, 0.0) for step in counted) for name in counted[-1]}


def compare(args: argparse.Namespace, model: str) -> None:
    """Run both sides, each in a process of its own, and print their medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args, model, folder)
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        found = {}
        environment = os.environ | {"PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        for side in [side for side in SIDES if args.vllm or side != "vllm"]:
            python = args.vllm if side == "vllm" else sys.executable
            command = [python, __file__, *sys.argv[1:], "--side", side, "--folder", name, "--model", model]
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            found[side] = medians(json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))
    print(f"\n{model}: {args.prompts} prompts x {args.responses} responses x {args.tokens} tokens, seconds of a step")
    for side, row in found.items():
        print(f"  {side:<5}", *(f"{name.removeprefix('timing/')} {seconds:.3f}" for name, seconds in row.items()))
    mine = found["ours"]
    work = sum(mine.get(f"timing/{name}", 0.0) for name in ("rollout", "update", "reference_model"))
    print(f"  TRL's step takes {found['trl']['timing/all'] / mine['timing/all']:.2f} times as long as ours")
    print(
        f"  of ours {1 - work / mine['timing/all']:.1%} is neither rollout, update nor the reference's pass", flush=True
    )


def workload_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the benchmarks' GRPO steps."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="directory of a tokenizer of 6400 ids")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = workload_parser(__doc__)
    parser.add_argument("--model", action="append", help="presets (default: minimind3_tiny, minimind2_small)")
    parser.add_argument("--micro", type=int, default=16, help="rows of a micro-batch")
    parser.add_argument("--processes", type=int, default=2, help="training ranks, and rollout engines, of our side")
    parser.add_argument("--vllm", help="interpreter of requirements/vllm.sh: measure the kit with vLLM too")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        steps = {"ours": ours, "vllm": vllm, "trl": trl}[args.side](args, args.model[-1], args.folder)
        (args.folder / f"{args.side}.json").write_text(json.dumps(steps), encoding="utf-8")
        return
    for model in args.model or ["minimind3_tiny", "minimind2_small"]:
        compare(args, model)


if __name__ == "__main__":
    main()
