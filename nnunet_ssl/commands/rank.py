"""Which unlabeled scans a model is worst on: predicts them with several networks and sorts them by expected error.

A folder that `nnunet-ssl rank` has written holds:

- `rank.csv`, a row per scan, worst first (an empty cell: not defined for this scan):
    case
    score                   expected error, higher is worse, see `ranking.scores`
    disagreement            1 - mean pairwise Dice of the networks' foreground, in [0, 1]; empty for one network
    disagreement_<class>    the same for every foreground class or region
    entropy_<class>         mean binary entropy in bits of the networks' mean probability, over the voxels that may be of
                            the class (probability of 5 % or more); empty where no voxel may be
    volume_ml_<class>       of the mean prediction; 0 where the class is not predicted. 2D images count as 1 mm thick
    volume_z                largest absolute robust z over the classes of the logarithm of the volume, over all scans
    components              connected pieces of the foreground of the mean prediction
    missing                 names of the classes that are not predicted, joined by spaces
- `labels/CASE<ending>`: the mean prediction, with the geometry of the image and the file ending of the dataset.
- `networks/NETWORK/CASE<ending>`: the label map of each network.
- `settings.json`: what all that was made from: dataset, configuration, plans, folds, trainers, also, checkpoint,
  mirroring, scans (their source), classes (name to label values), file_ending, and networks (name to file, network,
  size and time of the file, the deployed one of the first model first). A run with other settings is refused.
- `measured/CASE.json`: the row of a scan without what needs all scans, and its features; written last, it says that the
  scan is done. So an interrupted run goes on, several parts share a folder, and no row is ever lost.
- `images/CASE_0000<ending>`: where a scan is a DICOM series, that series as one file.
- `next.csv`, with --next: order, case, score, distance (to the nearest one before it), random_case.
"""
