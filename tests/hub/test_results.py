"""results.json beside an adapter: what lies there is of one evaluation."""

import json

from peft_longlora.hub.results import copy_results, read_results

ROW = {"task": "perplexity", "dataset": "books", "metric": "perplexity", "value": 9.5}


def test_plots_of_an_earlier_evaluation_do_not_stay_beside_the_results_of_a_later_one(tmp_path):
    """A card shows every plot in its folder; pictures of somebody's own stay."""
    source, folder = tmp_path / "out", tmp_path / "adapter"
    for place, names in (source, ["perplexity_documents.png"]), (folder, ["passkey.png", "mine.png", "results.json"]):
        place.mkdir()
        for name in names:
            (place / name).write_bytes(b"old")
    (source / "results.json").write_text(json.dumps({"results": [ROW]}))
    copy_results(source, folder)
    rows, plots = read_results(folder)
    assert [row.value for row in rows] == [9.5] and plots == ["mine.png", "perplexity_documents.png"]
    assert sorted(path.name for path in folder.iterdir()) == ["mine.png", "perplexity_documents.png", "results.json"]


def test_results_that_lie_beside_the_adapter_already_keep_their_plots(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"results": [ROW]}))
    (tmp_path / "passkey.png").write_bytes(b"")
    copy_results(tmp_path, tmp_path)
    assert read_results(tmp_path)[1] == ["passkey.png"]
