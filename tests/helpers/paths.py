"""Where the repository has what tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EMBEDDED = EXAMPLES / "assets" / "stdlib-llama-512"  # a small trained model with its tokenizer
REAL_DATA = ROOT.parent / "shared" / "data"  # real books and records, not in the repository
