"""Who draws next, what is drawn together, and what happens where somebody leaves or a drawing fails."""

import time

import pytest
import torch

from generation.images import generate_batch, plan_image, to_image
from service.queue import Busy, GenerationQueue

PROMPT = "a red circle"


@pytest.fixture
def queue(loaded, drawing):
    queue = GenerationQueue(loaded, max_jobs=8)
    queue.start()
    yield queue
    drawing.release()
    queue.stop(20)


def pictures(loaded, *seeds, prompt=PROMPT, **sampling):
    return [plan_image(loaded, prompt, seed, sampling) for seed in seeds]


def wait(*jobs):
    for job in jobs:
        assert job.ended.wait(20)


def occupied(queue, loaded, drawing):
    """A drawing that has begun and is held up, so that what is submitted next waits."""
    drawing.hold()
    job = queue.submit("first", pictures(loaded, 1000))
    drawing.began(1)
    return job


def test_pictures_of_several_people_are_drawn_together(loaded, drawing, queue):
    first = occupied(queue, loaded, drawing)
    jobs = [queue.submit(f"client {seed}", pictures(loaded, seed, prompt=f"a {seed} star")) for seed in (1, 2, 3)]
    jobs.append(queue.submit("another", pictures(loaded, 4, temperature=0.5)))
    jobs.append(queue.submit("another", pictures(loaded, 5)))  # goes with the others, and what waits before it does not
    drawing.before, released = lambda seeds: queue.cancel(jobs[0]), time.monotonic()
    drawing.release()
    wait(first, *jobs)
    assert drawing.batches == [[1000], [1, 2, 3, 5], [4]]
    assert [job.ready for job in jobs] == [0, 1, 1, 1, 1] and first.started < released < jobs[1].started


def test_a_small_request_does_not_wait_for_a_large_one(loaded, drawing, queue):
    first = occupied(queue, loaded, drawing)
    large = queue.submit("greedy", pictures(loaded, *range(20)))
    more = queue.submit("greedy", pictures(loaded, *range(20, 40)))
    small = queue.submit("modest", pictures(loaded, 50, 51))
    drawing.release()
    wait(first, large, more, small)
    assert {50, 51} <= set(drawing.batches[1])
    assert sorted(sum(drawing.batches[1:], [])) == [*range(40), 50, 51]
    assert all(len(batch) <= loaded.batch_size for batch in drawing.batches)


def test_pictures_that_go_with_no_others_get_their_turn(loaded, drawing, queue):
    first = occupied(queue, loaded, drawing)
    many = [queue.submit(f"client {i}", pictures(loaded, *range(10 * i, 10 * i + 8))) for i in range(1, 4)]
    odd = queue.submit("odd", pictures(loaded, 99, temperature=0.5))
    drawing.release()
    wait(first, odd, *many)
    turn = next(number for number, batch in enumerate(drawing.batches) if 99 in batch)
    assert drawing.batches[turn] == [99] and turn <= 2


def test_calls_without_end_do_not_hold_up_batches(loaded, drawing, queue):
    first, batches = occupied(queue, loaded, drawing), []

    def call():
        batches.append(len(drawing.batches))
        if len(batches) < 3:
            queue.call(call)

    queue.call(call)
    job = queue.submit("a", pictures(loaded, 1))
    drawing.release()
    wait(first, job)
    assert batches.count(1) == 1


def test_cancelled_images_are_given_up_or_never_begun(loaded, drawing, queue):
    first = occupied(queue, loaded, drawing)
    gone = queue.submit("gone", pictures(loaded, *range(10)))
    stays = queue.submit("stays", pictures(loaded, 77))
    for job in (gone, gone, first):
        queue.cancel(job)
    drawing.release()
    wait(first, stays, gone)
    assert drawing.batches == [[1000], [77]]
    assert drawing.codes == 1 + loaded.model.image_seq_len  # one of the batch that was held up, then it ended
    assert gone.cancelled and gone.error is None and gone.ready == 0 and not stays.cancelled
    assert queue.images_generated == 1 and first.images == [None]


def test_a_batch_that_finds_no_memory_is_halved(loaded, drawing, queue):
    def before(seeds):
        if len(seeds) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    first = occupied(queue, loaded, drawing)
    drawing.before = before
    job = queue.submit("a", pictures(loaded, 13, 14, 15))
    drawing.release()
    wait(first, job)
    size, loaded.batch_size = loaded.batch_size, 4
    assert size == 1 and job.error is None and job.ready == 3
    assert job.images[2].tobytes() == to_image(loaded.decode(generate_batch(loaded, pictures(loaded, 15)))[0]).tobytes()


def test_a_full_queue_says_so(loaded, drawing, queue):
    first = occupied(queue, loaded, drawing)
    own = [queue.submit("greedy", pictures(loaded, seed)) for seed in range(4)]  # half of the queue
    with pytest.raises(Busy, match="try again"):
        queue.submit("greedy", pictures(loaded, 9))
    others = [queue.submit(f"client {seed}", pictures(loaded, seed)) for seed in range(3)]
    with pytest.raises(Busy, match=r"^Too many .*\.$"):
        queue.submit("one more", pictures(loaded, 9))
    drawing.release()
    wait(first, *own, *others)
    wait(queue.submit("one more", pictures(loaded, 9)))
    queue.max_images = 8  # half of them for one client
    drawing.hold()
    own = queue.submit("greedy", pictures(loaded, 1, 2, 3))
    with pytest.raises(Busy, match="try again"):
        queue.submit("greedy", pictures(loaded, 4, 5))
    drawing.release()
    wait(own)


def test_stopping_ends_jobs_and_calls_while_the_model_computes(loaded, drawing):
    queue = GenerationQueue(loaded)
    queue.start()
    job = occupied(queue, loaded, drawing)
    call = queue.call(int, "1")
    queue.stop()
    assert job.ended.is_set() and job.error == "The service is stopping."
    assert isinstance(call.exception(1), Busy)
    with pytest.raises(Busy):
        queue.call(int, "1")
    drawing.release()
    queue.stop(20)
    assert not queue.thread.is_alive()
