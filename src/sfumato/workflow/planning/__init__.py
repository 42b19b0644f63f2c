"""What a recipe would do and cost, said before it is done."""
