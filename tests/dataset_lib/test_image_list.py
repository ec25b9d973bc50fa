"""Lists of images: names, labels, splits, and errors that name file and line."""

import itertools
import pathlib
import pickle

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import image_list, sources


def images(root: pathlib.Path, *names: str) -> None:
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode())


def load(root, **options) -> sources.Splits:
  return image_list.splits(root=str(root), **options)


def contents(source: sources.Source) -> list[tuple[str, int]]:
  return [(source[i].image.decode(), source[i].label) for i in range(len(source))]


@pytest.fixture
def vtab(tmp_path) -> pathlib.Path:
  """Three classes, the lists of a VTAB-1k export with four, two and two images."""
  names = [f'images/{i:02} with space.jpg' for i in range(8)]
  images(tmp_path, *names)
  lines = [f'{name} {i % 3}\n' for i, name in enumerate(names)]
  (tmp_path / 'train800.txt').write_text(''.join(lines[:4]))
  (tmp_path / 'val200.txt').write_text(''.join(lines[4:6]))
  (tmp_path / 'train800val200.txt').write_text(''.join(lines[:6]))
  (tmp_path / 'test.txt').write_text(''.join(lines[6:]) + '\n')
  return tmp_path


def test_vtab_lists_are_found_and_read(vtab):
  splits = load(vtab)
  assert contents(splits.train) == [(f'images/{i:02} with space.jpg', i % 3) for i in range(4)]
  assert contents(splits.valid) == [(f'images/{i:02} with space.jpg', i % 3) for i in (4, 5)]
  assert contents(splits.test) == [(f'images/{i:02} with space.jpg', i % 3) for i in (6, 7)]
  assert splits.class_names == ('0', '1', '2')
  assert splits.about[0].endswith(': 3 classes')
  assert splits.about[1:] == (
    'train: 4 images in train800.txt',
    'val: 2 images in val200.txt',
    'test: 2 images in test.txt',
  )
  assert splits.train[1].id == str(vtab / 'images/01 with space.jpg')
  assert contents(pickle.loads(pickle.dumps(splits.test))) == contents(splits.test)
  (vtab / 'images/01 with space.jpg').unlink()
  with pytest.raises(sources.BadImage, match='01 with space'):
    splits.train[1]


def test_a_given_training_list_may_hold_the_validation_images(vtab):
  splits = load(vtab, train_list='train800val200.txt')
  assert len(splits.train) == 6 and splits.valid is None and len(splits.test) == 2
  splits = load(vtab, train_list=str(vtab / 'train800.txt'), val_list='val200.txt')
  assert len(splits.train) == 4 and len(splits.valid) == 2
  with pytest.raises(errors.UserError, match=r"'train800\.txt'"):
    load(vtab, train_list='trian800.txt')


def test_published_lists_without_validation_are_complete(tmp_path):
  images(tmp_path, *(f'{i}.jpg' for i in range(20)))
  (tmp_path / 'train.txt').write_text(''.join(f'{i}.jpg {i % 2}\n' for i in range(16)))
  (tmp_path / 'test.txt').write_text(''.join(f'{i}.jpg {i % 2}\n' for i in range(16, 20)))
  assert load(tmp_path).valid is None
  splits = load(tmp_path, val_fraction=0.25)
  assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [12, 4, 4]
  assert sorted(contents(splits.train) + contents(splits.valid)) == sorted(
    (f'{i}.jpg', i % 2) for i in range(16)
  )
  with pytest.raises(errors.UserError, match='test_fraction is given'):
    load(tmp_path, test_fraction=0.25)


def test_a_table_with_names_quotes_and_a_split_column(tmp_path):
  images(tmp_path, 'a, b.jpg', 'c.jpg', 'd.jpg', 'e.jpg')
  (tmp_path / 'all.csv').write_text(
    'Label,author,Image_Path,split\r\nzebra,x,"a, b.jpg",train\r\nant,"y ""z""",c.jpg,train\r\n'
    '\r\nant,,d.jpg,Validation\r\nzebra,,e.jpg,test\r\n',
    encoding='utf-8-sig',
  )
  for root in (tmp_path, tmp_path / 'all.csv'):
    splits = load(root)
    assert splits.class_names == ('ant', 'zebra')
    assert contents(splits.train) == [('a, b.jpg', 1), ('c.jpg', 0)]
    assert contents(splits.valid) == [('d.jpg', 0)] and contents(splits.test) == [('e.jpg', 1)]
  (tmp_path / 'classes.txt').write_text('zebra\nyak\nant\n')
  splits = load(tmp_path)
  assert splits.class_names == ('zebra', 'yak', 'ant')
  assert contents(splits.train) == [('a, b.jpg', 0), ('c.jpg', 2)]
  assert '3 classes, 1 of them without a training image' in splits.about[0]


def test_a_list_alone_is_split(tmp_path):
  images(tmp_path, *(f'{i}.jpg' for i in range(30)))
  rows = [f'{i}.jpg\t{"even" if i % 2 == 0 else "odd"}' for i in range(30)]
  (tmp_path / 'mine.tsv').write_text('\n'.join(['file\tclass', *rows]))
  splits = load(tmp_path)
  parts = [contents(part) for part in (splits.train, splits.valid, splits.test)]
  assert [len(part) for part in parts] == [20, 4, 6]
  assert sorted(itertools.chain(*parts)) == sorted((f'{i}.jpg', i % 2) for i in range(30))
  (tmp_path / 'mine.tsv').write_text('\n'.join(['file\tclass', *rows[::-1]]))
  assert set(contents(load(tmp_path).test)) == set(parts[2])
  assert set(contents(load(tmp_path, split_seed=1).test)) != set(parts[2])


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('train.txt', 'a.jpg 0\nb.jpg\n', r"train\.txt:2: a line must be 'path label'.*'b.jpg'"),
    ('train.txt', 'a.jpg 0\nb.jpg cat\n', r'train\.txt:2: .*whole number'),
    ('train.txt', 'a.jpg 0\n\nb.jpg -1\n', r'train\.txt:3: label -1 is outside'),
    ('train.txt', 'a.jpg 0\nb.jpg 70000\n', r'train\.txt:2: label 70000, but there are only'),
    ('train.txt', '../a.jpg 0\n', r"train\.txt:1: '\.\./a\.jpg': a path outside"),
    ('train.txt', 'a.jpg 0\na.jpg 1\n', r"train\.txt:2: a\.jpg has label '1', but '0'"),
    ('train.txt', '\n', r'train\.txt: it lists no images'),
    ('train.txt', 'x.jpg 0\ny.jpg 1\n', r'train\.txt:1: .*x\.jpg does not exist'),
    ('train.csv', 'path;label\na.jpg;0\n', r'train\.csv:1: no column for the path .*path;label'),
    ('train.csv', 'path,file,label\n', r'train\.csv:1: more than one column for the path'),
    ('train.csv', 'path,label\na.jpg,0,1\n', r'train\.csv:2: 3 cells in a table of 2'),
    ('train.csv', 'path,label\na.jpg,\n', r"train\.csv:2: the cell 'label' is empty"),
    ('train.csv', 'path,label\na.jpg,cat\nb.jpg,1\n', r"train\.csv:3: label '1': some labels are"),
    ('train.csv', 'path,label\n"a.jpg,1\n', r'train\.csv:2: unexpected end of data'),
    ('x.csv', 'path,label,split\na.jpg,0,tset\n', r"split in .*x\.csv:2: 'tset'. Did you.*'test'"),
    ('x.csv', 'path,label,split\na.jpg,0,test\n', r'x\.csv: no row is of the split train'),
    ('x.csv', 'path,label,split\na.jpg,ant,train\nb.jpg,amt,test\n', r"x\.csv:3 .*'amt'.*'ant'"),
  ],
)
def test_errors_name_file_and_line(tmp_path, name, text, message):
  images(tmp_path, 'a.jpg', 'b.jpg')
  (tmp_path / name).write_text(text)
  with pytest.raises(errors.UserError, match=message):
    load(tmp_path)


def test_other_mistakes(tmp_path):
  images(tmp_path, 'a.jpg', 'b.jpg')
  with pytest.raises(errors.UserError, match=r'dataset_configs\.root=PATH'):
    image_list.splits()
  with pytest.raises(errors.UserError, match='no such file or folder'):
    load(tmp_path / 'nowhere')
  with pytest.raises(errors.UserError, match=r'Looked for train800\.txt.*there are none'):
    load(tmp_path)
  (tmp_path / 'train.csv').write_text('path,label,split\na.jpg,0,train\nb.jpg,0,test\n')
  (tmp_path / 'test.csv').write_text('path,label\nb.jpg,0\n')
  with pytest.raises(errors.UserError, match=r"train\.csv:3: split 'test', but this file is the"):
    load(tmp_path)
  (tmp_path / 'train.csv').write_bytes(b'path,label\n\xff.jpg,0\n')
  with pytest.raises(errors.UserError, match=r'train\.csv: cannot be read as UTF-8'):
    load(tmp_path)
  (tmp_path / 'train.csv').write_text('path,label\na.jpg,1\n')
  (tmp_path / 'classes.txt').write_text('x\n')
  with pytest.raises(errors.UserError, match=r'train\.csv:2: label 1 is outside 0\.\.0'):
    load(tmp_path)
  for text, message in (
    ('x\n\ny', r'classes\.txt:2: a class without'),
    ('x\ny\nx', r':3: .*line 1'),
  ):
    (tmp_path / 'classes.txt').write_text(text)
    with pytest.raises(errors.UserError, match=message):
      load(tmp_path)
  with pytest.raises(errors.UserError, match='root is a list itself'):
    load(tmp_path / 'train.csv', test_list='test.csv')


def test_a_list_of_two_parts_is_refused(vtab):
  (vtab / 'link.txt').symlink_to('test.txt')
  for same in ('test.txt', './test.txt', 'link.txt'):
    with pytest.raises(errors.UserError, match=r'given for two parts, val and test'):
      load(vtab, val_list=same)
  (vtab / 'copy.txt').write_text((vtab / 'test.txt').read_text())
  assert len(load(vtab, val_list='copy.txt').valid) == 2


def test_two_spellings_of_a_path_are_one_image(tmp_path):
  images(tmp_path, 'x/0.png', 'x/1.png')
  (tmp_path / 'test.txt').write_text('x/0.png 0\n')
  (tmp_path / 'train.txt').write_text('./x/0.png 0\nx/./1.png 1\nx//1.png 1\n')
  train = load(tmp_path).train
  assert train.files == ['x/0.png', 'x/1.png', 'x/1.png']
  (tmp_path / 'train.txt').write_text('./x/0.png 0\nx/0.png 1\n')
  with pytest.raises(errors.UserError, match=r"train\.txt:2: x/0\.png has label '1', but '0'"):
    load(tmp_path)


def test_numbers_that_are_not_whole_are_no_names(tmp_path):
  names = [f'{i}.jpg' for i in range(12)]
  images(tmp_path, *names)

  def write(labels):
    rows = [f'{name},{label},train' for name, label in zip(names, labels, strict=False)]
    text = '\n'.join(['path,label,split', *rows, f'11.jpg,{labels[0]},test'])
    (tmp_path / 'all.csv').write_text(text)

  for wrong, line in (
    ([f'{i}.0' for i in range(11)], 2),
    (['0', '1', '2.0'], 4),
    (['1e1', '.5'], 2),
    (['1' * 5000], 2),
  ):
    write(wrong)
    with pytest.raises(errors.UserError, match=rf'all\.csv:{line}: .* must be whole'):
      load(tmp_path)
  # Where somebody says so, they are names.
  write(['0.5', '0.25'])
  (tmp_path / 'classes.txt').write_text('0.25\n0.5\n')
  splits = load(tmp_path)
  assert splits.class_names == ('0.25', '0.5') and splits.train.labels.tolist() == [1, 0]


def test_names_that_are_other_numbers_than_their_labels(tmp_path):
  images(tmp_path, *(f'{i}.jpg' for i in range(4)))

  def write(labels):
    rows = [f'{i}.jpg,{label},{part}' for i, (label, part) in enumerate(labels)]
    (tmp_path / 'all.csv').write_text('\n'.join(['path,label,split', *rows]))

  (tmp_path / 'classes.txt').write_text('1\n2\n3\n')
  write([(1, 'train'), (2, 'train'), (2, 'test')])
  with pytest.raises(errors.UserError, match=r"classes\.txt:1: the name '1' .* names label 0"):
    load(tmp_path)
  for names in ('0\n1\n2\n', 'none\n1\n2', 'a\nb\nc 7'):
    (tmp_path / 'classes.txt').write_text(names)
    assert load(tmp_path).train.labels.tolist() == [1, 2]
  # Beside names, a number is a name.
  (tmp_path / 'classes.txt').write_text('cat\n2048\n')
  write([('cat', 'train'), ('cat', 'test')])
  assert load(tmp_path).class_names == ('cat', '2048')


def test_a_list_of_a_very_long_name_is_not_there(vtab):
  with pytest.raises(errors.UserError, match='val_list'):
    load(vtab, val_list='x' * 5000)
