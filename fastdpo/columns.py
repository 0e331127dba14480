"""The columns of a pair: its token ids, and what a reference may have made of them."""

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # ints, a list or an array
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
