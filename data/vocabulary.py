"""Train a vocabulary on the captions of a data set: a byte-level BPE as tokenizer.json, for --bpe-path.

    python -m data.vocabulary train --input-folder my_images --size 8192 --out my_vocab.json

It reads any text, since each byte is a token. Id 0 is padding. Captions are read as they are, with their capitals.
"""

import sys
from pathlib import Path
from typing import Iterator, Optional, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.files import IMAGE_SUFFIXES
from data.sources import open_source
from utils.command_line import Parser, exit_on_error, number, path
from utils.files import atomic_write

PADDING = "<pad>"
BYTES = 256
AT_ONCE = 4096  # captions whose encodings, which are large, are in memory at once
SIZE = number(int, low=BYTES + 1, high=1 << 20)


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser("Train a vocabulary on captions.", usage="train --input-folder FOLDER --out FILE.json")
    parser.prog = "python -m data.vocabulary"
    parser.add_argument("task", choices=["train"], metavar="train", help="what to do")
    add = parser.heading("Flags")
    add("input-folder", None, "captioned images in any form that train.py reads", path)
    add("size", 8192, "tokens, padding and bytes included", SIZE)
    add("out", None, "file to write, with the suffix .json", path)
    settings = parser.parse(argv)
    if not settings.input_folder or not settings.out:
        parser.error("give --input-folder FOLDER and --out FILE.json")
    if not settings.out.endswith(".json"):
        parser.error(f"argument --out: {settings.out} does not end in .json")
    with exit_on_error():
        captions = list(read_captions(settings.input_folder))
        model = train(captions, settings.size)
        with atomic_write(Path(settings.out), text=True) as file:
            file.write(model.to_str(pretty=True))
        parts = (captions[first : first + AT_ONCE] for first in range(0, len(captions), AT_ONCE))
        tokens = sum(len(encoding.ids) for part in parts for encoding in model.encode_batch(part))
        print(
            f"wrote {settings.out}: {model.get_vocab_size():,} tokens from {len(captions):,} captions, "
            f"{tokens / len(captions):.1f} tokens per caption"
        )


def read_captions(folder: str) -> Iterator[str]:
    """Yield all captions of a data set; images are not opened."""
    source = open_source(folder, lambda file: file[0].lower().endswith(IMAGE_SUFFIXES))  # captions are checked
    for name, *_ in source.texts:
        yield from source.captions(name)


def train(captions: Sequence[str], size: int) -> Tokenizer:
    """Return a byte-level BPE of at most `size` tokens, of fewer for few words; ValueError without a caption."""
    if not captions:
        raise ValueError("there is no caption to train a vocabulary on")
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer, len(captions))
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
