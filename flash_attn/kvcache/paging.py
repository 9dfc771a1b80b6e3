"""Which pages are free: the bookkeeping of a paged KV cache, in plain integers on the host."""

from flash_attn.errors import FlashAttnError


class CacheFullError(FlashAttnError):
    """There are not enough free pages left; the message says how many are needed, free and there at all."""


class PagePool:
    """Numbers of pages handed out and taken back, the last one freed first (it may still be in a cache)."""

    def __init__(self, pages: int):
        self.pages = 0
        self._free: list[int] = []
        self._used: set[int] = set()
        self.grow(pages)

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    def grow(self, pages: int) -> None:
        """Have `pages` pages in all; never fewer than before."""
        new = range(self.pages, pages)
        self._free[:0] = reversed(new)
        self.pages = max(self.pages, pages)

    def take(self, count: int) -> list[int]:
        """`count` pages.

        Raises:
            CacheFullError: fewer are free; none is taken then.
        """
        if count > self.free:
            raise CacheFullError(
                f"the KV cache is full: {count} more pages needed, {self.free} of {self.pages} are free"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Free `pages`, which must have been taken."""
        for page in pages:
            if page not in self._used:
                raise FlashAttnError(f"page {page} is not in use, so it cannot be freed")
            self._used.remove(page)
            self._free.append(page)
