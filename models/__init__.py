"""What MiniMind is: architecture presets, layer spec, weight rules, HF config."""
