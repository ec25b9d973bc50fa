"""Something-Something v2: its annotations, where they lie, and missing clips."""

import json
import pathlib

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import datasets, something_v2
from losa_scenic.dataset_lib.frame_sampling import WHOLE

# As published: the classes by number, in the text of each the brackets are gone.
LABELS = {'Putting something on a surface': '1', 'Holding something next to something': '0'}
TRAIN = [
  ('78687', 'Holding [something] next to [something]'),
  ('42326', 'Putting [something] on a surface'),
  ('100904', 'Putting [something] on a surface'),
]
VALIDATION = [('74225', 'Holding [something] next to [something]')]


def entries(clips) -> list[dict]:
  return [
    {'id': name, 'label': 'holding a cup', 'template': template, 'placeholders': ['a cup']}
    for name, template in clips
  ]


def write(folder: pathlib.Path, prefix: str = '', **changed) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  content = {'labels': LABELS, 'train': entries(TRAIN), 'validation': entries(VALIDATION)}
  for name, value in (content | {'test': [{'id': '1420'}]} | changed).items():
    (folder / f'{prefix}{name}.json').write_text(json.dumps(value))
  (folder / 'test-answers.csv').write_text('1420;Putting something on a surface\n')


def touch(folder: pathlib.Path, names) -> None:
  """Nothing opens these: they may be empty."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in names:
    (folder / name).touch()


CLIPS = ['78687.webm', '42326.webm', '100904.mp4', '74225.webm', '1420.webm']


def load(root, **options):
  return something_v2.splits(root=str(root), **options)


@pytest.mark.parametrize(
  ('annotations', 'prefix', 'videos', 'options'),
  [
    ('.', '', '.', {}),
    ('.', something_v2.PREFIX, '.', {}),
    ('labels', '', '20bn-something-something-v2', {}),
    ('annotations', something_v2.PREFIX, 'videos', {'videos': 'videos'}),
    ('json/v2', '', 'a/b/c', {'annotations': 'json/v2', 'videos': 'a/b/c'}),
  ],
)
def test_layouts(tmp_path, annotations, prefix, videos, options):
  write(tmp_path / annotations, prefix)
  touch(tmp_path / videos, CLIPS)
  splits = load(tmp_path, **options)
  assert splits.clips and splits.valid is None
  assert splits.class_names == (
    'Holding something next to something',
    'Putting something on a surface',
  )
  train = [splits.train[i] for i in range(3)]
  assert [pathlib.Path(record.id).name for record in train] == CLIPS[:3]
  assert [record.label for record in train] == [0, 1, 1]
  assert pathlib.Path(train[0].image.path) == tmp_path / videos / '78687.webm'
  assert train[0].image.segment == WHOLE and train[0].image.path == train[0].id
  assert len(splits.test) == 1 and splits.test[0].id.endswith('74225.webm')
  assert splits.about[-1].startswith('test: the published validation clips')


def test_detected_and_split(tmp_path):
  clips = [(str(i), TRAIN[i % 2][1]) for i in range(20)]
  write(tmp_path, train=entries(clips))
  touch(tmp_path / 'v', [*(f'{i}.webm' for i in range(20)), '74225.webm'])
  options = {'root': str(tmp_path), 'val_fraction': 0.2}
  name, splits = datasets.open_splits('auto', 32, options)
  assert name == 'something_v2'
  assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [16, 4, 1]
  labels = [splits.valid[i].label for i in range(4)]
  assert sorted(labels) == [0, 0, 1, 1]


def test_missing_clips(tmp_path):
  write(tmp_path, train=entries([(str(i), TRAIN[0][1]) for i in range(10)]))
  touch(tmp_path, [*(f'{i}.webm' for i in range(8)), '74225.webm'])
  splits = load(tmp_path)
  assert len(splits.train) == 8
  assert splits.about[0].endswith('2 classes, 1 of them without a training clip')
  assert splits.about[1].endswith('; 2 (20.0%) are missing: 8, 9')
  with pytest.raises(errors.UserError, match=r'2 of its 10 clips .*: 8, 9\. .*fraction than 0\.1'):
    load(tmp_path, max_missing_fraction=0.1)
  touch(tmp_path / 'other', ['3.mp4'])
  with pytest.raises(errors.UserError, match=r"clip '3' is there twice, as 3\.webm and as other/3"):
    load(tmp_path)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'train': entries([('1', 'Holding [smoething]')])}, r"template of clip 1 .*'Holding smoeth"),
    ({'train': entries([TRAIN[0], TRAIN[0]])}, r'train\.json: clip 78687 is listed twice'),
    ({'validation': [{'id': '1'}]}, r"validation\.json: entry 1, \{'id': '1'\}: .* a template"),
    ({'validation': [3]}, r'validation\.json: entry 1, 3: '),
    ({'validation': {'clips': entries(VALIDATION)}}, r'must be a list of clips'),
    ({'train': []}, r'train\.json: it lists no clips'),
    (
      {'labels': {'a': '1', 'b': '2'}},
      r'labels\.json: the numbers of its 2 classes must be 0\.\.1',
    ),
    ({'labels': {'a': '0', 'b': '0'}}, r'labels\.json: the numbers'),
    ({'labels': ['a', 'b']}, r'labels\.json: it must map'),
    ({'labels': {'a': 'b'}}, r'labels\.json: it must map'),
  ],
)
def test_wrong_annotations(tmp_path, changed, message):
  write(tmp_path, **changed)
  touch(tmp_path, CLIPS)
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path)


def test_other_mistakes(tmp_path):
  with pytest.raises(errors.UserError, match=r'not all of labels\.json, train\.json, validation'):
    load(tmp_path)
  write(tmp_path / 'labels')
  (tmp_path / 'labels' / 'labels.json').write_text('{')
  with pytest.raises(errors.UserError, match=r'labels\.json: cannot be read as JSON'):
    load(tmp_path)
  with pytest.raises(errors.UserError, match=r"folder \(annotations\) in .*'lables'.*'labels'"):
    load(tmp_path, annotations='lables')
