"""Where a training step runs: select() picks the machine, base.py is the contract of native/ and ipu/."""


def select(settings):
    """The backend of --device for a namespace of args.py. ValueError in one line where this machine has it not."""
    from backends.ipu import backend as ipu
    from backends.native import backend as native

    on_ipu = settings.device == "ipu"
    if settings.device == "auto" and not native.has_cuda():
        on_ipu = ipu.is_enabled() and ipu.has_optimizer(settings)
    if on_ipu and getattr(settings, "shard", False):
        raise ValueError("--shard: for CPUs and GPUs; on IPUs --enable-rts shares the optimizer's state out")
    return (ipu.IpuBackend if on_ipu else native.NativeBackend)(settings)
