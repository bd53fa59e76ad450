"""Post-training: supervised fine-tuning, LoRA, DPO, distillation. Each is a `training.job.Job`."""
