"""Lists of clips: whole files and parts of them, with and without a header."""

import os
import pathlib
import pickle

import pytest
from reference import video_clips

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import clip_files, clip_list, frame_sampling, image_list, video_file
from losa_scenic.dataset_lib.frame_sampling import WHOLE, Segment

SHARED = pathlib.Path(
  os.environ.get('LOSA_SHARED_DATA', pathlib.Path(__file__).parents[3] / 'shared' / 'data')
)
FIGHT = SHARED / 'video' / 'fight'


def touch(root: pathlib.Path, *names: str) -> None:
  """Nothing opens these: they may be empty."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def load(root, **options):
  return clip_list.splits(root=str(root), **options)


def contents(source) -> list[tuple[str, int, Segment]]:
  records = [source[i] for i in range(len(source))]
  assert all(clip.path == id for clip, _, id in records)
  return [(os.path.relpath(r.id, source.root), r.label, r.image.segment) for r in records]


def test_a_table_of_parts_of_files(tmp_path):
  touch(tmp_path, 'v/a.mp4', 'v/b, c.webm')
  (tmp_path / 'clips.csv').write_text(
    'File,Label,Start,End,split\nv/a.mp4,run,,2.5,train\nv/a.mp4,jump,2.5,,train\n'
    '"v/b, c.webm",jump,0,1e1,test\nv/a.mp4,run,,,val\n'
  )
  (tmp_path / 'notes.csv').write_text('x,y\n')
  for root in (tmp_path, tmp_path / 'clips.csv'):
    splits = load(root)
    assert splits.clips and splits.class_names == ('jump', 'run')
    assert contents(splits.train) == [
      ('v/a.mp4', 1, Segment(0.0, 2.5)),
      ('v/a.mp4', 0, Segment(2.5, None)),
    ]
    assert contents(splits.test) == [('v/b, c.webm', 0, Segment(0.0, 10.0))]
    assert contents(splits.valid) == [('v/a.mp4', 1, WHOLE)]
  assert splits.about[1:] == tuple(
    f'{part}: {count} clips in clips.csv' for part, count in (('train', 2), ('test', 1), ('val', 1))
  )
  assert contents(pickle.loads(pickle.dumps(splits.train))) == contents(splits.train)


@pytest.mark.parametrize('header', ['start_time,end_time', 'time_start,time_end'])
def test_other_names_of_the_times(tmp_path, header):
  touch(tmp_path, 'a.mp4')
  (tmp_path / 'train.csv').write_text(f'video,label,{header}\na.mp4,0,1,2\n')
  (tmp_path / 'test.csv').write_text(f'path,label,{header}\na.mp4,0,3,4\n')
  splits = load(tmp_path)
  assert contents(splits.train) == [('a.mp4', 0, Segment(1.0, 2.0))]
  assert contents(splits.test) == [('a.mp4', 0, Segment(3.0, 4.0))]


@pytest.mark.parametrize(
  ('name', 'separator'), [('txt', ' '), ('csv', ','), ('csv', ' '), ('tsv', '\t')]
)
def test_lists_without_a_header(tmp_path, name, separator):
  """As published for Kinetics by SlowFast and VideoMAE (spaces) and UniFormer (commas)."""
  files = ['a b/1.mp4', 'a b/2.mp4', 'a b/3.mp4', 'x.mp4']
  touch(tmp_path, *files)
  rows = [f'{file}{separator}{i % 2}\n' for i, file in enumerate(files)]
  (tmp_path / f'train.{name}').write_text(''.join(rows[:3]), encoding='utf-8-sig')
  (tmp_path / f'val.{name}').write_text(rows[3])
  (tmp_path / f'test.{name}').write_text(rows[3])
  splits = load(tmp_path)
  assert splits.class_names == ('0', '1')
  assert contents(splits.train) == [(file, i % 2, WHOLE) for i, file in enumerate(files[:3])]
  assert contents(splits.valid) == contents(splits.test) == [('x.mp4', 1, WHOLE)]
  assert type(splits.train) is clip_files.ClipFiles


def test_absolute_paths_must_lie_in_the_folder(tmp_path, monkeypatch):
  touch(tmp_path, 'set/a b/1.mp4', 'set2/2.mp4')
  root = tmp_path / 'set'
  (root / 'test.csv').write_text(f'{root}/a b/1.mp4 0\n')
  (root / 'train.csv').write_text('a b/1.mp4 0\n')
  monkeypatch.chdir(tmp_path)
  for name in ('set', './set', root):
    assert load(name).test.files == ['a b/1.mp4']
  for outside in (f'{tmp_path}/set2/2.mp4', f'{root}/../set2/2.mp4', f'{root}//etc/x.mp4'):
    (root / 'train.csv').write_text(f'{outside} 0\n')
    with pytest.raises(errors.UserError, match=r'train\.csv:1: .*a path outside'):
      load(root)


def test_images_may_lack_a_header_too(tmp_path):
  touch(tmp_path, 'a.jpg', 'b.jpg')
  (tmp_path / 'train.csv').write_text('a.jpg,0\n')
  (tmp_path / 'test.csv').write_text('b.jpg 0\n')
  splits = image_list.splits(root=str(tmp_path))
  assert splits.train.files + splits.test.files == ['a.jpg', 'b.jpg'] and not splits.clips


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ('a.mp4,0,2,2', r'train\.csv:3: .*must end after its start, not last from 2 to 2 s'),
    ('a.mp4,0,3,2', r'train\.csv:3: .*from 3 to 2 s'),
    ('a.mp4,0,-1,2', r"train\.csv:3: start '-1' is no time"),
    ('a.mp4,0,,0', r'train\.csv:3: .*from 0 to 0 s'),
    ('a.mp4,0,,1:30', r"train\.csv:3: end '1:30' is no time: .* seconds"),
    ('a.mp4,0,nan,', r"train\.csv:3: start 'nan' is no time"),
    ('a.mp4,0,0,1e999', r"train\.csv:3: end '1e999' is no time"),
    ('a.mp4,,0,1', r"train\.csv:3: the cell 'label' is empty"),
    ('a.mp4,1,0,1', r"train\.csv:3: a\.mp4 has label '1', but '0' further up"),
    ('../a.mp4,1,0,1', r'train\.csv:3: .*outside'),
  ],
)
def test_errors_name_file_and_line(tmp_path, row, message):
  touch(tmp_path, 'a.mp4')
  (tmp_path / 'train.csv').write_text(f'path,label,start,end\na.mp4,0,0,1\n{row}\n')
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path)


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('train.csv', 'a.mp4,30,0\n', r'train\.csv:1: no column for the path .*Without a header: two'),
    ('train.csv', 'a.mp4,run\n', r'train\.csv:1: no column for the path'),
    ('train.csv', 'a.mp4 0\nb.mp4\n', r"train\.csv:2: a line must be 'path label'"),
    ('train.csv', 'a.mp4,0\nb.mp4,run\n', r"train\.csv:2: label 'run': some labels are whole"),
    (
      'train.csv',
      'path,label,start,start_time\n',
      r'train\.csv:1: more than one column for the st',
    ),
    ('train.txt', '\n', r'train\.txt: it lists no clips'),
    ('train.txt', 'gone.mp4 0\n', r'gone\.mp4 does not exist'),
    ('other.json', '', r'no list of training clips found\. Looked for train\.txt/\.csv/\.tsv and'),
  ],
)
def test_what_is_no_list(tmp_path, name, text, message):
  touch(tmp_path, 'a.mp4', 'b.mp4')
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path)


def test_parts_of_one_file_may_be_split(tmp_path):
  touch(tmp_path, 'a.mp4')
  rows = [f'a.mp4,run,{i},{i + 1}' for i in range(10)]
  (tmp_path / 'mine.csv').write_text('\n'.join(['path,label,start,end', *rows]))
  splits = load(tmp_path)
  assert [len(p) for p in (splits.train, splits.valid, splits.test)] == [7, 1, 2]
  assert splits.about[-1].startswith('note: parts of one file may lie on both sides')
  (tmp_path / 'mine.csv').write_text('\n'.join(['path,label,start,end', *rows, rows[0]]))
  with pytest.raises(errors.UserError, match=r'a\.mp4 0\.0-1\.0: listed twice'):
    load(tmp_path)


def test_times_mean_frames(tmp_path):
  pytest.importorskip('av', reason="PyAV is not installed: pip install 'losa_scenic[video]'")
  video_clips.write(tmp_path / 'a.mp4', 50)
  (tmp_path / 'train.csv').write_text('path,label,start,end\na.mp4,0,0.4,0.8\n')
  (tmp_path / 'test.csv').write_text('path,label,start,end\na.mp4,0,1.6,\n')
  for part, expected in (('train', range(10, 20)), ('test', range(40, 50))):
    path, segment, _ = getattr(load(tmp_path), part)[0].image
    frames = frame_sampling.frame_range(video_file.probe(path), segment)
    assert video_clips.numbers(video_file.read_frames(path, frames)) == list(expected)


@pytest.mark.skipif(not FIGHT.is_dir(), reason=f'no clips in {FIGHT}')
def test_the_shared_clips():
  splits = load(FIGHT)
  parts = splits.train, splits.valid, splits.test
  assert splits.clips and splits.class_names == ('fight', 'noFight')
  assert sum(map(len, parts)) == 211
  for part in parts:
    for path, label, segment in contents(part):
      assert path.split('/')[0] == splits.class_names[label] and segment == WHOLE
      assert (FIGHT / path).is_file()
