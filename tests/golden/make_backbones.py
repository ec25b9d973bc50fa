"""Writes backbones/: small checkpoints of public ViT families and what their libraries compute.

Every family whose checkpoints can be loaded has a case: a model with few and oddly many channels
and random values in all parameters, saved as the library saves for the hub or with the key names of
the project that trained it, and the output of every block for two images. Nothing here imports
losa_scenic: whoever changes the loading does not change what it is compared with.

To write the files anew (all, or the cases whose names contain one of the words given), in an
environment of its own:

  pip install torch==2.13.0 torchvision timm==1.0.31 transformers==5.23.0 open_clip_torch==3.3.0
  python tests/golden/make_backbones.py [word ...]

The cases are in backbone_timm.py, backbone_transformers.py, backbone_originals.py,
backbone_remote.py and backbone_more.py; backbones/README.md says what each file holds.
"""

import sys

import torch


def _import_torchvision():
  """torchvision for another build of torch lacks its operators; nothing here uses them."""
  real = torch.library.register_fake

  def register_fake(op, *args, **kwargs):
    if isinstance(op, str) and op.startswith('torchvision::'):
      return lambda function: function
    return real(op, *args, **kwargs)

  torch.library.register_fake = register_fake
  try:
    import torchvision  # noqa: F401
  finally:
    torch.library.register_fake = real


_import_torchvision()  # The libraries import it.

import backbone_common  # noqa: E402
import backbone_more  # noqa: E402
import backbone_originals  # noqa: E402
import backbone_remote  # noqa: E402
import backbone_timm  # noqa: E402
import backbone_transformers  # noqa: E402

MODULES = (
  backbone_timm,
  backbone_transformers,
  backbone_originals,
  backbone_remote,
  backbone_more,
)


def main(words):
  for module in MODULES:
    for name in module.CASES:
      if not words or any(word in name for word in words):
        backbone_common.write(name, module.make)
  backbone_common.write_table()


if __name__ == '__main__':
  main(sys.argv[1:])
