"""Nothing but the reader of TFRecord needs TensorFlow, whatever else is installed."""

import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# TensorFlow is not there, whether it is installed or not. The tests of the sets that might have
# used it are run, and everything else is imported.
PROGRAM = """
import functools, importlib, importlib.machinery, pkgutil, sys


find = importlib.machinery.PathFinder.find_spec


def find_others(name, path=None, target=None):
  return None if name.partition('.')[0] == 'tensorflow' else find(name, path, target)


# Partial: pytest keeps it as an attribute of a class, where a function would become a method.
importlib.machinery.PathFinder.find_spec = functools.partial(find_others)
import pytest

status = pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *sys.argv[1:]])
import losa_scenic

for module in pkgutil.walk_packages(losa_scenic.__path__, 'losa_scenic.'):
  importlib.import_module(module.name)
assert 'tensorflow' not in sys.modules
sys.exit(status)
"""


def test_all_modules_and_the_sets_of_libraries():
  for package in ('tensorflow_datasets', 'datasets'):
    pytest.importorskip(package, reason=f'{package} is not installed')
  tests = ['test_tfds_sets.py', 'test_tfds_video.py', 'test_vtab_tfds.py', 'test_hugging_face.py']
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, *(str(HERE / name) for name in tests)],
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
  assert ' passed' in done.stdout
