"""The one thread in which the model computes, whoever asks for it. What is computed, and in which order, is others'.

Each thread that computes gets OpenMP workers of its own. With two sets of them on the same cores each waits for
its turn at every small operation: the demo drew half as many pictures a second.
"""

from concurrent.futures import ThreadPoolExecutor

_THREAD = ThreadPoolExecutor(max_workers=1, thread_name_prefix="computing")


def compute(function, *args, **options):
    """What function(*args, **options) gives or raises, in that thread, after what was asked for before."""
    return _THREAD.submit(function, *args, **options).result()
