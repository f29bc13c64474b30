"""Second derivatives of a task's loss: products for a block, and what they are worth."""
