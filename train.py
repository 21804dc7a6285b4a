"""Train a DALL-E: build a run, loop over its batches, save checkpoints.

python train.py --config NAME [flags]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

import args
import log
from utils.command_line import exit_on_error
from utils.files import defer_signals, sigterm_as_ctrl_c

if TYPE_CHECKING:  # importing torch takes seconds, so flags are checked first
    from training.run import Run


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Build the run that the flags describe, then train it, or report what it needs if --dry-run is given."""
    settings = args.train_arguments(argv)
    log.set_up()
    with exit_on_error(), sigterm_as_ctrl_c():
        try:
            from training import dry_run
            from training.run import build

            run = build(settings)
            if settings.dry_run:
                dry_run.report(run)
        except KeyboardInterrupt:
            print("stopped before the first step")
            raise SystemExit(130) from None
        if not settings.dry_run:
            train(run)


def train(run: Run) -> None:
    """Train to the end of the run; validate, save and sample when due."""
    from training.loop import open_loop

    with open_loop(run) as loop:
        for batch in loop.batches():  # compiles the model before the first one
            with defer_signals():  # an update that is made is also counted and logged
                losses = loop.update(batch)
                loop.record(losses)
            loop.do_what_is_due(losses)


if __name__ == "__main__":
    main()
