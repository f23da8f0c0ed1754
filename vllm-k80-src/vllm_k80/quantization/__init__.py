"""Quantized checkpoints, repacked once at load time into the layouts of `vllm_k80.ops`."""
