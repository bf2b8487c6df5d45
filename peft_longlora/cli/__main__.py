"""`python -m peft_longlora.cli`."""

import sys

from .main import main

sys.exit(main())
