"""VTAB-1K from TFDS: the real features and split sizes of each set, with made-up examples."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from reference.vtab_splits import SPLIT_SIZES

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import decode, tfds_builders, vtab, vtab_tasks

pytest.importorskip('tensorflow_datasets', reason='the TFDS path needs tensorflow_datasets')

TASKS = tuple(vtab_tasks.TASKS)


@pytest.fixture(scope='module')
def tfds():
  return tfds_builders.tfds_module()


def describe(tfds, data_folder, task, version, file_format='array_record'):
  """Writes what TFDS keeps of a prepared set, and empty files in place of its images."""
  base, _, variant = task.builder.partition('/')
  folder = data_folder / task.builder / version
  folder.mkdir(parents=True)
  tfds.builder(task.builder, data_dir=data_folder / 'none').info.features.save_config(folder)
  template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  splits = [
    {'name': name, 'shardLengths': [str(count)], 'numBytes': '1', 'filepathTemplate': template}
    for name, count in SPLIT_SIZES[task.builder].items()
  ]
  info = {'name': base, 'version': version, 'fileFormat': file_format, 'splits': splits}
  if variant:
    info['configName'] = variant
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  for name in SPLIT_SIZES[task.builder]:
    (folder / f'{base}-{name}.{file_format}-00000-of-00001').touch()
  return folder


def encoded(pixels):
  stream = io.BytesIO()
  Image.fromarray(pixels).save(stream, 'png')
  return stream.getvalue()


@pytest.fixture(scope='module')
def data_folder(tfds, tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  for task in {task.builder: task for task in vtab_tasks.TASKS.values()}.values():
    describe(tfds, folder, task, task.version)
  return folder


class MadeUp:
  """Examples of a split in place of its files."""

  def __init__(self, builder, split, deserialize_method=None):
    assert deserialize_method is None or deserialize_method.value == 'raw_bytes'
    self.features, self.kinds = builder.info.features, tfds_builders.tfds_module().features
    self.is_sprites = builder.name == 'dsprites'
    self.count = builder.info.splits[split].num_examples

  def __len__(self):
    return self.count

  def __getitem__(self, i):
    return self.features.serialize_example(self.value(self.features, i))

  def value(self, feature, i):
    kinds = self.kinds
    if isinstance(feature, kinds.FeaturesDict):
      return {key: self.value(part, i) for key, part in feature.items()}
    if isinstance(feature, kinds.Sequence):
      return [self.value(feature.feature, i + j) for j in range(3 + i % 8)]
    if isinstance(feature, kinds.Image):
      channels = feature.shape[-1]
      pixels = np.full((4, 6, channels), i % 2 if self.is_sprites else (100 + i) % 256, np.uint8)
      return io.BytesIO(encoded(pixels[..., 0] if channels == 1 else pixels))
    if isinstance(feature, kinds.ClassLabel):
      return i % feature.num_classes
    if isinstance(feature, kinds.BBoxFeature):
      return kinds.BBox(0.0, 0.0, 1.0, 1.0)
    if isinstance(feature, kinds.Text):
      return f'{i}.jpg'
    return np.full(feature.shape, 7 + i / 2, feature.np_dtype)


@pytest.fixture
def made_up(tfds, monkeypatch):
  monkeypatch.setattr(
    tfds.core.DatasetBuilder,
    'as_data_source',
    lambda self, split, *, deserialize_method: MadeUp(self, split, deserialize_method),
  )


@pytest.mark.parametrize('name', TASKS)
def test_every_task_from_tfds(data_folder, made_up, name):
  task = vtab_tasks.TASKS[name]
  found = vtab.splits(task=name, root=str(data_folder), data_path='tfds')
  assert len(found.train) == 800 and len(found.valid) == 200 and len(found.test) == task.num_test
  assert len(found.class_names) == task.num_classes
  assert f'test: {task.num_test:,} images, {task.test}' in found.about
  for part in (found.train, found.valid, found.test):
    records = [part[i] for i in (0, 1, 5)]
    assert all(0 <= record.label < task.num_classes for record in records)
    for record in records:
      image = record.image
      if isinstance(image, bytes):
        image = decode.decode(image, record.id)
      assert image.shape == (4, 6, 3) and image.dtype == np.uint8
  # Image 5 has 8 objects, the nearest at 9.5; its nearest vehicle is at 11 m.
  expected = {'clevr_count': 5, 'clevr_dist': 3, 'kitti': 1, 'dsprites_loc': 2, 'dsprites_ori': 2}
  assert found.train[5].label == expected.get(name, 5 % task.num_classes)
  if name.startswith('dsprites'):
    assert [int(found.train[i].image[0, 0, 2]) for i in range(4)] == [0, 255, 0, 255]


def test_sources_of_derived_tasks_pickle(data_folder, made_up):
  for name in ('kitti', 'clevr_dist', 'dsprites_ori'):
    source = vtab.splits(task=name, root=str(data_folder), data_path='tfds').test
    other = pickle.loads(pickle.dumps(source))
    assert len(other) == len(source) and other[3].label == source[3].label


def test_a_set_that_is_not_prepared(tfds, tmp_path):
  with pytest.raises(errors.UserError) as raised:
    vtab.splits(task='resisc45', root=str(tmp_path), data_path='tfds')
  assert "tfds.builder('resisc45:3.0.0', data_dir=" in str(raised.value)


def test_the_version_nearest_to_the_benchmark_is_read(tfds, made_up, tmp_path):
  pets = vtab_tasks.TASKS['oxford_iiit_pet']
  describe(tfds, tmp_path, pets, '4.0.0')
  found = vtab.splits(task='pets', root=str(tmp_path), data_path='tfds')
  assert 'oxford_iiit_pet/4.0.0' in found.about[0]
  assert found.about[-1] == (
    'published results have oxford_iiit_pet 3.2.0, which TFDS no longer prepares: the 1,000 '
    'training images of 4.0.0 may be others'
  )
  describe(tfds, tmp_path, pets, '3.2.0')
  found = vtab.splits(task='pets', root=str(tmp_path), data_path='tfds')
  assert 'oxford_iiit_pet/3.2.0' in found.about[0] and 'published' not in found.about[-1]
  svhn = vtab_tasks.TASKS['svhn']
  for version in ('4.0.0', '3.0.0'):
    folder = describe(tfds, tmp_path, svhn, version)
  found = vtab.splits(task='svhn', root=str(tmp_path), data_path='tfds')
  assert 'svhn_cropped/3.0.0' in found.about[0]
  assert len(vtab.splits(task='svhn', root=str(folder), data_path='tfds').train) == 800
  with pytest.raises(errors.UserError, match="is a prepared set, but not 'cifar100'"):
    vtab.splits(task='cifar100', root=str(folder), data_path='tfds')


@pytest.mark.parametrize(
  ('name', 'prepared', 'read', 'said'),
  [
    ('kitti', ('3.1.0', '3.2.0', '3.3.0'), '3.2.0', None),
    ('kitti', ('3.1.0', '3.3.0'), '3.1.0', None),
    ('kitti', ('3.3.0',), '3.3.0', 'have kitti 3.2.0 or 3.1.0: the 1,000'),
    ('svhn', ('3.1.0',), '3.1.0', 'have svhn_cropped 3.0.0, which TFDS no longer prepares: '),
    ('svhn', ('3.0.0', '3.1.0'), '3.0.0', None),
    ('caltech101', ('3.0.2',), '3.0.2', 'have caltech101 3.0.1, which TFDS no longer prepares: '),
    ('dtd', ('3.0.1', '3.1.0'), '3.0.1', None),
    ('dtd', ('3.0.0', '3.1.0'), '3.1.0', 'have dtd 3.0.1: the 1,000'),
  ],
)
def test_versions_of_published_results_go_first(
  tfds, made_up, tmp_path, name, prepared, read, said
):
  for version in prepared:
    folder = describe(tfds, tmp_path, vtab_tasks.TASKS[name], version)
  for root in (tmp_path, *([folder] if prepared == (read,) else [])):
    found = vtab.splits(task=name, root=str(root), data_path='tfds')
    assert f'/{read} in ' in found.about[0]
    notes = [line for line in found.about if 'published results' in line]
    assert len(notes) == (said is not None)
    assert said is None or (said in notes[0] and notes[0].endswith(f'of {read} may be others'))


@pytest.mark.parametrize('name', TASKS)
def test_the_version_to_prepare_is_one_that_tfds_has(tfds, tmp_path, name):
  task = vtab_tasks.TASKS[name]
  builder = tfds.builder(f'{task.builder}:{task.version}', data_dir=tmp_path)
  assert str(builder.version) == task.version
  if task.version not in task.benchmark_versions:
    for version in task.benchmark_versions:
      with pytest.raises(AssertionError, match='cannot be loaded at version'):
        tfds.builder(f'{task.builder}:{version}', data_dir=tmp_path)


def test_what_is_to_be_prepared_anew_is_a_version_that_tfds_has(tfds, tmp_path):
  describe(tfds, tmp_path, vtab_tasks.TASKS['oxford_iiit_pet'], '3.2.0', 'tfrecord')
  with pytest.raises(errors.UserError, match=r"tfds\.builder\('oxford_iiit_pet:4\.0\.0'"):
    vtab.splits(task='pets', root=str(tmp_path), data_path='tfds')
  with pytest.raises(errors.UserError, match=r"tfds\.builder\('kitti:3\.2\.0'"):
    vtab.splits(task='kitti', root=str(tmp_path), data_path='tfds')


def test_a_set_of_another_size_is_an_error(tfds, made_up, tmp_path):
  folder = describe(tfds, tmp_path, vtab_tasks.TASKS['kitti'], '3.3.0')
  info = (folder / 'dataset_info.json').read_text()
  (folder / 'dataset_info.json').write_text(info.replace('"711"', '"700"'))
  with pytest.raises(errors.UserError, match=r'the test split has 700 images, but .* has 711'):
    vtab.splits(task='kitti', root=str(tmp_path), data_path='tfds')


def test_a_task_from_tfrecord_files(tfds, tmp_path):
  tf = pytest.importorskip('tensorflow', reason='TFRecord files are read with TensorFlow')
  task = vtab_tasks.TASKS['kitti']
  folder = describe(tfds, tmp_path, task, '3.2.0', 'tfrecord')
  builder = tfds_builders.open_builder(folder, 'tfrecord')
  for split, count in (('train', 800), ('validation', 200), ('test', 711)):
    examples = MadeUp(builder, split)
    with tf.io.TFRecordWriter(str(folder / f'kitti-{split}.tfrecord-00000-of-00001')) as writer:
      for i in range(count):
        writer.write(examples[i])
  options = {'task': 'kitti', 'root': str(tmp_path)}
  found = vtab.splits(data_path='tfds_tfrecord', **options)
  assert [len(part) for part in (found.train, found.valid, found.test)] == [800, 200, 711]
  assert found.train[5].label == 1 and found.train[5].id == 'kitti/3.2.0/train[:800][5]'
  assert decode.decode(found.test[710].image, 'x')[0, 0, 0] == (100 + 710) % 256
  with pytest.raises(errors.UserError, match='data_path=tfds_tfrecord, or prepare'):
    vtab.splits(data_path='tfds', **options)
