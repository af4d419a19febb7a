"""What is written to disk and read back: checkpoints, PEFT's LoRA files."""
