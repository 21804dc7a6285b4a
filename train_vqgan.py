"""Train a VQGAN, the image tokenizer of train.py, on a folder of images.

    python train_vqgan.py --config vqgan_demo
    python train_vqgan.py --config vqgan_photos --input-folder my_photos --output-dir output/my_vqgan

Images need no captions. --output-dir receives vqgan.ckpt and vqgan.yaml in taming-transformers' format, for train.py's
--vae-path, and reconstructions.png: validation images above their reconstructions. With --resume a stopped run
continues. --decoder-of FOLDER makes a VQGAN's images sharper without changing its codes: a DALL-E trained on them
stays valid.
"""

from typing import Optional, Sequence

import log
from args import vqgan_arguments
from utils.command_line import exit_on_error
from utils.files import claim_folder, sigterm_as_ctrl_c


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Train the VQGAN that the flags describe."""
    settings = vqgan_arguments(argv)
    log.set_up()
    with exit_on_error(), sigterm_as_ctrl_c():
        from training.vqgan import train  # torch takes seconds to import, so flags are checked first

        with claim_folder(settings.output_dir, "--output-dir"):
            train(settings)


if __name__ == "__main__":
    main()
