"""COCO-style annotations, as iNaturalist publishes them."""

import json
import pathlib
import pickle

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import coco, json_stream, sources


def write(
  root: pathlib.Path, name: str, images, annotations=None, categories=((3, 'ant'),)
) -> None:
  """images: id -> file name; annotations: pairs of image id and category id."""
  for file in images.values():
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes(file.encode())
  content = {
    'info': {'description': 'ü', 'list': [1, [2]]},
    'images': [{'license': 1, 'id': i, 'file_name': file} for i, file in images.items()],
    'categories': [{'id': i, 'name': n} if n else {'id': i} for i, n in categories],
    'annotations': [
      {'id': k, 'image_id': i, 'category_id': c} for k, (i, c) in enumerate(annotations or ())
    ],
  }
  if annotations is None:
    del content['annotations']
  (root / name).write_text(json.dumps(content, indent=1))


@pytest.fixture
def root(tmp_path) -> pathlib.Path:
  """Category ids 9, 2 and 5; annotations in another order than the images."""
  kinds = ((9, 'yak'), (2, 'bee'), (5, None))
  train = {100 - i: f'train_val2018/t{i:02}.jpg' for i in range(12)}
  pairs = [(100 - i, (9, 2, 5)[i % 3]) for i in range(12)][::-1]
  write(tmp_path, 'train2018.json', train, pairs, kinds)
  val = {i: f'train_val2018/v{i}.jpg' for i in range(3)}
  write(tmp_path, 'val2018.json', val, [(i, (9, 2, 5)[i]) for i in range(3)], kinds)
  return tmp_path


def contents(source: sources.Source) -> list[tuple[str, int]]:
  return [(source[i].image.decode(), source[i].label) for i in range(len(source))]


def test_labels_follow_category_ids_and_val_is_the_test_part(root):
  splits = coco.splits(root=str(root))
  assert splits.class_names == ('bee', '5', 'yak')
  assert contents(splits.train) == [
    (f'train_val2018/t{i:02}.jpg', (2, 0, 1)[i % 3]) for i in range(12)
  ]
  assert splits.valid is None
  assert contents(splits.test) == [(f'train_val2018/v{i}.jpg', (2, 0, 1)[i]) for i in range(3)]
  assert 'train: 12 images in train2018.json' in splits.about
  assert 'test: 3 images in val2018.json' in splits.about
  assert contents(pickle.loads(pickle.dumps(splits.test))) == contents(splits.test)
  (root / 'train_val2018/v1.jpg').unlink()
  with pytest.raises(sources.BadImage, match=r'v1\.jpg'):
    splits.test[1]


def test_validation_images_are_split_off_train(root):
  splits = coco.splits(root=str(root), val_fraction=0.25)
  assert len(splits.train) == 9 and len(splits.test) == 3
  assert sorted(label for _, label in contents(splits.valid)) == [0, 1, 2]
  everything = contents(coco.splits(root=str(root)).train)
  assert sorted(contents(splits.train) + contents(splits.valid)) == sorted(everything)


def test_names_of_categories_json(root):
  listed = [{'id': i, 'name': n} for i, n in ((2, 'same'), (5, 'same'), (9, 'x'), (11, 'y'))]
  (root / 'categories.json').write_text(json.dumps(listed))
  assert coco.splits(root=str(root)).class_names == ('same (2)', 'same (5)', 'x')
  (root / 'categories.json').write_text(json.dumps(listed[1:]))
  with pytest.raises(errors.UserError, match=r'category 2 of train2018\.json is not in it'):
    coco.splits(root=str(root))


def test_files_of_2021_and_annotated_test_images(tmp_path):
  for name, count in (('train', 4), ('train_mini', 2), ('val', 1), ('test', 3)):
    images = {i: f'{name}/00000_x/{i}.jpg' for i in range(count)}
    write(tmp_path, f'{name}.json', images, [(i, 3) for i in images])
  splits = coco.splits(root=str(tmp_path))
  assert [len(part) for part in (splits.train, splits.valid, splits.test)] == [4, 1, 3]
  assert len(coco.splits(root=str(tmp_path), train_json='train_mini.json').train) == 2
  with pytest.raises(errors.UserError, match='val_fraction is given'):
    coco.splits(root=str(tmp_path), val_fraction=0.1)
  # Published test lists have no labels.
  write(tmp_path, 'test.json', {0: 'test/0.jpg'})
  splits = coco.splits(root=str(tmp_path))
  assert splits.valid is None and len(splits.test) == 1
  assert 'test.json has no annotations and is not used' in splits.about
  with pytest.raises(errors.UserError, match=r'test\.json: test/0\.jpg has no annotation'):
    coco.splits(root=str(tmp_path), test_json='test.json')
  (tmp_path / 'train.json').unlink()
  assert len(coco.splits(root=str(tmp_path)).train) == 2


@pytest.mark.parametrize(
  ('images', 'annotations', 'message'),
  [
    ({0: 'a.jpg', 1: 'b.jpg'}, [(0, 3)], 'b.jpg has no annotation; 1 images'),
    ({0: 'a.jpg'}, [(0, 3), (0, 4)], r'a\.jpg has annotations of two categories, \d and \d'),
    ({0: 'a.jpg'}, [(0, 3), (0, 3), (7, 3)], 'an annotation is of image 7'),
    ({0: 'a.jpg'}, [(0, 6)], r'a\.jpg is of category 6'),
    ({0: 'a.jpg'}, [(0, 'x')], "'category_id': 'x'.* in annotations"),
    ({'z': 'a.jpg'}, [(0, 3)], "'id': 'z'.* in images"),
    ({}, [], "there are no 'images'"),
  ],
)
def test_wrong_annotations_are_named(tmp_path, images, annotations, message):
  kinds = ((3, 'ant'), (4, 'bee'))
  write(tmp_path, 'train.json', images, annotations, kinds)
  write(tmp_path, 'val.json', {0: 'v.jpg'}, [(0, 3)], kinds)
  with pytest.raises(errors.UserError, match=message) as caught:
    coco.splits(root=str(tmp_path))
  assert 'train.json' in str(caught.value)


def test_missing_or_ambiguous_files_and_a_wrong_folder(root):
  (root / 'train_val2018/t00.jpg').unlink()
  with pytest.raises(errors.UserError, match=r'must lie in .*train_val2018'):
    coco.splits(root=str(root))
  write(root, 'train2017.json', {0: 'a.jpg'}, [(0, 3)])
  with pytest.raises(errors.UserError, match=r'train2017\.json and train2018\.json: choose one'):
    coco.splits(root=str(root))
  (root / 'val2018.json').unlink()
  with pytest.raises(errors.UserError, match=r'val\.json or val2018\.json: give .*val_json=FILE'):
    coco.splits(root=str(root), train_json='train2018.json')


def test_json_is_read_in_pieces_as_whole(tmp_path, monkeypatch):
  content = {'a': [1, 22, 333], 'skip': {'a': [9]}, 'b': [{'x': 'é"]}'}, [], None, 1.5e3], 'c': []}
  file = tmp_path / 'x.json'
  for chunk in (1, 2, 7, 1000):
    monkeypatch.setattr(json_stream, '_CHUNK', chunk)
    for indent in (None, 2):
      file.write_text(json.dumps(content, indent=indent, ensure_ascii=False), 'utf-8')
      expected = [('a', v) for v in content['a']] + [('b', v) for v in content['b']]
      assert list(json_stream.elements(file)) == expected
    file.write_text('[12, 3]')
    assert list(json_stream.elements(file)) == [('', 12), ('', 3)]
  for text in (
    '',
    '{"a": [1,]}',
    '{"a": [1}',
    '{"a": [1',
    '{"a" [1]}',
    '[1] 2',
    '{1: 2}',
    '{"a": nul}',
  ):
    file.write_text(text)
    with pytest.raises(errors.UserError, match=r'x\.json: not valid JSON at character'):
      list(json_stream.elements(file))


@pytest.mark.parametrize(
  ('train', 'val', 'message'),
  [
    (
      {},
      {'categories': ((3, 'bee'), (4, 'ant'))},
      r"val\.json: category 3 is 'bee', but 'ant'",
    ),
    ({'categories': ((3, 'ant'), (3, 'ant'))}, {}, r'train\.json: two categories have the id 3'),
    ({'categories': ((3, 'ant'), (2**70, 'b'))}, {}, rf'train\.json: .*{2**70}.*below 2\*\*63'),
    (
      {'images': {0: 'a.jpg', 1: 'b.jpg', 2: './a.jpg'}, 'annotations': [(0, 3), (1, 3), (2, 4)]},
      {},
      r'train\.json: a\.jpg is listed twice',
    ),
    (
      {},
      {'images': {0: 'v.jpg', 1: 'w.jpg', 2: 'v.jpg'}, 'annotations': [(0, 3), (1, 3), (2, 3)]},
      r'val\.json: v\.jpg is listed twice',
    ),
    ({}, {'images': {0: 'b.jpg'}}, r'val\.json: b\.jpg is listed in train\.json as well'),
    (
      {'images': {0: '../x/a.jpg'}, 'annotations': [(0, 3)]},
      {},
      r"'\.\./x/a\.jpg': a path outside",
    ),
  ],
)
def test_files_that_contradict_themselves_or_each_other(tmp_path, train, val, message):
  common = {'categories': ((3, 'ant'), (4, 'bee'))}
  root = tmp_path / 'root'
  root.mkdir()
  (tmp_path / 'x').mkdir()
  images = {0: 'a.jpg', 1: 'b.jpg'}
  train = {'images': images, 'annotations': [(0, 3), (1, 4)]} | common | train
  write(root, 'train.json', **train)
  write(root, 'val.json', **({'images': {0: 'v.jpg'}, 'annotations': [(0, 3)]} | common | val))
  with pytest.raises(errors.UserError, match=message):
    coco.splits(root=str(root))


def test_a_name_that_one_file_lacks_is_no_contradiction(tmp_path):
  write(tmp_path, 'train.json', {0: 'a.jpg'}, [(0, 3)], ((3, None), (4, 'bee')))
  write(tmp_path, 'val.json', {0: './b//c.jpg'}, [(0, 3)], ((3, 'ant'), (9, 'new')))
  splits = coco.splits(root=str(tmp_path))
  assert splits.class_names == ('3', 'bee') and splits.test[0].id == str(tmp_path / 'b/c.jpg')
  listed = [{'id': 3, 'name': 'x'}, {'id': 4, 'name': 'y'}, {'id': 3, 'name': 'z'}]
  (tmp_path / 'categories.json').write_text(json.dumps(listed))
  with pytest.raises(errors.UserError, match=r'categories\.json: two categories have the id 3'):
    coco.splits(root=str(tmp_path))


def test_a_number_of_thousands_of_digits_is_no_json(tmp_path):
  (tmp_path / 'x.json').write_text('[' + '1' * 5000 + ']')
  with pytest.raises(errors.UserError, match=r'x\.json: not valid JSON at character 1'):
    list(json_stream.elements(tmp_path / 'x.json'))
