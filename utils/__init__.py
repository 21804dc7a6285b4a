"""Command lines, checkpoints, parameter groups, learning rates and the COCO download."""
