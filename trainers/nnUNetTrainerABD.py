"""ABD, adaptive bidirectional displacement: Chi et al. 2024 (arXiv:2405.00378), in BCP.

Of its two displacements BCP has the one of unsure blocks (ABD-R). What differs from the released code on purpose is
what nnUNetTrainerBCP says of BCP, and:
- The grid has a number of cells per axis, in 3D too (released: 4 x 4 blocks of a slice). The surest quarter of the
  blocks are candidates.
- A block that is moved is that of the image before anything has moved (released: the second move sees the first).
- A loss is the mean of those of both mixes, each with a Dice of its own. nnU-Net's Dice + cross entropy has the scale
  of the released loss in that form, which is half of it, summed over both mixes: the weights are those released.
- The strong view of unlabeled scans is nnU-Net's intensity augmentation (released: color jitter and cutout).
- Labeled scans have one view, the teacher labels the weak view for both students, the first phase trains one student
  and copies it, and both have one optimizer.
- The first student is deployed, as in BCP.
"""

import torch

from nnunet_ssl.blocks.losses import full_resolution, kl_divergence, masked_loss, masked_losses, reweighted
from nnunet_ssl.blocks.mixing import box_mask, cell_means, halves, mix, mix_halves, shuffle_cells
from nnunet_ssl.blocks.networks import finest, frozen_copy, logits, trainable_copy, update_ema
from nnunet_ssl.blocks.pseudo_labels import confidence, probabilities
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerABD(SemiSupervisedTrainer):
    """ABD: two students of BCP's mixes label for each other, also where sure blocks have replaced unsure ones."""

    pretraining = 0.25  # first part of the training: copy-paste between labeled scans (10,000 of 40,000 steps)
    box_side = 2 / 3  # edge of the box as a part of the patch's
    pseudo_weight = 0.5  # alpha: weight of pseudo-labeled voxels; labeled voxels have 1
    cross_weight = 1.0  # of the Dice with the other student's labels on the mixes
    displaced_weight = 1.0  # the same on mixes with displaced blocks
    cells = 4  # of the grid per axis, fewer on thin axes
    candidates = 0.25  # part of the blocks, the surest ones, of which the most similar one is chosen
    surest = 0.5  # probability that the surest block is taken, not the most similar one
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        return {"student_2": trainable_copy(self.network), "teacher": frozen_copy(self.network)}

    def streams(self):
        return True, not self.is_pretraining()

    def is_pretraining(self):
        return self.step < self.pretraining * self.max_steps

    def losses(self, batch):
        size, patch, device = len(batch.image), batch.image.shape[2:], batch.image.device
        # nnU-Net puts the patches with foreground last: the halves take turns, and so do samples that are in both
        batch = batch.rolled(self.step * ((size + 1) // 2))
        if self.is_pretraining():
            mask = box_mask(size, patch, side=self.box_side, device=device)
            image, target = (mix(x, x.roll(size // 2, 0), mask) for x in (batch.image, batch.labels))
            yield {"labeled": masked_loss(self.loss, self.network(image), target, torch.ones_like(mask))}
            return
        with torch.no_grad():
            pseudo = self.hard_labels(logits(self.companions.teacher, batch.unlabeled_weak))
        mask = box_mask((size + 1) // 2, patch, side=self.box_side, device=device)
        mask = torch.cat([mask, ~mask])  # half b is labeled in the box, half a around it
        weak, target = mix_halves(batch.image, batch.labels, batch.unlabeled_weak, pseudo, mask)
        strong = mix(halves(batch.image), halves(batch.unlabeled), mask)
        for part in self.half_batches(len(mask)):
            share = len(mask[part]) / len(mask)
            for terms in self.learn((weak[part], strong[part]), target[part], mask[part]):
                yield {name: share * value for name, value in terms.items()}

    def learn(self, views, target, mask):
        """Terms on both views of mixes, the weak one for student 1, and on both views with displaced blocks."""
        students = (self.network, self.companions.student_2)
        outputs = [student(view) for student, view in zip(students, views, strict=True)]
        first, second = (finest(output).detach() for output in outputs)
        terms = {}
        for number, output in enumerate(outputs, start=1):
            labeled, unlabeled = masked_losses(self.loss, output, target, (mask, ~mask))
            terms |= {f"labeled_{number}": labeled, f"pseudo_{number}": self.pseudo_weight * unlabeled}
        yield terms | self.cross("cross", [finest(output) for output in outputs], self.cross_weight)
        del outputs, output, terms
        plain = torch.rand((len(mask), 1), device=mask.device) < self.surest
        order = displacement(first, second, plain, self.cells, self.candidates, self.label_manager.has_regions)
        for view in shuffle_cells(*views, order, cells=self.cells):
            outputs = [logits(student, view) for student in students]
            yield self.cross("displaced", outputs, self.displaced_weight / 2)
            del outputs

    def cross(self, name, outputs, weight):
        """Dice of each student's logits with the other one's labels."""
        dice = reweighted(full_resolution(self.loss), cross_entropy=0, dice=1)
        labels = [self.hard_labels(output) for output in reversed(outputs)]
        pairs = enumerate(zip(outputs, labels, strict=True), start=1)
        return {f"{name}_{number}": weight * dice(output, peer) for number, (output, peer) in pairs}

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))
        if self.is_pretraining():
            update_ema(self.companions.student_2, self.network, 0.0)


def displacement(first, second, plain, cells: int, candidates: float, regions: bool):
    """ABD-R: the order for `shuffle_cells` by which the least sure block of each image is replaced from the other one.

    It is replaced by one of the other image's surest blocks: the one whose prediction is most like that of the replaced
    block, by their KL divergence, or the surest of all.

    Args:
        first: logits (B, C, *spatial) of the first image.
        second: those of the second one.
        plain: (B, 1) bool, True takes the surest block.
        cells: of the grid per axis.
        candidates: part of the blocks of which the most similar one is chosen; at least one.
        regions: the channels are overlapping regions.

    Returns:
        (B, twice the number of blocks), int64.
    """
    found = []
    for output in (first, second):
        sure = cell_means(confidence(probabilities(output, regions=regions), regions=regions), cells=cells)[:, 0]
        top = sure.topk(max(1, round(candidates * sure.shape[1])), dim=1).indices
        found.append((cell_means(output.float(), cells=cells), top, sure.argmin(1, keepdim=True)))
    chosen = []
    for (means, top, _), (others, _, least) in (found, found[::-1]):
        candidate, replaced = (
            x.gather(2, at[:, None].expand(-1, x.shape[1], -1)) for x, at in ((means, top), (others, least))
        )
        target = probabilities(replaced, regions=regions).expand_as(candidate)
        nearest = kl_divergence(target, candidate, regions=regions)[:, 0].argmin(1, keepdim=True)
        chosen.append(top.gather(1, torch.where(plain, 0, nearest)))
    count = found[0][0].shape[2]
    order = torch.arange(2 * count, device=first.device).repeat(len(first), 1)
    places = torch.cat([found[0][2], count + found[1][2]], 1)
    return order.scatter(1, places, torch.cat([count + chosen[1], chosen[0]], 1))


__getattr__ = epoch_variants(globals())
