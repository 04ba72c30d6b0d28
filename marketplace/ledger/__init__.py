"""The book: who has what, and why.  See README.md for its promises and the chart of accounts."""
