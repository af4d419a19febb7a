"""How well fine-tuning methods do at equal budgets, on real models and real text: ``python -m benchmarks.quality``."""
