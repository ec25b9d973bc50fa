"""The largest batch that fits into a device's memory, from few compilations."""

from collections.abc import Callable

# Beyond this nobody wants to know.
MOST = 65_536
_TRIES = 4
_NEAR = 0.03


def largest(
  total: Callable[[int], int], size: int, bytes_of_it: int, unit: int, capacity: int
) -> tuple[int, int]:
  """Searches along the line through two batch sizes, and checks.

  Memory grows about linearly with the batch, but not exactly: compilers trade memory for work where
  it becomes short. So the last word is that of a step that was planned, not of the line.

  Args:
    total: batch size -> bytes of its step; called at most four times.
    size: a batch size, a multiple of `unit`.
    bytes_of_it: what `total` gives for it.
    unit: batch sizes are multiples of it.
    capacity: bytes of the device.

  Returns:
    The largest batch size found to fit (0 if none does, `MOST` or little less if that fits), within
    3 % of the largest that does, or in four tries as near as they came; and its bytes.
  """
  known = {size: bytes_of_it}
  guess = 2 * size if bytes_of_it <= capacity else size // 2
  for _ in range(_TRIES):
    low = max((n for n, b in known.items() if b <= capacity), default=0)
    high = min((n for n, b in known.items() if b > capacity), default=MOST + unit)
    guess = min(guess, high - 1) // unit * unit
    if guess <= (1 + _NEAR) * low or high - low <= max(unit, _NEAR * low):
      if low or high <= unit:
        break
      guess = unit
    known[guess] = total(guess)
    guess = _on_line(known, capacity)
  fits = [n for n, b in known.items() if b <= capacity]
  return (max(fits), known[max(fits)]) if fits else (0, 0)


def _on_line(known: dict[int, int], capacity: int) -> int:
  """Where a line meets the limit: through its two neighbours, or else through the nearest two."""
  points = sorted(known.items(), key=lambda point: abs(point[1] - capacity))
  low = max((point for point in points if point[1] <= capacity), default=points[1])
  high = min((point for point in points if point[1] > capacity), default=points[1])
  if low == high:  # All are on one side.
    low = points[0]
  if low[1] == high[1]:
    return MOST
  return int(low[0] + (capacity - low[1]) * (high[0] - low[0]) / (high[1] - low[1]))
