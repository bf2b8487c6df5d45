"""The console script `longlora`: reads the command line before anything slow is imported.

Python runs the `__init__` of a package before any of its modules. The `__init__` of peft_longlora imports torch and
peft, which takes seconds, too long for `--help`. The files of peft_longlora/cli import neither before a command runs,
so this script loads them as a package of their own. `python -m peft_longlora` runs the same files in the usual way.
"""

import sys
from importlib import import_module, util
from pathlib import Path

NAME = "longlora_cli"


def main() -> int:
    """Run `longlora`; returns the exit code."""
    folder = Path(util.find_spec("peft_longlora").origin).parent / "cli"
    spec = util.spec_from_file_location(NAME, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[NAME] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
    return import_module(f"{NAME}.main").main()


if __name__ == "__main__":
    sys.exit(main())
