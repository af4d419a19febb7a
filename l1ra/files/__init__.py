"""Reading and writing files: checkpoints, and plain LoRA in PEFT's format."""
