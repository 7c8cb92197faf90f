"""The name under which the documents call chat_sft: `python -m scripts.sft_train` is `python -m scripts.chat_sft`."""

from __future__ import annotations

from nanochat.config import cli
from scripts.chat_sft import Config, main

if __name__ == "__main__":
    main(cli(Config))
