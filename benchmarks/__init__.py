"""Speed beside dalle-pytorch and the machine's own limits, in one run: python -m benchmarks. Nothing imports it."""
