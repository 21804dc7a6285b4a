"""Files and schedules around a run: checkpoints, parameter groups, learning rates, the COCO download. Imports no
sibling room.
"""
