"""Writes tf_resize.npz: images as `tf.image.resize` resizes them, bilinear and not antialiased.

Nothing here imports losa_scenic. To write the file anew, in an environment of its own:

  pip install tensorflow-cpu==2.21.0 numpy==2.4.6
  python tests/golden/make_tf_resize.py

Arrays in the file:

  <h>x<w>         uint8 [h w 3], what goes in
  <h>x<w>/<side>  float32 [side side 3], not rounded
"""

import pathlib

import numpy as np
import tensorflow as tf

OUT = pathlib.Path(__file__).parent / 'tf_resize.npz'
# Larger, smaller, both at once, by whole factors and by others, from one pixel.
SIZES = {(5, 7): (3, 9, 14), (16, 12): (4, 11, 24), (30, 9): (16,), (1, 1): (3,), (2, 40): (8,)}


def main() -> None:
  """Writes the file next to this script."""
  rng, arrays = np.random.default_rng(0), {}
  for (height, width), sides in SIZES.items():
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    arrays[f'{height}x{width}'] = image
    for side in sides:
      resized = tf.image.resize(image, (side, side), method='bilinear', antialias=False)
      arrays[f'{height}x{width}/{side}'] = resized.numpy()
  np.savez_compressed(OUT, **arrays)
  print(f'{OUT.name}: {len(arrays)} arrays, {OUT.stat().st_size} bytes')


if __name__ == '__main__':
  main()
