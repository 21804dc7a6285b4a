"""A stand-in for PopART's Python module, which the project does not use beyond asking whether it is there."""
