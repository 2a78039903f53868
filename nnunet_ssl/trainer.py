"""SemiSupervisedTrainer: the only file that touches nnU-Net's training loop."""

import errno
import time
from collections.abc import Iterable
from contextlib import nullcontext
from copy import deepcopy
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import torch
from nnunetv2 import paths
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, autocast, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnunet_ssl.blocks import pseudo_labels
from nnunet_ssl.blocks.networks import broadcast, compile_in_place, has_batch_norm, set_deep_supervision, unwrap
from nnunet_ssl.blocks.schedules import sigmoid_rampup, whole_epochs
from nnunet_ssl.data.augmentation import OnDevice, augments_on_device
from nnunet_ssl.data.loading import Batch, UnlabeledDataset, foreground, make_loaders, to_device
from nnunet_ssl.data.splits import require_hidden
from nnunet_ssl.system.attributes import replaced
from nnunet_ssl.system.nnunet_version import require_nnunet
from nnunet_ssl.training import checkpoints, preflight
from nnunet_ssl.training.health import Health, ends
from nnunet_ssl.training.history import History, time_left
from nnunet_ssl.training.loaders import KeptItems, make_repeatable, start_loaders, stop_loaders
from nnunet_ssl.training.observations import dice_by_network, evaluating, observe, pseudo_labeler
from nnunet_ssl.training.optimizer import (
    PhaseScheduler,
    accumulate_gradients,
    add_networks,
    first_groups_only,
    keep_finite,
    update_weights,
)
from nnunet_ssl.training.random_state import seed_from_environment, set_random_state
from nnunet_ssl.training.variants import epoch_variants as epoch_variants  # for the files of trainers
from nnunet_ssl.training.variants import stock_settings

SAMPLING = ("label_manager", "oversample_foreground_percent", "probabilistic_oversampling")  # of nnU-Net's loader
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
SAVE_SECONDS = 1800.0  # after which a checkpoint is due, in an expensive training sooner than nnU-Net's 50 epochs
COMPARED_BATCHES = 10  # of the validation batches of an epoch, on which the Dice of every network is taken


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with an unlabeled stream; a method overrides a few short functions.

    A method may use `self.network` (the student), `self.companions.<name>`, `self.loss` (nnU-Net's), `self.step`
    (optimizer steps taken) and `self.max_steps`. Its hyperparameters are class attributes. It derives from this class
    directly and has no `__init__`. What labels are, classes or regions, with or without the ignore label, it leaves to
    `self.hard_labels`, `self.probabilities`, `self.as_probabilities` and `self.annotated`. On several GPUs, every rank
    has to yield the same terms: nnU-Net's Dice waits for the other ranks.
    """

    max_gradient_norm = 12  # as in nnU-Net, whose Primus trainers have 1
    rampup = 0.0  # part of the training after which `self.ramp` is 1
    weak_view = False  # also give the method every unlabeled crop with spatial augmentation only
    signed_distance = False  # also give it the signed distances to the boundaries of the labeled crops' classes
    supervised_part = 0.0  # first part of the training that is stock nnU-Net on the labeled cases, in whole epochs

    # ---- what a method overrides ----

    def build_companions(self) -> dict[str, nn.Module]:
        """Networks beside `self.network`, by name: what segments is called teacher... (frozen) or student....

        Any other name is a module that does not segment, such as a head or a discriminator. What requires gradients
        is trained by the same optimizer, but for `build_optimizers`; everything is saved, and restored by --c.
        """
        return {}

    def build_optimizers(self) -> dict[str, Optimizer]:
        """Further optimizers, by name, each of companions that it alone trains, such as a discriminator's Adam.

        Made anew where the companions are. They step where there are gradients; their learning rates are their own.
        """
        return {}

    def losses(self, batch: Batch) -> Iterable[dict[str, Tensor]]:
        """Yields dicts of named, weighted scalar terms; the terms of one dict share one forward graph.

        Each dict is back-propagated and its graph freed before the next one is asked for, so the peak memory is that
        of the largest graph and the update that of the sum of all terms. A name may come again, its values are
        summed. A term may be missing in some steps, but not on some ranks; the name "loss" is taken by the sum.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Runs after every optimizer step, before `self.step` is raised: moving averages."""

    def inference_network(self) -> nn.Module:
        """The network that is validated and saved as `network_weights`."""
        return self.network

    def streams(self) -> tuple[bool, bool]:
        """Whether this step learns from labeled and from unlabeled patches.

        What no step of an epoch needs is not loaded: the batch has None there.
        """
        return True, True

    def same_patches(self) -> bool:
        """Whether this step learns from those patches of the step before that were left over: nothing is loaded."""
        return False

    # ---- what a method may use: the functions of pseudo_labels.py for this dataset's labels ----

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the classes, sigmoid of regions; float32."""
        return pseudo_labels.probabilities(logits, regions=self.label_manager.has_regions)

    def hard_labels(self, logits: Tensor) -> Tensor:
        """The most probable class, or the regions with a logit above 0, as targets of `self.loss`; no gradient."""
        labels = self.label_manager
        hard = pseudo_labels.hard_labels(logits, regions=labels.has_regions, ignore_channel=labels.has_ignore_label)
        self.health.note_pseudo_labels(hard)
        return hard

    def as_probabilities(self, labels: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Labels as probabilities of the network's `channels`, and a mask of the voxels that are annotated."""
        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        return pseudo_labels.as_probabilities(labels, channels, regions=regions, ignore_label=ignore_label)

    def annotated(self, labels: Tensor) -> Tensor:
        """The voxels of a batch's labels that are not ignored: bool (B, 1, *spatial)."""
        manager = self.label_manager
        heads, ignore_label = manager.num_segmentation_heads, manager.ignore_label
        return pseudo_labels.annotated(labels, heads, regions=manager.has_regions, ignore_label=ignore_label)

    def foreground(self, labels: Tensor) -> Tensor:
        """The annotated voxels of every foreground class or region: bool (B, K, *spatial)."""
        found, annotated = foreground(labels, self.label_manager)
        return found & annotated

    def half_batches(self, size: int) -> list[slice]:
        """Slices of at most half a batch of that size: two graphs of one need no more memory than one of the batch.

        An odd batch has three of nearly one size. The whole batch where its samples depend on each other: in batch
        normalisation, or in a Dice over all GPUs. A single sample is one slice.
        """
        joint = has_batch_norm(self.network) or (self.is_ddp and self.configuration_manager.batch_dice)
        number = 1 if joint else ceil(size / max(1, size // 2))
        return [slice(size * i // number, size * (i + 1) // number) for i in range(number)]

    def new_network(self) -> nn.Module:
        """A further network, built and randomly initialised as nnU-Net does with the first one."""
        labels, deep = self.label_manager, self.enable_deep_supervision
        network = self.build_network_architecture(
            self.plans_manager, self.configuration_manager, self.num_input_channels, labels.num_segmentation_heads, deep
        )
        if self.is_ddp:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network.to(self.device)

    # ---- set-up ----

    # nnU-Net keeps the arguments by the names of this signature
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):  # noqa: B008
        require_nnunet()
        for variable in (paths.nnUNet_preprocessed, paths.nnUNet_results):
            variable.require()
        self._continued = plans["continue_training"]  # nnU-Net takes it out of the plans
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            if error.filename is None and error.errno not in UNWRITABLE:  # of Weights & Biases, which starts there
                raise
            raise OSError(
                f"{paths.nnUNet_results} cannot be written to ({error}). Set nnUNet_results to a folder that can."
            ) from error
        vars(self).update(stock_settings(type(self)))
        self.step = 0  # of the semi-supervised phase
        self.supervised_epochs = 0  # known from `initialize` on
        self.companions = SimpleNamespace()
        self.optimizers: dict[str, Optimizer] = {}  # beside nnU-Net's
        self._intensity: OnDevice | None = None  # augmentation on the training device
        self._losses: dict[str, float] = {}  # means of the epoch
        self._observations: dict = {}  # of the epoch's last batch
        self._overlaps: dict[str, list[dict]] = {}  # network to what nnU-Net counted on the compared batches
        self._resume_random_state = None
        self._split: tuple[list[str], list[str]] | None = None  # of the whole training, whatever becomes of the file
        self._unlabeled: UnlabeledDataset | None = None  # as well
        self._saved_at = time.monotonic()  # when --c would have found the last checkpoint
        self.health = Health(self.print_to_log_file)

    @property
    def supervised_phase(self) -> bool:
        return self.current_epoch < self.supervised_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the semi-supervised phase: of the whole training, where there is no other one."""
        return (self.num_epochs - self.supervised_epochs) * self.num_iterations_per_epoch

    @property
    def ramp(self) -> float:
        """Factor for the weights of unlabeled terms: sigmoid ramp-up over the first `rampup` part of the training."""
        return sigmoid_rampup(self.step, self.rampup * self.max_steps)

    def initialize(self) -> None:
        preflight.refuse_unsupported(type(self), SemiSupervisedTrainer, self.configuration_name, self.is_cascaded)
        preflight.require_cases(Path(self.preprocessed_dataset_folder), self.plans_manager, self.configuration_name)
        self.supervised_epochs = whole_epochs(self.supervised_part, self.num_epochs)
        self.seed, self._augments_on_device = seed_from_environment(self.local_rank), augments_on_device()
        with replaced(self, "_do_i_compile", lambda: False):  # its wrapper leaves out what methods call: see below
            super().initialize()
        companions = {name: network.to(self.device) for name, network in self.build_companions().items()}
        self.companions = SimpleNamespace(**companions)
        broadcast(vars(self.companions).values())  # as nnU-Net does with its network
        if self._do_i_compile():
            self.print_to_log_file("Using torch.compile...")
            self.loss = self._build_loss()  # with nnU-Net's compiled Dice
            for network in (self.network, *vars(self.companions).values()):
                compile_in_place(network)
        self._restart_optimizer()
        self._first_weights = [weights.detach().clone() for weights in ends(self.network)]

    def _restart_optimizer(self) -> None:
        # nnU-Net's and further ones, of all trained networks; nnU-Net's learning rate over the present phase's epochs
        begin = 0 if self.supervised_phase else self.supervised_epochs
        epochs = self.supervised_epochs if self.supervised_phase else self.num_epochs - begin
        self.training_stage = None  # nnU-Net's trainers with a warm-up would give the optimizer of before
        with replaced(self, "num_epochs", epochs):
            self.optimizer, scheduler = self.configure_optimizers()
        self.lr_scheduler = PhaseScheduler(scheduler, self.optimizer, begin)
        if self.supervised_phase:
            keep_finite(self.optimizer)  # nnU-Net makes every step
        self.optimizers = self.build_optimizers()
        add_networks(self.optimizer, self.trained_networks()[1:], self.optimizers.values())

    def _restart_companions(self) -> None:
        # in place: optimizers hold the parameters of those that are trained
        for name, network in self.build_companions().items():
            getattr(self.companions, name).load_state_dict(network.state_dict())
        broadcast(vars(self.companions).values())

    @property
    def _splits_file(self) -> Path:
        return Path(self.preprocessed_dataset_folder_base) / "splits_final.json"

    def do_split(self):
        if self._split is None:
            splits, folder = self._splits_file, Path(self.preprocessed_dataset_folder)
            preflight.check_numbered_fold(splits, self.fold, folder)
            train, val = super().do_split()
            preflight.check_cases(train, val, self.fold, splits, folder)
            preflight.refuse_empty_labels(train, self.fold, folder, self.label_manager)
            self._split = train, val
        return self._split

    def get_dataloaders(self):
        # nnU-Net's method with one change: the training loader is paired with the unlabeled one, in the same workers
        self.dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        preflight.require_present_format(self.dataset_class, self.preprocessed_dataset_folder)
        configuration, manager = self.configuration_manager, self.label_manager
        scales, mask = self._get_deep_supervision_scales(), configuration.use_mask_for_norm
        geometry = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        rotation, dummy_2d, initial_patch_size, mirror_axes = geometry
        regions, ignored = manager.foreground_regions if manager.has_regions else None, manager.ignore_label
        labels = {"foreground_labels": manager.foreground_labels, "regions": regions, "ignore_label": ignored}
        augmentation = (configuration.patch_size, rotation, scales, mirror_axes, dummy_2d)
        transforms = self.get_training_transforms(*augmentation, use_mask_for_norm=mask, **labels)
        if self.seed is not None:
            make_repeatable(transforms)
        val_transforms = self.get_validation_transforms(scales, **labels)
        train, val = self.get_tr_and_val_datasets()
        known = {"training": train.identifiers, "validation": val.identifiers}
        folder, plans, name = Path(self.preprocessed_dataset_folder_base), self.plans_manager, self.configuration_name
        if self._unlabeled is None:
            self._unlabeled = preflight.unlabeled_dataset(folder, plans, name, self.fold, known, self.dataset_json)
        unlabeled = self._unlabeled
        description = preflight.describe(self, SemiSupervisedTrainer, known, unlabeled)
        self.print_to_log_file(description, add_timestamp=False)
        sampling = {name: getattr(self, name) for name in SAMPLING}
        sizes = (self.batch_size, initial_patch_size, configuration.patch_size)
        streams = zip((train, unlabeled), self._streams_of(self.current_epoch), strict=True)
        used = [data if is_used else None for data, is_used in streams]
        self._intensity = OnDevice(transforms) if self._augments_on_device else None
        views = {"weak_view": self.weak_view, "strong_view": self._intensity is None}
        distances = self.signed_distance and not self.supervised_phase
        loaders = make_loaders(*used, val, sizes, (transforms, val_transforms), views, sampling, distances)
        train, val = start_loaders(*loaders, self.device, self.num_input_channels, folder / "dataset.json")
        return (train if self.supervised_phase else KeptItems(train, self.same_patches)), val

    def _streams_of(self, epoch: int) -> tuple[bool, bool]:
        # what any of its steps needs; asked at the begin of an epoch, of this one or of the one before
        if epoch < self.supervised_epochs:
            return True, False
        begin, found = self.step + (epoch - self.current_epoch) * self.num_iterations_per_epoch, []
        for step in range(begin, begin + self.num_iterations_per_epoch):
            with replaced(self, "step", step):
                found.append(self.streams())
        return tuple(map(any, zip(*found, strict=True)))

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        networks = [*vars(self.companions).values()]
        if self.is_ddp and not isinstance(self.network, DistributedDataParallel):
            networks.append(self.network)  # a deployed teacher, which nnU-Net would unwrap
        else:
            super().set_deep_supervision_enabled(enabled)
        set_deep_supervision(networks, enabled)

    # ---- training ----

    def on_train_start(self) -> None:
        if self.current_epoch == 0 and self.step == 0 and self.was_initialized:
            # weights given by -pretrained_weights were loaded after initialize: start the companions from them
            self._restart_companions()
            if not self.supervised_epochs and self._resume_random_state is None:
                self.health.check_heads(self.network, self._first_weights)
        super().on_train_start()
        if self.local_rank == 0:
            labeler = pseudo_labeler(self.segmenting_networks()).replace("_", " ")
            self.history = History(Path(self.output_folder), labeler, self.supervised_epochs)
            self.history.begin(self.current_epoch, self.print_to_log_file)
        if self._resume_random_state is not None:
            # the loaders have drawn their first batch by now
            set_random_state(self._resume_random_state, self.print_to_log_file)
            self._resume_random_state = None

    def run_training(self) -> None:
        try:
            with preflight.only_training(self.output_folder, self.local_rank):
                super().run_training()
        finally:
            stop_loaders(self.dataloader_train, self.dataloader_val)

    def on_train_epoch_start(self) -> None:
        epoch = self.current_epoch
        begins = self.step == 0 and 0 < self.supervised_epochs == epoch
        if begins:
            self.print_to_log_file("The semi-supervised phase begins: companions, learning rate and momentum are new.")
            self._restart_companions()
            self._restart_optimizer()
            self._best_ema = None  # the Dice falls at first: the best of this phase shall be kept
        # also where a training is continued, whose loaders are new: it goes on with the same random numbers
        if begins or (epoch > 0 and self._streams_of(epoch) != self._streams_of(epoch - 1)):
            stop_loaders(self.dataloader_train, self.dataloader_val)
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        super().on_train_epoch_start()
        for network in self.trained_networks():  # nnU-Net thinks of one, and validates with the deployed one
            network.train()

    def train_step(self, batch: dict) -> dict:
        labeled = f"labeled images ({', '.join(batch.get('keys', []))})"
        if self.supervised_phase:
            output = super().train_step(batch)
            self._check_terms({"loss": float(output["loss"])}, {labeled: batch["data"]})
            return output
        batch = self._to_device(batch)
        optimizers = [self.optimizer, *self.optimizers.values()]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        precision = (lambda: autocast("cuda")) if self.device.type == "cuda" else nullcontext  # as in nnU-Net
        # DistributedDataParallel would exchange gradients in every backward pass; a step exchanges their sum
        with replaced(self, "network", self.network.module if self.is_ddp else self.network):
            terms = accumulate_gradients(iter(self.losses(batch)), precision, self.grad_scaler)
        if not terms:
            raise RuntimeError(f"{type(self).__name__}.losses gave no term in step {self.step}. Yield at least one.")
        update_weights(optimizers, self.trained_networks(), self.max_gradient_norm, self.grad_scaler)
        self.after_step()
        self.step += 1
        if self.step % self.num_iterations_per_epoch == 0 and self.local_rank == 0:
            networks, ramp = self.segmenting_networks(), {"ramp": self.ramp} if self.rampup > 0 else {}
            labeler = networks[pseudo_labeler(networks)]
            self._observations = ramp | observe(self.network, labeler, batch, self.label_manager)
        # one copy to the host for all terms, where nnU-Net has one for its loss
        values = torch.stack([value.float() for value in terms.values()]).cpu().numpy()
        by_name = dict(zip(terms, values, strict=True))
        self._check_terms(by_name, {labeled: batch.image, "unlabeled images": batch.unlabeled})
        return {"loss": values.sum(), **by_name}

    def _check_terms(self, values: dict[str, float], images: dict[str, Tensor | None]) -> None:
        loaded = {name: image for name, image in images.items() if image is not None}
        self.health.check_terms(values, loaded, self.current_epoch, Path(self.output_folder))

    def _to_device(self, batch: dict) -> Batch:
        return to_device(batch, self.device, self.weak_view, self._intensity)

    def trained_networks(self) -> list[nn.Module]:
        """The networks that the optimizers train: `self.network` and companions that require gradients."""
        companions = vars(self.companions).values()
        return [self.network, *(c for c in companions if any(p.requires_grad for p in c.parameters()))]

    def segmenting_networks(self) -> dict[str, nn.Module]:
        """The student, and the companions that are called student or teacher: others need not segment."""
        companions = vars(self.companions).items()
        return {"student": self.network} | {n: c for n, c in companions if n.startswith(("student", "teacher"))}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        # nnU-Net takes the names from the first step, but a term may come in later ones only
        super().on_train_epoch_end([{"loss": step["loss"]} for step in train_outputs])
        self._losses = self.health.end_epoch(train_outputs)

    def on_epoch_end(self) -> None:
        due = time.monotonic() - self._saved_at > SAVE_SECONDS  # jobs on a cluster may be short
        with replaced(self, "save_every", 1 if due else self.save_every):
            super().on_epoch_end()
        begin, end = (self.logger.get_value(f"epoch_{t}_timestamps", step=-1) for t in ("start", "end"))
        last = self.supervised_epochs if self.supervised_phase else self.num_epochs
        if self.current_epoch < last:
            self.print_to_log_file(time_left(last - self.current_epoch, end - begin, self.supervised_phase))

    # ---- validation with the deployed network ----

    def _deployed(self) -> nn.Module:
        return self.network if self.supervised_phase else self.inference_network()

    def on_validation_epoch_start(self) -> None:
        self._overlaps = {}
        with replaced(self, "network", self._deployed()):
            super().on_validation_epoch_start()

    def validation_step(self, batch: dict) -> dict:
        deployed = self._deployed()
        networks = {} if self.supervised_phase else self.segmenting_networks()
        compared = len(networks) > 1 and len(self._overlaps.get("student", ())) < COMPARED_BATCHES
        # nnU-Net overwrites ignored voxels in place; a copy of what goes to a GPU would not be pinned
        overwritten = compared and self.label_manager.has_ignore_label and self.device.type == "cpu"
        original = deepcopy(batch["target"]) if overwritten else batch["target"]
        with replaced(self, "network", deployed):
            outputs = super().validation_step(batch)
        for name, network in networks.items() if compared else ():
            counts = outputs
            if network is not deployed:
                with replaced(self, "network", network), evaluating(network):
                    target = deepcopy(original) if overwritten else original
                    counts = super().validation_step({**batch, "target": target})
            self._overlaps.setdefault(name, []).append(counts)
        return outputs

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        if 0 < self.supervised_epochs == self.current_epoch:
            # new like _best_ema, or the networks of the phase before would be rated with those of this one
            logged = self.logger.local_logger.my_fantastic_logging
            logged["ema_fg_dice"][-1] = logged["mean_fg_dice"][-1]
        dice = dice_by_network(self._overlaps)
        if self.local_rank != 0:
            return
        # a moving average lags behind at first
        if self.current_epoch - self.supervised_epochs >= (self.num_epochs - self.supervised_epochs) / 10:
            self.health.compare_dice(dice)
        self.health.compare_foreground(self._observations)
        observations = self._observations | {f"dice_{name}": value for name, value in dice.items()}
        last = self.current_epoch == self.num_epochs - 1
        try:
            self.history.record(self.current_epoch, self._losses, observations, self.logger.loggers, last)
        except (OSError, ValueError) as error:  # open in another program, saved by one, or a drive that is away
            self.print_to_log_file(f"WARNING: no table or picture of this epoch ({error}). The training goes on.")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with replaced(self, "network", self._deployed()):
            super().perform_actual_validation(save_probabilities)

    # ---- checkpoints ----

    def save_checkpoint(self, filename: str) -> None:
        if filename.endswith("latest.pth"):
            self._saved_at = time.monotonic()
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        networks = {"student": unwrap(self.network), **{k: unwrap(c) for k, c in vars(self.companions).items()}}
        stock, deployed = super().save_checkpoint, unwrap(self._deployed())
        progress = {"step": self.step, "supervised_epochs": self.supervised_epochs}
        progress["labeled"] = self._split and list(self._split[0])  # None: no training has begun
        optimizers = (self.optimizer, self.optimizers)
        checkpoints.save(Path(filename), stock, networks, *optimizers, deployed, progress, self.current_epoch)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        if not self.was_initialized:
            self.initialize()
        file, checkpoint = checkpoints.read_newest(
            Path(filename_or_checkpoint), self._continued, self.print_to_log_file
        )
        networks = {"student": self.network, **vars(self.companions)}
        training = (type(self).__name__, self.plans_manager.plans_name, self.configuration_name)
        checkpoints.check_networks(file, checkpoint, networks, training)
        state = checkpoint.get(checkpoints.CHECKPOINT_KEY)
        require_hidden(self._splits_file, self.fold, file, checkpoints.labeled_cases(checkpoint) or ())
        self.current_epoch = checkpoint["current_epoch"]
        if state is not None:
            self.supervised_epochs = state.get("supervised_epochs", 0)  # earlier versions had no such phase
        unfinished = self._continued and state is not None and state["step"] == 0
        if unfinished and self.num_epochs <= self.supervised_epochs:
            raise ValueError(
                f"{file} is of a training whose first {self.supervised_epochs} epochs are supervised, and now "
                f"num_epochs is {self.num_epochs}: none would be left for the unlabeled scans. Set more, or train "
                f"anew without --c."
            )
        self._restart_optimizer()
        with first_groups_only(self.optimizer):
            super().load_checkpoint(str(file))
        if state is None:  # written by stock nnU-Net
            self.step = max(0, self.current_epoch - self.supervised_epochs) * self.num_iterations_per_epoch
            self._restart_companions()
            return
        checkpoints.restore(state, networks, self.optimizer, self.optimizers)
        self.step = state["step"]
        if self.step == 0 < self.supervised_epochs:  # its companions were never trained
            self._restart_companions()
        # it is rank 0's: the others would draw the same crops and masks
        self._resume_random_state = state["random_state"] if self.local_rank == 0 else None
