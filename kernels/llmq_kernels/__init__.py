"""Triton kernels for matrices of packed low-bit integers: tensors in, tensors out."""
