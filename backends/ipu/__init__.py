"""Graphcore IPUs through PopTorch: how they train, and how they evaluate and sample."""
