"""UA-MT, uncertainty-aware Mean Teacher: Yu et al. 2019 (arXiv:1907.07034).

Differs from the released code on purpose: the threshold starts at ln C for C classes (released: ln 2 always), the
divisor is the number of voxels and classes, the teacher sees a weak view (spatial augmentation only) plus noise,
dropout acts on the bottleneck of the teacher's stochastic passes only (nnU-Net plans no dropout), the ramp-up is a part
of the training (released: all of it), and the weight is doubled because nnU-Net's Dice + cross entropy is twice that
code's supervised loss.
"""

import torch
import torch.nn.functional as F

from nnunet_ssl.blocks.losses import probability_mse
from nnunet_ssl.blocks.networks import (
    finest,
    forward_with_features,
    frozen_copy,
    logits,
    require_stages,
    update_ema,
)
from nnunet_ssl.blocks.perturbations import add_noise
from nnunet_ssl.blocks.pseudo_labels import uncertainty
from nnunet_ssl.blocks.schedules import sigmoid_rampup, warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerUAMT(SemiSupervisedTrainer):
    """UA-MT: Mean Teacher on the voxels of which the teacher is sure, by eight passes with dropout and noise."""

    consistency_weight = 0.2  # of the mean squared difference of probabilities, after the ramp-up
    rampup = 0.4  # part of the training after which the consistency weight is full
    noise = 0.1  # standard deviation of the teacher's input noise, in units of the normalized image
    dropout = 0.5  # of the teacher's bottleneck features, by voxel, in the stochastic passes
    passes = 8  # stochastic passes of the teacher per step
    initial_threshold = 0.75  # entropy in units of ln C below which a voxel counts; rises to 1 over the training
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        require_stages(self.network, "The dropout of UA-MT")
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        with torch.no_grad():
            noisy = add_noise(batch.unlabeled_weak, self.noise)
            target = self.probabilities(logits(self.companions.teacher, noisy))
            mean = sum(self.stochastic_pass(batch.unlabeled_weak) for _ in range(self.passes)) / self.passes
            rise = (1 - self.initial_threshold) * sigmoid_rampup(self.step, self.max_steps)
            sure = uncertainty(mean, regions=self.label_manager.has_regions) < self.initial_threshold + rise
            del mean
        weight = self.consistency_weight * self.ramp
        prediction = self.probabilities(logits(self.network, batch.unlabeled))
        yield {"consistency": weight * probability_mse(prediction, target, sure)}

    def stochastic_pass(self, image):
        """Probabilities of the teacher with noise on the input and dropout at the bottleneck."""

        def drop(skips):
            return [*skips[:-1], F.dropout(skips[-1], self.dropout)]

        output, _ = forward_with_features(self.companions.teacher, add_noise(image, self.noise), drop)
        return self.probabilities(finest(output))

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


__getattr__ = epoch_variants(globals())
