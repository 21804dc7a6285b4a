"""What a run of train.py is made of: build, resume and save, validation. The story itself is train.py's."""
