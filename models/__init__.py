"""The networks: plain PyTorch, the same on every machine. Nothing here reads files of pictures or text, or knows of a
training loop.
"""
