"""What stands around a run: command lines, checkpoints, parameter groups, learning rates, the COCO download. Imports no
sibling room.
"""
