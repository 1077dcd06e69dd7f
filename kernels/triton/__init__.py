"""Triton kernels, installed as bmsn.kernels; imported by the ops when CUDA tensors come, never on a CPU host."""
