"""A reward model with the interface of InternLM2's: a directory with its own code (`get_score`) and random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, Qwen3Config

# The code that travels with the weights. Like InternLM2's it writes the conversation with the tokenizer's template,
# appends the token of the reward, and reads the score there.
CODE = """
import torch
from transformers import Qwen3Config, Qwen3Model


class TinyForRewardModel(Qwen3Model):
    config_class = Qwen3Config

    def __init__(self, config):
        super().__init__(config)
        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @torch.no_grad()
    def get_score(self, tokenizer, conversation):
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False)
        ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([ids, torch.tensor([[self.config.reward_token_id]])], dim=1)
        return float(self.v_head(self(ids).last_hidden_state[:, -1]))
"""


def write_reward_model(folder: Path, tokenizer: Path) -> Path:
    """Write a reward model that reads conversations with a tokenizer; its scores lie between -3 and 3, mostly."""
    folder.mkdir(parents=True)
    (folder / "modeling_tiny.py").write_text(CODE, encoding="utf-8")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    own: dict[str, Any] = {"reward_token_id": 3, "auto_map": {"AutoModel": "modeling_tiny.TinyForRewardModel"}}
    Qwen3Config(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0,
        architectures=["TinyForRewardModel"], **own,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    with torch.no_grad():
        model.v_head.weight.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder
