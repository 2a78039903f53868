"""PS-MT, perturbed and strict mean teachers: Liu et al. 2022 (arXiv:2111.12903).

Differs from the released code on purpose:
- The adversarial noise (T-VAT) is on the bottleneck of the U-Net alone. Its size is a part of the features' (released:
  an L2 norm of 2, about a fiftieth of the features' size in a bottleneck of 20,000 values). Its direction is found in
  float32, from a probe that convolutions do not round away (released: 1e-6).
- The teachers' logits are averaged as they are (released: only those of seven classes).
- The box of CutMix has one size and lies inside of the patch; the strong view is nnU-Net's intensity augmentation.
- The teachers' decay is the paper's 0.99, with a warm-up (released: 0.996).
- There are no first epochs in which the three networks learn from labels alone, each for itself. The ramp-up of the
  unlabeled weight has their place: a part of the training and a sigmoid (released: a cosine). In the first epoch both
  teachers are updated.
- Labeled scans have nnU-Net's Dice and cross entropy, about twice the cross entropy alone. So the unlabeled weight is
  twice that released.
- Deployed is one network, the student, which alone learns in every epoch. The paper predicts with the mean of the
  teachers' logits: `nnunet-ssl export --network teacher teacher_2` makes that ensemble.
"""

import torch

from nnunet_ssl.blocks.losses import cross_entropy, kl_divergence
from nnunet_ssl.blocks.mixing import box_mask, mix
from nnunet_ssl.blocks.networks import (
    finest,
    forward_with_features,
    frozen_copy,
    logits,
    require_stages,
    update_ema,
)
from nnunet_ssl.blocks.perturbations import adversarial_direction, in_float32
from nnunet_ssl.blocks.pseudo_labels import confidence
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerPSMT(SemiSupervisedTrainer):
    """PS-MT: two EMA teachers, updated in turns by epoch, label for a student with adversarial features."""

    unlabeled_weight = 3.0  # of the cross entropy with pseudo labels, after the ramp-up
    rampup = 0.4  # part of the training after which the unlabeled weight is full
    threshold = 0.6  # probability of a pseudo label from which it counts; it counts by its probability then
    noise = 0.02  # root mean square of the adversarial noise on the student's bottleneck, as a part of the features'
    probe = 0.01  # the same of the noise from which its direction is found
    box_side = 0.7  # edge of the box as a part of the patch's
    teacher_decay = 0.99  # of the EMA, per update, after the warm-up
    weak_view = True

    def build_companions(self):
        require_stages(self.network, "The adversarial noise of PS-MT")
        return {"teacher": frozen_copy(self.network), "teacher_2": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.forward(batch.image), batch.target)}
        with torch.no_grad():
            output = self.mean(logits(teacher, batch.unlabeled_weak) for teacher in self.teachers())
            pseudo, regions = self.hard_labels(output), self.label_manager.has_regions
            sure = confidence(self.probabilities(output), regions=regions)
            mask = box_mask(len(output), output.shape[2:], side=self.box_side, device=output.device)
        image, pseudo, sure = (mix(x, x.roll(1, 0), mask) for x in (batch.unlabeled, pseudo, sure))
        loss = cross_entropy(self.loss, finest(self.forward(image)), pseudo, sure * (sure >= self.threshold))
        yield {"pseudo": self.unlabeled_weight * self.ramp * loss}

    def teachers(self):
        return self.companions.teacher, self.companions.teacher_2

    def mean(self, outputs):
        return sum(outputs) / 2

    def forward(self, image):
        """Output of the student with adversarial noise on its bottleneck."""
        if not self.noise:
            return self.network(image)
        return forward_with_features(self.network, image, self.shifted)[0]

    def shifted(self, skips):
        """Stage outputs whose bottleneck is moved to where the teachers' mean prediction changes most."""
        parts = self.half_batches(len(skips[-1]))  # float32 needs twice the memory
        noise = torch.cat([self.adversarial_noise([skip[part] for skip in skips]) for part in parts])
        return [*skips[:-1], skips[-1] + noise.to(skips[-1].dtype)]

    def adversarial_noise(self, skips):
        """T-VAT: the noise on the bottleneck after which the teachers' decoders say something else."""
        *others, bottleneck = (skip.detach().float() for skip in skips)

        def decoded(teacher, x):
            return finest(teacher.decoder([*others, x]))

        @torch.no_grad()
        def mean(x):
            return self.mean(decoded(teacher, x) for teacher in self.teachers())

        with in_float32(bottleneck.device):
            target = self.probabilities(mean(bottleneck))

        def distance(x):
            # by the chain rule for one teacher after the other: the graphs of both need half as much memory again
            output = mean(x).requires_grad_()
            divergence = kl_divergence(target, output, regions=self.label_manager.has_regions).sum()
            (slope,) = torch.autograd.grad(divergence, output)
            for teacher in self.teachers():
                yield (decoded(teacher, x) * slope).sum() / 2

        size = bottleneck.square().mean([*range(1, bottleneck.ndim)], keepdim=True).sqrt()
        return self.noise * size * adversarial_direction(distance, bottleneck, self.probe * size)

    def after_step(self):
        # the turn follows from the step alone: a training that is continued goes on with the same
        epoch = self.step // self.num_iterations_per_epoch
        for number, teacher in enumerate(self.teachers()):
            if number == epoch % 2 or epoch == 0:  # both: one of random weights would label as much as the other
                update_ema(teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
