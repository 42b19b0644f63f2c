"""What each command does, apart from reading its arguments. Nothing here is for other code to use."""

__all__: list[str] = []
