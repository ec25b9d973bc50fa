"""Clips named by lists: tables, CSV or TSV, or text.

  train.csv, val.csv, test.csv (.tsv)    a header with the columns path and label, perhaps more; or
  clips.csv                              all clips, perhaps with a column split that says train, val
                                         or test; any name will do for the only table in the folder

  train.txt, val.txt, test.txt           one 'path label' a line, labels from 0

The column of the path may also be called file, filename, clip or video (see
`list_rows.CLIP_COLUMNS`). Columns start and end (or start_time, time_start, ..), in seconds, name a
part of the file; where they are empty the clip begins or ends with the file. One file may be listed
with several parts. Tables without a header are read if their lines are 'path,label' or 'path label'
with whole numbers as labels, as published for Kinetics by several projects; lists of folders of
frames, 'path count label', are not.

Paths are relative to the folder, or begin with its absolute name. Labels of tables are whole
numbers from 0 or class names; the names are sorted, unless `classes.txt` gives their order, one a
line.

What is missing is split off the training clips, see `splitting`. Of lists with test clips but no
validation clips nothing is split off unless `val_fraction` is given: published lists are complete.
"""

from losa_scenic.dataset_lib import listed_files, sources
from losa_scenic.dataset_lib.media import CLIPS


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
  """Reads the lists; of the clips only the presence of a few is checked.

  Args:
    root: the folder, or one list file in it; required.
    train_list: list of training clips, relative to the folder or absolute. Default: found by name,
      as are the others. A table that is the only list may have a column 'split'.
    val_list: list of validation clips. Where `train_list` is given, none is looked for: such a
      list may hold the validation clips.
    test_list: list of test clips.
    val_fraction: share of each class to validate with, if there is no list, see `splitting`.
    test_fraction: share of each class to test with, if there is no list.
    split_seed: another number splits differently.
    class_names: file with the class names, one a line; default `classes.txt` if there is one.

  Returns:
    Sources of video files and parts of them; nothing is opened.

  Raises:
    errors.UserError: naming the file and line that is wrong, or the list that is missing.
  """
  return listed_files.open_splits(
    CLIPS,
    'clip_list',
    root,
    {'train': train_list, 'val': val_list, 'test': test_list},
    val_fraction=val_fraction,
    test_fraction=test_fraction,
    split_seed=split_seed,
    class_names=class_names,
  )
