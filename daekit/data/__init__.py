"""Rows of the data: loading them (sources, rows), mixing them (mixture), telling them apart (fingerprint), tokenizers,
preparation and collation that keep each row's domain, and the embedded corpora (builtin)."""
