"""Killed at any moment and started again, a run logs and ends as if nothing had happened."""

import pytest
from faults import campaign


def test_a_few_kills_change_nothing(tmp_path):
  made = campaign.run(tmp_path, kills=3, seed=3)
  assert sum(made.ends.values()) == 3 and len(made.ends) > 1


@pytest.mark.slow
def test_forty_kills_change_nothing(tmp_path):
  assert campaign.run(tmp_path, kills=40, seed=1).in_saves >= 3


@pytest.mark.slow
def test_results_do_not_depend_on_the_compilation_cache(tmp_path):
  made = campaign.Campaign(
    tmp_path, steps=20, seed=0, environment={'JAX_ENABLE_COMPILATION_CACHE': '0'}
  )
  made.finish('whole')
  made.environment['JAX_ENABLE_COMPILATION_CACHE'] = '1'
  for name in ('broken', 'again'):  # One fills the cache, the other reads it.
    made.finish(name)
    made.names = ('whole', name)
    assert made.rows('whole') == made.rows(name)
    assert made.different_arrays('last') == []
