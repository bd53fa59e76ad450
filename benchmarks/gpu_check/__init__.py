"""The GPU check that benchmarks/gpu_check.sh runs. docs/benchmarks.md describes its use."""
