"""How ranks are distributed: pure functions of numbers and tensors, without modules."""
