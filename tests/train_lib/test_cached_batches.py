"""Rows in the place of images: the same slots, labels and masks, and nothing is done twice."""

import dataclasses

import numpy as np
import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import batches, resize, sources
from losa_scenic.dataset_lib.augment import Augment
from losa_scenic.dataset_lib.bad_files import BadFiles
from losa_scenic.dataset_lib.pipeline import Pipeline
from losa_scenic.train_lib.cached_batches import CachedBatches
from losa_scenic.train_lib.feature_layout import Layout, Leaf
from losa_scenic.train_lib.feature_store import Store

COUNT, SIDE, BATCH = 20, 6, 8
LAYOUT = Layout((Leaf('a', (SIDE * SIDE * 3,), 'float32'),), 'float32')


class Images:
  """Random images, of which some cannot be read."""

  def __init__(self, bad=()):
    rng = np.random.default_rng(0)
    self.images = rng.integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
    self.bad, self.read = set(bad), []

  def __len__(self):
    return COUNT

  def __getitem__(self, index):
    self.read.append(index)
    if index in self.bad:
      raise sources.BadImage(f'{index}.png', 'the file is empty')
    return sources.Record(self.images[index], index % 7, f'{index}.png')


@dataclasses.dataclass
class Setting:
  """Batches of images, and the same from a store."""

  source: Images
  plain: batches.Batches
  cached: CachedBatches
  encoded: list


def setting(folder, bad=(), split='train', views=None, seed=0, allowed=0.5, fails=None):
  source, encoded = Images(bad), []
  pipeline = Pipeline(
    batch_size=BATCH,
    eval_batch_size=BATCH,
    shuffle_seed=seed,
    dtype_str='uint8',
    view=resize.View(SIDE),
    augment=Augment(min_crop_area=0.3, flip=True) if views else Augment(),
    views=views,
    max_bad_fraction=allowed,
    cache_gigabytes=0.0,
  )

  def make(source):
    listed = BadFiles({split: COUNT}, allowed)
    if split == 'train':
      return batches.train_batches(source, pipeline, listed)
    return batches.eval_batches(source, pipeline, listed, split)

  def encode(images):
    encoded.append(len(images))
    if fails is not None and len(encoded) == fails:
      raise KeyboardInterrupt
    flat = images.reshape(len(images), -1).astype(np.float32)
    return np.pad(flat, ((0, 0), (0, LAYOUT.items - flat.shape[1])))

  many = views or 1
  store = Store(folder, {'views': views}, many * COUNT, LAYOUT.row_bytes)
  cached = CachedBatches(make(source), store, LAYOUT, encode, many)
  return Setting(source, make(Images(bad)), cached, encoded)


def same(batch, plain, shown=None):
  """Whether a batch of rows is that batch of images."""
  for name in ('label', 'batch_mask', 'index'):
    np.testing.assert_array_equal(batch[name], plain[name], name)
  rows = batch['inputs'][:, : SIDE * SIDE * 3]
  np.testing.assert_array_equal(rows.reshape(plain['inputs'].shape), plain['inputs'])
  assert batch['inputs'].ctypes.data % 64 == 0
  return True


def test_later_epochs_touch_no_image(tmp_path):
  s = setting(tmp_path)
  for number, batch in enumerate(s.cached.iterate(0, 12)):
    assert same(batch, s.plain[number])
  # Each image was decoded and encoded in the first epoch; its last batch has some of the second.
  assert s.encoded == [BATCH] * 3 and len(s.source.read) == 3 * BATCH
  again = setting(tmp_path)
  for number, batch in enumerate(again.cached.iterate(5, 9), start=5):
    assert same(batch, again.plain[number])
  assert again.encoded == [] and again.source.read == []
  assert same(again.cached[1], s.plain[1])


def test_another_order_finds_the_same_rows(tmp_path):
  list(setting(tmp_path).cached.iterate(0, 3))
  other = setting(tmp_path, seed=1)
  assert all(same(b, other.plain[i]) for i, b in enumerate(other.cached.iterate(0, 5)))
  assert other.source.read == []


def test_a_run_that_was_cut_short_goes_on_with_what_is_there(tmp_path):
  cut = setting(tmp_path, fails=2)
  with pytest.raises(KeyboardInterrupt):
    list(cut.cached.iterate(0, 3))
  assert cut.cached.store.have == BATCH
  # And with a batch of which some rows are there.
  later = setting(tmp_path)
  rows, batch = later.cached.images.positions(1)[0], later.plain[1]
  pixels = np.pad(
    batch['inputs'].reshape(BATCH, -1).astype(np.float32), ((0, 0), (0, LAYOUT.items - 108))
  )
  for slot in (2, 5):
    row = pixels[slot].view(np.uint8)
    later.cached.store.write(int(rows[slot]), row, int(batch['label'][slot]))
  assert all(same(b, later.plain[i]) for i, b in enumerate(later.cached.iterate(0, 6)))
  assert later.encoded == [BATCH] * 2


@pytest.mark.parametrize('split', ['train', 'valid'])
def test_unreadable_images(split, tmp_path):
  bad = (3, 4, 19)
  end = 9 if split == 'train' else 3
  for attempt in range(2):
    s = setting(tmp_path, bad, split)
    passes = 1 if split == 'train' else 2
    for _ in range(passes):
      for number, batch in enumerate(s.cached.iterate(0, end)):
        assert same(batch, s.plain[number])
    # They have no row, and are listed by each process that meets them.
    whole = s.cached.store.whole(np.arange(COUNT))
    assert np.flatnonzero(~whole).tolist() == sorted(bad)
    assert {p.index for p in s.cached.bad_files.problems.values()} == set(bad)
    # The second process had to look at them again, but had nothing to encode.
    assert len(s.encoded) == (3 if attempt == 0 else 0)
    assert len(s.source.read) <= 3 * BATCH + 3 * len(bad)


def test_too_many_unreadable_images_end_the_run(tmp_path):
  s = setting(tmp_path, (3, 4, 19), allowed=0.1)
  with pytest.raises(errors.UserError, match='at most 2 are allowed'):
    list(s.cached.iterate(0, 3))


def test_evaluation_fills_up_its_last_batch(tmp_path):
  s = setting(tmp_path, split='valid')
  assert len(s.cached) == 3
  for _ in range(2):
    assert all(same(b, s.plain[i]) for i, b in enumerate(s.cached.iterate(0, None)))
  assert s.encoded == [BATCH] * 3 and len(s.source.read) == COUNT
  last = s.cached[2]
  assert last['batch_mask'].tolist() == [1] * 4 + [0] * 4 and not last['inputs'][4:].any()
  # People are shown images, decoded for the occasion.
  slots = np.array([1, 3])
  np.testing.assert_array_equal(s.cached.pictures(last, slots), s.source.images[[17, 19]])
  assert len(s.source.read) == COUNT + 2


def test_views_take_turns_and_are_the_same_for_every_seed(tmp_path):
  s = setting(tmp_path, views=2)
  epochs = [list(s.cached.iterate(5 * k, 5 * k + 5)) for k in range(3)]  # Two epochs each.
  for k, epoch in enumerate(epochs):
    assert all(same(b, s.plain[5 * k + i]) for i, b in enumerate(epoch))

  def rows(epoch, half):
    index = np.concatenate([b['index'] for b in epoch])[half * COUNT :][:COUNT]
    values = np.concatenate([b['inputs'] for b in epoch])[half * COUNT :][:COUNT]
    return values[np.argsort(index)]

  assert (rows(epochs[0], 0) != rows(epochs[0], 1)).any(axis=1).mean() > 0.8
  for view in range(2):
    np.testing.assert_array_equal(rows(epochs[0], view), rows(epochs[2], view))
  assert s.cached.store.have == 2 * COUNT
  other = setting(tmp_path, views=2, seed=5)
  assert all(same(b, other.plain[i]) for i, b in enumerate(other.cached.iterate(0, 5)))
  assert other.source.read == []


def test_a_damaged_row_is_made_again(tmp_path, capsys):
  s = setting(tmp_path)
  list(s.cached.iterate(0, 3))
  path = s.cached.store.path / 'rows.bin'
  content = bytearray(path.read_bytes())
  content[7 * LAYOUT.row_bytes + 5] ^= 64
  path.write_bytes(content)
  later = setting(tmp_path)
  assert all(same(b, later.plain[i]) for i, b in enumerate(later.cached.iterate(0, 6)))
  assert later.encoded == [BATCH] and len(later.source.read) == BATCH
  assert capsys.readouterr().err.count('row 7 is damaged') == 1
