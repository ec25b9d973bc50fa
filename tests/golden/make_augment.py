"""Writes augment.npz: RandAugment's operations and colour jitter as torchvision computes them.

On Pillow images, with torchvision's defaults: nearest neighbour, black outside. Nothing here
imports losa_scenic.

To write the file anew, in the environment of make_backbones.py with pillow==13.0.0:

  python tests/golden/make_augment.py

Arrays in the file, uint8 [h w 3]:
  <image>                         what goes in
  <image>/<operation>/<level>     RandAugment at magnitude 30 |level| of 0..30, negated if level < 0
  <image>/jitter_<name>/<factor>  adjust_brightness, adjust_contrast, adjust_saturation
"""

import pathlib

import make_backbones  # noqa: F401  (imports torchvision in a way that works)

import numpy as np  # isort: skip
from PIL import Image
from torchvision.transforms import InterpolationMode, autoaugment, functional

OUT = pathlib.Path(__file__).parent / 'augment.npz'
BINS = 31
STEPS = (9, 27)
FACTORS = (0.0, 0.6, 1.35)
NAMES = {
  'Identity': 'identity',
  'AutoContrast': 'autocontrast',
  'Equalize': 'equalize',
  'Rotate': 'rotate',
  'Solarize': 'solarize',
  'Color': 'color',
  'Posterize': 'posterize',
  'Contrast': 'contrast',
  'Brightness': 'brightness',
  'Sharpness': 'sharpness',
  'ShearX': 'shear_x',
  'ShearY': 'shear_y',
  'TranslateX': 'translate_x',
  'TranslateY': 'translate_y',
}
JITTERS = {
  'brightness': functional.adjust_brightness,
  'contrast': functional.adjust_contrast,
  'saturation': functional.adjust_saturation,
}


def images():
  """A smooth one with noise and full channels, and one of few values, constant in one channel."""
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:33, :28] / 30
  waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(9 * x * y + 1)]
  smooth = 130 + 110 * np.stack(waves, -1) + rng.integers(-2, 3, (33, 28, 3))
  few = np.stack(
    [rng.integers(60, 66, (15, 18)), np.full((15, 18), 90), rng.choice([10, 200], (15, 18))], -1
  )
  return {'smooth': np.clip(smooth, 0, 255).astype(np.uint8), 'few': few.astype(np.uint8)}


def main():
  arrays = {}
  for name, array in images().items():
    arrays[name] = array
    image = Image.fromarray(array)
    space = autoaugment.RandAugment()._augmentation_space(BINS, array.shape[:2])
    assert set(space) == set(NAMES)
    for operation, (magnitudes, signed) in space.items():
      for step in STEPS if magnitudes.ndim else STEPS[-1:]:
        strength = float(magnitudes[step]) if magnitudes.ndim else 0.0
        for sign in (1, -1) if signed else (1,):
          result = autoaugment._apply_op(
            image, operation, sign * strength, InterpolationMode.NEAREST, None
          )
          key = f'{name}/{NAMES[operation]}/{sign * step / (BINS - 1)}'
          arrays[key] = np.asarray(result)
    for jitter, function in JITTERS.items():
      for factor in FACTORS:
        arrays[f'{name}/jitter_{jitter}/{factor}'] = np.asarray(function(image, factor))
  np.savez_compressed(OUT, **arrays)
  print(f'{OUT.name}: {len(arrays)} arrays, {OUT.stat().st_size} bytes')


if __name__ == '__main__':
  main()
