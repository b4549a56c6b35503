"""Names of the files and sheets of Stage II's figures; in a module of their own, because their readers load no torch."""

EVAL_SHEET, EVAL_FILE = "eval.png", "eval.parquet"
DETAIL_SHEET = "eval_details.png"  # zoomed details of Stage II on held-out pictures
SPOILT_SHEETS = ("eval_spoilt.png", "eval_spoilt_details.png")  # both, with degraded low-res pictures
