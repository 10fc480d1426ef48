"""`python -m megatron_lite COMMAND`, which is also how torchrun starts a command on several processes."""

import sys

from megatron_lite.commands import main

if __name__ == "__main__":
    sys.exit(main())
