"""Images named by lists: text as the VTAB-1k exports of the adapter papers, CSV or TSV.

  train800.txt, val200.txt, test.txt     one 'path label' a line, labels from 0; or
  train.txt, val.txt, test.txt           a path may contain spaces

  train.csv, val.csv, test.csv (.tsv)    a header with the columns path and label, perhaps more; or
  labels.csv                             the only table in the folder, perhaps with a column split
                                         that says train, val or test

Paths are relative to the folder, or begin with its absolute name. Labels of tables are whole
numbers from 0 or class names; the names are sorted, unless `classes.txt` gives their order, one a
line.

What is missing is split off the training images, see `splitting`. Of lists with test images but no
validation images nothing is split off unless `val_fraction` is given: published lists are complete.
"""

from losa_scenic.dataset_lib import listed_files, sources
from losa_scenic.dataset_lib.media import IMAGES


def splits(
  *,
  root: str | None = None,
  train_list: str | None = None,
  val_list: str | None = None,
  test_list: str | None = None,
  val_fraction: float | None = None,
  test_fraction: float | None = None,
  split_seed: int = 0,
  class_names: str | None = None,
) -> sources.Splits:
  """Reads the lists; of the images only the presence of a few is checked.

  Args:
    root: the folder, or one list file in it; required.
    train_list: list of training images, relative to the folder or absolute. Default: found by name,
      as are the others. A table that is the only list may have a column 'split'.
    val_list: list of validation images. Where `train_list` is given, none is looked for: such a
      list (train800val200.txt) may hold the validation images.
    test_list: list of test images.
    val_fraction: share of each class to validate with, if there is no list, see `splitting`.
    test_fraction: share of each class to test with, if there is no list.
    split_seed: another number splits differently.
    class_names: file with the class names, one a line; default `classes.txt` if there is one.

  Returns:
    Sources that read a file each time it is asked for.

  Raises:
    errors.UserError: naming the file and line that is wrong, or the list that is missing.
  """
  return listed_files.open_splits(
    IMAGES,
    'image_list',
    root,
    {'train': train_list, 'val': val_list, 'test': test_list},
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    class_names=class_names,
  )
