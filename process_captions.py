"""Command: COCO's captions JSON to one text file a picture. The work is done in data/process_trainset.py."""

import argparse
import sys


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, where argparse would print the usage too
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> int:
    parser = _Parser(
        description="Write COCO's captions as one .txt a picture, one caption a line, named as the picture is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--captions",
        metavar="JSON",
        default="./data/COCO/annotations/captions_train2017.json",
        help="COCO captions file",
    )
    parser.add_argument(
        "--out-dir",
        "--out_dir",
        metavar="DIR",
        default="./data/COCO/train2017_captions",
        help="folder for the .txt files; made if missing",
    )
    args = parser.parse_args()

    from data.process_trainset import write_caption_files  # here, so that --help works before anything is installed

    try:
        written = write_caption_files(args.captions, args.out_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left_out = f", {written.empty:,} empty ones left out" if written.empty else ""
    print(f"{written.captions:,} captions of {written.files:,} pictures in {args.out_dir}{left_out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
