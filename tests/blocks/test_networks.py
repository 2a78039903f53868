from collections import Counter
from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl.blocks.networks import (
    Pyramid,
    forward_with_features,
    frozen_copy,
    further_decoder,
    logits,
    trainable_copy,
    unwrap,
    update_ema,
    update_weighted_ema,
    with_interpolation,
)

NETWORKS = {"plain": (PlainConvUNet, "n_conv_per_stage"), "residual": (ResidualEncoderUNet, "n_blocks_per_stage")}
FEATURES = [3, 4, 5]
NORMS = {2: (nn.Conv2d, nn.InstanceNorm2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d, nn.BatchNorm3d)}
every_network = pytest.mark.parametrize(
    ("kind", "dim"), [(kind, dim) for kind in NETWORKS for dim in NORMS], ids=lambda value: str(value)
)


def network(kind="plain", dim=2, *, seed=0, deep=False, batch_norm=False, features=FEATURES, classes=2):
    """A toy U-Net of nnU-Net's kind in which every parameter and buffer is random."""
    architecture, per_stage = NETWORKS[kind]
    conv, instance, batch = NORMS[dim]
    net = architecture(
        input_channels=1, n_stages=3, features_per_stage=features, conv_op=conv, kernel_sizes=3, strides=[1, 2, 2],
        num_classes=classes, n_conv_per_stage_decoder=1, conv_bias=True, norm_op=batch if batch_norm else instance,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=deep, **{per_stage: 1},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*net.parameters(), *net.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            else:
                tensor.fill_(seed + 3)
    return net


def snapshot(net):
    """Every entry of the state, so every name under which a shared tensor is known."""
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def storages(net):
    return {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


def assert_close(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@every_network
def test_the_state_lists_shared_tensors_several_times_and_the_parameters_do_not(kind, dim):
    net = network(kind, dim)
    counts = Counter(tensor.data_ptr() for tensor in net.state_dict().values())
    assert max(counts.values()) >= 4
    parameters = [p.data_ptr() for _, p in net.named_parameters()]
    assert sorted(parameters) == sorted(counts)


@every_network
@pytest.mark.parametrize("decay", [0.9, 0.25])
def test_the_average_is_applied_to_every_tensor_exactly_once(kind, dim, decay):
    teacher, student = network(kind, dim, seed=0), network(kind, dim, seed=1)
    old, new = snapshot(teacher), snapshot(student)
    update_ema(teacher, student, decay)
    assert_close(snapshot(teacher), {name: decay * old[name] + (1 - decay) * new[name] for name in old})
    assert_same(snapshot(student), new)


@every_network
def test_the_average_of_a_constant_student_follows_the_closed_form(kind, dim):
    teacher, student = network(kind, dim, seed=0), network(kind, dim, seed=1)
    old, new = snapshot(teacher), snapshot(student)
    for step in range(1, 6):
        update_ema(teacher, student, 0.7)
        weight = 0.7**step
        assert_close(snapshot(teacher), {name: weight * old[name] + (1 - weight) * new[name] for name in old})


def test_the_average_of_changing_students_is_their_weighted_sum():
    teacher, decays = network(seed=0), [0.9, 0.5, 0.8]
    expected = snapshot(teacher)
    for seed, decay in enumerate(decays, start=1):
        student = network(seed=seed)
        update_ema(teacher, student, decay)
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in snapshot(student).items()}
    assert_close(snapshot(teacher), expected)


@every_network
def test_decay_0_copies_the_student_and_decay_1_leaves_the_teacher(kind, dim):
    teacher, student = network(kind, dim, seed=0), network(kind, dim, seed=1)
    old, new = snapshot(teacher), snapshot(student)
    update_ema(teacher, student, 1)
    assert_same(snapshot(teacher), old)
    update_ema(teacher, student, 0)
    assert_same(snapshot(teacher), new)


@every_network
def test_buffers_are_copied_and_not_averaged(kind, dim):
    teacher, student = network(kind, dim, seed=0, batch_norm=True), network(kind, dim, seed=1, batch_norm=True)
    assert {b.dtype for b in teacher.buffers()} == {torch.float32, torch.int64}
    update_ema(teacher, student, 0.9)
    state, new = snapshot(teacher), snapshot(student)
    for name in (n for n in state if "running" in n or "num_batches" in n):
        assert torch.equal(state[name], new[name]), name
    assert not torch.equal(next(teacher.parameters()), next(student.parameters()))


@pytest.mark.parametrize(
    "other",
    [{"kind": "residual"}, {"dim": 3}, {"features": [3, 4, 6]}, {"classes": 3}],
    ids=["names", "dimensions", "features", "classes"],
)
def test_networks_with_other_names_or_shapes_are_refused_and_nothing_changes(other):
    teacher = network(seed=0, batch_norm=True)
    student = network(**{"seed": 1, "batch_norm": True, **other})
    old, new = snapshot(teacher), snapshot(student)
    with pytest.raises(ValueError, match="same parameter names and shapes"):
        update_ema(teacher, student, 0.5)
    assert_same(snapshot(teacher), old)
    assert_same(snapshot(student), new)


@every_network
def test_a_frozen_copy_has_the_same_weights_in_its_own_memory(kind, dim):
    student = network(kind, dim, batch_norm=True).train()
    teacher = frozen_copy(student)
    assert_same(snapshot(teacher), snapshot(student))
    assert not storages(teacher) & storages(student)
    update_ema(teacher, student, 0)
    assert not storages(teacher) & storages(student)
    before = snapshot(teacher)
    with torch.no_grad():
        for tensor in [*student.parameters(), *student.buffers()]:
            tensor.add_(1)
    assert_same(snapshot(teacher), before)


@every_network
def test_a_frozen_copy_is_in_eval_mode_and_needs_no_gradient_and_the_student_stays_as_it_was(kind, dim):
    student = network(kind, dim).train()
    teacher = frozen_copy(student)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad for p in student.parameters())


def test_an_average_needs_no_gradient_and_leaves_the_students_gradients_alone():
    student = network(seed=1)
    teacher = frozen_copy(network(seed=0))
    student(torch.randn(1, 1, 8, 8)).sum().backward()
    grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    update_ema(teacher, student, 0.5)
    assert all(p.grad is None and not p.requires_grad and p.grad_fn is None for p in teacher.parameters())
    assert grads
    for name, parameter in student.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_a_compiled_student_gives_a_plain_teacher_with_plain_names():
    student = network(seed=1)
    compiled = torch.compile(student, backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    teacher = frozen_copy(compiled)
    assert type(teacher) is type(student)
    assert list(teacher.state_dict()) == list(student.state_dict())
    assert not storages(teacher) & storages(student)


def test_the_average_of_a_compiled_student_is_that_of_the_plain_one():
    teacher, student = network(seed=0), network(seed=1)
    expected = deepcopy(teacher)
    update_ema(expected, student, 0.8)
    update_ema(teacher, torch.compile(student, backend="eager"), 0.8)
    assert_same(snapshot(teacher), snapshot(expected))


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed training")
@pytest.mark.usefixtures("process_group")
def test_the_network_is_found_in_every_wrapper():
    net = network(seed=1)
    for wrapped in (
        net,
        torch.compile(net, backend="eager"),
        DistributedDataParallel(net),
        DistributedDataParallel(torch.compile(net, backend="eager")),
    ):
        assert unwrap(wrapped) is net
        teacher = network(seed=0)
        update_ema(teacher, wrapped, 0)
        assert_same(snapshot(teacher), snapshot(net))
        assert len(forward_with_features(wrapped, torch.randn(1, 1, 8, 8))[1]) == len(FEATURES)


@every_network
def test_logits_are_those_of_full_resolution_with_and_without_deep_supervision(kind, dim):
    net = network(kind, dim, deep=True, classes=3)
    x = torch.randn(2, 1, *[16] * dim)
    deep = net(x)
    assert [o.shape[2] for o in deep] == [16, 8]
    assert torch.equal(logits(net, x), deep[0])
    net.decoder.deep_supervision = False
    assert torch.equal(logits(net, x), deep[0])
    assert logits(net, x).shape == (2, 3, *[16] * dim)


@every_network
@pytest.mark.parametrize("deep", [False, True])
def test_the_output_with_features_is_the_plain_output(kind, dim, deep):
    net = network(kind, dim, deep=deep)
    x = torch.randn(2, 1, *[16] * dim)
    expected = net(x)
    for wrapped in (net, torch.compile(net, backend="eager")):
        output, _ = forward_with_features(wrapped, x)
        for ours, theirs in zip(output if deep else [output], expected if deep else [expected], strict=True):
            assert torch.equal(ours, theirs)


@every_network
def test_features_are_the_encoders_stages_from_full_resolution_to_the_bottleneck(kind, dim):
    net = network(kind, dim)
    _, skips = forward_with_features(net, torch.randn(2, 1, *[16] * dim))
    assert [s.shape for s in skips] == [
        (2, channels, *[size] * dim) for channels, size in zip(FEATURES, (16, 8, 4), strict=True)
    ]


def test_features_and_output_share_one_graph():
    net = network()
    _, skips = forward_with_features(net, torch.randn(2, 1, 16, 16))
    skips[-1].square().sum().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())
    assert all(p.grad is None for n, p in net.decoder.named_parameters() if not n.startswith("encoder."))


def test_different_buffers_are_refused_before_anything_changes():
    teacher, student = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
    with torch.no_grad():
        student.weight.fill_(5.0)
    with pytest.raises(ValueError, match="same parameter names and shapes"):
        update_ema(teacher, student, 0.5)
    assert (teacher.weight == 1).all()


@every_network
@pytest.mark.parametrize("weights", [(0.1, 0.3), (0.005, 0.005), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_weighted_average_of_two_students_follows_its_equation(kind, dim, weights):
    alpha, beta = weights
    teacher, first, second = (network(kind, dim, seed=seed) for seed in range(3))
    old, a, b = snapshot(teacher), snapshot(first), snapshot(second)
    update_weighted_ema(teacher, [first, second], weights)
    expected = {name: (1 - alpha - beta) * old[name] + alpha * a[name] + beta * b[name] for name in old}
    assert_close(snapshot(teacher), expected)
    assert_same(snapshot(first), a)
    assert_same(snapshot(second), b)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (-0.1, 0.5)])
def test_weights_out_of_range_are_refused_and_nothing_changes(weights):
    teacher = network(seed=0)
    old = snapshot(teacher)
    with pytest.raises(ValueError, match="weights"):
        update_weighted_ema(teacher, [network(seed=1), network(seed=2)], weights)
    assert_same(snapshot(teacher), old)


@pytest.mark.parametrize("position", [0, 1])
def test_a_weighted_average_needs_students_of_the_same_shapes(position):
    teacher, students = network(seed=0), [network(seed=1), network(seed=2)]
    students[position] = with_interpolation(students[position])
    old = snapshot(teacher)
    with pytest.raises(ValueError, match="same parameter names and shapes"):
        update_weighted_ema(teacher, students, [0.1, 0.1])
    assert_same(snapshot(teacher), old)


@every_network
def test_a_trainable_copy_starts_equal_and_is_trained_on_its_own(kind, dim):
    student = network(kind, dim)
    copy = trainable_copy(student)
    assert_same(snapshot(copy), snapshot(student))
    assert not storages(copy) & storages(student)
    assert all(p.requires_grad for p in copy.parameters())


@every_network
def test_interpolation_replaces_the_transposed_convolutions_and_nothing_else(kind, dim):
    student = network(kind, dim, deep=True)
    copy = with_interpolation(student)
    x = torch.randn(2, 1, *[16] * dim)
    outputs = copy(x)
    assert [o.shape for o in outputs] == [o.shape for o in student(x)]
    assert not any("ConvTranspose" in type(m).__name__ for m in copy.modules())
    before, after = snapshot(student), snapshot(copy)
    same = [name for name in after if name in before and after[name].shape == before[name].shape]
    assert all(torch.equal(after[name], before[name]) for name in same if "transpconvs" not in name)
    assert {name for name in before.keys() ^ after.keys() if "transpconvs" not in name} == set()
    sum(o.sum() for o in outputs).backward()
    assert all(c.conv.weight.grad.abs().sum() > 0 for c in copy.decoder.transpconvs)


def test_the_new_convolutions_are_on_the_device_of_the_network():
    copy = with_interpolation(network(dim=3).to("meta"))
    assert {p.device.type for p in copy.parameters()} == {"meta"}


@every_network
@pytest.mark.parametrize("nearest", [False, True])
def test_a_further_decoder_starts_as_a_copy_without_the_encoder(kind, dim, nearest):
    student = network(kind, dim, deep=True)
    decoder = further_decoder(student, nearest=nearest)
    before, after = snapshot(student.decoder), snapshot(decoder)
    assert not any(name.startswith("encoder") for name in after)
    assert not storages(decoder) & storages(student)
    kept = [name for name in after if "transpconvs" not in name]
    assert kept
    assert all(torch.equal(after[name], before[name]) for name in kept)
    skips = student.encoder(torch.randn(2, 1, *[16] * dim))
    outputs = decoder(skips)
    assert [o.shape for o in outputs] == [o.shape for o in student.decoder(skips)]
    assert {c.mode == "nearest" for c in decoder.transpconvs} == {nearest}
    assert "encoder" in dict(student.decoder.named_children())


@every_network
@pytest.mark.parametrize("deep", [False, True])
def test_a_pyramid_is_the_decoder_with_dropout_before_the_heads(kind, dim, deep):
    student = network(kind, dim, deep=deep)
    skips = student.encoder(torch.randn(2, 1, *[16] * dim))
    plain, pyramid = student.decoder, Pyramid(student, (0.0, 0.0, 0.0))
    assert [*pyramid.parameters()] == []
    outputs = pyramid(skips)
    plain.deep_supervision = True
    torch.testing.assert_close(outputs, plain(skips))
    assert torch.equal(Pyramid(student, (0.0,))(skips)[0], outputs[0])
    torch.manual_seed(0)
    dropped = Pyramid(student, (0.5, 0.0))(skips)
    assert not torch.equal(dropped[0], outputs[0])
    assert torch.equal(dropped[1], outputs[1])  # and nothing behind it


def test_interpolation_follows_anisotropic_strides():
    transposed = nn.ConvTranspose3d(4, 3, (1, 2, 2), stride=(1, 2, 2))
    student = network(dim=3)
    student.decoder.transpconvs[0] = transposed
    upsampling = with_interpolation(student).decoder.transpconvs[0]
    assert upsampling(torch.zeros(1, 4, 5, 6, 7)).shape == (1, 3, 5, 12, 14)


@every_network
def test_stage_outputs_can_be_changed_before_the_decoder(kind, dim):
    net = network(kind, dim)
    x = torch.randn(2, 1, *[16] * dim)
    same, _ = forward_with_features(net, x, lambda skips: skips)
    changed, skips = forward_with_features(net, x, lambda skips: [*skips[:-1], 0 * skips[-1]])
    assert torch.equal(same, net(x))
    assert torch.equal(changed, net.decoder(skips))
    assert not torch.equal(changed, same)
    assert (skips[-1] == 0).all()
