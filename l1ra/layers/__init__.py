"""The adapted linear layer: its parameters, its forward, its changes of rank and its merging into the base weight."""
