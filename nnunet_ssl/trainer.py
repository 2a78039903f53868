"""SemiSupervisedTrainer: the only file that touches nnU-Net's training loop."""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2 import paths
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, autocast, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from nnunet_ssl import checkpoints, pseudo_labels
from nnunet_ssl.checkpoints import CHECKPOINT_KEY, CHECKPOINTS
from nnunet_ssl.data import (
    Batch,
    LabeledDataLoader,
    PairedDataLoader,
    UnlabeledDataLoader,
    UnlabeledDataset,
    find_unlabeled,
    predicted_foreground,
)
from nnunet_ssl.dataset_json import channel_names
from nnunet_ssl.monitoring import History, evaluating, labeler, mean_dice, observe
from nnunet_ssl.networks import average_gradients, unwrap
from nnunet_ssl.nnunet_version import require_nnunet
from nnunet_ssl.preprocessing import (
    check_settings,
    find_scans,
    finished_cases,
    preprocessing_settings,
    unlabeled_folder,
)
from nnunet_ssl.random_state import seed_from_environment, set_random_state
from nnunet_ssl.schedules import sigmoid_rampup
from nnunet_ssl.splits import CROSSVAL_FOLDS, check_fold, read_fold

COMPARED_BATCHES = 10  # of the validation batches of an epoch, on which the Dice of every network is taken
LAGGING = 0.05  # Dice by which a teacher may be below every student without a warning
NOT_FINITE_STEPS = 20  # steps in a row with the same term NaN or infinite, after which a training is stopped
STOCK_SETTINGS = (  # nnU-Net sets these in __init__; as class attributes of a trainer they win
    "num_epochs",
    "initial_lr",
    "weight_decay",
    "oversample_foreground_percent",
    "probabilistic_oversampling",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "enable_deep_supervision",
    "save_every",
)


class SemiSupervisedTrainer(nnUNetTrainer):
    """nnU-Net's trainer with an unlabeled stream; a method overrides four short functions.

    A method may use `self.network` (the student), `self.companions.<name>`, `self.loss` (nnU-Net's), `self.step`
    (optimizer steps taken) and `self.max_steps`. Its hyperparameters are class attributes. It derives from this class
    directly and has no `__init__`. What labels are, classes or regions, with or without the ignore label, it leaves to
    `self.hard_labels`, `self.probabilities` and `self.as_probabilities`. On several GPUs, every rank has to yield the
    same terms: nnU-Net's Dice waits for the other ranks.
    """

    max_gradient_norm = 12  # as in nnU-Net, whose Primus trainers have 1
    rampup = 0.0  # part of the training after which `self.ramp` is 1
    weak_view = False  # also give the method every unlabeled crop with spatial augmentation only

    # ---- what a method overrides ----

    def build_companions(self) -> dict[str, nn.Module]:
        """Networks beside `self.network`, by name: what segments is called teacher... (frozen) or student....

        Any other name is a module that does not segment, such as a head or a discriminator. What requires gradients
        is trained by the same optimizer; everything is saved, and restored by --c.
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

    # ---- what a method may use: the functions of pseudo_labels.py for this dataset's labels ----

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax over the classes, sigmoid of regions; float32."""
        return pseudo_labels.probabilities(logits, regions=self.label_manager.has_regions)

    def hard_labels(self, logits: Tensor) -> Tensor:
        """The most probable class, or the regions with a logit above 0, as targets of `self.loss`; no gradient."""
        labels = self.label_manager
        hard = pseudo_labels.hard_labels(logits, regions=labels.has_regions, ignore_channel=labels.has_ignore_label)
        self._note_foreground(hard)
        return hard

    def as_probabilities(self, labels: Tensor, channels: int) -> tuple[Tensor, Tensor]:
        """Labels as probabilities of the network's `channels`, and a mask of the voxels that are annotated."""
        regions, ignore_label = self.label_manager.has_regions, self.label_manager.ignore_label
        return pseudo_labels.as_probabilities(labels, channels, regions=regions, ignore_label=ignore_label)

    def parts(self, size: int) -> list[slice]:
        """Parts of a batch of that size of which two graphs need no more memory than one graph of the whole batch.

        The whole batch where its samples depend on each other beyond this process or this part: in batch
        normalisation, and in a Dice over the samples of all GPUs. A single sample is a part as well.
        """
        normalised = any(isinstance(module, _BatchNorm) for module in unwrap(self.network).modules())
        joint = normalised or (self.is_ddp and self.configuration_manager.batch_dice)
        step = size if joint else max(1, size // 2)
        return [slice(begin, begin + step) for begin in range(0, size, step)]

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

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008, the signature is nnU-Net's
    ):
        require_nnunet()
        for variable in (paths.nnUNet_preprocessed, paths.nnUNet_results):
            variable.require()
        self._continued = plans["continue_training"]  # nnU-Net takes it out of the plans
        try:
            super().__init__(plans, configuration, fold, dataset_json, device)
        except OSError as error:
            raise OSError(
                f"{paths.nnUNet_results} cannot be written to ({error}). Set nnUNet_results to a folder that can."
            ) from error
        for name in STOCK_SETTINGS:
            if hasattr(type(self), name):
                setattr(self, name, getattr(type(self), name))
        self.step = 0
        self.companions = SimpleNamespace()
        self._losses: dict[str, float] = {}  # means of the epoch
        self._observations: dict = {}  # of the epoch's last batch
        self._overlaps: dict[str, list[dict]] = {}  # network to what nnU-Net counted on the compared batches
        self._resume_random_state = None
        self._not_finite: dict[str, int] = {}  # loss term to the steps in a row in which it was not finite
        self._foreground, self._pseudo_labels = 0.0, 0  # of this epoch: sum of shares, and how many there were

    def _restart_companions(self) -> None:
        # in place: the optimizer holds the parameters of those that are trained
        for name, network in self.build_companions().items():
            getattr(self.companions, name).load_state_dict(network.state_dict())
        self._synchronize_companions()

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.num_epochs * self.num_iterations_per_epoch

    @property
    def ramp(self) -> float:
        """Factor for the weights of unlabeled terms: sigmoid ramp-up over the first `rampup` part of the training."""
        return sigmoid_rampup(self.step, self.rampup * self.max_steps)

    def initialize(self) -> None:
        self._refuse_unsupported()
        if not finished_cases(Path(self.preprocessed_dataset_folder)):
            plans = self.plans_manager
            raise FileNotFoundError(
                f"{self.preprocessed_dataset_folder} has no preprocessed case. Run: nnUNetv2_preprocess "
                f"-d {plans.dataset_name[7:10]} -plans_name {plans.plans_name} -c {self.configuration_name}"
            )
        self.seed = seed_from_environment(self.local_rank)
        super().initialize()
        companions = {name: network.to(self.device) for name, network in self.build_companions().items()}
        self.companions = SimpleNamespace(**companions)
        self._synchronize_companions()
        for network in self.trained_networks()[1:]:
            self.optimizer.add_param_group({"params": [p for p in network.parameters() if p.requires_grad]})
        self._first_weights = next(unwrap(self.network).parameters()).detach().clone()

    def _synchronize_companions(self) -> None:
        """On several GPUs, gives every rank the companions of rank 0, as nnU-Net does with its network."""
        for network in vars(self.companions).values() if self.is_ddp else ():
            for tensor in (*network.parameters(), *network.buffers()):
                dist.broadcast(tensor.detach(), 0)

    def _refuse_unsupported(self) -> None:
        name = type(self).__name__
        owner = next(cls for cls in type(self).__mro__ if "train_step" in vars(cls))
        if not issubclass(owner, SemiSupervisedTrainer):
            raise NotImplementedError(
                f"{name} would train with {owner.__name__}.train_step, without unlabeled scans. Name the "
                f"semi-supervised trainer first among its base classes."
            )
        if self.is_cascaded:
            raise NotImplementedError(
                f"{name} does not support cascades ({self.configuration_name}): the unlabeled scans have no "
                f"segmentation of the previous stage. Train 3d_fullres or 3d_lowres, or nnUNetTrainer for this stage."
            )

    def do_split(self):
        path = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        folder = Path(self.preprocessed_dataset_folder)
        cases = finished_cases(folder)
        if self.fold != "all":
            # for other folds nnU-Net would draw a random split, with cases that are meant to stay unlabeled
            check_fold(path, self.fold)
            if not path.is_file() and len(cases) < CROSSVAL_FOLDS:
                raise ValueError(
                    f"{folder} has {len(cases)} cases, too few for the {CROSSVAL_FOLDS} folds that nnU-Net draws. "
                    f"Write a fold into {path}, as " + '[{"train": ["CASE_A"], "val": ["CASE_B"]}], or train fold all.'
                )
        train, val = super().do_split()
        missing = sorted({*train, *val} - cases)
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} cases of fold {self.fold} are not in {folder}, or not all three files of them: "
                f"{', '.join(missing[:5])}. Run nnUNetv2_preprocess for this configuration again, or correct {path}."
            )
        self._refuse_empty_labels(train)
        return train, val

    def _refuse_empty_labels(self, cases: list[str]) -> None:
        """Refuses labeled cases without any foreground; usually the first file that is read has some."""
        everything = (-1, *self.label_manager.all_labels)  # nnU-Net's entry for all annotated voxels
        for case in cases:
            found = load_pickle(str(Path(self.preprocessed_dataset_folder) / f"{case}.pkl"))["class_locations"]
            if any(len(voxels) for label, voxels in found.items() if label != everything):
                return
        raise ValueError(
            f"None of the {len(cases)} labeled cases of fold {self.fold} has a voxel of a foreground label: "
            f"{', '.join(cases[:5])}. Check their files in labelsTr, and labels in dataset.json."
        )

    def unlabeled_files(self, train_cases: list[str], val_cases: list[str]) -> dict[str, Path]:
        """Identifier to preprocessed image of this fold's unlabeled cases, from both sources.

        Raises:
            FileNotFoundError: there is none; the message has both ways to provide them.
            ValueError: a case is labeled or for validation as well, or other plans have preprocessed imagesUn.
        """
        base = Path(self.preprocessed_dataset_folder_base)
        path = base / "splits_final.json"
        listed = read_fold(path, self.fold)["unlabeled"] if self.fold != "all" else []
        own = unlabeled_folder(base, self.configuration_manager.data_identifier)
        check_settings(own, preprocessing_settings(self.plans_manager, self.configuration_manager))
        files = find_unlabeled(base, self.configuration_manager.data_identifier, listed)
        for kind, cases in (("training", train_cases), ("validation", val_cases)):
            shared = sorted(set(files) & set(cases))
            if shared:
                raise ValueError(f"{path}: unlabeled cases of fold {self.fold} are {kind} cases too: {shared[:5]}.")
        if not files:
            plans, configuration = self.plans_manager, self.configuration_name
            dataset, number = plans.dataset_name, plans.dataset_name[7:10]
            file = f"CASE_0000{self.dataset_json['file_ending']}"
            raise FileNotFoundError(
                f"{dataset} has no unlabeled cases for fold {self.fold}. There are two ways to provide them:\n"
                f"  1. Put the scans into nnUNet_raw/{dataset}/imagesUn, as {file}, without label files, and run\n"
                f"     nnunet-ssl preprocess -d {number} -c {configuration} -p {plans.plans_name}\n"
                f'  2. To hide labels of a labeled dataset (benchmark), write folds with an "unlabeled" list:\n'
                f"     nnunet-ssl split -d {number} --labeled 8 --overwrite"
            )
        return files

    def get_dataloaders(self):
        # nnU-Net's method with one change: the training loader is paired with the unlabeled one, in the same workers
        self.dataset_class = self.dataset_class or infer_dataset_class(self.preprocessed_dataset_folder)
        if not issubclass(self.dataset_class, nnUNetDatasetBlosc2):
            raise NotImplementedError(
                f"{self.preprocessed_dataset_folder} was preprocessed by an old nnU-Net. Run nnUNetv2_preprocess again."
            )
        patch_size = self.configuration_manager.patch_size
        scales = self._get_deep_supervision_scales()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        labels = {
            "foreground_labels": self.label_manager.foreground_labels,
            "regions": self.label_manager.foreground_regions if self.label_manager.has_regions else None,
            "ignore_label": self.label_manager.ignore_label,
        }
        mask = self.configuration_manager.use_mask_for_norm
        transforms = self.get_training_transforms(
            patch_size, rotation, scales, mirror_axes, dummy_2d, use_mask_for_norm=mask, **labels
        )
        if self.seed is not None:
            for transform in transforms.transforms:
                blur = getattr(transform, "transform", None)
                if isinstance(blur, GaussianBlurTransform):
                    blur.benchmark = False  # it times two ways of blurring and takes the faster one
        val_transforms = self.get_validation_transforms(scales, **labels)
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        files = self.unlabeled_files(dataset_tr.identifiers, dataset_val.identifiers)

        sampling = {
            "oversample_foreground_percent": self.oversample_foreground_percent,
            "probabilistic_oversampling": self.probabilistic_oversampling,
        }
        labeled = LabeledDataLoader(
            dataset_tr,
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms=transforms,
            **sampling,
        )
        plans, configuration = self.plans_manager, self.configuration_manager
        predicted = predicted_foreground(
            plans.dataset_name,
            None if self.fold == "all" else dataset_tr.identifiers,
            preprocessing_settings(plans, configuration),
            configuration.data_identifier,
        )
        unlabeled = UnlabeledDataLoader(
            UnlabeledDataset(files, predicted),
            self.batch_size,
            initial_patch_size,
            patch_size,
            self.label_manager,
            transforms,
            self.weak_view,
            **sampling,
        )
        validation = LabeledDataLoader(
            dataset_val,
            self.batch_size,
            patch_size,
            patch_size,
            self.label_manager,
            transforms=val_transforms,
            **sampling,
        )
        self._log_data(len(dataset_tr.identifiers), files, len(dataset_val.identifiers))
        if predicted:
            self.print_to_log_file(
                f"Unlabeled patches are oversampled where a model found foreground, in {len(predicted.keys() & files)} "
                f"of {len(files)} unlabeled cases.",
                add_timestamp=False,
            )

        workers = get_allowed_n_proc_DA()
        train = _augmenter(PairedDataLoader(labeled, unlabeled), workers, max(6, workers // 2), self.device)
        val = _augmenter(validation, min(workers, max(1, workers // 2)), max(3, workers // 4), self.device)
        batch = next(train)
        next(val)
        for name, kind in (("data", "labeled"), ("unlabeled", "unlabeled")):
            if batch[name].shape[1] != self.num_input_channels:
                raise ValueError(
                    f"The preprocessed {kind} cases have {batch[name].shape[1]} channels, but dataset.json has "
                    f"{self.num_input_channels}. Correct {self.preprocessed_dataset_folder_base}/dataset.json, or "
                    f"preprocess again."
                )
        return train, val

    def _log_data(self, labeled: int, unlabeled: dict[str, Path], validation: int) -> None:
        settings = {
            name: getattr(self, name)
            for cls in type(self).__mro__[: type(self).__mro__.index(SemiSupervisedTrainer) + 1]
            for name, value in vars(cls).items()
            if not name.startswith("_") and isinstance(value, int | float | str | bool)
        }
        self.print_to_log_file(
            f"Cases: {labeled} labeled, {len(unlabeled)} unlabeled, {validation} for validation.\n"
            f"Every batch: {self.batch_size} labeled and {self.batch_size} unlabeled patches of "
            f"{list(self.configuration_manager.patch_size)} voxels; {self.max_steps} steps.\n"
            f"{type(self).__name__}: " + ", ".join(f"{name} = {value}" for name, value in sorted(settings.items())),
            add_timestamp=False,
        )
        if paths.nnUNet_raw.is_set():
            images = Path(paths.nnUNet_raw) / self.plans_manager.dataset_name / "imagesUn"
            single = len(channel_names(self.dataset_json)) == 1
            missing = find_scans(images, self.dataset_json["file_ending"], single)[0].keys() - unlabeled.keys()
            if missing:
                self.print_to_log_file(
                    f"WARNING: {len(missing)} scans of {images} are not preprocessed and not used. Run: nnunet-ssl "
                    f"preprocess -d {self.plans_manager.dataset_name[7:10]} -c {self.configuration_name}"
                )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        networks = list(vars(self.companions).values())
        if self.is_ddp and not isinstance(self.network, DistributedDataParallel):
            networks.append(self.network)  # a deployed teacher, which nnU-Net would unwrap
        else:
            super().set_deep_supervision_enabled(enabled)
        for network in networks:
            decoder = getattr(unwrap(network), "decoder", None)
            if decoder is not None:  # transformers have none, and no deep supervision
                decoder.deep_supervision = enabled

    # ---- training ----

    def on_train_start(self) -> None:
        fresh = self.current_epoch == 0 and self.step == 0
        if fresh and self.was_initialized:
            # weights given by -pretrained_weights were loaded after initialize: start the companions from them
            self._restart_companions()
            self._warn_of_random_heads()
        super().on_train_start()
        if self.local_rank == 0:
            for leftover in Path(self.output_folder).glob(".*.tmp"):
                leftover.unlink()  # a training that was killed while it wrote a checkpoint or a picture
            self.history = History(Path(self.output_folder), labeler(self)[0].replace("_", " "))
            self.history.trim(self.current_epoch)
        if self._resume_random_state is not None:
            # the loaders have drawn their first batch by now
            set_random_state(self._resume_random_state)
            self._resume_random_state = None

    def _warn_of_random_heads(self) -> None:
        network = unwrap(self.network)
        heads = [name for name, _ in network.named_modules() if name.endswith("seg_layers")]
        if heads and not torch.equal(next(network.parameters()), self._first_weights):
            self.print_to_log_file(
                f"WARNING: -pretrained_weights leaves out the segmentation heads ({', '.join(heads)}). They start with "
                f"random weights, in the student and in its companions: the first pseudo labels mean nothing."
            )

    def run_training(self) -> None:
        try:
            super().run_training()
        finally:
            # nnU-Net leaves its workers behind when it is interrupted
            for loader in (self.dataloader_train, self.dataloader_val):
                if isinstance(loader, NonDetMultiThreadedAugmenter):
                    loader._finish()

    def train_step(self, batch: dict) -> dict:
        keys, batch = batch.get("keys", []), self._to_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        losses = iter(self.losses(batch))
        while True:
            # as in nnU-Net: autocast only where there is CUDA; the backward pass runs outside of it
            with autocast("cuda") if self.device.type == "cuda" else nullcontext(), self._without_ddp():
                group = next(losses, None)
                total = None if group is None else sum(group.values())
            if group is None:
                break
            if not group:
                continue
            if self.grad_scaler is not None:
                self.grad_scaler.scale(total).backward()
            else:
                total.backward()
            for name, value in group.items():
                terms[name] = terms.get(name, 0) + value.detach()
            del group, total
        if not terms:
            raise RuntimeError(f"{type(self).__name__}.losses gave no term in step {self.step}. Yield at least one.")
        self._update_weights()
        self.after_step()
        self.step += 1
        if self.step % self.num_iterations_per_epoch == 0 and self.local_rank == 0:
            self._observations = observe(self, batch)
        # one copy to the host for all terms, where nnU-Net has one for its loss
        values = torch.stack([value.float() for value in terms.values()]).cpu().numpy()
        by_name = dict(zip(terms, values, strict=True))
        self._watch_terms(by_name, batch, keys)
        return {"loss": values.sum(), **by_name}

    def _to_device(self, batch: dict) -> Batch:
        def move(x):
            return [move(i) for i in x] if isinstance(x, list) else x.to(self.device, non_blocking=True)

        return Batch(
            image=move(batch["data"]),
            target=move(batch["target"]),
            unlabeled=move(batch["unlabeled"]),
            unlabeled_weak=move(batch["unlabeled_weak"]) if self.weak_view else None,
        )

    @contextmanager
    def _without_ddp(self) -> Iterator[None]:
        """For the forward passes, `self.network` is the one inside DistributedDataParallel.

        That would exchange gradients in every backward pass; a step has several, and exchanges their sum.
        """
        wrapped = self.network
        self.network = wrapped.module if self.is_ddp else wrapped
        try:
            yield
        finally:
            self.network = wrapped

    def _update_weights(self) -> None:
        if self.is_ddp:
            average_gradients(self.trained_networks())
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        norms = [nn.utils.clip_grad_norm_(s.parameters(), self.max_gradient_norm) for s in self.trained_networks()]
        # Where a gradient is not finite, GradScaler leaves the step out (CUDA), and so do we on a CPU: weights and
        # momentum stay good, and teachers average good weights. On MPS to ask would make the host wait: there the
        # weights are lost, the teachers with them, and `save_checkpoint` keeps the earlier files.
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        elif self.device.type != "cpu" or all(norm.isfinite() for norm in norms):
            self.optimizer.step()

    def _watch_terms(self, values: dict[str, float], batch: Batch, keys: list[str]) -> None:
        """Stops a training of which a term is not finite for many steps; `values` are on the host already.

        A single such step is harmless, see `_update_weights`, and told at the end of the epoch. Nothing is saved here:
        weights that give NaN for so many batches are not worth more than those of the last checkpoint.
        """
        for name, value in values.items():
            self._not_finite[name] = 0 if np.isfinite(value) else self._not_finite.get(name, 0) + 1
        names = [name for name, steps in self._not_finite.items() if steps >= NOT_FINITE_STEPS]
        if not names:
            return
        text = (
            f"The loss term {' and '.join(names)} was NaN or infinite for {NOT_FINITE_STEPS} steps in a row, up to "
            f"step {self.step} (epoch {self.current_epoch}). "
        )
        labeled = f"labeled images ({', '.join(keys)})"
        for image, name in ((batch.image, labeled), (batch.unlabeled, "unlabeled images")):
            if not image.isfinite().all():
                text += f"The last {name} have voxels that are NaN or infinite: check them. "
        folder = Path(self.output_folder)
        kept = [name for name in CHECKPOINTS[1:] if (folder / name).is_file()]
        text += (
            f"{folder / kept[0]} is the last good state, from which --c continues once the cause is removed."
            if kept
            else "There is no checkpoint yet. Start again once the cause is removed."
        )
        raise RuntimeError(text)

    def _note_foreground(self, labels: Tensor) -> None:
        # a sum on the device: nothing waits for it before the end of the epoch
        self._foreground = self._foreground + (labels > 0).any(1).float().mean()
        self._pseudo_labels += 1

    def _warn_of_empty_pseudo_labels(self) -> None:
        if self._pseudo_labels and float(self._foreground) == 0:
            self.print_to_log_file(
                "WARNING: all pseudo labels of this epoch are background: unlabeled scans teach nothing else now. That "
                "is usual in the first epochs only."
            )
        self._foreground, self._pseudo_labels = 0.0, 0

    def trained_networks(self) -> list[nn.Module]:
        """The networks that the optimizer trains: `self.network` and companions that require gradients."""
        companions = vars(self.companions).values()
        return [self.network, *(c for c in companions if any(p.requires_grad for p in c.parameters()))]

    def segmenting_networks(self) -> dict[str, nn.Module]:
        """The student, and the companions that are called student or teacher: others need not segment."""
        companions = vars(self.companions).items()
        return {"student": self.network} | {n: c for n, c in companions if n.startswith(("student", "teacher"))}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        # nnU-Net takes the names from the first step, but a term may come in later ones only
        super().on_train_epoch_end([{"loss": step["loss"]} for step in train_outputs])
        self._warn_of_empty_pseudo_labels()
        names = dict.fromkeys(name for step in train_outputs for name in step)
        outputs = {name: [step[name] for step in train_outputs if name in step] for name in names}
        for name, values in outputs.items():
            if name != "loss" and not np.all(np.isfinite(values)):
                steps = f"{np.sum(~np.isfinite(values))} of {len(values)} steps"
                self.print_to_log_file(f"WARNING: the loss term {name} was NaN or infinite in {steps} of this epoch.")
        means = {name: float(np.mean(values)) for name, values in outputs.items()}
        if self.is_ddp:
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, means)
            means = {name: float(np.mean([rank[name] for rank in ranks])) for name in means}
        self.print_to_log_file("losses", ", ".join(f"{name} {value:.4f}" for name, value in means.items()))
        self._losses = means

    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        begin, end = (self.logger.get_value(f"epoch_{t}_timestamps", step=-1) for t in ("start", "end"))
        left = self.num_epochs - self.current_epoch
        if left > 0:
            finish = datetime.now() + left * timedelta(seconds=end - begin)
            self.print_to_log_file(f"{left} epochs left, until about {finish:%Y-%m-%d %H:%M}")

    # ---- validation with the deployed network ----

    @contextmanager
    def _standing_in(self, network: nn.Module) -> Iterator[None]:
        student = self.network
        self.network = network
        try:
            yield
        finally:
            self.network = student

    def on_validation_epoch_start(self) -> None:
        self._overlaps = {}
        with self._standing_in(self.inference_network()):
            super().on_validation_epoch_start()

    def validation_step(self, batch: dict) -> dict:
        deployed = self.inference_network()
        networks = self.segmenting_networks()
        compared = len(networks) > 1 and len(self._overlaps.get("student", ())) < COMPARED_BATCHES
        original = deepcopy(batch["target"]) if compared else None  # nnU-Net overwrites ignored voxels
        with self._standing_in(deployed):
            outputs = super().validation_step(batch)
        for name, network in networks.items() if compared else ():
            counts = outputs
            if network is not deployed:
                with self._standing_in(network), evaluating(network):
                    counts = super().validation_step({**batch, "target": deepcopy(original)})
            self._overlaps.setdefault(name, []).append(counts)
        return outputs

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        ranks = [self._overlaps]
        if self.is_ddp:
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, self._overlaps)
        dice = {name: mean_dice([counts for rank in ranks for counts in rank[name]]) for name in self._overlaps}
        if self.local_rank != 0:
            return
        self._warn_of_lagging_teachers(dice)
        observations = {name: float(value) for name, value in self._observations.items()}
        observations |= {f"dice_{name}": value for name, value in dice.items()}
        for logger in self.logger.loggers:  # Weights & Biases, where nnU-Net has it enabled
            for name, value in self._losses.items():
                logger.log(f"losses/{name}", value, self.current_epoch)
            for name, value in observations.items():
                logger.log(f"semi_supervised/{name}", value, self.current_epoch)
        self.history.append(self.current_epoch, self._losses, observations)
        self.history.draw(last=self.current_epoch == self.num_epochs - 1)

    def _warn_of_lagging_teachers(self, dice: dict[str, float]) -> None:
        if self.current_epoch < self.num_epochs / 10:  # a moving average lags behind at first
            return
        worst = min((value for name, value in dice.items() if name.startswith("student")), default=0.0)
        for name, value in dice.items():
            if name.startswith("teacher") and value < worst - LAGGING:
                self.print_to_log_file(
                    f"WARNING: on validation patches the {name.replace('_', ' ')} has a Dice of {value:.3f}, every "
                    f"student {worst:.3f} or more: its labels hold the students back."
                )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with self._standing_in(self.inference_network()):
            super().perform_actual_validation(save_probabilities)

    # ---- checkpoints ----

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        networks = {"student": unwrap(self.network), **{k: unwrap(c) for k, c in vars(self.companions).items()}}
        # tensors that are shared between the entries are stored once
        states = {name: network.state_dict() for name, network in networks.items()}
        checkpoints.require_finite(Path(filename), states, self.current_epoch)
        optimizer = self.optimizer.state_dict()
        stock = io.BytesIO()
        with checkpoints.without_states(networks["student"], self.optimizer):
            super().save_checkpoint(stock)
        stock.seek(0)
        checkpoint = torch.load(stock, map_location="cpu", weights_only=False)
        deployed = unwrap(self.inference_network())
        name = next(name for name, network in networks.items() if network is deployed)
        checkpoints.write(checkpoints.extended(checkpoint, states, optimizer, name, self.step), Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        if not self.was_initialized:
            self.initialize()
        file, checkpoint, damaged = checkpoints.read_newest(Path(filename_or_checkpoint), self._continued)
        if damaged:
            self.print_to_log_file(
                f"WARNING: cut off or damaged: {', '.join(damaged)}. Training continues from {file} instead, "
                f"with epoch {checkpoint['current_epoch']}."
            )
        misfits = checkpoints.misfits(checkpoint, {"student": self.network, **vars(self.companions)})
        if misfits:
            arguments = checkpoint.get("init_args", {})
            plans, configuration = arguments.get("plans", {}).get("plans_name"), arguments.get("configuration")
            raise ValueError(
                f"{file} is of {checkpoint.get('trainer_name')}, {plans}, {configuration}; its networks do not fit "
                f"{type(self).__name__}, {self.plans_manager.plans_name}, {self.configuration_name} "
                f"({', '.join(misfits)}). Continue with the trainer, plans and configuration that wrote it, or "
                f"move the file away and start without --c."
            )
        further = self.optimizer.param_groups[1:]
        del self.optimizer.param_groups[1:]
        super().load_checkpoint(str(file))
        self.optimizer.param_groups.extend(further)
        state = checkpoint.get(CHECKPOINT_KEY)
        if state is None:  # written by stock nnU-Net: the companions start from its weights
            self._restart_companions()
            self.step = self.current_epoch * self.num_iterations_per_epoch
            return
        self.optimizer.load_state_dict(state["optimizer"])
        unwrap(self.network).load_state_dict(state["student"])
        for name, network in vars(self.companions).items():
            unwrap(network).load_state_dict(state["companions"][name])
        self.step = state["step"]
        # it is rank 0's: the others would draw the same crops and masks
        self._resume_random_state = state["random_state"] if self.local_rank == 0 else None


def _augmenter(loader, workers: int, cached: int, device: torch.device):
    if workers == 0:
        return SingleThreadedAugmenter(loader, None)
    pin = device.type == "cuda"
    return NonDetMultiThreadedAugmenter(loader, None, workers, cached, pin_memory=pin, wait_time=0.002)


def epoch_variants(module: dict):
    """Module-level `__getattr__` that makes `<trainer>_<N>epochs` of the module's trainers when nnU-Net asks for them.

    Args:
        module: `globals()` of a trainer file.
    """

    def find(name: str) -> type:
        base, _, ending = name.rpartition("_")
        number = ending.removesuffix("epochs")
        trainer = module.get(base)
        if not (isinstance(trainer, type) and ending.endswith("epochs") and number.isdecimal() and int(number) > 0):
            raise AttributeError(f"module {module['__name__']!r} has no attribute {name!r}")
        attributes = {"num_epochs": int(number), "__module__": trainer.__module__, "__doc__": trainer.__doc__}
        return type(name, (trainer,), attributes)

    return find
