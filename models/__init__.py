"""MiniMind's architecture: presets, layer spec, weight rules, Hugging Face configs."""

if __name__ == "models":
    raise ImportError("import minimind_mcore.models instead of models: a second copy of its classes differs")
