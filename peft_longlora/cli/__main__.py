"""`python -m peft_longlora.cli`."""

import sys

from peft_longlora.cli.main import main

sys.exit(main())
