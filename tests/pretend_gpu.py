"""A GPU that is not there: CPU tensors that carry a mark, and the refusals of CUDA.

Within `pretended_gpu(capability)` the device "cuda" can be asked for. A tensor that lives there is marked, `.device` says cuda:0, and what
CUDA refuses raises: tensors of two devices in one operation, `.numpy()` on a GPU tensor, a CPU generator for a draw on the GPU, a GPU index
into a CPU tensor. What this cannot find: kernels, memory, speed, rounding.

python tests/pretend_gpu.py SCRIPT.py [7.5]      a whole script with it, such as the notebook's; 7.5 is the capability of a T4
"""
import contextlib
import runpy
import sys
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)

# Of these, the result lives where the first tensor lives; they may be handed what lives elsewhere.
FREE = {"item", "tolist", "__repr__", "__format__", "__len__", "__bool__", "__int__", "__float__", "__index__", "__iter__", "__hash__", "size", "dim", "numel",
        "element_size", "nelement", "is_floating_point", "is_contiguous", "stride", "data_ptr", "storage_offset", "requires_grad_", "backward", "copy_",
        "_has_compatible_shallow_copy_type"}
STRICT = {"embedding", "index_select", "gather", "cross_entropy", "cat", "stack", "where"}             # refuse single numbers of another device too


def tensors(tree):
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple, dict)):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(branch)


def on_gpu(tensor):
    return getattr(tensor, "_on_gpu", False)


def put(tree, gpu):
    """Mark all tensors of the tree as living on the GPU, or as not."""
    for tensor in tensors(tree):
        tensor._on_gpu = gpu
    return tree


def is_gpu(device):
    return isinstance(device, int) or torch.device(device).type == "cuda"


class PretendedGPU(TorchFunctionMode):
    """Sees every call of a torch function. `moves` counts the copies from one device to the other."""
    moves = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__"):
            return self.attribute(func, name, args, kwargs)
        if name in ("to", "cpu", "cuda", "type"):
            return self.move(func, name, list(args), kwargs)
        inputs = list(tensors([args, kwargs]))
        wanted = None
        if kwargs.get("device") is not None:
            wanted, kwargs["device"] = is_gpu(kwargs["device"]), torch.device("cpu")
        gpu = self.check(name, args, kwargs, inputs, wanted)
        out = func(*args, **kwargs)
        if name.endswith("_") and inputs and out is inputs[0]:
            return out                                               # in place: it lives where it lived
        return put(out, gpu if wanted is None else wanted)

    def attribute(self, func, name, args, kwargs):
        which, out = getattr(func.__self__, "__name__", ""), func(*args, **kwargs)
        if name == "__set__":
            return put(args[0], on_gpu(args[1])) if which == "data" else out
        if which in ("device", "is_cuda"):
            return out if not on_gpu(args[0]) else GPU if which == "device" else True
        return put(out, on_gpu(args[0])) if isinstance(out, torch.Tensor) else out

    def move(self, func, name, args, kwargs):
        before = gpu = on_gpu(args[0])
        for i, what in enumerate(args[1:], 1):
            if isinstance(what, (str, torch.device)) or isinstance(what, int) and not isinstance(what, bool):
                gpu, args[i] = is_gpu(what), torch.device("cpu")
            elif isinstance(what, torch.Tensor):
                gpu = on_gpu(what)
        if kwargs.get("device") is not None:
            gpu, kwargs["device"] = is_gpu(kwargs["device"]), torch.device("cpu")
        if name in ("cpu", "cuda"):
            gpu, func, args, kwargs = name == "cuda", torch.Tensor.cpu, args[:1], {}
        out = func(*args, **kwargs)
        if gpu != before:
            self.moves += 1
            out = out.clone() if out is args[0] else out
        return put(out, gpu)

    def check(self, name, args, kwargs, inputs, wanted):
        """Raises what CUDA would raise; returns where the result lives."""
        if name in ("numpy", "__array__") and any(map(on_gpu, inputs)):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if name in ("__getitem__", "__setitem__"):
            gpu = on_gpu(args[0])
            if not gpu and any(on_gpu(index) and index.dim() for index in tensors(args[1:2])):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            if name == "__setitem__" and isinstance(args[2], torch.Tensor) and args[2].dim() and on_gpu(args[2]) != gpu:
                raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (set)")
            return gpu
        if name in FREE:
            return bool(inputs) and on_gpu(inputs[0])
        asked = inputs if name in STRICT else [tensor for tensor in inputs if tensor.dim()]
        if len(set(map(on_gpu, asked))) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})")
        gpu = any(map(on_gpu, inputs))
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and (gpu or wanted):
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")
        return gpu


@contextlib.contextmanager
def pretended_gpu(capability):
    """While it is open there is one GPU of this compute capability, such as (7, 5). Yields the PretendedGPU."""
    cast, scale, new, tensor, load = torch.autocast, torch.amp.GradScaler, torch.nn.Parameter.__new__, torch.tensor, torch.load
    dice = [torch.arange(16, dtype=torch.uint8)]

    class Autocast(cast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    class Scaler(scale):
        def __init__(self, device="cpu", *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    def parameter(cls, data=None, requires_grad=True):
        out = new(cls, data, requires_grad)
        return out if data is None else put(out, on_gpu(data))

    def read(*args, map_location=None, **kwargs):
        """A file keeps the marks of its tensors, as it keeps their devices."""
        out = load(*args, map_location=map_location, **kwargs)
        return out if map_location is None else put(out, is_gpu(map_location))

    cuda = {"is_available": lambda: True, "device_count": lambda: 1, "get_device_capability": lambda *_: capability,
            "get_device_name": lambda *_: "a pretended GPU", "is_bf16_supported": lambda *_, **__: True, "synchronize": lambda *_: None,
            "max_memory_allocated": lambda *_: 0, "manual_seed_all": lambda *_: None, "get_rng_state": lambda *_: dice[0],
            "set_rng_state": lambda state, *_: dice.__setitem__(0, state)}
    with mock.patch.multiple(torch.cuda, **cuda), mock.patch.multiple(torch.amp, autocast=Autocast, GradScaler=Scaler), \
            mock.patch.multiple(torch, autocast=Autocast, load=read), mock.patch.object(torch.nn.Parameter, "__new__", parameter), \
            mock.patch.object(torch, "tensor", lambda *a, device=None, **k: tensor(*a, **k) if device is None else tensor(*a, **k).to(device)), \
            PretendedGPU() as gpu:
        yield gpu


def main():
    script, capability = sys.argv[1], tuple(map(int, (sys.argv[2] if len(sys.argv) > 2 else "7.5").split(".")))
    sys.argv = [script]
    with pretended_gpu(capability) as gpu:
        runpy.run_path(script, run_name="__main__")
    print(f"a pretended GPU of capability {capability}: {gpu.moves:,} moves between devices, and nothing that CUDA refuses")


if __name__ == "__main__":
    main()
