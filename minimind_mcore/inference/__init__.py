"""Generate, chat and evaluate with any MiniMind model in any format, loaded as a transformers model."""
