"""Text and conversations to Megatron data files; tokenizer training; the sample corpus."""
