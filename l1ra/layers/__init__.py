"""The adapted linear layer: its forward, its parameters, and how rows are added and removed."""
