"""Image packs: made here, and the real ones where the shared data folder is present."""

import io
import os
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets, decode, image_pack
from losa_scenic.dataset_lib.sources import BadImage

SHARED = pathlib.Path(
  os.environ.get('LOSA_SHARED_DATA', pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)


def pack(count=12) -> dict[str, np.ndarray]:
  """Image i is of colour (i, 2i, 3i)."""
  encoded = []
  for i in range(count):
    buffer = io.BytesIO()
    Image.new('RGB', (5 + i, 9), (i, 2 * i, 3 * i)).save(buffer, 'PNG')
    encoded.append(np.frombuffer(buffer.getvalue(), np.uint8))
  return {
    'blob': np.concatenate(encoded),
    'offsets': np.cumsum([0] + [len(e) for e in encoded]),
    'label': np.arange(count).astype(np.int16) % 3,
    'split': (np.arange(count) % 4 % 3).astype(np.uint8),
    'classes': np.array(['a', 'b', 'c']),
    'meta': np.array('made by a test'),
  }


def save(tmp_path, **changes) -> str:
  arrays = {key: value for key, value in (pack() | changes).items() if value is not None}
  np.savez(tmp_path / 'pack.npz', **arrays)
  return str(tmp_path / 'pack.npz')


def test_reads_every_image_into_its_split(tmp_path):
  splits = image_pack.splits(root=save(tmp_path))
  assert splits.class_names == ('a', 'b', 'c')
  assert splits.about == (f'image pack {tmp_path}/pack.npz',)
  expected = {'train': [0, 3, 4, 7, 8, 11], 'valid': [1, 5, 9], 'test': [2, 6, 10]}
  for part, members in expected.items():
    source = getattr(splits, part)
    assert len(source) == len(members)
    for i, member in enumerate(members):
      image, label, name = source[i]
      assert name == f'{tmp_path}/pack.npz, image {member}' and label == member % 3
      assert name == source.id(i)
      decoded = decode.decode(image, name)
      assert decoded.shape == (9, 5 + member, 3)
      assert (decoded == (member, 2 * member, 3 * member)).all()


def test_a_pickled_part_holds_its_own_images_alone(tmp_path):
  path = save(tmp_path)
  splits = image_pack.splits(root=path)
  pathlib.Path(path).unlink()
  pickled = pickle.dumps(splits.valid)
  copy = pickle.loads(pickled)
  assert [copy[i] for i in range(3)] == [splits.valid[i] for i in range(3)]
  assert splits.valid[1].image in pickled and splits.train[1].image not in pickled


def test_without_validation(tmp_path):
  split = np.arange(12) % 2 * 2
  assert image_pack.splits(root=save(tmp_path, split=split)).valid is None


def test_an_image_that_is_none_is_bad_when_it_is_decoded(tmp_path):
  splits = image_pack.splits(root=save(tmp_path, blob=np.zeros_like(pack()['blob'])))
  record = splits.train[1]
  with pytest.raises(BadImage, match=r'pack\.npz, image 3: not a JPEG'):
    decode.decode(record.image, record.id)


def swapped_offsets() -> np.ndarray:
  offsets = pack()['offsets'].copy()
  offsets[[3, 4]] = offsets[[4, 3]]
  return offsets


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'label': None, 'split': None}, 'lacks label, split'),
    ({'label': np.full(12, 3)}, "image 0: 'label' is 3, outside 0..2"),
    ({'label': np.array([0] * 11 + [-1])}, "image 11: 'label' is -1"),
    ({'label': np.zeros(12)}, "'label' must be a list of integers, not float64"),
    ({'label': np.zeros((12, 1), int)}, r"'label' must be .* shape \(12, 1\)"),
    ({'split': np.array([0, 2] * 5 + [0, 7])}, "image 11: 'split' is 7, outside 0..2"),
    ({'split': np.zeros(11, int)}, "'split' has 11 entries"),
    ({'split': np.zeros(12, int)}, r'no image as test \(2\)'),
    ({'split': np.full(12, 2)}, r'no image as training \(0\)'),
    ({'offsets': pack()['offsets'][:-1]}, "'offsets' has 12 entries"),
    ({'offsets': pack()['offsets'] + 1}, "'offsets' must rise from 0"),
    ({'offsets': swapped_offsets()}, "'offsets' must rise from 0"),
    ({'offsets': swapped_offsets().astype(np.uint64)}, "'offsets' must rise from 0"),
    ({'blob': pack()['blob'][:-5]}, "'offsets' must rise from 0"),
    ({'blob': pack()['blob'].astype(np.uint16)}, "'blob' must be uint8"),
    ({'classes': np.array(['a', 'b', 'a'])}, "'classes' has the same name twice"),
    ({'classes': np.array(['a', 'b', 'c'], dtype=object)}, 'cannot be read as an image pack'),
  ],
)
def test_wrong_packs_are_errors_that_name_the_file(tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    image_pack.splits(root=save(tmp_path, **changes))
  assert 'pack.npz' in str(caught.value)


def test_wrong_files(tmp_path):
  with pytest.raises(errors.UserError, match=r'--config\.dataset_configs\.root=FILE'):
    image_pack.splits()
  with pytest.raises(errors.UserError, match=r'nowhere\.npz: there is no such file'):
    image_pack.splits(root=str(tmp_path / 'nowhere.npz'))
  whole = pathlib.Path(save(tmp_path)).read_bytes()
  array = io.BytesIO()
  np.save(array, np.zeros(3))
  middle = len(whole) // 2
  flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
  for body in (b'', b'hello', whole[:middle], array.getvalue(), flipped):
    (tmp_path / 'bad.npz').write_bytes(body)
    with pytest.raises(errors.UserError, match=r'bad\.npz'):
      image_pack.splits(root=str(tmp_path / 'bad.npz'))


@pytest.mark.parametrize(
  ('name', 'num_classes'),
  [('signdigits', 10), ('elpv_solar', 2), ('omniglot_strokes', 5), ('pneumoniamnist', 2)],
)
def test_real_packs(name, num_classes):
  path = SHARED / 'images' / f'{name}.npz'
  if not path.is_file():
    pytest.skip(f'no shared data: {path} is missing (set LOSA_SHARED_DATA)')
  dataset = datasets.build_dataset(
    'image_pack',
    batch_size=32,
    eval_batch_size=256,
    image_size=32,
    dataset_configs={'root': str(path), 'train_split': 'trainval'},
  )
  meta = dataset.meta_data
  assert meta['num_classes'] == num_classes and meta['num_train_examples'] == 1000
  batches = list(dataset_utils.iterate(dataset.test_ds))
  assert sum(batch['batch_mask'].sum() for batch in batches) == meta['num_test_examples']
  labels = np.concatenate([batch['label'][batch['batch_mask'] > 0] for batch in batches])
  assert set(labels) == set(range(num_classes))
  assert all(batch['inputs'].std() > 5 for batch in batches)
