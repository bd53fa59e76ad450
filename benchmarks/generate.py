"""Compare generation with a plain PyTorch loop.

    python benchmarks/generate.py                                   # minimind2_small and minimind3, fp32
    python benchmarks/generate.py --model minimind2_small --rounds 32

The plain loop generates as MiniMind does: its own modules, a key-value cache that is concatenated every step, attention
by two matrix products, and top-k and top-p on all logits. The other side is the code of `inference.py`. Both have
random weights of the same sizes, and sample from the 50 most likely tokens at temperature 0.85 without stopping. Each
side runs in a process of its own. The sides alternate, so that other load on the machine affects both, and the median
of the pairs' ratios is printed. The program also compares a batch with its prompts one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from plain_model import PlainModel
from torch import Tensor

from minimind_mcore.models.config import ModelConfig
from minimind_mcore.models.presets import get_preset
from minimind_mcore.platform import cpu, device, processor

TEMPERATURE, TOP_K, TOP_P = 0.85, 50, 0.95


class Generating(PlainModel):
    """The plain loop."""

    @torch.inference_mode()
    def generate(self, ids: Tensor, tokens: int) -> Tensor:
        cache = None
        for _ in range(tokens):
            logits, cache = self(ids if cache is None else ids[:, -1:], cache)
            ids = torch.cat([ids, sample(logits[:, -1] / TEMPERATURE)], dim=-1)
        return ids


def sample(logits: Tensor) -> Tensor:
    logits[logits < torch.topk(logits, TOP_K)[0][..., -1, None]] = -float("inf")
    ordered, order = torch.sort(logits, descending=True)
    drop = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > TOP_P
    drop[..., 1:], drop[..., 0] = drop[..., :-1].clone(), 0
    logits[drop.scatter(1, order, drop)] = -float("inf")
    return torch.multinomial(torch.softmax(logits, dim=-1), num_samples=1)


Run = Callable[[Tensor], object]


def plain_run(config: ModelConfig, args: argparse.Namespace) -> Run:
    """The plain loop."""
    model: Any = Generating(config, config.max_position_embeddings).to(
        device.current().torch_device, DTYPES[args.dtype]
    )
    return lambda ids: model.generate(ids, args.tokens)


def kit_run(config: ModelConfig, args: argparse.Namespace) -> Run:
    """The generation of inference.py, without stop tokens."""
    import transformers

    from minimind_mcore.inference.generation import Generator
    from minimind_mcore.inference.loading import Loaded
    from minimind_mcore.inference.sampling import SamplingParams
    from minimind_mcore.preprocess.tokenize import TokenizerInfo

    model: Any = transformers.AutoModelForCausalLM.from_config(config.hf_config()).eval()
    info = TokenizerInfo("", "", config.vocab_size, None, None)
    loaded = Loaded(model.to(device.current().torch_device, DTYPES[args.dtype]), NoTokenizer(), info, config, "")
    generator = Generator(loaded, SamplingParams(temperature=TEMPERATURE, top_k=TOP_K, top_p=TOP_P), args.tokens)
    generator.stop = []
    return lambda ids: generator.complete(ids.tolist())


class NoTokenizer:
    """Stands for a tokenizer, because random weights generate no text."""

    eos_token_id = 2


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def serve(args: argparse.Namespace) -> None:
    """Run the measured process: for each line "BATCH CALLS" generate, and print wall-clock and CPU seconds."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    if args.side != "plain" and device.current().kind == "cpu":
        cpu.tune()
    config = get_preset(args.model[0])
    run = (plain_run if args.side == "plain" else kit_run)(config, args)
    for line in sys.stdin:
        batch, calls = map(int, line.split())
        prompts = torch.randint(3, config.vocab_size, (batch, args.prompt), device=device.current().torch_device)
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run(prompts)
        device.synchronize()
        print(json.dumps([time.perf_counter() - start, time.process_time() - busy]), flush=True)


class Side:
    """A measured process and its times."""

    def __init__(self, side: str, model: str, args: argparse.Namespace) -> None:
        options = [f"--{name}={getattr(args, name)}" for name in ("tokens", "prompt", "dtype", "threads")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--side", side, "--model", model, *options],
            env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, batch: int, calls: int = 1) -> tuple[float, float]:
        """Return wall-clock and CPU seconds of `calls` calls with `batch` prompts each."""
        assert self.process.stdin and self.process.stdout
        print(batch, calls, file=self.process.stdin, flush=True)
        wall, busy = json.loads(self.process.stdout.readline())
        return wall, busy

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(model: str, args: argparse.Namespace) -> None:
    """Call both sides alternately, `--rounds` times; print tokens/s and the medians of the pairs' ratios."""
    kit, plain = Side("kit", model, args), Side("plain", model, args)
    for batch in (1, 16):
        for side in (kit, plain):
            side.seconds(batch)  # the first call sets up
        pairs = []
        for number in range(args.rounds):
            sides = [kit, plain][:: -1 if number % 2 else 1]
            found = {side: side.seconds(batch) for side in sides}
            pairs.append((found[kit], found[plain]))
        rates = [f"{batch * args.tokens / min(pair[i][0] for pair in pairs):,.1f}" for i in (0, 1)]
        print(
            f"{model:<16} batch {batch:<3} best: kit {rates[0]}, plain {rates[1]} tokens/s; kit to plain {ratio(pairs)}"
        )
    pairs = [(kit.seconds(16), kit.seconds(1, calls=16)) for _ in range(max(1, args.rounds // 4))]
    print(f"{model:<16} one batch of 16 to 16 calls, kit: {ratio(pairs)}\n", flush=True)
    kit.close()
    plain.close()


def ratio(pairs: list[tuple[tuple[float, float], tuple[float, float]]]) -> str:
    """Format how many times faster the first side is: the median of the pairs, and their middle half."""
    texts = []
    for place, name in enumerate(("by the clock", "by CPU seconds")):
        ratios = sorted(second[place] / first[place] for first, second in pairs)
        middle = ratios[len(ratios) // 4 : len(ratios) - len(ratios) // 4]
        texts.append(f"{statistics.median(ratios):.2f} {name} ({middle[0]:.2f} to {middle[-1]:.2f})")
    return ", ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["minimind2_small", "minimind3"], help="dense presets")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each prompt")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=processor.usable_cores())
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--side", choices=("kit", "plain"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args)
        return
    found = device.current()
    print(f"{found.kind}: {found.name}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    print(f"prompts of {args.prompt} tokens, {args.tokens} new ones\n")
    for model in args.model:
        compare(model, args)


if __name__ == "__main__":
    main()
