"""Two sources have one fingerprint as far as they hold the same images in the same order."""

import pathlib

import numpy as np
import pytest

from losa_scenic.dataset_lib import clip_files, sources
from losa_scenic.dataset_lib.fingerprint import fingerprint
from losa_scenic.dataset_lib.frame_sampling import Segment

NAMES = tuple(f'{i}.png' for i in range(8))
LABELS = (0, 1, 2, 0, 1, 2, 0, 1)


def files(root: pathlib.Path, names=NAMES, labels=LABELS) -> sources.FileSource:
  root.mkdir(exist_ok=True)
  for name in names:
    if not (root / name).exists():
      (root / name).write_bytes(name.encode())
  return sources.FileSource(root, names, labels, num_classes=3)


def array(labels=LABELS, colour=5) -> sources.ArraySource:
  images = np.zeros((len(labels), 4, 6, 3), np.uint8)
  images[len(labels) // 2] = colour
  return sources.ArraySource(images, labels, 'set', num_classes=3)


def test_a_folder_may_move(tmp_path):
  before = fingerprint(files(tmp_path / 'a'))
  assert len(bytes.fromhex(before)) == 16
  (tmp_path / 'a').rename(tmp_path / 'b')
  assert fingerprint(files(tmp_path / 'b')) == before


def test_every_change_is_noticed(tmp_path):
  root = tmp_path / 'a'
  swapped = (*NAMES[:5], NAMES[6], NAMES[5], NAMES[7])
  changed = {
    'nothing': files(root),
    'a name': files(root, (*NAMES[:5], 'other.png', *NAMES[6:])),
    'where a name ends': files(root, ('0.pn', 'g1.png', *NAMES[2:])),
    'a label': files(root, labels=(*LABELS[:6], 2, 1)),
    'one more': files(root, (*NAMES, '8.png'), (*LABELS, 0)),
    'one less': files(root, NAMES[:-1], LABELS[:-1]),
    'two swapped': files(root, swapped, (*LABELS[:5], 0, 2, 1)),
    'none': files(root, (), ()),
    'a subset': sources.Subset(files(root), range(8)),
    'another subset': sources.Subset(files(root), [0, 2, 1, *range(3, 8)]),
    'a joint set': sources.Concat([files(root)]),
    'a joint set of two': sources.Concat([files(root), files(root, (), ())]),
    'parts': sources.Concat(
      [files(root, NAMES[:3], LABELS[:3]), files(root, NAMES[3:], LABELS[3:])]
    ),
    'pixels': array(),
    'other pixels': array(colour=6),
    'a label of pixels': array((*LABELS[:6], 2, 1)),
  }
  found = {what: fingerprint(source) for what, source in changed.items()}
  assert len(set(found.values())) == len(found)
  # And the same again.
  assert found == {what: fingerprint(source) for what, source in changed.items()}


@pytest.mark.parametrize('index', [0, 4, 7])
def test_the_content_of_three_images_counts(tmp_path, index):
  source = files(tmp_path / 'a')
  joint = sources.Concat([source, sources.Subset(source, [1])])
  found = {fingerprint(source), fingerprint(joint)}
  path = source.root / NAMES[index]
  path.write_bytes(b'other')
  found |= {fingerprint(source), fingerprint(joint)}
  path.unlink()
  found |= {fingerprint(source), fingerprint(joint)}
  assert len(found) == 6
  # A bad image is told by its reason, which does not say where it lies.
  source.root.rename(tmp_path / 'b')
  moved = sources.FileSource(tmp_path / 'b', NAMES, LABELS, num_classes=3)
  assert fingerprint(moved) in found


def test_names_and_labels_are_read_and_images_almost_not():
  read = []

  class Counting(sources.ArraySource):
    def __getitem__(self, index):
      read.append(index)
      return super().__getitem__(index)

  labels = np.zeros(1000, int)
  source = Counting(np.zeros((1000, 1, 1, 3), np.uint8), labels, 'set', num_classes=2)
  halves = [sources.Subset(source, range(500)), sources.Subset(source, range(500, 1000))]
  fingerprint(sources.Concat(halves))
  # Three of the whole, of each half and of both together; the whole is asked once.
  assert len(read) == 12 and set(read) == {0, 250, 499, 500, 750, 999}


def clips(root: pathlib.Path, segments=None) -> clip_files.ClipFiles:
  plain = files(root)
  return clip_files.ClipFiles(root, NAMES, plain.labels, num_classes=3, segments=segments)


def test_a_folder_of_clips_may_move(tmp_path):
  segments = [Segment(i, None if i % 2 else i + 2.5) for i in range(8)]
  before = [fingerprint(clips(tmp_path / 'a', parts)) for parts in (None, segments)]
  (tmp_path / 'a').rename(tmp_path / 'b')
  assert [fingerprint(clips(tmp_path / 'b', parts)) for parts in (None, segments)] == before


def test_every_change_of_clips_is_noticed(tmp_path):
  root = tmp_path / 'a'
  whole = [Segment()] * 8
  changed = [
    files(root),
    clips(root),
    clips(root, whole),
    # Neither is one of the three whose content is read.
    clips(root, [*whole[:5], Segment(1.0), *whole[6:]]),
    clips(root, [*whole[:5], Segment(0.0, 1.0), *whole[6:]]),
    sources.Subset(clips(root, [*whole[:7], Segment(0.5)]), [7]),
    sources.Subset(clips(root), [7]),
  ]
  assert len({fingerprint(source) for source in changed}) == len(changed)


@pytest.mark.parametrize('index', [0, 4, 7])
def test_of_three_clips_the_size_and_the_ends_count(tmp_path, index):
  source = clips(tmp_path / 'a')
  path, content = source.root / NAMES[index], bytes(200_000)
  found = []
  for place in (None, 0, 65_535, 100_000, 200_000 - 65_536, 199_999):
    changed = bytearray(content)
    if place is not None:
      changed[place] = 1
    path.write_bytes(changed)
    found.append(fingerprint(source))
  # What lies between is not read.
  assert found.pop(3) == found[0]
  path.write_bytes(bytes(200_001))
  found.append(fingerprint(source))
  path.unlink()
  found.append(fingerprint(source))
  assert len(set(found)) == len(found) == 7


class OneClip:
  """One record."""

  def __init__(self, image) -> None:
    self.image = image

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return sources.Record(self.image, 0, 'clip')


def test_clips_of_frames_and_of_pixels():
  pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
  images = [
    [b'ab', b'c'],
    [b'a', b'bc'],
    [b'abc'],
    b'abc',
    [],
    [b'c', b'ab'],
    pixels,
    pixels[::-1],
    pixels.reshape(2, 4, 3, 3),
  ]
  found = [fingerprint(OneClip(image)) for image in images]
  assert len(set(found)) == len(images)
  assert fingerprint(OneClip([b'ab', b'c'])) == found[0]
  assert fingerprint(OneClip(np.flip(pixels, 0).copy())) == found[7]
