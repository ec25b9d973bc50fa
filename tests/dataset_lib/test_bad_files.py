"""The list of unreadable images: each once, however often a run is started again."""

import csv

from losa_scenic.dataset_lib.bad_files import BadFiles, Problem


def problem(index: int, split: str = 'train') -> Problem:
  return Problem(split, index, f'cats, "odd" ones/{index}.jpg', 'truncated,\nhere')


def rows(path) -> list[Problem]:
  with path.open(newline='', encoding='utf-8') as file:
    return [
      Problem(r['split'], int(r['index']), r['id'], r['reason']) for r in csv.DictReader(file)
    ]


def test_what_is_known_is_not_listed_again(tmp_path, capsys):
  path, listed = tmp_path / 'bad.csv', BadFiles()
  listed.keep_in(path)
  assert not path.exists()  # Only if something is bad.
  listed.add([])
  assert not path.exists()
  listed.add([problem(3), problem(1)])
  listed.add([problem(3), problem(3, 'test')])
  assert rows(path) == [problem(3), problem(1), problem(3, 'test')]
  assert list(listed.problems.values()) == rows(path)
  assert capsys.readouterr().err.count('bad image (') == 3


def test_an_interrupted_run_goes_on_with_its_list(tmp_path, capsys):
  path, former = tmp_path / 'bad.csv', BadFiles()
  former.keep_in(path)
  former.add([problem(3), problem(1)])
  capsys.readouterr()
  # Before it learns where to write, the next run met an old problem and a new one.
  later = BadFiles()
  later.add([problem(1), problem(7)])
  later.keep_in(path)
  later.add([problem(3)])
  assert rows(path) == [problem(3), problem(1), problem(7)]
  assert len(later.problems) == 3 and path.read_text().count('split,index') == 1


def test_the_first_few_are_said(capsys):
  listed = BadFiles()
  listed.add([Problem('train', i, f'{i}.jpg', 'the file is empty') for i in range(9)])
  printed = capsys.readouterr().err.splitlines()
  assert printed == [f'bad image (train): {i}.jpg: the file is empty' for i in range(5)]
  assert len(listed.problems) == 9
