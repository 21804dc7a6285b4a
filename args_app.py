"""The flags of app.py → one validated namespace; of the same parts as those in args.py, and as light to import."""

from args import COUNT, check_vqgan_files, machine_flags, vqgan_file_flags
from utils.command_line import Parser, number, parse


def app_parser():
    parser = Parser("Opens a web page and an HTTP API that draw pictures for prompts; requirements-app.txt.")
    add = parser.heading("What to draw with")
    add("dalle-path", None, "checkpoint of train.py; none: the demo that ships with the program")
    machine_flags(parser)
    add = parser.heading("Where to listen")
    add("host", "127.0.0.1", "address; 0.0.0.0 lets other machines in, without any password")
    add("port", 7860, "port; 0: a free one", number(int, low=0, high=65535))
    add = parser.heading("Limits")
    add("max-images", 16, "pictures a request", number(int, low=1, high=256))
    add("max-prompt-characters", 400, "characters a prompt", COUNT)
    add("queue-size", 64, "requests at once; further ones are told to come back later", COUNT)
    add("batch-size", None, "pictures drawn at once; none: as many as the machine does well", COUNT)
    add = parser.heading("Files that the checkpoint does not bring along")
    add("bpe-path", None, "YouTokenToMe vocabulary; none: the checkpoint's, else CLIP's")
    vqgan_file_flags(add)
    return parser


def app_arguments(argv=None):
    """The namespace of app.py."""
    parser = app_parser()
    settings = parse(parser, argv)
    check_vqgan_files(parser, settings)
    return settings
