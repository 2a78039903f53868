"""Vectors of voxels, and the memory of them."""

import pytest
import torch
from test_networks import every_network, network
from tiny_trainers import seed

from nnunet_ssl.blocks import prototypes
from nnunet_ssl.blocks.heads import FeatureDecoder
from nnunet_ssl.blocks.prototypes import (
    ClassMemory,
    PrototypeHeads,
    at_voxels,
    class_separation,
    random_voxels,
    scores,
)


@every_network
@pytest.mark.parametrize("deep", [False, True])
def test_a_feature_decoder_is_the_decoder_and_shows_what_its_last_head_sees(kind, dim, deep):
    student = network(kind, dim, deep=deep)
    decoder, skips = FeatureDecoder(student), student.encoder(torch.randn(2, 1, *[16] * dim))
    assert not decoder.state_dict()
    output, features = decoder(skips)
    expected = student.decoder(skips)
    for ours, theirs in zip(output if deep else [output], expected if deep else [expected], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(student.decoder.seg_layers[-1](features), output[0] if deep else output)


def test_voxels_are_random_ones_of_the_mask_without_repetition():
    seed()
    masks = torch.rand(2, 3, 6, 7, 8) > torch.tensor([0.3, 0.5, 0.99]).view(1, 3, 1, 1, 1)
    flat = masks.transpose(0, 1).flatten(1)
    voxels, valid = random_voxels(masks, 50)
    assert voxels.shape == valid.shape == (3, 50)
    for row, chosen, there in zip(flat, voxels, valid, strict=True):
        assert len(chosen.unique()) == 50
        assert torch.equal(row[chosen], there)
        assert there.sum() == min(50, row.sum())
        assert there[: there.sum()].all()  # they come first
    assert 0 < valid[2].sum() < 50
    other, _ = random_voxels(masks, 50)
    assert not torch.equal(voxels, other)
    # every voxel of the mask is as probable as the others
    drawn = torch.zeros(flat.shape[1])
    for _ in range(400):
        drawn[random_voxels(masks[:, :1], 50)[0][0]] += 1
    assert (drawn[~flat[0]] == 0).all()
    expected = 400 * 50 / flat[0].sum()
    assert drawn[flat[0]].min() > expected / 3
    assert drawn[flat[0]].max() < expected * 2


def test_fewer_voxels_than_wanted_are_all_taken():
    voxels, valid = random_voxels(torch.ones(2, 1, 3, 3, dtype=torch.bool), 4096)
    assert sorted(voxels[0].tolist()) == list(range(18))
    assert valid.all()


def test_features_are_those_of_the_voxels():
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    voxels = torch.tensor([[0, 13, 23], [7, 7, 12]])
    found = at_voxels(features, voxels)
    for row, chosen in zip(found, voxels.tolist(), strict=True):
        for vector, voxel in zip(row, chosen, strict=True):
            sample, place = divmod(voxel, 12)
            assert torch.equal(vector, features[sample, :, place // 4, place % 4])
    found.sum().backward()
    assert features.grad[0, 0, 1, 3] == 2  # voxel 7, twice


def test_the_memory_keeps_the_best_vectors_of_a_class_and_leaves_a_class_without_new_ones():
    memory = ClassMemory(classes=3, size=2, width=1)
    assert not memory.filled.any()
    vectors = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]] * 3)
    valid = torch.tensor([[True, True, True, False], [False, True, False, False], [False] * 4])
    memory.refill(vectors, torch.tensor([[0.1, 0.9, 0.5, 1.0]] * 3), valid)
    assert memory.vectors[..., 0].tolist() == [[2, 3], [2, 0], [0, 0]]
    assert memory.filled.tolist() == [[True, True], [True, False], [False, False]]
    memory.refill(vectors * 10, torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3), valid & torch.tensor([[1], [0], [0]]).bool())
    assert memory.vectors[..., 0].tolist() == [[30, 20], [2, 0], [0, 0]]
    assert memory.filled.tolist() == [[True, True], [True, False], [False, False]]


def test_the_memory_takes_fewer_vectors_than_it_has_room_for_and_none_that_is_not_finite():
    memory = ClassMemory(classes=1, size=4, width=2)
    vectors = torch.tensor([[[torch.nan, 1.0], [torch.inf, 1.0], [5.0, 6.0]]])
    memory.refill(vectors, torch.tensor([[0.9, 0.8, 0.1]]), torch.ones(1, 3, dtype=torch.bool))
    assert memory.vectors.tolist() == [[[5, 6], [0, 0], [0, 0], [0, 0]]]
    assert memory.filled.tolist() == [[True, False, False, False]]


def test_several_ranks_share_the_memory(monkeypatch):
    # another rank has the same, with doubled vectors and scores
    monkeypatch.setattr(prototypes, "is_distributed", lambda: True)
    monkeypatch.setattr(prototypes, "_gathered", lambda x: [x, 2 * x if x.is_floating_point() else x])
    memory = ClassMemory(classes=1, size=2, width=1)
    memory.refill(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.1, 0.3]]), torch.ones(1, 2, dtype=torch.bool))
    assert memory.vectors[0, :, 0].tolist() == [4, 2]  # scores 0.6 and 0.3


@pytest.mark.parametrize("missing", [None, "vectors", "memory"])
def test_the_separation_is_the_weighted_mean_over_all_pairs(missing):
    seed()
    vectors, memory = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    weights, memory_weights = torch.rand(2, 5), torch.rand(2, 3)
    weights[0, 3:] = memory_weights[1, 2:] = 0  # not there
    if missing:
        (weights if missing == "vectors" else memory_weights)[1] = 0
    total = 0
    for c in range(1 if missing else 2):
        w = weights[c] * (weights[c] > 0).sum() / weights[c].sum()  # mean 1, as released
        v = memory_weights[c] * (memory_weights[c] > 0).sum() / memory_weights[c].sum()
        pairs = [
            (1 - torch.dot(a, b) / a.norm() / b.norm()) * w[m] * v[n]
            for m, a in enumerate(vectors[c])
            for n, b in enumerate(memory[c])
            if w[m] > 0 and v[n] > 0
        ]
        total += sum(pairs) / len(pairs) / 2
    torch.testing.assert_close(class_separation(vectors, weights, memory, memory_weights), total)


def test_without_any_vector_the_separation_is_zero_and_its_gradient_too():
    vectors = torch.randn(2, 5, 4, requires_grad=True)
    nothing = torch.zeros(2, 5)
    value = class_separation(vectors, nothing, torch.zeros(2, 3, 4), torch.zeros(2, 3))
    value.backward()
    assert value == 0
    assert (vectors.grad == 0).all()


def test_selectors_learn_and_vectors_do_not_learn_from_them():
    seed()
    heads, features = PrototypeHeads(4, 2, 3), torch.randn(2, 5, 4, requires_grad=True)
    projected, predicted = heads(features)
    assert projected.shape == predicted.shape == (2, 5, 3)
    rated = scores(heads.selectors, predicted)
    assert rated.shape == (2, 5)
    assert ((rated > 0) & (rated < 1)).all()
    torch.testing.assert_close(rated[1], heads.selectors[1](predicted[1]).sigmoid()[:, 0])
    rated.sum().backward()
    assert features.grad is None
    assert all(parameter.grad is not None for parameter in heads.selectors.parameters())
