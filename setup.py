"""Metadata. No downloads at install, and no TensorFlow: data sources that need it are an extra."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(r"__version__ = '(.+)'", (_ROOT / 'losa_scenic/__init__.py').read_text())[1]

setuptools.setup(
  name='losa_scenic',
  version=_VERSION,
  description='LoSA: time-, memory- and parameter-efficient visual adaptation, in JAX and Flax',
  long_description=(_ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  # Without this, configs/, projects/ and tests/ would install as top-level modules.
  packages=setuptools.find_packages(include=['losa_scenic', 'losa_scenic.*']),
  package_data={'losa_scenic.pretrained': ['*.safetensors', '*.json', '*.md']},
  install_requires=[
    'absl-py',
    'flax>=0.12',
    'grain>=0.2.12',
    'jax>=0.10,<0.12',
    'jaxtyping',
    'ml_collections>=1.0',
    'numpy',
    'opencv-python-headless',
    'optax>=0.2.5',
    'pillow>=10.1',
    'safetensors',
    'scikit-learn',
    'tensorboard>=2.20',
    'tensorboardX>=2.6',
    'tqdm',
  ],
  extras_require={
    'hf': ['datasets>=4'],
    'video': ['av>=14'],
    'tfds': ['array_record', 'tensorflow-datasets>=4.9.9'],
    'tf': ['tensorflow-cpu', 'tensorflow-datasets>=4.9.9'],
    'gpu': ['jax[cuda12]>=0.10,<0.12'],
    # The CUDA plugin compiles for GPUs that are not there: `python -m losa_scenic.plan`.
    'plan': ['jax[cuda12]>=0.10,<0.12'],
    'tpu': ['jax[tpu]>=0.10,<0.12'],
    'dev': [
      'array_record',
      'av>=14',
      'beartype',
      'datasets>=4',
      'hypothesis',
      'psutil',
      'pyright',
      'pytest',
      'pytest-xdist',
      'ruff',
      'tensorflow-datasets>=4.9.9',
    ],
  },
)
