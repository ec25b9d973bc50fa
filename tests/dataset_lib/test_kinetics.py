"""Kinetics: its tables, the names of its clips, and the many that are gone."""

import os
import pathlib

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import datasets, kinetics
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

HEADER = 'label,youtube_id,time_start,time_end,split'
TRAIN = [
  'air drumming,-_AbCdEfGhI,10,20,train',
  'abseiling,b_12_3456789,0,10,train',
  '"cooking (spicy), hot",ccccccccccc,5.0,15.0,train',
  'abseiling,ddddddddddd,7,17,train',
]
VAL = ['abseiling,eeeeeeeeeee,100,110,validate', 'air drumming,fffffffffff,1,11,validate']
TEST = ['abseiling,ggggggggggg,0,10,test']
CLIPS = [
  '-_AbCdEfGhI_000010_000020.mp4',
  'b_12_3456789_000000_000010.webm',
  'ccccccccccc_000005_000015.mkv',
  'ddddddddddd_000007_000017.mp4',
]
VAL_CLIPS = ['eeeeeeeeeee_000100_000110.mp4', 'fffffffffff_000001_000011.mp4']


def touch(root: pathlib.Path, *names: str) -> None:
  """Nothing opens these: they may be empty."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def write(root: pathlib.Path, header: str = HEADER, **tables: list[str]) -> None:
  root.mkdir(exist_ok=True)
  for name, rows in tables.items():
    (root / f'{name}.csv').write_text('\n'.join([header, *rows]) + '\n')


def load(root, **options):
  return kinetics.splits(root=str(root), **options)


def contents(source, root) -> list[tuple[str, int, Segment]]:
  records = [source[i] for i in range(len(source))]
  return [(os.path.relpath(r.image.path, root), r.label, r.image.segment) for r in records]


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  """Tables and clips, all in one folder."""
  write(tmp_path, train=TRAIN, val=VAL)
  touch(tmp_path, *CLIPS, *VAL_CLIPS)
  return tmp_path


def test_the_validation_clips_are_the_test_clips(root):
  splits = load(root)
  assert splits.clips and splits.valid is None
  assert splits.class_names == ('abseiling', 'air drumming', 'cooking (spicy), hot')
  labels = [1, 0, 2, 0]
  expected = [(name, label, WHOLE) for name, label in zip(CLIPS, labels, strict=True)]
  assert contents(splits.train, root) == expected
  assert contents(splits.test, root) == [(VAL_CLIPS[0], 0, WHOLE), (VAL_CLIPS[1], 1, WHOLE)]
  assert splits.about == (
    f'{root}: 3 classes',
    f'train: 4 clips of train.csv in {root}',
    f'val: 2 clips of val.csv in {root}',
    'test: the published validation clips, since there are no test clips with labels',
  )


LAYOUTS = {
  # torchvision and CVDF: annotations/, a folder a split; with or without one a class.
  'torchvision': ('annotations/{}.csv', 'train/air_drumming/', 'val/any/', None),
  'cvdf': ('annotations/{}.csv', 'train/', 'val/', None),
  # mmaction2.
  'mmaction2': ('annotations/kinetics_{}.csv', 'videos_train/abseiling/', 'videos_val/x/', None),
  'classes': ('kinetics400_{}.csv', 'air drumming/', 'abseiling/', None),
  'elsewhere': ('{}.csv', 'videos/a/', 'videos/', 'videos'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_the_usual_downloaders(tmp_path, layout):
  table, train, val, videos = LAYOUTS[layout]
  place = tmp_path / os.path.dirname(table)
  name = os.path.basename(table).removesuffix('.csv')
  write(place, **{name.format('train'): TRAIN, name.format('val'): VAL})
  touch(tmp_path, *(train + clip for clip in CLIPS), *(val + clip for clip in VAL_CLIPS))
  splits = load(tmp_path, videos=videos)
  assert [clip for clip, _, _ in contents(splits.train, tmp_path)] == [train + c for c in CLIPS]
  assert [clip for clip, _, _ in contents(splits.test, tmp_path)] == [val + c for c in VAL_CLIPS]


def test_full_videos_are_cut_by_the_table(tmp_path):
  write(tmp_path, train=TRAIN, validate=VAL)
  touch(tmp_path, '-_AbCdEfGhI.mp4', 'b_12_3456789.mp4', *CLIPS[2:], 'eeeeeeeeeee_100_110.mp4')
  touch(tmp_path, 'fffffffffff_000002_000012.mp4', 'fffffffffff.mp4')
  splits = load(tmp_path)
  assert contents(splits.train, tmp_path)[:3] == [
    ('-_AbCdEfGhI.mp4', 1, Segment(10.0, 20.0)),
    ('b_12_3456789.mp4', 0, Segment(0.0, 10.0)),
    (CLIPS[2], 2, WHOLE),
  ]
  assert contents(splits.test, tmp_path) == [
    ('eeeeeeeeeee_100_110.mp4', 0, WHOLE),
    ('fffffffffff.mp4', 1, Segment(1.0, 11.0)),
  ]


def test_missing_clips_are_counted_and_left_out(root):
  (root / CLIPS[2]).unlink()
  with pytest.raises(
    errors.UserError, match=r'train\.csv: 1 of its 4 clips \(25\.0%\) are not in .*: ccccccccccc 5'
  ):
    load(root)
  splits = load(root, max_missing_fraction=0.25)
  assert [file for file, _, _ in contents(splits.train, root)] == [*CLIPS[:2], CLIPS[3]]
  assert len(splits.class_names) == 3
  assert splits.about[:2] == (
    f'{root}: 3 classes, 1 of them without a training clip',
    f'train: 3 clips of train.csv in {root}; 1 (25.0%) are missing: ccccccccccc 5.0-15.0',
  )
  for clip in VAL_CLIPS:
    (root / clip).unlink()
  with pytest.raises(errors.UserError, match=r'val\.csv: 2 of its 2 clips \(100\.0%\)'):
    load(root, max_missing_fraction=1.0)
  with pytest.raises(errors.UserError, match=r'max_missing_fraction must be a number in \[0, 1\]'):
    load(root, max_missing_fraction=1.5)


def test_test_clips(root):
  write(root, test=TEST)
  touch(root, 'ggggggggggg_000000_000010.mp4')
  splits = load(root)
  assert len(splits.valid) == 2
  assert contents(splits.test, root) == [('ggggggggggg_000000_000010.mp4', 0, WHOLE)]
  for name in ('val.csv', str(root / 'val.csv')):
    assert len(load(root, test_list=name).test) == 2 and load(root, test_list=name).valid is None
  (root / 'ggggggggggg_000000_000010.mp4').unlink()
  splits = load(root)
  assert splits.valid is None and len(splits.test) == 2
  assert 'test.csv: none of its clips is there; it is not used' in splits.about
  with pytest.raises(errors.UserError, match=r'test\.csv: 1 of its 1 clips'):
    load(root, test_list='test.csv')


def test_test_clips_without_labels(root):
  (root / 'test.csv').write_text('youtube_id,time_start,time_end,split\nggggggggggg,0,10,test\n')
  splits = load(root)
  assert splits.about[1] == 'test.csv has no labels and is not used' and len(splits.test) == 2
  with pytest.raises(errors.UserError, match=r'test\.csv:1: no column for the label'):
    load(root, test_list='test.csv')
  write(root, test=[',ggggggggggg,0,10,test'])
  with pytest.raises(errors.UserError, match=r"test\.csv:2: the cell 'label' is empty"):
    load(root)
  (root / 'val.csv').unlink()
  (root / 'test.csv').write_text('youtube_id,time_start,time_end,split\n')
  with pytest.raises(errors.UserError, match=r'no table found.*like val\.csv'):
    load(root)


def test_validation_clips_are_split_off_on_request(root):
  rows = [f'abseiling,{i:011},0,10,train' for i in range(10)]
  write(root, train=rows)
  write(root, val=VAL[:1])
  touch(root, *(f'{i:011}_000000_000010.mp4' for i in range(10)))
  splits = load(root, val_fraction=0.2)
  assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [8, 2, 1]
  assert splits.about[-1].startswith('val: 2 clips split off train')


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('abseiling,xxxxxxxxxxx,20,10,train', r'train\.csv:2: .*from 20 to 10 s'),
    ('abseiling,xxxxxxxxxxx,1,,train', r'train\.csv:2: a clip needs time_start and time_end'),
    ('abseiling,xxxxxxxxxxx,1,2,val', r"train\.csv:2: split 'val', but .* of the train clips"),
    ('abseiling,../x,1,2,train', r'train\.csv:2: .*outside'),
  ],
)
def test_wrong_rows(root, row, message):
  write(root, train=[row])
  with pytest.raises(errors.UserError, match=message):
    load(root)


def test_other_mistakes(root):
  write(root, val=['abseilign,eeeeeeeeeee,100,110,val'])
  with pytest.raises(errors.UserError, match=r"val\.csv:2 .*'abseilign'. Did you mean 'abseiling'"):
    load(root)
  write(root, val=VAL)
  with pytest.raises(errors.UserError, match=r"folder \(videos\) in .*'vidoes'"):
    load(root, videos='vidoes')
  touch(root, f'double/{CLIPS[0]}')
  with pytest.raises(errors.UserError, match=rf'{CLIPS[0][:-4]}. is there twice, as .*double/'):
    load(root)
  write(root, kinetics_train=TRAIN)
  with pytest.raises(
    errors.UserError, match=r'kinetics_train\.csv and train\.csv: choose one with'
  ):
    load(root)
  with pytest.raises(errors.UserError, match=r'train\.csv: not a folder'):
    load(root / 'train.csv')


def test_is_a_data_set_with_its_options(root):
  options = {'root': str(root), 'max_missing_fraction': 0, 'split_seed': 1}
  assert len(datasets.open_splits('kinetics', 32, options)[1].train) == 4
  with pytest.raises(errors.UserError, match="option of dataset 'kinetics' 'max_missing'"):
    datasets.open_splits('kinetics', 32, {'root': str(root), 'max_missing': 0.1})
  assert datasets.option_types()['max_missing_fraction'] is float
