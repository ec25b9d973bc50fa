"""A user's own images: one folder per class.

Two layouts:

  root/train/cat/1.jpg      split folders; `val/` and `test/` are optional, and what is missing is
  root/val/cat/9.jpg        split off from `train/`
  root/test/cat/5.png

  root/cat/1.jpg            class folders only; validation and test images are split off
  root/dog/7.webp

A split-off part takes the same share of every class. Which images it takes depends only on
`split_seed` and each file's class and name: neither the machine nor other files matter. Labels
follow the alphabetical order of the class folders of the training images.

Nothing is left out silently: every file in a class folder must be named as an image. See
`class_folders`.
"""

from losa_scenic.dataset_lib import class_folders, sources
from losa_scenic.dataset_lib.media import IMAGES


def splits(
  *,
  root: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
) -> sources.Splits:
  """Finds the images and splits them.

  Args:
    root: the folder; required.
    val_fraction: share in [0, 1) of each class to validate with, where there is no `val/`; 0 for
      no validation split. Default 0.1.
    test_fraction: share in (0, 1) of each class to test with, where there is no `test/`. Default
      0.2.
    split_seed: another number splits differently.

  Returns:
    Sources that read a file each time it is asked for.

  Raises:
    errors.UserError: naming the folder or file that is missing, empty, not an image by its name or
      of a class without training images.
  """
  return class_folders.open_splits(
    IMAGES,
    'image_folder',
    root,
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
  )
