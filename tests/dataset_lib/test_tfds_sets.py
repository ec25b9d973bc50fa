"""Sets prepared by TFDS, as array_record and as TFRecord: small real ones, written by TFDS."""

import functools
import io
import json
import os
import pickle
import sys
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import sources, tfds_builders, tfds_records, tfds_sets, tfds_tfrecord

pytest.importorskip('tensorflow_datasets', reason='TFDS sets need tensorflow_datasets')

SIZES = {'train': 20, 'validation': 4, 'test': 6}


def png(value):
  stream = io.BytesIO()
  Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(stream, 'png')
  stream.seek(0)
  return stream


@functools.cache
def builder_class():
  tfds = tfds_builders.tfds_module()
  features = tfds.features

  class TinyShapes(tfds.core.GeneratorBasedBuilder):
    """Image i of a split is all i; its label is i % 3."""

    VERSION = tfds.core.Version('1.2.0')
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name='rgb'),)
    code_path = None  # There are no checksums beside it.

    def _info(self):
      kinds = {
        'image': features.Image(shape=(None, None, 3)),
        'pixels': features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
        'heights': features.Tensor(shape=(2, 2, 1), dtype=np.float32),
        'label': features.ClassLabel(names=['round', 'square', 'star']),
        'unlabelled': features.ClassLabel(names=['a', 'b']),
        'parts': features.Sequence({'at': features.Tensor(shape=(3,), dtype=np.float32)}),
      }
      info = tfds.core.DatasetInfo
      return info(builder=self, features=features.FeaturesDict(kinds), homepage='', citation='')

    def _split_generators(self, dl_manager):
      return {name: self._generate_examples(count) for name, count in SIZES.items()}

    def _generate_examples(self, count):
      for i in range(count):
        yield (
          i,
          {
            'image': png(i),
            'pixels': np.full((2, 2, 1), i, np.uint8),
            'heights': np.zeros((2, 2, 1), np.float32),
            'label': i % 3,
            'unlabelled': -1,
            'parts': [{'at': [0, 0, j]} for j in range(i % 3)],
          },
        )

  return TinyShapes


def prepare(folder, file_format):
  tfds = tfds_builders.tfds_module()
  tfds.disable_progress_bar()
  builder_class()(data_dir=folder).download_and_prepare(file_format=file_format)
  return str(folder)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return prepare(tmp_path_factory.mktemp('array_record'), 'array_record')


@pytest.fixture(scope='module')
def tfrecord_root(tmp_path_factory):
  pytest.importorskip('tensorflow', reason='TFRecord files are read with TensorFlow')
  return prepare(tmp_path_factory.mktemp('tfrecord'), 'tfrecord')


def pixels(record):
  assert isinstance(record.image, bytes)
  return np.asarray(Image.open(io.BytesIO(record.image)))


def value(record):
  """The i of image i."""
  image = pixels(record)
  assert image.shape == (3, 5, 3) and np.ptp(image) == 0
  return int(image.flat[0])


def test_a_prepared_set_by_name(root):
  found = tfds_sets.splits(name='tiny_shapes/rgb', root=root)
  assert [len(part) for part in (found.train, found.valid, found.test)] == [20, 4, 6]
  assert found.class_names == ('round', 'square', 'star')
  values = []
  for i in range(20):
    record = found.train[i]
    values.append(value(record))
    assert record.label == values[-1] % 3
    assert record.id == f'tiny_shapes/rgb/1.2.0/train[{i}]'
  assert sorted(values) == list(range(20))
  assert found.about[0].startswith('tiny_shapes/rgb/1.2.0, 3 classes, in ')
  assert found.about[1:] == (
    'train: 20 images, train',
    'valid: 4 images, validation',
    'test: 6 images, test',
  )


def test_reading_needs_no_tensorflow(root):
  if 'tensorflow' in sys.modules:
    pytest.skip('another test imported TensorFlow')
  assert value(tfds_sets.splits(name='tiny_shapes/rgb', root=root).test[0]) < 6
  assert 'tensorflow' not in sys.modules and os.environ['NO_GCE_CHECK']


@pytest.mark.parametrize('name', ['tiny_shapes/rgb:1.2.0', 'tiny_shapes/rgb/1.2.0', None])
def test_other_ways_to_name_a_set(root, name):
  given = {'name': name, 'root': root if name else f'{root}/tiny_shapes/rgb/1.2.0'}
  assert len(tfds_sets.splits(**given).train) == 20


def test_slices_and_sums_of_splits(root):
  whole = tfds_sets.splits(name='tiny_shapes/rgb', root=root)
  part = tfds_sets.splits(
    name='tiny_shapes/rgb', root=root, train='train[:50%]+validation', val='train[12:15]'
  )
  expected = [whole.train[i] for i in range(10)] + [whole.valid[i] for i in range(4)]
  assert [value(part.train[i]) for i in range(14)] == [value(record) for record in expected]
  assert [value(part.valid[i]) for i in range(3)] == [value(whole.train[i]) for i in (12, 13, 14)]
  assert [part.train[i].label for i in range(14)] == [record.label for record in expected]


def test_a_set_without_a_test_split_is_judged_by_its_validation_split(root, tmp_path):
  folder = tmp_path / '1.2.0'
  folder.mkdir()
  for file in os.listdir(f'{root}/tiny_shapes/rgb/1.2.0'):
    os.symlink(f'{root}/tiny_shapes/rgb/1.2.0/{file}', folder / file)
  info = json.loads((folder / 'dataset_info.json').read_text())
  (folder / 'dataset_info.json').unlink()

  def keep(*names):
    kept = [split for split in info['splits'] if split['name'] in names]
    (folder / 'dataset_info.json').write_text(json.dumps({**info, 'splits': kept}))

  keep('train', 'validation')
  found = tfds_sets.splits(root=str(folder))
  assert found.valid is None and len(found.test) == 4
  keep('train')
  with pytest.raises(errors.UserError, match=r'no test or validation split \(there: train\)'):
    tfds_sets.splits(root=str(folder))
  found = tfds_sets.splits(root=str(folder), train='train[:15]', test='train[15:]')
  assert found.valid is None and len(found.test) == 5


def test_images_stored_as_pixels(root):
  found = tfds_sets.splits(name='tiny_shapes/rgb', root=root, image_key='pixels')
  record = found.train[3]
  assert isinstance(record.image, np.ndarray)
  assert record.image.shape == (2, 2, 3) and record.image.dtype == np.uint8
  assert record.label == record.image[1, 1, 2] % 3


def derived(example):
  """The number of parts, which is the label of the image."""
  return len(example['parts']['at'])


def halved(image, id):
  return np.asarray(Image.open(io.BytesIO(image))) // 2


def test_labels_and_images_made_by_functions(root):
  fields = tfds_records.Fields(
    3, label=derived, label_features={'parts': {'at': True}}, image=halved
  )
  directory = tfds_builders.find('tiny_shapes/rgb', root)
  source = tfds_records.TfdsSource(directory, 'test', fields)
  plain = tfds_sets.splits(name='tiny_shapes/rgb', root=root).test
  for i in range(6):
    assert source[i].label == plain[i].label
    np.testing.assert_array_equal(source[i].image, pixels(plain[i]) // 2)


def test_a_source_pickles(root):
  source = tfds_sets.splits(name='tiny_shapes/rgb', root=root, train='train[5:]').train
  source[0]
  data = pickle.dumps(source)
  assert len(data) < 1000
  other = pickle.loads(data)
  assert len(other) == 15
  assert [other[i] for i in range(15)] == [source[i] for i in range(15)]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'train': 'trian'}, r"Unknown split of tiny_shapes/rgb/1.2.0 'trian'\. Did you mean 'train'"),
    ({'train': 'train[:30]'}, r"'train\[:30\]'.*There: train \(20\)"),
    ({'train': 'train[3'}, r'train\[3'),
    ({'train': 'train[4:4]'}, 'has no images'),
    ({'test': 'train[15:]'}, r"'train' and 'train\[15:\]' .* share 5 images"),
    ({'train': 'train[:80%]', 'val': 'train[75%:]'}, 'share 1 images'),
    ({'label_key': 'lable'}, "Did you mean 'label'"),
    ({'label_key': 'parts'}, 'no class label. Known: label, unlabelled'),
    ({'label_key': 'unlabelled'}, 'label -1 is outside 0..1.*no labels'),
    ({'image_key': 'pixel'}, "Did you mean 'pixels'"),
    ({'image_key': 'heights'}, 'is no image'),
    ({'name': 'tiny_shape/rgb'}, r"(?s)Did you mean 'tiny_shapes'.*download_and_prepare\(file_"),
    ({'name': 'tiny_shapes/rgb:2.0.0'}, r'There: version 1\.2\.0\.'),
    ({'name': 'tiny_shapes'}, r'There: tiny_shapes/rgb\.'),
    ({'name': 'tiny_shapes/rgb:new'}, 'is no name of a TFDS set'),
    ({'name': '../tiny_shapes'}, 'outside of'),
    ({'name': None}, r'Say which TFDS set.*There: tiny_shapes'),
    ({'root': '/nowhere'}, 'There is no such folder'),
  ],
)
def test_what_is_wrong_is_said_at_the_start(root, options, message):
  with pytest.raises(errors.UserError, match=message):
    tfds_sets.splits(**{'name': 'tiny_shapes/rgb', 'root': root, **options})


def test_the_prepare_line_is_a_command_for_this_set(root):
  with pytest.raises(errors.UserError) as raised:
    tfds_sets.splits(name='caltech101:3.0.2', root=root)
  line = (
    "python -c \"import tensorflow_datasets as tfds; tfds.builder('caltech101:3.0.2', "
    f"data_dir='{root}').download_and_prepare(file_format='array_record')\""
  )
  assert line in str(raised.value).splitlines()[1]


def test_root_and_name_must_agree(root):
  directory = f'{root}/tiny_shapes/rgb/1.2.0'
  assert len(tfds_sets.splits(name='tiny_shapes', root=directory).test) == 6
  with pytest.raises(errors.UserError, match="is a prepared set, but not 'caltech101'"):
    tfds_sets.splits(name='caltech101', root=directory)


@pytest.fixture
def copy(root, tmp_path):
  """A copy of the set, to be damaged."""
  for file in os.listdir(f'{root}/tiny_shapes/rgb/1.2.0'):
    with open(f'{root}/tiny_shapes/rgb/1.2.0/{file}', 'rb') as stream:
      (tmp_path / file).write_bytes(stream.read())
  return tmp_path


def test_a_missing_file_is_an_error_at_the_start(copy):
  (file,) = copy.glob('*test.array_record*')
  file.unlink()
  with pytest.raises(errors.UserError, match=r"array_record-.* 1 of the 1 files of split 'test'"):
    tfds_sets.splits(root=str(copy))


def test_a_damaged_record_is_a_bad_image(copy):
  (file,) = copy.glob('*train.array_record*')
  content = bytearray(file.read_bytes())
  content[1000:1008] = bytes(byte ^ 0xFF for byte in content[1000:1008])
  file.write_bytes(content)
  source = tfds_sets.splits(root=str(copy)).train
  bad = []
  for i in range(20):
    try:
      assert value(source[i]) % 3 == source[i].label
    except sources.BadImage as error:
      assert error.id == f'tiny_shapes/rgb/1.2.0/train[{i}]'
      assert error.reason.startswith('the record cannot be read (')
      bad.append(i)
  assert len(bad) == 1


def test_a_broken_description_is_an_error(copy):
  (copy / 'dataset_info.json').write_text('{"name": ')
  with pytest.raises(errors.UserError, match='TFDS cannot open it'):
    tfds_sets.splits(root=str(copy))


def test_tfrecord_files_are_for_the_other_data_set(copy):
  info = json.loads((copy / 'dataset_info.json').read_text())
  (copy / 'dataset_info.json').write_text(json.dumps({**info, 'fileFormat': 'tfrecord'}))
  with pytest.raises(errors.UserError) as raised:
    tfds_sets.splits(root=str(copy))
  message = str(raised.value)
  assert 'is prepared as tfrecord, not as array_record' in message
  assert 'dataset_name=tfds_tfrecord' in message
  assert "tfds.builder('tiny_shapes/rgb:1.2.0', data_dir='OTHER_FOLDER')" in message


def test_array_record_beside_tfrecord(copy):
  info = json.loads((copy / 'dataset_info.json').read_text())
  both = {'fileFormat': 'tfrecord', 'alternativeFileFormats': ['array_record']}
  (copy / 'dataset_info.json').write_text(json.dumps({**info, **both}))
  assert value(tfds_sets.splits(root=str(copy)).test[0]) in range(6)


def test_a_broken_description_with_a_name(copy):
  (copy / 'dataset_info.json').write_text('[]')
  with pytest.raises(errors.UserError, match=r'dataset_info\.json: not a description'):
    tfds_sets.splits(name='tiny_shapes/rgb', root=str(copy))


def test_threads_read_the_same(root):
  source = tfds_sets.splits(name='tiny_shapes/rgb', root=root).train
  alone = [source[i] for i in range(20)]
  source = pickle.loads(pickle.dumps(source))
  with futures.ThreadPoolExecutor(8) as threads:
    assert list(threads.map(source.__getitem__, list(range(20)) * 5)) == alone * 5


def test_without_the_extra_the_error_names_it(root, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow_datasets', None)
  with pytest.raises(errors.UserError, match=r'pip install losa_scenic\[tfds\]'):
    tfds_sets.splits(name='tiny_shapes/rgb', root=root)


def test_tfrecord_without_tensorflow(root, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorflow', None)
  directory = tfds_builders.find('tiny_shapes/rgb', root)
  with pytest.raises(errors.UserError, match=r'pip install losa_scenic\[tf\]'):
    tfds_tfrecord.read(directory, 'train', tfds_records.Fields(3))


def test_tfrecord_has_the_images_of_array_record_in_the_same_order(root, tfrecord_root):
  options = {'name': 'tiny_shapes/rgb', 'train': 'train[3:]+validation[:2]', 'val': 'train[:3]'}
  one = tfds_sets.splits(root=root, **options)
  other = tfds_tfrecord.splits(root=tfrecord_root, **options)
  assert other.class_names == one.class_names and other.about[1:] == one.about[1:]
  for left, right in ((one.train, other.train), (one.valid, other.valid), (one.test, other.test)):
    assert [left[i] for i in range(len(left))] == [right[i] for i in range(len(right))]
  assert len(pickle.loads(pickle.dumps(other.train))) == 19


def test_tfrecord_with_derived_labels_and_pixels(root, tfrecord_root):
  label = {'label': derived, 'label_features': {'parts': {'at': True}}}
  fields = tfds_records.Fields(3, image_key='pixels', **label)
  source = tfds_tfrecord.read(tfds_builders.find('tiny_shapes/rgb', tfrecord_root), 'test', fields)
  other = tfds_records.TfdsSource(tfds_builders.find('tiny_shapes/rgb', root), 'test', fields)
  assert [source[i].label for i in range(6)] == [other[i].label for i in range(6)]
  for i in range(6):
    np.testing.assert_array_equal(source[i].image, other[i].image)


def test_tfrecord_too_large_for_the_memory_is_refused(tfrecord_root):
  with pytest.raises(errors.UserError, match=r'at most 1e-07 are allowed.*max_gigabytes'):
    tfds_tfrecord.splits(name='tiny_shapes/rgb', root=tfrecord_root, max_gigabytes=1e-7)


def test_a_damaged_tfrecord_file_is_an_error(tfrecord_root, tmp_path):
  folder = f'{tfrecord_root}/tiny_shapes/rgb/1.2.0'
  for file in os.listdir(folder):
    with open(f'{folder}/{file}', 'rb') as stream:
      content = stream.read()
    (tmp_path / file).write_bytes(content[:-40] if 'train.tfrecord' in file else content)
  with pytest.raises(errors.UserError, match=r'reading ends at image 19 of 20'):
    tfds_tfrecord.splits(root=str(tmp_path))


def test_array_record_files_are_not_for_tfrecord(root):
  pytest.importorskip('tensorflow', reason='TFRecord files are read with TensorFlow')
  with pytest.raises(errors.UserError, match='dataset_name=tfds, or prepare'):
    tfds_tfrecord.splits(name='tiny_shapes/rgb', root=root)
