"""Validation and test images for a set that lacks them, split off its training images.

A part takes the same share of every class. Which images it takes depends only on the seed, the part
and each image's class and name: neither the machine, nor the order, nor other images matter.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources

# Shares that are split off when neither the user nor the set says otherwise.
VAL_FRACTION = 0.1
TEST_FRACTION = 0.2


def complete(
  parts: Mapping[str, sources.Source],
  names: Sequence[str],
  labels: np.ndarray,
  class_names: Sequence[str],
  *,
  val_fraction: float | None,
  test_fraction: float | None,
  split_seed: int,
  where: str,
  noun: str = 'image',
) -> tuple[dict[str, sources.Source], tuple[str, ...]]:
  """Adds the parts that a set lacks, as subsets of its training part.

  Args:
    parts: the sources that there are: 'train' and perhaps 'val' and 'test', none of them empty.
    names: a name of each training image, unique within its class, that no other image changes.
    labels: integers [n] of the training images.
    class_names: of the labels.
    val_fraction: share in [0, 1) of each class to validate with; 0 for no validation part. Default
      0.1, but 0 if there is a test part: a published set without validation images is complete.
    test_fraction: share in (0, 1) of each class to test with. Default 0.2.
    split_seed: another number splits differently.
    where: names the set in messages.
    noun: what its examples are called there.

  Returns:
    The sources 'train', 'test' and, unless its share is 0, 'val'; and a line on each new one.

  Raises:
    errors.UserError: for a share out of range or of a part that exists, no test images, or classes
      with too few images to split.
  """
  given = {'test': test_fraction, 'val': val_fraction}
  default = {'test': TEST_FRACTION, 'val': 0.0 if 'test' in parts else VAL_FRACTION}
  left, counts = np.arange(len(names)), np.bincount(labels, minlength=len(class_names))
  result, about = dict(parts), []
  for part in ('test', 'val'):
    share = fraction(part, given[part], default[part], exists=part in parts, where=where, noun=noun)
    if not share:
      continue
    kept, taken = split_off(
      [names[int(i)] for i in left],
      labels[left],
      class_names,
      share,
      f'{split_seed}/{part}',
      counts,
      noun,
    )
    result[part] = sources.Subset(parts['train'], left[taken])
    about.append(
      f'{part}: {len(taken)} {noun}s split off train ({part}_fraction {share:g}, split_seed '
      f'{split_seed})'
    )
    left = left[kept]
  if 'test' not in result:
    raise errors.UserError(f'{where}: there are no test {noun}s: give a test_fraction above 0.')
  if len(left) < len(names):
    result['train'] = sources.Subset(parts['train'], left)
  return result, tuple(about)


def fraction(
  part: str,
  given: float | None,
  default: float,
  *,
  exists: bool,
  where: str,
  noun: str = 'image',
) -> float:
  """The share of the training images that becomes a part; 0 if the part exists.

  Args:
    part: 'val' or 'test'.
    given: the user's `<part>_fraction`.
    default: what None stands for.
    exists: whether the set has this part already.
    where: names the set in messages.
    noun: what its examples are called there.

  Raises:
    errors.UserError: for a share that is no number in [0, 1), or given for a part that exists.
  """
  if exists:
    if given is not None:
      raise errors.UserError(
        f'{where}: {part}_fraction is given, but the set has its own {part} {noun}s: leave it out.'
      )
    return 0.0
  value = default if given is None else given
  if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
    raise errors.UserError(f'{part}_fraction must be a number in [0, 1), not {value!r}.')
  return float(value)


def split_off(
  names: Sequence[str],
  labels: np.ndarray,
  class_names: Sequence[str],
  share: float,
  salt: str,
  counts: np.ndarray | None = None,
  noun: str = 'image',
) -> tuple[np.ndarray, np.ndarray]:
  """Takes the images of each class whose hash of 'salt/class name/name' is smallest.

  Args:
    names: n names, unique within a class.
    labels: integers [n].
    class_names: of the labels.
    share: in (0, 1). Of a class of c images max(1, round(share c)) are taken.
    salt: another text takes other images.
    counts: integers [classes], the c of each class; default: its number among `labels`.
    noun: what the examples are called in messages.

  Returns:
    Positions kept and positions taken, int64, both rising.

  Raises:
    errors.UserError: if a class has too few images to keep one, or a name twice.
  """
  labels = np.asarray(labels, np.int64)
  present = np.bincount(labels, minlength=len(class_names))
  counts = present if counts is None else counts
  wanted = np.maximum(1, np.rint(share * counts)).astype(np.int64)
  for label in np.flatnonzero((present > 0) & (wanted >= present)).tolist():
    raise errors.UserError(
      f"Class '{class_names[label]}': {counts[label]} {noun}s are too few: with a share of "
      f'{share:g}, {wanted[label]} would be split off and none of the {present[label]} be left to '
      f'train on. Add {noun}s (3 are the least), or give a smaller val_fraction (0 for none) or '
      'test_fraction.'
    )
  texts = (f'{salt}/{class_names[k]}/{name}' for k, name in zip(labels, names, strict=True))
  digests = _digests(texts, len(names))
  order = np.lexsort((digests, labels))
  ordered = labels[order]
  twice = (ordered[1:] == ordered[:-1]) & (digests[order][1:] == digests[order][:-1])
  if twice.any():
    name = names[int(order[np.argmax(twice)])]
    raise errors.UserError(f'{name}: listed twice, so that a split could put it on both sides.')
  rank = np.arange(len(names)) - np.searchsorted(ordered, ordered)
  is_taken = rank < wanted[ordered]
  return np.sort(order[~is_taken]), np.sort(order[is_taken])


def _digests(texts: Iterable[str], count: int) -> np.ndarray:
  hashes = (hashlib.sha256(text.encode('utf-8', 'surrogateescape')).digest() for text in texts)
  return np.fromiter(hashes, 'S32', count)
