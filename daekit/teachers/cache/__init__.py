"""What a frozen teacher says about fixed rows, kept on disk: written once, read in every epoch. See docs/caches.md."""
