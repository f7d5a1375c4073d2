"""A GPU for machines without one: its tensors say that they are on cuda:0 and are computed with on
the CPU.

A tensor of the CPU among its own, or a generator of the CPU where it samples, is refused. What
would make the CPU wait is counted, with the function of the program that asked: values that are
looked at, shapes that depend on values, copies but those that need not be waited for (of which CUDA
waits for some, if they are large). Autocast is that for CUDA, whose lists are not a CPU's. Random
numbers are the CPU's, so that a run is the same as one on the CPU, but for the order of sums.
Speed, kernels, streams and the memory that a step takes are beyond it.

    with pretend_gpu.there() as waits:
        ddpm.train(config)
    print(waits)  # Counter({"train: item": 8, ...})
"""

import contextlib
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GPU = torch.device("cuda", 0)
ASKING = {  # operations whose result the CPU has to know before it continues
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "_unique2": "unique",
    "bincount": "bincount",
    "repeat_interleave": "repeat_interleave",
}
# What autocast computes in bf16 or fp16 on CUDA and what in fp32, of all that the programs call:
# "CUDA Op-Specific Behavior" in PyTorch's documentation of torch.amp.
LOWER = """conv2d conv_transpose2d linear matmul __matmul__ mm bmm addmm baddbmm
    scaled_dot_product_attention""".split()
FULL = """group_norm layer_norm softmax log_softmax sum prod norm exp log pow __pow__ acos rsqrt
    cosine_similarity mse_loss l1_loss smooth_l1_loss cumsum cumprod""".split()
waits = Counter()


class OnGPU(torch.Tensor):
    """A tensor on the GPU. held: its values, on the CPU. To PyTorch's inner parts it is on the
    device meta, which they can handle without a driver."""

    device, is_cuda, is_meta = (property(lambda self, v=v: v) for v in (GPU, True, False))

    def __repr__(self):
        return f"OnGPU({self.held})"

    def __reduce_ex__(self, protocol):  # to be saved
        wait("save")
        return self.held.__reduce_ex__(protocol)

    def tolist(self):
        wait("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def wait(why):
    """Count a wait of the CPU, for the function of the program that is nearest."""
    frame = sys._getframe()
    while frame and not frame.f_code.co_filename.endswith(("ddpm.py", "evaluate.py")):
        frame = frame.f_back
    waits[f"{frame.f_code.co_name if frame else 'test'}: {why}"] += 1


def on_gpu(held):
    """A tensor on the GPU with these values; without a mode of PyTorch that would see it made."""
    like = torch.empty_strided(held.shape, held.stride(), dtype=held.dtype, device="meta")
    made = torch.Tensor._make_subclass(OnGPU, like, False)
    made.held = held
    return made


def tensors_in(a):
    """The tensors in tuples, lists and dictionaries. PyTorch's tree_leaves, and its tree_map, take
    longer than the operation itself."""
    if isinstance(a, torch.Tensor):
        return [a]
    if isinstance(a, dict):
        a = a.values()
    elif not isinstance(a, (tuple, list)):
        return []
    return [tensor for b in a for tensor in tensors_in(b)]


def mapped(change, a):
    """The same tuples, lists and dictionaries with what is in them changed."""
    if type(a) in (tuple, list):
        return type(a)([mapped(change, b) for b in a])
    if type(a) is dict:
        return {key: mapped(change, b) for key, b in a.items()}
    return change(a)


def compute(func, args, kwargs):
    """An operation of PyTorch on tensors, some of them on the GPU, or to be created there."""
    name = func.overloadpacket.__name__
    tensors = tensors_in((args, kwargs))
    ours, others = ([t for t in tensors if isinstance(t, OnGPU) is on] for on in (True, False))
    device = kwargs.get("device")
    there = bool(ours) if device is None else torch.device(device).type in ("cuda", "meta")
    if there and getattr(kwargs.get("generator"), "device", GPU).type == "cpu":
        raise RuntimeError(f"{func}: expected a generator on {GPU}")
    if name in ("_to_copy", "copy_"):
        goes = isinstance(args[0], OnGPU) if name == "copy_" else there
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if ours and not goes:
            wait("to the CPU")
        elif goes and others and not asynchronous:
            wait("to the GPU")
    elif ours:
        indexing = name in ("index", "index_put_", "_index_put_impl_") and isinstance(
            args[0], OnGPU
        )
        wrong = [tuple(t.shape) for t in others if t.dim()]
        if wrong and not indexing:
            raise RuntimeError(
                f"{func}: tensors of shapes {wrong} are on the CPU, and others on {GPU}"
            )
        if indexing and others:
            wait("indices to the GPU")
        if indexing and any(t is not None and t.dtype == torch.bool for t in args[1]):
            wait("nonzero")
        if name in ASKING:
            wait(ASKING[name])

    def held(a):
        return (
            a.held
            if isinstance(a, OnGPU)
            else torch.device("cpu")
            if isinstance(a, torch.device)
            else a
        )

    known = {id(t.held): t for t in ours}  # an operation in place gives its own argument back

    def wrapped(a):
        if not isinstance(a, torch.Tensor):
            return a
        return known[id(a)] if id(a) in known else on_gpu(a)

    with _disable_current_modes():
        result = func(*mapped(held, args), **mapped(held, kwargs))
        return mapped(wrapped, result) if there else result


class Creating(TorchDispatchMode):
    """Operations without a tensor of the GPU among their arguments, as
    torch.zeros(2, device=GPU)."""


def dispatch(self, func, types, args=(), kwargs=None):
    return compute(func, args, kwargs or {})


# Inside the class, PyTorch would put its compiler around the method, which takes seconds to import.
Creating.__torch_dispatch__ = dispatch


class Autocasting(TorchFunctionMode):
    """Autocast for CUDA; PyTorch's own does not see that the tensors are there. Not in the backward
    pass, where
    activations may be recomputed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, to = kwargs or {}, None
        if torch.is_autocast_enabled("cuda"):
            lower = torch.get_autocast_dtype("cuda")
            to = (
                lower
                if func.__name__ in LOWER
                else torch.float32
                if func.__name__ in FULL
                else None
            )

        def cast(a):
            return a.to(to) if isinstance(a, OnGPU) and a.is_floating_point() else a

        return func(*mapped(cast, args), **mapped(cast, kwargs)) if to else func(*args, **kwargs)


@contextlib.contextmanager
def there():
    """PyTorch finds a GPU while this lasts. Yields the Counter of waits for it, empty at first."""
    tensor, memory = torch.tensor, 80 * 2**30
    gpu = SimpleNamespace(name="Pretended", total_memory=memory, major=9, minor=0)
    answers = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        is_bf16_supported=True,
        get_device_capability=(9, 0),
        get_device_properties=gpu,
        mem_get_info=(memory, memory),
        max_memory_allocated=10**9,
        set_device=None,
        manual_seed_all=None,
        _lazy_init=None,
    )

    def on_device(*args, device=None, **kwargs):
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    waits.clear()
    overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # Module.to replaces parameters
    with contextlib.ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwriting)
        for name, answer in answers.items():
            stack.enter_context(
                mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer)
            )
        for kind in ("accelerator", "cuda"):  # the name depends on the version
            check = f"_{kind}_graph_capture_health_check"
            stack.enter_context(
                mock.patch.object(torch.optim.Optimizer, check, lambda _: None, create=True)
            )
        stack.enter_context(mock.patch.object(torch, "tensor", on_device))
        stack.enter_context(Creating())
        stack.enter_context(Autocasting())
        yield waits
