"""Where a run may write: never among its own data, nor over its base."""

from __future__ import annotations

from pathlib import Path

from peft_longlora.data.folders import walk
from peft_longlora.hub.writing import file_in_the_way, why_unwritable
from peft_longlora.training.recipe import Recipe


def check_places(recipe: Recipe) -> None:
    """Refuse an output folder that holds data, lies among data, or is the base's: it would be read as data later on.

    Raises: ValueError.
    """
    options, given = recipe.run, str(recipe.output_dir)
    output = recipe.output_dir.resolve()
    for key, names in (("data", options.data), ("eval_data", options.eval_data or ())):
        for folder in filter(Path.is_dir, map(Path, names)):
            place = folder.resolve()
            if output == place:
                where = "is"
            elif place in output.parents or _is_linked(folder, output):
                where = "lies in"
            elif output in place.parents:
                where = "holds"
            else:
                continue
            raise ValueError(
                f"output_dir={given!r} {where} the folder {str(folder)!r} of {key}: what a run writes would be read as "
                f"data. Give an output_dir beside it."
            )
    for key, name in (("model", options.model), ("tokenizer", options.tokenizer)):
        if name and Path(name).is_dir() and Path(name).resolve() == output:
            raise ValueError(
                f"output_dir={given!r} is the folder of {key}: the adapter would be written over it. Give another "
                f"output_dir."
            )
    # `open_output` refuses a file in the way.
    if file_in_the_way(output) is None and (reason := why_unwritable(output)):
        raise ValueError(
            f"output_dir={str(output)!r} cannot be written ({reason}). Give an output_dir that you may write to."
        )


def _is_linked(folder: Path, output: Path) -> bool:
    """Whether a link in a folder of data leads to the output, or to a folder around it."""
    found, _ = walk(folder)
    linked = {place for path in found if path.parent != folder for place in path.parents if place.is_symlink()}
    real = {link.resolve() for link in linked if folder in link.parents}
    return bool(real & {output, *output.parents})
