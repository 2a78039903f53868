"""A training step on tensors that say they are on a GPU and have no values: what waits for it, what is elsewhere.

Everything runs as on CUDA, autocast and gradient scaler included, but the backward pass, in whose place every trained
weight in the graph gets a gradient, as does what torch.autograd.grad is asked for.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from tiny_trainers import EVERY_STREAM, make_trainer, seed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nnunet_ssl.blocks.mixing import _cell_of_voxel

# the host waits until the GPU knows how large the result is, or what its value
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal", "bincount"}
WAITING |= {"unique_dim", "_unique2", "unique_consecutive", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_"}  # with a mask: nonzero in disguise
COPYING = {"_to_copy", "copy_"}


class Watch(TorchDispatchMode):
    """Counts what makes the host wait for the GPU, and copies to it that are not from pinned memory on the side."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(function).split(".")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        masks = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
        if on_gpu and (name in WAITING or (name in INDEXING and masks)):
            self.waits[name] += 1
        if name in COPYING:
            source = tensors[1] if name == "copy_" else tensors[0]
            target = tensors[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            if source.is_cuda and target.type == "cpu":
                self.waits["copy to the host"] += 1
            if target.type == "cuda" and not source.is_cuda and not kwargs.get("non_blocking"):
                self.uploads[tuple(source.shape)] += 1
        if name == "_local_scalar_dense" and on_gpu:
            return 0.0 if tensors[0].is_floating_point() else 1 if tensors[0].dtype != torch.bool else False
        return function(*args, **kwargs)


class WithoutValues(TorchFunctionMode):
    """Stand-ins for what needs values: a copy in numpy, and the backward pass."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            return np.ones(tuple(args[0].shape), np.float32)
        if function is torch.Tensor.backward:
            return fill_gradients(args[0])
        if function is torch.autograd.grad:
            return stand_in_gradients(*args[:2])
        return function(*args, **(kwargs or {}))


def fill_gradients(loss: torch.Tensor) -> None:
    for weight in leaves(loss):
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad + torch.zeros_like(weight)


def stand_in_gradients(outputs, inputs) -> tuple[torch.Tensor, ...]:
    """In place of torch.autograd.grad of one output."""
    (output,) = outputs
    found = {id(leaf) for leaf in leaves(output)}
    assert all(id(tensor) in found for tensor in inputs)
    return tuple(torch.zeros_like(tensor) for tensor in inputs)


def leaves(value: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with a gradient of their own in the graph of a scalar."""
    assert value.is_cuda
    assert value.requires_grad
    assert value.shape == ()
    found, seen, todo = [], set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def move(module: nn.Module, device: torch.device) -> nn.Module:
    """Module.to for weights without values."""
    for part in module.modules():
        for tensors, make in ((part._parameters, nn.Parameter), (part._buffers, lambda x, _: x)):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = make(torch.empty(old.shape, dtype=old.dtype, device=device), old.requires_grad)
    return module


@contextmanager
def no_gpu_needed():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self, raising=False)
        _cell_of_voxel.cache_clear()
        yield
        _cell_of_voxel.cache_clear()  # of tensors without values


def fake_step(trainer_class, dataset, configuration="3d_fullres", part=0.0, batch_size=2, **settings) -> Watch:
    """What a training step waits for; the second of two, when everything is there that is made once.

    Args:
        trainer_class: ours or nnUNetTrainer.
        dataset: a preprocessed one.
        configuration: of its plans.
        part: of the training that is done, in [0, 1).
        batch_size: of the plans.
        settings: attributes of the trainer.
    """
    seed()

    def made():
        defaults = EVERY_STREAM | {"num_iterations_per_epoch": 1000}
        trainer = make_trainer(trainer_class, dataset, configuration, **defaults | settings)
        trainer.configuration_manager.configuration["batch_size"] = batch_size
        return trainer

    real = made()
    real.on_train_start()
    batch = next(real.dataloader_train)
    trainer, watch = made(), Watch()
    trainer.device = torch.device("cuda", 0)
    with no_gpu_needed(), ExitStack() as modes:
        trainer.grad_scaler = torch.amp.GradScaler("cuda")
        assert trainer.grad_scaler.is_enabled()
        mode = FakeTensorMode(allow_non_fake_inputs=False)
        for each in (mode, WithoutValues(), watch):
            modes.enter_context(each)
        with pytest.MonkeyPatch.context() as making:
            making.setattr(nn.Module, "to", move)
            trainer.initialize()
        trainer.network.train()
        if hasattr(trainer, "companions"):
            trainer.step = int(part * trainer.max_steps)
        for _ in range(2):
            watch.waits.clear()
            watch.uploads.clear()
            fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x, batch)
            trainer.train_step(fake)
        networks = (trainer.network, *vars(getattr(trainer, "companions", trainer.network)).values())
        for network in (n for n in networks if isinstance(n, nn.Module)):
            assert all(tensor.is_cuda for tensor in (*network.parameters(), *network.buffers()))
    return watch
