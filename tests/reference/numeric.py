"""Elementary operations, for real and for complex arrays with a tiny imaginary part."""

import itertools
import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def erf(x):
  if np.iscomplexobj(x):
    slope = 2 / math.sqrt(math.pi) * np.exp(-(x.real**2))
    return _erf(x.real) + 1j * x.imag * slope
  return _erf(x)


def gelu(x, kind):
  if kind == 'erf':
    return x * (1 + erf(x / math.sqrt(2))) / 2
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2


def gelu_erf(x):
  return gelu(x, 'erf')


def sigmoid(x):
  return (1 + np.tanh(x / 2)) / 2


def quick_gelu(x):
  return x * sigmoid(1.702 * x)


def relu(x):
  return np.where(x.real > 0, x, 0)


def clip(x, low, high):
  return np.where(x.real < low, low, np.where(x.real > high, high, x))


def length(x, axis):
  """L2 norm, without the conjugate of `np.linalg.norm`."""
  return np.sqrt((x * x).sum(axis=axis, keepdims=True))


def detached(x):
  """The value without its derivative."""
  return x.real


def layer_norm(x, scale, bias, eps):
  x = x - x.mean(axis=-1, keepdims=True)
  return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale + bias


def softmax(x):
  x = np.exp(x - x.real.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def attend(q, k, v, heads):
  """softmax(q k^T / sqrt(d / heads)) v for each head, q [b n d], k and v [b m d]."""

  def split(x):
    return x.reshape(len(x), x.shape[1], heads, -1).transpose(0, 2, 1, 3)

  q, k, v = split(q), split(k), split(v)
  y = softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])) @ v
  return y.transpose(0, 2, 1, 3).reshape(len(q), q.shape[2], -1)


def repeat(x, size):
  """A parameter [n d] or [1 n d], the same for every image: [size n d]."""
  return np.repeat(x.reshape(1, *x.shape[-2:]), size, axis=0)


def convolve(x, kernel, stride=1, padding=None):
  """Cross-correlation of [b *space c] with [*window c e], zero padded.

  `padding` is (before, after) on every axis; without it, half the window on both sides, the
  shorter half first.
  """
  window, space = kernel.shape[:-2], x.shape[1:-1]
  pads = [padding or ((size - 1) // 2, size // 2) for size in window]
  x = np.pad(x, [(0, 0), *pads, (0, 0)])
  out = [
    (n + sum(pad) - size) // stride + 1 for n, pad, size in zip(space, pads, window, strict=True)
  ]
  y = 0
  for tap in itertools.product(*map(range, window)):
    at = tuple(
      slice(start, start + stride * (n - 1) + 1, stride) for start, n in zip(tap, out, strict=True)
    )
    y = y + x[(slice(None), *at)] @ kernel[tap]
  return y


def depthwise(x, kernel, padding=None):
  """As `convolve`, each channel by itself: kernel [*window c]."""
  return convolve(x, kernel[..., None, :] * np.eye(kernel.shape[-1]), padding=padding)


def resize(x, height, width):
  """Bilinear resize of [b h w c], sampled at half-pixel centres, edges repeated."""

  def matrix(n, m):
    weights = np.zeros((m, n))
    for i in range(m):
      at = min(max((i + 0.5) * n / m - 0.5, 0), n - 1)
      low = int(at)
      high = min(low + 1, n - 1)
      weights[i, low] += 1 - (at - low)
      weights[i, high] += at - low
    return weights

  return np.einsum('ah,bw,nhwc->nabc', matrix(x.shape[1], height), matrix(x.shape[2], width), x)
