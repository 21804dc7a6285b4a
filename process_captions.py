"""Write COCO's captions as one text file per image; the work is done in data/process_trainset.py."""

import sys
from typing import Optional, Sequence

from utils.command_line import Parser, exit_on_closed_output


@exit_on_closed_output()
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; return the exit status, 2 for bad arguments or files."""
    parser = Parser("Write COCO's captions as one .txt per image, one caption per line, named like the image.")
    add = parser.add_argument
    captions, out = "./data/COCO/annotations/captions_train2017.json", "./data/COCO/train2017_captions"
    add("--captions", metavar="JSON", default=captions, help="COCO captions file")
    add("--out-dir", "--out_dir", metavar="DIR", default=out, help="folder for the .txt files; created if missing")
    settings = parser.parse_args(argv)
    from data.process_trainset import write_caption_files  # imports torch, which --help does not need

    try:
        written = write_caption_files(settings.captions, settings.out_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    skipped = f", {written.empty:,} empty ones skipped" if written.empty else ""
    print(f"{written.captions:,} captions of {written.files:,} images in {settings.out_dir}{skipped}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
