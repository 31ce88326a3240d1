"""How one candidate is trained with Lightning."""
