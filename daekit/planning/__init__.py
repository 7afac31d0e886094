"""What a recipe needs before it runs: memory by part, what fits, operations of a step. No weights are loaded."""
