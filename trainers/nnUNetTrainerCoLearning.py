"""Semi-supervised multi-model co-learning for left atrium segmentation (2024): two students, one weighted-EMA teacher.

Differs from the paper on purpose (it has no public code):
- Eq. 13 takes labeled voxels where the image of Eq. 11 has unlabeled ones. Here image and target of a mix take every
  voxel from the same scan.
- The students start from the same weights: the mean of independently initialised networks predicts nothing. They differ
  by noise on their inputs and by the place of their box.
- The first half of the training is stock nnU-Net on the labeled scans. From random weights the students can come to
  agree that everything is foreground (docs/results.md).
- Every term has half of the planned batch: one half is learned unmixed, the other one mixed. A whole batch in every
  term was worse after as many passes (benchmarks/results/choices.md).
- lambda and mu are ramped up, and labeled scans have nnU-Net's Dice and cross entropy. The paper's constant weights and
  Dice alone were measured to be worse (benchmarks/results).
- Student 1 is deployed: it was ahead of the teacher (benchmarks/results), or equal after a supervised training.
- Dice is nnU-Net's, which leaves the background out. Where nnU-Net takes it over the whole batch, it is that of the
  patches of a term; the Dice of Eq. 4-9, with whole batches or odd ones, that of half of them or a third.
- Eq. 4-9 learn from hard pseudo labels.
- Eq. 15-17 compare the student's probabilities with the label of a labeled voxel, and with the teacher's probabilities
  of an unlabeled one.
- The teacher sees the whole unlabeled patch with spatial augmentation only.
"""

import torch

from nnunet_ssl.blocks.losses import full_resolution, labeled_loss, probability_mse, reweighted
from nnunet_ssl.blocks.mixing import box_mask, mix
from nnunet_ssl.blocks.networks import (
    frozen_copy,
    logits,
    require_stages,
    trainable_copy,
    update_ema,
    update_weighted_ema,
    with_interpolation,
)
from nnunet_ssl.blocks.perturbations import add_noise
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerCoLearning(SemiSupervisedTrainer):
    """Co-learning: two students learn from labels, each other, and a teacher that is the moving average of both."""

    supervised_part = 0.5  # first part of the training: stock nnU-Net on the labeled scans; the rest is of what follows
    alpha = 0.005  # weight of student 1 in the teacher's EMA, per step, after the warm-up
    beta = 0.005  # weight of student 2
    unlabeled_weight = 1.0  # lambda: of the Dice with the other student's and with the teacher's labels
    mix_weight = 1.0  # mu: of the mean squared difference on the mixes
    rampup = 0.4  # part of the training after which lambda and mu are full; 0: from the start, as in the paper
    cross_entropy = True  # add nnU-Net's cross entropy to the Dice of the labeled scans; False: as in the paper
    box_side = 0.5  # edge of the box as a part of the patch's
    shared_mask = False  # one box for both mixes, as in Eq. 11 and 12; False: each has its own
    noise = 0.1  # standard deviation of each student's own input noise, in units of the normalized image
    patches_per_term = "half"  # every term has half of the planned batch; "full": all of it, at twice the cost
    student_backbones = "same"  # "different": student 2 upsamples by interpolation, one EMA teacher per student
    weak_view = True

    def build_companions(self):
        if self.student_backbones not in ("same", "different"):
            raise ValueError(f'student_backbones is "same" or "different", not {self.student_backbones!r}.')
        if self.patches_per_term not in ("full", "half"):
            raise ValueError(f'patches_per_term is "full" or "half", not {self.patches_per_term!r}.')
        companions = {"teacher": frozen_copy(self.network)}
        if self.student_backbones == "same":
            return {"student_2": trainable_copy(self.network), **companions}
        require_stages(self.network, 'student_backbones = "different"')
        # weights of different networks cannot be averaged by name: an ensemble of two teachers instead
        second = with_interpolation(self.network)
        return {"student_2": second, **companions, "teacher_2": frozen_copy(second)}

    def losses(self, batch):
        students = (self.network, self.companions.student_2)
        if self.patches_per_term == "half":  # the halves take turns: nnU-Net puts the patches with foreground last
            batch = batch.rolled(self.step * ((len(batch.image) + 1) // 2))
        supervised = reweighted(self.loss, cross_entropy=float(self.cross_entropy), dice=1)
        dice = reweighted(full_resolution(self.loss), cross_entropy=0, dice=1)
        first, second = self.shares(batch)
        with torch.no_grad():
            soft = self.teach(batch.unlabeled_weak)
        pseudo, soft = self.hard_labels(soft - 0.5)[: len(first.image)], soft[-len(second.image) :]

        for number, student in enumerate(students, start=1):
            output = student(add_noise(first.image, self.noise))
            yield {f"supervised_{number}": labeled_loss(supervised, output, first.target)}  # Eq. 3
            del output

        size = len(first.unlabeled)
        # two graphs at a time, of no more than a batch together
        for part in [slice(size)] if 2 * size <= len(batch.image) else self.half_batches(size):
            weight = self.ramp * self.unlabeled_weight * len(pseudo[part]) / size
            outputs = [logits(student, add_noise(first.unlabeled[part], self.noise)) for student in students]
            terms = {}
            for number, (output, peer) in enumerate(zip(outputs, outputs[::-1], strict=True), start=1):
                terms[f"cross_{number}"] = weight * dice(output, self.hard_labels(peer))  # Eq. 4-6
                terms[f"teacher_{number}"] = weight * dice(output, pseudo[part])  # Eq. 7-9
            yield terms
            del outputs, output, peer, terms

        truth, annotated = self.as_probabilities(second.labels, soft.shape[1])
        for number, student in enumerate(students, start=1):
            # INDMIX: the box of an unlabeled scan in a labeled one for student 1, the reverse for student 2
            if number == 1 or not self.shared_mask:
                mask = box_mask(size, second.image.shape[2:], side=self.box_side, device=second.image.device)
            reverse = number == 2
            image, target = indmix(second.image, truth, second.unlabeled, soft, mask, reverse=reverse)
            counts = annotated | (mask if reverse else ~mask)  # every voxel of the unlabeled scan does
            output = logits(student, add_noise(image, self.noise))
            difference = probability_mse(self.probabilities(output), target, counts)
            yield {f"mix_{number}": self.ramp * self.mix_weight * difference}  # OUTDMIX, Eq. 15-17
            del output, image, target, difference

    def shares(self, batch):
        """What is learned unmixed, and what is mixed: all of the batch, or one half of it each."""
        if self.patches_per_term == "full":
            return batch, batch
        half = (len(batch.image) + 1) // 2
        return batch.part(slice(0, half)), batch.part(slice(-half, None))

    def teach(self, image):
        """Probabilities of the teacher, or of the two teachers weighted by alpha and beta, in fp32."""
        soft = self.probabilities(logits(self.companions.teacher, image))
        if self.student_backbones == "same":
            return soft
        second = self.probabilities(logits(self.companions.teacher_2, image))
        return (self.alpha * soft + self.beta * second) / (self.alpha + self.beta)

    def after_step(self):
        decay = warmup_decay(self.step, 1 - self.alpha - self.beta)
        teacher, student, second = self.companions.teacher, self.network, self.companions.student_2
        if self.student_backbones == "same":
            share = (1 - decay) / (self.alpha + self.beta)
            update_weighted_ema(teacher, [student, second], [share * self.alpha, share * self.beta])  # Eq. 1
        else:
            update_ema(teacher, student, decay)
            update_ema(self.companions.teacher_2, second, decay)


def indmix(labeled, truth, unlabeled, soft, mask, *, reverse: bool):
    """Eq. 11 and 12 with their targets: image and target take every voxel from the same scan.

    Args:
        labeled: images (B, C, *spatial), with their labels `truth` as probabilities (B, classes, *spatial).
        unlabeled: images, with the teacher's probabilities `soft`.
        mask: (B, 1, *spatial), 0 in the box.
        reverse: False puts a box of the unlabeled image into the labeled one (Eq. 11), True the opposite (Eq. 12).

    Returns:
        Mixed image and target.
    """
    if reverse:
        labeled, truth, unlabeled, soft = unlabeled, soft, labeled, truth
    return mix(labeled, unlabeled, mask), mix(truth, soft, mask)


class nnUNetTrainerCoLearningPaper(nnUNetTrainerCoLearning):
    """Co-learning with the paper's settings.

    No supervised phase, a whole batch in every term, weights constant, Dice alone, no noise, one box for both mixes.

    What still differs: optimizer, learning rate, augmentation, patch and batch size are nnU-Net's; Dice is nnU-Net's,
    without the background, with hard pseudo labels; labeled voxels of a mix have their own labels (Eq. 13 takes those
    of the unlabeled scan's places); both students have the same architecture and start from the same weights, because
    the mean of different ones predicts nothing; the teacher's EMA has a warm-up, and it sees a weak view. The paper
    does not say which network is deployed: student 1, as by default.
    """

    supervised_part = 0.0
    patches_per_term = "full"
    rampup = 0.0
    cross_entropy = False
    noise = 0.0
    shared_mask = True


__getattr__ = epoch_variants(globals())
