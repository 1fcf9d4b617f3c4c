"""Records that show themselves as tables: in a notebook cell, and as pandas data frames."""

import html

import pandas as pd


class Framed:
    """A record with a short `repr`, a table (`to_pandas`), and both in a notebook cell."""

    def to_pandas(self) -> pd.DataFrame:
        """The record as a table, one row a thing."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        shown = table.to_html(max_rows=12, index=False, border=0, na_rep="", float_format=lambda value: f"{value:.4g}")
        return f"<p><code>{html.escape(repr(self))}</code></p>{shown}"
