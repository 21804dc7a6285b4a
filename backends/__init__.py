"""Where a training step runs: select() picks the machine, base.py is the contract of native.py and ipu.py."""


def select(settings):
    """The backend of --device for a namespace of args.py. ValueError in one line where this machine has it not."""
    from backends import ipu, native

    if settings.device == "ipu" or (settings.device == "auto" and ipu.is_enabled() and not native.has_cuda()):
        return ipu.IpuBackend(settings)
    return native.NativeBackend(settings)
