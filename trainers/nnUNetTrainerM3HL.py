"""M3HL, mutual mask mix with high-low level feature consistency: Liu et al. 2025 (arXiv:2508.03752).

Differs from the paper and its released code on purpose: masks are drawn per sample by count and really applied (the
released LA script returns masks of ones), the teacher starts as a copy of the student (released: an independent random
network), labeled voxels weigh 1 and pseudo-labeled ones alpha (the paper's Eq. 3 swaps them), pseudo-labeled voxels
have cross entropy alone (where all foreground of a patch is a false one, to keep it is the whole Dice), with alpha 2
after a ramp-up instead of 0.5, the teacher sees a weak view (spatial augmentation only), and the last part of the
training is on whole patches without the feature terms: networks that only ever saw mixed patches did worse on scans,
which are not mixed (`unmixed=0.0` in benchmarks/results). The student is deployed, as in the released code.
"""

import torch

from nnunet_ssl.blocks.losses import feature_cosine, feature_l1, masked_loss, masked_losses, shrink
from nnunet_ssl.blocks.mixing import block_mask, halves, mix_halves
from nnunet_ssl.blocks.networks import (
    finest,
    forward_with_features,
    frozen_copy,
    require_stages,
    samples_of,
    update_ema,
)
from nnunet_ssl.blocks.pseudo_labels import keep_largest_component
from nnunet_ssl.blocks.schedules import warmup_decay
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants


class nnUNetTrainerM3HL(SemiSupervisedTrainer):
    """M3HL: labeled and unlabeled scans mixed by random block masks, feature consistency with an EMA teacher."""

    mask_cells = 4  # cells of the block grid per axis, fewer on thin axes
    mask_ratio = 0.5  # part of the cells of an unlabeled image that is masked and filled from a labeled one (Eq. 2)
    complementary_halves = True  # half b fills what half a keeps, so the ratio of a batch is 0.5; False: as half a
    pseudo_weight = 2.0  # alpha: weight of pseudo-labeled voxels; labeled voxels have 1
    pseudo_dice = False  # pseudo-labeled voxels have nnU-Net's cross entropy alone; True: its Dice as well
    rampup = 0.2  # part of the training after which pseudo_weight is full; 0: from the start, as in the paper
    unmixed = 0.6  # last part of the training: half a is labeled scans, half b unlabeled ones; 0: as in the paper
    feature_weight = 0.5  # lambda: weight of L_low + L_high where cross entropy + Dice are summed over a and b (Eq. 1)
    feature_pairs = "matched"  # features are compared where both images show the same voxels; "all": Eq. 4 and 5
    largest_component = False  # clean pseudo labels: keep the largest component per class
    teacher_decay = 0.99  # of the EMA, per step, after the warm-up
    weak_view = True

    def build_companions(self):
        if self.feature_pairs not in ("all", "matched"):
            raise ValueError(f'feature_pairs is "all" or "matched", not {self.feature_pairs!r}.')
        if self.feature_weight:
            require_stages(self.network, "The feature consistency of M3HL")
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        half = (len(batch.image) + 1) // 2
        # nnU-Net puts the patches with foreground last: the halves take turns, and so do samples that are in both
        batch = batch.rolled(self.step * half)
        yield self.whole(batch, half) if self.is_whole(self.step) else self.mixed(batch, half)

    def is_whole(self, step):
        """Whether a step learns from whole patches, not from mixed ones."""
        return step >= (1 - self.unmixed) * self.max_steps

    def same_patches(self):
        # a step on whole patches needs half of a batch: the next one takes the other half
        return self.batch_size > 1 and self.step % 2 == 1 and self.is_whole(self.step - 1)

    def mixed(self, batch, half):
        """Terms of the paper: half a and half b mixed by masks."""
        pseudo, target_features = self.teach(batch.unlabeled_weak, self.feature_weight > 0)
        mask = self.draw_masks(half, batch.image)
        image, target = mix_halves(batch.image, batch.labels, batch.unlabeled, pseudo, mask)
        output, features = self.forward(self.network, image, self.feature_weight > 0)
        labeled, unlabeled = masked_losses(self.loss, output, target, (mask, ~mask), dice=(True, self.pseudo_dice))
        terms = {"labeled": labeled, "pseudo": self.pseudo_weight * self.ramp * unlabeled}
        if self.feature_weight:
            terms |= self.feature_terms(features, [halves(target) for target in target_features], ~mask, half)
        return terms

    def draw_masks(self, half, image):
        """Masks of both halves, 1 where the labeled image is; `mask_ratio` counts those cells."""
        count = half if self.complementary_halves else 2 * half
        mask = block_mask(count, image.shape[2:], cells=self.mask_cells, ratio=1 - self.mask_ratio, device=image.device)
        return torch.cat([mask, ~mask]) if self.complementary_halves else mask

    def feature_terms(self, features, targets, unlabeled, half):
        """L_low and L_high: student on mixed images, teacher on unlabeled ones; mask of the voxels that both show."""
        pairs = (0, half) if self.feature_pairs == "all" else (0,)  # offset of the unlabeled sample in a and b
        # the other terms are means over both halves where Eq. 3 has sums: hence 1/2
        weight = self.feature_weight / 2 / len(pairs)
        terms = {}
        for name, distance, own, target in zip(
            ("low", "high"), (feature_l1, feature_cosine), features, targets, strict=True
        ):
            same = None if self.feature_pairs == "all" else shrink(unlabeled, own)
            terms[name] = weight * sum(distance(own, target.roll(offset, 0), same) for offset in pairs)
        return terms

    def whole(self, batch, half):
        """Unmixed patches: half a is labeled scans, half b is unlabeled ones."""
        pseudo, _ = self.teach(batch.unlabeled_weak[-half:], False)
        output = self.network(torch.cat([batch.image[:half], batch.unlabeled[-half:]]))
        labeled, unlabeled = (samples_of(output, part) for part in (slice(0, half), slice(half, None)))
        everything = torch.ones_like(batch.image[:half, :1], dtype=torch.bool)
        pseudo_loss = masked_loss(self.loss, unlabeled, pseudo, everything, dice=self.pseudo_dice)
        return {
            "labeled": masked_loss(self.loss, labeled, batch.labels[:half], everything),
            "pseudo": self.pseudo_weight * self.ramp * pseudo_loss,
        }

    def teach(self, image, with_features):
        """The teacher's hard labels and, if asked for, its features."""
        with torch.no_grad():
            output, features = self.forward(self.companions.teacher, image, with_features)
            pseudo = self.hard_labels(finest(output))
        return keep_largest_component(pseudo) if self.largest_component else pseudo, features

    def forward(self, network, image, with_features):
        """Output and, if asked for, the two feature taps: after the first downsampling and at the bottleneck."""
        if not with_features:
            return network(image), []
        output, skips = forward_with_features(network, image)
        return output, [skips[1], skips[-1]]

    def after_step(self):
        update_ema(self.companions.teacher, self.network, warmup_decay(self.step, self.teacher_decay))


class nnUNetTrainerM3(nnUNetTrainerM3HL):
    """M3: M3HL's mutual mask mix without the feature terms."""

    feature_weight = 0.0
    unmixed = 0.4


class nnUNetTrainerM3HLPaper(nnUNetTrainerM3HL):
    """M3HL with the paper's settings: mixed to the end, lambda and alpha 0.5, all four pairs of feature maps.

    What still differs: optimizer, learning rate, augmentation, patch and batch size are nnU-Net's; half b has the
    complement of half a's masks, as in the released code for ACDC (Eq. 2: "similarly"); L_low (Eq. 4) is a mean over
    the feature map; features are taken in the encoder, as the paper says, where the released code has the decoder's;
    the weights of labeled and pseudo-labeled voxels are those of the released code, because Eq. 3 swaps them; the
    teacher starts as a copy, is in eval mode, sees a weak view, and its EMA warms up. The paper does not say which
    network is deployed; the released code keeps the student, and so do we.
    """

    unmixed = 0.0
    pseudo_weight = 0.5
    pseudo_dice = True
    rampup = 0.0
    feature_weight = 0.5
    feature_pairs = "all"


__getattr__ = epoch_variants(globals())
