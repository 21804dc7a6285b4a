"""Where a training step runs: select() picks the machine, base.py has the contract, native.py carries it out."""


def select(settings):
    """The backend of --device for a namespace of args.py. ValueError in one line where this machine has it not."""
    from backends import native

    if settings.device == "ipu":
        raise ValueError(
            "--device ipu: there is no IPU backend in this version; it runs on CPUs and CUDA GPUs, see --device auto"
        )
    return native.NativeBackend(settings)
