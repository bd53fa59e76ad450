"""Rehearsals of MindSpeed-RL for tests: its programs on this CPU, started by the kit's script, and what they wrote."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import rehearsal, weights_on_disk
from helpers.engine import ROOT
from minimind_mcore.models.presets import PRESETS
from minimind_mcore.rl.runtime import batch as batches

SCRIPT = ROOT / "examples/rlxf/grpo_minimind_single.sh"
TIMEOUT = 1500  # seconds for one run; most of it is the import of MindSpeed-LLM in each of Ray's processes
VALUE = re.compile(r"\| ([\w:/.]+) : ([-+.\deE]+)")
EOS = 2  # of MiniMind's tokenizers
# Eight prompts with four responses each, two steps.
BATCH = ("megatron_training.train_iters=2", "megatron_training.global_batch_size=8", "megatron_training.seq_length=256",
         "rl_config.mini_batch_size=8", "rl_config.n_samples_per_prompt=4", "rl_config.max_prompt_length=192",
         "rl_config.actor_forward_micro_batch_size=16", "rl_config.ref_forward_micro_batch_size=16",
         "generate_config.max_model_len=256", "generate_config.sampling_config.max_tokens=16",
         "actor_config.micro_batch_size=16",
         "minimind.rewards=[{path: 'helpers.rl_rehearsal:even', weight: 1.0}]")  # fmt: skip
# The two sections of other workers; a single NPU has no group over which ZeroMQ could send.
SEPARATE = ("rl_config.zmq_communication=false",)


def even(response: str, label: str, **context: object) -> float:
    """1 for an even number of letters."""
    return float(len(response) % 2 == 0)


even.wrong = 0.0  # type: ignore[attr-defined]


def missing() -> str:
    """Why there can be no rehearsal here; empty where there can."""
    if reason := rehearsal.missing():
        return reason
    unset = [name for name in ("MINDSPEED_RL_HOME", "MINIMIND_TOKENIZER_DIR") if not os.environ.get(name)]
    return f"{', '.join(unset)} not set: no sources of MindSpeed-RL to rehearse with" if unset else ""


@dataclass
class RlInputs:
    """Prompts, models and their checkpoints in a folder."""

    folder: Path

    @property
    def data(self) -> Path:
        """Prefix of the prompts."""
        return self.folder / "sums"

    @functools.cache  # noqa: B019 (one object in a session)
    def model(self, name: str) -> Path:
        """The Hugging Face directory of a preset with random weights."""
        config = PRESETS[name]
        state = weights_on_disk.state_dict(config, "hf", seed=3)
        kind = "Qwen3Moe" if config.moe else "Qwen3" if config.qk_layernorm else "Llama"
        found = {"architectures": [f"{kind}ForCausalLM"]}  # vLLM chooses its class by this name
        folder = weights_on_disk.write_hf(self.folder / f"{name}-hf", config, state, **found)
        for file in tokenizer().iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        if not config.moe:
            _let_end(folder)
        return folder

    @functools.cache  # noqa: B019
    def weights(self, name: str, tp: int) -> Path:
        """The Megatron checkpoint of a preset; the experts of a mixture are grouped."""
        target = self.folder / f"{name}-{tp}-mg"
        grouped = ["--moe-grouped-gemm"] if PRESETS[name].moe else []
        where = {"LOAD_DIR": str(self.model(name)), "SAVE_DIR": str(target), "TP": str(tp)}
        rehearsal.run_script("ckpt_convert_minimind_hf2mcore.sh", *grouped, rehearse=False, **where)
        return target

    def __hash__(self) -> int:
        return hash(self.folder)


def _let_end(folder: Path) -> None:
    """Make the end token likely as the first of a response, so that responses differ in length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = AutoTokenizer.from_pretrained(tokenizer()).apply_chat_template(
        [{"role": "user", "content": "3+4=?"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        hidden = model.model(torch.tensor([asked])).last_hidden_state[0, -1]
        rest = model.lm_head(hidden).logsumexp(0)
        row = hidden * (rest + 2) / hidden.square().sum()
    state = tensors(folder)
    state["model.embed_tokens.weight"][EOS] = row
    save_file(state, folder / "model.safetensors")


def tokenizer() -> Path:
    """MiniMind-3's."""
    return Path(os.environ["MINIMIND_TOKENIZER_DIR"]) / "v3"


def make_inputs(folder: Path) -> RlInputs:
    """Write 64 sums, and convert them."""
    numbers, lines = random.Random(1), []
    for _ in range(64):
        a, b = numbers.randint(0, 99), numbers.randint(0, 99)
        lines.append(json.dumps({"question": f"{a}+{b}=?", "answer": str(a + b)}) + "\n")
    (folder / "sums.jsonl").write_text("".join(lines), encoding="utf-8")
    inputs = RlInputs(folder)
    subprocess.run(
        [sys.executable, str(ROOT / "preprocess_data.py"), "--config",
         str(ROOT / "configs/datasets/grpo_minimind_math.yaml"), "--input", str(folder / "sums.jsonl"),
         "--tokenizer-name-or-path", str(tokenizer()), "--output-prefix", str(inputs.data)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    return inputs


@dataclass(frozen=True)
class Run:
    """What a run of MindSpeed-RL printed.

    Attributes:
        output: all of it.
        steps: the metrics of each step, "iteration" among them.
    """

    output: str
    steps: list[dict[str, float]]


def overrides(
    inputs: RlInputs, folder: Path, config: str, model: str, npus: int, tp: int, load: Path
) -> dict[str, str]:
    """Hydra overrides of the configuration `config` for a model."""
    sections = {"actor_config", "megatron_training"}
    sections |= {"critic_config"} if config.startswith("ppo") else set()
    sections |= {"ref_config", "reward_config"} if "separate" in config else set()
    found = {f"{section}.model": model for section in sections} | {"model": f"[{model}]"}
    loading = sections - {"megatron_training"}
    found |= {f"{section}.load": str(load) for section in loading}
    found |= {f"{section}.tensor_model_parallel_size": str(tp) for section in loading}
    if "critic_config" in sections:
        found |= {"critic_config.save": str(folder / "critic"), "critic_config.micro_batch_size": "16"}
    return found | {
        "megatron_training.data_path": str(inputs.data),
        "megatron_training.tokenizer_name_or_path": str(inputs.model(model)),
        "actor_config.save": str(folder / "checkpoints"),
        "generate_config.infer_tensor_parallel_size": str(tp),
        "rl_config.actor_resource.num_npus": str(npus),
        "minimind.output_dir": str(folder),
    }


def run(
    inputs: RlInputs, folder: Path, config: str, model: str, npus: int, tp: int, *more: str, **settings: str
) -> Run:
    """Two steps of MindSpeed-RL's program of a configuration, by examples/rlxf/grpo_minimind_single.sh."""
    given = overrides(inputs, folder, config, model, npus, tp, inputs.weights(model, tp))
    words = [f"{key}={value}" for key, value in given.items()]
    devices = npus * (2 if "separate" in config else 1)
    environment = {
        **os.environ, "REHEARSE": "1", "CONFIG": config, "NPUS_PER_NODE": str(devices),
        "NPU_EMULATION_STRICT": "report", "PYTHONPATH": str(ROOT / "tests"), **settings,
    }  # fmt: skip
    environment.pop("DEVICE", None)
    done = subprocess.run(
        ["bash", str(SCRIPT), *words, *BATCH, *more], env=environment, cwd=ROOT, timeout=TIMEOUT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output.log").write_text(done.stdout, encoding="utf-8")
    assert done.returncode == 0, f"{config} ended with {done.returncode}\n{done.stdout[-6000:]}"
    found = re.findall(r"\] iteration: (\d+) / \d+ (\|.*)", done.stdout)
    steps = [{"iteration": int(number), **_metrics(line)} for number, line in found]
    return Run(done.stdout, steps)


def _metrics(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in VALUE.findall(line)}


def run_embedded(inputs: RlInputs, folder: Path, model: str, *more: str) -> str:
    """The same two steps by the embedded trainer, in bf16; returns what it printed."""
    given = overrides(inputs, folder, "grpo", model, 1, 1, inputs.weights(model, 1))
    words = [f"{key}={value}" for key, value in given.items()]
    words += ["minimind.precision=bf16", "minimind.weight_check_interval=0"]
    environment = {
        **os.environ,
        "DEVICE": "cpu",
        "BACKEND": "embedded",
        "PYTHONPATH": str(ROOT / "tests"),
        "RAY_ADDRESS": "local",
    }
    done = subprocess.run(
        [sys.executable, "train_grpo.py", "--config-name", "grpo_minimind_tiny", *words, *BATCH, *more],
        env=environment, cwd=ROOT, timeout=TIMEOUT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face directory."""
    return load_file(folder / "model.safetensors")


def in_groups(update: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Sort the rows of a recorded batch by prompt: MindSpeed-RL draws them in any order (its transfer_dock.py)."""
    ids = update["input_ids"].tolist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    found = {name: rows[order] for name, rows in update.items() if isinstance(rows, torch.Tensor)}
    assert found["advantages"][:, 0].view(-1, 4).mean(1).abs().max() < 1e-5, "two groups have the same prompt"
    return found


def save_for_replay(update: Mapping[str, Any], generated: list[dict[str, Any]], folder: Path, step: int) -> None:
    """Write what MindSpeed-RL's actor trained on as the embedded trainer's rollouts of a step.

    An advantage of MindSpeed-RL is a reward that has been normalised in its group, and stays the same if that is done
    again.
    """
    prompts, responses, sizes = [], [], zip(update["prompt_length"], update["response_length"], strict=True)
    for row, answer, (first, count) in zip(update["input_ids"], update["responses"], sizes, strict=True):
        prompts.append(row[: int(first)].tolist())
        responses.append(answer[: int(count)].tolist())
    by_ids = {(tuple(one["prompt"]), tuple(one["response"])): one["logprobs"] for one in generated}
    logp = [by_ids[tuple(p), tuple(r)] for p, r in zip(prompts, responses, strict=True)]
    batch = batches.make(prompts, responses, logp, [r[-1] == EOS for r in responses], list(range(len(prompts))))
    batch.rewards = update["advantages"][:, 0].float()
    texts = [{"prompt": "", "response": "", "label": ""}] * len(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"batch": batch.state_dict(), "texts": texts, "consumed": 8 * step, "metrics": {}}
    torch.save(content | {"n_samples_per_prompt": 4}, folder / f"rollouts-{step:07d}.pt")


def generated(path: Path) -> list[dict[str, Any]]:
    """The responses that the stand-in of vLLM wrote on rank 0."""
    return [json.loads(line) for line in Path(f"{path}.0.jsonl").read_text(encoding="utf-8").splitlines()]


def logp_difference(update: Mapping[str, Any], kept: Mapping[str, torch.Tensor]) -> float:
    """Compare the reference's log-probabilities, of which both trainers have kept theirs: relative, in the 2-norm.

    A single token tells less: bf16 moves some by 4e-2, against fp32, in transformers as in both trainers.
    """
    pairs = zip(update["ref_log_prob"], kept["ref_logp"], update["response_length"], strict=True)
    theirs, ours = zip(*((theirs[: int(n)].float(), ours[: int(n)]) for theirs, ours, n in pairs), strict=True)
    return ((torch.cat(theirs) - torch.cat(ours)).norm() / torch.cat(ours).norm()).item()
