"""`python -m peft_longlora`: the command `longlora`."""

import sys

from peft_longlora.cli.main import main

sys.exit(main())
