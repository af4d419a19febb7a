"""The proof on a GPU, in one command from the root of the repository: ``python3 -m benchmarks.gpu`` (``make gpu``).

Correctness first, then whole trainings, a training step, linear layers, kernels, the card's ceilings and a
reallocation, each next to what it competes with; results go to ``benchmarks/results/<gpu>/``. Nothing needs to be
installed but torch, triton, transformers and pytest; peft and matplotlib are used where they are.
"""
