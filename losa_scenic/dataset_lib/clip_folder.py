"""A user's own clips: one folder per class.

Two layouts:

  root/train/run/1.mp4      split folders; `val/` and `test/` are optional, and what is missing is
  root/val/run/9.mp4        split off from `train/`
  root/test/run/5.webm

  root/run/1.mp4            class folders only; validation and test clips are split off
  root/jump/7.avi

A split-off part takes the same share of every class. Which clips it takes depends only on
`split_seed` and each file's class and name. Labels follow the alphabetical order of the class
folders of the training clips. Clips that were cut from one recording should not be split at random:
give `val/` and `test/`, or a list (`clip_list`).

Nothing is left out silently: every file in a class folder must be named as a video. See
`class_folders`.
"""

from losa_scenic.dataset_lib import class_folders, sources
from losa_scenic.dataset_lib.media import CLIPS


def splits(
  *,
  root: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
) -> sources.Splits:
  """Finds the clips and splits them.

  Args:
    root: the folder; required.
    val_fraction: share in [0, 1) of each class to validate with, where there is no `val/`; 0 for
      no validation split. Default 0.1.
    test_fraction: share in (0, 1) of each class to test with, where there is no `test/`. Default
      0.2.
    split_seed: another number splits differently.

  Returns:
    Sources of video files, whole; nothing is opened.

  Raises:
    errors.UserError: naming the folder or file that is missing, empty, not a video by its name or
      of a class without training clips.
  """
  return class_folders.open_splits(
    CLIPS,
    'clip_folder',
    root,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
  )
