"""What a quantised backbone costs in accuracy: linear probing and LoSA on nine image packs.

  python -m losa_scenic.sweep --config=projects/losa/quantisation.py:DIR --workdir=WORK
  python -m losa_scenic.bench_lib.tables WORK/results.jsonl --value=test_accuracy --scale=100 \
      --rows=dataset --columns=backbone_quantisation --where=method=losa --reference=None

DIR holds the packs named in `packs.PACKS`; the recipes are those of packs.py. Two methods with
three seeds each are a population: one pass of the backbone is for all six, and the order of the
images is the same in all.
"""

from types import SimpleNamespace
from typing import Any

from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config

packs = config_lib.load_file(__file__, 'packs.py')

KINDS = ('int8', 'w8a8')  # Beside floats.


def get_config(directory: str = '.') -> Config:
  """One run: both methods on the first pack."""
  config = packs.get_config(directory)
  seeds = '|'.join(map(str, packs.SEEDS))
  config.population = (
    f'method=linear rng_seed={seeds}; '
    f'method=losa optimizer_configs.weight_decay=5.0 rng_seed={seeds}'
  )
  config.log_eval_steps = 100_000
  config.checkpoint = False
  return config


def get_hyper(hyper: SimpleNamespace, directory: str = '.') -> list[dict[str, Any]]:
  """Packs x kinds."""
  return hyper.product(
    [
      packs.packs(hyper, directory, tuple(packs.PACKS)),
      [{}, *hyper.sweep('config.backbone_quantisation', KINDS)],
    ]
  )
