"""Measurements, one program each.

- ``planted``: whether ranks find the layers that need them, on networks whose needs are known.
- ``quality``: fine-tuning methods at equal budgets, on real models and text.
- ``gpu``: correctness, speed and memory on a GPU.
- ``layer``: one adapted layer and a training step of a small model, beside PEFT, on any machine.
- ``compiled``: registers, spills and instructions of every compiled kernel; needs no GPU.
- ``waves``: programs and resident blocks of every launch of a decoder layer; needs no GPU.
- ``host``: host time of adapted layers, beside PEFT; needs no GPU.
- ``roofline``: modelled bytes, FLOPs and time of each design.
- ``tune``: tiles for the GPU at hand.

``common`` holds the code that several programs share, ``results`` what was measured. Records of ``planted`` and
``quality`` are JSON lines, one run a row: ``pandas.read_json("benchmarks/results/quality/rounded.jsonl", lines=True)``.
"""
