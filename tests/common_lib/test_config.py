"""Config blocks become keyword arguments; whatever nobody takes is an error that helps."""

import ml_collections
import pytest
from ml_collections import config_dict

from losa_scenic.common_lib import config, errors


def make(first, *, rank: int = 4, name: str = 'x'):
  return first, rank, name


def test_none_means_not_given():
  block = ml_collections.ConfigDict({'a': None, 'b': 0, 'c': False})
  assert config.to_dict(block) == {'b': 0, 'c': False}
  assert config.to_dict(None) == {}
  assert config.build(make, 1, block={'rank': None}, what='it') == (1, 4, 'x')


def test_build():
  assert config.options(make) == {'rank', 'name'}
  assert config.build(make, 1, block={'rank': 2}, what='it', name='y') == (1, 2, 'y')


@pytest.mark.parametrize('block', [{'rnk': 2}, {'name': 'user'}, {'first': 3}])
def test_unknown_options(block):
  with pytest.raises(errors.UserError, match="Unknown option of it '"):
    config.build(make, 1, block=block, what='it', name='program')


SCHEMA = ml_collections.ConfigDict(
  {
    'count': 1,
    'share': 0.5,
    'on': False,
    'name': 'x',
    'block': {'maybe': config_dict.placeholder(int), 'pair': config_dict.placeholder(tuple)},
    'free': {},
  }
)


def given(**changes) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(SCHEMA.to_dict() | changes)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'cout': 1}, "'cout'.*'count'"),
    ({'block': {'mabe': 1}}, r"'block\.mabe'.*'block\.maybe'"),
  ],
)
def test_unknown_keys(changes, message):
  with pytest.raises(errors.UserError, match=message):
    config.check_keys(given(**changes), SCHEMA)


def test_known_keys_and_free_blocks():
  config.check_keys(given(free={'anything': 1}), SCHEMA)
  config.check_keys({'count': 2}, SCHEMA)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'share': 1},
    {'block': {'maybe': 3, 'pair': [1, 2]}},
    {'block': {}},
    {'free': {'anything': 'goes'}},
  ],
)
def test_right_types(changes):
  config.check_types(given(**changes), SCHEMA)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'count': 1.5}, 'count must be of type int, not 1.5'),
    ({'count': True}, 'count must be of type int, not True'),
    ({'count': None}, 'count must be of type int, not None'),
    ({'share': 'x'}, "share must be of type float, not 'x'"),
    ({'share': False}, 'share must be of type float, not False'),
    ({'on': 1}, 'on must be of type bool, not 1'),
    ({'name': 3}, 'name must be of type str, not 3'),
    ({'block': {'maybe': 2.5}}, r'block\.maybe must be of type int, not 2.5'),
    ({'block': {'pair': 2}}, r'block\.pair must be of type tuple, not 2'),
    ({'block': 3}, 'block must be a block of options, not 3'),
  ],
)
def test_wrong_types(changes, message):
  with pytest.raises(errors.UserError, match=message):
    config.check_types(given(**changes), SCHEMA)


def test_missing_field():
  with pytest.raises(errors.UserError, match="no field 'block'"):
    config.check_types(ml_collections.ConfigDict({'count': 1}), SCHEMA)
