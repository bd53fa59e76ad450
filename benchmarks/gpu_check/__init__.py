"""The check of a GPU that benchmarks/gpu_check.sh runs; docs/benchmarks.md says how to use it."""
