"""Steps of SS-Net and PS-MT against direct implementations of their equations."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from equations import CLASSES, EVERY_KIND, assert_terms, started
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.mixing import box_mask
from nnunet_ssl.cli import main
from nnunet_ssl.trainers.nnUNetTrainerPSMT import nnUNetTrainerPSMT
from nnunet_ssl.trainers.nnUNetTrainerSSNet import nnUNetTrainerSSNet

every_kind = pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
both = pytest.mark.parametrize("trainer", [nnUNetTrainerSSNet, nnUNetTrainerPSMT])


def unit(x):
    """One sample with root mean square 1."""
    return x / x.square().mean().sqrt()


def steepest(distance, x, probe):
    """Where the distance grows most, from a random direction."""
    changed = (x + probe * unit(torch.rand(x.shape) - 0.5)).requires_grad_()
    return unit(torch.autograd.grad(distance(changed), changed)[0])


# ---- SS-Net ----


def dice_distance(p, q):
    """1 - 2 sum(pq) / (sum(p^2) + sum(q^2)), the mean over the classes of one sample."""
    return sum(1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()) for a, b in zip(p[0], q[0], strict=True)) / len(
        p[0]
    )


def masks_of_classes(labels, target):
    """Voxels of every foreground class or region, without ignored ones."""
    first = 0 if labels.regions else 1
    return labels.truth(target)[:, first:].bool() & labels.annotated(target)


def rows(x):
    """(B, F, *spatial) to one row per voxel."""
    return x.movedim(1, -1).flatten(0, -2)


def attraction(heads, c, vectors, memory):
    """Mean over all pairs of a class of 1 - cosine, times both weights, each with a mean of 1."""
    kept = F.normalize(memory, dim=1)
    w = heads.selectors[c](vectors).sigmoid()[:, 0]
    v = heads.memory_selectors[c](kept).sigmoid()[:, 0]
    cosine = F.normalize(vectors, dim=1) @ kept.T
    return ((1 - cosine) * (w * len(w) / w.sum())[:, None] * (v * len(v) / v.sum())).mean()


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_ssnet(labels, labels_dataset, size):
    settings = {"unlabeled_weight": 0.7, "separation_weight": 0.3, "radius": 0.3, "probe": 0.05, "voxels": 10**6}
    trainer = started(nnUNetTrainerSSNet, labels_dataset, **settings)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    for _ in range(2):
        torch.rand(size * 16**3)  # the order of the voxels, all of which count here
    network, heads = trainer.network, trainer.companions.heads
    features = [network.decoder.stages[-1](upsampled(network, x)) for x in (batch.image, batch.unlabeled)]
    logits = [network.decoder.seg_layers[-1](x) for x in features]
    known, predicted, pseudo = (masks_of_classes(labels, t) for t in (batch.target, *map(labels.hard, logits)))
    classes, separation = known.shape[1], 0
    for c in range(classes):
        projected = [heads.projector(rows(x)) for x in features]
        correct = projected[0][rows(known & predicted & labels.annotated(batch.target))[:, c]]
        assert len(correct) > 32
        best = heads.selectors[c](correct)[:, 0].argsort(descending=True)[:32]
        memory = correct[best].detach()
        for vectors, chosen in zip(projected, (known, pseudo), strict=True):
            found = heads.predictor(vectors)[rows(chosen)[:, c]]
            separation += attraction(heads, c, found, memory) / classes if len(found) else 0
    smoothness = []
    for x in [*batch.image, *batch.unlabeled]:
        x = x[None]
        target = labels.probabilities(network(x)).detach()
        direction = steepest(lambda y, target=target: dice_distance(labels.probabilities(network(y)), target), x, 0.05)
        smoothness.append(dice_distance(labels.probabilities(network(x + 0.3 * direction)), target))
    assert min(smoothness) > 1e-3
    expected = {
        "supervised": labels.dice_and_cross_entropy(logits[0], batch.target),
        "separation": 0.7 * 0.3 * separation,
        "smoothness": 0.7 * sum(smoothness) / len(smoothness),
    }
    assert_terms(groups, expected)


def upsampled(network, x):
    """What the last stage of the decoder takes."""
    skips, seen = network.encoder(x), []
    hook = network.decoder.stages[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network.decoder(skips)
    hook.remove()
    return seen[0]


def test_adversarial_noise_changes_the_prediction_more_than_random_noise(tiny_dataset):
    trainer = started(nnUNetTrainerSSNet, tiny_dataset, radius=0.1)
    image = CLASSES.random_batch(4).image
    target = trainer.probabilities(trainer.network(image))
    noise = torch.randn_like(image)
    random = trainer.probabilities(trainer.network(image + 0.1 * noise))
    plain = torch.stack([dice_distance(p[None], t[None]) for p, t in zip(random, target, strict=True)])
    assert (trainer.smoothness(image) > 2 * plain).all()


def test_the_default_noise_is_above_the_resolution_of_half_precision():
    for trainer in (nnUNetTrainerSSNet, nnUNetTrainerPSMT):
        assert trainer.probe > torch.finfo(torch.bfloat16).eps


def test_no_gradient_of_a_weight_is_computed_where_a_direction_is_looked_for(tiny_dataset):
    # a compiled network would compute them all, and they would be thrown away
    trainer, wanted = started(nnUNetTrainerSSNet, tiny_dataset), []
    parameters = list(trainer.network.parameters())
    trainer.network.encoder.register_forward_pre_hook(
        lambda *_: wanted.append(torch.is_grad_enabled() and {p.requires_grad for p in parameters})
    )
    trainer.smoothness(CLASSES.random_batch(2).image)
    assert wanted == [False, {False}, {True}]  # target, direction, changed image


def test_no_more_voxels_of_a_class_are_compared_than_set(tiny_dataset):
    trainer, seen = started(nnUNetTrainerSSNet, tiny_dataset, voxels=50), []
    trainer.companions.heads.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    list(trainer.losses(CLASSES.random_batch(2)))
    assert seen == [(1, 50), (1, 50)]


def test_the_memory_of_ssnet_is_kept_for_classes_that_are_missing_and_goes_on_after_a_restart(tiny_dataset, tmp_path):
    trainer = started(nnUNetTrainerSSNet, tiny_dataset)
    batch, memory = CLASSES.random_batch(2), trainer.companions.memory
    list(trainer.losses(batch))
    before = memory.vectors.clone()
    assert memory.filled.all()
    batch.target.zero_()
    groups = list(trainer.losses(batch))
    assert torch.equal(memory.vectors, before)
    assert all(term.isfinite() for terms in groups for term in terms.values())
    for name in ("mean_fg_dice", "ema_fg_dice"):
        trainer.logger.local_logger.my_fantastic_logging[name].append(0.5)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed = make_trainer(nnUNetTrainerSSNet, tiny_dataset, enable_deep_supervision=False)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    assert torch.equal(resumed.companions.memory.vectors, before)
    assert resumed.companions.memory.filled.all()


# ---- PS-MT ----


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_psmt(labels, labels_dataset, size):
    settings = {"unlabeled_weight": 0.7, "noise": 0.5, "probe": 0.05, "threshold": 0.6}
    trainer = started(nnUNetTrainerPSMT, labels_dataset, **settings)
    student, teachers = trainer.network, (trainer.companions.teacher, trainer.companions.teacher_2)
    for network in (student, *teachers):
        torch.nn.init.normal_(network.decoder.seg_layers[-1].weight, std=0.5)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    supervised = labels.dice_and_cross_entropy(perturbed(labels, student, teachers, batch.image), batch.target)
    said = (teachers[0](batch.unlabeled_weak) + teachers[1](batch.unlabeled_weak)) / 2
    p = labels.probabilities(said)
    sure = torch.maximum(p, 1 - p).amin(1, keepdim=True) if labels.regions else p.amax(1, keepdim=True)
    keep = box_mask(size, (16, 16, 16), side=0.7)
    image, pseudo, sure = (
        torch.stack([torch.where(keep[i], x[i], x[i - 1]) for i in range(size)])
        for x in (batch.unlabeled, labels.hard(said), sure)
    )
    counts = sure >= 0.6
    assert 0 < counts.float().mean() < 1
    logits, truth = perturbed(labels, student, teachers, image), labels.truth(pseudo)
    if labels.regions:
        entropy = -(truth * F.logsigmoid(logits) + (1 - truth) * F.logsigmoid(-logits))
        entropy = entropy.sum(1, keepdim=True) if labels.ignore else entropy.mean(1, keepdim=True)
    else:
        entropy = -(logits.log_softmax(1) * truth).sum(1, keepdim=True)
    pseudo_loss = (entropy * sure)[counts].mean()
    assert_terms(groups, {"supervised": supervised, "pseudo": 0.7 * pseudo_loss})


def perturbed(labels, student, teachers, images):
    """The student's logits, with the bottleneck moved by half of its size to where the teachers' mean changes most."""
    outputs = []
    for image in images:
        *skips, bottleneck = student.encoder(image[None])
        fixed, x = [skip.detach() for skip in skips], bottleneck.detach()
        size = x.square().mean().sqrt()

        def mean(x, fixed=fixed):
            return (teachers[0].decoder([*fixed, x]) + teachers[1].decoder([*fixed, x])) / 2

        p = labels.probabilities(mean(x)).detach()

        def divergence(x, mean=mean, p=p):
            q = labels.probabilities(mean(x))
            value = p * (p / q).log()
            return (value + (1 - p) * ((1 - p) / (1 - q)).log()).sum() if labels.regions else value.sum()

        outputs.append(student.decoder([*skips, bottleneck + 0.5 * size * steepest(divergence, x, 0.05 * size)]))
    return torch.cat(outputs)


def test_the_teachers_of_psmt_are_updated_in_turns_by_epoch(tiny_dataset):
    trainer = started(nnUNetTrainerPSMT, tiny_dataset, num_epochs=10, num_iterations_per_epoch=3, teacher_decay=0.7)
    student, *teachers = (
        next(n.parameters()).data for n in (trainer.network, trainer.companions.teacher, trainer.companions.teacher_2)
    )
    expected, updates = [t.clone() for t in teachers], [0, 0]
    for trainer.step in range(15):
        student.add_(1.0)
        trainer.after_step()
        decay = min(1 - 1 / (trainer.step + 1), 0.7)
        for turn in (0, 1) if trainer.step < 3 else (trainer.step // 3 % 2,):  # in the first epoch both
            expected[turn] = decay * expected[turn] + (1 - decay) * student
            updates[turn] += 1
        for teacher, value in zip(teachers, expected, strict=True):
            torch.testing.assert_close(teacher, value)
    assert updates == [9, 9]


def test_the_ensemble_of_the_teachers_of_psmt_can_be_exported(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    seed()
    trainer = make_trainer(nnUNetTrainerPSMT, tiny_dataset, num_val_iterations_per_epoch=1)
    trainer.run_training()
    command = f"export -d 701 -c 3d_fullres -tr nnUNetTrainerPSMT --network teacher teacher_2 -o {tmp_path / 'both'}"
    assert main(command.split()) == 0
    predictor = nnUNetPredictor(use_gaussian=False, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "both"), (0, 1))
    image = torch.randn(1, 16, 16, 16)
    teachers = (trainer.companions.teacher, trainer.companions.teacher_2)
    for teacher in teachers:
        teacher.decoder.deep_supervision = False
    with torch.no_grad():
        expected = sum(teacher(image[None])[0] for teacher in teachers) / 2  # what the paper predicts with
    assert not torch.equal(*(next(t.parameters()) for t in teachers))
    found = predictor.predict_logits_from_preprocessed_data(image)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)  # nnU-Net keeps half precision
    assert Path(tmp_path / "both" / "fold_1").is_dir()


@both
def test_the_unlabeled_weight_is_ramped_up(tiny_dataset, trainer):
    made = started(trainer, tiny_dataset, rampup=0.5, num_epochs=10, num_iterations_per_epoch=10)
    batch, terms = CLASSES.random_batch(2), {}
    for made.step in (25, 50):
        seed(5)
        terms[made.step] = {}
        for group in made.losses(batch):
            for name, value in group.items():
                terms[made.step][name] = terms[made.step].get(name, 0) + value.item()
    for name, full in terms[50].items():
        assert terms[25][name] == pytest.approx(full * (1 if name == "supervised" else math.exp(-5 / 4)), rel=1e-4)


@both
def test_the_search_leaves_no_gradient_in_any_network(tiny_dataset, trainer):
    made = started(trainer, tiny_dataset)
    for terms in made.losses(CLASSES.random_batch(2)):
        assert terms
    networks = [made.network, *vars(made.companions).values()]
    assert all(p.grad is None for network in networks for p in network.parameters())
