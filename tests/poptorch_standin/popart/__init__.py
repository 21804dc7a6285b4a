"""A stand-in for PopART's Python module, of which the project only asks whether it is installed."""
