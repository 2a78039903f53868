"""Co-M3HL: two students and their weighted-EMA teacher (multi-model co-learning, 2024) on M3HL's mutual mask mixes.

No paper has this method; it joins the two. From co-learning: two students with their own input noise, which start from
the same weights, and a teacher that is the moving average of both (Eq. 1). From M3HL: each student's only forward pass
is on patches that block masks mix from labeled and unlabeled scans, the teacher sees a weak view of the latter, the
first half of the training is stock nnU-Net on the labeled scans, and the last part of the rest is on whole patches.
Unlabeled voxels have the labels of the teacher and of the other student. So a step of the second half has three forward
passes and two backward ones, where one of co-learning has four and three, or seven and six with whole batches.
"""

import torch

from nnunet_ssl.blocks.losses import feature_cosine, feature_l1, masked_loss, shrink
from nnunet_ssl.blocks.mixing import block_mask, halves, mix_halves
from nnunet_ssl.blocks.networks import (
    finest,
    forward_with_features,
    frozen_copy,
    require_stages,
    samples_of,
    trainable_copy,
    update_weighted_ema,
)
from nnunet_ssl.blocks.perturbations import add_noise
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerCoM3HL(SemiSupervisedTrainer):
    """Co-M3HL: two students and their common EMA teacher learn from labeled and unlabeled scans mixed by masks."""

    supervised_part = 0.5  # first part of the training: stock nnU-Net on the labeled scans; the rest is of what follows
    pseudo_weight = 0.25  # of unlabeled voxels with the teacher's label; labeled voxels have 1
    peer_weight = 0.25  # of unlabeled voxels with the other student's label
    masks = "same"  # of both students; "complementary": student 2 sees what student 1 does not, and has no peer
    mask_cells = 4  # cells of the block grid per axis, fewer on thin axes; half of them are filled
    unmixed = 0.6  # last part of the training: half a is labeled scans, half b unlabeled ones
    noise = 0.1  # standard deviation of each student's own input noise, in units of the normalized image
    feature_weight = 0.0  # of M3HL's feature terms with the teacher, where both images show the same voxels
    alpha = 0.005  # weight of student 1 in the teacher's EMA, per step, after the warm-up
    beta = 0.005  # weight of student 2
    weak_view = True

    def build_companions(self):
        if self.masks not in ("same", "complementary"):
            raise ValueError(f'masks is "same" or "complementary", not {self.masks!r}.')
        if self.feature_weight:
            require_stages(self.network, "The feature consistency of Co-M3HL")
        return {"student_2": trainable_copy(self.network), "teacher": frozen_copy(self.network)}

    def losses(self, batch):
        half = (len(batch.image) + 1) // 2
        # nnU-Net puts the patches with foreground last: the halves take turns, and so do samples that are in both
        batch = batch.rolled(self.step * half)
        mixed = not self.is_whole(self.step)
        mask = block_mask(half, batch.image.shape[2:], cells=self.mask_cells, device=batch.image.device)
        mask = mask if mixed else torch.ones_like(mask)
        masks = [torch.cat([mask, ~mask])]
        if mixed and self.masks == "complementary":
            masks.append(~masks[0])
        with torch.no_grad():
            needed = batch.unlabeled_weak if mixed else batch.unlabeled_weak[-half:]
            taught, features = self.forward(self.companions.teacher, needed)
            pseudo, features = self.hard_labels(finest(taught)), [halves(feature) for feature in features]
        if mixed:
            views = [mix_halves(batch.image, batch.labels, batch.unlabeled, pseudo, mask) for mask in masks]
        else:
            whole = (batch.image[:half], batch.unlabeled[-half:]), (batch.labels[:half], pseudo.to(batch.labels.dtype))
            views = [tuple(map(torch.cat, whole))]
        masks, views = (both if len(both) == 2 else both * 2 for both in (masks, views))  # one for each student
        students = (self.network, self.companions.student_2)
        for part in self.half_batches(2 * half):
            # rows that have labeled voxels, and rows that have unlabeled ones
            border = max(0, half - part.start)
            rows = (slice(None), slice(None)) if mixed else (slice(0, border), slice(border, None))
            outputs = [
                self.forward(student, add_noise(image[part], self.noise))
                for student, (image, _) in zip(students, views, strict=True)
            ]
            terms = {}
            for number, ((output, own), (peer, _)) in enumerate(zip(outputs, outputs[::-1], strict=True), start=1):
                mask, target = masks[number - 1][part], views[number - 1][1][part]
                found = self.terms(output, finest(peer), target, mask, rows)
                if mixed:
                    found |= self.feature_terms(own, [feature[part] for feature in features], ~mask)
                share = len(mask) / (2 * half) if mixed else 1
                terms |= {f"{name}_{number}": share * value for name, value in found.items()}
            yield terms
            del outputs, output, own, peer, found, terms

    def is_whole(self, step):
        """Whether a step learns from whole patches, not from mixed ones."""
        return step >= (1 - self.unmixed) * self.max_steps

    def same_patches(self):
        # a step on whole patches needs half of a batch: the next one takes the other half
        return self.batch_size > 1 and self.step % 2 == 1 and self.is_whole(self.step - 1)

    def terms(self, output, peer, target, mask, rows):
        """nnU-Net's loss on labeled voxels, and with both kinds of labels on unlabeled ones."""
        labeled, unlabeled = rows
        found = {}
        if len(mask[labeled]):
            found["labeled"] = masked_loss(self.loss, samples_of(output, labeled), target[labeled], mask[labeled])
        if len(mask[unlabeled]):
            output, target, other = samples_of(output, unlabeled), target[unlabeled], ~mask[unlabeled]
            found["pseudo"] = self.pseudo_weight * masked_loss(self.loss, output, target, other)
            if self.masks == "same" and self.peer_weight:
                peer = self.hard_labels(peer[unlabeled])
                found["peer"] = self.peer_weight * masked_loss(self.loss, output, peer, other)
        return found

    def feature_terms(self, own, features, unlabeled):
        """M3HL's L_low and L_high between a student on a mix and the teacher on the unlabeled patch."""
        pairs = zip(("low", "high"), (feature_l1, feature_cosine), own, features, strict=True)
        weight = self.feature_weight / 2
        return {name: weight * f(own, target, shrink(unlabeled, own)) for name, f, own, target in pairs} if own else {}

    def forward(self, network, image):
        """Output and, if they are used, the feature maps after the first downsampling and at the bottleneck."""
        if not self.feature_weight:
            return network(image), []
        output, skips = forward_with_features(network, image)
        return output, [skips[1], skips[-1]]

    def after_step(self):
        share = (1 - warmup_decay(self.step, 1 - self.alpha - self.beta)) / (self.alpha + self.beta)
        students = [self.network, self.companions.student_2]
        update_weighted_ema(self.companions.teacher, students, [share * self.alpha, share * self.beta])


__getattr__ = epoch_variants(globals())
