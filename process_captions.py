"""Write COCO's captions as one text file per image; the work is done in data/process_trainset.py."""

from typing import Optional, Sequence

from utils.command_line import Parser, exit_on_error


@exit_on_error()
def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command; exit with 2 for bad arguments or files."""
    parser = Parser("Write COCO's captions as one .txt per image, one caption per line, named like the image.")
    add = parser.add_argument
    captions, out = "./data/COCO/annotations/captions_train2017.json", "./data/COCO/train2017_captions"
    add("--captions", metavar="JSON", default=captions, help="COCO captions file")
    add("--out-dir", "--out_dir", metavar="DIR", default=out, help="folder for the .txt files; created if missing")
    settings = parser.parse_args(argv)
    from data.process_trainset import write_caption_files  # imports torch, which --help does not need

    written = write_caption_files(settings.captions, settings.out_dir)
    skipped = f", {written.empty:,} empty ones skipped" if written.empty else ""
    print(f"{written.captions:,} captions of {written.files:,} images in {settings.out_dir}{skipped}")


if __name__ == "__main__":
    main()
