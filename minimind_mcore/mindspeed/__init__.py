"""The only place that touches MindSpeed, MindSpeed-LLM or MindSpeed-RL."""
