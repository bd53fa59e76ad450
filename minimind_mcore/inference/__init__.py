"""Generate, chat, evaluate: any MiniMind, whatever its files, as a transformers model."""
