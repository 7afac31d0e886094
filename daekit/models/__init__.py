"""Models: loading them, their hidden states and output head, their tokenizers compared, their weights identified."""
