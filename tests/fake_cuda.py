"""A CUDA device that is not there: its tensors have shapes and no values, while those of the host are real.

Built on torch's FakeTensorMode. What a GPU would refuse or wait for raises an error: a host tensor among those of the
device, a value that reaches the host other than by `host.read`, a copy to the device that blocks.
"""

import contextlib
from collections import defaultdict

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip.nn import host

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
WAITING = (aten.multinomial, aten.unique_consecutive, aten._unique2, aten.bincount, aten.masked_scatter)
"""Operations with a fixed result shape, or one that FakeTensorMode invents, whose CUDA kernels wait for the host."""


class Misplaced(RuntimeError):
    """A tensor is on the wrong device, or the host waits for the device where it must not."""


class FakeCuda(TorchDispatchMode):
    """Run operations of the host as they are, and those of the device without values."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.reads = 0
        """Number of uses of `host.read`."""
        self.strict = True
        """Whether a copy to the device must not block; a model may be moved as it likes."""
        self.answer = torch.zeros_like
        """What `host.read` makes of an empty tensor of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        to_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not ours and not to_device:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        on_host = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)]
        uploads = bool(on_host) and func.overloadpacket in (aten._to_copy, aten.copy_)
        if uploads and self.strict and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            raise Misplaced(f"{func}: a copy to the device that blocks")
        if not uploads and any(tensor.dim() for tensor in on_host):
            raise Misplaced(f"{func}: a tensor of the host among those of the device")
        if func.overloadpacket in WAITING:
            raise Misplaced(f"{func} waits for the device")
        result = func(*args, **kwargs)
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(result)):
            raise Misplaced(f"{func}: a value reaches the host")
        return result

    def read(self, *tensors):
        """Stand in for `host.read`."""
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return tensors
        assert {tensor.device for tensor in tensors} == {DEVICE}
        self.reads += 1
        return tuple(self.answer(torch.empty(tensor.shape, dtype=tensor.dtype)) for tensor in tensors)

    @contextlib.contextmanager
    def installed(self, monkeypatch):
        """Make the device the one that `cuda` means, with autocast to bfloat16 and gradients."""
        with monkeypatch.context() as patch:
            patch.setattr(host, "read", self.read)
            patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
            patch.setattr(torch.cuda, "get_device_name", lambda device: "none")
            patch.setattr(torch.Tensor, "backward", lambda loss: backward(loss))
            with self.fake, self:
                yield self

    def move(self, module):
        """Move a module to the device."""
        self.strict = False
        try:
            return module.to(DEVICE)
        finally:
            self.strict = True


def backward(loss):
    """Compute gradients as `Tensor.backward`, whose own engine needs a driver where a device of type cuda is used."""
    waiting = defaultdict(int)
    stack, seen = [loss.grad_fn], {loss.grad_fn}
    while stack:
        node = stack.pop()
        for after, _ in node.next_functions:
            if after is not None:
                waiting[after] += 1
                if after not in seen:
                    seen.add(after)
                    stack.append(after)
    given = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            inputs = given.pop(node, {})
            if hasattr(node, "variable"):
                accumulate(node.variable, inputs.get(0))
                continue
            grads = [inputs.get(i) for i in range(len(node._input_metadata))]
            results = call(node, grads) if inputs else [None] * len(node.next_functions)
            for (after, place), grad in zip(node.next_functions, results, strict=True):
                if after is None:
                    continue
                if grad is not None:
                    add(given.setdefault(after, {}), place, grad, after._input_metadata[place])
                waiting[after] -= 1
                if not waiting[after]:
                    ready.append(after)


def call(node, grads):
    """Compute the gradients of a node's inputs."""
    results = node.apply(*grads) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*grads)
    return results if isinstance(results, tuple) else (results,)


def add(given, place, grad, like):
    """Add a gradient to those that a node was given, in the shape and type of the forward pass."""
    if grad.device != like.device:
        raise Misplaced(f"a gradient on {grad.device} of a tensor on {like.device}")
    grad = grad.sum_to_size(like.shape).to(like.dtype)
    given[place] = given[place] + grad if place in given else grad


def accumulate(parameter, grad):
    """Add a gradient to a parameter's."""
    if grad is not None:
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad
