"""Sizes of the splits of the TFDS sets that VTAB-1K is made of."""

SPLIT_SIZES = {
  'cifar100': {'train': 50_000, 'test': 10_000},
  'caltech101': {'train': 3_060, 'test': 6_084},
  'dtd': {'train': 1_880, 'validation': 1_880, 'test': 1_880},
  'oxford_flowers102': {'train': 1_020, 'validation': 1_020, 'test': 6_149},
  'oxford_iiit_pet': {'train': 3_680, 'test': 3_669},
  'svhn_cropped': {'train': 73_257, 'test': 26_032, 'extra': 531_131},
  'sun397/tfds': {'train': 76_128, 'validation': 10_875, 'test': 21_750},
  'patch_camelyon': {'train': 262_144, 'validation': 32_768, 'test': 32_768},
  'eurosat/rgb': {'train': 27_000},
  'resisc45': {'train': 31_500},
  'diabetic_retinopathy_detection/btgraham-300': {
    'train': 35_126,
    'validation': 10_906,
    'test': 42_670,
  },
  'clevr': {'train': 70_000, 'validation': 15_000, 'test': 15_000},
  'dmlab': {'train': 65_550, 'validation': 22_628, 'test': 22_735},
  'kitti': {'train': 6_347, 'validation': 423, 'test': 711},
  'dsprites': {'train': 737_280},
  'smallnorb': {'train': 24_300, 'test': 24_300},
}
