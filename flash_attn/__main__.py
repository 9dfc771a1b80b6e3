"""`python -m flash_attn` is the `flash-attn` command."""

from flash_attn.cli.__main__ import main

main()
