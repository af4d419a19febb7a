"""The tensor operations of L1RA as stateless functions: Triton kernels, and their definitions in plain PyTorch."""

from l1ra_kernels import dispatch, reference

__all__ = ["dispatch", "reference"]
