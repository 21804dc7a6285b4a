"""A package, so that no package of this name among the installed ones stands before it."""
