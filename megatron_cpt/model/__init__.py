"""megatron-core's GPT, built from run.yaml. Without CUDA, call `backend.cpu.install` before importing this package."""
