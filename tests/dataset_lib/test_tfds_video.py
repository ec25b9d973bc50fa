"""Sets of clips prepared by TFDS: a sequence of encoded images, as its `Video` is, or pixels."""

import functools
import importlib.util
import io
import json
import pathlib
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import frame_images, tfds_builders, tfds_sets, tfds_tfrecord

pytest.importorskip('tensorflow_datasets', reason='TFDS sets need tensorflow_datasets')

SIZES = {'train': 6, 'test': 3}
FEATURES = 'tensorflow_datasets.core.features'


def png(value):
  stream = io.BytesIO()
  Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(stream, 'png')
  stream.seek(0)
  return stream


@functools.cache
def builder_class():
  tfds = tfds_builders.tfds_module()
  features = tfds.features

  class TinyClips(tfds.core.GeneratorBasedBuilder):
    """Clip i of a split has i + 1 frames, the j-th all 10 i + j; its label is i % 2."""

    VERSION = tfds.core.Version('1.0.0')
    code_path = None  # There are no checksums beside it.

    def _info(self):
      kinds = {
        'video': features.Sequence(features.Image(shape=(None, None, 3))),
        'pixels': features.Tensor(shape=(4, 2, 2, 1), dtype=np.uint8),
        'flow': features.Sequence(features.Tensor(shape=(2,), dtype=np.float32)),
        'label': features.ClassLabel(names=['run', 'jump']),
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
            'video': [png(10 * i + j) for j in range(i + 1)],
            'pixels': 10 * i + np.repeat(np.arange(4, dtype=np.uint8), 4).reshape(4, 2, 2, 1),
            'flow': [[0, 0]],
            'label': i % 2,
          },
        )

  return TinyClips


def prepare(folder, file_format):
  """A set as TFDS writes it, whose description calls the clips `Video`."""
  tfds = tfds_builders.tfds_module()
  tfds.disable_progress_bar()
  builder_class()(data_dir=folder).download_and_prepare(file_format=file_format)
  (path,) = pathlib.Path(folder).glob('*/*/features.json')
  description = json.loads(path.read_text())
  described = description['featuresDict']['features']['video']
  assert described['pythonClassName'] == f'{FEATURES}.sequence_feature.Sequence'
  shape = {'dimensions': ['-1', '-1', '-1', '3']}
  video = {'dtype': 'uint8', 'encodingFormat': 'png', 'shape': shape}
  name = f'{FEATURES}.video_feature.Video'
  description['featuresDict']['features']['video'] = {'pythonClassName': name, 'video': video}
  path.write_text(json.dumps(description))
  return str(folder)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  return prepare(tmp_path_factory.mktemp('array_record'), 'array_record')


def frames(record):
  """The values of the frames of a clip."""
  assert isinstance(record.image, list) and isinstance(record.image[0], bytes)
  pixels = frame_images.decode_frames(record.image, range(len(record.image)), record.id)
  assert pixels.shape[1:] == (3, 5, 3) and not np.ptp(pixels, axis=(1, 2, 3)).any()
  return pixels[:, 0, 0, 0].tolist()


def test_clips_are_lists_of_encoded_frames(root):
  found = tfds_sets.splits(name='tiny_clips', root=root)
  assert found.clips and found.class_names == ('run', 'jump')
  assert found.about[1:] == ('train: 6 clips, train', 'test: 3 clips, test')
  seen = []
  for i in range(6):
    record = found.train[i]
    values = frames(record)
    number = len(values) - 1
    seen.append(number)
    assert values == [10 * number + j for j in range(number + 1)]
    assert record.label == number % 2
    assert record.id == f'tiny_clips/1.0.0/train[{i}]'
  assert sorted(seen) == list(range(6))
  again = pickle.loads(pickle.dumps(found.train))
  assert [again[i] for i in range(6)] == [found.train[i] for i in range(6)]


def test_a_video_is_read_without_tensorflow(root):
  if importlib.util.find_spec('tensorflow'):
    pytest.skip('TFDS imports TensorFlow for a Video where it is installed')
  assert len(frames(tfds_sets.splits(name='tiny_clips', root=root).test[0])) <= 3
  assert 'tensorflow' not in sys.modules


def test_clips_stored_as_pixels(root):
  found = tfds_sets.splits(name='tiny_clips', root=root, image_key='pixels')
  assert found.clips
  for i in range(6):
    image = found.train[i].image
    assert image.shape == (4, 2, 2, 3) and image.dtype == np.uint8
    start = image[0, 0, 0, 0]
    assert (image == start + np.arange(4)[:, None, None, None]).all()
    assert found.train[i].label == start // 10 % 2


def test_what_is_no_clip(root):
  with pytest.raises(errors.UserError, match=r"'flow' of tiny_clips/1.0.0 is no image.*or a clip"):
    tfds_sets.splits(name='tiny_clips', root=root, image_key='flow')
  with pytest.raises(errors.UserError, match=r"Unknown feature of tiny_clips/1.0.0 'image'"):
    tfds_sets.splits(name='tiny_clips', root=root, image_key='image')


def test_tfrecord_has_the_same_clips(root, tmp_path):
  pytest.importorskip('tensorflow', reason='TFRecord files are read with TensorFlow')
  options = {'name': 'tiny_clips', 'train': 'train[2:]'}
  one = tfds_sets.splits(root=root, **options)
  other = tfds_tfrecord.splits(root=prepare(tmp_path, 'tfrecord'), **options)
  assert other.clips and other.about[1:] == one.about[1:]
  for left, right in ((one.train, other.train), (one.test, other.test)):
    assert [left[i] for i in range(len(left))] == [right[i] for i in range(len(right))]
  with pytest.raises(errors.UserError, match=r'at most 1e-07 are allowed'):
    tfds_tfrecord.splits(root=str(tmp_path), name='tiny_clips', max_gigabytes=1e-7)
