"""Run in a fresh process: load each folder, compare its outputs with those kept beside it, bit for bit, and save it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def main(root: Path) -> None:
    import transformers

    import leanformers
    from families import inputs, outputs
    from leanformers.surgery import ledger

    assert leanformers.__version__
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import torch

    failures = {}
    for case in sorted(root.iterdir()):
        about = json.loads((case / "about.json").read_text())
        try:
            model = getattr(transformers, about["class"]).from_pretrained(case / "model").eval()
            expected = torch.load(case / "expected.pt", weights_only=True)
            found = outputs(model, inputs(model, padded=True))
            if not torch.equal(found, expected):
                failures[case.name] = f"outputs differ by {(found - expected).abs().max().item():.2e}"
            elif sorted(model.state_dict()) != about["names"]:
                failures[case.name] = "the names differ"
            elif [edit.to_json() for edit in ledger(model)] != about["ledger"]:
                failures[case.name] = "the ledger differs"
            else:
                model.save_pretrained(case / "again")
                first, second = files(case / "model"), files(case / "again")
                if differing := [name for name in {**first, **second} if first.get(name) != second.get(name)]:
                    failures[case.name] = f"a second save writes other bytes into {', '.join(differing)}"
        except Exception as error:
            failures[case.name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failures))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(Path(sys.argv[1]))
