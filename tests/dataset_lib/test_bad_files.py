"""The list of unreadable images: each once, however often a run is started again."""

import csv
import json
import re
import threading
from concurrent import futures

import pytest

from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib.bad_files import BadFiles, Problem

COUNTS = {'train': 200, 'test': 200}


def problem(index: int, split: str = 'train') -> Problem:
  return Problem(split, index, f'cats, "odd" ones/{index}.jpg', 'truncated,\nhere')


def rows(path) -> list[Problem]:
  with path.open(newline='', encoding='utf-8') as file:
    return [
      Problem(r['split'], int(r['index']), r['id'], r['reason']) for r in csv.DictReader(file)
    ]


def test_what_is_known_is_not_listed_again(tmp_path, capsys):
  path, listed = tmp_path / 'bad.csv', BadFiles(COUNTS, 0.1)
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
  path, former = tmp_path / 'bad.csv', BadFiles(COUNTS, 0.1)
  former.keep_in(path)
  former.add([problem(3), problem(1)])
  capsys.readouterr()
  # Before it learns where to write, the next run met an old problem and a new one.
  later = BadFiles(COUNTS, 0.1)
  later.add([problem(1), problem(7)])
  later.keep_in(path)
  later.add([problem(3)])
  assert rows(path) == [problem(3), problem(1), problem(7)]
  assert len(later.problems) == 3 and path.read_text().count('split,index') == 1


def test_the_first_few_are_said(capsys):
  listed = BadFiles(COUNTS, 0.1)
  listed.add([Problem('train', i, f'{i}.jpg', 'the file is empty') for i in range(9)])
  printed = capsys.readouterr().err.splitlines()
  assert printed == [f'bad image (train): {i}.jpg: the file is empty' for i in range(5)]
  assert len(listed.problems) == 9


def test_too_many_of_a_split_are_an_error_also_over_restarts(tmp_path):
  path, former = tmp_path / 'bad.csv', BadFiles({'train': 30, 'test': 30}, 0.1)
  former.keep_in(path)
  former.add([problem(1), problem(2), problem(1, 'test')])
  former.add([problem(3)])
  later = BadFiles({'train': 30, 'test': 30}, 0.1)
  later.keep_in(path)
  with pytest.raises(errors.UserError, match=r'unreadable image 4 of the 30 .* at most 3 .*= 0\.1'):
    later.add([problem(9)])
  assert rows(path)[-1] == problem(9)
  later.add([problem(2, 'test'), problem(3, 'test')])


def test_names_that_are_not_utf_8(tmp_path, capsys):
  odd = Problem('train', 0, 'caf\udce9.jpg', 'truncated')
  path, listed = tmp_path / 'bad.csv', BadFiles(COUNTS, 0.1)
  listed.keep_in(path)
  listed.add([odd])
  assert b'caf\xe9.jpg' in path.read_bytes()
  again = BadFiles(COUNTS, 0.1)
  again.keep_in(path)
  assert list(again.problems.values()) == [odd]
  assert 'caf\\udce9.jpg' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['split,index,id,reason\ntr\n', 'hello\n1\n', 'a,b\n"x'])
def test_a_list_that_is_none_is_an_error(tmp_path, text):
  (tmp_path / 'bad.csv').write_text(text)
  with pytest.raises(errors.UserError, match=r'bad\.csv: not a list'):
    BadFiles(COUNTS, 0.1).keep_in(tmp_path / 'bad.csv')


def test_a_run_over_its_limit_stays_over_it(tmp_path):
  for _ in range(2):
    listed = BadFiles({'train': 30}, 0.0)
    listed.keep_in(tmp_path / 'bad.csv')
    with pytest.raises(errors.UserError, match='unreadable image 1 of the 30'):
      listed.add([problem(1)])


def on_hosts(count: int, work) -> list:
  """Calls `work(host, gather)` for every host in a thread; values are gathered as JSON."""
  there, barrier = [''] * count, threading.Barrier(count)

  def run(host: int):
    def gather(value):
      there[host] = json.dumps(value)
      barrier.wait(10)
      values = [json.loads(text) for text in there]
      barrier.wait(10)
      return values

    return work(host, gather)

  with futures.ThreadPoolExecutor(count) as pool:
    return list(pool.map(run, range(count)))


def test_hosts_come_to_one_list_and_the_first_writes_it(tmp_path, capsys):
  path = tmp_path / 'bad.csv'
  former = BadFiles(COUNTS, 0.1)
  former.keep_in(path)
  former.add([problem(5)])
  capsys.readouterr()
  odd = Problem('train', 9, 'caf\udce9.jpg', 'truncated')
  met = [
    ([problem(1), problem(2)], []),
    ([problem(2), problem(3), problem(5)], [odd]),
    ([], [problem(1)]),
  ]

  def work(host, gather):
    listed = BadFiles(COUNTS, 0.1, host=host, hosts=3)
    listed.keep_in(path)
    for part in met[host]:
      listed.add(part)
      assert odd not in listed.problems.values()  # Nothing counts before it is shared.
      listed.share(gather)
    return listed

  hosts = on_hosts(3, work)
  together = [problem(5), problem(1), problem(2), problem(3), odd]
  assert [list(listed.problems.values()) for listed in hosts] == [together] * 3
  assert [listed.path for listed in hosts] == [path, None, None]
  again = BadFiles(COUNTS, 0.1)
  again.keep_in(path)
  assert list(again.problems.values()) == together
  assert capsys.readouterr().err.count('bad image (') == 4  # The former one was said then.


@pytest.mark.parametrize('listed_before', [False, True])
def test_hosts_end_together_with_the_same_error(tmp_path, listed_before):
  path = tmp_path / 'bad.csv'
  if listed_before:
    former = BadFiles({'train': 30}, 0.1)
    former.keep_in(path)
    former.add([problem(7)])
  met = [[problem(1), problem(2)], [problem(3), problem(4)]]

  def work(host, gather):
    listed = BadFiles({'train': 30}, 0.1, host=host, hosts=2)
    listed.keep_in(path)
    listed.share(gather)  # The former ones alone are within the limit.
    listed.add(met[host])  # And so is what each host has met.
    with pytest.raises(errors.UserError) as caught:
      listed.share(gather)
    return str(caught.value)

  first, second = on_hosts(2, work)
  assert first == second
  assert re.search(r'unreadable image \d of the 30 .* at most 3 are', first), first
  assert len(rows(path)) == 4 + listed_before


def test_a_single_host_shares_nothing():
  listed = BadFiles(COUNTS, 0.1)
  listed.add([problem(1)])
  listed.share(lambda value: pytest.fail('nobody to gather from'))
  assert list(listed.problems.values()) == [problem(1)]
