"""Allocation of the rank budget to the adapters: pure functions of numbers and tensors, without modules."""
