"""The mechanism of L1RA: stateless functions, tensors in, tensors out. Imports torch and triton only."""

from l1ra_kernels import dispatch, reference

__all__ = ["dispatch", "reference"]
